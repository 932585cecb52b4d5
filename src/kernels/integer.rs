//! 64 codes of a byte and 16 integer sums: what products with 8-bit activations are made of.
//!
//! All implementations give the same integers. Where a bigger number would saturate or overflow in one
//! of them, the domain is stated at the operation.

// Every function here has the preconditions of `Simd`.
#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc)]

use super::simd::Arrays;

/// 64 bytes (`C`) and 16 i32 (`I`). Byte `4 * lane + i` of the codes belongs to lane `lane`.
///
/// # Safety
/// All functions ask that the processor has the instructions and that pointers are valid for what is
/// read, aligned or not.
pub trait Integer: Copy {
    type C: Copy;
    type I: Copy;

    /// What [`Integer::dot_wide`] leaves to be subtracted from each code.
    const WIDE_ZERO: i32;
    /// Tokens that a product handles at once without running out of registers.
    const TILE: usize;
    /// Whether tiles of AMX may be used beside these instructions, where they are available.
    const AMX: bool;

    /// 64 bytes.
    unsafe fn codes(p: *const u8) -> Self::C;
    unsafe fn store_codes(p: *mut u8, c: Self::C);
    /// `(c >> shift) & mask` for each byte; `mask << shift` fits into a byte.
    unsafe fn field(c: Self::C, shift: u32, mask: u8) -> Self::C;
    /// `c | (d << shift)` for each byte; `d << shift` fits into a byte.
    unsafe fn or_shifted(c: Self::C, d: Self::C, shift: u32) -> Self::C;
    /// Each byte or `value` where its bit of the 8 bytes at `p` is set.
    unsafe fn or_bits(c: Self::C, p: *const u8, value: u8) -> Self::C;

    /// `c - d` for each byte, wrapping.
    unsafe fn less(c: Self::C, d: u8) -> Self::C;

    unsafe fn splat_i32(v: i32) -> Self::I;
    unsafe fn load_i32(p: *const i32) -> Self::I;
    unsafe fn store_i32(p: *mut i32, v: Self::I);
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn mul_i32(a: Self::I, b: Self::I) -> Self::I;
    /// 16 unsigned bytes.
    unsafe fn load_u8(p: *const u8) -> Self::I;
    /// Lanes as bytes, the nearest of -128 to 127.
    unsafe fn store_i8(p: *mut i8, v: Self::I);
    /// The sum of all lanes.
    unsafe fn sum_i32(v: Self::I) -> i32;

    /// Adds to each lane the product of its four codes, unsigned and below 128, and the four signed bytes
    /// at `x`, none of which is -128.
    unsafe fn dot(sum: Self::I, c: Self::C, x: *const i8) -> Self::I;
    /// The same for codes up to 255, less `128 - WIDE_ZERO` each.
    unsafe fn dot_wide(sum: Self::I, c: Self::C, x: *const i8) -> Self::I;
}

impl Integer for Arrays {
    type C = [u8; 64];
    type I = [i32; 16];
    const WIDE_ZERO: i32 = 0;
    const TILE: usize = 4;
    const AMX: bool = false;

    #[inline(always)]
    unsafe fn codes(p: *const u8) -> Self::C {
        p.cast::<Self::C>().read()
    }
    #[inline(always)]
    unsafe fn store_codes(p: *mut u8, c: Self::C) {
        p.cast::<Self::C>().write(c);
    }
    #[inline(always)]
    unsafe fn field(c: Self::C, shift: u32, mask: u8) -> Self::C {
        c.map(|b| (b >> shift) & mask)
    }
    #[inline(always)]
    unsafe fn or_shifted(c: Self::C, d: Self::C, shift: u32) -> Self::C {
        std::array::from_fn(|i| c[i] | (d[i] << shift))
    }
    #[inline(always)]
    unsafe fn or_bits(c: Self::C, p: *const u8, value: u8) -> Self::C {
        let bits = u64::from_le_bytes(p.cast::<[u8; 8]>().read());
        std::array::from_fn(|i| c[i] | if bits >> i & 1 == 1 { value } else { 0 })
    }
    #[inline(always)]
    unsafe fn less(c: Self::C, d: u8) -> Self::C {
        c.map(|c| c.wrapping_sub(d))
    }
    #[inline(always)]
    unsafe fn splat_i32(v: i32) -> Self::I {
        [v; 16]
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const i32) -> Self::I {
        p.cast::<Self::I>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut i32, v: Self::I) {
        p.cast::<Self::I>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul_i32(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::I {
        p.cast::<[u8; 16]>().read().map(i32::from)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::I) {
        p.cast::<[i8; 16]>().write(v.map(|v| v.clamp(-128, 127) as i8));
    }
    #[inline(always)]
    unsafe fn sum_i32(v: Self::I) -> i32 {
        v.into_iter().sum()
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::I, c: Self::C, x: *const i8) -> Self::I {
        let x = x.cast::<[i8; 4]>().read().map(i32::from);
        std::array::from_fn(|lane| {
            (0..4).fold(sum[lane], |sum, i| sum + i32::from(c[4 * lane + i]) * x[i])
        })
    }
    #[inline(always)]
    unsafe fn dot_wide(sum: Self::I, c: Self::C, x: *const i8) -> Self::I {
        let x = x.cast::<[i8; 4]>().read().map(i32::from);
        std::array::from_fn(|lane| {
            (0..4).fold(sum[lane], |sum, i| sum + (i32::from(c[4 * lane + i]) - 128) * x[i])
        })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::simd::x86::{Avx2, Avx512};
    use super::Integer;

    #[inline(always)]
    unsafe fn four(x: *const i8) -> i32 {
        x.cast::<i32>().read_unaligned()
    }

    #[inline(always)]
    unsafe fn sum8(v: __m256i) -> i32 {
        let four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
    }

    impl<const VNNI: bool> Integer for Avx512<VNNI> {
        type C = __m512i;
        type I = __m512i;
        const WIDE_ZERO: i32 = if VNNI { 128 } else { 0 };
        const TILE: usize = 16;
        const AMX: bool = VNNI;

        #[inline(always)]
        unsafe fn codes(p: *const u8) -> Self::C {
            _mm512_loadu_si512(p.cast())
        }
        #[inline(always)]
        unsafe fn store_codes(p: *mut u8, c: Self::C) {
            _mm512_storeu_si512(p.cast(), c);
        }
        #[inline(always)]
        unsafe fn field(c: Self::C, shift: u32, mask: u8) -> Self::C {
            let shifted = _mm512_srl_epi16(c, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8))
        }
        #[inline(always)]
        unsafe fn or_shifted(c: Self::C, d: Self::C, shift: u32) -> Self::C {
            _mm512_or_si512(c, _mm512_sll_epi16(d, _mm_cvtsi32_si128(shift as i32)))
        }
        #[inline(always)]
        unsafe fn or_bits(c: Self::C, p: *const u8, value: u8) -> Self::C {
            let bits = p.cast::<u64>().read_unaligned();
            // The bit is clear in `c`, so or is add.
            _mm512_mask_add_epi8(c, bits, c, _mm512_set1_epi8(value as i8))
        }
        #[inline(always)]
        unsafe fn less(c: Self::C, d: u8) -> Self::C {
            _mm512_sub_epi8(c, _mm512_set1_epi8(d as i8))
        }
        #[inline(always)]
        unsafe fn splat_i32(v: i32) -> Self::I {
            _mm512_set1_epi32(v)
        }
        #[inline(always)]
        unsafe fn load_i32(p: *const i32) -> Self::I {
            _mm512_loadu_si512(p.cast())
        }
        #[inline(always)]
        unsafe fn store_i32(p: *mut i32, v: Self::I) {
            _mm512_storeu_si512(p.cast(), v);
        }
        #[inline(always)]
        unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I {
            _mm512_add_epi32(a, b)
        }
        #[inline(always)]
        unsafe fn mul_i32(a: Self::I, b: Self::I) -> Self::I {
            _mm512_mullo_epi32(a, b)
        }
        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> Self::I {
            _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))
        }
        #[inline(always)]
        unsafe fn store_i8(p: *mut i8, v: Self::I) {
            _mm_storeu_si128(p.cast(), _mm512_cvtsepi32_epi8(v));
        }
        #[inline(always)]
        unsafe fn sum_i32(v: Self::I) -> i32 {
            let half = _mm512_extracti64x4_epi64::<1>(v);
            sum8(_mm256_add_epi32(_mm512_castsi512_si256(v), half))
        }
        #[inline(always)]
        unsafe fn dot(sum: Self::I, c: Self::C, x: *const i8) -> Self::I {
            let x = _mm512_set1_epi32(four(x));
            if VNNI {
                return _mm512_dpbusd_epi32(sum, c, x);
            }
            let pairs = _mm512_maddubs_epi16(c, x);
            _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
        #[inline(always)]
        unsafe fn dot_wide(sum: Self::I, c: Self::C, x: *const i8) -> Self::I {
            let x = _mm512_set1_epi32(four(x));
            if VNNI {
                return _mm512_dpbusd_epi32(sum, c, x);
            }
            // Sixteen-bit products: two unsigned bytes times signed ones do not fit into i16.
            let even = _mm512_and_si512(c, _mm512_set1_epi16(0xff));
            let even = _mm512_sub_epi16(even, _mm512_set1_epi16(128));
            let odd = _mm512_sub_epi16(_mm512_srli_epi16::<8>(c), _mm512_set1_epi16(128));
            let even_x = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x));
            let sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, even_x));
            _mm512_add_epi32(sum, _mm512_madd_epi16(odd, _mm512_srai_epi16::<8>(x)))
        }
    }

    #[inline(always)]
    unsafe fn both(f: impl Fn(usize) -> __m256i) -> [__m256i; 2] {
        [f(0), f(1)]
    }

    impl Integer for Avx2 {
        type C = [__m256i; 2];
        type I = [__m256i; 2];
        const WIDE_ZERO: i32 = 0;
        const TILE: usize = 4;
        const AMX: bool = false;

        #[inline(always)]
        unsafe fn codes(p: *const u8) -> Self::C {
            [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())]
        }
        #[inline(always)]
        unsafe fn store_codes(p: *mut u8, c: Self::C) {
            _mm256_storeu_si256(p.cast(), c[0]);
            _mm256_storeu_si256(p.add(32).cast(), c[1]);
        }
        #[inline(always)]
        unsafe fn field(c: Self::C, shift: u32, mask: u8) -> Self::C {
            let (shift, mask) = (_mm_cvtsi32_si128(shift as i32), _mm256_set1_epi8(mask as i8));
            both(|i| _mm256_and_si256(_mm256_srl_epi16(c[i], shift), mask))
        }
        #[inline(always)]
        unsafe fn or_shifted(c: Self::C, d: Self::C, shift: u32) -> Self::C {
            let shift = _mm_cvtsi32_si128(shift as i32);
            both(|i| _mm256_or_si256(c[i], _mm256_sll_epi16(d[i], shift)))
        }
        #[inline(always)]
        unsafe fn or_bits(c: Self::C, p: *const u8, value: u8) -> Self::C {
            let spread = _mm256_setr_epi8(
                0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3,
                3, 3, 3, 3,
            );
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let value = _mm256_set1_epi8(value as i8);
            both(|i| {
                let bits = _mm256_set1_epi32(p.add(4 * i).cast::<i32>().read_unaligned());
                let own = _mm256_and_si256(_mm256_shuffle_epi8(bits, spread), bit);
                let set = _mm256_cmpeq_epi8(own, bit);
                _mm256_or_si256(c[i], _mm256_and_si256(set, value))
            })
        }
        #[inline(always)]
        unsafe fn less(c: Self::C, d: u8) -> Self::C {
            both(|i| _mm256_sub_epi8(c[i], _mm256_set1_epi8(d as i8)))
        }
        #[inline(always)]
        unsafe fn splat_i32(v: i32) -> Self::I {
            [_mm256_set1_epi32(v); 2]
        }
        #[inline(always)]
        unsafe fn load_i32(p: *const i32) -> Self::I {
            [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())]
        }
        #[inline(always)]
        unsafe fn store_i32(p: *mut i32, v: Self::I) {
            _mm256_storeu_si256(p.cast(), v[0]);
            _mm256_storeu_si256(p.add(8).cast(), v[1]);
        }
        #[inline(always)]
        unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I {
            both(|i| _mm256_add_epi32(a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn mul_i32(a: Self::I, b: Self::I) -> Self::I {
            both(|i| _mm256_mullo_epi32(a[i], b[i]))
        }
        #[inline(always)]
        unsafe fn load_u8(p: *const u8) -> Self::I {
            both(|i| _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8 * i).cast())))
        }
        #[inline(always)]
        unsafe fn store_i8(p: *mut i8, v: Self::I) {
            // Packing works within halves of 128 bits.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v[0], v[1]));
            let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, high));
        }
        #[inline(always)]
        unsafe fn sum_i32(v: Self::I) -> i32 {
            sum8(_mm256_add_epi32(v[0], v[1]))
        }
        #[inline(always)]
        unsafe fn dot(sum: Self::I, c: Self::C, x: *const i8) -> Self::I {
            let (x, ones) = (_mm256_set1_epi32(four(x)), _mm256_set1_epi16(1));
            // Two products of at most 127 * 127 fit into i16.
            both(|i| {
                let pairs = _mm256_maddubs_epi16(c[i], x);
                _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, ones))
            })
        }
        #[inline(always)]
        unsafe fn dot_wide(sum: Self::I, c: Self::C, x: *const i8) -> Self::I {
            let (x, ones) = (_mm256_set1_epi32(four(x)), _mm256_set1_epi16(1));
            // |c - 128| times x with the sign of c - 128: two products of at most 128 * 127 fit into i16.
            both(|i| {
                let signed = _mm256_xor_si256(c[i], _mm256_set1_epi8(-128));
                let pairs =
                    _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed));
                _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, ones))
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{self, Level, Simd, Task};

    struct Probe([u8; 64], [u8; 64], [i8; 4]);

    impl Task for Probe {
        type Out = Vec<i32>;
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Vec<i32> {
            let mut out = Vec::new();
            let mut put = |v: S::I| {
                let mut lanes = [0; 16];
                S::store_i32(lanes.as_mut_ptr(), v);
                out.extend(lanes);
            };
            let (c, d) = (S::codes(self.0.as_ptr()), S::codes(self.1.as_ptr()));
            let (zero, x) = (S::splat_i32(0), self.2.as_ptr());
            for (shift, mask) in [(0, 15), (4, 15), (2, 3), (6, 3), (0, 127)] {
                put(S::dot(zero, S::field(c, shift, mask), x));
            }
            put(S::dot(
                S::splat_i32(7),
                S::or_shifted(S::field(c, 0, 15), S::field(d, 2, 3), 4),
                x,
            ));
            put(S::dot(zero, S::or_bits(S::field(c, 4, 15), self.1.as_ptr().add(3), 16), x));
            let sum: i32 = self.2.iter().map(|x| i32::from(*x)).sum();
            put(S::dot_wide(S::splat_i32((128 - S::WIDE_ZERO) * sum), c, x));
            let lanes: [i32; 16] = std::array::from_fn(|i| i as i32 * 1000 - 7000);
            let v = S::load_i32(lanes.as_ptr());
            put(S::add_i32(S::mul_i32(v, S::load_u8(self.1.as_ptr())), v));
            out
        }
    }

    #[test]
    fn every_level_computes_the_same_integers() {
        let noise = |n: usize| std::array::from_fn(|i| (i * 167 + n * 59 + i * i * 31) as u8);
        for (c, x) in [
            (noise(1), [1, -2, 3, -4]),
            (noise(2), [127, 127, 127, 127]),
            (noise(3), [-127, -127, -127, -127]),
            ([255; 64], [127; 4]),
            ([0; 64], [127; 4]),
        ] {
            let expected = simd::run(Level::Arrays, Probe(c, noise(5), x));
            let wide: i32 = (0..4).map(|i| i32::from(c[i]) * i32::from(x[i])).sum();
            assert_eq!(expected[7 * 16], wide, "codes as they are");
            for level in Level::available() {
                assert_eq!(simd::run(level, Probe(c, noise(5), x)), expected, "{level:?}");
            }
        }
    }
}
