//! The files of a stored version: safetensors shards, `config.json`, tokenizer files, `planish.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Family, Model, ModelInfo, TensorInfo, files};
use crate::error::{Error, Reason, Result};
use crate::formats::safetensors::{self, Plan, Tensor};
use crate::formats::{malformed, quoted};
use crate::nn::weight::{Part, Record, Weight};

/// Name of the file that says how the tensors are laid out and where they come from.
pub(super) const MANIFEST: &str = "planish.json";

/// Version of the manifest that is written, and the only one that is read.
const FORMAT: u32 = 1;

/// Largest manifest: a record for each tensor, and the lineage.
const MAX_MANIFEST: u64 = 64 << 20;

/// Bytes of a shard.
const SHARD: u64 = 2 << 30;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    lineage: Value,
    tensors: BTreeMap<String, Record>,
}

/// Writes the files of a version into `folder`. `lineage` is what `planish.json` keeps of the
/// version's origin; it must not contain times or anything else that differs between equal runs.
/// Equal models and lineages give equal bytes. Returns the file names, sorted.
pub fn write(model: &Model, lineage: &Value, folder: &Path) -> Result<Vec<String>> {
    let mut plans = Vec::new();
    let mut owners = BTreeMap::new();
    for (name, weight) in &model.weights {
        for part in weight.parts() {
            let stored = part_name(name, part.suffix);
            owners.insert(stored.clone(), (weight, part.suffix));
            plans.push(Plan { name: stored, dtype: part.dtype, shape: part.shape });
        }
    }
    let mut data = |plan: &Plan, out: &mut dyn std::io::Write| -> Result<()> {
        let part = owners.get(&plan.name).and_then(|(weight, suffix)| {
            weight.parts().into_iter().find(|part| part.suffix == *suffix)
        });
        let part = part
            .ok_or_else(|| Error::internal(format!("part '{}' of a weight vanished", plan.name)))?;
        out.write_all(&part.data)?;
        Ok(())
    };
    let mut names = safetensors::write_shards(folder, &plans, SHARD, &mut data)?;
    names.extend(files::write_text(&model.config, model.tokenizer.as_deref(), folder)?);
    let manifest = Manifest {
        format: FORMAT,
        lineage: lineage.clone(),
        tensors: model.weights.iter().map(|(name, w)| (name.clone(), w.record())).collect(),
    };
    let manifest = serde_json::to_value(manifest)
        .map_err(|e| Error::internal(format!("the manifest has no JSON form: {e}")))?;
    std::fs::write(folder.join(MANIFEST), files::pretty(&manifest))?;
    names.push(MANIFEST.to_owned());
    names.sort_unstable();
    Ok(names)
}

/// Reads a version from its files (name to path); weights stay memory-mapped.
///
/// # Errors
/// `MALFORMED_FILE` for files that are missing, broken or disagree, `UNSUPPORTED_FORMAT` for versions
/// written by a newer program.
pub fn read(files: &BTreeMap<String, PathBuf>) -> Result<Model> {
    let (config, family) = files::config(find(files, files::CONFIG)?)?;
    let manifest = manifest(files)?;
    let mut weights = BTreeMap::new();
    for (name, (record, parts)) in stored(files, manifest.tensors)? {
        let weight = Weight::from_parts(&record, parts)
            .map_err(|e| e.within(&format!("tensor {}", quoted(&name))))?;
        weights.insert(name, Arc::new(weight));
    }
    let tokenizer = files::tokenizer(|name| files.get(name).cloned(), &config)?;
    files::assemble(family, config, weights, tokenizer)
}

/// Reads only headers and configuration.
pub fn read_info(files: &BTreeMap<String, PathBuf>) -> Result<ModelInfo> {
    let (_, family) = files::config(find(files, files::CONFIG)?)?;
    let manifest = manifest(files)?;
    let mut tensors = BTreeMap::new();
    for (name, (record, parts)) in stored(files, manifest.tensors)? {
        let bytes = parts.values().map(|part| part.data.len() as u64).sum();
        let shape = match &record {
            Record::Dense { shape } => shape.clone(),
            Record::Grouped { shape, .. }
            | Record::Ggml { shape, .. }
            | Record::Sparse { shape, .. } => shape.to_vec(),
        };
        tensors.insert(name, TensorInfo { record, shape, bytes });
    }
    let Family::Decoder(decoder) = &family;
    for (name, shape) in decoder.tensors() {
        let tensor = tensors.get(&name).ok_or_else(|| {
            Error::new(
                Reason::MalformedFile,
                format!("tensor '{name}' is missing from the version"),
            )
        })?;
        files::check_shape(&name, &tensor.shape, &shape)?;
    }
    Ok(ModelInfo { family, has_tokenizer: files.contains_key(files::TOKENIZER), tensors })
}

fn find<'a>(files: &'a BTreeMap<String, PathBuf>, name: &str) -> Result<&'a Path> {
    files.get(name).map(PathBuf::as_path).ok_or_else(|| {
        Error::new(Reason::MalformedFile, format!("{name} is missing from the version's files"))
    })
}

fn manifest(files: &BTreeMap<String, PathBuf>) -> Result<Manifest> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let text = files::text(find(files, MANIFEST)?, MAX_MANIFEST)?;
    let broken = |e: serde_json::Error| malformed(format!("{MANIFEST} cannot be read: {e}"));
    let version: Version = serde_json::from_str(&text).map_err(broken)?;
    if version.format != FORMAT {
        return Err(Error::new(
            Reason::UnsupportedFormat,
            format!(
                "{MANIFEST} has format {}, but only {FORMAT} is read here; use a newer program",
                version.format
            ),
        ));
    }
    serde_json::from_str(&text).map_err(broken)
}

/// A weight's tensor in the file.
fn part_name(weight: &str, suffix: &str) -> String {
    match suffix {
        "" => weight.to_owned(),
        suffix => format!("{weight}.{suffix}"),
    }
}

type Stored = BTreeMap<String, (Record, BTreeMap<String, Part>)>;

/// The parts of every weight of the manifest, from all shards. Each tensor belongs to one weight: the
/// one that has its name, or its name without the last word.
fn stored(files: &BTreeMap<String, PathBuf>, records: BTreeMap<String, Record>) -> Result<Stored> {
    let mut weights: Stored =
        records.into_iter().map(|(name, record)| (name, (record, BTreeMap::new()))).collect();
    for (_, path) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        for (name, tensor) in safetensors::open(path)?.tensors {
            let (owner, suffix) = match weights.contains_key(&name) {
                true => (name.as_str(), ""),
                false => name.rsplit_once('.').unwrap_or((&name, "")),
            };
            let Some((_, parts)) = weights.get_mut(owner) else {
                return Err(malformed(format!("tensor {} has no record", quoted(&name))));
            };
            let Tensor { dtype, shape, data } = tensor;
            // The key is what counts; only parts on their way out carry their suffix.
            let part = Part { suffix: "", dtype, shape, data };
            if parts.insert(suffix.to_owned(), part).is_some() {
                return Err(malformed(format!("tensor {} appears twice", quoted(&name))));
            }
        }
    }
    Ok(weights)
}
