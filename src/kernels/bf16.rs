//! Products in which weights and activations are bf16 and sums are f32: several times as fast as f32 where the
//! processor multiplies tiles of bf16 (AMX), for the price of rounding the activations to 8 bits of mantissa.

// Every unsafe function here asks that the processor has the instructions it is compiled for.
#![allow(unsafe_op_in_unsafe_fn)]

use std::sync::OnceLock;

use super::multiversion::multiversion;
use super::threads::{self, Shared};
#[cfg(target_arch = "x86_64")]
use super::tiles;

/// Rows of a strip: the lanes of a vector of sums, and the tokens of a tile.
const LANES: usize = 16;

/// Multiplications that are worth a thread of their own.
const GRAIN: usize = 1 << 20;

/// Pairs of columns that a tile of the processor holds: rows are padded to these.
const DEPTH: usize = 16;

/// Tokens that meet two strips before the next two come: they and their results stay in the second-level cache.
const PASS: usize = 128;

/// Tokens from which tiles, which hold 16, are faster than vectors.
const TILES: usize = 4;

/// Which code multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
enum Path {
    Plain,
    /// AVX-512 with products of bf16 pairs.
    Pairs,
    /// AMX besides.
    Tiles,
}

impl Path {
    fn best() -> Self {
        static BEST: OnceLock<Path> = OnceLock::new();
        *BEST.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            if super::simd::Level::best() >= super::simd::Level::Avx512
                && is_x86_feature_detected!("avx512bf16")
            {
                return if tiles::available() { Self::Tiles } else { Self::Pairs };
            }
            Self::Plain
        })
    }
}

/// Pairs of 16 lanes or of 32 columns: a line of the caches, so that nothing that is loaded lies in two.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; LANES]);

const ZEROS: Line = Line([0; LANES]);

/// Activations rounded to bf16, for several products. The memory is kept from one use to the next.
///
/// Sixteen tokens stand side by side, 32 columns of each at a time: `[tiles][count / DEPTH][16 tokens]`
/// lines, so that a tile of the processor is one run of memory. Tokens and columns that are missing are zeros.
#[derive(Debug, Default)]
pub struct Rounded {
    tokens: usize,
    cols: usize,
    lines: Vec<Line>,
}

impl Rounded {
    /// Rounds the rows `x` (`[tokens, cols]`), halves to even; parallel. Panics if rows are not whole.
    pub fn set(&mut self, x: &[f32], cols: usize) {
        self.set_by(Path::best(), x, cols);
    }

    fn set_by(&mut self, path: Path, x: &[f32], cols: usize) {
        assert!(cols > 0 && x.len().is_multiple_of(cols), "rows are whole");
        (self.tokens, self.cols) = (x.len() / cols, cols);
        let tile = count(cols);
        let tiles = self.tokens.div_ceil(LANES);
        if self.lines.len() < tiles * tile {
            self.lines.resize(tiles * tile, ZEROS);
        }
        let lines = Shared::new(&mut self.lines);
        threads::for_ranges(tiles, (1 << 15) / (LANES * cols) + 1, |range| {
            for at in range {
                // SAFETY: tiles are disjoint.
                let lines = unsafe { lines.slice(at * tile..(at + 1) * tile) };
                let x = &x[at * LANES * cols..x.len().min((at + 1) * LANES * cols)];
                match path {
                    #[cfg(target_arch = "x86_64")]
                    Path::Pairs | Path::Tiles if cols.is_multiple_of(2 * DEPTH) => {
                        // SAFETY: the path was detected on this processor.
                        unsafe { round_fast(x, cols, lines) }
                    }
                    _ => round_tile(x, cols, lines),
                }
            }
        });
    }

    /// The lines of tile `at`.
    fn tile(&self, at: usize) -> &[Line] {
        let tile = count(self.cols);
        &self.lines[at * tile..(at + 1) * tile]
    }
}

/// A matrix rounded to bf16 and packed for products: strips of 16 rows, in which pairs of columns of the rows
/// lie side by side. Rows, and columns up to a multiple of 32, that are missing are zeros.
#[derive(Debug, Clone, Default)]
pub struct Bf16Panels {
    rows: usize,
    cols: usize,
    /// `[strips][pairs]`; the even column is the low half.
    lines: Vec<Line>,
}

impl Bf16Panels {
    /// Packs a `[rows, cols]` matrix; `read(row, out)` writes a row as f32. What is bf16 already keeps its bits.
    pub fn pack(rows: usize, cols: usize, mut read: impl FnMut(usize, &mut [f32])) -> Self {
        let count = count(cols);
        let mut lines = vec![ZEROS; rows.div_ceil(LANES) * count];
        let mut row_values = vec![0.0; cols];
        let mut rounded = vec![0_u16; 2 * count];
        for row in 0..rows {
            read(row, &mut row_values);
            round(&row_values, &mut rounded);
            let strip = &mut lines[row / LANES * count..][..count];
            for (line, pair) in strip.iter_mut().zip(rounded.as_chunks::<2>().0) {
                line.0[row % LANES] = u32::from(pair[0]) | u32::from(pair[1]) << 16;
            }
        }
        Self { rows, cols, lines }
    }

    /// Packs the transpose of a `[rows, cols]` matrix in the memory of the one that was there; `read(row, out)`
    /// writes a row of the matrix as f32. Parallel, and cheap beside a product with a hundred tokens.
    pub fn set_transposed(
        &mut self,
        rows: usize,
        cols: usize,
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        (self.rows, self.cols) = (cols, rows);
        let (count, strips) = (count(rows), cols.div_ceil(LANES));
        if self.lines.len() < strips * count {
            self.lines = Vec::new();
            self.lines = vec![ZEROS; strips * count];
        } else {
            self.lines.truncate(strips * count);
        }
        let lines = Shared::new(&mut self.lines);
        threads::for_ranges(count, (1 << 14) / cols.max(1) + 1, |pairs| {
            let (mut low, mut high) = (vec![0.0; cols], vec![0.0; cols]);
            let mut line = ZEROS;
            for pair in pairs {
                for (row, out) in [(2 * pair, &mut low), (2 * pair + 1, &mut high)] {
                    if row < rows { read(row, out) } else { out.fill(0.0) }
                }
                for (strip, (low, high)) in low.chunks(LANES).zip(high.chunks(LANES)).enumerate() {
                    interleave(low, high, &mut line.0);
                    // SAFETY: pairs are disjoint, and each has a line of its own in every strip.
                    unsafe { lines.set(strip * count + pair, line) };
                }
            }
        });
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.lines[..])
    }

    /// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten; parallel. A result does not depend on how the work is
    /// split. Panics if sizes do not fit.
    pub fn multiply(&self, x: &Rounded, y: &mut [f32]) {
        self.multiply_by(Path::best(), x, y);
    }

    fn multiply_by(&self, path: Path, x: &Rounded, y: &mut [f32]) {
        let (rows, tokens, count) = (self.rows, x.tokens, count(self.cols));
        assert!(x.cols == self.cols && y.len() == tokens * rows, "sizes of a product");
        if rows == 0 || tokens == 0 {
            return;
        }
        let path = if tokens < TILES { path.min(Path::Pairs) } else { path };
        let y = Shared::new(y);
        // Two strips and a pass of tokens at a time; the same strips one after the other.
        let passes = tokens.div_ceil(PASS);
        let each = 4 * LANES * count * tokens.min(PASS);
        threads::for_ranges(rows.div_ceil(2 * LANES) * passes, GRAIN / each + 1, |range| {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the path was detected on this processor.
            let _tiles = (path == Path::Tiles).then(|| unsafe { tiles::Configured::new() });
            for at in range {
                let (pair, pass) = (at / passes, at % passes);
                let end = ((2 * pair + 2) * count).min(self.lines.len());
                let block = Block {
                    strips: &self.lines[2 * pair * count..end],
                    count,
                    x,
                    tokens: pass * PASS..tokens.min((pass + 1) * PASS),
                    y,
                    rows,
                    first: 2 * pair * LANES,
                };
                match path {
                    // SAFETY: as below; tiles are configured.
                    #[cfg(target_arch = "x86_64")]
                    Path::Tiles => unsafe { by_tiles(&block) },
                    // SAFETY: the path was detected on this processor; blocks of the result are disjoint.
                    #[cfg(target_arch = "x86_64")]
                    Path::Pairs => unsafe { block.pairs() },
                    _ => block.plain(),
                }
            }
        });
    }
}

/// Pairs of a row, whole tiles of them.
fn count(cols: usize) -> usize {
    cols.div_ceil(2).next_multiple_of(DEPTH)
}

multiversion! {
    /// Rounds to bf16, halves to even. More of `out` is left alone.
    fn round(x: &[f32], out: &mut [u16]) {
        for (v, out) in x.iter().zip(out) {
            *out = half(*v);
        }
    }

    /// Rounds two runs of equally many numbers into pairs; what follows them becomes zeros.
    fn interleave(low: &[f32], high: &[f32], out: &mut [u32]) {
        out[low.len()..].fill(0);
        for (out, (low, high)) in out.iter_mut().zip(low.iter().zip(high)) {
            *out = u32::from(half(*low)) | u32::from(half(*high)) << 16;
        }
    }

    /// Rounds up to 16 tokens into a tile of them.
    fn round_tile(x: &[f32], cols: usize, lines: &mut [Line]) {
        lines.fill(ZEROS);
        for (token, row) in x.chunks_exact(cols).enumerate() {
            for (at, values) in row.chunks(2 * DEPTH).enumerate() {
                let line = &mut lines[at * LANES + token].0;
                for (pair, values) in line.iter_mut().zip(values.chunks(2)) {
                    let high = values.get(1).map_or(0, |v| half(*v));
                    *pair = u32::from(half(values[0])) | u32::from(high) << 16;
                }
            }
        }
    }

    /// Sums of a strip for one token of a tile, whose lines are [`LANES`] apart.
    fn strip(pairs: &[Line], x: &[Line], sums: &mut [f32]) {
        let mut acc = [0.0_f32; LANES];
        for (pairs, x) in pairs.as_chunks::<DEPTH>().0.iter().zip(x.iter().step_by(LANES)) {
            for (pairs, x) in pairs.iter().zip(x.0) {
                let (low, high) = (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000));
                for (acc, pair) in acc.iter_mut().zip(pairs.0) {
                    let w = (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
                    let sum = super::multiversion::mul_add::<FMA>(w.1, high, *acc);
                    *acc = super::multiversion::mul_add::<FMA>(w.0, low, sum);
                }
            }
        }
        sums.copy_from_slice(&acc[..sums.len()]);
    }
}

/// The nearest bf16, halves to even.
#[inline(always)]
pub(super) fn half(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding could make infinity of what is not a number.
    (if v.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

/// [`round_tile`] of whole tiles of columns. Numbers below the smallest normal one become zeros.
///
/// # Safety
/// The processor has the instructions; `lines` is a tile for `cols` columns.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn round_fast(x: &[f32], cols: usize, lines: &mut [Line]) {
    use std::arch::x86_64::*;
    let tokens = x.len() / cols;
    assert!(tokens <= LANES && lines.len() * 2 >= cols);
    for (at, lines) in lines.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        for (token, line) in lines.iter_mut().enumerate() {
            if token >= tokens {
                *line = ZEROS;
                continue;
            }
            let from = x.as_ptr().add(token * cols + at * 2 * DEPTH);
            let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(DEPTH)));
            let pairs = _mm512_cvtne2ps_pbh(high, low);
            let pairs = std::mem::transmute::<__m512bh, __m512i>(pairs);
            _mm512_store_si512((&raw mut line.0).cast(), pairs);
        }
    }
}

/// One or two strips times some tokens.
struct Block<'a> {
    strips: &'a [Line],
    /// Lines of a strip.
    count: usize,
    x: &'a Rounded,
    /// They start with a tile.
    tokens: std::ops::Range<usize>,
    y: Shared<'a>,
    rows: usize,
    first: usize,
}

impl<'a> Block<'a> {
    /// The results of a token for the strip that starts at row `first`.
    ///
    /// # Safety
    /// No two live slices may overlap.
    unsafe fn results(&self, token: usize, first: usize) -> &'a mut [f32] {
        let at = token * self.rows + first;
        self.y.slice(at..at + LANES.min(self.rows - first))
    }

    fn plain(&self) {
        for (i, pairs) in self.strips.chunks_exact(self.count).enumerate() {
            for token in self.tokens.clone() {
                let x = &self.x.tile(token / LANES)[token % LANES..];
                // SAFETY: blocks of the result are disjoint, and so are tokens.
                strip(pairs, x, unsafe { self.results(token, self.first + i * LANES) });
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn pairs(&self) {
        let mut token = self.tokens.start;
        // Never across a tile: counts divide 16 and come in falling order.
        while token < self.tokens.end {
            token += if self.strips.len() == self.count {
                match self.tokens.end - token {
                    8.. => self.group::<8, 1>(token),
                    4.. => self.group::<4, 1>(token),
                    _ => self.group::<1, 1>(token),
                }
            } else {
                match self.tokens.end - token {
                    8.. => self.group::<8, 2>(token),
                    4.. => self.group::<4, 2>(token),
                    2.. => self.group::<2, 2>(token),
                    _ => self.group::<1, 2>(token),
                }
            };
        }
    }

    /// `T` tokens from `token` on, `N` strips. Answers `T`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn group<const T: usize, const N: usize>(&self, token: usize) -> usize {
        use std::arch::x86_64::*;
        // Two types for the same 64 bytes.
        let pairs = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
        let mut acc = [[_mm512_setzero_ps(); N]; T];
        let x = self.x.tile(token / LANES)[token % LANES..].as_ptr();
        let w = self.strips.as_ptr();
        for depth in 0..self.count / DEPTH {
            let x = x.add(depth * LANES).cast::<i32>();
            for k in 0..DEPTH {
                let w: [__m512bh; N] = std::array::from_fn(|n| {
                    let p = w.add(n * self.count + depth * DEPTH + k);
                    pairs(_mm512_load_si512(p.cast()))
                });
                for (t, acc) in acc.iter_mut().enumerate() {
                    let x = pairs(_mm512_set1_epi32(*x.add(t * LANES + k)));
                    for (acc, w) in acc.iter_mut().zip(w) {
                        *acc = _mm512_dpbf16_ps(*acc, x, w);
                    }
                }
            }
        }
        for (t, acc) in acc.iter().enumerate() {
            for (n, acc) in acc.iter().enumerate() {
                let mut sums = [0.0; LANES];
                _mm512_storeu_ps(sums.as_mut_ptr(), *acc);
                let out = self.results(token + t, self.first + n * LANES);
                match out.as_chunks_mut::<LANES>().0 {
                    [out] => *out = sums,
                    _ => out.copy_from_slice(&sums[..out.len()]),
                }
            }
        }
        T
    }
}

/// One or two strips times the tokens, 32 at a time.
///
/// # Safety
/// Tiles are configured; no other thread writes these results.
#[cfg(target_arch = "x86_64")]
unsafe fn by_tiles(block: &Block<'_>) {
    let second = block.strips.len() > block.count;
    let w = block.strips.as_ptr();
    // What is missing is multiplied as its neighbour and not stored.
    let other_w = if second { w.add(block.count) } else { w };
    for token in block.tokens.clone().step_by(2 * LANES) {
        let left = block.tokens.end - token;
        let x = block.x.tile(token / LANES).as_ptr();
        let other_x = if left > LANES { x.add(block.count) } else { x };
        std::arch::asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x} + {line}*1]",
            "tileloadd tmm6, [{w} + {line}*1]",
            "tileloadd tmm7, [{other_w} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{other_x} + {line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {x}, 1024",
            "add {other_x}, 1024",
            "add {w}, 1024",
            "add {other_w}, 1024",
            "dec {depth}",
            "jnz 2b",
            x = inout(reg) x => _,
            other_x = inout(reg) other_x => _,
            w = inout(reg) w => _,
            other_w = inout(reg) other_w => _,
            depth = inout(reg) block.count / DEPTH => _,
            line = in(reg) 64_usize,
            options(nostack, readonly)
        );
        let whole_x = [left >= LANES, left >= 2 * LANES];
        let whole_w = [LANES, 2 * LANES].map(|end| block.first + end <= block.rows);
        for tile in 0..4 {
            let (below, beside) = (tile / 2, tile % 2);
            if below == 1 && left <= LANES || beside == 1 && !second {
                continue;
            }
            let (token, first) = (token + below * LANES, block.first + beside * LANES);
            if whole_x[below] && whole_w[beside] {
                // All 16 rows lie inside of the result.
                tiles::store(tile, block.y.at(token * block.rows + first), 4 * block.rows);
                continue;
            }
            let mut out = [[0.0_f32; LANES]; LANES];
            tiles::store(tile, out.as_mut_ptr().cast(), 4 * LANES);
            for (i, sums) in out.iter().enumerate().take(block.tokens.end - token) {
                let results = block.results(token + i, first);
                results.copy_from_slice(&sums[..results.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests;
