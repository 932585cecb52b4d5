//! NEON: rows are lanes, whatever the number of tokens.

use std::arch::aarch64::*;

use super::{Few, QUAD, add_plain, sums_plain};
use crate::kernels::few::prefetch;
use crate::kernels::integer::neon::{dot, four, less_128};
use crate::kernels::row_groups::neon::pack_bytes;

/// Registers of sums: enough of them to hide how long an instruction takes.
const SUMS: usize = 8;

impl Few<'_> {
    /// # Safety
    /// No other thread writes the results of these groups; the processor has the dot product extension if `DOT`.
    pub(super) unsafe fn neon<const DOT: bool>(self) {
        self.each(
            0,
            pack_bytes,
            // SAFETY: the caller's promise; `each` gives whole pieces.
            #[inline(always)]
            |values, lanes, packed, out| unsafe {
                match lanes {
                    2 => sums::<DOT, 2>(values, packed, out),
                    4 => sums::<DOT, 4>(values, packed, out),
                    8 => sums::<DOT, 8>(values, packed, out),
                    16 => sums::<DOT, 16>(values, packed, out),
                    32 => sums::<DOT, 32>(values, packed, out),
                    _ => sums_plain::<128>(values, lanes, packed, out),
                }
            },
        );
    }
}

/// Sums of `N` rows over packed activations less 128: a register is four columns of four rows, or eight columns of two.
#[inline(always)]
unsafe fn sums<const DOT: bool, const N: usize>(values: &[u8], packed: &[u8], out: &mut [i32; 32]) {
    let quads = packed.len() / QUAD;
    let (vectors, per) = ((N / 4).max(1), (4 / N).max(1));
    let steps = SUMS / vectors;
    let add = |sums: &mut [int32x4_t], quad: usize| {
        let x = packed.as_ptr().add(QUAD * quad);
        let x = if per == 1 {
            four(x.cast())
        } else {
            // Each of two quads for two rows.
            let both = vreinterpret_u32_u8(vld1_u8(x));
            let both = vcombine_u32(both, both);
            vreinterpretq_s8_u32(vzip1q_u32(both, both))
        };
        let x = less_128(vreinterpretq_u8_s8(x));
        for (v, sum) in sums.iter_mut().enumerate() {
            let p = values.as_ptr().add(QUAD * N * quad + 16 * v);
            prefetch(p);
            *sum = dot::<DOT>(*sum, vreinterpretq_s8_u8(vld1q_u8(p)), x);
        }
    };
    let mut acc = [vdupq_n_s32(0); SUMS];
    let mut quad = 0;
    while quad + steps * per <= quads {
        for (i, acc) in acc.chunks_exact_mut(vectors).enumerate() {
            add(acc, quad + i * per);
        }
        quad += steps * per;
    }
    while quad + per <= quads {
        add(&mut acc[..vectors], quad);
        quad += per;
    }
    out.fill(0);
    for (i, acc) in acc.into_iter().enumerate() {
        let mut lanes = [0_i32; 4];
        vst1q_s32(lanes.as_mut_ptr(), acc);
        for (lane, sum) in lanes.into_iter().enumerate() {
            let row = &mut out[(4 * i + lane) % N];
            *row = row.wrapping_add(sum);
        }
    }
    add_plain::<128>(&values[QUAD * N * quad..], N, &packed[QUAD * quad..], out);
}
