//! Training an adapter: the request, its report, the row that is kept.

use std::time::Instant;

use prost::Message;

use super::memory::Peak;
use super::recipe::signed;
use super::tuning::{Data, Keep, Work};
use super::work::Job;
use crate::error::{Error, Reason, Result};
use crate::methods::adapt::Needs;
use crate::proto::v1;
use crate::recipe::adapt::{NOT_SERVED, Plan};
use crate::seed::Stream;
use crate::store::adapters::AdapterRow;

/// Gives an encoded `AdaptReport`. A run that was cut off goes on from its last checkpoint.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::AdaptRequest = job.request()?;
    if let Some(report) = finished(job, &request.adapter_id)? {
        return Ok(report.encode_to_vec());
    }
    let (start, peak) = (Instant::now(), Peak::start(job.handle));
    let base = job.wait(job.store.version(&request.model))?;
    let plan = Plan::new(
        request.adaptation.as_ref(),
        request.training.as_ref(),
        (base.family.as_str(), &base.config),
    )?;
    job.progress.report(0.0, "reading the data")?;
    let mut model = job.wait(job.store.open_any_version(&base))?;
    let prepared = plan.method()?.prepare(model.weights_mut(), &plan.shapes)?;
    let random = Stream::root(request.seed).child("adapt");
    let data = Data::read(job, &model, &plan, &random, &job.progress)?;
    let weights_digest = base.weights_digest();
    let work = Work {
        job,
        plan: &plan,
        model: &model,
        digest: &base.digest,
        weights_digest: &weights_digest,
        data: &data,
        random: &random,
        kept: &job.kept,
        progress: &job.progress,
    };
    let made = work.train()?;

    job.progress.report(0.98, "writing the adapter")?;
    let written = work.write(&made, &base.model, job.scratch)?;
    let mut warnings = plan.cost.warnings.clone();
    warnings.extend(data.warnings.iter().cloned());
    warnings.extend(prepared);
    if let Needs::Gradients { samples, .. } = plan.method()?.needs()?
        && samples > data.training.len()
    {
        warnings.push(format!(
            "the gradients that the start is made from are of all {} records, not of the {samples} asked for",
            data.training.len()
        ));
    }
    if !written.served && !warnings.iter().any(|w| w == NOT_SERVED) {
        warnings.push(NOT_SERVED.to_owned());
    }
    let mut report = v1::AdaptReport {
        base_version: base.name(),
        trained_parameters: made.report.trained_parameters,
        frozen_parameters: signed(plan.cost.frozen),
        data: Some(data.training_facts.clone()),
        validation: data.validation_facts.clone(),
        // Training knows the time of runs before this one; the rest is done anew by each.
        seconds: (start.elapsed().as_secs_f64() - made.own_seconds).max(0.0) + made.report.seconds,
        training: Some(made.report),
        warnings,
        peak_memory_bytes: signed(peak.bytes()),
        ..Default::default()
    };
    // Kept before the row: where there is an adapter, there is a report.
    job.save("report", &report)?;
    let operation = job.operation.name();
    let keep = Keep {
        id: &request.adapter_id,
        display_name: &request.display_name,
        base: &base,
        seed: request.seed,
        // The same work again finds the row it made.
        request_id: &operation,
    };
    let row = work.keep(&keep, written, job.scratch)?;
    identify(&mut report, &row);
    Ok(report.encode_to_vec())
}

/// The report of an earlier run of the operation that was cut off after its adapter was kept.
fn finished(job: &Job<'_>, id: &str) -> Result<Option<v1::AdaptReport>> {
    let row = match job.wait(job.store.adapter(id)) {
        Ok(row) if row.source == job.operation.name() => row,
        Ok(_) => {
            return Err(Error::new(
                Reason::ResourceExists,
                format!("adapters/{id} exists; choose another id or delete it first"),
            ));
        }
        Err(error) if error.reason() == Reason::ResourceNotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(mut report) = job.saved::<v1::AdaptReport>("report")? else { return Ok(None) };
    identify(&mut report, &row);
    Ok(Some(report))
}

fn identify(report: &mut v1::AdaptReport, row: &AdapterRow) {
    report.adapter = row.name();
    report.digest.clone_from(&row.digest);
    report.total_bytes = signed(row.total_bytes());
}
