//! Running a claim: its comparison, then the verdict.

use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::compare;
use super::work::Job;
use crate::error::{Error, Result};
use crate::proto::v1::{self, ClaimVerdict};
use crate::recipe::claim;
use crate::store::models::timestamp;

/// Gives an encoded `ClaimResult`.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::RunClaimRequest = job.request()?;
    let comparison = compare::of_claim(&request)?;
    let given = request.claim.unwrap_or_default();
    // That of the program which began: should another one end this, its code is not what was measured.
    const KEY: &str = "provenance";
    let provenance = match job.saved::<v1::Provenance>(KEY)? {
        Some(provenance) => provenance,
        None => {
            let provenance = claim::provenance(&comparison, request.checkout);
            job.save(KEY, &provenance)?;
            provenance
        }
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let started = job
        .operation
        .started_ms
        .unwrap_or_else(|| i64::try_from(now.as_millis()).unwrap_or_default());
    let started = timestamp(started);
    let report = compare::compare(job, &comparison)?;
    if !given.model_digest.is_empty() && given.model_digest != report.base_digest {
        return Err(Error::internal("the base has another digest than was checked"));
    }
    if let Some(result) = &request.confirm {
        let renewed = claim::confirm::renewed(result, &report, provenance, started)?;
        return Ok(renewed.encode_to_vec());
    }
    let (findings, verdict) = claim::judge::judge(&given, &report);
    let verdict = if request.short { ClaimVerdict::Unspecified } else { verdict };
    let mut result = v1::ClaimResult {
        claim: given.name.clone(),
        claim_digest: claim::digest(&given, request.short)?,
        short: request.short,
        provenance: Some(provenance),
        start_time: Some(started),
        minutes: report.seconds / 60.0,
        report: Some(report),
        findings,
        ..Default::default()
    };
    result.set_verdict(verdict);
    result.seal = claim::seal(&result)?;
    Ok(result.encode_to_vec())
}
