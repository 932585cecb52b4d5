//! What the runner runs: one function for each kind of operation.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message;
use tokio::runtime::Handle;

use super::{adapt, claim, compare, create, damaged, evaluate, import, merge, recipe};
use crate::data::choices::Item;
use crate::data::images::Images;
use crate::data::records::Source;
use crate::error::{Error, Result};
use crate::methods::Datasets;
use crate::models::AnyModel;
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
    /// A folder for what an interrupted run of the operation leaves for the next one (checkpoints of
    /// training). Who needs it makes it; it goes when the operation ends.
    pub kept: PathBuf,
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

    /// The questions of a data set by resource name.
    pub fn items(&self, name: &str) -> Result<Vec<Item>> {
        self.wait(self.store.dataset_items(names::dataset(name)?))
    }

    /// Opens a stored version.
    pub fn open(&self, row: &VersionRow) -> Result<AnyModel> {
        self.wait(self.store.open_any_version(row))
    }

    /// Keeps an intermediate result for a later run of the operation.
    pub fn save(&self, name: &str, message: &impl Message) -> Result<()> {
        let value = message.encode_to_vec();
        self.wait(self.store.save_result(&self.operation.id, name, &value))
    }

    /// What an earlier run of the operation kept under `name`.
    pub fn saved<M: Message + Default>(&self, name: &str) -> Result<Option<M>> {
        let value = self.wait(self.store.saved_result(&self.operation.id, name))?;
        value.map(|value| M::decode(value.as_slice()).map_err(damaged)).transpose()
    }

    /// Digests of the data sets of these names.
    pub fn data_digests(&self, names: &[String]) -> Result<Vec<String>> {
        let row = |name: &String| self.wait(self.store.dataset(names::dataset(name)?));
        names.iter().map(|name| Ok(row(name)?.object.digest)).collect()
    }
}

impl Datasets for Job<'_> {
    fn source(&self, name: &str) -> Result<Source> {
        Ok(self.wait(self.store.dataset_source(names::dataset(name)?))?.1)
    }

    fn images(&self, name: &str) -> Result<Images> {
        self.wait(self.store.dataset_images(names::dataset(name)?))
    }
}

/// The work on models.
pub struct Models;

impl Work for Models {
    fn run(&self, job: &Job<'_>) -> Result<Vec<u8>> {
        match job.operation.kind {
            Kind::Import => import::run(job),
            Kind::Create => create::run(job),
            Kind::Recipe => recipe::run(job),
            Kind::Evaluate => evaluate::run(job),
            Kind::Compare => compare::run(job),
            Kind::Claim => claim::run(job),
            Kind::Adapt => adapt::run(job),
            Kind::Merge => merge::run(job),
        }
    }
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
        Kind::Create => {
            let request = v1::CreateModelRequest::decode(request).map_err(bad)?;
            uses.push(format!("models/{}", request.model_id));
            uses.extend(request.tokenizer.map(|tokenizer| tokenizer.dataset));
        }
        Kind::Recipe => {
            let request = v1::RunRecipeRequest::decode(request).map_err(bad)?;
            uses.push(request.model);
            uses.extend(crate::recipe::datasets(&request.recipe.unwrap_or_default()));
        }
        Kind::Evaluate => {
            let request = v1::EvaluateRequest::decode(request).map_err(bad)?;
            uses.extend([request.model, request.base, request.adapter]);
            let norms = request.evaluation.iter().filter_map(|e| e.norm_bounds.as_ref());
            uses.extend(norms.map(|norms| norms.adapter.clone()));
            uses.extend(request.evaluation.iter().flat_map(crate::recipe::evaluation_datasets));
        }
        Kind::Compare => {
            let request = v1::CompareRequest::decode(request).map_err(bad)?;
            let comparison = request.comparison.unwrap_or_default();
            uses.extend(crate::recipe::compare::datasets(&comparison));
            uses.extend(crate::recipe::compare::versions(&comparison));
        }
        Kind::Claim => {
            let request = v1::RunClaimRequest::decode(request).map_err(bad)?;
            uses.push(request.model);
            uses.extend(crate::recipe::claim::uses(&request.claim.unwrap_or_default()));
        }
        Kind::Adapt => {
            let request = v1::AdaptRequest::decode(request).map_err(bad)?;
            uses.extend(crate::recipe::adapt::datasets(&request)?);
            uses.push(request.model);
        }
        Kind::Merge => {
            let request = v1::MergeAdapterRequest::decode(request).map_err(bad)?;
            uses.extend([request.name, request.model]);
        }
    }
    uses.retain(|resource| !resource.is_empty());
    Ok(uses)
}
