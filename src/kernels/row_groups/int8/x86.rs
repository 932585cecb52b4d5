//! Few tokens on AVX2 and AVX-512: rows are lanes.

use std::arch::x86_64::*;

use super::{Few, QUAD, SLACK, add_plain, pack_plain, sums_plain};
use crate::kernels::few::prefetch;

impl Few<'_> {
    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi1"
    )]
    pub(super) unsafe fn vnni(self) {
        self.each(
            128,
            // SAFETY: this function has the instructions.
            #[inline(always)]
            |mask, x, out| unsafe { pack_vnni(mask, x, out) },
            // SAFETY: this function has the instructions; `each` gives whole pieces.
            #[inline(always)]
            |values, lanes, packed, out| unsafe {
                match lanes {
                    2 => sums_vnni::<2>(values, packed, out),
                    4 => sums_vnni::<4>(values, packed, out),
                    8 => sums_vnni::<8>(values, packed, out),
                    16 => sums_vnni::<16>(values, packed, out),
                    32 => sums_vnni::<32>(values, packed, out),
                    _ => sums_plain::<0>(values, lanes, packed, out),
                }
            },
        );
    }

    #[target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")]
    pub(super) unsafe fn avx2(self) {
        self.each(
            0,
            pack_plain,
            // SAFETY: this function has the instructions; `each` gives whole pieces.
            #[inline(always)]
            |values, lanes, packed, out| unsafe {
                match lanes {
                    2 => sums_avx2::<2>(values, packed, out),
                    4 => sums_avx2::<4>(values, packed, out),
                    8 => sums_avx2::<8>(values, packed, out),
                    16 => sums_avx2::<16>(values, packed, out),
                    32 => sums_avx2::<32>(values, packed, out),
                    _ => sums_plain::<128>(values, lanes, packed, out),
                }
            },
        );
    }
}

/// Packs the bytes whose bit is set to the front; `out` has room for 64 more.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
unsafe fn pack_vnni(mask: &[u64], x: &[u8], out: &mut [u8]) {
    assert!(x.len() >= 64 * mask.len() && out.len() >= x.len() + SLACK);
    let mut out = out.as_mut_ptr();
    for (i, &word) in mask.iter().enumerate() {
        let v = _mm512_loadu_si512(x.as_ptr().add(64 * i).cast());
        _mm512_storeu_si512(out.cast(), _mm512_maskz_compress_epi8(word, v));
        out = out.add(word.count_ones() as usize);
    }
}

/// Bytes `0..len` of a vector, zeros behind them.
#[inline(always)]
unsafe fn front(p: *const u8, len: usize) -> __m512i {
    let mask = if len >= 64 { !0 } else { (1_u64 << len) - 1 };
    _mm512_maskz_loadu_epi8(mask, p.cast())
}

/// `R < 4` bytes a row become four, the last ones zeros.
#[inline(always)]
unsafe fn widen_rest(v: __m512i, rest: usize) -> __m512i {
    let byte = |rest: usize| -> [u8; 64] { std::array::from_fn(|i| (i / 4 * rest + i % 4) as u8) };
    let place: [u8; 64] = byte(rest);
    let mask = match rest {
        1 => 0x1111_1111_1111_1111,
        2 => 0x3333_3333_3333_3333,
        _ => 0x7777_7777_7777_7777,
    };
    _mm512_maskz_permutexvar_epi8(mask, _mm512_loadu_si512(place.as_ptr().cast()), v)
}

/// Sums of `N` rows over activations with offset: a vector is four columns of 16 rows, or more columns of fewer rows.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi1"
)]
unsafe fn sums_vnni<const N: usize>(values: &[u8], packed: &[u8], out: &mut [i32; 32]) {
    let kept = packed.len();
    let (values, x) = (values.as_ptr(), packed.as_ptr());
    let quads = kept / QUAD;
    let mut acc = [_mm512_setzero_si512(); 4];
    if N >= 16 {
        let vectors = N / 16;
        let step = 4 / vectors;
        let mut quad = 0;
        while quad + step <= quads {
            for i in 0..step {
                let x = x.add(4 * (quad + i)).cast::<i32>().read_unaligned();
                let x = _mm512_set1_epi32(x);
                for v in 0..vectors {
                    let p = values.add((quad + i) * 4 * N + 64 * v);
                    prefetch(p);
                    let w = _mm512_loadu_si512(p.cast());
                    let at = i * vectors + v;
                    acc[at] = _mm512_dpbusd_epi32(acc[at], x, w);
                }
            }
            quad += step;
        }
        while quad < quads {
            let x = _mm512_set1_epi32(x.add(4 * quad).cast::<i32>().read_unaligned());
            for (v, acc) in acc[..vectors].iter_mut().enumerate() {
                let w = _mm512_loadu_si512(values.add(quad * 4 * N + 64 * v).cast());
                *acc = _mm512_dpbusd_epi32(*acc, x, w);
            }
            quad += 1;
        }
        for v in 0..vectors {
            for i in 1..step {
                acc[v] = _mm512_add_epi32(acc[v], acc[i * vectors + v]);
            }
        }
        let rest = kept % QUAD;
        if rest > 0 {
            let mut quad = [0; 4];
            quad[..rest].copy_from_slice(&packed[kept - rest..]);
            let x = _mm512_set1_epi32(i32::from_le_bytes(quad));
            for (v, acc) in acc[..vectors].iter_mut().enumerate() {
                let p = values.add(quads * 4 * N + 16 * rest * v);
                let w = widen_rest(front(p, 16 * rest), rest);
                *acc = _mm512_dpbusd_epi32(*acc, x, w);
            }
        }
        for (v, acc) in acc[..vectors].iter().enumerate() {
            _mm512_storeu_si512(out.as_mut_ptr().add(16 * v).cast(), *acc);
        }
        return;
    }
    // 16 quads of activations make `N` vectors.
    let per = 16 / N;
    let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let lane = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(N.trailing_zeros() as i32));
    let mut quad = 0;
    while quad + 16 <= quads {
        let all = _mm512_loadu_si512(x.add(4 * quad).cast());
        for v in 0..N {
            let place = _mm512_add_epi32(lane, _mm512_set1_epi32((v * per) as i32));
            let x = _mm512_permutexvar_epi32(place, all);
            let p = values.add((quad + v * per) * 4 * N);
            prefetch(p);
            let w = _mm512_loadu_si512(p.cast());
            acc[v % 4] = _mm512_dpbusd_epi32(acc[v % 4], x, w);
        }
        quad += 16;
    }
    if quad < quads {
        let all = front(x.add(4 * quad), 4 * (quads - quad));
        let mut v = 0;
        while quad + v * per < quads {
            let place = _mm512_add_epi32(lane, _mm512_set1_epi32((v * per) as i32));
            let x = _mm512_permutexvar_epi32(place, all);
            let from = (quad + v * per) * 4 * N;
            // Where no column is left, values are 0.
            let w = front(values.add(from), quads * 4 * N - from);
            acc[0] = _mm512_dpbusd_epi32(acc[0], x, w);
            v += 1;
        }
    }
    let rest = kept % QUAD;
    if rest > 0 {
        let mut last = [0; 4];
        last[..rest].copy_from_slice(&packed[kept - rest..]);
        let x = _mm512_set1_epi32(i32::from_le_bytes(last));
        let w = widen_rest(front(values.add(quads * 4 * N), N * rest), rest);
        // Lanes beyond the rows read zeros.
        acc[1] = _mm512_dpbusd_epi32(acc[1], x, w);
    }
    let sum = _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3]));
    let mut lanes = [0_i32; 16];
    _mm512_storeu_si512(lanes.as_mut_ptr().cast(), sum);
    for (row, out) in out[..N].iter_mut().enumerate() {
        *out = (0..per).map(|i| lanes[i * N + row]).sum();
    }
}

/// The same with eight lanes. Signs move to the activations, so that pairs fit into 16 bits: the bytes
/// without their signs times at most 127, twice.
#[target_feature(enable = "avx2,fma,f16c,popcnt,bmi1")]
unsafe fn sums_avx2<const N: usize>(values: &[u8], packed: &[u8], out: &mut [i32; 32]) {
    let quads = packed.len() / QUAD;
    let x = packed.as_ptr();
    let vectors = N.div_ceil(8);
    let per = (8 / N).max(1);
    let whole = quads / per * per;
    let mut acc = [_mm256_setzero_si256(); 4];
    let offset = _mm256_set1_epi8(-128);
    let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let lane = _mm256_srl_epi32(lane, _mm_cvtsi32_si128(N.trailing_zeros() as i32));
    for quad in (0..whole).step_by(per) {
        let x = if per == 1 {
            _mm256_set1_epi32(x.add(4 * quad).cast::<i32>().read_unaligned())
        } else {
            let mut few = [0_i32; 8];
            std::ptr::copy_nonoverlapping(x.add(4 * quad), few.as_mut_ptr().cast(), 4 * per);
            _mm256_permutevar8x32_epi32(_mm256_loadu_si256(few.as_ptr().cast()), lane)
        };
        let x = _mm256_xor_si256(x, offset);
        for (v, acc) in acc[..vectors].iter_mut().enumerate() {
            let p = values.as_ptr().add(quad * 4 * N + 32 * v);
            let w = _mm256_loadu_si256(p.cast());
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            *acc = _mm256_add_epi32(*acc, fours);
        }
    }
    out.fill(0);
    for (v, acc) in acc[..vectors].iter().enumerate() {
        let mut lanes = [0_i32; 8];
        _mm256_storeu_si256(lanes.as_mut_ptr().cast(), *acc);
        for (i, sum) in lanes.iter().enumerate() {
            out[(8 * v + i) % N] += sum;
        }
    }
    add_plain::<128>(&values[whole * 4 * N..], N, &packed[4 * whole..], out);
}
