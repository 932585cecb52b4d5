//! GGUF files, versions 2 and 3.

mod metadata;

pub use metadata::{Array, Metadata, Value, missing};
