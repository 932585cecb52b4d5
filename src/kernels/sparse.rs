//! Decoding of rows whose non-zero elements are stored in order, with a bitmap or places beside them.

#![allow(unsafe_op_in_unsafe_fn)]

use half::{bf16, f16};

use super::dot::{DenseKind, Rows, Sink};
use super::grouped::Grid;
use super::simd::Simd;

/// Where the stored elements of a row stand.
#[derive(Clone, Copy)]
pub enum Places<'a> {
    /// One bit a column, a row padded to a byte with zero bits.
    Bitmap(&'a [u8]),
    /// For each `of` columns the rising places of `keep` elements, `log2(of)` bits each rounded up; a
    /// little-endian bit stream a row, padded to a byte.
    NOfM { places: &'a [u8], keep: u32, of: u32 },
}

/// The largest group of n:m places: what fits into a word while another is being filled.
pub const MAX_OF: u32 = 32;

/// Bits of a place among `of`.
pub fn place_bits(of: u32) -> u32 {
    u32::BITS - (of - 1).leading_zeros()
}

/// The stored elements, row after row.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    Dense(&'a [u8], DenseKind),
    /// A little-endian bit stream a row, padded to a byte.
    Codes(&'a [u8], Grid<'a>),
}

/// Rows of stored elements.
#[derive(Clone, Copy)]
pub struct SparseRows<'a> {
    rows: usize,
    cols: usize,
    places: Places<'a>,
    values: Values<'a>,
    starts: &'a [usize],
}

impl<'a> SparseRows<'a> {
    /// `starts` says at which element (at which byte, for codes) of the values each row starts, and where
    /// the last one ends.
    ///
    /// # Safety
    /// Places have the size their kind asks for; each row has at least as many values between its starts
    /// as its places name, and the last start lies within the values. Places are below `of`.
    pub unsafe fn new(
        [rows, cols]: [usize; 2],
        places: Places<'a>,
        values: Values<'a>,
        starts: &'a [usize],
    ) -> Self {
        assert_eq!(starts.len(), rows + 1);
        Self { rows, cols, places, values, starts }
    }

    /// Whether each column of `row` is stored.
    pub fn mask(&self, row: usize, out: &mut [bool]) {
        assert!(row < self.rows && out.len() == self.cols);
        // SAFETY: the row exists and no more than its columns are asked for.
        let mut cursor = unsafe { Cursor::new(self, row) };
        for out in out.chunks_mut(32) {
            // SAFETY: as above.
            let word = unsafe { cursor.next(out.len() as u32) };
            for (i, out) in out.iter_mut().enumerate() {
                *out = word >> i & 1 == 1;
            }
        }
    }
}

/// Reads a row's places as bits, up to 32 at a time.
enum Cursor {
    Bitmap { next: *const u8 },
    NOfM { next: *const u8, keep: u32, of: u32, stream: u64, have: u32, word: u64, filled: u32 },
}

impl Cursor {
    #[inline(always)]
    unsafe fn new(rows: &SparseRows<'_>, row: usize) -> Self {
        match rows.places {
            Places::Bitmap(bits) => {
                Self::Bitmap { next: bits.as_ptr().add(row * rows.cols.div_ceil(8)) }
            }
            Places::NOfM { places, keep, of } => {
                let fields = rows.cols / of as usize * keep as usize;
                let bytes = (fields * place_bits(of) as usize).div_ceil(8);
                let next = places.as_ptr().add(row * bytes);
                Self::NOfM { next, keep, of, stream: 0, have: 0, word: 0, filled: 0 }
            }
        }
    }

    /// The bits of the next `count <= 32` columns; fewer than 32 only at the end of the row.
    #[inline(always)]
    unsafe fn next(&mut self, count: u32) -> u32 {
        match self {
            Self::Bitmap { next } if count == 32 => {
                let word = next.cast::<u32>().read_unaligned();
                *next = next.add(4);
                word
            }
            Self::Bitmap { next } => (0..count.div_ceil(8))
                .fold(0, |word, i| word | u32::from(*next.add(i as usize)) << (8 * i)),
            Self::NOfM { next, keep, of, stream, have, word, filled } => {
                let bits = place_bits(*of);
                while *filled < count {
                    for _ in 0..*keep {
                        if *have < bits {
                            *stream |= u64::from(**next) << *have;
                            *next = next.add(1);
                            *have += 8;
                        }
                        let place = *stream & ((1 << bits) - 1);
                        *stream >>= bits;
                        *have -= bits;
                        *word |= 1 << (place + u64::from(*filled));
                    }
                    *filled += *of;
                }
                let out = *word as u32;
                *word >>= count;
                *filled -= count;
                out
            }
        }
    }
}

/// Reads stored elements in order: 16 from a position on, of which some leading ones are meant.
trait Source {
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F;
    unsafe fn one(&self, at: usize) -> f32;
}

/// Calls `read` with a pointer to `LEN` readable bytes that start at `from`; near the end of `data` they
/// are copied, and zeros follow.
#[inline(always)]
unsafe fn readable<const LEN: usize, T>(
    data: &[u8],
    from: usize,
    read: impl Fn(*const u8) -> T,
) -> T {
    if from + LEN <= data.len() {
        return read(data.as_ptr().add(from));
    }
    let mut copy = [0; LEN];
    let rest = data.get_unchecked(from.min(data.len())..);
    copy.get_unchecked_mut(..rest.len()).copy_from_slice(rest);
    read(copy.as_ptr())
}

struct F32<'a>(&'a [u8]);

impl Source for F32<'_> {
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F {
        readable::<64, _>(self.0, 4 * at, |p| S::load(p.cast()))
    }
    #[inline(always)]
    unsafe fn one(&self, at: usize) -> f32 {
        self.0.as_ptr().cast::<f32>().add(at).read_unaligned()
    }
}

struct F16<'a>(&'a [u8]);

impl Source for F16<'_> {
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F {
        readable::<32, _>(self.0, 2 * at, |p| S::load_f16(p))
    }
    #[inline(always)]
    unsafe fn one(&self, at: usize) -> f32 {
        let bits = self.0.as_ptr().cast::<u16>().add(at).read_unaligned();
        f16::from_bits(bits).to_f32_const()
    }
}

struct BF16<'a>(&'a [u8]);

impl Source for BF16<'_> {
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F {
        readable::<32, _>(self.0, 2 * at, |p| S::load_bf16(p))
    }
    #[inline(always)]
    unsafe fn one(&self, at: usize) -> f32 {
        let bits = self.0.as_ptr().cast::<u16>().add(at).read_unaligned();
        bf16::from_bits(bits).to_f32_const()
    }
}

/// Codes as f32; positions are counted from the first byte of a row.
struct Codes<'a, const BITS: usize>(&'a [u8]);

impl<const BITS: usize> Source for Codes<'_, BITS> {
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F {
        if BITS == 8 {
            return readable::<16, _>(self.0, at, |p| S::unsigned(S::bytes(p)));
        }
        // Eight codes at a time: 32 bits and up to 7 before them.
        readable::<16, _>(self.0, at * BITS / 8, |p| {
            let word = |p: *const u8| (p.cast::<u64>().read_unaligned() >> (at * BITS % 8)) as u32;
            S::fields(word(p), word(p.add(BITS)), BITS as u32)
        })
    }
    #[inline(always)]
    unsafe fn one(&self, at: usize) -> f32 {
        let (first, shift) = (at * BITS / 8, at * BITS % 8);
        let mut both = u16::from(*self.0.get_unchecked(first));
        if shift + BITS > 8 {
            both |= u16::from(*self.0.get_unchecked(first + 1)) << 8;
        }
        f32::from((both >> shift) & ((1 << BITS) - 1))
    }
}

impl SparseRows<'_> {
    #[inline(always)]
    unsafe fn decode_dense<S: Simd, K: Sink<S>>(
        &self,
        row: usize,
        source: impl Source,
        sink: &mut K,
    ) {
        let mut cursor = Cursor::new(self, row);
        let mut next = *self.starts.get_unchecked(row);
        let whole = self.cols / 32 * 32;
        for at in (0..whole).step_by(32) {
            let word = cursor.next(32);
            let (low, high) = (word as u16, (word >> 16) as u16);
            let middle = next + low.count_ones() as usize;
            let a = S::expand(low, source.sixteen::<S>(next));
            let b = S::expand(high, source.sixteen::<S>(middle));
            sink.pair(at, a, b);
            next = middle + high.count_ones() as usize;
        }
        let word = if whole < self.cols { cursor.next((self.cols - whole) as u32) } else { 0 };
        for at in whole..self.cols {
            if word >> (at - whole) & 1 == 1 {
                sink.one(at, source.one(next));
                next += 1;
            } else {
                sink.one(at, 0.0);
            }
        }
    }

    #[inline(always)]
    unsafe fn decode_codes<const BITS: usize, S: Simd, K: Sink<S>>(
        &self,
        row: usize,
        codes: &[u8],
        grid: &Grid<'_>,
        sink: &mut K,
    ) {
        let mut cursor = Cursor::new(self, row);
        let source = Codes::<BITS>(codes.get_unchecked(*self.starts.get_unchecked(row)..));
        let group = grid.group();
        let whole = self.cols / 32 * 32;
        let mut next = 0;
        // Scales change at multiples of 16 or anywhere.
        let by_vector = group.is_multiple_of(16);
        let (mut current, mut end) = (0, 0);
        let (mut zero, mut scale) = (0.0, 0.0);
        for at in (0..self.cols).step_by(32) {
            let count = (self.cols - at).min(32);
            let word = cursor.next(count as u32);
            if by_vector && at < whole {
                let mut part = |at: usize, mask: u16| {
                    if at >= end {
                        (zero, scale) = grid.at::<S>(row, current);
                        current += 1;
                        end += group;
                    }
                    let codes = S::expand(mask, source.sixteen::<S>(next));
                    next += mask.count_ones() as usize;
                    // Where nothing is stored the expanded code is 0, which is not the grid's zero.
                    S::masked(mask, S::mul(S::sub(codes, S::splat(zero)), S::splat(scale)))
                };
                let a = part(at, word as u16);
                let b = part(at + 16, (word >> 16) as u16);
                sink.pair(at, a, b);
                continue;
            }
            for i in 0..count {
                if word >> i & 1 == 1 {
                    let (zero, scale) = grid.at::<S>(row, (at + i) / group);
                    sink.one(at + i, (source.one(next) - zero) * scale);
                    next += 1;
                } else {
                    sink.one(at + i, 0.0);
                }
            }
        }
    }
}

// SAFETY: words of 32 columns, and the single columns after them, step through 0..cols without gap or
// overlap.
unsafe impl Rows for SparseRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K) {
        match self.values {
            Values::Dense(data, DenseKind::F32) => self.decode_dense(row, F32(data), sink),
            Values::Dense(data, DenseKind::F16) => self.decode_dense(row, F16(data), sink),
            Values::Dense(data, DenseKind::BF16) => self.decode_dense(row, BF16(data), sink),
            Values::Codes(data, grid) => match grid.bits() {
                2 => self.decode_codes::<2, S, K>(row, data, &grid, sink),
                3 => self.decode_codes::<3, S, K>(row, data, &grid, sink),
                4 => self.decode_codes::<4, S, K>(row, data, &grid, sink),
                _ => self.decode_codes::<8, S, K>(row, data, &grid, sink),
            },
        }
    }
}
