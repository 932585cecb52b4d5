//! The files of an adapter that comes in: read, checked against the base, described.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Reason, Result};
use crate::formats::peft::{self, Folder};
use crate::methods::adapt::export::{self, About};
use crate::methods::adapt::native;
use crate::methods::adapt::shapes::Shapes;
use crate::methods::adapt::stored::{self, Base, HEAD_CONFIG, Stored};
use crate::models::AnyModel;
use crate::models::decoder::plan::adapters::Fitted;
use crate::proto::v1;
use crate::store::adapters::Facts;
use crate::store::models::VersionRow;

/// An adapter that fits its base.
pub struct Found {
    pub method: v1::AdapterMethod,
    pub facts: Facts,
    pub lineage: Option<v1::AdapterLineage>,
    /// Names of the files that are kept.
    pub names: Vec<&'static str>,
}

/// Reads the files of `folder` as an adapter of a base. `name` is that of
/// the base's model. Where
/// our own files are there, those of PEFT are written anew from them, as training writes them.
///
/// # Errors
/// What is wrong with a file; MODEL_UNSUITABLE for another base.
pub fn inspect(folder: &Path, base: &VersionRow, model: &AnyModel) -> Result<Found> {
    let shapes = Shapes::of(model)?;
    let own = [native::HEADER, native::TENSORS].iter().all(|f| folder.join(f).is_file());
    let head = folder.join(HEAD_CONFIG).is_file();
    if !own && !head {
        // Says which file is missing, and what to do.
        Folder::read(folder)?;
    }
    let paths = |folder: &Path| -> BTreeMap<String, PathBuf> {
        let held = stored::FILES.iter().filter(|name| folder.join(name).is_file());
        held.map(|name| ((*name).to_owned(), folder.join(name))).collect()
    };
    let digest = base.weights_digest();
    let read = Stored::read(&paths(folder), Base::Own(&digest), model, &shapes)?;
    if own && !read.tuned.modules.is_empty() {
        write_again(&read, folder, base, &shapes)?;
    }
    let method = read.method();
    let facts = match (method, model) {
        (v1::AdapterMethod::Lora, AnyModel::Decoder(model)) => {
            let adapter = peft::read(folder)?;
            Fitted::new("", &adapter, model.decoder()?)?;
            Facts::of(&adapter)
        }
        _ => {
            let resident = match read.serving("", model) {
                Ok(ready) => ready.bytes(),
                // Kept all the same: it can be merged and exported.
                Err(error) if error.reason() == Reason::Unsupported => 0,
                Err(error) => return Err(error),
            };
            let head = read.head.as_ref().map_or(0, |head| head.bytes() / 4);
            stored::facts(&read.tuned, head, resident)?
        }
    };
    let labels = read.head.map(|head| head.labels).unwrap_or_default();
    let lineage = read.adaptation.map(|adaptation| v1::AdapterLineage {
        base_digest: base.digest.clone(),
        adaptation: Some(adaptation),
        labels,
        ..Default::default()
    });
    let held = paths(folder);
    let names = stored::FILES.into_iter().filter(|name| held.contains_key(*name)).collect();
    Ok(Found { method, facts, lineage, names })
}

/// The files of PEFT of an adapter that our own files hold.
fn write_again(read: &Stored, folder: &Path, base: &VersionRow, shapes: &Shapes) -> Result<()> {
    // The base's name is all that only the other files say.
    let config = folder.join(peft::CONFIG);
    let given = match config.is_file() && config.metadata()?.len() < 1 << 20 {
        false => None,
        true => serde_json::from_slice::<serde_json::Value>(&std::fs::read(&config)?).ok(),
    };
    let given = given.as_ref().and_then(|v| v["base_model_name_or_path"].as_str());
    let own = base.config.get("_name_or_path").and_then(serde_json::Value::as_str);
    let own = own.filter(|name| !name.is_empty());
    let heads = read.head.as_ref().map(stored::head_tensors).unwrap_or_default();
    let about = About {
        shapes,
        base: given.or(own).unwrap_or(&base.model),
        task: read.head.as_ref().map_or("CAUSAL_LM", |head| stored::task_type(head.task)),
        inside: if read.head.is_some() { stored::INSIDE } else { "" },
        heads: &heads,
    };
    for name in [peft::CONFIG, peft::WEIGHTS] {
        match std::fs::remove_file(folder.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    export::peft(&read.tuned, &about)?.write(folder)
}
