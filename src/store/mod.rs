//! Models, data sets, operations and their lineage in SQL; content-addressed objects beside them.
//!
//! Rows never hold paths, only digests and names, so rows and objects may move to other engines.
//! Every change is one transaction; bytes are on disk before a row refers to them.

pub mod adapters;
pub mod datasets;
pub mod models;
pub mod names;
pub mod objects;
pub mod operations;
mod recent;
mod sql;

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use object_store::local::LocalFileSystem;

use crate::error::{Error, Reason, Result};

/// How long `open` waits for another process (one that is stopping, as a rule) to let go of the folder.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// The store: one database, one object store.
pub struct Store {
    pub objects: objects::Objects,
    sql: sql::Sql,
    recent: recent::Recent,
    /// Texts in use, so that the steps of a recipe share one copy.
    texts: Mutex<HashMap<String, Weak<String>>>,
    /// Held while the store is open: at its start a process takes over what a dead one left
    /// behind, which must not happen to one that lives.
    _lock: File,
}

impl Store {
    /// Opens (and migrates) the store in `folder`: `planish.db` and `objects/`. One process at a time;
    /// a second one gets NOT_READY. Unreferenced objects and stale temporary files are removed.
    pub async fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let lock = lock(folder).await?;
        let sql = sql::Sql::open(&folder.join("planish.db")).await?;
        let root = folder.join("objects");
        std::fs::create_dir_all(&root)?;
        let local = LocalFileSystem::new_with_prefix(&root)?.with_fsync(true);
        let objects = objects::Objects::local(local, sql.clone())?;
        objects.collect().await?;
        let recent = recent::Recent::default();
        Ok(Self { objects, sql, recent, texts: Mutex::default(), _lock: lock })
    }

    /// Whether the database answers and the object folder is writable.
    pub async fn ping(&self) -> Result<()> {
        sqlx::query("SELECT 1").execute(&self.sql.reader).await?;
        self.objects.ping().await
    }

    /// Collects what a deletion set free, and uploads that nobody came for. What fails now succeeds the
    /// next time; the deletion itself is done.
    pub async fn sweep(&self) {
        if let Err(error) = self.objects.collect().await {
            tracing::warn!(%error, "unused objects were not collected");
        }
    }
}

async fn lock(folder: &Path) -> Result<File> {
    let file = File::create(folder.join("planish.lock"))?;
    let start = tokio::time::Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_PATIENCE => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(
                    Reason::NotReady,
                    "another process uses this data folder; stop it or choose another folder",
                ));
            }
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {
                tracing::warn!(%error, "this file system has no locks; start one process only");
                return Ok(file);
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
    }
}

/// Milliseconds since 1970.
fn now_ms() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX)
}

/// A tag that no other state of any resource has.
fn new_etag() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

/// Refuses a stale etag; an absent or empty one guards nothing.
fn check_etag(name: &str, given: Option<&str>, current: &str) -> Result<()> {
    match given {
        Some(etag) if !etag.is_empty() && etag != current => Err(Error::new(
            Reason::EtagMismatch,
            format!("{name} changed since it was read; read it again and repeat the request"),
        )),
        _ => Ok(()),
    }
}

/// Runs blocking work off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => {
            Err(Error::internal("a storage task panicked; see the log").with_source(error))
        }
        Err(error) => {
            Err(Error::new(Reason::NotReady, "the server is stopping").with_source(error))
        }
    }
}

impl Store {
    /// The text kept under `key`, or the one that `load` makes, shared while anyone holds it.
    async fn shared_text<F>(&self, key: String, load: F) -> Result<Arc<String>>
    where
        F: Future<Output = Result<String>>,
    {
        let held = |texts: &Mutex<HashMap<String, Weak<String>>>| {
            let texts = texts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            texts.get(&key).and_then(Weak::upgrade)
        };
        if let Some(text) = held(&self.texts) {
            return Ok(text);
        }
        let text = Arc::new(load.await?);
        let mut texts = self.texts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        texts.retain(|_, text| text.strong_count() > 0);
        texts.insert(key, Arc::downgrade(&text));
        Ok(text)
    }
}

#[cfg(test)]
mod tests;
