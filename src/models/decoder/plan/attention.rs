//! Attention of a step: cut into independent tasks and shared out over the threads.

use std::cell::RefCell;
use std::ops::Range;

use super::super::Config;
use super::Chunk;
use crate::kernels::attention::{Elements, Queries, Rows, Segment, Shape, attend, for_pieces};

/// Query rows (positions times heads that share a key head) of a task: enough to fill the matrix
/// kernels, few enough to share out.
const TASK_ROWS: usize = 192;
/// Multiply-adds below which handing work to other threads costs more than it saves.
const SERIAL: usize = 1 << 17;

/// Consecutive rows of a step that belong to one sequence.
#[derive(Debug, Clone)]
pub(super) struct Span {
    /// The chunk that they are part of.
    pub chunk: usize,
    /// The first of its tokens that is one of them.
    pub token: usize,
    /// Rows of the step's buffers.
    pub rows: Range<usize>,
    /// Position of the first row.
    pub first: usize,
}

/// Where the keys and values of the spans stand.
pub(super) enum Store<'a, 'c> {
    /// The caches of the spans' chunks, all new positions written.
    Caches(&'a [Chunk<'c>]),
    /// The step's own rows, for sequences that start with it.
    Step { keys: &'a [f32], values: &'a [f32] },
}

impl Store<'_, '_> {
    /// Keys and values of a key head from `position` of the span's sequence on.
    fn segment(
        &self,
        config: &Config,
        layer: usize,
        span: &Span,
        head: usize,
        position: usize,
    ) -> Segment<'_> {
        match self {
            Self::Caches(chunks) => chunks[span.chunk].cache.segment(layer, head, position),
            Self::Step { keys, values } => {
                let width = config.key_channels();
                let at = position - span.first;
                let range =
                    (span.rows.start + at) * width + head * config.head_dim..span.rows.end * width;
                let rows = |data| Rows { data: Elements::F32(data), stride: width };
                Segment {
                    keys: rows(&keys[range.clone()]),
                    values: rows(&values[range]),
                    count: span.rows.len() - at,
                }
            }
        }
    }
}

/// What it takes to compute a piece of the output.
struct Task {
    span: usize,
    /// Rows of the span.
    rows: Range<usize>,
    /// Query heads.
    heads: Range<usize>,
}

/// The tasks of a step and where their pieces of the output end.
#[derive(Default)]
struct Tasks {
    tasks: Vec<Task>,
    ends: Vec<usize>,
}

thread_local! {
    /// Kept between steps, so that decoding allocates nothing.
    static TASKS: RefCell<Tasks> = RefCell::default();
}

/// `out[row] = attention(q[row])` for all rows of all spans; both `[rows, heads * dim]`.
pub(super) fn run(
    config: &Config,
    layer: usize,
    spans: &[Span],
    q: &[f32],
    store: &Store<'_, '_>,
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

    // Taken, not borrowed: a thread that waits for others may begin another step's work.
    let mut cut = TASKS.take();
    cut.fill(config, spans);
    let grain = if work <= SERIAL { cut.tasks.len() } else { 1 };
    for_pieces(out, &cut.ends, grain, |index, out| {
        let task = &cut.tasks[index];
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
            let source = |position| store.segment(config, layer, span, key_head, position);
            let out = &mut out[(heads.start - task.heads.start) * shape.dim..];
            attend(&shape, &queries, &source, out, width);
            heads.start = end;
        }
    });
    TASKS.set(cut);
}

impl Tasks {
    /// Spans of one row are cut by heads, longer ones into blocks of rows with all heads: so every task
    /// has a piece of the output to itself.
    fn fill(&mut self, config: &Config, spans: &[Span]) {
        let group = config.heads / config.kv_heads;
        let threads = rayon::current_num_threads();
        let singles = spans.iter().filter(|s| s.rows.len() == 1).count().max(1);
        // A key head's queries stay together unless threads would have nothing to do.
        let parts = threads.div_ceil(singles * config.kv_heads).min(group);
        let heads_each = group.div_ceil(parts);
        let most = (TASK_ROWS / group).clamp(16, 64);

        self.tasks.clear();
        self.ends.clear();
        for (index, span) in spans.iter().enumerate() {
            let count = span.rows.len();
            if count == 1 {
                for key_head in 0..config.kv_heads {
                    let end = (key_head + 1) * group;
                    for first in (key_head * group..end).step_by(heads_each) {
                        let heads = first..end.min(first + heads_each);
                        self.push(config, span, Task { span: index, rows: 0..1, heads });
                    }
                }
            } else {
                // Short spans are shared out too, a few rows each.
                let block = most.min(count.div_ceil(threads).max(4));
                for first in (0..count).step_by(block) {
                    let rows = first..count.min(first + block);
                    let heads = 0..config.heads;
                    self.push(config, span, Task { span: index, rows, heads });
                }
            }
        }
    }

    fn push(&mut self, config: &Config, span: &Span, task: Task) {
        let last = span.rows.start + task.rows.end - 1;
        self.ends.push((last * config.heads + task.heads.end) * config.head_dim);
        self.tasks.push(task);
    }
}
