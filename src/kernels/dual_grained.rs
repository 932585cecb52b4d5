//! Decoding of 4-bit codes in groups inside 8-bit rows (DGQ, arXiv 2310.04836).

#![allow(unsafe_op_in_unsafe_fn)]

use super::dot::{Rows, Sink};
use super::ggml::nibbles;
use super::simd::Simd;

/// Columns of a block of stored codes.
pub const BLOCK: usize = 32;

/// Rows of codes: `weight = (code - zero) * (scale * factor)`.
#[derive(Clone, Copy)]
pub struct DualGrainedRows<'a> {
    rows: usize,
    cols: usize,
    group: usize,
    codes: &'a [u8],
    factors: &'a [u8],
    zeros: &'a [u8],
    scales: &'a [u8],
}

impl<'a> DualGrainedRows<'a> {
    /// `codes` are 16 bytes for [`BLOCK`] columns of a row, column i in the low half of byte i and column
    /// i + 16 in its high half; `factors` and `zeros` are one byte each, `[rows, cols / group]`; `scales` are
    /// little-endian f32, `[rows]`. Panics if sizes differ from that, or groups are not whole blocks that
    /// divide the columns.
    pub fn new(
        [rows, cols]: [usize; 2],
        group: usize,
        codes: &'a [u8],
        factors: &'a [u8],
        zeros: &'a [u8],
        scales: &'a [u8],
    ) -> Self {
        assert!(group > 0 && group.is_multiple_of(BLOCK) && cols.is_multiple_of(group));
        let groups = rows * (cols / group);
        assert!(codes.len() == rows * (cols / 2) && scales.len() == 4 * rows);
        assert!(factors.len() == groups && zeros.len() == groups);
        Self { rows, cols, group, codes, factors, zeros, scales }
    }
}

// SAFETY: groups follow each other without gap or overlap, and so do the blocks in them.
unsafe impl Rows for DualGrainedRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K) {
        let groups = self.cols / self.group;
        let codes = self.codes.as_ptr().add(row * (self.cols / 2));
        let scale = f32::from_le_bytes(self.scales.as_ptr().add(4 * row).cast::<[u8; 4]>().read());
        for group in 0..groups {
            let at = row * groups + group;
            let zero = S::splat(f32::from(*self.zeros.get_unchecked(at)));
            let step = S::splat(scale * f32::from(*self.factors.get_unchecked(at)));
            for column in (group * self.group..(group + 1) * self.group).step_by(BLOCK) {
                let [a, b] = nibbles::<S>(codes.add(column / 2));
                let (a, b) = (S::mul(S::sub(a, zero), step), S::mul(S::sub(b, zero), step));
                sink.pair(column, a, b);
            }
        }
    }
}
