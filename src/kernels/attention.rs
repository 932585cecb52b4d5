//! Causal attention of a few query positions over keys and values in a cache, tile by tile with a
//! running softmax, so that no row of scores is ever as long as the context.

use std::cell::RefCell;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::activation::{exp, tanh};
use super::gemm::{View, gemm};
use super::multiversion::{mul_add, multiversion};

/// Positions of keys handled at once: scores, keys and values of a tile stay in the second cache.
const TILE: usize = 256;
/// Up to this many query rows, plain dot products beat packing for a matrix product.
const FEW_ROWS: usize = 8;
const LANES: usize = 16;

/// Keys or values of one key head: position `p` stands in row `p % slots`, `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: Elements<'a>,
    pub stride: usize,
    pub slots: usize,
}

/// Stored elements of [`Rows`], from the first element of row 0 on.
#[derive(Clone, Copy)]
pub enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

/// What all heads of a layer share.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Channels of a head.
    pub dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` on the scaled scores.
    pub softcap: Option<f32>,
    /// Positions a query sees, itself included.
    pub window: Option<usize>,
}

/// Queries of consecutive positions that share one key head.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// Query heads of the first position, `heads * dim` elements; the next position's are `stride` on.
    pub data: &'a [f32],
    pub stride: usize,
    /// Query heads that share the key head.
    pub heads: usize,
    /// Position of the first query.
    pub first: usize,
    /// Number of positions.
    pub count: usize,
}

/// Buffers of a thread, kept between calls.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    sums: Vec<f32>,
    maxima: Vec<f32>,
    totals: Vec<f32>,
    tile: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Attention of `queries` over the positions up to their own. `out` is laid out like the queries: the
/// heads of the first position, then `stride` on those of the next.
///
/// # Panics
/// If a slice is too short for its description.
pub fn attend(
    shape: &Shape,
    queries: &Queries<'_>,
    keys: Rows<'_>,
    values: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    SCRATCH.with_borrow_mut(|scratch| {
        attend_with(scratch, shape, queries, keys, values, out, out_stride);
    });
}

fn attend_with(
    scratch: &mut Scratch,
    shape: &Shape,
    queries: &Queries<'_>,
    keys: Rows<'_>,
    values: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    let dim = shape.dim;
    let width = queries.heads * dim;
    let rows = queries.heads * queries.count;
    let Scratch { queries: q, scores, sums, maxima, totals, tile } = scratch;

    // Row t * heads + h is head h of position t; the factor on the scores is applied here once.
    q.clear();
    for t in 0..queries.count {
        q.extend(queries.data[t * queries.stride..][..width].iter().map(|v| v * shape.scale));
    }
    sums.clear();
    sums.resize(rows * dim, 0.0);
    maxima.clear();
    maxima.resize(rows, f32::NEG_INFINITY);
    totals.clear();
    totals.resize(rows, 0.0);
    scores.resize(rows * TILE, 0.0);

    let seen_from = |position: usize| shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let end = queries.first + queries.count;
    let mut start = seen_from(queries.first);
    while start < end {
        let slot = start % keys.slots;
        let length = TILE.min(end - start).min(keys.slots - slot);

        let k = dense(keys, slot, length, dim, tile);
        product_transposed(q, k, length, dim, scores);
        for (row, s) in scores.chunks_exact_mut(TILE).enumerate().take(rows) {
            let position = queries.first + row / queries.heads;
            let low = seen_from(position).clamp(start, start + length) - start;
            let high = (position + 1).clamp(start, start + length) - start;
            s[..low].fill(0.0);
            s[high.max(low)..length].fill(0.0);
            if low < high {
                let (max, total) = (&mut maxima[row], &mut totals[row]);
                let shrink = soften(&mut s[low..high], shape.softcap.unwrap_or(0.0), max, total);
                if shrink != 1.0 {
                    sums[row * dim..][..dim].iter_mut().for_each(|v| *v *= shrink);
                }
            }
        }
        let v = dense(values, slot, length, dim, tile);
        product_add(scores, v, length, dim, sums);
        start += length;
    }

    for t in 0..queries.count {
        let out = &mut out[t * out_stride..][..width];
        for h in 0..queries.heads {
            let row = t * queries.heads + h;
            let inverse = 1.0 / totals[row];
            let sums = &sums[row * dim..][..dim];
            for (o, s) in out[h * dim..][..dim].iter_mut().zip(sums) {
                *o = s * inverse;
            }
        }
    }
}

/// Rows of f32, `stride` elements apart.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    stride: usize,
}

/// Rows `slot .. slot + length` as f32, converted into `buffer` where they are stored otherwise.
fn dense<'a>(
    rows: Rows<'a>,
    slot: usize,
    length: usize,
    dim: usize,
    buffer: &'a mut Vec<f32>,
) -> Matrix<'a> {
    let end = (slot + length - 1) * rows.stride + dim;
    match rows.data {
        Elements::F32(data) => Matrix { data: &data[slot * rows.stride..end], stride: rows.stride },
        Elements::F16(data) => {
            let data = &data[slot * rows.stride..end];
            buffer.resize(TILE * dim, 0.0);
            for (from, to) in data.chunks(rows.stride).zip(buffer.chunks_exact_mut(dim)) {
                from[..dim].convert_to_f32_slice(to);
            }
            Matrix { data: &buffer[..length * dim], stride: dim }
        }
    }
}

/// `scores[r, j] = q[r] . k[j]`; rows of scores are `TILE` apart.
fn product_transposed(q: &[f32], k: Matrix<'_>, length: usize, dim: usize, scores: &mut [f32]) {
    let rows = q.len() / dim;
    if rows <= FEW_ROWS {
        return few_scores(q, k.data, k.stride, dim, scores);
    }
    let k = View::strided(k.data, length, dim, k.stride, 1);
    gemm(View::new(q, rows, dim), k.t(), scores, TILE, false, false);
}

/// `sums[r] += sum_j scores[r, j] v[j]`.
fn product_add(scores: &[f32], v: Matrix<'_>, length: usize, dim: usize, sums: &mut [f32]) {
    let rows = sums.len() / dim;
    if rows <= FEW_ROWS {
        return few_sums(scores, v.data, v.stride, length, dim, sums);
    }
    let v = View::strided(v.data, length, dim, v.stride, 1);
    gemm(View::strided(scores, rows, length, TILE, 1), v, sums, dim, true, false);
}

multiversion! {
    /// Turns scores into weights relative to the running maximum, adds them to the running total, and
    /// returns the factor by which what was summed up before shrinks. A cap of 0 means none.
    fn soften(scores: &mut [f32], cap: f32, max: &mut f32, total: &mut f32) -> f32 {
        if cap > 0.0 {
            let inverse = 1.0 / cap;
            for s in scores.iter_mut() {
                *s = cap * tanh::<FMA>(*s * inverse);
            }
        }
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let chunks = scores.chunks_exact(LANES);
        for (lane, s) in lanes.iter_mut().zip(chunks.remainder()) {
            *lane = *s;
        }
        for chunk in chunks {
            for (lane, s) in lanes.iter_mut().zip(chunk) {
                *lane = if *s > *lane { *s } else { *lane };
            }
        }
        let highest = lanes.iter().fold(*max, |a, b| if *b > a { *b } else { a });
        let shrink = exp::<FMA>(*max - highest);

        let mut lanes = [0.0_f32; LANES];
        let mut chunks = scores.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (lane, s) in lanes.iter_mut().zip(chunk) {
                *s = exp::<FMA>(*s - highest);
                *lane += *s;
            }
        }
        for (lane, s) in lanes.iter_mut().zip(chunks.into_remainder()) {
            *s = exp::<FMA>(*s - highest);
            *lane += *s;
        }
        *total = *total * shrink + lanes.iter().sum::<f32>();
        *max = highest;
        shrink
    }

    /// [`product_transposed`] for a few rows: each key is read once for all of them.
    fn few_scores(q: &[f32], k: &[f32], stride: usize, dim: usize, scores: &mut [f32]) {
        for (j, key) in k.chunks(stride).enumerate() {
            let key = &key[..dim];
            for (query, s) in q.chunks_exact(dim).zip(scores.chunks_exact_mut(TILE)) {
                let mut lanes = [0.0_f32; LANES];
                let (a, b) = (query.chunks_exact(LANES), key.chunks_exact(LANES));
                let mut rest = 0.0;
                for (x, y) in a.remainder().iter().zip(b.remainder()) {
                    rest = mul_add::<FMA>(*x, *y, rest);
                }
                for (x, y) in a.zip(b) {
                    for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
                        *lane = mul_add::<FMA>(*x, *y, *lane);
                    }
                }
                s[j] = lanes.iter().sum::<f32>() + rest;
            }
        }
    }

    /// [`product_add`] for a few rows: sums of 64 channels stay in registers over all values.
    fn few_sums(
        scores: &[f32],
        v: &[f32],
        stride: usize,
        length: usize,
        dim: usize,
        sums: &mut [f32],
    ) {
        const WIDE: usize = 4 * LANES;
        for (s, sum) in scores.chunks_exact(TILE).zip(sums.chunks_exact_mut(dim)) {
            let s = &s[..length];
            let mut channel = 0;
            while channel + WIDE <= dim {
                let part: &mut [f32; WIDE] = (&mut sum[channel..channel + WIDE])
                    .try_into()
                    .expect("the slice has this length");
                let mut lanes = *part;
                for (value, s) in v.chunks(stride).zip(s) {
                    let value: &[f32; WIDE] = value[channel..channel + WIDE]
                        .try_into()
                        .expect("the slice has this length");
                    for (lane, x) in lanes.iter_mut().zip(value) {
                        *lane = mul_add::<FMA>(*s, *x, *lane);
                    }
                }
                *part = lanes;
                channel += WIDE;
            }
            for (value, s) in v.chunks(stride).zip(s) {
                for (sum, x) in sum[channel..].iter_mut().zip(&value[channel..dim]) {
                    *sum = mul_add::<FMA>(*s, *x, *sum);
                }
            }
        }
    }
}
