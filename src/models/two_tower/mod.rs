//! Models of two towers: an image and a caption become vectors of one space, near each other where they mean the
//! same (as in CLIP, arXiv 2103.00020), small enough to be trained on a CPU.

pub mod config;
pub mod graph;
pub mod plan;
pub mod prompts;
pub mod random;

pub use config::{Config, FAMILY, Side, TEMPERATURE, Tower, is_two_tower};

/// A model of two towers with its weights.
pub type Model = super::Model<Config>;

#[cfg(test)]
mod tests;
