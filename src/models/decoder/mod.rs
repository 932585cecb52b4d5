//! Decoder-only language models: one implementation whose differences are settings.

mod config;
pub mod graph;
mod hugging_face;
pub mod plan;
pub mod random;

pub use config::{Activation, Config, LayerKind, Rope, RopeScaling};
