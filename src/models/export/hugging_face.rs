//! Hugging Face folders of dense tensors.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::report::describe;
use super::{Drift, Exported, Report, TensorReport, dense_bytes, each_rows, put_dense, torch_name};
use crate::error::Result;
use crate::formats::safetensors::{Plan, write_shards};
use crate::models::{AnyModel, Model, encoder, files};
use crate::nn::dtype::Dtype;
use crate::progress::Progress;

/// Bytes of a shard.
pub(super) const SHARD: u64 = 2 << 30;

/// Writes a Hugging Face folder of a model of any family: config.json, safetensors shards, tokenizer files,
/// and those of sentence-transformers for an encoder. Every weight becomes dense `dtype` elements, F32, F16
/// or BF16; a head that is the embedding matrix stays that.
///
/// # Errors
/// `INVALID_FIELD` for another type, `NON_FINITE` for values that `dtype` cannot hold, `CANCELLED`.
pub fn dense(
    model: &AnyModel,
    folder: &Path,
    dtype: Dtype,
    progress: &Progress,
) -> Result<Exported> {
    let mut exported = match model {
        AnyModel::Decoder(model) => write(model, folder, dtype, progress)?,
        AnyModel::Encoder(model) => write(model, folder, dtype, progress)?,
        AnyModel::Vision(model) => write(model, folder, dtype, progress)?,
        AnyModel::Lstm(model) => write(model, folder, dtype, progress)?,
        AnyModel::TwoTower(model) => write(model, folder, dtype, progress)?,
    };
    exported.files.extend(modules(model, folder)?);
    if let Some(odd) = uneven(model.config()) {
        exported.report.warnings.push(format!(
            "{odd}: planish reads this, classes of other programs want one width for all blocks"
        ));
    }
    if let Some(biases) = extra_biases(model.config()) {
        exported.report.warnings.push(format!(
            "{biases}: planish reads these biases, classes of other programs may leave them out"
        ));
    }
    Ok(exported)
}

/// [`dense`] of a model whose family is known, without the files of sentence-transformers; gives the files.
pub fn hugging_face<F>(model: &Model<F>, folder: &Path, dtype: Dtype) -> Result<Vec<PathBuf>> {
    Ok(write(model, folder, dtype, &Progress::silent())?.files)
}

/// The files that sentence-transformers wants beside an encoder.
pub(super) fn modules(model: &AnyModel, folder: &Path) -> Result<Vec<PathBuf>> {
    let AnyModel::Encoder(model) = model else { return Ok(Vec::new()) };
    let names = encoder::sentence::write(&model.family, folder)?;
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// What a configuration says of widths that differ by block.
pub(super) fn uneven(config: &Value) -> Option<String> {
    let widths = config.get("intermediate_size")?.as_array()?;
    Some(format!("the feed-forward networks of the {} blocks differ in width", widths.len()))
}

/// Biases of feed-forward networks outside of the one architecture whose published classes have them.
pub(super) fn extra_biases(config: &Value) -> Option<String> {
    let architecture = config.get("model_type")?.as_str()?;
    let there = config.get("mlp_bias").and_then(Value::as_bool) == Some(true);
    (there && architecture != "llama")
        .then(|| format!("the feed-forward networks have biases (mlp_bias of {architecture})"))
}

fn write<F>(
    model: &Model<F>,
    folder: &Path,
    dtype: Dtype,
    progress: &Progress,
) -> Result<Exported> {
    let torch = torch_name(dtype)?;
    std::fs::create_dir_all(folder)?;
    let plans: Vec<Plan> = model
        .weights
        .iter()
        .map(|(name, w)| Plan { name: name.clone(), dtype, shape: w.shape().to_vec() })
        .collect();
    let mut drifts = BTreeMap::new();
    let mut data = |plan: &Plan, out: &mut dyn Write| -> Result<()> {
        let weight = model.weight(&plan.name)?;
        let mut drift = Drift::default();
        each_rows(weight, None, progress, |rows| put_dense(rows, dtype, out, &mut drift))
            .map_err(|e| e.within(&plan.name))?;
        drifts.insert(plan.name.clone(), drift);
        Ok(())
    };
    let mut names = write_shards(folder, &plans, SHARD, &mut data)?;
    let config = config(&model.config, torch);
    names.extend(files::write_text(&config, model.tokenizer.as_deref(), folder)?);
    names.sort_unstable();
    let tensors = model.weights.iter().map(|(name, weight)| TensorReport {
        name: name.clone(),
        stored_as: describe(weight),
        written_as: dtype.to_string(),
        bytes: dense_bytes(weight.shape(), dtype),
        carried: false,
        drift: drifts.remove(name).unwrap_or_default(),
    });
    Ok(Exported {
        report: Report { tensors: tensors.collect(), warnings: Vec::new() },
        files: names.into_iter().map(|name| folder.join(name)).collect(),
    })
}

/// The configuration with the type of the new tensors, under the key that all versions read and under
/// the new one where it is in use.
pub(super) fn config(config: &Value, dtype: &str) -> Value {
    let mut config = config.clone();
    if let Some(map) = config.as_object_mut() {
        map.insert("torch_dtype".to_owned(), dtype.into());
        if let Some(new) = map.get_mut("dtype") {
            *new = dtype.into();
        }
    }
    config
}
