//! Models of two towers with random weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::{Config, Model, TEMPERATURE};
use crate::error::Result;
use crate::models::random::{check_size, normal};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};
use crate::seed::Stream;

/// What similarities are multiplied by at first, as in CLIP.
const FIRST: f64 = 1.0 / 0.07;

/// A model of the given configuration with weights drawn from `random`: normal with the deviation
/// `sqrt(1 / inputs)`, of what is added to the states of `L` blocks `sqrt(1 / 2L)` times that; embeddings of tokens
/// and positions have a deviation of 0.1. Norms do nothing, biases are 0.
///
/// # Errors
/// What [`Config::from_hugging_face`] refuses, and more weights than fit.
pub fn model(config: Value, random: &Stream) -> Result<Model> {
    let family = Config::from_hugging_face(&config)?;
    let tensors = family.tensors();
    check_size(&tensors)?;
    let mut weights = BTreeMap::new();
    for (name, shape) in tensors {
        let elements = shape.iter().product();
        let layers = match name.starts_with("image.") {
            true => family.image.layers,
            false => family.text.layers,
        };
        let values = match (shape.as_slice(), name.as_str()) {
            (_, TEMPERATURE) => vec![FIRST.ln() as f32],
            ([_, inputs], part) => {
                let usual = 1.0 / (*inputs as f64).sqrt();
                let deviation =
                    if part.ends_with("tokens.weight") || part.ends_with("positions.weight") {
                        0.1
                    } else if part.ends_with("output.weight") || part.ends_with("down.weight") {
                        usual / (2.0 * layers as f64).sqrt()
                    } else {
                        usual
                    };
                normal(elements, deviation, &random.child(part))
            }
            (_, part) if part.ends_with("norm.weight") => vec![1.0; elements],
            _ => vec![0.0; elements],
        };
        let weight = Dense::from_f32(shape, &values, Dtype::F32)?;
        weights.insert(name, Arc::new(Weight::Dense(weight)));
    }
    Ok(Model { family, config, weights, tokenizer: None })
}
