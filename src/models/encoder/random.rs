//! Encoders with random weights, for tests and benchmarks.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::Rng;
use serde_json::{Value, json};

use super::{Config, Model};
use crate::error::{Error, Reason, Result};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};
use crate::seed::Stream;

/// An encoder of the given Hugging Face configuration with dense f32 weights drawn from `seed`. No
/// tokenizer.
///
/// # Errors
/// What [`Config::from_hugging_face`] refuses, and more than 2^31 weights.
pub fn model(config: Value, seed: u64) -> Result<Model> {
    let family = Config::from_hugging_face(&config)?;
    let tensors = family.tensors();
    let elements: usize = tensors.iter().map(|(_, s)| s.iter().product::<usize>()).sum();
    if elements > 1 << 31 {
        return Err(Error::new(
            Reason::TooLarge,
            format!("a random model of {elements} weights is too large; make it smaller"),
        ));
    }
    let stream = Stream::root(seed);
    let mut weights = BTreeMap::new();
    for (name, shape) in tensors {
        let mut rng = stream.child(&name).rng();
        let (center, deviation) = match (shape.len(), name.ends_with(".bias")) {
            (1, true) => (0.0, 0.3),
            (1, false) => (1.0, 0.2),
            _ if name.starts_with("embeddings.") => (0.0, 1.0),
            _ => (0.0, 1.0 / (shape[1] as f32).sqrt()),
        };
        // A uniform variable of this half width has the deviation asked for.
        let half = deviation * 3.0_f32.sqrt();
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| center + half * (2.0 * rng.random::<f32>() - 1.0))
            .collect();
        let weight = Dense::from_f32(shape, &values, Dtype::F32)?;
        weights.insert(name, Arc::new(Weight::Dense(weight)));
    }
    Ok(Model { family, config, weights, tokenizer: None })
}

/// A configuration small enough for tests: vocabulary 96, hidden 32 in 4 heads, 3 layers, 64 positions.
pub fn tiny() -> Value {
    json!({
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    })
}
