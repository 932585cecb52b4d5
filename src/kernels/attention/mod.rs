//! Causal attention of a few query positions over keys and values in a cache, tile by tile with a
//! running softmax, so that no row of scores is ever as long as the context.
//!
//! Few query rows (decoding) go straight over the stored elements, see [`few`]; many (prefill) make a
//! tile dense and use matrix products.

mod few;

use std::cell::RefCell;
use std::ops::Range;

use half::f16;

use super::activation::{exp, tanh};
use super::gemm::{View, gemm};
use super::multiversion::{mul_add, multiversion};
use super::threads::{self, Shared};

/// Positions of keys handled at once: scores, keys and values of a tile stay in the second cache.
const TILE: usize = 256;
/// Up to this many query rows, products from the stored elements beat a dense tile and its packing.
const FEW_ROWS: usize = 16;
const LANES: usize = 16;

/// Stored elements, from the first element of the first row on.
#[derive(Clone, Copy)]
pub enum Elements<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    /// Codes times the scale of their row.
    Q8 {
        codes: &'a [i8],
        scales: &'a [f32],
    },
}

/// Keys or values of one key head at consecutive positions, `stride` elements apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: Elements<'a>,
    pub stride: usize,
}

/// Keys and values of `count` consecutive positions.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    pub keys: Rows<'a>,
    pub values: Rows<'a>,
    pub count: usize,
}

/// Where keys and values stand: gives the segment that starts at a position, at least that position.
pub type Source<'a> = dyn Fn(usize) -> Segment<'a> + 'a;

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
    source: &Source<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    SCRATCH.with_borrow_mut(|scratch| {
        attend_with(scratch, shape, queries, source, out, out_stride);
    });
}

fn attend_with(
    scratch: &mut Scratch,
    shape: &Shape,
    queries: &Queries<'_>,
    source: &Source<'_>,
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
    if scores.len() < rows * TILE {
        scores.resize(rows * TILE, 0.0);
    }
    let scores = &mut scores[..rows * TILE];

    // A single position always goes the short way: all heads of a key head share one pass over the keys.
    let few = queries.count == 1 || rows <= FEW_ROWS;
    let seen_from = |position: usize| shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let end = queries.first + queries.count;
    let mut start = seen_from(queries.first);
    while start < end {
        let length = TILE.min(end - start);
        if few {
            segments(source, start, length, |at, segment, count| {
                few::scores(q, segment.keys, count, dim, &mut scores[at..]);
            });
        } else {
            let k = dense(source, |s| s.keys, start, length, dim, tile);
            let k = View::strided(k.data, length, dim, k.stride, 1);
            gemm(View::new(q, rows, dim), k.t(), scores, TILE, false, false);
        }
        for (row, s) in scores.chunks_exact_mut(TILE).enumerate() {
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
        if few {
            segments(source, start, length, |at, segment, count| {
                few::add_values(&scores[at..], segment.values, count, dim, sums);
            });
        } else {
            let v = dense(source, |s| s.values, start, length, dim, tile);
            let v = View::strided(v.data, length, dim, v.stride, 1);
            gemm(View::strided(scores, rows, length, TILE, 1), v, sums, dim, true, false);
        }
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

/// Calls `work` with the offset from `start`, the segment and its positions in use, for all segments
/// of `start .. start + length`.
fn segments(
    source: &Source<'_>,
    start: usize,
    length: usize,
    mut work: impl FnMut(usize, Segment<'_>, usize),
) {
    let mut at = 0;
    while at < length {
        let segment = source(start + at);
        let count = segment.count.min(length - at);
        assert!(count > 0, "a segment without positions");
        work(at, segment, count);
        at += count;
    }
}

/// Rows of f32, `stride` elements apart.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    stride: usize,
}

/// Keys or values (as `pick` says) of `length` positions as f32: in place where they are stored so and
/// together, else gathered into `buffer`.
fn dense<'m, 's: 'm>(
    source: &Source<'s>,
    pick: impl for<'x> Fn(&Segment<'x>) -> Rows<'x>,
    start: usize,
    length: usize,
    dim: usize,
    buffer: &'m mut Vec<f32>,
) -> Matrix<'m> {
    let first = source(start);
    let rows = pick(&first);
    if let (Elements::F32(data), true) = (rows.data, first.count >= length) {
        return Matrix { data: &data[..(length - 1) * rows.stride + dim], stride: rows.stride };
    }
    if buffer.len() < TILE * dim {
        buffer.resize(TILE * dim, 0.0);
    }
    segments(source, start, length, |at, segment, count| {
        few::read(pick(&segment), count, dim, &mut buffer[at * dim..(at + count) * dim]);
    });
    Matrix { data: &buffer[..length * dim], stride: dim }
}

/// Cuts `out` before each of `ends` (ascending) and calls `work` with the index and the piece, on
/// several threads if there are `grain` pieces for more than one.
///
/// # Panics
/// If `ends` do not ascend or go beyond `out`.
pub fn for_pieces(
    out: &mut [f32],
    ends: &[usize],
    grain: usize,
    work: impl Fn(usize, &mut [f32]) + Sync,
) {
    assert!(ends.is_sorted() && ends.last().is_none_or(|end| *end <= out.len()));
    let shared = Shared::new(out);
    threads::for_ranges(ends.len(), grain, |range: Range<usize>| {
        for i in range {
            // The last pieces see most positions: started first, they do not keep others waiting at the end.
            let i = ends.len() - 1 - i;
            let start = if i == 0 { 0 } else { ends[i - 1] };
            // SAFETY: pieces are disjoint because `ends` ascend, and each index comes once.
            work(i, unsafe { shared.slice(start..ends[i]) });
        }
    });
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

    /// Codes of a row and their scale: the largest magnitude becomes 127. What is not finite makes the
    /// scale so too, so that it shows.
    pub fn quantize(row: &[f32], codes: &mut [i8]) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        let mut poison = [0.0_f32; LANES];
        for chunk in row.chunks(LANES) {
            for ((lane, bad), v) in lanes.iter_mut().zip(&mut poison).zip(chunk) {
                let v = v.abs();
                *lane = if v > *lane { v } else { *lane };
                *bad = mul_add::<FMA>(v, 0.0, *bad);
            }
        }
        let largest = lanes.iter().fold(0.0_f32, |a, b| if *b > a { *b } else { a });
        let scale = largest / 127.0 + poison.iter().sum::<f32>();
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (code, v) in codes.iter_mut().zip(row) {
            // Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even; products are within
            // 127 and a rounding.
            let rounded = mul_add::<FMA>(*v, inverse, 12_582_912.0);
            *code = (rounded.to_bits() as i32).wrapping_sub(0x4b40_0000) as i8;
        }
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIM: usize = 20;

    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Attention worked out in f64, one query at a time.
    fn naive(shape: &Shape, q: &Queries<'_>, keys: &[f32], values: &[f32]) -> Vec<f64> {
        let mut out = Vec::new();
        for t in 0..q.count {
            let position = q.first + t;
            let from = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for h in 0..q.heads {
                let q = &q.data[t * q.stride + h * shape.dim..][..shape.dim];
                let dot = |p: usize| -> f64 {
                    let k = &keys[p * shape.dim..][..shape.dim];
                    q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                let weights: Vec<f64> = (from..=position)
                    .map(|p| {
                        let s = dot(p) * f64::from(shape.scale);
                        shape.softcap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh()).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..shape.dim).map(|c| {
                    let at = |i: usize| f64::from(values[(from + i) * shape.dim + c]);
                    weights.iter().enumerate().map(|(i, w)| w / total * at(i)).sum::<f64>()
                }));
            }
        }
        out
    }

    #[test]
    fn all_formats_and_ways_equal_the_definition() {
        let positions = 600;
        let keys = random(positions * DIM, 1);
        let values = random(positions * DIM, 2);
        let halves = |v: &[f32]| v.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>();
        let (half_keys, half_values) = (halves(&keys), halves(&values));
        let codes = |v: &[f32]| {
            let (mut codes, mut scales) = (vec![0; v.len()], Vec::new());
            for (row, codes) in v.chunks(DIM).zip(codes.chunks_mut(DIM)) {
                scales.push(quantize(row, codes));
            }
            (codes, scales)
        };
        let ((k_codes, k_scales), (v_codes, v_scales)) = (codes(&keys), codes(&values));
        // Pages of 7 positions: no tile begins or ends with one.
        let page = 7;
        let cut = |at: usize| (at, page - at % page);
        let f32s = |at: usize| {
            let (at, count) = cut(at);
            let rows = |v| Rows { data: Elements::F32(v), stride: DIM };
            Segment { keys: rows(&keys[at * DIM..]), values: rows(&values[at * DIM..]), count }
        };
        let f16s = |at: usize| {
            let (at, count) = cut(at);
            let rows = |v| Rows { data: Elements::F16(v), stride: DIM };
            let (keys, values) = (rows(&half_keys[at * DIM..]), rows(&half_values[at * DIM..]));
            Segment { keys, values, count }
        };
        let q8s = |at: usize| {
            let (at, count) = cut(at);
            let rows = |codes, scales| Rows { data: Elements::Q8 { codes, scales }, stride: DIM };
            Segment {
                keys: rows(&k_codes[at * DIM..], &k_scales[at..]),
                values: rows(&v_codes[at * DIM..], &v_scales[at..]),
                count,
            }
        };
        let queries = random(40 * 5 * DIM, 3);
        // One row to many: one position with five heads, a few rows, and the matrix products.
        for (first, count, heads) in
            [(0, 1, 1), (599, 1, 5), (300, 1, 3), (0, 3, 2), (255, 2, 5), (0, 40, 1), (511, 40, 5)]
        {
            for window in [None, Some(9), Some(300)] {
                for softcap in [None, Some(0.7)] {
                    let shape = Shape { dim: DIM, scale: 0.5, softcap, window };
                    let q = Queries { data: &queries, stride: 5 * DIM, heads, first, count };
                    let want = naive(&shape, &q, &keys, &values);
                    // A code is off by half a step of 1/127; scores of twenty channels, then values.
                    for (source, bound) in [
                        (&f32s as &Source<'_>, 1e-5),
                        (&f16s as &Source<'_>, 2e-3),
                        (&q8s as &Source<'_>, 2e-2),
                    ] {
                        let mut out = vec![0.0; count * heads * DIM];
                        attend(&shape, &q, source, &mut out, heads * DIM);
                        for (i, (got, want)) in out.iter().zip(&want).enumerate() {
                            let what =
                                format!("{first} {count} {heads} {window:?} {softcap:?} {i}");
                            assert!((f64::from(*got) - want).abs() < bound, "{what}: {got} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn codes_are_within_half_a_step() {
        let row = random(37, 9);
        let mut codes = vec![0; 37];
        let scale = quantize(&row, &mut codes);
        let largest = row.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        assert!((scale - largest / 127.0).abs() < 1e-7);
        for (v, code) in row.iter().zip(&codes) {
            assert!((v - f32::from(*code) * scale).abs() <= 0.501 * scale, "{v} {code}");
        }
        assert_eq!(codes.iter().map(|c| c.unsigned_abs()).max(), Some(127));
        assert_eq!(quantize(&[0.0; 3], &mut codes[..3]), 0.0);
        assert_eq!(codes[..3], [0; 3]);
        assert!(quantize(&[f32::NAN, 1.0], &mut codes[..2]).is_nan());
        assert!(quantize(&[f32::INFINITY, 1.0], &mut codes[..2]).is_nan());
    }

    #[test]
    fn pieces_are_disjoint_and_cover() {
        let mut out = vec![0.0; 10];
        for_pieces(&mut out, &[3, 3, 7, 10], 1, |i, piece| {
            piece.iter_mut().for_each(|v| *v += (i + 1) as f32);
        });
        assert_eq!(out, [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 4.0, 4.0, 4.0]);
    }
}
