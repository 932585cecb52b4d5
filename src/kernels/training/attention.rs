//! Attention within the sequences of a batch and its gradient. Scores are made a block of queries at a
//! time and made again for the gradient: what is kept between the two is one number a query.

use std::ops::Range;

use super::super::activation::{exp, tanh};
use super::super::gemm::{View, gemm};
use super::super::multiversion::multiversion;
use super::super::threads::{self, Shared, with_scratch};

/// Scores of a block of queries.
const BLOCK: usize = 1 << 16;
/// Positions of a block of queries, where the scores allow.
const POSITIONS: usize = 64;
const LANES: usize = 16;

/// What the heads of a layer share.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Query heads; a row of queries is `heads * dim` wide.
    pub heads: usize,
    /// Key heads, which divide the query heads; a row of keys or values is `kv_heads * dim` wide.
    pub kv_heads: usize,
    /// Channels of a head.
    pub dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` on the scaled scores.
    pub softcap: Option<f32>,
    /// Whether a position sees only those up to its own.
    pub causal: bool,
    /// Positions that a causal query sees, itself included.
    pub window: Option<usize>,
}

impl Shape {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of the queries.
    pub fn query_width(&self) -> usize {
        self.heads * self.dim
    }

    /// Width of the keys, and of the values.
    pub fn key_width(&self) -> usize {
        self.kv_heads * self.dim
    }

    /// The keys that position `t` of a sequence of `n` sees.
    fn seen(&self, t: usize, n: usize) -> Range<usize> {
        if !self.causal {
            return 0..n;
        }
        self.window.map_or(0, |w| (t + 1).saturating_sub(w))..t + 1
    }

    /// Blocks of queries for a sequence of `n`, each with the keys that any of them sees.
    fn blocks(&self, n: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
        let positions = (BLOCK / (n * self.group()).max(1)).clamp(1, POSITIONS);
        (0..n).step_by(positions).map(move |start| {
            let end = (start + positions).min(n);
            (start..end, self.seen(start, n).start..self.seen(end - 1, n).end)
        })
    }

    fn check(&self, sequences: &[Range<usize>], q: usize, k: usize) {
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "heads");
        let rows = q / self.query_width();
        assert!(q == rows * self.query_width() && k == rows * self.key_width(), "sizes of rows");
        let mut end = 0;
        for rows in sequences {
            assert!(rows.start >= end && rows.start <= rows.end, "sequences overlap");
            end = rows.end;
        }
        assert!(end <= rows, "a sequence ends beyond the rows");
    }
}

/// `out = softmax(scale q k^T) v` for each head of each sequence (a range of rows, ascending); rows outside
/// are left alone. `sums` gets the logarithm of the sum of each query's exponentials, `[rows, heads]`.
///
/// # Panics
/// If sizes do not fit.
pub fn forward(
    shape: &Shape,
    sequences: &[Range<usize>],
    (q, k, v): (&[f32], &[f32], &[f32]),
    out: &mut [f32],
    sums: &mut [f32],
) {
    forward_where(shape, sequences, &|_| true, (q, k, v), out, sums);
}

/// As [`forward`], for some of the heads: `wanted` is asked for each key head of each sequence, counted in
/// this order. The others are left alone.
///
/// # Panics
/// If sizes do not fit.
pub fn forward_where(
    shape: &Shape,
    sequences: &[Range<usize>],
    wanted: &(dyn Fn(usize) -> bool + Sync),
    (q, k, v): (&[f32], &[f32], &[f32]),
    out: &mut [f32],
    sums: &mut [f32],
) {
    shape.check(sequences, q.len(), k.len());
    let rows = q.len() / shape.query_width();
    assert!(v.len() == k.len() && out.len() == q.len() && sums.len() == rows * shape.heads);
    let blocks: Vec<_> = sequences
        .iter()
        .enumerate()
        .flat_map(|(i, s)| shape.blocks(s.len()).map(move |(queries, keys)| (i, s, queries, keys)))
        .collect();
    let (out, sums) = (Shared::new(out), Shared::new(sums));
    threads::for_ranges(blocks.len() * shape.kv_heads, 1, |tasks| {
        for task in tasks {
            // The longest of a sequence first.
            let (index, rows, queries, keys) = &blocks[blocks.len() - 1 - task / shape.kv_heads];
            if !wanted(index * shape.kv_heads + task % shape.kv_heads) {
                continue;
            }
            let head = Head { shape, start: rows.start, head: task % shape.kv_heads };
            let (r, n) = (queries.len() * shape.group(), keys.len());
            with_scratch(r * (2 * shape.dim + n), |scratch| {
                let (queries_, scratch) = scratch.split_at_mut(r * shape.dim);
                let (sums_, scores) = scratch.split_at_mut(r * shape.dim);
                head.gather(q, queries, shape.scale, queries_);
                let (queries_, d) = (View::new(queries_, r, shape.dim), shape.dim);
                gemm(queries_, head.keys(k, keys).t(), scores, n, false, false);
                for (i, row) in scores.chunks_exact_mut(n).enumerate() {
                    let t = queries.start + i / shape.group();
                    let seen = head.clear(t, rows.len(), keys, row);
                    let sum = soften(&mut row[seen], shape.softcap.unwrap_or(0.0));
                    // SAFETY: this head of this position belongs to this task.
                    unsafe { sums.set(head.place(t, i % shape.group()), sum) };
                }
                gemm(View::new(scores, r, n), head.keys(v, keys), sums_, d, false, false);
                for (i, from) in sums_.chunks_exact(d).enumerate() {
                    let at = head.place(queries.start + i / shape.group(), i % shape.group()) * d;
                    // SAFETY: as above.
                    unsafe { out.slice(at..at + d) }.copy_from_slice(from);
                }
            });
        }
    });
}

/// What the gradient is made from.
#[derive(Clone, Copy)]
pub struct Kept<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub out: &'a [f32],
    /// As [`forward`] gave them.
    pub sums: &'a [f32],
}

/// The gradients of [`forward`], `g` being that of its output; rows outside the sequences become 0.
///
/// # Panics
/// If sizes do not fit.
pub fn backward(
    shape: &Shape,
    sequences: &[Range<usize>],
    kept: Kept<'_>,
    g: &[f32],
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    backward_where(shape, sequences, &|_| true, kept, g, (dq, dk, dv));
}

/// As [`backward`], for some of the heads, see [`forward_where`]; the gradients of the others become 0.
///
/// # Panics
/// If sizes do not fit.
pub fn backward_where(
    shape: &Shape,
    sequences: &[Range<usize>],
    wanted: &(dyn Fn(usize) -> bool + Sync),
    kept: Kept<'_>,
    g: &[f32],
    (dq, dk, dv): (&mut [f32], &mut [f32], &mut [f32]),
) {
    let Kept { q, k, v, out, sums } = kept;
    shape.check(sequences, q.len(), k.len());
    let rows = q.len() / shape.query_width();
    assert!(v.len() == k.len() && out.len() == q.len() && sums.len() == rows * shape.heads);
    assert!(g.len() == q.len() && dq.len() == q.len() && dk.len() == k.len());
    assert_eq!(dv.len(), k.len());
    dq.fill(0.0);
    dk.fill(0.0);
    dv.fill(0.0);
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    let group = shape.group();
    threads::for_ranges(sequences.len() * shape.kv_heads, 1, |tasks| {
        for task in tasks {
            if !wanted(task) {
                continue;
            }
            let rows = &sequences[task / shape.kv_heads];
            let head = Head { shape, start: rows.start, head: task % shape.kv_heads };
            let (n, d) = (rows.len(), shape.dim);
            let longest = shape.blocks(n).map(|(queries, keys)| queries.len() * group * keys.len());
            let longest = longest.max().unwrap_or(0);
            let most = POSITIONS * group * d;
            let slopes = if shape.softcap.is_some() { longest } else { 0 };
            with_scratch(2 * n * d + 3 * most + 2 * longest + slopes, |scratch| {
                let (own_k, scratch) = scratch.split_at_mut(n * d);
                let (own_v, scratch) = scratch.split_at_mut(n * d);
                let (queries_, scratch) = scratch.split_at_mut(most);
                let (grads, scratch) = scratch.split_at_mut(most);
                let (own_q, scratch) = scratch.split_at_mut(most);
                let (scores, scratch) = scratch.split_at_mut(longest);
                let (dscores, slopes) = scratch.split_at_mut(longest);
                own_k.fill(0.0);
                own_v.fill(0.0);
                for (queries, keys) in shape.blocks(n) {
                    let (r, width) = (queries.len() * group, keys.len());
                    let (queries_, grads) = (&mut queries_[..r * d], &mut grads[..r * d]);
                    let (scores, dscores) = (&mut scores[..r * width], &mut dscores[..r * width]);
                    head.gather(q, &queries, shape.scale, queries_);
                    head.gather(g, &queries, 1.0, grads);
                    let (queries_, grads) = (View::new(queries_, r, d), View::new(grads, r, d));
                    gemm(queries_, head.keys(k, &keys).t(), scores, width, false, false);
                    gemm(grads, head.keys(v, &keys).t(), dscores, width, false, false);
                    for i in 0..r {
                        let (t, h) = (queries.start + i / group, i % group);
                        let places = i * width..(i + 1) * width;
                        let (p, ds) = (&mut scores[places.clone()], &mut dscores[places.clone()]);
                        let seen = head.clear(t, n, &keys, p);
                        ds[..seen.start].fill(0.0);
                        ds[seen.end..].fill(0.0);
                        let at = head.place(t, h);
                        let dot = dot(&out[at * d..(at + 1) * d], &g[at * d..(at + 1) * d]);
                        match shape.softcap {
                            None => again(&mut p[seen.clone()], sums[at], dot, &mut ds[seen]),
                            Some(cap) => {
                                let slopes = &mut slopes[..seen.len()];
                                capped(&mut p[seen.clone()], cap, slopes);
                                again(&mut p[seen.clone()], sums[at], dot, &mut ds[seen.clone()]);
                                multiply(&mut ds[seen], slopes);
                            }
                        }
                    }
                    let (p, ds) = (View::new(scores, r, width), View::new(dscores, r, width));
                    let places = keys.start * d..keys.end * d;
                    gemm(p.t(), grads, &mut own_v[places.clone()], d, true, false);
                    gemm(ds.t(), queries_, &mut own_k[places], d, true, false);
                    let own_q = &mut own_q[..r * d];
                    gemm(ds, head.keys(k, &keys), own_q, d, false, false);
                    for (i, from) in own_q.chunks_exact(d).enumerate() {
                        let at = head.place(queries.start + i / group, i % group) * d;
                        // SAFETY: this head of this sequence belongs to this task.
                        let to = unsafe { dq.slice(at..at + d) };
                        to.iter_mut().zip(from).for_each(|(to, from)| *to = from * shape.scale);
                    }
                }
                for (own, to) in [(own_k, dk), (own_v, dv)] {
                    for (t, from) in own.chunks_exact(d).enumerate() {
                        let at = ((head.start + t) * shape.kv_heads + head.head) * d;
                        // SAFETY: as above.
                        unsafe { to.slice(at..at + d) }.copy_from_slice(from);
                    }
                }
            });
        }
    });
}

/// A key head of a sequence and the query heads that share it.
struct Head<'a> {
    shape: &'a Shape,
    /// The sequence's first row.
    start: usize,
    head: usize,
}

impl Head<'_> {
    /// Which of all heads of all rows is head `h` of the group at position `t`.
    fn place(&self, t: usize, h: usize) -> usize {
        (self.start + t) * self.shape.heads + self.head * self.shape.group() + h
    }

    /// The group's channels of some positions, head by head, times `by`.
    fn gather(&self, rows: &[f32], positions: &Range<usize>, by: f32, out: &mut [f32]) {
        let each = self.shape.group() * self.shape.dim;
        for (t, out) in positions.clone().zip(out.chunks_exact_mut(each)) {
            let at = self.place(t, 0) * self.shape.dim;
            for (out, v) in out.iter_mut().zip(&rows[at..at + each]) {
                *out = v * by;
            }
        }
    }

    /// Keys or values at some positions.
    fn keys<'b>(&self, rows: &'b [f32], positions: &Range<usize>) -> View<'b> {
        let (width, d) = (self.shape.key_width(), self.shape.dim);
        let at = (self.start + positions.start) * width + self.head * d;
        View::strided(&rows[at..], positions.len(), d, width, 1)
    }

    /// Puts 0 where position `t` of `n` does not see; gives where it does, in a row of scores with `keys`.
    fn clear(&self, t: usize, n: usize, keys: &Range<usize>, row: &mut [f32]) -> Range<usize> {
        let seen = self.shape.seen(t, n);
        let seen = seen.start - keys.start..seen.end - keys.start;
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
        seen
    }
}

#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = *v;
    }
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

multiversion! {
    /// Scores (capped if `cap` is not 0) to weights; gives the logarithm of the sum of exponentials.
    fn soften(x: &mut [f32], cap: f32) -> f32 {
        if cap != 0.0 {
            x.iter_mut().for_each(|v| *v = cap * tanh::<FMA>(*v / cap));
        }
        let top = largest(x);
        let mut lanes = [0.0_f32; LANES];
        let mut chunks = x.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (lane, v) in lanes.iter_mut().zip(chunk) {
                *v = exp::<FMA>(*v - top);
                *lane += *v;
            }
        }
        for (lane, v) in lanes.iter_mut().zip(chunks.into_remainder()) {
            *v = exp::<FMA>(*v - top);
            *lane += *v;
        }
        let sum = lanes.iter().sum::<f32>();
        let by = 1.0 / sum;
        x.iter_mut().for_each(|v| *v *= by);
        top + sum.ln()
    }

    /// Scores to weights `p` again, and gradients of weights to gradients of scores: `p (ds - dot)`.
    fn again(p: &mut [f32], sum: f32, dot: f32, ds: &mut [f32]) {
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp::<FMA>(*p - sum);
            *ds = *p * (*ds - dot);
        }
    }

    /// Caps scores; `slopes` gets the derivatives.
    fn capped(x: &mut [f32], cap: f32, slopes: &mut [f32]) {
        for (x, slope) in x.iter_mut().zip(slopes) {
            let t = tanh::<FMA>(*x / cap);
            *x = cap * t;
            *slope = 1.0 - t * t;
        }
    }

    fn multiply(x: &mut [f32], by: &[f32]) {
        for (x, by) in x.iter_mut().zip(by) {
            *x *= *by;
        }
    }

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let rest = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum::<f32>();
        for (a, b) in a.zip(b) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a * b;
            }
        }
        lanes.iter().sum::<f32>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Attention by its definition in f64.
    fn exact(
        shape: &Shape,
        sequences: &[Range<usize>],
        [q, k, v]: [&[f64]; 3],
        rows: usize,
    ) -> Vec<f64> {
        let d = shape.dim;
        let mut out = vec![0.0; rows * shape.heads * d];
        for s in sequences {
            for (t, h) in (0..s.len()).flat_map(|t| (0..shape.heads).map(move |h| (t, h))) {
                let kv = h / (shape.heads / shape.kv_heads);
                let query = &q[((s.start + t) * shape.heads + h) * d..][..d];
                let row = |x: &[f64], j: usize| {
                    x[((s.start + j) * shape.kv_heads + kv) * d..][..d].to_vec()
                };
                let seen: Vec<usize> = (0..s.len())
                    .filter(|j| !shape.causal || *j <= t && t - j < shape.window.unwrap_or(rows))
                    .collect();
                let weights: Vec<f64> = seen
                    .iter()
                    .map(|j| {
                        let dot: f64 = query.iter().zip(row(k, *j)).map(|(a, b)| a * b).sum();
                        let score = dot * f64::from(shape.scale);
                        shape
                            .softcap
                            .map(f64::from)
                            .map_or(score, |cap| cap * (score / cap).tanh())
                            .exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for (j, w) in seen.iter().zip(&weights) {
                    for (c, v) in row(v, *j).iter().enumerate() {
                        out[((s.start + t) * shape.heads + h) * d + c] += w / total * v;
                    }
                }
            }
        }
        out
    }

    #[test]
    fn values_and_gradients_match_the_definition() {
        let plain = Shape {
            heads: 4,
            kv_heads: 2,
            dim: 5,
            scale: 0.6,
            softcap: None,
            causal: true,
            window: None,
        };
        for (shape, lengths) in [
            (plain, vec![7, 1, 4]),
            (Shape { window: Some(3), ..plain }, vec![9]),
            (Shape { softcap: Some(0.8), ..plain }, vec![5, 3]),
            (Shape { causal: false, kv_heads: 4, ..plain }, vec![6, 2]),
            (Shape { kv_heads: 1, dim: 16, ..plain }, vec![8]),
        ] {
            // A row in front belongs to no sequence.
            let mut next = 1;
            let sequences: Vec<_> = lengths
                .iter()
                .map(|n| {
                    next += n;
                    next - n..next
                })
                .collect();
            let (wq, wk) = (shape.query_width(), shape.key_width());
            let inputs = [noise(next * wq, 1), noise(next * wk, 2), noise(next * wk, 3)];
            let mut g = noise(next * wq, 4);
            g[..wq].fill(0.0);
            let [q, k, v] = &inputs;
            let (mut out, mut sums) = (vec![0.0; next * wq], vec![0.0; next * shape.heads]);
            forward(&shape, &sequences, (q, k, v), &mut out, &mut sums);
            let wide =
                inputs.each_ref().map(|x| x.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>());
            let want = exact(&shape, &sequences, wide.each_ref().map(|x| &x[..]), next);
            for (got, want) in out.iter().zip(&want) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{shape:?}: {got} is not {want}");
            }
            let mut grads = inputs.each_ref().map(|x| vec![9.0; x.len()]);
            let [dq, dk, dv] = &mut grads;
            let kept = Kept { q, k, v, out: &out, sums: &sums };
            backward(&shape, &sequences, kept, &g, (dq, dk, dv));
            let loss = |inputs: &[Vec<f64>; 3]| -> f64 {
                let out = exact(&shape, &sequences, inputs.each_ref().map(|x| &x[..]), next);
                out.iter().zip(&g).map(|(o, g)| o * f64::from(*g)).sum()
            };
            for which in 0..3 {
                for at in (0..inputs[which].len()).step_by(3) {
                    let moved = |by: f64| {
                        let mut inputs = wide.clone();
                        inputs[which][at] += by;
                        loss(&inputs)
                    };
                    let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let got = f64::from(grads[which][at]);
                    assert!((got - want).abs() < 1e-4, "{shape:?} {which} {at}: {got} not {want}");
                }
            }
        }
    }

    #[test]
    fn blocks_of_long_sequences_agree_with_the_definition() {
        // More positions than a block, a window that starts in the middle of one.
        let shape = Shape {
            heads: 2,
            kv_heads: 1,
            dim: 4,
            scale: 0.5,
            softcap: None,
            causal: true,
            window: Some(90),
        };
        let n = 200;
        let (q, k, v) = (noise(n * 8, 1), noise(n * 4, 2), noise(n * 4, 3));
        let (mut out, mut sums) = (vec![0.0; n * 8], vec![0.0; n * 2]);
        let whole = std::slice::from_ref(&(0..200));
        forward(&shape, whole, (&q, &k, &v), &mut out, &mut sums);
        let wide = [&q, &k, &v].map(|x| x.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>());
        let want = exact(&shape, whole, wide.each_ref().map(|x| &x[..]), n);
        assert!(out.iter().zip(&want).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));
    }
}
