//! The forward, with gradients where they are wanted. Sequences run side by side, a step of all of them at a
//! time; so rows of activations stand step by step.

use std::sync::Arc;

use candle_core::Tensor;

use super::Config;
use crate::error::{Error, Result};
use crate::nn::ops::{Tape, Value};

/// Tensors by name.
pub type Tensors<'a> = dyn Fn(&str) -> Result<&'a Tensor> + 'a;

/// Sequences of equal length, side by side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    pub rows: usize,
    /// Token of step `t` of sequence `r` at `t * rows + r`.
    pub tokens: Arc<[u32]>,
    /// Where a text begins.
    pub starts: Arc<[bool]>,
}

impl Rows {
    /// From sequence after sequence, all of length `width`.
    pub fn new(width: usize, tokens: &[u32], start: impl Fn(usize) -> bool) -> Self {
        let rows = tokens.len() / width.max(1);
        let place = |i: usize| (i % rows) * width + i / rows;
        let total = rows * width;
        Self {
            rows,
            tokens: (0..total).map(|i| tokens[place(i)]).collect(),
            starts: (0..total).map(|i| start(place(i))).collect(),
        }
    }

    /// The row of activations of token `i` of the sequences one after another.
    pub fn row(&self, i: usize) -> usize {
        let width = self.tokens.len() / self.rows.max(1);
        (i % width) * self.rows + i / width
    }
}

/// Last states `[tokens, hidden]`.
///
/// # Errors
/// INTERNAL for tokens that the model does not know.
pub fn states(tape: &Tape, config: &Config, tensors: &Tensors<'_>, rows: &Rows) -> Result<Value> {
    if rows.rows == 0 {
        return Err(Error::internal("no sequence to run"));
    }
    let leaf = |name: &str| tape.leaf(tensors(name)?);
    let mut x = tape.rows(&leaf("embedding.weight")?, &rows.tokens)?;
    for layer in 0..config.layers {
        let part = |name: &str| leaf(&format!("layers.{layer}.{name}"));
        let gates = tape.dense(&x, &part("input.weight")?)?;
        let gates = tape.add_bias(gates, &part("bias")?)?;
        x = tape.lstm(gates, &part("recurrent.weight")?, rows.rows, &rows.starts)?;
    }
    Ok(x)
}

/// Logits `[rows, vocab]` of some states.
///
/// # Errors
/// INTERNAL for states of another width.
pub fn logits(tape: &Tape, tensors: &Tensors<'_>, states: &Value) -> Result<Value> {
    let logits = tape.dense(states, &tape.leaf(tensors("head.weight")?)?)?;
    tape.add_bias(logits, &tape.leaf(tensors("head.bias")?)?)
}
