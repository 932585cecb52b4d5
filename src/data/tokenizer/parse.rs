//! From the text of `tokenizer.json` to the `tokenizers` crate's parts.
//!
//! The crate's own reader buffers the model three times over and trusts merges to be sound; BPE,
//! which is nearly every language model, is therefore read and checked here. Other kinds of model
//! go through the crate's reader.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, Tokenizer as Inner,
};

use super::{contained, malformed};
use crate::error::{Error, Reason, Result};

/// Larger than any tokenizer.json published so far (the largest are near 35 MB).
const MAX_BYTES: usize = 256 << 20;
/// Characters of a word of word pieces; files in use say 100 or 200.
const MAX_WORD: usize = 512;
/// Nesting of the known parts stays under ten.
const MAX_DEPTH: usize = 32;

/// Reads `json`. Gives the tokenizer and, where the vocabulary has one, the id of the token that
/// stands for what it cannot spell.
pub fn read(json: &str) -> Result<(Inner, Option<u32>)> {
    if json.len() > MAX_BYTES {
        return Err(Error::new(
            Reason::TooLarge,
            format!(
                "tokenizer.json has {} bytes, more than the {MAX_BYTES} that are read; check that it \
                 is the right file",
                json.len()
            ),
        ));
    }
    if depth(json) > MAX_DEPTH {
        return Err(malformed(format!("it nests deeper than {MAX_DEPTH} levels")));
    }
    let file: File = contained(|| Ok(serde_json::from_str(json)?))?;
    let unk_id = file.model.unk_id;
    let mut inner = match file.model.vocab {
        Entries::Map(_) if file.model.merges.is_some() => file.build()?,
        _ => contained(|| Inner::from_str(json))?,
    };
    // Cutting and padding are the callers' business: a file must not shorten their texts.
    inner.with_truncation(None).map_err(malformed)?.with_padding(None);
    let unknown = match inner.get_model() {
        ModelWrapper::BPE(model) => model.unk_token.as_deref(),
        ModelWrapper::WordPiece(model) => Some(model.unk_token.as_str()),
        ModelWrapper::WordLevel(model) => Some(model.unk_token.as_str()),
        ModelWrapper::Unigram(_) => None,
    };
    let unknown = unknown.map_or(unk_id, |token| inner.token_to_id(token));
    if let ModelWrapper::WordPiece(model) = inner.get_model() {
        // Words are tried at every length from every start, which takes the cube of their length.
        if model.max_input_chars_per_word > MAX_WORD {
            return Err(malformed(format!(
                "max_input_chars_per_word is {}, more than the {MAX_WORD} that are taken",
                model.max_input_chars_per_word
            )));
        }
        if unknown.is_none() {
            return Err(malformed(format!(
                "the unknown token '{:.40}' has no id",
                model.unk_token
            )));
        }
    }
    Ok((inner, unknown))
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Option<NormalizerWrapper>,
    #[serde(default)]
    pre_tokenizer: Option<PreTokenizerWrapper>,
    #[serde(default)]
    post_processor: Option<PostProcessorWrapper>,
    #[serde(default)]
    decoder: Option<DecoderWrapper>,
    model: Model,
}

/// The fields of all kinds of model that matter here. A dropout is not read: the same text must
/// always give the same ids.
#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    unk_id: Option<u32>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
    #[serde(default)]
    vocab: Entries,
    #[serde(default)]
    merges: Option<Vec<Merge>>,
}

impl File {
    fn build(self) -> Result<Inner> {
        let model = self.model.bpe()?;
        let mut inner = Inner::new(model);
        inner.with_normalizer(self.normalizer).map_err(malformed)?;
        inner.with_pre_tokenizer(self.pre_tokenizer);
        inner.with_post_processor(self.post_processor);
        inner.with_decoder(self.decoder);
        contained(|| inner.add_tokens(self.added_tokens))?;
        Ok(inner)
    }
}

impl Model {
    fn bpe(self) -> Result<BPE> {
        let Entries::Map(vocab) = self.vocab else {
            return Err(malformed("a bpe without a map of tokens"));
        };
        if self.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                "tokenizer.json is a bpe with a continuing_subword_prefix, which is not read; convert \
                 it to byte-level bpe or sentencepiece",
            ));
        }
        let mut whole = String::new();
        let merges: Vec<_> = self.merges.into_iter().flatten().map(|Merge(a, b)| (a, b)).collect();
        for (a, b) in &merges {
            whole.clear();
            whole.push_str(a);
            whole.push_str(b);
            // The crate indexes by what it finds here.
            if ![a, b, &whole].into_iter().all(|token| vocab.contains_key(token)) {
                return Err(malformed(format!("the merge of '{a}' and '{b}' joins no two tokens")));
            }
        }
        // The crate keeps its cache per thread and never gives it back; `encode` has its own.
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .cache_capacity(0)
            .fuse_unk(self.fuse_unk.unwrap_or_default())
            .byte_fallback(self.byte_fallback.unwrap_or_default())
            .ignore_merges(self.ignore_merges.unwrap_or_default());
        if let Some(token) = self.unk_token {
            builder = builder.unk_token(token);
        }
        if let Some(suffix) = self.end_of_word_suffix {
            builder = builder.end_of_word_suffix(suffix);
        }
        contained(|| builder.build())
    }
}

/// A vocabulary: a map of tokens to ids, or something that only the crate reads.
#[derive(Default)]
enum Entries {
    Map(Vocab),
    #[default]
    Other,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map or a list of tokens")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Entries, A::Error> {
                Vocab::deserialize(de::value::MapAccessDeserializer::new(map)).map(Entries::Map)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entries, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Entries::Other)
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

/// A merge: `"a b"` in older files, `["a", "b"]` in newer ones.
struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Merge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Merge, E> {
                match text.split_once(' ') {
                    Some((a, b)) if !b.contains(' ') => Ok(Merge(a.into(), b.into())),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merge, A::Error> {
                let (a, b) = (list.next_element()?, list.next_element()?);
                match (a, b, list.next_element::<IgnoredAny>()?) {
                    (Some(a), Some(b), None) => Ok(Merge(a, b)),
                    _ => Err(de::Error::invalid_length(2, &self)),
                }
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

/// Deepest nesting of brackets outside strings.
fn depth(json: &str) -> usize {
    let (mut now, mut most) = (0usize, 0usize);
    let (mut quoted, mut escaped) = (false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'{' | b'[' if !quoted => {
                now += 1;
                most = most.max(now);
            }
            b'}' | b']' if !quoted => now = now.saturating_sub(1),
            _ => {}
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(json: &str) -> Reason {
        read(json).map(|_| ()).unwrap_err().reason()
    }

    #[test]
    fn depth_counts_brackets_outside_strings() {
        assert_eq!(depth("1"), 0);
        assert_eq!(depth(r#"{"a":[{"b":"[[[\"[[["}],"c":[]}"#), 3);
    }

    #[test]
    fn hostile_files_are_refused() {
        let deep = format!("{{\"model\":{}{}}}", "[".repeat(100), "]".repeat(100));
        assert_eq!(refusal(&deep), Reason::MalformedFile);
        let prefixed = r#"{"model":{"vocab":{},"merges":[],"continuing_subword_prefix":"é"}}"#;
        assert_eq!(refusal(prefixed), Reason::UnsupportedFormat);
        for model in [
            r#"{"vocab":{"a":0,"b":1},"merges":["a b"]}"#,
            r#"{"vocab":{"a":0},"merges":[["a","a","a"]]}"#,
            r#"{"vocab":{"a":0},"merges":["a"]}"#,
            r#"{"vocab":{"a":-1},"merges":[]}"#,
            r#"{"vocab":3,"merges":[]}"#,
            r#"{"type":"Unigram","vocab":[["a",0.0]],"unk_id":7}"#,
            r###"{"type":"WordPiece","vocab":{"a":0},"unk_token":"?","continuing_subword_prefix":"##",
                "max_input_chars_per_word":100}"###,
            r###"{"type":"WordPiece","vocab":{"?":0},"unk_token":"?","continuing_subword_prefix":"##",
                "max_input_chars_per_word":100000}"###,
            r###"{"type":"WordPiece","vocab":{"?":-1},"unk_token":"?","continuing_subword_prefix":"##",
                "max_input_chars_per_word":100}"###,
            r###"{"type":"WordPiece","vocab":["?"],"unk_token":"?","continuing_subword_prefix":"##",
                "max_input_chars_per_word":100}"###,
            "{}",
            "[]",
        ] {
            assert_eq!(
                refusal(&format!("{{\"model\":{model}}}")),
                Reason::MalformedFile,
                "{model}"
            );
        }
    }

    #[test]
    fn both_forms_of_merges_say_the_same() {
        for merges in [r#"["a b"]"#, r#"[["a","b"]]"#] {
            let json =
                format!(r#"{{"model":{{"vocab":{{"a":0,"b":1,"ab":2}},"merges":{merges}}}}}"#);
            let (inner, unknown) = read(&json).unwrap();
            assert_eq!(inner.encode_fast("abab", false).unwrap().get_ids(), [2, 2]);
            assert_eq!(unknown, None);
        }
    }
}
