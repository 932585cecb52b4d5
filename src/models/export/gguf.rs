//! GGUF files that llama.cpp and its relatives load.

use std::io::Write;
use std::path::Path;

use super::{each_rows, put_dense};
use crate::error::{Error, Result};
use crate::formats::gguf::{Metadata, Plan, TensorType, Value, write};
use crate::formats::tokenizer::to_gguf;
use crate::models::Model;
use crate::models::decoder::Config;
use crate::models::gguf::{
    ROPE_FACTORS, from_config, rope_factors, row_order, shifted_norm, tensor_name,
};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Ggml, GgmlType, Weight};

/// Number format of the matrices of a GGUF export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufFormat {
    F32,
    F16,
    Q8_0,
    Q4_0,
    Q4_1,
}

impl GgufFormat {
    fn tensor_type(self) -> TensorType {
        match self {
            Self::F32 => TensorType::F32,
            Self::F16 => TensorType::F16,
            Self::Q8_0 => TensorType::Blocks(GgmlType::Q8_0),
            Self::Q4_0 => TensorType::Blocks(GgmlType::Q4_0),
            Self::Q4_1 => TensorType::Blocks(GgmlType::Q4_1),
        }
    }

    /// `general.file_type`.
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
        }
    }
}

/// Writes one GGUF file. Matrices get `format`, except that the embeddings and the head stay at Q8_0
/// where it has 4 bits (they cost the most quality), and that rows that are not whole blocks stay at
/// F16. Vectors are F32. Blocks that have the type already are copied.
///
/// # Errors
/// `UNSUPPORTED_MODEL` for settings that GGUF files cannot express, `MODEL_UNSUITABLE` for tokenizers
/// of other kinds, `NON_FINITE` for values that F16 cannot hold.
pub fn gguf(model: &Model, file: &Path, format: GgufFormat) -> Result<()> {
    let config = model.decoder()?;
    let mut metadata = from_config(config)?;
    metadata.set("general.file_type", Value::U32(format.file_type()));
    metadata.set("general.quantization_version", Value::U32(2));
    add_tokenizer(&mut metadata, model, config)?;

    let factors = rope_factors(&config.rope, config.head_dim);
    let mut plans = Vec::new();
    let mut sources = Vec::new();
    if let Some(factors) = &factors {
        let name = ROPE_FACTORS.to_owned();
        plans.push(Plan { name, kind: TensorType::F32, shape: vec![factors.len()] });
        sources.push(None);
    }
    for (name, shape) in config.tensors() {
        let kind = tensor_type(&name, &shape, format);
        let weight = model.weight(&name)?;
        plans.push(Plan { name: tensor_name(config, &name)?, kind, shape });
        sources.push(Some((name, weight)));
    }
    write(file, &metadata, &plans, &mut |index, out| match &sources[index] {
        None => put_dense(factors.as_deref().unwrap_or_default(), Dtype::F32, out),
        Some((name, weight)) => {
            put(config, name, weight, plans[index].kind, out).map_err(|e| e.within(name))
        }
    })
}

fn add_tokenizer(metadata: &mut Metadata, model: &Model, config: &Config) -> Result<()> {
    match &model.tokenizer {
        Some(tokenizer) => {
            for (key, value) in to_gguf(tokenizer, config.vocab)? {
                metadata.set(key, value);
            }
        }
        // Readers want to be told that ids are all there is.
        None => metadata.set("tokenizer.ggml.model", Value::String("none".to_owned())),
    }
    Ok(())
}

fn tensor_type(name: &str, shape: &[usize], format: GgufFormat) -> TensorType {
    let &[_, cols] = shape else { return TensorType::F32 };
    let kind = match format {
        GgufFormat::Q4_0 | GgufFormat::Q4_1 if !name.starts_with("model.layers.") => {
            TensorType::Blocks(GgmlType::Q8_0)
        }
        _ => format.tensor_type(),
    };
    if cols.is_multiple_of(kind.block().0) { kind } else { TensorType::F16 }
}

fn put(
    config: &Config,
    name: &str,
    weight: &Weight,
    kind: TensorType,
    out: &mut dyn Write,
) -> Result<()> {
    let order = row_order(config, name);
    let order = order.as_deref();
    let kind = match (kind, weight) {
        (TensorType::Blocks(kind), Weight::Ggml(blocks)) if blocks.kind() == kind => {
            match order {
                Some(order) => out.write_all(blocks.permute_rows(order).data())?,
                None => out.write_all(blocks.data())?,
            }
            return Ok(());
        }
        (TensorType::Blocks(kind), _) => kind,
        (TensorType::F32, _) if shifted_norm(config, name) => {
            let values: Vec<f32> = weight.to_f32().iter().map(|v| v + 1.0).collect();
            return put_dense(&values, Dtype::F32, out);
        }
        (dense, _) => {
            let dtype = match dense {
                TensorType::F16 => Dtype::F16,
                TensorType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            return each_rows(weight, order, |rows| put_dense(rows, dtype, out));
        }
    };
    let cols = weight.cols();
    each_rows(weight, order, |rows| {
        if let Some(bad) = rows.iter().find(|v| !v.is_finite()) {
            return Err(Error::new(
                crate::error::Reason::NonFinite,
                format!("the tensor holds {bad}; the model is damaged"),
            ));
        }
        let blocks = Ggml::quantize([rows.len() / cols, cols], kind, rows)?;
        out.write_all(blocks.data())?;
        Ok(())
    })
}
