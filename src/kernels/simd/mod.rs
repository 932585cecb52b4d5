//! Vectors of 16 f32 and of 16 bytes over AVX-512, AVX2, NEON and plain arrays, and the dispatch between
//! them at run time.
//!
//! Kernels are written once, generic over [`Simd`]. The implementations add in the same order; AVX-512,
//! AVX2 and NEON agree to the bit, arrays differ in that they round between multiply and add.

// Every function here has the same two preconditions, stated at `Simd`.
#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc)]

#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

use std::sync::OnceLock;

use half::{bf16, f16};

use super::integer::Integer;

/// Instruction sets of the architecture, from least to most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Arrays,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with products of bytes.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON with dot products of bytes.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Level {
    /// The levels this processor has.
    pub fn available() -> impl Iterator<Item = Self> {
        [
            Self::Arrays,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Vnni,
            #[cfg(target_arch = "aarch64")]
            Self::Neon,
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot,
        ]
        .into_iter()
        .filter(|l| *l <= Self::best())
    }

    /// What the instructions are called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Arrays => "none",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => "AVX-512 VNNI",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "NEON",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => "NEON with dot products",
        }
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

#[cfg(target_arch = "aarch64")]
fn detect() -> Level {
    use std::arch::is_aarch64_feature_detected;
    match (is_aarch64_feature_detected!("neon"), is_aarch64_feature_detected!("dotprod")) {
        (true, true) => Level::NeonDot,
        (true, false) => Level::Neon,
        _ => Level::Arrays,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
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
        // SAFETY: the level was detected on this processor.
        #[cfg(target_arch = "aarch64")]
        Level::NeonDot => unsafe { neon::with_dot(task) },
        // SAFETY: the level was detected on this processor.
        #[cfg(target_arch = "aarch64")]
        Level::Neon => unsafe { neon::with_neon(task) },
        // SAFETY: arrays need nothing.
        Level::Arrays => unsafe { task.run::<Arrays>() },
    }
}

/// The same, where the processor has it with an instruction that moves bytes to the places of a mask beside those
/// of the highest level: what few kernels use is no level of its own, for which all others were compiled too.
#[inline]
pub fn run_expanding<T: Task>(level: Level, task: T) -> T::Out {
    #[cfg(target_arch = "x86_64")]
    if level == Level::Vnni && level <= Level::best() && is_x86_feature_detected!("avx512vbmi2") {
        // SAFETY: the level and the extension were detected on this processor.
        return unsafe { x86::with_expanding(task) };
    }
    run(level, task)
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

    /// Lane `i` of vector `j` becomes lane `j` of vector `i`.
    #[inline(always)]
    unsafe fn transpose(rows: [Self::F; 16]) -> [Self::F; 16] {
        let mut block = [[0.0; 16]; 16];
        for (out, row) in block.iter_mut().zip(rows) {
            Self::store(out.as_mut_ptr(), row);
        }
        std::array::from_fn(|i| {
            let column: [f32; 16] = std::array::from_fn(|j| block[j][i]);
            Self::load(column.as_ptr())
        })
    }

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

/// Where no element belongs: a place beyond all of them.
const NONE: u8 = 32;

/// For each mask of eight lanes: which leading element each set lane takes.
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
static EXPAND: [[u8; 8]; 256] = {
    let mut table = [[NONE; 8]; 256];
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
