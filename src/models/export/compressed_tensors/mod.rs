//! Folders in the form of vLLM's compressed-tensors library, whose code is the specification: integers packed
//! into 32-bit words (`pack-quantized`), or two values of four and a bitmap (`sparse-24-bitmask`).
//!
//! A folder has one of the two. Matrices with a grid are packed, and all others of that model stay dense; where
//! no matrix has a grid, those with at most two values in four consecutive columns are sparse.

mod config;
mod packed;
mod sparse_24;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use super::grid::Grid;
use super::hugging_face::{self, SHARD};
use super::report::describe;
use super::{Drift, Exported, Report, TensorReport, dense_bytes, each_rows, put_dense, torch_name};
use crate::error::{Error, Reason, Result};
use crate::formats::safetensors::{Plan, write_shards};
use crate::models::{AnyModel, files};
use crate::nn::dtype::Dtype;
use crate::nn::weight::Weight;
use crate::progress::Progress;

/// How a weight is written.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    Packed(packed::Scheme),
    Sparse24,
    Dense,
}

/// A tensor of the file.
struct Piece<'a> {
    weight: &'a str,
    part: Part,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Dense,
    Packed(packed::Part),
    Sparse24(sparse_24::Part),
}

/// Writes a folder that compressed-tensors reads. What is not packed, and the scales of what is, become `dtype`
/// elements: F16 holds scales exactly, as F32 does; BF16 rounds them.
///
/// # Errors
/// `MODEL_UNSUITABLE` for families and layouts that the form does not hold, `INVALID_FIELD` for another type,
/// `NON_FINITE` for values that `dtype` cannot hold, `CANCELLED`.
pub fn compressed_tensors(
    model: &AnyModel,
    folder: &Path,
    dtype: Dtype,
    progress: &Progress,
) -> Result<Exported> {
    let torch = torch_name(dtype)?;
    check_family(model)?;
    let ways = ways(model, progress)?;
    std::fs::create_dir_all(folder)?;

    let (mut plans, mut pieces) = (Vec::new(), BTreeMap::new());
    let mut add = |weight: &'_ str, part, (name, dtype, shape): (String, Dtype, Vec<usize>)| {
        pieces.insert(name.clone(), (weight.to_owned(), part));
        plans.push(Plan { name, dtype, shape });
    };
    for (name, weight) in model.weights() {
        let shape = weight.shape();
        match &ways[name] {
            Way::Dense => add(name, Part::Dense, (name.clone(), dtype, shape.to_vec())),
            Way::Packed(scheme) => {
                for (part, plan) in packed::parts(module(name), shape, scheme, dtype) {
                    add(name, Part::Packed(part), plan);
                }
            }
            Way::Sparse24 => {
                for (part, plan) in sparse_24::parts(module(name), shape, dtype) {
                    add(name, Part::Sparse24(part), plan);
                }
            }
        }
    }
    let mut drifts: BTreeMap<String, Drift> = BTreeMap::new();
    let mut data = |plan: &Plan, out: &mut dyn Write| -> Result<()> {
        let (name, part) = pieces.get(&plan.name).ok_or_else(|| lost(&plan.name))?;
        let piece = Piece { weight: name, part: *part };
        let drift = drifts.entry(name.clone()).or_default();
        put(model, &piece, &ways[name], dtype, out, drift, progress).map_err(|e| e.within(name))
    };
    let mut names = write_shards(folder, &plans, SHARD, &mut data)?;
    let mut settings = hugging_face::config(model.config(), torch);
    if let Some(map) = settings.as_object_mut() {
        map.insert("quantization_config".to_owned(), config::config(model, &ways));
    }
    names.extend(files::write_text(&settings, model.tokenizer().map(|t| &**t), folder)?);
    names.sort_unstable();

    let tensors = model.weights().iter().map(|(name, weight)| {
        let drift = drifts.remove(name).unwrap_or_default();
        TensorReport {
            name: name.clone(),
            stored_as: describe(weight),
            written_as: match &ways[name] {
                Way::Packed(scheme) => scheme.to_string(),
                Way::Sparse24 => format!("2 of 4 of {dtype}"),
                Way::Dense => dtype.to_string(),
            },
            bytes: match &ways[name] {
                Way::Packed(scheme) => packed::bytes(weight.shape(), scheme, dtype),
                Way::Sparse24 => sparse_24::bytes(weight.shape(), dtype),
                Way::Dense => dense_bytes(weight.shape(), dtype),
            },
            // Two of four are found in dense matrices too, and values may be rounded on their way.
            carried: match &ways[name] {
                Way::Packed(_) => true,
                Way::Sparse24 => matches!(&**weight, Weight::Sparse(_)) && drift.max() == 0.0,
                Way::Dense => false,
            },
            drift,
        }
    });
    let tensors = tensors.collect();
    let mut files: Vec<_> = names.into_iter().map(|name| folder.join(name)).collect();
    files.extend(hugging_face::modules(model, folder)?);
    Ok(Exported { files, report: Report { tensors, warnings: warnings(model, &ways) } })
}

fn lost(name: &str) -> Error {
    Error::internal(format!("tensor '{name}' of an export vanished"))
}

/// The module that a weight belongs to, as configurations name it.
fn module(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// Whether a tensor is the matrix of a linear layer: of others the form knows nothing.
fn linear(name: &str, weight: &Weight) -> bool {
    weight.shape().len() == 2 && name.ends_with(".weight") && !name.contains("embed")
}

fn unsuitable(message: String) -> Error {
    Error::new(Reason::ModelUnsuitable, message)
}

fn check_family(model: &AnyModel) -> Result<()> {
    if !matches!(model, AnyModel::Decoder(_) | AnyModel::Encoder(_)) {
        return Err(unsuitable(format!(
            "compressed-tensors holds decoders and encoders, and no program would load a model of the \
             family {} from it; export in the form hugging_face or native",
            model.family()
        )));
    }
    let odd = hugging_face::uneven(model.config());
    if let Some(odd) = odd.or_else(|| hugging_face::extra_biases(model.config())) {
        return Err(unsuitable(format!(
            "{odd}, which no reader of compressed-tensors takes; export in the form hugging_face"
        )));
    }
    Ok(())
}

/// How each weight is written.
fn ways(model: &AnyModel, progress: &Progress) -> Result<BTreeMap<String, Way>> {
    let packed = |name: &str, weight: &Weight| {
        let grid = Grid::of(weight).filter(|_| linear(name, weight));
        grid.map_or(Way::Dense, |grid| Way::Packed(packed::Scheme::of(&grid)))
    };
    let mut ways: BTreeMap<String, Way> =
        model.weights().iter().map(|(name, w)| (name.clone(), packed(name, w))).collect();
    if ways.values().all(|way| *way == Way::Dense) {
        for (name, weight) in model.weights() {
            if linear(name, weight) && sparse_24::holds(weight, progress)? {
                ways.insert(name.clone(), Way::Sparse24);
            }
        }
    }
    if ways.values().all(|way| *way == Way::Dense) {
        return Err(unsuitable(format!(
            "no matrix of the model is something that compressed-tensors holds: codes of 2, 3, 4 or 8 bits in \
             groups, or two values of each four columns ({}); quantise it or prune it 2:4, or export in the \
             form hugging_face",
            layouts(model)
        )));
    }
    Ok(ways)
}

/// The layouts of the matrices, for a message.
fn layouts(model: &AnyModel) -> String {
    let mut all: Vec<String> = Vec::new();
    for (name, weight) in model.weights() {
        let layout = describe(weight);
        if linear(name, weight) && !all.contains(&layout) {
            all.push(layout);
        }
    }
    all.truncate(5);
    format!("there are: {}", all.join("; "))
}

fn put(
    model: &AnyModel,
    piece: &Piece<'_>,
    way: &Way,
    dtype: Dtype,
    out: &mut dyn Write,
    drift: &mut Drift,
    progress: &Progress,
) -> Result<()> {
    let weight = model.weights().get(piece.weight).ok_or_else(|| lost(piece.weight))?;
    match (piece.part, way) {
        (Part::Packed(part), Way::Packed(scheme)) => {
            let grid = Grid::of(weight).ok_or_else(|| lost(piece.weight))?;
            packed::put(&grid, scheme, part, dtype, out, drift, progress)
        }
        (Part::Sparse24(part), _) => sparse_24::put(weight, part, dtype, out, drift, progress),
        _ => each_rows(weight, None, progress, |rows| put_dense(rows, dtype, out, drift)),
    }
}

/// What readers other than the library itself may stumble over.
fn warnings(model: &AnyModel, ways: &BTreeMap<String, Way>) -> Vec<String> {
    let mut warnings = Vec::new();
    if ways.values().any(|way| *way == Way::Sparse24) {
        warnings.push(
            "compressed-tensors reads sparse-24-bitmask up to its version 0.14; later versions, and those of vLLM \
             and transformers that use them, do not"
                .to_owned(),
        );
    }
    if ways.values().any(|way| matches!(way, Way::Packed(scheme) if !scheme.symmetric)) {
        warnings.push(
            "transformers does not load packed zero points (5.23 with compressed-tensors 0.20); the library itself \
             unpacks them, and symmetric grids are loaded by both"
                .to_owned(),
        );
    }
    let mut groups: Vec<usize> = ways
        .iter()
        .filter_map(|(name, way)| match way {
            Way::Packed(scheme) if scheme.group != model.weights()[name].cols() => {
                Some(scheme.group)
            }
            _ => None,
        })
        .filter(|group| ![32, 64, 128].contains(group))
        .collect();
    groups.sort_unstable();
    groups.dedup();
    if !groups.is_empty() {
        warnings.push(format!(
            "groups of {groups:?} columns are read by the library; kernels of vLLM want 32, 64, 128 or whole rows"
        ));
    }
    for parts in [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].as_slice(),
        &["mlp.gate_proj", "mlp.up_proj"],
    ] {
        let differs = |name: &&String| {
            let Some(prefix) = name.strip_suffix(&format!("{}.weight", parts[0])) else {
                return false;
            };
            parts.iter().any(|part| ways.get(&format!("{prefix}{part}.weight")) != ways.get(*name))
        };
        if let Some(name) = ways.keys().find(differs) {
            warnings.push(format!(
                "{} and its neighbours ({}) are written differently; vLLM joins them and refuses that",
                module(name),
                parts[1..].join(", ")
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests;
