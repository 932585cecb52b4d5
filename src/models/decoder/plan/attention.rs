//! Attention of a step: cut into independent tasks and run on rayon's pool.

use std::ops::Range;

use rayon::prelude::*;

use super::super::Config;
use super::cache::Cache;
use crate::kernels::attention::{Elements, Queries, Rows, Shape, attend};

/// Query rows (positions times heads that share a key head) of a task: enough to fill the matrix
/// kernels, few enough to share out.
const TASK_ROWS: usize = 192;
/// Multiply-adds below which handing work to other threads costs more than it saves.
const SERIAL: usize = 1 << 17;

/// Consecutive rows of a step that belong to one sequence.
#[derive(Debug, Clone)]
pub(super) struct Span {
    /// Rows of the step's buffers.
    pub rows: Range<usize>,
    /// Position of the first row.
    pub first: usize,
}

/// Where the keys and values of the spans stand.
pub(super) enum Store<'a> {
    /// One cache a span, all new positions written.
    Caches(&'a [&'a Cache]),
    /// The step's own rows, for sequences that start with it.
    Step { keys: &'a [f32], values: &'a [f32] },
}

impl Store<'_> {
    fn head(
        &self,
        config: &Config,
        layer: usize,
        index: usize,
        span: &Span,
        head: usize,
    ) -> (Rows<'_>, Rows<'_>) {
        match self {
            Self::Caches(caches) => caches[index].head(layer, head),
            Self::Step { keys, values } => {
                let width = config.key_channels();
                let range = span.rows.start * width + head * config.head_dim..span.rows.end * width;
                let (stride, slots) = (width, span.rows.len());
                (
                    Rows { data: Elements::F32(&keys[range.clone()]), stride, slots },
                    Rows { data: Elements::F32(&values[range]), stride, slots },
                )
            }
        }
    }
}

/// A piece of the output and what it takes to compute it.
struct Task<'a> {
    span: usize,
    /// Rows of the span.
    rows: Range<usize>,
    /// Query heads.
    heads: Range<usize>,
    out: &'a mut [f32],
}

/// `out[row] = attention(q[row])` for all rows of all spans; both `[rows, heads * dim]`.
pub(super) fn run(
    config: &Config,
    layer: usize,
    spans: &[Span],
    q: &[f32],
    store: &Store<'_>,
    out: &mut [f32],
) {
    let shape = Shape {
        dim: config.head_dim,
        scale: config.attention_scale,
        softcap: config.attention_softcap,
        window: config.layer_window(layer),
    };
    let width = config.query_channels();
    let group = config.heads / config.kv_heads;
    let work: usize = spans
        .iter()
        .map(|s| s.rows.len() * shape.window.unwrap_or(usize::MAX).min(s.first + s.rows.len()))
        .sum::<usize>()
        .saturating_mul(2 * width);

    let mut tasks = cut(config, spans, out);
    let compute = |task: &mut Task<'_>| {
        let span = &spans[task.span];
        let mut heads = task.heads.clone();
        while !heads.is_empty() {
            // The queries of one key head at a time.
            let key_head = heads.start / group;
            let end = heads.end.min((key_head + 1) * group);
            let queries = Queries {
                data: &q[(span.rows.start + task.rows.start) * width + heads.start * shape.dim..],
                stride: width,
                heads: end - heads.start,
                first: span.first + task.rows.start,
                count: task.rows.len(),
            };
            let (keys, values) = store.head(config, layer, task.span, span, key_head);
            let out = &mut task.out[(heads.start - task.heads.start) * shape.dim..];
            attend(&shape, &queries, keys, values, out, width);
            heads.start = end;
        }
    };
    if work <= SERIAL || tasks.len() == 1 || rayon::current_num_threads() == 1 {
        tasks.iter_mut().for_each(compute);
    } else {
        tasks.par_iter_mut().with_max_len(1).for_each(compute);
    }
}

/// Spans of one row are cut by heads, longer ones into blocks of rows with all heads: so every task
/// has a slice of the output to itself.
fn cut<'a>(config: &Config, spans: &[Span], out: &'a mut [f32]) -> Vec<Task<'a>> {
    let width = config.query_channels();
    let group = config.heads / config.kv_heads;
    let singles = spans.iter().filter(|s| s.rows.len() == 1).count().max(1);
    // A key head's queries stay together unless threads would have nothing to do.
    let parts = rayon::current_num_threads().div_ceil(singles * config.kv_heads).min(group);
    let heads_each = group.div_ceil(parts);
    let block = (TASK_ROWS / group).clamp(16, 64);

    let mut tasks = Vec::with_capacity(spans.len() * config.kv_heads);
    let mut rest = out;
    for (index, span) in spans.iter().enumerate() {
        let (mine, others) = rest.split_at_mut(span.rows.len() * width);
        rest = others;
        if span.rows.len() == 1 {
            for (key_head, out) in mine.chunks_exact_mut(group * config.head_dim).enumerate() {
                let mut first = key_head * group;
                for out in out.chunks_mut(heads_each * config.head_dim) {
                    let heads = first..first + out.len() / config.head_dim;
                    first = heads.end;
                    tasks.push(Task { span: index, rows: 0..1, heads, out });
                }
            }
        } else {
            for (i, out) in mine.chunks_mut(block * width).enumerate() {
                let rows = i * block..i * block + out.len() / width;
                tasks.push(Task { span: index, rows, heads: 0..config.heads, out });
            }
        }
    }
    tasks
}
