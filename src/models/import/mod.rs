//! From files to a model: finds the format and family, maps names, undoes what the format did.

mod source;

use std::path::Path;

use super::Model;
use crate::error::Result;

pub use source::Source;

/// Opens a model from a Hugging Face folder, a `.gguf` file, a `.safetensors` file beside its
/// `config.json`, or a stored version's folder. Weights stay memory-mapped.
pub fn open(_path: &Path) -> Result<Model> {
    todo!()
}
