//! A writer that knows how much went through it.

use std::io::{self, Write};

/// Counts the bytes written.
pub(super) struct Counting<W> {
    out: W,
    count: u64,
}

impl<W: Write> Counting<W> {
    pub fn new(out: W) -> Self {
        Self { out, count: 0 }
    }

    /// Bytes written so far.
    pub fn count(&self) -> u64 {
        self.count
    }
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
