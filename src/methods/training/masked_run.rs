//! Training under masks that another method makes: fixed ones, or groups of rows that go while the model trains.
//! The masks are those of [`super::pruner`]: what is masked is zero, has no gradient, no moments, no decay.

use super::masks::{Pattern, Pool};
use super::pruner::{Pruner, Rule};
use super::run::{self, Ended};
use super::schedule::Schedule;
use crate::error::{Error, Result};
use crate::methods::{Estimate, Learning, StepContext};
use crate::models::{AnyInfo, AnyModel};
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

/// Trains a model whose tensors are plain numbers. Fixed masks ask that what they mask is zero already.
///
/// # Errors
/// What the loop gives.
pub fn train(
    cx: &StepContext<'_>,
    learning: &Learning<'_>,
    model: AnyModel,
    (training, settings): (&v1::Training, &Settings),
    masks: Masks,
) -> Result<Trained> {
    let mut ended = run::train((cx, learning), &model, (training, settings), |total, losses| {
        Ok(Some(match masks {
            Masks::Fixed(masks) => Pruner::fixed(masks),
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
    let model = run::stored(model, &ended, |_| None)?;
    let report = std::mem::take(&mut ended.report);
    let warnings = std::mem::take(&mut ended.warnings);
    Ok(Trained { model, report, warnings, ended })
}
