//! The files of a stored version: safetensors shards, `config.json`, tokenizer files, `planish.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Model, ModelInfo};
use crate::error::Result;

/// Writes the files of a version into `folder`. `lineage` is what `planish.json` keeps of the
/// version's origin; it must not contain times or anything else that differs between equal runs.
/// Equal models and lineages give equal bytes. Returns the file names, sorted.
pub fn write(_model: &Model, _lineage: &serde_json::Value, _folder: &Path) -> Result<Vec<String>> {
    todo!()
}

/// Reads a version from its files (name to path); weights stay memory-mapped.
pub fn read(_files: &BTreeMap<String, PathBuf>) -> Result<Model> {
    todo!()
}

/// Reads only headers and configuration.
pub fn read_info(_files: &BTreeMap<String, PathBuf>) -> Result<ModelInfo> {
    todo!()
}
