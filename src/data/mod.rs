//! Data sets: kinds, readers, packing into windows, chat templates, tokenizers.

pub mod chat;
pub mod choices;
pub mod sequence;
pub mod text;
pub mod tokenizer;
