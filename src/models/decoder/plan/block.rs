//! One transformer block over the rows of a step.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::rotary::{Rotary, Table};
use super::super::{Activation, Config, LayerKind};
use super::adapters::{Adapters, Norm, Site};
use super::attention::{self, Span, Store};
use super::linear::{self, Arithmetic, Linear};
use super::{Chunk, Tap, vector};
use crate::error::Result;
use crate::kernels::quantize::Activations;
use crate::kernels::threads::for_row_pairs;
use crate::kernels::{activation, norm, rope};
use crate::nn::weight::Weight;

/// Rows that walk through a block at once; bounds the memory of long inputs.
const WALK_ROWS: usize = 1024;
/// Elements below which a loop over rows stays on its thread.
const GRAIN: usize = 1 << 14;

/// Rotary angles of global and of local layers.
#[derive(Debug, Clone)]
pub(super) struct Rotaries {
    global: Arc<Rotary>,
    local: Arc<Rotary>,
}

impl Rotaries {
    pub fn new(config: &Config) -> Self {
        let global = Arc::new(Rotary::new(&config.rope, config.head_dim));
        let local = match &config.local_rope {
            Some(rope) => Arc::new(Rotary::new(rope, config.head_dim)),
            None => Arc::clone(&global),
        };
        Self { global, local }
    }

    fn of(&self, kind: LayerKind) -> &Arc<Rotary> {
        match kind {
            LayerKind::Global => &self.global,
            LayerKind::Local => &self.local,
        }
    }
}

/// Activations of a step, kept between steps so that decoding allocates nothing. Each holds rows of
/// the width that [`Layer::forward`] gives it.
#[derive(Default)]
pub(super) struct Buffers {
    x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    delta: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// The input of products, in 8 bits.
    pub rounded: Activations,
    /// What adapters add to the rows of the step.
    pub adapters: Adapters,
}

/// The first `len` elements of a buffer that grows but never shrinks.
pub(super) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Calls `f` with the index and the rows of two matrices of equally many rows, in parallel when there
/// is enough of them.
pub(super) fn each_row(
    a: &mut [f32],
    a_width: usize,
    b: &mut [f32],
    b_width: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    for_row_pairs(a, a_width, b, b_width, (GRAIN / (a_width + b_width)).max(1), f);
}

/// The weights of one block, ready to run.
pub(super) struct Layer {
    config: Arc<Config>,
    index: usize,
    /// Channels inside of the feed-forward network.
    wide: usize,
    rotary: Arc<Rotary>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    gate: Linear,
    up: Linear,
    down: Linear,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    before_attention: Vec<f32>,
    after_attention: Option<Vec<f32>>,
    before_mlp: Vec<f32>,
    after_mlp: Option<Vec<f32>>,
}

impl Layer {
    pub fn new(
        config: &Arc<Config>,
        weights: &BTreeMap<String, Arc<Weight>>,
        index: usize,
        rotaries: &Rotaries,
        arithmetic: Arithmetic,
    ) -> Result<Self> {
        let (hidden, wide) = (config.hidden, config.wide(index));
        let (q, kv) = (config.query_channels(), config.key_channels());
        let linear = |name: &str, rows: usize, cols: usize, biased: bool| {
            let name = format!("model.layers.{index}.{name}");
            Linear::new(weights, &name, [rows, cols], biased, arithmetic)
        };
        let norm = |name: &str, len: usize| {
            let mut weight = vector(weights, &format!("model.layers.{index}.{name}.weight"), len)?;
            if config.norm_offset {
                weight.iter_mut().for_each(|w| *w += 1.0);
            }
            Ok(weight)
        };
        let when = |wanted: bool, name: &str, len: usize| -> Result<Option<Vec<f32>>> {
            if wanted { norm(name, len).map(Some) } else { Ok(None) }
        };
        let post = config.post_norms;
        Ok(Self {
            index,
            wide,
            rotary: Arc::clone(rotaries.of(config.layers[index])),
            q: linear("self_attn.q_proj", q, hidden, config.qkv_bias)?,
            k: linear("self_attn.k_proj", kv, hidden, config.qkv_bias)?,
            v: linear("self_attn.v_proj", kv, hidden, config.qkv_bias)?,
            o: linear("self_attn.o_proj", hidden, q, config.output_bias)?,
            gate: linear("mlp.gate_proj", wide, hidden, config.mlp_bias)?,
            up: linear("mlp.up_proj", wide, hidden, config.mlp_bias)?,
            down: linear("mlp.down_proj", hidden, wide, config.mlp_bias)?,
            q_norm: when(config.qk_norm, "self_attn.q_norm", config.head_dim)?,
            k_norm: when(config.qk_norm, "self_attn.k_norm", config.head_dim)?,
            before_attention: norm("input_layernorm", hidden)?,
            after_attention: when(post, "post_attention_layernorm", hidden)?,
            // The same name stands for different places: with norms on both sides it is the one after
            // attention, otherwise the one before the feed-forward network.
            before_mlp: match post {
                true => norm("pre_feedforward_layernorm", hidden)?,
                false => norm("post_attention_layernorm", hidden)?,
            },
            after_mlp: when(post, "post_feedforward_layernorm", hidden)?,
            config: Arc::clone(config),
        })
    }

    /// Bytes of the weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        let linears = [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down];
        let norms = [&self.q_norm, &self.k_norm, &self.after_attention, &self.after_mlp];
        let norms = norms.into_iter().flatten().chain([&self.before_attention, &self.before_mlp]);
        linears.iter().map(|linear| linear.bytes()).sum::<u64>()
            + norms.map(|norm| size_of_val(&norm[..]) as u64).sum::<u64>()
    }

    /// Runs the block over `hidden` (`[rows, hidden]`, in place). `spans` tile the rows. With chunks
    /// keys and values are appended to their caches; without, every span is a sequence of its own.
    pub fn forward(
        &self,
        buffers: &mut Buffers,
        hidden: &mut [f32],
        spans: &[Span],
        chunks: Option<&mut [Chunk<'_>]>,
        mut tap: Option<&mut Tap<'_>>,
    ) {
        let config = &*self.config;
        let (width, wide) = (config.hidden, self.wide);
        let (q_width, kv_width) = (config.query_channels(), config.key_channels());
        let rows = hidden.len() / width;
        let eps = config.norm_eps;
        let x = sized(&mut buffers.x, rows * width);
        let q = sized(&mut buffers.q, rows * q_width);
        let k = sized(&mut buffers.k, rows * kv_width);
        let v = sized(&mut buffers.v, rows * kv_width);
        let attended = sized(&mut buffers.attended, rows * q_width);
        let delta = sized(&mut buffers.delta, rows * width);
        let gate = sized(&mut buffers.gate, rows * wide);
        let up = sized(&mut buffers.up, rows * wide);
        let adapters = &mut buffers.adapters;
        let mut tap = |group: usize, rows: &[f32]| {
            if let Some(tap) = &mut tap {
                tap(group, rows);
            }
        };

        let rounded = &mut buffers.rounded;
        let outputs = [(&self.q, &mut *q), (&self.k, &mut *k), (&self.v, &mut *v)];
        linear::run_made([hidden, x], [width; 2], rounded, outputs, |_, h, x| {
            norm::rms_norm(h, &self.before_attention, eps, x);
        });
        adapters.norm(self.index, Norm::BeforeAttention, hidden, x, eps);
        tap(0, x);
        adapters.add(self.index, Site::Q, x, q);
        adapters.add(self.index, Site::K, x, k);
        adapters.add(self.index, Site::V, x, v);
        let end = spans.iter().map(|s| s.first + s.rows.len()).max().unwrap_or(0);
        self.place(&self.rotary.upto(end), spans, adapters, q, k);
        match chunks {
            Some(chunks) => {
                for span in spans {
                    let range = span.rows.start * kv_width..span.rows.end * kv_width;
                    chunks[span.chunk].cache.write(self.index, &k[range.clone()], &v[range]);
                }
                attention::run(config, self.index, spans, q, &Store::Caches(chunks), attended);
            }
            None => {
                let store = Store::Step { keys: k, values: v };
                attention::run(config, self.index, spans, q, &store, attended);
            }
        }
        tap(1, attended);
        linear::run(attended, q_width, rounded, [(&self.o, &mut *delta)]);
        adapters.add(self.index, Site::O, attended, delta);
        adapters.norm(self.index, Norm::AfterAttention, delta, hidden, eps);
        let outputs = [(&self.gate, &mut *gate), (&self.up, &mut *up)];
        linear::run_made([hidden, x], [width; 2], rounded, outputs, |i, h, x| {
            let delta = &delta[i * width..][..width];
            add_normed(h, delta, self.after_attention.as_deref(), eps, x);
            norm::rms_norm(h, &self.before_mlp, eps, x);
        });
        adapters.norm(self.index, Norm::BeforeMlp, hidden, x, eps);
        tap(2, x);
        adapters.add(self.index, Site::Gate, x, gate);
        adapters.add(self.index, Site::Up, x, up);
        let gated = match config.activation {
            Activation::Silu => activation::silu_gated,
            Activation::GeluTanh => activation::gelu_gated,
        };
        let outputs = [(&self.down, &mut *delta)];
        linear::run_made([up, gate], [wide; 2], rounded, outputs, |_, up, gate| gated(gate, up));
        tap(3, gate);
        adapters.add(self.index, Site::Down, gate, delta);
        adapters.norm(self.index, Norm::AfterMlp, delta, hidden, eps);
        each_row(hidden, width, x, width, |i, h, x| {
            add_normed(h, &delta[i * width..][..width], self.after_mlp.as_deref(), eps, x);
        });
    }

    /// Norms the heads of queries and keys where the architecture does, and turns them to their
    /// positions.
    fn place(
        &self,
        table: &Table,
        spans: &[Span],
        adapters: &Adapters,
        q: &mut [f32],
        k: &mut [f32],
    ) {
        let config = &*self.config;
        let changed =
            adapters.head_norms(self.index, [self.q_norm.as_deref(), self.k_norm.as_deref()]);
        let (q_width, kv_width) = (config.query_channels(), config.key_channels());
        let heads = |row: &mut [f32], weight: Option<&Vec<f32>>| {
            if let Some(weight) = weight {
                for head in row.chunks_exact_mut(config.head_dim) {
                    norm::rms_norm_in_place(head, weight, config.norm_eps);
                }
            }
        };
        for span in spans {
            let q = &mut q[span.rows.start * q_width..span.rows.end * q_width];
            let k = &mut k[span.rows.start * kv_width..span.rows.end * kv_width];
            each_row(q, q_width, k, kv_width, |i, q, k| {
                let own = changed.as_ref().map(|c| c.of(span.rows.start + i)).unwrap_or_default();
                heads(q, own[0].or(self.q_norm.as_ref()));
                heads(k, own[1].or(self.k_norm.as_ref()));
                let (cos, sin) = table.at(span.first + i);
                rope::rotate(q, cos, sin);
                rope::rotate(k, cos, sin);
            });
        }
    }
}

/// `hidden += delta`, normed first where there is a weight; `scratch` has the same length.
fn add_normed(
    hidden: &mut [f32],
    delta: &[f32],
    weight: Option<&[f32]>,
    eps: f32,
    scratch: &mut [f32],
) {
    match weight {
        None => norm::add(hidden, delta),
        Some(weight) => {
            norm::rms_norm(delta, weight, eps, scratch);
            norm::add(hidden, scratch);
        }
    }
}

/// One block, for walking through a model layer by layer.
pub struct Block {
    layer: Layer,
}

impl Block {
    /// Takes block `layer`'s weights from the map of a model.
    ///
    /// # Errors
    /// A layer that does not exist, a missing tensor, or one of the wrong shape.
    pub fn new(
        config: &Config,
        weights: &BTreeMap<String, Arc<Weight>>,
        layer: usize,
    ) -> Result<Self> {
        if layer >= config.layers.len() {
            return Err(crate::error::Error::internal(format!(
                "block {layer} of {} was asked for",
                config.layers.len()
            )));
        }
        let rotaries = Rotaries::new(config);
        let config = Arc::new(config.clone());
        let layer = Layer::new(&config, weights, layer, &rotaries, Arithmetic::Exact)?;
        Ok(Self { layer })
    }

    /// Hidden states in, hidden states out, in place: `hidden` is `[sequences * length, hidden]`, each
    /// sequence starts at position 0 and sees only itself. Long inputs run a few sequences at a time, so
    /// the tap sees each group of linears once for every piece, in order.
    pub fn forward(&self, hidden: &mut [f32], length: usize, mut tap: Option<&mut Tap<'_>>) {
        let width = self.layer.config.hidden;
        let sequence = length * width;
        if sequence == 0 {
            return;
        }
        let mut buffers = Buffers::default();
        for piece in hidden.chunks_mut((WALK_ROWS / length).max(1) * sequence) {
            let spans: Vec<Span> = (0..piece.len() / sequence)
                .map(|i| Span { chunk: i, token: 0, rows: i * length..(i + 1) * length, first: 0 })
                .collect();
            // A closure of this call's lifetime, so that the tap can be lent once a piece.
            match &mut tap {
                Some(tap) => {
                    self.layer.forward(&mut buffers, piece, &spans, None, Some(&mut **tap))
                }
                None => self.layer.forward(&mut buffers, piece, &spans, None, None),
            }
        }
    }
}
