//! safetensors files: single and sharded, memory-mapped in, streamed out.
//!
//! A file is the length of a header (`u64`, little endian), the header (a JSON object: tensor name to
//! type, shape and byte range), and the tensors' bytes without gaps.

mod read;
mod write;

pub use read::{File, Tensor, open, read_index};
pub use write::{Plan, Sink, write, write_shards};

use crate::nn::dtype::Dtype;

/// Longest header that is read; the limit of the format's reference implementation.
const MAX_HEADER: usize = 100_000_000;

/// The type called `name`, where it is one that is read here.
fn dtype(name: &str) -> Option<Dtype> {
    use Dtype::*;
    [F32, F16, BF16, I64, I32, I16, I8, U32, U16, U8].into_iter().find(|d| d.name() == name)
}
