//! Running a recipe, step by step; who calls this keeps the versions that come out.

use std::path::Path;
use std::sync::Arc;

use crate::calibrate;
use crate::error::Result;
use crate::methods::{AnyOutcome, Datasets, Learning, StepContext, registry};
use crate::models::AnyModel;
use crate::progress::Progress;
use crate::proto::v1;
use crate::seed::Stream;

/// What a step may use of the world.
pub struct Environment<'a> {
    /// Progress of this step and the cancellation.
    pub progress: &'a Progress,
    /// Text data sets by resource name, documents joined.
    pub texts: &'a dyn Fn(&str) -> Result<Arc<String>>,
    /// Calibration windows that the steps of the job share.
    pub calibrations: &'a calibrate::Shared,
    /// An existing folder for temporary files; the step leaves nothing in it.
    pub scratch: &'a Path,
    /// Data sets to learn from.
    pub datasets: &'a dyn Datasets,
    /// A folder of the step's own for checkpoints, which outlives a run that is cut off.
    pub kept: &'a Path,
}

/// What a step made.
pub struct Made {
    /// The step with every default written out, as the lineage keeps it.
    pub step: v1::Step,
    pub outcome: AnyOutcome,
    /// How training and pruning went, where the method trains.
    pub training: Option<v1::TrainingReport>,
    pub pruning: Option<v1::PruningReport>,
}

/// Runs a step on a model, as number `index` (from 0) of its recipe. The result depends on the model (`digest`
/// names its content), the step, its index, the recipe's seed and the number of threads only. Errors
/// point at `steps[i].<method>`.
pub fn run_step(
    step: &v1::Step,
    (seed, index): (u64, usize),
    (model, digest): (AnyModel, &str),
    environment: &Environment<'_>,
) -> Result<Made> {
    let place = format!("steps[{index}]");
    let step = registry::resolve(step);
    let method = registry::method(&step).map_err(|e| e.within(&place))?;
    let place = format!("{place}.{}", method.card().name);
    let run = || {
        method.check_any(&model.info())?;
        let scratch = tempfile::Builder::new().prefix("step-").tempdir_in(environment.scratch)?;
        let mut context = StepContext {
            random: Stream::root(seed).child(&format!("step {index}")),
            progress: environment.progress,
            texts: environment.texts,
            calibrations: environment.calibrations,
            digest,
            scratch: scratch.path().to_owned(),
        };
        let mut learning = Learning::new(environment.datasets, environment.kept.to_owned());
        let outcome = method.apply_any(&mut context, &mut learning, model)?;
        Ok((outcome, learning.training, learning.pruning))
    };
    let (outcome, training, pruning) = run().map_err(|e: crate::error::Error| e.within(&place))?;
    Ok(Made { step, outcome, training, pruning })
}
