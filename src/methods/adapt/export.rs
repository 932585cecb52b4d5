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
mod tests {
    use super::super::testing;
    use super::super::testing::{Case, all_linear};
    use super::*;
    use crate::formats::peft::{self as files, Use};
    use crate::models::decoder::random;
    use crate::proto::v1;

    fn about<'a>(case: &'a Case, heads: &'a BTreeMap<String, Plain>) -> About<'a> {
        About { shapes: case.shapes(), base: "base", task: "CAUSAL_LM", inside: "", heads }
    }

    fn read(folder: &Folder) -> Contents {
        Contents::parse(&folder.config, &folder.tensors, Use::Keep).unwrap()
    }

    #[test]
    fn what_is_written_is_read_as_the_same_function_and_written_the_same() {
        for method in testing::low_rank_methods() {
            let case = Case::decoder();
            let tuned = case.start(method.as_ref());
            case.disturb(&tuned, 0.1);
            let (name, want) = (method.card().name, case.outputs(&tuned));
            let none = BTreeMap::new();
            let folder = peft(&tuned, &about(&case, &none)).unwrap();
            let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            folder.write(one.path()).unwrap();
            let again = Folder::read(one.path()).unwrap();
            again.write(two.path()).unwrap();
            for file in [files::CONFIG, files::WEIGHTS] {
                let bytes = |folder: &tempfile::TempDir| std::fs::read(folder.path().join(file));
                assert_eq!(bytes(&one).unwrap(), bytes(&two).unwrap(), "{name}: {file}");
            }
            let contents = read(&again);
            let (loaded, heads) = load(&contents, "", case.shapes(), case.weights()).unwrap();
            assert!(heads.is_empty());
            for (got, want) in case.outputs(&loaded).iter().zip(&want) {
                assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{name}: {got}, {want}");
            }
            // From what was loaded, the same files again.
            let once_more = peft(&loaded, &about(&case, &none)).unwrap();
            assert_eq!(once_more.config, folder.config, "{name}");
            for (tensor, was) in &folder.tensors {
                assert_eq!(once_more.tensors[tensor].data, was.data, "{name}: {tensor}");
            }
            let dora = tuned.modules.values().any(|m| m.magnitude.is_some());
            assert_eq!(served(&tuned).is_err(), dora, "{name}");
            if !dora {
                let ours = served(&tuned).unwrap();
                assert_eq!(files::read(one.path()).unwrap(), ours, "{name}");
            }
        }
    }

    #[test]
    fn adalora_files_say_the_same() {
        for method in testing::low_rank_methods() {
            let (case, name) = (Case::decoder(), method.card().name);
            let tuned = case.start(method.as_ref());
            case.disturb(&tuned, 0.1);
            let tuned = method.finish(tuned).unwrap();
            let none = BTreeMap::new();
            let folder = adalora(&tuned, &about(&case, &none));
            if name == "dora" {
                assert_eq!(folder.unwrap_err().reason(), Reason::Unsupported);
                continue;
            }
            let folder = folder.unwrap();
            let contents = read(&folder);
            assert_eq!(contents.kind, crate::formats::peft::Kind::AdaLora);
            let (loaded, _) = load(&contents, "", case.shapes(), case.weights()).unwrap();
            for (got, want) in case.outputs(&loaded).iter().zip(case.outputs(&tuned)) {
                assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{name}: {got}, {want}");
            }
            for (path, entry) in &contents.modules {
                for r in 0..entry.rank {
                    let column = entry.b.iter().skip(r).step_by(entry.rank);
                    let length: f32 = column.map(|b| b * b).sum::<f32>().sqrt();
                    assert!((length - 1.0).abs() < 1e-5, "{name}: {path} has length {length}");
                }
            }
            // As what serves, from the bytes.
            let served = files::parse(&folder.config, &folder.file()).unwrap();
            assert_eq!(served.linears.len(), tuned.modules.len(), "{name}");
        }
    }

    #[test]
    fn names_ranks_and_alphas_are_those_that_peft_reads() {
        let case = Case::decoder();
        let options = v1::AdapterOptions {
            alpha: Some(6.0),
            layers: vec![0, 2],
            targets: vec!["q_proj".into(), "v_proj".into()],
            rank_pattern: [("layers.2.self_attn.q_proj".to_owned(), 4)].into(),
            alpha_pattern: [("v_proj".to_owned(), 1.5)].into(),
            ..all_linear(3)
        };
        let tuned = case.start(&v1::Lora { adapter: Some(options), ..Default::default() });
        let none = BTreeMap::new();
        let folder = peft(&tuned, &about(&case, &none)).unwrap();
        let config: Value = serde_json::from_slice(&folder.config).unwrap();
        assert_eq!(config["r"], 3);
        let q2 = "model.layers.2.self_attn.q_proj";
        assert_eq!(config["rank_pattern"], json!({ q2: 4 }));
        // Two have alpha 6, two 1.5; the smaller is the default.
        assert_eq!(config["lora_alpha"], json!(1.5));
        assert_eq!(config["alpha_pattern"][q2], 6);
        assert_eq!(config["target_modules"].as_array().unwrap().len(), 4);
        assert!(folder.tensors.contains_key(&format!("base_model.model.{q2}.lora_A.weight")));
        let all = case.start(&v1::Lora { adapter: Some(all_linear(2)), ..Default::default() });
        let folder = peft(&all, &about(&case, &none)).unwrap();
        let config: Value = serde_json::from_slice(&folder.config).unwrap();
        let short = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
        assert_eq!(config["target_modules"], json!(short));
        assert_eq!(config["lora_alpha"], 2);
        let text = String::from_utf8(folder.config).unwrap();
        assert!(
            text.starts_with(
                "{\n  \"alpha_pattern\": {},\n  \"base_model_name_or_path\": \"base\","
            )
        );
    }

    #[test]
    fn whole_modules_biases_and_heads() {
        let case = Case::encoder();
        let options = v1::AdapterOptions {
            targets: vec!["query".into()],
            modules_to_save: vec!["embeddings.LayerNorm".into()],
            bias: v1::AdapterBias::LoraOnly as i32,
            ..all_linear(2)
        };
        let tuned = case.start(&v1::Lora { adapter: Some(options), ..Default::default() });
        let heads: BTreeMap<String, Plain> =
            [("classifier.weight".to_owned(), Plain::new(&[2, 32], vec![0.5; 64]))].into();
        let about =
            About { task: "SEQ_CLS", inside: "bert.", heads: &heads, ..about(&case, &heads) };
        let folder = peft(&tuned, &about).unwrap();
        let config: Value = serde_json::from_slice(&folder.config).unwrap();
        assert_eq!(config["bias"], "lora_only");
        assert_eq!(config["modules_to_save"], json!(["bert.embeddings.LayerNorm", "classifier"]));
        let query = "base_model.model.bert.encoder.layer.0.attention.self.query";
        for name in [
            format!("{query}.lora_A.weight"),
            format!("{query}.bias"),
            "base_model.model.bert.embeddings.LayerNorm.weight".to_owned(),
            "base_model.model.classifier.weight".to_owned(),
        ] {
            assert!(folder.tensors.contains_key(&name), "{name}");
        }
        let contents = read(&folder);
        let (loaded, found) = load(&contents, "bert.", case.shapes(), case.weights()).unwrap();
        assert_eq!(found, heads);
        assert_eq!(loaded.values().unwrap(), tuned.values().unwrap());
        // Not to be served so.
        let error = files::parse(&folder.config, &folder.file()).unwrap_err();
        assert_eq!(error.reason(), Reason::UnsupportedFormat);
        assert!(served(&tuned).is_err());
    }

    #[test]
    fn adapters_of_other_models_are_refused() {
        let (ours, theirs) = (Case::decoder(), Case::encoder());
        let method = v1::Lora { adapter: Some(all_linear(2)), ..Default::default() };
        let none = BTreeMap::new();
        let folder = peft(&ours.start(&method), &about(&ours, &none)).unwrap();
        let contents = read(&folder);
        let error = load(&contents, "", theirs.shapes(), theirs.weights()).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let empty = peft(&Tuned::default(), &about(&ours, &none)).unwrap_err();
        assert_eq!(empty.reason(), Reason::Unsupported);
    }

    #[test]
    fn adapters_of_another_width_say_what_was_wanted() {
        let ours = Case::decoder();
        let mut config = random::tiny("llama");
        config["intermediate_size"] = json!(96);
        let theirs = Case::of_decoder(random::model(config, 1).unwrap());
        let method = v1::Lora { adapter: Some(all_linear(2)), ..Default::default() };
        let none = BTreeMap::new();
        let folder = peft(&theirs.start(&method), &about(&theirs, &none)).unwrap();
        let error = load(&read(&folder), "", ours.shapes(), ours.weights()).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        for part in ["model.layers.0.mlp.down_proj.weight", "[32, 80]", "[32, 96]"] {
            assert!(error.message().contains(part), "{error} lacks {part}");
        }
    }

    #[test]
    fn names_of_special_parts_and_the_mark_of_the_format() {
        let case = Case::decoder();
        let none = BTreeMap::new();
        let q = "model.layers.0.self_attn.q_proj";
        let settings =
            |folder: &Folder| -> Value { serde_json::from_slice(&folder.config).unwrap() };
        let dora = case.start(&v1::Dora { adapter: Some(all_linear(2)) });
        let folder = peft(&dora, &about(&case, &none)).unwrap();
        assert_eq!(folder.metadata["format"], "pt");
        let magnitude = format!("base_model.model.{q}.lora_magnitude_vector");
        assert_eq!(folder.tensors[&magnitude].shape, [64], "a name without .weight");
        assert_eq!(settings(&folder)["use_dora"], true);
        let lora = case.start(&v1::Lora { adapter: Some(all_linear(2)), ..Default::default() });
        let folder = adalora(&lora, &about(&case, &none)).unwrap();
        for (end, shape) in [("lora_A", [2, 32]), ("lora_B", [64, 2]), ("lora_E", [2, 1])] {
            let name = format!("base_model.model.{q}.{end}");
            assert_eq!(folder.tensors[&name].shape, shape, "{name}");
        }
        let config = settings(&folder);
        assert_eq!(config["rank_pattern"][format!("{q}.lora_E")], json!([true, true]));
        assert_eq!((&config["peft_type"], &config["init_r"]), (&json!("ADALORA"), &json!(2)));
    }
}
