//! The queue and its threads, with made-up work; see `recipe` for the real one.

use std::sync::atomic::AtomicUsize;

use prost::Message;

use super::work::{Job, Work};
use super::*;
use crate::proto::v1;
use crate::store::operations::Kind;

impl<F: Fn(&Job<'_>) -> Result<Vec<u8>> + Send + Sync> Work for F {
    fn run(&self, job: &Job<'_>) -> Result<Vec<u8>> {
        self(job)
    }
}

fn work(f: impl Fn(&Job<'_>) -> Result<Vec<u8>> + Send + Sync + 'static) -> Box<dyn Work> {
    Box::new(f)
}

/// Works until it is interrupted.
fn endless(job: &Job<'_>) -> Result<Vec<u8>> {
    loop {
        job.progress.report(0.5, "on and on")?;
        std::thread::sleep(Duration::from_millis(1));
    }
}

async fn start(folder: &Path, work: Box<dyn Work>) -> (Arc<Store>, Jobs) {
    let store = Arc::new(Store::open(folder).await.unwrap());
    let options = Options { runners: 2, max_queued: 4, scratch: folder.join("scratch") };
    let jobs = Jobs::start_with(store.clone(), options, work).await.unwrap();
    (store, jobs)
}

fn evaluate(request_id: &str) -> NewOperation {
    let request = v1::EvaluateRequest { model: "models/m/versions/1".into(), ..Default::default() };
    NewOperation {
        kind: Kind::Evaluate,
        target: request.model.clone(),
        request: request.encode_to_vec(),
        request_id: request_id.to_owned(),
        fingerprint: request.encode_to_vec(),
    }
}

/// The operation once `ready`, watched as the server does.
async fn wait_for(
    store: &Store,
    jobs: &Jobs,
    id: &str,
    ready: impl Fn(&Operation) -> bool,
) -> Operation {
    let mut changes = jobs.watch(id);
    let wait = async {
        loop {
            let operation = store.operation(id).await.unwrap();
            if ready(&operation) {
                return operation;
            }
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("nobody told the watcher")
}

async fn done(store: &Store, jobs: &Jobs, id: &str) -> Operation {
    wait_for(store, jobs, id, |operation| operation.state.done()).await
}

fn entries(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

#[tokio::test]
async fn work_is_done_and_answers() {
    let folder = tempfile::tempdir().unwrap();
    let left = folder.path().join("scratch/jobs/left-by-a-dead-process");
    std::fs::create_dir_all(&left).unwrap();
    let (store, jobs) = start(
        folder.path(),
        work(|job| {
            assert_eq!(job.request::<v1::EvaluateRequest>()?.model, job.operation.target);
            std::fs::write(job.scratch.join("file"), "x")?;
            job.progress.report(0.5, "half")?;
            Ok(b"answer".to_vec())
        }),
    )
    .await;
    assert!(!left.exists());
    let first = jobs.submit(evaluate("r")).await.unwrap();
    let ended = done(&store, &jobs, &first.id).await;
    assert_eq!((ended.state, ended.progress), (State::Succeeded, 1.0));
    assert_eq!(ended.response.as_deref(), Some(b"answer".as_slice()));
    assert_eq!(jobs.submit(evaluate("r")).await.unwrap().id, first.id);
    assert_eq!(entries(&folder.path().join("scratch/jobs")), 0);
    let other = NewOperation { fingerprint: b"other".to_vec(), ..evaluate("r") };
    assert_eq!(jobs.submit(other).await.unwrap_err().reason(), Reason::RequestIdReused);
}

#[tokio::test]
async fn failures_and_panics_are_told_and_the_threads_live_on() {
    let folder = tempfile::tempdir().unwrap();
    let count = AtomicUsize::new(0);
    let (store, jobs) = start(
        folder.path(),
        work(move |_| match count.fetch_add(1, Ordering::Relaxed) {
            0 => Err(Error::option("share", "2 is too much").within("recipe.steps[0].wanda")),
            1..5 => panic!("a defect"),
            _ => Ok(Vec::new()),
        }),
    )
    .await;
    let failed = jobs.submit(evaluate("")).await.unwrap();
    let failed = done(&store, &jobs, &failed.id).await;
    let error = failed.error.unwrap();
    assert_eq!((failed.state, error.reason()), (State::Failed, Reason::InvalidOption));
    assert_eq!(
        error.violations,
        [("recipe.steps[0].wanda.share".to_owned(), "2 is too much".to_owned())]
    );
    for _ in 1..5 {
        let operation = jobs.submit(evaluate("")).await.unwrap();
        let ended = done(&store, &jobs, &operation.id).await;
        let error = ended.error.unwrap();
        assert_eq!((ended.state, error.reason()), (State::Failed, Reason::Internal));
        assert!(error.message.contains("a defect"));
    }
    let operation = jobs.submit(evaluate("")).await.unwrap();
    assert_eq!(done(&store, &jobs, &operation.id).await.state, State::Succeeded);
}

#[tokio::test]
async fn cancelling_ends_what_waits_at_once_and_what_runs_soon() {
    let folder = tempfile::tempdir().unwrap();
    let (store, jobs) = start(folder.path(), work(endless)).await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        let id = jobs.submit(evaluate("")).await.unwrap().id;
        wait_for(&store, &jobs, &id, |operation| operation.message == "on and on").await;
        ids.push(id);
    }
    let waiting = jobs.submit(evaluate("")).await.unwrap().id;
    assert_eq!(store.operation(&waiting).await.unwrap().state, State::Queued);
    jobs.cancel(&waiting).await.unwrap();
    assert_eq!(store.operation(&waiting).await.unwrap().state, State::Cancelled);
    for id in ids {
        jobs.cancel(&id).await.unwrap();
        let ended = done(&store, &jobs, &id).await;
        assert_eq!(ended.state, State::Cancelled);
        assert_eq!(ended.error.unwrap().reason(), Reason::Cancelled);
        jobs.cancel(&id).await.unwrap();
    }
    assert_eq!(entries(&folder.path().join("scratch/jobs")), 0);
    assert_eq!(jobs.cancel("none").await.unwrap_err().reason(), Reason::ResourceNotFound);
}

#[tokio::test]
async fn what_waits_is_limited() {
    let folder = tempfile::tempdir().unwrap();
    let (store, jobs) = start(folder.path(), work(endless)).await;
    for _ in 0..2 {
        let id = jobs.submit(evaluate("")).await.unwrap().id;
        wait_for(&store, &jobs, &id, |operation| operation.state == State::Running).await;
    }
    for _ in 0..4 {
        jobs.submit(evaluate("")).await.unwrap();
    }
    assert_eq!(jobs.submit(evaluate("")).await.unwrap_err().reason(), Reason::LimitReached);
}

#[tokio::test]
async fn a_stop_interrupts_and_the_next_start_takes_up_again() {
    let folder = tempfile::tempdir().unwrap();
    let (store, jobs) = start(folder.path(), work(endless)).await;
    let id = jobs.submit(evaluate("")).await.unwrap().id;
    wait_for(&store, &jobs, &id, |operation| operation.message == "on and on").await;
    jobs.stop(Duration::from_secs(20)).await;
    let stopped = store.operation(&id).await.unwrap();
    assert_eq!((stopped.state, stopped.attempt), (State::Queued, 1));
    // Nothing is taken any more.
    let later = jobs.submit(evaluate("")).await.unwrap().id;
    drop((store, jobs));

    let (store, jobs) = start(folder.path(), work(|_| Ok(Vec::new()))).await;
    assert_eq!(done(&store, &jobs, &id).await.attempt, 2);
    assert_eq!(done(&store, &jobs, &later).await.attempt, 1);
}

#[tokio::test]
async fn work_that_hears_nothing_is_left_behind_and_cannot_spoil_its_successor() {
    let folder = tempfile::tempdir().unwrap();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let gone = std::sync::Mutex::new(gone);
    let deaf = work(move |_| {
        let _ = gone.lock().unwrap().recv();
        Ok(b"too late".to_vec())
    });
    let (store, jobs) = start(folder.path(), deaf).await;
    let id = jobs.submit(evaluate("")).await.unwrap().id;
    wait_for(&store, &jobs, &id, |operation| operation.state == State::Running).await;
    jobs.stop(Duration::from_millis(10)).await;
    assert_eq!(store.operation(&id).await.unwrap().state, State::Queued);
    go.send(()).unwrap();
    jobs.stop(Duration::from_secs(20)).await;
    let row = store.operation(&id).await.unwrap();
    assert_eq!((row.state, row.response), (State::Queued, None));
}

#[tokio::test]
async fn dropping_the_handle_ends_the_threads() {
    let folder = tempfile::tempdir().unwrap();
    let (store, jobs) = start(folder.path(), work(endless)).await;
    jobs.submit(evaluate("")).await.unwrap();
    let mut alive = jobs.shared.alive.subscribe();
    drop(jobs);
    tokio::time::timeout(Duration::from_secs(20), alive.wait_for(|n| *n == 0))
        .await
        .unwrap()
        .unwrap();
    drop(store);
}

#[tokio::test]
async fn what_an_interrupted_run_keeps_is_there_for_the_next_one_and_goes_with_the_operation() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("scratch/kept");
    let begin = |job: &Job<'_>| -> Result<()> {
        std::fs::create_dir_all(&job.kept)?;
        std::fs::write(job.kept.join("checkpoint"), job.operation.attempt.to_string())?;
        Ok(())
    };
    let first = work(move |job| {
        begin(job)?;
        endless(job)
    });
    let (store, jobs) = start(folder.path(), first).await;
    let (resumed, cancelled) =
        (jobs.submit(evaluate("")).await.unwrap().id, jobs.submit(evaluate("")).await.unwrap().id);
    for id in [&resumed, &cancelled] {
        wait_for(&store, &jobs, id, |operation| operation.message == "on and on").await;
    }
    assert_eq!(entries(&kept), 2);
    jobs.cancel(&cancelled).await.unwrap();
    assert_eq!(done(&store, &jobs, &cancelled).await.state, State::Cancelled);
    assert_eq!(entries(&kept), 1);
    jobs.stop(Duration::from_secs(20)).await;
    assert_eq!(entries(&kept), 1);
    drop((store, jobs));
    // Left by an operation that nobody knows.
    std::fs::create_dir(kept.join("unknown")).unwrap();

    let second = work(|job| {
        let left = std::fs::read_to_string(job.kept.join("checkpoint"))?;
        assert_eq!((left.as_str(), job.operation.attempt), ("1", 2));
        Ok(Vec::new())
    });
    let (store, jobs) = start(folder.path(), second).await;
    assert_eq!(done(&store, &jobs, &resumed).await.state, State::Succeeded);
    assert_eq!(entries(&kept), 0);
}

#[tokio::test]
async fn measured_numbers_come_with_the_events() {
    let folder = tempfile::tempdir().unwrap();
    let (store, jobs) = start(
        folder.path(),
        work(|job| {
            let metrics = [("loss", 2.5), ("bad", f64::NAN)];
            let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
            job.progress.part(0.0, 0.5).measure(metrics);
            endless(job)
        }),
    )
    .await;
    let id = jobs.submit(evaluate("")).await.unwrap().id;
    let told = wait_for(&store, &jobs, &id, |operation| !operation.metrics.is_empty()).await;
    assert_eq!(told.metrics, [("loss".to_owned(), 2.5)].into());
    let events = store.events(&id, 0).await.unwrap();
    assert!(events[0].metrics.is_empty());
    let event = events.iter().find(|event| !event.metrics.is_empty()).unwrap();
    assert_eq!((event.message.as_str(), event.metrics["loss"]), ("on and on", 2.5));
    jobs.cancel(&id).await.unwrap();
    // What has ended measures nothing.
    assert!(done(&store, &jobs, &id).await.metrics.is_empty());
}
