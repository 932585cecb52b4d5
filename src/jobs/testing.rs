//! A queue over a store in a folder, for tests of jobs on tiny random models.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use prost::Message;

use super::work::{Job, Models, Work};
use super::{Jobs, Options};
use crate::error::Result;
use crate::models::AnyModel;
use crate::models::decoder::random;
use crate::progress::Progress;
use crate::proto::v1;
use crate::store::Store;
use crate::store::models::VersionRow;
use crate::store::operations::{Kind, NewOperation, Operation};

/// The real work, held for ever at the first message that begins with `.0`; then `.1` is told.
pub struct HeldAt(pub &'static str, pub mpsc::Sender<()>);

impl Work for HeldAt {
    fn run(&self, job: &Job<'_>) -> Result<Vec<u8>> {
        let (outer, place, tell) = (job.progress.clone(), self.0, self.1.clone());
        let interrupt = Arc::new(AtomicBool::new(false));
        let flag = interrupt.clone();
        let sink = move |_: f64, message: &str| {
            if message.starts_with(place) {
                let _ = tell.send(());
                while !outer.cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                flag.store(true, Ordering::Relaxed);
            }
        };
        let progress = Progress::new(Arc::new(sink), interrupt);
        Models.run(&Job { progress, kept: job.kept.clone(), ..*job })
    }
}

/// The real work on recipes of one step, which counts what the step says after it began and is held for ever
/// when it says this much.
pub struct HeldInStep {
    /// Messages until it is held; `usize::MAX` for never.
    pub at: Arc<AtomicUsize>,
    /// Messages so far; starts anew with each recipe.
    pub seen: Arc<AtomicUsize>,
    /// Told when it is held.
    pub tell: tokio::sync::mpsc::UnboundedSender<()>,
}

impl Work for HeldInStep {
    fn run(&self, job: &Job<'_>) -> Result<Vec<u8>> {
        let interrupt = Arc::new(AtomicBool::new(false));
        let (outer, flag, tell) = (job.progress.clone(), interrupt.clone(), self.tell.clone());
        let (at, seen) = (self.at.clone(), self.seen.clone());
        let inside = AtomicBool::new(false);
        let sink = move |_: f64, message: &str| {
            // Of the step itself these are the first and the last.
            if message.starts_with("step 1 of 1: ") {
                inside.store(!message.ends_with("version"), Ordering::Relaxed);
                if inside.load(Ordering::Relaxed) {
                    seen.store(0, Ordering::Relaxed);
                }
            } else if inside.load(Ordering::Relaxed)
                && seen.fetch_add(1, Ordering::Relaxed) + 1 == at.load(Ordering::Relaxed)
            {
                let _ = tell.send(());
                while !outer.cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                flag.store(true, Ordering::Relaxed);
            }
        };
        let progress = Progress::new(Arc::new(sink), interrupt);
        Models.run(&Job { progress, kept: job.kept.clone(), ..*job })
    }
}

pub struct Service {
    pub store: Arc<Store>,
    pub jobs: Jobs,
}

impl Service {
    pub async fn start(folder: &Path, work: impl Work + 'static) -> Self {
        let store = Arc::new(Store::open(folder).await.unwrap());
        let options = Options { runners: 1, max_queued: 9, scratch: folder.join("scratch") };
        let jobs = Jobs::start_with(store.clone(), options, Box::new(work)).await.unwrap();
        Self { store, jobs }
    }

    pub async fn base(&self, id: &str) -> VersionRow {
        self.keep(id, &random::model(random::tiny("llama"), 1).unwrap()).await
    }

    /// The first version of a model called `id`.
    pub async fn keep(&self, id: &str, model: impl Into<AnyModel>) -> VersionRow {
        let scratch = tempfile::tempdir().unwrap();
        let lineage = v1::Lineage::default();
        self.store.write_version(id, "tiny", model, (&lineage, 0), scratch.path()).await.unwrap()
    }

    pub async fn submit(&self, kind: Kind, target: &str, request: &impl Message) -> Operation {
        let request = request.encode_to_vec();
        let operation = NewOperation {
            kind,
            target: target.to_owned(),
            fingerprint: request.clone(),
            request,
            request_id: String::new(),
        };
        self.jobs.submit(operation).await.unwrap()
    }

    pub async fn run_recipe(&self, base: &VersionRow, recipe: v1::Recipe) -> Operation {
        let model = base.name();
        let request = v1::RunRecipeRequest {
            model: model.clone(),
            recipe: Some(recipe),
            ..Default::default()
        };
        self.submit(Kind::Recipe, &model, &request).await
    }

    pub async fn end(&self, operation: &Operation) -> Operation {
        let mut changes = self.jobs.watch(&operation.id);
        let wait = async {
            loop {
                let row = self.store.operation(&operation.id).await.unwrap();
                if row.state.done() {
                    return row;
                }
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect("the job ends")
    }

    /// Digests of the versions that an operation made.
    pub async fn digests(&self, operation: &Operation) -> Vec<String> {
        let mut digests = Vec::new();
        for name in &operation.versions {
            digests.push(self.store.version(name).await.unwrap().digest);
        }
        digests
    }
}
