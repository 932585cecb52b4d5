//! Tiles of 16 tokens by 16 rows, where the processor multiplies whole tiles (AMX).
//!
//! A tile instruction does the products of 32 columns at once, eight times as many a cycle as vectors do.
//! What then bounds a product are the scales: each tile of sums goes through memory and is scaled by
//! vectors, some four instructions for 512 products.

#![allow(unsafe_op_in_unsafe_fn)]

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use super::super::quantize::{self, Activations, BLOCK};
use super::super::simd::Simd;
use super::panels::{LANES, VECTOR};
use super::scales::Scales;
use super::tile::{All, Panel, Stream, each_token};
use super::whole::{self, Groups};

/// Tokens of a tile.
pub(super) const TOKENS: usize = quantize::TILE;
/// Blocks whose sums have room: the one that is scaled and the next.
const RING: usize = 2;
/// Bytes of the unpacked codes of a block.
const UNPACKED: usize = 8 * VECTOR;

/// Whether the processor has tiles of bytes and the system lets this process use them.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if __cpuid(0).eax < 7 {
            return false;
        }
        let leaf = __cpuid_count(7, 0);
        let (tile, int8) = (leaf.edx >> 24 & 1, leaf.edx >> 25 & 1);
        tile == 1 && int8 == 1 && permitted()
    })
}

/// Asks the system for the registers, which it keeps apart from the others.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` of arch_prctl, and the number of the tile data among the components.
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call changes nothing but this process's permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Shapes of the tile registers.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    const fn new(wanted: [(u16, u8); 8]) -> Self {
        let mut shapes =
            Self { palette: 1, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut i = 0;
        while i < wanted.len() {
            (shapes.row_bytes[i], shapes.rows[i]) = wanted[i];
            i += 1;
        }
        shapes
    }
}

/// Registers: 0 and 3 sums; 1 tokens and 2 codes of 32 columns; 4 tokens and 5 codes of 16.
static BLOCKS: Shapes =
    Shapes::new([(64, 16), (32, 16), (64, 8), (64, 16), (16, 16), (64, 4), (64, 16), (64, 16)]);

/// Registers: 0 to 3 sums; 4 and 5 tokens, 6 and 7 codes of 64 columns.
static WIDE: Shapes = Shapes::new([(64, 16); 8]);

/// The tile registers in use by this thread; released when dropped, so that switching threads does not
/// have to save them.
pub(super) struct Tiles(());

impl Tiles {
    /// For sums of a block at a time.
    ///
    /// # Safety
    /// [`available`] said yes.
    pub unsafe fn blocks() -> Self {
        asm!("ldtilecfg [{}]", in(reg) &raw const BLOCKS, options(nostack, readonly));
        Self(())
    }

    /// For sums over all columns.
    ///
    /// # Safety
    /// [`available`] said yes.
    pub unsafe fn wide() -> Self {
        asm!("ldtilecfg [{}]", in(reg) &raw const WIDE, options(nostack, readonly));
        Self(())
    }

    /// Sums of 32 columns: `out[token][lane]`, tokens `stride` bytes apart.
    ///
    /// # Safety
    /// `x` is valid for 16 tokens, `codes` for a block, `out` for 256 numbers, and the registers were set up
    /// by `blocks`.
    #[inline(always)]
    unsafe fn dot(&self, x: *const i8, stride: usize, codes: *const u8, out: *mut i32) {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm1, [{x} + {stride}]",
            "tileloadd tmm2, [{codes} + {line}]",
            "tdpbssd tmm0, tmm1, tmm2",
            "tilestored [{out} + {line}], tmm0",
            x = in(reg) x, stride = in(reg) stride, codes = in(reg) codes,
            line = in(reg) VECTOR, out = in(reg) out,
            out("tmm0") _, out("tmm1") _, out("tmm2") _,
            options(nostack),
        );
    }

    /// Two tiles of tokens times two panels, over `pairs` of blocks: `out[tile of tokens][panel]`.
    ///
    /// # Safety
    /// `x[..]` are valid for 16 tokens, `codes[..]` for the unpacked blocks, `out` for 1024 numbers, and
    /// the registers were set up by `wide`.
    #[inline(always)]
    unsafe fn dot_all(
        &self,
        x: [*const i8; 2],
        stride: usize,
        codes: [*const u8; 2],
        pairs: usize,
        out: *mut i32,
    ) {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x0} + {stride}]",
            "tileloadd tmm6, [{w0} + {line}]",
            "tdpbsud tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + {line}]",
            "tdpbsud tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x1} + {stride}]",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "add {x0}, 64",
            "add {x1}, 64",
            "add {w0}, 1024",
            "add {w1}, 1024",
            "dec {pairs}",
            "jnz 2b",
            "tilestored [{out} + {line}], tmm0",
            "tilestored [{out} + {line} + 1024], tmm1",
            "tilestored [{out} + {line} + 2048], tmm2",
            "tilestored [{out} + {line} + 3072], tmm3",
            x0 = inout(reg) x[0] => _, x1 = inout(reg) x[1] => _,
            w0 = inout(reg) codes[0] => _, w1 = inout(reg) codes[1] => _,
            pairs = inout(reg) pairs => _,
            stride = in(reg) stride, line = in(reg) VECTOR, out = in(reg) out,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }

    /// [`Tiles::dot`] of 16 columns.
    ///
    /// # Safety
    /// As of `dot`.
    #[inline(always)]
    unsafe fn dot_half(&self, x: *const i8, stride: usize, codes: *const u8, out: *mut i32) {
        asm!(
            "tilezero tmm3",
            "tileloadd tmm4, [{x} + {stride}]",
            "tileloadd tmm5, [{codes} + {line}]",
            "tdpbssd tmm3, tmm4, tmm5",
            "tilestored [{out} + {line}], tmm3",
            x = in(reg) x, stride = in(reg) stride, codes = in(reg) codes,
            line = in(reg) VECTOR, out = in(reg) out,
            out("tmm3") _, out("tmm4") _, out("tmm5") _,
            options(nostack),
        );
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a value exists only where the instructions do.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}

/// Bytes of scratch that a panel of `cols` columns takes unpacked.
pub(super) const fn unpacked_bytes(cols: usize) -> usize {
    cols / BLOCK * UNPACKED
}

/// Unpacks the codes of a panel into signed bytes, less the panel's zero point.
///
/// # Safety
/// The pointers are those of a panel of `cols` columns, `scratch` is valid for [`unpacked_bytes`], and the
/// processor has the instructions of `S`.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd, C: Stream, G: Scales>(
    panel: Panel<G>,
    cols: usize,
    scratch: *mut u8,
) {
    let (reader, zero) = (panel.reader, panel.zero);
    let mut stream = C::new(panel.codes);
    for block in 0..cols / BLOCK {
        let unit = panel.scales.add(block / reader.blocks() * reader.bytes());
        let w = stream.next::<S>(reader.absent::<S>(unit, zero), true);
        for (v, w) in w.into_iter().enumerate() {
            let w = if zero == 0 { w } else { S::less(w, zero) };
            S::store_codes(scratch.add(block * UNPACKED + v * VECTOR), w);
        }
    }
}

#[repr(C, align(64))]
struct Sums([[i32; LANES]; TOKENS]);

/// [`super::tile::tile`] for 16 tokens, with the codes as `unpack` gave them.
///
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, G: Scales>(
    tiles: &Tiles,
    panel: Panel<G>,
    unpacked: *const u8,
    x: &Activations,
    first: usize,
) -> [S::F; TOKENS] {
    let cols = x.cols();
    let blocks = cols / BLOCK;
    let codes = x.codes().as_ptr().add(first * cols);
    let lines = x.tiles().as_ptr().add(first / TOKENS * blocks).cast::<f32>();

    let mut room = [const { Sums([[0; LANES]; TOKENS]) }; 2 * RING];
    let room = room.as_mut_ptr();
    let ask = |block: usize| {
        let (q, w) = (codes.add(block * BLOCK), unpacked.add(block * UNPACKED));
        let low = room.add(2 * (block % RING)).cast::<i32>();
        let high = room.add(2 * (block % RING) + 1).cast::<i32>();
        if G::HALVES {
            tiles.dot_half(q, cols, w, low);
            tiles.dot_half(q.add(16), cols, w.add(UNPACKED / 2), high);
        } else {
            tiles.dot(q, cols, w, low);
        }
    };
    for block in 0..blocks.min(RING - 1) {
        ask(block);
    }
    let mut sums = [S::splat(0.0); TOKENS];
    let reader = panel.reader;
    let mut block = 0;
    let mut unit_at = panel.scales;
    while block < blocks {
        let unit = reader.unit::<S>(unit_at);
        for inside in 0..reader.blocks() {
            if block + RING - 1 < blocks {
                ask(block + RING - 1);
            }
            let low = room.add(2 * (block % RING)).cast::<i32>();
            let high = room.add(2 * (block % RING) + 1).cast::<i32>();
            let (scale, min) = reader.block::<S>(unit, unit_at, inside);
            let line = lines.add(2 * TOKENS * block);
            each_token!(T => {
                let d = S::splat(*line.add(T));
                let low = S::from_i32(S::load_i32(low.add(LANES * T)));
                sums[T] = S::fused(low, S::mul(scale[0], d), sums[T]);
                if G::HALVES {
                    let high = S::from_i32(S::load_i32(high.add(LANES * T)));
                    sums[T] = S::fused(high, S::mul(scale[1], d), sums[T]);
                }
                if G::MIN {
                    sums[T] = S::fused(min, S::splat(*line.add(TOKENS + T)), sums[T]);
                }
            });
            block += 1;
        }
        unit_at = unit_at.add(reader.bytes());
    }
    sums
}

/// Unpacks a panel into bytes `weight + 128`, unless it is that already; gives where they are.
///
/// # Safety
/// As of [`unpack`].
#[inline(always)]
pub(super) unsafe fn expand<S: Simd, G: Groups, const BITS: u8>(
    panel: whole::Panel<G>,
    cols: usize,
    scratch: *mut u8,
) -> *const u8 {
    if BITS == 8 {
        return panel.codes;
    }
    let mut stream = All::<BITS>::new(panel.codes);
    for block in 0..cols / BLOCK {
        let w = stream.next::<S>(S::splat_codes(0), true);
        for (v, w) in w.into_iter().enumerate() {
            S::store_codes(scratch.add(block * UNPACKED + v * VECTOR), w);
        }
    }
    let each = panel.groups.blocks();
    for block in 0..cols / BLOCK {
        let factors = panel.factors().add(2 * LANES * (block / each));
        for v in 0..8 {
            let at = scratch.add(block * UNPACKED + v * VECTOR).cast::<[u8; VECTOR]>();
            panel.groups.expand(factors, &mut *at);
        }
    }
    scratch.cast_const()
}

/// [`whole::tile`] for 32 tokens and two panels (which may be the same): `[tile of tokens][panel]`.
///
/// # Safety
/// As there; the panels are unpacked by [`expand`], have an even number of blocks, and `tiles` is `wide`.
#[inline(always)]
pub(super) unsafe fn tiles_of_rows<S: Simd, G: Groups>(
    tiles: &Tiles,
    panels: [whole::Panel<G>; 2],
    unpacked: [*const u8; 2],
    x: &Activations,
    first: usize,
    mut store: impl FnMut(usize, usize, [S::F; TOKENS]),
) {
    let cols = x.cols();
    let blocks = cols / BLOCK;
    let mut room = [const { Sums([[0; LANES]; TOKENS]) }; 4];
    let codes = x.codes().as_ptr().add(first * cols);
    let tokens = [codes, codes.add(TOKENS * cols)];
    tiles.dot_all(tokens, cols, unpacked, blocks / 2, room.as_mut_ptr().cast());
    for (i, sums) in room.iter().enumerate() {
        let (tile, panel) = (i / 2, i % 2);
        let mut out = [S::splat(0.0); TOKENS];
        for (t, (out, sums)) in out.iter_mut().zip(&sums.0).enumerate() {
            let token = first + tile * TOKENS + t;
            let less = S::splat_i32(-128 * *x.totals().get_unchecked(token));
            let sum = S::add_i32(S::load_i32(sums.as_ptr()), less);
            *out = panels[panel].scaled::<S>(sum, *x.scales().get_unchecked(token * blocks));
        }
        store(tile, panel, out);
    }
}
