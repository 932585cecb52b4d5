//! The files of a stored version: safetensors shards, `config.json`, tokenizer files, `planish.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{AnyFamily, AnyInfo, AnyModel, Family, Model, ModelInfo, TensorInfo, files};
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
pub fn write<F>(model: &Model<F>, lineage: &Value, folder: &Path) -> Result<Vec<String>> {
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
    read_any(files)?.walked()
}

/// [`read`] for who tells the families apart.
pub fn read_any(files: &BTreeMap<String, PathBuf>) -> Result<AnyModel> {
    let (config, family) = files::config(find(files, files::CONFIG)?)?;
    let manifest = manifest(files)?;
    let mut weights = BTreeMap::new();
    for (name, (record, parts)) in stored(files, manifest.tensors)? {
        let weight = Weight::from_parts(&record, parts)
            .map_err(|e| e.within(&format!("tensor {}", quoted(&name))))?;
        weights.insert(name, Arc::new(weight));
    }
    let tokenizer = files::tokenizer(|name| files.get(name).cloned(), &config)?;
    Ok(match family {
        AnyFamily::Decoder(family) => {
            files::assemble(Family::Decoder(family), config, weights, tokenizer)?.into()
        }
        AnyFamily::Encoder(family) => files::assemble(family, config, weights, tokenizer)?.into(),
        AnyFamily::Vision(family) => files::assemble(family, config, weights, tokenizer)?.into(),
        AnyFamily::Lstm(family) => files::assemble(family, config, weights, tokenizer)?.into(),
        AnyFamily::TwoTower(family) => files::assemble(family, config, weights, tokenizer)?.into(),
    })
}

/// Writes a model of any family; otherwise as [`write`].
pub fn write_any(model: &AnyModel, lineage: &Value, folder: &Path) -> Result<Vec<String>> {
    match model {
        AnyModel::Decoder(model) => write(model, lineage, folder),
        AnyModel::Encoder(model) => write(model, lineage, folder),
        AnyModel::Vision(model) => write(model, lineage, folder),
        AnyModel::Lstm(model) => write(model, lineage, folder),
        AnyModel::TwoTower(model) => write(model, lineage, folder),
    }
}

/// Reads only headers and configuration.
///
/// # Errors
/// As [`read`].
pub fn read_info(files: &BTreeMap<String, PathBuf>) -> Result<ModelInfo> {
    read_any_info(files)?.walked()
}

/// Reads only headers and configuration, of a version of any family.
///
/// # Errors
/// As [`read_any`].
pub fn read_any_info(files: &BTreeMap<String, PathBuf>) -> Result<AnyInfo> {
    let (config, family) = files::config(find(files, files::CONFIG)?)?;
    let manifest = manifest(files)?;
    let mut tensors = BTreeMap::new();
    for (name, (record, parts)) in stored(files, manifest.tensors)? {
        let bytes = parts.values().map(|part| part.data.len() as u64).sum();
        let shape = record.shape().to_vec();
        tensors.insert(name, TensorInfo { record, shape, bytes });
    }
    for (name, shape) in family.tensors() {
        let tensor = tensors.get(&name).ok_or_else(|| {
            Error::new(
                Reason::MalformedFile,
                format!("tensor '{name}' is missing from the version"),
            )
        })?;
        files::check_shape(&name, &tensor.shape, &shape)?;
    }
    Ok(AnyInfo { family, config, has_tokenizer: files.contains_key(files::TOKENIZER), tensors })
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

#[cfg(test)]
mod tests {
    use rand::Rng;
    use serde_json::json;

    use super::*;
    use crate::formats::hostile::damage;
    use crate::models::decoder::random;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{
        Dense, DualGrained, Factored, Ggml, GgmlType, Grouped, GroupedSpec, Nf4, RowGroupValues,
        RowGroups, Sparse, Sum, ValueFormat,
    };
    use crate::seed::Stream;

    /// A model whose linears are in every layout there is.
    fn mixed() -> Model {
        let mut model = random::model(random::tiny("llama"), 3).unwrap();
        let spec = |bits, symmetric| GroupedSpec { bits, group: 16, symmetric };
        let linears = model.weights.keys().filter(|n| n.contains("_proj")).cloned();
        for (i, name) in linears.collect::<Vec<_>>().into_iter().enumerate() {
            let dense = &model.weights[&name];
            let shape = [dense.rows(), dense.cols()];
            let mut values = dense.to_f32();
            let grouped = |spec: GroupedSpec| {
                let (mut scales, mut zeros, mut codes) = (Vec::new(), Vec::new(), Vec::new());
                for group in values.chunks(spec.group) {
                    let (scale, zero) = spec.fit(group);
                    codes.extend(group.iter().map(|v| spec.code(*v, scale, zero)));
                    scales.push(scale);
                    zeros.push(zero);
                }
                Grouped::pack(shape, spec, &codes, &scales, &zeros).unwrap()
            };
            let factored = |[rows, cols]: [usize; 2], values: &[f32]| {
                let (left, right) = (&values[..2 * rows], &values[..2 * cols]);
                Factored::from_f32(shape, 2, left, right, Dtype::BF16).unwrap()
            };
            let weight = match i % 12 {
                0 if shape[1].is_multiple_of(32) => {
                    Weight::Ggml(Ggml::quantize(shape, GgmlType::Q4_1, &values).unwrap())
                }
                1 => Weight::Grouped(grouped(spec(4, true))),
                2 => Weight::Grouped(grouped(spec(3, false))),
                3 => {
                    values.iter_mut().step_by(3).for_each(|v| *v = 0.0);
                    Weight::Sparse(
                        Sparse::from_dense(shape, &values, ValueFormat::F16, None).unwrap(),
                    )
                }
                4 => {
                    for pair in values.chunks_exact_mut(4) {
                        (pair[0], pair[2]) = (0.0, 0.0);
                    }
                    let hint = Some((2, 4));
                    let format = ValueFormat::BF16;
                    Weight::Sparse(Sparse::from_dense(shape, &values, format, hint).unwrap())
                }
                5 => Weight::Dense(Dense::from_f32(shape.to_vec(), &values, Dtype::F16).unwrap()),
                6 => Weight::Dense(Dense::from_f32(shape.to_vec(), &values, Dtype::BF16).unwrap()),
                7 => {
                    values.iter_mut().step_by(3).for_each(|v| *v = 0.0);
                    let format = RowGroupValues::Int8;
                    Weight::RowGroups(RowGroups::from_dense(shape, &values, 2, format).unwrap())
                }
                8 if shape[1].is_multiple_of(32) => {
                    Weight::DualGrained(DualGrained::round(shape, 32, &values).unwrap())
                }
                9 => Weight::Factored(factored(shape, &values)),
                10 => {
                    let base = Weight::Grouped(grouped(spec(4, true)));
                    Weight::Sum(Sum::new(base, factored(shape, &values)).unwrap())
                }
                11 => Weight::Nf4(Nf4::round(shape, &values).unwrap()),
                _ => continue,
            };
            model.weights.insert(name, Arc::new(weight));
        }
        model
    }

    fn written(model: &Model, folder: &Path) -> BTreeMap<String, PathBuf> {
        let names = write(model, &json!({ "source": "test" }), folder).unwrap();
        names.into_iter().map(|name| (name.clone(), folder.join(name))).collect()
    }

    #[test]
    fn every_layout_comes_back_as_it_was() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let model = mixed();
        let files = written(&model, first.path());
        let again = read(&files).unwrap();
        assert_eq!(again.family, model.family);
        assert_eq!(again.config, model.config);
        for (name, weight) in &model.weights {
            assert_eq!(again.weights[name].record(), weight.record(), "{name}");
            assert_eq!(again.weights[name].to_f32(), weight.to_f32(), "{name}");
        }
        // What is written again is the same to the byte.
        for (name, path) in written(&again, second.path()) {
            assert!(
                std::fs::read(path).unwrap() == std::fs::read(&files[&name]).unwrap(),
                "{name}"
            );
        }
        let (info, expected) = (read_info(&files).unwrap(), model.info());
        assert_eq!(info.family, expected.family);
        assert_eq!(info.tensors.len(), expected.tensors.len());
        for (name, tensor) in &expected.tensors {
            let read = &info.tensors[name];
            assert_eq!((&read.record, &read.shape), (&tensor.record, &tensor.shape), "{name}");
            assert_eq!(read.bytes, tensor.bytes, "{name}");
        }
    }

    #[test]
    fn files_that_disagree_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let files = written(&mixed(), folder.path());
        let manifest = std::fs::read_to_string(&files[MANIFEST]).unwrap();
        let edited = |from: &str, to: &str| {
            assert!(manifest.contains(from), "{from}");
            std::fs::write(&files[MANIFEST], manifest.replacen(from, to, 1)).unwrap();
            let reasons = [read(&files).err(), read_info(&files).err()];
            reasons.map(|e| e.map(|e| e.reason()))
        };
        use Reason::{MalformedFile, UnsupportedFormat};
        assert_eq!(edited("\"format\": 1", "\"format\": 2"), [Some(UnsupportedFormat); 2]);
        assert_eq!(edited("\"format\"", "\"x\": 0, \"format\""), [Some(MalformedFile); 2]);
        assert_eq!(edited("model.norm.weight", "model.norm.wait"), [Some(MalformedFile); 2]);
        assert_eq!(edited("\"Q4_1\"", "\"Q9_9\""), [Some(MalformedFile); 2]);
        assert_eq!(edited("\"Q4_1\"", "\"Q4_0\"")[0], Some(MalformedFile));
        assert_eq!(edited("\"bits\": 4", "\"bits\": 8")[0], Some(MalformedFile));
        let deep = format!("{{\"lineage\": {}", "[".repeat(100_000));
        std::fs::write(&files[MANIFEST], deep).unwrap();
        assert_eq!(read(&files).err().unwrap().reason(), MalformedFile);
        let mut without = files.clone();
        without.remove("config.json");
        assert_eq!(read(&without).err().unwrap().reason(), MalformedFile);
    }

    #[test]
    fn damaged_versions_are_survived() {
        let folder = tempfile::tempdir().unwrap();
        let files = written(&mixed(), folder.path());
        let mut rng = Stream::root(2).child("damage").rng();
        let content: BTreeMap<_, _> =
            files.iter().map(|(name, path)| (name, std::fs::read(path).unwrap())).collect();
        for _ in 0..600 {
            let (name, good) = content.iter().nth(rng.random_range(0..content.len())).unwrap();
            let header = match name.ends_with(".safetensors") {
                true => u64::from_le_bytes(good[..8].try_into().unwrap()) as usize + 64,
                false => good.len(),
            };
            std::fs::write(&files[*name], damage(good, header, &mut rng)).unwrap();
            let _ = read_info(&files);
            if let Ok(model) = read(&files) {
                for weight in model.weights.values() {
                    weight.to_f32();
                }
            }
            std::fs::write(&files[*name], good).unwrap();
        }
        read(&files).unwrap();
    }
}
