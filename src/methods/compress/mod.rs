//! Pruning and quantisation: smaller weights in the same places.
//!
//! The methods differ in how they choose ([`mask`]) and correct ([`hessian`]) weights; the ways through
//! the model ([`alone`], [`calibrated`]), the layouts that come out ([`store`]) and the accounts
//! ([`report`]) are shared.

mod across;
pub mod awq;
mod blockwise;
pub mod cfsp;
pub mod coarse_fine;
mod cost;
pub mod dgq;
mod dgq_search;
pub mod dsnot;
pub mod ecoflap;
pub mod ffn_walk;
pub mod flap;
mod folding;
pub mod gptq;
pub mod grid;
pub mod group_sparse;
mod group_units;
pub mod hessian;
pub mod ig_lora;
pub mod keep_budget;
pub mod low_rank;
pub mod lrec;
pub mod mag_sp;
pub mod magnitude;
pub mod mask;
mod named_choice;
pub mod normal_float;
mod options;
pub mod random_pruning;
pub mod regrow;
mod report;
pub mod round_to_nearest;
pub mod slimming;
pub mod sparsegpt;
pub mod sparsity;
mod store;
mod two_tower;
mod two_tower_scores;
pub mod wanda;
pub mod wanda_sp;
mod windows_of;
pub mod zeroth;

use std::collections::BTreeSet;
use std::sync::Arc;

use self::grid::Codes;
use self::mask::Mask;
use self::report::Report;
use self::sparsity::Sparsity;
use super::{Outcome, StepContext};
use crate::calibrate::{self, walk};
use crate::error::{Error, Reason, Result};
use crate::models::Model;
use crate::nn::weight::{GroupedSpec, Weight};
use crate::proto::v1;

/// What a method without text makes of a weight, from its name, its values `[rows, cols]` and its
/// columns.
type ChangeOne<'a> = dyn Fn(&str, &[f32], usize) -> Result<Weight> + 'a;

/// Changes one weight after the other, without text.
fn alone(
    cx: &StepContext<'_>,
    mut model: Model,
    names: &BTreeSet<String>,
    change: &ChangeOne<'_>,
) -> Result<Outcome> {
    let mut report = Report::default();
    for (i, name) in names.iter().enumerate() {
        cx.progress.report(i as f64 / names.len() as f64, name)?;
        let stored = model.weight(name)?;
        let values = stored.to_f32();
        check_finite(name, &values)?;
        let new = change(name, &values, stored.cols())?;
        report.add(name, &values, &new, None);
        model.weights.insert(name.clone(), Arc::new(new));
    }
    cx.progress.report(1.0, "all weights done")?;
    Ok(report.outcome(model, 0))
}

/// What a calibrated method does with the weights that share an input.
type Change<'a> = dyn FnMut(&walk::Site<'_>, &mut Report) -> Result<Vec<Weight>> + 'a;

/// Walks calibration text through the model and changes the weights of each block on the way.
fn calibrated(
    cx: &StepContext<'_>,
    mut model: Model,
    names: &BTreeSet<String>,
    options: &calibrate::Options,
    gram: bool,
    change: &mut Change<'_>,
) -> Result<Outcome> {
    let sources = calibrate::Sources {
        model: &model,
        texts: cx.texts,
        stream: &cx.random.child("calibration"),
        progress: cx.progress,
    };
    let windows = cx.calibrations.windows(options, cx.digest, &sources)?;
    let mut report = Report::default();
    windows.warnings.iter().for_each(|w| report.warn(w.clone()));
    let plan = walk::Plan { windows: &windows, names, gram, progress: cx.progress };
    walk::walk_model(&mut model, &plan, &mut |site| {
        for (name, values) in site.names.iter().zip(&site.dense) {
            check_finite(name, values)?;
        }
        let changed = change(&site, &mut report)?;
        for ((name, before), after) in site.names.iter().zip(&site.dense).zip(&changed) {
            report.add(name, before, after, site.inputs.gram());
        }
        Ok(changed)
    })?;
    Ok(report.outcome(model, options.tokens()))
}

/// Whether what calibration sees depends on random numbers; options that are wrong are refused later.
fn seeded(calibration: Option<&v1::Calibration>) -> bool {
    calibrate::Options::read(calibration).is_ok_and(|options| options.seeded())
}

/// The stored form of `[rows, cols]` values without their pruned elements.
fn prune_each(
    name: &str,
    values: &[f32],
    cols: usize,
    mask: &Mask,
    sparsity: &Sparsity,
) -> Result<Weight> {
    let mut kept = values.to_vec();
    mask.apply(&mut kept);
    let shape = [values.len() / cols, cols];
    store::pruned(name, shape, &kept, sparsity.values, sparsity.amount.hint())
}

/// The stored form of codes.
fn quantise_each(
    before: &Weight,
    cols: usize,
    spec: GroupedSpec,
    codes: &Codes,
    pruned: &Mask,
) -> Result<Weight> {
    store::quantised(before, [codes.codes.len() / cols, cols], spec, codes, pruned)
}

fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    if values.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(Error::new(
        Reason::NonFinite,
        format!("'{name}' holds numbers that are not finite; the model is broken, import it again"),
    ))
}

#[cfg(test)]
mod testing {
    //! Matrices for the methods' tests, and a way to run a method.

    use rand::Rng;

    use crate::calibrate::{self, gram::Gram};
    use crate::error::{Error, Result};
    use crate::methods::{Method, Outcome, StepContext};
    use crate::models::Model;
    use crate::progress::Progress;
    use crate::seed::Stream;

    /// Checks a method against a model and applies it to a copy; there are no data sets.
    pub fn apply(method: &dyn Method, model: &Model) -> Result<Outcome> {
        let scratch = tempfile::tempdir()?;
        let no_texts = |name: &str| Err(Error::not_found(name, "there are no data sets here"));
        method.check(&model.info())?;
        let mut cx = StepContext {
            random: Stream::root(5).child("step 0"),
            progress: &Progress::silent(),
            texts: &no_texts,
            calibrations: &calibrate::Shared::default(),
            digest: "a tiny model",
            scratch: scratch.path().to_owned(),
        };
        method.apply(&mut cx, model.clone())
    }

    /// Weights `[rows, cols]` that are roughly normal.
    pub fn weights(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
        let mut rng = Stream::root(seed).rng();
        let mut normal = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
        (0..rows * cols).map(|_| normal()).collect()
    }

    /// Gram matrix of correlated inputs whose scales differ by a factor of 10 and more.
    pub fn correlated(cols: usize, seed: u64) -> Gram {
        let tokens = 4 * cols;
        let base = weights(tokens, cols, seed ^ 0xabcd);
        let mut rows = vec![0.0; tokens * cols];
        for (row, base) in rows.chunks_mut(cols).zip(base.chunks(cols)) {
            let mut before = 0.0;
            for (j, (x, b)) in row.iter_mut().zip(base).enumerate() {
                before = 0.8 * before + 0.6 * b;
                *x = before * 10f32.powf((j * 7 % cols) as f32 / cols as f32 * 1.5);
            }
        }
        let mut gram = Gram::new(cols);
        gram.add(&rows);
        gram
    }
}
