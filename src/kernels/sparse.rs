//! Decoding of rows whose non-zero elements are stored in order, with a bitmap or places beside them.

#![allow(unsafe_op_in_unsafe_fn)]

use half::{bf16, f16};

use super::dot::{DenseKind, Rows, Sink};
#[cfg(target_arch = "x86_64")]
use super::expand;
use super::grouped::Grid;
use super::product;
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

/// Whether this processor moves the values of bitmaps to their places by instructions. Others decode rows, which
/// takes longer than reading dense ones.
pub fn moves_bitmaps() -> bool {
    #[cfg(target_arch = "x86_64")]
    return expand::available();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Bits of a place among `of`.
pub fn place_bits(of: u32) -> u32 {
    u32::BITS - (of - 1).leading_zeros()
}

/// Bytes of a row of n:m places.
pub fn list_row_bytes(cols: usize, keep: u32, of: u32) -> usize {
    (cols / of as usize * keep as usize * place_bits(of) as usize).div_ceil(8)
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
    /// `starts` says at which element (at which byte, for codes) of the values each row starts. Panics if
    /// places do not have the size their kind asks for. Nothing else is relied upon: values that places
    /// promise but that are not there read as 0.
    pub fn new(
        [rows, cols]: [usize; 2],
        places: Places<'a>,
        values: Values<'a>,
        starts: &'a [usize],
    ) -> Self {
        assert!(starts.len() >= rows && cols > 0);
        match places {
            Places::Bitmap(bits) => assert_eq!(bits.len(), rows * cols.div_ceil(8)),
            Places::NOfM { places, keep, of } => {
                assert!((2..=MAX_OF).contains(&of) && cols.is_multiple_of(of as usize));
                assert_eq!(places.len(), rows * list_row_bytes(cols, keep, of));
            }
        }
        Self { rows, cols, places, values, starts }
    }

    /// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten. Panics if sizes do not fit.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if let (Places::Bitmap(bitmap), Values::Dense(values, kind)) = (self.places, self.values)
            && x.len() <= product::FEW * self.cols
            && expand::available()
        {
            let (rows, cols, starts) = (self.rows, self.cols, self.starts);
            return expand::multiply(
                expand::Rows { rows, cols, bitmap, values, kind, starts },
                x,
                y,
            );
        }
        product::multiply(self, x, y);
    }

    /// Where the values of `row` start, within the values or at their end.
    #[inline(always)]
    fn start(&self, row: usize, len: usize) -> usize {
        self.starts[row].min(len)
    }

    pub(super) fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// The grid of the values, if they are codes.
    pub(super) fn grid(&self) -> Option<Grid<'a>> {
        match self.values {
            Values::Codes(_, grid) => Some(grid),
            Values::Dense(..) => None,
        }
    }

    /// Gives the stored columns of `row`, rising, and their codes; none if its values are no codes.
    pub(super) fn kept_codes(&self, row: usize, mut take: impl FnMut(usize, u8)) {
        let Values::Codes(data, grid) = self.values else { return };
        let codes = &data[self.start(row, data.len())..];
        let mut next = 0;
        assert!(row < self.rows);
        // SAFETY: the row exists and no more than its columns are asked for.
        let mut cursor = unsafe { Cursor::new(self, row) };
        for at in (0..self.cols).step_by(32) {
            let count = (self.cols - at).min(32);
            // SAFETY: as above.
            let mut word = unsafe { cursor.next(count as u32) };
            while word != 0 {
                take(at + word.trailing_zeros() as usize, code(codes, next, grid.bits()));
                word &= word - 1;
                next += 1;
            }
        }
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
                let next = places.as_ptr().add(row * list_row_bytes(rows.cols, keep, of));
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
    /// Elements there are.
    fn len(&self) -> usize;
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F;
    unsafe fn one(&self, at: usize) -> f32;
}

/// A pointer to `LEN` readable bytes that start at `from`; near the end of `data` they are copied into
/// `copy`, with zeros behind them. Not a function that takes a closure: those are not sure to be inlined,
/// and vector code that is not inlined loses its instructions.
#[inline(always)]
unsafe fn readable<const LEN: usize>(data: &[u8], from: usize, copy: &mut [u8; LEN]) -> *const u8 {
    if from + LEN <= data.len() {
        return data.as_ptr().add(from);
    }
    copy_rest(data, from, copy);
    copy.as_ptr()
}

#[cold]
fn copy_rest(data: &[u8], from: usize, copy: &mut [u8]) {
    let rest = data.get(from..).unwrap_or_default();
    copy[..rest.len()].copy_from_slice(rest);
}

/// Element `at`, or zero bytes if there is none.
#[inline(always)]
fn element<const SIZE: usize>(data: &[u8], at: usize) -> [u8; SIZE] {
    let bytes = data.get(at * SIZE..).and_then(|rest| rest.first_chunk());
    bytes.copied().unwrap_or([0; SIZE])
}

struct F32<'a>(&'a [u8]);

impl Source for F32<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len() / 4
    }
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F {
        S::load(readable(self.0, 4 * at, &mut [0; 64]).cast())
    }
    #[inline(always)]
    unsafe fn one(&self, at: usize) -> f32 {
        f32::from_le_bytes(element(self.0, at))
    }
}

struct F16<'a>(&'a [u8]);

impl Source for F16<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len() / 2
    }
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F {
        S::load_f16(readable(self.0, 2 * at, &mut [0; 32]))
    }
    #[inline(always)]
    unsafe fn one(&self, at: usize) -> f32 {
        f16::from_le_bytes(element(self.0, at)).to_f32_const()
    }
}

struct BF16<'a>(&'a [u8]);

impl Source for BF16<'_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len() / 2
    }
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F {
        S::load_bf16(readable(self.0, 2 * at, &mut [0; 32]))
    }
    #[inline(always)]
    unsafe fn one(&self, at: usize) -> f32 {
        bf16::from_le_bytes(element(self.0, at)).to_f32_const()
    }
}

/// Code `at` of a stream of `bits` bits each, or 0 if there is none.
#[inline(always)]
fn code(data: &[u8], at: usize, bits: usize) -> u8 {
    let (first, shift) = (at * bits / 8, at * bits % 8);
    let byte = |i: usize| data.get(i).copied().unwrap_or(0);
    let mut both = u16::from(byte(first));
    if shift + bits > 8 {
        both |= u16::from(byte(first + 1)) << 8;
    }
    (both >> shift) as u8 & (0xff >> (8 - bits))
}

/// Codes as f32; positions are counted from the first byte of a row.
struct Codes<'a, const BITS: usize>(&'a [u8]);

impl<const BITS: usize> Source for Codes<'_, BITS> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len() * 8 / BITS
    }
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, at: usize) -> S::F {
        let copy = &mut [0; 16];
        let p = readable(self.0, at * BITS / 8, copy);
        if BITS == 8 {
            return S::unsigned(S::bytes(p));
        }
        // Eight codes at a time: 32 bits and up to 7 before them.
        let shift = at * BITS % 8;
        let low = p.cast::<u64>().read_unaligned() >> shift;
        let high = p.add(BITS).cast::<u64>().read_unaligned() >> shift;
        S::fields(low as u32, high as u32, BITS as u32)
    }
    #[inline(always)]
    unsafe fn one(&self, at: usize) -> f32 {
        f32::from(code(self.0, at, BITS))
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
        let mut next = self.start(row, source.len());
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
        let source = Codes::<BITS>(&codes[self.start(row, codes.len())..]);
        let group = grid.group();
        let whole = self.cols / 32 * 32;
        let mut next = 0;
        // Scales change at multiples of 16 or anywhere.
        let by_vector = group.is_multiple_of(16);
        let (mut current, mut end) = (0, group);
        let (mut zero, mut scale) = grid.at::<S>(row, 0);
        for at in (0..self.cols).step_by(32) {
            let count = (self.cols - at).min(32);
            let word = cursor.next(count as u32);
            if by_vector && at < whole {
                let mut pair = [S::splat(0.0); 2];
                for (i, part) in pair.iter_mut().enumerate() {
                    if at + 16 * i >= end {
                        current += 1;
                        end += group;
                        (zero, scale) = grid.at::<S>(row, current);
                    }
                    let mask = (word >> (16 * i)) as u16;
                    let codes = S::expand(mask, source.sixteen::<S>(next));
                    next += mask.count_ones() as usize;
                    // Where nothing is stored the expanded code is 0, which is not the grid's zero.
                    *part = S::masked(mask, S::mul(S::sub(codes, zero), scale));
                }
                sink.pair(at, pair[0], pair[1]);
                continue;
            }
            for i in 0..count {
                if word >> i & 1 == 1 {
                    let code = source.one(next);
                    sink.one(at + i, grid.weight::<S>(row, (at + i) / group, code));
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
