//! The forward that serves: texts of all lengths in one matrix without padding, preallocated buffers,
//! weights in their layouts.

pub mod adapters;
mod block;
mod layer;
mod linear;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

pub use self::block::Block;
pub(super) use self::layer::tensor;
pub use self::linear::Precision;

use self::adapters::{Mix, Place, Rows};
use self::layer::{Buffers, Layer, Norm, sized};
use super::{Config, Model, Pooling, WORDS};
use crate::error::{Error, Result};
use crate::kernels::{norm, threads};
use crate::nn::weight::Weight;

/// Rows that run through the layers at once, where no single text is longer: enough for fast products.
const STEP: usize = 1024;
/// Elements of the widest buffer, for models so wide that fewer rows must do.
const ELEMENTS: usize = 1 << 26;
/// Rows of a group of texts that one thread takes through all layers: their states, and the weights of a
/// product, stay in its second-level cache.
const GROUP: usize = 256;
/// Rows whose widest states are there at once.
const MLP_ROWS: usize = 128;
/// Elements of rows that are worth a task of their own.
const GRAIN: usize = 1 << 13;

/// A text in tokens and what becomes of their states.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    pub tokens: &'a [u32],
    pub pooling: Pooling,
}

/// An encoder ready to run. Weights are shared with the model; buffers are its own.
pub struct Encoder {
    config: Arc<Config>,
    words: Arc<Weight>,
    /// Position embeddings with the one of type 0 added: a text alone has no other type.
    positions: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    states: Vec<f32>,
    /// Of each group of texts that runs at the same time as others.
    buffers: Vec<Buffers>,
}

impl Encoder {
    /// An encoder that computes in f32. Checks that every tensor is there and has its shape.
    pub fn new(model: &Model) -> Result<Self> {
        Self::with(model, Precision::F32)
    }

    /// An encoder that computes as asked. Checks that every tensor is there and has its shape.
    pub fn with(model: &Model, precision: Precision) -> Result<Self> {
        let config = Arc::new(model.family.clone());
        let words = layer::tensor(model, WORDS, &[config.vocab, config.hidden])?;
        Ok(Self {
            words: Arc::clone(words),
            positions: positions(model)?,
            norm: Norm::new(model, "embeddings")?,
            layers: (0..config.layers)
                .map(|i| Layer::new(model, &config, i, precision))
                .collect::<Result<_>>()?,
            states: Vec::new(),
            buffers: Vec::new(),
            config,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of the weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(Layer::weight_bytes).sum();
        layers + self.words.bytes() + size_of_val(&self.positions[..]) as u64
    }

    /// Rows of a full step; texts are gathered up to here.
    pub fn step_rows(&self) -> usize {
        let widest = self.config.intermediate.max(self.config.hidden);
        (ELEMENTS / widest).clamp(1, STEP)
    }

    /// One vector `[hidden]` for each input, in order. A vector depends on its own text alone.
    ///
    /// # Errors
    /// `INVALID_FIELD` that names the input for no tokens, ids outside the vocabulary, and more tokens
    /// than the model has positions; nothing has run then.
    pub fn embed(&mut self, inputs: &[Input<'_>], out: &mut [f32]) -> Result<()> {
        let width = self.config.hidden;
        assert_eq!(out.len(), inputs.len() * width, "room for one vector an input");
        self.run(inputs, &[], &mut |i, states| {
            pool(inputs[i].pooling, states, &mut out[i * width..][..width]);
        })
    }

    /// Runs the inputs, each with the adapters at its place (inputs beyond the end of `adapters` have none),
    /// and calls `see` once for each, in any order, with its index and the states of its tokens `[tokens,
    /// hidden]`; [`pool`] makes a vector of them. Adapters must fit (checked).
    ///
    /// # Errors
    /// As [`Encoder::embed`]; MODEL_UNSUITABLE for adapters of other shapes.
    pub fn run(
        &mut self,
        inputs: &[Input<'_>],
        adapters: &[Mix],
        see: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        for (i, input) in inputs.iter().enumerate() {
            check_tokens(&self.config, input.tokens)
                .and_then(|()| adapters.get(i).map_or(Ok(()), |mix| mix.check(&self.config)))
                .map_err(|e| e.within(&format!("inputs[{i}]")))?;
        }
        // Texts of like length side by side, the long ones first: threads end at the same time.
        let mut order: Vec<usize> = (0..inputs.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(inputs[i].tokens.len()));
        let most = self.step_rows();
        let mut left = order.as_slice();
        while !left.is_empty() {
            let mut rows = 0;
            let fitting = left.iter().take_while(|&&i| {
                rows += inputs[i].tokens.len();
                rows <= most
            });
            let (step, rest) = left.split_at(fitting.count().max(1));
            self.step(inputs, adapters, step, see);
            left = rest;
        }
        Ok(())
    }

    /// Runs some of the inputs at once.
    fn step(
        &mut self,
        inputs: &[Input<'_>],
        adapters: &[Mix],
        step: &[usize],
        see: &mut dyn FnMut(usize, &[f32]),
    ) {
        let width = self.config.hidden;
        // With their positions.
        let mut tokens: Vec<(u32, usize)> = Vec::new();
        let sequences: Vec<Range<usize>> = step
            .iter()
            .map(|&i| {
                let start = tokens.len();
                tokens.extend(inputs[i].tokens.iter().copied().zip(0..));
                start..tokens.len()
            })
            .collect();
        let mut rest = sized(&mut self.states, tokens.len() * width);
        let groups = groups(&sequences, threads::threads());
        if self.buffers.len() < groups.len() {
            self.buffers.resize_with(groups.len(), Buffers::default);
        }
        // Each is locked once, by the thread that takes it.
        let mut pieces = Vec::with_capacity(groups.len());
        for (group, buffers) in groups.iter().zip(&mut self.buffers) {
            let rows = sequences[group.start].start..sequences[group.end - 1].end;
            let states;
            (states, rest) = rest.split_at_mut(rows.len() * width);
            let own: Vec<_> = sequences[group.clone()]
                .iter()
                .map(|s| s.start - rows.start..s.end - rows.start)
                .collect();
            let mixes = step[group.clone()].iter().map(|&i| adapters.get(i));
            let mixes = Rows::new(own.iter().cloned().zip(mixes));
            pieces.push(Mutex::new((states, buffers, own, &tokens[rows], mixes)));
        }
        let (words, positions, norm) = (&*self.words, &self.positions, &self.norm);
        // Inside of a group that shares the threads with others nothing is shared out again.
        threads::share(pieces.len(), &|i| {
            let mut piece = pieces[i].lock().unwrap_or_else(PoisonError::into_inner);
            let (states, buffers, sequences, tokens, mixes) = &mut *piece;
            let changed = mixes.embed();
            threads::for_rows(states, width, GRAIN / width + 1, |first, rows| {
                for (row, &(token, position)) in rows.chunks_exact_mut(width).zip(&tokens[first..])
                {
                    words.read_rows(token as usize, row);
                    norm::add(row, &positions[position * width..][..width]);
                }
                if !changed {
                    norm.apply(rows);
                }
            });
            if changed {
                mixes.add_words(tokens, states);
                norm.by_runs((mixes, Place::Embeddings), tokens.len(), |norm, rows| {
                    norm.apply(&mut states[rows.start * width..rows.end * width]);
                });
            }
            for layer in &self.layers {
                layer.forward(buffers, states, sequences, mixes, None);
            }
        });
        drop(pieces);
        let states = &self.states;
        for (&i, rows) in step.iter().zip(&sequences) {
            see(i, &states[rows.start * width..rows.end * width]);
        }
    }
}

/// Position embeddings with the one of type 0 added: a text alone has no other type.
fn positions(model: &Model) -> Result<Vec<f32>> {
    let config = &model.family;
    let table = |name: &str, rows: usize| {
        let name = format!("embeddings.{name}.weight");
        layer::tensor(model, &name, &[rows, config.hidden]).cloned()
    };
    let mut positions = table("position_embeddings", config.max_positions)?.to_f32();
    let mut first = vec![0.0; config.hidden];
    table("token_type_embeddings", config.types)?.read_rows(0, &mut first);
    for row in positions.chunks_exact_mut(config.hidden) {
        norm::add(row, &first);
    }
    Ok(positions)
}

/// Splits texts, whose rows follow each other, into groups of about [`GROUP`] rows, as many as keep all
/// threads at work; one group, which all threads work on together, where that leaves some idle for long.
fn groups(sequences: &[Range<usize>], threads: usize) -> Vec<Range<usize>> {
    let rows = sequences.last().map_or(0, |s| s.end);
    let count = rows.div_ceil(GROUP).next_multiple_of(threads);
    let mut groups = Vec::with_capacity(count);
    let mut start = 0;
    for (i, sequence) in sequences.iter().enumerate() {
        if sequence.end * count >= rows * (groups.len() + 1) {
            groups.push(start..i + 1);
            start = i + 1;
        }
    }
    // Each thread takes the next group when it has done one.
    let mut busy = vec![0; threads];
    for group in &groups {
        if let Some(least) = busy.iter_mut().min() {
            *least += sequences[group.end - 1].end - sequences[group.start].start;
        }
    }
    let longest = busy.into_iter().max().unwrap_or(0);
    if longest * threads > rows + rows / 4 {
        return std::iter::once(0..sequences.len()).collect();
    }
    groups
}

/// Refuses what the embeddings have no rows for; errors blame `ids`.
pub fn check_tokens(config: &Config, tokens: &[u32]) -> Result<()> {
    if tokens.is_empty() {
        return Err(Error::field("ids", "no tokens; give at least one"));
    }
    if tokens.len() > config.max_positions {
        return Err(Error::field(
            "ids",
            format!(
                "{} tokens are more than the {} positions of the model; shorten the text",
                tokens.len(),
                config.max_positions
            ),
        ));
    }
    match tokens.iter().find(|id| **id as usize >= config.vocab) {
        None => Ok(()),
        Some(id) => Err(Error::field(
            "ids",
            format!("id {id} is outside the vocabulary of {}", config.vocab),
        )),
    }
}

/// One vector of the states of a text.
pub fn pool(pooling: Pooling, states: &[f32], out: &mut [f32]) {
    let (first, rest) = states.split_at(out.len());
    out.copy_from_slice(first);
    match pooling {
        Pooling::Cls => {}
        Pooling::Mean => {
            rest.chunks_exact(out.len()).for_each(|row| norm::add(out, row));
            let share = out.len() as f32 / states.len() as f32;
            out.iter_mut().for_each(|v| *v *= share);
        }
        Pooling::Max => {
            for row in rest.chunks_exact(out.len()) {
                for (o, v) in out.iter_mut().zip(row) {
                    // Not a number must show.
                    if *v > *o || v.is_nan() {
                        *o = *v;
                    }
                }
            }
        }
    }
}
