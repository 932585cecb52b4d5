//! Turns the tokenizer stored in a GGUF file into the `tokenizer.json` form, and back.
//!
//! GGUF keeps a table of tokens with their types, and either the merges of a byte-level BPE
//! (`gpt2`) or the scores of a SentencePiece BPE (`llama`). Scores become merges: SentencePiece
//! joins the two neighbours that make the token with the highest score, which is what a list of
//! all ways to make each token, best token first, says to the `tokenizers` crate.

mod export;
mod pre;

use std::collections::{HashMap, HashSet};

use serde::{Serialize, Serializer};
use serde_json::{Map, Value as Json, json};

use super::gguf::{Metadata, missing};
use crate::data::tokenizer::{Files, Tokenizer};
use crate::error::{Error, Reason, Result};

pub use export::to_gguf;
use pre::Kind;

/// No vocabulary comes near.
const MAX_TOKENS: usize = 1 << 21;
/// No token of a published vocabulary is longer; longer ones take no part in merges made from
/// scores, whose number grows with the length.
const MAX_MERGED_BYTES: usize = 512;
/// Where `tokenizer_config.json` keeps the name that the GGUF file had for its pre-tokenizer.
const PRE_FIELD: &str = "gguf_pre_tokenizer";

/// What ends a turn in the chat formats in use; files often name only the end of the text.
const END_OF_TURN: [&str; 8] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eot|>",
    "<|endoftext|>",
    "<|end_of_text|>",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
enum Type {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Type {
    fn from_number(number: i64) -> Result<Self> {
        Ok(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return Err(malformed(format!("token type {number} does not exist"))),
        })
    }

    fn special(self) -> bool {
        matches!(self, Self::Unknown | Self::Control)
    }
}

/// The tokenizer of a GGUF file, or nothing when it has none.
pub fn from_gguf(metadata: &Metadata) -> Result<Option<Tokenizer>> {
    let model = match metadata.text("tokenizer.ggml.model")? {
        None | Some("none" | "no_vocab") => return Ok(None),
        Some(model) => model,
    };
    let table = Table::read(metadata)?;
    let (mut json, defaults) = match model {
        "gpt2" => byte_level(&table, metadata)?,
        "llama" => sentencepiece(&table, metadata)?,
        other => {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                format!(
                    "the gguf file's tokenizer is of kind '{other}'; 'gpt2' (byte-level bpe) and \
                     'llama' (sentencepiece) are read: import the hugging face folder instead"
                ),
            ));
        }
    };
    // Equal tokenizers give equal bytes, whatever order this code makes them in.
    let file = &mut json;
    [&mut file.normalizer, &mut file.pre_tokenizer, &mut file.post_processor, &mut file.decoder]
        .into_iter()
        .chain(&mut file.added_tokens)
        .for_each(Json::sort_all_objects);
    let config = Json::Object(table.config(metadata, defaults)?);
    let generation = json!({"eos_token_id": table.ends(metadata)?});
    Tokenizer::from_files(Files {
        tokenizer: serde_json::to_string(&json).map_err(malformed)?,
        tokenizer_config: Some(&config.to_string()),
        generation_config: Some(&generation.to_string()),
        config: None,
        chat_template: None,
    })
    .map(Some)
}

/// What the kind of tokenizer says where the file is silent.
#[derive(Default)]
struct Defaults<'a> {
    add_bos: bool,
    pre: Option<&'a str>,
}

/// The tokens with their types, each text once.
struct Table<'a> {
    tokens: &'a [String],
    types: Vec<Type>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Table<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        let tokens = metadata.texts(TOKENS)?.ok_or_else(|| missing(TOKENS))?;
        if tokens.len() > MAX_TOKENS {
            return Err(malformed(format!(
                "the vocabulary has {} tokens, more than the {MAX_TOKENS} that are read",
                tokens.len()
            )));
        }
        let types = match metadata.integers("tokenizer.ggml.token_type")? {
            Some(types) if types.len() != tokens.len() => {
                return Err(malformed(format!(
                    "there are {} token types for {} tokens",
                    types.len(),
                    tokens.len()
                )));
            }
            Some(types) => types.into_iter().map(Type::from_number).collect::<Result<_>>()?,
            None => vec![Type::Normal; tokens.len()],
        };
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, (token, kind)) in (0u32..).zip(tokens.iter().zip(&types)) {
            // Filler rows have no text of their own; of equal texts the first is meant.
            if *kind != Type::Unused && !token.is_empty() {
                ids.entry(token.as_str()).or_insert(id);
            }
        }
        Ok(Self { tokens, types, ids })
    }

    fn has(&self, id: usize) -> bool {
        self.ids.get(self.tokens[id].as_str()) == Some(&(id as u32))
    }

    /// Ids in order, without filler rows.
    fn rows(&self) -> impl Iterator<Item = (u32, &'a str, Type)> {
        (0..self.tokens.len())
            .filter(|&id| self.has(id))
            .map(|id| (id as u32, self.tokens[id].as_str(), self.types[id]))
    }

    /// A normal token's id: what merges may use and make.
    fn word(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied().filter(|&id| self.types[id as usize] == Type::Normal)
    }

    /// The id under `key`, when it has a token.
    fn id(&self, metadata: &Metadata, key: &str) -> Result<Option<u32>> {
        let Some(id) = metadata.unsigned(&format!("tokenizer.ggml.{key}"))? else {
            return Ok(None);
        };
        match usize::try_from(id) {
            Ok(id) if id < self.tokens.len() => Ok(self.has(id).then_some(id as u32)),
            _ => {
                Err(malformed(format!("{key} is {id}, but there are {} tokens", self.tokens.len())))
            }
        }
    }

    /// Tokens that end generation: those the file names, and the turn marks it has.
    fn ends(&self, metadata: &Metadata) -> Result<Vec<u32>> {
        let mut ends = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            ends.extend(self.id(metadata, key)?);
        }
        ends.extend(END_OF_TURN.iter().filter_map(|text| {
            self.ids.get(text).copied().filter(|&id| self.types[id as usize] != Type::Normal)
        }));
        let mut seen = HashSet::new();
        ends.retain(|id| seen.insert(*id));
        Ok(ends)
    }

    /// The fields of `tokenizer_config.json`.
    fn config(&self, metadata: &Metadata, defaults: Defaults<'_>) -> Result<Map<String, Json>> {
        let mut config = Map::new();
        for (field, key) in [
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("pad_token", "padding_token_id"),
            ("unk_token", "unknown_token_id"),
        ] {
            if let Some(id) = self.id(metadata, key)? {
                config.insert(field.into(), self.tokens[id as usize].as_str().into());
            }
        }
        let add_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(defaults.add_bos);
        config.insert("add_bos_token".into(), add_bos.into());
        if let Some(template) = metadata.text("tokenizer.chat_template")? {
            config.insert("chat_template".into(), template.into());
        }
        if let Some(pre) = defaults.pre {
            config.insert(PRE_FIELD.into(), pre.into());
        }
        Ok(config)
    }

    fn added(&self) -> Vec<Json> {
        self.rows()
            .filter(|(_, _, kind)| kind.special() || *kind == Type::UserDefined)
            .map(|(id, text, kind)| {
                json!({
                    "id": id, "content": text, "special": kind.special(), "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                })
            })
            .collect()
    }

    /// Puts the start token in front of texts, for other programs that read the file.
    fn post_processor(&self, metadata: &Metadata, add_bos: bool) -> Result<Json> {
        let asked = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos);
        let Some(id) = self.id(metadata, "bos_token_id")?.filter(|_| asked) else {
            return Ok(Json::Null);
        };
        let bos = &self.tokens[id as usize];
        let start = json!({"SpecialToken": {"id": bos, "type_id": 0}});
        let text = |id: &str, kind: u32| json!({"Sequence": {"id": id, "type_id": kind}});
        Ok(json!({
            "type": "TemplateProcessing",
            "single": [start, text("A", 0)],
            "pair": [start, text("A", 0), text("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
        }))
    }
}

/// The parts of `tokenizer.json`, in its order.
#[derive(Serialize)]
struct File<'a> {
    version: &'static str,
    truncation: Json,
    padding: Json,
    added_tokens: Vec<Json>,
    normalizer: Json,
    pre_tokenizer: Json,
    post_processor: Json,
    decoder: Json,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'static str,
    dropout: Json,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Json,
    end_of_word_suffix: Json,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    #[serde(serialize_with = "as_map")]
    vocab: Vec<(&'a str, u32)>,
    merges: Vec<(&'a str, &'a str)>,
}

fn as_map<S: Serializer>(vocab: &[(&str, u32)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(vocab.iter().copied())
}

fn byte_level<'a>(table: &Table<'a>, metadata: &'a Metadata) -> Result<(File<'a>, Defaults<'a>)> {
    const MERGES: &str = "tokenizer.ggml.merges";
    let name = metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let kind = Kind::named(name).ok_or_else(|| {
        let known: Vec<_> = pre::KINDS.iter().flat_map(|kind| kind.names).copied().collect();
        Error::new(
            Reason::UnsupportedFormat,
            format!(
                "the gguf file's pre-tokenizer '{name}' is not known (known: {}); import the hugging \
                 face folder instead",
                known.join(", ")
            ),
        )
    })?;
    let merges = metadata.texts(MERGES)?.ok_or_else(|| missing(MERGES))?;
    let merges = merges
        .iter()
        .map(|merge| {
            let pair = merge.split_once(' ').filter(|(a, b)| {
                // Both halves and the whole must be tokens; the crate trusts that they are.
                table.ids.contains_key(a)
                    && table.ids.contains_key(b)
                    && table.ids.contains_key(format!("{a}{b}").as_str())
            });
            pair.ok_or_else(|| malformed(format!("the merge '{merge}' does not join two tokens")))
        })
        .collect::<Result<_>>()?;
    let file = File {
        version: "1.0",
        truncation: Json::Null,
        padding: Json::Null,
        added_tokens: table.added(),
        normalizer: if kind.nfc { json!({"type": "NFC"}) } else { Json::Null },
        pre_tokenizer: kind.pre_tokenizer(),
        post_processor: table.post_processor(metadata, kind.add_bos)?,
        decoder: json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
        }),
        model: Bpe {
            r#type: "BPE",
            dropout: Json::Null,
            unk_token: None,
            continuing_subword_prefix: Json::Null,
            end_of_word_suffix: Json::Null,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: kind.ignore_merges,
            vocab: table.rows().map(|(id, text, _)| (text, id)).collect(),
            merges,
        },
    };
    Ok((file, Defaults { add_bos: kind.add_bos, pre: Some(name) }))
}

fn sentencepiece<'a>(
    table: &Table<'a>,
    metadata: &'a Metadata,
) -> Result<(File<'a>, Defaults<'a>)> {
    const SCORES: &str = "tokenizer.ggml.scores";
    let scores = metadata.floats(SCORES)?.ok_or_else(|| missing(SCORES))?;
    if scores.len() != table.tokens.len() {
        return Err(malformed(format!(
            "there are {} scores for {} tokens",
            scores.len(),
            table.tokens.len()
        )));
    }
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizer = if prefix {
        let front = json!({"type": "Prepend", "prepend": SPACE});
        json!({"type": "Sequence", "normalizers": [front, space]})
    } else {
        space
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = match table.id(metadata, "unknown_token_id")? {
        Some(id) => Some(table.tokens[id as usize].as_str()),
        None => table.rows().find(|(_, _, kind)| *kind == Type::Unknown).map(|(_, text, _)| text),
    };
    let file = File {
        version: "1.0",
        truncation: Json::Null,
        padding: Json::Null,
        added_tokens: table.added(),
        normalizer,
        pre_tokenizer: Json::Null,
        post_processor: table.post_processor(metadata, true)?,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: Bpe {
            r#type: "BPE",
            dropout: Json::Null,
            unk_token: unknown,
            continuing_subword_prefix: Json::Null,
            end_of_word_suffix: Json::Null,
            fuse_unk: true,
            byte_fallback: table.types.contains(&Type::Byte),
            ignore_merges: false,
            vocab: table.rows().map(|(id, text, _)| (text, id)).collect(),
            merges: merges_from_scores(table, &scores),
        },
    };
    Ok((file, Defaults { add_bos: true, pre: None }))
}

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// Every way to make a token of two tokens, best score first; among equal scores the lower id, and
/// among the ways to make one token the more frequent (lower) left half first.
fn merges_from_scores<'a>(table: &Table<'a>, scores: &[f32]) -> Vec<(&'a str, &'a str)> {
    let mut words: Vec<_> = table
        .rows()
        .filter(|(_, text, kind)| *kind == Type::Normal && text.len() <= MAX_MERGED_BYTES)
        .collect();
    words.sort_by(|a, b| scores[b.0 as usize].total_cmp(&scores[a.0 as usize]).then(a.0.cmp(&b.0)));
    let mut merges = Vec::with_capacity(words.len() * 2);
    let mut ways = Vec::new();
    for (_, text, _) in words {
        ways.extend(text.char_indices().skip(1).filter_map(|(cut, _)| {
            let (left, right) = text.split_at(cut);
            Some(((table.word(left)?, table.word(right)?), (left, right)))
        }));
        ways.sort_unstable_by_key(|(ids, _)| *ids);
        merges.extend(ways.drain(..).map(|(_, way)| way));
    }
    merges
}

fn malformed(what: impl std::fmt::Display) -> Error {
    Error::new(
        Reason::MalformedFile,
        format!("the gguf file's tokenizer is damaged: {what}; convert the model again"),
    )
}

#[cfg(test)]
mod tests;
