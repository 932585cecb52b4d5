//! Signed 8-bit values times activations rounded to 8 bits. All paths compute the same bits: their sums are
//! integers, and each result is made from its sum in one way.
//!
//! The dot product instruction multiplies unsigned bytes with signed ones. So an activation `q` is given as
//! `q + 128`, and 128 times the sum of a row's values is taken off again.

#[cfg(target_arch = "x86_64")]
mod many;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;
use std::sync::OnceLock;

use super::{Bits, Pattern, QUAD};
use crate::kernels::multiversion::multiversion;
use crate::kernels::simd::Level;
use crate::kernels::threads::{self, Shared, with_scratch};

/// Kernels of the architecture, from least to most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Path {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with dot products and byte permutations.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON with dot products.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Path {
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Path> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    #[cfg(test)]
    pub(super) fn available() -> impl Iterator<Item = Self> {
        [
            Self::Plain,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Vnni,
            #[cfg(target_arch = "aarch64")]
            Self::Neon,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot,
        ]
        .into_iter()
        .filter(|path| *path <= Self::best())
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Path {
    let vnni = is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vbmi2");
    match Level::best() {
        Level::Vnni if vnni => Path::Vnni,
        Level::Vnni | Level::Avx512 | Level::Avx2 => Path::Avx2,
        Level::Arrays => Path::Plain,
    }
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Path {
    match Level::best() {
        Level::NeonDot => Path::NeonDot,
        Level::Neon => Path::Neon,
        Level::Arrays => Path::Plain,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Path {
    Path::Plain
}

/// Groups whose activations are packed before the first of them is multiplied: what was just written in other
/// pieces cannot be read at once.
const AHEAD: usize = 4;

/// Bytes that packed activations may be written past their end.
const SLACK: usize = 64;

/// A weight of 8-bit values.
#[derive(Clone, Copy)]
struct Weight<'a> {
    pattern: &'a Pattern,
    values: &'a [u8],
    scales: &'a [f32],
    sums: &'a [i32],
}

pub(super) fn multiply(
    path: Path,
    pattern: &Pattern,
    values: &[u8],
    scales: &[f32],
    sums: &[i32],
    x: &[f32],
    y: &mut [f32],
) {
    assert!(path <= Path::best(), "instructions that this processor lacks");
    let w = Weight { pattern, values, scales, sums };
    let cols = pattern.cols;
    let tokens = x.len() / cols;
    // A scale a token, then a row of bytes a token, padded to whole words of the bitmaps.
    let width = pattern.words * 64;
    with_scratch(tokens + tokens * width / 4, |scratch| {
        let (steps, rounded) = scratch.split_at_mut(tokens);
        let shared = (Shared::new(steps), Shared::new(rounded));
        threads::for_ranges(tokens, (1 << 16) / cols + 1, |range| {
            for token in range {
                // SAFETY: tokens are disjoint.
                let (step, out) = unsafe {
                    let row = token * width / 4..(token + 1) * width / 4;
                    (shared.0.slice(token..token + 1), as_bytes(shared.1.slice(row)))
                };
                step[0] = round(&x[token * cols..(token + 1) * cols], out);
                out[cols..].fill(0);
            }
        });
        let (steps, rounded, y) = (&*steps, &*as_bytes(rounded), Shared::new(y));
        #[cfg(target_arch = "x86_64")]
        if tokens > many::FEW && path == Path::Vnni {
            return many::multiply(w, rounded, steps, y);
        }
        threads::for_ranges(pattern.groups(), pattern.grain(tokens), |range| {
            with_scratch(AHEAD * (width + SLACK) / 4, |packed| {
                let few = Few { w, range, rounded, steps, y, packed: as_bytes(packed) };
                // SAFETY: the path was compared with what the processor has; ranges are disjoint.
                unsafe {
                    match path {
                        #[cfg(target_arch = "x86_64")]
                        Path::Vnni => few.vnni(),
                        #[cfg(target_arch = "x86_64")]
                        Path::Avx2 => few.avx2(),
                        #[cfg(target_arch = "aarch64")]
                        Path::NeonDot => few.neon::<true>(),
                        #[cfg(target_arch = "aarch64")]
                        Path::Neon => few.neon::<false>(),
                        Path::Plain => few.plain(),
                    }
                }
            });
        });
    });
}

multiversion! {
    /// Rounds activations to `127 / max |x|` steps, halves to even, offset by 128; answers the size of a step.
    fn round(x: &[f32], out: &mut [u8]) -> f32 {
        let mut most = [0.0_f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for chunk in chunks {
            for (most, v) in most.iter_mut().zip(chunk) {
                *most = most.max(v.abs());
            }
        }
        let most = most.iter().chain(rest).fold(0.0_f32, |m, v| m.max(v.abs()));
        let by = if most > 0.0 { 127.0 / most } else { 0.0 };
        for (v, out) in x.iter().zip(&mut *out) {
            let q = (v * by).round_ties_even().clamp(-127.0, 127.0);
            *out = (q as i32 + 128) as u8;
        }
        most / 127.0
    }
}

fn as_bytes(floats: &mut [f32]) -> &mut [u8] {
    // SAFETY: bytes have no alignment, and every pattern is a valid f32 and a valid byte.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats)) }
}

/// The result for a sum over activations without offset.
#[inline(always)]
fn finish(sum: i32, scale: f32, step: f32) -> f32 {
    sum as f32 * (scale * step)
}

/// Groups `range` times each token, rows as lanes.
struct Few<'a> {
    w: Weight<'a>,
    range: Range<usize>,
    rounded: &'a [u8],
    steps: &'a [f32],
    y: Shared<'a>,
    packed: &'a mut [u8],
}

impl Few<'_> {
    /// Calls `pack`, then `sums` with values, rows and packed activations of each group and token; it writes the
    /// sums of the rows, over activations less 128 - `offset`.
    ///
    /// # Safety
    /// No other thread writes the results of these groups.
    #[inline(always)]
    unsafe fn each(
        self,
        offset: i32,
        pack: impl Fn(&[u64], &[u8], &mut [u8]),
        sums: impl Fn(&[u8], usize, &[u8], &mut [i32; 32]),
    ) {
        let p = self.w.pattern;
        let width = p.words * 64;
        let tokens = self.rounded.chunks_exact(width).zip(self.steps).enumerate();
        for (token, (x, step)) in tokens {
            for first in self.range.clone().step_by(AHEAD) {
                let block = first..self.range.end.min(first + AHEAD);
                for (g, out) in block.clone().zip(self.packed.chunks_exact_mut(width + SLACK)) {
                    pack(p.mask(g), x, out);
                }
                for (g, packed) in block.zip(self.packed.chunks_exact(width + SLACK)) {
                    // SAFETY: the caller's promise.
                    unsafe { self.group(g, token, offset, *step, packed, &sums) };
                }
            }
        }
    }

    /// One group times one token.
    ///
    /// # Safety
    /// No other thread writes the results.
    #[inline(always)]
    unsafe fn group(
        &self,
        g: usize,
        token: usize,
        offset: i32,
        step: f32,
        packed: &[u8],
        sums: impl Fn(&[u8], usize, &[u8], &mut [i32; 32]),
    ) {
        let p = self.w.pattern;
        let (kept, lanes) = (p.kept(g), p.lanes(g));
        let values = &self.w.values[p.starts[g] * p.group..][..kept * lanes];
        let mut out = [0; 32];
        sums(values, lanes, &packed[..kept], &mut out);
        let row = g * p.group;
        let (of_values, scales) = (&self.w.sums[row..][..lanes], &self.w.scales[row..][..lanes]);
        let at = token * p.rows + row;
        // SAFETY: the caller's promise.
        let y = unsafe { self.y.slice(at..at + lanes) };
        // Eight at a time are vectors.
        let (y, y_rest) = y.as_chunks_mut::<8>();
        let (sums, _) = out.as_chunks::<8>();
        let (of_values, of_rest) = of_values.as_chunks::<8>();
        let (scales, scales_rest) = scales.as_chunks::<8>();
        for (((y, sums), of_values), scales) in y.iter_mut().zip(sums).zip(of_values).zip(scales) {
            for i in 0..8 {
                let sum = sums[i].wrapping_sub(of_values[i].wrapping_mul(offset));
                y[i] = finish(sum, scales[i], step);
            }
        }
        let sums = &out[lanes / 8 * 8..];
        let rest = y_rest.iter_mut().zip(sums).zip(of_rest).zip(scales_rest);
        for (((y, sum), of_values), scale) in rest {
            *y = finish(sum.wrapping_sub(of_values.wrapping_mul(offset)), *scale, step);
        }
    }

    unsafe fn plain(self) {
        // SAFETY: the caller's promise.
        unsafe { self.each(0, pack_plain, sums_plain::<128>) };
    }
}

fn pack_plain(mask: &[u64], x: &[u8], out: &mut [u8]) {
    let mut next = 0;
    for (i, &word) in mask.iter().enumerate() {
        for bit in Bits(word) {
            out[next] = x[64 * i + bit];
            next += 1;
        }
    }
}

/// Sums over packed activations less `LESS`.
fn sums_plain<const LESS: i32>(values: &[u8], lanes: usize, packed: &[u8], out: &mut [i32; 32]) {
    out.fill(0);
    add_plain::<LESS>(values, lanes, packed, out);
}

fn add_plain<const LESS: i32>(values: &[u8], lanes: usize, packed: &[u8], out: &mut [i32; 32]) {
    let mut values = values;
    for quad in packed.chunks(QUAD) {
        let (block, rest) = values.split_at(quad.len() * lanes);
        for (row, sum) in block.chunks_exact(quad.len()).zip(&mut *out) {
            for (v, x) in row.iter().zip(quad) {
                *sum = sum.wrapping_add(i32::from(*v as i8) * (i32::from(*x) - LESS));
            }
        }
        values = rest;
    }
}
