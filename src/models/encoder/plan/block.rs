//! One block, for walking through a model block by block.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::adapters::Rows;
use super::layer::{Buffers, Layer, Norm};
use super::linear::Precision;
use super::{Config, Model, positions};
use crate::error::{Error, Result};
use crate::kernels::norm;
use crate::models::decoder::plan::Tap;
use crate::nn::weight::Weight;

/// Rows that walk through a block at once; bounds the memory of long inputs.
const WALK_ROWS: usize = 1024;

/// A block in f32. The first also turns the embeddings of words into states.
pub struct Block {
    layer: Layer,
    width: usize,
    start: Option<Start>,
}

struct Start {
    positions: Vec<f32>,
    norm: Norm,
}

impl Block {
    /// Takes block `index`'s weights from the map of a model.
    ///
    /// # Errors
    /// A block that does not exist, a missing tensor, or one of the wrong shape.
    pub fn new(
        config: &Config,
        weights: &BTreeMap<String, Arc<Weight>>,
        index: usize,
    ) -> Result<Self> {
        if index >= config.layers {
            return Err(Error::internal(format!(
                "block {index} of {} was asked for",
                config.layers
            )));
        }
        let model = Model {
            family: config.clone(),
            config: serde_json::Value::Null,
            weights: weights.clone(),
            tokenizer: None,
        };
        let start = match index {
            0 => Some(Start {
                positions: positions(&model)?,
                norm: Norm::new(&model, "embeddings")?,
            }),
            _ => None,
        };
        let layer = Layer::new(&model, &Arc::new(config.clone()), index, Precision::F32)?;
        Ok(Self { layer, width: config.hidden, start })
    }

    /// States in, states out, in place: `hidden` is `[sequences * length, hidden]`, each sequence sees only
    /// itself; `length` is at most the positions of the model. Long inputs run a few sequences at a time.
    pub fn forward(&self, hidden: &mut [f32], length: usize, mut tap: Option<&mut Tap<'_>>) {
        let sequence = length * self.width;
        if sequence == 0 {
            return;
        }
        let (mut buffers, alone) = (Buffers::default(), Rows::default());
        for piece in hidden.chunks_mut((WALK_ROWS / length).max(1) * sequence) {
            if let Some(start) = &self.start {
                for states in piece.chunks_mut(sequence) {
                    let rows = states.chunks_exact_mut(self.width);
                    for (row, place) in rows.zip(start.positions.chunks_exact(self.width)) {
                        norm::add(row, place);
                    }
                }
                start.norm.apply(piece);
            }
            let ranges: Vec<Range<usize>> =
                (0..piece.len() / sequence).map(|i| i * length..(i + 1) * length).collect();
            // A closure of this call's lifetime, so that the tap can be lent once a piece.
            match &mut tap {
                Some(tap) => {
                    self.layer.forward(&mut buffers, piece, &ranges, &alone, Some(&mut **tap))
                }
                None => self.layer.forward(&mut buffers, piece, &ranges, &alone, None),
            }
        }
    }
}
