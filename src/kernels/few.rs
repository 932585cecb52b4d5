//! Dense rows times few tokens, bound by reading the rows: several rows and tokens at a time, with what comes next
//! asked for early.

// The one precondition of every unsafe function here: the processor has the instructions of `S`.
#![allow(unsafe_op_in_unsafe_fn)]

use std::ops::Range;

use half::{bf16, f16};

use super::dot::{DenseKind, DenseRows};
use super::simd::{self, Level, Simd, Task};
use super::threads::{self, Shared};

/// Rows at a time.
const ROWS: usize = 4;

/// Tokens at a time: with four rows 16 sums, which fit into registers.
const TOKENS: usize = 4;

/// Bytes ahead of what is read that memory is asked for.
const AHEAD: usize = 2048;

/// Elements that are worth a thread of their own: a microsecond or two, as parts must be small to end together.
const GRAIN: usize = 1 << 15;

/// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten. Panics if sizes do not fit.
pub fn multiply(w: &DenseRows<'_>, x: &[f32], y: &mut [f32]) {
    multiply_at(Level::best(), w, x, y);
}

fn multiply_at(level: Level, w: &DenseRows<'_>, x: &[f32], y: &mut [f32]) {
    let (data, [rows, cols], kind) = w.parts();
    let tokens = x.len() / cols;
    assert!(x.len() == tokens * cols && y.len() == tokens * rows, "sizes of a product do not fit");
    let y = Shared::new(y);
    let grain = GRAIN / (cols * tokens.max(1)) + 1;
    threads::for_ranges(rows.div_ceil(ROWS), grain.div_ceil(ROWS), |range| {
        let range = range.start * ROWS..rows.min(range.end * ROWS);
        simd::run(level, Few { data, rows, cols, kind, range, x, y });
    });
}

struct Few<'a> {
    data: &'a [u8],
    rows: usize,
    cols: usize,
    kind: DenseKind,
    range: Range<usize>,
    x: &'a [f32],
    y: Shared<'a>,
}

impl Task for Few<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.kind {
            DenseKind::F32 => self.all::<S, F32>(),
            DenseKind::F16 => self.all::<S, F16>(),
            DenseKind::BF16 => self.all::<S, BF16>(),
        }
    }
}

/// How an element is stored.
trait Element {
    const SIZE: usize;
    unsafe fn sixteen<S: Simd>(p: *const u8) -> S::F;
    unsafe fn one(p: *const u8) -> f32;
}

struct F32;
struct F16;
struct BF16;

impl Element for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(p: *const u8) -> S::F {
        S::load(p.cast())
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        p.cast::<f32>().read_unaligned()
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(p: *const u8) -> S::F {
        S::load_f16(p)
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        f16::from_bits(p.cast::<u16>().read_unaligned()).to_f32_const()
    }
}

impl Element for BF16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(p: *const u8) -> S::F {
        S::load_bf16(p)
    }
    #[inline(always)]
    unsafe fn one(p: *const u8) -> f32 {
        bf16::from_bits(p.cast::<u16>().read_unaligned()).to_f32_const()
    }
}

impl Few<'_> {
    #[inline(always)]
    unsafe fn all<S: Simd, E: Element>(&self) {
        let tokens = self.x.len() / self.cols;
        let mut row = self.range.start;
        while row < self.range.end {
            let rows = self.range.end - row;
            let mut token = 0;
            while token < tokens {
                token += match (rows, tokens - token) {
                    (ROWS.., TOKENS..) => self.tile::<S, E, ROWS, TOKENS>(row, token),
                    (ROWS.., 2..) => self.tile::<S, E, ROWS, 2>(row, token),
                    (ROWS.., _) => self.tile::<S, E, ROWS, 1>(row, token),
                    (_, TOKENS..) => self.tile::<S, E, 1, TOKENS>(row, token),
                    _ => self.tile::<S, E, 1, 1>(row, token),
                };
            }
            row += if rows >= ROWS { ROWS } else { 1 };
        }
    }

    /// `R` rows from `row` on times `T` tokens from `token` on. Answers `T`.
    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const R: usize, const T: usize>(
        &self,
        row: usize,
        token: usize,
    ) -> usize {
        let (w, x) = (self.data.as_ptr(), self.x.as_ptr());
        let w: [*const u8; R] = std::array::from_fn(|r| w.add((row + r) * self.cols * E::SIZE));
        let x: [*const f32; T] = std::array::from_fn(|t| x.add((token + t) * self.cols));
        let mut acc = [[S::splat(0.0); T]; R];
        let whole = self.cols / 32 * 32;
        for at in (0..whole).step_by(32) {
            for (w, acc) in w.iter().zip(&mut acc) {
                prefetch(w.wrapping_add(at * E::SIZE));
                let a = E::sixteen::<S>(w.add(at * E::SIZE));
                let b = E::sixteen::<S>(w.add((at + 16) * E::SIZE));
                for (x, acc) in x.iter().zip(acc) {
                    let sum = S::mul_add(a, S::load(x.add(at)), *acc);
                    *acc = S::mul_add(b, S::load(x.add(at + 16)), sum);
                }
            }
        }
        for (r, (w, acc)) in w.iter().zip(acc).enumerate() {
            for (t, (x, acc)) in x.iter().zip(acc).enumerate() {
                let mut sum = S::sum(acc);
                for at in whole..self.cols {
                    sum += E::one(w.add(at * E::SIZE)) * *x.add(at);
                }
                self.y.set((token + t) * self.rows + row + r, sum);
            }
        }
        T
    }
}

/// Asks for the line [`AHEAD`] bytes behind an address; neither need exist. The processor itself looks ahead only
/// to the end of a page.
#[inline(always)]
pub(super) fn prefetch(p: *const u8) {
    let p = p.wrapping_add(AHEAD);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint, which never faults. There is no stable intrinsic yet.
    unsafe {
        std::arch::asm!(
            "prfm pldl1keep, [{p}]",
            p = in(reg) p.addr(),
            options(nomem, nostack, preserves_flags),
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_every_size_and_level() {
        for [rows, cols] in [[1, 1], [3, 31], [4, 32], [7, 33], [9, 96], [70, 200]] {
            let value = |i: usize| ((i * 37) % 101) as f32 / 64.0 - 0.75;
            for (kind, data) in [
                (DenseKind::F32, (0..rows * cols).flat_map(|i| value(i).to_le_bytes()).collect()),
                (
                    DenseKind::F16,
                    (0..rows * cols)
                        .flat_map(|i| f16::from_f32(value(i)).to_le_bytes())
                        .collect::<Vec<_>>(),
                ),
                (
                    DenseKind::BF16,
                    (0..rows * cols).flat_map(|i| bf16::from_f32(value(i)).to_le_bytes()).collect(),
                ),
            ] {
                let w = DenseRows::new(&data, rows, cols, kind);
                for tokens in 1..=9 {
                    let x: Vec<f32> =
                        (0..tokens * cols).map(|i| ((i * 7) % 19) as f32 / 8.0 - 1.0).collect();
                    for level in Level::available() {
                        let mut y = vec![f32::NAN; tokens * rows];
                        multiply_at(level, &w, &x, &mut y);
                        for (i, y) in y.iter().enumerate() {
                            // All values are multiples of 1/64 that each type holds, so sums are exact.
                            let (t, r) = (i / rows, i % rows);
                            let sum: f32 =
                                (0..cols).map(|c| value(r * cols + c) * x[t * cols + c]).sum();
                            assert_eq!(*y, sum, "{kind:?} {level:?} [{rows}, {cols}] {tokens}");
                        }
                    }
                }
            }
        }
    }
}
