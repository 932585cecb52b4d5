//! Sizes of queries and keys of a stored version, with a stored adapter where one is named.

use std::sync::Arc;

use super::work::Job;
use crate::error::{Error, Reason, Result};
use crate::eval::norms::{self, With};
use crate::formats::{peft, safetensors};
use crate::models::Model;
use crate::models::decoder::plan::adapters::Fitted;
use crate::nn::adapter::Adapter;
use crate::progress::Progress;
use crate::proto::v1;
use crate::store::models::VersionRow;
use crate::store::names;

/// The report of a version.
pub fn measure(
    job: &Job<'_>,
    row: &VersionRow,
    model: &Model,
    options: &v1::NormBounds,
    progress: &Progress,
) -> Result<v1::NormReport> {
    let text = job.text(&options.dataset)?;
    let adapter = match options.adapter.as_str() {
        "" => None,
        name => Some(adapter(job, row, model, name).map_err(|e| e.within("norm_bounds"))?),
    };
    let with = adapter.as_ref().map(|adapter| With { name: &options.adapter, adapter });
    norms::measure(model, with, options, &text, progress)
}

/// A stored adapter that adds to this model's weights.
fn adapter(job: &Job<'_>, row: &VersionRow, model: &Model, name: &str) -> Result<Arc<Adapter>> {
    let stored = job.wait(job.store.adapter(names::adapter(name)?))?;
    if stored.base_model != row.model {
        let problem = format!("{name} was made for models/{}", stored.base_model);
        return Err(Error::at(Reason::ModelUnsuitable, "adapter", problem));
    }
    if stored.method != v1::AdapterMethod::Lora {
        let problem =
            format!("{name} is more than low-rank products, whose sizes cannot be told apart");
        return Err(Error::at(Reason::Unsupported, "adapter", problem));
    }
    let paths = job.wait(job.store.adapter_paths(&stored))?;
    let missing = || Error::new(Reason::StoreCorrupt, "an adapter lacks a file; import it again");
    let config = std::fs::read(paths.get(peft::CONFIG).ok_or_else(missing)?)?;
    let weights = safetensors::open(paths.get(peft::WEIGHTS).ok_or_else(missing)?)?;
    let adapter = peft::parse(&config, &weights)?;
    // Checks that all of it fits.
    Fitted::new(&stored.digest, &adapter, model.decoder()?)?;
    Ok(Arc::new(adapter))
}
