//! Data sets: kinds, readers, splits, chat templates, tokenizers, tokenised records.

pub mod captions;
pub mod chat;
pub mod choices;
pub mod images;
pub mod records;
mod rows;
pub mod sequence;
pub mod split;
pub mod text;
pub mod tokenise;
pub mod tokenizer;
