//! NEON, with the dot product of its extension or with widening products.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::simd::neon::{Neon, each, widen};
use super::{EXPAND, Integer};

/// Adds to each lane the product of its four bytes of `a` and of `b`, both signed; no byte of `b` is -128.
///
/// # Safety
/// The processor has the dot product extension if `DOT`.
#[inline(always)]
pub(in super::super) unsafe fn dot<const DOT: bool>(
    sum: int32x4_t,
    a: int8x16_t,
    b: int8x16_t,
) -> int32x4_t {
    if DOT {
        let mut sum = sum;
        // There is no stable intrinsic yet. The extension is named here as well, so that the function that this
        // ends up in need not have been compiled for it.
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
        return sum;
    }
    // Two products of at most 128 * 127 fit into i16.
    let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(a, b)))
}

/// Four bytes, in every lane.
#[inline(always)]
pub(in super::super) unsafe fn four(x: *const i8) -> int8x16_t {
    vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned()))
}

/// Unsigned bytes less 128.
#[inline(always)]
pub(in super::super) unsafe fn less_128(c: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(veorq_u8(c, vdupq_n_u8(128)))
}

impl<const DOT: bool> Integer for Neon<DOT> {
    type C = [uint8x16_t; 4];
    type I = [int32x4_t; 4];
    const WIDE_ZERO: i32 = 0;
    const TILE: usize = 4;
    const AMX: bool = false;

    #[inline(always)]
    unsafe fn codes(p: *const u8) -> Self::C {
        each(|i| vld1q_u8(p.add(16 * i)))
    }
    #[inline(always)]
    unsafe fn store_codes(p: *mut u8, c: Self::C) {
        for (i, c) in c.into_iter().enumerate() {
            vst1q_u8(p.add(16 * i), c);
        }
    }
    #[inline(always)]
    unsafe fn splat_codes(v: u8) -> Self::C {
        [vdupq_n_u8(v); 4]
    }
    #[inline(always)]
    unsafe fn spread(p: *const u8) -> Self::C {
        let bytes = vld1q_u8(p);
        let first =
            vcombine_u8(vcreate_u8(0x0101_0101_0000_0000), vcreate_u8(0x0303_0303_0202_0202));
        each(|i| vqtbl1q_u8(bytes, vaddq_u8(first, vdupq_n_u8(4 * i as u8))))
    }
    #[inline(always)]
    unsafe fn expand_codes(
        base: Self::C,
        mask: u64,
        p: *const u8,
        shift: u32,
        field: u8,
    ) -> Self::C {
        let (shift, field) = (vdupq_n_s8(-(shift as i8)), vdupq_n_u8(field));
        let masks = mask.to_le_bytes();
        let (mut at, mut out) = (p, base);
        for (i, out) in out.iter_mut().enumerate() {
            let (low, high) = (masks[2 * i], masks[2 * i + 1]);
            let second = at.add(low.count_ones() as usize);
            let bytes = vcombine_u8(vld1_u8(at), vld1_u8(second));
            at = second.add(high.count_ones() as usize);
            let bytes = vandq_u8(vshlq_u8(bytes, shift), field);
            let (low, high) = (&EXPAND[usize::from(low)], &EXPAND[usize::from(high)]);
            let high = vadd_u8(vld1_u8(high.as_ptr()), vdup_n_u8(8));
            // Places beyond the table leave the base as it is.
            *out = vqtbx1q_u8(*out, bytes, vcombine_u8(vld1_u8(low.as_ptr()), high));
        }
        out
    }
    #[inline(always)]
    unsafe fn field(c: Self::C, shift: u32, mask: u8) -> Self::C {
        // A shift to the left by less than nothing is one to the right.
        let (shift, mask) = (vdupq_n_s8(-(shift as i8)), vdupq_n_u8(mask));
        each(|i| vandq_u8(vshlq_u8(c[i], shift), mask))
    }
    #[inline(always)]
    unsafe fn or_shifted(c: Self::C, d: Self::C, shift: u32) -> Self::C {
        let shift = vdupq_n_s8(shift as i8);
        each(|i| vorrq_u8(c[i], vshlq_u8(d[i], shift)))
    }
    #[inline(always)]
    unsafe fn or_bits(c: Self::C, p: *const u8, value: u8) -> Self::C {
        let bits = vcreate_u8(0x8040_2010_0804_0201);
        let (bits, value) = (vcombine_u8(bits, bits), vdupq_n_u8(value));
        each(|i| {
            let own = vcombine_u8(vdup_n_u8(*p.add(2 * i)), vdup_n_u8(*p.add(2 * i + 1)));
            vorrq_u8(c[i], vandq_u8(vtstq_u8(own, bits), value))
        })
    }
    #[inline(always)]
    unsafe fn less(c: Self::C, d: u8) -> Self::C {
        each(|i| vsubq_u8(c[i], vdupq_n_u8(d)))
    }
    #[inline(always)]
    unsafe fn splat_i32(v: i32) -> Self::I {
        [vdupq_n_s32(v); 4]
    }
    #[inline(always)]
    unsafe fn load_i32(p: *const i32) -> Self::I {
        each(|i| vld1q_s32(p.add(4 * i)))
    }
    #[inline(always)]
    unsafe fn store_i32(p: *mut i32, v: Self::I) {
        for (i, v) in v.into_iter().enumerate() {
            vst1q_s32(p.add(4 * i), v);
        }
    }
    #[inline(always)]
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I {
        each(|i| vaddq_s32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn mul_i32(a: Self::I, b: Self::I) -> Self::I {
        each(|i| vmulq_s32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::I {
        widen(vld1q_u8(p)).map(|v| vreinterpretq_s32_u32(v))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::I) {
        let words = [0, 2].map(|i| vcombine_s16(vqmovn_s32(v[i]), vqmovn_s32(v[i + 1])));
        vst1q_s8(p, vcombine_s8(vqmovn_s16(words[0]), vqmovn_s16(words[1])));
    }
    #[inline(always)]
    unsafe fn sum_i32(v: Self::I) -> i32 {
        vaddvq_s32(vaddq_s32(vaddq_s32(v[0], v[1]), vaddq_s32(v[2], v[3])))
    }
    #[inline(always)]
    unsafe fn dot(sum: Self::I, c: Self::C, x: *const i8) -> Self::I {
        let x = four(x);
        each(|i| dot::<DOT>(sum[i], vreinterpretq_s8_u8(c[i]), x))
    }
    #[inline(always)]
    unsafe fn dot_wide(sum: Self::I, c: Self::C, x: *const i8) -> Self::I {
        let x = four(x);
        each(|i| dot::<DOT>(sum[i], less_128(c[i]), x))
    }
}
