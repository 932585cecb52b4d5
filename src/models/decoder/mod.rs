//! Decoder-only language models: one implementation whose differences are settings.

mod config;
pub mod graph;
pub(super) mod hugging_face;
pub mod plan;
pub mod random;
#[cfg(test)]
mod reference;
mod rotary;

pub use config::{Activation, Config, LayerKind, Rope, RopeScaling};
