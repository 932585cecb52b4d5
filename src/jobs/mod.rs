//! The queue of long work: rows in SQL, a runner, progress, cancellation, resume.
//!
//! An operation is a row first; everything else here may be lost at any moment. What a dead process
//! left running goes back into the queue at the next start and is taken up after its last finished
//! step.

mod adapt;
mod claim;
pub mod compare;
pub mod create;
pub mod evaluate;
mod import;
mod memory;
mod merge;
mod norms;
mod recipe;
mod runner;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tuning;
pub mod warnings;
mod work;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::error::{Error, Reason, Result};
use crate::store::Store;
use crate::store::operations::{End, NewOperation, Operation, State};

/// Handle to the queue and its runner; cheap to clone. When the last one goes, the threads end as
/// after [`Jobs::stop`], unwaited for.
#[derive(Clone)]
pub struct Jobs {
    shared: Arc<Shared>,
    _stop: Arc<StopOnDrop>,
}

/// Settings of the runner.
#[derive(Debug, Clone)]
pub struct Options {
    /// Runner threads (1 or 2).
    pub runners: usize,
    /// Waiting operations beyond which new ones are refused.
    pub max_queued: usize,
    /// Folder for temporary files; the runner keeps to a folder of its own in it.
    pub scratch: PathBuf,
}

/// Uploads that nobody came for are looked for this often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// What the handles and the threads have in common.
struct Shared {
    store: Arc<Store>,
    work: Box<dyn work::Work>,
    max_queued: usize,
    scratch: PathBuf,
    /// Holds a folder for each operation that was interrupted and left something.
    kept: PathBuf,
    /// Tells a thread without work that there is some.
    wake: Notify,
    stopping: watch::Sender<bool>,
    /// Threads that have not ended.
    alive: watch::Sender<usize>,
    running: Locked<HashMap<String, Run>>,
    watchers: Locked<HashMap<String, watch::Sender<u64>>>,
}

/// An operation that a thread of this process works on.
#[derive(Clone)]
struct Run {
    attempt: i32,
    interrupt: Arc<AtomicBool>,
}

impl Jobs {
    /// Starts the runner threads. Operations that a dead runner left behind go back into the queue.
    pub async fn start(store: Arc<Store>, options: Options) -> Result<Self> {
        Self::start_with(store, options, Box::new(work::Models)).await
    }

    async fn start_with(
        store: Arc<Store>,
        options: Options,
        work: Box<dyn work::Work>,
    ) -> Result<Self> {
        store.recover_operations().await?;
        let scratch = options.scratch.join("jobs");
        match std::fs::remove_dir_all(&scratch) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => std::fs::create_dir_all(&scratch)?,
        }
        let kept = options.scratch.join("kept");
        std::fs::create_dir_all(&kept)?;
        forget_ended(&store, &kept).await?;
        let shared = Arc::new(Shared {
            store,
            work,
            max_queued: options.max_queued,
            scratch,
            kept,
            wake: Notify::new(),
            stopping: watch::Sender::new(false),
            alive: watch::Sender::new(0),
            running: Locked::default(),
            watchers: Locked::default(),
        });
        let jobs = Self { _stop: Arc::new(StopOnDrop(shared.clone())), shared };
        for number in 0..options.runners.max(1) {
            runner::spawn(number, jobs.shared.clone())?;
        }
        tokio::spawn(sweep(jobs.shared.store.clone(), jobs.shared.stopping.subscribe()));
        Ok(jobs)
    }

    /// Writes the operation and wakes a runner. The same request id and request give the operation that
    /// exists; the same id with another request is refused (REQUEST_ID_REUSED), and everything new is
    /// when too many wait (LIMIT_REACHED).
    pub async fn submit(&self, operation: NewOperation) -> Result<Operation> {
        let uses = work::uses(&operation)?;
        let shared = &self.shared;
        let operation = shared.store.enqueue(&operation, &uses, shared.max_queued).await?;
        shared.wake.notify_one();
        Ok(operation)
    }

    /// Asks an operation to stop. Queued ones end at once; running ones at their next poll; ended ones
    /// stay as they are.
    pub async fn cancel(&self, id: &str) -> Result<()> {
        let state = self.shared.store.request_cancel(id).await?;
        if state == State::Running {
            self.shared.running.with(|running| {
                if let Some(run) = running.get(id) {
                    run.interrupt.store(true, Ordering::Relaxed);
                }
            });
        }
        self.shared.changed(id);
        Ok(())
    }

    /// A receiver that sees each change of the operation (a change counter; read the row for details).
    pub fn watch(&self, id: &str) -> watch::Receiver<u64> {
        self.shared.watchers.with(|watchers| {
            watchers.retain(|_, sender| sender.receiver_count() > 0);
            watchers.entry(id.to_owned()).or_insert_with(|| watch::Sender::new(0)).subscribe()
        })
    }

    /// Stops taking work, cancels nothing finished: running steps are interrupted and will resume at
    /// the next start. Returns when the threads have ended or the deadline passed.
    pub async fn stop(&self, deadline: Duration) {
        self.shared.stop();
        let mut alive = self.shared.alive.subscribe();
        let ended = alive.wait_for(|threads| *threads == 0);
        if tokio::time::timeout(deadline, ended).await.is_ok() {
            return;
        }
        // What did not hear in time will be cut off with the process. That is no crash of its making.
        for (id, run) in self.shared.running.with(|running| running.clone()) {
            tracing::warn!(
                operation = id,
                "still at work at the deadline; it will be taken up again"
            );
            if let Err(error) = self.shared.store.end(&id, run.attempt, &End::Interrupted).await {
                tracing::error!(%error, operation = id, "the interruption was not written");
            }
            self.shared.changed(&id);
        }
    }
}

/// Removes what operations left that will not go on: they ended while nobody could remove it.
async fn forget_ended(store: &Store, kept: &Path) -> Result<()> {
    for entry in std::fs::read_dir(kept)? {
        let entry = entry?;
        let id = entry.file_name().to_string_lossy().into_owned();
        let over = match store.operation(&id).await {
            Ok(operation) => operation.state.done(),
            Err(error) if error.reason() == Reason::ResourceNotFound => true,
            Err(error) => return Err(error),
        };
        if over {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

async fn sweep(store: Arc<Store>, mut stopping: watch::Receiver<bool>) {
    let stopped = stopping.wait_for(|stopping| *stopping);
    tokio::pin!(stopped);
    while tokio::time::timeout(SWEEP_INTERVAL, &mut stopped).await.is_err() {
        store.sweep().await;
    }
}

impl Shared {
    fn stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    fn stop(&self) {
        self.stopping.send_replace(true);
        self.running.with(|running| {
            running.values().for_each(|run| run.interrupt.store(true, Ordering::Relaxed));
        });
    }

    /// Tells the watchers of an operation that its row changed.
    fn changed(&self, id: &str) {
        self.watchers.with(|watchers| {
            if let Some(sender) = watchers.get(id) {
                sender.send_modify(|changes| *changes += 1);
            }
        });
    }
}

struct StopOnDrop(Arc<Shared>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A mutex held for one short closure; a panic in it leaves the value usable.
#[derive(Default)]
struct Locked<T>(std::sync::Mutex<T>);

impl<T> Locked<T> {
    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// A request that does not decode: it was checked before it was written.
fn damaged(error: prost::DecodeError) -> Error {
    Error::internal(format!("a stored message is damaged: {error}")).with_source(error)
}
