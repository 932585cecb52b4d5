//! Bitmap rows times few tokens: 32 columns of values are moved to their places by one instruction or two, and
//! bf16 is used as it is then, even columns and odd ones apart, so that decoding costs less than reading does.

#![cfg(target_arch = "x86_64")]
// Every unsafe function here asks that the processor has the instructions it is compiled for.
#![allow(unsafe_op_in_unsafe_fn)]

use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::dot::DenseKind;
use super::few::prefetch;
use super::simd::Level;
use super::threads::{self, Shared, with_scratch};

/// Columns that are moved at once.
const BLOCK: usize = 32;

/// Elements that are worth a thread of their own: a microsecond or two, as parts must be small to end together.
const GRAIN: usize = 1 << 15;

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
    pub(super) values: &'a [u8],
    pub(super) kind: DenseKind,
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
            match w.kind {
                DenseKind::BF16 => split_columns(x, split),
                DenseKind::F32 | DenseKind::F16 => {
                    split[..w.cols].copy_from_slice(x);
                    split[w.cols..].fill(0.0);
                }
            }
        }
        let split = &*split;
        threads::for_ranges(w.rows, GRAIN / (w.cols * tokens.max(1)) + 1, |range| {
            // SAFETY: the instructions are there; ranges are disjoint.
            unsafe {
                match w.kind {
                    DenseKind::F32 => rows::<F32>(w, range, split, y),
                    DenseKind::F16 => rows::<F16>(w, range, split, y),
                    DenseKind::BF16 => rows::<BF16>(w, range, split, y),
                }
            };
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
unsafe fn rows<V: Value>(w: Rows<'_>, range: Range<usize>, split: &[f32], y: Shared<'_>) {
    let width = w.cols.next_multiple_of(BLOCK);
    let tokens = split.len() / width;
    for row in range {
        let mut token = 0;
        while token < tokens {
            let x = split.as_ptr().add(token * width);
            let out = token * w.rows + row;
            token += match tokens - token {
                8.. => one_row::<V, 8>(w, row, x, y, out),
                4.. => one_row::<V, 4>(w, row, x, y, out),
                2.. => one_row::<V, 2>(w, row, x, y, out),
                _ => one_row::<V, 1>(w, row, x, y, out),
            };
        }
    }
}

/// A row times `T` tokens. Answers `T`.
#[inline(always)]
unsafe fn one_row<V: Value, const T: usize>(
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
    prefetch(bitmap);
    let mut next = w.starts[row].min(w.values.len() / V::SIZE);
    // Two sums of even and of odd blocks, or with many tokens of all blocks: there are 32 registers.
    let second = usize::from(T < 8);
    let mut acc = [[[_mm512_setzero_ps(); 2]; T]; 2];
    let mut block = 0;
    while block + 2 <= whole {
        let word = bitmap.add(4 * block).cast::<u64>().read_unaligned();
        let (low, high) = (word as u32, (word >> 32) as u32);
        let middle = next + low.count_ones() as usize;
        let x = x.add(BLOCK * block);
        step::<V, T>(&mut acc[0], low, w.values, next, x, width);
        step::<V, T>(&mut acc[second], high, w.values, middle, x.add(BLOCK), width);
        next = middle + high.count_ones() as usize;
        block += 2;
    }
    while BLOCK * block < w.cols {
        // Up to four bytes: the rest of a row.
        let count = 4.min(bytes - 4 * block);
        let word =
            (0..count).fold(0, |word, i| word | u32::from(*bitmap.add(4 * block + i)) << (8 * i));
        step::<V, T>(&mut acc[0], word, w.values, next, x.add(BLOCK * block), width);
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

/// Adds a block to the sums of its two halves; tokens are `width` elements apart.
#[inline(always)]
unsafe fn step<V: Value, const T: usize>(
    acc: &mut [[__m512; 2]; T],
    mask: u32,
    values: &[u8],
    next: usize,
    x: *const f32,
    width: usize,
) {
    let [a, b] = V::block(values, next, mask);
    for (t, acc) in acc.iter_mut().enumerate() {
        let x = x.add(t * width);
        acc[0] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x), acc[0]);
        acc[1] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x.add(BLOCK / 2)), acc[1]);
    }
}

/// How a value is stored.
trait Value {
    const SIZE: usize;
    /// The 32 columns of a block, of which those in the mask have values, from value `next` on: first half and
    /// second half, or even and odd ones, as activations are ordered.
    unsafe fn block(values: &[u8], next: usize, mask: u32) -> [__m512; 2];
}

struct F32;
struct F16;
struct BF16;

impl Value for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn block(values: &[u8], next: usize, mask: u32) -> [__m512; 2] {
        let (low, high) = (mask as u16, (mask >> 16) as u16);
        let second = next + low.count_ones() as usize;
        let a = _mm512_castsi512_ps(load(values, 4 * next));
        let b = _mm512_castsi512_ps(load(values, 4 * second));
        [_mm512_maskz_expand_ps(low, a), _mm512_maskz_expand_ps(high, b)]
    }
}

impl Value for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn block(values: &[u8], next: usize, mask: u32) -> [__m512; 2] {
        let v = _mm512_maskz_expand_epi16(mask, load(values, 2 * next));
        let high = _mm512_extracti64x4_epi64::<1>(v);
        [_mm512_cvtph_ps(_mm512_castsi512_si256(v)), _mm512_cvtph_ps(high)]
    }
}

impl Value for BF16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn block(values: &[u8], next: usize, mask: u32) -> [__m512; 2] {
        let v = _mm512_maskz_expand_epi16(mask, load(values, 2 * next));
        let high = _mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)), _mm512_castsi512_ps(high)]
    }
}

/// 64 bytes from byte `from` on; zeros for those that are not there.
#[inline(always)]
unsafe fn load(values: &[u8], from: usize) -> __m512i {
    prefetch(values.as_ptr().wrapping_add(from));
    if from + 64 <= values.len() {
        _mm512_loadu_si512(values.as_ptr().add(from).cast())
    } else {
        near_end(values, from)
    }
}

#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f")]
unsafe fn near_end(values: &[u8], from: usize) -> __m512i {
    let mut copy = [0_u8; 64];
    let rest = values.get(from..).unwrap_or_default();
    copy[..rest.len()].copy_from_slice(rest);
    _mm512_loadu_si512(copy.as_ptr().cast())
}
