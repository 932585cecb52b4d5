//! Adapters as they are stored: whichever files there are, as one thing that serves and merges.
//!
//! Files of PEFT come first, which any version of the model takes; our own are read where there are no
//! others, and when an adapter is imported, for they say more. A head has two files of its own, so that its
//! labels travel with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::native;
use super::shapes::{Shapes, module};
use super::tuned::Tuned;
use super::{export, find};
use crate::error::{Error, Reason, Result};
use crate::formats::peft::contents::Contents;
use crate::formats::peft::{self, Folder, Plain, Use};
use crate::formats::{malformed, quoted, safetensors};
use crate::models::{AnyModel, decoder, encoder, not_for_text};
use crate::nn::adapter::{Changes, Product};
use crate::nn::weight::Weight;
use crate::proto::v1;
use crate::serve::head::{Head, Task};
use crate::store::adapters::Facts;
use crate::train::head::{HEAD_BIAS, HEAD_WEIGHT, HIDDEN_TOKENS};

/// Names of the files of a head.
pub const HEAD_CONFIG: &str = "head_config.json";
pub const HEAD_WEIGHTS: &str = "head.safetensors";

/// Names of all files that an adapter may have.
pub const FILES: [&str; 6] =
    [peft::CONFIG, peft::WEIGHTS, native::HEADER, native::TENSORS, HEAD_CONFIG, HEAD_WEIGHTS];

/// Largest settings of a head: labels.
const MAX_HEAD: u64 = 4 << 20;

/// What the task's model puts before the names of its encoder.
pub const INSIDE: &str = "bert.";

/// A decoder's table of embeddings.
const EMBEDDING: &str = "model.embed_tokens.weight";

/// `head_config.json`.
#[derive(Debug, Serialize, Deserialize)]
struct HeadFile {
    #[serde(default)]
    base_model_name_or_path: String,
    #[serde(default)]
    labels: Vec<String>,
    /// `single_label_classification`, `multi_label_classification`, `regression`, `token_classification` or
    /// `masked_language_modeling`.
    problem_type: String,
    #[serde(default)]
    task_type: String,
}

/// Names of the tasks of heads in their files.
const TASKS: [(Task, &str); 4] = [
    (Task::Classification, "single_label_classification"),
    (Task::MultiLabel, "multi_label_classification"),
    (Task::Regression, "regression"),
    (Task::Tagging, "token_classification"),
];

/// What heads for hidden tokens are for, in their files. They go with an adapter for those who train it on;
/// nothing here predicts with them.
const HIDDEN: &str = "masked_language_modeling";

/// An adapter that was read.
#[derive(Debug)]
pub struct Stored {
    pub tuned: Tuned,
    /// None of a head for hidden tokens, too.
    pub head: Option<Head>,
    /// The method that made it, where our own files say it.
    pub adaptation: Option<v1::Adaptation>,
}

/// Whether the base is the version that an adapter was made for.
#[derive(Debug, Clone, Copy)]
pub enum Base<'a> {
    /// It must be, and this is the digest of its weights; our own files are read first.
    Own(&'a str),
    /// A version of the same model.
    Any,
}

impl Stored {
    /// Reads an adapter from its files, by their names, for a version of its model.
    ///
    /// # Errors
    /// What is wrong with a file; MODEL_UNSUITABLE for an adapter of another model, UNSUPPORTED_FORMAT for
    /// what is not read.
    pub fn read(
        paths: &BTreeMap<String, PathBuf>,
        base: Base<'_>,
        model: &AnyModel,
        shapes: &Shapes,
    ) -> Result<Self> {
        let pair = |names: [&str; 2]| Some((paths.get(names[0])?, paths.get(names[1])?));
        let own = pair([native::HEADER, native::TENSORS]);
        let others = pair([peft::CONFIG, peft::WEIGHTS]);
        let files = pair([HEAD_CONFIG, HEAD_WEIGHTS]);
        let head = match files {
            None => None,
            Some((config, weights)) => read_head(config, weights, model)?,
        };
        let weights = model.weights();
        let (tuned, adaptation) = match (base, own, others) {
            (Base::Own(digest), Some((header, tensors)), _) => {
                let read = native::open([header, tensors], Some(digest), shapes, weights)?;
                (read.tuned, Some(read.adaptation))
            }
            (_, _, Some((config, tensors))) => {
                (read_peft(config, tensors, files.is_some(), shapes, weights)?, None)
            }
            (Base::Any, Some((header, tensors)), None) => {
                let read = native::open([header, tensors], None, shapes, weights)?;
                (read.tuned, Some(read.adaptation))
            }
            (_, None, None) if files.is_some() => (Tuned::default(), None),
            (_, None, None) => {
                return Err(Error::new(
                    Reason::SourceUnavailable,
                    format!(
                        "the adapter lacks {} and {}, or {} and {}; name the folder that \
                         save_pretrained or an export wrote",
                        peft::CONFIG,
                        peft::WEIGHTS,
                        native::HEADER,
                        native::TENSORS
                    ),
                ));
            }
        };
        Ok(Self { tuned, head, adaptation })
    }

    /// How it changes its base.
    pub fn method(&self) -> v1::AdapterMethod {
        method(&self.tuned, self.head.is_some())
    }
}

/// An adapter ready to run beside its base.
#[derive(Debug)]
pub enum Ready {
    Decoder(decoder::plan::adapters::Fitted),
    Encoder {
        /// None of a head alone.
        fitted: Option<encoder::plan::adapters::Fitted>,
        head: Option<Head>,
    },
}

impl Ready {
    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Decoder(fitted) => fitted.bytes(),
            Self::Encoder { fitted, head } => {
                fitted.as_ref().map_or(0, encoder::plan::adapters::Fitted::bytes)
                    + head.as_ref().map_or(0, Head::bytes)
            }
        }
    }
}

impl Stored {
    /// The adapter as it runs beside a version. `digest` stands for its content and the version.
    ///
    /// # Errors
    /// MODEL_UNSUITABLE for a version of other shapes; UNSUPPORTED for whole matrices, which are merged
    /// instead.
    pub fn serving(&self, digest: &str, model: &AnyModel) -> Result<Ready> {
        let changes = changes(&self.tuned, model.weights())?;
        Ok(match model {
            AnyModel::Decoder(model) => {
                let config = model.decoder()?;
                Ready::Decoder(decoder::plan::adapters::Fitted::of(digest, &changes, config)?)
            }
            AnyModel::Encoder(model) => {
                let fit = || encoder::plan::adapters::Fitted::of(digest, &changes, &model.family);
                let fitted = if changes.is_empty() { None } else { Some(fit()?) };
                Ready::Encoder { fitted, head: self.head.clone() }
            }
            model => return Err(not_for_text(model.family())),
        })
    }
}

/// How an adapter changes its base.
pub fn method(tuned: &Tuned, head: bool) -> v1::AdapterMethod {
    if head {
        v1::AdapterMethod::Head
    } else if !tuned.whole.is_empty() || tuned.modules.contains_key(EMBEDDING) {
        v1::AdapterMethod::Tensors
    } else if tuned.modules.values().any(|module| module.magnitude.is_some()) {
        v1::AdapterMethod::Dora
    } else {
        v1::AdapterMethod::Lora
    }
}

fn read_peft(
    config: &Path,
    tensors: &Path,
    head: bool,
    shapes: &Shapes,
    weights: &BTreeMap<String, Arc<Weight>>,
) -> Result<Tuned> {
    let files = Folder::open(config, tensors)?;
    let mut contents = Contents::parse(&files.config, &files.tensors, Use::Keep)?;
    let mut names =
        contents.modules.keys().chain(contents.tables.keys()).chain(contents.whole.keys());
    let inside = if names.any(|name| name.starts_with(INSIDE)) { INSIDE } else { "" };
    // Written beside the adapter too, for those who load it into a model for the task.
    if head {
        let of_head =
            |name: &str| name == HEAD_WEIGHT || name == HEAD_BIAS || HIDDEN_TOKENS.contains(&name);
        contents.whole.retain(|name, _| !of_head(name));
    }
    let (tuned, others) = export::load(&contents, inside, shapes, weights)?;
    match others.keys().next() {
        None => Ok(tuned),
        Some(name) if name == HEAD_WEIGHT || name == HEAD_BIAS => Err(Error::new(
            Reason::UnsupportedFormat,
            format!(
                "the adapter has a head, {}, without {HEAD_CONFIG}, which says what it reads and its \
                 labels; heads of other programs read states that are pooled in another way and are not \
                 read",
                quoted(name)
            ),
        )),
        Some(name) => Err(Error::new(
            Reason::ModelUnsuitable,
            format!(
                "the adapter has {}, which the model does not have; name the base it was trained on",
                quoted(name)
            ),
        )),
    }
}

/// None of a head for hidden tokens, whose parts are looked at only.
fn read_head(config: &Path, weights: &Path, model: &AnyModel) -> Result<Option<Head>> {
    let AnyModel::Encoder(model) = model else {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            "the adapter has a head for an encoder's states, and the model is no encoder; name the base \
             it was trained on",
        ));
    };
    if std::fs::metadata(config)?.len() > MAX_HEAD {
        return Err(malformed(format!("{HEAD_CONFIG} has more than {MAX_HEAD} bytes")));
    }
    let file: HeadFile = serde_json::from_slice(&std::fs::read(config)?)
        .map_err(|e| malformed(format!("{HEAD_CONFIG} cannot be read: {e}")))?;
    if file.problem_type == HIDDEN {
        check_hidden(weights, model.family.hidden)?;
        return Ok(None);
    }
    let task = TASKS.iter().find(|(_, name)| *name == file.problem_type).ok_or_else(|| {
        Error::new(
            Reason::UnsupportedFormat,
            format!("problem_type of {HEAD_CONFIG} is {}", quoted(&file.problem_type)),
        )
    })?;
    let tensors = safetensors::open(weights)?.tensors;
    let take = |name: &str| {
        let tensor = tensors.get(name);
        let tensor = tensor.ok_or_else(|| malformed(format!("{HEAD_WEIGHTS} lacks {name}")))?;
        Plain::of(name, tensor)
    };
    let (weight, bias) = (take(HEAD_WEIGHT)?, take(HEAD_BIAS)?);
    let weight = (&weight.shape[..], weight.values);
    Head::new(task.0, file.labels, weight, bias.values, model.family.hidden).map(Some)
}

/// Refuses a head for hidden tokens that does not fit states of this width.
fn check_hidden(weights: &Path, hidden: usize) -> Result<()> {
    let tensors = safetensors::open(weights)?.tensors;
    for (name, shape) in
        HIDDEN_TOKENS.iter().zip([vec![hidden; 2], vec![hidden], vec![hidden], vec![hidden]])
    {
        let tensor = tensors.get(*name);
        let tensor = tensor.ok_or_else(|| malformed(format!("{HEAD_WEIGHTS} lacks {name}")))?;
        let plain = Plain::of(name, tensor)?;
        if plain.shape != shape {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                format!(
                    "'{name}' of {HEAD_WEIGHTS} has the shape {:?}, and states of the model have {hidden} \
                     values; name the model that it was trained on",
                    plain.shape
                ),
            ));
        }
    }
    Ok(())
}

/// PEFT's name of a head's task.
pub fn task_type(task: Task) -> &'static str {
    match task {
        Task::Tagging => "TOKEN_CLS",
        Task::Classification | Task::MultiLabel | Task::Regression => "SEQ_CLS",
    }
}

/// The tensors of a head by their names in the task's model.
pub fn head_tensors(head: &Head) -> BTreeMap<String, Plain> {
    let ((weight, bias), outputs) = (head.parts(), head.outputs());
    let shape = [outputs, weight.len() / outputs.max(1)];
    [
        (HEAD_WEIGHT.to_owned(), Plain::new(&shape, weight.to_vec())),
        (HEAD_BIAS.to_owned(), Plain::new(&[outputs], bias.to_vec())),
    ]
    .into()
}

/// What the row of an adapter says that is more than products of low rank. `head` is the number of elements
/// of its head.
///
/// # Errors
/// INTERNAL.
pub fn facts(tuned: &Tuned, head: u64, resident_bytes: u64) -> Result<Facts> {
    let (mut ranks, mut scales) = ((u32::MAX, 0), (f32::INFINITY, f32::NEG_INFINITY));
    let mut targets = BTreeSet::new();
    for (linear, adapter) in &tuned.modules {
        let part = adapter.low_rank_part()?;
        let (rank, scale) = (u32::try_from(part.rank).unwrap_or(u32::MAX), part.scale as f32);
        ranks = (ranks.0.min(rank), ranks.1.max(rank));
        scales = (scales.0.min(scale), scales.1.max(scale));
        targets.insert(module(linear).rsplit('.').next().unwrap_or_default().to_owned());
    }
    if tuned.modules.is_empty() {
        (ranks, scales) = ((0, 0), (0.0, 0.0));
    }
    Ok(Facts {
        ranks,
        scales,
        targets: targets.into_iter().collect(),
        linears: u32::try_from(tuned.modules.len()).unwrap_or(u32::MAX),
        parameters: tuned.count() + head,
        resident_bytes,
    })
}

/// The files of a head: its tensors as they are named in the task's model, its labels and what it is for, which
/// is to tell hidden tokens where no task is named.
///
/// # Errors
/// IO.
pub fn write_head(
    tensors: &BTreeMap<String, Plain>,
    (task, labels): (Option<Task>, &[String]),
    base: &str,
    folder: &Path,
) -> Result<()> {
    let known = TASKS.iter().find(|(known, _)| Some(*known) == task);
    let name = known.map_or(HIDDEN, |(_, name)| name);
    let config = serde_json::to_value(HeadFile {
        base_model_name_or_path: base.to_owned(),
        labels: labels.to_vec(),
        problem_type: name.to_owned(),
        task_type: task.map_or("", task_type).to_owned(),
    });
    let Ok(serde_json::Value::Object(config)) = config else {
        return Err(Error::internal("the settings of a head are no object"));
    };
    Folder::new(config, tensors.clone())?.write_as(folder, HEAD_CONFIG, HEAD_WEIGHTS)
}

/// What an adapter changes of a version with these weights, as what serves takes it.
///
/// # Errors
/// NON_FINITE for an adapter that is broken.
pub fn changes(tuned: &Tuned, weights: &BTreeMap<String, Arc<Weight>>) -> Result<Changes> {
    let mut changes = Changes::default();
    for (name, var) in &tuned.whole {
        let mut values = var.flatten_all()?.to_vec1::<f32>()?;
        if let Some(stored) = weights.get(name) {
            let stored = stored.to_f32();
            // Files may hold an embedding table that nobody changed.
            if var.rank() > 1 && stored == values {
                continue;
            }
            values.iter_mut().zip(stored).for_each(|(v, s)| *v -= s);
        }
        changes.tensors.insert(name.clone(), values.into());
    }
    for (name, adapter) in &tuned.modules {
        let part = adapter.low_rank_part()?;
        let (shape, rank, scale) = (part.shape, part.rank, part.scale as f32);
        let mut b = part.b;
        if let Some(ratios) = adapter.ratios()? {
            for (row, ratio) in b.chunks_mut(rank).zip(&ratios) {
                row.iter_mut().for_each(|b| *b *= ratio);
            }
            // The layer gives its bias with the product, and the gain is not the bias's.
            let bias = format!("{}.bias", module(name));
            if let Some(stored) = weights.get(&bias) {
                let stored = stored.to_f32();
                let mut shift = match changes.tensors.get(&bias) {
                    Some(values) => values.to_vec(),
                    None => vec![0.0; stored.len()],
                };
                for ((shift, bias), ratio) in shift.iter_mut().zip(stored).zip(&ratios) {
                    *shift -= (ratio - 1.0) * bias;
                }
                changes.tensors.insert(bias, shift.into());
            }
            let gains: Vec<f32> = ratios.iter().map(|ratio| ratio - 1.0).collect();
            changes.gains.insert(name.clone(), gains.into());
        }
        let product = Product { shape, rank, a: part.a, b, scale };
        changes.products.insert(name.clone(), product);
    }
    changes.check()?;
    Ok(changes)
}

/// Whether all that an adapter changes can be in a version's weights; refuses a bias that the base lacks.
///
/// # Errors
/// MODEL_UNSUITABLE.
pub fn check_mergeable(tuned: &Tuned, model: &AnyModel) -> Result<()> {
    let weights = model.weights();
    if tuned.modules.is_empty() && tuned.whole.is_empty() {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            "the adapter is a head alone and changes no weight of its base; predict with it as it is",
        ));
    }
    for name in tuned.whole.keys() {
        if name.ends_with(".bias") && !weights.contains_key(name) {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                format!(
                    "the adapter adds the bias '{name}', which the model has no place for; keep the \
                     adapter beside the model, which serves both"
                ),
            ));
        }
        find(weights, name)?;
    }
    if let AnyModel::Decoder(model) = model
        && model.decoder()?.tied
        && tuned.modules.contains_key(EMBEDDING)
    {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            format!(
                "the adapter changes what '{EMBEDDING}' gives for tokens and not what it makes logits \
                 of, and the model has one table for both; keep the adapter beside the model, which \
                 serves it"
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
