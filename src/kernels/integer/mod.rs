//! 64 codes of a byte and 16 integer sums: what products with 8-bit activations are made of.
//!
//! All implementations give the same integers. Where a bigger number would saturate or overflow in one
//! of them, the domain is stated at the operation.

// Every function here has the preconditions of `Simd`.
#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc)]

#[cfg(target_arch = "aarch64")]
pub(super) mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::simd::Arrays;

/// For each mask of eight bytes: which of the stored bytes each takes, and more than 127 where it takes none.
#[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]
static EXPAND: [[u8; 8]; 256] = {
    let mut table = [[0x80; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut byte, mut next) = (0, 0);
        while byte < 8 {
            if mask >> byte & 1 == 1 {
                table[mask][byte] = next;
                next += 1;
            }
            byte += 1;
        }
        mask += 1;
    }
    table
};

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
    /// One byte everywhere.
    unsafe fn splat_codes(v: u8) -> Self::C;
    /// A byte for each lane from 16 bytes at `p`, in all four of its places.
    unsafe fn spread(p: *const u8) -> Self::C;
    /// `base`, but where a bit of `mask` is set the next of the fields `(byte >> shift) & field` of the bytes at
    /// `p`, in order; 64 bytes are valid there, and `field << shift` fits into a byte.
    unsafe fn expand_codes(
        base: Self::C,
        mask: u64,
        p: *const u8,
        shift: u32,
        field: u8,
    ) -> Self::C;
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
    unsafe fn splat_codes(v: u8) -> Self::C {
        [v; 64]
    }
    #[inline(always)]
    unsafe fn spread(p: *const u8) -> Self::C {
        std::array::from_fn(|i| *p.add(i / 4))
    }
    #[inline(always)]
    unsafe fn expand_codes(
        base: Self::C,
        mask: u64,
        p: *const u8,
        shift: u32,
        field: u8,
    ) -> Self::C {
        let mut next = 0;
        std::array::from_fn(|i| {
            if mask >> i & 1 == 0 {
                return base[i];
            }
            next += 1;
            (*p.add(next - 1) >> shift) & field
        })
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
        v.into_iter().fold(0, i32::wrapping_add)
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

#[cfg(test)]
mod tests {
    use super::super::simd::{self, Level, Simd, Task};
    use super::{Arrays, Integer};

    const MASKS: [u64; 7] = [
        0,
        u64::MAX,
        1 << 63 | 1,
        0x3333_5555_9999_cccc,
        0x0000_ffff_0000_ff00,
        0xff00_0000_0000_0001,
        0x9e37_79b9_7f4a_7c15,
    ];

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
            let base = S::spread(self.1.as_ptr());
            for mask in MASKS {
                for (shift, field) in [(0, 255), (0, 15), (4, 15), (6, 3)] {
                    let mut codes = [0; 64];
                    let c = S::expand_codes(base, mask, self.0.as_ptr(), shift, field);
                    S::store_codes(codes.as_mut_ptr(), c);
                    out.extend(codes.map(i32::from));
                }
            }
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
                let expanding = simd::run_expanding(level, Probe(c, noise(5), x));
                assert_eq!(expanding, expected, "{level:?}");
            }
        }
    }
    #[test]
    fn fields_are_expanded_in_order() {
        let (base, from) = ([7; 64], std::array::from_fn::<u8, 64, _>(|i| i as u8 * 16 + 1));
        // SAFETY: arrays need no instructions.
        let out = unsafe { Arrays::expand_codes(base, 1 << 63 | 0b1010, from.as_ptr(), 4, 15) };
        let mut expected = base;
        (expected[1], expected[3], expected[63]) = (0, 1, 2);
        assert_eq!(out, expected);
    }
}
