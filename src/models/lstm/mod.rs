//! Language models of stacked LSTM layers: an embedding, the layers, a head over the vocabulary.

pub mod config;
pub mod graph;
pub mod random;

pub use config::{Config, FAMILY, is_lstm};

/// An LSTM language model with its weights.
pub type Model = super::Model<Config>;

#[cfg(test)]
mod tests;
