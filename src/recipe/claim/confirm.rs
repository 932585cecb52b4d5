//! Whether changed code still makes what a written result measured.
//!
//! A result names the digests of the code that made it, and any change of that code, also one that changes no
//! number, makes it stale. What has one seed and makes the same bytes would be measured alike: so for each changed method
//! one arm is made and measured again with the first seed, and must give the same version and, wherever no clock has
//! a part in them, the same samples. Those may differ as sums in another order do: measuring is no method's code.

use std::collections::BTreeSet;

use super::{code, digest, form, methods, seal};
use crate::error::{Error, Reason, Result};
use crate::eval::metrics;
use crate::proto::v1;

/// How far samples may lie apart, of the larger one; of a thousandth where both are smaller.
const ROUNDING: f64 = 1e-5;

/// Methods of a result whose code is another now.
pub fn changed(result: &v1::ClaimResult) -> BTreeSet<&'static str> {
    let report = result.report.clone().unwrap_or_default();
    let provenance = result.provenance.clone().unwrap_or_default();
    let mut all = methods(&report.comparison.unwrap_or_default());
    all.retain(|m| provenance.method_code.get(*m).map(String::as_str) != code::of_method(m));
    all
}

/// The part of a claim that is run to confirm a result: for each method that changed the first arm that has
/// it, with the first seed; its model is empty.
///
/// # Errors
/// INVALID_FIELD for results of other claims or short forms, edited ones, and where no code changed.
pub fn part(claim: &v1::Claim, result: &v1::ClaimResult) -> Result<v1::Comparison> {
    let refuse = |problem: &str| Err(Error::field("confirm", problem));
    if result.short || result.claim_digest != digest(claim, false)? {
        return refuse("is no result of the full form of this claim; run the claim");
    }
    if seal(result)? != result.seal {
        return refuse("is not as the program wrote it; restore it, or run the claim");
    }
    let changed = changed(result);
    if changed.is_empty() {
        return refuse("was measured with the code of this program; there is nothing to confirm");
    }
    let mut part = form(claim, false)?;
    let mut open = changed;
    part.arms.retain(|arm| {
        let alone = v1::Comparison { arms: vec![arm.clone()], ..Default::default() };
        let before = open.len();
        open.retain(|method| !methods(&alone).contains(method));
        open.len() < before
    });
    part.seeds.truncate(1);
    part.contrasts.clear();
    Ok(part)
}

/// The result with the digests of the code that has made `again`, a report of its [`part`], alike; `made` is that
/// code.
///
/// # Errors
/// RESULT_DIFFERS with the arm, the seed and the first number that is another.
pub fn renewed(
    result: &v1::ClaimResult,
    again: &v1::ComparisonReport,
    made: v1::Provenance,
    time: pbjson_types::Timestamp,
) -> Result<v1::ClaimResult> {
    let before = result.report.clone().unwrap_or_default();
    for arm in &again.arms {
        let known = before.arms.iter().find(|known| known.name == arm.name);
        for run in &arm.runs {
            let known = known.and_then(|arm| arm.runs.iter().find(|known| known.seed == run.seed));
            let difference = match known {
                None => Some("was not run before".to_owned()),
                Some(known) => difference(known, run),
            };
            if let Some(difference) = difference {
                let seed = run.seed.map(|seed| format!(" with seed {seed}")).unwrap_or_default();
                return Err(Error::new(
                    Reason::ResultDiffers,
                    format!(
                        "'{}'{seed} {difference}: the changed code makes other numbers; run the claim again",
                        arm.name
                    ),
                ));
            }
        }
    }
    let comparison = again.comparison.clone().unwrap_or_default();
    let mut renewed = result.clone();
    let renewal = v1::Renewal {
        method_code: made.method_code,
        arms: comparison.arms.iter().map(|arm| arm.name.clone()).collect(),
        seed: comparison.seeds.first().copied().unwrap_or_default(),
        checkout: made.checkout,
        time: Some(time),
    };
    let provenance = renewed.provenance.get_or_insert_default();
    provenance.method_code.extend(renewal.method_code.clone());
    renewed.renewals.push(renewal);
    renewed.seal = seal(&renewed)?;
    Ok(renewed)
}

/// What is not the same of two runs of an arm, clocks and memory aside.
fn difference(before: &v1::ArmRun, now: &v1::ArmRun) -> Option<String> {
    if before.digest != now.digest {
        return Some(format!("became the version {}, it was {}", now.digest, before.digest));
    }
    let timeless = |m: &&v1::Measurement| {
        metrics::metric(&m.metric).is_ok_and(|metric| metric.quality || metric.exact)
    };
    for known in before.measurements.iter().filter(timeless) {
        let (metric, was) = (&known.metric, known.value);
        let near = |a: f64, b: f64| (a - b).abs() <= ROUNDING * a.abs().max(b.abs()).max(1e-3);
        let same = |m: &&v1::Measurement| m.metric == *metric && m.protocol == known.protocol;
        match now.measurements.iter().find(same) {
            Some(m)
                if m.samples.len() == known.samples.len()
                    && m.samples.iter().zip(&known.samples).all(|(a, b)| near(*a, *b))
                    && near(m.value, was) => {}
            Some(m) => return Some(format!("has the {metric} {}, it was {was}", m.value)),
            None => return Some(format!("has no {metric}, it was {was}")),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::testing::{claim, measured};
    use super::super::{judge, provenance};
    use super::*;

    const BASE: [f64; 3] = [2.0, 2.5, 3.0];
    const WANDA: [f64; 3] = [2.2, 2.6, 3.2];
    const ROUND: [f64; 3] = [2.1, 2.6, 3.1];

    fn written() -> (v1::Claim, v1::ClaimResult) {
        let claim = claim();
        let report = measured(&claim, &BASE, &WANDA, &ROUND);
        let (findings, verdict) = judge::judge(&claim, &report);
        let mut result = v1::ClaimResult {
            claim: claim.name.clone(),
            claim_digest: digest(&claim, false).unwrap(),
            provenance: Some(provenance(&form(&claim, false).unwrap(), None)),
            report: Some(report),
            findings,
            ..Default::default()
        };
        result.set_verdict(verdict);
        result.seal = seal(&result).unwrap();
        (claim, result)
    }

    /// The result of code in which this method was another.
    fn older(mut result: v1::ClaimResult, method: &str) -> v1::ClaimResult {
        let code = &mut result.provenance.as_mut().unwrap().method_code;
        code.insert(method.to_owned(), "sha256:before".to_owned());
        result.seal = seal(&result).unwrap();
        result
    }

    fn time() -> pbjson_types::Timestamp {
        pbjson_types::Timestamp { seconds: 1, nanos: 0 }
    }

    #[test]
    fn one_arm_of_each_changed_method_runs_with_one_seed() {
        let (claim, result) = written();
        for (method, arm) in [("wanda", "wanda"), ("round_to_nearest", "round")] {
            let part = part(&claim, &older(result.clone(), method)).unwrap();
            let arms: Vec<_> = part.arms.iter().map(|arm| arm.name.as_str()).collect();
            assert_eq!((arms, part.seeds), (vec![arm], vec![0]));
            assert!(part.contrasts.is_empty());
        }
        let both = older(older(result.clone(), "wanda"), "round_to_nearest");
        assert_eq!(part(&claim, &both).unwrap().arms.len(), 2);
        // Nothing changed, another claim, and a result that somebody edited.
        assert!(part(&claim, &result).is_err());
        let mut other = claim.clone();
        other.comparison.as_mut().unwrap().seeds.pop();
        assert!(part(&other, &both).is_err());
        let edited = v1::ClaimResult { minutes: 7.0, ..both };
        let error = part(&claim, &edited).unwrap_err();
        assert_eq!(error.violations()[0].field, "confirm");
    }

    #[test]
    fn the_same_numbers_renew_a_result_and_others_do_not() {
        let (claim, result) = written();
        let stale = older(result.clone(), "wanda");
        let again = |wanda: &[f64]| {
            let mut report = measured(&claim, &BASE, wanda, &ROUND);
            report.arms.retain(|arm| arm.name != "round");
            for arm in &mut report.arms {
                arm.runs.truncate(1);
            }
            report.comparison = Some(part(&claim, &stale).unwrap());
            report
        };
        let made = || provenance(&part(&claim, &stale).unwrap(), None);
        let renewed_by = |wanda: &[f64]| renewed(&stale, &again(wanda), made(), time());
        // Sums in another order are the same.
        assert!(renewed_by(&[2.2 + 1e-9, 2.6, 3.2]).is_ok());
        let new = renewed_by(&WANDA).unwrap();
        let found = super::super::verify::verify(&claim, Some(&new)).unwrap();
        assert!(found.problems.is_empty(), "{:?}", found.problems);
        assert_eq!(new.renewals.len(), 1);
        assert_eq!(
            (&new.renewals[0].arms[..], new.renewals[0].seed),
            (&["wanda".to_owned()][..], 0)
        );
        assert_eq!((new.report, new.findings), (result.report, result.findings));

        let error = renewed_by(&[2.2, 2.6, 3.2 + 1e-4]).unwrap_err();
        assert_eq!(error.reason(), Reason::ResultDiffers);
        assert!(error.message().starts_with("'wanda' with seed 0 has the perplexity"), "{error}");
        let mut moved = again(&WANDA);
        moved.arms[1].runs[0].digest = "sha256:other".into();
        let error = renewed(&stale, &moved, made(), time()).unwrap_err();
        assert!(error.message().contains("became the version sha256:other"), "{error}");
    }
}
