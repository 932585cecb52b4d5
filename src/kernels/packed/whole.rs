//! Panels whose rows have one scale: sums stay integers over all columns.
//!
//! Activations share a scale a token. Groups of 4-bit codes keep their factors and zero points
//! apart: `sum over groups of factor * (sum of code * x - zero * sum of x)` is the same integer as the
//! product of the 8-bit weights `(code - zero) * factor`, and reads half the bytes. Each column adds at most
//! 128 * 127, the zero point of whole bytes included, so [`MOST_COLS`] columns fit into an i32.

#![allow(unsafe_op_in_unsafe_fn)]

use super::super::quantize::{Activations, BLOCK};
use super::super::simd::Simd;
use super::panels::{LANES, VECTOR, block_bytes};
use super::tile::{Codes, FEW, ask_ahead};

/// Columns whose products fit into an i32.
pub(super) const MOST_COLS: usize = i32::MAX as usize / (128 * 127);

/// What multiplies the codes of a panel.
pub(super) trait Groups: Copy {
    /// Blocks of a group.
    fn blocks(self) -> usize;
    /// What is subtracted from each code, where that is the same in the whole matrix.
    fn zero(self) -> i32;

    /// The sum of a group from the sum of its codes' products and that of its activations.
    ///
    /// # Safety
    /// `p` is the start of the panel's factors, the group exists, and the processor has the instructions
    /// of `S`.
    unsafe fn finish<S: Simd>(self, p: *const u8, group: usize, sum: S::I, x: i32) -> S::I;

    /// The bytes `weight + 128` of a vector of codes of a group.
    ///
    /// # Safety
    /// As of `finish`; `p` is the start of the group's factors.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    unsafe fn expand(self, p: *const u8, codes: &mut [u8; VECTOR]);
}

/// Bytes as they are, less 128.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    /// Blocks of a row.
    pub blocks: usize,
}

impl Groups for Bytes {
    fn blocks(self) -> usize {
        self.blocks
    }
    fn zero(self) -> i32 {
        128
    }
    #[inline(always)]
    unsafe fn finish<S: Simd>(self, _: *const u8, _: usize, sum: S::I, _: i32) -> S::I {
        sum
    }
    #[inline(always)]
    unsafe fn expand(self, _: *const u8, _: &mut [u8; VECTOR]) {}
}

/// 4-bit codes with a factor and a zero point a group.
#[derive(Clone, Copy)]
pub(super) struct Dual {
    pub blocks: usize,
}

impl Groups for Dual {
    fn blocks(self) -> usize {
        self.blocks
    }
    fn zero(self) -> i32 {
        0
    }
    #[inline(always)]
    unsafe fn finish<S: Simd>(self, p: *const u8, group: usize, sum: S::I, x: i32) -> S::I {
        let p = p.add(2 * LANES * group);
        let less = S::mul_i32(S::load_u8(p.add(LANES)), S::splat_i32(-x));
        S::mul_i32(S::load_u8(p), S::add_i32(sum, less))
    }
    #[inline(always)]
    unsafe fn expand(self, p: *const u8, codes: &mut [u8; VECTOR]) {
        for (i, code) in codes.iter_mut().enumerate() {
            let (factor, zero) = (*p.add(i / 4), *p.add(LANES + i / 4));
            *code = 128_u8.wrapping_add(code.wrapping_sub(zero).wrapping_mul(factor));
        }
    }
}

/// A panel: where its codes, its row scales and its factors start.
#[derive(Clone, Copy)]
pub(super) struct Panel<G: Groups> {
    pub codes: *const u8,
    pub scales: *const u8,
    pub groups: G,
}

impl<G: Groups> Panel<G> {
    /// Factors stand behind the scales.
    pub fn factors(&self) -> *const u8 {
        // Within the panel: scales of sixteen rows come first.
        self.scales.wrapping_add(4 * LANES)
    }

    /// Sums as f32, times the scales of the rows and of the tokens.
    ///
    /// # Safety
    /// The pointers are those of a panel, and the processor has the instructions of `S`.
    #[inline(always)]
    pub unsafe fn scaled<S: Simd>(&self, sum: S::I, token: f32) -> S::F {
        let scale = S::mul(S::load(self.scales.cast()), S::splat(token));
        S::mul(S::from_i32(sum), scale)
    }
}

/// `T` tokens from `first` on, times the panel.
///
/// # Safety
/// The pointers are those of a panel of `x.cols()` columns, tokens `first .. first + T` exist, and the
/// processor has the instructions of `S`.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, G: Groups, const BITS: u8, const T: usize>(
    panel: Panel<G>,
    x: &Activations,
    first: usize,
) -> [S::F; T] {
    let blocks = x.cols() / BLOCK;
    let codes = x.codes().as_ptr().add(first * x.cols());
    let offsets = x.sums().as_ptr().add(2 * first * blocks);
    let wide = BITS == 8;
    let zero = if wide { panel.groups.zero() - 128 + S::WIDE_ZERO } else { panel.groups.zero() };
    let each = panel.groups.blocks();

    let mut sums = [S::splat_i32(0); T];
    for group in 0..blocks / each {
        let mut inside = [S::splat_i32(0); T];
        for block in group * each..(group + 1) * each {
            let at = panel.codes.add(block * block_bytes(BITS));
            if T <= FEW {
                ask_ahead(at, block_bytes(BITS));
            }
            let w = Codes::<BITS>::unpack::<S>(at);
            for (t, sum) in inside.iter_mut().enumerate() {
                let q = codes.add((t * blocks + block) * BLOCK);
                for (v, w) in w.into_iter().enumerate() {
                    let q = q.add(4 * v);
                    *sum = if wide { S::dot_wide(*sum, w, q) } else { S::dot(*sum, w, q) };
                }
            }
        }
        for (t, (sum, inside)) in sums.iter_mut().zip(inside).enumerate() {
            let at = 2 * (t * blocks + group * each);
            let x = (at..at + 2 * each).fold(0, |sum, i| sum + *offsets.add(i));
            let inside = S::add_i32(inside, S::splat_i32(-zero * x));
            let inside = panel.groups.finish::<S>(panel.factors(), group, inside, x);
            *sum = S::add_i32(*sum, inside);
        }
    }
    let scales = x.scales().as_ptr().add(first * blocks);
    let mut out = [S::splat(0.0); T];
    for (t, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
        *out = panel.scaled::<S>(sum, *scales.add(t * blocks));
    }
    out
}
