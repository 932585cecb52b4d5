//! Decoding of packed codes with a scale and a zero point for each group of a row.

#![allow(unsafe_op_in_unsafe_fn)]

use super::dot::{Rows, Sink};
use super::simd::Simd;

/// `weight = (code - zero) * scale` by groups of consecutive columns.
#[derive(Clone, Copy)]
pub struct Grid<'a> {
    bits: usize,
    group: usize,
    per_row: usize,
    scales: &'a [u8],
    zeros: Option<&'a [u8]>,
}

impl<'a> Grid<'a> {
    /// `scales` are f16, `zeros` one byte each, both `[rows, cols / group]`; without zeros the zero
    /// point is `2^(bits-1)`. Panics if the sizes differ from that.
    pub fn new(
        bits: u8,
        group: usize,
        [rows, cols]: [usize; 2],
        scales: &'a [u8],
        zeros: Option<&'a [u8]>,
    ) -> Self {
        assert!(matches!(bits, 2 | 3 | 4 | 8) && cols.is_multiple_of(group));
        let per_row = cols / group;
        assert_eq!(scales.len(), 2 * rows * per_row);
        assert!(zeros.is_none_or(|z| z.len() == rows * per_row));
        Self { bits: bits.into(), group, per_row, scales, zeros }
    }

    /// Bits, columns of a group, scales and zero points.
    pub(super) fn parts(&self) -> (u8, usize, &'a [u8], Option<&'a [u8]>) {
        (self.bits as u8, self.group, self.scales, self.zeros)
    }

    pub(super) fn bits(&self) -> usize {
        self.bits
    }

    pub(super) fn group(&self) -> usize {
        self.group
    }

    /// Zero and scale of a group of a row.
    ///
    /// # Safety
    /// The row and the group exist, and the processor has the instructions of `S`.
    #[inline(always)]
    pub(super) unsafe fn at<S: Simd>(&self, row: usize, group: usize) -> (S::F, S::F) {
        let at = row * self.per_row + group;
        let scale = S::splat_f16(self.scales.as_ptr().add(2 * at).cast::<u16>().read_unaligned());
        let zero = match self.zeros {
            Some(zeros) => f32::from(*zeros.get_unchecked(at)),
            None => (1 << (self.bits - 1)) as f32,
        };
        (S::splat(zero), scale)
    }

    /// The weight of one code.
    ///
    /// # Safety
    /// As of `at`.
    #[inline(always)]
    pub(super) unsafe fn weight<S: Simd>(&self, row: usize, group: usize, code: f32) -> f32 {
        let (zero, scale) = self.at::<S>(row, group);
        S::first(S::mul(S::sub(S::splat(code), zero), scale))
    }
}

/// Rows of codes: a little-endian bit stream a row, padded to a byte.
#[derive(Clone, Copy)]
pub struct GroupedRows<'a> {
    codes: &'a [u8],
    rows: usize,
    cols: usize,
    grid: Grid<'a>,
}

impl<'a> GroupedRows<'a> {
    /// Panics if `codes` is not `rows` padded rows.
    pub fn new(codes: &'a [u8], rows: usize, cols: usize, grid: Grid<'a>) -> Self {
        assert_eq!(codes.len(), rows * (cols * grid.bits).div_ceil(8));
        assert_eq!(grid.per_row * grid.group, cols);
        Self { codes, rows, cols, grid }
    }

    #[inline(always)]
    unsafe fn decode_bits<const BITS: usize, S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K) {
        let p = self.codes.as_ptr().add(row * (self.cols * BITS).div_ceil(8));
        let group = self.grid.group;
        if group.is_multiple_of(32) {
            for g in 0..self.grid.per_row {
                let (zero, scale) = self.grid.at::<S>(row, g);
                for at in (g * group..(g + 1) * group).step_by(32) {
                    let a = S::sub(sixteen::<BITS, S>(p.add(at * BITS / 8)), zero);
                    let b = S::sub(sixteen::<BITS, S>(p.add((at + 16) * BITS / 8)), zero);
                    sink.pair(at, S::mul(a, scale), S::mul(b, scale));
                }
            }
            return;
        }
        let whole = if group.is_multiple_of(16) { self.cols / 32 * 32 } else { 0 };
        for at in (0..whole).step_by(32) {
            let (zero, scale) = self.grid.at::<S>(row, at / group);
            let a = S::mul(S::sub(sixteen::<BITS, S>(p.add(at * BITS / 8)), zero), scale);
            let (zero, scale) = self.grid.at::<S>(row, (at + 16) / group);
            let b = S::sub(sixteen::<BITS, S>(p.add((at + 16) * BITS / 8)), zero);
            sink.pair(at, a, S::mul(b, scale));
        }
        for at in whole..self.cols {
            let low = u16::from(*p.add(at * BITS / 8)) >> (at * BITS % 8);
            // A code of 3 bits may reach into the next byte.
            let last = (at * BITS + BITS - 1) / 8;
            let both = if last > at * BITS / 8 {
                low | u16::from(*p.add(last)) << (8 - at * BITS % 8)
            } else {
                low
            };
            let code = f32::from(both & ((1 << BITS) - 1));
            sink.one(at, self.grid.weight::<S>(row, at / group, code));
        }
    }
}

/// 16 codes from `2 * BITS` bytes, no more of which are read.
#[inline(always)]
unsafe fn sixteen<const BITS: usize, S: Simd>(p: *const u8) -> S::F {
    if BITS == 8 {
        S::unsigned(S::bytes(p))
    } else {
        S::fields(eight::<BITS>(p), eight::<BITS>(p.add(BITS)), BITS as u32)
    }
}

/// Eight codes from `BITS <= 4` bytes.
#[inline(always)]
unsafe fn eight<const BITS: usize>(p: *const u8) -> u32 {
    match BITS {
        2 => u32::from(p.cast::<u16>().read_unaligned()),
        3 => u32::from(p.cast::<u16>().read_unaligned()) | u32::from(*p.add(2)) << 16,
        _ => p.cast::<u32>().read_unaligned(),
    }
}

// SAFETY: groups, pairs and single columns step through 0..cols without gap or overlap.
unsafe impl Rows for GroupedRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K) {
        match self.grid.bits {
            2 => self.decode_bits::<2, S, K>(row, sink),
            3 => self.decode_bits::<3, S, K>(row, sink),
            4 => self.decode_bits::<4, S, K>(row, sink),
            _ => self.decode_bits::<8, S, K>(row, sink),
        }
    }
}
