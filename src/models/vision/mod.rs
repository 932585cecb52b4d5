//! Image classifiers: plain convolutional nets and MobileNet-v1, small enough to be trained on a CPU.

pub mod config;
pub mod graph;
pub mod plan;
pub mod random;

pub use config::{Config, FAMILY, Layer, is_vision};

/// An image classifier with its weights.
pub type Model = super::Model<Config>;

#[cfg(test)]
mod tests;
