//! Write-once objects under their SHA-256 digests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;

/// A stored object.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Object {
    /** `sha256:` and 64 hex digits. */
    pub digest: String,
    pub size: u64,
}

/// Content-addressed objects in a folder or bucket.
pub struct Objects {
    inner: Arc<dyn object_store::ObjectStore>,
}

impl Objects {
    /// Stores a file (moved when it lies on the same disk, else copied), after hashing it.
    pub async fn put_file(&self, _path: &Path) -> Result<Object> {
        let _ = &self.inner;
        todo!()
    }
    /// A local path with the object's content: the object itself in a local store, a cached copy of a
    /// remote one. Missing objects or wrong sizes are STORE_CORRUPT.
    pub async fn local_path(&self, _digest: &str) -> Result<PathBuf> {
        todo!()
    }
    /// Starts an upload: chunks are written to a temporary file and hashed as they come.
    pub async fn upload(&self, _max_bytes: u64) -> Result<Upload> {
        todo!()
    }
}

/// An upload in progress; dropped unfinished, it leaves nothing.
pub struct Upload {}

impl Upload {
    pub async fn write(&mut self, _chunk: &[u8]) -> Result<()> {
        todo!()
    }
    /// Checks size and digest (where given) and makes the object visible.
    pub async fn finish(self, _size: Option<u64>, _digest: Option<&str>) -> Result<Object> {
        todo!()
    }
}
