//! Bitmap rows of bf16 values times few tokens: 32 columns of values are moved to their places by one instruction
//! and used as they are, even columns and odd ones apart, so that decoding costs less than reading them does.

#![cfg(target_arch = "x86_64")]
// Every unsafe function here asks that the processor has the instructions it is compiled for.
#![allow(unsafe_op_in_unsafe_fn)]

use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::simd::Level;
use super::threads::{self, Shared, with_scratch};

/// Columns that are moved at once.
const BLOCK: usize = 32;

/// Elements that are worth a thread of their own.
const GRAIN: usize = 1 << 17;

/// Whether this processor has the instructions.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE
        .get_or_init(|| Level::best() >= Level::Avx512 && is_x86_feature_detected!("avx512vbmi2"))
}

/// Rows as `super::sparse` has them; see there for what may be relied upon.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// `cols.div_ceil(8)` bytes a row.
    pub(super) bitmap: &'a [u8],
    /// bf16.
    pub(super) values: &'a [u8],
    /// At which value each row starts.
    pub(super) starts: &'a [usize],
}

/// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten. Panics if sizes do not fit or there are no such instructions.
pub(super) fn multiply(w: Rows<'_>, x: &[f32], y: &mut [f32]) {
    let tokens = x.len() / w.cols;
    assert!(available() && x.len() == tokens * w.cols && y.len() == tokens * w.rows);
    assert!(w.starts.len() >= w.rows && w.bitmap.len() == w.rows * w.cols.div_ceil(8));
    let width = w.cols.next_multiple_of(BLOCK);
    let y = Shared::new(y);
    with_scratch(tokens * width, |split| {
        for (x, split) in x.chunks_exact(w.cols).zip(split.chunks_exact_mut(width)) {
            split_columns(x, split);
        }
        let split = &*split;
        threads::for_ranges(w.rows, GRAIN / (w.cols * tokens.max(1)) + 1, |range| {
            // SAFETY: the instructions are there; ranges are disjoint.
            unsafe { rows(w, range, split, y) };
        });
    });
}

/// The even columns of each block, then its odd ones; zeros behind the last.
fn split_columns(x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks(BLOCK).zip(out.chunks_exact_mut(BLOCK)) {
        if x.len() < BLOCK {
            out.fill(0.0);
        }
        for (i, v) in x.iter().enumerate() {
            out[i % 2 * (BLOCK / 2) + i / 2] = *v;
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,popcnt,bmi1")]
unsafe fn rows(w: Rows<'_>, range: Range<usize>, split: &[f32], y: Shared<'_>) {
    let width = w.cols.next_multiple_of(BLOCK);
    let tokens = split.len() / width;
    for row in range {
        let mut token = 0;
        while token < tokens {
            let x = split.as_ptr().add(token * width);
            let out = token * w.rows + row;
            token += match tokens - token {
                4.. => one_row::<4>(w, row, x, y, out),
                2.. => one_row::<2>(w, row, x, y, out),
                _ => one_row::<1>(w, row, x, y, out),
            };
        }
    }
}

/// A row times `T` tokens. Answers `T`.
#[inline(always)]
unsafe fn one_row<const T: usize>(
    w: Rows<'_>,
    row: usize,
    x: *const f32,
    y: Shared<'_>,
    out: usize,
) -> usize {
    let bytes = w.cols.div_ceil(8);
    let width = w.cols.next_multiple_of(BLOCK);
    let whole = w.cols / BLOCK;
    let bitmap = w.bitmap.as_ptr().add(row * bytes);
    let mut next = w.starts[row].min(w.values.len() / 2);
    // Sums of even and odd columns of even and odd blocks.
    let mut acc = [[[_mm512_setzero_ps(); 2]; T]; 2];
    let mut block = 0;
    while block + 2 <= whole {
        let word = bitmap.add(4 * block).cast::<u64>().read_unaligned();
        let (low, high) = (word as u32, (word >> 32) as u32);
        let middle = next + low.count_ones() as usize;
        let x = x.add(BLOCK * block);
        step(&mut acc[0], low, w.values, next, x, width);
        step(&mut acc[1], high, w.values, middle, x.add(BLOCK), width);
        next = middle + high.count_ones() as usize;
        block += 2;
    }
    while BLOCK * block < w.cols {
        // Up to four bytes: the rest of a row.
        let count = 4.min(bytes - 4 * block);
        let word =
            (0..count).fold(0, |word, i| word | u32::from(*bitmap.add(4 * block + i)) << (8 * i));
        step(&mut acc[0], word, w.values, next, x.add(BLOCK * block), width);
        next += word.count_ones() as usize;
        block += 1;
    }
    let [even, odd] = acc;
    for (t, (even, odd)) in even.into_iter().zip(odd).enumerate() {
        let sums = (_mm512_add_ps(even[0], even[1]), _mm512_add_ps(odd[0], odd[1]));
        y.set(out + t * w.rows, _mm512_reduce_add_ps(_mm512_add_ps(sums.0, sums.1)));
    }
    T
}

/// Adds a block to the sums of even and of odd columns; tokens are `width` elements apart.
#[inline(always)]
unsafe fn step<const T: usize>(
    acc: &mut [[__m512; 2]; T],
    mask: u32,
    values: &[u8],
    next: usize,
    x: *const f32,
    width: usize,
) {
    let v = if 2 * next + 64 <= values.len() {
        _mm512_loadu_si512(values.as_ptr().add(2 * next).cast())
    } else {
        near_end(values, next)
    };
    let v = _mm512_maskz_expand_epi16(mask, v);
    let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v));
    let odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
    for (t, acc) in acc.iter_mut().enumerate() {
        let x = x.add(t * width);
        acc[0] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), acc[0]);
        acc[1] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x.add(BLOCK / 2)), acc[1]);
    }
}

/// The values that are left, zeros behind them.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f")]
unsafe fn near_end(values: &[u8], next: usize) -> __m512i {
    let mut copy = [0_u8; 64];
    let rest = values.get(2 * next..).unwrap_or_default();
    copy[..rest.len()].copy_from_slice(rest);
    _mm512_loadu_si512(copy.as_ptr().cast())
}
