//! Data sets.

use std::sync::Arc;

use tonic::{Request, Response, Status, Streaming};

use super::State;
use super::paging::Page;
use super::upload::{self, Part};
use super::{check, convert, download};
use crate::error::{Error, Result};
use crate::proto::v1;
use crate::proto::v1::dataset_service_server::DatasetService;
use crate::proto::v1::import_dataset_request;
use crate::store::datasets::DatasetKind;
use crate::store::names;

pub struct Datasets(pub Arc<State>);

fn part(message: v1::ImportDatasetRequest) -> Option<Part<v1::DatasetHeader>> {
    Some(match message.part? {
        import_dataset_request::Part::Header(header) => Part::Header(header),
        import_dataset_request::Part::Chunk(chunk) => Part::Chunk(chunk),
    })
}

#[tonic::async_trait]
impl DatasetService for Datasets {
    async fn import_dataset(
        &self,
        request: Request<Streaming<v1::ImportDatasetRequest>>,
    ) -> Result<Response<v1::Dataset>, Status> {
        let mut stream = request.into_inner();
        let header = upload::header(&mut stream, part).await?;
        let size = self.check_header(&header).map_err(|e| e.within("header"))?;
        let object = upload::body(&mut stream, part, &self.0.store.objects, size, None).await?;
        let row = self
            .0
            .store
            .create_dataset(
                &header.dataset_id,
                &header.display_name,
                (kind(&header), &header.file_name),
                object,
                &header.request_id,
            )
            .await?;
        Ok(Response::new(convert::dataset(row)))
    }

    async fn get_dataset(
        &self,
        request: Request<v1::GetDatasetRequest>,
    ) -> Result<Response<v1::Dataset>, Status> {
        let request = request.into_inner();
        let row = self.0.store.dataset(names::dataset(&request.name)?).await?;
        Ok(Response::new(convert::dataset(row)))
    }

    async fn list_datasets(
        &self,
        request: Request<v1::ListDatasetsRequest>,
    ) -> Result<Response<v1::ListDatasetsResponse>, Status> {
        let request = request.into_inner();
        let scope = ["datasets"];
        let page = Page::parse(request.page_size, &request.page_token, &scope)?;
        let mut rows = self.0.store.datasets(page.after.as_deref(), page.size + 1).await?;
        let next_page_token = page.cut(&mut rows, &scope, |row| row.id.clone());
        let datasets = rows.into_iter().map(convert::dataset).collect();
        Ok(Response::new(v1::ListDatasetsResponse { datasets, next_page_token }))
    }

    async fn delete_dataset(
        &self,
        request: Request<v1::DeleteDatasetRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let request = request.into_inner();
        let etag = Some(request.etag.as_str()).filter(|e| !e.is_empty());
        self.0.store.delete_dataset(names::dataset(&request.name)?, etag).await?;
        Ok(Response::new(pbjson_types::Empty {}))
    }

    type DownloadDatasetStream = download::Messages<v1::DownloadDatasetResponse>;

    async fn download_dataset(
        &self,
        request: Request<v1::DownloadDatasetRequest>,
    ) -> Result<Response<Self::DownloadDatasetStream>, Status> {
        let request = request.into_inner();
        let row = self.0.store.dataset(names::dataset(&request.name)?).await?;
        let path = self.0.store.objects.local_path(&row.object.digest).await?;
        let file = download::Source { name: row.file_name, path };
        Ok(Response::new(download::stream(vec![file], None, |piece| match piece {
            download::Piece::File { .. } => None,
            download::Piece::Chunk(chunk) => Some(v1::DownloadDatasetResponse { chunk }),
        })))
    }
}

impl Datasets {
    /// Checks the header; returns the size.
    fn check_header(&self, header: &v1::DatasetHeader) -> Result<u64> {
        names::check_id(&header.dataset_id)
            .map_err(|e| Error::at(e.reason(), "dataset_id", e.message()))?;
        check::display_name("display_name", &header.display_name)?;
        check::file_name("file_name", &header.file_name)?;
        check::request_id(&header.request_id)?;
        if v1::DatasetKind::try_from(header.kind).is_err() {
            return Err(Error::field("kind", format!("{} is no kind of data set", header.kind)));
        }
        check::size("size_bytes", header.size_bytes, self.0.config.limits.upload_bytes)
    }
}

fn kind(header: &v1::DatasetHeader) -> DatasetKind {
    match header.kind() {
        v1::DatasetKind::Choices => DatasetKind::Choices,
        v1::DatasetKind::Text | v1::DatasetKind::Unspecified => DatasetKind::Text,
    }
}
