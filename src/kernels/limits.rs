//! What the machine can do at most: bytes read a second, and products a second out of registers. These
//! are the ceilings that the speed of kernels is held against.
//!
//! Threads are those of the standard library, not of the pool that kernels use: a limit must not depend
//! on how well work is handed out.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use super::multiversion::multiversion;

/// Independent chains of arithmetic: enough to hide the latency of an instruction, few enough for the
/// registers of every instruction set.
const CHAINS: usize = 12;

/// Seconds that a measurement of arithmetic lasts at least.
const LEAST_SECONDS: f64 = 0.05;

/// A peak of arithmetic.
#[derive(Debug, Clone)]
pub struct Peak {
    /// The instruction that was repeated, or `loop` where the compiler chose.
    pub instruction: &'static str,
    /// Operations a second of all threads together, one value a repetition. A product and a sum are two.
    pub rates: Vec<f64>,
}

/// Runs `work` on `threads` threads at once and gives the seconds from the first start to the last end.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let spans: Vec<_> = std::thread::scope(|scope| {
        let spawned: Vec<_> = (0..threads)
            .map(|index| {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    work(index);
                    (start, Instant::now())
                })
            })
            .collect();
        spawned.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let start = spans.iter().map(|(start, _)| *start).min();
    let end = spans.iter().map(|(_, end)| *end).max();
    match (start, end) {
        (Some(start), Some(end)) => (end - start).as_secs_f64().max(1e-9),
        _ => f64::NAN,
    }
}

multiversion! {
    /// Sum of all words, wrapping: the cheapest use of everything that is read.
    fn sum(words: &[u64]) -> u64 {
        /// Bytes that are asked for ahead of their use.
        #[cfg(target_arch = "x86_64")]
        const AHEAD: usize = 4096;
        let mut sums = [0_u64; 32];
        let mut chunks = words.chunks_exact(32);
        for chunk in &mut chunks {
            #[cfg(target_arch = "x86_64")]
            for line in 0..4 {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                let place = chunk.as_ptr().cast::<i8>().wrapping_add(AHEAD + 64 * line);
                // SAFETY: a prefetch is a hint; it neither faults nor reads, wherever it points.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(place) };
            }
            for (sum, word) in sums.iter_mut().zip(chunk) {
                *sum = sum.wrapping_add(*word);
            }
        }
        let rest = chunks.remainder().iter().fold(0_u64, |a, b| a.wrapping_add(*b));
        sums.iter().fold(rest, |a, b| a.wrapping_add(*b))
    }
}

/// Bytes a second at which `threads` threads, each with a part of its own, read `buffer` `passes` times;
/// one value a repetition. Where the buffer fits into caches, the first pass warms them unmeasured.
pub fn read_rates(buffer: &[u64], threads: usize, passes: usize, repetitions: usize) -> Vec<f64> {
    let (threads, passes) = (threads.max(1), passes.max(1));
    let part = buffer.len().div_ceil(threads).max(1);
    let read = |passes: usize| {
        together(threads, |index| {
            let start = (index * part).min(buffer.len());
            let mine = &buffer[start..(start + part).min(buffer.len())];
            for _ in 0..passes {
                black_box(sum(black_box(mine)));
            }
        })
    };
    read(1);
    (0..repetitions).map(|_| (passes * size_of_val(buffer)) as f64 / read(passes)).collect()
}

/// A loop over registers: runs `spins` times, and how many operations a spin is.
#[derive(Clone, Copy)]
struct Spin {
    instruction: &'static str,
    run: fn(usize),
    operations: usize,
}

fn measure(spin: Spin, threads: usize, repetitions: usize) -> Peak {
    let threads = threads.max(1);
    let mut spins = 1 << 12;
    // Also wakes cores up and lets the clock settle.
    while together(threads, |_| (spin.run)(spins)) < LEAST_SECONDS && spins < 1 << 40 {
        spins *= 2;
    }
    let done = (spins * spin.operations * threads) as f64;
    let rates = (0..repetitions).map(|_| done / together(threads, |_| (spin.run)(spins))).collect();
    Peak { instruction: spin.instruction, rates }
}

/// Products of 8-bit integers summed in 32 bits.
pub fn integer(threads: usize, repetitions: usize) -> Peak {
    measure(integer_spin(), threads, repetitions)
}

/// Fused multiply-add in f32.
pub fn single(threads: usize, repetitions: usize) -> Peak {
    measure(single_spin(), threads, repetitions)
}

/// Products of bf16 summed in f32, where the processor has them.
pub fn brain(threads: usize, repetitions: usize) -> Option<Peak> {
    brain_spin().map(|spin| measure(spin, threads, repetitions))
}

/// Products of 8-bit integers in matrix tiles, where the processor has them and the system lets us use them.
pub fn tiles(threads: usize, repetitions: usize) -> Option<Peak> {
    tile_spin().map(|spin| measure(spin, threads, repetitions))
}

#[cfg(target_arch = "x86_64")]
fn integer_spin() -> Spin {
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
        // SAFETY: the instructions were detected.
        let run = |spins| unsafe { x86::dot_512(spins) };
        return Spin { instruction: "vpdpbusd zmm", run, operations: CHAINS * 128 };
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the instructions were detected.
        let run = |spins| unsafe { x86::dot_256(spins) };
        return Spin { instruction: "vpmaddubsw + vpmaddwd ymm", run, operations: CHAINS * 64 };
    }
    INTEGER_LOOP
}

#[cfg(target_arch = "aarch64")]
fn integer_spin() -> Spin {
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        // SAFETY: the instruction was detected.
        let run = |spins| unsafe { neon::dot(spins) };
        return Spin { instruction: "sdot 16b", run, operations: CHAINS * 32 };
    }
    INTEGER_LOOP
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn integer_spin() -> Spin {
    INTEGER_LOOP
}

#[cfg(target_arch = "x86_64")]
fn single_spin() -> Spin {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the instructions were detected.
        let run = |spins| unsafe { x86::fma_512(spins) };
        return Spin { instruction: "vfmadd ps zmm", run, operations: CHAINS * 32 };
    }
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the instructions were detected.
        let run = |spins| unsafe { x86::fma_256(spins) };
        return Spin { instruction: "vfmadd ps ymm", run, operations: CHAINS * 16 };
    }
    SINGLE_LOOP
}

#[cfg(target_arch = "aarch64")]
fn single_spin() -> Spin {
    if std::arch::is_aarch64_feature_detected!("neon") {
        // SAFETY: the instruction was detected.
        let run = |spins| unsafe { neon::fma(spins) };
        return Spin { instruction: "fmla 4s", run, operations: CHAINS * 8 };
    }
    SINGLE_LOOP
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn single_spin() -> Spin {
    SINGLE_LOOP
}

#[cfg(target_arch = "x86_64")]
fn brain_spin() -> Option<Spin> {
    let there = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    // SAFETY: only handed out where the instructions were detected.
    let run: fn(usize) = |spins| unsafe { x86::dot_bf16(spins) };
    there.then_some(Spin { instruction: "vdpbf16ps zmm", run, operations: CHAINS * 64 })
}

#[cfg(not(target_arch = "x86_64"))]
fn brain_spin() -> Option<Spin> {
    None
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tile_spin() -> Option<Spin> {
    // SAFETY: only handed out where the instructions were detected and permitted.
    let run: fn(usize) = |spins| unsafe { x86::tiles(spins) };
    x86::may_use_tiles().then_some(Spin {
        instruction: "tdpbssd tmm",
        run,
        operations: x86::TILES * 2 * 16 * 16 * 64,
    })
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn tile_spin() -> Option<Spin> {
    None
}

/// Lanes of the plain loops: a vector of 16 for each chain.
const LANES: usize = 16 * CHAINS;
const INTEGER_LOOP: Spin = Spin { instruction: "loop", run: integer_loop, operations: 8 * LANES };
const SINGLE_LOOP: Spin = Spin { instruction: "loop", run: single_loop, operations: 8 * LANES };

fn integer_loop(spins: usize) {
    let mut chains = [1_i32; LANES];
    for spin in 0..spins {
        let factor = black_box(spin as i32 | 1);
        for _ in 0..4 {
            chains.iter_mut().for_each(|c| *c = c.wrapping_mul(factor).wrapping_add(3));
        }
    }
    black_box(chains);
}

fn single_loop(spins: usize) {
    let mut chains = [1_f32; LANES];
    for _ in 0..spins {
        let factor = black_box(0.999_f32);
        for _ in 0..4 {
            chains.iter_mut().for_each(|c| *c = *c * factor + 0.001);
        }
    }
    black_box(chains);
}

/// Hides a register's value from the compiler, so that it can neither fold a loop nor drop it.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! hide {
    (vreg, $value:expr) => { hide!("/* {0:v} */", vreg, $value) };
    ($class:ident, $value:expr) => { hide!("/* {0} */", $class, $value) };
    ($text:literal, $class:ident, $value:expr) => {
        // SAFETY: the text is a comment: nothing is read, written or changed.
        unsafe { asm!($text, inout($class) $value, options(nomem, nostack, preserves_flags)) }
    };
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;
    use std::arch::asm;
    use std::hint::black_box;

    use super::CHAINS;
    use crate::kernels::integer::neon;

    #[target_feature(enable = "neon,dotprod")]
    pub fn dot(spins: usize) {
        let mut chains = [vdupq_n_s32(0); CHAINS];
        let (left, right) = (vdupq_n_s8(3), vdupq_n_s8(-2));
        for _ in 0..spins {
            for chain in &mut chains {
                // SAFETY: this function has the instruction.
                *chain = unsafe { neon::dot::<true>(*chain, left, right) };
                hide!(vreg, *chain);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "neon")]
    pub fn fma(spins: usize) {
        let mut chains = [vdupq_n_f32(1.0); CHAINS];
        let (factor, term) = (vdupq_n_f32(0.999), vdupq_n_f32(0.001));
        for _ in 0..spins {
            for chain in &mut chains {
                *chain = vfmaq_f32(*chain, factor, term);
                hide!(vreg, *chain);
            }
        }
        black_box(chains);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::CHAINS;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn dot_512(spins: usize) {
        let mut chains = [_mm512_setzero_si512(); CHAINS];
        let (unsigned, signed) = (_mm512_set1_epi8(3), _mm512_set1_epi8(-2));
        for _ in 0..spins {
            for chain in &mut chains {
                *chain = _mm512_dpbusd_epi32(*chain, unsigned, signed);
                hide!(zmm_reg, *chain);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx2")]
    pub fn dot_256(spins: usize) {
        let mut chains = [_mm256_setzero_si256(); CHAINS];
        let (unsigned, signed) = (_mm256_set1_epi8(3), _mm256_set1_epi8(-2));
        let ones = _mm256_set1_epi16(1);
        for _ in 0..spins {
            for chain in &mut chains {
                let mut left = unsigned;
                hide!(ymm_reg, left);
                let pairs = _mm256_maddubs_epi16(left, signed);
                *chain = _mm256_add_epi32(*chain, _mm256_madd_epi16(pairs, ones));
                hide!(ymm_reg, *chain);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx512f")]
    pub fn fma_512(spins: usize) {
        let mut chains = [_mm512_set1_ps(1.0); CHAINS];
        let (factor, term) = (_mm512_set1_ps(0.999), _mm512_set1_ps(0.001));
        for _ in 0..spins {
            for chain in &mut chains {
                *chain = _mm512_fmadd_ps(*chain, factor, term);
                hide!(zmm_reg, *chain);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn fma_256(spins: usize) {
        let mut chains = [_mm256_set1_ps(1.0); CHAINS];
        let (factor, term) = (_mm256_set1_ps(0.999), _mm256_set1_ps(0.001));
        for _ in 0..spins {
            for chain in &mut chains {
                *chain = _mm256_fmadd_ps(*chain, factor, term);
                hide!(ymm_reg, *chain);
            }
        }
        black_box(chains);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn dot_bf16(spins: usize) {
        let mut chains = [_mm512_set1_ps(1.0); CHAINS];
        let halves = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.25));
        for _ in 0..spins {
            for chain in &mut chains {
                *chain = _mm512_dpbf16_ps(*chain, halves, halves);
                hide!(zmm_reg, *chain);
            }
        }
        black_box(chains);
    }

    /// Tiles that are summed into.
    #[cfg(target_os = "linux")]
    pub const TILES: usize = 4;

    /// Whether the processor has tiles of 8-bit integers, and Linux, which must be asked, gives them to
    /// this process.
    #[cfg(target_os = "linux")]
    pub fn may_use_tiles() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
        let there = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8;
        // SAFETY: asks for a permission; no memory is passed.
        there
            && unsafe {
                libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0
            }
    }

    /// # Safety
    /// [`may_use_tiles`] said yes.
    #[cfg(target_os = "linux")]
    pub unsafe fn tiles(spins: usize) {
        // Palette 1; eight tiles of 16 rows of 64 bytes.
        let mut config = [0_u8; 64];
        config[0] = 1;
        for tile in 0..8 {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        // SAFETY: the instructions are there by the caller's promise; the configuration is a whole one of
        // 64 bytes; all tiles are declared changed and are released before the end.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tilezero tmm4",
                "tilezero tmm5",
                "2:",
                "tdpbssd tmm0, tmm4, tmm5",
                "tdpbssd tmm1, tmm4, tmm5",
                "tdpbssd tmm2, tmm4, tmm5",
                "tdpbssd tmm3, tmm4, tmm5",
                "dec {spins}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) config.as_ptr(),
                spins = inout(reg) spins.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_take_every_word_once() {
        for len in [0, 1, 31, 32, 33, 64, 1000] {
            let words: Vec<u64> = (0..len).map(|i| i * i + 1).collect();
            assert_eq!(sum(&words), words.iter().sum::<u64>(), "{len}");
        }
        assert_eq!(sum(&[u64::MAX, 2]), 1);
    }

    #[test]
    fn every_thread_runs_once() {
        let seen: Vec<_> = (0..3).map(|_| std::sync::atomic::AtomicU32::new(0)).collect();
        let seconds = together(3, |i| {
            seen[i].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(seconds > 0.0);
        assert!(seen.iter().all(|n| n.load(std::sync::atomic::Ordering::Relaxed) == 1));
    }

    #[test]
    fn limits_are_positive_numbers_with_a_name() {
        let read = read_rates(&vec![1; 1 << 12], 2, 3, 2);
        assert_eq!(read.len(), 2);
        let peaks = [Some(integer(1, 1)), Some(single(1, 1)), brain(1, 1), tiles(1, 1)];
        for peak in peaks.into_iter().flatten() {
            assert!(!peak.instruction.is_empty() && peak.rates.len() == 1);
            assert!(peak.rates[0].is_finite() && peak.rates[0] > 1e6, "{peak:?}");
        }
        assert!(read.iter().all(|rate| rate.is_finite() && *rate > 0.0));
        // More threads than words: some have nothing to read.
        assert!(read_rates(&[1, 2], 4, 1, 1)[0] > 0.0);
    }

    #[test]
    fn loops_of_the_compiler_run_everywhere() {
        for spin in [INTEGER_LOOP, SINGLE_LOOP] {
            let peak = measure(spin, 1, 1);
            assert!(peak.rates[0] > 1e6, "{peak:?}");
        }
    }
}
