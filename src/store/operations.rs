//! Rows of operations and their events.
//!
//! Every change of a row counts its `sequence` up and leaves an event. Writes of a runner carry the
//! attempt they belong to, so that a run that was given up cannot disturb the one that replaced it.

use std::collections::BTreeMap;

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, Transaction};

use super::datasets::request_id_reused;
use super::models::page;
use super::sql::json;
use super::{Store, now_ms};
use crate::error::{Error, Reason, Result, Violation};
use crate::progress::Metrics;

/// Events kept of an operation; older ones go.
const MAX_EVENTS: i64 = 1000;

/// Runs of an operation that may end with the process before it counts as the cause.
const MAX_CRASHES: i64 = 5;

/// Kinds of work; `request` holds the encoded request message of the RPC that asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Import,
    Create,
    Recipe,
    Evaluate,
    Compare,
    Claim,
    Adapt,
    Merge,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Import,
        Self::Create,
        Self::Recipe,
        Self::Evaluate,
        Self::Compare,
        Self::Claim,
        Self::Adapt,
        Self::Merge,
    ];

    /// Name in the database and in `OperationMetadata`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Import => "import",
            Self::Create => "create",
            Self::Recipe => "recipe",
            Self::Evaluate => "evaluate",
            Self::Compare => "compare",
            Self::Claim => "claim",
            Self::Adapt => "adapt",
            Self::Merge => "merge",
        }
    }

    /// Type URL of the response message.
    pub fn response_type(self) -> &'static str {
        match self {
            Self::Import | Self::Create => "type.googleapis.com/planish.v1.ModelVersion",
            Self::Recipe => "type.googleapis.com/planish.v1.RecipeReport",
            Self::Evaluate => "type.googleapis.com/planish.v1.EvaluationReport",
            Self::Compare => "type.googleapis.com/planish.v1.ComparisonReport",
            Self::Claim => "type.googleapis.com/planish.v1.ClaimResult",
            Self::Adapt => "type.googleapis.com/planish.v1.AdaptReport",
            Self::Merge => "type.googleapis.com/planish.v1.MergeReport",
        }
    }

    fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| damaged("kind", name))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl State {
    /// Whether the operation has ended.
    pub fn done(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }

    /// Name in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    fn parse(name: &str) -> Result<Self> {
        let all = [Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled];
        all.into_iter().find(|state| state.name() == name).ok_or_else(|| damaged("state", name))
    }
}

/// A new row.
#[derive(Debug, Clone)]
pub struct NewOperation {
    pub kind: Kind,
    /** Resource it works on. */
    pub target: String,
    /** The prost-encoded request message, with names resolved to exact versions. */
    pub request: Vec<u8>,
    pub request_id: String,
    /// The encoded request as the client sent it, before names were resolved: `models/m` may stand
    /// for another version when the same request comes again.
    pub fingerprint: Vec<u8>,
}

/// An operation's row.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    pub id: String,
    pub kind: Kind,
    pub state: State,
    pub target: String,
    pub request: Vec<u8>,
    pub progress: f64,
    pub message: String,
    /** What it last measured. */
    pub metrics: Metrics,
    pub created_ms: i64,
    pub started_ms: Option<i64>,
    pub ended_ms: Option<i64>,
    pub attempt: i32,
    /** Versions finished so far. */
    pub versions: Vec<String>,
    pub sequence: i64,
    /** Encoded result message, of the kind's type. */
    pub response: Option<Vec<u8>>,
    /** Reason name, message, violations (field, description). */
    pub error: Option<StoredError>,
    pub cancel_requested: bool,
}

impl Operation {
    /// `operations/{operation}`.
    pub fn name(&self) -> String {
        format!("operations/{}", self.id)
    }

    fn read(row: &SqliteRow) -> Result<Self> {
        let error: Option<&str> = row.try_get("error")?;
        Ok(Self {
            id: row.try_get("id")?,
            kind: Kind::parse(row.try_get("kind")?)?,
            state: State::parse(row.try_get("state")?)?,
            target: row.try_get("target")?,
            request: row.try_get("request")?,
            progress: row.try_get("progress")?,
            message: row.try_get("message")?,
            metrics: json(row.try_get("metrics")?)?,
            created_ms: row.try_get("created_ms")?,
            started_ms: row.try_get("started_ms")?,
            ended_ms: row.try_get("ended_ms")?,
            attempt: row.try_get("attempt")?,
            versions: json(row.try_get("versions")?)?,
            sequence: row.try_get("sequence")?,
            response: row.try_get("response")?,
            error: error.map(json).transpose()?,
            cancel_requested: row.try_get("cancel_requested")?,
        })
    }
}

/// An [`Error`] as an operation's row keeps it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StoredError {
    pub reason: String,
    pub message: String,
    pub violations: Vec<(String, String)>,
}

impl From<&Error> for StoredError {
    fn from(error: &Error) -> Self {
        let pair = |v: &Violation| (v.field.clone(), v.description.clone());
        Self {
            reason: error.reason().name().to_owned(),
            message: error.message().to_owned(),
            violations: error.violations().iter().map(pair).collect(),
        }
    }
}

impl StoredError {
    /// The reason; INTERNAL where the row is from a version that knew others.
    pub fn reason(&self) -> Reason {
        let known = Reason::ALL.iter().find(|reason| reason.name() == self.reason);
        known.copied().unwrap_or(Reason::Internal)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct EventRow {
    pub sequence: i64,
    pub time_ms: i64,
    pub progress: f64,
    pub message: String,
    pub metrics: Metrics,
}

/// How a run ended.
#[derive(Debug)]
pub enum End {
    /// With the encoded result message.
    Succeeded(Vec<u8>),
    Failed(StoredError),
    Cancelled(StoredError),
    /// It was interrupted and is to be taken up again.
    Interrupted,
}

impl Store {
    /// An operation by id.
    pub async fn operation(&self, id: &str) -> Result<Operation> {
        let row = sqlx::query("SELECT * FROM operation_rows WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.sql.reader)
            .await?;
        Operation::read(&row.ok_or_else(|| no_operation(id))?)
    }

    /// The operation that a request id stands for: to be asked before names are resolved, since what
    /// the request names may be gone. REQUEST_ID_REUSED when it came with another request.
    pub async fn operation_by_request(
        &self,
        kind: Kind,
        request_id: &str,
        fingerprint: &[u8],
    ) -> Result<Option<Operation>> {
        find_request(&self.sql.reader, kind, request_id, fingerprint).await
    }

    /// Newest first, `before` a (created_ms, id) position, at most `limit`; `done` filters.
    pub async fn operations(
        &self,
        before: Option<(i64, &str)>,
        limit: usize,
        done: Option<bool>,
    ) -> Result<Vec<Operation>> {
        let rows = sqlx::query(
            "SELECT * FROM operation_rows WHERE (?1 IS NULL OR (created_ms, id) < (?1, ?2)) \
             AND (?3 IS NULL OR (state NOT IN ('queued', 'running')) = ?3) \
             ORDER BY created_ms DESC, id DESC LIMIT ?4",
        )
        .bind(before.map(|(ms, _)| ms))
        .bind(before.map(|(_, id)| id))
        .bind(done)
        .bind(page(limit))
        .fetch_all(&self.sql.reader)
        .await?;
        rows.iter().map(Operation::read).collect()
    }

    /// The newest evaluations of a version that succeeded, oldest first, at most `limit`.
    pub async fn evaluations(&self, version: &str, limit: usize) -> Result<Vec<Operation>> {
        let rows = sqlx::query(
            "SELECT * FROM operation_rows WHERE kind = 'evaluate' AND state = 'succeeded' \
             AND target = ? ORDER BY created_ms DESC, id DESC LIMIT ?",
        )
        .bind(version)
        .bind(page(limit))
        .fetch_all(&self.sql.reader)
        .await?;
        rows.iter().rev().map(Operation::read).collect()
    }

    /// Forgets a finished operation; its results stay.
    pub async fn delete_operation(&self, id: &str) -> Result<()> {
        let mut tx = self.sql.write().await?;
        let state: Option<String> = sqlx::query_scalar("SELECT state FROM operations WHERE id = ?")
            .bind(id)
            .fetch_optional(&mut *tx)
            .await?;
        let state = State::parse(&state.ok_or_else(|| no_operation(id))?)?;
        if !state.done() {
            return Err(Error::new(
                Reason::ResourceInUse,
                format!("operations/{id} is {}; cancel it or wait for its end", state.name()),
            ));
        }
        sqlx::query("DELETE FROM operations WHERE id = ?").bind(id).execute(&mut *tx).await?;
        Ok(tx.commit().await?)
    }

    /// Events with a sequence number above `after`, oldest first.
    pub async fn events(&self, id: &str, after: i64) -> Result<Vec<EventRow>> {
        let rows = sqlx::query(
            "SELECT * FROM operation_events WHERE operation = ? AND sequence > ? ORDER BY sequence",
        )
        .bind(id)
        .bind(after)
        .fetch_all(&self.sql.reader)
        .await?;
        let read = |row: &SqliteRow| {
            Ok(EventRow {
                sequence: row.try_get("sequence")?,
                time_ms: row.try_get("time_ms")?,
                progress: row.try_get("progress")?,
                message: row.try_get("message")?,
                metrics: json(row.try_get("metrics")?)?,
            })
        };
        rows.iter().map(read).collect()
    }

    /// Puts an operation into the queue, with the names and digests of all it `uses`; LIMIT_REACHED
    /// when `max_queued` wait.
    pub async fn enqueue(
        &self,
        new: &NewOperation,
        uses: &[String],
        max_queued: usize,
    ) -> Result<Operation> {
        let mut tx = self.sql.write().await?;
        let known = find_request(&mut *tx, new.kind, &new.request_id, &new.fingerprint).await?;
        if let Some(operation) = known {
            return Ok(operation);
        }
        let queued: i64 =
            sqlx::query_scalar("SELECT count(*) FROM operations WHERE state = 'queued'")
                .fetch_one(&mut *tx)
                .await?;
        if queued >= page(max_queued) {
            return Err(Error::new(
                Reason::LimitReached,
                format!("{queued} operations wait, as many as may; try again later"),
            ));
        }
        let id = uuid::Uuid::new_v4().simple().to_string();
        sqlx::query(
            "INSERT INTO operations (id, kind, state, target, request, request_id, fingerprint, \
             created_ms) VALUES (?, ?, 'queued', ?, ?, ?, ?, ?)",
        )
        .bind(&id)
        .bind(new.kind.name())
        .bind(&new.target)
        .bind(&new.request)
        .bind(&new.request_id)
        .bind(&new.fingerprint)
        .bind(now_ms())
        .execute(&mut *tx)
        .await?;
        for resource in uses {
            sqlx::query("INSERT INTO operation_uses VALUES (?, ?) ON CONFLICT DO NOTHING")
                .bind(&id)
                .bind(resource)
                .execute(&mut *tx)
                .await?;
        }
        let operation = record(&mut tx, &id, None, "waiting for a runner", &Metrics::new()).await?;
        tx.commit().await?;
        Ok(operation)
    }

    /// Takes the operation that has waited longest, if any; no two callers get the same.
    pub async fn claim(&self) -> Result<Option<Operation>> {
        let mut tx = self.sql.write().await?;
        let id: Option<String> = sqlx::query_scalar(
            "UPDATE operations SET state = 'running', attempt = attempt + 1, \
             started_ms = coalesce(started_ms, ?) WHERE id = (SELECT id FROM operations \
             WHERE state = 'queued' ORDER BY created_ms, rowid LIMIT 1) RETURNING id",
        )
        .bind(now_ms())
        .fetch_optional(&mut *tx)
        .await?;
        let Some(id) = id else { return Ok(None) };
        let operation = record(&mut tx, &id, None, "started", &Metrics::new()).await?;
        tx.commit().await?;
        Ok(Some(operation))
    }

    /// Writes the progress of a run. True when the run is to stop: somebody asked for it, or the
    /// operation is no longer this run's.
    pub async fn report_progress(
        &self,
        id: &str,
        attempt: i32,
        progress: f64,
        message: &str,
        metrics: &Metrics,
    ) -> Result<bool> {
        let mut tx = self.sql.write().await?;
        if !runs(&mut tx, id, attempt).await? {
            return Ok(true);
        }
        let operation = record(&mut tx, id, Some(progress), message, metrics).await?;
        tx.commit().await?;
        Ok(operation.cancel_requested)
    }

    /// Ends a run. Nothing happens when the operation is no longer this run's.
    pub async fn end(&self, id: &str, attempt: i32, end: &End) -> Result<()> {
        let mut tx = self.sql.write().await?;
        if !runs(&mut tx, id, attempt).await? {
            return Ok(());
        }
        let (state, response, error) = match end {
            End::Succeeded(response) => (State::Succeeded, Some(response.as_slice()), None),
            End::Failed(error) => (State::Failed, None, Some(error)),
            End::Cancelled(error) => (State::Cancelled, None, Some(error)),
            End::Interrupted => (State::Queued, None, None),
        };
        conclude(&mut tx, id, state, response, error).await?;
        Ok(tx.commit().await?)
    }

    /// Asks an operation to stop: a waiting one ends at once, a running one is to be told by the
    /// caller, one that has ended stays as it is. Returns the state afterwards.
    pub async fn request_cancel(&self, id: &str) -> Result<State> {
        let mut tx = self.sql.write().await?;
        let state: Option<String> = sqlx::query_scalar(
            "UPDATE operations SET cancel_requested = cancel_requested OR state = 'running' \
             WHERE id = ? RETURNING state",
        )
        .bind(id)
        .fetch_optional(&mut *tx)
        .await?;
        let mut state = State::parse(&state.ok_or_else(|| no_operation(id))?)?;
        if state == State::Queued {
            state = State::Cancelled;
            conclude(&mut tx, id, state, None, Some(&(&Error::cancelled()).into())).await?;
        }
        tx.commit().await?;
        Ok(state)
    }

    /// Puts what a dead process left running back into the queue; what was to be cancelled ends so,
    /// and what took the process down too often fails.
    pub async fn recover_operations(&self) -> Result<()> {
        let mut tx = self.sql.write().await?;
        let left = sqlx::query(
            "UPDATE operations SET crashes = crashes + 1 WHERE state = 'running' \
             RETURNING id, crashes, cancel_requested",
        )
        .fetch_all(&mut *tx)
        .await?;
        for row in left {
            let id: String = row.try_get("id")?;
            let crashes: i64 = row.try_get("crashes")?;
            let (state, error) = if row.try_get("cancel_requested")? {
                (State::Cancelled, Some(Error::cancelled()))
            } else if crashes >= MAX_CRASHES {
                let message = format!(
                    "the server ended {crashes} times while this ran, perhaps for lack of memory; \
                     try a smaller model or less calibration"
                );
                (State::Failed, Some(Error::internal(message)))
            } else {
                (State::Queued, None)
            };
            let error = error.as_ref().map(StoredError::from);
            conclude(&mut tx, &id, state, None, error.as_ref()).await?;
        }
        Ok(tx.commit().await?)
    }

    /// Keeps an intermediate result of an operation under `name`.
    pub async fn save_result(&self, id: &str, name: &str, value: &[u8]) -> Result<()> {
        let mut tx = self.sql.write().await?;
        sqlx::query("INSERT OR REPLACE INTO operation_results VALUES (?, ?, ?)")
            .bind(id)
            .bind(name)
            .bind(value)
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }

    /// All intermediate results of an operation, by name.
    pub async fn saved_results(&self, id: &str) -> Result<BTreeMap<String, Vec<u8>>> {
        let query = "SELECT name, value FROM operation_results WHERE operation = ?";
        let rows: Vec<(String, Vec<u8>)> =
            sqlx::query_as(query).bind(id).fetch_all(&self.sql.reader).await?;
        Ok(rows.into_iter().collect())
    }

    /// The intermediate result kept under `name`.
    pub async fn saved_result(&self, id: &str, name: &str) -> Result<Option<Vec<u8>>> {
        let query = "SELECT value FROM operation_results WHERE operation = ? AND name = ?";
        Ok(sqlx::query_scalar(query).bind(id).bind(name).fetch_optional(&self.sql.reader).await?)
    }
}

/// Whether the operation runs, and in this attempt.
async fn runs(tx: &mut Transaction<'_, Sqlite>, id: &str, attempt: i32) -> Result<bool> {
    let query = "SELECT 1 FROM operations WHERE id = ? AND state = 'running' AND attempt = ?";
    let found: Option<i64> =
        sqlx::query_scalar(query).bind(id).bind(attempt).fetch_optional(&mut **tx).await?;
    Ok(found.is_some())
}

/// Moves an operation to `state` and says so.
async fn conclude(
    tx: &mut Transaction<'_, Sqlite>,
    id: &str,
    state: State,
    response: Option<&[u8]>,
    error: Option<&StoredError>,
) -> Result<()> {
    let message = match (&error, state) {
        (Some(error), _) => error.message.clone(),
        (None, State::Succeeded) => "done".to_owned(),
        (None, _) => "interrupted; waiting for a runner".to_owned(),
    };
    sqlx::query(
        "UPDATE operations SET state = ?, response = ?, error = ?, ended_ms = ? WHERE id = ?",
    )
    .bind(state.name())
    .bind(response)
    .bind(error.map(|error| serde_json::json!(error).to_string()))
    .bind(state.done().then(now_ms))
    .bind(id)
    .execute(&mut **tx)
    .await?;
    if state == State::Succeeded {
        // The response holds what they were for.
        let query = "DELETE FROM operation_results WHERE operation = ?";
        sqlx::query(query).bind(id).execute(&mut **tx).await?;
    }
    let progress = (state == State::Succeeded).then_some(1.0);
    record(tx, id, progress, &message, &Metrics::new()).await.map(|_| ())
}

/// Writes progress (unchanged when absent), message and numbers with an event of their own.
async fn record(
    tx: &mut Transaction<'_, Sqlite>,
    id: &str,
    progress: Option<f64>,
    message: &str,
    metrics: &Metrics,
) -> Result<Operation> {
    // NaN would be stored as NULL.
    let progress = progress.map(|p| if p.is_finite() { p.clamp(0.0, 1.0) } else { 0.0 });
    let metrics = serde_json::json!(metrics).to_string();
    sqlx::query(
        "UPDATE operations SET progress = coalesce(?, progress), message = ?, metrics = ?, \
         sequence = sequence + 1 WHERE id = ?",
    )
    .bind(progress)
    .bind(message)
    .bind(&metrics)
    .bind(id)
    .execute(&mut **tx)
    .await?;
    let row = sqlx::query("SELECT * FROM operation_rows WHERE id = ?")
        .bind(id)
        .fetch_one(&mut **tx)
        .await?;
    let operation = Operation::read(&row)?;
    sqlx::query("INSERT INTO operation_events VALUES (?, ?, ?, ?, ?, ?)")
        .bind(id)
        .bind(operation.sequence)
        .bind(now_ms())
        .bind(operation.progress)
        .bind(message)
        .bind(&metrics)
        .execute(&mut **tx)
        .await?;
    sqlx::query("DELETE FROM operation_events WHERE operation = ? AND sequence <= ?")
        .bind(id)
        .bind(operation.sequence - MAX_EVENTS)
        .execute(&mut **tx)
        .await?;
    Ok(operation)
}

async fn find_request<'e>(
    executor: impl sqlx::Executor<'e, Database = Sqlite>,
    kind: Kind,
    request_id: &str,
    fingerprint: &[u8],
) -> Result<Option<Operation>> {
    if request_id.is_empty() {
        return Ok(None);
    }
    let query = "SELECT * FROM operation_rows WHERE kind = ? AND request_id = ?";
    let row =
        sqlx::query(query).bind(kind.name()).bind(request_id).fetch_optional(executor).await?;
    let Some(row) = row else { return Ok(None) };
    if row.try_get::<&[u8], _>("fingerprint")? != fingerprint {
        return Err(request_id_reused(request_id));
    }
    Operation::read(&row).map(Some)
}

fn no_operation(id: &str) -> Error {
    Error::not_found(&format!("operations/{id}"), "list the operations")
}

fn damaged(column: &str, value: &str) -> Error {
    Error::new(
        Reason::StoreCorrupt,
        format!(
            "an operation's row has the {column} '{value}'; was it written by a newer version?"
        ),
    )
}
