//! Vectors of 16 f32 and of 16 bytes over AVX-512, AVX2 and plain arrays, and the dispatch between
//! them at run time.
//!
//! Kernels are written once, generic over [`Simd`]. The three implementations add in the same order;
//! AVX-512 and AVX2 agree to the bit, arrays differ in that they round between multiply and add.
//! Arrays of 16 are also what NEON uses: the compiler turns their loops into vector code there.

// Every function here has the same two preconditions, stated at `Simd`.
#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc)]

use std::sync::OnceLock;

use half::{bf16, f16};

use super::integer::Integer;

/// Instruction sets, from least to most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Arrays,
    Avx2,
    Avx512,
    /// AVX-512 with products of bytes.
    Vnni,
}

impl Level {
    /// The levels this processor has.
    pub fn available() -> impl Iterator<Item = Self> {
        [Self::Arrays, Self::Avx2, Self::Avx512, Self::Vnni]
            .into_iter()
            .filter(|l| *l <= Self::best())
    }

    /// The best level of this processor.
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(detect)
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("bmi1");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512, is_x86_feature_detected!("avx512vnni")) {
        (true, true, true) => Level::Vnni,
        (true, true, false) => Level::Avx512,
        (true, false, _) => Level::Avx2,
        _ => Level::Arrays,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Arrays
}

/// A kernel: `run` is compiled once for each instruction set.
pub trait Task {
    type Out;
    /// Implementations are `#[inline(always)]`, or the instructions do not reach them.
    ///
    /// # Safety
    /// The processor has the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

/// Runs a task with the instructions of `level`, which must be available.
#[inline]
pub fn run<T: Task>(level: Level, task: T) -> T::Out {
    assert!(level <= Level::best(), "instructions that this processor lacks");
    match level {
        // SAFETY: the level was detected on this processor.
        #[cfg(target_arch = "x86_64")]
        Level::Vnni => unsafe { x86::with_vnni(task) },
        // SAFETY: the level was detected on this processor.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::with_avx512(task) },
        // SAFETY: the level was detected on this processor.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::with_avx2(task) },
        // SAFETY: arrays need nothing.
        _ => unsafe { task.run::<Arrays>() },
    }
}

/// 16 f32 (`F`) and 16 bytes (`B`).
///
/// # Safety
/// All functions ask that the processor has the instructions, and that pointers are valid for 16
/// elements (`load_f16` and `load_bf16`: 32 bytes), aligned or not.
pub trait Simd: Integer {
    type F: Copy;
    type B: Copy;

    unsafe fn splat(v: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Halves are added first: lane i to i + 8, then to i + 4, i + 2, i + 1.
    unsafe fn sum(v: Self::F) -> f32;

    /// Lane 0.
    unsafe fn first(v: Self::F) -> f32;

    /// `a * b + c` rounded once, at every level.
    unsafe fn fused(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn from_i32(v: Self::I) -> Self::F;
    /// The nearest integers, ties to even; of no meaning beyond i32.
    unsafe fn nearest(v: Self::F) -> Self::I;
    /// `max(a, |v|)`; `a` where `v` is not a number.
    unsafe fn max_abs(a: Self::F, v: Self::F) -> Self::F;
    /// The largest lane.
    unsafe fn largest(v: Self::F) -> f32;

    unsafe fn load_f16(p: *const u8) -> Self::F;
    unsafe fn load_bf16(p: *const u8) -> Self::F;
    /// One f16 in every lane.
    unsafe fn splat_f16(bits: u16) -> Self::F;

    unsafe fn bytes(p: *const u8) -> Self::B;
    unsafe fn and(a: Self::B, mask: u8) -> Self::B;
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B;
    /// Each byte shifted right by `n < 8`.
    unsafe fn shr(a: Self::B, n: u32) -> Self::B;
    /// Each byte shifted left by `n < 8`.
    unsafe fn shl(a: Self::B, n: u32) -> Self::B;
    unsafe fn unsigned(a: Self::B) -> Self::F;
    unsafe fn signed(a: Self::B) -> Self::F;

    /// Fields of `bits <= 4` bits as f32: eight from the low end of `lo`, then eight from `hi`.
    unsafe fn fields(lo: u32, hi: u32, bits: u32) -> Self::F;
    /// `v` where the mask's bit is set, else 0.
    unsafe fn masked(mask: u16, v: Self::F) -> Self::F;
    /// The leading lanes of `v` moved to where the mask's bits are set, in order; 0 elsewhere.
    unsafe fn expand(mask: u16, v: Self::F) -> Self::F;
}

/// Plain arrays: the fallback, and what the vector code is tested against.
#[derive(Clone, Copy)]
pub struct Arrays;

impl Simd for Arrays {
    type F = [f32; 16];
    type B = [u8; 16];

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        [v; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        p.cast::<Self::F>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        p.cast::<Self::F>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn sum(v: Self::F) -> f32 {
        let eight: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
    #[inline(always)]
    unsafe fn first(v: Self::F) -> f32 {
        v[0]
    }
    #[inline(always)]
    unsafe fn fused(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn from_i32(v: Self::I) -> Self::F {
        v.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn nearest(v: Self::F) -> Self::I {
        v.map(|v| v.round_ties_even() as i32)
    }
    #[inline(always)]
    unsafe fn max_abs(a: Self::F, v: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].max(v[i].abs()))
    }
    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        v.into_iter().fold(v[0], f32::max)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        let bits = p.cast::<[u16; 16]>().read_unaligned();
        std::array::from_fn(|i| f16::from_bits(bits[i]).to_f32_const())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::F {
        let bits = p.cast::<[u16; 16]>().read_unaligned();
        std::array::from_fn(|i| bf16::from_bits(bits[i]).to_f32_const())
    }
    #[inline(always)]
    unsafe fn splat_f16(bits: u16) -> Self::F {
        [f16::from_bits(bits).to_f32_const(); 16]
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> Self::B {
        p.cast::<Self::B>().read()
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, mask: u8) -> Self::B {
        a.map(|b| b & mask)
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn shr(a: Self::B, n: u32) -> Self::B {
        a.map(|b| b >> n)
    }
    #[inline(always)]
    unsafe fn shl(a: Self::B, n: u32) -> Self::B {
        a.map(|b| b << n)
    }
    #[inline(always)]
    unsafe fn unsigned(a: Self::B) -> Self::F {
        a.map(f32::from)
    }
    #[inline(always)]
    unsafe fn signed(a: Self::B) -> Self::F {
        a.map(|b| f32::from(b as i8))
    }
    #[inline(always)]
    unsafe fn fields(lo: u32, hi: u32, bits: u32) -> Self::F {
        let mask = (1 << bits) - 1;
        std::array::from_fn(|i| {
            let word = if i < 8 { lo } else { hi };
            ((word >> (bits * (i as u32 % 8))) & mask) as f32
        })
    }
    #[inline(always)]
    unsafe fn masked(mask: u16, v: Self::F) -> Self::F {
        std::array::from_fn(|i| if mask >> i & 1 == 1 { v[i] } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn expand(mask: u16, v: Self::F) -> Self::F {
        let mut next = 0;
        std::array::from_fn(|i| {
            let set = (mask >> i & 1) as usize;
            let out = if set == 1 { v[next] } else { 0.0 };
            next += set;
            out
        })
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::{Simd, Task};

    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt,bmi1"
    )]
    pub(super) unsafe fn with_vnni<T: Task>(task: T) -> T::Out {
        task.run::<Avx512<true>>()
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
    pub struct Avx512<const VNNI: bool>;

    impl<const VNNI: bool> Simd for Avx512<VNNI> {
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

    /// For each mask of eight lanes: which leading element each set lane takes.
    static EXPAND: [[u8; 8]; 256] = {
        let mut table = [[0; 8]; 256];
        let mut mask = 0;
        while mask < 256 {
            let (mut lane, mut next) = (0, 0);
            while lane < 8 {
                if mask >> lane & 1 == 1 {
                    table[mask][lane] = next;
                    next += 1;
                }
                lane += 1;
            }
            mask += 1;
        }
        table
    };

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
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Probe;

    impl Task for Probe {
        type Out = Vec<f32>;
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Vec<f32> {
            let mut out = Vec::new();
            let mut put = |v: S::F| {
                let mut lanes = [0.0; 16];
                S::store(lanes.as_mut_ptr(), v);
                out.extend(lanes);
            };
            let x: [f32; 16] = std::array::from_fn(|i| i as f32 + 1.0);
            let halves: [u16; 16] = std::array::from_fn(|i| (i * 4099) as u16 & 0xfbff);
            let bytes: [u8; 16] = std::array::from_fn(|i| (i * 37 + 11) as u8);
            let v = S::load(x.as_ptr());
            put(S::splat(S::sum(v)));
            put(S::mul_add(v, S::sub(v, S::splat(3.0)), S::add(v, S::mul(v, v))));
            put(S::load_f16(halves.as_ptr().cast()));
            put(S::load_bf16(halves.map(|h| h & 0x3fff).as_ptr().cast()));
            put(S::splat_f16(0x0001));
            let b = S::bytes(bytes.as_ptr());
            put(S::unsigned(b));
            put(S::signed(b));
            for n in [0, 1, 3, 7] {
                put(S::unsigned(S::or(S::and(S::shr(b, n), 0x35), S::shl(b, n))));
            }
            for bits in [2, 3, 4] {
                put(S::fields(0x9e37_79b9, 0x85eb_ca6b, bits));
            }
            for mask in [0, 0xffff, 0x8001, 0x00ff, 0xa53c, 0xfffe] {
                put(S::masked(mask, v));
                put(S::expand(mask, v));
            }
            out
        }
    }

    #[test]
    fn every_level_computes_the_same_lanes() {
        let expected = run(Level::Arrays, Probe);
        assert_eq!(expected[0], 136.0);
        for level in Level::available() {
            assert_eq!(run(level, Probe), expected, "{level:?}");
        }
    }

    #[test]
    fn expand_places_leading_lanes() {
        // SAFETY: arrays need no instructions.
        let out =
            unsafe { Arrays::expand(0b1010_0000_0000_0010, std::array::from_fn(|i| i as f32)) };
        let mut expected = [0.0; 16];
        (expected[13], expected[15]) = (1.0, 2.0);
        assert_eq!(out, expected);
    }
}
