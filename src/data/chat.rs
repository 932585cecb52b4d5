//! Chat templates through minijinja.

use super::tokenizer::Tokenizer;
use crate::error::Result;

/// One message of a conversation.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// Lays out a conversation by the model's chat template, with the prompt for the assistant's turn.
pub fn render(
    _tokenizer: &Tokenizer,
    _messages: &[Message],
    _add_generation_prompt: bool,
) -> Result<String> {
    todo!()
}
