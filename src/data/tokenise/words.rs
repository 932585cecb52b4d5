//! Words of a sentence as pieces.

use std::collections::HashMap;

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};

/// Words that are remembered.
const MAX_WORDS: usize = 1 << 16;

/// Which pieces of a word get its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TagPieces {
    /// The first; what the model says of the others does not count.
    #[default]
    First,
    /// All of them.
    All,
}

/// Pieces of words as they have them inside a sentence. Text comes with spaces between its words, and
/// tokenizers differ in what they make of these.
#[derive(Debug, Default)]
pub struct Words {
    /// Whether a word that follows another gets a space in front; found out at the first word.
    spaced: Option<bool>,
    known: HashMap<String, Vec<u32>>,
}

impl Words {
    /// The pieces of a word: a token for an unknown word at least, unless the tokenizer takes all its
    /// characters away and has none.
    pub fn pieces(&mut self, tokenizer: &Tokenizer, word: &str, first: bool) -> Result<&[u32]> {
        let spaced = match self.spaced {
            Some(spaced) => spaced,
            None => *self.spaced.insert(spaced(tokenizer)?),
        };
        let word = word.trim();
        let key = if spaced && !first { format!(" {word}") } else { word.to_owned() };
        if !self.known.contains_key(&key) {
            if self.known.len() == MAX_WORDS {
                self.known.clear();
            }
            let mut ids = tokenizer.encode(&key, false, false)?;
            if ids.is_empty() {
                ids.extend(tokenizer.unknown());
            }
            self.known.insert(key.clone(), ids);
        }
        Ok(self.known.get(&key).map(Vec::as_slice).unwrap_or_default())
    }
}

/// How two words of a text are two texts: with a space before the second, or without, where the
/// tokenizer puts one itself or does not care.
fn spaced(tokenizer: &Tokenizer) -> Result<bool> {
    let encode = |text: &str| tokenizer.encode(text, false, false);
    let both = encode("a a")?;
    for (spaced, second) in [(false, "a"), (true, " a")] {
        if both == [encode("a")?, encode(second)?].concat() {
            return Ok(spaced);
        }
    }
    Err(Error::new(
        Reason::ModelUnsuitable,
        "the model's tokenizer joins words, so that none can have a tag of its own; choose another model",
    ))
}
