//! The files of a trained adapter.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{Device, Var};

use super::{Made, Work};
use crate::data::records::Kind;
use crate::error::{Error, Result};
use crate::formats::peft::contents::Contents;
use crate::formats::peft::{self, Plain};
use crate::formats::safetensors;
use crate::jobs::work::Job;
use crate::methods::adapt::export::{self, About};
use crate::methods::adapt::native;
use crate::methods::adapt::shapes::Shapes;
use crate::methods::adapt::tuned::Tuned;
use crate::models::AnyModel;
use crate::models::decoder::plan::adapters::Fitted;
use crate::proto::v1::{AdapterMethod, adaptation::Method};
use crate::store::adapters::{AdapterRow, Facts};
use crate::train::parameters::{Parameter, Parameters};
use crate::train::pass::CLASSIFIER;

/// What was written.
pub struct Written {
    pub method: AdapterMethod,
    pub facts: Facts,
    /// Names of the files in the folder.
    pub names: Vec<&'static str>,
    /// Bytes of those that are needed: where there are files of ours, a copy for PEFT is not.
    pub bytes: u64,
}

/// An adapter that was kept, as it was trained.
pub struct Stored {
    pub tuned: Tuned,
    pub head: Parameters,
}

/// Reads the files of an adapter of a model, which has the digest `digest`.
///
/// # Errors
/// MODEL_UNSUITABLE for an adapter of another model; as reading the files.
pub fn read(job: &Job<'_>, row: &AdapterRow, (model, digest): (&AnyModel, &str)) -> Result<Stored> {
    let paths = job.wait(job.store.adapter_paths(row))?;
    // The readers know the files by their names.
    let folder = tempfile::Builder::new().prefix("adapter-").tempdir_in(job.scratch)?;
    for (name, path) in &paths {
        std::fs::copy(path, folder.path().join(name))?;
    }
    let (folder, shapes, weights) = (folder.path(), Shapes::of(model)?, model.weights());
    let (mut tuned, mut heads) = (Tuned::new(0.0, ""), BTreeMap::new());
    if paths.contains_key(peft::CONFIG) {
        let files = peft::Folder::read(folder)?;
        let contents = Contents::parse(&files.config, &files.tensors, peft::Use::Keep)?;
        (tuned, heads) = export::load(&contents, INSIDE, &shapes, weights)?;
    }
    // Ours are what was trained, bit for bit.
    if paths.contains_key(native::HEADER) {
        tuned = native::read(folder, digest, &shapes, weights)?.tuned;
    }
    if paths.contains_key(HEAD_WEIGHTS) {
        for (name, tensor) in &safetensors::open(&folder.join(HEAD_WEIGHTS))?.tensors {
            let inner = name.strip_prefix(peft::PREFIX).unwrap_or(name);
            heads.insert(inner.to_owned(), Plain::of(inner, tensor)?);
        }
    }
    let mut head = Parameters::new();
    for (name, plain) in heads.into_iter().filter(|(name, _)| CLASSIFIER.contains(&name.as_str())) {
        let var = Var::from_vec(plain.values, plain.shape, &Device::Cpu)?;
        head.insert(name, Parameter { var, rate: 1.0, decay: false });
    }
    Ok(Stored { tuned, head })
}

/// An adapter that was written into `folder` in a form of our own, as it is read back; none for others.
pub fn read_own(
    written: &Written,
    folder: &Path,
    (model, digest): (&AnyModel, &str),
) -> Result<Option<Tuned>> {
    if !written.names.contains(&native::HEADER) {
        return Ok(None);
    }
    let read = native::read(folder, digest, &Shapes::of(model)?, model.weights())?;
    Ok(Some(read.tuned))
}

/// What a task's encoder puts before the names of its base.
const INSIDE: &str = "bert.";

/// Writes the files of an adapter into `folder`: those of PEFT where it has a form for it, our own where
/// they say more than those or where there are no others. `model` is the base's name where its settings
/// have none.
pub fn write(made: &Made, work: &Work<'_>, model: &str, folder: &Path) -> Result<Written> {
    let tuned = &made.tuned;
    let head = &super::plain(&made.head)?;
    let method = if !head.is_empty() {
        AdapterMethod::Head
    } else if !tuned.whole.is_empty() {
        AdapterMethod::Tensors
    } else if tuned.modules.values().any(|module| module.magnitude.is_some()) {
        AdapterMethod::Dora
    } else {
        AdapterMethod::Lora
    };
    let plan = work.plan;
    let mut names = Vec::new();
    let base = work.model.config().get("_name_or_path").and_then(serde_json::Value::as_str);
    let about = About {
        shapes: &plan.shapes,
        base: base.filter(|name| !name.is_empty()).unwrap_or(model),
        task: match work.data.kind {
            Kind::Classification | Kind::Regression => "SEQ_CLS",
            Kind::Tagging => "TOKEN_CLS",
            _ => "CAUSAL_LM",
        },
        inside: if head.is_empty() { "" } else { INSIDE },
        heads: head,
    };
    if tuned.modules.is_empty() {
        // PEFT has no files without an adapter on a linear.
        if !head.is_empty() {
            head_alone(head, &about, folder, &mut names)?;
        }
    } else {
        export::peft(tuned, &about)?.write(folder)?;
        names.extend([peft::CONFIG, peft::WEIGHTS]);
    }
    let own = matches!(
        plan.adaptation.method,
        Some(Method::LoraXs(_) | Method::LoraSb(_) | Method::Loldu(_) | Method::Nola(_))
    );
    if own || tuned.modules.is_empty() && !tuned.whole.is_empty() {
        native::write(tuned, &plan.adaptation, work.digest, folder)?;
        names.extend([native::HEADER, native::TENSORS]);
    }
    let facts = match (method, work.model) {
        // Read back as an import would: what is kept is what serves.
        (AdapterMethod::Lora, AnyModel::Decoder(model)) => {
            let adapter = peft::read(folder)?;
            Fitted::new("", &adapter, model.decoder()?)?;
            Facts::of(&adapter)
        }
        _ => facts(tuned, head.values().map(|plain| plain.values.len() as u64).sum())?,
    };
    if names.is_empty() {
        return Err(Error::internal("an adapter without files"));
    }
    // PEFT's files hold all that ours do, in a larger form.
    let needed = |name: &&str| !(own && [peft::CONFIG, peft::WEIGHTS].contains(name));
    let mut bytes = 0;
    for name in names.iter().filter(|name| needed(name)) {
        bytes += std::fs::metadata(folder.join(name))?.len();
    }
    Ok(Written { method, facts, names, bytes })
}

/// A head that stands alone: its tensors in a file as they are named in the task's model.
fn head_alone(
    head: &BTreeMap<String, Plain>,
    about: &About<'_>,
    folder: &Path,
    names: &mut Vec<&'static str>,
) -> Result<()> {
    let config = serde_json::json!({
        "base_model_name_or_path": about.base,
        "task_type": about.task,
        "modules_to_save": ["classifier"],
    });
    let serde_json::Value::Object(config) = config else {
        return Err(Error::internal("the settings of a head are no object"));
    };
    peft::Folder::new(config, head.clone())?.write_as(folder, HEAD_CONFIG, HEAD_WEIGHTS)?;
    names.extend([HEAD_CONFIG, HEAD_WEIGHTS]);
    Ok(())
}

const HEAD_CONFIG: &str = "head_config.json";
const HEAD_WEIGHTS: &str = "head.safetensors";

/// What the row of an adapter says that cannot be served.
fn facts(tuned: &Tuned, head: u64) -> Result<Facts> {
    let (mut ranks, mut scales) = ((u32::MAX, 0), (f32::INFINITY, f32::NEG_INFINITY));
    let mut targets = BTreeSet::new();
    for (linear, module) in &tuned.modules {
        let part = module.low_rank_part()?;
        let (rank, scale) = (u32::try_from(part.rank).unwrap_or(u32::MAX), part.scale as f32);
        ranks = (ranks.0.min(rank), ranks.1.max(rank));
        scales = (scales.0.min(scale), scales.1.max(scale));
        let module = linear.strip_suffix(".weight").unwrap_or(linear);
        targets.insert(module.rsplit('.').next().unwrap_or(module).to_owned());
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
        resident_bytes: 0,
    })
}
