//! Low-rank additions to linear weights: `W' = W + scale * B A`.
//!
//! Factors are kept as bf16. An adapter's cost in a step is the bytes of its factors, so halving
//! them halves the cost and doubles how many adapters stay in memory; rounding moves an element by
//! at most one part in 256, a small share of a small change. Sums are f32.

mod changes;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use changes::{Changes, Product};

use candle_core::{Device, Tensor};
use half::bf16;

use super::tuning::{LowRank, Tuning};
use super::weight::Weight;
use crate::error::{Error, Result};

/// What is added to one linear weight `[out, in]`.
#[derive(Clone, PartialEq)]
pub struct Factors {
    rank: usize,
    rows: usize,
    cols: usize,
    /// `A`: `[rank, in]`.
    a: Vec<bf16>,
    /// `B` transposed: `[rank, out]`, so that adding a multiple of one of its columns to an output
    /// runs through memory in order.
    b: Vec<bf16>,
    scale: f32,
}

impl std::fmt::Debug for Factors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Factors {{ [{}, {}], rank {}, scale {} }}",
            self.rows, self.cols, self.rank, self.scale
        )
    }
}

impl Factors {
    /// From `a` `[rank, cols]` and `b` `[rows, rank]`, both in row order; `shape` is `[rows,
    /// cols]`.
    ///
    /// # Errors
    /// INTERNAL for a rank of 0 or slices of other sizes.
    pub fn new(
        shape: [usize; 2],
        rank: usize,
        a: Vec<bf16>,
        b: &[bf16],
        scale: f32,
    ) -> Result<Self> {
        let [rows, cols] = shape;
        let fits = |factor: &[bf16], side: usize| side.checked_mul(rank) == Some(factor.len());
        if rank == 0 || rows == 0 || cols == 0 || !fits(&a, cols) || !fits(b, rows) {
            return Err(Error::internal(format!(
                "factors with {} and {} elements are no product of rank {rank} for a [{rows}, {cols}] \
                 weight",
                a.len(),
                b.len()
            )));
        }
        let mut transposed = vec![bf16::ZERO; b.len()];
        for (row, values) in b.chunks_exact(rank).enumerate() {
            for (r, value) in values.iter().enumerate() {
                transposed[r * rows + row] = *value;
            }
        }
        Ok(Self { rank, rows, cols, a, b: transposed, scale })
    }

    /// From f32 elements, rounded.
    ///
    /// # Errors
    /// As [`Factors::new`].
    pub fn from_f32(
        shape: [usize; 2],
        rank: usize,
        a: &[f32],
        b: &[f32],
        scale: f32,
    ) -> Result<Self> {
        let round = |v: &[f32]| -> Vec<bf16> { v.iter().map(|v| bf16::from_f32(*v)).collect() };
        Self::new(shape, rank, round(a), &round(b), scale)
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Shape of the weight that is added to: `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// `A`, `[rank, in]`.
    pub fn a(&self) -> &[bf16] {
        &self.a
    }

    /// `B` transposed, `[rank, out]`.
    pub fn b(&self) -> &[bf16] {
        &self.b
    }

    /// Number of elements of both factors.
    pub fn parameters(&self) -> usize {
        self.a.len() + self.b.len()
    }

    /// `weight += by * scale * B A` on a dense `[out, in]` weight. Panics for another size.
    pub fn add_to(&self, by: f32, weight: &mut [f32]) {
        assert_eq!(weight.len(), self.rows * self.cols);
        for (row, weight) in weight.chunks_exact_mut(self.cols).enumerate() {
            for (r, a) in self.a.chunks_exact(self.cols).enumerate() {
                let factor = by * self.scale * self.b[r * self.rows + row].to_f32();
                for (w, a) in weight.iter_mut().zip(a) {
                    *w += factor * a.to_f32();
                }
            }
        }
    }
}

/// The additions to a model's linear weights, by the names of the weights
/// (`model.layers.0.self_attn.q_proj.weight`).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Adapter {
    pub linears: BTreeMap<String, Arc<Factors>>,
}

impl Adapter {
    /// Number of elements of all factors.
    pub fn parameters(&self) -> u64 {
        self.linears.values().map(|f| f.parameters() as u64).sum()
    }

    /// Bytes of all factors in memory.
    pub fn bytes(&self) -> u64 {
        self.parameters() * size_of::<bf16>() as u64
    }
}

/// Adapters as they serve, each with its weight, in a differentiable forward. Their shapes must fit.
#[derive(Debug, Clone, Default)]
pub struct Weighted(pub Vec<(Arc<Adapter>, f32)>);

impl Tuning for Weighted {
    /// The factors of all adapters side by side, as constants.
    fn low_rank(&self, name: &str) -> Result<Option<LowRank>> {
        let (mut a, mut b, mut shape) = (Vec::new(), Vec::new(), None);
        for (adapter, by) in &self.0 {
            let Some(factors) = adapter.linears.get(name) else { continue };
            let by = by * factors.scale;
            a.extend(factors.a.iter().map(|v| v.to_f32()));
            b.extend(factors.b.iter().map(|v| by * v.to_f32()));
            shape = Some([factors.rows, factors.cols]);
        }
        let Some([rows, cols]) = shape else { return Ok(None) };
        let rank = a.len() / cols;
        Ok(Some(LowRank {
            a: Tensor::from_vec(a, (rank, cols), &Device::Cpu)?,
            b: Tensor::from_vec(b, (rank, rows), &Device::Cpu)?.t()?.contiguous()?,
            rows: None,
            scale: 1.0,
            dropout: None,
        }))
    }

    fn linear(&self, _: &str, _: &Tensor, _: &Arc<Weight>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn computes(&self, _: &str) -> bool {
        false
    }

    fn tensor(&self, _: &str) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_of_factors_worked_out_by_hand() {
        // A = [[1, 2, 0], [0, -1, 3]], B = [[1, 0], [2, 1]]; B A = [[1, 2, 0], [2, 3, 3]].
        let (a, b) = ([1.0, 2.0, 0.0, 0.0, -1.0, 3.0], [1.0, 0.0, 2.0, 1.0]);
        let factors = Factors::from_f32([2, 3], 2, &a, &b, 0.5).unwrap();
        let mut weight = [10.0; 6];
        factors.add_to(2.0, &mut weight);
        assert_eq!(weight, [11.0, 12.0, 10.0, 12.0, 13.0, 13.0]);
        factors.add_to(-2.0, &mut weight);
        assert_eq!(weight, [10.0; 6]);
        assert_eq!((factors.rank(), factors.parameters()), (2, 10));
        let linears = [("w".to_owned(), Arc::new(factors))].into();
        assert_eq!(Adapter { linears }.bytes(), 20);
    }

    #[test]
    fn factors_of_other_sizes_are_refused() {
        for (shape, rank, a, b) in
            [([2, 3], 2, 5, 4), ([2, 3], 2, 6, 3), ([2, 3], 0, 0, 0), ([0, 3], 2, 6, 0)]
        {
            let (a, b) = (vec![0.0; a], vec![0.0; b]);
            assert!(Factors::from_f32(shape, rank, &a, &b, 1.0).is_err());
        }
        assert!(Factors::new([usize::MAX, 3], 2, vec![bf16::ZERO; 6], &[], 1.0).is_err());
    }
}
