//! What training steps share: checking, running the loop, storing what came out.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use super::data::Data;
use super::net::{self, Trained, not_trained};
use super::pruner::Pruner;
use crate::error::{Error, Reason, Result};
use crate::methods::{Estimate, Learning, StepContext};
use crate::models::two_tower::Tower;
use crate::models::vision::Layer;
use crate::models::{AnyFamily, AnyInfo, AnyModel};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Record, Sparse, ValueFormat, Weight};
use crate::proto::v1;
use crate::train::loss::LossSums;
use crate::train::memory::Transformer;
use crate::train::parameters::Parameters;
use crate::train::run::{Needs, Run};
use crate::train::settings::{self, Duration, Precision, Settings};
use crate::train::tensors;

/// Learning rate where the options do not say.
pub const RATE: f64 = 1e-3;

/// Pairs of images and captions that are told from each other, at most.
const MOST_PAIRS: usize = 2048;

/// Multiplications a second that training is guessed to make.
const SPEED: f64 = 3e10;

/// Writes every default out.
pub fn resolve(training: &mut Option<v1::Training>) {
    settings::resolve(training.get_or_insert_default(), RATE);
}

/// The data sets of a training.
pub fn datasets(training: Option<&v1::Training>) -> Vec<&str> {
    let Some(training) = training else { return Vec::new() };
    let other = training.validation.as_ref().map_or("", |v| v.dataset.as_str());
    [training.dataset.as_str(), other].into_iter().filter(|name| !name.is_empty()).collect()
}

/// Reads the options of a training and checks them against a model.
///
/// # Errors
/// `INVALID_OPTION` with the option; `MODEL_UNSUITABLE` for families and layouts that are not trained.
pub fn check(training: Option<&v1::Training>, model: &AnyInfo) -> Result<Settings> {
    let empty = v1::Training::default();
    let given = training.unwrap_or(&empty);
    let settings = Settings::read(given, RATE).map_err(|e| e.within("training"))?;
    let named = |name: &str| name.strip_prefix("datasets/").is_some_and(|id| !id.is_empty());
    if !named(&given.dataset) {
        return Err(Error::option(
            "training.dataset",
            "is missing; name the data set to learn from, as datasets/NAME",
        ));
    }
    let other = given.validation.as_ref().map_or("", |v| v.dataset.as_str());
    if !other.is_empty() && !named(other) {
        let problem =
            format!("'{other:.100}' is no resource name of a data set; write datasets/NAME");
        return Err(Error::option("training.validation.dataset", problem));
    }
    let text = match &model.family {
        AnyFamily::Decoder(_) => true,
        AnyFamily::Lstm(_) => {
            if settings.precision == Precision::Bf16 {
                return Err(only_decoders("training.precision"));
            }
            true
        }
        AnyFamily::Vision(_) => {
            if settings.precision == Precision::Bf16 {
                return Err(only_decoders("training.precision"));
            }
            false
        }
        AnyFamily::TwoTower(_) => {
            if settings.precision == Precision::Bf16 {
                return Err(only_decoders("training.precision"));
            }
            if !(2..=MOST_PAIRS).contains(&settings.batch_size) {
                let problem = format!(
                    "{} is outside 2 to {MOST_PAIRS}: images are told from others of their batch",
                    settings.batch_size
                );
                return Err(Error::option("training.batch_size", problem));
            }
            true
        }
        AnyFamily::Encoder(config) => return Err(not_trained(&config.architecture)),
    };
    if settings.checkpoint_activations && !matches!(model.family, AnyFamily::Decoder(_)) {
        return Err(only_decoders("training.checkpoint_activations"));
    }
    if text && !model.has_tokenizer {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            "the model has no tokenizer, so it cannot read texts; create or import one with a tokenizer",
        ));
    }
    for (name, tensor) in &model.tensors {
        let trained = match &tensor.record {
            Record::Dense { .. } => true,
            Record::Sparse { values, .. } => !matches!(values, ValueFormat::Grouped(_)),
            _ => false,
        };
        if !trained {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                format!(
                    "'{name}' is quantised or factored and cannot be trained; start from the version before"
                ),
            ));
        }
    }
    Ok(settings)
}

fn only_decoders(field: &str) -> Error {
    Error::option(field, "is for decoders only; leave it out")
}

/// What a training is expected to cost, roughly; `bytes` are those of the weights afterwards.
pub fn estimate(settings: &Settings, model: &AnyInfo, bytes: u64) -> Estimate {
    let parameters: u64 =
        model.tensors.values().map(|t| t.shape.iter().product::<usize>() as u64).sum();
    let rows = settings.batch_size as u64 * settings.accumulation as u64;
    let (tokens, products) = match &model.family {
        AnyFamily::Vision(config) => {
            let images = config.images();
            let layer = |(layer, sides): (&Layer, &[usize; 2])| {
                let places = layer.window(*sides).places() as u64;
                places
                    * (layer.inputs() * layer.outputs()) as u64
                    * match layer {
                        Layer::Plain { .. } => 9,
                        Layer::Separable { .. } => 1,
                    }
            };
            (1, config.layers.iter().zip(&images).map(layer).sum())
        }
        AnyFamily::TwoTower(config) => {
            let rows = |tower: &Tower| (tower.positions * tower.products()) as u64;
            // Captions are about half as long as they may be.
            (1, rows(&config.image) + rows(&config.text) / 2)
        }
        _ => (settings.max_length as u64, parameters),
    };
    let updates = match settings.duration {
        Duration::Steps(steps) => steps,
        // Without the data it is not known; a thousand is usual.
        Duration::Epochs(_) => 1000,
    };
    let batch = rows.min(settings.batch_size as u64) * tokens;
    Estimate {
        weight_bytes: bytes,
        memory_bytes: parameters * 20 + activations(&model.family, batch as usize),
        seconds: 0.1 + (updates * rows * tokens) as f64 * products as f64 * 3.0 / SPEED,
        calibration_tokens: 0,
    }
}

/// Bytes that the backward pass of a batch of so many tokens (or images) finds.
fn activations(family: &AnyFamily, tokens: usize) -> u64 {
    let floats = match family {
        AnyFamily::Vision(config) => {
            let images = config.images();
            let layer = |(layer, sides): (&Layer, &[usize; 2])| {
                let window = layer.window(*sides);
                let (places, taps) = (window.places(), window.taps());
                match layer {
                    // What was unfolded, and three of each result: before the norm, after it, its gradient.
                    Layer::Plain { inputs, outputs, .. } => places * (taps * inputs + 3 * outputs),
                    Layer::Separable { inputs, outputs, .. } => places * 3 * (inputs + outputs),
                }
            };
            config.layers.iter().zip(&images).map(layer).sum::<usize>()
        }
        AnyFamily::TwoTower(config) => {
            // Norms, queries, keys, values, what they give, sums; what is wide before and after its function.
            let tower = |tower: &Tower| {
                tower.positions * tower.layers * (10 * tower.hidden + 2 * tower.intermediate)
            };
            tower(&config.image) + tower(&config.text) + 6 * tokens
        }
        AnyFamily::Lstm(config) => {
            config.layers * 12 * config.hidden + 2 * config.embedding + 2 * config.vocab
        }
        AnyFamily::Decoder(config) => {
            return Transformer {
                layers: config.layers.len(),
                hidden: config.hidden,
                query: config.heads * config.head_dim,
                key_value: config.kv_heads * config.head_dim,
                inner: config.intermediate,
                gates: 2,
                head: 0,
            }
            .activation_bytes(tokens, false);
        }
        AnyFamily::Encoder(_) => 0,
    };
    4 * (floats as u64).saturating_mul(tokens as u64)
}

/// A run that ended.
pub struct Ended {
    pub report: v1::TrainingReport,
    pub parameters: Parameters,
    pub pruner: Option<Pruner>,
    pub warnings: Vec<String>,
}

/// Trains a model. `prune` gets the number of updates and gives the masks; without any it is plain training.
pub fn train(
    (cx, learning): (&StepContext<'_>, &Learning<'_>),
    model: &AnyModel,
    (training, settings): (&v1::Training, &Settings),
    prune: impl FnOnce(u64, Rc<Cell<LossSums>>) -> Result<Option<Pruner>>,
) -> Result<Ended> {
    let random = cx.random.child("train");
    let reading = cx.progress.part(0.0, 0.05);
    let data = Data::read(learning.datasets, model, (training, settings), &random, &reading)?;
    let mut settings = settings.clone();
    if data.images.is_some() {
        // An image is one token.
        settings.max_length = 2;
    }
    let family = model.info().family;
    let needed = |tokens: usize| activations(&family, tokens);
    let progress = cx.progress.part(0.05, 1.0);
    let run = Run {
        settings: &settings,
        training: &data.training,
        validation: &data.validation,
        padding: data.padding,
        masking: None,
        random,
        folder: &learning.kept,
        progress: &progress,
        needs: Needs { weights: model.bytes(), activations: &needed },
    };
    let losses = Rc::new(Cell::new(LossSums::default()));
    let mut pruner = prune(run.updates()?, Rc::clone(&losses))?;
    let trained = Trained::new(model)?;
    let count = trained.count();
    let mut parameters = trained.parameters.clone();
    if let Some(pruner) = &mut pruner {
        pruner.start(&parameters)?;
    }
    let images = (data.images.as_ref(), data.validation_images.as_ref());
    let seen = (images, data.prompts.as_ref());
    let found = net::with(model, &trained, seen, &settings, &losses, |learner| match &mut pruner {
        Some(pruner) => run.train(learner, &mut parameters, pruner),
        None => run.train(learner, &mut parameters, &mut crate::train::hooks::Plain),
    });
    let mut report = found.map_err(|error| match (&pruner, error.reason()) {
        (Some(pruner), Reason::NonFinite) => Error::new(
            Reason::NonFinite,
            format!(
                "{}; {:.4} of the weights in scope were masked",
                error.message(),
                pruner.sparsity()
            ),
        ),
        _ => error,
    })?;
    report.trained_parameters = i64::try_from(count).unwrap_or(i64::MAX);
    let mut warnings = data.warnings;
    warnings.extend(report.warnings.iter().cloned());
    Ok(Ended { report, parameters, pruner, warnings })
}

/// The model with what was trained; `masks` says where zeros are meant to stay.
pub fn stored(
    mut model: AnyModel,
    ended: &Ended,
    hint: impl Fn(&str) -> Option<(u8, u8)>,
) -> Result<AnyModel> {
    let mut weights = BTreeMap::new();
    for (name, before) in model.weights() {
        let parameter = ended
            .parameters
            .get(name)
            .ok_or_else(|| Error::internal(format!("'{name}' was not trained")))?;
        let values = tensors::read(&parameter.var, <[f32]>::to_vec)?;
        let masked = ended.pruner.as_ref().and_then(|pruner| pruner.mask(name));
        let pruned = masked.is_some_and(|mask| mask.iter().any(|m| *m));
        let weight = store(before, &values, pruned, hint(name)).map_err(|e| e.within(name))?;
        weights.insert(name.clone(), Arc::new(weight));
    }
    *model.weights_mut() = weights;
    Ok(model)
}

/// In the number format that it had; sparse where that is smaller.
fn store(before: &Weight, values: &[f32], pruned: bool, hint: Option<(u8, u8)>) -> Result<Weight> {
    let (dtype, format) = match before {
        Weight::Dense(dense) => match dense.dtype() {
            Dtype::F16 => (Dtype::F16, ValueFormat::F16),
            Dtype::BF16 => (Dtype::BF16, ValueFormat::BF16),
            _ => (Dtype::F32, ValueFormat::F32),
        },
        other => formats(&other.record(), other.bytes()),
    };
    let shape = before.shape().to_vec();
    let dense = (values.len() * dtype.size()) as u64;
    if let (true, [rows, cols]) = (pruned, shape.as_slice()) {
        let sparse = Sparse::from_dense([*rows, *cols], values, format, hint)?;
        if sparse.bytes() < dense {
            return Ok(Weight::Sparse(sparse));
        }
    }
    Ok(Weight::Dense(Dense::from_f32(shape, values, dtype)?))
}

/// Number formats of a weight that is dense, or sparse with plain values, as far as its header tells: of 16 bits
/// either kind has the same size.
pub fn formats(record: &Record, bytes: u64) -> (Dtype, ValueFormat) {
    match record {
        Record::Sparse { values: ValueFormat::F16, .. } => (Dtype::F16, ValueFormat::F16),
        Record::Sparse { values: ValueFormat::BF16, .. } => (Dtype::BF16, ValueFormat::BF16),
        Record::Dense { shape } if bytes == 2 * shape.iter().product::<usize>() as u64 => {
            (Dtype::BF16, ValueFormat::BF16)
        }
        _ => (Dtype::F32, ValueFormat::F32),
    }
}

/// Masks of the weights that are stored sparse.
pub fn sparse_masks(model: &AnyModel) -> Vec<(String, usize, Vec<bool>)> {
    let sparse = |(name, weight): (&String, &Arc<Weight>)| match &**weight {
        Weight::Sparse(sparse) => {
            let masked = sparse.mask().iter().map(|kept| !kept).collect();
            Some((name.clone(), weight.cols(), masked))
        }
        _ => None,
    };
    model.weights().iter().filter_map(sparse).collect()
}

/// Exact counts for the record, by tensor.
pub fn record(model: &AnyModel, names: &BTreeSet<String>) -> (serde_json::Value, u64, u64) {
    let (mut tensors, mut zeros, mut elements) = (serde_json::Map::new(), 0, 0);
    for (name, weight) in model.weights().iter().filter(|(name, _)| names.contains(*name)) {
        let own = (weight.zeros(), weight.shape().iter().product::<usize>() as u64);
        tensors.insert(name.clone(), serde_json::json!({ "zeros": own.0, "elements": own.1 }));
        (zeros, elements) = (zeros + own.0, elements + own.1);
    }
    (serde_json::Value::Object(tensors), zeros, elements)
}
