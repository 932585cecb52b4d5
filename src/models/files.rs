//! What Hugging Face folders and stored versions have in common: configuration, tokenizer, weights.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::{AnyFamily, Family, Model, decoder, encoder, lstm, two_tower, vision};
use crate::data::tokenizer::{self, Tokenizer};
use crate::error::{Error, Reason, Result};
use crate::formats::malformed;
use crate::nn::weight::Weight;

/// Largest `config.json` and its like; parsed JSON takes up to some ten times its text.
const MAX_CONFIG: u64 = 4 << 20;

/// Largest `tokenizer.json`.
const MAX_TOKENIZER: u64 = 256 << 20;

/// Names of the files.
pub(super) const CONFIG: &str = "config.json";
pub(super) const GENERATION: &str = "generation_config.json";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The text of a file of at most `limit` bytes.
pub(super) fn text(path: &Path, limit: u64) -> Result<String> {
    let shown = path.display();
    let failed = |error: std::io::Error| Error::from(error).within(&shown.to_string());
    let mut text = Vec::new();
    // One byte more than allowed tells a long file from a longest one; sizes on disk may lie.
    File::open(path).map_err(failed)?.take(limit + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > limit {
        return Err(Error::new(
            Reason::TooLarge,
            format!("{shown} is larger than {limit} bytes; this is no such file of a model"),
        ));
    }
    String::from_utf8(text).map_err(|_| malformed(format!("{shown} is not UTF-8")))
}

/// A small file of settings in JSON.
pub(super) fn json(path: &Path) -> Result<Value> {
    serde_json::from_str(&text(path, MAX_CONFIG)?)
        .map_err(|e| malformed(format!("{} cannot be read: {e}", path.display())))
}

/// The configuration and the family it describes.
pub(super) fn config(path: &Path) -> Result<(Value, AnyFamily)> {
    let config = json(path)?;
    let family = if encoder::is_encoder(&config) {
        AnyFamily::Encoder(encoder::Config::from_hugging_face(&config)?)
    } else if vision::is_vision(&config) {
        AnyFamily::Vision(vision::Config::from_hugging_face(&config)?)
    } else if lstm::is_lstm(&config) {
        AnyFamily::Lstm(lstm::Config::from_hugging_face(&config)?)
    } else if two_tower::is_two_tower(&config) {
        AnyFamily::TwoTower(two_tower::Config::from_hugging_face(&config)?)
    } else {
        AnyFamily::Decoder(decoder::Config::from_hugging_face(&config)?)
    };
    Ok((config, family))
}

/// The tokenizer of a folder; `find` gives the path of a file where there is one.
pub(super) fn tokenizer(
    find: impl Fn(&str) -> Option<std::path::PathBuf>,
    config: &Value,
) -> Result<Option<Arc<Tokenizer>>> {
    let Some(path) = find(TOKENIZER) else { return Ok(None) };
    let side = |name: &str| find(name).map(|path| text(&path, MAX_CONFIG)).transpose();
    let (tokenizer_config, generation) = (side(TOKENIZER_CONFIG)?, side(GENERATION)?);
    let tokenizer = Tokenizer::from_files(tokenizer::Files {
        tokenizer: text(&path, MAX_TOKENIZER)?,
        tokenizer_config: tokenizer_config.as_deref(),
        generation_config: generation.as_deref(),
        config: Some(config),
        chat_template: side(CHAT_TEMPLATE)?,
    })?;
    Ok(Some(Arc::new(tokenizer)))
}

/// Writes a configuration and a tokenizer into `folder`; returns the files' names.
pub(super) fn write_text(
    config: &Value,
    tokenizer: Option<&Tokenizer>,
    folder: &Path,
) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let mut write = |name: &str, text: &str| {
        names.push(name.to_owned());
        std::fs::write(folder.join(name), text)
    };
    write(CONFIG, &pretty(config))?;
    if let Some(tokenizer) = tokenizer {
        write(TOKENIZER, &tokenizer.json)?;
        write(TOKENIZER_CONFIG, &pretty(&tokenizer.tokenizer_config()))?;
        write(GENERATION, &pretty(&tokenizer.generation_config()))?;
    }
    Ok(names)
}

/// JSON for people; keys are sorted, so equal values give equal text.
pub(super) fn pretty(value: &Value) -> String {
    let mut sorted = value.clone();
    sorted.sort_all_objects();
    format!("{sorted:#}\n")
}

/// What a configuration says of a model's parts.
pub(super) trait Parts {
    /// Every tensor the model must have, with its shape.
    fn tensors(&self) -> Vec<(String, Vec<usize>)>;
    /// Rows of the embedding matrix.
    fn vocab(&self) -> usize;
}

impl Parts for Family {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            Self::Decoder(config) => config.tensors(),
            Self::Encoder(config) => config.tensors(),
        }
    }

    fn vocab(&self) -> usize {
        match self {
            Self::Decoder(config) => config.vocab,
            Self::Encoder(config) => config.vocab,
        }
    }
}

impl Parts for encoder::Config {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        Self::tensors(self)
    }

    fn vocab(&self) -> usize {
        self.vocab
    }
}

impl Parts for vision::Config {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        Self::tensors(self)
    }

    fn vocab(&self) -> usize {
        0
    }
}

impl Parts for lstm::Config {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        Self::tensors(self)
    }

    fn vocab(&self) -> usize {
        self.vocab
    }
}

impl Parts for two_tower::Config {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        Self::tensors(self)
    }

    fn vocab(&self) -> usize {
        self.vocab
    }
}

impl Parts for AnyFamily {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            Self::Decoder(config) => config.tensors(),
            Self::Encoder(config) => config.tensors(),
            Self::Vision(config) => config.tensors(),
            Self::Lstm(config) => config.tensors(),
            Self::TwoTower(config) => config.tensors(),
        }
    }

    fn vocab(&self) -> usize {
        match self {
            Self::Decoder(config) => config.vocab,
            Self::Encoder(config) => config.vocab,
            Self::Vision(_) => 0,
            Self::Lstm(config) => config.vocab,
            Self::TwoTower(config) => config.vocab,
        }
    }
}

/// A model of checked parts: every tensor that the configuration asks for, in its shape, and no other.
pub(super) fn assemble<F: Parts>(
    family: F,
    config: Value,
    mut weights: BTreeMap<String, Arc<Weight>>,
    tokenizer: Option<Arc<Tokenizer>>,
) -> Result<Model<F>> {
    let mut checked = BTreeMap::new();
    for (name, shape) in family.tensors() {
        let weight = weights.remove(&name).ok_or_else(|| {
            Error::new(
                Reason::MalformedFile,
                format!("tensor '{name}' is missing; the weights and config.json disagree"),
            )
        })?;
        check_shape(&name, weight.shape(), &shape)?;
        checked.insert(name, weight);
    }
    if let Some(name) = weights.keys().next() {
        return Err(unexpected(name));
    }
    if let Some(tokenizer) = &tokenizer
        && tokenizer.vocab_size() > family.vocab()
    {
        // Ids beyond the embeddings would only fail later, in the middle of a text.
        tracing::warn!(
            tokens = tokenizer.vocab_size(),
            embeddings = family.vocab(),
            "the tokenizer has tokens that the model has no embeddings for"
        );
    }
    Ok(Model { family, config, weights: checked, tokenizer })
}

/// Refuses a tensor whose shape is not the one the configuration asks for.
pub(super) fn check_shape(name: &str, shape: &[usize], wanted: &[usize]) -> Result<()> {
    if shape == wanted {
        return Ok(());
    }
    Err(Error::new(
        Reason::MalformedFile,
        format!("tensor '{name}' has shape {shape:?} where the configuration asks for {wanted:?}"),
    ))
}

/// The error for a tensor that the configuration does not ask for.
pub(super) fn unexpected(name: &str) -> Error {
    Error::new(
        Reason::UnsupportedModel,
        format!(
            "tensor {} is not part of the architecture that the configuration describes; leaving it \
             out would change the model",
            crate::formats::quoted(name)
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sorted_whatever_order_they_came_in() {
        let value: Value =
            serde_json::from_str(r#"{"b": {"z": 1, "a": [{"d": 2, "c": 3}]}, "a": 4}"#).unwrap();
        let text: String = pretty(&value).split_whitespace().collect();
        assert_eq!(text, r#"{"a":4,"b":{"a":[{"c":3,"d":2}],"z":1}}"#);
    }
}
