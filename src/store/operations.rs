//! Rows of operations and their events.

use super::Store;
use crate::error::Result;

/// Kinds of work; `request` holds the encoded request message of the RPC that asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Import,
    Recipe,
    Evaluate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
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
}

/// An operation's row.
#[derive(Debug, Clone)]
pub struct Operation {
    pub id: String,
    pub kind: Kind,
    pub state: State,
    pub target: String,
    pub request: Vec<u8>,
    pub progress: f64,
    pub message: String,
    pub created_ms: i64,
    pub started_ms: Option<i64>,
    pub ended_ms: Option<i64>,
    pub attempt: i32,
    /** Versions finished so far. */
    pub versions: Vec<String>,
    pub sequence: i64,
    /** Encoded result message (ModelVersion, RecipeReport, EvaluationReport). */
    pub response: Option<Vec<u8>>,
    /** Reason name, message, violations (field, description). */
    pub error: Option<StoredError>,
    pub cancel_requested: bool,
}

#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct StoredError {
    pub reason: String,
    pub message: String,
    pub violations: Vec<(String, String)>,
}

#[derive(Debug, Clone)]
pub struct EventRow {
    pub sequence: i64,
    pub time_ms: i64,
    pub progress: f64,
    pub message: String,
}

impl Store {
    pub async fn operation(&self, _id: &str) -> Result<Operation> {
        todo!()
    }
    /// Newest first, `before` a (created_ms, id) position, at most `limit`; `done` filters.
    pub async fn operations(
        &self,
        _before: Option<(i64, &str)>,
        _limit: usize,
        _done: Option<bool>,
    ) -> Result<Vec<Operation>> {
        todo!()
    }
    /// Forgets a finished operation.
    pub async fn delete_operation(&self, _id: &str) -> Result<()> {
        todo!()
    }
    pub async fn events(&self, _id: &str, _after: i64) -> Result<Vec<EventRow>> {
        todo!()
    }
}
