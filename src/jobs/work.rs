//! What the runner runs: one function for each kind of operation.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use tokio::runtime::Handle;

use super::{damaged, import, recipe};
use crate::error::{Error, Result};
use crate::eval;
use crate::models::Model;
use crate::progress::Progress;
use crate::proto::v1;
use crate::store::models::VersionRow;
use crate::store::operations::{Kind, NewOperation, Operation};
use crate::store::{Store, names};

/// Work on operations; gives the encoded response message.
pub trait Work: Send + Sync {
    fn run(&self, job: &Job<'_>) -> Result<Vec<u8>>;
}

/// A claimed operation and what is needed to do it, on a thread that may block.
pub struct Job<'a> {
    pub store: &'a Arc<Store>,
    pub handle: &'a Handle,
    pub operation: &'a Operation,
    pub progress: Progress,
    /// An empty folder of the job's own.
    pub scratch: &'a Path,
}

impl Job<'_> {
    /// Waits for the store.
    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.handle.block_on(future)
    }

    /// The request message of the operation.
    pub fn request<M: Message + Default>(&self) -> Result<M> {
        M::decode(self.operation.request.as_slice()).map_err(damaged)
    }

    /// The text of a data set by resource name.
    pub fn text(&self, name: &str) -> Result<Arc<String>> {
        self.wait(self.store.dataset_text(names::dataset(name)?))
    }

    /// Measures a version.
    pub fn measure(
        &self,
        row: &VersionRow,
        model: &Model,
        base: Option<&Model>,
        options: &v1::Evaluation,
        progress: &Progress,
    ) -> Result<v1::EvaluationReport> {
        let start = Instant::now();
        let text = match options.dataset.as_str() {
            "" => None,
            name => Some(self.text(name)?),
        };
        let subject = eval::Subject {
            model,
            base,
            text: text.as_ref().map(|text| text.as_str()),
            disk_bytes: row.total_bytes.unsigned_abs(),
        };
        Ok(v1::EvaluationReport {
            version: row.name(),
            digest: row.digest.clone(),
            measurements: eval::evaluate(&subject, options, progress)?,
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}

/// The work on models.
pub struct Models;

impl Work for Models {
    fn run(&self, job: &Job<'_>) -> Result<Vec<u8>> {
        match job.operation.kind {
            Kind::Import => import::run(job),
            Kind::Recipe => recipe::run(job),
            Kind::Evaluate => evaluate(job),
        }
    }
}

fn evaluate(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::EvaluateRequest = job.request()?;
    let options = request.evaluation.unwrap_or_default();
    let row = job.wait(job.store.version(&request.model))?;
    let model = job.wait(job.store.open_version(&row))?;
    let base = if request.base.is_empty() {
        None
    } else {
        let row = job.wait(job.store.version(&request.base))?;
        Some(job.wait(job.store.open_version(&row))?)
    };
    let report = job.measure(&row, &model, base.as_ref(), &options, &job.progress)?;
    Ok(report.encode_to_vec())
}

/// Resource names and object digests that an operation needs until it ends.
pub fn uses(new: &NewOperation) -> Result<Vec<String>> {
    let bad = |error: prost::DecodeError| {
        Error::internal(format!("the request of an operation does not decode: {error}"))
    };
    let request = new.request.as_slice();
    let mut uses = vec![new.target.clone()];
    match new.kind {
        Kind::Import => {
            let request = v1::ImportModelRequest::decode(request).map_err(bad)?;
            uses.push(format!("models/{}", request.model_id));
            if let Some(v1::import_model_request::Source::Uploaded(uploaded)) = request.source {
                uses.extend(uploaded.files.into_iter().map(|file| file.digest));
            }
        }
        Kind::Recipe => {
            let request = v1::RunRecipeRequest::decode(request).map_err(bad)?;
            uses.push(request.model);
            uses.extend(crate::recipe::datasets(&request.recipe.unwrap_or_default()));
        }
        Kind::Evaluate => {
            let request = v1::EvaluateRequest::decode(request).map_err(bad)?;
            uses.extend([request.model, request.base]);
            uses.extend(request.evaluation.map(|evaluation| evaluation.dataset));
        }
    }
    uses.retain(|resource| !resource.is_empty());
    Ok(uses)
}
