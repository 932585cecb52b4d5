//! Rows of data sets.

use std::sync::Arc;

use super::Store;
use super::objects::Object;
use crate::error::Result;

#[derive(Debug, Clone)]
pub struct DatasetRow {
    pub id: String,
    pub display_name: String,
    pub object: Object,
    pub file_name: String,
    pub records: i64,
    pub created_ms: i64,
    pub etag: String,
    pub source: String,
}

impl Store {
    /// Checks an uploaded object as a text data set and writes its row. `request_id` as everywhere.
    pub async fn create_dataset(
        &self,
        _id: &str,
        _display_name: &str,
        _file_name: &str,
        _object: Object,
        _request_id: &str,
    ) -> Result<DatasetRow> {
        todo!()
    }
    pub async fn dataset(&self, _id: &str) -> Result<DatasetRow> {
        todo!()
    }
    pub async fn datasets(&self, _after: Option<&str>, _limit: usize) -> Result<Vec<DatasetRow>> {
        todo!()
    }
    pub async fn delete_dataset(&self, _id: &str, _etag: Option<&str>) -> Result<()> {
        todo!()
    }
    /// The text of a data set: documents joined by a blank line.
    pub async fn dataset_text(&self, _id: &str) -> Result<Arc<String>> {
        todo!()
    }
}
