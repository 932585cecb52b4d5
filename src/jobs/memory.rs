//! The largest resident memory of the process during a piece of work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

/// The kernel keeps the high-water mark since it was last reset; samples in between keep it for this
/// piece of work when another one resets it.
const INTERVAL: Duration = Duration::from_millis(250);

/// Watches resident memory until dropped.
pub struct Peak {
    field: &'static str,
    bytes: Arc<AtomicU64>,
    sampler: JoinHandle<()>,
}

impl Peak {
    /// Starts watching.
    pub fn start(handle: &Handle) -> Self {
        // Where the mark cannot be reset it may be older than the work: then samples must do.
        let reset = std::fs::write("/proc/self/clear_refs", "5").is_ok();
        let field = if reset { "VmHWM:" } else { "VmRSS:" };
        let bytes = Arc::new(AtomicU64::new(0));
        let sampled = bytes.clone();
        let sampler = handle.spawn(async move {
            loop {
                sampled.fetch_max(resident(field), Ordering::Relaxed);
                tokio::time::sleep(INTERVAL).await;
            }
        });
        Self { field, bytes, sampler }
    }

    /// The largest so far, in bytes; 0 where the system does not say.
    pub fn bytes(&self) -> u64 {
        self.bytes.fetch_max(resident(self.field), Ordering::Relaxed);
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.sampler.abort();
    }
}

fn resident(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    read(&status, field).unwrap_or_default()
}

/// The field of a status text, given there in KiB, in bytes.
fn read(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_bytes() {
        let status = "Name:\tplanish\nVmHWM:\t    2048 kB\nVmRSS:\t 3 kB\n";
        assert_eq!(read(status, "VmHWM:"), Some(2 << 20));
        assert_eq!(read(status, "VmRSS:"), Some(3072));
        assert_eq!(read(status, "VmSwap:"), None);
        assert_eq!(read("VmRSS: x kB", "VmRSS:"), None);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn memory_in_use_counts() {
        let peak = Peak::start(&Handle::current());
        let block = vec![1u8; 64 << 20];
        assert!(peak.bytes() >= block.iter().map(|b| u64::from(*b)).sum());
    }
}
