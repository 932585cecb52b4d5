//! Dense f32 products with a matrix that was packed once: what [`super::gemm`] does, without packing.

use super::gemm::View;
use super::gemm::strips::{self, LANES, Line, Result, Right};
use super::simd::Level;
use super::threads::Shared;

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
        let mut lines = vec![Line::ZERO; rows.div_ceil(LANES) * cols];
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
    /// result does not depend on how the work is split, and on the other tokens only, by rounding, in whether they
    /// are enough for products in parts. Panics if sizes do not fit.
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
        let x = View::new(x, tokens, self.cols);
        let y = Result {
            c: Shared::new(y),
            stride: self.rows,
            columns: self.rows,
            of: self.rows,
            accumulate: false,
        };
        // SAFETY: the sizes fit, and `y` is borrowed mutably.
        unsafe { strips::multiply(level, x, Right::Packed(&self.lines), y, true) };
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

    /// More strips than are taken apart at once, the last of them short.
    #[test]
    fn products_of_many_strips_match_the_definition() {
        let (rows, cols, tokens) = (530, 2048, 97);
        let (w, x) = (noise(rows * cols, 1), noise(tokens * cols, 2));
        let packed =
            F32Panels::pack(rows, cols, |row, out| out.copy_from_slice(&w[row * cols..][..cols]));
        let mut y = vec![f32::NAN; tokens * rows];
        packed.multiply(&x, &mut y);
        for (i, y) in y.iter().enumerate() {
            let (x, w) = (&x[i / rows * cols..], &w[i % rows * cols..][..cols]);
            let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let size: f64 = terms.clone().map(f64::abs).sum();
            let error = (f64::from(*y) - terms.sum::<f64>()).abs();
            assert!(error <= 1e-5 * size, "{i}: off by {error} of {size}");
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
