//! A walk through a model for methods that change more of a block than its linears one by one: they see all
//! inputs of the block together, and may rewrite its norms too.
//!
//! As in [`walk`], the text runs through each block as it is while its inputs are watched, then the block is
//! changed, then what the changed block gives enters the next.

use std::sync::Arc;

use crate::calibrate::gram::Gram;
use crate::calibrate::{Windows, walk};
use crate::error::{Error, Reason, Result};
use crate::methods::StepContext;
use crate::models::Model;
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};

/// Tokens that run through a block at once.
const CHUNK_TOKENS: usize = 2048;

/// What was seen of the input that some linears share.
pub struct Seen {
    /// `X^T X` over all rows, or over those of the last sequence where that was asked for.
    pub gram: Gram,
    /// Rows.
    pub count: u64,
    /// Sum of the absolute values of each channel.
    pub sizes: Vec<f64>,
    /// Largest absolute value of each channel.
    pub tops: Vec<f32>,
    /// The least, over the sequences, of the largest absolute value of each channel in a sequence.
    pub least_tops: Vec<f32>,
}

impl Seen {
    fn new(cols: usize) -> Self {
        Self {
            gram: Gram::new(cols),
            count: 0,
            sizes: vec![0.0; cols],
            tops: vec![0.0; cols],
            least_tops: vec![f32::INFINITY; cols],
        }
    }

    fn add(&mut self, sequence: &[f32], gram: bool) {
        let cols = self.sizes.len();
        if gram {
            self.gram.add(sequence);
        }
        let mut tops = vec![0.0_f32; cols];
        for row in sequence.chunks_exact(cols) {
            for ((v, size), top) in row.iter().zip(&mut self.sizes).zip(&mut tops) {
                *size += f64::from(v.abs());
                *top = top.max(v.abs());
            }
        }
        self.count += (sequence.len() / cols) as u64;
        for ((top, all), least) in tops.iter().zip(&mut self.tops).zip(&mut self.least_tops) {
            *all = all.max(*top);
            *least = least.min(*top);
        }
    }

    /// Mean absolute value of each channel.
    pub fn mean_sizes(&self) -> Vec<f64> {
        self.sizes.iter().map(|sum| sum / self.count.max(1) as f64).collect()
    }

    fn finite(&self) -> bool {
        self.sizes.iter().all(|v| v.is_finite())
    }
}

/// A block before it is changed.
pub struct Block<'a> {
    /// All weights of the model; those of this block are to be changed in place.
    pub weights: &'a mut walk::Weights,
    /// Linears by the input they share, in running order, and what was seen of it.
    pub sites: Vec<(Vec<String>, Seen)>,
}

/// Which sequences make the Gram matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    All,
    LastSequence,
}

/// Walks through all blocks; `change` gets each one.
pub fn walk_blocks(
    cx: &StepContext<'_>,
    model: &mut Model,
    windows: &Windows,
    rows: Rows,
    change: &mut dyn FnMut(Block<'_>) -> Result<()>,
) -> Result<()> {
    let family = model.family.clone();
    let walk = walk::of(&family);
    let Windows { tokens, length, .. } = windows;
    let (length, width, blocks) = (*length, walk.width(), walk.blocks());
    let mut hidden = vec![0.0; tokens.len() * width];
    walk.embed(&model.weights, tokens, &mut hidden)?;
    let chunk = (CHUNK_TOKENS / length).max(1) * length * width;
    let last = tokens.len() / length - 1;
    for b in 0..blocks {
        let done = b as f64 / blocks as f64;
        let message = format!("block {} of {blocks}", b + 1);
        cx.progress.report(done, &message)?;
        let mut sites = Vec::new();
        for group in walk.linears(b) {
            let cols = group.first().map(|name| model.weight(name)).transpose()?;
            let cols = cols.map_or(1, |weight| weight.cols());
            sites.push((group, Seen::new(cols)));
        }
        let block = walk.block(&dense(walk, model, b)?, b)?;
        let mut copy = Vec::new();
        for (c, part) in hidden.chunks(chunk).enumerate() {
            cx.progress.check()?;
            copy.clear();
            copy.extend_from_slice(part);
            let first = c * (chunk / width / length);
            let mut tap = |group: usize, inputs: &[f32]| {
                let Some((_, seen)) = sites.get_mut(group) else { return };
                let cols = seen.sizes.len();
                for (i, sequence) in inputs.chunks(length * cols).enumerate() {
                    seen.add(sequence, rows == Rows::All || first + i == last);
                }
            };
            block.forward(&mut copy, length, Some(&mut tap));
        }
        drop(block);
        if !sites.iter().all(|(_, seen)| seen.finite()) {
            return Err(not_finite(b, "runs inside"));
        }
        cx.progress.report(done + 0.4 / blocks as f64, &message)?;
        change(Block { weights: &mut model.weights, sites })?;
        if b + 1 < blocks {
            let block = walk.block(&dense(walk, model, b)?, b)?;
            for part in hidden.chunks_mut(chunk) {
                cx.progress.check()?;
                block.forward(part, length, None);
            }
            if !hidden.iter().all(|v| v.is_finite()) {
                return Err(not_finite(b, "comes out of"));
            }
        }
    }
    cx.progress.report(1.0, "all blocks done")
}

/// The weights with the linears of block `b` as f32.
fn dense(walk: &dyn walk::Walk, model: &Model, b: usize) -> Result<walk::Weights> {
    let mut view = model.weights.clone();
    for name in walk.linears(b).into_iter().flatten() {
        let stored = model.weight(&name)?;
        let plain = Dense::from_f32(stored.shape().to_vec(), &stored.to_f32(), Dtype::F32)?;
        view.insert(name, Arc::new(Weight::Dense(plain)));
    }
    Ok(view)
}

fn not_finite(block: usize, how: &str) -> Error {
    Error::new(
        Reason::NonFinite,
        format!(
            "a number that is not finite {how} block {block} on the calibration text; the model is \
             broken, or an earlier step damaged it: evaluate the version this step starts from"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_seen_by_sequence() {
        let mut seen = Seen::new(2);
        seen.add(&[1.0, -4.0, -3.0, 2.0], true);
        seen.add(&[2.0, 0.5, 0.0, 1.0], false);
        assert_eq!((seen.count, &seen.sizes[..]), (4, &[6.0, 7.5][..]));
        assert_eq!((&seen.tops[..], &seen.least_tops[..]), (&[3.0, 4.0][..], &[2.0, 1.0][..]));
        assert_eq!(seen.gram.at(0, 0), 10.0, "of the first sequence alone");
        assert_eq!(seen.mean_sizes(), [1.5, 1.875]);
    }
}
