//! The forward that serves, evaluates and calibrates: preallocated buffers, weights in their layouts.

use std::ops::Range;
use std::sync::Arc;

use super::Config;
use crate::error::Result;
use crate::models::Model;
use crate::nn::weight::Weight;

/// Keys and values of one sequence, all layers.
pub struct Cache {}

impl Cache {
    /// An empty cache with room for `capacity` positions.
    pub fn new(_config: &Config, _capacity: usize) -> Self {
        todo!()
    }
    /// Positions held.
    pub fn len(&self) -> usize {
        todo!()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    pub fn capacity(&self) -> usize {
        todo!()
    }
    /// Forgets all but the first `len` positions.
    pub fn truncate(&mut self, _len: usize) {
        todo!()
    }
    /// Bytes a position takes.
    pub fn bytes_per_position(_config: &Config) -> usize {
        todo!()
    }
}

/// One sequence's share of a step: its new tokens and its cache.
pub struct Chunk<'a> {
    pub tokens: &'a [u32],
    pub cache: &'a mut Cache,
    /** Which of the new tokens' logits are wanted. */
    pub logits: Range<usize>,
}

/// A decoder ready to run.
pub struct Decoder {}

impl Decoder {
    pub fn new(_model: &Model) -> Result<Self> {
        todo!()
    }
    pub fn config(&self) -> &Config {
        todo!()
    }
    /// Runs the new tokens of several sequences at once; returns the wanted logits `[wanted, vocab]`,
    /// chunk by chunk. Caches grow by their tokens. Token ids must be below the vocabulary size and
    /// caches must have room (checked, errors name the chunk).
    pub fn forward(&mut self, _chunks: &mut [Chunk<'_>]) -> Result<&[f32]> {
        todo!()
    }
}

/// Called with the input of each group of linears that share one: the group's index within the block
/// (as in [`Config::linears`]) and the rows `[tokens, in]`.
pub type Tap<'a> = dyn FnMut(usize, &[f32]) + 'a;

/// One block, for walking through a model layer by layer.
pub struct Block {}

impl Block {
    /// Takes block `layer`'s weights from the map of a model.
    pub fn new(
        _config: &Config,
        _weights: &std::collections::BTreeMap<String, Arc<Weight>>,
        _layer: usize,
    ) -> Result<Self> {
        todo!()
    }
    /// Hidden states in, hidden states out, in place: `hidden` is `[sequences * length, hidden]`, each
    /// sequence starts at position 0 and sees only itself.
    pub fn forward(&self, _hidden: &mut [f32], _length: usize, _tap: Option<&mut Tap<'_>>) {
        todo!()
    }
}

/// Embeddings of tokens (scaled as the config asks), `[tokens, hidden]`.
pub fn embed(_config: &Config, _embedding: &Weight, _tokens: &[u32], _out: &mut [f32]) {
    todo!()
}
