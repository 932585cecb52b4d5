//! Packing activations with NEON: of eight columns the kept ones move to the front by one table lookup.

use std::arch::aarch64::*;

use super::Bits;

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

/// Packs the bytes whose bit is set to the front of `out`. Panics if `x` has no byte for a bit, or `out` has no room
/// for all of `x` and 8 more.
pub(super) fn pack_bytes(mask: &[u64], x: &[u8], out: &mut [u8]) {
    assert!(x.len() >= 64 * mask.len() && out.len() >= x.len() + 8);
    let mut packed = 0;
    for (x, &word) in x.as_chunks::<64>().0.iter().zip(mask) {
        let ends = ends(word);
        let mut start = 0;
        for ((x, mask), end) in x.as_chunks::<8>().0.iter().zip(word.to_le_bytes()).zip(ends) {
            // SAFETY: NEON is a part of the architecture. No more was packed than was read, so eight more fit.
            unsafe {
                let front = vtbl1_u8(vld1_u8(x.as_ptr()), vld1_u8(PLACES[mask as usize].as_ptr()));
                vst1_u8(out.as_mut_ptr().add(packed + start), front);
            }
            start = end.into();
        }
        packed += start;
    }
}

/// The same for f32 elements. Elements that do not exist have no bits.
pub(super) fn pack_floats(mask: &[u64], x: &[f32], out: &mut [f32]) {
    assert!(mask.len() >= x.len().div_ceil(64) && out.len() >= x.len() + 8);
    let mut packed = 0;
    for (x, &word) in x.chunks(64).zip(mask) {
        let ends = ends(word);
        let mut start = 0;
        let (whole, rest) = x.as_chunks::<8>();
        for ((x, mask), end) in whole.iter().zip(word.to_le_bytes()).zip(ends) {
            // SAFETY: as above.
            unsafe {
                let table = uint8x16x2_t(
                    vreinterpretq_u8_f32(vld1q_f32(x.as_ptr())),
                    vreinterpretq_u8_f32(vld1q_f32(x.as_ptr().add(4))),
                );
                // Four bytes for each place.
                let places = vshl_n_u8::<2>(vld1_u8(PLACES[mask as usize].as_ptr()));
                let places = vmovl_u8(places);
                let bytes = |places| {
                    let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), places, 0x0101_0101);
                    vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes)))
                };
                let out = out.as_mut_ptr().add(packed + start);
                vst1q_f32(out, bytes(vmovl_u16(vget_low_u16(places))));
                vst1q_f32(out.add(4), bytes(vmovl_high_u16(places)));
            }
            start = end.into();
        }
        if !rest.is_empty() {
            for bit in Bits(word >> (8 * whole.len())) {
                out[packed + start] = rest[bit];
                start += 1;
            }
        }
        packed += start;
    }
}

/// How many bits are set in each byte and those below it.
fn ends(word: u64) -> [u8; 8] {
    // SAFETY: NEON is a part of the architecture.
    let set = unsafe { vget_lane_u64::<0>(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(word)))) };
    // The product adds every byte to those above it; sums are at most 64.
    set.wrapping_mul(0x0101_0101_0101_0101).to_le_bytes()
}
