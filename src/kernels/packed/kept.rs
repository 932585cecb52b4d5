//! Panels of which only some codes are stored: those of sparse matrices.
//!
//! A block of 32 columns begins with a line of masks: a bit for each element, in the order of the bytes of its
//! eight vectors. The codes that are kept follow in the same order; codes of 4 bits of two vectors share bytes,
//! those of 2 bits of four (codes of 3 bits stand in 4). So each vector is read from where the one before ended,
//! and its codes are moved to their places; where none is stored the group's zero point stands, whose weight is 0:
//! from there on a product is that of a full panel, to the bit.
//!
//! At half the elements a code of 8 bits takes 5 bits an element and one of 4 bits 3. One token is bound by reading
//! as long as a core gets less than some 16 elements a cycle: moving 64 bytes to their places keeps one port busy
//! for three cycles.

#![allow(unsafe_op_in_unsafe_fn)]

use super::super::few::prefetch;
use super::super::quantize::BLOCK;
use super::super::simd::Simd;
use super::panels::{self, LANES, VECTOR};
use super::tile::Stream;

/// Vectors of a block.
const VECTORS: usize = BLOCK / 4;

/// Bits that a code takes.
pub(super) const fn width(bits: u8) -> u8 {
    if bits == 3 { 4 } else { bits }
}

/// The panels of a matrix, each from a line on.
#[derive(Debug)]
pub(super) struct Panels {
    lines: panels::Panels,
    starts: Box<[usize]>,
}

impl Panels {
    /// From what [`panel`] made.
    pub fn new(each: Vec<Vec<u8>>) -> Self {
        let mut end = 0;
        let starts: Box<[usize]> = each
            .iter()
            .map(|panel| {
                let start = end;
                end += panel.len().next_multiple_of(VECTOR);
                start
            })
            .collect();
        let mut lines = panels::Panels::new(1, end);
        for (panel, start) in each.iter().zip(&starts) {
            lines.all_mut()[*start..][..panel.len()].copy_from_slice(panel);
        }
        Self { lines, starts }
    }

    pub fn bytes(&self) -> usize {
        self.lines.bytes() + size_of_val(&*self.starts)
    }

    /// Start of a panel; readable for the rest of the allocation and a line more.
    pub fn start(&self, panel: usize) -> *const u8 {
        self.lines.all()[self.starts[panel]..].as_ptr()
    }

    /// Gives the kept columns of a row, rising, and their codes.
    pub fn row(&self, row: usize, bits: u8, mut take: impl FnMut(usize, u8)) {
        let (panel, lane, width) = (row / LANES, row % LANES, width(bits));
        let next = self.starts.get(panel + 1).copied();
        let mut rest = &self.lines.all()[self.starts[panel]..next.unwrap_or(self.lines.bytes())];
        let mut column = 0;
        while let Some((masks, codes)) = rest.split_first_chunk::<VECTOR>() {
            let masks = masks.as_chunks::<8>().0;
            let mut at = 0;
            for sharing in masks.chunks_exact(8 / usize::from(width)) {
                let mut most = 0;
                for (field, mask) in sharing.iter().enumerate() {
                    let mask = u64::from_le_bytes(*mask);
                    most = most.max(mask.count_ones() as usize);
                    for bit in (4 * lane..4 * lane + 4).filter(|bit| mask >> bit & 1 == 1) {
                        let before = (mask & ((1 << bit) - 1)).count_ones() as usize;
                        let code = codes[at + before] >> (usize::from(width) * field);
                        take(column + bit % 4, code & (0xff >> (8 - width)));
                    }
                    column += 4;
                }
                at += most;
            }
            rest = &codes[at..];
        }
    }
}

/// The bytes of a panel: `codes` are `[16, cols]`, none where nothing is kept.
pub(super) fn panel(codes: &[Option<u8>], cols: usize, bits: u8) -> Vec<u8> {
    let width = usize::from(width(bits));
    let mut out = Vec::with_capacity(codes.len() * (width + 2) / 16);
    for block in 0..cols / BLOCK {
        let mut kept = [[0_u8; VECTOR]; VECTORS];
        let mut counts = [0; VECTORS];
        for vector in 0..VECTORS {
            let mut mask = 0_u64;
            for byte in 0..VECTOR {
                let column = block * BLOCK + 4 * vector + byte % 4;
                if let Some(code) = codes[byte / 4 * cols + column] {
                    mask |= 1 << byte;
                    kept[vector][counts[vector]] = code;
                    counts[vector] += 1;
                }
            }
            out.extend_from_slice(&mask.to_le_bytes());
        }
        for (kept, counts) in kept.chunks_exact(8 / width).zip(counts.chunks_exact(8 / width)) {
            let most = counts.iter().max().copied().unwrap_or(0);
            out.extend((0..most).map(|i| {
                // Behind the last code of a vector are zeros.
                kept.iter()
                    .enumerate()
                    .fold(0, |byte, (field, codes)| byte | codes[i] << (width * field))
            }));
        }
    }
    out
}

/// Reads a panel whose codes take `WIDTH` bits.
#[derive(Clone, Copy)]
pub(super) struct Kept<const WIDTH: u8>(*const u8);

impl<const WIDTH: u8> Stream for Kept<WIDTH> {
    const WIDE: bool = WIDTH == 8;

    #[inline(always)]
    fn new(codes: *const u8) -> Self {
        Self(codes)
    }
    #[inline(always)]
    unsafe fn next<S: Simd>(&mut self, absent: S::C, ahead: bool) -> [S::C; 8] {
        let masks = self.0.cast::<u64>();
        let sharing = 8 / usize::from(WIDTH);
        if ahead {
            prefetch(self.0);
        }
        let mut at = self.0.add(VECTOR);
        let mut out = [absent; VECTORS];
        for (first, out) in out.chunks_exact_mut(sharing).enumerate() {
            if ahead {
                prefetch(at);
            }
            let mut most = 0;
            for (field, out) in out.iter_mut().enumerate() {
                let mask = u64::from_le(masks.add(first * sharing + field).read_unaligned());
                let shift = u32::from(WIDTH) * field as u32;
                *out = S::expand_codes(absent, mask, at, shift, 0xff >> (8 - WIDTH));
                most = most.max(mask.count_ones() as usize);
            }
            at = at.add(most);
        }
        self.0 = at;
        out
    }
}
