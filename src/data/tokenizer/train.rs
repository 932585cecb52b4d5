//! Tokenizers made here: one token a byte, or byte-level BPE trained on a text.

use std::collections::HashSet;

use serde_json::{Map, Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::pre_tokenizer::OffsetType;
use tokenizers::{OffsetReferential, PreTokenizedString, PreTokenizer as _, Trainer as _};

use super::{Tokenizer, contained};
use crate::error::{Error, Result};

/// Tokens of a vocabulary, at most.
const MAX_VOCABULARY: usize = 1 << 17;

/// Bytes of text that a vocabulary is made from.
const MAX_TEXT: usize = 64 << 20;

/// Longest token in letters: longer ones are rare and whole phrases.
const MAX_TOKEN: usize = 24;

impl Tokenizer {
    /// One token a byte, its number being the byte. No special tokens.
    ///
    /// # Errors
    /// INTERNAL only.
    pub fn bytes() -> Result<Self> {
        let vocabulary: Map<String, Value> =
            (0..=255u8).map(|byte| (letter(byte).to_string(), byte.into())).collect();
        Self::new(file(&json!(vocabulary), &json!([])))
    }

    /// Byte-level BPE of `size` tokens, trained on a text (its beginning, where it is very long). No special
    /// tokens.
    ///
    /// # Errors
    /// `INVALID_FIELD` for sizes outside 256 to 131072.
    pub fn train(text: &str, size: usize) -> Result<Self> {
        if !(256..=MAX_VOCABULARY).contains(&size) {
            let problem = format!("{size} is outside 256 to {MAX_VOCABULARY}");
            return Err(Error::field("vocab_size", problem));
        }
        let end = (0..=text.len().min(MAX_TEXT)).rev().find(|at| text.is_char_boundary(*at));
        let text = &text[..end.unwrap_or_default()];
        let split = ByteLevel::new(false, false, true);
        let mut trainer = BpeTrainerBuilder::new()
            .vocab_size(size)
            .show_progress(false)
            .initial_alphabet((0..=255).map(letter).collect::<HashSet<char>>())
            .max_token_length(Some(MAX_TOKEN))
            .build();
        let words = |line: &str| {
            let mut parts = PreTokenizedString::from(line);
            split.pre_tokenize(&mut parts)?;
            let splits = parts.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
            Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).collect())
        };
        let model = contained(|| {
            trainer.feed(text.split_inclusive('\n'), words)?;
            let mut model = BPE::default();
            trainer.train(&mut model)?;
            Ok(serde_json::to_value(&model)?)
        })?;
        Self::new(file(&model["vocab"], &model["merges"]))
    }
}

/// `tokenizer.json` of byte-level BPE.
fn file(vocabulary: &Value, merges: &Value) -> String {
    let level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true,
    });
    let mut file = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": merges },
    });
    file.sort_all_objects();
    file.to_string()
}

/// The letter of byte-level vocabularies that stands for a byte: itself where it is printable, else the next
/// one from U+0100.
fn letter(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_their_own_numbers() {
        let tokenizer = Tokenizer::bytes().unwrap();
        assert_eq!(tokenizer.vocab_size(), 256);
        let text = "Zeile 1\n\tÄ€ \u{1F600}\0";
        let ids = tokenizer.encode(text, false, false).unwrap();
        assert_eq!(ids, text.bytes().map(u32::from).collect::<Vec<_>>());
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    }

    #[test]
    fn frequent_pairs_become_tokens() {
        let text = "the cat and the hat and the bat\n".repeat(50) + "rare ü\n";
        let tokenizer = Tokenizer::train(&text, 270).unwrap();
        assert_eq!(tokenizer.vocab_size(), 270);
        let ids = tokenizer.encode(&text, false, false).unwrap();
        assert!(ids.len() < text.len() / 2, "{} tokens of {} bytes", ids.len(), text.len());
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        // The same text gives the same file.
        assert_eq!(Tokenizer::train(&text, 270).unwrap().json, tokenizer.json);
        assert!(Tokenizer::train(&text, 255).is_err());
    }
}
