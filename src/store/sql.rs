//! The database: connections, transactions, and errors in our own terms.

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Sqlite, SqlitePool, Transaction};

use crate::error::{Error, Reason, Result};

/// Two pools on one database. SQLite has one writer at a time; queueing for its only connection is
/// fair and free, while colliding and retrying is neither.
#[derive(Clone)]
pub struct Sql {
    pub reader: SqlitePool,
    writer: SqlitePool,
}

impl Sql {
    /// Opens the database file and brings its tables up to date.
    pub async fn open(file: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // An operation that was answered must survive a power cut.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(30));
        let writer =
            SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
        sqlx::migrate!().run(&writer).await.map_err(|error| {
            Error::new(
                Reason::StoreCorrupt,
                format!("the database cannot be brought up to date: {error}; was it written by a newer version?"),
            )
            .with_source(error)
        })?;
        // A connection to a file does not break while nobody uses it: it is not tried before each use.
        let reader = SqlitePoolOptions::new()
            .max_connections(8)
            .test_before_acquire(false)
            .connect_with(options)
            .await?;
        Ok(Self { reader, writer })
    }

    /// Starts a transaction that writes; dropped without a commit, it leaves nothing. Must not be
    /// nested: there is one connection that writes.
    pub async fn write(&self) -> Result<Transaction<'static, Sqlite>> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let reason = match error {
            sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
                Reason::NotReady
            }
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => Reason::StoreCorrupt,
            _ => Reason::Io,
        };
        Self::new(reason, format!("the database failed: {error}; check the disk and the log"))
            .with_source(error)
    }
}

/// A JSON column.
pub fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| {
        Error::new(
            Reason::StoreCorrupt,
            format!("a stored row is damaged: {error}; restore a backup"),
        )
        .with_source(error)
    })
}
