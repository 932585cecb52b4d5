//! AVX2 and AVX-512, with products of bytes or with those of pairs.

use std::arch::x86_64::*;

use super::super::simd::x86::{Avx2, Avx512};
use super::{EXPAND, Integer};

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

/// `base`, but where the mask's bit is set the next field of the bytes at `p`; 32 bytes are valid there.
#[inline(always)]
unsafe fn expand32(base: __m256i, mask: u32, p: *const u8, shift: u32, field: u8) -> __m256i {
    let masks = mask.to_le_bytes().map(usize::from);
    let mut at = p;
    // Eight bytes at a time; where they are taken from, and which.
    let next = masks.map(|mask| {
        let eight = at.cast::<i64>().read_unaligned();
        at = at.add(mask.count_ones() as usize);
        eight
    });
    let place = |i: usize| i64::from_le_bytes(EXPAND[masks[i]]);
    // The second eight of each half, which cannot carry: none is beyond 0x87.
    const SECOND: i64 = 0x0808_0808_0808_0808;
    let places = _mm256_setr_epi64x(place(0), place(1) | SECOND, place(2), place(3) | SECOND);
    let bytes = _mm256_setr_epi64x(next[0], next[1], next[2], next[3]);
    let bytes = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
    let bytes = _mm256_and_si256(bytes, _mm256_set1_epi8(field as i8));
    // The highest bit of a place says that there is none.
    _mm256_blendv_epi8(_mm256_shuffle_epi8(bytes, places), base, places)
}

impl<const VNNI: bool, const EXPANDS: bool> Integer for Avx512<VNNI, EXPANDS> {
    type C = __m512i;
    type I = __m512i;
    const WIDE_ZERO: i32 = if VNNI { 128 } else { 0 };
    const TILE: usize = 8;
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
    unsafe fn splat_codes(v: u8) -> Self::C {
        _mm512_set1_epi8(v as i8)
    }
    #[inline(always)]
    unsafe fn spread(p: *const u8) -> Self::C {
        let bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
        let lane = |i: i32| i * 0x0101_0101;
        let place = _mm512_setr_epi32(
            lane(0),
            lane(1),
            lane(2),
            lane(3),
            lane(4),
            lane(5),
            lane(6),
            lane(7),
            lane(8),
            lane(9),
            lane(10),
            lane(11),
            lane(12),
            lane(13),
            lane(14),
            lane(15),
        );
        _mm512_shuffle_epi8(bytes, place)
    }
    #[inline(always)]
    unsafe fn expand_codes(
        base: Self::C,
        mask: u64,
        p: *const u8,
        shift: u32,
        field: u8,
    ) -> Self::C {
        if EXPANDS {
            let bytes = _mm512_loadu_si512(p.cast());
            let bytes = if field == 255 { bytes } else { Self::field(bytes, shift, field) };
            return _mm512_mask_expand_epi8(base, mask, bytes);
        }
        let (low, high) = (mask as u32, (mask >> 32) as u32);
        let second = p.add(low.count_ones() as usize);
        let low = expand32(_mm512_castsi512_si256(base), low, p, shift, field);
        let high = expand32(_mm512_extracti64x4_epi64::<1>(base), high, second, shift, field);
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
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
    unsafe fn splat_codes(v: u8) -> Self::C {
        [_mm256_set1_epi8(v as i8); 2]
    }
    #[inline(always)]
    unsafe fn spread(p: *const u8) -> Self::C {
        let bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
        let lane = |i: i32| i * 0x0101_0101;
        let first = _mm256_setr_epi32(
            lane(0),
            lane(1),
            lane(2),
            lane(3),
            lane(4),
            lane(5),
            lane(6),
            lane(7),
        );
        let second = _mm256_add_epi8(first, _mm256_set1_epi8(8));
        [_mm256_shuffle_epi8(bytes, first), _mm256_shuffle_epi8(bytes, second)]
    }
    #[inline(always)]
    unsafe fn expand_codes(
        base: Self::C,
        mask: u64,
        p: *const u8,
        shift: u32,
        field: u8,
    ) -> Self::C {
        let (low, high) = (mask as u32, (mask >> 32) as u32);
        let second = p.add(low.count_ones() as usize);
        [expand32(base[0], low, p, shift, field), expand32(base[1], high, second, shift, field)]
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
            0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3,
            3, 3, 3,
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
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed));
            _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, ones))
        })
    }
}
