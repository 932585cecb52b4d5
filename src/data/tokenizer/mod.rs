//! A model's tokenizer: text to ids and back, special tokens, and the chat template's source.

mod files;
mod parse;
mod pieces;
mod stream;
mod train;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Map, Value};
use tokenizers::tokenizer::pre_tokenizer::OffsetType;
use tokenizers::{AddedVocabulary, Model, OffsetReferential, PreTokenizer, Tokenizer as Inner};

use crate::error::{Error, Reason, Result};

pub use files::Files;
use pieces::Pieces;
pub use pieces::byte_token;
pub use stream::TextStream;

/// Bytes of a text that the crate gets at once.
const PIECE: usize = 256 << 10;
/// Bytes of a text whose tokens are wanted with their places.
const MAX_PLACED: usize = 2 << 20;
/// Ends of lines that are tried for a cut, and the bytes round each that must agree.
const CUTS: usize = 32;
const NEAR: usize = 2048;

/// Tokenizer with what a model's configuration says about its special tokens.
///
/// Texts become ids by the `tokenizers` crate; ids become bytes by a table built once, so that text
/// can be streamed in constant time per token.
pub struct Tokenizer {
    /// `tokenizer.json`, kept as it came so that exports lose nothing.
    pub json: String,
    /// Source of the chat template (Jinja), when the model has one.
    pub chat_template: Option<String>,
    /// Start token.
    pub bos: Option<u32>,
    /// Tokens that end generation.
    pub eos: Vec<u32>,
    /// Padding token.
    pub pad: Option<u32>,
    /// Whether text gets the start token in front.
    pub add_bos: bool,
    /// `tokenizer_config.json` as it came.
    config: Map<String, Value>,
    /// `generation_config.json` as it came.
    generation: Map<String, Value>,
    inner: Inner,
    /// The added tokens without the special ones: what text of strangers is matched against.
    plain: AddedVocabulary,
    pieces: Pieces,
    unknown: Option<u32>,
}

impl Tokenizer {
    /// Parses `tokenizer_json`; size and nesting are limited. Nothing is known of special tokens
    /// beyond what the file itself says: see [`Tokenizer::from_files`].
    pub fn new(tokenizer_json: String) -> Result<Self> {
        let (inner, unknown) = parse::read(&tokenizer_json)?;
        let pieces = Pieces::new(&inner)?;
        let mut plain = inner.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        Ok(Self {
            json: tokenizer_json,
            chat_template: None,
            bos: None,
            eos: Vec::new(),
            pad: None,
            add_bos: false,
            config: Map::new(),
            generation: Map::new(),
            inner,
            plain,
            pieces,
            unknown,
        })
    }

    /// Ids of `text`. Special tokens written in the text are recognised only when `parse_special`;
    /// the start token goes in front only when `add_bos`, and the model asks for one, and the text
    /// does not begin with it already.
    pub fn encode(&self, text: &str, add_bos: bool, parse_special: bool) -> Result<Vec<u32>> {
        let mut ids = contained(|| self.tokenize(text, parse_special))?;
        if !parse_special && ids.iter().any(|&id| self.is_forged(id)) {
            ids = self.spell_out(&ids)?;
        }
        match self.bos {
            Some(bos) if add_bos && self.add_bos && ids.first() != Some(&bos) => {
                ids.insert(0, bos);
            }
            _ => {}
        }
        Ok(ids)
    }

    /// Ids of `text` with the bytes of it that each stands for; special tokens are recognised. Of a token of
    /// a part of a character it is the whole character. This takes some hundred bytes for each byte of the text,
    /// so texts are limited.
    pub fn encode_with_places(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        if text.len() > MAX_PLACED {
            return Err(Error::new(
                Reason::TooLarge,
                format!("the text has more than {MAX_PLACED} bytes; split it"),
            ));
        }
        let encoding = contained(|| {
            let added = self.inner.get_added_vocabulary();
            let mut parts = added.extract_and_normalize(self.inner.get_normalizer(), text);
            if let Some(pre) = self.inner.get_pre_tokenizer() {
                pre.pre_tokenize(&mut parts)?;
            }
            parts.tokenize(|part| self.inner.get_model().tokenize(part.get()))?;
            parts.into_encoding(None, 0, OffsetType::Byte)
        })?;
        let places = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok((encoding.get_ids().to_vec(), places.collect()))
    }

    /// Text of `ids`; `skip_special` leaves special tokens out. Ids without a token give nothing,
    /// bytes that are no character give U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut stream = TextStream::new(self);
        if !skip_special {
            stream = stream.with_special();
        }
        let mut text = String::new();
        for &id in ids {
            stream.push_into(id, &mut text);
        }
        stream.finish_into(&mut text);
        Ok(text)
    }

    /// The token's own text, lossy where its bytes are no character; empty for ids without a token.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.pieces.bytes(id)).into_owned()
    }

    /// The token's bytes inside a text; empty for ids without a token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.bytes(id)
    }

    /// The token as the vocabulary spells it (`Ġthe`, `▁the`, `<|im_end|>`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token in the vocabulary's spelling.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Number of ids: one more than the largest.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Whether `id` stands for a special token (start, end, turn marks and the like).
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.is_special(id)
    }

    /// The token for what the vocabulary lacks.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    /// Texts of the special tokens.
    pub fn special_texts(&self) -> impl Iterator<Item = &str> {
        self.inner
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .values()
            .filter(|t| t.special)
            .map(|t| t.content.as_str())
    }

    /// Long texts go piece by piece: the crate keeps some hundred bytes for each byte of its input.
    fn tokenize(&self, text: &str, parse_special: bool) -> tokenizers::Result<Vec<u32>> {
        self.tokenize_in_pieces(text, parse_special, PIECE)
    }

    fn tokenize_in_pieces(
        &self,
        text: &str,
        parse_special: bool,
        piece: usize,
    ) -> tokenizers::Result<Vec<u32>> {
        let (mut ids, mut rest) = (Vec::new(), text);
        while rest.len() > piece {
            let Some(at) = self.cut(rest, parse_special, piece)? else { break };
            ids.extend(self.tokenize_whole(&rest[..at], parse_special)?);
            rest = &rest[at..];
        }
        ids.extend(self.tokenize_whole(rest, parse_special)?);
        Ok(ids)
    }

    /// Where a piece of at most `piece` bytes may end so that the tokens of the parts are those of the
    /// whole: after a line, if the lines round it say so. None for tokenizers to which the start of a
    /// text means something (those that put a space in front), and for texts without lines.
    fn cut(
        &self,
        text: &str,
        parse_special: bool,
        piece: usize,
    ) -> tokenizers::Result<Option<usize>> {
        let boundary = |at: usize| (at..=text.len()).find(|at| text.is_char_boundary(*at));
        let ends = text.as_bytes()[..piece].iter().enumerate().rev().filter(|(_, b)| **b == b'\n');
        for at in ends.map(|(i, _)| i + 1).take(CUTS) {
            let from = boundary(at.saturating_sub(NEAR)).unwrap_or_default();
            let to = boundary((at + NEAR).min(text.len())).unwrap_or(text.len());
            let mut parts = self.tokenize_whole(&text[from..at], parse_special)?;
            parts.extend(self.tokenize_whole(&text[at..to], parse_special)?);
            if parts == self.tokenize_whole(&text[from..to], parse_special)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// The crate's own steps without its post-processor: templates add what only callers may decide.
    fn tokenize_whole(&self, text: &str, parse_special: bool) -> tokenizers::Result<Vec<u32>> {
        let added = if parse_special { self.inner.get_added_vocabulary() } else { &self.plain };
        let mut parts = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(pre) = self.inner.get_pre_tokenizer() {
            pre.pre_tokenize(&mut parts)?;
        }
        let model = self.inner.get_model();
        let mut ids = Vec::new();
        // Words come again and again: where in `ids` the first of each went.
        let mut seen: HashMap<&str, Range<usize>> = HashMap::new();
        let splits = parts.get_splits(OffsetReferential::Normalized, OffsetType::None);
        for (part, _, added) in splits {
            if let Some(added) = added {
                ids.extend(added.iter().map(|t| t.id));
            } else if let Some(range) = seen.get(part) {
                ids.extend_from_within(range.clone());
            } else {
                let start = ids.len();
                ids.extend(model.tokenize(part)?.iter().map(|t| t.id));
                seen.insert(part, start..ids.len());
            }
        }
        Ok(ids)
    }

    /// Special although nobody asked for special tokens: some vocabularies spell them as words.
    fn is_forged(&self, id: u32) -> bool {
        self.pieces.is_special(id) && self.unknown != Some(id)
    }

    /// Replaces special tokens by the tokens of their characters.
    fn spell_out(&self, ids: &[u32]) -> Result<Vec<u32>> {
        let model = self.inner.get_model();
        let mut out = Vec::with_capacity(ids.len() + 16);
        for &id in ids {
            if !self.is_forged(id) {
                out.push(id);
                continue;
            }
            for c in self.token(id).unwrap_or_default().chars() {
                let tokens = contained(|| model.tokenize(c.encode_utf8(&mut [0; 4])))?;
                out.extend(tokens.iter().map(|t| t.id).filter(|&id| !self.is_forged(id)));
            }
        }
        Ok(out)
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("pad", &self.pad)
            .field("add_bos", &self.add_bos)
            .field("chat_template", &self.chat_template.is_some())
            .finish_non_exhaustive()
    }
}

/// Runs code of the `tokenizers` crate on data of strangers. It indexes and unwraps where a file
/// breaks its expectations; such a panic is the file's fault and must not take the thread down.
fn contained<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(malformed),
        Err(_) => Err(malformed("its parts contradict each other")),
    }
}

fn malformed(error: impl fmt::Display) -> Error {
    Error::new(
        Reason::MalformedFile,
        format!("tokenizer.json cannot be used: {error}; export the tokenizer again"),
    )
}

#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
