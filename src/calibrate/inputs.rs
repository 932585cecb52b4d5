//! Streaming statistics of the rows that enter a linear.

use rayon::prelude::*;

use super::gram::Gram;

/// Columns that one task works on: wide enough for vectors, narrow enough to spread over cores. Every
/// column's sums run in the order of the rows, so the number of threads does not change a bit.
const STRIPE: usize = 64;

/// Statistics of each column over all rows seen.
#[derive(Debug, Clone)]
pub struct Inputs {
    count: u64,
    squares: Vec<f64>,
    abs_max: Vec<f32>,
    mean: Vec<f64>,
    /// Sums of squared distances from the mean.
    spread: Vec<f64>,
    gram: Option<Gram>,
}

impl Inputs {
    /// Nothing seen yet; the Gram matrix is collected only when asked for.
    pub fn new(cols: usize, gram: bool) -> Self {
        Self {
            count: 0,
            squares: vec![0.0; cols],
            abs_max: vec![0.0; cols],
            mean: vec![0.0; cols],
            spread: vec![0.0; cols],
            gram: gram.then(|| Gram::new(cols)),
        }
    }

    /// Adds rows `[n, cols]`.
    pub fn add(&mut self, rows: &[f32]) {
        let cols = self.squares.len();
        let (before, new) = (self.count as f64, (rows.len() / cols) as f64);
        if new == 0.0 {
            return;
        }
        let stripes = self
            .squares
            .par_chunks_mut(STRIPE)
            .zip(self.abs_max.par_chunks_mut(STRIPE))
            .zip(self.mean.par_chunks_mut(STRIPE))
            .zip(self.spread.par_chunks_mut(STRIPE))
            .enumerate();
        stripes.for_each(|(s, (((squares, abs_max), mean), spread))| {
            let (from, width) = (s * STRIPE, squares.len());
            let stripe = || rows.chunks_exact(cols).map(|row| &row[from..from + width]);
            let mut sum = [0f64; STRIPE];
            for row in stripe() {
                for (i, v) in row.iter().enumerate() {
                    let wide = f64::from(*v);
                    sum[i] += wide;
                    squares[i] += wide * wide;
                    abs_max[i] = abs_max[i].max(v.abs());
                }
            }
            let chunk_mean = sum.map(|s| s / new);
            let mut chunk_spread = [0f64; STRIPE];
            for row in stripe() {
                for (i, v) in row.iter().enumerate() {
                    let distance = f64::from(*v) - chunk_mean[i];
                    chunk_spread[i] += distance * distance;
                }
            }
            for i in 0..width {
                let part = Moments { count: new, mean: chunk_mean[i], spread: chunk_spread[i] };
                let whole = Moments { count: before, mean: mean[i], spread: spread[i] };
                Moments { mean: mean[i], spread: spread[i], .. } = whole.merge(part);
            }
        });
        self.count += (rows.len() / cols) as u64;
        if let Some(gram) = &mut self.gram {
            gram.add(rows);
        }
    }

    /// Adds what another collector has seen (of the same columns, with or without Gram as this one).
    pub fn merge(&mut self, other: &Self) {
        for i in 0..self.squares.len() {
            let a =
                Moments { count: self.count as f64, mean: self.mean[i], spread: self.spread[i] };
            let b =
                Moments { count: other.count as f64, mean: other.mean[i], spread: other.spread[i] };
            Moments { mean: self.mean[i], spread: self.spread[i], .. } = a.merge(b);
            self.squares[i] += other.squares[i];
            self.abs_max[i] = self.abs_max[i].max(other.abs_max[i]);
        }
        self.count += other.count;
        if let (Some(mine), Some(theirs)) = (&mut self.gram, &other.gram) {
            mine.merge(theirs);
        }
    }

    /// Rows seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn cols(&self) -> usize {
        self.squares.len()
    }

    /// Sum of squares of each column.
    pub fn squares(&self) -> &[f64] {
        &self.squares
    }

    /// Euclidean norm of each column.
    pub fn norms(&self) -> Vec<f32> {
        self.squares.iter().map(|s| s.sqrt() as f32).collect()
    }

    /// Mean of each column.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Population variance of each column.
    pub fn variance(&self) -> Vec<f64> {
        self.spread.iter().map(|s| s / (self.count.max(1) as f64)).collect()
    }

    /// Largest absolute value of each column.
    pub fn abs_max(&self) -> &[f32] {
        &self.abs_max
    }

    /// `X^T X`, when it was asked for.
    pub fn gram(&self) -> Option<&Gram> {
        self.gram.as_ref()
    }

    /// Whether every value seen was finite.
    pub fn finite(&self) -> bool {
        self.squares.iter().all(|s| s.is_finite())
    }
}

/// Count, mean and sum of squared distances of some numbers.
struct Moments {
    count: f64,
    mean: f64,
    spread: f64,
}

impl Moments {
    /// Chan's pairwise merge: exact in real numbers, and it never subtracts large sums.
    fn merge(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0.0 {
            return self;
        }
        let distance = other.mean - self.mean;
        Self {
            count,
            mean: self.mean + distance * other.count / count,
            spread: self.spread
                + other.spread
                + distance * distance * self.count * other.count / count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_give_what_the_whole_gives() {
        // Columns [1, 2, 3, 4] and [-2, 0, 2, -4]: means 2.5 and -1, variances 1.25 and 5.
        let rows = [1.0, -2.0, 2.0, 0.0, 3.0, 2.0, 4.0, -4.0];
        let mut chunks = Inputs::new(2, true);
        chunks.add(&rows[..2]);
        chunks.add(&rows[2..]);
        let mut merged = Inputs::new(2, true);
        let mut rest = Inputs::new(2, true);
        merged.add(&rows[..6]);
        rest.add(&rows[6..]);
        merged.merge(&rest);
        for inputs in [chunks, merged] {
            assert_eq!(inputs.count(), 4);
            assert_eq!(inputs.mean(), [2.5, -1.0]);
            assert_eq!(inputs.variance(), [1.25, 5.0]);
            assert_eq!(inputs.squares(), [30.0, 24.0]);
            assert_eq!(inputs.abs_max(), [4.0, 4.0]);
            assert_eq!(inputs.norms()[0], 30f32.sqrt());
            assert_eq!(inputs.gram().expect("asked for").at(0, 1), -12.0);
        }
    }

    #[test]
    fn variance_survives_a_large_mean() {
        let mut inputs = Inputs::new(1, false);
        for _ in 0..1000 {
            inputs.add(&[10_000.0, 10_001.0]);
        }
        assert!((inputs.variance()[0] - 0.25).abs() < 1e-9);
        assert!(inputs.finite());
        inputs.add(&[f32::NAN]);
        assert!(!inputs.finite());
    }
}
