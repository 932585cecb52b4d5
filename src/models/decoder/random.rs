//! Decoders with random weights, for tests and benchmarks: every architecture in any size, no files.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::Rng;
use serde_json::{Value, json};

use super::Config;
use crate::error::{Error, Reason, Result};
use crate::models::{Family, Model};
use crate::nn::adapter::{Adapter, Factors};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};
use crate::seed::Stream;

/// A decoder of the given Hugging Face configuration with dense f32 weights drawn from `seed`, scaled
/// so that activations stay near one and logits near a standard normal. No tokenizer.
///
/// # Errors
/// What [`Config::from_hugging_face`] refuses, and more than 2^31 weights.
pub fn model(config: Value, seed: u64) -> Result<Model> {
    let decoder = Config::from_hugging_face(&config)?;
    let tensors = decoder.tensors();
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
            (1, true) => (0.0, 0.1),
            (1, false) => (if decoder.norm_offset { 0.0 } else { 1.0 }, 0.1),
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
    Ok(Model { family: Family::Decoder(decoder), config, weights, tokenizer: None })
}

/// An adapter of `rank` on the linears of `config` whose names `on` accepts, with factors drawn from
/// `seed` such that it adds about `size` times what the weights give.
pub fn adapter(
    config: &Config,
    rank: usize,
    size: f32,
    seed: u64,
    on: impl Fn(&str) -> bool,
) -> Result<Adapter> {
    let stream = Stream::root(seed);
    let mut linears = BTreeMap::new();
    for (name, shape) in config.tensors() {
        let (&[rows, cols], true) = (&shape[..], name.contains("_proj.") && on(&name)) else {
            continue;
        };
        let mut rng = stream.child(&name).rng();
        let mut draw = |count: usize, deviation: f32| -> Vec<f32> {
            let half = deviation * 3.0_f32.sqrt();
            (0..count).map(|_| half * (2.0 * rng.random::<f32>() - 1.0)).collect()
        };
        let a = draw(rank * cols, 1.0 / (cols as f32).sqrt());
        let b = draw(rows * rank, size / (rank as f32).sqrt());
        let factors = Factors::from_f32([rows, cols], rank, &a, &b, 1.0)?;
        linears.insert(name, Arc::new(factors));
    }
    Ok(Adapter { linears })
}

/// A configuration of `architecture` small enough for tests (vocabulary 96, hidden 32, 4 heads of 16
/// over 2 key heads, 3 layers, or 4 where local and global layers alternate), with every trait of the
/// architecture switched on. Local layers see 5 positions.
pub fn tiny(architecture: &str) -> Value {
    let mut config = json!({
        "model_type": architecture,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": false,
    });
    let own = match architecture {
        "mistral" => json!({ "sliding_window": 5 }),
        "qwen2" => json!({
            "use_sliding_window": true, "sliding_window": 5, "max_window_layers": 2,
        }),
        "qwen3" => json!({ "rope_theta": 1e6 }),
        "gemma3_text" => json!({
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": true,
        }),
        _ => json!({}),
    };
    if let (Value::Object(all), Value::Object(own)) = (&mut config, own) {
        all.extend(own);
    }
    config
}
