//! The inside of dense f32 products: rows of the left matrix by strips of 16 columns of the right one.
//!
//! A strip holds its columns side by side, so that a vector is one row of it. A tile of sums, some rows by
//! some strips, stays in registers over [`DEPTH`] steps; the part of the strips that it reads stays in the
//! first cache while all rows of a pass go by, and those, put in the order in which they are read, in the
//! second. Arithmetic bounds it: about 85 % of the peak of the vector units was measured.

#![allow(unsafe_op_in_unsafe_fn)]

use std::cell::Cell;
use std::ops::Range;

use super::View;
use crate::kernels::simd::{self, Level, Simd, Task};
use crate::kernels::threads::{self, Shared};

/// Columns of a strip.
pub const LANES: usize = 16;
/// Strips that are multiplied together.
pub const STRIPS: usize = 4;
/// Rows of a tile.
const TILE: usize = 6;
/// Steps after which sums go back to memory: of four strips they read 24 KiB.
const DEPTH: usize = 96;
/// Steps whose part of the left matrix is put in order at once.
const STEPS: usize = 16 * DEPTH;
/// Rows that meet the same strips before the next strips come.
const PASS: usize = 16 * TILE;
/// Multiply-adds that are worth a thread of their own: a few microseconds.
pub const GRAIN: usize = 1 << 18;

/// A row of a strip: a line of the caches, so that no vector lies in two.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [f32; LANES]);

impl Line {
    pub const ZERO: Self = Self([0.0; LANES]);
}

/// The right matrix.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    /// `[strips][steps]`; columns that fill up the last strip are of any content.
    Packed(&'a [Line]),
    /// Rows `stride` elements apart whose columns are whole strips, read where they are.
    Plain { data: &'a [f32], stride: usize },
}

/// Where a result goes: columns of a row-major matrix, the first at its start.
#[derive(Clone, Copy)]
pub struct Result<'a> {
    pub c: Shared<'a>,
    /// Elements from a row to the next.
    pub stride: usize,
    pub columns: usize,
    /// Columns of the whole product, of which these may be some.
    pub of: usize,
    /// Whether the product is added to what is there.
    pub accumulate: bool,
}

/// Writes the product of `a` and `right`; parallel if wished. Steps are added in order, so that an element
/// does not depend on how the work is split, and on the other rows and columns only in whether they are enough for
/// products in [parts](super::parts).
///
/// # Safety
/// All elements of the result lie inside `c`, and of `right` inside its memory: `a.cols` steps of as many
/// columns as the result has. Nobody else reads or writes these elements of `c`.
pub unsafe fn multiply(
    level: Level,
    a: View<'_>,
    right: Right<'_>,
    result: Result<'_>,
    parallel: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if let Right::Packed(lines) = right
        && super::parts::suit(level, a.rows, a.cols, result.of)
    {
        return super::parts::multiply(level, a, lines, result, parallel);
    }
    by_vectors(level, a, right, result, parallel);
}

/// [`multiply`] without parts.
///
/// # Safety
/// As of it.
pub(super) unsafe fn by_vectors(
    level: Level,
    a: View<'_>,
    right: Right<'_>,
    result: Result<'_>,
    parallel: bool,
) {
    let columns = result.columns;
    let (groups, tiles) = (columns.div_ceil(STRIPS * LANES), a.rows.div_ceil(TILE));
    // Equally much for each thread: passes of equally many tiles, or where there are few, parts of the strips.
    let wanted = if parallel { 4 * threads::threads() } else { 1 };
    let mut passes = tiles.div_ceil(PASS / TILE);
    let mut parts = 1;
    if tiles >= 4 * wanted {
        passes = passes.next_multiple_of(wanted);
    } else {
        parts = wanted.div_ceil(passes.max(1)).clamp(1, groups.max(1));
    }
    let work = |items: Range<usize>| {
        with_ordered(PASS * a.cols.min(STEPS), |ordered| {
            for first in (0..a.cols).step_by(STEPS) {
                let steps = first..a.cols.min(first + STEPS);
                let mut inside = usize::MAX;
                for item in items.clone() {
                    let (pass, part) = (item / parts, item % parts);
                    let rows = pass * tiles / passes * TILE
                        ..a.rows.min((pass + 1) * tiles / passes * TILE);
                    if pass != inside {
                        order(a, rows.clone(), steps.clone(), ordered);
                        inside = pass;
                    }
                    let groups = part * groups / parts..(part + 1) * groups / parts;
                    let strips =
                        groups.start * STRIPS..columns.div_ceil(LANES).min(groups.end * STRIPS);
                    let adding = result.accumulate || first > 0;
                    let depth = a.cols;
                    let steps = steps.clone();
                    let piece =
                        Piece { ordered, right, depth, rows, steps, strips, result, adding };
                    simd::run(level, piece);
                }
            }
        });
    };
    if parallel {
        let each = a.rows.div_ceil(passes.max(1)) * columns.div_ceil(parts) * a.cols;
        threads::for_ranges(passes * parts, GRAIN / each.max(1) + 1, work);
    } else {
        work(0..passes * parts);
    }
}

thread_local! {
    static ORDERED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Room for a part of the left matrix, kept by the thread between calls.
fn with_ordered(len: usize, work: impl FnOnce(&mut [f32])) {
    let mut room = ORDERED.take();
    if room.len() < len {
        room = vec![0.0; len];
    }
    work(&mut room[..len]);
    ORDERED.set(room);
}

/// Puts a part of `a` in the order `[tiles][steps][TILE]`; rows that fill up the last tile are left alone.
fn order(a: View<'_>, rows: Range<usize>, steps: Range<usize>, out: &mut [f32]) {
    let tiles = out.chunks_exact_mut(TILE * steps.len());
    for (first, tile) in rows.clone().step_by(TILE).zip(tiles) {
        let count = TILE.min(rows.end - first);
        if a.row_stride == 1 {
            for (step, out) in steps.clone().zip(tile.chunks_exact_mut(TILE)) {
                out[..count].copy_from_slice(&a.data[step * a.col_stride + first..][..count]);
            }
        } else if a.col_stride == 1 && count == TILE {
            let row = |i: usize| &a.data[(first + i) * a.row_stride..][steps.clone()];
            let rows: [&[f32]; TILE] = std::array::from_fn(row);
            for (step, out) in tile.chunks_exact_mut(TILE).enumerate() {
                for (out, row) in out.iter_mut().zip(rows) {
                    *out = row[step];
                }
            }
        } else {
            for (step, out) in steps.clone().zip(tile.chunks_exact_mut(TILE)) {
                for (i, out) in out[..count].iter_mut().enumerate() {
                    *out = a.data[(first + i) * a.row_stride + step * a.col_stride];
                }
            }
        }
    }
}

/// Some rows by some strips over some steps.
struct Piece<'a> {
    /// The rows, `[tiles][steps][TILE]`.
    ordered: &'a [f32],
    right: Right<'a>,
    /// All steps of the product.
    depth: usize,
    rows: Range<usize>,
    steps: Range<usize>,
    strips: Range<usize>,
    result: Result<'a>,
    adding: bool,
}

impl Task for Piece<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // 6 rows by 4 strips fill 24 of 32 registers, by one strip 12 of 16 of half the width.
        let width = if S::TILE >= 8 { STRIPS } else { 1 };
        let mut strip = self.strips.start;
        while strip < self.strips.end {
            match width.min(self.strips.end - strip) {
                4 => self.group::<S, 4>(strip),
                3 => self.group::<S, 3>(strip),
                2 => self.group::<S, 2>(strip),
                _ => self.group::<S, 1>(strip),
            }
            strip += width;
        }
    }
}

impl Piece<'_> {
    /// All rows and steps of `N` strips from `strip` on.
    ///
    /// # Safety
    /// The strips are some of the piece's, and the processor has the instructions of `S`.
    #[inline(always)]
    unsafe fn group<S: Simd, const N: usize>(&self, strip: usize) {
        let (steps, rows) = (self.steps.len(), self.rows.len());
        for from in (0..steps).step_by(DEPTH) {
            let steps = from..steps.min(from + DEPTH);
            let mut row = 0;
            while row + TILE <= rows {
                self.tile::<S, TILE, N>(strip, row, steps.clone());
                row += TILE;
            }
            if row + 4 <= rows {
                self.tile::<S, 4, N>(strip, row, steps.clone());
                row += 4;
            }
            if row + 2 <= rows {
                self.tile::<S, 2, N>(strip, row, steps.clone());
                row += 2;
            }
            if row < rows {
                self.tile::<S, 1, N>(strip, row, steps);
            }
        }
    }

    /// Adds some steps to the sums of `T` rows, counted from the piece's first, by `N` strips.
    ///
    /// # Safety
    /// As of `group`; the rows are some of the piece's and lie in one tile of the order.
    #[inline(always)]
    unsafe fn tile<S: Simd, const T: usize, const N: usize>(
        &self,
        strip: usize,
        row: usize,
        steps: Range<usize>,
    ) {
        let first = strip * LANES;
        let Result { c: out, stride, columns, .. } = self.result;
        let whole = first + N * LANES <= columns;
        let c = |t: usize, n: usize| (self.rows.start + row + t) * stride + first + n * LANES;
        let mut sums = [[S::splat(0.0); N]; T];
        if self.adding || steps.start > 0 {
            for (t, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    let at = out.at(c(t, n));
                    if whole {
                        *sum = S::load(at);
                    } else {
                        let mut some = [0.0; LANES];
                        let count = LANES.min(columns - first - n * LANES);
                        some[..count].copy_from_slice(std::slice::from_raw_parts(at, count));
                        *sum = S::load(some.as_ptr());
                    }
                }
            }
        }
        let (mut w, strip_stride, step_stride) = match self.right {
            Right::Packed(lines) => {
                let step = self.steps.start + steps.start;
                debug_assert!((strip + N) * self.depth <= lines.len());
                let start = lines.as_ptr().add(strip * self.depth + step);
                (start.cast::<f32>(), self.depth * LANES, LANES)
            }
            Right::Plain { data, stride } => {
                let step = self.steps.start + steps.start;
                (data.as_ptr().add(step * stride + first), LANES, stride)
            }
        };
        let tile = row / TILE * TILE * self.steps.len() + steps.start * TILE + row % TILE;
        debug_assert!(tile + (steps.len() - 1) * TILE + T <= self.ordered.len());
        let mut x = self.ordered.as_ptr().add(tile);
        for _ in steps {
            let line: [S::F; N] = std::array::from_fn(|n| S::load(w.add(n * strip_stride)));
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = S::splat(*x.add(t));
                for (sum, w) in sums.iter_mut().zip(line) {
                    *sum = S::mul_add(x, w, *sum);
                }
            }
            // Only compared, never read, after the last step.
            w = w.wrapping_add(step_stride);
            x = x.wrapping_add(TILE);
        }
        for (t, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                let at = c(t, n);
                if whole {
                    S::store(out.at(at), sum);
                } else {
                    let mut some = [0.0; LANES];
                    S::store(some.as_mut_ptr(), sum);
                    let count = LANES.min(columns - first - n * LANES);
                    out.slice(at..at + count).copy_from_slice(&some[..count]);
                }
            }
        }
    }
}
