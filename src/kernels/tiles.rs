//! AMX: registers that are tiles of 16 rows of 64 bytes, here for products of bf16 pairs. There are no intrinsics for
//! them yet. What is not written here does not touch them, so that they keep their contents between the blocks of
//! assembly.

#![allow(unsafe_op_in_unsafe_fn)]

use std::arch::asm;

/// Whether the processor has bf16 tiles and the system lets this process use them, which it must be asked.
pub fn available() -> bool {
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
pub struct Configured(());

impl Configured {
    /// # Safety
    /// Tiles are available.
    pub unsafe fn new() -> Self {
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

/// Makes one of the four tiles of sums zeros.
///
/// # Safety
/// Tiles are configured.
#[inline(always)]
pub unsafe fn zero(tile: usize) {
    macro_rules! zero {
        ($tile:literal) => {
            asm!(concat!("tilezero ", $tile), options(nostack, preserves_flags, nomem))
        };
    }
    match tile {
        0 => zero!("tmm0"),
        1 => zero!("tmm1"),
        2 => zero!("tmm2"),
        _ => zero!("tmm3"),
    }
}

/// Reads one of the four tiles of sums, its rows `stride` bytes apart.
///
/// # Safety
/// Tiles are configured; the rows are valid for reading.
#[inline(always)]
pub unsafe fn load(tile: usize, from: *const f32, stride: usize) {
    macro_rules! load {
        ($tile:literal) => {
            asm!(
                concat!("tileloadd ", $tile, ", [{from} + {stride}*1]"),
                from = in(reg) from,
                stride = in(reg) stride,
                options(nostack, preserves_flags, readonly)
            )
        };
    }
    match tile {
        0 => load!("tmm0"),
        1 => load!("tmm1"),
        2 => load!("tmm2"),
        _ => load!("tmm3"),
    }
}

/// Writes one of the four tiles of sums, its rows `stride` bytes apart.
///
/// # Safety
/// Tiles are configured; the rows are valid for writing.
#[inline(always)]
pub unsafe fn store(tile: usize, to: *mut f32, stride: usize) {
    macro_rules! store {
        ($tile:literal) => {
            asm!(
                concat!("tilestored [{to} + {stride}*1], ", $tile),
                to = in(reg) to,
                stride = in(reg) stride,
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
}
