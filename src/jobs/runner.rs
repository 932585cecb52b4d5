//! The threads that do the work: claim, run, write, resume.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::work::Job;
use super::{Run, Shared};
use crate::error::{Error, Reason, Result};
use crate::progress::{Metrics, Progress};
use crate::store::operations::{End, Kind, Operation};

/// Progress is written at most this often.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// Pause before the database is asked again after it failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Times the end of a run is tried to be written.
const END_TRIES: usize = 5;

const STACK_BYTES: usize = 8 << 20;

/// Starts a thread. It is an operating system's thread since the work keeps a processor busy for
/// hours; the database is reached through the runtime it is started on.
pub fn spawn(number: usize, shared: Arc<Shared>) -> Result<()> {
    let handle = Handle::current();
    shared.alive.send_modify(|threads| *threads += 1);
    let alive = Alive(shared.clone());
    std::thread::Builder::new()
        .name(format!("planish-job-{number}"))
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let _alive = alive;
            while !shared.stopping() {
                match handle.block_on(shared.store.claim()) {
                    Ok(Some(operation)) => perform(&shared, &handle, &operation),
                    // No polling: only this process writes to its queue.
                    Ok(None) => handle.block_on(async {
                        let mut stopping = shared.stopping.subscribe();
                        tokio::select! {
                            () = shared.wake.notified() => {}
                            _ = stopping.wait_for(|stopping| *stopping) => {}
                        }
                    }),
                    Err(error) => {
                        tracing::error!(%error, "no operation could be claimed");
                        std::thread::sleep(RETRY_INTERVAL);
                    }
                }
            }
        })?;
    Ok(())
}

struct Alive(Arc<Shared>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.alive.send_modify(|threads| *threads -= 1);
    }
}

/// Runs a claimed operation to its end, whatever happens in it.
fn perform(shared: &Arc<Shared>, handle: &Handle, operation: &Operation) {
    let span = tracing::info_span!("job", operation = operation.id, kind = operation.kind.name());
    let _entered = span.enter();
    tracing::info!(attempt = operation.attempt, target_resource = operation.target, "started");
    shared.changed(&operation.id);
    let interrupt = Arc::new(AtomicBool::new(false));
    let run = Run { attempt: operation.attempt, interrupt: interrupt.clone() };
    shared.running.with(|running| running.insert(operation.id.clone(), run));
    // A stop or a cancellation that came before the line above found nobody to tell.
    if shared.stopping() || cancel_requested(shared, handle, operation) {
        interrupt.store(true, Ordering::Relaxed);
    }

    let (sink, latest) = watch::channel(Latest {
        done: operation.progress,
        message: operation.message.clone(),
        metrics: Metrics::new(),
    });
    // Numbers that no event has shown yet.
    let unseen = Arc::new(Mutex::new(Metrics::new()));
    let writer = handle.spawn(write_progress(
        shared.clone(),
        operation.id.clone(),
        operation.attempt,
        (latest, unseen.clone()),
        interrupt.clone(),
    ));
    let sink = Arc::new(sink);
    let (numbers, measured, said) = (sink.clone(), unseen.clone(), sink.clone());
    let sink = Arc::new(move |done: f64, message: &str| {
        sink.send_modify(|latest| {
            latest.done = done;
            if latest.message != message {
                message.clone_into(&mut latest.message);
            }
        });
    });
    // They are written with the message that follows.
    let numbers = Arc::new(move |metrics: &Metrics| {
        numbers.send_if_modified(|latest| {
            latest.metrics.clone_from(metrics);
            false
        });
        if !metrics.is_empty() {
            lock(&measured).clone_from(metrics);
        }
    });
    let progress = Progress::new(sink, interrupt.clone()).with_metrics(numbers);
    let result = catch_unwind(AssertUnwindSafe(|| {
        progress.check()?;
        let scratch = Scratch::new(shared.scratch.join(&operation.id))?;
        shared.work.run(&Job {
            store: &shared.store,
            handle,
            operation,
            progress,
            scratch: scratch.path(),
            kept: shared.kept.join(&operation.id),
        })
    }));
    writer.abort();
    // What was measured since the last event would be lost, and of short work all of it.
    let unseen = std::mem::take(&mut *lock(&unseen));
    if !unseen.is_empty() {
        let Latest { done, message, .. } = said.borrow().clone();
        let (id, attempt) = (&operation.id, operation.attempt);
        let written = shared.store.report_progress(id, attempt, done, &message, &unseen);
        if let Err(error) = handle.block_on(written) {
            tracing::warn!(%error, "progress was not written");
        }
    }
    let result = result.unwrap_or_else(|panic| Err(panicked(panic.as_ref())));
    let end = match result {
        Ok(response) => End::Succeeded(response),
        // Whatever work says when it is interrupted, it is the interruption that counts.
        Err(error) if interrupt.load(Ordering::Relaxed) => {
            if cancel_requested(shared, handle, operation) {
                End::Cancelled((&cancelled(shared, handle, operation)).into())
            } else {
                tracing::info!(%error, "interrupted");
                End::Interrupted
            }
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, reason = error.reason().name(), cause, "failed");
            End::Failed((&error).into())
        }
    };
    if !matches!(end, End::Interrupted) {
        remove(&shared.kept.join(&operation.id));
    }
    write_end(shared, handle, operation, &end);
    shared.running.with(|running| running.remove(&operation.id));
    shared.changed(&operation.id);
}

/// Numbers are whole at any time, so a thread that panicked left nothing half done.
fn lock(metrics: &Mutex<Metrics>) -> MutexGuard<'_, Metrics> {
    metrics.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a job last said.
#[derive(Clone)]
struct Latest {
    done: f64,
    message: String,
    metrics: Metrics,
}

async fn write_progress(
    shared: Arc<Shared>,
    id: String,
    attempt: i32,
    (mut latest, unseen): (watch::Receiver<Latest>, Arc<Mutex<Metrics>>),
    interrupt: Arc<AtomicBool>,
) {
    while latest.changed().await.is_ok() {
        let Latest { done, message, mut metrics } = latest.borrow_and_update().clone();
        let unseen = std::mem::take(&mut *lock(&unseen));
        if metrics.is_empty() {
            metrics = unseen;
        }
        match shared.store.report_progress(&id, attempt, done, &message, &metrics).await {
            Ok(stop) => {
                interrupt.fetch_or(stop, Ordering::Relaxed);
            }
            Err(error) => tracing::warn!(%error, operation = id, "progress was not written"),
        }
        shared.changed(&id);
        tokio::time::sleep(WRITE_INTERVAL).await;
    }
}

/// An end that is not written keeps the operation running in the eyes of the world until the next
/// start, so a passing failure of the database must not decide it.
fn write_end(shared: &Shared, handle: &Handle, operation: &Operation, end: &End) {
    for _ in 0..END_TRIES {
        let written = shared.store.end(&operation.id, operation.attempt, end);
        match handle.block_on(written) {
            Ok(()) => return tracing::info!("ended"),
            Err(error) => tracing::error!(%error, "the end was not written"),
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
}

fn cancel_requested(shared: &Shared, handle: &Handle, operation: &Operation) -> bool {
    let row = handle.block_on(shared.store.operation(&operation.id));
    row.is_ok_and(|row| row.cancel_requested)
}

/// Says what stays: the versions of finished steps are finished.
fn cancelled(shared: &Shared, handle: &Handle, operation: &Operation) -> Error {
    match handle.block_on(shared.store.operation(&operation.id)) {
        Ok(row) if matches!(row.kind, Kind::Compare | Kind::Claim) => Error::new(
            Reason::Cancelled,
            "cancelled; the runs that were finished stay and can be read as the comparison's report",
        ),
        Ok(row) if !row.versions.is_empty() => Error::new(
            Reason::Cancelled,
            format!("cancelled; of the steps that were finished stay {}", row.versions.join(", ")),
        ),
        _ => Error::cancelled(),
    }
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    let text = text.unwrap_or_else(|| "no message".to_owned());
    Error::internal(format!("the job met a defect of the program: {text}; please report it"))
}

/// A folder that lives as long as the run.
struct Scratch(PathBuf);

impl Scratch {
    fn new(path: PathBuf) -> Result<Self> {
        let scratch = Self(path);
        scratch.remove();
        std::fs::create_dir_all(&scratch.0)?;
        Ok(scratch)
    }

    fn path(&self) -> &Path {
        &self.0
    }

    fn remove(&self) {
        remove(&self.0);
    }
}

/// Removes a folder, if it is there.
fn remove(folder: &Path) {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "temporary files were not removed");
        }
        _ => {}
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remove();
    }
}
