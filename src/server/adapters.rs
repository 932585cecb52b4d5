//! Adapters.

mod exports;
mod imports;
pub mod loaded;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use prost::Message as _;
use tonic::{Request, Response, Status};

use super::State;
use super::download::{self, Piece, Source as File};
use super::paging::Page;
use super::{check, convert, jobs, upload};
use crate::error::{Error, Reason, Result};
use crate::methods::adapt::stored;
use crate::proto::google::longrunning::Operation;
use crate::proto::v1;
use crate::proto::v1::adapter_service_server::AdapterService;
use crate::proto::v1::{export_adapter_response, import_adapter_request};
use crate::store::adapters::{AdapterRow, NewAdapter};
use crate::store::names;
use crate::store::operations::Kind;

/// Files one import may name: PEFT writes two and a README, an export up to six.
const MAX_FILES: usize = 16;

pub struct Adapters(pub Arc<State>);

#[tonic::async_trait]
impl AdapterService for Adapters {
    async fn import_adapter(
        &self,
        request: Request<v1::ImportAdapterRequest>,
    ) -> Result<Response<v1::Adapter>, Status> {
        let request = request.into_inner();
        names::check_id(&request.adapter_id)
            .map_err(|e| Error::at(e.reason(), "adapter_id", e.message()))?;
        check::display_name("display_name", &request.display_name)?;
        check::request_id(&request.request_id)?;
        let (model, _) = names::version(&request.base)
            .map_err(|e| Error::at(e.reason(), "base", e.message()))?;
        let base = self.0.store.version(&request.base).await?;

        let folder = tempfile::Builder::new()
            .prefix("adapter-")
            .tempdir_in(&self.0.scratch)
            .map_err(Error::from)?;
        let source = self.gather(&request, folder.path()).await?;
        let model_files = self.0.store.open_any_version(&base).await?;
        let (path, row) = (folder.path().to_owned(), base.clone());
        let found = super::blocking(move || imports::inspect(&path, &row, &model_files)).await?;
        let imports::Found { method, facts, lineage, names: kept } = found;
        if request.validate_only {
            let row = AdapterRow {
                id: request.adapter_id,
                display_name: request.display_name,
                base_model: model.to_owned(),
                base_version: base.name(),
                digest: String::new(),
                method,
                facts,
                lineage,
                files: Vec::new(),
                source: source.to_owned(),
                created_ms: 0,
                etag: String::new(),
            };
            return Ok(Response::new(v1::Adapter { create_time: None, ..message(row) }));
        }
        let new = NewAdapter {
            id: &request.adapter_id,
            display_name: &request.display_name,
            base_model: model,
            base_version: &base.name(),
            method,
            facts,
            source,
            request_id: &request.request_id,
            lineage,
        };
        let row = self.0.store.create_adapter(&new, folder.path(), &kept).await?;
        Ok(Response::new(message(row)))
    }

    async fn get_adapter(
        &self,
        request: Request<v1::GetAdapterRequest>,
    ) -> Result<Response<v1::Adapter>, Status> {
        let request = request.into_inner();
        let row = self.0.store.adapter(names::adapter(&request.name)?).await?;
        Ok(Response::new(message(row)))
    }

    async fn list_adapters(
        &self,
        request: Request<v1::ListAdaptersRequest>,
    ) -> Result<Response<v1::ListAdaptersResponse>, Status> {
        let request = request.into_inner();
        let base = match request.base_model.as_str() {
            "" => None,
            name => Some(
                names::model(name).map_err(|e| Error::at(e.reason(), "base_model", e.message()))?,
            ),
        };
        let scope = ["adapters", request.base_model.as_str()];
        let page = Page::parse(request.page_size, &request.page_token, &scope)?;
        let mut rows = self.0.store.adapters(base, page.after.as_deref(), page.size + 1).await?;
        let next_page_token = page.cut(&mut rows, &scope, |row| row.id.clone());
        let adapters = rows.into_iter().map(message).collect();
        Ok(Response::new(v1::ListAdaptersResponse { adapters, next_page_token }))
    }

    async fn delete_adapter(
        &self,
        request: Request<v1::DeleteAdapterRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let request = request.into_inner();
        let etag = Some(request.etag.as_str()).filter(|e| !e.is_empty());
        let row = self.0.store.delete_adapter(names::adapter(&request.name)?, etag).await?;
        self.0.adapters.unload(&row.digest);
        Ok(Response::new(pbjson_types::Empty {}))
    }

    type ExportAdapterStream = download::Messages<v1::ExportAdapterResponse>;

    async fn export_adapter(
        &self,
        request: Request<v1::ExportAdapterRequest>,
    ) -> Result<Response<Self::ExportAdapterStream>, Status> {
        let request = request.into_inner();
        let row = self.0.store.adapter(names::adapter(&request.name)?).await?;
        let paths = self.0.store.adapter_paths(&row).await?;
        let (paths, folder) = match request.form() {
            v1::AdapterForm::Unspecified => (paths, None),
            form => {
                let base = loaded::version(&self.0, &row).await?;
                let model = self.0.store.open_any_version(&base).await?;
                let folder = tempfile::Builder::new()
                    .prefix("export-")
                    .tempdir_in(&self.0.scratch)
                    .map_err(Error::from)?;
                let done = move || {
                    let paths = exports::write(form, &paths, &row, &model, folder.path())?;
                    Ok((paths, Some(folder)))
                };
                super::blocking(done).await?
            }
        };
        let files = paths.into_iter().map(|(name, path)| File { name, path }).collect();
        Ok(Response::new(download::stream(files, folder, |piece| {
            let part = match piece {
                Piece::File { name, size } => export_adapter_response::Part::File(v1::ModelFile {
                    file_name: name,
                    digest: String::new(),
                    size_bytes: convert::signed(size),
                }),
                Piece::Chunk(chunk) => export_adapter_response::Part::Chunk(chunk),
            };
            Some(v1::ExportAdapterResponse { part: Some(part) })
        })))
    }

    async fn load_adapter(
        &self,
        request: Request<v1::LoadAdapterRequest>,
    ) -> Result<Response<v1::LoadAdapterResponse>, Status> {
        let request = request.into_inner();
        let row = self.0.store.adapter(names::adapter(&request.name)?).await?;
        let started = Instant::now();
        let base = loaded::version(&self.0, &row).await?;
        let held = loaded::load(&self.0, &row, &base).await?;
        Ok(Response::new(v1::LoadAdapterResponse {
            name: row.name(),
            resident_bytes: convert::signed(held.bytes()),
            seconds: started.elapsed().as_secs_f64(),
        }))
    }

    async fn unload_adapter(
        &self,
        request: Request<v1::UnloadAdapterRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let request = request.into_inner();
        let row = self.0.store.adapter(names::adapter(&request.name)?).await?;
        self.0.adapters.unload(&row.digest);
        Ok(Response::new(pbjson_types::Empty {}))
    }

    async fn merge_adapter(
        &self,
        request: Request<v1::MergeAdapterRequest>,
    ) -> Result<Response<Operation>, Status> {
        let mut request = request.into_inner();
        let fingerprint = request.encode_to_vec();
        check::request_id(&request.request_id)?;
        let known = self.0.repeated(Kind::Merge, &request.request_id, &fingerprint).await?;
        if let Some(known) = known {
            return Ok(known);
        }
        let row = self.0.store.adapter(names::adapter(&request.name)?).await?;
        let weight = *request.weight.get_or_insert(1.0);
        loaded::check_weight("weight", weight)?;
        let base = match request.model.as_str() {
            "" => self.0.store.version(&row.base_version).await?,
            name => {
                let at = |e: Error| Error::at(e.reason(), "model", e.message());
                self.0.store.version(name).await.map_err(at)?
            }
        };
        loaded::check_model("model", &row, &base)?;
        if request.validate_only {
            let report = v1::MergeReport {
                base: base.name(),
                adapter: row.name(),
                weight,
                ..Default::default()
            };
            return Ok(Response::new(convert::validated("merge", base.name(), &report)));
        }
        // The newest version may be another one by the time the job runs.
        request.model = base.name();
        let id = request.request_id.clone();
        Ok(jobs::submit(&self.0, Kind::Merge, base.name(), &request, &id, fingerprint).await?)
    }
}

impl Adapters {
    /// Copies the files of an import into a folder of its own, so that what is checked is what is
    /// kept. Gives where they came from.
    async fn gather(
        &self,
        request: &v1::ImportAdapterRequest,
        folder: &Path,
    ) -> Result<&'static str> {
        match &request.source {
            None => Err(Error::field("source", "missing; give a path or uploaded files")),
            Some(import_adapter_request::Source::Path(path)) => {
                let from = check::allowed_path(Path::new(path), &self.0.config.import.allow_paths)
                    .map_err(|e| Error::at(e.reason(), "path", without_field(&e)))?;
                let (folder, most) = (folder.to_owned(), self.0.config.limits.upload_bytes);
                super::blocking(move || copy(&from, &folder, most)).await?;
                Ok("path")
            }
            Some(import_adapter_request::Source::Uploaded(uploaded)) => {
                self.place(&uploaded.files, folder).await?;
                Ok("upload")
            }
        }
    }

    async fn place(&self, files: &[v1::ModelFile], folder: &Path) -> Result<()> {
        upload::check_files(&self.0.store.objects, files, MAX_FILES).await?;
        for file in files {
            let from = self.0.store.objects.local_path(&file.digest).await?;
            let to = folder.join(&file.file_name);
            // A second name for the same bytes is as good as a copy: objects are write-once.
            super::blocking(move || {
                if std::fs::hard_link(&from, &to).is_err() {
                    std::fs::copy(&from, &to)?;
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

/// The description alone: the violation repeats the field.
fn without_field(error: &Error) -> String {
    error.violations().first().map_or(error.message(), |v| v.description.as_str()).to_owned()
}

/// Copies what belongs to an adapter from a folder, at most `most` bytes a file.
fn copy(from: &Path, to: &Path, most: u64) -> Result<()> {
    for name in stored::FILES {
        let path = from.join(name);
        // Neither links, which could lead out of the folder, nor devices.
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        if !metadata.is_file() {
            continue;
        }
        if metadata.len() > most {
            return Err(Error::at(
                Reason::TooLarge,
                "path",
                format!("{name} has more bytes than the {most} that limits.upload_bytes allows"),
            ));
        }
        std::fs::copy(path, to.join(name))?;
    }
    Ok(())
}

/// A row as a message of the API.
fn message(row: AdapterRow) -> v1::Adapter {
    let total = row.total_bytes();
    v1::Adapter {
        name: row.name(),
        display_name: row.display_name,
        base_model: format!("models/{}", row.base_model),
        base_version: row.base_version,
        method: row.method.into(),
        max_rank: row.facts.ranks.1,
        min_rank: row.facts.ranks.0,
        max_scale: row.facts.scales.1,
        min_scale: row.facts.scales.0,
        target_modules: row.facts.targets,
        linear_count: i32::try_from(row.facts.linears).unwrap_or(i32::MAX),
        parameter_count: convert::signed(row.facts.parameters),
        resident_bytes: convert::signed(row.facts.resident_bytes),
        total_bytes: convert::signed(total),
        digest: row.digest,
        files: row
            .files
            .into_iter()
            .map(|(file_name, object)| v1::ModelFile {
                file_name,
                digest: object.digest,
                size_bytes: convert::signed(object.size),
            })
            .collect(),
        create_time: Some(convert::timestamp(row.created_ms)),
        etag: row.etag,
        source: row.source,
        lineage: row.lineage,
    }
}
