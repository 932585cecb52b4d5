//! Gram matrices of inputs, summed over chunks of rows.

use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// `X^T X` over all rows seen, `[cols, cols]`; only the upper triangle is kept up to date.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    cols: usize,
    upper: Vec<f64>,
    chunk: Vec<f32>,
}

impl Gram {
    pub fn new(cols: usize) -> Self {
        Self { cols, upper: vec![0.0; cols * cols], chunk: vec![0.0; cols * cols] }
    }

    /// Adds rows `[n, cols]`. A chunk's products are summed in f32 (it is short), chunks in f64, so
    /// the error does not grow with the text.
    pub fn add(&mut self, rows: &[f32]) {
        let (n, cols) = (rows.len() / self.cols, self.cols);
        let x = MatRef::from_row_major_slice(rows, n, cols);
        triangular::matmul(
            MatMut::from_row_major_slice_mut(&mut self.chunk, cols, cols),
            BlockStructure::TriangularUpper,
            Accum::Replace,
            x.transpose(),
            BlockStructure::Rectangular,
            x,
            BlockStructure::Rectangular,
            1.0,
            Par::rayon(0),
        );
        let sums = self.upper.par_chunks_mut(cols).zip(self.chunk.par_chunks(cols)).enumerate();
        sums.for_each(|(i, (sum, chunk))| {
            for (s, c) in sum[i..].iter_mut().zip(&chunk[i..]) {
                *s += f64::from(*c);
            }
        });
    }

    /// Adds what another matrix has seen.
    pub fn merge(&mut self, other: &Self) {
        for (s, o) in self.upper.iter_mut().zip(&other.upper) {
            *s += o;
        }
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Element `(i, j)`; the matrix is symmetric.
    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.upper[i.min(j) * self.cols + i.max(j)]
    }

    /// The squared size of `w`'s outputs on the inputs seen, `||W X||^2 = sum_r w_r G w_r^T`; `w` is
    /// `[rows, cols]`. The same bits whatever the number of threads.
    pub fn energy(&self, w: &[f32]) -> f64 {
        let cols = self.cols;
        let mut full = vec![0f32; cols * cols];
        full.par_chunks_mut(cols).enumerate().for_each(|(i, row)| {
            for (j, v) in row.iter_mut().enumerate() {
                *v = self.at(i, j) as f32;
            }
        });
        let rows = w.len() / cols;
        let mut product = vec![0f32; w.len()];
        faer::linalg::matmul::matmul(
            MatMut::from_row_major_slice_mut(&mut product, rows, cols),
            Accum::Replace,
            MatRef::from_row_major_slice(w, rows, cols),
            MatRef::from_row_major_slice(&full, cols, cols),
            1.0,
            Par::rayon(0),
        );
        let rows = product.par_chunks(cols).zip(w.par_chunks(cols));
        let sums: Vec<f64> = rows
            .map(|(p, w)| p.iter().zip(w).map(|(p, w)| f64::from(*p) * f64::from(*w)).sum())
            .collect();
        sums.iter().sum::<f64>().max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_chunks_are_the_products_of_columns() {
        // X = [[1, 2], [3, 4], [5, 6]]: X^T X = [[35, 44], [44, 56]].
        let mut gram = Gram::new(2);
        gram.add(&[1.0, 2.0, 3.0, 4.0]);
        gram.add(&[5.0, 6.0]);
        assert_eq!(
            [gram.at(0, 0), gram.at(0, 1), gram.at(1, 0), gram.at(1, 1)],
            [35., 44., 44., 56.]
        );
        let (mut a, mut b) = (Gram::new(2), Gram::new(2));
        a.add(&[1.0, 2.0]);
        b.add(&[3.0, 4.0, 5.0, 6.0]);
        a.merge(&b);
        assert_eq!(a.at(0, 1), 44.0);
        // w = [1, -1]: outputs -1, -1, -1.
        assert_eq!(gram.energy(&[1.0, -1.0]), 3.0);
    }
}
