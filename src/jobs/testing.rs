//! A queue over a store in a folder, for tests of jobs on tiny random models.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use prost::Message;

use super::work::{Job, Models, Work};
use super::{Jobs, Options};
use crate::error::Result;
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
        let interrupt = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let flag = interrupt.clone();
        let sink = move |_: f64, message: &str| {
            if message.starts_with(place) {
                let _ = tell.send(());
                while !outer.cancelled() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                flag.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        };
        let progress = Progress::new(std::sync::Arc::new(sink), interrupt);
        Models.run(&Job { progress, kept: job.kept.clone(), ..*job })
    }
}

pub struct Service {
    pub store: std::sync::Arc<Store>,
    pub jobs: Jobs,
}

impl Service {
    pub async fn start(folder: &Path, work: impl Work + 'static) -> Self {
        let store = std::sync::Arc::new(Store::open(folder).await.unwrap());
        let options = Options { runners: 1, max_queued: 9, scratch: folder.join("scratch") };
        let jobs = Jobs::start_with(store.clone(), options, Box::new(work)).await.unwrap();
        Self { store, jobs }
    }

    pub async fn base(&self, id: &str) -> VersionRow {
        let model = random::model(random::tiny("llama"), 1).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let lineage = v1::Lineage::default();
        self.store.write_version(id, "tiny", &model, (&lineage, 0), scratch.path()).await.unwrap()
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
