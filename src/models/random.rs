//! Models with random weights, from which training begins.

use std::collections::BTreeMap;

use rand::Rng;
use serde_json::Value;

use super::{AnyFamily, AnyInfo, AnyModel, TensorInfo, lstm, two_tower, vision};
use crate::error::{Error, Reason, Result};
use crate::nn::weight::Record;
use crate::seed::Stream;

/// Weights of a random model, at most.
const MAX_WEIGHTS: usize = 1 << 31;

/// A model of the family that the configuration describes, with weights drawn from `random` and without a
/// tokenizer.
///
/// # Errors
/// `UNSUPPORTED_MODEL` for families whose models are not made here, and for what the family refuses;
/// `TOO_LARGE`.
pub fn model(config: Value, random: &Stream) -> Result<AnyModel> {
    if vision::is_vision(&config) {
        return Ok(vision::random::model(config, random)?.into());
    }
    if lstm::is_lstm(&config) {
        return Ok(lstm::random::model(config, random)?.into());
    }
    if two_tower::is_two_tower(&config) {
        return Ok(two_tower::random::model(config, random)?.into());
    }
    Err(unknown())
}

/// What [`model`] would make, without making it.
///
/// # Errors
/// As [`model`].
pub fn info(config: Value) -> Result<AnyInfo> {
    let family = if vision::is_vision(&config) {
        AnyFamily::Vision(vision::Config::from_hugging_face(&config)?)
    } else if lstm::is_lstm(&config) {
        AnyFamily::Lstm(lstm::Config::from_hugging_face(&config)?)
    } else if two_tower::is_two_tower(&config) {
        AnyFamily::TwoTower(two_tower::Config::from_hugging_face(&config)?)
    } else {
        return Err(unknown());
    };
    let tensors = family.tensors();
    check_size(&tensors)?;
    let info = |(name, shape): (String, Vec<usize>)| {
        let bytes = 4 * shape.iter().product::<usize>() as u64;
        (name, TensorInfo { record: Record::Dense { shape: shape.clone() }, shape, bytes })
    };
    let tensors: BTreeMap<_, _> = tensors.into_iter().map(info).collect();
    Ok(AnyInfo { family, config, has_tokenizer: false, tensors })
}

/// The same with whole numbers as integers: messages have floats only.
pub fn whole(value: Value) -> Value {
    match value {
        Value::Number(n) => match n.as_f64() {
            Some(v) if n.is_f64() && v.fract() == 0.0 && v.abs() < 9e15 => (v as i64).into(),
            _ => Value::Number(n),
        },
        Value::Array(list) => list.into_iter().map(whole).collect(),
        Value::Object(map) => map.into_iter().map(|(key, value)| (key, whole(value))).collect(),
        other => other,
    }
}

fn unknown() -> Error {
    Error::new(
        Reason::UnsupportedModel,
        "model_type: only conv_net, mobilenet_v1, lstm and two_tower are made with random weights; import \
         other models",
    )
}

/// Refuses models that are too large to be drawn.
pub(super) fn check_size(tensors: &[(String, Vec<usize>)]) -> Result<()> {
    let count = |n: usize, (_, shape): &(String, Vec<usize>)| {
        let elements = shape.iter().try_fold(1usize, |a, b| a.checked_mul(*b));
        n.saturating_add(elements.unwrap_or(usize::MAX))
    };
    match tensors.iter().fold(0, count) {
        0..=MAX_WEIGHTS => Ok(()),
        elements => Err(Error::new(
            Reason::TooLarge,
            format!("a random model of {elements} weights is too large; make it smaller"),
        )),
    }
}

/// Numbers from a normal distribution around 0.
pub(super) fn normal(count: usize, deviation: f64, random: &Stream) -> Vec<f32> {
    let mut rng = random.rng();
    let draw = |_| {
        // Box and Muller; the first number is never 0.
        let (a, b): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
        (deviation * (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
    };
    (0..count).map(draw).collect()
}
