//! The settings that tell the decoder architectures apart.

use crate::error::Result;

/// Nonlinearity of the gated feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    GeluTanh,
}

/// What a layer attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    Global,
    Local,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f32,
    },
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        original: usize,
    },
    Dynamic {
        factor: f32,
        original: usize,
    },
    Yarn {
        factor: f32,
        original: usize,
        beta_fast: f32,
        beta_slow: f32,
        attention_factor: Option<f32>,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// Configuration of a decoder. Shapes: `hidden` = width of the residual stream; queries have
/// `heads * head_dim` channels, keys and values `kv_heads * head_dim`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `model_type` of the Hugging Face configuration: llama, mistral, qwen2, qwen3, gemma3_text.
    pub architecture: String,
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: Vec<LayerKind>,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub norm_eps: f32,
    /// Norm weights are stored as offsets from 1 (Gemma).
    pub norm_offset: bool,
    /// Norms after attention and after the feed-forward network too (Gemma).
    pub post_norms: bool,
    pub activation: Activation,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    /// RMS norm over each head of q and k.
    pub qk_norm: bool,
    pub embedding_scale: f32,
    pub attention_scale: f32,
    pub rope: Rope,
    /// Rotary settings of local layers, where they differ.
    pub local_rope: Option<Rope>,
    /// Positions a local layer sees, itself included.
    pub window: Option<usize>,
    pub attention_softcap: Option<f32>,
    pub final_softcap: Option<f32>,
    /// The output head is the embedding matrix.
    pub tied: bool,
    pub max_positions: usize,
}

impl Config {
    /// From `config.json`; every value is checked, unknown architectures are refused.
    pub fn from_hugging_face(_config: &serde_json::Value) -> Result<Self> {
        todo!()
    }

    /// Names of the linear weights of block `layer`, grouped by the input they share, in the order in
    /// which they run: q k v; o; gate up; down.
    pub fn linears(&self, _layer: usize) -> Vec<Vec<String>> {
        todo!()
    }

    /// Every tensor the model must have, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        todo!()
    }
}
