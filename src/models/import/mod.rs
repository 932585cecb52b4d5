//! From files to a model: finds the format and family, maps names, undoes what the format did.

mod gguf;
mod hugging_face;
mod source;

use std::fs;
use std::path::{Path, PathBuf};

use super::{AnyModel, Model, files, package};
use crate::error::{Error, Reason, Result};

pub use source::Source;

/// Opens a model from a Hugging Face folder, a `.gguf` file, a `.safetensors` file beside its
/// `config.json`, or a stored version's folder. Weights stay memory-mapped, so the files must not be
/// written to as long as the model is used.
///
/// # Errors
/// `SOURCE_UNAVAILABLE` when nothing is there, `UNSUPPORTED_FORMAT` when it is nothing that is read,
/// `MALFORMED_FILE` and `UNSUPPORTED_MODEL` for what is wrong inside, `MODEL_UNSUITABLE` for an encoder,
/// which [`open_any`] takes.
pub fn open(path: &Path) -> Result<Model> {
    open_any(path)?.decoder()
}

/// Opens a model of any family; otherwise as [`open`].
pub fn open_any(path: &Path) -> Result<AnyModel> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|e| Error::from(e).within(&shown.to_string()))?;
    if !meta.is_dir() {
        if crate::formats::gguf::is_gguf(path) {
            return Ok(gguf::open(path)?.into());
        }
        if path.extension().is_some_and(|e| e == "safetensors") {
            let folder = path.parent().unwrap_or(Path::new("."));
            return hugging_face::open(folder, Some(path));
        }
        return Err(Error::new(
            Reason::UnsupportedFormat,
            format!(
                "{shown} is no model that is read here; name a folder, a .gguf or a .safetensors file"
            ),
        ));
    }
    if path.join(package::MANIFEST).is_file() {
        return package::read_any(&plain_files(path)?);
    }
    if path.join(files::CONFIG).is_file() {
        return hugging_face::open(path, None);
    }
    let ggufs: Vec<PathBuf> = plain_files(path)?
        .into_values()
        .filter(|file| file.extension().is_some_and(|e| e == "gguf"))
        .collect();
    match &ggufs[..] {
        [only] => Ok(gguf::open(only)?.into()),
        [] => Err(Error::new(
            Reason::UnsupportedFormat,
            format!("{shown} holds neither config.json nor a .gguf file; name a model's folder"),
        )),
        many => Err(Error::new(
            Reason::UnsupportedFormat,
            format!("{shown} holds {} .gguf files; name the one to open", many.len()),
        )),
    }
}

/// The files of a folder by name.
fn plain_files(folder: &Path) -> Result<std::collections::BTreeMap<String, PathBuf>> {
    let mut files = std::collections::BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if let Some(name) = path.file_name().and_then(|n| n.to_str())
            && path.is_file()
        {
            files.insert(name.to_owned(), path);
        }
    }
    Ok(files)
}
