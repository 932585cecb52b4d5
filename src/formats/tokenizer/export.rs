//! From a tokenizer to the metadata of a GGUF file.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::pre::Kind;
use super::{PRE_FIELD, SPACE, Type};
use crate::data::tokenizer::{Tokenizer, byte_token};
use crate::error::{Error, Reason, Result};
use crate::formats::gguf::{Array, Value};

/// The `tokenizer.*` metadata of a GGUF file for a model with `vocab` embedding rows. Byte-level BPE
/// with a known pre-tokenizer and SentencePiece BPE can be written; others are MODEL_UNSUITABLE.
pub fn to_gguf(tokenizer: &Tokenizer, vocab: usize) -> Result<Vec<(String, Value)>> {
    let json: Json = serde_json::from_str(&tokenizer.json)
        .map_err(|e| Error::internal(format!("tokenizer.json was read before: {e}")))?;
    if tokenizer.vocab_size() > vocab {
        return Err(unsuitable(format!(
            "it has {} tokens but the model has only {vocab} embeddings",
            tokenizer.vocab_size()
        )));
    }
    let form = Form::of(&json, tokenizer)?;
    let merges = merges(&json)?;
    let mut out = Vec::new();
    let mut set = |key: &str, value: Value| out.push((format!("tokenizer.ggml.{key}"), value));

    let unknown = tokenizer.special_text("unk_token").and_then(|t| tokenizer.id(&t));
    let added: HashMap<u64, &Json> = json["added_tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|t| Some((tokenizer.id(t["content"].as_str()?)?.into(), t)))
        .collect();
    let (mut tokens, mut types) = (Vec::with_capacity(vocab), Vec::with_capacity(vocab));
    for id in 0..vocab as u32 {
        let Some(token) = tokenizer.token(id) else {
            tokens.push(format!("[PAD{id}]"));
            types.push(Type::Unused as i32);
            continue;
        };
        let kind = match added.get(&u64::from(id)) {
            Some(t) if t["special"] == true => match form {
                Form::SentencePiece { .. } if unknown == Some(id) => Type::Unknown,
                _ => Type::Control,
            },
            Some(_) => Type::UserDefined,
            None if matches!(form, Form::SentencePiece { .. }) && byte_token(&token).is_some() => {
                Type::Byte
            }
            None => Type::Normal,
        };
        tokens.push(token);
        types.push(kind as i32);
    }

    match form {
        Form::ByteLevel { pre } => {
            set("model", Value::String("gpt2".into()));
            set("pre", Value::String(pre));
            let joined = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
            set("merges", Value::Array(Array::String(joined)));
        }
        Form::SentencePiece { prefix } => {
            set("model", Value::String("llama".into()));
            set("pre", Value::String("default".into()));
            set("scores", Value::Array(Array::F32(scores(tokenizer, &merges, vocab))));
            set("add_space_prefix", Value::Bool(prefix));
        }
    }
    set("tokens", Value::Array(Array::String(tokens)));
    set("token_type", Value::Array(Array::I32(types)));
    let ids = [
        ("bos_token_id", tokenizer.bos),
        ("eos_token_id", tokenizer.eos.first().copied()),
        ("eot_token_id", tokenizer.eos.get(1).copied()),
        ("padding_token_id", tokenizer.pad),
        ("unknown_token_id", unknown),
    ];
    for (key, id) in ids {
        if let Some(id) = id {
            set(key, Value::U32(id));
        }
    }
    set("add_bos_token", Value::Bool(tokenizer.add_bos));
    if let Some(template) = &tokenizer.chat_template {
        out.push(("tokenizer.chat_template".into(), Value::String(template.clone())));
    }
    Ok(out)
}

enum Form {
    ByteLevel { pre: String },
    SentencePiece { prefix: bool },
}

impl Form {
    fn of(json: &Json, tokenizer: &Tokenizer) -> Result<Self> {
        let (model, normalizer, pre) =
            (&json["model"], &json["normalizer"], &json["pre_tokenizer"]);
        if model["merges"].as_array().is_none() {
            let kind = model["type"].as_str().unwrap_or("no named kind");
            return Err(unsuitable(format!("it is of {kind}, not bpe")));
        }
        if json["decoder"]["type"] == "ByteLevel" {
            // Several names cut alike; the one that came is the one that goes.
            let kept = tokenizer.config_field(PRE_FIELD).and_then(Json::as_str);
            let kind = Kind::detect(pre, normalizer);
            return match (kept, kind) {
                (Some(name), _) if Kind::named(name).is_some() => {
                    Ok(Self::ByteLevel { pre: name.into() })
                }
                (_, Some(kind)) => Ok(Self::ByteLevel { pre: kind.names[0].into() }),
                _ => Err(unsuitable("no gguf pre-tokenizer cuts text as it does")),
            };
        }
        let mut steps = match &normalizer["normalizers"] {
            Json::Array(steps) => steps.iter().collect(),
            _ => vec![normalizer],
        };
        // Metaspace does as a pre-tokenizer what the two normalizers do.
        if pre["type"] == "Metaspace" && pre["replacement"] == SPACE && normalizer.is_null() {
            return Ok(Self::SentencePiece { prefix: pre["prepend_scheme"] != "never" });
        }
        let prefix = steps[0]["type"] == "Prepend" && steps[0]["prepend"] == SPACE;
        if prefix {
            steps.remove(0);
        }
        match steps.as_slice() {
            [only]
                if only["type"] == "Replace"
                    && only["pattern"]["String"] == " "
                    && only["content"] == SPACE =>
            {
                Ok(Self::SentencePiece { prefix })
            }
            _ => Err(unsuitable("it normalises text in a way that gguf cannot say")),
        }
    }
}

/// Merges in either of the two forms that tokenizer.json has for them.
fn merges(json: &Json) -> Result<Vec<(&str, &str)>> {
    json["model"]["merges"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|merge| match merge {
            Json::String(text) => text.split_once(' '),
            Json::Array(pair) => match pair.as_slice() {
                [Json::String(a), Json::String(b)] => Some((a.as_str(), b.as_str())),
                _ => None,
            },
            _ => None,
        })
        .map(|merge| merge.ok_or_else(|| unsuitable("its merges have an unknown form")))
        .collect()
}

/// Scores that make SentencePiece join in the order of `merges`: the earlier a token can be made,
/// the higher. What no merge makes comes last.
fn scores(tokenizer: &Tokenizer, merges: &[(&str, &str)], vocab: usize) -> Vec<f32> {
    let mut scores = vec![None; vocab];
    let mut rank = 0u32;
    for (a, b) in merges {
        let Some(id) = tokenizer.id(&format!("{a}{b}")) else { continue };
        let slot = &mut scores[id as usize];
        if slot.is_none() {
            *slot = Some(-(rank as f32));
            rank += 1;
        }
    }
    scores.into_iter().map(|score| score.unwrap_or(-(rank as f32) - 1.0)).collect()
}

fn unsuitable(what: impl std::fmt::Display) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!(
            "the model's tokenizer cannot be written to gguf: {what}; export the hugging face folder \
             instead"
        ),
    )
}
