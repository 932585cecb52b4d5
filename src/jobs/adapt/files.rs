//! The files of a trained adapter.

use std::path::Path;

use super::{Made, Work};
use crate::data::records::Kind;
use crate::error::{Error, Reason, Result};
use crate::formats::peft;
use crate::methods::adapt::export::{self, About};
use crate::methods::adapt::native;
use crate::methods::adapt::stored::{self, Base, Stored};
use crate::models::AnyModel;
use crate::models::decoder::plan::adapters::Fitted;
use crate::proto::v1::{AdapterMethod, adaptation::Method};
use crate::serve::head::Task;
use crate::store::adapters::Facts;

/// What was written.
pub struct Written {
    pub method: AdapterMethod,
    pub facts: Facts,
    /// Names of the files in the folder.
    pub names: Vec<&'static str>,
    /// It serves beside its base.
    pub served: bool,
}

/// Writes the files of an adapter into `folder`: those of PEFT where it has a form for it, our own where
/// they say more than those or where there are no others, and those of its head.
pub fn write(made: &Made, work: &Work<'_>, folder: &Path) -> Result<Written> {
    let Made { tuned, head, .. } = made;
    let method = stored::method(tuned, !head.is_empty());
    let plan = work.plan;
    let mut names = Vec::new();
    let base = work.base.config.get("_name_or_path").and_then(serde_json::Value::as_str);
    let task = match work.data.kind {
        Kind::Classification => Task::Classification,
        Kind::Tagging => Task::Tagging,
        _ => Task::Regression,
    };
    let about = About {
        shapes: &plan.shapes,
        base: base.filter(|name| !name.is_empty()).unwrap_or(&work.base.model),
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
        native::write(tuned, &plan.adaptation, &work.base.weights_digest(), folder)?;
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
    Ok(Written { method, facts, names, served })
}
