//! Signed 8-bit values times activations rounded to 8 bits. All paths compute the same bits: their sums are
//! integers, and each result is made from its sum in one way.
//!
//! The dot product instruction multiplies unsigned bytes with signed ones. So an activation `q` is given as
//! `q + 128`, and 128 times the sum of a row's values is taken off again.

use std::ops::Range;
use std::sync::OnceLock;

use super::{Bits, Pattern, QUAD};
use crate::kernels::multiversion::multiversion;
use crate::kernels::simd::Level;
use crate::kernels::threads::{self, Shared, with_scratch};

/// Kernels, from least to most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Path {
    Plain,
    Avx2,
    /// AVX-512 with dot products and byte permutations.
    Vnni,
}

impl Path {
    pub(super) fn best() -> Self {
        static BEST: OnceLock<Path> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    #[cfg(test)]
    pub(super) fn available() -> impl Iterator<Item = Self> {
        [Self::Plain, Self::Avx2, Self::Vnni].into_iter().filter(|path| *path <= Self::best())
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Path {
    let vnni = is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512vbmi2");
    match Level::best() {
        Level::Vnni if vnni => Path::Vnni,
        Level::Vnni | Level::Avx512 | Level::Avx2 => Path::Avx2,
        Level::Arrays => Path::Plain,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Path {
    Path::Plain
}

/// Up to here rows are lanes.
const FEW: usize = 12;

/// Tokens of a panel of transposed activations.
const PANEL: usize = 32;

/// Bytes of the panels that one pass over the weight uses: they stay in the second-level cache.
const PASS: usize = 1 << 20;

/// Groups whose activations are packed before the first of them is multiplied: what was just written in other
/// pieces cannot be read at once.
const AHEAD: usize = 4;

/// Bytes that packed activations may be written past their end.
const SLACK: usize = 64;

/// A weight of 8-bit values.
#[derive(Clone, Copy)]
struct Weight<'a> {
    pattern: &'a Pattern,
    values: &'a [u8],
    scales: &'a [f32],
    sums: &'a [i32],
}

pub(super) fn multiply(
    path: Path,
    pattern: &Pattern,
    values: &[u8],
    scales: &[f32],
    sums: &[i32],
    x: &[f32],
    y: &mut [f32],
) {
    assert!(path <= Path::best(), "instructions that this processor lacks");
    let w = Weight { pattern, values, scales, sums };
    let cols = pattern.cols;
    let tokens = x.len() / cols;
    // A scale a token, then a row of bytes a token, padded to whole words of the bitmaps.
    let width = pattern.words * 64;
    with_scratch(tokens + tokens * width / 4, |scratch| {
        let (steps, rounded) = scratch.split_at_mut(tokens);
        let shared = (Shared::new(steps), Shared::new(rounded));
        threads::for_ranges(tokens, (1 << 16) / cols + 1, |range| {
            for token in range {
                // SAFETY: tokens are disjoint.
                let (step, out) = unsafe {
                    let row = token * width / 4..(token + 1) * width / 4;
                    (shared.0.slice(token..token + 1), as_bytes(shared.1.slice(row)))
                };
                step[0] = round(&x[token * cols..(token + 1) * cols], out);
                out[cols..].fill(0);
            }
        });
        let (steps, rounded, y) = (&*steps, &*as_bytes(rounded), Shared::new(y));
        if tokens > FEW && path == Path::Vnni {
            many(w, rounded, steps, y);
            return;
        }
        threads::for_ranges(pattern.groups(), pattern.grain(tokens), |range| {
            with_scratch(AHEAD * (width + SLACK) / 4, |packed| {
                let few = Few { w, range, rounded, steps, y, packed: as_bytes(packed) };
                // SAFETY: the path was compared with what the processor has; ranges are disjoint.
                unsafe {
                    match path {
                        #[cfg(target_arch = "x86_64")]
                        Path::Vnni => few.vnni(),
                        #[cfg(target_arch = "x86_64")]
                        Path::Avx2 => few.avx2(),
                        _ => few.plain(),
                    }
                }
            });
        });
    });
}

multiversion! {
    /// Rounds activations to `127 / max |x|` steps, halves to even, offset by 128; answers the size of a step.
    fn round(x: &[f32], out: &mut [u8]) -> f32 {
        let mut most = [0.0_f32; 16];
        let (chunks, rest) = x.as_chunks::<16>();
        for chunk in chunks {
            for (most, v) in most.iter_mut().zip(chunk) {
                *most = most.max(v.abs());
            }
        }
        let most = most.iter().chain(rest).fold(0.0_f32, |m, v| m.max(v.abs()));
        let by = if most > 0.0 { 127.0 / most } else { 0.0 };
        for (v, out) in x.iter().zip(&mut *out) {
            let q = (v * by).round_ties_even().clamp(-127.0, 127.0);
            *out = (q as i32 + 128) as u8;
        }
        most / 127.0
    }
}

fn as_bytes(floats: &mut [f32]) -> &mut [u8] {
    // SAFETY: bytes have no alignment, and every pattern is a valid f32 and a valid byte.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats)) }
}

/// The result for a sum over activations without offset.
#[inline(always)]
fn finish(sum: i32, scale: f32, step: f32) -> f32 {
    sum as f32 * (scale * step)
}

/// Groups `range` times each token, rows as lanes.
struct Few<'a> {
    w: Weight<'a>,
    range: Range<usize>,
    rounded: &'a [u8],
    steps: &'a [f32],
    y: Shared<'a>,
    packed: &'a mut [u8],
}

impl Few<'_> {
    /// Calls `pack`, then `sums` with values, rows and packed activations of each group and token; it writes the
    /// sums of the rows, over activations less 128 - `offset`.
    ///
    /// # Safety
    /// No other thread writes the results of these groups.
    #[inline(always)]
    unsafe fn each(
        self,
        offset: i32,
        pack: impl Fn(&[u64], &[u8], &mut [u8]),
        sums: impl Fn(&[u8], usize, &[u8], &mut [i32; 32]),
    ) {
        let p = self.w.pattern;
        let width = p.words * 64;
        let tokens = self.rounded.chunks_exact(width).zip(self.steps).enumerate();
        for (token, (x, step)) in tokens {
            for first in self.range.clone().step_by(AHEAD) {
                let block = first..self.range.end.min(first + AHEAD);
                for (g, out) in block.clone().zip(self.packed.chunks_exact_mut(width + SLACK)) {
                    pack(p.mask(g), x, out);
                }
                for (g, packed) in block.zip(self.packed.chunks_exact(width + SLACK)) {
                    // SAFETY: the caller's promise.
                    unsafe { self.group(g, token, offset, *step, packed, &sums) };
                }
            }
        }
    }

    /// One group times one token.
    ///
    /// # Safety
    /// No other thread writes the results.
    #[inline(always)]
    unsafe fn group(
        &self,
        g: usize,
        token: usize,
        offset: i32,
        step: f32,
        packed: &[u8],
        sums: impl Fn(&[u8], usize, &[u8], &mut [i32; 32]),
    ) {
        let p = self.w.pattern;
        let (kept, lanes) = (p.kept(g), p.lanes(g));
        let values = &self.w.values[p.starts[g] * p.group..][..kept * lanes];
        let mut out = [0; 32];
        sums(values, lanes, &packed[..kept], &mut out);
        let row = g * p.group;
        let (of_values, scales) = (&self.w.sums[row..][..lanes], &self.w.scales[row..][..lanes]);
        let at = token * p.rows + row;
        // SAFETY: the caller's promise.
        let y = unsafe { self.y.slice(at..at + lanes) };
        // Eight at a time are vectors.
        let (y, y_rest) = y.as_chunks_mut::<8>();
        let (sums, _) = out.as_chunks::<8>();
        let (of_values, of_rest) = of_values.as_chunks::<8>();
        let (scales, scales_rest) = scales.as_chunks::<8>();
        for (((y, sums), of_values), scales) in y.iter_mut().zip(sums).zip(of_values).zip(scales) {
            for i in 0..8 {
                let sum = sums[i].wrapping_sub(of_values[i].wrapping_mul(offset));
                y[i] = finish(sum, scales[i], step);
            }
        }
        let sums = &out[lanes / 8 * 8..];
        let rest = y_rest.iter_mut().zip(sums).zip(of_rest).zip(scales_rest);
        for (((y, sum), of_values), scale) in rest {
            *y = finish(sum.wrapping_sub(of_values.wrapping_mul(offset)), *scale, step);
        }
    }

    unsafe fn plain(self) {
        // SAFETY: the caller's promise.
        unsafe { self.each(0, pack_plain, sums_plain::<128>) };
    }
}

fn pack_plain(mask: &[u64], x: &[u8], out: &mut [u8]) {
    let mut next = 0;
    for (i, &word) in mask.iter().enumerate() {
        for bit in Bits(word) {
            out[next] = x[64 * i + bit];
            next += 1;
        }
    }
}

/// Sums over packed activations less `LESS`.
fn sums_plain<const LESS: i32>(values: &[u8], lanes: usize, packed: &[u8], out: &mut [i32; 32]) {
    out.fill(0);
    add_plain::<LESS>(values, lanes, packed, out);
}

fn add_plain<const LESS: i32>(values: &[u8], lanes: usize, packed: &[u8], out: &mut [i32; 32]) {
    let mut values = values;
    for quad in packed.chunks(QUAD) {
        let (block, rest) = values.split_at(quad.len() * lanes);
        for (row, sum) in block.chunks_exact(quad.len()).zip(&mut *out) {
            for (v, x) in row.iter().zip(quad) {
                *sum = sum.wrapping_add(i32::from(*v as i8) * (i32::from(*x) - LESS));
            }
        }
        values = rest;
    }
}

#[cfg(target_arch = "x86_64")]
use x86::many;

#[cfg(not(target_arch = "x86_64"))]
fn many(_: Weight<'_>, _: &[u8], _: &[f32], _: Shared<'_>) {
    unreachable!("this processor has no such instructions");
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    impl Few<'_> {
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi1"
        )]
        pub(super) unsafe fn vnni(self) {
            self.each(
                128,
                #[inline(always)]
                |mask, x, out| unsafe { pack_vnni(mask, x, out) },
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
        let byte =
            |rest: usize| -> [u8; 64] { std::array::from_fn(|i| (i / 4 * rest + i % 4) as u8) };
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
                        let w = _mm512_loadu_si512(p.cast());
                        let at = i * vectors + v;
                        acc[at] = _mm512_dpbusd_epi32(acc[at], x, w);
                    }
                }
                quad += step;
            }
            while quad < quads {
                let x = _mm512_set1_epi32(x.add(4 * quad).cast::<i32>().read_unaligned());
                for v in 0..vectors {
                    let w = _mm512_loadu_si512(values.add(quad * 4 * N + 64 * v).cast());
                    acc[v] = _mm512_dpbusd_epi32(acc[v], x, w);
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
                for v in 0..vectors {
                    let p = values.add(quads * 4 * N + 16 * rest * v);
                    let w = widen_rest(front(p, 16 * rest), rest);
                    acc[v] = _mm512_dpbusd_epi32(acc[v], x, w);
                }
            }
            for v in 0..vectors {
                _mm512_storeu_si512(out.as_mut_ptr().add(16 * v).cast(), acc[v]);
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
                let w = _mm512_loadu_si512(values.add((quad + v * per) * 4 * N).cast());
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
        let sum =
            _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3]));
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
            for v in 0..vectors {
                let p = values.as_ptr().add(quad * 4 * N + 32 * v);
                let w = _mm256_loadu_si256(p.cast());
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                acc[v] = _mm256_add_epi32(acc[v], fours);
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

    /// Panels of transposed activations, tokens as lanes.
    pub(in super::super) fn many(w: Weight<'_>, rounded: &[u8], steps: &[f32], y: Shared<'_>) {
        let p = w.pattern;
        let (width, tokens) = (p.words * 64, steps.len());
        let pass = (PASS / (PANEL * width)).max(1) * PANEL;
        for first in (0..tokens).step_by(pass) {
            let count = pass.min(tokens - first);
            let panels = count.div_ceil(PANEL);
            let size = PANEL * width / 4;
            with_scratch(panels * size, |xt| {
                let shared = Shared::new(xt);
                threads::for_ranges(panels, 1, |range| {
                    for panel in range {
                        // SAFETY: panels are disjoint.
                        let xt = unsafe { shared.slice(panel * size..(panel + 1) * size) };
                        let from = first + panel * PANEL;
                        let last = (from + PANEL).min(tokens);
                        transpose(&rounded[from * width..last * width], width, as_bytes(xt));
                    }
                });
                let xt = &*as_bytes(xt);
                threads::for_ranges(p.groups(), p.grain(count), |range| {
                    let most = range.clone().map(|g| p.kept(g)).max().unwrap_or(0);
                    // Interleaved activations of a panel, the columns of a group, its last values.
                    let quads = most.div_ceil(QUAD);
                    with_scratch(quads * PANEL + most + 32, |scratch| {
                        let many =
                            Many { w, range, xt, steps: &steps[first..first + count], y, first };
                        // SAFETY: this path is taken where its instructions are.
                        unsafe { many.run(scratch) };
                    });
                });
            });
        }
    }

    /// `out[column][token]`, zeros for tokens there are not.
    fn transpose(x: &[u8], width: usize, out: &mut [u8]) {
        if x.len() < PANEL * width {
            out.fill(0);
        }
        for at in (0..width).step_by(64) {
            for (token, row) in x.chunks_exact(width).enumerate() {
                for (i, v) in row[at..at + 64].iter().enumerate() {
                    out[(at + i) * PANEL + token] = *v;
                }
            }
        }
    }

    struct Many<'a> {
        w: Weight<'a>,
        range: Range<usize>,
        xt: &'a [u8],
        steps: &'a [f32],
        y: Shared<'a>,
        first: usize,
    }

    impl Many<'_> {
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,popcnt,bmi1"
        )]
        unsafe fn run(self, scratch: &mut [f32]) {
            let p = self.w.pattern;
            for g in self.range.clone() {
                let (kept, lanes) = (p.kept(g), p.lanes(g));
                let quads = kept.div_ceil(QUAD);
                let start = p.starts[g] * p.group;
                let values = &self.w.values[start..start + kept * lanes];
                let (mixed, rest) = scratch.split_at_mut(quads * PANEL);
                let (columns, _) = rest.split_at_mut(kept);
                for (out, column) in columns.iter_mut().zip(p.columns(g)) {
                    *out = f32::from_bits(column as u32);
                }
                let columns = &*columns;
                // The columns that do not fill a quad, with zeros behind them.
                let mut last = [0_i32; 32];
                let rest = kept % QUAD;
                if rest > 0 {
                    for (row, last) in
                        values[kept / QUAD * QUAD * lanes..].chunks_exact(rest).zip(&mut last)
                    {
                        let mut quad = [0; 4];
                        quad[..rest].copy_from_slice(row);
                        *last = i32::from_le_bytes(quad);
                    }
                }
                let panels = self.xt.chunks_exact(PANEL * p.words * 64);
                for (panel, xt) in panels.enumerate() {
                    interleave(xt, columns, mixed);
                    let steps = &self.steps[panel * PANEL..];
                    let steps = &steps[..steps.len().min(PANEL)];
                    let mut lane = 0;
                    while lane < lanes {
                        let tile = Tile {
                            values,
                            last: &last,
                            quads: kept / QUAD,
                            mixed,
                            lanes,
                            lane,
                            row: g * p.group + lane,
                            first: self.first + panel * PANEL,
                            steps,
                        };
                        lane += match lanes - lane {
                            8.. => tile.multiply::<8>(self.w, self.y),
                            4.. => tile.multiply::<4>(self.w, self.y),
                            2.. => tile.multiply::<2>(self.w, self.y),
                            _ => tile.multiply::<1>(self.w, self.y),
                        };
                    }
                }
            }
        }
    }

    /// `out[quad][token][4]` of the kept columns, whatever for those that are missing in the last quad: their
    /// values are 0.
    #[inline(always)]
    unsafe fn interleave(xt: &[u8], columns: &[f32], out: &mut [f32]) {
        // Byte i of four runs of 16 tokens goes beside the same token's others.
        let place: [u8; 64] = std::array::from_fn(|i| (i % 4 * 16 + i / 4) as u8);
        let place = _mm512_loadu_si512(place.as_ptr().cast());
        for (quad, out) in columns.chunks(QUAD).zip(out.chunks_exact_mut(PANEL)) {
            let column = |i: usize| {
                let column = quad[i.min(quad.len() - 1)].to_bits() as usize;
                xt.as_ptr().add(column * PANEL)
            };
            let from = [column(0), column(1), column(2), column(3)];
            for half in 0..2 {
                let load = |i: usize| _mm_loadu_si128(from[i].add(16 * half).cast());
                let v = _mm512_castsi128_si512(load(0));
                let v = _mm512_inserti32x4::<1>(v, load(1));
                let v = _mm512_inserti32x4::<2>(v, load(2));
                let v = _mm512_inserti32x4::<3>(v, load(3));
                let v = _mm512_permutexvar_epi8(place, v);
                _mm512_storeu_si512(out.as_mut_ptr().add(16 * half).cast(), v);
            }
        }
    }

    /// Rows from `lane` on of a group of `lanes` rows, times the tokens of a panel.
    struct Tile<'a> {
        values: &'a [u8],
        last: &'a [i32; 32],
        quads: usize,
        mixed: &'a [f32],
        lanes: usize,
        lane: usize,
        row: usize,
        first: usize,
        steps: &'a [f32],
    }

    impl Tile<'_> {
        /// `R` rows. Answers `R`.
        #[inline(always)]
        unsafe fn multiply<const R: usize>(&self, w: Weight<'_>, y: Shared<'_>) -> usize {
            let mut acc = [[_mm512_setzero_si512(); 2]; R];
            let mut values = self.values.as_ptr().cast::<i32>().add(self.lane);
            let mut x = self.mixed.as_ptr();
            for _ in 0..self.quads {
                let a = _mm512_loadu_si512(x.cast());
                let b = _mm512_loadu_si512(x.add(16).cast());
                for (r, acc) in acc.iter_mut().enumerate() {
                    let v = _mm512_set1_epi32(values.add(r).read_unaligned());
                    acc[0] = _mm512_dpbusd_epi32(acc[0], a, v);
                    acc[1] = _mm512_dpbusd_epi32(acc[1], b, v);
                }
                values = values.add(self.lanes);
                x = x.add(PANEL);
            }
            if self.mixed.len() > self.quads * PANEL {
                let a = _mm512_loadu_si512(x.cast());
                let b = _mm512_loadu_si512(x.add(16).cast());
                for (acc, last) in acc.iter_mut().zip(&self.last[self.lane..]) {
                    let v = _mm512_set1_epi32(*last);
                    acc[0] = _mm512_dpbusd_epi32(acc[0], a, v);
                    acc[1] = _mm512_dpbusd_epi32(acc[1], b, v);
                }
            }
            // The results of a row, then those of a token.
            let mut out = [[0.0_f32; PANEL]; R];
            let mut steps = [0.0; PANEL];
            steps[..self.steps.len()].copy_from_slice(self.steps);
            for (r, (out, acc)) in out.iter_mut().zip(acc).enumerate() {
                let offset = _mm512_set1_epi32(w.sums[self.row + r].wrapping_mul(128));
                let scale = _mm512_set1_ps(w.scales[self.row + r]);
                for (i, acc) in acc.into_iter().enumerate() {
                    let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, offset));
                    let step = _mm512_loadu_ps(steps.as_ptr().add(16 * i));
                    let y = _mm512_mul_ps(sum, _mm512_mul_ps(scale, step));
                    _mm512_storeu_ps(out.as_mut_ptr().add(16 * i), y);
                }
            }
            for token in 0..self.steps.len() {
                let at = (self.first + token) * w.pattern.rows + self.row;
                let results: [f32; R] = std::array::from_fn(|r| out[r][token]);
                y.slice(at..at + R).copy_from_slice(&results);
            }
            R
        }
    }
}
