//! Scales of a panel: one vector for sixteen rows.

#![allow(unsafe_op_in_unsafe_fn)]

use half::f16;

use super::super::quantize::BLOCK;
use super::super::simd::Simd;
use super::panels::LANES;
use super::{Kind, Packed};

/// Reads the scales of a panel, unit by unit, block by block.
///
/// A weight is `scale * (code - zero) + min`, where `zero` is one number for the whole matrix.
pub(super) trait Scales: Copy {
    /// Whether a block has two scales, one for each half.
    const HALVES: bool;
    const MIN: bool;
    /// What a unit's blocks share.
    type Unit<S: Simd>: Copy;

    /// Blocks of a unit.
    fn blocks(self) -> usize;
    /// Bytes of a unit.
    fn bytes(self) -> usize;

    /// # Safety
    /// `p` is the start of a unit, and the processor has the instructions of `S`.
    unsafe fn unit<S: Simd>(self, p: *const u8) -> Self::Unit<S>;

    /// The code that stands for 0.
    ///
    /// # Safety
    /// As of `unit`.
    #[inline(always)]
    unsafe fn absent<S: Simd>(self, _: *const u8, zero: u8) -> S::C {
        S::splat_codes(zero)
    }

    /// Scales of the halves (equal if there is one) and the minimum of block `block` of the unit.
    ///
    /// # Safety
    /// As of `unit`.
    unsafe fn block<S: Simd>(
        self,
        unit: Self::Unit<S>,
        p: *const u8,
        block: usize,
    ) -> ([S::F; 2], S::F);
}

/// [`Kind::Block`] and [`Kind::Group`]: one scale.
#[derive(Clone, Copy)]
pub(super) struct One(pub usize);

impl Scales for One {
    const HALVES: bool = false;
    const MIN: bool = false;
    type Unit<S: Simd> = S::F;

    fn blocks(self) -> usize {
        self.0
    }
    fn bytes(self) -> usize {
        2 * LANES
    }
    #[inline(always)]
    unsafe fn unit<S: Simd>(self, p: *const u8) -> S::F {
        S::load_f16(p)
    }
    #[inline(always)]
    unsafe fn block<S: Simd>(self, unit: S::F, _: *const u8, _: usize) -> ([S::F; 2], S::F) {
        ([unit; 2], unit)
    }
}

/// [`Kind::BlockMin`].
#[derive(Clone, Copy)]
pub(super) struct Min;

impl Scales for Min {
    const HALVES: bool = false;
    const MIN: bool = true;
    type Unit<S: Simd> = (S::F, S::F);

    fn blocks(self) -> usize {
        1
    }
    fn bytes(self) -> usize {
        4 * LANES
    }
    #[inline(always)]
    unsafe fn unit<S: Simd>(self, p: *const u8) -> (S::F, S::F) {
        (S::load_f16(p), S::load_f16(p.add(2 * LANES)))
    }
    #[inline(always)]
    unsafe fn block<S: Simd>(
        self,
        (d, m): (S::F, S::F),
        _: *const u8,
        _: usize,
    ) -> ([S::F; 2], S::F) {
        ([d; 2], m)
    }
}

/// [`Kind::GroupZero`]: the zero point as a minimum, less what the kernel subtracts anyway.
#[derive(Clone, Copy)]
pub(super) struct Zero {
    pub blocks: usize,
    pub less: u8,
}

impl Scales for Zero {
    const HALVES: bool = false;
    const MIN: bool = true;
    type Unit<S: Simd> = (S::F, S::F);

    fn blocks(self) -> usize {
        self.blocks
    }
    fn bytes(self) -> usize {
        3 * LANES
    }
    #[inline(always)]
    unsafe fn unit<S: Simd>(self, p: *const u8) -> (S::F, S::F) {
        let scale = S::load_f16(p);
        let zero = S::unsigned(S::bytes(p.add(2 * LANES)));
        (scale, S::mul(scale, S::sub(S::splat(f32::from(self.less)), zero)))
    }
    #[inline(always)]
    unsafe fn absent<S: Simd>(self, p: *const u8, _: u8) -> S::C {
        S::spread(p.add(2 * LANES))
    }
    #[inline(always)]
    unsafe fn block<S: Simd>(
        self,
        (d, m): (S::F, S::F),
        _: *const u8,
        _: usize,
    ) -> ([S::F; 2], S::F) {
        ([d; 2], m)
    }
}

/// [`Kind::Super`].
#[derive(Clone, Copy)]
pub(super) struct Factors;

impl Scales for Factors {
    const HALVES: bool = false;
    const MIN: bool = true;
    type Unit<S: Simd> = (S::F, S::F);

    fn blocks(self) -> usize {
        8
    }
    fn bytes(self) -> usize {
        20 * LANES
    }
    #[inline(always)]
    unsafe fn unit<S: Simd>(self, p: *const u8) -> (S::F, S::F) {
        (S::load_f16(p), S::mul(S::load_f16(p.add(2 * LANES)), S::splat(-1.0)))
    }
    #[inline(always)]
    unsafe fn block<S: Simd>(
        self,
        (d, m): (S::F, S::F),
        p: *const u8,
        block: usize,
    ) -> ([S::F; 2], S::F) {
        let p = p.add((4 + 2 * block) * LANES);
        let scale = S::mul(d, S::unsigned(S::bytes(p)));
        ([scale; 2], S::mul(m, S::unsigned(S::bytes(p.add(LANES)))))
    }
}

/// [`Kind::SuperSigned`].
#[derive(Clone, Copy)]
pub(super) struct SignedFactors;

impl Scales for SignedFactors {
    const HALVES: bool = true;
    const MIN: bool = false;
    type Unit<S: Simd> = S::F;

    fn blocks(self) -> usize {
        8
    }
    fn bytes(self) -> usize {
        18 * LANES
    }
    #[inline(always)]
    unsafe fn unit<S: Simd>(self, p: *const u8) -> S::F {
        S::load_f16(p)
    }
    #[inline(always)]
    unsafe fn block<S: Simd>(self, d: S::F, p: *const u8, block: usize) -> ([S::F; 2], S::F) {
        let p = p.add((2 + 2 * block) * LANES);
        let low = S::mul(d, S::signed(S::bytes(p)));
        ([low, S::mul(d, S::signed(S::bytes(p.add(LANES))))], d)
    }
}

impl Packed {
    /// The scale of a whole row.
    fn row_scale(&self, row: usize) -> f32 {
        let at = 4 * (row % LANES);
        let bytes = &self.scales.panel(row / LANES)[at..at + 4];
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    /// The scale of an element and what is subtracted (or, for [`Kind::BlockMin`], added).
    pub(super) fn scale(&self, row: usize, column: usize) -> (f32, f32) {
        let panel = self.scales.panel(row / LANES);
        let lane = row % LANES;
        let half = |at: usize| {
            let at = at + 2 * lane;
            f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32()
        };
        let byte = |at: usize| panel[at + lane];
        let block = column / BLOCK;
        match self.kind {
            Kind::Block { zero } => (half(block * 2 * LANES), f32::from(zero)),
            Kind::BlockMin => (half(block * 4 * LANES), half((block * 4 + 2) * LANES)),
            Kind::Super => {
                let unit = block / 8 * 20 * LANES;
                let factors = unit + (4 + 2 * (block % 8)) * LANES;
                let (scale, min) = (byte(factors), byte(factors + LANES));
                (half(unit) * f32::from(scale), half(unit + 2 * LANES) * f32::from(min))
            }
            Kind::SuperSigned => {
                let unit = block / 8 * 18 * LANES;
                let factor = byte(unit + (2 + column / 16 % 16) * LANES) as i8;
                (half(unit) * f32::from(factor), 32.0)
            }
            Kind::Group { blocks, zero } => (half(block / blocks * 2 * LANES), f32::from(zero)),
            Kind::GroupZero { blocks } => {
                let unit = block / blocks * 3 * LANES;
                (half(unit), f32::from(byte(unit + 2 * LANES)))
            }
            Kind::Row => (self.row_scale(row), 128.0),
            Kind::Dual { blocks } => {
                let unit = 4 * LANES + block / blocks * 2 * LANES;
                let factor = f32::from(byte(unit));
                (self.row_scale(row) * factor, f32::from(byte(unit + LANES)))
            }
        }
    }
}
