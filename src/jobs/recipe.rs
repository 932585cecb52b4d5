//! Running a recipe: measure the base, take the steps, keep each one's version, measure the last.

use std::time::Instant;

use prost::Message;

use super::damaged;
use super::memory::Peak;
use super::work::Job;
use crate::error::{Error, Result};
use crate::methods::registry;
use crate::models::Model;
use crate::progress::Progress;
use crate::proto::v1;
use crate::recipe::{self, run::Environment};
use crate::store::models::VersionRow;
use crate::store::names;

/// Gives an encoded `RecipeReport`. What an earlier run of the operation finished is not done again.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::RunRecipeRequest = job.request()?;
    let recipe = request.recipe.unwrap_or_default();
    let base = job.wait(job.store.version(&request.model))?;
    let mut run = Run {
        job,
        evaluation: recipe.evaluation.clone().unwrap_or_default(),
        recovered_seconds: 0.0,
    };
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
    };
    Ok(report.encode_to_vec())
}

struct Run<'a> {
    job: &'a Job<'a>,
    /// What to measure; sizes only when the recipe asks for nothing.
    evaluation: v1::Evaluation,
    /// Seconds of the parts that earlier runs of the operation finished.
    recovered_seconds: f64,
}

impl Run<'_> {
    fn before(&mut self, base: &VersionRow, progress: &Progress) -> Result<v1::EvaluationReport> {
        if let Some(report) = self.saved::<v1::EvaluationReport>("before")? {
            self.recovered_seconds += report.seconds;
            return Ok(report);
        }
        progress.report(0.0, "measuring the base")?;
        let model = self.open(base)?;
        // The base agrees with itself.
        let options = v1::Evaluation { compare_with_base: false, ..self.evaluation.clone() };
        let report = self.job.measure(base, &model, None, &options, progress)?;
        self.save("before", &report)?;
        Ok(report)
    }

    fn after(
        &self,
        base: &VersionRow,
        last: &VersionRow,
        progress: &Progress,
    ) -> Result<v1::EvaluationReport> {
        progress.report(0.0, "measuring the result")?;
        let model = self.open(last)?;
        let base = match self.evaluation.compare_with_base {
            true => Some(self.open(base)?),
            false => None,
        };
        self.job.measure(last, &model, base.as_ref(), &self.evaluation, progress)
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
            let report: v1::StepReport = self.saved(&key)?.unwrap_or_default();
            self.recovered_seconds += report.seconds;
            return Ok((version.clone(), v1::StepReport { version: version.name(), ..report }));
        }

        let method = registry::method(&recipe.steps[i])?.card().name;
        let message = format!("step {} of {}: {method}", i + 1, recipe.steps.len());
        progress.report(0.0, &message)?;
        let model = self.open(parent)?;
        let bytes_before = model.bytes();
        let start = Instant::now();
        let environment =
            Environment { progress, texts: &|name| self.job.text(name), scratch: self.job.scratch };
        let (step, outcome) = recipe::run::run_step(recipe, i, model, &environment)?;
        let seconds = start.elapsed().as_secs_f64();
        progress.report(1.0, &format!("{message}, writing the version"))?;

        let mut report = v1::StepReport {
            method: method.to_owned(),
            version: String::new(),
            seconds,
            bytes_before: signed(bytes_before),
            bytes_after: signed(outcome.model.bytes()),
            calibration_tokens: signed(outcome.calibration_tokens),
            zero_share: outcome.zero_share,
            warnings: outcome.warnings,
        };
        self.save(&key, &report)?;
        let lineage = v1::Lineage {
            source: String::new(),
            parent: parent.name(),
            parent_digest: parent.digest.clone(),
            data_digests: self.data_digests(&step)?,
            step: Some(step),
            step_index: index,
            seed: recipe.seed,
            code_version: env!("CARGO_PKG_VERSION").to_owned(),
            threads: i32::try_from(rayon::current_num_threads()).unwrap_or(i32::MAX),
            seconds,
            operation,
            record: Some(message_of(outcome.record)?),
        };
        let written =
            store.write_version(&parent.model, "", &outcome.model, &lineage, self.job.scratch);
        let version = self.job.wait(written)?;
        report.version = version.name();
        Ok((version, report))
    }

    fn open(&self, row: &VersionRow) -> Result<Model> {
        self.job.wait(self.job.store.open_version(row))
    }

    fn data_digests(&self, step: &v1::Step) -> Result<Vec<String>> {
        let mut digests = Vec::new();
        for name in recipe::step_datasets(step) {
            let row = self.job.wait(self.job.store.dataset(names::dataset(&name)?))?;
            digests.push(row.object.digest);
        }
        Ok(digests)
    }

    fn save(&self, name: &str, message: &impl Message) -> Result<()> {
        let value = message.encode_to_vec();
        self.job.wait(self.job.store.save_result(&self.job.operation.id, name, &value))
    }

    fn saved<M: Message + Default>(&self, name: &str) -> Result<Option<M>> {
        let value = self.job.wait(self.job.store.saved_result(&self.job.operation.id, name))?;
        value.map(|value| M::decode(value.as_slice()).map_err(damaged)).transpose()
    }
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

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
