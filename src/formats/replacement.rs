//! Files that appear whole or not at all.

use std::fs::File;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Reason, Result};

/// A new content for a path, written beside it and moved there at the end. A process that has mapped the
/// old file keeps what it mapped; dropped early, nothing stays.
pub struct Replacement {
    file: NamedTempFile,
    path: PathBuf,
}

impl Replacement {
    pub fn new(path: &Path) -> Result<Self> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        let file = tempfile::Builder::new()
            .prefix(".planish-")
            .suffix(".partial")
            .tempfile_in(folder.unwrap_or(Path::new(".")))?;
        Ok(Self { file, path: path.to_owned() })
    }

    pub fn as_file_mut(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    /// Moves the content to its path.
    pub fn commit(self) -> Result<()> {
        self.file.persist(&self.path).map(drop).map_err(|error| {
            let path = self.path.display();
            Error::new(
                Reason::Io,
                format!("{path} cannot be written: {}; check the folder", error.error),
            )
            .with_source(error.error)
        })
    }
}
