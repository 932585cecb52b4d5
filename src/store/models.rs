//! Rows of models and versions.

use std::path::Path;

use super::Store;
use super::objects::Object;
use crate::error::Result;
use crate::models::Model;

/// A model's row.
#[derive(Debug, Clone)]
pub struct ModelRow {
    pub id: String,
    pub display_name: String,
    pub labels: std::collections::BTreeMap<String, String>,
    pub created_ms: i64,
    pub updated_ms: i64,
    pub etag: String,
    pub latest: Option<i64>,
    pub versions: i64,
}

/// A version's row. `lineage` is a `planish.v1.Lineage` message in its JSON mapping.
#[derive(Debug, Clone)]
pub struct VersionRow {
    pub model: String,
    pub version: i64,
    pub digest: String,
    pub family: String,
    pub architecture: String,
    pub config: serde_json::Value,
    pub parameters: i64,
    pub weight_bytes: i64,
    pub total_bytes: i64,
    pub layout_bytes: std::collections::BTreeMap<String, i64>,
    pub files: Vec<(String, Object)>,
    pub lineage: serde_json::Value,
    pub created_ms: i64,
}

impl VersionRow {
    /// `models/{model}/versions/{version}`.
    pub fn name(&self) -> String {
        format!("models/{}/versions/{}", self.model, self.version)
    }
}

impl Store {
    /// Writes a model's files as a new version (creating the model where it is new). `lineage` without
    /// times goes into `planish.json`; the row keeps it whole. Idempotent by (operation, step): writing
    /// the same step of the same operation again returns the version that exists.
    pub async fn write_version(
        &self,
        _model_id: &str,
        _display_name: &str,
        _model: &Model,
        _lineage: &crate::proto::v1::Lineage,
        _scratch: &Path,
    ) -> Result<VersionRow> {
        todo!()
    }
    /// A version by resource name; `models/{model}` gives the newest.
    pub async fn version(&self, _name: &str) -> Result<VersionRow> {
        todo!()
    }
    /// Opens a version's model (weights memory-mapped).
    pub async fn open_version(&self, _row: &VersionRow) -> Result<Model> {
        todo!()
    }
    pub async fn model(&self, _id: &str) -> Result<ModelRow> {
        todo!()
    }
    /// Models by id, after `after`, at most `limit`.
    pub async fn models(&self, _after: Option<&str>, _limit: usize) -> Result<Vec<ModelRow>> {
        todo!()
    }
    /// Versions newest first, below `before`, at most `limit`.
    pub async fn versions(
        &self,
        _model: &str,
        _before: Option<i64>,
        _limit: usize,
    ) -> Result<Vec<VersionRow>> {
        todo!()
    }
    pub async fn update_model(
        &self,
        _id: &str,
        _display_name: Option<&str>,
        _labels: Option<&std::collections::BTreeMap<String, String>>,
        _etag: Option<&str>,
    ) -> Result<ModelRow> {
        todo!()
    }
    /// Deletes a model, its versions, and the objects nothing else uses. Refused while an unfinished
    /// operation or a version of another model depends on it.
    pub async fn delete_model(&self, _id: &str, _etag: Option<&str>) -> Result<()> {
        todo!()
    }
    pub async fn delete_version(&self, _name: &str) -> Result<()> {
        todo!()
    }
}
