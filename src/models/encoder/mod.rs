//! Encoders that turn texts into vectors: BERT and what sentence-transformers adds to it.

mod config;
pub mod graph;
pub mod plan;
pub mod random;
#[cfg(test)]
mod reference;
pub(super) mod sentence;

pub use config::{Activation, Config, Pooling};
pub(super) use config::{is_encoder, tensor_name};

/// Name of the family in versions and messages.
pub const FAMILY: &str = "encoder";

/// Name of the embeddings of words.
pub const WORDS: &str = "embeddings.word_embeddings.weight";

/// A model of this family.
pub type Model = super::Model<Config>;
