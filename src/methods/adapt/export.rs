//! Adapters as files of the PEFT library, and back; and as what serves.
//!
//! Every form but DoRA's is written as plain LoRA of the rank it takes: a core goes into `B`, a subtracted
//! start makes the rank twice as large (`[A; A0]`, `[B, -B0]`), so the files fit the base that everyone
//! has.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{Device, Var};
use serde_json::{Map, Value, json};

use super::find;
use super::module::{Core, Factor, LowRank, Magnitude, Module, Part, row_squares};
use super::shapes::{Shapes, module};
use super::tuned::Tuned;
use crate::error::{Error, Reason, Result};
use crate::formats::peft::contents::{Contents, Entry};
use crate::formats::peft::{Folder, PREFIX, Plain};
use crate::nn::adapter::{Adapter, Factors};
use crate::nn::weight::Weight;

/// What the files say of the base and the task.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    pub shapes: &'a Shapes,
    /// `base_model_name_or_path`
    pub base: &'a str,
    /// `task_type`: CAUSAL_LM, SEQ_CLS, TOKEN_CLS, FEATURE_EXTRACTION.
    pub task: &'a str,
    /// What the task's model puts before the names of the base: `bert.` under a classification head.
    pub inside: &'a str,
    /// Tensors of the head, by their names in the task's model (`classifier.weight`).
    pub heads: &'a BTreeMap<String, Plain>,
}

/// The files of `tuned` in the form of PEFT.
///
/// # Errors
/// UNSUPPORTED for what PEFT has no files for (no adapter at all), and for factors of embeddings.
pub fn peft(tuned: &Tuned, about: &About<'_>) -> Result<Folder> {
    check_linears(tuned, about)?;
    if tuned.modules.is_empty() {
        return Err(Error::new(
            Reason::Unsupported,
            "there is no adapter on a linear to write for PEFT: tensors that were trained whole make a \
             model, export that",
        ));
    }
    let dora = tuned.modules.values().filter(|m| m.magnitude.is_some()).count();
    if dora != 0 && dora != tuned.modules.len() {
        return Err(Error::internal("some adapters have magnitudes and some have none"));
    }
    let mut tensors = BTreeMap::new();
    let mut written: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    for adapter in tuned.modules.values() {
        let LowRank { shape: [rows, cols], rank, a, b, .. } = adapter.low_rank_part()?;
        let path = format!("{}{}", about.inside, module(&adapter.linear));
        let name = |end: &str| format!("{PREFIX}{path}.{end}");
        tensors.insert(name("lora_A.weight"), Plain::new(&[rank, cols], a));
        tensors.insert(name("lora_B.weight"), Plain::new(&[rows, rank], b));
        if let Some(magnitude) = &adapter.magnitude {
            let values = magnitude.values.values()?;
            tensors.insert(name("lora_magnitude_vector"), Plain::new(&[rows], values));
        }
        let root = if adapter.rslora { (rank as f64).sqrt() } else { rank as f64 };
        written.insert(path, (rank, adapter.scale * root));
    }
    add_whole(tuned, about, &mut tensors)?;
    Folder::new(config(tuned, about, &written, dora > 0)?, tensors)
}

/// The same as AdaLoRA: the columns of `B` with length 1, and their lengths in a vector between the factors,
/// as that method trains them. The rank at the start is the largest there is.
///
/// # Errors
/// UNSUPPORTED for DoRA and for what PEFT has no files for.
pub fn adalora(tuned: &Tuned, about: &About<'_>) -> Result<Folder> {
    check_linears(tuned, about)?;
    let parts: Vec<(String, LowRank)> = tuned
        .modules
        .values()
        .map(|adapter| {
            Ok((format!("{}{}", about.inside, module(&adapter.linear)), adapter.low_rank()?))
        })
        .collect::<Result<_>>()?;
    let Some(first) = parts.iter().map(|(_, part)| part.rank).max() else {
        return Err(Error::new(
            Reason::Unsupported,
            "there is no adapter on a linear to write for PEFT: tensors that were trained whole make a \
             model, export that",
        ));
    };
    let mut tensors = BTreeMap::new();
    let mut left = Map::new();
    for (path, LowRank { shape: [rows, cols], rank, a, mut b, scale, .. }) in parts {
        let mut lengths = vec![0f64; rank];
        for row in b.chunks(rank) {
            lengths.iter_mut().zip(row).for_each(|(l, b)| *l += f64::from(*b).powi(2));
        }
        lengths.iter_mut().for_each(|l| *l = l.sqrt());
        for row in b.chunks_mut(rank) {
            for (b, length) in row.iter_mut().zip(&lengths) {
                *b = if *length > 0.0 { (f64::from(*b) / length) as f32 } else { 0.0 };
            }
        }
        let e = lengths.iter().map(|length| (length * scale) as f32).collect();
        let name = |end: &str| format!("{PREFIX}{path}.{end}");
        tensors.insert(name("lora_A"), Plain::new(&[rank, cols], a));
        tensors.insert(name("lora_B"), Plain::new(&[rows, rank], b));
        tensors.insert(name("lora_E"), Plain::new(&[rank, 1], e));
        let kept: Vec<bool> = (0..first).map(|i| i < rank).collect();
        left.insert(format!("{path}.lora_E"), json!(kept));
    }
    add_whole(tuned, about, &mut tensors)?;
    let (bias, saved) = saved(tuned, about)?;
    let map = json!({
        "base_model_name_or_path": about.base,
        "beta1": 0.85,
        "beta2": 0.85,
        "bias": bias,
        "deltaT": 1,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "init_r": first,
        // The scale is in E: alpha over the first rank and this offset is 1.
        "lora_alpha": first as f64 + 1e-5,
        "lora_dropout": tuned.dropout,
        "modules_to_save": saved,
        "orth_reg_weight": 0.5,
        "peft_type": "ADALORA",
        "r": first,
        "rank_pattern": left,
        "target_modules": targets(tuned, about),
        "target_r": first,
        "task_type": if about.task.is_empty() { Value::Null } else { json!(about.task) },
        "tfinal": 0,
        "tinit": 0,
        // PEFT wants a schedule; who trains on sets another.
        "total_step": 1,
    });
    match map {
        Value::Object(map) => Folder::new(map, tensors),
        _ => Err(Error::internal("the settings of an adapter are no object")),
    }
}

fn check_linears(tuned: &Tuned, about: &About<'_>) -> Result<()> {
    let linear = |name: &&String| !about.shapes.linears.iter().any(|(known, _)| known == *name);
    match tuned.modules.keys().find(linear) {
        None => Ok(()),
        Some(name) => Err(Error::new(
            Reason::Unsupported,
            format!("'{name}' is an embedding, whose factors are exported as they came"),
        )),
    }
}

/// Adds the tensors that were trained whole and those of the head.
fn add_whole(
    tuned: &Tuned,
    about: &About<'_>,
    tensors: &mut BTreeMap<String, Plain>,
) -> Result<()> {
    for (name, var) in &tuned.whole {
        let values = var.flatten_all()?.to_vec1::<f32>()?;
        let key = format!("{PREFIX}{}{name}", about.inside);
        tensors.insert(key, Plain::new(var.dims(), values));
    }
    for (name, plain) in about.heads {
        tensors.insert(format!("{PREFIX}{name}"), plain.clone());
    }
    Ok(())
}

/// PEFT's `bias` and `modules_to_save`.
fn saved(tuned: &Tuned, about: &About<'_>) -> Result<(&'static str, Value)> {
    let (bias, mut saved) = whole(tuned, about)?;
    saved.extend(about.heads.keys().map(|name| module(name).to_owned()));
    Ok((bias, if saved.is_empty() { Value::Null } else { json!(saved) }))
}

fn config(
    tuned: &Tuned,
    about: &About<'_>,
    written: &BTreeMap<String, (usize, f64)>,
    dora: bool,
) -> Result<Map<String, Value>> {
    let rslora = tuned.modules.values().any(|m| m.rslora);
    let rank = commonest(written.values().map(|(rank, _)| *rank));
    let alpha = commonest(written.values().map(|(_, alpha)| alpha.to_bits()));
    let (rank, alpha) = (rank.unwrap_or_default(), f64::from_bits(alpha.unwrap_or_default()));
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (path, (r, a)) in written {
        if *r != rank {
            ranks.insert(path.clone(), json!(r));
        }
        if a.to_bits() != alpha.to_bits() {
            alphas.insert(path.clone(), number(*a));
        }
    }
    let (bias, saved) = saved(tuned, about)?;
    let map = json!({
        "alpha_pattern": alphas,
        "base_model_name_or_path": about.base,
        "bias": bias,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": number(alpha),
        "lora_dropout": tuned.dropout,
        "modules_to_save": saved,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "target_modules": targets(tuned, about),
        "task_type": if about.task.is_empty() { Value::Null } else { json!(about.task) },
        "use_dora": dora,
        "use_rslora": rslora,
    });
    match map {
        Value::Object(map) => Ok(map),
        _ => Err(Error::internal("the settings of an adapter are no object")),
    }
}

/// The most frequent value; of equally frequent ones the smallest.
fn commonest<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_insert(0) += 1);
    counts.into_iter().max_by(|a, b| a.1.cmp(&b.1).then(b.0.cmp(&a.0))).map(|(value, _)| value)
}

/// A number without a fraction as an integer, as people write alpha.
fn number(value: f64) -> Value {
    // Scales are quotients: what is an integer but for rounding is meant to be one.
    let near = value.round();
    match (value - near).abs() < 1e-9 * value.abs().max(1.0) && near.abs() < 1e15 {
        true => json!(near as i64),
        false => json!(value),
    }
}

/// Short names where they say the same as the whole ones, which not all wrappers share.
fn targets(tuned: &Tuned, about: &About<'_>) -> Vec<String> {
    let last = |linear: &str| module(linear).rsplit('.').next().unwrap_or_default().to_owned();
    let short: BTreeSet<String> = tuned.modules.keys().map(|linear| last(linear)).collect();
    let meant = about.shapes.linears.iter().filter(|(name, _)| short.contains(&last(name)));
    if meant.clone().count() == tuned.modules.len()
        && meant.clone().all(|(name, _)| tuned.modules.contains_key(name))
    {
        return short.into_iter().collect();
    }
    tuned.modules.keys().map(|linear| format!("{}{}", about.inside, module(linear))).collect()
}

/// PEFT's `bias`, and the modules that were trained whole.
fn whole(tuned: &Tuned, about: &About<'_>) -> Result<(&'static str, BTreeSet<String>)> {
    let is_bias = |name: &&String| name.ends_with(".bias");
    let saved: BTreeSet<String> =
        tuned.whole.keys().filter(|n| !is_bias(n)).map(|name| module(name).to_owned()).collect();
    let biases: Vec<String> = tuned
        .whole
        .keys()
        .filter(|name| is_bias(name) && !saved.contains(module(name)))
        .cloned()
        .collect();
    let adapted: Vec<String> = tuned.modules.keys().cloned().collect();
    let without_saved = |mut names: Vec<String>| {
        names.retain(|name| !saved.contains(module(name)));
        names.sort();
        names
    };
    let kind = if biases.is_empty() {
        "none"
    } else if biases == without_saved(about.shapes.biases(Some(&adapted))) {
        "lora_only"
    } else if biases == without_saved(about.shapes.all_biases()) {
        "all"
    } else {
        return Err(Error::new(
            Reason::Unsupported,
            "some biases were trained, neither all nor those of the adapted linears, which PEFT has no \
             setting for",
        ));
    };
    Ok((kind, saved.into_iter().map(|path| format!("{}{path}", about.inside)).collect()))
}

/// The adapter as the engine serves it.
///
/// # Errors
/// UNSUPPORTED for DoRA and for tensors that were trained whole: they are merged into the base instead.
pub fn served(tuned: &Tuned) -> Result<Adapter> {
    if let Some(name) = tuned.whole.keys().next() {
        return Err(Error::new(
            Reason::Unsupported,
            format!(
                "'{name}' was trained whole, which cannot be served beside its base; merge the adapter \
                 into its base"
            ),
        ));
    }
    let linears = tuned.modules.values().map(|adapter| {
        let LowRank { shape, rank, a, b, scale, .. } = adapter.low_rank()?;
        let factors = Factors::from_f32(shape, rank, &a, &b, scale as f32)?;
        Ok((adapter.linear.clone(), Arc::new(factors)))
    });
    Ok(Adapter { linears: linears.collect::<Result<_>>()? })
}

/// What files say, as something that can be tuned further, merged and written. `inside` is cut from the
/// names; tensors of heads are returned beside. A bias of factors becomes a part of the layer's bias.
///
/// # Errors
/// MODEL_UNSUITABLE for an adapter of another model; UNSUPPORTED_FORMAT for biases of DoRA's factors.
pub fn load(
    contents: &Contents,
    inside: &str,
    shapes: &Shapes,
    weights: &BTreeMap<String, Arc<Weight>>,
) -> Result<(Tuned, BTreeMap<String, Plain>)> {
    let mut tuned = Tuned::new(0.0, "");
    for (path, entry) in &contents.modules {
        let path = path.strip_prefix(inside).unwrap_or(path);
        let linear = format!("{path}.weight");
        let found = shapes.linears.iter().find(|(name, _)| *name == linear);
        let Some((_, shape)) = found else {
            return Err(misfit(format!("it has no linear '{linear}'")));
        };
        if *shape != entry.shape {
            return Err(misfit(format!(
                "'{linear}' is {shape:?}, but the adapter adds to {:?}",
                entry.shape
            )));
        }
        if let Some(own) = &entry.bias {
            let (name, values) = bias(&linear, entry, own, weights)?;
            tuned.whole.insert(name, values);
        }
        let adapter = from_entry(linear, entry, weights)?;
        tuned.modules.insert(adapter.linear.clone(), adapter);
    }
    for (path, entry) in &contents.tables {
        let name = format!("{}.weight", path.strip_prefix(inside).unwrap_or(path));
        if shapes.tensors.get(&name).map(Vec::as_slice) != Some(&entry.shape) {
            return Err(misfit(format!("it has no table '{name}' of shape {:?}", entry.shape)));
        }
        tuned.modules.insert(name.clone(), from_entry(name, entry, weights)?);
    }
    let mut heads = BTreeMap::new();
    for (name, plain) in &contents.whole {
        let inner = name.strip_prefix(inside).unwrap_or(name);
        match shapes.tensors.get(inner) {
            Some(shape) if *shape == plain.shape => {
                let var = Var::from_vec(plain.values.clone(), shape.as_slice(), &Device::Cpu)?;
                if tuned.whole.insert(inner.to_owned(), var).is_some() {
                    return Err(Error::new(
                        Reason::UnsupportedFormat,
                        format!(
                            "'{inner}' was trained whole and has a bias of factors beside; merge this \
                             adapter into its base and import that instead"
                        ),
                    ));
                }
            }
            Some(shape) => {
                return Err(misfit(format!(
                    "'{inner}' is {shape:?}, but the adapter has {:?}",
                    plain.shape
                )));
            }
            None => {
                heads.insert(name.clone(), plain.clone());
            }
        }
    }
    Ok((tuned, heads))
}

/// The bias of a linear with that of its factors in it; where the base has none it is one of zeros.
fn bias(
    linear: &str,
    entry: &Entry,
    own: &[f32],
    weights: &BTreeMap<String, Arc<Weight>>,
) -> Result<(String, Var)> {
    if entry.magnitude.is_some() {
        return Err(Error::new(
            Reason::UnsupportedFormat,
            format!("the adapter of '{linear}' is DoRA with a bias of its own, which is not read"),
        ));
    }
    let name = format!("{}.bias", module(linear));
    let mut values = match weights.get(&name) {
        Some(stored) => stored.to_f32(),
        None => vec![0.0; own.len()],
    };
    values.iter_mut().zip(own).for_each(|(v, o)| *v += entry.scale as f32 * o);
    let len = values.len();
    Ok((name, Var::from_vec(values, len, &Device::Cpu)?))
}

fn from_entry(
    linear: String,
    entry: &Entry,
    weights: &BTreeMap<String, Arc<Weight>>,
) -> Result<Module> {
    let ([rows, cols], rank) = (entry.shape, entry.rank);
    let (core, core_name) = match (&entry.matrix, &entry.diagonal) {
        (Some(matrix), _) => {
            (Core::Matrix(Part::trained(matrix.clone(), &[rank, rank])?), "lora_R")
        }
        (None, Some(e)) => (Core::Diagonal(Part::trained(e.clone(), &[rank])?), "lora_E"),
        (None, None) => (Core::Identity, ""),
    };
    // The factors around a matrix are those that LoRA-XS froze.
    let factor = |values: &[f32], shape: &[usize]| {
        let part = match core {
            Core::Matrix(_) => Part::fixed(values.to_vec(), shape),
            _ => Part::trained(values.to_vec(), shape),
        };
        part.map(Factor::Plain)
    };
    let (a, b) = (factor(&entry.a, &[rank, cols])?, factor(&entry.b, &[rows, rank])?);
    let magnitude = match &entry.magnitude {
        None => None,
        Some(values) => {
            let stored = find(weights, &linear)?;
            Some(Magnitude::new(values.clone(), stored, row_squares(stored))?)
        }
    };
    Ok(Module {
        linear,
        shape: entry.shape,
        rank,
        scale: entry.scale,
        rslora: entry.rslora,
        a,
        b,
        core,
        core_name,
        start: None,
        magnitude,
        ldu: None,
    })
}

fn misfit(problem: String) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!(
            "the adapter was made for another model: {problem}; name the base it was trained on"
        ),
    )
}

#[cfg(test)]
mod tests;
