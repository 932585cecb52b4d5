//! Products of several matrices with the same activations, shared out over the threads.

#![allow(unsafe_op_in_unsafe_fn)]

use std::ops::Range;

use super::super::quantize::{Activations, BLOCK};
use super::super::simd::{self, Level, Simd, Task};
use super::super::threads::{self, Shared};
#[cfg(target_arch = "x86_64")]
use super::amx;
use super::kept::{self, Kept};
use super::panels::LANES;
use super::scales::{Factors, Min, One, Scales, SignedFactors, Zero};
use super::tile::{All, Panel, Stream, tile};
use super::whole::{self, Bytes, Dual, Groups};
use super::{Codes, Kind, Packed};

/// A matrix and where its product goes, `[tokens, rows]`.
pub struct Job<'a> {
    pub weight: &'a Packed,
    pub y: &'a mut [f32],
}

/// Multiply-adds that are worth a thread of their own: a few microseconds.
const GRAIN: usize = 1 << 17;

/// `y[t, o] = sum_i x[t, i] w[o, i]` for each job that is there, overwritten. Panics if sizes do not fit.
pub fn multiply(x: &Activations, jobs: &mut [Option<Job<'_>>]) {
    multiply_at(Level::best(), true, x, jobs);
}

/// With the instructions of `level`, and tiles only if `tiles`.
pub(super) fn multiply_at(
    level: Level,
    tiles: bool,
    x: &Activations,
    jobs: &mut [Option<Job<'_>>],
) {
    if x.tokens() == 0 {
        return;
    }
    let mut outputs: Outputs<'_> = [None; 4];
    assert!(jobs.len() <= outputs.len(), "too many products at once");
    for (output, job) in outputs.iter_mut().zip(jobs) {
        let Some(job) = job else { continue };
        assert_eq!(job.weight.cols, x.cols(), "columns of a product do not fit");
        assert_eq!(job.weight.grain(), x.grain(), "activations are rounded for another layout");
        assert_eq!(job.y.len(), x.tokens() * job.weight.rows, "sizes of a product do not fit");
        *output = Some((job.weight, Shared::new(job.y)));
    }
    // The panels of all jobs in one row.
    let panels: usize = outputs.iter().flatten().map(|(weight, _)| weight.panels()).sum();
    let grain = GRAIN / (LANES * x.cols() * x.tokens()) + 1;
    let scratch = if tiles { tile_scratch(x) } else { 0 };
    threads::for_ranges(panels, grain, |range| {
        let mut start = 0;
        for (weight, y) in outputs.iter().flatten() {
            let end = start + weight.panels();
            let own = range.start.max(start)..range.end.min(end);
            if !own.is_empty() {
                let panels = own.start - start..own.end - start;
                threads::with_scratch(scratch, |scratch| {
                    let piece = Piece { weight, panels, x, y: *y, scratch };
                    match weight.codes {
                        Codes::All(_) => simd::run(level, piece),
                        Codes::Kept(_) => simd::run_expanding(level, Sparse(piece)),
                    }
                });
            }
            start = end;
        }
    });
}

/// Elements of scratch that tiles take; 0 where they are not to be used.
#[cfg(target_arch = "x86_64")]
fn tile_scratch(x: &Activations) -> usize {
    if x.tokens() >= amx::TOKENS && amx::available() {
        // f32 is how scratch is counted; a line more, to start at a line.
        return 2 * amx::unpacked_bytes(x.cols()) / 4 + 16;
    }
    0
}

#[cfg(not(target_arch = "x86_64"))]
fn tile_scratch(_: &Activations) -> usize {
    0
}

/// As many jobs as ever share their input: q, k and v.
type Outputs<'a> = [Option<(&'a Packed, Shared<'a>)>; 4];

/// Some panels of a job.
struct Piece<'a> {
    weight: &'a Packed,
    panels: Range<usize>,
    x: &'a Activations,
    y: Shared<'a>,
    /// Room for two unpacked panels, if tiles are to be used.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    scratch: &'a mut [f32],
}

impl Task for Piece<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let w = self.weight;
        match (w.bits, w.kind) {
            (4, Kind::Block { zero }) => self.panels::<S, All<4>, _>(One(1), zero),
            (5, Kind::Block { zero }) => self.panels::<S, All<5>, _>(One(1), zero),
            (8, Kind::Block { zero }) => self.panels::<S, All<8>, _>(One(1), zero),
            (4, Kind::BlockMin) => self.panels::<S, All<4>, _>(Min, 0),
            (5, Kind::BlockMin) => self.panels::<S, All<5>, _>(Min, 0),
            (4, Kind::Super) => self.panels::<S, All<4>, _>(Factors, 0),
            (5, Kind::Super) => self.panels::<S, All<5>, _>(Factors, 0),
            (6, Kind::SuperSigned) => self.panels::<S, All<6>, _>(SignedFactors, 32),
            (2, Kind::Group { blocks, zero }) => self.panels::<S, All<2>, _>(One(blocks), zero),
            (3, Kind::Group { blocks, zero }) => self.panels::<S, All<3>, _>(One(blocks), zero),
            (4, Kind::Group { blocks, zero }) => self.panels::<S, All<4>, _>(One(blocks), zero),
            (8, Kind::Group { blocks, zero }) => self.panels::<S, All<8>, _>(One(blocks), zero),
            (2, Kind::GroupZero { blocks }) => {
                self.panels::<S, All<2>, _>(Zero { blocks, less: 0 }, 0)
            }
            (3, Kind::GroupZero { blocks }) => {
                self.panels::<S, All<3>, _>(Zero { blocks, less: 0 }, 0)
            }
            (4, Kind::GroupZero { blocks }) => {
                self.panels::<S, All<4>, _>(Zero { blocks, less: 0 }, 0)
            }
            (8, Kind::GroupZero { blocks }) => {
                self.panels::<S, All<8>, _>(Zero { blocks, less: 128 }, 128);
            }
            (8, Kind::Row) => {
                let groups = Bytes { blocks: w.cols / BLOCK };
                self.rows::<S, 8, _>(groups);
            }
            (4, Kind::Dual { blocks }) => self.rows::<S, 4, _>(Dual { blocks }),
            _ => unreachable!("no matrix is packed so"),
        }
    }
}

/// Panels of which only some codes are stored.
struct Sparse<'a>(Piece<'a>);

impl Task for Sparse<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (width, kind) = (kept::width(self.0.weight.bits), self.0.weight.kind);
        match (width, kind) {
            (2, Kind::Group { blocks, zero }) => self.0.panels::<S, Kept<2>, _>(One(blocks), zero),
            (4, Kind::Group { blocks, zero }) => self.0.panels::<S, Kept<4>, _>(One(blocks), zero),
            (8, Kind::Group { blocks, zero }) => self.0.panels::<S, Kept<8>, _>(One(blocks), zero),
            (2, Kind::GroupZero { blocks }) => {
                self.0.panels::<S, Kept<2>, _>(Zero { blocks, less: 0 }, 0);
            }
            (4, Kind::GroupZero { blocks }) => {
                self.0.panels::<S, Kept<4>, _>(Zero { blocks, less: 0 }, 0);
            }
            (8, Kind::GroupZero { blocks }) => {
                self.0.panels::<S, Kept<8>, _>(Zero { blocks, less: 128 }, 128);
            }
            _ => unreachable!("no matrix is packed so"),
        }
    }
}

impl Piece<'_> {
    /// # Safety
    /// `C`, the reader and `zero` are those of the matrix; the processor has the instructions of `S`;
    /// no other thread writes the columns of these panels.
    #[inline(always)]
    unsafe fn panels<S: Simd, C: Stream, G: Scales>(mut self, reader: G, zero: u8) {
        let whole = self.in_tiles::<S, C, G>(reader, zero);
        let tokens = self.x.tokens();
        if whole == tokens {
            return;
        }
        for index in self.panels.clone() {
            let panel = self.panel(index, reader, zero);
            let mut token = whole;
            if S::TILE >= 8 {
                while token + 8 <= tokens {
                    let sums = tile::<S, C, G, 8>(panel, self.x, token);
                    self.store::<S, 8>(index, token, sums);
                    token += 8;
                }
            }
            while token + 4 <= tokens {
                let sums = tile::<S, C, G, 4>(panel, self.x, token);
                self.store::<S, 4>(index, token, sums);
                token += 4;
            }
            if token + 2 <= tokens {
                let sums = tile::<S, C, G, 2>(panel, self.x, token);
                self.store::<S, 2>(index, token, sums);
                token += 2;
            }
            if token < tokens {
                let sums = tile::<S, C, G, 1>(panel, self.x, token);
                self.store::<S, 1>(index, token, sums);
            }
        }
    }

    /// The same for panels whose rows have one scale.
    ///
    /// # Safety
    /// As of `panels`.
    #[inline(always)]
    unsafe fn rows<S: Simd, const BITS: u8, G: Groups>(mut self, groups: G) {
        let whole = self.rows_in_tiles::<S, BITS, G>(groups);
        let tokens = self.x.tokens();
        for index in self.panels.clone() {
            let panel = self.panel_of_rows(index, groups);
            let mut token = whole;
            if S::TILE >= 8 {
                while token + 8 <= tokens {
                    let sums = whole::tile::<S, G, BITS, 8>(panel, self.x, token);
                    self.store::<S, 8>(index, token, sums);
                    token += 8;
                }
            }
            while token + 4 <= tokens {
                let sums = whole::tile::<S, G, BITS, 4>(panel, self.x, token);
                self.store::<S, 4>(index, token, sums);
                token += 4;
            }
            while token < tokens {
                let sums = whole::tile::<S, G, BITS, 1>(panel, self.x, token);
                self.store::<S, 1>(index, token, sums);
                token += 1;
            }
        }
    }

    /// # Safety
    /// As of `panels`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn rows_in_tiles<S: Simd, const BITS: u8, G: Groups>(&mut self, groups: G) -> usize {
        let cols = self.x.cols();
        if !S::AMX || self.scratch.is_empty() || !cols.is_multiple_of(2 * BLOCK) {
            return 0;
        }
        let whole = self.x.tokens() / (2 * amx::TOKENS) * (2 * amx::TOKENS);
        if whole == 0 {
            return 0;
        }
        let tiles = amx::Tiles::wide();
        let start = self.scratch.as_mut_ptr().cast::<u8>();
        let start = start.add(start.align_offset(64));
        for index in self.panels.clone().step_by(2) {
            // The last panel may have no neighbour.
            let pair = [index, (index + 1).min(self.panels.end - 1)];
            let panels = pair.map(|index| self.panel_of_rows(index, groups));
            let second = start.add(amx::unpacked_bytes(cols));
            let unpacked = [
                amx::expand::<S, G, BITS>(panels[0], cols, start),
                amx::expand::<S, G, BITS>(panels[1], cols, second),
            ];
            for token in (0..whole).step_by(2 * amx::TOKENS) {
                amx::tiles_of_rows::<S, G>(
                    &tiles,
                    panels,
                    unpacked,
                    self.x,
                    token,
                    #[inline(always)]
                    |tile, panel, sums| {
                        self.store::<S, { amx::TOKENS }>(
                            pair[panel],
                            token + tile * amx::TOKENS,
                            sums,
                        );
                    },
                );
            }
        }
        whole
    }

    /// # Safety
    /// As of `panels`.
    #[cfg(not(target_arch = "x86_64"))]
    #[inline(always)]
    #[allow(clippy::extra_unused_type_parameters)]
    unsafe fn rows_in_tiles<S: Simd, const BITS: u8, G: Groups>(&mut self, _: G) -> usize {
        0
    }

    #[inline(always)]
    fn panel_of_rows<G: Groups>(&self, index: usize, groups: G) -> whole::Panel<G> {
        whole::Panel {
            codes: self.weight.codes.start(index),
            scales: self.weight.scales.start(index),
            groups,
        }
    }

    /// Does as many tokens as fill tiles; gives their number.
    ///
    /// # Safety
    /// As of `panels`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn in_tiles<S: Simd, C: Stream, G: Scales>(&mut self, reader: G, zero: u8) -> usize {
        if !S::AMX || self.scratch.is_empty() {
            return 0;
        }
        let whole = self.x.tokens() / amx::TOKENS * amx::TOKENS;
        let tiles = amx::Tiles::blocks();
        let start = self.scratch.as_mut_ptr().cast::<u8>();
        let start = start.add(start.align_offset(64));
        for index in self.panels.clone() {
            let panel = self.panel(index, reader, zero);
            amx::unpack::<S, C, G>(panel, self.x.cols(), start);
            for token in (0..whole).step_by(amx::TOKENS) {
                let sums = amx::tile::<S, G>(&tiles, panel, start, self.x, token);
                self.store::<S, { amx::TOKENS }>(index, token, sums);
            }
        }
        whole
    }

    /// # Safety
    /// As of `panels`.
    #[cfg(not(target_arch = "x86_64"))]
    #[inline(always)]
    #[allow(clippy::extra_unused_type_parameters)]
    unsafe fn in_tiles<S: Simd, C: Stream, G: Scales>(&mut self, _: G, _: u8) -> usize {
        0
    }

    #[inline(always)]
    fn panel<G: Scales>(&self, index: usize, reader: G, zero: u8) -> Panel<G> {
        Panel {
            codes: self.weight.codes.start(index),
            scales: self.weight.scales.start(index),
            reader,
            zero,
        }
    }

    /// Writes the sums of some tokens from `first` on.
    ///
    /// # Safety
    /// As of `panels`; the tokens exist.
    #[inline(always)]
    unsafe fn store<S: Simd, const T: usize>(&self, index: usize, first: usize, sums: [S::F; T]) {
        let row = index * LANES;
        let rows = LANES.min(self.weight.rows - row);
        for (t, sums) in sums.into_iter().enumerate() {
            let at = (first + t) * self.weight.rows + row;
            let out = self.y.slice(at..at + rows);
            if rows == LANES {
                S::store(out.as_mut_ptr(), sums);
            } else {
                let mut all = [0.0; LANES];
                S::store(all.as_mut_ptr(), sums);
                out.copy_from_slice(&all[..rows]);
            }
        }
    }
}
