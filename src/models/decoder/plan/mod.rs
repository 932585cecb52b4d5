//! The forward that serves, evaluates and calibrates: preallocated buffers, weights in their layouts.

pub mod adapters;
mod attention;
mod block;
mod cache;
mod linear;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

pub use block::Block;
pub use cache::{Cache, CacheFormat, PAGE, Page, PagePool};
pub use linear::Arithmetic;

use self::adapters::Mix;
use self::attention::Span;
use self::block::{Buffers, Layer, Rotaries, sized};
use self::linear::Matrix;
use super::Config;
use super::config::{EMBEDDING, FINAL_NORM};
use crate::error::{Error, Reason, Result};
use crate::kernels::quantize::Activations;
use crate::kernels::threads::for_rows;
use crate::kernels::{activation, norm};
use crate::models::Model;
use crate::nn::weight::Weight;

/// Rows that run through the layers at once; longer inputs are cut, so memory stays bounded.
const STEP: usize = 512;
/// Logits below which capping them stays on its thread.
const CAP_GRAIN: usize = 1 << 14;

/// Called with the input of each group of linears that share one: the group's index within the block
/// (as in [`Config::linears`]) and the rows `[tokens, in]`.
pub type Tap<'a> = dyn FnMut(usize, &[f32]) + 'a;

/// One sequence's share of a step: its new tokens and its cache.
pub struct Chunk<'a> {
    pub tokens: &'a [u32],
    pub cache: &'a mut Cache,
    /// Which of the new tokens' logits are wanted.
    pub logits: Range<usize>,
}

/// A decoder ready to run. Weights are shared with the model unless they were packed; buffers are its
/// own.
pub struct Decoder {
    config: Arc<Config>,
    embedding: Matrix,
    layers: Vec<Layer>,
    head: Head,
    hidden: Vec<f32>,
    wanted: Vec<f32>,
    buffers: Buffers,
    /// Those of the present step; kept, like the buffers, so that decoding allocates nothing.
    spans: Vec<Span>,
    /// The rows of the step whose output is wanted.
    rows: Vec<usize>,
    out: Vec<f32>,
}

/// What a forward gives for each wanted row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Output {
    Logits,
    /// What the head makes logits of.
    States,
}

impl Decoder {
    /// A decoder that computes in f32. Checks that every tensor is there and has its shape.
    pub fn new(model: &Model) -> Result<Self> {
        Self::with(model, Arithmetic::Exact)
    }

    /// A decoder that computes as asked. Checks that every tensor is there and has its shape.
    pub fn with(model: &Model, arithmetic: Arithmetic) -> Result<Self> {
        let config = Arc::new(model.decoder()?.clone());
        let rotaries = Rotaries::new(&config);
        let layers = (0..config.layers.len())
            .map(|i| Layer::new(&config, &model.weights, i, &rotaries, arithmetic))
            .collect::<Result<_>>()?;
        let head = Head::with(&config, &model.weights, arithmetic)?;
        let embedding = match config.tied {
            true => head.matrix.clone(),
            false => {
                let shape = [config.vocab, config.hidden];
                Matrix::Plain(Arc::clone(tensor(&model.weights, EMBEDDING, &shape)?))
            }
        };
        Ok(Self {
            config,
            embedding,
            layers,
            head,
            hidden: Vec::new(),
            wanted: Vec::new(),
            buffers: Buffers::default(),
            spans: Vec::new(),
            rows: Vec::new(),
            out: Vec::new(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of the weights in memory, as they are multiplied with.
    pub fn weight_bytes(&self) -> u64 {
        let layers: u64 = self.layers.iter().map(Layer::weight_bytes).sum();
        let embedding = if self.config.tied { 0 } else { self.embedding.bytes() };
        layers + embedding + self.head.matrix.bytes() + size_of_val(&self.head.norm[..]) as u64
    }

    /// Runs the new tokens of several sequences at once; returns the wanted logits `[wanted, vocab]`,
    /// chunk by chunk. Caches grow by their tokens. Token ids must be below the vocabulary size and
    /// caches must have room (checked, errors name the chunk; then no cache has changed).
    pub fn forward(&mut self, chunks: &mut [Chunk<'_>]) -> Result<&[f32]> {
        self.run(chunks, &[], Output::Logits)
    }

    /// Like [`Decoder::forward`], each chunk with the adapters at its place; chunks beyond the end of
    /// `adapters` have none. Adapters must fit the decoder (checked as the chunks are).
    pub fn forward_with(&mut self, chunks: &mut [Chunk<'_>], adapters: &[Mix]) -> Result<&[f32]> {
        self.run(chunks, adapters, Output::Logits)
    }

    /// Like [`Decoder::forward`], but gives the final hidden states `[wanted, hidden]`, of which a
    /// [`Head`] makes the logits.
    pub fn states(&mut self, chunks: &mut [Chunk<'_>]) -> Result<&[f32]> {
        self.run(chunks, &[], Output::States)
    }

    fn run(
        &mut self,
        chunks: &mut [Chunk<'_>],
        adapters: &[Mix],
        output: Output,
    ) -> Result<&[f32]> {
        for (i, chunk) in chunks.iter().enumerate() {
            self.check(chunk)
                .and_then(|()| adapters.get(i).map_or(Ok(()), |mix| mix.check(&self.config)))
                .map_err(|error| error.within(&format!("chunk {i}")))?;
        }
        for chunk in chunks.iter_mut() {
            chunk.cache.prepare(chunk.tokens.len())?;
        }
        let width = match output {
            Output::Logits => self.config.vocab,
            Output::States => self.config.hidden,
        };
        let wanted: usize = chunks.iter().map(|c| c.logits.len()).sum();
        let total = sized(&mut self.out, wanted * width).len();

        let mut done = 0;
        let (mut chunk, mut token) = (0, 0);
        while chunk < chunks.len() {
            // Fill a step with what is left of the chunks, in order.
            self.spans.clear();
            let mut rows = 0;
            while chunk < chunks.len() && rows < STEP {
                let Chunk { tokens, cache, .. } = &chunks[chunk];
                let take = (tokens.len() - token).min(STEP - rows);
                if take > 0 {
                    let (rows, first) = (rows..rows + take, cache.len());
                    self.spans.push(Span { chunk, token, rows, first });
                }
                (rows, token) = (rows + take, token + take);
                if token == tokens.len() {
                    (chunk, token) = (chunk + 1, 0);
                }
            }
            if rows > 0 {
                done += self.step(chunks, adapters, (rows, done), output);
            }
        }
        debug_assert_eq!(done, wanted);
        Ok(&self.out[..total])
    }

    fn check(&self, chunk: &Chunk<'_>) -> Result<()> {
        check_tokens(&self.config, chunk.tokens)?;
        let (held, room) = (chunk.cache.len(), chunk.cache.capacity());
        if !chunk.cache.fits(&self.config) {
            return Err(Error::internal("the cache was made for another model"));
        }
        if chunk.tokens.len() > room - held {
            return Err(Error::new(
                Reason::LimitReached,
                format!(
                    "{} new tokens do not fit into a cache that holds {held} of {room} positions; \
                     make the text shorter or the cache larger",
                    chunk.tokens.len()
                ),
            ));
        }
        let Range { start, end } = chunk.logits;
        if start > end || end > chunk.tokens.len() {
            return Err(Error::internal(format!(
                "logits {start}..{end} of {} tokens were asked for",
                chunk.tokens.len()
            )));
        }
        Ok(())
    }

    /// Runs the tokens of the spans; writes their wanted output from row `first` on, returns how many
    /// rows.
    fn step(
        &mut self,
        chunks: &mut [Chunk<'_>],
        adapters: &[Mix],
        (rows, first): (usize, usize),
        output: Output,
    ) -> usize {
        let width = self.config.hidden;
        let hidden = sized(&mut self.hidden, rows * width);
        let spans = &self.spans[..];
        for span in spans {
            let out = &mut hidden[span.rows.start * width..span.rows.end * width];
            let tokens = &chunks[span.chunk].tokens[span.token..][..span.rows.len()];
            embed_rows(&self.config, tokens, out, |row, out| self.embedding.read_row(row, out));
        }
        let mixes = spans.iter().filter_map(|s| Some((adapters.get(s.chunk)?, s.rows.clone())));
        self.buffers.adapters.start(rows, mixes);
        let token = |row: usize| {
            let at = spans.partition_point(|span| span.rows.end <= row);
            let Span { chunk, token, rows, .. } = &spans[at];
            chunks[*chunk].tokens[token + row - rows.start]
        };
        self.buffers.adapters.embed(token, self.config.embedding_scale, hidden);
        for layer in &self.layers {
            layer.forward(&mut self.buffers, hidden, spans, Some(&mut *chunks), None);
        }
        for span in spans {
            chunks[span.chunk].cache.advance(span.rows.len());
        }

        // Only the rows whose logits are wanted go through the head.
        let wanted = sized(&mut self.wanted, rows * width);
        let mut count = 0;
        self.rows.clear();
        for Span { chunk, token, rows, .. } in spans {
            let Range { start, end } = chunks[*chunk].logits;
            let low = start.clamp(*token, token + rows.len()) - token;
            let high = end.clamp(*token, token + rows.len()) - token;
            let from = &hidden[(rows.start + low) * width..(rows.start + high) * width];
            wanted[count * width..][..from.len()].copy_from_slice(from);
            self.rows.extend(rows.start + low..rows.start + high);
            count += high - low;
        }
        let wanted = &mut wanted[..count * width];
        let more = self.buffers.adapters.last_norm(&self.rows, wanted, self.config.norm_eps);
        self.buffers.adapters.end();
        match output {
            _ if count == 0 => {}
            Output::Logits => {
                let vocab = self.config.vocab;
                let logits = &mut self.out[first * vocab..(first + count) * vocab];
                self.head.finish_with(wanted, more.as_deref(), logits, &mut self.buffers.rounded);
            }
            Output::States => {
                self.out[first * width..(first + count) * width].copy_from_slice(wanted);
            }
        }
        count
    }
}

/// The final norm and the output matrix.
pub struct Head {
    norm: Vec<f32>,
    matrix: Matrix,
    eps: f32,
    softcap: Option<f32>,
}

impl Head {
    /// Takes the final norm and the head (the embedding where they are tied) from the map of a model.
    pub fn new(config: &Config, weights: &BTreeMap<String, Arc<Weight>>) -> Result<Self> {
        Self::with(config, weights, Arithmetic::Exact)
    }

    fn with(
        config: &Config,
        weights: &BTreeMap<String, Arc<Weight>>,
        arithmetic: Arithmetic,
    ) -> Result<Self> {
        let mut norm = vector(weights, FINAL_NORM, config.hidden)?;
        if config.norm_offset {
            norm.iter_mut().for_each(|w| *w += 1.0);
        }
        let shape = [config.vocab, config.hidden];
        Ok(Self {
            norm,
            matrix: Matrix::new(tensor(weights, config.head_name(), &shape)?, arithmetic),
            eps: config.norm_eps,
            softcap: config.final_softcap,
        })
    }

    /// Logits `[rows, vocab]` of final hidden states `[rows, hidden]`, which are left normed.
    pub fn finish(&self, hidden: &mut [f32], logits: &mut [f32]) {
        self.finish_with(hidden, None, logits, &mut Activations::default());
    }

    /// `more` is added to the normed states.
    fn finish_with(
        &self,
        hidden: &mut [f32],
        more: Option<&[f32]>,
        logits: &mut [f32],
        rounded: &mut Activations,
    ) {
        for row in hidden.chunks_exact_mut(self.norm.len()) {
            norm::rms_norm_in_place(row, &self.norm, self.eps);
        }
        if let Some(more) = more {
            norm::add(hidden, more);
        }
        let width = self.norm.len();
        linear::multiply(hidden, width, rounded, [(&self.matrix, &mut *logits)]);
        if let Some(cap) = self.softcap {
            for_rows(logits, 1, CAP_GRAIN, |_, part| activation::softcap(part, cap));
        }
    }
}

/// Embeddings of tokens (scaled as the config asks), `[tokens, hidden]`. Tokens must be below the
/// vocabulary size, see [`check_tokens`].
pub fn embed(config: &Config, embedding: &Weight, tokens: &[u32], out: &mut [f32]) {
    embed_rows(config, tokens, out, |row, out| embedding.read_rows(row, out));
}

fn embed_rows(config: &Config, tokens: &[u32], out: &mut [f32], read: impl Fn(usize, &mut [f32])) {
    for (token, row) in tokens.iter().zip(out.chunks_exact_mut(config.hidden)) {
        read(*token as usize, row);
        if config.embedding_scale != 1.0 {
            row.iter_mut().for_each(|v| *v *= config.embedding_scale);
        }
    }
}

/// Refuses token ids outside the vocabulary.
pub fn check_tokens(config: &Config, tokens: &[u32]) -> Result<()> {
    match tokens.iter().enumerate().find(|(_, t)| **t as usize >= config.vocab) {
        None => Ok(()),
        Some((i, token)) => Err(Error::field(
            format!("tokens[{i}]"),
            format!("{token} is outside the vocabulary of {} tokens", config.vocab),
        )),
    }
}

/// The weight `name`, which must have `shape`.
pub(super) fn tensor<'a>(
    weights: &'a BTreeMap<String, Arc<Weight>>,
    name: &str,
    shape: &[usize],
) -> Result<&'a Arc<Weight>> {
    let weight = weights.get(name).ok_or_else(|| {
        Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
    })?;
    if weight.shape() != shape {
        return Err(Error::new(
            Reason::MalformedFile,
            format!(
                "tensor '{name}' has shape {:?}, but the configuration asks for {shape:?}",
                weight.shape()
            ),
        ));
    }
    Ok(weight)
}

fn vector(weights: &BTreeMap<String, Arc<Weight>>, name: &str, len: usize) -> Result<Vec<f32>> {
    tensor(weights, name, &[len]).map(|weight| weight.to_f32())
}
