//! Online work on loaded models.

pub mod embed;
pub mod engine;
pub mod loaded;
pub mod residency;
pub mod sample;
