//! Layers shared by the model families, and the layouts their weights come in.

pub mod adapter;
pub mod dtype;
pub mod limits;
pub mod linalg;
pub mod ops;
pub mod tuning;
pub mod weight;
