//! From a model to files other programs read.

use std::path::{Path, PathBuf};

use super::Model;
use crate::error::Result;
use crate::nn::dtype::Dtype;

/// Number format of the matrices of a GGUF export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufFormat {
    F32,
    F16,
    Q8_0,
    Q4_0,
    Q4_1,
}

/// Writes a Hugging Face folder (config.json, safetensors shards, tokenizer files); returns its files.
pub fn hugging_face(_model: &Model, _folder: &Path, _dtype: Dtype) -> Result<Vec<PathBuf>> {
    todo!()
}

/// Writes one GGUF file.
pub fn gguf(_model: &Model, _file: &Path, _format: GgufFormat) -> Result<()> {
    todo!()
}
