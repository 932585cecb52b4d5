//! f32 and bf16 values. With few tokens the rows of a group are lanes, and each packed activation is spread over
//! them; with many, tokens are lanes, and each value is.

use std::ops::Range;

use half::bf16;

use super::{Bits, Pattern, RowGroups, Values, put};
use crate::kernels::few::prefetch;
use crate::kernels::simd::{self, Level, Simd, Task};
use crate::kernels::threads::{self, Shared, with_scratch};

/// Up to here rows are lanes.
const FEW: usize = 3;

/// Groups whose activations are packed before the first of them is multiplied: what was just written in other
/// pieces cannot be read at once.
const AHEAD: usize = 4;

/// Values for which activations are spread in memory at a time.
const CHUNK: usize = 256;

/// Tokens of a panel of transposed activations.
const PANEL: usize = 32;

/// f32 elements of the panels that one pass over the weight uses: they stay in the second-level cache.
const PASS: usize = 1 << 18;

pub(super) fn multiply(level: Level, w: &RowGroups<'_>, x: &[f32], y: &mut [f32]) {
    let (rows, cols) = (w.pattern.rows, w.pattern.cols);
    let tokens = x.len() / cols;
    let y = Shared::new(y);
    if tokens <= FEW {
        let w = *w;
        threads::for_ranges(w.pattern.groups(), w.pattern.grain(tokens), |range| {
            with_scratch(AHEAD * (cols + 16), |packed| {
                simd::run(level, Few { w, range, x, y, packed, level });
            });
        });
        return;
    }
    let pass = (PASS / (PANEL * cols)).max(1) * PANEL;
    for first in (0..tokens).step_by(pass) {
        let count = pass.min(tokens - first);
        let panels = count.div_ceil(PANEL);
        with_scratch(panels * PANEL * cols, |xt| {
            let shared = Shared::new(xt);
            threads::for_ranges(panels, 1, |range| {
                for panel in range {
                    // SAFETY: panels are disjoint.
                    let xt =
                        unsafe { shared.slice(panel * PANEL * cols..(panel + 1) * PANEL * cols) };
                    let first = first + panel * PANEL;
                    let last = (first + PANEL).min(tokens);
                    let x = &x[first * cols..last * cols];
                    simd::run(level, Transpose { x, cols, out: xt });
                }
            });
            let (w, xt) = (*w, &*xt);
            threads::for_ranges(w.pattern.groups(), w.pattern.grain(count), |range| {
                let most = range.clone().map(|g| w.pattern.kept(g)).max().unwrap_or(0);
                // Values of a group, and its columns.
                with_scratch(most * (w.pattern.group + 1), |scratch| {
                    let place = Place { first, count, stride: rows };
                    simd::run(level, Many { w, range, xt, y, place, scratch });
                });
            });
        });
    }
}

/// Rows of `x` become lanes: `out[column][token]`, zeros for tokens there are not.
struct Transpose<'a> {
    x: &'a [f32],
    cols: usize,
    out: &'a mut [f32],
}

impl Task for Transpose<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, cols, out } = self;
        let tokens = x.len() / cols;
        if tokens < PANEL {
            out.fill(0.0);
        }
        let (blocks, across) = (tokens / 16, cols / 16);
        for token in (0..blocks).map(|block| 16 * block) {
            for column in (0..across).map(|block| 16 * block) {
                let at = x.as_ptr().add(token * cols + column);
                let turned =
                    S::transpose(std::array::from_fn(|token| S::load(at.add(token * cols))));
                for (i, vector) in turned.into_iter().enumerate() {
                    S::store(out.as_mut_ptr().add((column + i) * PANEL + token), vector);
                }
            }
        }
        // What fills no block: the last columns of the tokens above, and the tokens that are left.
        for (token, row) in x.chunks_exact(cols).enumerate() {
            let from = if token < 16 * blocks { 16 * across } else { 0 };
            for (column, v) in row.iter().enumerate().skip(from) {
                out[column * PANEL + token] = *v;
            }
        }
    }
}

/// Packs the elements of `x` whose bit is set to the front of `out`, which has room for 16 more.
///
/// # Safety
/// The level is available; no bit at or beyond `x.len()` is set; `out` has room.
#[inline(always)]
unsafe fn pack(level: Level, mask: &[u64], x: &[f32], out: &mut [f32]) {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Vnni => pack_avx512(mask, x.as_ptr(), out.as_mut_ptr()),
        #[cfg(target_arch = "aarch64")]
        Level::Neon | Level::NeonDot => super::neon::pack_floats(mask, x, out),
        _ => {
            let mut next = 0;
            for (i, &word) in mask.iter().enumerate() {
                for bit in Bits(word) {
                    out[next] = x[64 * i + bit];
                    next += 1;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,popcnt")]
unsafe fn pack_avx512(mask: &[u64], x: *const f32, out: *mut f32) {
    use std::arch::x86_64::*;
    let mut out = out;
    for (i, &word) in mask.iter().enumerate() {
        for part in 0..4 {
            let mask = (word >> (16 * part)) as u16;
            // Lanes without a bit are not read: there may be no memory.
            let v = _mm512_maskz_loadu_ps(mask, x.wrapping_add(64 * i + 16 * part));
            _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, v));
            out = out.add(mask.count_ones() as usize);
        }
    }
}

/// 16 values from element `at` on.
#[inline(always)]
unsafe fn sixteen<S: Simd, const BF16: bool>(p: *const u8, at: usize) -> S::F {
    prefetch(p.wrapping_add(at * if BF16 { 2 } else { 4 }));
    if BF16 { S::load_bf16(p.add(2 * at)) } else { S::load(p.add(4 * at).cast()) }
}

#[inline(always)]
unsafe fn one<const BF16: bool>(p: *const u8, at: usize) -> f32 {
    if BF16 {
        bf16::from_bits(p.cast::<u16>().add(at).read_unaligned()).to_f32_const()
    } else {
        p.cast::<f32>().add(at).read_unaligned()
    }
}

/// Groups `range` times each token.
struct Few<'a> {
    w: RowGroups<'a>,
    range: Range<usize>,
    x: &'a [f32],
    y: Shared<'a>,
    packed: &'a mut [f32],
    level: Level,
}

impl Task for Few<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.w.values {
            Values::F32(data) => self.values::<S, false>(data),
            Values::BF16(data) => self.values::<S, true>(data),
            Values::Int8 { .. } => unreachable!("8-bit values have kernels of their own"),
        }
    }
}

impl Few<'_> {
    #[inline(always)]
    unsafe fn values<S: Simd, const BF16: bool>(self, data: &[u8]) {
        match self.w.pattern.group {
            2 => self.groups::<S, BF16, 2>(data),
            4 => self.groups::<S, BF16, 4>(data),
            8 => self.groups::<S, BF16, 8>(data),
            16 => self.groups::<S, BF16, 16>(data),
            _ => self.groups::<S, BF16, 32>(data),
        }
    }

    #[inline(always)]
    unsafe fn groups<S: Simd, const BF16: bool, const N: usize>(self, data: &[u8]) {
        let p = self.w.pattern;
        let size = if BF16 { 2 } else { 4 };
        for (token, x) in self.x.chunks_exact(p.cols).enumerate() {
            for first in self.range.clone().step_by(AHEAD) {
                let block = first..self.range.end.min(first + AHEAD);
                for (g, out) in block.clone().zip(self.packed.chunks_exact_mut(p.cols + 16)) {
                    pack(self.level, p.mask(g), x, out);
                }
                for (g, packed) in block.zip(self.packed.chunks_exact(p.cols + 16)) {
                    let (packed, lanes) = (&packed[..p.kept(g)], p.lanes(g));
                    let values = data.as_ptr().add(p.starts[g] * N * size);
                    let at = token * p.rows + g * N;
                    if lanes < N {
                        let sums = short::<BF16, N>(values, lanes, packed);
                        self.y.slice(at..at + lanes).copy_from_slice(&sums[..lanes]);
                        continue;
                    }
                    let sums = match self.level {
                        #[cfg(target_arch = "x86_64")]
                        Level::Avx512 | Level::Vnni if N < 16 => {
                            group_avx512::<BF16, N>(values, packed)
                        }
                        _ => group::<S, BF16, N>(values, packed),
                    };
                    self.y.slice(at..at + N).copy_from_slice(&sums);
                }
            }
        }
    }
}

/// Sums of the rows of a group with all its `N` rows.
#[inline(always)]
unsafe fn group<S: Simd, const BF16: bool, const N: usize>(
    values: *const u8,
    packed: &[f32],
) -> [f32; N] {
    let kept = packed.len();
    let mut acc = [S::splat(0.0); 4];
    let mut sums = [0.0; N];
    if N >= 16 {
        // One vector or two a column, four independent sums in all.
        let vectors = N / 16;
        let step = 4 / vectors;
        let mut k = 0;
        while k + step <= kept {
            for i in 0..step {
                let x = S::splat(*packed.get_unchecked(k + i));
                for v in 0..vectors {
                    let w = sixteen::<S, BF16>(values, (k + i) * N + 16 * v);
                    acc[i * vectors + v] = S::mul_add(w, x, acc[i * vectors + v]);
                }
            }
            k += step;
        }
        while k < kept {
            let x = S::splat(*packed.get_unchecked(k));
            for (v, acc) in acc[..vectors].iter_mut().enumerate() {
                *acc = S::mul_add(sixteen::<S, BF16>(values, k * N + 16 * v), x, *acc);
            }
            k += 1;
        }
        for v in 0..vectors {
            let mut sum = acc[v];
            for i in 1..step {
                sum = S::add(sum, acc[i * vectors + v]);
            }
            S::store(sums.as_mut_ptr().add(16 * v), sum);
        }
        return sums;
    }
    // Several columns a vector: their activations, each `N` times.
    let mut spread = [0.0_f32; CHUNK];
    let columns = CHUNK / N;
    for first in (0..kept).step_by(columns) {
        let part = &packed[first..kept.min(first + columns)];
        for (out, x) in spread.chunks_exact_mut(N).zip(part) {
            out.fill(*x);
        }
        let count = part.len() * N;
        let mut at = 0;
        while at + 64 <= count {
            for (i, acc) in acc.iter_mut().enumerate() {
                let w = sixteen::<S, BF16>(values, first * N + at + 16 * i);
                *acc = S::mul_add(w, S::load(spread.as_ptr().add(at + 16 * i)), *acc);
            }
            at += 64;
        }
        while at + 16 <= count {
            let w = sixteen::<S, BF16>(values, first * N + at);
            acc[0] = S::mul_add(w, S::load(spread.as_ptr().add(at)), acc[0]);
            at += 16;
        }
        for i in at..count {
            sums[i % N] += one::<BF16>(values, first * N + i) * spread[i];
        }
    }
    let mut all = [0.0; 16];
    S::store(all.as_mut_ptr(), S::add(S::add(acc[0], acc[1]), S::add(acc[2], acc[3])));
    for (i, v) in all.iter().enumerate() {
        sums[i % N] += v;
    }
    sums
}

/// The same for groups of fewer than 16 rows, which spreads activations in registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn group_avx512<const BF16: bool, const N: usize>(
    values: *const u8,
    packed: &[f32],
) -> [f32; N] {
    use std::arch::x86_64::*;
    let (kept, per) = (packed.len(), 16 / N);
    let load = |at: usize, left: usize| -> __m512 {
        // Values that are there; zeros behind them.
        let mask = if left >= 16 { !0 } else { (1_u16 << left) - 1 };
        prefetch(values.wrapping_add(at * if BF16 { 2 } else { 4 }));
        if BF16 {
            let p = values.wrapping_add(2 * at).cast();
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        } else {
            _mm512_maskz_loadu_ps(mask, values.wrapping_add(4 * at).cast())
        }
    };
    let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let lane = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(N.trailing_zeros() as i32));
    let mut acc = [_mm512_setzero_ps(); 4];
    let mut k = 0;
    while k + 16 <= kept {
        let x = _mm512_loadu_ps(packed.as_ptr().add(k));
        for v in 0..N {
            let place = _mm512_add_epi32(lane, _mm512_set1_epi32((v * per) as i32));
            let w = load((k + v * per) * N, 16);
            acc[v % 4] = _mm512_fmadd_ps(w, _mm512_permutexvar_ps(place, x), acc[v % 4]);
        }
        k += 16;
    }
    if k < kept {
        let mask = (1_u16 << (kept - k)) - 1;
        let x = _mm512_maskz_loadu_ps(mask, packed.as_ptr().add(k));
        for v in 0..(kept - k).div_ceil(per) {
            let place = _mm512_add_epi32(lane, _mm512_set1_epi32((v * per) as i32));
            let at = (k + v * per) * N;
            let w = load(at, kept * N - at);
            acc[0] = _mm512_fmadd_ps(w, _mm512_permutexvar_ps(place, x), acc[0]);
        }
    }
    let mut all = [0.0_f32; 16];
    let sum = _mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3]));
    _mm512_storeu_ps(all.as_mut_ptr(), sum);
    std::array::from_fn(|row| (0..per).map(|i| all[i * N + row]).sum())
}

/// The same with fewer rows: the last group of a weight only.
unsafe fn short<const BF16: bool, const N: usize>(
    values: *const u8,
    lanes: usize,
    packed: &[f32],
) -> [f32; N] {
    let mut sums = [0.0; N];
    for (k, x) in packed.iter().enumerate() {
        for (lane, sum) in sums[..lanes].iter_mut().enumerate() {
            *sum += one::<BF16>(values, k * lanes + lane) * x;
        }
    }
    sums
}

/// Which tokens a pass is for, and how far apart their results are.
#[derive(Clone, Copy)]
struct Place {
    first: usize,
    count: usize,
    stride: usize,
}

/// Groups `range` times panels of transposed activations.
struct Many<'a> {
    w: RowGroups<'a>,
    range: Range<usize>,
    xt: &'a [f32],
    y: Shared<'a>,
    place: Place,
    scratch: &'a mut [f32],
}

impl Task for Many<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let p: &Pattern = self.w.pattern;
        for g in self.range.clone() {
            let (kept, lanes) = (p.kept(g), p.lanes(g));
            let (values, columns) = self.scratch.split_at_mut(kept * lanes);
            let start = p.starts[g] * p.group;
            match self.w.values {
                Values::F32(data) => widen::<S, false>(data.as_ptr().add(4 * start), values),
                Values::BF16(data) => widen::<S, true>(data.as_ptr().add(2 * start), values),
                Values::Int8 { .. } => unreachable!("8-bit values have kernels of their own"),
            }
            // Columns are kept as the bits of f32: scratch memory has one type.
            for (out, column) in columns.iter_mut().zip(p.columns(g)) {
                *out = f32::from_bits(column as u32);
            }
            let columns = &columns[..kept];
            for (panel, xt) in self.xt.chunks_exact(PANEL * p.cols).enumerate() {
                let place = Place {
                    first: self.place.first + panel * PANEL,
                    count: PANEL.min(self.place.count - panel * PANEL),
                    stride: self.place.stride,
                };
                // As many rows at once as there are registers for.
                let mut lane = 0;
                while lane < lanes {
                    let tile = Tile { values, columns, xt, lanes, lane, row: g * p.group + lane };
                    let many = S::TILE >= 8;
                    let wide = many && place.count > 16;
                    lane += match lanes - lane {
                        8.. if wide => tile.multiply::<S, 8, 2>(self.y, place),
                        8.. if many => tile.multiply::<S, 8, 1>(self.y, place),
                        4.. if wide => tile.multiply::<S, 4, 2>(self.y, place),
                        4.. => tile.multiply::<S, 4, 1>(self.y, place),
                        2.. if wide => tile.multiply::<S, 2, 2>(self.y, place),
                        2.. => tile.multiply::<S, 2, 1>(self.y, place),
                        _ => tile.multiply::<S, 1, 2>(self.y, place),
                    };
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn widen<S: Simd, const BF16: bool>(values: *const u8, out: &mut [f32]) {
    let whole = out.len() / 16 * 16;
    for at in (0..whole).step_by(16) {
        S::store(out.as_mut_ptr().add(at), sixteen::<S, BF16>(values, at));
    }
    for (at, out) in out.iter_mut().enumerate().skip(whole) {
        *out = one::<BF16>(values, at);
    }
}

/// Rows from `lane` on of a group of `lanes` rows, times a panel.
struct Tile<'a> {
    values: &'a [f32],
    columns: &'a [f32],
    xt: &'a [f32],
    lanes: usize,
    lane: usize,
    row: usize,
}

impl Tile<'_> {
    /// `R` rows, `P` vectors of tokens at a time. Answers `R`.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const R: usize, const P: usize>(
        &self,
        y: Shared<'_>,
        place: Place,
    ) -> usize {
        for first in (0..place.count).step_by(16 * P) {
            let mut acc = [[S::splat(0.0); P]; R];
            let mut values = self.values.as_ptr().add(self.lane);
            for column in self.columns {
                let x = self.xt.as_ptr().add(column.to_bits() as usize * PANEL + first);
                let x: [S::F; P] = std::array::from_fn(|p| S::load(x.add(16 * p)));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let v = S::splat(*values.add(r));
                    for (acc, x) in acc.iter_mut().zip(x) {
                        *acc = S::mul_add(v, x, *acc);
                    }
                }
                values = values.add(self.lanes);
            }
            let at = (place.first + first) * place.stride + self.row;
            let count = (16 * P).min(place.count - first);
            put::<S, R, P>(acc, y, (at, place.stride), count);
        }
        R
    }
}
