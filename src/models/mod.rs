//! Models: a family's configuration, named weights, and the text side (tokenizer, chat template).

pub mod decoder;
pub mod export;
mod files;
mod gguf;
pub mod import;
pub mod package;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::nn::weight::{Record, Weight};

/// The configuration of a model, by family.
#[derive(Debug, Clone, PartialEq)]
pub enum Family {
    /// Decoder-only language models (Llama, Mistral, Qwen, Gemma and their relatives).
    Decoder(decoder::Config),
}

impl Family {
    /// Name used in method cards and messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Decoder(_) => "decoder",
        }
    }
}

/// A model in memory. Weights are shared: cloning a model copies no tensor.
#[derive(Clone)]
pub struct Model {
    pub family: Family,
    /// `config.json` in Hugging Face form, kept whole so that exports lose nothing.
    pub config: serde_json::Value,
    /// Weights by their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`).
    pub weights: BTreeMap<String, Arc<Weight>>,
    /// Absent when the source had none; such a model takes and gives token ids only.
    pub tokenizer: Option<Arc<Tokenizer>>,
}

impl Model {
    /// The weight called `name`.
    pub fn weight(&self, name: &str) -> Result<&Arc<Weight>> {
        self.weights.get(name).ok_or_else(|| {
            Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
        })
    }

    /// The decoder configuration, or an error that names `what` needs it.
    pub fn decoder(&self) -> Result<&decoder::Config> {
        match &self.family {
            Family::Decoder(config) => Ok(config),
        }
    }

    /// Shapes, layouts and sizes without the data.
    pub fn info(&self) -> ModelInfo {
        ModelInfo {
            family: self.family.clone(),
            has_tokenizer: self.tokenizer.is_some(),
            tensors: self
                .weights
                .iter()
                .map(|(name, w)| {
                    (
                        name.clone(),
                        TensorInfo {
                            record: w.record(),
                            shape: w.shape().to_vec(),
                            bytes: w.bytes(),
                        },
                    )
                })
                .collect(),
        }
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> u64 {
        self.weights.values().map(|w| w.bytes()).sum()
    }

    /// Number of weights' elements.
    pub fn parameters(&self) -> u64 {
        self.weights.values().map(|w| w.shape().iter().product::<usize>() as u64).sum()
    }
}

/// What is known of a model before its data is read: enough to refuse or estimate a recipe.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    pub family: Family,
    pub has_tokenizer: bool,
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Shape, layout and stored size of one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    pub record: Record,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

impl ModelInfo {
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes).sum()
    }
}
