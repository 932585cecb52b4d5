//! One block over the rows of a step.

use std::ops::Range;
use std::sync::Arc;

use super::super::{Activation, Config, Model};
use super::adapters::{Place, Room, Rows, Site};
use super::linear::{Inputs, Linear, Precision, products};
use super::{GRAIN, MLP_ROWS};
use crate::error::{Error, Reason, Result};
use crate::kernels::quantize::Grain;
use crate::kernels::{activation, bidirectional, norm, threads};
use crate::models::decoder::plan::Tap;
use crate::nn::weight::Weight;

/// A layer normalisation.
#[derive(Debug, Clone)]
pub(super) struct Norm {
    pub weight: Vec<f32>,
    pub shift: Vec<f32>,
    eps: f32,
}

impl Norm {
    pub fn new(model: &Model, place: &str) -> Result<Self> {
        let config = &model.family;
        Ok(Self {
            weight: vector(model, &format!("{place}.LayerNorm.weight"), config.hidden)?,
            shift: vector(model, &format!("{place}.LayerNorm.bias"), config.hidden)?,
            eps: config.norm_eps,
        })
    }

    pub fn apply(&self, rows: &mut [f32]) {
        norm::layer_norm(rows, &self.weight, &self.shift, self.eps);
    }

    /// Calls `f` with runs of rows, in order, and the normalisation that is theirs.
    pub fn by_runs(
        &self,
        (adapters, place): (&Rows<'_>, Place),
        rows: usize,
        mut f: impl FnMut(&Self, Range<usize>),
    ) {
        let mut at = 0;
        for (run, own) in adapters.norms(place, self) {
            if at < run.start {
                f(self, at..run.start);
            }
            at = run.end;
            f(&own, run);
        }
        if at < rows {
            f(self, at..rows);
        }
    }

    /// The end of a block's half: `states = norm(states + delta + bias)`.
    fn add(&self, states: &mut [f32], delta: &[f32], bias: &[f32]) {
        let width = self.weight.len();
        threads::for_rows(states, width, GRAIN / width + 1, |first, rows| {
            let delta = &delta[first * width..][..rows.len()];
            norm::add_layer_norm(rows, delta, bias, &self.weight, &self.shift, self.eps);
        });
    }
}

/// Activations of a step, kept between steps so that embedding allocates little.
#[derive(Default)]
pub(super) struct Buffers {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    delta: Vec<f32>,
    wide: Vec<f32>,
    /// The input of products, in fewer bits.
    inputs: Inputs,
    /// What adapters take.
    room: Room,
}

/// The weights of one block, ready to run.
pub(super) struct Layer {
    config: Arc<Config>,
    index: usize,
    /// Channels inside of the feed-forward network.
    wide: usize,
    /// Of queries, keys and values; they share their input.
    qkv: [Linear; 3],
    out: Linear,
    after_attention: Norm,
    up: Linear,
    down: Linear,
    after_mlp: Norm,
}

impl Layer {
    pub fn new(
        model: &Model,
        config: &Arc<Config>,
        index: usize,
        precision: Precision,
    ) -> Result<Self> {
        let (hidden, wide) = (config.hidden, config.wide(index));
        let place = |name: &str| format!("encoder.layer.{index}.{name}");
        let linear = |name: &str, rows, cols, grain| {
            Linear::new(model, &place(name), [rows, cols], precision, grain)
        };
        // A few channels of the states are ten times as large as the others. Where whole tokens shared a
        // scale, they would leave too few bits to the others; queries and keys suffer most, as scores are
        // exponents. Elsewhere the faster products do.
        let (fine, coarse) = (Grain::Block, Grain::Token);
        Ok(Self {
            qkv: [
                linear("attention.self.query", hidden, hidden, fine)?,
                linear("attention.self.key", hidden, hidden, fine)?,
                linear("attention.self.value", hidden, hidden, fine)?,
            ],
            out: linear("attention.output.dense", hidden, hidden, coarse)?,
            after_attention: Norm::new(model, &place("attention.output"))?,
            up: linear("intermediate.dense", wide, hidden, coarse)?,
            down: linear("output.dense", hidden, wide, coarse)?,
            after_mlp: Norm::new(model, &place("output"))?,
            wide,
            config: Arc::clone(config),
            index,
        })
    }

    /// Runs the block over `states` (`[rows, hidden]`, in place); `sequences` tile the rows. `tap` sees the
    /// input rows of each group of linears, as [`Config::linears`] has them, those of the last two piece by
    /// piece.
    pub fn forward(
        &self,
        buffers: &mut Buffers,
        states: &mut [f32],
        sequences: &[Range<usize>],
        adapters: &Rows<'_>,
        mut tap: Option<&mut Tap<'_>>,
    ) {
        let config = &*self.config;
        let rows = states.len() / config.hidden;
        let len = states.len();
        let q = sized(&mut buffers.q, len);
        let k = sized(&mut buffers.k, len);
        let v = sized(&mut buffers.v, len);
        let attended = sized(&mut buffers.attended, len);
        let delta = sized(&mut buffers.delta, len);
        let wide = sized(&mut buffers.wide, rows.min(MLP_ROWS) * self.wide);
        let mut tap = |group: usize, rows: &[f32]| {
            if let Some(tap) = &mut tap {
                tap(group, rows);
            }
        };

        let (inputs, room) = (&mut buffers.inputs, &mut buffers.room);
        let (width, index) = (config.hidden, self.index);
        let [query, key, value] = &self.qkv;
        let outputs = [(query, &mut *q), (key, &mut *k), (value, &mut *v)];
        tap(0, states);
        products(states, width, inputs, outputs);
        adapters.add((index, Site::Query), states, q, &query.bias, room);
        adapters.add((index, Site::Key), states, k, &key.bias, room);
        adapters.add((index, Site::Value), states, v, &value.bias, room);
        let shape = bidirectional::Shape {
            heads: config.heads,
            dim: config.head_dim(),
            scale: 1.0 / (config.head_dim() as f32).sqrt(),
        };
        let qkv = (biased(q, query), biased(k, key), biased(v, value));
        bidirectional::attend(&shape, sequences, qkv, attended);
        tap(1, attended);
        products(attended, width, inputs, [(&self.out, &mut *delta)]);
        adapters.add((index, Site::Out), attended, delta, &self.out.bias, room);
        let place = (adapters, Place::AfterAttention(index));
        self.after_attention.by_runs(place, rows, |norm, run| {
            let run = run.start * width..run.end * width;
            norm.add(&mut states[run.clone()], &delta[run], &self.out.bias);
        });
        let pieces = states.chunks_mut(MLP_ROWS * width).zip(delta.chunks_mut(MLP_ROWS * width));
        for (piece, (states, delta)) in pieces.enumerate() {
            let (rows, first) = (states.len() / width, piece * MLP_ROWS);
            let adapters = &adapters.within(first..first + rows);
            let wide = &mut wide[..rows * self.wide];
            tap(2, states);
            products(states, width, inputs, [(&self.up, &mut *wide)]);
            adapters.add((index, Site::Up), states, wide, &self.up.bias, room);
            self.activate(wide);
            tap(3, wide);
            products(wide, self.wide, inputs, [(&self.down, &mut *delta)]);
            adapters.add((index, Site::Down), wide, delta, &self.down.bias, room);
            let place = (adapters, Place::AfterMlp(index));
            self.after_mlp.by_runs(place, rows, |norm, run| {
                let run = run.start * width..run.end * width;
                norm.add(&mut states[run.clone()], &delta[run], &self.down.bias);
            });
        }
    }

    /// Bytes of the matrices.
    pub fn weight_bytes(&self) -> u64 {
        let linears = self.qkv.iter().chain([&self.out, &self.up, &self.down]);
        linears.map(Linear::bytes).sum()
    }

    fn activate(&self, wide: &mut [f32]) {
        let bias = &self.up.bias;
        let run = match self.config.activation {
            Activation::Gelu => activation::bias_gelu,
            Activation::GeluTanh => activation::bias_gelu_tanh,
            Activation::Relu => activation::bias_relu,
        };
        threads::for_rows(wide, bias.len(), GRAIN / bias.len() + 1, |_, rows| run(rows, bias));
    }
}

fn biased<'a>(rows: &'a [f32], linear: &'a Linear) -> bidirectional::Input<'a> {
    bidirectional::Input { rows, bias: &linear.bias }
}

/// The first `len` elements of a buffer that grows but never shrinks.
pub(super) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// The weight `name`, which must have `shape`.
pub(in super::super) fn tensor<'a>(
    model: &'a Model,
    name: &str,
    shape: &[usize],
) -> Result<&'a Arc<Weight>> {
    let weight = model.weight(name)?;
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

pub(super) fn vector(model: &Model, name: &str, len: usize) -> Result<Vec<f32>> {
    tensor(model, name, &[len]).map(|weight| weight.to_f32())
}
