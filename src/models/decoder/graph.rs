//! The differentiable forward on candle tensors.

use candle_core::Tensor;

use crate::error::Result;
use crate::models::Model;

/// Logits `[batch, tokens, vocab]` of token ids `[batch, tokens]` (u32).
pub fn forward(_model: &Model, _tokens: &Tensor) -> Result<Tensor> {
    todo!()
}
