//! Lines of a file, packed or not, with limits.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flate2::read::MultiGzDecoder;

use super::{MAX_ROW_BYTES, long_row, malformed};
use crate::error::{Error, Reason, Result};

/// Unpacked bytes of a file: at most so many in all, and so many of a row.
pub struct Bytes {
    inner: Box<dyn Read + Send>,
    left: u64,
    max: u64,
    /// Bytes read since the last row began; whoever knows where rows begin sets it back.
    row: Arc<AtomicUsize>,
}

impl Bytes {
    pub fn open(path: &Path, packed: bool, max: u64) -> Result<Self> {
        let file = BufReader::new(File::open(path)?);
        let inner: Box<dyn Read + Send> =
            if packed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
        Ok(Self { inner, left: max, max, row: Arc::default() })
    }

    /// The count of bytes since a row began.
    pub fn row(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.row)
    }
}

impl Read for Bytes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let Some(left) = self.left.checked_sub(read as u64) else {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("more than {} bytes; split the file or raise the limit", self.max),
            ));
        };
        self.left = left;
        // A reader may have read some of the next rows into its buffer.
        let slack = 1 << 20;
        if self.row.fetch_add(read, Ordering::Relaxed) > MAX_ROW_BYTES + slack {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!(
                    "a record has more than {MAX_ROW_BYTES} bytes; close its quotes or split it"
                ),
            ));
        }
        Ok(read)
    }
}

/// What went wrong while bytes were read.
pub fn failed(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::FileTooLarge => Error::new(Reason::TooLarge, error.to_string()),
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
            Error::new(
                Reason::MalformedFile,
                format!("the gzip data is damaged: {error}; pack the file again"),
            )
        }
        _ => error.into(),
    }
}

/// Lines with their numbers from 1, without their ends and without a byte order mark.
pub struct Lines {
    reader: BufReader<Bytes>,
    row: Arc<AtomicUsize>,
    number: u64,
    buffer: Vec<u8>,
}

impl Lines {
    pub fn open(path: &Path, packed: bool, max_bytes: u64) -> Result<Self> {
        let bytes = Bytes::open(path, packed, max_bytes)?;
        let row = bytes.row();
        Ok(Self { reader: BufReader::new(bytes), row, number: 0, buffer: Vec::new() })
    }

    pub fn next(&mut self) -> Result<Option<(u64, &str)>> {
        self.buffer.clear();
        self.row.store(0, Ordering::Relaxed);
        let most = MAX_ROW_BYTES as u64 + 1;
        let read = (&mut self.reader).take(most).read_until(b'\n', &mut self.buffer);
        if read.map_err(failed)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        if self.buffer.len() > MAX_ROW_BYTES {
            return Err(long_row("line", self.number));
        }
        let line = std::str::from_utf8(&self.buffer).map_err(|error| {
            let byte = error.valid_up_to() + 1;
            malformed(
                "line",
                self.number,
                format!("byte {byte} is not utf-8; convert the file to utf-8"),
            )
        })?;
        let line = line.strip_suffix('\n').unwrap_or(line);
        let line = line.strip_suffix('\r').unwrap_or(line);
        let line = if self.number == 1 { line.trim_start_matches('\u{FEFF}') } else { line };
        Ok(Some((self.number, line)))
    }
}
