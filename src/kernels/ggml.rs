//! Decoding of the block types of GGUF files, exactly as ggml defines their values.

#![allow(unsafe_op_in_unsafe_fn)]

use serde::{Deserialize, Serialize};

use super::dot::{Rows, Sink};
use super::simd::Simd;

/// Block types that are read; the discriminants are the numbers in GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GgmlType {
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2K = 10,
    Q3K = 11,
    Q4K = 12,
    Q5K = 13,
    Q6K = 14,
}

impl GgmlType {
    /// All block types.
    pub const ALL: [Self; 10] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The type with this number in a GGUF file.
    pub fn from_number(n: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| *t as u32 == n)
    }

    /// Elements of a block.
    pub const fn block_elements(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }
}

/// Rows of blocks.
#[derive(Clone, Copy)]
pub struct GgmlRows<'a> {
    data: &'a [u8],
    rows: usize,
    cols: usize,
    kind: GgmlType,
}

impl<'a> GgmlRows<'a> {
    /// Panics if `cols` is not a whole number of blocks or `data` is not `rows` rows of them.
    pub fn new(data: &'a [u8], rows: usize, cols: usize, kind: GgmlType) -> Self {
        assert!(cols.is_multiple_of(kind.block_elements()));
        assert_eq!(data.len(), rows * (cols / kind.block_elements()) * kind.block_bytes());
        Self { data, rows, cols, kind }
    }
}

// SAFETY: every block decoder calls the sink once for each 32 of its columns, and `blocks` goes
// through the blocks of the row without gap or overlap.
unsafe impl Rows for GgmlRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K) {
        let count = self.cols / self.kind.block_elements();
        let p = self.data.as_ptr().add(row * count * self.kind.block_bytes());
        // One loop a type, so that its vectors stay in registers.
        macro_rules! blocks {
            ($kind:ident, $decode:ident) => {
                for b in 0..count {
                    let block = p.add(b * GgmlType::$kind.block_bytes());
                    $decode::<S, K>(block, b * GgmlType::$kind.block_elements(), sink);
                }
            };
        }
        match self.kind {
            GgmlType::Q4_0 => blocks!(Q4_0, q4_0),
            GgmlType::Q4_1 => blocks!(Q4_1, q4_1),
            GgmlType::Q5_0 => blocks!(Q5_0, q5_0),
            GgmlType::Q5_1 => blocks!(Q5_1, q5_1),
            GgmlType::Q8_0 => blocks!(Q8_0, q8_0),
            GgmlType::Q2K => blocks!(Q2K, q2_k),
            GgmlType::Q3K => blocks!(Q3K, q3_k),
            GgmlType::Q4K => blocks!(Q4K, q4_k),
            GgmlType::Q5K => blocks!(Q5K, q5_k),
            GgmlType::Q6K => blocks!(Q6K, q6_k),
        }
    }
}

#[inline(always)]
unsafe fn f16_at<S: Simd>(p: *const u8, offset: usize) -> S::F {
    S::splat_f16(p.add(offset).cast::<u16>().read_unaligned())
}

/// The low and the high nibbles of 16 bytes.
#[inline(always)]
pub(super) unsafe fn nibbles<S: Simd>(p: *const u8) -> [S::F; 2] {
    let q = S::bytes(p);
    [S::unsigned(S::and(q, 15)), S::unsigned(S::shr(q, 4))]
}

/// 16 where the bit is set; fifth bits of the elements whose nibbles are beside them.
#[inline(always)]
unsafe fn fifth_bits<S: Simd>(p: *const u8) -> [S::F; 2] {
    let bits = p.cast::<u32>().read_unaligned();
    let sixteen = S::splat(16.0);
    [S::masked(bits as u16, sixteen), S::masked((bits >> 16) as u16, sixteen)]
}

/// `(q - zero) * d`
#[inline(always)]
unsafe fn centred<S: Simd>(q: S::F, zero: f32, d: S::F) -> S::F {
    S::mul(S::sub(q, S::splat(zero)), d)
}

/// `q * d + m`, rounded after the product as ggml does.
#[inline(always)]
unsafe fn affine<S: Simd>(q: S::F, d: S::F, m: S::F) -> S::F {
    S::add(S::mul(q, d), m)
}

#[inline(always)]
unsafe fn q4_0<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let d = f16_at::<S>(p, 0);
    let [a, b] = nibbles::<S>(p.add(2));
    sink.pair(at, centred::<S>(a, 8.0, d), centred::<S>(b, 8.0, d));
}

#[inline(always)]
unsafe fn q4_1<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let (d, m) = (f16_at::<S>(p, 0), f16_at::<S>(p, 2));
    let [a, b] = nibbles::<S>(p.add(4));
    sink.pair(at, affine::<S>(a, d, m), affine::<S>(b, d, m));
}

#[inline(always)]
unsafe fn q5_0<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let d = f16_at::<S>(p, 0);
    let ([a, b], [c, e]) = (nibbles::<S>(p.add(6)), fifth_bits::<S>(p.add(2)));
    sink.pair(at, centred::<S>(S::add(a, c), 16.0, d), centred::<S>(S::add(b, e), 16.0, d));
}

#[inline(always)]
unsafe fn q5_1<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let (d, m) = (f16_at::<S>(p, 0), f16_at::<S>(p, 2));
    let ([a, b], [c, e]) = (nibbles::<S>(p.add(8)), fifth_bits::<S>(p.add(4)));
    sink.pair(at, affine::<S>(S::add(a, c), d, m), affine::<S>(S::add(b, e), d, m));
}

#[inline(always)]
unsafe fn q8_0<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let d = f16_at::<S>(p, 0);
    let (a, b) = (S::signed(S::bytes(p.add(2))), S::signed(S::bytes(p.add(18))));
    sink.pair(at, S::mul(a, d), S::mul(b, d));
}

/// Scales 16, codes 64, d, dmin; a scale byte holds a 4-bit scale and a 4-bit minimum of 16 elements.
#[inline(always)]
unsafe fn q2_k<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let (d, dmin) = (f16_at::<S>(p, 80), f16_at::<S>(p, 82));
    for half in 0..2 {
        let q = [S::bytes(p.add(16 + 32 * half)), S::bytes(p.add(32 + 32 * half))];
        for j in 0..4 {
            let part = |i: usize| {
                let scale = *p.add(8 * half + 2 * j + i);
                let code = S::unsigned(S::and(S::shr(q[i], 2 * j as u32), 3));
                let d = S::mul(d, S::splat(f32::from(scale & 15)));
                S::sub(S::mul(code, d), S::mul(dmin, S::splat(f32::from(scale >> 4))))
            };
            sink.pair(at + 128 * half + 32 * j, part(0), part(1));
        }
    }
}

/// High bits 32, low codes 64, scales 12 (sixteen of 6 bits, less 32), d.
#[inline(always)]
unsafe fn q3_k<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let d = f16_at::<S>(p, 108);
    let high = [S::bytes(p), S::bytes(p.add(16))];
    for half in 0..2 {
        let q = [S::bytes(p.add(32 + 32 * half)), S::bytes(p.add(48 + 32 * half))];
        for j in 0..4 {
            let part = |i: usize| {
                let n = 8 * half + 2 * j + i;
                let low = *p.add(96 + n % 8) >> (4 * (n / 8)) & 15;
                let top = *p.add(104 + n % 4) >> (2 * (n / 4)) & 3;
                let scale = f32::from(low | top << 4) - 32.0;
                let code = S::and(S::shr(q[i], 2 * j as u32), 3);
                // A set high bit means that nothing is subtracted.
                let bit = S::and(S::shr(high[i], (4 * half + j) as u32), 1);
                let code = S::unsigned(S::or(code, S::shl(bit, 2)));
                centred::<S>(code, 4.0, S::mul(d, S::splat(scale)))
            };
            sink.pair(at + 128 * half + 32 * j, part(0), part(1));
        }
    }
}

/// Scale and minimum `j` of the eight pairs of 6 bits in 12 bytes.
#[inline(always)]
pub(super) fn factors(p: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (p[j] & 63, p[j + 4] & 63);
    }
    let low = p[j + 4];
    ((low & 15) | (p[j - 4] >> 6 << 4), (low >> 4) | (p[j] >> 6 << 4))
}

/// [`factors`] as numbers.
#[inline(always)]
unsafe fn scale_min(p: *const u8, j: usize) -> (f32, f32) {
    let (scale, min) = factors(&*p.cast::<[u8; 12]>(), j);
    (f32::from(scale), f32::from(min))
}

/// d, dmin, scales 12, codes 128.
#[inline(always)]
unsafe fn q4_k<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let (d, dmin) = (f16_at::<S>(p, 0), f16_at::<S>(p, 2));
    for j in 0..4 {
        let q = [nibbles::<S>(p.add(16 + 32 * j)), nibbles::<S>(p.add(32 + 32 * j))];
        for high in [0, 1] {
            let (scale, min) = scale_min(p.add(4), 2 * j + high);
            let (d, m) = (S::mul(d, S::splat(scale)), S::mul(dmin, S::splat(min)));
            let part = |i: usize| S::sub(S::mul(q[i][high], d), m);
            sink.pair(at + 64 * j + 32 * high, part(0), part(1));
        }
    }
}

/// d, dmin, scales 12, high bits 32, low codes 128.
#[inline(always)]
unsafe fn q5_k<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let (d, dmin) = (f16_at::<S>(p, 0), f16_at::<S>(p, 2));
    let top = [S::bytes(p.add(16)), S::bytes(p.add(32))];
    for j in 0..4 {
        let q = [S::bytes(p.add(48 + 32 * j)), S::bytes(p.add(64 + 32 * j))];
        for high in [0, 1] {
            let n = 2 * j + high;
            let (scale, min) = scale_min(p.add(4), n);
            let (d, m) = (S::mul(d, S::splat(scale)), S::mul(dmin, S::splat(min)));
            let part = |i: usize| {
                let low = S::and(S::shr(q[i], 4 * high as u32), 15);
                let bit = S::shl(S::and(S::shr(top[i], n as u32), 1), 4);
                S::sub(S::mul(S::unsigned(S::or(low, bit)), d), m)
            };
            sink.pair(at + 64 * j + 32 * high, part(0), part(1));
        }
    }
}

/// Low codes 128, high codes 64, signed scales 16, d.
#[inline(always)]
unsafe fn q6_k<S: Simd, K: Sink<S>>(p: *const u8, at: usize, sink: &mut K) {
    let d = f16_at::<S>(p, 208);
    for half in 0..2 {
        let top = [S::bytes(p.add(128 + 32 * half)), S::bytes(p.add(144 + 32 * half))];
        for j in 0..4 {
            let part = |i: usize| {
                let scale = f32::from(*p.add(192 + 8 * half + 2 * j + i).cast::<i8>());
                let low = S::bytes(p.add(64 * half + 32 * (j % 2) + 16 * i));
                let low = S::and(S::shr(low, 4 * (j as u32 / 2)), 15);
                let bits = S::shl(S::and(S::shr(top[i], 2 * j as u32), 3), 4);
                centred::<S>(S::unsigned(S::or(low, bits)), 32.0, S::mul(d, S::splat(scale)))
            };
            sink.pair(at + 128 * half + 32 * j, part(0), part(1));
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::GgmlType;

    /// Blocks of pseudo-random bytes with harmless scales.
    pub fn blocks(kind: GgmlType, count: usize) -> Vec<u8> {
        let scales: &[usize] = match kind {
            GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => &[0],
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
            GgmlType::Q2K => &[80, 82],
            GgmlType::Q3K => &[108],
            GgmlType::Q6K => &[208],
        };
        let mut state = 12345_u32;
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .take(count * kind.block_bytes())
        .collect();
        for (i, block) in bytes.chunks_exact_mut(kind.block_bytes()).enumerate() {
            for (j, &at) in scales.iter().enumerate() {
                let half = 0x2c00 + (i % 8) as u16 * 0x123 + j as u16 * 0x8055;
                block[at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::super::dot;
    use super::super::simd::Level;
    use super::testing::blocks;
    use super::*;

    fn fnv(bytes: impl IntoIterator<Item = u8>) -> u64 {
        bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    // The digests (FNV-1a of the little-endian values) and the values 0, 17 and last were computed with
    // the `gguf` Python package from the same bytes.
    #[test]
    #[allow(clippy::excessive_precision)]
    fn values_are_those_of_the_reference_to_the_bit() {
        let expected = [
            (GgmlType::Q4_0, 0x5b93_5c6f_355a_84bf, [0.1875, 0.125, 0.39208984375]),
            (
                GgmlType::Q4_1,
                0x6b99_cf83_bbff_6dd6,
                [0.43231201171875, -0.00518798828125, 1.17108154296875],
            ),
            (GgmlType::Q5_0, 0x5843_5dd6_c405_b82d, [0.875, -0.5, 0.4901123046875]),
            (
                GgmlType::Q5_1,
                0xfaa3_ab18_ff49_1865,
                [0.43231201171875, 1.68231201171875, 0.48492431640625],
            ),
            (GgmlType::Q8_0, 0x3789_5252_832f_c104, [-7.3125, -0.8125, 7.0576171875]),
            (GgmlType::Q2K, 0xf24c_23e0_9a22_538c, [0.3125, 0.5, 1.67156982421875]),
            (GgmlType::Q3K, 0x4aba_4da8_a452_f2fd, [0.75, 1.4375, 2.940673828125]),
            (
                GgmlType::Q4K,
                0xd6f0_147a_50e3_9c28,
                [14.12451171875, 26.62451171875, 8.11102294921875],
            ),
            (
                GgmlType::Q5K,
                0xc396_44f3_f72f_67ad,
                [54.12451171875, 24.12451171875, 30.19091796875],
            ),
            (GgmlType::Q6K, 0x0bf1_f9d6_b1c5_592b, [106.3125, -177.1875, -33.7197265625]),
        ];
        for (kind, digest, [first, eighteenth, last]) in expected {
            let (bytes, cols) = (blocks(kind, 3), 3 * kind.block_elements());
            let rows = GgmlRows::new(&bytes, 1, cols, kind);
            for level in Level::available() {
                let mut out = vec![f32::NAN; cols];
                dot::read_at(level, &rows, 0, &mut out);
                let some = [out[0], out[17], out[cols - 1]];
                assert_eq!(some, [first, eighteenth, last], "{kind:?} {level:?}");
                assert_eq!(fnv(out.iter().flat_map(|v| v.to_le_bytes())), digest, "{kind:?}");
            }
        }
    }

    #[test]
    fn numbers_are_those_of_the_file_format() {
        assert_eq!(GgmlType::from_number(12), Some(GgmlType::Q4K));
        for n in [0, 1, 4, 9, 15, u32::MAX] {
            assert_eq!(GgmlType::from_number(n), None);
        }
    }
}
