//! A model's tokenizer: text to ids and back, special tokens, and the chat template's source.

use crate::error::Result;

/// Tokenizer with what a model's configuration says about its special tokens.
#[derive(Debug)]
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
}

impl Tokenizer {
    /// Parses `tokenizer_json`; size and nesting are limited.
    pub fn new(_tokenizer_json: String) -> Result<Self> {
        todo!()
    }
    /// Ids of `text`. Special tokens written in the text are recognised only when `parse_special`;
    /// the start token goes in front only when `add_bos`, and the model asks for one.
    pub fn encode(&self, _text: &str, _add_bos: bool, _parse_special: bool) -> Result<Vec<u32>> {
        todo!()
    }
    /// Text of `ids`; `skip_special` leaves special tokens out.
    pub fn decode(&self, _ids: &[u32], _skip_special: bool) -> Result<String> {
        todo!()
    }
    /// The token's own text, lossy where its bytes are no character.
    pub fn token_text(&self, _id: u32) -> String {
        todo!()
    }
    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        todo!()
    }
}

/// Turns a stream of ids into text piece by piece without ever cutting a character.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer }
    }
    /// The text that `id` completes; empty while a character is open.
    pub fn push(&mut self, _id: u32) -> Result<String> {
        let _ = self.tokenizer;
        todo!()
    }
    /// What is left at the end (incomplete characters become U+FFFD).
    pub fn finish(&mut self) -> Result<String> {
        todo!()
    }
}
