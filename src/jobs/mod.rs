//! The queue of long work: rows in SQL, a runner, progress, cancellation, resume.

pub mod progress;
mod runner;

use std::sync::Arc;

use crate::error::Result;
use crate::store::Store;
use crate::store::operations::{NewOperation, Operation};

/// Handle to the queue and its runner; cheap to clone.
#[derive(Clone)]
pub struct Jobs {}

/// Settings of the runner.
#[derive(Debug, Clone)]
pub struct Options {
    /// Runner threads (1 or 2).
    pub runners: usize,
    /// Waiting operations beyond which new ones are refused.
    pub max_queued: usize,
    /// Folder for temporary files.
    pub scratch: std::path::PathBuf,
}

impl Jobs {
    /// Starts the runner threads. Operations that a dead runner left behind go back into the queue.
    pub async fn start(_store: Arc<Store>, _options: Options) -> Result<Self> {
        todo!()
    }
    /// Writes the operation and wakes a runner. The same request id and request give the operation that
    /// exists; the same id with another request is refused (REQUEST_ID_REUSED).
    pub async fn submit(&self, _operation: NewOperation) -> Result<Operation> {
        todo!()
    }
    /// Asks an operation to stop. Queued ones end at once; running ones at their next poll.
    pub async fn cancel(&self, _id: &str) -> Result<()> {
        todo!()
    }
    /// A receiver that sees each change of the operation (a change counter; read the row for details).
    pub fn watch(&self, _id: &str) -> tokio::sync::watch::Receiver<u64> {
        todo!()
    }
    /// Stops taking work, cancels nothing finished: running steps are interrupted and will resume at
    /// the next start. Returns when the threads have ended or the deadline passed.
    pub async fn stop(&self, _deadline: std::time::Duration) {
        todo!()
    }
}
