//! The files of an adapter in another form than that in which they are kept.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::formats::peft;
use crate::methods::adapt::export::{self, About};
use crate::methods::adapt::shapes::Shapes;
use crate::methods::adapt::stored::{self, Base, Stored};
use crate::models::AnyModel;
use crate::proto::v1;
use crate::store::adapters::AdapterRow;

/// Writes the files into `folder`; gives their paths by name. The files of a head go along as they are.
///
/// # Errors
/// UNSUPPORTED for an adapter that has no such form.
pub fn write(
    form: v1::AdapterForm,
    paths: &BTreeMap<String, PathBuf>,
    row: &AdapterRow,
    model: &AnyModel,
    folder: &Path,
) -> Result<BTreeMap<String, PathBuf>> {
    let shapes = Shapes::of(model)?;
    let read = Stored::read(paths, Base::Any, model, &shapes)?;
    let base = model.config().get("_name_or_path").and_then(serde_json::Value::as_str);
    let heads = read.head.as_ref().map(stored::head_tensors).unwrap_or_default();
    let about = About {
        shapes: &shapes,
        base: base.filter(|name| !name.is_empty()).unwrap_or(&row.base_model),
        task: read.head.as_ref().map_or("CAUSAL_LM", |head| stored::task_type(head.task)),
        inside: if read.head.is_some() { stored::INSIDE } else { "" },
        heads: &heads,
    };
    let files = match form {
        v1::AdapterForm::PeftLora => export::peft(&read.tuned, &about)?,
        v1::AdapterForm::PeftAdalora => export::adalora(&read.tuned, &about)?,
        v1::AdapterForm::Unspecified => return Err(Error::internal("an export without a form")),
    };
    files.write(folder)?;
    let mut written: BTreeMap<String, PathBuf> =
        [peft::CONFIG, peft::WEIGHTS].map(|name| (name.to_owned(), folder.join(name))).into();
    for name in [stored::HEAD_CONFIG, stored::HEAD_WEIGHTS] {
        written.extend(paths.get(name).map(|path| (name.to_owned(), path.clone())));
    }
    Ok(written)
}
