//! Running text through a model block by block and collecting statistics of every linear's input.
//!
//! [`windows`] chooses the text, [`walk`] runs it, [`inputs`] holds what was seen of the inputs.

pub mod gram;
pub mod inputs;
mod sample;
mod shared;
pub mod walk;
mod windows;

pub use shared::Shared;
pub use windows::{Options, Sources, Windows, encode_prefix};
