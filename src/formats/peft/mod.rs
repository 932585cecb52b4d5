//! Adapters in the file form of the PEFT library: `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! Read is LoRA on linear layers. What would change the result and is not done here is refused,
//! each with its reason; settings of training and settings that are off are passed over.

mod config;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};

use self::config::Settings;
use super::{malformed, quoted, safetensors};
use crate::error::{Error, Reason, Result};
use crate::nn::adapter::{Adapter, Factors};
use crate::nn::dtype::Dtype;

/// Names of the two files.
pub const CONFIG: &str = "adapter_config.json";
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// Largest `adapter_config.json`.
const MAX_CONFIG: u64 = 1 << 20;
/// Largest rank that is believed.
const MAX_RANK: usize = 1 << 14;
/// What the wrapper puts before the names of the model's own modules.
const PREFIX: &str = "base_model.model.";

/// Reads the two files of a folder.
///
/// # Errors
/// SOURCE_UNAVAILABLE for a missing file, MALFORMED_FILE for what breaks the form,
/// UNSUPPORTED_FORMAT for kinds of adapters and settings that are not served here.
pub fn read(folder: &Path) -> Result<Adapter> {
    for (name, what) in [(CONFIG, "its settings"), (WEIGHTS, "its factors")] {
        if !folder.join(name).is_file() {
            let pickle = folder.join("adapter_model.bin").is_file();
            let hint = if pickle && name == WEIGHTS {
                "adapter_model.bin is a pickle, which can run code and is not read: save the adapter \
                 again with safe_serialization"
            } else {
                "name the folder that save_pretrained wrote"
            };
            return Err(Error::new(
                Reason::SourceUnavailable,
                format!("the adapter lacks {name} with {what}; {hint}"),
            ));
        }
    }
    let config = folder.join(CONFIG);
    if std::fs::metadata(&config)?.len() > MAX_CONFIG {
        return Err(malformed(format!("{CONFIG} has more than {MAX_CONFIG} bytes")));
    }
    parse(&std::fs::read(config)?, &safetensors::open(&folder.join(WEIGHTS))?)
}

/// Puts settings and tensors together.
pub fn parse(config: &[u8], file: &safetensors::File) -> Result<Adapter> {
    let settings = Settings::parse(config)?;
    let mut pairs: BTreeMap<&str, Pair<'_>> = BTreeMap::new();
    for (name, tensor) in &file.tensors {
        let (module, side) = take_apart(name)?;
        let pair = pairs.entry(module).or_default();
        match side {
            Side::A => pair.a = Some(tensor),
            Side::B => pair.b = Some(tensor),
        }
    }
    if pairs.is_empty() {
        return Err(malformed(format!("{WEIGHTS} holds no factors")));
    }
    let linears = pairs.into_iter().map(|(module, pair)| {
        let factors = pair.factors(module, &settings)?;
        Ok((format!("{module}.weight"), Arc::new(factors)))
    });
    Ok(Adapter { linears: linears.collect::<Result<_>>()? })
}

#[derive(Clone, Copy)]
enum Side {
    A,
    B,
}

/// `base_model.model.<module>.lora_A.weight`
fn take_apart(name: &str) -> Result<(&str, Side)> {
    let unsupported = |what: &str| {
        Error::new(
            Reason::UnsupportedFormat,
            format!("tensor {} {what}; only the factors of linear layers are read", quoted(name)),
        )
    };
    let module = name
        .strip_prefix(PREFIX)
        .ok_or_else(|| unsupported("does not have a name that starts with 'base_model.model.'"))?;
    if let Some(module) = module.strip_suffix(".lora_A.weight") {
        return Ok((module, Side::A));
    }
    if let Some(module) = module.strip_suffix(".lora_B.weight") {
        return Ok((module, Side::B));
    }
    Err(unsupported(if module.contains("lora_magnitude_vector") {
        "is a magnitude of DoRA, which is not served"
    } else if module.contains("lora_embedding_") {
        "changes an embedding"
    } else if module.ends_with(".lora_B.bias") {
        "is a bias of an adapter"
    } else {
        "is no LoRA factor (modules_to_save, a bias or another method)"
    }))
}

#[derive(Default)]
struct Pair<'a> {
    a: Option<&'a safetensors::Tensor>,
    b: Option<&'a safetensors::Tensor>,
}

impl Pair<'_> {
    fn factors(&self, module: &str, settings: &Settings) -> Result<Factors> {
        let (Some(a), Some(b)) = (self.a, self.b) else {
            let missing = if self.a.is_none() { "lora_A" } else { "lora_B" };
            return Err(malformed(format!("module {} has no {missing}", quoted(module))));
        };
        let (&[rank, cols], &[rows, rank_b]) = (&a.shape[..], &b.shape[..]) else {
            return Err(malformed(format!(
                "the factors of module {} have the shapes {:?} and {:?} instead of two dimensions",
                quoted(module),
                a.shape,
                b.shape
            )));
        };
        if rank != rank_b || rank == 0 || rank > MAX_RANK || rows == 0 || cols == 0 {
            return Err(malformed(format!(
                "the factors of module {} have the shapes {:?} and {:?}, which are no product of a \
                 rank from 1 to {MAX_RANK}",
                quoted(module),
                a.shape,
                b.shape
            )));
        }
        let wanted = settings.rank(module);
        if rank as u64 != wanted {
            return Err(malformed(format!(
                "the factors of module {} have rank {rank}, but {CONFIG} says {wanted}",
                quoted(module)
            )));
        }
        let scale = settings.scale(module, rank)?;
        Factors::new([rows, cols], rank, elements(module, a)?, &elements(module, b)?, scale)
    }
}

/// The elements as bf16; refuses types that are no floats, and values that are not finite.
fn elements(module: &str, tensor: &safetensors::Tensor) -> Result<Vec<bf16>> {
    let data = &tensor.data;
    let values: Vec<bf16> = match tensor.dtype {
        Dtype::F32 => data
            .chunks_exact(4)
            .map(|b| bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect(),
        Dtype::F16 => data
            .chunks_exact(2)
            .map(|b| bf16::from_f32(f16::from_le_bytes([b[0], b[1]]).to_f32()))
            .collect(),
        Dtype::BF16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect(),
        other => {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                format!(
                    "the factors of module {} are {other}; store them as F32, F16 or BF16",
                    quoted(module)
                ),
            ));
        }
    };
    if values.iter().all(|v| v.is_finite()) {
        return Ok(values);
    }
    Err(malformed(format!("the factors of module {} are not all finite", quoted(module))))
}
