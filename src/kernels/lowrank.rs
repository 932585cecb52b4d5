//! Products with thin bf16 factors, for adapters: `h = factor * A x`, then `y += B h`.
//!
//! Few rows meet many factors, each of them read once, so the bytes of the factors bound the time.
//! Rows that share their factors go together in tiles of [`TILE`], which read a factor once for all
//! of them. Work is shared out by blocks of ranks and of columns; every sum is made by one thread
//! in one order.

#![allow(unsafe_op_in_unsafe_fn)]

use std::ops::Range;

use half::bf16;

use super::simd::{self, Level, Simd, Task};
use super::threads::{self, Shared};

/// Rows that go through a factor together.
pub const TILE: usize = 4;
/// Columns of an output that are worth a unit of work of their own.
const COLUMNS: usize = 512;
/// Elements of factors that are worth another thread: some five microseconds from memory.
const GRAIN: usize = 1 << 15;

/// Rows of a matrix in groups; each row is in one group at most.
#[derive(Debug, Default)]
pub struct RowGroups {
    rows: Vec<u32>,
    ends: Vec<usize>,
    taken: Vec<bool>,
}

impl RowGroups {
    /// Starts anew for a matrix of `rows` rows, without groups. Keeps its memory.
    pub fn clear(&mut self, rows: usize) {
        self.rows.clear();
        self.ends.clear();
        self.taken.clear();
        self.taken.resize(rows, false);
    }

    /// Puts rows into the group that is being made. Panics for rows that do not exist or are taken.
    pub fn push(&mut self, rows: Range<usize>) {
        for row in rows {
            assert!(!std::mem::replace(&mut self.taken[row], true), "row {row} is in two groups");
            self.rows.push(row as u32);
        }
    }

    /// Ends the group that is being made.
    pub fn close(&mut self) {
        self.ends.push(self.rows.len());
    }

    pub fn groups(&self) -> usize {
        self.ends.len()
    }

    /// The rows of a group.
    pub fn rows(&self, group: usize) -> &[u32] {
        &self.rows[self.places(group)]
    }

    /// Places of a group within the list of all rows.
    pub fn places(&self, group: usize) -> Range<usize> {
        (if group == 0 { 0 } else { self.ends[group - 1] })..self.ends[group]
    }
}

/// At most [`TILE`] rows of one group, and where their coefficients start.
#[derive(Debug, Clone, Copy)]
pub struct Tile {
    pub group: usize,
    /// Place of the first row within the list of all rows.
    pub first: usize,
    pub count: usize,
    /// Where the coefficients of the tile start: `[ranks, count]`, the factors one after the other.
    pub at: usize,
}

/// What [`down`] computes at one go: `out = factor * A x` for the rows of a tile, `[ranks, count]`.
pub struct Down<'a> {
    /// Some rows of `A`, `[ranks, width]`.
    pub a: &'a [bf16],
    /// Places of the rows.
    pub places: Range<usize>,
    pub factor: f32,
}

/// Computes all units, each into the block of `h` that ends at its entry of `ends` and starts where
/// the one before ends. `x` is `[rows, width]`. Panics if a block does not have the size of its
/// unit.
pub fn down<'a>(
    groups: &RowGroups,
    ends: &[usize],
    unit: impl Fn(usize) -> Down<'a> + Sync,
    x: &[f32],
    width: usize,
    h: &mut [f32],
) {
    assert!(ends.is_sorted(), "blocks overlap");
    assert!(groups.taken.len() * width <= x.len(), "rows that do not exist");
    let elements = ends.last().copied().unwrap_or(0) * width;
    let grain = GRAIN * ends.len() / elements.max(1) + 1;
    let h = Shared::new(h);
    threads::for_ranges(ends.len(), grain, |range| {
        for i in range {
            let Down { a, places, factor } = unit(i);
            let start = if i == 0 { 0 } else { ends[i - 1] };
            // SAFETY: `ends` are sorted, so blocks are disjoint, and each belongs to one unit.
            let out = unsafe { h.slice(start..ends[i]) };
            let rows = &groups.rows[places];
            assert_eq!(out.len() * width, a.len() * rows.len());
            assert!(rows.len() <= TILE);
            simd::run(Level::best(), DownTask { a, rows, factor, x, width, out });
        }
    });
}

struct DownTask<'a> {
    a: &'a [bf16],
    rows: &'a [u32],
    factor: f32,
    x: &'a [f32],
    width: usize,
    out: &'a mut [f32],
}

impl DownTask<'_> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const N: usize>(self) {
        let x: [*const f32; N] = std::array::from_fn(|i| {
            // In bounds: rows are those of a group, and `x` holds all rows.
            self.x[self.rows[i] as usize * self.width..][..self.width].as_ptr()
        });
        for (a, out) in self.a.chunks_exact(self.width).zip(self.out.chunks_exact_mut(N)) {
            let p = a.as_ptr().cast::<u8>();
            // Two sums a row hide the latency of the addition.
            let mut sums = [[S::splat(0.0); 2]; N];
            let mut at = 0;
            while at + 32 <= self.width {
                let (low, high) = (S::load_bf16(p.add(2 * at)), S::load_bf16(p.add(2 * at + 32)));
                for (sum, x) in sums.iter_mut().zip(x) {
                    sum[0] = S::mul_add(low, S::load(x.add(at)), sum[0]);
                    sum[1] = S::mul_add(high, S::load(x.add(at + 16)), sum[1]);
                }
                at += 32;
            }
            for ((sum, x), out) in sums.into_iter().zip(x).zip(out) {
                let mut rest = 0.0;
                for (i, a) in a.iter().enumerate().skip(at) {
                    rest += a.to_f32_const() * *x.add(i);
                }
                *out = self.factor * (S::sum(S::add(sum[0], sum[1])) + rest);
            }
        }
    }
}

impl Task for DownTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.rows.len() {
            0 => {}
            1 => self.tile::<S, 1>(),
            2 => self.tile::<S, 2>(),
            3 => self.tile::<S, 3>(),
            _ => self.tile::<S, TILE>(),
        }
    }
}

/// `y[row] += sum over the parts of B h` for the rows of all tiles. `part(tile, i)` is the i-th
/// factor `B` of a tile, transposed: `[rank, width]`; None ends the list. `y` is `[rows, width]`.
/// Panics if tiles overlap.
pub fn up<'a>(
    groups: &RowGroups,
    tiles: &[Tile],
    part: impl Fn(&Tile, usize) -> Option<&'a [bf16]> + Sync,
    h: &[f32],
    y: &mut [f32],
    width: usize,
) {
    let mut end = 0;
    for tile in tiles {
        assert!(tile.first >= end && (1..=TILE).contains(&tile.count), "tiles overlap");
        end = tile.first + tile.count;
    }
    assert!(end <= groups.rows.len() && groups.taken.len() * width <= y.len());
    // Of the same size within one, so that no thread gets a sliver.
    let blocks = width.div_ceil(COLUMNS);
    let elements: usize = tiles
        .iter()
        .map(|t| (0..).map_while(|i| part(t, i)).map(<[bf16]>::len).sum::<usize>())
        .sum();
    let units = tiles.len() * blocks;
    let grain = GRAIN * units / elements.max(1) + 1;
    let y = Shared::new(y);
    threads::for_ranges(units, grain, |range| {
        for unit in range {
            let (tile, block) = (&tiles[unit / blocks], unit % blocks);
            // Whole vectors in every block but the last.
            let cut = |block: usize| (block * width / blocks).next_multiple_of(16).min(width);
            let columns = cut(block)..if block + 1 == blocks { width } else { cut(block + 1) };
            let rows = &groups.rows[tile.first..tile.first + tile.count];
            let mut at = tile.at;
            for i in 0.. {
                let Some(b) = part(tile, i) else { break };
                let ranks = b.len() / width;
                let h = &h[at..at + ranks * tile.count];
                at += h.len();
                let columns = columns.clone();
                simd::run(Level::best(), UpTask { b, rows, h, y, width, columns });
            }
        }
    });
}

struct UpTask<'a> {
    b: &'a [bf16],
    rows: &'a [u32],
    h: &'a [f32],
    y: Shared<'a>,
    width: usize,
    columns: Range<usize>,
}

impl UpTask<'_> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const N: usize>(self) {
        let Range { start, end } = self.columns;
        let mut y: [&mut [f32]; N] = std::array::from_fn(|i| {
            let first = self.rows[i] as usize * self.width;
            // SAFETY: a row is in one tile, and blocks of columns do not overlap, so nobody else
            // writes here.
            unsafe { self.y.slice(first + start..first + end) }
        });
        let mut at = start;
        while at + 32 <= end {
            let mut sums = [[S::splat(0.0); 2]; N];
            for (sum, y) in sums.iter_mut().zip(&y) {
                let p = y.as_ptr().add(at - start);
                *sum = [S::load(p), S::load(p.add(16))];
            }
            for (b, h) in self.b.chunks_exact(self.width).zip(self.h.chunks_exact(N)) {
                let p = b.as_ptr().add(at).cast::<u8>();
                let (low, high) = (S::load_bf16(p), S::load_bf16(p.add(32)));
                for (sum, h) in sums.iter_mut().zip(h) {
                    let h = S::splat(*h);
                    sum[0] = S::mul_add(h, low, sum[0]);
                    sum[1] = S::mul_add(h, high, sum[1]);
                }
            }
            for (sum, y) in sums.into_iter().zip(&mut y) {
                let p = y.as_mut_ptr().add(at - start);
                S::store(p, sum[0]);
                S::store(p.add(16), sum[1]);
            }
            at += 32;
        }
        for (b, h) in self.b.chunks_exact(self.width).zip(self.h.chunks_exact(N)) {
            for (y, h) in y.iter_mut().zip(h) {
                for (y, b) in y[at - start..].iter_mut().zip(&b[at..end]) {
                    *y += *h * b.to_f32_const();
                }
            }
        }
    }
}

impl Task for UpTask<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.rows.len() {
            0 => {}
            1 => self.tile::<S, 1>(),
            2 => self.tile::<S, 2>(),
            3 => self.tile::<S, 3>(),
            _ => self.tile::<S, TILE>(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factor(len: usize, seed: usize) -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(((i * 31 + seed * 17) % 13) as f32 - 6.0)).collect()
    }

    /// Both products of one group of all rows, with units of `ranks` ranks.
    fn both(
        rows: usize,
        (inner, outer): (usize, usize),
        rank: usize,
        ranks: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let (a, b) = (factor(rank * inner, 1), factor(rank * outer, 2));
        let x: Vec<f32> = (0..rows * inner).map(|i| ((i * 7) % 11) as f32 - 5.0).collect();
        let mut groups = RowGroups::default();
        groups.clear(rows);
        groups.push(0..rows);
        groups.close();
        let (mut tiles, mut units, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        let mut at = 0;
        for first in (0..rows).step_by(TILE) {
            let count = TILE.min(rows - first);
            tiles.push(Tile { group: 0, first, count, at });
            for r in (0..rank).step_by(ranks) {
                let r = r..rank.min(r + ranks);
                at += r.len() * count;
                units.push((first..first + count, r));
                ends.push(at);
            }
        }
        let mut h = vec![f32::NAN; at];
        let unit = |i: usize| {
            let (places, r) = units[i].clone();
            Down { a: &a[r.start * inner..r.end * inner], places, factor: 0.5 }
        };
        down(&groups, &ends, unit, &x, inner, &mut h);
        let mut y = vec![1.0; rows * outer];
        up(&groups, &tiles, |_, i| (i == 0).then_some(&b[..]), &h, &mut y, outer);

        let mut want = vec![1.0; rows * outer];
        for row in 0..rows {
            for r in 0..rank {
                let a = &a[r * inner..][..inner];
                let x = &x[row * inner..][..inner];
                let dot: f32 = a.iter().zip(x).map(|(a, x)| a.to_f32() * x).sum();
                for o in 0..outer {
                    want[row * outer + o] += 0.5 * dot * b[r * outer + o].to_f32();
                }
            }
        }
        (y, want)
    }

    #[test]
    fn products_equal_plain_loops() {
        // Small whole numbers: every sum is exact. Lengths around vectors and blocks of columns.
        for rows in [1, 2, 3, 4, 5, 9] {
            for (widths, rank, ranks) in [
                ((1, 1), 1, 1),
                ((31, 33), 3, 2),
                ((64, 16), 8, 8),
                ((70, 513), 5, 4),
                ((32, 1100), 16, 4),
            ] {
                let (got, want) = both(rows, widths, rank, ranks);
                assert_eq!(got, want, "{rows} rows, {widths:?}, rank {rank}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "in two groups")]
    fn a_row_is_in_one_group() {
        let mut groups = RowGroups::default();
        groups.clear(4);
        groups.push(0..2);
        groups.close();
        groups.push(1..3);
    }

    #[test]
    #[should_panic(expected = "tiles overlap")]
    fn tiles_do_not_overlap() {
        let mut groups = RowGroups::default();
        groups.clear(4);
        groups.push(0..4);
        groups.close();
        let tile = |first| Tile { group: 0, first, count: 3, at: 0 };
        up(&groups, &[tile(0), tile(1)], |_, _| None, &[], &mut [0.0; 4], 1);
    }
}
