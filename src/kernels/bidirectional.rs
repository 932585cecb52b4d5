//! Attention in which every position of a sequence sees every other, for many sequences at once: what
//! encoders do. Sequences are short, so the scores of a few queries over a whole sequence fit the first
//! cache, and both products are tiles of the same kernel over packed operands.

#![allow(unsafe_op_in_unsafe_fn)]

use std::ops::Range;

use super::activation::exp;
use super::multiversion::multiversion;
use super::simd::{self, Level, Simd, Task};
use super::threads::{self, Shared, with_scratch};

/// Rows of a tile.
const ROWS: usize = 4;
/// Columns of a tile: two vectors.
const COLS: usize = 32;
const LANES: usize = 16;
/// Products below which a head of a sequence is not worth a task of its own.
const GRAIN: usize = 1 << 15;

/// One of the three inputs, without its bias: row-major, as wide as the output.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub rows: &'a [f32],
    /// Added to every row.
    pub bias: &'a [f32],
}

/// What the sequences share.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Heads of a row; the row is `heads * dim` wide.
    pub heads: usize,
    /// Channels of a head.
    pub dim: usize,
    /// Factor on the scores.
    pub scale: f32,
}

/// `out = softmax(scale q k^T) v` for each head of each sequence; `sequences` are ranges of rows that do
/// not overlap, rows outside them are left alone.
///
/// # Panics
/// If sizes do not fit or sequences overlap or are out of order.
pub fn attend(
    shape: &Shape,
    sequences: &[Range<usize>],
    (q, k, v): (Input<'_>, Input<'_>, Input<'_>),
    out: &mut [f32],
) {
    let width = shape.heads * shape.dim;
    for input in [q, k, v] {
        assert!(input.rows.len() == out.len() && input.bias.len() == width, "sizes do not fit");
    }
    let mut end = 0;
    for rows in sequences {
        assert!(rows.start >= end && rows.start <= rows.end, "sequences overlap");
        end = rows.end;
    }
    assert!(end * width <= out.len(), "a sequence ends beyond the rows");
    let longest = sequences.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
    let grain = GRAIN / (longest * longest * shape.dim).max(1) + 1;
    let out = Shared::new(out);
    threads::for_ranges(sequences.len() * shape.heads, grain, |items| {
        for item in items {
            let rows = &sequences[item / shape.heads];
            let head = item % shape.heads;
            let task = Head { shape, rows: rows.clone(), first: head * shape.dim, q, k, v, out };
            if !rows.is_empty() {
                with_scratch(task.scratch(), |scratch| {
                    simd::run(Level::best(), Run { head: &task, scratch });
                });
            }
        }
    });
}

/// One head of one sequence.
struct Head<'a> {
    shape: &'a Shape,
    rows: Range<usize>,
    /// The head's first channel.
    first: usize,
    q: Input<'a>,
    k: Input<'a>,
    v: Input<'a>,
    /// Of this, only the head's channels of the sequence's rows are written.
    out: Shared<'a>,
}

impl Head<'_> {
    fn scratch(&self) -> usize {
        let (n, dim) = (self.rows.len(), self.shape.dim);
        let (wide, deep) = (n.next_multiple_of(COLS), dim.next_multiple_of(COLS));
        n.next_multiple_of(ROWS) * dim + dim * wide + n * deep + ROWS * (wide + deep)
    }

    /// The head's channels of each row of an input, and their bias.
    fn channels<'b>(
        &self,
        input: &Input<'b>,
    ) -> (impl Iterator<Item = &'b [f32]> + use<'b>, &'b [f32]) {
        let width = self.shape.heads * self.shape.dim;
        let (first, dim) = (self.first, self.shape.dim);
        let rows = &input.rows[self.rows.start * width..self.rows.end * width];
        (
            rows.chunks_exact(width).map(move |row| &row[first..first + dim]),
            &input.bias[first..first + dim],
        )
    }
}

struct Run<'a, 'b> {
    head: &'a Head<'b>,
    scratch: &'a mut [f32],
}

impl Task for Run<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Head { shape, rows, first, out, .. } = self.head;
        let (n, dim) = (rows.len(), shape.dim);
        let (wide, deep) = (n.next_multiple_of(COLS), dim.next_multiple_of(COLS));
        let (queries, rest) = self.scratch.split_at_mut(n.next_multiple_of(ROWS) * dim);
        let (keys, rest) = rest.split_at_mut(dim * wide);
        let (values, rest) = rest.split_at_mut(n * deep);
        let (scores, sums) = rest.split_at_mut(ROWS * wide);

        // Queries with the factor on the scores, padded to whole tiles with zeros.
        let (q, bias) = self.head.channels(&self.head.q);
        for (to, from) in queries.chunks_exact_mut(dim).zip(q) {
            for ((to, x), b) in to.iter_mut().zip(from).zip(bias) {
                *to = (*x + *b) * shape.scale;
            }
        }
        queries[n * dim..].fill(0.0);
        // Keys transposed.
        let (k, bias) = self.head.channels(&self.head.k);
        for (j, from) in k.enumerate() {
            for ((x, b), to) in from.iter().zip(bias).zip(keys.chunks_exact_mut(wide)) {
                to[j] = *x + *b;
            }
        }
        for row in keys.chunks_exact_mut(wide) {
            row[n..].fill(0.0);
        }
        let (v, bias) = self.head.channels(&self.head.v);
        for (to, from) in values.chunks_exact_mut(deep).zip(v) {
            for ((to, x), b) in to.iter_mut().zip(from).zip(bias) {
                *to = *x + *b;
            }
            to[dim..].fill(0.0);
        }

        let width = shape.heads * dim;
        for at in (0..n).step_by(ROWS) {
            let block = &queries[at * dim..(at + ROWS) * dim];
            product::<S>((block, dim), (keys, wide), dim, scores);
            let totals = soften(scores, wide, n);
            product::<S>((scores, wide), (values, deep), n, sums);
            for (r, total) in totals.iter().enumerate().take(n - at) {
                let start = (rows.start + at + r) * width + first;
                // SAFETY: these channels of this row belong to this head alone.
                let to = out.slice(start..start + dim);
                let inverse = 1.0 / total;
                for (o, s) in to.iter_mut().zip(&sums[r * deep..]) {
                    *o = s * inverse;
                }
            }
        }
    }
}

/// `c = a b` for `ROWS` rows of `a`, `depth` rows of `b` (a multiple of `COLS` wide); each comes with the
/// distance of its rows, and `c` has that of `b`.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn product<S: Simd>(
    (a, a_stride): (&[f32], usize),
    (b, b_stride): (&[f32], usize),
    depth: usize,
    c: &mut [f32],
) {
    assert!(depth <= a_stride && a.len() >= ROWS * a_stride && b.len() >= depth * b_stride);
    assert!(b_stride.is_multiple_of(COLS) && c.len() >= ROWS * b_stride);
    let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
    for col in (0..b_stride).step_by(COLS) {
        let mut tile = [[S::splat(0.0); 2]; ROWS];
        for d in 0..depth {
            // SAFETY: inside the slices by the assertions above.
            let row = b.add(d * b_stride + col);
            let (left, right) = (S::load(row), S::load(row.add(LANES)));
            for (r, sums) in tile.iter_mut().enumerate() {
                let x = S::splat(*a.add(r * a_stride + d));
                sums[0] = S::mul_add(x, left, sums[0]);
                sums[1] = S::mul_add(x, right, sums[1]);
            }
        }
        for (r, sums) in tile.into_iter().enumerate() {
            let to = c.add(r * b_stride + col);
            S::store(to, sums[0]);
            S::store(to.add(LANES), sums[1]);
        }
    }
}

multiversion! {
    /// Turns the first `n` scores of each row into weights and gives the sum of each row's.
    fn soften(scores: &mut [f32], stride: usize, n: usize) -> [f32; ROWS] {
        let mut totals = [0.0; ROWS];
        for (row, total) in scores.chunks_exact_mut(stride).zip(&mut totals) {
            let row = &mut row[..n];
            let mut lanes = [f32::NEG_INFINITY; LANES];
            let chunks = row.chunks_exact(LANES);
            for (lane, s) in lanes.iter_mut().zip(chunks.remainder()) {
                *lane = *s;
            }
            for chunk in chunks {
                for (lane, s) in lanes.iter_mut().zip(chunk) {
                    *lane = if *s > *lane { *s } else { *lane };
                }
            }
            let highest = lanes.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
            let mut lanes = [0.0_f32; LANES];
            let mut chunks = row.chunks_exact_mut(LANES);
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
            *total = lanes.iter().sum();
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed | 1;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn heads_and_sequences_match_the_definition() {
        for (heads, dim, lengths) in [
            (1, 1, vec![1, 2]),
            (3, 5, vec![7, 1, 33]),
            (2, 32, vec![32, 31, 64]),
            (4, 40, vec![3, 100]),
        ] {
            let width = heads * dim;
            let rows: usize = lengths.iter().sum();
            // A row in front belongs to no sequence.
            let mut next = 1;
            let sequences: Vec<_> = lengths
                .iter()
                .map(|n| {
                    next += n;
                    next - n..next
                })
                .collect();
            let inputs: Vec<_> =
                (1..4).map(|i| (noise((rows + 1) * width, i * 77), noise(width, i * 91))).collect();
            let input = |i: usize| Input { rows: &inputs[i].0, bias: &inputs[i].1 };
            let shape = Shape { heads, dim, scale: 0.7 };
            let mut out = vec![9.0; (rows + 1) * width];
            attend(&shape, &sequences, (input(0), input(1), input(2)), &mut out);
            assert!(out[..width].iter().all(|v| *v == 9.0));
            let at = |i: usize, row: usize, c: usize| {
                f64::from(inputs[i].0[row * width + c]) + f64::from(inputs[i].1[c])
            };
            for s in &sequences {
                for (row, head) in s.clone().flat_map(|row| (0..heads).map(move |h| (row, h))) {
                    let channels = head * dim..(head + 1) * dim;
                    let weights: Vec<f64> = s
                        .clone()
                        .map(|j| {
                            let dot: f64 =
                                channels.clone().map(|c| at(0, row, c) * at(1, j, c)).sum();
                            (0.7 * dot).exp()
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    for c in channels {
                        let want: f64 =
                            s.clone().zip(&weights).map(|(j, w)| w * at(2, j, c)).sum::<f64>()
                                / total;
                        let got = f64::from(out[row * width + c]);
                        assert!((got - want).abs() < 1e-5, "{heads} by {dim}: {got} not {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn large_scores_do_not_overflow() {
        // Two positions; the second key wins by e^-200.
        let q = [100.0, 100.0];
        let k = [1.0, 3.0];
        let v = [5.0, 7.0];
        let none = [0.0];
        let input = |rows| Input { rows, bias: &none };
        let mut out = [0.0; 2];
        let shape = Shape { heads: 1, dim: 1, scale: 1.0 };
        attend(&shape, std::slice::from_ref(&(0..2)), (input(&q), input(&k), input(&v)), &mut out);
        assert_eq!(out, [7.0, 7.0]);
    }
}
