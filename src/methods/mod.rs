//! Methods: the published systems that change a model.

pub mod adapt;
pub mod catalogue;
pub mod compress;
pub mod docs;
pub mod registry;
pub mod scope;
pub mod training;

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use crate::calibrate;
use crate::data::images::Images;
use crate::data::records::Source;
use crate::error::{Error, Result};
use crate::models::{AnyInfo, AnyModel, Model, ModelInfo};
use crate::progress::Progress;
use crate::proto::v1;
use crate::seed::Stream;

/// Facts about a method.
#[derive(Debug)]
pub struct Card {
    /// Name in recipes; the field name in the `Step` oneof.
    pub name: &'static str,
    pub title: &'static str,
    pub verb: &'static str,
    pub summary: &'static str,
    /// The paper by name and number.
    pub paper: &'static str,
    pub needs_calibration: bool,
    pub families: &'static [&'static str],
    /// Methods that make sense after this one.
    pub followed_by: &'static [&'static str],
}

/// Expected cost of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    /// Bytes of weights afterwards.
    pub weight_bytes: u64,
    /// Largest resident memory.
    pub memory_bytes: u64,
    pub seconds: f64,
    /// Tokens that run through the model.
    pub calibration_tokens: u64,
}

/// Data sets that are learnt from, by resource name.
pub trait Datasets {
    /// Where the records of a data set are and how they are read.
    fn source(&self, name: &str) -> Result<Source>;
    /// The images of a data set.
    fn images(&self, name: &str) -> Result<Images>;
}

/// There are none.
pub struct NoDatasets;

impl Datasets for NoDatasets {
    fn source(&self, name: &str) -> Result<Source> {
        Err(Error::not_found(name, "there are no data sets here"))
    }

    fn images(&self, name: &str) -> Result<Images> {
        Err(Error::not_found(name, "there are no data sets here"))
    }
}

/// What a method gets to work with.
pub struct StepContext<'a> {
    /// Seeded random numbers; name a stream for each purpose.
    pub random: Stream,
    /// Progress of this step (0 to 1), and the cancellation to poll in every loop.
    pub progress: &'a Progress,
    /// Text data sets by resource name, already read: documents joined.
    pub texts: &'a dyn Fn(&str) -> Result<Arc<String>>,
    /// Calibration windows that the steps of a job share.
    pub calibrations: &'a calibrate::Shared,
    /// Digest of the model that the step starts from.
    pub digest: &'a str,
    /// A folder for temporary files, removed after the step.
    pub scratch: PathBuf,
}

/// What a method that trains gets besides, and what it says of it.
pub struct Learning<'a> {
    /// Data sets to learn from.
    pub datasets: &'a dyn Datasets,
    /// A folder for checkpoints, which outlives a run that is cut off. Who needs it makes it.
    pub kept: PathBuf,
    /// How training and pruning went, where the method trains; the method says.
    pub training: Option<v1::TrainingReport>,
    pub pruning: Option<v1::PruningReport>,
}

impl<'a> Learning<'a> {
    /// With nothing to say yet.
    pub fn new(datasets: &'a dyn Datasets, kept: PathBuf) -> Self {
        Self { datasets, kept, training: None, pruning: None }
    }

    /// Without data sets.
    pub fn none(cx: &StepContext<'_>) -> Self {
        Self::new(&NoDatasets, cx.scratch.join("kept"))
    }
}

/// What a step made of a model of any family.
pub type AnyOutcome = Outcome<AnyModel>;

/// What a step made.
pub struct Outcome<M = Model> {
    pub model: M,
    /// Replayable facts: exact counts, errors by layer, warnings. No times.
    pub record: Value,
    pub calibration_tokens: u64,
    pub zero_share: f64,
    pub warnings: Vec<String>,
}

/// A system that changes a model. The options message of the API is what implements it.
pub trait Method: Send + Sync {
    /// Facts about the method.
    fn card(&self) -> &'static Card;
    /// Writes every default out, so that the options say all that was done.
    fn resolve(&mut self);
    /// Resource names of the data sets that the step reads.
    fn datasets(&self) -> Vec<&str>;
    /// Whether the result depends on random numbers: without, all seeds give the same bytes.
    fn seeded(&self) -> bool;
    /// Refuses bad options early and says what the step costs. Also returns what the model will look
    /// like, so that the next step can be checked against it.
    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)>;
    /// Does the work. Polls `cx.progress` for cancellation; the same input and seed give the same bits.
    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome>;

    /// [`Method::check`] for a model of any family. Methods that do not say otherwise
    /// are for what can be walked.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for families that the method is not for, and what [`Method::check`] refuses.
    fn check_any(&self, model: &AnyInfo) -> Result<(Estimate, AnyInfo)> {
        let (estimate, after) = self.check(&model.walked()?)?;
        Ok((estimate, after.into()))
    }

    /// [`Method::apply`] for a model of any family.
    ///
    /// # Errors
    /// As [`Method::check_any`], and what [`Method::apply`] gives.
    fn apply_any(
        &self,
        cx: &mut StepContext<'_>,
        _learning: &mut Learning<'_>,
        model: AnyModel,
    ) -> Result<AnyOutcome> {
        Ok(self.apply(cx, model.walked()?)?.any())
    }
}

impl Outcome {
    /// The same of a model of any family.
    pub fn any(self) -> AnyOutcome {
        Outcome {
            model: self.model.into(),
            record: self.record,
            calibration_tokens: self.calibration_tokens,
            zero_share: self.zero_share,
            warnings: self.warnings,
        }
    }
}

impl AnyOutcome {
    /// The same of what can be walked.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for what is neither a decoder nor an encoder.
    pub fn walked(self) -> Result<Outcome> {
        Ok(Outcome {
            model: self.model.walked()?,
            record: self.record,
            calibration_tokens: self.calibration_tokens,
            zero_share: self.zero_share,
            warnings: self.warnings,
        })
    }
}
