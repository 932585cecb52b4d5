//! LSTM language models with random weights.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::Rng;
use serde_json::Value;

use super::{Config, Model};
use crate::error::Result;
use crate::models::random::{check_size, normal};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};
use crate::seed::Stream;

/// A model of the given configuration with weights drawn from `random`: uniform within `1 / sqrt(hidden)` for
/// the gates and the head, as in PyTorch, and normal with deviation 0.1 for embeddings. Forget gates begin with
/// a bias of 1, so that what is seen is remembered for a while (Jozefowicz et al. 2015); the other biases
/// are 0.
///
/// # Errors
/// What [`Config::from_hugging_face`] refuses, and more weights than fit.
pub fn model(config: Value, random: &Stream) -> Result<Model> {
    let family = Config::from_hugging_face(&config)?;
    let tensors = family.tensors();
    check_size(&tensors)?;
    let bound = 1.0 / (family.hidden as f32).sqrt();
    let mut weights = BTreeMap::new();
    for (name, shape) in tensors {
        let elements = shape.iter().product();
        let stream = random.child(&name);
        let values = match name.as_str() {
            "embedding.weight" => normal(elements, 0.1, &stream),
            name if name.ends_with(".weight") => {
                let mut rng = stream.rng();
                (0..elements).map(|_| bound * (2.0 * rng.random::<f32>() - 1.0)).collect()
            }
            name => {
                let mut values = vec![0.0; elements];
                if name.starts_with("layers.") {
                    values[family.hidden..2 * family.hidden].fill(1.0);
                }
                values
            }
        };
        let weight = Dense::from_f32(shape, &values, Dtype::F32)?;
        weights.insert(name, Arc::new(Weight::Dense(weight)));
    }
    Ok(Model { family, config, weights, tokenizer: None })
}
