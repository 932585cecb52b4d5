//! Decoder-only language models: one implementation whose differences are settings.

mod config;
pub mod graph;
pub mod plan;

pub use config::{Activation, Config, LayerKind, Rope, RopeScaling};
