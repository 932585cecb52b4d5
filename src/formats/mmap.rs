//! Files as shared, read-only bytes.

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{Error, Reason, Result};

/// Maps a whole file into memory. The bytes live as long as any slice of them; pages are read when
/// they are touched, and the system may drop them again under pressure.
pub fn map(path: &Path) -> Result<Bytes> {
    let failed = |error: std::io::Error| Error::from(error).within(&path.display().to_string());
    let file = File::open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?;
    if !kind.is_file() {
        return Err(Error::new(
            Reason::UnsupportedFormat,
            format!("{} is not a regular file; name a model file", path.display()),
        ));
    }
    if kind.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the mapping is private and read-only, and is reached only as bytes, for which every bit
    // pattern is valid. What Rust cannot rule out is another process changing the file meanwhile: a
    // changed byte is a changed weight, a truncated file ends the process with SIGBUS. The store's
    // objects are write-once; importing a file that somebody is writing to is documented as an error.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
    Ok(Bytes::from_owner(map))
}
