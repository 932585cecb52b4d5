//! Models and their versions.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use super::State;
use super::download;
use super::paging::Page;
use super::upload::{self, Part};
use super::{check, convert, exports};
use crate::error::{Error, Result};
use crate::models::import::Source;
use crate::proto::google::longrunning::Operation;
use crate::proto::v1;
use crate::proto::v1::model_service_server::ModelService;
use crate::proto::v1::{import_model_request, upload_file_request};
use crate::store::models::VersionRow;
use crate::store::names;
use crate::store::objects::check_digest;
use crate::store::operations::{Kind, NewOperation};

/// Files one import may name.
const MAX_FILES: usize = 1000;

pub struct Models(pub Arc<State>);

fn part(message: v1::UploadFileRequest) -> Option<Part<v1::UploadHeader>> {
    Some(match message.part? {
        upload_file_request::Part::Header(header) => Part::Header(header),
        upload_file_request::Part::Chunk(chunk) => Part::Chunk(chunk),
    })
}

#[tonic::async_trait]
impl ModelService for Models {
    async fn create_model(
        &self,
        request: Request<v1::CreateModelRequest>,
    ) -> Result<Response<Operation>, Status> {
        Ok(super::creation::create(&self.0, request.into_inner()).await?)
    }

    async fn import_model(
        &self,
        request: Request<v1::ImportModelRequest>,
    ) -> Result<Response<Operation>, Status> {
        let request = request.into_inner();
        let fingerprint = request.encode_to_vec();
        check::request_id(&request.request_id)?;
        if let Some(known) =
            self.0.repeated(Kind::Import, &request.request_id, &fingerprint).await?
        {
            return Ok(known);
        }
        let checked = self.check_import(request).await?;
        let target = format!("models/{}", checked.model_id);
        if checked.validate_only {
            let version = v1::ModelVersion::default();
            return Ok(Response::new(convert::validated("import", target, &version)));
        }
        let operation = NewOperation {
            kind: Kind::Import,
            target,
            request: checked.encode_to_vec(),
            request_id: checked.request_id,
            fingerprint,
        };
        Ok(Response::new(convert::operation(self.0.jobs.submit(operation).await?)))
    }

    async fn upload_file(
        &self,
        request: Request<Streaming<v1::UploadFileRequest>>,
    ) -> Result<Response<v1::UploadFileResponse>, Status> {
        let mut stream = request.into_inner();
        let header = upload::header(&mut stream, part).await?;
        let max = self.0.config.limits.upload_bytes;
        let size = check::size("header.size_bytes", header.size_bytes, max)?;
        let digest = Some(header.digest.as_str()).filter(|d| !d.is_empty());
        if let Some(digest) = digest {
            check_digest(digest).map_err(|e| Error::field("header.digest", e.message()))?;
        }
        let object = upload::body(&mut stream, part, &self.0.store.objects, size, digest).await?;
        Ok(Response::new(v1::UploadFileResponse {
            file: Some(v1::ModelFile {
                file_name: header.file_name,
                digest: object.digest,
                size_bytes: convert::signed(object.size),
            }),
        }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::Model>, Status> {
        let request = request.into_inner();
        let row = self.0.store.model(names::model(&request.name)?).await?;
        Ok(Response::new(convert::model(row)))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let request = request.into_inner();
        let scope = ["models"];
        let page = Page::parse(request.page_size, &request.page_token, &scope)?;
        let mut rows = self.0.store.models(page.after.as_deref(), page.size + 1).await?;
        let next_page_token = page.cut(&mut rows, &scope, |row| row.id.clone());
        let models = rows.into_iter().map(convert::model).collect();
        Ok(Response::new(v1::ListModelsResponse { models, next_page_token }))
    }

    async fn update_model(
        &self,
        request: Request<v1::UpdateModelRequest>,
    ) -> Result<Response<v1::Model>, Status> {
        let request = request.into_inner();
        let mask = request.update_mask.unwrap_or_default().paths;
        let model = request.model.ok_or_else(|| Error::field("model", "missing"))?;
        let id = names::model(&model.name).map_err(|e| e.within("model"))?;
        let known = ["display_name", "labels", "*"];
        if let Some(path) = mask.iter().find(|p| !known.contains(&p.as_str())) {
            let problem = format!("'{path}' cannot be changed; name display_name or labels");
            return Err(Error::field("update_mask", problem).into());
        }
        let asked = |field: &str| mask.is_empty() || mask.iter().any(|p| p == field || p == "*");
        let display_name = asked("display_name").then_some(model.display_name.as_str());
        let labels: Option<BTreeMap<_, _>> =
            asked("labels").then(|| model.labels.clone().into_iter().collect());
        check::display_name("model.display_name", display_name.unwrap_or_default())?;
        if let Some(labels) = &labels {
            check::labels("model.labels", labels.iter())?;
        }
        let etag = Some(model.etag.as_str()).filter(|e| !e.is_empty());
        let row = self.0.store.update_model(id, display_name, labels.as_ref(), etag).await?;
        Ok(Response::new(convert::model(row)))
    }

    async fn delete_model(
        &self,
        request: Request<v1::DeleteModelRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let request = request.into_inner();
        let id = names::model(&request.name)?;
        let etag = Some(request.etag.as_str()).filter(|e| !e.is_empty());
        let versions = self.0.store.versions(id, None, usize::MAX).await?;
        self.0.store.delete_model(id, etag).await?;
        for row in versions {
            self.0.residency.unload(&row.digest);
        }
        Ok(Response::new(pbjson_types::Empty {}))
    }

    async fn get_model_version(
        &self,
        request: Request<v1::GetModelVersionRequest>,
    ) -> Result<Response<v1::ModelVersion>, Status> {
        let row = self.0.store.version(&request.into_inner().name).await?;
        Ok(Response::new(row.message()?))
    }

    async fn list_model_versions(
        &self,
        request: Request<v1::ListModelVersionsRequest>,
    ) -> Result<Response<v1::ListModelVersionsResponse>, Status> {
        let request = request.into_inner();
        let id = names::model(&request.parent)?;
        let scope = ["versions", id];
        let page = Page::parse(request.page_size, &request.page_token, &scope)?;
        // A model without versions has an empty list; a model that is not there is an error.
        self.0.store.model(id).await?;
        let before = page.after.as_deref().and_then(|v| v.parse().ok());
        let mut rows = self.0.store.versions(id, before, page.size + 1).await?;
        let next_page_token = page.cut(&mut rows, &scope, |row| row.version.to_string());
        let versions = rows.iter().map(VersionRow::message).collect::<Result<_>>()?;
        Ok(Response::new(v1::ListModelVersionsResponse { versions, next_page_token }))
    }

    async fn delete_model_version(
        &self,
        request: Request<v1::DeleteModelVersionRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let request = request.into_inner();
        names::exact_version(&request.name)?;
        let row = self.0.store.version(&request.name).await?;
        self.0.store.delete_version(&request.name).await?;
        self.0.residency.unload(&row.digest);
        Ok(Response::new(pbjson_types::Empty {}))
    }

    type ExportModelStream = download::Messages<v1::ExportModelResponse>;

    async fn export_model(
        &self,
        request: Request<v1::ExportModelRequest>,
    ) -> Result<Response<Self::ExportModelStream>, Status> {
        Ok(Response::new(exports::export(&self.0, &request.into_inner()).await?))
    }

    async fn load_model(
        &self,
        request: Request<v1::LoadModelRequest>,
    ) -> Result<Response<v1::LoadModelResponse>, Status> {
        let row = self.0.store.version(&request.into_inner().name).await?;
        let started = Instant::now();
        let engine = self.0.load(&row).await?;
        Ok(Response::new(v1::LoadModelResponse {
            name: row.name(),
            resident_bytes: convert::signed(engine.resident_bytes()),
            seconds: started.elapsed().as_secs_f64(),
        }))
    }

    async fn unload_model(
        &self,
        request: Request<v1::UnloadModelRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let row = self.0.store.version(&request.into_inner().name).await?;
        self.0.residency.unload(&row.digest);
        Ok(Response::new(pbjson_types::Empty {}))
    }

    async fn list_loaded_models(
        &self,
        _: Request<v1::ListLoadedModelsRequest>,
    ) -> Result<Response<v1::ListLoadedModelsResponse>, Status> {
        let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for version in self.0.store.version_index(None).await? {
            let name = names::of_version(&version.model, version.version);
            names.entry(version.digest).or_default().push(name);
        }
        let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let loaded = self.0.residency.loaded().into_iter().map(|l| v1::LoadedModel {
            versions: names.remove(&l.key).unwrap_or_default(),
            digest: l.key,
            resident_bytes: convert::signed(l.resident_bytes),
            pinned: l.pinned,
            running_requests: count(l.running),
            waiting_requests: count(l.waiting),
            idle_seconds: l.idle.as_secs_f64(),
        });
        Ok(Response::new(v1::ListLoadedModelsResponse { loaded_models: loaded.collect() }))
    }
}

impl Models {
    /// Checks an import; paths become canonical, so that what was checked is what is read.
    async fn check_import(
        &self,
        mut request: v1::ImportModelRequest,
    ) -> Result<v1::ImportModelRequest> {
        names::check_id(&request.model_id)
            .map_err(|e| Error::at(e.reason(), "model_id", e.message()))?;
        check::display_name("display_name", &request.display_name)?;
        match &mut request.source {
            None => return Err(Error::field("source", "missing; give a uri or uploaded files")),
            Some(import_model_request::Source::Uri(uri)) => {
                let source = Source::parse(uri).map_err(|e| Error::field("uri", e.message()))?;
                if let Source::Path(path) = source {
                    *uri = self.check_path(&path)?;
                }
            }
            Some(import_model_request::Source::Uploaded(uploaded)) => {
                upload::check_files(&self.0.store.objects, &uploaded.files, MAX_FILES).await?;
            }
        }
        Ok(request)
    }

    fn check_path(&self, path: &Path) -> Result<String> {
        let path = check::allowed_path(path, &self.0.config.import.allow_paths)?;
        path.into_os_string()
            .into_string()
            .map_err(|_| Error::field("uri", "the path is not unicode; rename the folder"))
    }
}
