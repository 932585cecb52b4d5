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
    use std::path::PathBuf;

    use super::*;
    use crate::calibrate;
    use crate::models::decoder::random;
    use crate::progress::Progress;
    use crate::seed::Stream;

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

    /// Walks text in windows of 8 through a model.
    fn walked(
        model: &mut Model,
        tokens: &[u32],
        rows: Rows,
        change: &mut dyn FnMut(Block<'_>),
    ) -> Result<()> {
        let no_texts = |name: &str| Err(Error::not_found(name, "there are no data sets here"));
        let cx = StepContext {
            random: Stream::root(1),
            progress: &Progress::silent(),
            texts: &no_texts,
            calibrations: &calibrate::Shared::default(),
            digest: "",
            scratch: PathBuf::new(),
        };
        let windows = Windows { tokens: tokens.to_vec(), length: 8, warnings: Vec::new() };
        walk_blocks(&cx, model, &windows, rows, &mut |block| {
            change(block);
            Ok(())
        })
    }

    fn put(model: &mut Model, name: &str, shape: &[usize], value: f32) {
        let values = vec![value; shape.iter().product()];
        let dense = Dense::from_f32(shape.to_vec(), &values, Dtype::F32).expect("dense");
        let before = model.weights.insert(name.to_owned(), Arc::new(Weight::Dense(dense)));
        assert!(before.is_some(), "{name}");
    }

    #[test]
    fn the_last_sequence_is_the_last_of_all_chunks() {
        let mut model = random::model(random::tiny("llama"), 3).expect("a model");
        // More than a chunk.
        let tokens: Vec<u32> = (0..2400).map(|i| (i * 31 + i / 7) % 96).collect();
        let mut seen = |tokens: &[u32], rows: Rows| {
            let mut found = Vec::new();
            walked(&mut model, tokens, rows, &mut |block| {
                found.extend(block.sites.into_iter().map(|(_, seen)| seen));
            })
            .expect("walks");
            found
        };
        let whole = seen(&tokens, Rows::LastSequence);
        let last = seen(&tokens[2392..], Rows::All);
        assert_eq!((whole.len(), last.len()), (12, 12));
        for (whole, last) in whole.iter().zip(&last) {
            assert_eq!((whole.count, last.count), (2400, 8));
            let cols = last.tops.len();
            let most = (0..cols).map(|j| last.gram.at(j, j)).fold(0.0, f64::max);
            for (i, j) in (0..cols).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                let (a, b) = (whole.gram.at(i, j), last.gram.at(i, j));
                assert!((a - b).abs() < 1e-4 * most, "{a} is not {b}");
            }
            // The largest of all sequences, and of the quietest one.
            for ((top, least), own) in whole.tops.iter().zip(&whole.least_tops).zip(&last.tops) {
                assert!(*least <= own * 1.0001 && own * 0.9999 <= *top, "{least} {own} {top}");
            }
        }
    }

    #[test]
    fn what_a_block_becomes_is_what_the_next_ones_see() {
        let model = random::model(random::tiny("llama"), 3).expect("a model");
        let tokens: Vec<u32> = (0..64).map(|i| (i * 31 + 5) % 96).collect();
        let zero = |model: &mut Model| {
            put(model, "model.layers.0.self_attn.o_proj.weight", &[32, 64], 0.0);
            put(model, "model.layers.0.mlp.down_proj.weight", &[32, 80], 0.0);
        };
        let tops = |mut model: Model, change: bool| {
            let (mut found, mut first) = (Vec::new(), true);
            let mut zeros = model.clone();
            zero(&mut zeros);
            walked(&mut model, &tokens, Rows::All, &mut |block| {
                found.push(block.sites[0].1.tops.clone());
                if change && first {
                    *block.weights = zeros.weights.clone();
                }
                first = false;
            })
            .expect("walks");
            found
        };
        let mut before = model.clone();
        zero(&mut before);
        let (changed, from_start) = (tops(model.clone(), true), tops(before, false));
        let plain = tops(model, false);
        assert_eq!(changed[0], plain[0], "the first block is seen as it was");
        assert_eq!(changed[1..], from_start[1..]);
        assert_ne!(changed[1], plain[1]);
    }

    #[test]
    fn numbers_that_are_not_finite_name_the_block() {
        let mut model = random::model(random::tiny("llama"), 3).expect("a model");
        put(&mut model, "model.layers.1.input_layernorm.weight", &[32], f32::MAX);
        let tokens: Vec<u32> = (0..16).collect();
        let error = walked(&mut model, &tokens, Rows::All, &mut |_| ()).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains("block 1"), "{error}");
    }
}
