//! The ceilings of this machine, measured in the same run as what is held against them.

use serde::Serialize;

use super::stats::Spread;
use crate::kernels::limits::{self, Peak};

/// Bytes read for the memory's bandwidth, where the memory allows.
const BUFFER: u64 = 512 << 20;
/// Least bytes read for it.
const LEAST_BUFFER: u64 = 64 << 20;
/// Bytes that a repetition reads at least: short ones measure the start of threads.
const LEAST_READ: u64 = 256 << 20;
const REPETITIONS: usize = 5;

/// What the machine can do at most, with all threads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limits {
    /// Size of the last-level cache, which other machines on the same processor may share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_bytes: Option<u64>,
    /// Reading a buffer that caches should not hold.
    pub memory: Bandwidth,
    /// Reading again and again as many bytes as a step reads of weights: what caches give.
    pub reread: Bandwidth,
    /// Products of 8-bit integers.
    pub integer: Rate,
    /// f32.
    pub single: Rate,
    /// bf16, where the processor multiplies it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bf16: Option<Rate>,
    /// Products of 8-bit integers in matrix tiles (AMX), where they can be had. Shares are not taken of
    /// this peak.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tiles: Option<Rate>,
}

/// Bandwidth of reading.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bandwidth {
    pub buffer_bytes: u64,
    pub gigabytes_per_second: Spread,
}

/// Peak of an instruction out of registers; a product and a sum are two operations.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rate {
    pub instruction: &'static str,
    pub gigaoperations_per_second: Spread,
}

impl From<Peak> for Rate {
    fn from(peak: Peak) -> Self {
        Self {
            instruction: peak.instruction,
            gigaoperations_per_second: Spread::of(peak.rates).times(1e-9),
        }
    }
}

impl Limits {
    /// Measures them; takes a few seconds. `working_set` is the number of bytes that a step reads.
    pub fn measure(working_set: u64) -> Self {
        let threads = super::threads();
        let cache_bytes = last_level_cache();
        let buffer = buffer_bytes(cache_bytes, available_memory());
        Self {
            cache_bytes,
            memory: Bandwidth::measure(buffer, threads),
            reread: Bandwidth::measure(working_set.min(buffer), threads),
            integer: limits::integer(threads, REPETITIONS).into(),
            single: limits::single(threads, REPETITIONS).into(),
            bf16: limits::brain(threads, REPETITIONS).map(Rate::from),
            tiles: limits::tiles(threads, REPETITIONS).map(Rate::from),
        }
    }

    /// Seconds that reading `bytes` takes at least.
    pub fn reading(&self, bytes: u64) -> f64 {
        let best = self.reread.gigabytes_per_second.median;
        bytes as f64 / (best.max(self.memory.gigabytes_per_second.median) * 1e9)
    }

    /// Seconds that `operations` on integers take at least.
    pub fn computing(&self, operations: u64) -> f64 {
        operations as f64 / (self.integer.gigaoperations_per_second.median * 1e9)
    }
}

impl Bandwidth {
    fn measure(bytes: u64, threads: usize) -> Self {
        let words = usize::try_from(bytes / 8).unwrap_or(0).max(1);
        let mut buffer = Vec::new();
        // The size was chosen by what is free, but that may have changed.
        let words = if buffer.try_reserve_exact(words).is_ok() { words } else { 1 };
        // Written, not only zeroed: untouched pages would all be the same one.
        buffer.extend((0..words).map(|i| i as u64 | 1));
        let size = size_of_val(&buffer[..]) as u64;
        let passes = usize::try_from(LEAST_READ.div_ceil(size)).unwrap_or(1);
        let rates = limits::read_rates(&buffer, threads, passes, REPETITIONS);
        Self { buffer_bytes: size, gigabytes_per_second: Spread::of(rates).times(1e-9) }
    }
}

/// Twice the last-level cache or [`BUFFER`], whichever is more, but not over a quarter of what is free.
fn buffer_bytes(cache: Option<u64>, free: Option<u64>) -> u64 {
    let wanted = BUFFER.max(cache.unwrap_or(0).saturating_mul(2));
    wanted.min(free.map_or(BUFFER, |free| (free / 4).max(LEAST_BUFFER)))
}

/// Bytes of the last-level cache, as Linux tells.
fn last_level_cache() -> Option<u64> {
    let mut last = None;
    for entry in std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()? {
        let folder = entry.ok()?.path();
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        if let (Some(level), Some(size)) = (read("level"), read("size"))
            && let (Ok(level), Some(size)) = (level.trim().parse::<u32>(), cache_size(size.trim()))
        {
            last = last.max(Some((level, size)));
        }
    }
    last.map(|(_, size)| size)
}

/// Reads `48K` or `32M`.
fn cache_size(text: &str) -> Option<u64> {
    let (number, scale) = match text.strip_suffix('K') {
        Some(number) => (number, 1 << 10),
        None => (text.strip_suffix('M')?, 1 << 20),
    };
    number.parse::<u64>().ok()?.checked_mul(scale)
}

/// Bytes of memory that can be had without pushing anything out, as Linux tells.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_large_but_leave_room() {
        let mib = |n: u64| n << 20;
        assert_eq!(buffer_bytes(Some(mib(32)), Some(mib(16_000))), mib(512));
        assert_eq!(buffer_bytes(Some(mib(480)), Some(mib(16_000))), mib(960));
        assert_eq!(buffer_bytes(Some(mib(480)), Some(mib(1000))), mib(250));
        assert_eq!(buffer_bytes(None, Some(mib(100))), mib(64));
        assert_eq!(buffer_bytes(Some(u64::MAX), None), mib(512));
        assert_eq!(cache_size("48K"), Some(48 << 10));
        assert_eq!(cache_size("2M"), Some(2 << 20));
        assert_eq!(cache_size("2"), None);
    }

    #[test]
    fn ceilings_turn_into_times_by_hand() {
        let rate = |value: f64| Rate {
            instruction: "x",
            gigaoperations_per_second: Spread::of(vec![value]),
        };
        let bandwidth = |value: f64| Bandwidth {
            buffer_bytes: 8,
            gigabytes_per_second: Spread::of(vec![value]),
        };
        let limits = Limits {
            cache_bytes: None,
            memory: bandwidth(10.0),
            reread: bandwidth(20.0),
            integer: rate(100.0),
            single: rate(50.0),
            bf16: None,
            tiles: None,
        };
        assert_eq!(limits.reading(40_000_000_000), 2.0);
        assert_eq!(limits.computing(50_000_000_000), 0.5);
    }

    #[test]
    fn a_small_buffer_is_measured() {
        let found = Bandwidth::measure(1 << 16, 1);
        assert_eq!(found.buffer_bytes, 1 << 16);
        assert_eq!(found.gigabytes_per_second.values.len(), REPETITIONS);
        assert!(found.gigabytes_per_second.min > 0.0);
    }
}
