//! A product of two narrow matrices, `W = L R`: what low-rank compression leaves of a weight.
//!
//! A product takes `rank * (rows + cols)` multiply-adds a token instead of `rows * cols`, and reads as many
//! elements; both halves are bound as [`Dense`] products are.

use super::*;
use crate::kernels::threads;

/// Suffixes of the parts.
const LEFT: &str = "left";
const RIGHT: &str = "right";
/// Multiply-adds that are worth a thread of their own.
const GRAIN: usize = 1 << 16;

/// `left` `[rows, rank]` times `right` `[rank, cols]`, each f32, f16 or bf16.
#[derive(Debug, Clone)]
pub struct Factored {
    shape: [usize; 2],
    rank: usize,
    left: Dense,
    right: Dense,
}

impl Factored {
    /// From the two factors.
    ///
    /// # Errors
    /// `MALFORMED_FILE` if they are no matrices, do not fit each other, or have more ranks than the product
    /// can.
    pub fn new(left: Dense, right: Dense) -> Result<Self> {
        let (&[rows, rank], &[inner, cols]) = (left.shape(), right.shape()) else {
            return Err(malformed("the factors of a weight must be matrices"));
        };
        if rank != inner || rank > rows.min(cols) {
            return Err(malformed(format!(
                "factors [{rows}, {rank}] and [{inner}, {cols}] do not make a matrix: give both the same \
                 rank, at most {}",
                rows.min(cols)
            )));
        }
        Ok(Self { shape: [rows, cols], rank, left, right })
    }

    /// From f32 factors, `left` `[rows, rank]` and `right` `[rank, cols]`, rounded to `dtype`.
    ///
    /// # Errors
    /// As [`Factored::new`] and [`Dense::from_f32`].
    pub fn from_f32(
        shape: [usize; 2],
        rank: usize,
        left: &[f32],
        right: &[f32],
        dtype: Dtype,
    ) -> Result<Self> {
        Self::new(
            Dense::from_f32(vec![shape[0], rank], left, dtype)?,
            Dense::from_f32(vec![rank, shape[1]], right, dtype)?,
        )
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Elements of both factors.
    pub fn stored(&self) -> u64 {
        (self.rank * (self.shape[0] + self.shape[1])) as u64
    }

    pub fn bytes(&self) -> u64 {
        self.left.bytes() + self.right.bytes()
    }

    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        out.fill(0.0);
        self.add_rows(first, out);
    }

    /// `out += rows first ..`, in one order whatever rows are asked for.
    pub fn add_rows(&self, first: usize, out: &mut [f32]) {
        let cols = self.shape[1];
        let mut left = vec![0.0; out.len() / cols * self.rank];
        let mut right = vec![0.0; self.rank * cols];
        self.left.read_rows(first, &mut left);
        self.right.read_rows(0, &mut right);
        threads::for_rows(out, cols, GRAIN / (self.rank * cols) + 1, |first, rows| {
            let left = left[first * self.rank..].chunks_exact(self.rank);
            for (out, left) in rows.chunks_exact_mut(cols).zip(left) {
                for (l, right) in left.iter().zip(right.chunks_exact(cols)) {
                    for (o, r) in out.iter_mut().zip(right) {
                        *o += l * r;
                    }
                }
            }
        });
    }

    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        let mut inner = vec![0.0; x.len() / self.shape[1] * self.rank];
        self.right.multiply(x, &mut inner);
        self.left.multiply(&inner, y);
    }

    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        let mut inner = vec![0.0; g.len() / self.shape[0] * self.rank];
        self.left.multiply_transposed(g, &mut inner);
        self.right.multiply_transposed(&inner, dx);
    }

    /// `y += W x`; `room` is scratch that is kept.
    pub fn add_product(&self, x: &[f32], y: &mut [f32], room: &mut Vec<f32>) {
        let tokens = x.len() / self.shape[1];
        let wanted = tokens * (self.rank + self.shape[0]);
        if room.len() < wanted {
            room.resize(wanted, 0.0);
        }
        let (inner, product) = room[..wanted].split_at_mut(tokens * self.rank);
        self.right.multiply(x, inner);
        self.left.multiply(inner, product);
        y.iter_mut().zip(product).for_each(|(y, product)| *y += *product);
    }

    /// `left` and `right`.
    pub fn parts(&self) -> Vec<Part> {
        self.parts_as([LEFT, RIGHT])
    }

    pub(super) fn parts_as(&self, suffixes: [&'static str; 2]) -> Vec<Part> {
        let factors = [&self.left, &self.right].into_iter().zip(suffixes);
        factors
            .flat_map(|(factor, suffix)| {
                factor.parts().into_iter().map(move |part| Part { suffix, ..part })
            })
            .collect()
    }

    pub fn record(&self) -> Record {
        Record::Factored { shape: self.shape, rank: self.rank }
    }

    pub fn from_parts(
        shape: [usize; 2],
        rank: usize,
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        Self::from_parts_as([LEFT, RIGHT], shape, rank, parts)
    }

    pub(super) fn from_parts_as(
        suffixes: [&str; 2],
        [rows, cols]: [usize; 2],
        rank: usize,
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        let mut factor = |suffix: &str, shape: [usize; 2]| {
            let part = take(parts, suffix)?;
            match part.shape == shape {
                true => Dense::new(part.shape, part.dtype, part.data),
                false => Err(malformed(format!(
                    "part '{suffix}' has shape {:?} but the layout record asks for {shape:?}",
                    part.shape
                ))),
            }
        };
        Self::new(factor(suffixes[0], [rows, rank])?, factor(suffixes[1], [rank, cols])?)
    }
}
