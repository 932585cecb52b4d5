//! Training under masks that another method makes: fixed ones, or groups of rows that go while the model trains.
//! The masks are those of [`super::pruner`]: what is masked is zero, has no gradient, no moments, no decay.
//! Tensors that an earlier step stored sparse keep their zeros beside fixed masks; growing ones go by one rule for
//! all that is masked, so there such tensors are refused.

use std::collections::BTreeMap;

use super::masks::{Pattern, Pool};
use super::pruner::{Pruner, Rule};
use super::run::{self, Ended};
use super::schedule::Schedule;
use crate::error::{Error, Reason, Result};
use crate::methods::{Estimate, Learning, StepContext};
use crate::models::{AnyInfo, AnyModel, TensorInfo};
use crate::nn::weight::{Record, SparsePattern};
use crate::proto::v1;
use crate::train::settings::{self, Settings};
use crate::train::tensors;

/// Fine-tuning goes at a tenth of the rate of training.
const RATE: f64 = run::RATE / 10.0;

/// Which elements are masked.
pub enum Masks {
    /// These, by name with the columns of the matrix; true where an element is zero.
    Fixed(Vec<(String, usize, Vec<bool>)>),
    /// In the end this share of the units of each matrix, by name with its shape; a unit is a column of `rows`
    /// consecutive rows, which divide the matrix.
    Growing { share: f64, rows: usize, matrices: Vec<(String, [usize; 2])> },
}

/// Writes every default out.
pub fn resolve(training: &mut v1::Training) {
    settings::resolve(training, RATE);
    // The best weights on the way are those that were pruned least.
    training.validation.get_or_insert_default().keep_last = true;
}

/// Reads the options of a training and checks them against a model.
///
/// # Errors
/// As of other trainings; averages of weights and early ends are refused, which would break the masks.
pub fn check(training: &v1::Training, model: &AnyInfo) -> Result<Settings> {
    let mut training = training.clone();
    resolve(&mut training);
    let settings = run::check(Some(&training), model)?;
    let refuse = |field: &str, why: &str| Error::option(format!("training.{field}"), why);
    if settings.ema_decay.is_some() {
        let why = "an average holds pruned weights that are not zero; leave it out";
        return Err(refuse("ema_decay", why));
    }
    if settings.patience.is_some() {
        let why = "an early end would leave the share of zeros unmet; leave it out";
        return Err(refuse("validation.patience", why));
    }
    Ok(Settings { keep_last: true, ..settings })
}

/// Refuses a model with a tensor that is stored sparse and stands outside of growing masks, which would fill its
/// zeros.
///
/// # Errors
/// `MODEL_UNSUITABLE`, blaming `field`.
pub fn check_growing(field: &str, masked: impl Fn(&str) -> bool, model: &AnyInfo) -> Result<()> {
    let sparse = |(name, tensor): &(&String, &TensorInfo)| {
        matches!(tensor.record, Record::Sparse { .. }) && !masked(name)
    };
    match model.tensors.iter().find(sparse) {
        None => Ok(()),
        Some((name, _)) => Err(Error::at(
            Reason::ModelUnsuitable,
            field,
            format!(
                "an earlier step pruned '{name}', which is left alone here, and gradual pruning would fill its \
                 zeros; prune at once, or prune '{name}' here too"
            ),
        )),
    }
}

/// What such a training costs; `bytes` are those of the weights afterwards.
pub fn estimate(settings: &Settings, model: &AnyInfo, bytes: u64) -> Estimate {
    run::estimate(settings, model, bytes)
}

/// What came out of a training.
pub struct Trained {
    /// Weights that are not masked are in the number formats they had; masked ones may be sparse.
    pub model: AnyModel,
    pub report: v1::TrainingReport,
    pub warnings: Vec<String>,
    ended: Ended,
}

impl Trained {
    /// The values of a tensor as they were trained, in f32.
    ///
    /// # Errors
    /// INTERNAL for a tensor that there is not.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let parameter = self.ended.parameters.get(name);
        let parameter =
            parameter.ok_or_else(|| Error::internal(format!("'{name}' was not trained")))?;
        tensors::read(&parameter.var, <[f32]>::to_vec)
    }

    /// The mask of a tensor: true where it is zero.
    pub fn mask(&self, name: &str) -> Option<&[bool]> {
        self.ended.pruner.as_ref().and_then(|pruner| pruner.mask(name))
    }
}

/// Trains a model whose masked tensors are plain numbers. Fixed masks ask that what they mask is zero already; tensors
/// that are stored sparse keep their zeros and their layout beside them.
///
/// # Errors
/// What the loop gives, and those of [`check_growing`].
pub fn train(
    cx: &StepContext<'_>,
    learning: &Learning<'_>,
    model: AnyModel,
    (training, settings): (&v1::Training, &Settings),
    masks: Masks,
) -> Result<Trained> {
    // What earlier steps pruned and this one leaves alone.
    let mut sparse = run::sparse_masks(&model);
    match &masks {
        Masks::Fixed(masks) => sparse.retain(|(name, ..)| masks.iter().all(|own| own.0 != *name)),
        Masks::Growing { matrices, .. } => {
            let masked = |name: &str| matrices.iter().any(|own| own.0 == name);
            check_growing("schedule", masked, &model.info())?;
        }
    }
    let mut ended = run::train((cx, learning), &model, (training, settings), |total, losses| {
        Ok(Some(match masks {
            Masks::Fixed(masks) => Pruner::fixed(masks.into_iter().chain(sparse)),
            Masks::Growing { share, rows, matrices } => {
                let given = v1::Gradual { final_sparsity: Some(share), ..Default::default() };
                let rule = Rule {
                    schedule: Schedule::read(&given, share, total)?,
                    pattern: Pattern::Block { rows, cols: 1 },
                    pool: Pool::Average,
                    global: false,
                    regrow: true,
                };
                Pruner::new(rule, matrices, losses)
            }
        }))
    })?;
    let hints: BTreeMap<String, (u8, u8)> = model
        .weights()
        .iter()
        .filter_map(|(name, weight)| match weight.record() {
            Record::Sparse { pattern: SparsePattern::NOfM { keep, of }, .. } => {
                Some((name.clone(), (of - keep, of)))
            }
            _ => None,
        })
        .collect();
    let model = run::stored(model, &ended, |name| hints.get(name).copied())?;
    let report = std::mem::take(&mut ended.report);
    let warnings = std::mem::take(&mut ended.warnings);
    Ok(Trained { model, report, warnings, ended })
}
