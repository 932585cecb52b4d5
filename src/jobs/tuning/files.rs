//! The files of a trained adapter.

use std::path::Path;

use candle_core::{Device, Var};

use super::{Made, Work};
use crate::data::records::Kind;
use crate::error::{Error, Reason, Result};
use crate::formats::peft;
use crate::jobs::work::Job;
use crate::methods::adapt::export::{self, About};
use crate::methods::adapt::native;
use crate::methods::adapt::shapes::Shapes;
use crate::methods::adapt::stored::{self, Base, Stored};
use crate::methods::adapt::tuned::Tuned;
use crate::models::AnyModel;
use crate::models::decoder::plan::adapters::Fitted;
use crate::proto::v1::{AdapterMethod, adaptation::Method};
use crate::serve::head::Task;
use crate::store::adapters::{AdapterRow, Facts};
use crate::store::models::VersionRow;
use crate::train::parameters::{Parameter, Parameters};

/// What was written.
pub struct Written {
    pub method: AdapterMethod,
    pub facts: Facts,
    /// Names of the files in the folder.
    pub names: Vec<&'static str>,
    /// Bytes of those that are needed: where there are files of ours, a copy for PEFT is not.
    pub bytes: u64,
    /// It serves beside its base.
    pub served: bool,
}

/// Reads what was tuned and the head of an adapter that was made for this version.
///
/// # Errors
/// MODEL_UNSUITABLE for an adapter of another model; as reading the files.
pub fn read(
    job: &Job<'_>,
    row: &AdapterRow,
    (base, model): (&VersionRow, &AnyModel),
) -> Result<(Tuned, Parameters)> {
    let paths = job.wait(job.store.adapter_paths(row))?;
    let digest = base.weights_digest();
    let stored = Stored::read(&paths, Base::Own(&digest), model, &Shapes::of(model)?)?;
    let mut head = Parameters::new();
    for (name, plain) in stored.head.iter().flat_map(stored::head_tensors) {
        let var = Var::from_vec(plain.values, plain.shape, &Device::Cpu)?;
        head.insert(name, Parameter { var, rate: 1.0, decay: false });
    }
    Ok((stored.tuned, head))
}

/// An adapter that was written into `folder` in a form of our own, as it is read back; none for others.
pub fn read_own(written: &Written, folder: &Path, work: &Work<'_>) -> Result<Option<Tuned>> {
    if !written.names.contains(&native::HEADER) {
        return Ok(None);
    }
    let weights = work.model.weights();
    let read = native::read(folder, work.weights_digest, &work.plan.shapes, weights)?;
    Ok(Some(read.tuned))
}

/// Writes the files of an adapter into `folder`: those of PEFT where it has a form for it, our own where
/// they say more than those or where there are no others, and those of its head. `model` is the base's name
/// where its settings have none.
pub fn write(made: &Made, work: &Work<'_>, model: &str, folder: &Path) -> Result<Written> {
    let tuned = &made.tuned;
    let head = &super::plain(&made.head)?;
    let method = stored::method(tuned, !head.is_empty());
    let plan = work.plan;
    let mut names = Vec::new();
    let base = work.model.config().get("_name_or_path").and_then(serde_json::Value::as_str);
    let task = match work.data.kind {
        Kind::Classification => Task::Classification,
        Kind::Tagging => Task::Tagging,
        _ => Task::Regression,
    };
    let about = About {
        shapes: &plan.shapes,
        base: base.filter(|name| !name.is_empty()).unwrap_or(model),
        task: match (head.is_empty(), task) {
            (true, _) => "CAUSAL_LM",
            (false, task) => stored::task_type(task),
        },
        inside: if head.is_empty() { "" } else { stored::INSIDE },
        heads: head,
    };
    if !tuned.modules.is_empty() {
        // PEFT has no files without an adapter on a linear.
        export::peft(tuned, &about)?.write(folder)?;
        names.extend([peft::CONFIG, peft::WEIGHTS]);
    }
    if !head.is_empty() {
        stored::write_head(head, (task, &work.data.labels), about.base, folder)?;
        names.extend([stored::HEAD_CONFIG, stored::HEAD_WEIGHTS]);
    }
    let own = matches!(
        plan.adaptation.method,
        Some(Method::LoraXs(_) | Method::LoraSb(_) | Method::Loldu(_) | Method::Nola(_))
    );
    if own || tuned.modules.is_empty() && !tuned.whole.is_empty() {
        native::write(tuned, &plan.adaptation, work.weights_digest, folder)?;
        names.extend([native::HEADER, native::TENSORS]);
    }
    if names.is_empty() {
        return Err(Error::internal("an adapter without files"));
    }
    let (facts, served) = match (method, work.model) {
        // Read back as an import would: what is kept is what serves.
        (AdapterMethod::Lora, AnyModel::Decoder(model)) => {
            let adapter = peft::read(folder)?;
            Fitted::new("", &adapter, model.decoder()?)?;
            (Facts::of(&adapter), true)
        }
        _ => {
            let paths = names.iter().map(|name| ((*name).to_owned(), folder.join(name))).collect();
            let read = Stored::read(&paths, Base::Any, work.model, &plan.shapes)?;
            let head = head.values().map(|plain| plain.values.len() as u64).sum();
            match read.serving("", work.model) {
                Ok(ready) => (stored::facts(tuned, head, ready.bytes())?, true),
                Err(e) if e.reason() == Reason::Unsupported => {
                    (stored::facts(tuned, head, 0)?, false)
                }
                Err(error) => return Err(error),
            }
        }
    };
    // PEFT's files hold all that ours do, in a larger form.
    let needed = |name: &&str| !(own && [peft::CONFIG, peft::WEIGHTS].contains(name));
    let mut bytes = 0;
    for name in names.iter().filter(|name| needed(name)) {
        bytes += std::fs::metadata(folder.join(name))?.len();
    }
    Ok(Written { method, facts, names, bytes, served })
}
