//! Online work on loaded models.

pub mod adapters;
pub mod constraint;
pub mod engine;
pub mod residency;
pub mod sample;
