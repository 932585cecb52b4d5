//! NEON: a vector of 16 f32 is four registers. Compiled and tested under emulation; nothing here was timed.

use std::arch::aarch64::*;

use super::{EXPAND, Simd, Task};

#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn with_dot<T: Task>(task: T) -> T::Out {
    task.run::<Neon<true>>()
}

#[target_feature(enable = "neon")]
pub(super) unsafe fn with_neon<T: Task>(task: T) -> T::Out {
    task.run::<Neon<false>>()
}

/// With or without dot products of bytes.
#[derive(Clone, Copy)]
pub struct Neon<const DOT: bool>;

/// Four registers, one after the other.
#[inline(always)]
pub(in super::super) fn each<T>(f: impl Fn(usize) -> T) -> [T; 4] {
    [f(0), f(1), f(2), f(3)]
}

/// 16 bytes widened to 16 u32.
#[inline(always)]
pub(in super::super) unsafe fn widen(a: uint8x16_t) -> [uint32x4_t; 4] {
    let (low, high) = (vmovl_u8(vget_low_u8(a)), vmovl_high_u8(a));
    [
        vmovl_u16(vget_low_u16(low)),
        vmovl_high_u16(low),
        vmovl_u16(vget_low_u16(high)),
        vmovl_high_u16(high),
    ]
}

/// The numbers 0 to 3, or what `f` makes of them, in the lanes of register `i` of four.
#[inline(always)]
unsafe fn lanes(i: usize, f: impl Fn(u32) -> u32) -> uint32x4_t {
    vld1q_u32(each(|lane| f(4 * i as u32 + lane as u32)).as_ptr())
}

impl<const DOT: bool> Simd for Neon<DOT> {
    type F = [float32x4_t; 4];
    type B = uint8x16_t;

    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        [vdupq_n_f32(v); 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        each(|i| vld1q_f32(p.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        for (i, v) in v.into_iter().enumerate() {
            vst1q_f32(p.add(4 * i), v);
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        each(|i| vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        each(|i| vsubq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        each(|i| vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(|i| vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn sum(v: Self::F) -> f32 {
        let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
        vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
    }
    #[inline(always)]
    unsafe fn first(v: Self::F) -> f32 {
        vgetq_lane_f32::<0>(v[0])
    }
    #[inline(always)]
    unsafe fn fused(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        Self::mul_add(a, b, c)
    }
    #[inline(always)]
    unsafe fn from_i32(v: Self::I) -> Self::F {
        each(|i| vcvtq_f32_s32(v[i]))
    }
    #[inline(always)]
    unsafe fn nearest(v: Self::F) -> Self::I {
        each(|i| vcvtnq_s32_f32(v[i]))
    }
    #[inline(always)]
    unsafe fn max_abs(a: Self::F, v: Self::F) -> Self::F {
        each(|i| vmaxnmq_f32(a[i], vabsq_f32(v[i])))
    }
    #[inline(always)]
    unsafe fn largest(v: Self::F) -> f32 {
        vmaxvq_f32(vmaxq_f32(vmaxq_f32(v[0], v[1]), vmaxq_f32(v[2], v[3])))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        each(|i| vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p.add(8 * i)))))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::F {
        each(|i| {
            let wide = vmovl_u16(vreinterpret_u16_u8(vld1_u8(p.add(8 * i))));
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(wide))
        })
    }
    #[inline(always)]
    unsafe fn splat_f16(bits: u16) -> Self::F {
        [vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))); 4]
    }
    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> Self::B {
        vld1q_u8(p)
    }
    #[inline(always)]
    unsafe fn and(a: Self::B, mask: u8) -> Self::B {
        vandq_u8(a, vdupq_n_u8(mask))
    }
    #[inline(always)]
    unsafe fn or(a: Self::B, b: Self::B) -> Self::B {
        vorrq_u8(a, b)
    }
    // A shift to the left by less than nothing is one to the right.
    #[inline(always)]
    unsafe fn shr(a: Self::B, n: u32) -> Self::B {
        vshlq_u8(a, vdupq_n_s8(-(n as i8)))
    }
    #[inline(always)]
    unsafe fn shl(a: Self::B, n: u32) -> Self::B {
        vshlq_u8(a, vdupq_n_s8(n as i8))
    }
    #[inline(always)]
    unsafe fn unsigned(a: Self::B) -> Self::F {
        let wide = widen(a);
        each(|i| vcvtq_f32_u32(wide[i]))
    }
    #[inline(always)]
    unsafe fn signed(a: Self::B) -> Self::F {
        let a = vreinterpretq_s8_u8(a);
        let (low, high) = (vmovl_s8(vget_low_s8(a)), vmovl_high_s8(a));
        [
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
            vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
            vcvtq_f32_s32(vmovl_high_s16(high)),
        ]
    }
    #[inline(always)]
    unsafe fn fields(lo: u32, hi: u32, bits: u32) -> Self::F {
        let mask = vdupq_n_u32((1 << bits) - 1);
        each(|i| {
            let words = vdupq_n_u32(if i < 2 { lo } else { hi });
            let shifts = vmulq_n_s32(vreinterpretq_s32_u32(lanes(i % 2, |n| n)), -(bits as i32));
            vcvtq_f32_u32(vandq_u32(vshlq_u32(words, shifts), mask))
        })
    }
    #[inline(always)]
    unsafe fn lookup(table: Self::F, lo: u32, hi: u32) -> Self::F {
        let [a, b, c, d] = table;
        let table = uint8x16x4_t(
            vreinterpretq_u8_f32(a),
            vreinterpretq_u8_f32(b),
            vreinterpretq_u8_f32(c),
            vreinterpretq_u8_f32(d),
        );
        each(|i| {
            let words = vdupq_n_u32(if i < 2 { lo } else { hi });
            let shifts = vmulq_n_s32(vreinterpretq_s32_u32(lanes(i % 2, |n| n)), -4);
            let index = vandq_u32(vshlq_u32(words, shifts), vdupq_n_u32(15));
            // The four bytes of each element.
            let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), index, 0x0404_0404);
            vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
        })
    }
    #[inline(always)]
    unsafe fn masked(mask: u16, v: Self::F) -> Self::F {
        let mask = vdupq_n_u32(mask.into());
        each(|i| {
            let set = vtstq_u32(mask, lanes(i, |n| 1 << n));
            vreinterpretq_f32_u32(vandq_u32(set, vreinterpretq_u32_f32(v[i])))
        })
    }
    #[inline(always)]
    unsafe fn expand(mask: u16, v: Self::F) -> Self::F {
        let (low, high) = (mask as u8, (mask >> 8) as u8);
        // Which element each lane takes; more than there are where it takes none.
        let places = vcombine_u8(
            vld1_u8(EXPAND[low as usize].as_ptr()),
            vadd_u8(vld1_u8(EXPAND[high as usize].as_ptr()), vdup_n_u8(low.count_ones() as u8)),
        );
        // Their bytes, which are looked up in all four registers: zeros beyond those.
        let places = widen(vshlq_n_u8::<2>(places));
        let v = v.map(|v| vreinterpretq_u8_f32(v));
        let table = uint8x16x4_t(v[0], v[1], v[2], v[3]);
        each(|i| {
            let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), places[i], 0x0101_0101);
            vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
        })
    }
}
