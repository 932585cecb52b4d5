//! Models in GGUF files.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::error::Result;
use crate::formats::gguf::{File, Tensor, TensorType, open as open_file};
use crate::formats::tokenizer::from_gguf;
use crate::models::decoder::Config;
use crate::models::gguf::{ROPE_FACTORS, inverse, row_order, shifted_norm, tensor_name, to_config};
use crate::models::{Family, Model, files};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};

/// Opens the model in the GGUF file at `path`. Quantised tensors keep their blocks, in the mapped file
/// where their rows stand in our order.
pub(super) fn open(path: &Path) -> Result<Model> {
    let file = open_file(path)?;
    model(file).map_err(|e| e.within(&path.display().to_string()))
}

fn model(mut file: File) -> Result<Model> {
    let mut config = to_config(&file)?;
    let tokenizer = from_gguf(&file.metadata)?;
    if let (Some(tokenizer), Value::Object(config)) = (&tokenizer, &mut config) {
        let eos = match &tokenizer.eos[..] {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        config.insert("bos_token_id".to_owned(), json!(tokenizer.bos));
        config.insert("eos_token_id".to_owned(), eos);
        config.insert("pad_token_id".to_owned(), json!(tokenizer.pad));
    }
    let decoder = Config::from_hugging_face(&config)?;
    // Read into the configuration already.
    file.tensors.remove(ROPE_FACTORS);
    let mut weights = BTreeMap::new();
    for (name, shape) in decoder.tensors() {
        let theirs = tensor_name(&decoder, &name)?;
        // What is missing is reported with everything else that is.
        let Some(tensor) = file.tensors.remove(&theirs) else { continue };
        files::check_shape(&theirs, &tensor.shape, &shape)?;
        let weight = weight(&decoder, &name, &tensor).map_err(|e| e.within(&theirs))?;
        weights.insert(name, Arc::new(weight));
    }
    if let Some(name) = file.tensors.keys().next() {
        return Err(files::unexpected(name));
    }
    files::assemble(Family::Decoder(decoder), config, weights, tokenizer.map(Arc::new))
}

/// The tensor with rows and values as Hugging Face files have them.
fn weight(config: &Config, name: &str, tensor: &Tensor) -> Result<Weight> {
    if shifted_norm(config, name) {
        let values: Vec<f32> = tensor.weight()?.to_f32().iter().map(|v| v - 1.0).collect();
        return Ok(Weight::Dense(Dense::from_f32(tensor.shape.clone(), &values, Dtype::F32)?));
    }
    let Some(order) = row_order(config, name) else { return tensor.weight() };
    let order = inverse(&order);
    match tensor.weight()? {
        Weight::Ggml(blocks) => Ok(Weight::Ggml(blocks.permute_rows(&order))),
        _ => {
            let dtype = match tensor.kind {
                TensorType::F16 => Dtype::F16,
                TensorType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            let row = tensor.data.len() / order.len();
            let mut data = Vec::with_capacity(tensor.data.len());
            for &r in &order {
                data.extend_from_slice(&tensor.data[r * row..(r + 1) * row]);
            }
            Ok(Weight::Dense(Dense::new(tensor.shape.clone(), dtype, data.into())?))
        }
    }
}
