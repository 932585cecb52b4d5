//! The files that stand beside `tokenizer.json`, in and out.

use serde_json::{Map, Value, json};

use super::{Tokenizer, contained, malformed};
use crate::error::{Error, Reason, Result};

/// Special tokens round a text; templates in use have one or two on each side.
const MAX_AROUND: usize = 16;

/// Templates in use have up to some tens of kilobytes.
const MAX_TEMPLATE: usize = 1 << 20;

/// Texts of a model's files, as far as they exist.
#[derive(Debug, Clone, Default)]
pub struct Files<'a> {
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`: names of special tokens, chat template.
    pub tokenizer_config: Option<&'a str>,
    /// `generation_config.json`: ids that end generation.
    pub generation_config: Option<&'a str>,
    /// `config.json`: ids, where the others say nothing.
    pub config: Option<&'a Value>,
    /// `chat_template.jinja`, which goes before a template in `tokenizer_config.json`.
    pub chat_template: Option<String>,
}

impl Tokenizer {
    /// Builds a tokenizer from a model's files.
    pub fn from_files(files: Files<'_>) -> Result<Self> {
        let config = object("tokenizer_config.json", files.tokenizer_config)?;
        let generation = object("generation_config.json", files.generation_config)?;
        let model = files.config.and_then(Value::as_object).cloned().unwrap_or_default();
        let mut this = Self::new(files.tokenizer)?;
        let named = |key: &str| token_name(&config, key).and_then(|name| this.id(name));
        let numbered = |key: &str| {
            let known = |id: &u32| this.token(*id).is_some();
            [&generation, &model].into_iter().find_map(|m| ids(m.get(key)).into_iter().find(known))
        };
        // An explicit null says that there is none.
        let one = |name: &str, number: &str| match config.get(name) {
            Some(Value::Null) => None,
            _ => named(name).or_else(|| numbered(number)),
        };
        let bos = one("bos_token", "bos_token_id");
        let pad = one("pad_token", "pad_token_id");
        let mut eos: Vec<u32> = Vec::new();
        let listed = [&generation, &model].into_iter().flat_map(|m| ids(m.get("eos_token_id")));
        for id in listed.chain(named("eos_token")) {
            if !eos.contains(&id) && this.token(id).is_some() {
                eos.push(id);
            }
        }
        this.add_bos = match config.get("add_bos_token").and_then(Value::as_bool) {
            Some(asked) => asked && bos.is_some(),
            None => bos.is_some() && this.template_start()? == bos,
        };
        this.chat_template = match files.chat_template {
            Some(text) => Some(text),
            None => template(&config),
        };
        if this.chat_template.as_ref().is_some_and(|t| t.len() > MAX_TEMPLATE) {
            return Err(Error::new(
                Reason::TooLarge,
                format!("the chat template is larger than {MAX_TEMPLATE} bytes; shorten it"),
            ));
        }
        (this.bos, this.pad, this.eos) = (bos, pad, eos);
        (this.config, this.generation) = (config, generation);
        Ok(this)
    }

    /// `tokenizer_config.json`: what came, with what the public fields say now.
    pub fn tokenizer_config(&self) -> Value {
        let mut config = self.config.clone();
        let same = |key: &str, wanted: &[u32]| {
            token_name(&self.config, key)
                .and_then(|name| self.id(name))
                .is_some_and(|id| wanted.contains(&id))
        };
        for (key, wanted) in [
            ("bos_token", self.bos.as_slice()),
            ("eos_token", self.eos.as_slice()),
            ("pad_token", self.pad.as_slice()),
        ] {
            if !same(key, wanted) {
                let name = wanted.first().and_then(|&id| self.token(id));
                config.insert(key.into(), name.map_or(Value::Null, Value::String));
            }
        }
        config.insert("add_bos_token".into(), self.add_bos.into());
        match &self.chat_template {
            Some(text) => config.insert("chat_template".into(), text.as_str().into()),
            None => config.remove("chat_template"),
        };
        config.entry("tokenizer_class").or_insert_with(|| "PreTrainedTokenizerFast".into());
        Value::Object(config)
    }

    /// `generation_config.json`: what came, with what the public fields say now.
    pub fn generation_config(&self) -> Value {
        let mut generation = self.generation.clone();
        let eos = match self.eos.as_slice() {
            [] => None,
            [one] => Some(json!(one)),
            many => Some(json!(many)),
        };
        for (key, value) in [
            ("bos_token_id", self.bos.map(Value::from)),
            ("eos_token_id", eos),
            ("pad_token_id", self.pad.map(Value::from)),
        ] {
            match value {
                Some(value) => generation.insert(key.into(), value),
                None => generation.remove(key),
            };
        }
        Value::Object(generation)
    }

    /// A field of `tokenizer_config.json` as it came.
    pub fn config_field(&self, key: &str) -> Option<&Value> {
        self.config.get(key)
    }

    /// Text of a special token by its role (`bos_token`, `eos_token`, `pad_token`, `unk_token`), as
    /// chat templates ask for it.
    pub fn special_text(&self, role: &str) -> Option<String> {
        if let Some(name) = token_name(&self.config, role) {
            return Some(name.to_owned());
        }
        let id = match role {
            "bos_token" => self.bos,
            "eos_token" => self.eos.first().copied(),
            "pad_token" => self.pad,
            "unk_token" => self.unknown,
            _ => None,
        };
        id.and_then(|id| self.token(id))
    }

    /// The special tokens that `tokenizer.json` itself puts before and after a text: `[CLS]` and `[SEP]`
    /// of BERT.
    ///
    /// # Errors
    /// MALFORMED_FILE for a template that does more than that.
    pub fn around(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let encode = |special: bool| {
            contained(|| Ok(self.inner.encode_fast("a", special)?.get_ids().to_vec()))
        };
        let (plain, whole) = (encode(false)?, encode(true)?);
        let at = match plain.len() {
            0 => None,
            length => whole.windows(length).position(|part| part == plain),
        };
        match at {
            Some(at) if whole.len() <= plain.len() + MAX_AROUND => {
                Ok((whole[..at].to_vec(), whole[at + plain.len()..].to_vec()))
            }
            _ => Err(malformed("its template does not put a few tokens round a text")),
        }
    }

    /// What `tokenizer.json` itself puts between two texts that are read together, and the type of the second
    /// one's tokens. Where its template has nothing for two texts, what it puts after one, and type 1: as BERT
    /// was trained.
    ///
    /// # Errors
    /// MALFORMED_FILE for a template that does more than that.
    pub fn between(&self) -> Result<(Vec<u32>, u32)> {
        let (before, after) = self.around()?;
        let plain = contained(|| Ok(self.inner.encode_fast("a", false)?.get_ids().to_vec()))?;
        let (ids, types) = contained(|| {
            let pair = self.inner.encode_fast(("a", "a"), true)?;
            Ok((pair.get_ids().to_vec(), pair.get_type_ids().to_vec()))
        })?;
        let fixed = before.len() + 2 * plain.len() + after.len();
        let start = before.len() + plain.len();
        let whole = ids.len() > fixed
            && ids.len() <= fixed + MAX_AROUND
            && ids.starts_with(&[before.as_slice(), &plain].concat())
            && ids.ends_with(&[plain.as_slice(), &after].concat());
        if !whole || types.len() != ids.len() {
            return Ok((after, 1));
        }
        let second = ids.len() - after.len() - plain.len();
        Ok((ids[start..second].to_vec(), types[second]))
    }

    /// The token that the tokenizer says stands for a hidden one.
    pub fn mask(&self) -> Option<u32> {
        let named = token_name(&self.config, "mask_token").and_then(|name| self.id(name));
        named.or_else(|| self.id("[MASK]")).or_else(|| self.id("<mask>"))
    }

    /// The token that `tokenizer.json` itself puts in front of texts.
    fn template_start(&self) -> Result<Option<u32>> {
        let ids = contained(|| Ok(self.inner.encode_fast("a", true)?.get_ids().to_vec()))?;
        let plain = contained(|| self.tokenize("a", false))?;
        Ok(if ids.len() > plain.len() { ids.first().copied() } else { None })
    }
}

fn object(file: &str, text: Option<&str>) -> Result<Map<String, Value>> {
    let Some(text) = text else { return Ok(Map::new()) };
    serde_json::from_str(text).map_err(|error| {
        Error::new(
            Reason::MalformedFile,
            format!("{file} is not a json object: {error}; export the tokenizer again"),
        )
    })
}

/// A token's text, which files write bare or inside an object.
fn token_name<'m>(config: &'m Map<String, Value>, key: &str) -> Option<&'m str> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// One id or a list of ids.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(many)) => many.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The template of `tokenizer_config.json`: a text, or a list of named texts.
fn template(config: &Map<String, Value>) -> Option<String> {
    let value = config.get("chat_template")?;
    let named = |name: &str| value.as_array()?.iter().find(|t| t["name"] == name);
    let text = match value {
        Value::String(text) => Some(text.as_str()),
        Value::Array(many) => {
            named("default").or_else(|| many.first()).and_then(|t| t["template"].as_str())
        }
        _ => None,
    };
    text.map(str::to_owned)
}
