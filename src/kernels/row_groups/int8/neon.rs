//! NEON: rows are lanes, whatever the number of tokens.

use std::arch::aarch64::*;

use super::{Few, QUAD, SLACK, add_plain, sums_plain};
use crate::kernels::few::prefetch;
use crate::kernels::integer::neon::{dot, four, less_128};

/// Registers of sums: enough of them to hide how long an instruction takes.
const SUMS: usize = 8;

/// For each byte of a bitmap: the places of the bits that are set.
static PLACES: [[u8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut bit, mut next) = (0, 0);
        while bit < 8 {
            if mask >> bit & 1 == 1 {
                table[mask][next] = bit;
                next += 1;
            }
            bit += 1;
        }
        mask += 1;
    }
    table
};

impl Few<'_> {
    /// # Safety
    /// No other thread writes the results of these groups; the processor has the dot product extension if `DOT`.
    pub(super) unsafe fn neon<const DOT: bool>(self) {
        self.each(
            0,
            pack,
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

/// Packs the bytes whose bit is set to the front, eight at a time; `out` has room for 64 more.
fn pack(mask: &[u64], x: &[u8], out: &mut [u8]) {
    assert!(x.len() >= 64 * mask.len() && out.len() >= x.len() + SLACK);
    let mut packed = 0;
    for (x, &word) in x.as_chunks::<64>().0.iter().zip(mask) {
        // SAFETY: NEON is a part of the architecture. At most as many bytes were packed as were read, so eight
        // more fit behind them.
        unsafe {
            // How many are set in each byte, then in all up to it: byte sums in a product.
            let set = vget_lane_u64::<0>(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(word))));
            let ends = set.wrapping_mul(0x0101_0101_0101_0101).to_le_bytes();
            let mut start = 0;
            for ((x, mask), end) in x.as_chunks::<8>().0.iter().zip(word.to_le_bytes()).zip(ends) {
                let places = vld1_u8(PLACES[mask as usize].as_ptr());
                let front = vtbl1_u8(vld1_u8(x.as_ptr()), places);
                vst1_u8(out.as_mut_ptr().add(packed + start), front);
                start = end.into();
            }
            packed += start;
        }
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
