//! Data sets.

use std::sync::Arc;

use tonic::{Request, Response, Status, Streaming};

use super::State;
use super::paging::Page;
use super::upload::{self, Part};
use super::{check, convert, download};
use crate::data::records::{Columns, Layout};
use crate::error::{Error, Result};
use crate::proto::v1;
use crate::proto::v1::dataset_service_server::DatasetService;
use crate::proto::v1::import_dataset_request;
use crate::store::datasets::{DatasetFile, DatasetKind};
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
        let file = file(&header).map_err(|e| e.within("header.layout"))?;
        let object = upload::body(&mut stream, part, &self.0.store.objects, size, None).await?;
        let row = self
            .0
            .store
            .create_dataset(
                &header.dataset_id,
                &header.display_name,
                file,
                object,
                &header.request_id,
            )
            .await
            // What is wrong with a layout may show in the file only.
            .map_err(|e| if e.violations().is_empty() { e } else { e.within("header.layout") })?;
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
        let datasets = rows.into_iter().map(|row| {
            let mut dataset = convert::dataset(row);
            // Thousands of names for each data set would not fit into a message.
            dataset.layout.get_or_insert_default().labels.clear();
            dataset
        });
        let datasets = datasets.collect();
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

/// The file and its layout as a client describes them.
fn file(header: &v1::DatasetHeader) -> Result<DatasetFile> {
    let kind = match header.kind() {
        v1::DatasetKind::Text | v1::DatasetKind::Unspecified => DatasetKind::Text,
        v1::DatasetKind::Choices => DatasetKind::Choices,
        v1::DatasetKind::Chat => DatasetKind::Chat,
        v1::DatasetKind::Classification => DatasetKind::Classification,
        v1::DatasetKind::Regression => DatasetKind::Regression,
        v1::DatasetKind::Tagging => DatasetKind::Tagging,
        v1::DatasetKind::Preferences => DatasetKind::Preferences,
        v1::DatasetKind::MultiLabel => DatasetKind::MultiLabel,
        v1::DatasetKind::Images => DatasetKind::Images,
    };
    let layout = asked(header.layout.clone().unwrap_or_default());
    layout.check(kind)?;
    Ok(DatasetFile { kind, name: header.file_name.clone(), layout })
}

/// A layout as clients ask for it.
pub fn asked(layout: v1::DatasetLayout) -> Layout {
    let given = |name: String| Some(name).filter(|name| !name.is_empty());
    Layout {
        columns: Columns {
            text: given(layout.text_column),
            label: given(layout.label_column),
            prompt: given(layout.prompt_column),
            input: given(layout.input_column),
            answer: given(layout.answer_column),
            system: given(layout.system_column),
            messages: given(layout.messages_column),
            chosen: given(layout.chosen_column),
            rejected: given(layout.rejected_column),
            second: given(layout.second_text_column),
        },
        header: layout.has_header,
        labels: layout.labels,
        templates: layout.templates,
        skip_unusable: layout.skip_unusable,
        skip_records: layout.skip_records.filter(|count| *count > 0),
        max_records: layout.max_records,
    }
}

/// A kind as clients name it.
pub fn kind(kind: DatasetKind) -> v1::DatasetKind {
    match kind {
        DatasetKind::Text => v1::DatasetKind::Text,
        DatasetKind::Choices => v1::DatasetKind::Choices,
        DatasetKind::Chat => v1::DatasetKind::Chat,
        DatasetKind::Classification => v1::DatasetKind::Classification,
        DatasetKind::Regression => v1::DatasetKind::Regression,
        DatasetKind::Tagging => v1::DatasetKind::Tagging,
        DatasetKind::Preferences => v1::DatasetKind::Preferences,
        DatasetKind::MultiLabel => v1::DatasetKind::MultiLabel,
        DatasetKind::Images => v1::DatasetKind::Images,
    }
}

/// A layout as clients see it.
pub fn layout(layout: Layout) -> v1::DatasetLayout {
    let Layout { columns, header, labels, templates, skip_unusable, skip_records, max_records } =
        layout;
    v1::DatasetLayout {
        text_column: columns.text.unwrap_or_default(),
        label_column: columns.label.unwrap_or_default(),
        prompt_column: columns.prompt.unwrap_or_default(),
        input_column: columns.input.unwrap_or_default(),
        answer_column: columns.answer.unwrap_or_default(),
        system_column: columns.system.unwrap_or_default(),
        messages_column: columns.messages.unwrap_or_default(),
        chosen_column: columns.chosen.unwrap_or_default(),
        rejected_column: columns.rejected.unwrap_or_default(),
        second_text_column: columns.second.unwrap_or_default(),
        has_header: header,
        labels,
        templates,
        skip_unusable,
        skip_records,
        max_records,
    }
}
