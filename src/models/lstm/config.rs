//! The settings of an LSTM language model, read from `config.json`, and the names of its tensors.

use serde_json::Value;

use crate::error::Result;
use crate::models::decoder::hugging_face::{Keys, MAX_PARAMETERS, refuse};

/// The family's name.
pub const FAMILY: &str = "lstm";

/// Configuration of an LSTM language model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `model_type`: `lstm`.
    pub architecture: String,
    pub vocab: usize,
    /// Width of the embeddings.
    pub embedding: usize,
    /// Width of the states.
    pub hidden: usize,
    pub layers: usize,
    /// Longest window of text.
    pub max_positions: usize,
}

/// Whether a configuration belongs to this family.
pub fn is_lstm(config: &Value) -> bool {
    config.get("model_type").and_then(Value::as_str) == Some("lstm")
}

impl Config {
    /// From `config.json`; every value is checked. Errors are `UNSUPPORTED_MODEL` and name the key.
    pub fn from_hugging_face(config: &Value) -> Result<Self> {
        if !is_lstm(config) {
            return Err(refuse("model_type", "is not lstm"));
        }
        let keys = Keys { map: config };
        let width = keys.number("width", 1.0, 1e-3..=64.0)?;
        let scaled = |size: usize| ((size as f64 * width).round() as usize).clamp(1, 1 << 17);
        let hidden = keys.size("hidden_size", Some(512), 1 << 17)?;
        let this = Self {
            architecture: "lstm".to_owned(),
            vocab: keys.size("vocab_size", None, 1 << 24)?,
            embedding: scaled(keys.size("embedding_size", Some(hidden), 1 << 17)?),
            hidden: scaled(hidden),
            layers: keys.size("num_hidden_layers", Some(1), 64)?,
            max_positions: keys.size("max_position_embeddings", Some(8192), 1 << 20)?,
        };
        let elements = |(_, shape): (String, Vec<usize>)| -> u128 {
            shape.iter().map(|side| *side as u128).product()
        };
        if this.tensors().into_iter().map(elements).sum::<u128>() > MAX_PARAMETERS {
            return Err(refuse("hidden_size", "the model would have more than 2^40 weights"));
        }
        Ok(this)
    }

    /// Every tensor the model must have, with its shape. Gates stand in the order input, forget, cell, output.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut all = vec![("embedding.weight".to_owned(), vec![self.vocab, self.embedding])];
        for layer in 0..self.layers {
            let inputs = if layer == 0 { self.embedding } else { self.hidden };
            let gates = 4 * self.hidden;
            all.push((format!("layers.{layer}.input.weight"), vec![gates, inputs]));
            all.push((format!("layers.{layer}.recurrent.weight"), vec![gates, self.hidden]));
            all.push((format!("layers.{layer}.bias"), vec![gates]));
        }
        all.push(("head.weight".to_owned(), vec![self.vocab, self.hidden]));
        all.push(("head.bias".to_owned(), vec![self.vocab]));
        all
    }

    /// Names of the weights that pruning takes when nothing is said: not the embedding and not the head.
    pub fn prunable(&self) -> Vec<String> {
        let layer =
            |l: usize| ["input", "recurrent"].map(|part| format!("layers.{l}.{part}.weight"));
        (0..self.layers).flat_map(layer).collect()
    }
}
