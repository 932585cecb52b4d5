//! Products of f32 by tiles of bf16 (AMX): each number is the sum of three bf16 numbers, exactly, and a product of
//! two is the six products of these parts that count; what is left out is below 2^-22 of it and has either sign.
//!
//! Arithmetic bounds it: six products of tiles should take 96 cycles for what vectors of f32 take 256 for at their
//! peak. Measured with 1,024 rows, one thread: 300 to 340 GFLOP/s where vectors give 155 to 185 and the processor
//! adds up parts that are all in the first cache at 310 to 390. Taking both sides apart costs as much as some
//! products, so that it pays off from about a hundred rows on. Parts below the smallest normal number become zeros,
//! and what is infinite or above 3.39e38 gives what is no number.

#![allow(unsafe_op_in_unsafe_fn)]

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;
use std::sync::OnceLock;
use std::thread::LocalKey;

use super::strips::{GRAIN, LANES, Line, Result};
use super::{View, for_strips, pack};
use crate::kernels::simd::Level;
use crate::kernels::{threads, tiles};

/// Steps of a tile: rows and strips are padded to these with zeros.
const DEPTH: usize = 32;
/// Lines of the three tiles that parts of 16 rows or columns over [`DEPTH`] steps take.
const TILES: usize = 3 * LANES;
/// Tiles of steps, at most, whose parts of the left matrix are made at once.
const STEPS: usize = 20;
/// Lines of parts of the right matrix that are made at once: six megabytes.
const ROOM: usize = 3 << 15;
/// Rows from which taking the right side apart pays off.
const ENOUGH: usize = 96;
/// Columns below which taking the left side apart does not.
const NARROW: usize = 3 * LANES;
/// Rows that are multiplied together.
const BLOCK: usize = 2 * LANES;
/// Rows that meet the same strips before the next strips come.
const PASS: usize = 8 * BLOCK;

/// Whether a product of `rows` by `columns` over `steps` is to be taken in parts: the processor has tiles, and there is
/// enough for them.
pub fn suit(level: Level, rows: usize, steps: usize, columns: usize) -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    let available = || *AVAILABLE.get_or_init(tiles::available);
    let enough = rows >= ENOUGH && steps >= DEPTH && columns >= NARROW;
    level >= Level::Avx512 && enough && available()
}

/// As [`super::strips::multiply`].
///
/// # Safety
/// As of it, and [`suit`] said yes.
pub unsafe fn multiply(
    level: Level,
    a: View<'_>,
    lines: &[Line],
    result: Result<'_>,
    parallel: bool,
) {
    let columns = result.columns;
    let (strips, all) = (columns.div_ceil(LANES), a.cols.div_ceil(DEPTH));
    // Some strips are taken apart, then multiplied.
    let each = (ROOM / (2 * all * TILES)).max(1) * 2;
    with_room(&RIGHT, each.min(strips) * all * TILES, |room| {
        for first in (0..strips).step_by(each) {
            let count = each.min(strips - first);
            let right = &mut room[..count * all * TILES];
            let grain = if parallel { (1 << 14) / (LANES * a.cols) + 1 } else { count };
            for_strips(right, all * TILES, grain, |strip, parts| {
                let lines = &lines[(first + strip) * a.cols..][..a.cols];
                // SAFETY: the processor has the instructions.
                unsafe { take_apart(lines, parts) };
            });
            let slab = Slab {
                right,
                tiles: all,
                first: first * LANES,
                columns: (count * LANES).min(columns - first * LANES),
            };
            slab.multiply(level, a, result, parallel);
        }
    });
}

/// The parts of some strips: `[strips][tiles of steps][3][16 pairs of steps]`.
struct Slab<'a> {
    right: &'a [Line],
    /// Tiles of steps.
    tiles: usize,
    /// The first column, and how many there are.
    first: usize,
    columns: usize,
}

impl Slab<'_> {
    /// # Safety
    /// As of [`multiply`].
    unsafe fn multiply(&self, level: Level, a: View<'_>, result: Result<'_>, parallel: bool) {
        let (groups, blocks) = (self.columns.div_ceil(2 * LANES), a.rows.div_ceil(BLOCK));
        let wanted = if parallel { 4 * threads::threads() } else { 1 };
        let passes = blocks.div_ceil(PASS / BLOCK);
        let parts = wanted.div_ceil(passes).clamp(1, groups);
        // Steps go in parts of equally many tiles, which depend on nothing but their number.
        let each = self.tiles.div_ceil(self.tiles.div_ceil(STEPS));
        let work = |items: Range<usize>| {
            with_room(&LEFT, PASS / LANES * each * TILES, |ordered| {
                // SAFETY: the processor has tiles.
                let _tiles = unsafe { tiles::Configured::new() };
                for first in (0..self.tiles).step_by(each) {
                    let depth = first..self.tiles.min(first + each);
                    let steps = first * DEPTH..a.cols.min(depth.end * DEPTH);
                    let mut inside = usize::MAX;
                    for item in items.clone() {
                        let (pass, part) = (item / parts, item % parts);
                        let rows = pass * blocks / passes * BLOCK
                            ..a.rows.min((pass + 1) * blocks / passes * BLOCK);
                        if pass != inside {
                            // SAFETY: the processor has the instructions.
                            unsafe { order(level, a, rows.clone(), steps.clone(), ordered) };
                            inside = pass;
                        }
                        let adding = result.accumulate || first > 0;
                        let piece = Piece {
                            ordered,
                            slab: self,
                            rows,
                            depth: depth.clone(),
                            result,
                            adding,
                        };
                        for group in part * groups / parts..(part + 1) * groups / parts {
                            // SAFETY: tiles are configured; pieces of the result are disjoint.
                            unsafe { piece.multiply(group * 2 * LANES) };
                        }
                    }
                }
            });
        };
        if parallel {
            let each = a.rows.div_ceil(passes) * self.columns.div_ceil(parts) * a.cols;
            threads::for_ranges(passes * parts, 2 * GRAIN / each.max(1) + 1, work);
        } else {
            work(0..passes * parts);
        }
    }
}

type Room = LocalKey<Cell<Vec<Line>>>;

thread_local! {
    static LEFT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    static RIGHT: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Room for parts, kept by the thread between calls.
fn with_room(kept: &'static Room, len: usize, work: impl FnOnce(&mut [Line])) {
    let mut room = kept.take();
    if room.len() < len {
        // Nothing of the old is needed, and both at once would be.
        drop(room);
        room = vec![Line::ZERO; len];
    }
    work(&mut room[..len]);
    kept.set(room);
}

/// Writes the three parts of 32 numbers, those of `low` in the lower halves, a tile apart.
///
/// # Safety
/// The processor has the instructions; `out` is valid for three tiles.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn split(low: __m512, high: __m512, out: *mut Line) {
    // The nearest bf16 number.
    let half = _mm512_set1_epi32(0x8000);
    let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let top = |v: __m512| {
        let bits = _mm512_castps_si512(v);
        _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(bits, half), mask))
    };
    let pair = |low: __m512, high: __m512| {
        // Tails may be below the smallest normal number, and then have more bits than fit.
        let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(low));
        _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(high), mask))
    };
    let heads = [top(low), top(high)];
    let rests = [_mm512_sub_ps(low, heads[0]), _mm512_sub_ps(high, heads[1])];
    let middles = [top(rests[0]), top(rests[1])];
    let tails = [_mm512_sub_ps(rests[0], middles[0]), _mm512_sub_ps(rests[1], middles[1])];
    for (part, [low, high]) in [heads, middles, tails].into_iter().enumerate() {
        _mm512_store_si512(out.add(part * LANES).cast(), pair(low, high));
    }
}

/// Writes the parts of some rows of `a` over some steps: `[tiles of rows][tiles of steps][3][16 rows]`. Rows and
/// steps that fill up tiles are zeros.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn order(
    level: Level,
    a: View<'_>,
    rows: Range<usize>,
    steps: Range<usize>,
    out: &mut [Line],
) {
    let depth = steps.len().div_ceil(DEPTH);
    let tiles = rows.len().next_multiple_of(BLOCK) / LANES;
    assert!(tiles * depth * TILES <= out.len());
    for tile in 0..tiles {
        let first = rows.start + tile * LANES;
        let count = LANES.min(rows.end.saturating_sub(first));
        for (at, step) in steps.clone().step_by(DEPTH).enumerate() {
            let out = out.as_mut_ptr().add((tile * depth + at) * TILES);
            let left = steps.end - step;
            if a.col_stride == 1 && count == LANES && left >= DEPTH {
                let row = &a.data[first * a.row_stride + step..];
                assert!(15 * a.row_stride + DEPTH <= row.len());
                for i in 0..LANES {
                    let row = row.as_ptr().add(i * a.row_stride);
                    split(_mm512_loadu_ps(row), _mm512_loadu_ps(row.add(LANES)), out.add(i));
                }
                continue;
            }
            let mut halves = [[Line::ZERO; LANES]; 2];
            for (half, from) in halves.iter_mut().zip([0, LANES]) {
                let many = LANES.min(left.saturating_sub(from));
                if many == 0 || count == 0 {
                    continue;
                }
                let start = first * a.row_stride + (step + from) * a.col_stride;
                if a.col_stride == 1 {
                    for (i, line) in half[..count].iter_mut().enumerate() {
                        let row = &a.data[start + i * a.row_stride..][..many];
                        match row.first_chunk() {
                            Some(row) if many == LANES => line.0 = *row,
                            _ => line.0[..many].copy_from_slice(row),
                        }
                    }
                } else if a.row_stride == 1 {
                    pack::columns(level, &a.data[start..], a.col_stride, many, &mut half[..count]);
                } else {
                    for (i, line) in half[..count].iter_mut().enumerate() {
                        for (k, out) in line.0[..many].iter_mut().enumerate() {
                            *out = a.data[start + i * a.row_stride + k * a.col_stride];
                        }
                    }
                }
            }
            for (row, (low, high)) in halves[0].iter().zip(&halves[1]).enumerate() {
                let (low, high) = (_mm512_load_ps(low.0.as_ptr()), _mm512_load_ps(high.0.as_ptr()));
                split(low, high, out.add(row));
            }
        }
    }
}

/// Writes the parts of a strip; steps that fill up the last tile are zeros.
///
/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn take_apart(lines: &[Line], parts: &mut [Line]) {
    for (lines, parts) in lines.chunks(DEPTH).zip(parts.chunks_exact_mut(TILES)) {
        let load = |i: usize| match lines.get(i) {
            Some(line) => _mm512_load_ps(line.0.as_ptr()),
            None => _mm512_setzero_ps(),
        };
        for pair in 0..LANES {
            split(load(pair), load(pair + LANES), parts.as_mut_ptr().add(pair));
        }
    }
}

/// The rows of a pass over some steps.
struct Piece<'a> {
    /// As [`order`] writes them.
    ordered: &'a [Line],
    slab: &'a Slab<'a>,
    rows: Range<usize>,
    /// Tiles of steps.
    depth: Range<usize>,
    result: Result<'a>,
    adding: bool,
}

impl Piece<'_> {
    /// The rows by the two strips that begin at a column of the slab.
    ///
    /// # Safety
    /// Tiles are configured, and nobody else uses these elements of the result.
    unsafe fn multiply(&self, column: usize) {
        let Slab { right, tiles, columns, .. } = *self.slab;
        let depth = self.depth.len();
        // A strip that is missing is multiplied as its neighbour and not stored.
        let strips = [column / LANES, (columns - 1).min(column + LANES) / LANES];
        let b = strips.map(|strip| right[(strip * tiles + self.depth.start) * TILES..].as_ptr());
        for row in (0..self.rows.len()).step_by(BLOCK) {
            let a = [0, 1].map(|i| self.ordered[(row / LANES + i) * depth * TILES..].as_ptr());
            self.block((row, column), self.adding, a, b, depth);
        }
    }

    /// Two tiles of rows by two strips over `count` tiles of steps.
    ///
    /// # Safety
    /// As of `multiply`; the pointers are those of as many tiles.
    unsafe fn block(
        &self,
        (row, column): (usize, usize),
        adding: bool,
        a: [*const Line; 2],
        b: [*const Line; 2],
        count: usize,
    ) {
        let Result { c, stride, .. } = self.result;
        let at = |i: usize| {
            let (row, column) = (row + i / 2 * LANES, column + i % 2 * LANES);
            let rows = LANES.min(self.rows.len().saturating_sub(row));
            let columns = LANES.min(self.slab.columns.saturating_sub(column));
            ((self.rows.start + row) * stride + self.slab.first + column, rows, columns)
        };
        let mut edge = [Line::ZERO; LANES];
        for i in 0..4 {
            let (start, rows, columns) = at(i);
            if !adding || rows == 0 || columns == 0 {
                tiles::zero(i);
            } else if rows == LANES && columns == LANES {
                tiles::load(i, c.at(start), 4 * stride);
            } else {
                for (row, line) in edge[..rows].iter_mut().enumerate() {
                    let from = std::slice::from_raw_parts(c.at(start + row * stride), columns);
                    line.0[..columns].copy_from_slice(from);
                }
                tiles::load(i, edge.as_ptr().cast(), 4 * LANES);
            }
        }
        for step in 0..count {
            let [a, other_a] = a.map(|a| a.add(step * TILES));
            let [b, other_b] = b.map(|b| b.add(step * TILES));
            asm!(
                // Heads by heads, tails and middles.
                "tileloadd tmm4, [{a} + {line}*1]",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tileloadd tmm7, [{other_b} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{other_a} + {line}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm6, [{b} + {line}*1 + 2048]",
                "tileloadd tmm7, [{other_b} + {line}*1 + 2048]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm6, [{b} + {line}*1 + 1024]",
                "tileloadd tmm7, [{other_b} + {line}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // Middles by middles and heads.
                "tileloadd tmm4, [{a} + {line}*1 + 1024]",
                "tileloadd tmm5, [{other_a} + {line}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm6, [{b} + {line}*1]",
                "tileloadd tmm7, [{other_b} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                // Tails by heads.
                "tileloadd tmm4, [{a} + {line}*1 + 2048]",
                "tileloadd tmm5, [{other_a} + {line}*1 + 2048]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                a = in(reg) a,
                other_a = in(reg) other_a,
                b = in(reg) b,
                other_b = in(reg) other_b,
                line = in(reg) 64_usize,
                options(nostack, readonly)
            );
        }
        for i in 0..4 {
            let (start, rows, columns) = at(i);
            if rows == 0 || columns == 0 {
                continue;
            }
            if rows == LANES && columns == LANES {
                tiles::store(i, c.at(start), 4 * stride);
                continue;
            }
            tiles::store(i, edge.as_mut_ptr().cast(), 4 * LANES);
            for (row, line) in edge[..rows].iter().enumerate() {
                let start = start + row * stride;
                c.slice(start..start + columns).copy_from_slice(&line.0[..columns]);
            }
        }
    }
}
