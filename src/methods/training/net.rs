//! Models of the families that are trained whole, as the loop sees them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::{lstm, two_tower, vision};
use crate::data::images::Images;
use crate::error::{Error, Reason, Result};
use crate::methods::adapt::learner::Learner;
use crate::methods::adapt::tuned::Tuned;
use crate::models::decoder::graph::Graph;
use crate::models::two_tower::{graph, prompts::Prompts};
use crate::models::vision::config::is_statistic;
use crate::models::{AnyModel, not_a_decoder};
use crate::nn::ops::{Pool, Precision};
use crate::nn::weight::Weight;
use crate::train::batch::Batch;
use crate::train::loss::{LossAndGradients, LossSums};
use crate::train::parameters::{Gradients, Parameter, Parameters};
use crate::train::pass::{self, Pass};
use crate::train::settings::{self, Settings};
use crate::train::tensors;

/// All tensors of a model as they are trained.
pub struct Trained {
    pub parameters: Parameters,
    /// Of decoders: the same variables, as their forward asks for them.
    tuned: Tuned,
}

impl Trained {
    pub fn new(model: &AnyModel) -> Result<Self> {
        let mut tuned = Tuned::new(0.0, "");
        let parameters = match model {
            AnyModel::Decoder(model) => {
                tuned.add_whole(model.weights.keys(), &model.weights)?;
                tuned.parameters()
            }
            AnyModel::Vision(_) | AnyModel::Lstm(_) | AnyModel::TwoTower(_) => {
                variables(model.weights())?
            }
            AnyModel::Encoder(_) => return Err(not_trained(model.architecture())),
        };
        Ok(Self { parameters, tuned })
    }

    /// Numbers that gradients change.
    pub fn count(&self) -> u64 {
        let trained = self.parameters.iter().filter(|(name, _)| !is_statistic(name));
        trained.map(|(_, parameter)| parameter.var.elem_count() as u64).sum()
    }
}

/// The error of a family that is tuned and not trained whole.
pub fn not_trained(architecture: &str) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!(
            "the model is an encoder ({architecture}), which is tuned with a head (planish adapters) and not \
             trained by a recipe; name a decoder, an LSTM or an image classifier"
        ),
    )
}

fn variables(weights: &BTreeMap<String, Arc<Weight>>) -> Result<Parameters> {
    let mut all = Parameters::new();
    for (name, weight) in weights {
        let var = Var::from_vec(weight.to_f32(), weight.shape(), &Device::Cpu)?;
        // Statistics have no gradient; they are here so that checkpoints hold them.
        let parameter = Parameter { decay: var.rank() > 1, var, rate: 1.0 };
        all.insert(name.clone(), parameter);
    }
    Ok(all)
}

/// Builds what the loop trains and hands it to `f`.
pub fn with<R>(
    model: &AnyModel,
    trained: &Trained,
    (images, prompts): ((Option<&Images>, Option<&Images>), Option<&Prompts>),
    settings: &Settings,
    losses: &Rc<Cell<LossSums>>,
    f: impl FnOnce(&mut dyn LossAndGradients) -> Result<R>,
) -> Result<R> {
    let (losses, pool) = (Rc::clone(losses), Pool::default());
    match model {
        AnyModel::Decoder(model) => {
            let precision = match settings.precision {
                settings::Precision::F32 => Precision::F32,
                settings::Precision::Bf16 => Precision::Bf16,
            };
            let graph = Graph::new(model, precision)?;
            let options = pass::Options {
                checkpoint_activations: settings.checkpoint_activations,
                ..Default::default()
            };
            let pass = Pass::decoder(graph, &trained.tuned, options);
            f(&mut Text { learner: Learner::new(pass, &trained.tuned), losses })
        }
        AnyModel::Vision(model) => {
            let training = images.0.ok_or_else(|| Error::internal("images were not read"))?;
            let config = &model.family;
            f(&mut vision::Learner { config, training, validation: images.1, losses, pool })
        }
        AnyModel::Lstm(model) => f(&mut lstm::Learner { config: &model.family, losses, pool }),
        AnyModel::TwoTower(model) => {
            let missing = || Error::internal("images and captions were not read");
            let training = images.0.ok_or_else(missing)?;
            let (prompts, validation) = (prompts.ok_or_else(missing)?, images.1);
            let graph = graph::Graph::new(model)?;
            let config = &model.family;
            let data = two_tower::Data { training, validation, prompts };
            f(&mut two_tower::Learner { config, graph, data, losses, pool })
        }
        AnyModel::Encoder(model) => Err(not_a_decoder(&model.family.architecture)),
    }
}

/// A decoder.
struct Text<'a> {
    learner: Learner<'a>,
    losses: Rc<Cell<LossSums>>,
}

impl LossAndGradients for Text<'_> {
    fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<(LossSums, Gradients)> {
        let found = self.learner.loss_and_gradients(batch, parameters)?;
        add(&self.losses, found.0);
        Ok(found)
    }

    fn loss(&mut self, batch: &Batch, parameters: &Parameters) -> Result<LossSums> {
        self.learner.loss(batch, parameters)
    }
}

/// Adds to what an update has lost so far.
pub fn add(losses: &Cell<LossSums>, sums: LossSums) {
    let mut all = losses.get();
    all.add(sums);
    losses.set(all);
}

/// The cross-entropy of a row of logits, and whether the right class is the likeliest (the first of several).
pub fn score(row: &[f32], class: usize) -> (f64, bool) {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|l| f64::from(l - top).exp()).sum();
    let right = row.iter().position(|l| *l == top) == Some(class);
    (sum.ln() + f64::from(top) - f64::from(row[class]), right)
}

pub fn variable<'a>(parameters: &'a Parameters, name: &str) -> Result<&'a Var> {
    let found = parameters.get(name).map(|parameter| &parameter.var);
    found.ok_or_else(|| Error::internal(format!("'{name}' is not trained")))
}

pub fn tensor<'a>(parameters: &'a Parameters, name: &str) -> Result<&'a Tensor> {
    variable(parameters, name).map(Var::as_tensor)
}

pub fn read(parameters: &Parameters, name: &str) -> Result<Vec<f32>> {
    tensors::read(variable(parameters, name)?, <[f32]>::to_vec)
}

/// Image `number` of those to learn from and, behind them, those to measure on.
pub fn image<'a>(
    (training, validation): (&'a Images, Option<&'a Images>),
    number: u32,
) -> Result<&'a [u8]> {
    let number = number as usize;
    match (number.checked_sub(training.len()), validation) {
        (None, _) => Ok(training.get(number)),
        (Some(number), Some(images)) if number < images.len() => Ok(images.get(number)),
        _ => Err(Error::internal(format!("there is no image {number}"))),
    }
}
