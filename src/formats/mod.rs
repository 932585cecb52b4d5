//! File formats, read as hostile and written for other programs: safetensors, GGUF, tokenizers.

pub mod gguf;
pub mod mmap;
pub mod safetensors;
pub mod tokenizer;
