//! The inner loop: a panel times a few tokens.
//!
//! With one token it is bound by the bandwidth of memory: it does some 30 vector instructions for the
//! 5 to 9 lines of a block. With 8 and more it is bound by arithmetic: for 8 products of bytes there are
//! 3 to 4 other instructions on the same ports, which leaves about two thirds of the peak.

#![allow(unsafe_op_in_unsafe_fn)]

use super::super::few::prefetch;
use super::super::quantize::{Activations, BLOCK};
use super::super::simd::Simd;
use super::panels::{VECTOR, block_bytes};
use super::scales::Scales;

/// Codes of `BITS` bits.
#[derive(Clone, Copy)]
pub(super) struct Codes<const BITS: u8>;

impl<const BITS: u8> Codes<BITS> {
    /// The codes of a block, four columns a vector.
    ///
    /// # Safety
    /// `p` is the start of a block, and the processor has the instructions of `S`.
    #[inline(always)]
    pub(super) unsafe fn unpack<S: Simd>(p: *const u8) -> [S::C; 8] {
        let line = |i: usize| S::codes(p.add(VECTOR * i));
        match BITS {
            2 | 3 => {
                let lines = [line(0), line(1)];
                let low = |v: usize| S::field(lines[v / 4], 2 * (v as u32 % 4), 3);
                let behind = p.add(2 * VECTOR);
                let all = |v: usize| match BITS {
                    2 => low(v),
                    _ => S::or_bits(low(v), behind.add(8 * v), 4),
                };
                [all(0), all(1), all(2), all(3), all(4), all(5), all(6), all(7)]
            }
            4..=6 => {
                let lines = [line(0), line(1), line(2), line(3)];
                let low = |v: usize| S::field(lines[v / 2], 4 * (v as u32 % 2), 15);
                let behind = p.add(4 * VECTOR);
                let all = |v: usize| match BITS {
                    4 => low(v),
                    5 => S::or_bits(low(v), behind.add(8 * v), 16),
                    _ => {
                        let rest = S::codes(behind.add(VECTOR * (v / 4)));
                        S::or_shifted(low(v), S::field(rest, 2 * (v as u32 % 4), 3), 4)
                    }
                };
                [all(0), all(1), all(2), all(3), all(4), all(5), all(6), all(7)]
            }
            _ => [line(0), line(1), line(2), line(3), line(4), line(5), line(6), line(7)],
        }
    }
}

/// The codes of a panel, block after block.
pub(super) trait Stream: Copy {
    /// Whether codes may be above 127.
    const WIDE: bool;

    /// From the start of a panel on.
    fn new(codes: *const u8) -> Self;

    /// The codes of the next block, four columns a vector; `absent` for those that are not stored. Asks for what
    /// follows if `ahead`.
    ///
    /// # Safety
    /// The panel has another block, and the processor has the instructions of `S`.
    unsafe fn next<S: Simd>(&mut self, absent: S::C, ahead: bool) -> [S::C; 8];
}

/// All codes are stored.
#[derive(Clone, Copy)]
pub(super) struct All<const BITS: u8>(*const u8);

impl<const BITS: u8> Stream for All<BITS> {
    const WIDE: bool = BITS == 8;

    #[inline(always)]
    fn new(codes: *const u8) -> Self {
        Self(codes)
    }
    #[inline(always)]
    unsafe fn next<S: Simd>(&mut self, _: S::C, ahead: bool) -> [S::C; 8] {
        let at = self.0;
        if ahead {
            ask_ahead(at, block_bytes(BITS));
        }
        self.0 = at.add(block_bytes(BITS));
        Codes::<BITS>::unpack::<S>(at)
    }
}

/// Up to so many tokens a panel is read too fast for the processor to fetch ahead by itself.
pub(super) const FEW: usize = 16;

/// Asks for the lines that follow those of a block.
#[inline(always)]
pub(super) fn ask_ahead(block: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(VECTOR) {
        prefetch(block.wrapping_add(line));
    }
}

/// A panel: where its codes and scales start, and what is subtracted from each code.
#[derive(Clone, Copy)]
pub(super) struct Panel<G: Scales> {
    pub codes: *const u8,
    pub scales: *const u8,
    pub reader: G,
    pub zero: u8,
}

/// The same for each token of a tile, without a loop, so that sums stay in registers.
macro_rules! each_token {
    ($t:ident => $body:block) => {
        each_token!($t => $body; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    ($t:ident => $body:block; $($n:literal)+) => {
        $({
            const $t: usize = $n;
            $body
        })+
    };
}
pub(super) use each_token;

/// `T` tokens from `first` on, times the panel: sixteen sums a token.
///
/// # Safety
/// The pointers are those of a panel of `x.cols()` columns, tokens `first .. first + T` exist, and the
/// processor has the instructions of `S`.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, C: Stream, G: Scales, const T: usize>(
    panel: Panel<G>,
    x: &Activations,
    first: usize,
) -> [S::F; T] {
    let blocks = x.cols() / BLOCK;
    let codes = x.codes().as_ptr().add(first * x.cols());
    let scales = x.scales().as_ptr().add(first * blocks);
    let weighted = x.weighted().as_ptr().add(first * blocks);
    let offsets = x.sums().as_ptr().add(2 * first * blocks);
    let zero = i32::from(panel.zero) + if C::WIDE { S::WIDE_ZERO - 128 } else { 0 };
    let dot = |sum, w, x| if C::WIDE { S::dot_wide(sum, w, x) } else { S::dot(sum, w, x) };

    let mut sums = [S::splat(0.0); T];
    let reader = panel.reader;
    let mut block = 0;
    let mut unit_at = panel.scales;
    let mut stream = C::new(panel.codes);
    while block < blocks {
        let unit = reader.unit::<S>(unit_at);
        let absent = reader.absent::<S>(unit_at, panel.zero);
        for inside in 0..reader.blocks() {
            if T <= FEW {
                prefetch(unit_at);
            }
            let w = stream.next::<S>(absent, T <= FEW);
            let (scale, min) = reader.block::<S>(unit, unit_at, inside);
            each_token!(I => {
                if I < T {
                    let at = I * blocks + block;
                    let q = codes.add(at * BLOCK);
                    let d = S::splat(*scales.add(at));
                    let offset = offsets.add(2 * at);
                    let mut total = sums[I];
                    if G::HALVES {
                        let mut low = S::splat_i32(-zero * *offset);
                        let mut high = S::splat_i32(-zero * *offset.add(1));
                        for (v, w) in w.into_iter().enumerate() {
                            match v {
                                0..4 => low = dot(low, w, q.add(4 * v)),
                                _ => high = dot(high, w, q.add(4 * v)),
                            }
                        }
                        total = S::fused(S::from_i32(low), S::mul(scale[0], d), total);
                        total = S::fused(S::from_i32(high), S::mul(scale[1], d), total);
                    } else {
                        let start = if zero == 0 { 0 } else { -zero * (*offset + *offset.add(1)) };
                        let mut sum = S::splat_i32(start);
                        for (v, w) in w.into_iter().enumerate() {
                            sum = dot(sum, w, q.add(4 * v));
                        }
                        total = S::fused(S::from_i32(sum), S::mul(scale[0], d), total);
                    }
                    if G::MIN {
                        total = S::fused(min, S::splat(*weighted.add(at)), total);
                    }
                    sums[I] = total;
                }
            });
            block += 1;
        }
        unit_at = unit_at.add(reader.bytes());
    }
    sums
}
