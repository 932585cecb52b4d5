//! Products in which weights and activations are bf16 and sums are f32: several times as fast as f32 where the
//! processor multiplies tiles of bf16 (AMX), for the price of rounding the activations to 8 bits of mantissa.

// Every unsafe function here asks that the processor has the instructions it is compiled for.
#![allow(unsafe_op_in_unsafe_fn)]

use std::sync::OnceLock;

use super::multiversion::multiversion;
use super::threads::{self, Shared, with_scratch};

/// Rows of a strip: the lanes of a vector of sums.
const LANES: usize = 16;

/// Multiplications that are worth a thread of their own.
const GRAIN: usize = 1 << 20;

/// Pairs of columns that a tile of the processor holds: rows are padded to these.
const DEPTH: usize = 16;

/// Tokens of a pass over the matrix: they and their results stay in the second-level cache.
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

/// A matrix rounded to bf16 and packed for products: strips of 16 rows, in which pairs of columns of the rows
/// lie side by side. Rows, and columns up to a multiple of 32, that are missing are zeros.
#[derive(Debug, Clone)]
pub struct Bf16Panels {
    rows: usize,
    cols: usize,
    /// `[strips][pairs][16]`; the even column is the low half.
    pairs: Vec<u32>,
}

impl Bf16Panels {
    /// Packs a `[rows, cols]` matrix; `read(row, out)` writes a row as f32. What is bf16 already keeps its bits.
    pub fn pack(rows: usize, cols: usize, mut read: impl FnMut(usize, &mut [f32])) -> Self {
        let count = count(cols);
        let mut pairs = vec![0_u32; rows.div_ceil(LANES) * count * LANES];
        let mut row_values = vec![0.0; cols];
        let mut rounded = vec![0.0; count];
        for row in 0..rows {
            read(row, &mut row_values);
            round(&row_values, halves(&mut rounded));
            let strip = &mut pairs[row / LANES * count * LANES..][..count * LANES];
            for (out, pair) in strip.chunks_exact_mut(LANES).zip(&rounded) {
                out[row % LANES] = pair.to_bits();
            }
        }
        Self { rows, cols, pairs }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.pairs[..])
    }

    /// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten, with `x` rounded to bf16; parallel. A result does not depend
    /// on how the work is split. Panics if sizes do not fit.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        self.multiply_by(Path::best(), x, y);
    }

    fn multiply_by(&self, path: Path, x: &[f32], y: &mut [f32]) {
        let (rows, cols) = (self.rows, self.cols);
        if rows == 0 || cols == 0 {
            return y.fill(0.0);
        }
        let tokens = x.len() / cols;
        assert!(x.len() == tokens * cols && y.len() == tokens * rows, "sizes of a product");
        let path = if tokens < TILES { path.min(Path::Pairs) } else { path };
        let y = Shared::new(y);
        for from in (0..tokens).step_by(PASS) {
            let tokens = PASS.min(tokens - from);
            self.pass(path, &x[from * cols..(from + tokens) * cols], from, y);
        }
    }

    /// The product of as many tokens as `x` has, which are those from `from` on.
    fn pass(&self, path: Path, x: &[f32], from: usize, y: Shared<'_>) {
        let (rows, cols, count) = (self.rows, self.cols, count(self.cols));
        let tokens = x.len() / cols;
        with_scratch(tokens.next_multiple_of(LANES) * count, |rounded| {
            rounded[tokens * count..].fill(0.0);
            let shared = Shared::new(rounded);
            threads::for_ranges(tokens, (1 << 15) / cols + 1, |range| {
                for token in range {
                    // SAFETY: tokens are disjoint.
                    let out = unsafe { shared.slice(token * count..(token + 1) * count) };
                    out[cols / 2..].fill(0.0);
                    round(&x[token * cols..(token + 1) * cols], halves(out));
                }
            });
            let rounded = &*rounded;
            // Two strips at a time.
            let strip = count * LANES;
            let grain = GRAIN / (4 * strip * tokens).max(1) + 1;
            threads::for_ranges(rows.div_ceil(2 * LANES), grain, |range| {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the path was detected on this processor.
                let _tiles = (path == Path::Tiles).then(|| unsafe { tiles::Configured::new() });
                for at in range {
                    let end = ((2 * at + 2) * strip).min(self.pairs.len());
                    let strips = &self.pairs[2 * at * strip..end];
                    let first = 2 * at * LANES;
                    let block = Block { strips, rounded, tokens, from, count, y, rows, first };
                    match path {
                        // SAFETY: as below; tiles are configured.
                        #[cfg(target_arch = "x86_64")]
                        Path::Tiles => unsafe { tiles::multiply(&block) },
                        // SAFETY: the path was detected on this processor; blocks of rows are disjoint.
                        #[cfg(target_arch = "x86_64")]
                        Path::Pairs => unsafe { block.pairs() },
                        _ => block.plain(),
                    }
                }
            });
        });
    }
}

/// Pairs of a row, whole tiles of them.
fn count(cols: usize) -> usize {
    cols.div_ceil(2).next_multiple_of(DEPTH)
}

/// Scratch memory, which is f32, as the halves of pairs.
fn halves(pairs: &mut [f32]) -> &mut [u16] {
    // SAFETY: two u16 take the place of an f32 and ask for less alignment; every pattern is valid for both.
    unsafe { std::slice::from_raw_parts_mut(pairs.as_mut_ptr().cast(), 2 * pairs.len()) }
}

multiversion! {
    /// Rounds to bf16, halves to even. More of `out` is left alone.
    fn round(x: &[f32], out: &mut [u16]) {
        for (v, out) in x.iter().zip(out) {
            let bits = v.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            // Rounding could make infinity of what is not a number.
            *out = if v.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16;
        }
    }

    /// Sums of a strip for one token.
    fn strip(pairs: &[u32], x: &[f32], sums: &mut [f32]) {
        let mut acc = [0.0_f32; LANES];
        for (pairs, x) in pairs.as_chunks::<LANES>().0.iter().zip(x) {
            let x = x.to_bits();
            let (low, high) = (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000));
            for (acc, pair) in acc.iter_mut().zip(pairs) {
                let w = (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
                let sum = super::multiversion::mul_add::<FMA>(w.1, high, *acc);
                *acc = super::multiversion::mul_add::<FMA>(w.0, low, sum);
            }
        }
        sums.copy_from_slice(&acc[..sums.len()]);
    }
}

/// One or two strips times all tokens.
struct Block<'a> {
    strips: &'a [u32],
    /// `[tokens][count]` pairs, with tokens of zeros up to a multiple of 16.
    rounded: &'a [f32],
    tokens: usize,
    from: usize,
    count: usize,
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
        let at = (self.from + token) * self.rows + first;
        self.y.slice(at..at + LANES.min(self.rows - first))
    }

    fn plain(&self) {
        for (i, pairs) in self.strips.chunks_exact(self.count * LANES).enumerate() {
            for (token, x) in self.rounded.chunks_exact(self.count).take(self.tokens).enumerate() {
                // SAFETY: blocks of rows are disjoint, and so are tokens.
                strip(pairs, x, unsafe { self.results(token, self.first + i * LANES) });
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn pairs(&self) {
        let tokens = self.tokens;
        let mut token = 0;
        while token < tokens {
            token += if self.strips.len() == self.count * LANES {
                match tokens - token {
                    12.. => self.tile::<12, 1>(token),
                    4.. => self.tile::<4, 1>(token),
                    _ => self.tile::<1, 1>(token),
                }
            } else {
                match tokens - token {
                    12.. => self.tile::<12, 2>(token),
                    8.. => self.tile::<8, 2>(token),
                    4.. => self.tile::<4, 2>(token),
                    2.. => self.tile::<2, 2>(token),
                    _ => self.tile::<1, 2>(token),
                }
            };
        }
    }

    /// `T` tokens from `token` on, `N` strips. Answers `T`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn tile<const T: usize, const N: usize>(&self, token: usize) -> usize {
        use std::arch::x86_64::*;
        // Two types for the same 64 bytes.
        let pairs = |v: __m512i| std::mem::transmute::<__m512i, __m512bh>(v);
        let mut acc = [[_mm512_setzero_ps(); N]; T];
        let x = self.rounded.as_ptr().add(token * self.count);
        let w = self.strips.as_ptr();
        for k in 0..self.count {
            let w: [__m512bh; N] = std::array::from_fn(|n| {
                let p = w.add((n * self.count + k) * LANES);
                pairs(_mm512_loadu_si512(p.cast()))
            });
            for (t, acc) in acc.iter_mut().enumerate() {
                let x = pairs(_mm512_castps_si512(_mm512_set1_ps(*x.add(t * self.count + k))));
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = _mm512_dpbf16_ps(*acc, x, w);
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

/// AMX: registers that are tiles of 16 rows of 64 bytes. There are no intrinsics for them yet. What is not
/// written here does not touch them, so that they keep their contents between the blocks of assembly.
#[cfg(target_arch = "x86_64")]
mod tiles {
    use std::arch::asm;

    use super::{Block, DEPTH, LANES};

    /// Whether the processor has bf16 tiles and the system lets this process use them, which it must be asked.
    pub(super) fn available() -> bool {
        let leaf = |leaf| std::arch::x86_64::__cpuid_count(leaf, 0);
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        // Leaf 7 may be asked for where AVX-512 was found.
        leaf(7).edx & (BF16 | TILE) == BF16 | TILE && permitted()
    }

    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const TILE_DATA: libc::c_ulong = 18;
        // SAFETY: the call takes two numbers and changes only what this process may use.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }

    /// The eight tiles of this thread, 16 rows of 64 bytes each, until it is dropped.
    pub(super) struct Configured(());

    impl Configured {
        /// # Safety
        /// Tiles are available.
        pub(super) unsafe fn new() -> Self {
            #[repr(align(64))]
            struct Config([u8; 64]);
            let mut config = Config([0; 64]);
            config.0[0] = 1;
            for tile in 0..8 {
                config.0[16 + 2 * tile] = 64;
                config.0[48 + tile] = 16;
            }
            asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, preserves_flags));
            Self(())
        }
    }

    impl Drop for Configured {
        fn drop(&mut self) {
            // SAFETY: the instruction exists where tiles could be configured.
            unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
        }
    }

    /// One or two strips times all tokens, 32 at a time.
    ///
    /// # Safety
    /// Tiles are configured; no other thread writes these rows of the result.
    pub(super) unsafe fn multiply(block: &Block<'_>) {
        let second = block.strips.len() > block.count * LANES;
        let mut token = 0;
        while token < block.tokens {
            let left = block.tokens - token;
            let x = block.rounded.as_ptr().add(token * block.count);
            let w = block.strips.as_ptr();
            // What is missing is multiplied as its neighbour and not stored.
            let other_x = if left > LANES { x.add(LANES * block.count) } else { x };
            let other_w = if second { w.add(LANES * block.count) } else { w };
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, preserves_flags, nomem)
            );
            for k in (0..block.count).step_by(DEPTH) {
                asm!(
                    "tileloadd tmm4, [{x} + {apart}*1]",
                    "tileloadd tmm6, [{w} + {line}*1]",
                    "tileloadd tmm7, [{other_w} + {line}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{other_x} + {apart}*1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    x = in(reg) x.add(k),
                    other_x = in(reg) other_x.add(k),
                    apart = in(reg) 4 * block.count,
                    w = in(reg) w.add(k * LANES),
                    other_w = in(reg) other_w.add(k * LANES),
                    line = in(reg) 64_usize,
                    options(nostack, preserves_flags, readonly)
                );
            }
            let mut out = [[0.0_f32; LANES]; LANES];
            let p = out.as_mut_ptr();
            for tile in 0..4 {
                let (below, beside) = (tile / 2 == 1, tile % 2 == 1);
                if below && left <= LANES || beside && !second {
                    continue;
                }
                macro_rules! store {
                    ($tile:literal) => {
                        asm!(
                            concat!("tilestored [{p} + {line}*1], ", $tile),
                            p = in(reg) p,
                            line = in(reg) 64_usize,
                            options(nostack, preserves_flags)
                        )
                    };
                }
                match tile {
                    0 => store!("tmm0"),
                    1 => store!("tmm1"),
                    2 => store!("tmm2"),
                    _ => store!("tmm3"),
                }
                let token = token + if below { LANES } else { 0 };
                let first = block.first + if beside { LANES } else { 0 };
                for (i, sums) in out.iter().enumerate().take(block.tokens - token) {
                    let results = block.results(token + i, first);
                    match results.as_chunks_mut::<LANES>().0 {
                        [results] => *results = *sums,
                        _ => results.copy_from_slice(&sums[..results.len()]),
                    }
                }
            }
            token += 2 * LANES;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn noise(len: usize, mut state: u32) -> Vec<f32> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 0.999_99
            })
            .collect()
    }

    fn rounded(v: f32) -> f64 {
        f64::from(bf16::from_f32(v).to_f32())
    }

    #[test]
    fn products_are_those_of_the_rounded_matrices() {
        for [rows, cols] in [[1, 1], [7, 5], [16, 64], [17, 33], [32, 8], [50, 129], [100, 320]] {
            let w = noise(rows * cols, 1);
            let read = |row: usize, out: &mut [f32]| out.copy_from_slice(&w[row * cols..][..cols]);
            let packed = Bf16Panels::pack(rows, cols, read);
            let strips = rows.div_ceil(16) * 16;
            assert_eq!(packed.bytes(), strips * cols.next_multiple_of(32) * 2);
            for tokens in [0, 1, 2, 3, 5, 8, 9, 12, 16, 17, 31, 32, 33, 50, 130] {
                let x = noise(tokens * cols, 3);
                for path in [Path::Plain, Path::Pairs, Path::Tiles] {
                    if path > Path::best() {
                        continue;
                    }
                    let mut y = vec![f32::NAN; tokens * rows];
                    packed.multiply_by(path, &x, &mut y);
                    for (i, y) in y.iter().enumerate() {
                        let (x, w) = (&x[i / rows * cols..], &w[i % rows * cols..][..cols]);
                        let terms = x.iter().zip(w).map(|(x, w)| rounded(*x) * rounded(*w));
                        let size: f64 = terms.clone().map(f64::abs).sum();
                        let error = (f64::from(*y) - terms.sum::<f64>()).abs();
                        assert!(
                            error <= 1e-5 * size + 1e-30,
                            "{path:?} [{rows}, {cols}] {tokens} tokens: off by {error} of {size}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_result_does_not_depend_on_the_other_tokens() {
        let (rows, cols) = (48, 70);
        let w = noise(rows * cols, 1);
        let packed =
            Bf16Panels::pack(rows, cols, |row, out| out.copy_from_slice(&w[row * cols..][..cols]));
        let x = noise(29 * cols, 2);
        let mut all = vec![0.0; 29 * rows];
        packed.multiply(&x, &mut all);
        for first in [0, 8, 16] {
            let mut some = vec![0.0; 12 * rows];
            packed.multiply(&x[first * cols..][..12 * cols], &mut some);
            assert_eq!(some, all[first * rows..][..12 * rows]);
        }
    }

    #[test]
    fn rounding_is_to_even_and_keeps_what_is_no_number() {
        let values =
            [1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::NAN, f32::MAX, -f32::INFINITY, 1e-42];
        let mut out = [0.0; 4];
        round(&values, halves(&mut out));
        let halves = halves(&mut out);
        for (half, v) in halves.iter().zip(values) {
            let expected = bf16::from_f32(v);
            let got = bf16::from_bits(*half);
            assert!(got == expected || got.is_nan() && expected.is_nan(), "{v}: {got}");
        }
        assert_eq!(halves[7], 0);
    }
}
