//! Rounding of activations to 8 bits, for products in integers.

use super::simd::{self, Level, Simd, Task};
use super::threads::{self, Shared};

/// Columns that share a scale.
pub const BLOCK: usize = 32;
/// Columns whose sum is kept: the finest group of weights with a zero point of its own.
pub const SUM: usize = 16;

/// Tokens whose scales also stand side by side, for products that take so many at once.
pub(super) const TILE: usize = 16;

/// Blocks that are worth a thread of their own: a few microseconds.
const GRAIN: usize = 1 << 10;

/// Elements of rows that are made and rounded that are worth a thread of their own.
const ROWS: usize = 1 << 14;

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Grain {
    /// [`BLOCK`] columns of a token.
    #[default]
    Block,
    /// A token: coarser, but sums run over all columns without leaving the integers.
    Token,
}

/// Rows of activations as `q * scale` with signed bytes. The buffers are kept from one use to the next.
#[derive(Debug, Default)]
pub struct Activations {
    cols: usize,
    tokens: usize,
    grain: Grain,
    codes: Vec<i8>,
    scales: Vec<f32>,
    /// Sums of `q` over [`SUM`] columns.
    sums: Vec<i32>,
    /// Sums of `q * scale` over [`BLOCK`] columns.
    weighted: Vec<f32>,
    /// Sums of `q` over a token, where it shares a scale.
    totals: Vec<i32>,
    /// Values that were clipped to the range of a fixed step.
    clipped: Vec<f32>,
    /// For each [`TILE`] tokens and block, where blocks have scales: their scales, then their weighted sums.
    tiles: Vec<[f32; 2 * TILE]>,
}

impl Activations {
    /// Rounds the rows `x` (`[tokens, cols]`). The largest magnitude of what shares a scale takes code 127;
    /// the rest goes to the nearest code, ties to even. Where a value is not finite the scale is not
    /// finite either, so that products show it. Panics if `cols` is not a multiple of [`BLOCK`].
    pub fn set(&mut self, x: &[f32], cols: usize, grain: Grain) {
        self.round(x, cols, grain, None);
    }

    /// Rounds the rows `x` to multiples of `step`, a number above 1e-38; what is beyond 127 of them is
    /// clipped. What is not finite shows as in [`Activations::set`]. Panics as that does.
    pub fn set_fixed(&mut self, x: &[f32], cols: usize, step: f32) {
        let mut clipped = std::mem::take(&mut self.clipped);
        clipped.clear();
        let most = 127.0 * step;
        clipped.extend(x.iter().map(|v| v.clamp(-most, most) + v * 0.0));
        self.round(&clipped, cols, Grain::Token, Some(step));
        self.clipped = clipped;
    }

    fn round(&mut self, x: &[f32], cols: usize, grain: Grain, step: Option<f32>) {
        let (width, parts) = self.start(x.len(), cols, grain, step);
        threads::for_ranges(x.len() / width, GRAIN * BLOCK / width + 1, |units| {
            let columns = units.start * width..units.end * width;
            // SAFETY: ranges are disjoint.
            unsafe { parts.round(&x[columns.clone()], columns.start, width) };
        });
        self.finish();
    }

    /// Makes the rows `x` (`[tokens, cols]`) and rounds each while it is near: `make` gets the index of a row, its
    /// row of `a` (`[tokens, width]`) and the row of `x` that it is to write. The same as making all and then
    /// [`Activations::set`].
    pub fn set_made(
        &mut self,
        [a, x]: [&mut [f32]; 2],
        [a_width, cols]: [usize; 2],
        grain: Grain,
        make: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
    ) {
        let (width, parts) = self.start(x.len(), cols, grain, None);
        threads::for_row_pairs(a, a_width, x, cols, ROWS / (a_width + cols) + 1, |row, a, x| {
            make(row, a, x);
            // SAFETY: rows are disjoint.
            unsafe { parts.round(x, row * cols, width) };
        });
        self.finish();
    }

    /// Room for so many elements; how many share a scale, and where the results go.
    fn start(
        &mut self,
        len: usize,
        cols: usize,
        grain: Grain,
        step: Option<f32>,
    ) -> (usize, Parts<'_>) {
        assert!(cols > 0 && cols.is_multiple_of(BLOCK) && len.is_multiple_of(cols));
        (self.cols, self.tokens, self.grain) = (cols, len / cols, grain);
        let width = match grain {
            Grain::Block => BLOCK,
            Grain::Token => cols,
        };
        // Room for whole vectors to be read from any place.
        self.codes.resize((len + 64).max(self.codes.len()), 0);
        self.scales.resize((len / BLOCK).max(self.scales.len()), 0.0);
        self.weighted.resize((len / BLOCK).max(self.weighted.len()), 0.0);
        self.sums.resize((len / SUM).max(self.sums.len()), 0);
        let parts = Parts {
            step,
            codes: Shared::new(&mut self.codes[..len]),
            scales: Shared::new(&mut self.scales),
            sums: Shared::new(&mut self.sums),
            weighted: Shared::new(&mut self.weighted),
        };
        (width, parts)
    }

    /// What is made of the scales and sums of all rows.
    fn finish(&mut self) {
        if self.grain == Grain::Block {
            self.set_tiles();
        }
        self.totals.clear();
        if self.grain == Grain::Token {
            let sums = self.sums.chunks_exact(self.cols / SUM).take(self.tokens);
            self.totals.extend(sums.map(|sums| sums.iter().sum::<i32>()));
        }
    }

    fn set_tiles(&mut self) {
        let (tiles, blocks) = (self.tokens / TILE, self.cols / BLOCK);
        self.tiles.resize((tiles * blocks).max(self.tiles.len()), [0.0; 2 * TILE]);
        let (scales, weighted) = (&self.scales, &self.weighted);
        let out = Shared::new(&mut self.tiles[..tiles * blocks]);
        threads::for_ranges(tiles, GRAIN / (TILE * blocks) + 1, |range| {
            // SAFETY: ranges are disjoint.
            let out = unsafe { out.slice(range.start * blocks..range.end * blocks) };
            for (tile, out) in range.zip(out.chunks_exact_mut(blocks)) {
                for t in 0..TILE {
                    let row = (tile * TILE + t) * blocks..(tile * TILE + t + 1) * blocks;
                    let both = scales[row.clone()].iter().zip(&weighted[row]);
                    for (line, (scale, weighted)) in out.iter_mut().zip(both) {
                        (line[t], line[TILE + t]) = (*scale, *weighted);
                    }
                }
            }
        });
    }

    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `[tokens, cols]`, followed by at least 64 elements of no meaning.
    pub(super) fn codes(&self) -> &[i8] {
        &self.codes
    }

    pub fn grain(&self) -> Grain {
        self.grain
    }

    /// `[tokens, cols / BLOCK]`, also where a whole token shares one.
    pub(super) fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// `[tokens, cols / SUM]`
    pub(super) fn sums(&self) -> &[i32] {
        &self.sums
    }

    /// `[tokens, cols / BLOCK]`
    pub(super) fn weighted(&self) -> &[f32] {
        &self.weighted
    }

    /// `[tokens / TILE, cols / BLOCK]`: scales and weighted sums of whole tiles of tokens.
    pub(super) fn tiles(&self) -> &[[f32; 2 * TILE]] {
        &self.tiles
    }

    /// `[tokens]`; empty where tokens do not share a scale.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn totals(&self) -> &[i32] {
        &self.totals
    }

    /// The rounded values, `[tokens, cols]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let codes = self.codes[..self.tokens * self.cols].chunks_exact(BLOCK);
        codes
            .zip(&self.scales)
            .flat_map(|(q, d)| q.iter().map(move |q| f32::from(*q) * d))
            .collect()
    }
}

/// Where the results of rounding go.
struct Parts<'a> {
    /// The scale, where it is fixed.
    step: Option<f32>,
    codes: Shared<'a, i8>,
    scales: Shared<'a>,
    sums: Shared<'a, i32>,
    weighted: Shared<'a>,
}

impl Parts<'_> {
    /// Rounds `x`, whose first element is element `first` of all.
    ///
    /// # Safety
    /// No other thread rounds these elements, which are whole units of `width`.
    unsafe fn round(&self, x: &[f32], first: usize, width: usize) {
        let columns = first..first + x.len();
        let blocks = columns.start / BLOCK..columns.end / BLOCK;
        // SAFETY: the caller's promise.
        let (codes, scales, sums, weighted) = unsafe {
            (
                self.codes.slice(columns),
                self.scales.slice(blocks.clone()),
                self.sums.slice(2 * blocks.start..2 * blocks.end),
                self.weighted.slice(blocks),
            )
        };
        let step = self.step;
        simd::run(Level::best(), Round { x, width, step, codes, scales, sums, weighted });
    }
}

/// Rounds what shares `width` columns, unit by unit.
struct Round<'a> {
    x: &'a [f32],
    width: usize,
    /// Fixed for all; `x` lies within 127 of it.
    step: Option<f32>,
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
    weighted: &'a mut [f32],
}

impl Task for Round<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (unit, x) in self.x.chunks_exact(self.width).enumerate() {
            // SAFETY: every pointer below is to 16 elements of a chunk.
            let (top, poison) = unsafe {
                let (mut top, mut poison) = (S::splat(0.0), S::splat(0.0));
                for x in x.as_chunks::<SUM>().0 {
                    let x = S::load(x.as_ptr());
                    top = S::max_abs(top, x);
                    // Zero, unless a value is not finite.
                    poison = S::mul_add(x, S::splat(0.0), poison);
                }
                (S::largest(top), S::sum(poison))
            };
            let scale = self.step.unwrap_or(top / 127.0);
            // Of a scale too small to divide by, the values are lost: all are below 1e-36.
            let inverse = if scale > 1e-38 { 1.0 / scale } else { 0.0 };
            let scale = scale + poison;
            let blocks = unit * (self.width / BLOCK)..(unit + 1) * (self.width / BLOCK);
            for (b, x) in blocks.zip(x.as_chunks::<BLOCK>().0) {
                let codes = &mut self.codes[b * BLOCK..][..BLOCK];
                let mut sums = [0; 2];
                for (half, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: as above.
                    unsafe {
                        let x = S::load(x.as_ptr().add(SUM * half));
                        let whole = S::nearest(S::mul(x, S::splat(inverse)));
                        S::store_i8(codes.as_mut_ptr().add(SUM * half), whole);
                        *sum = S::sum_i32(whole);
                    }
                }
                self.sums[2 * b..2 * b + 2].copy_from_slice(&sums);
                self.scales[b] = scale;
                self.weighted[b] = scale * sums[0].wrapping_add(sums[1]) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_by_hand() {
        let mut x = vec![0.0; 64];
        // Scale 2: 254 -> 127, 5 -> 2.5 -> 2, 7 -> 3.5 -> 4, -254 -> -127.
        (x[0], x[1], x[2], x[31]) = (254.0, 5.0, 7.0, -254.0);
        let mut a = Activations::default();
        a.set(&x, 64, Grain::Block);
        assert_eq!(a.codes()[..3], [127, 2, 4]);
        assert_eq!(a.codes()[31], -127);
        assert_eq!(a.scales()[..2], [2.0, 0.0]);
        assert_eq!(a.sums()[..4], [133, -127, 0, 0]);
        assert_eq!(a.weighted()[..2], [12.0, 0.0]);
        assert_eq!(a.to_f32()[..3], [254.0, 4.0, 8.0]);
        assert_eq!((a.tokens(), a.cols()), (1, 64));
    }

    #[test]
    fn rows_rounded_as_they_are_made_are_those_rounded_after() {
        for (tokens, cols) in [(1, 32), (3, 96), (17, 576), (64, 160)] {
            for grain in [Grain::Block, Grain::Token] {
                let from: Vec<f32> =
                    (0..tokens * 7).map(|i| ((i * 7919) % 1009) as f32 / 17.0 - 30.0).collect();
                let make = |row: usize, a: &mut [f32], x: &mut [f32]| {
                    a[0] += 1.0;
                    let made = x.iter_mut().enumerate();
                    made.for_each(|(i, x)| *x = a[i % 7] * (1.0 + (row + i) as f32 / 50.0));
                };
                let (mut a, mut x) = (from.clone(), vec![f32::NAN; tokens * cols]);
                let mut fused = Activations::default();
                // What an earlier use left does not matter.
                fused.set(&vec![3.0; 2 * tokens * cols], cols, Grain::Block);
                fused.set_made([&mut a, &mut x], [7, cols], grain, make);
                let (mut b, mut y) = (from.clone(), vec![f32::NAN; tokens * cols]);
                threads::for_row_pairs(&mut b, 7, &mut y, cols, 1, make);
                let mut after = Activations::default();
                after.set(&y, cols, grain);
                assert_eq!((&a, &x), (&b, &y));
                assert_eq!(fused.codes()[..x.len()], after.codes()[..x.len()]);
                let blocks = x.len() / BLOCK;
                let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&fused.scales()[..blocks]), bits(&after.scales()[..blocks]));
                assert_eq!(bits(&fused.weighted()[..blocks]), bits(&after.weighted()[..blocks]));
                assert_eq!(fused.sums()[..2 * blocks], after.sums()[..2 * blocks]);
                assert_eq!(fused.totals(), after.totals());
                if grain == Grain::Block {
                    let tiles = tokens / TILE * (cols / BLOCK);
                    assert_eq!(fused.tiles()[..tiles], after.tiles()[..tiles]);
                }
            }
        }
    }

    #[test]
    fn rounding_is_within_half_a_step() {
        let x: Vec<f32> = (0..320).map(|i| ((i * 7919) % 1009) as f32 / 17.0 - 30.0).collect();
        let mut a = Activations::default();
        a.set(&x, 160, Grain::Block);
        for (i, (x, y)) in x.iter().zip(a.to_f32()).enumerate() {
            assert!((x - y).abs() <= a.scales()[i / 32] * 0.5001, "{i}: {x} {y}");
        }
    }

    #[test]
    fn a_token_shares_a_scale() {
        let mut x = vec![0.0; 128];
        (x[0], x[40], x[64]) = (254.0, -127.0, 1.0);
        let mut a = Activations::default();
        a.set(&x, 64, Grain::Token);
        assert_eq!(a.scales()[..4], [2.0, 2.0, 1.0 / 127.0, 1.0 / 127.0]);
        // -63.5 goes to the even neighbour.
        assert_eq!((a.codes()[0], a.codes()[40], a.codes()[64]), (127, -64, 127));
        assert_eq!(a.sums()[..4], [127, 0, -64, 0]);
    }

    #[test]
    fn a_fixed_step_clips() {
        let mut x = vec![0.0; 64];
        // Step 2: 300 is beyond 254, 5 -> 2.5 -> 2, -7 -> -3.5 -> -4.
        (x[0], x[1], x[2], x[40]) = (300.0, 5.0, -7.0, -1e9);
        let mut a = Activations::default();
        a.set_fixed(&x, 64, 2.0);
        assert_eq!((a.codes()[..3].to_vec(), a.codes()[40]), (vec![127, 2, -4], -127));
        assert_eq!((a.scales()[..2].to_vec(), a.grain()), (vec![2.0, 2.0], Grain::Token));
        assert_eq!(a.totals(), [127 + 2 - 4 - 127]);
        x[3] = f32::NAN;
        a.set_fixed(&x, 64, 2.0);
        assert!(!a.scales()[0].is_finite());
    }

    #[test]
    fn what_is_not_finite_shows() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 64];
            x[40] = bad;
            let mut a = Activations::default();
            a.set(&x, 64, Grain::Block);
            assert!(a.scales()[0].is_finite() && !a.scales()[1].is_finite(), "{bad}");
        }
        let mut a = Activations::default();
        a.set(&[1e-40; 32], 32, Grain::Block);
        assert_eq!(a.codes()[..32], [0; 32]);
    }
}
