//! Adapters in the file form of the PEFT library: `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! Read are LoRA, DoRA, AdaLoRA and LoRA-XS on linear layers, and tensors that were trained whole
//! ([`contents`]); of these, what is an addition of low rank can be served. What would change the result
//! and is not done here is refused, each with its reason; settings of training and settings that are off
//! are passed over. [`Folder`] reads and writes the two files byte for byte.

mod config;
pub mod contents;
mod folder;
#[cfg(test)]
mod tests;

use std::path::Path;

use half::f16;

pub use self::config::{Kind, Use};
use self::contents::Contents;
pub use self::folder::{Folder, Plain};
use super::{malformed, quoted, safetensors};
use crate::error::{Error, Reason, Result};
use crate::nn::adapter::Adapter;
use crate::nn::dtype::Dtype;

/// Names of the two files.
pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// Largest `adapter_config.json`.
const MAX_CONFIG: u64 = 1 << 20;
/// Largest rank that is believed.
const MAX_RANK: usize = 1 << 14;
/// What the wrapper puts before the names of the model's own modules.
pub const PREFIX: &str = "base_model.model.";

/// Reads the two files of a folder, to serve them.
///
/// # Errors
/// SOURCE_UNAVAILABLE for a missing file, MALFORMED_FILE for what breaks the form,
/// UNSUPPORTED_FORMAT for kinds of adapters and settings that are not served here.
pub fn read(folder: &Path) -> Result<Adapter> {
    let folder = Folder::read(folder)?;
    parse(&folder.config, &folder.file())
}

/// Puts settings and tensors together, to serve them.
pub fn parse(config: &[u8], file: &safetensors::File) -> Result<Adapter> {
    Contents::parse(config, &file.tensors, Use::Serve)?.adapter()
}

/// The elements as f32; refuses types that are no floats, and values that are not finite or cannot be
/// rounded to bf16.
fn floats(what: &str, tensor: &safetensors::Tensor) -> Result<Vec<f32>> {
    let data = &tensor.data;
    let values: Vec<f32> = match tensor.dtype {
        Dtype::F32 => {
            data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        Dtype::F16 => {
            data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        Dtype::BF16 => {
            data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
        other => {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                format!(
                    "the factors of module {} are {other}; store them as F32, F16 or BF16",
                    quoted(what)
                ),
            ));
        }
    };
    if values.iter().all(|v| half::bf16::from_f32(*v).is_finite()) {
        return Ok(values);
    }
    Err(malformed(format!("the factors of module {} are not all finite", quoted(what))))
}
