//! Dense f32 products with a matrix that was packed once, near the peak of the vector units from a few
//! tokens on.
//!
//! Strips of 16 rows stand side by side, column after column, so that a vector holds one column of a strip.
//! A tile of sums, some tokens by some strips, stays in registers over [`DEPTH`] columns; the part of the
//! strips that it reads stays in the first cache for all tokens of a pass.

#![allow(unsafe_op_in_unsafe_fn)]

use std::ops::Range;

use super::simd::{self, Level, Simd, Task};
use super::threads::{self, Shared};

/// Rows of a strip.
const LANES: usize = 16;
/// Strips that are multiplied together.
const STRIPS: usize = 3;
/// Columns after which sums go back to memory: of three strips they take 24 KiB.
const DEPTH: usize = 128;
/// Tokens that meet the same strips before the next strips come.
const PASS: usize = 64;
/// Multiply-adds that are worth a thread of their own: a few microseconds.
const GRAIN: usize = 1 << 18;

/// A column of a strip: a line of the caches, so that no vector lies in two.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// A packed matrix. Rows that fill up the last strip are zeros.
#[derive(Debug, Clone)]
pub struct F32Panels {
    rows: usize,
    cols: usize,
    /// `[strips][cols]`
    lines: Vec<Line>,
}

impl F32Panels {
    /// Packs a `[rows, cols]` matrix; `read(row, out)` writes a row.
    pub fn pack(rows: usize, cols: usize, mut read: impl FnMut(usize, &mut [f32])) -> Self {
        let mut lines = vec![Line([0.0; LANES]); rows.div_ceil(LANES) * cols];
        let mut values = vec![0.0; cols];
        for row in 0..rows {
            read(row, &mut values);
            let strip = &mut lines[row / LANES * cols..][..cols];
            for (line, value) in strip.iter_mut().zip(&values) {
                line.0[row % LANES] = *value;
            }
        }
        Self { rows, cols, lines }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.lines[..])
    }

    /// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten; parallel. Columns are added in order, so that a
    /// result depends neither on the other tokens nor on how the work is split. Panics if sizes do not fit.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        self.multiply_at(Level::best(), x, y);
    }

    fn multiply_at(&self, level: Level, x: &[f32], y: &mut [f32]) {
        if self.rows == 0 || self.cols == 0 {
            return y.fill(0.0);
        }
        let tokens = x.len() / self.cols;
        assert!(
            x.len() == tokens * self.cols && y.len() == tokens * self.rows,
            "sizes of a product do not fit"
        );
        if tokens == 0 {
            return;
        }
        let y = Shared::new(y);
        let passes = tokens.div_ceil(PASS);
        let items = self.rows.div_ceil(STRIPS * LANES) * passes;
        let each = STRIPS * LANES * self.cols * tokens.min(PASS);
        threads::for_ranges(items, GRAIN / each + 1, |items| {
            for item in items {
                let (group, pass) = (item / passes, item % passes);
                let strips = self.rows.div_ceil(LANES);
                let strips = STRIPS * group..strips.min(STRIPS * (group + 1));
                let tokens = pass * PASS..tokens.min((pass + 1) * PASS);
                simd::run(level, Piece { panels: self, x, y, strips, tokens });
            }
        });
    }
}

/// Some tokens by at most [`STRIPS`] strips.
struct Piece<'a> {
    panels: &'a F32Panels,
    x: &'a [f32],
    y: Shared<'a>,
    strips: Range<usize>,
    tokens: Range<usize>,
}

impl Task for Piece<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // With 32 registers 8 tokens by 3 strips, with 16 of half the width 6 tokens by one.
        if S::TILE >= 8 {
            match self.strips.len() {
                3 => self.columns::<S, 8, 3>(self.strips.start),
                2 => self.columns::<S, 8, 2>(self.strips.start),
                _ => self.columns::<S, 8, 1>(self.strips.start),
            }
        } else {
            for strip in self.strips.clone() {
                self.columns::<S, 6, 1>(strip);
            }
        }
    }
}

impl Piece<'_> {
    /// All columns of `N` strips from `strip` on, `T` tokens at a time.
    ///
    /// # Safety
    /// The strips are some of the piece's, and the processor has the instructions of `S`.
    #[inline(always)]
    unsafe fn columns<S: Simd, const T: usize, const N: usize>(&self, strip: usize) {
        let cols = self.panels.cols;
        for from in (0..cols).step_by(DEPTH) {
            let columns = from..cols.min(from + DEPTH);
            let mut token = self.tokens.start;
            while token + T <= self.tokens.end {
                self.tile::<S, T, N>(strip, token, columns.clone());
                token += T;
            }
            if token + 4 <= self.tokens.end {
                self.tile::<S, 4, N>(strip, token, columns.clone());
                token += 4;
            }
            if token + 2 <= self.tokens.end {
                self.tile::<S, 2, N>(strip, token, columns.clone());
                token += 2;
            }
            if token < self.tokens.end {
                self.tile::<S, 1, N>(strip, token, columns);
            }
        }
    }

    /// Adds some columns to the sums of `T` tokens by `N` strips; the first columns start them.
    ///
    /// # Safety
    /// As of `columns`; the tokens are some of the piece's.
    #[inline(always)]
    unsafe fn tile<S: Simd, const T: usize, const N: usize>(
        &self,
        strip: usize,
        token: usize,
        columns: Range<usize>,
    ) {
        let F32Panels { rows, cols, lines } = self.panels;
        let (rows, cols) = (*rows, *cols);
        debug_assert!((strip + N) * cols <= lines.len() && (token + T) * cols <= self.x.len());
        let first = strip * LANES;
        let whole = first + N * LANES <= rows;
        let y = |t: usize, n: usize| (token + t) * rows + first + n * LANES;
        let mut sums = [[S::splat(0.0); N]; T];
        if columns.start > 0 {
            for (t, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    if whole {
                        *sum = S::load(self.y.at(y(t, n)));
                    } else {
                        let mut some = [0.0; LANES];
                        let count = LANES.min(rows - first - n * LANES);
                        let at = self.y.at(y(t, n));
                        some[..count].copy_from_slice(std::slice::from_raw_parts(at, count));
                        *sum = S::load(some.as_ptr());
                    }
                }
            }
        }
        let w = lines.as_ptr().add(strip * cols + columns.start).cast::<f32>();
        let x = self.x.as_ptr().add(token * cols + columns.start);
        for k in 0..columns.len() {
            let w: [S::F; N] = std::array::from_fn(|n| S::load(w.add((n * cols + k) * LANES)));
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = S::splat(*x.add(t * cols + k));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = S::mul_add(x, w, *sum);
                }
            }
        }
        for (t, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                if whole {
                    S::store(self.y.at(y(t, n)), sum);
                } else {
                    let mut some = [0.0; LANES];
                    S::store(some.as_mut_ptr(), sum);
                    let count = LANES.min(rows - first - n * LANES);
                    self.y.slice(y(t, n)..y(t, n) + count).copy_from_slice(&some[..count]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, mut state: u32) -> Vec<f32> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 0.999_99
            })
            .collect()
    }

    #[test]
    fn products_match_the_definition_at_all_levels() {
        for [rows, cols] in [[1, 1], [7, 5], [16, 64], [17, 129], [48, 300], [50, 128], [100, 33]] {
            let w = noise(rows * cols, 1);
            let read = |row: usize, out: &mut [f32]| out.copy_from_slice(&w[row * cols..][..cols]);
            let packed = F32Panels::pack(rows, cols, read);
            assert_eq!(packed.bytes(), rows.next_multiple_of(16) * cols * 4);
            for tokens in [0, 1, 2, 3, 6, 7, 8, 15, 16, 33, 64, 65, 131] {
                let x = noise(tokens * cols, 3);
                for level in Level::available() {
                    let mut y = vec![f32::NAN; tokens * rows];
                    packed.multiply_at(level, &x, &mut y);
                    for (i, y) in y.iter().enumerate() {
                        let (x, w) = (&x[i / rows * cols..], &w[i % rows * cols..][..cols]);
                        let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                        let size: f64 = terms.clone().map(f64::abs).sum();
                        let error = (f64::from(*y) - terms.sum::<f64>()).abs();
                        assert!(
                            error <= 1e-5 * size + 1e-30,
                            "{level:?} [{rows}, {cols}] {tokens} tokens: off by {error} of {size}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_result_does_not_depend_on_the_other_tokens() {
        let (rows, cols) = (70, 150);
        let w = noise(rows * cols, 1);
        let packed =
            F32Panels::pack(rows, cols, |row, out| out.copy_from_slice(&w[row * cols..][..cols]));
        let x = noise(77 * cols, 2);
        let mut all = vec![0.0; 77 * rows];
        packed.multiply(&x, &mut all);
        for (first, count) in [(0, 1), (5, 9), (60, 17)] {
            let mut some = vec![0.0; count * rows];
            packed.multiply(&x[first * cols..][..count * cols], &mut some);
            assert_eq!(some, all[first * rows..][..count * rows]);
        }
    }
}
