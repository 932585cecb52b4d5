//! Many tokens on AVX-512: tokens are lanes, and each quad of a row's values is spread over them.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{QUAD, Shared, Weight, as_bytes, threads, with_scratch};

/// Up to here rows are lanes.
pub(super) const FEW: usize = 12;

/// Tokens of a panel of transposed activations.
const PANEL: usize = 32;

/// Bytes of the panels that one pass over the weight uses: they stay in the second-level cache.
const PASS: usize = 1 << 20;

/// Panels of transposed activations, tokens as lanes.
pub(super) fn multiply(w: Weight<'_>, rounded: &[u8], steps: &[f32], y: Shared<'_>) {
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
                    let many = Many { w, range, xt, steps: &steps[first..first + count], y, first };
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
        for (token, _) in self.steps.iter().enumerate() {
            let at = (self.first + token) * w.pattern.rows + self.row;
            let results: [f32; R] = out.each_ref().map(|row| row[token]);
            y.slice(at..at + R).copy_from_slice(&results);
        }
        R
    }
}
