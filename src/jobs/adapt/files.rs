//! The files of a trained adapter.

use std::collections::BTreeSet;
use std::path::Path;

use super::{Made, Work};
use crate::data::records::Kind;
use crate::error::{Error, Result};
use crate::formats::peft;
use crate::methods::adapt::export::{self, About};
use crate::methods::adapt::native;
use crate::methods::adapt::tuned::Tuned;
use crate::models::AnyModel;
use crate::models::decoder::plan::adapters::Fitted;
use crate::proto::v1::{AdapterMethod, adaptation::Method};
use crate::store::adapters::Facts;

/// What was written.
pub struct Written {
    pub method: AdapterMethod,
    pub facts: Facts,
    /// Names of the files in the folder.
    pub names: Vec<&'static str>,
}

/// Writes the files of an adapter into `folder`: those of PEFT where it has a form for it, our own where
/// they say more than those or where there are no others.
pub fn write(made: &Made, work: &Work<'_>, folder: &Path) -> Result<Written> {
    let Made { tuned, head, .. } = made;
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
    let base = work.base.config.get("_name_or_path").and_then(serde_json::Value::as_str);
    let about = About {
        shapes: &plan.shapes,
        base: base.filter(|name| !name.is_empty()).unwrap_or(&work.base.model),
        task: match work.data.kind {
            Kind::Classification | Kind::Regression | Kind::MultiLabel => "SEQ_CLS",
            // PEFT has no name for telling hidden tokens.
            Kind::Text if plan.is_encoder() => "",
            Kind::Tagging => "TOKEN_CLS",
            _ => "CAUSAL_LM",
        },
        inside: if head.is_empty() { "" } else { "bert." },
        heads: head,
    };
    if tuned.modules.is_empty() {
        // PEFT has no files without an adapter on a linear.
        if !head.is_empty() {
            head_alone(made, &about, folder, &mut names)?;
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
        native::write(tuned, &plan.adaptation, &work.base.digest, folder)?;
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
    Ok(Written { method, facts, names })
}

/// A head that stands alone: its tensors in a file as they are named in the task's model.
fn head_alone(
    made: &Made,
    about: &About<'_>,
    folder: &Path,
    names: &mut Vec<&'static str>,
) -> Result<()> {
    let modules: BTreeSet<&str> = made
        .head
        .keys()
        .map(|name| name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module))
        .collect();
    let config = serde_json::json!({
        "base_model_name_or_path": about.base,
        "task_type": if about.task.is_empty() { None } else { Some(about.task) },
        "modules_to_save": modules,
    });
    let serde_json::Value::Object(config) = config else {
        return Err(Error::internal("the settings of a head are no object"));
    };
    peft::Folder::new(config, made.head.clone())?.write_as(folder, HEAD_CONFIG, HEAD_WEIGHTS)?;
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
