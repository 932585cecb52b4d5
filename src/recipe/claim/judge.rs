//! Holding measured effects against what was expected.

use crate::eval::metrics;
use crate::proto::v1::{self, ClaimVerdict, FindingVerdict, Relation};
use crate::recipe::compare::{BASE, gap, report};

/// The contrast that an expectation speaks of; values are held against the base only to have one.
pub fn contrast_of(expectation: &v1::Expectation) -> v1::Contrast {
    let against = match expectation.against.as_str() {
        "" => BASE,
        against => against,
    };
    v1::Contrast {
        metric: expectation.metric.clone(),
        arm: expectation.arm.clone(),
        against: against.to_owned(),
    }
}

/// A finding for each expectation, and all together. An incomplete report decides nothing; nor does the
/// short form, which is for the caller to say.
pub fn judge(
    claim: &v1::Claim,
    measured: &v1::ComparisonReport,
) -> (Vec<v1::Finding>, ClaimVerdict) {
    let findings: Vec<v1::Finding> =
        claim.expectations.iter().map(|expectation| finding(expectation, measured)).collect();
    let verdict = if measured.complete { together(&findings) } else { ClaimVerdict::Unspecified };
    (findings, verdict)
}

fn finding(expectation: &v1::Expectation, measured: &v1::ComparisonReport) -> v1::Finding {
    let found = report::contrast(measured, &contrast_of(expectation));
    let (number, at_least) = match expectation.relation() {
        Relation::RatioAtLeast => (found.ratio, true),
        Relation::RatioAtMost => (found.ratio, false),
        Relation::DifferenceAtLeast => (found.difference, true),
        Relation::DifferenceAtMost => (found.difference, false),
        Relation::ValueAtLeast => (value(expectation, measured), true),
        Relation::ValueAtMost => (value(expectation, measured), false),
        Relation::GapClosedAtLeast => {
            let v1::Expectation { metric, arm, against, .. } = expectation;
            (gap::closed(measured, metric, arm, against), true)
        }
        Relation::Unspecified => (None, true),
    };
    let mut finding = v1::Finding {
        effect: expectation.effect.clone(),
        measured: number,
        bound: expectation.bound,
        headline: expectation.headline,
        ..Default::default()
    };
    finding.set_verdict(
        number.map_or(FindingVerdict::Unspecified, |number| {
            hold(&number, expectation.bound, at_least)
        }),
    );
    finding
}

/// The mean of an arm with the range of its runs. One run says nothing of chance, unless the metric is a
/// plain count.
fn value(expectation: &v1::Expectation, measured: &v1::ComparisonReport) -> Option<v1::Estimated> {
    let arm = measured.arms.iter().find(|arm| arm.name == expectation.arm)?;
    let column = (0..measured.columns.len()).find(|c| {
        measured.columns[*c].metric == expectation.metric && report::cell(arm, *c).is_some()
    })?;
    let cell = report::cell(arm, column)?;
    let exact = metrics::metric(&expectation.metric).is_ok_and(|metric| metric.exact);
    let known = cell.runs > 1 || exact;
    Some(v1::Estimated {
        value: cell.mean,
        low: known.then_some(cell.minimum),
        high: known.then_some(cell.maximum),
    })
}

fn hold(number: &v1::Estimated, bound: f64, at_least: bool) -> FindingVerdict {
    let (Some(low), Some(high)) = (number.low, number.high) else {
        return FindingVerdict::Unclear;
    };
    let right = |v: f64| if at_least { v >= bound } else { v <= bound };
    match (right(low), right(high)) {
        (true, true) => FindingVerdict::Holds,
        (false, false) => FindingVerdict::Fails,
        _ => FindingVerdict::Unclear,
    }
}

fn together(findings: &[v1::Finding]) -> ClaimVerdict {
    let all = |want: FindingVerdict, only_headlines: bool| {
        let asked = findings.iter().filter(|f| f.headline || !only_headlines);
        asked.into_iter().all(|f| f.verdict() == want)
    };
    let failed = |f: &&v1::Finding| f.headline && f.verdict() == FindingVerdict::Fails;
    if findings.iter().any(|f| f.verdict() == FindingVerdict::Unspecified) {
        ClaimVerdict::Unspecified
    } else if all(FindingVerdict::Holds, false) {
        ClaimVerdict::Reproduced
    } else if findings.iter().any(|f| failed(&f)) {
        ClaimVerdict::Not
    } else if all(FindingVerdict::Holds, true) {
        ClaimVerdict::Partly
    } else {
        ClaimVerdict::Unclear
    }
}

/// The verdict in a word.
pub fn word(verdict: ClaimVerdict) -> &'static str {
    match verdict {
        ClaimVerdict::Unspecified => "undecided",
        ClaimVerdict::Reproduced => "reproduced",
        ClaimVerdict::Partly => "partly",
        ClaimVerdict::Not => "not",
        ClaimVerdict::Unclear => "unclear",
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{claim, measured};
    use super::*;

    const BASE_NATS: [f64; 4] = [2.0, 2.5, 3.0, 2.2];

    fn shifted(by: f64) -> Vec<f64> {
        BASE_NATS.iter().map(|v| v + by).collect()
    }

    fn verdict(wanda: &[f64], round: &[f64]) -> (Vec<FindingVerdict>, ClaimVerdict) {
        let claim = claim();
        let report = measured(&claim, &BASE_NATS, wanda, round);
        let (findings, verdict) = judge(&claim, &report);
        (findings.iter().map(v1::Finding::verdict).collect(), verdict)
    }

    #[test]
    fn verdicts_follow_headlines_and_intervals() {
        use FindingVerdict::{Fails, Holds, Unclear};
        // Wanda e^0.1 = 1.105 times round, and worse than the base.
        let good = verdict(&shifted(0.3), &shifted(0.2));
        assert_eq!(good, (vec![Holds, Holds], ClaimVerdict::Reproduced));
        // The headline holds, the other does not: wanda is better than the base.
        let half = verdict(&shifted(-0.1), &shifted(0.2));
        assert_eq!(half, (vec![Holds, Fails], ClaimVerdict::Partly));
        // e^0.5 = 1.65 is more than 1.2.
        let bad = verdict(&shifted(0.7), &shifted(0.2));
        assert_eq!(bad, (vec![Fails, Holds], ClaimVerdict::Not));
        // Windows disagree widely: the interval holds the bound.
        let wide = verdict(&[1.0, 4.5, 2.0, 4.2], &BASE_NATS);
        assert_eq!(wide.0[0], Unclear);
        assert_eq!(wide.1, ClaimVerdict::Unclear);
    }

    #[test]
    fn what_was_not_measured_decides_nothing() {
        let claim = claim();
        let mut report = measured(&claim, &BASE_NATS, &shifted(0.3), &shifted(0.2));
        report.complete = false;
        assert_eq!(judge(&claim, &report).1, ClaimVerdict::Unspecified);
        let mut report = measured(&claim, &BASE_NATS, &shifted(0.3), &shifted(0.2));
        report.arms[2].runs.clear();
        report::derive(&mut report);
        let (findings, verdict) = judge(&claim, &report);
        assert_eq!(findings[0].verdict(), FindingVerdict::Unspecified);
        assert_eq!(verdict, ClaimVerdict::Unspecified);
    }

    #[test]
    fn values_differences_and_ratios_have_their_bounds() {
        let mut claim = claim();
        let report = measured(&claim, &BASE_NATS, &shifted(0.3), &shifted(0.2));
        let base = 2.425f64.exp();
        let mut of = |relation: Relation, bound: f64| {
            let expectation = &mut claim.expectations[0];
            expectation.set_relation(relation);
            expectation.bound = bound;
            expectation.arm = "wanda".into();
            expectation.against = match relation {
                Relation::ValueAtLeast | Relation::ValueAtMost => String::new(),
                _ => BASE.into(),
            };
            judge(&claim, &report).0[0].verdict()
        };
        let expected = base * 0.3f64.exp();
        assert_eq!(of(Relation::ValueAtLeast, expected - 0.1), FindingVerdict::Holds);
        assert_eq!(of(Relation::ValueAtMost, expected - 0.1), FindingVerdict::Fails);
        assert_eq!(of(Relation::RatioAtLeast, 1.2), FindingVerdict::Holds);
        assert_eq!(of(Relation::RatioAtMost, 1.2), FindingVerdict::Fails);
        assert_eq!(of(Relation::DifferenceAtLeast, 0.0), FindingVerdict::Holds);
        assert_eq!(of(Relation::DifferenceAtMost, 0.0), FindingVerdict::Fails);
        // One run of an arm says nothing of chance.
        claim.expectations[0].arm = "round".into();
        claim.expectations[0].set_relation(Relation::ValueAtLeast);
        claim.expectations[0].against.clear();
        assert_eq!(judge(&claim, &report).0[0].verdict(), FindingVerdict::Unclear);
    }
}
