//! Whether a written result can be believed: is it as the program wrote it, and of this claim and this
//! code?

use super::{digest, judge, methods, seal};
use crate::code;
use crate::error::Result;
use crate::eval::metrics;
use crate::proto::v1::{self, ClaimProblemKind as Kind, ClaimVerdict};
use crate::recipe::compare::report;

/// Holds a result against its claim and this program.
pub fn verify(
    claim: &v1::Claim,
    result: Option<&v1::ClaimResult>,
) -> Result<v1::CheckClaimResponse> {
    let mut out = v1::CheckClaimResponse::default();
    let mut problems = Vec::new();
    let mut problem = |kind: Kind, description: String| {
        problems.push(v1::ClaimProblem { kind: kind.into(), description });
    };
    let again = format!("run it again: planish claims run {}", claim.name);
    let Some(result) = result else {
        problem(Kind::Missing, format!("'{}' has no result; {again}", claim.name));
        out.problems = problems;
        return Ok(out);
    };
    if result.short {
        let text = "the result is of the short form, which decides nothing";
        problem(Kind::Missing, format!("{text}; {again}"));
    }
    if seal(result)? != result.seal {
        let text =
            "the result is not as the program wrote it: its seal does not fit; restore it, or";
        problem(Kind::Edited, format!("{text} {again}"));
    }
    if result.claim != claim.name {
        let text = format!("the result is of the claim '{}'; restore it, or {again}", result.claim);
        problem(Kind::ClaimChanged, text);
    }
    if result.claim_digest != digest(claim, result.short)? {
        let text = "arms, seeds, evaluation, model or data changed since the run";
        problem(Kind::ClaimChanged, format!("{text}; {again}"));
    }
    let measured = result.report.clone().unwrap_or_default();
    let provenance = result.provenance.clone().unwrap_or_default();
    for method in methods(&measured.comparison.clone().unwrap_or_default()) {
        let then = provenance.method_code.get(method).map(String::as_str);
        if then != code::of_method(method) {
            let text = format!("the code of '{method}' changed since the run; {again}");
            problem(Kind::CodeChanged, text);
        }
    }
    if !report::consistent(&measured)? || !values_follow_from_samples(&measured) {
        let text = "means, intervals or front do not follow from the runs; restore the result, or";
        problem(Kind::Inconsistent, format!("{text} {again}"));
    }

    let (findings, verdict) = judge::judge(claim, &measured);
    let verdict = if result.short { ClaimVerdict::Unspecified } else { verdict };
    if !same(&findings, &result.findings) || verdict != result.verdict() {
        let text = "the result was judged by other expectations than the claim has now; look at the \
                    difference, then write the new verdict: planish claims check --rejudge";
        problem(Kind::ExpectationsChanged, text.to_owned());
        let only = problems.iter().all(|p| p.kind() == Kind::ExpectationsChanged);
        if only {
            let mut rejudged = v1::ClaimResult { findings: findings.clone(), ..result.clone() };
            rejudged.set_verdict(verdict);
            rejudged.seal = seal(&rejudged)?;
            out.rejudged = Some(rejudged);
        }
    }
    out.problems = problems;
    out.set_verdict(verdict);
    out.findings = findings;
    Ok(out)
}

/// Whether two lists of findings say the same, up to the last bits of what is computed from samples.
fn same(now: &[v1::Finding], then: &[v1::Finding]) -> bool {
    let said = |f: &v1::Finding| (f.effect.clone(), f.bound, f.headline, f.verdict());
    now.len() == then.len()
        && now.iter().zip(then).all(|(now, then)| {
            said(now) == said(then) && report::estimates_agree(&now.measured, &then.measured)
        })
}

/// Whether each value is what its samples make.
fn values_follow_from_samples(report: &v1::ComparisonReport) -> bool {
    let runs = report.arms.iter().flat_map(|arm| &arm.runs);
    runs.flat_map(|run| &run.measurements).all(|m| {
        if m.samples.is_empty() {
            return true;
        }
        metrics::metric(&m.metric).is_ok_and(|metric| {
            let value = metric.statistic.of(&m.samples);
            (value - m.value).abs() <= 1e-9 * value.abs()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{claim, measured};
    use super::super::{form, provenance};
    use super::*;

    fn written() -> (v1::Claim, v1::ClaimResult) {
        let claim = claim();
        let base = [2.0, 2.5, 3.0, 2.2];
        let shifted = |by: f64| base.map(|v| v + by);
        let report = measured(&claim, &base, &shifted(0.3), &shifted(0.2));
        let (findings, verdict) = judge::judge(&claim, &report);
        let mut result = v1::ClaimResult {
            claim: claim.name.clone(),
            claim_digest: digest(&claim, false).expect("digest"),
            provenance: Some(provenance(&form(&claim, false).expect("a form"), None)),
            report: Some(report),
            findings,
            ..Default::default()
        };
        result.set_verdict(verdict);
        result.seal = seal(&result).expect("seal");
        (claim, result)
    }

    fn kinds(claim: &v1::Claim, result: &v1::ClaimResult) -> Vec<Kind> {
        let found = verify(claim, Some(result)).expect("verifies");
        found.problems.iter().map(v1::ClaimProblem::kind).collect()
    }

    #[test]
    fn a_result_as_it_was_written_stands_also_after_a_journey_through_a_file() {
        let (claim, result) = written();
        let text = serde_json::to_string_pretty(&result).expect("json");
        let read: v1::ClaimResult = serde_json::from_str(&text).expect("json");
        assert_eq!(read, result);
        let found = verify(&claim, Some(&read)).expect("verifies");
        assert!(found.problems.is_empty(), "{:?}", found.problems);
        assert_eq!(found.verdict(), ClaimVerdict::Reproduced);
    }

    #[test]
    fn edits_are_found_even_under_a_new_seal() {
        let (claim, result) = written();
        type Edit = fn(&mut v1::ClaimResult);
        let edits: [(Edit, Kind); 4] = [
            (
                |r| r.report.as_mut().expect("given").arms[1].cells[0].mean *= 0.9,
                Kind::Inconsistent,
            ),
            (
                |r| {
                    let arm = &mut r.report.as_mut().expect("given").arms[1];
                    arm.runs[0].measurements[0].value *= 0.9;
                },
                Kind::Inconsistent,
            ),
            (|r| r.set_verdict(ClaimVerdict::Partly), Kind::ExpectationsChanged),
            (
                |r| r.findings[0].measured.as_mut().expect("measured").value = 1.0,
                Kind::ExpectationsChanged,
            ),
        ];
        for (edit, kind) in edits {
            let mut edited = result.clone();
            edit(&mut edited);
            let found = kinds(&claim, &edited);
            assert!(found.contains(&Kind::Edited) && found.contains(&kind), "{found:?}");
            edited.seal = seal(&edited).expect("seal");
            assert!(kinds(&claim, &edited).contains(&kind));
        }
        let mut minutes = result;
        minutes.minutes += 1.0;
        assert_eq!(kinds(&claim, &minutes), [Kind::Edited]);
    }

    #[test]
    fn changed_code_and_changed_claims_make_a_result_stale() {
        let (claim, mut result) = written();
        let code = &mut result.provenance.as_mut().expect("given").method_code;
        assert_eq!(code.len(), 2, "wanda and round_to_nearest");
        code.insert("wanda".into(), "sha256:of other code".into());
        result.seal = seal(&result).expect("seal");
        assert_eq!(kinds(&claim, &result), [Kind::CodeChanged]);

        let (mut claim, result) = written();
        claim.comparison.as_mut().expect("given").seeds = vec![0, 1];
        assert_eq!(kinds(&claim, &result), [Kind::ClaimChanged]);
        assert_eq!(verify(&claim, None).expect("verifies").problems[0].kind(), Kind::Missing);
    }

    #[test]
    fn new_expectations_are_judged_on_the_old_runs() {
        let (mut claim, result) = written();
        claim.expectations[0].bound = 1.01;
        let found = verify(&claim, Some(&result)).expect("verifies");
        let kinds: Vec<_> = found.problems.iter().map(v1::ClaimProblem::kind).collect();
        assert_eq!(kinds, [Kind::ExpectationsChanged]);
        let rejudged = found.rejudged.expect("the runs are as they were");
        assert_eq!(rejudged.verdict(), ClaimVerdict::Not);
        assert!(verify(&claim, Some(&rejudged)).expect("verifies").problems.is_empty());
        // What is stale is not judged anew, only a new run is.
        let mut stale = result.clone();
        let code = &mut stale.provenance.as_mut().expect("given").method_code;
        code.insert("wanda".into(), "sha256:of other code".into());
        stale.seal = seal(&stale).expect("seal");
        let found = verify(&claim, Some(&stale)).expect("verifies");
        assert!(found.problems.len() == 2 && found.rejudged.is_none());
        // Nor is a damaged result.
        let mut edited = result;
        edited.minutes += 1.0;
        assert!(verify(&claim, Some(&edited)).expect("verifies").rejudged.is_none());
    }
}
