//! Decoding of 4-bit normal floats: a code is a place in a table of sixteen levels, times the largest
//! absolute value of its block, which is kept in 8 bits.

#![allow(unsafe_op_in_unsafe_fn)]

use super::dot::{Rows, Sink};
use super::simd::Simd;

/// Elements of a block, in row order across rows.
pub const BLOCK: usize = 64;
/// Blocks whose sizes share a step.
pub const SHARED: usize = 256;

/// Quantiles of a normal distribution that are scaled to -1 to 1 and hold 0 (Dettmers et al. 2023).
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_1,
    -0.394_917_5,
    -0.284_441_4,
    -0.184_773_4,
    -0.091_050_0,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_2,
    0.440_709_8,
    0.562_617,
    0.722_956_8,
    1.0,
];

/// Rows of a `[rows, cols]` matrix.
#[derive(Clone, Copy)]
pub struct Nf4Rows<'a> {
    /// Two codes a byte, the first in the low half, in row order.
    codes: &'a [u8],
    /// For each block how many steps its size is above the mean, as i8.
    sizes: &'a [u8],
    /// f32, one for each [`SHARED`] blocks.
    steps: &'a [u8],
    mean: f32,
    rows: usize,
    cols: usize,
}

impl<'a> Nf4Rows<'a> {
    /// Panics if the parts have other sizes than `[rows, cols]` takes.
    pub fn new(
        (codes, sizes, steps): (&'a [u8], &'a [u8], &'a [u8]),
        mean: f32,
        [rows, cols]: [usize; 2],
    ) -> Self {
        let blocks = (rows * cols).div_ceil(BLOCK);
        assert_eq!(codes.len(), (rows * cols).div_ceil(2));
        assert_eq!(sizes.len(), blocks);
        assert_eq!(steps.len(), 4 * blocks.div_ceil(SHARED));
        Self { codes, sizes, steps, mean, rows, cols }
    }

    /// The size of a block.
    ///
    /// # Safety
    /// The block exists.
    #[inline(always)]
    unsafe fn size(&self, block: usize) -> f32 {
        let step = self.steps.as_ptr().add(4 * (block / SHARED)).cast::<[u8; 4]>();
        let size = f32::from(*self.sizes.get_unchecked(block) as i8);
        size_of_block(size, f32::from_le_bytes(step.read()), self.mean)
    }
}

/// What the stored numbers say of a block's size.
#[inline(always)]
pub fn size_of_block(above: f32, step: f32, mean: f32) -> f32 {
    let size = above * step + mean;
    if size > 0.0 { size } else { 0.0 }
}

// SAFETY: pairs step through the whole blocks of a row, or single columns through all of it.
unsafe impl Rows for Nf4Rows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K) {
        let first = row * self.cols;
        if self.cols.is_multiple_of(BLOCK) {
            let table = S::load(LEVELS.as_ptr());
            let codes = self.codes.as_ptr().add(first / 2);
            for at in (0..self.cols).step_by(BLOCK) {
                let size = S::splat(self.size((first + at) / BLOCK));
                for at in [at, at + BLOCK / 2] {
                    let p = codes.add(at / 2).cast::<[u32; 4]>().read_unaligned();
                    let [a, b, c, d] = p.map(u32::from_le);
                    let low = S::mul(S::lookup(table, a, b), size);
                    sink.pair(at, low, S::mul(S::lookup(table, c, d), size));
                }
            }
            return;
        }
        for at in 0..self.cols {
            let place = first + at;
            let code = *self.codes.get_unchecked(place / 2) >> (4 * (place % 2)) & 15;
            sink.one(at, LEVELS[usize::from(code)] * self.size(place / BLOCK));
        }
    }
}
