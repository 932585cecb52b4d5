//! Hugging Face folders of dense tensors.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{each_rows, put_dense};
use crate::error::{Error, Result};
use crate::formats::safetensors::{Plan, write_shards};
use crate::models::{AnyModel, Model, encoder, files};
use crate::nn::dtype::Dtype;

/// Bytes of a shard.
const SHARD: u64 = 2 << 30;

/// [`hugging_face`] for a model of any family; encoders get the files of sentence-transformers too.
pub fn any(model: &AnyModel, folder: &Path, dtype: Dtype) -> Result<Vec<PathBuf>> {
    match model {
        AnyModel::Decoder(model) => hugging_face(model, folder, dtype),
        AnyModel::Encoder(model) => {
            let mut paths = hugging_face(model, folder, dtype)?;
            let names = encoder::sentence::write(&model.family, folder)?;
            paths.extend(names.into_iter().map(|name| folder.join(name)));
            Ok(paths)
        }
        AnyModel::Vision(model) => hugging_face(model, folder, dtype),
        AnyModel::Lstm(model) => hugging_face(model, folder, dtype),
    }
}

/// Writes a Hugging Face folder (config.json, safetensors shards, tokenizer files); returns its files.
/// Every weight becomes dense `dtype` elements: F32, F16 or BF16.
///
/// # Errors
/// `INVALID_FIELD` for another type, `NON_FINITE` for values that `dtype` cannot hold.
pub fn hugging_face<F>(model: &Model<F>, folder: &Path, dtype: Dtype) -> Result<Vec<PathBuf>> {
    let name = match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        other => {
            return Err(Error::field("dtype", format!("{other} is not one of F32, F16, BF16")));
        }
    };
    std::fs::create_dir_all(folder)?;
    let plans: Vec<Plan> = model
        .weights
        .iter()
        .map(|(name, w)| Plan { name: name.clone(), dtype, shape: w.shape().to_vec() })
        .collect();
    let mut data = |plan: &Plan, out: &mut dyn Write| {
        let weight = model.weight(&plan.name)?;
        each_rows(weight, None, |rows| put_dense(rows, dtype, out))
            .map_err(|e| e.within(&plan.name))
    };
    let mut names = write_shards(folder, &plans, SHARD, &mut data)?;
    let config = config(&model.config, name);
    names.extend(files::write_text(&config, model.tokenizer.as_deref(), folder)?);
    names.sort_unstable();
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// The configuration with the type of the new tensors, under the key that all versions read and under
/// the new one where it is in use.
fn config(config: &Value, dtype: &str) -> Value {
    let mut config = config.clone();
    if let Some(map) = config.as_object_mut() {
        map.insert("torch_dtype".to_owned(), dtype.into());
        if let Some(new) = map.get_mut("dtype") {
            *new = dtype.into();
        }
    }
    config
}
