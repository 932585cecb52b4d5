//! Online work on loaded models.

pub mod adapters;
pub mod constraint;
pub mod embed;
pub mod engine;
pub mod head;
pub mod residency;
pub mod sample;
pub mod serving;
