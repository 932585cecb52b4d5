//! Write-once objects under their SHA-256 digests.
//!
//! A local object lies at `objects/ab/cdef...`, written to `objects/staging/` first, synced, then
//! renamed. The database knows every object before its bytes are in place (see `leases` in the
//! migrations), so that an object can be collected safely while another writer hands in the same one.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Location;
use object_store::{ObjectStore, ObjectStoreExt};
use sha2::{Digest, Sha256};
use sqlx::{Row, Sqlite, Transaction};
use tempfile::{NamedTempFile, TempPath};

use super::sql::Sql;
use super::{blocking, now_ms};
use crate::error::{Error, Reason, Result};

/// How long an object is kept that was handed in and then not referred to.
const LEASE_MS: i64 = 24 * 60 * 60 * 1000;

const STAGING: &str = "staging";

/// A stored object.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Object {
    /** `sha256:` and 64 hex digits. */
    pub digest: String,
    pub size: u64,
}

/// Content-addressed objects in a folder or bucket; cheap to clone.
#[derive(Clone)]
pub struct Objects {
    inner: Arc<dyn ObjectStore>,
    /// Set when `inner` is a folder of this machine: then objects are moved in and read in place.
    local: Option<LocalFileSystem>,
    /// Temporary files (and, for a remote store, copies of its objects).
    staging: PathBuf,
    sql: Sql,
}

impl Objects {
    /// Objects in a local folder.
    pub(super) fn local(folder: LocalFileSystem, sql: Sql) -> Result<Self> {
        let staging = folder.path_to_filesystem(&Location::from(STAGING))?;
        Self::new(Arc::new(folder.clone()), Some(folder), staging, sql)
    }

    /// Objects in any other store, with `staging` a local folder for temporary files.
    #[cfg(test)]
    pub(super) fn remote(inner: Arc<dyn ObjectStore>, staging: PathBuf, sql: Sql) -> Result<Self> {
        Self::new(inner, None, staging, sql)
    }

    fn new(
        inner: Arc<dyn ObjectStore>,
        local: Option<LocalFileSystem>,
        staging: PathBuf,
        sql: Sql,
    ) -> Result<Self> {
        // What lies here belongs to a process that is dead.
        match std::fs::remove_dir_all(&staging) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => std::fs::create_dir_all(&staging)?,
        }
        Ok(Self { inner, local, staging, sql })
    }

    /// Stores a file (moved when it lies on the same disk, else copied). It is hashed, unless the caller
    /// did that already.
    pub async fn put_file(&self, path: &Path, hashed: Option<Object>) -> Result<Object> {
        let (path, staging) = (path.to_owned(), self.staging.clone());
        let (object, staged) = blocking(move || {
            let staged = NamedTempFile::new_in(staging)?.into_temp_path();
            if std::fs::rename(&path, &staged).is_err() {
                std::fs::copy(&path, &staged)?;
            }
            let object = hashed.map_or_else(|| hash_file(&staged), Ok)?;
            Ok((object, staged))
        })
        .await?;
        self.admit(&object, staged).await?;
        Ok(object)
    }

    /// A local path with the object's content: the object itself in a local store, a cached copy of a
    /// remote one. Missing objects or wrong sizes are STORE_CORRUPT.
    pub async fn local_path(&self, digest: &str) -> Result<PathBuf> {
        let object = self.row(digest).await?.ok_or_else(|| corrupt(digest, "is not stored"))?;
        let location = location(digest)?;
        if self.stored_size(&location).await? != Some(object.size) {
            return Err(corrupt(digest, "is missing or has another size than it was stored with"));
        }
        if let Some(local) = &self.local {
            return Ok(local.path_to_filesystem(&location)?);
        }
        let cached = self.staging.join(digest.replace(':', "-"));
        if std::fs::metadata(&cached).is_ok_and(|m| m.len() == object.size) {
            return Ok(cached);
        }
        let mut upload = self.upload(object.size).await?;
        let mut chunks = self.inner.get(&location).await?.into_stream();
        while let Some(chunk) = chunks.try_next().await? {
            upload.write(&chunk).await?;
        }
        let (fetched, staged) = upload.close(None, None).await?;
        if fetched != object {
            return Err(corrupt(digest, "does not have the content it was stored with"));
        }
        let target = cached.clone();
        blocking(move || Ok(staged.persist(target).map_err(|e| e.error)?)).await?;
        Ok(cached)
    }

    /// The stored object with this digest, if there is one.
    pub async fn find(&self, digest: &str) -> Result<Option<Object>> {
        let Ok(location) = location(digest) else { return Ok(None) };
        let Some(object) = self.row(digest).await? else { return Ok(None) };
        let there = self.stored_size(&location).await? == Some(object.size);
        Ok(there.then_some(object))
    }

    /// Starts an upload: chunks are written to a temporary file and hashed as they come. At most
    /// `max_bytes` may be written. A finished object that nothing refers to is kept for a day.
    pub async fn upload(&self, max_bytes: u64) -> Result<Upload> {
        let staging = self.staging.clone();
        let file = blocking(move || Ok(NamedTempFile::new_in(staging)?)).await?;
        let state = Partial { file, hash: Sha256::new(), size: 0 };
        Ok(Upload { objects: self.clone(), max_bytes, state: Some(Box::new(state)) })
    }

    /// Deletes the objects that nothing refers to and nobody holds; returns the bytes set free.
    pub async fn collect(&self) -> Result<u64> {
        let mut tx = self.sql.write().await?;
        sqlx::query("DELETE FROM leases WHERE expires_ms <= ?")
            .bind(now_ms())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        let digests: Vec<String> = sqlx::query_scalar("SELECT digest FROM unused_objects")
            .fetch_all(&self.sql.reader)
            .await?;
        let mut freed = 0;
        for digest in digests {
            freed += self.collect_one(&digest).await?;
        }
        Ok(freed)
    }

    /// Gives up one claim to an object that was handed in and is not needed after all.
    pub(super) async fn release(&self, object: &Object) -> Result<()> {
        let mut tx = self.sql.write().await?;
        consume_lease(&mut tx, &object.digest).await?;
        tx.commit().await?;
        self.collect_one(&object.digest).await.map(|_| ())
    }

    /// Whether the folder for new objects is writable.
    pub(super) async fn ping(&self) -> Result<()> {
        let staging = self.staging.clone();
        blocking(move || Ok(NamedTempFile::new_in(staging)?)).await.map(|_| ())
    }

    /// The row goes and the bytes go while the write lock is held: a writer of the same object comes
    /// either before (its lease keeps the object) or after (it finds no bytes and brings its own).
    async fn collect_one(&self, digest: &str) -> Result<u64> {
        let mut tx = self.sql.write().await?;
        let size: Option<i64> = sqlx::query_scalar(
            "DELETE FROM objects WHERE digest = ?1 AND digest IN unused_objects AND NOT EXISTS \
             (SELECT 1 FROM leases WHERE digest = ?1 AND expires_ms > ?2) RETURNING size",
        )
        .bind(digest)
        .bind(now_ms())
        .fetch_optional(&mut *tx)
        .await?;
        let Some(size) = size else { return Ok(0) };
        match self.inner.delete(&location(digest)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        tx.commit().await?;
        Ok(size.unsigned_abs())
    }

    /// Makes a staged file visible under its digest, and holds it for the caller.
    async fn admit(&self, object: &Object, staged: TempPath) -> Result<()> {
        let size = i64::try_from(object.size)
            .map_err(|_| Error::new(Reason::TooLarge, "the object has more than 2^63 bytes"))?;
        let mut tx = self.sql.write().await?;
        sqlx::query("INSERT INTO objects (digest, size) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(&object.digest)
            .bind(size)
            .execute(&mut *tx)
            .await?;
        sqlx::query("INSERT INTO leases (digest, expires_ms) VALUES (?, ?)")
            .bind(&object.digest)
            .bind(now_ms().saturating_add(LEASE_MS))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;

        let location = location(&object.digest)?;
        if self.stored_size(&location).await? == Some(object.size) {
            return Ok(());
        }
        let file = blocking(move || {
            let file = File::open(&staged)?;
            file.sync_all()?;
            Ok((file, staged))
        });
        let (file, staged) = file.await?;
        if self.local.is_some() {
            let name = staged.file_name().and_then(|n| n.to_str());
            let name = name.ok_or_else(|| Error::internal("a staged file has no name"))?;
            self.inner.rename(&Location::from_iter([STAGING, name]), &location).await?;
        } else {
            let mut writer = object_store::buffered::BufWriter::new(self.inner.clone(), location);
            let mut file = tokio::fs::File::from_std(file);
            tokio::io::copy(&mut file, &mut writer).await?;
            tokio::io::AsyncWriteExt::shutdown(&mut writer).await?;
        }
        Ok(())
    }

    async fn row(&self, digest: &str) -> Result<Option<Object>> {
        let row = sqlx::query("SELECT size FROM objects WHERE digest = ?")
            .bind(digest)
            .fetch_optional(&self.sql.reader)
            .await?;
        row.map(|row| {
            let size: i64 = row.try_get("size")?;
            Ok(Object { digest: digest.to_owned(), size: size.unsigned_abs() })
        })
        .transpose()
    }

    async fn stored_size(&self, location: &Location) -> Result<Option<u64>> {
        match self.inner.head(location).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Takes away one lease of an object, in the transaction that makes the reference.
pub(super) async fn consume_lease(tx: &mut Transaction<'_, Sqlite>, digest: &str) -> Result<()> {
    // All leases run equally long, so the oldest is the one to miss least.
    sqlx::query("DELETE FROM leases WHERE id = (SELECT min(id) FROM leases WHERE digest = ?)")
        .bind(digest)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// An upload in progress; dropped unfinished, it leaves nothing.
pub struct Upload {
    objects: Objects,
    max_bytes: u64,
    /// Absent only while a chunk is being written: a caller that goes away then drops it there.
    state: Option<Box<Partial>>,
}

struct Partial {
    file: NamedTempFile,
    hash: Sha256,
    size: u64,
}

impl Upload {
    /// Takes the next bytes; TOO_LARGE beyond the limit.
    pub async fn write(&mut self, chunk: &[u8]) -> Result<()> {
        let mut state = self.take()?;
        if state.size.saturating_add(chunk.len() as u64) > self.max_bytes {
            return Err(Error::new(
                Reason::TooLarge,
                format!(
                    "the upload has more than {} bytes; send less or raise the limit",
                    self.max_bytes
                ),
            ));
        }
        let chunk = chunk.to_vec();
        let state = blocking(move || {
            state.file.write_all(&chunk)?;
            state.hash.update(&chunk);
            state.size += chunk.len() as u64;
            Ok(state)
        });
        self.state = Some(state.await?);
        Ok(())
    }

    /// Checks size and digest (where given) and makes the object visible.
    pub async fn finish(mut self, size: Option<u64>, digest: Option<&str>) -> Result<Object> {
        let (object, staged) = self.close(size, digest).await?;
        self.objects.admit(&object, staged).await?;
        Ok(object)
    }

    async fn close(
        &mut self,
        size: Option<u64>,
        digest: Option<&str>,
    ) -> Result<(Object, TempPath)> {
        let state = self.take()?;
        let object = Object { digest: digest_text(state.hash), size: state.size };
        let mismatch = |what: &str, sent: &str, declared: &str| {
            Err(Error::new(
                Reason::DigestMismatch,
                format!(
                    "the upload has the {what} {sent}, not {declared} as declared; send it again"
                ),
            ))
        };
        if let Some(size) = size.filter(|size| *size != object.size) {
            return mismatch("size", &object.size.to_string(), &size.to_string());
        }
        if let Some(digest) = digest.filter(|digest| *digest != object.digest) {
            // The declared text is the client's; a digest of the right form is short.
            check_digest(digest)?;
            return mismatch("digest", &object.digest, digest);
        }
        Ok((object, state.file.into_temp_path()))
    }

    fn take(&mut self) -> Result<Box<Partial>> {
        self.state.take().ok_or_else(|| {
            Error::new(Reason::Io, "the upload failed before; start it again from the beginning")
        })
    }
}

/// Checks the form `sha256:` and 64 lower-case hex digits.
pub fn check_digest(digest: &str) -> Result<()> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(());
    }
    Err(Error::field("digest", "must be 'sha256:' and 64 lower-case hex digits"))
}

pub(super) fn digest_text(hash: Sha256) -> String {
    use std::fmt::Write as _;
    hash.finalize().iter().fold("sha256:".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(super) fn hash_file(path: &Path) -> Result<Object> {
    let mut file = File::open(path)?;
    let (mut hash, mut size, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Object { digest: digest_text(hash), size }),
            n => {
                hash.update(&buffer[..n]);
                size += n as u64;
            }
        }
    }
}

/// `ab/cdef...` for `sha256:abcdef...`.
fn location(digest: &str) -> Result<Location> {
    check_digest(digest)?;
    let hex = &digest["sha256:".len()..];
    Ok(Location::from_iter([&hex[..2], &hex[2..]]))
}

fn corrupt(digest: &str, what: &str) -> Error {
    Error::new(
        Reason::StoreCorrupt,
        format!(
            "object {} {what}; restore it from a backup or import again",
            digest.escape_debug()
        ),
    )
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        Self::new(Reason::Io, format!("the object store failed: {error}; check it and the log"))
            .with_source(error)
    }
}
