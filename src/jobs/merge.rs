//! Merging an adapter into a version: read both, add, keep the sum as a new version.

use std::time::Instant;

use prost::Message;

use super::evaluate;
use super::memory::Peak;
use super::recipe::signed;
use super::work::Job;
use crate::error::{Error, Reason, Result};
use crate::methods::adapt::merge::{self, Drift, Merged};
use crate::methods::adapt::shapes::Shapes;
use crate::methods::adapt::stored::{self, Base, Stored};
use crate::models::AnyModel;
use crate::proto::v1;
use crate::store::adapters::AdapterRow;
use crate::store::models::VersionRow;
use crate::store::names;

/// Gives an encoded `MergeReport`.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::MergeAdapterRequest = job.request()?;
    let operation = job.operation.name();
    // The report is saved before the version is written: where there is a version, there is one.
    if let Some(version) = job.wait(job.store.step_version(&operation, 0))? {
        let report: v1::MergeReport = job.saved("report")?.unwrap_or_default();
        return Ok(v1::MergeReport { version: version.name(), ..report }.encode_to_vec());
    }
    let (start, peak) = (Instant::now(), Peak::start(job.handle));
    job.progress.report(0.0, "reading the adapter")?;
    let row = job.wait(job.store.adapter(names::adapter(&request.name)?))?;
    let base = job.wait(job.store.version(&request.model))?;
    let model = job.open(&base)?;
    let (stored, weight) = (read(job, &row, &base, &model)?, request.weight.unwrap_or(1.0));
    let progress = job.progress.part(0.1, 0.8);
    let tuned = &stored.tuned;
    let Merged { weights, drift } =
        merge::merge_weighted(tuned, weight, model.weights(), request.allow_requantise, &progress)?;
    let mut warnings = Vec::new();
    if evaluate::fits(&row, &base).is_err() {
        warnings.push(format!(
            "{} was made beside {}; what it corrects there may be otherwise in {}: evaluate the new version",
            row.name(),
            row.base_version,
            base.name()
        ));
    }
    if stored.head.is_some() {
        warnings.push(
            "the head is no part of a version: it stays with the adapter, which changes the new version \
             once more where it is used with it"
                .to_owned(),
        );
    }
    let count = weights.len();
    let (before, model) = (model.bytes(), with(model, weights));
    let report = v1::MergeReport {
        version: String::new(),
        base: base.name(),
        adapter: row.name(),
        weight,
        tensor_count: i32::try_from(count).unwrap_or(i32::MAX),
        max_drift: drift.iter().map(|d| d.of_weight).fold(0.0, f64::max),
        mean_drift: drift.iter().map(|d| d.of_weight).sum::<f64>() / drift.len().max(1) as f64,
        drifts: drift.into_iter().map(message).collect(),
        bytes_before: signed(before),
        bytes_after: signed(model.bytes()),
        warnings,
        seconds: start.elapsed().as_secs_f64(),
        peak_memory_bytes: signed(peak.bytes()),
    };
    job.progress.report(0.8, "writing the version")?;
    job.save("report", &report)?;
    let lineage = v1::Lineage {
        parent: base.name(),
        parent_digest: base.digest.clone(),
        data_digests: row.lineage.map(|lineage| lineage.data_digests).unwrap_or_default(),
        code_version: env!("CARGO_PKG_VERSION").to_owned(),
        threads: i32::try_from(rayon::current_num_threads()).unwrap_or(i32::MAX),
        seconds: report.seconds,
        operation,
        merged: Some(v1::MergedAdapter {
            digest: row.digest,
            weight,
            requantised: request.allow_requantise,
        }),
        ..Default::default()
    };
    let written = job.store.write_version(&base.model, "", &model, (&lineage, 0), job.scratch);
    let version = job.wait(written)?;
    Ok(v1::MergeReport { version: version.name(), ..report }.encode_to_vec())
}

/// The adapter as it fits the version.
fn read(job: &Job<'_>, row: &AdapterRow, base: &VersionRow, model: &AnyModel) -> Result<Stored> {
    if row.base_model != base.model {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            format!(
                "{} was made for models/{}, not for models/{}; name a version of its own model",
                row.name(),
                row.base_model,
                base.model
            ),
        ));
    }
    let paths = job.wait(job.store.adapter_paths(row))?;
    let stored = Stored::read(&paths, Base::Any, model, &Shapes::of(model)?)?;
    stored::check_mergeable(&stored.tuned, model)?;
    Ok(stored)
}

/// The model with some other weights.
fn with(
    mut model: AnyModel,
    weights: std::collections::BTreeMap<String, std::sync::Arc<crate::nn::weight::Weight>>,
) -> AnyModel {
    model.weights_mut().extend(weights);
    model
}

fn message(drift: Drift) -> v1::TensorDrift {
    v1::TensorDrift { tensor: drift.tensor, of_weight: drift.of_weight, of_change: drift.of_change }
}
