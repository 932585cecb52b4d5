//! The bytes that each token stands for, compiled once from the tokenizer's decoder.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer as Inner;

use super::malformed;
use crate::error::{Error, Reason, Result};

/// No vocabulary comes near; an id beyond it would make the table absurdly large.
const MAX_ID: u32 = 1 << 22;

/// Bytes of every token, in one block each for the tokens of a text and for its first one.
pub struct Pieces {
    rest: Table,
    /// Present when a text's first token is written differently (no space in front, for example).
    first: Option<Table>,
    special: Vec<bool>,
    strip: Strip,
}

/// Characters that the decoder takes from the front of a whole text.
#[derive(Debug, Clone, Copy, Default)]
pub struct Strip {
    pub byte: u8,
    pub count: usize,
}

#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Table {
    fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(self.bytes.len());
    }

    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..end]
    }
}

impl Pieces {
    /// Compiles the decoder of `inner`; decoders that need more than one token at a time are refused.
    pub fn new(inner: &Inner) -> Result<Self> {
        let decoder = serde_json::to_value(inner.get_decoder()).map_err(malformed)?;
        let decoder = Decoder::from_json(&decoder)?;
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let mut tokens = vec![None; 0];
        for (token, id) in inner.get_vocab(true) {
            if id >= MAX_ID {
                return Err(malformed(format!("token id {id} is beyond {MAX_ID}")));
            }
            let slot = id as usize;
            if slot >= tokens.len() {
                tokens.resize(slot + 1, None);
            }
            tokens[slot] = Some(token);
        }
        let (mut rest, mut first) = (Table::default(), Table::default());
        let mut special = Vec::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            let added = added.get(&(id as u32));
            special.push(added.is_some_and(|t| t.special));
            let text = added.map(|t| t.content.as_str()).or(token.as_deref());
            let Some(text) = text else {
                rest.push(&[]);
                first.push(&[]);
                continue;
            };
            rest.push(&decoder.piece(text, added.is_some(), false));
            first.push(&decoder.piece(text, added.is_some(), true));
        }
        let first = (first.bytes != rest.bytes || first.ends != rest.ends).then_some(first);
        Ok(Self { rest, first, special, strip: decoder.strip() })
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.special.len()
    }

    /// Bytes of `id` inside a text; empty for ids without a token.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.rest.get(id)
    }

    /// Bytes of `id` as the first token of a text.
    pub fn first_bytes(&self, id: u32) -> &[u8] {
        self.first.as_ref().unwrap_or(&self.rest).get(id)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    pub fn strip(&self) -> Strip {
        self.strip
    }
}

/// The decoders whose result is made of one piece per token.
enum Decoder {
    /// Tokens joined by spaces (no decoder at all).
    Spaced,
    /// Each character stands for a byte.
    ByteLevel(HashMap<char, u8>),
    /// Replacements, `<0x41>` as bytes, and characters taken from the front of the text.
    Steps { replace: Vec<(String, String)>, byte_fallback: bool, strip: Strip },
    /// A mark for spaces; a first token loses it.
    Metaspace { mark: char, keep_first: bool },
    /// Words apart, except where a token continues one.
    WordPiece { prefix: String, cleanup: bool },
}

/// The fields of the decoders' JSON form.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum Json {
    ByteLevel {},
    ByteFallback {},
    Fuse {},
    Replace { pattern: Pattern, content: String },
    Strip { content: char, start: usize, stop: usize },
    Metaspace { replacement: char, prepend_scheme: String },
    WordPiece { prefix: String, cleanup: bool },
    Sequence { decoders: Vec<Value> },
}

#[derive(Deserialize)]
enum Pattern {
    String(String),
}

impl Decoder {
    fn from_json(json: &Value) -> Result<Self> {
        if json.is_null() {
            return Ok(Self::Spaced);
        }
        let unsupported = || {
            let kind = json["type"].as_str().unwrap_or("of no type");
            Error::new(
                Reason::UnsupportedFormat,
                format!(
                    "tokenizer.json has a decoder ({kind}) whose text cannot be streamed; byte-level, \
                     sentencepiece and wordpiece decoders are read"
                ),
            )
        };
        let parse = |json: &Value| Json::deserialize(json).map_err(|_| unsupported());
        let steps = match parse(json)? {
            Json::Sequence { decoders } => decoders.iter().map(parse).collect::<Result<_>>()?,
            one => vec![one],
        };
        if let [one] = steps.as_slice() {
            match one {
                Json::ByteLevel {} => return Ok(Self::ByteLevel(byte_alphabet())),
                Json::Metaspace { replacement, prepend_scheme } => {
                    return Ok(Self::Metaspace {
                        mark: *replacement,
                        keep_first: prepend_scheme == "never",
                    });
                }
                Json::WordPiece { prefix, cleanup } => {
                    return Ok(Self::WordPiece { prefix: prefix.clone(), cleanup: *cleanup });
                }
                _ => {}
            }
        }
        let (mut replace, mut byte_fallback, mut fused) = (Vec::new(), false, false);
        let mut strip = Strip::default();
        for step in steps {
            match step {
                Json::Replace { pattern: Pattern::String(from), content } if !fused => {
                    replace.push((from, content));
                }
                Json::ByteFallback {} if !fused => byte_fallback = true,
                Json::Fuse {} => fused = true,
                Json::Strip { content, start, stop: 0 }
                    if fused && content.is_ascii() && strip.count == 0 =>
                {
                    strip = Strip { byte: content as u8, count: start };
                }
                _ => return Err(unsupported()),
            }
        }
        Ok(Self::Steps { replace, byte_fallback, strip })
    }

    fn strip(&self) -> Strip {
        match self {
            Self::Steps { strip, .. } => *strip,
            _ => Strip::default(),
        }
    }

    /// Bytes of `token`, whose text is literal when it was `added` to the vocabulary.
    fn piece(&self, token: &str, added: bool, first: bool) -> Vec<u8> {
        match self {
            Self::Spaced if first => token.into(),
            Self::Spaced => format!(" {token}").into(),
            Self::ByteLevel(_) if added => token.into(),
            Self::ByteLevel(alphabet) => token
                .chars()
                .map(|c| alphabet.get(&c).copied())
                .collect::<Option<_>>()
                .unwrap_or_else(|| token.into()),
            Self::Steps { replace, byte_fallback, .. } => {
                let text = replace
                    .iter()
                    .fold(token.to_owned(), |text, (from, to)| text.replace(from.as_str(), to));
                match byte_token(&text) {
                    Some(byte) if *byte_fallback => vec![byte],
                    _ => text.into(),
                }
            }
            Self::Metaspace { mark, keep_first } => {
                let space = if first && !keep_first { "" } else { " " };
                token.replace(*mark, space).into()
            }
            Self::WordPiece { prefix, cleanup } => {
                let text = match token.strip_prefix(prefix.as_str()) {
                    _ if first => token.to_owned(),
                    Some(rest) => rest.to_owned(),
                    None => format!(" {token}"),
                };
                if *cleanup { clean(&text) } else { text }.into()
            }
        }
    }
}

/// The byte that `<0x41>` names.
pub fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let plain = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The character that stands for each byte in byte-level vocabularies: printable Latin-1 stands for
/// itself, the other 68 bytes for the characters from U+0100 on.
pub fn byte_chars() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap_or_default()
            }
        }
    })
}

fn byte_alphabet() -> HashMap<char, u8> {
    byte_chars().into_iter().zip(0..=u8::MAX).collect()
}

/// What the WordPiece decoder tidies in each token.
fn clean(text: &str) -> String {
    const RULES: [(&str, &str); 11] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" do not", " don't"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    RULES.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}
