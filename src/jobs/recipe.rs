//! Running a recipe: measure the base, take the steps, keep each one's version, measure the last.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prost::Message;

use super::memory::Peak;
use super::warnings;
use super::work::Job;
use crate::calibrate;
use crate::error::{Error, Result};
use crate::methods::registry;
use crate::models::AnyModel;
use crate::progress::{Metrics, Progress};
use crate::proto::v1;
use crate::recipe;
use crate::store::models::VersionRow;

/// Gives an encoded `RecipeReport`. What an earlier run of the operation finished is not done again.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::RunRecipeRequest = job.request()?;
    let recipe = request.recipe.unwrap_or_default();
    let base = job.wait(job.store.version(&request.model))?;
    let mut run = Run {
        job,
        evaluation: recipe.evaluation.clone().unwrap_or_default(),
        calibrations: calibrate::Shared::default(),
        recovered_seconds: 0.0,
    };
    // What is wrong with a step is told when it is taken.
    let planned = job.wait(job.store.version_info(&base)).and_then(|i| recipe::check(&recipe, &i));
    let planned = planned.map(|plan| plan.warnings).unwrap_or_default();
    let warnings = job.wait(warnings::of_recipe(job.store, &recipe, planned, &base))?;
    let (start, peak) = (Instant::now(), Peak::start(job.handle));
    // Equal shares for the two evaluations and the steps: how they compare is not known beforehand.
    let parts = recipe.steps.len() as f64 + 2.0;
    let part = |i: usize| job.progress.part(i as f64 / parts, (i as f64 + 1.0) / parts);

    let before = run.before(&base, &part(0))?;
    let mut last = base.clone();
    let mut steps = Vec::with_capacity(recipe.steps.len());
    for i in 0..recipe.steps.len() {
        let (version, report) = run.step(&recipe, i, &last, &part(i + 1))?;
        steps.push(report);
        last = version;
    }
    let after = run.after(&base, &last, &part(recipe.steps.len() + 1))?;
    let report = v1::RecipeReport {
        base: base.name(),
        versions: steps.iter().map(|step| step.version.clone()).collect(),
        before: Some(before),
        after: Some(after),
        steps,
        seconds: start.elapsed().as_secs_f64() + run.recovered_seconds,
        peak_memory_bytes: i64::try_from(peak.bytes()).unwrap_or(i64::MAX),
        warnings,
    };
    Ok(report.encode_to_vec())
}

struct Run<'a> {
    job: &'a Job<'a>,
    /// What to measure; sizes only when the recipe asks for nothing.
    evaluation: v1::Evaluation,
    calibrations: calibrate::Shared,
    /// Seconds of the parts that earlier runs of the operation finished.
    recovered_seconds: f64,
}

impl Run<'_> {
    fn before(&mut self, base: &VersionRow, progress: &Progress) -> Result<v1::EvaluationReport> {
        if let Some(report) = self.job.saved::<v1::EvaluationReport>("before")? {
            self.recovered_seconds += report.seconds;
            return Ok(report);
        }
        progress.report(0.0, "measuring the base")?;
        // The base agrees with itself.
        let options = v1::Evaluation { compare_with_base: false, ..self.evaluation.clone() };
        let report = self.job.measure_version(base, None, &options, progress)?;
        self.job.save("before", &report)?;
        Ok(report)
    }

    fn after(
        &self,
        base: &VersionRow,
        last: &VersionRow,
        progress: &Progress,
    ) -> Result<v1::EvaluationReport> {
        progress.report(0.0, "measuring the result")?;
        let base = self.evaluation.compare_with_base.then_some(base);
        self.job.measure_version(last, base, &self.evaluation, progress)
    }

    /// Takes step `i` from the version `parent`, unless that was done before.
    fn step(
        &mut self,
        recipe: &v1::Recipe,
        i: usize,
        parent: &VersionRow,
        progress: &Progress,
    ) -> Result<(VersionRow, v1::StepReport)> {
        let (store, operation) = (self.job.store, self.job.operation.name());
        let index = i32::try_from(i).map_err(|_| Error::internal("a recipe of 2^31 steps"))?;
        // The report is saved before the version is written: where there is a version, there is one.
        let key = format!("step {i}");
        if let Some(version) = self.job.wait(store.step_version(&operation, index))? {
            let report: v1::StepReport = self.job.saved(&key)?.unwrap_or_default();
            self.recovered_seconds += report.seconds;
            return Ok((version.clone(), v1::StepReport { version: version.name(), ..report }));
        }

        let method = registry::method(&recipe.steps[i])?.card().name;
        let message = format!("step {} of {}: {method}", i + 1, recipe.steps.len());
        progress.report(0.0, &message)?;
        let model = self.job.open(parent)?;
        let taken = take_step(
            self.job,
            &Step { step: &recipe.steps[i], index: i, seed: recipe.seed, place: &key },
            (model, &parent.digest),
            &self.calibrations,
            progress,
        )
        .map_err(|e| e.within("recipe"))?;
        progress.report(1.0, &format!("{message}, writing the version"))?;
        let mut report = taken.report;
        self.job.save(&key, &report)?;
        let lineage = v1::Lineage {
            parent: parent.name(),
            parent_digest: parent.digest.clone(),
            operation,
            ..taken.lineage
        };
        let written = store.write_version(
            &parent.model,
            "",
            taken.model,
            (&lineage, index),
            self.job.scratch,
        );
        let version = self.job.wait(written)?;
        report.version = version.name();
        Ok((version, report))
    }
}

/// A step of a recipe.
pub(super) struct Step<'a> {
    pub step: &'a v1::Step,
    /// Its number in the recipe, from 0.
    pub index: usize,
    pub seed: u64,
    /// What no other step of the operation is called: its checkpoints lie there.
    pub place: &'a str,
}

/// What a step made.
pub(super) struct Taken {
    pub model: AnyModel,
    /// Without the version, which is not written yet.
    pub report: v1::StepReport,
    /// Without the parent's names and the operation, which are the caller's to know.
    pub lineage: v1::Lineage,
}

/// Takes a step from a model whose content `digest` names.
pub(super) fn take_step(
    job: &Job<'_>,
    step: &Step<'_>,
    (model, digest): (AnyModel, &str),
    calibrations: &calibrate::Shared,
    progress: &Progress,
) -> Result<Taken> {
    let bytes_before = model.bytes();
    let (start, peak) = (Instant::now(), Peak::start(job.handle));
    let texts = |name: &str| job.text(name);
    // What a method measures last is what it says of its work.
    let measured = Arc::new(Mutex::new(Metrics::new()));
    let last = Arc::clone(&measured);
    let progress = &progress.and_metrics(Arc::new(move |found: &Metrics| {
        last.lock().unwrap_or_else(PoisonError::into_inner).clone_from(found);
    }));
    let kept = job.kept.join(step.place);
    let environment = recipe::run::Environment {
        progress,
        texts: &texts,
        calibrations,
        scratch: job.scratch,
        datasets: job,
        kept: &kept,
    };
    let place = (step.seed, step.index);
    let recipe::run::Made { step: resolved, outcome, training, pruning } =
        recipe::run::run_step(step.step, place, (model, digest), &environment)?;
    if kept.exists() {
        // The step is done: nobody goes on from its checkpoints.
        std::fs::remove_dir_all(&kept)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let report = v1::StepReport {
        method: registry::method(&resolved)?.card().name.to_owned(),
        version: String::new(),
        seconds,
        bytes_before: signed(bytes_before),
        bytes_after: signed(outcome.model.bytes()),
        calibration_tokens: signed(outcome.calibration_tokens),
        zero_share: outcome.zero_share,
        warnings: outcome.warnings,
        peak_memory_bytes: signed(peak.bytes()),
        training,
        pruning,
        measures: measured.lock().unwrap_or_else(PoisonError::into_inner).clone(),
    };
    let lineage = v1::Lineage {
        parent_digest: digest.to_owned(),
        data_digests: job.data_digests(&recipe::step_datasets(&resolved))?,
        step: Some(resolved),
        step_index: i32::try_from(step.index)
            .map_err(|_| Error::internal("a recipe of 2^31 steps"))?,
        // Where it decides nothing it is left out, so that equal bytes have equal digests.
        seed: if registry::method(step.step)?.seeded() { step.seed } else { 0 },
        code_version: env!("CARGO_PKG_VERSION").to_owned(),
        threads: i32::try_from(rayon::current_num_threads()).unwrap_or(i32::MAX),
        seconds,
        record: Some(message_of(outcome.record)?),
        ..Default::default()
    };
    Ok(Taken { model: outcome.model, report, lineage })
}

/// A record as the lineage carries it.
fn message_of(record: serde_json::Value) -> Result<pbjson_types::Struct> {
    let object = match record {
        serde_json::Value::Null => serde_json::json!({}),
        object @ serde_json::Value::Object(_) => object,
        other => serde_json::json!({ "record": other }),
    };
    serde_json::from_value(object).map_err(|error| {
        Error::internal(format!("the record of a step has no message form: {error}"))
    })
}

pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod cancelled;
#[cfg(test)]
mod tests;
