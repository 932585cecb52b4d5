//! AVX2 and AVX-512.

use std::arch::x86_64::*;

use super::{EXPAND, Simd, Task};

#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt,bmi1"
)]
pub(super) unsafe fn with_vnni<T: Task>(task: T) -> T::Out {
    task.run::<Avx512<true>>()
}

#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi2,avx2,fma,f16c,popcnt,bmi1"
)]
pub(super) unsafe fn with_expanding<T: Task>(task: T) -> T::Out {
    task.run::<Avx512<true, true>>()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt,bmi1")]
pub(super) unsafe fn with_avx512<T: Task>(task: T) -> T::Out {
    task.run::<Avx512<false>>()
}

#[target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")]
pub(super) unsafe fn with_avx2<T: Task>(task: T) -> T::Out {
    task.run::<Avx2>()
}

/// The byte vectors are the same for both.
macro_rules! common {
    () => {
        type B = __m128i;

        #[inline(always)]
        unsafe fn bytes(p: *const u8) -> Self::B {
            _mm_loadu_si128(p.cast())
        }
        #[inline(always)]
        unsafe fn and(a: Self::B, mask: u8) -> Self::B {
            _mm_and_si128(a, _mm_set1_epi8(mask as i8))
        }
        #[inline(always)]
        unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
            _mm_or_si128(a, b)
        }
        // Bytes are shifted as 16-bit lanes; what crosses from the neighbour is masked away.
        #[inline(always)]
        unsafe fn shr(a: Self::B, n: u32) -> Self::B {
            let shifted = _mm_srl_epi16(a, _mm_cvtsi32_si128(n as i32));
            _mm_and_si128(shifted, _mm_set1_epi8((0xff_u8 >> n) as i8))
        }
        #[inline(always)]
        unsafe fn shl(a: Self::B, n: u32) -> Self::B {
            let shifted = _mm_sll_epi16(a, _mm_cvtsi32_si128(n as i32));
            _mm_and_si128(shifted, _mm_set1_epi8((0xff_u8 << n) as i8))
        }
    };
}

#[inline(always)]
unsafe fn largest8(v: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

#[inline(always)]
unsafe fn sum8(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// With or without products of bytes.
#[derive(Clone, Copy)]
pub struct Avx512<const VNNI: bool, const EXPANDS: bool = false>;

impl<const VNNI: bool, const EXPANDS: bool> Simd for Avx512<VNNI, EXPANDS> {
    type F = __m512;
    common!();

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        _mm512_set1_ps(v)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        _mm512_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn transpose(rows: [Self::F; 16]) -> [Self::F; 16] {
        // Pairs of rows, then rows by four: vector `4 g + c` holds column `4 l + c` of rows `4 g ..` in its
        // quarter `l`. Then quarters change places.
        let mut fours = rows;
        for (rows, out) in rows.chunks_exact(4).zip(fours.chunks_exact_mut(4)) {
            let pairs = [
                _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1])),
                _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1])),
                _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3])),
                _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3])),
            ];
            out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[2]));
            out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[2]));
            out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[1], pairs[3]));
            out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[1], pairs[3]));
        }
        let mut out = fours;
        for c in 0..4 {
            let [a, b, d, e] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            let (even, odd) =
                (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            let (evens, odds) =
                (_mm512_shuffle_f32x4::<0x88>(d, e), _mm512_shuffle_f32x4::<0xdd>(d, e));
            out[c] = _mm512_shuffle_f32x4::<0x88>(even, evens);
            out[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd, odds);
            out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(even, evens);
            out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(odd, odds);
        }
        out
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn sum(v: Self::F) -> f32 {
        sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)))
    }
    #[inline(always)]
    unsafe fn first(v: Self::F) -> f32 {
        _mm512_cvtss_f32(v)
    }
    #[inline(always)]
    unsafe fn fused(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn from_i32(v: Self::I) -> Self::F {
        _mm512_cvtepi32_ps(v)
    }
    #[inline(always)]
    unsafe fn nearest(v: Self::F) -> Self::I {
        _mm512_cvtps_epi32(v)
    }
    #[inline(always)]
    unsafe fn max_abs(a: Self::F, v: Self::F) -> Self::F {
        // Where one is not a number the second is given.
        _mm512_max_ps(_mm512_abs_ps(v), a)
    }
    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        let half = _mm512_extractf32x8_ps::<1>(v);
        largest8(_mm256_max_ps(_mm512_castps512_ps256(v), half))
    }
    // Spread first: a single half would be inserted into a register that a slower instruction of the
    // iteration before still has to write.
    #[inline(always)]
    unsafe fn splat_f16(bits: u16) -> Self::F {
        _mm512_cvtph_ps(_mm256_set1_epi16(bits as i16))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::F {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }
    #[inline(always)]
    unsafe fn unsigned(a: Self::B) -> Self::F {
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(a))
    }
    #[inline(always)]
    unsafe fn signed(a: Self::B) -> Self::F {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a))
    }
    #[inline(always)]
    unsafe fn fields(lo: u32, hi: u32, bits: u32) -> Self::F {
        let words = _mm512_mask_set1_epi32(_mm512_set1_epi32(lo as i32), 0xff00, hi as i32);
        let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
        let shifts = _mm512_mullo_epi32(lane, _mm512_set1_epi32(bits as i32));
        let mask = _mm512_set1_epi32((1 << bits) - 1);
        _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(words, shifts), mask))
    }
    #[inline(always)]
    unsafe fn masked(mask: u16, v: Self::F) -> Self::F {
        _mm512_maskz_mov_ps(mask, v)
    }
    #[inline(always)]
    unsafe fn expand(mask: u16, v: Self::F) -> Self::F {
        _mm512_maskz_expand_ps(mask, v)
    }
}

#[derive(Clone, Copy)]
pub struct Avx2;

#[inline(always)]
unsafe fn masked8(mask: u8, v: __m256) -> __m256 {
    let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let set = _mm256_and_si256(_mm256_set1_epi32(i32::from(mask)), bit);
    _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)))
}

#[inline(always)]
unsafe fn fields8(word: u32, bits: u32) -> __m256 {
    let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let shifts = _mm256_mullo_epi32(lane, _mm256_set1_epi32(bits as i32));
    let mask = _mm256_set1_epi32((1 << bits) - 1);
    let words = _mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts);
    _mm256_cvtepi32_ps(_mm256_and_si256(words, mask))
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    common!();

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        [_mm256_set1_ps(v); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        _mm256_storeu_ps(p, v[0]);
        _mm256_storeu_ps(p.add(8), v[1]);
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }
    #[inline(always)]
    unsafe fn sum(v: Self::F) -> f32 {
        sum8(_mm256_add_ps(v[0], v[1]))
    }
    #[inline(always)]
    unsafe fn first(v: Self::F) -> f32 {
        _mm256_cvtss_f32(v[0])
    }
    #[inline(always)]
    unsafe fn fused(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        Self::mul_add(a, b, c)
    }
    #[inline(always)]
    unsafe fn from_i32(v: Self::I) -> Self::F {
        [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])]
    }
    #[inline(always)]
    unsafe fn nearest(v: Self::F) -> Self::I {
        [_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])]
    }
    #[inline(always)]
    unsafe fn max_abs(a: Self::F, v: Self::F) -> Self::F {
        let sign = _mm256_set1_ps(-0.0);
        // Where one is not a number the second is given.
        let one = |i: usize| _mm256_max_ps(_mm256_andnot_ps(sign, v[i]), a[i]);
        [one(0), one(1)]
    }
    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        largest8(_mm256_max_ps(v[0], v[1]))
    }
    #[inline(always)]
    unsafe fn splat_f16(bits: u16) -> Self::F {
        [_mm256_cvtph_ps(_mm_set1_epi16(bits as i16)); 2]
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        [
            _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())),
        ]
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::F {
        let lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        let hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(16).cast()));
        [
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(lo)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(hi)),
        ]
    }
    #[inline(always)]
    unsafe fn unsigned(a: Self::B) -> Self::F {
        [
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(a)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(a))),
        ]
    }
    #[inline(always)]
    unsafe fn signed(a: Self::B) -> Self::F {
        [
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(a))),
        ]
    }
    #[inline(always)]
    unsafe fn fields(lo: u32, hi: u32, bits: u32) -> Self::F {
        [fields8(lo, bits), fields8(hi, bits)]
    }
    #[inline(always)]
    unsafe fn masked(mask: u16, v: Self::F) -> Self::F {
        [masked8(mask as u8, v[0]), masked8((mask >> 8) as u8, v[1])]
    }
    #[inline(always)]
    unsafe fn expand(mask: u16, v: Self::F) -> Self::F {
        // The upper half starts inside the 16 elements, so it is read back from memory.
        let mut all = [0.0_f32; 16];
        Self::store(all.as_mut_ptr(), v);
        let (low, high) = (mask as u8, (mask >> 8) as u8);
        let upper = _mm256_loadu_ps(all.as_ptr().add(low.count_ones() as usize));
        let place = |mask: u8| {
            let indices = _mm_loadl_epi64(EXPAND[mask as usize].as_ptr().cast());
            _mm256_cvtepu8_epi32(indices)
        };
        [
            masked8(low, _mm256_permutevar8x32_ps(v[0], place(low))),
            masked8(high, _mm256_permutevar8x32_ps(upper, place(high))),
        ]
    }
}
