//! Where models come from: `pypi:package`, `hf:owner/name`, or a local path.

use std::path::PathBuf;

use crate::error::Result;

/// A source of a model: `pypi:package`, `hf:owner/name`, or a local path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Pypi(Vec<String>),
    Hub(String),
    Path(PathBuf),
}

impl Source {
    /// Parses a source string.
    pub fn parse(_text: &str) -> Result<Self> {
        todo!()
    }
    /// Brings the files into `folder` (nothing to do for paths) and says what to open. `progress` gets
    /// a line of text now and then; `cancelled` is polled.
    pub fn fetch(
        &self,
        _folder: &std::path::Path,
        _progress: &dyn Fn(&str),
        _cancelled: &dyn Fn() -> bool,
    ) -> Result<PathBuf> {
        todo!()
    }
}
