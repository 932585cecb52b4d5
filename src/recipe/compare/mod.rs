//! Comparisons: recipes side by side over one base and the same data.
//!
//! [`plan`] orders the work so that what arms have in common is done once, [`report`] puts the finished
//! runs together, [`stats`] says how sure a difference is, [`table`] and [`picture`] show it. Who runs
//! the plan keeps the runs.

pub mod chart;
mod draw;
mod expand;
pub mod front;
pub mod gap;
mod labels;
pub mod picture;
pub mod plan;
pub mod report;
pub(super) mod scale;
pub mod stats;
pub mod table;
pub(super) mod text;

use std::collections::{BTreeMap, BTreeSet};

pub(super) use draw::{GREY, SMALL, line, text as label};

pub use expand::expand;
use serde_json::Value;

use super::{adapt, check_steps, evaluation_datasets, rules, step_datasets, unique};
use crate::data::records::Kind;
use crate::error::{Error, Reason, Result};
use crate::eval::{self, metrics};
use crate::methods::{Estimate, registry};
use crate::models::{AnyInfo, encoder, not_a_decoder};
use crate::proto::v1::{self, KeepVersions};

/// Name that stands for the base in contrasts and tables.
pub const BASE: &str = "base";

const MAX_ARMS: usize = 64;
const MAX_SEEDS: usize = 32;
const MAX_CONTRASTS: usize = 256;
const MAX_NAME: usize = 40;
const MAX_TITLE: usize = 512;

/// What is known of a base before its weights are read.
#[derive(Debug, Clone)]
pub struct Base {
    pub family: String,
    /// `config.json` in Hugging Face form.
    pub config: Value,
    /// Bytes of the weights.
    pub bytes: u64,
    /// Of what takes steps: all but encoders.
    pub info: Option<AnyInfo>,
}

impl Base {
    /// A decoder.
    pub fn decoder(config: Value, info: AnyInfo) -> Self {
        let family = info.family.name().to_owned();
        Self { family, config, bytes: info.bytes(), info: Some(info) }
    }

    fn info(&self) -> Result<&AnyInfo> {
        self.info.as_ref().ok_or_else(|| not_a_decoder(&self.family))
    }

    /// Whether it reads texts, and does not continue them.
    pub fn is_encoder(&self) -> bool {
        self.family == encoder::FAMILY
    }

    fn check_evaluation(&self, evaluation: &v1::Evaluation) -> Result<()> {
        if evaluation.norm_bounds.is_some() {
            return Err(Error::field(
                "norm_bounds",
                "sizes of queries and keys are not compared; evaluate a version with it",
            ));
        }
        match &self.info {
            Some(info) => eval::check_any(evaluation, info),
            None => eval::check_encoder(evaluation),
        }
    }
}

/// Refuses comparisons that are larger than any is run, before anything is done with one.
pub fn check_counts(comparison: &v1::Comparison) -> Result<()> {
    let arms = &comparison.arms;
    if arms.is_empty() || arms.len() > MAX_ARMS {
        let count = arms.len();
        return Err(bad("arms", format!("{count} arms; a comparison has 1 to {MAX_ARMS}")));
    }
    let seeds: BTreeSet<u64> = comparison.seeds.iter().take(MAX_SEEDS + 1).copied().collect();
    if seeds.len() < comparison.seeds.len() || seeds.len() > MAX_SEEDS {
        let problem = format!("give at most {MAX_SEEDS} seeds, each once");
        return Err(Error::field("seeds", problem));
    }
    let counts = [
        ("contrasts", comparison.contrasts.len(), MAX_CONTRASTS),
        ("metrics", comparison.metrics.len(), metrics::ALL.len()),
    ];
    for (field, count, most) in counts {
        if count > most {
            return Err(Error::field(field, format!("{count} are more than {most}")));
        }
    }
    let titles = arms.iter().map(|arm| &arm.display_name).chain([&comparison.display_name]);
    if titles.into_iter().any(|title| title.len() > MAX_TITLE) {
        return Err(Error::field("display_name", format!("longer than {MAX_TITLE} bytes")));
    }
    Ok(())
}

/// Checks all of a comparison, [expanded](expand), that its base's header can tell; gives the cost of each
/// arm's steps and the memory of its tuning. Arms that measure another version are checked against that, and
/// data sets against what they are for, by who knows them. Errors point into the
/// comparison (`arms[2].steps[0].wanda.sparsity.share`).
pub fn check(comparison: &v1::Comparison, base: &Base) -> Result<Vec<Estimate>> {
    check_counts(comparison)?;
    let arms = &comparison.arms;
    if KeepVersions::try_from(comparison.keep).is_err() {
        let problem = format!("{} is no number of KeepVersions", comparison.keep);
        return Err(Error::field("keep", problem));
    }
    for (i, metric) in comparison.metrics.iter().enumerate() {
        metrics::metric(metric).map_err(|e| e.within(&format!("metrics[{i}]")))?;
    }
    let evaluation = comparison.evaluation.clone().unwrap_or_default();
    base.check_evaluation(&evaluation).map_err(|e| e.within("evaluation"))?;

    let mut names = BTreeSet::from([BASE]);
    let mut estimates = Vec::with_capacity(arms.len());
    for (i, arm) in arms.iter().enumerate() {
        let place = format!("arms[{i}]");
        check_name(&arm.name).map_err(|e| e.within(&place))?;
        if !names.insert(&arm.name) {
            let problem = format!("'{}' is taken; names of arms are unique", arm.name);
            return Err(bad(format!("{place}.name"), problem));
        }
        if !arm.version.is_empty() && !arm.steps.is_empty() {
            let problem = "an arm takes steps or measures a version, not both";
            return Err(bad(format!("{place}.version"), problem));
        }
        let idle = arm.steps.is_empty() && arm.tuning.is_none() && arm.evaluation.is_none();
        if arm.version.is_empty() && idle {
            let problem = "the arm does nothing: give steps, a tuning, a version, or an \
                           evaluation of its own";
            return Err(bad(place, problem));
        }
        if !arm.version.is_empty() && arm.tuning.is_some() {
            let problem = "an arm tunes what its steps make; compare over the version to tune it";
            return Err(bad(format!("{place}.tuning"), problem));
        }
        if let Some(evaluation) = &arm.evaluation {
            let within = |e: Error| e.within(&format!("{place}.evaluation"));
            base.check_evaluation(evaluation).map_err(within)?;
        }
        let mut estimate = if arm.steps.is_empty() {
            Estimate { memory_bytes: base.bytes, ..Estimate::default() }
        } else {
            let steps = base.info().and_then(|info| check_steps(&arm.steps, info));
            steps.map_err(|e| e.within(&place))?.total
        };
        if let Some(tuning) = &arm.tuning {
            let place = format!("{place}.tuning");
            let memory = check_tuning(tuning, base).map_err(|e| e.within(&place))?;
            estimate.memory_bytes = estimate.memory_bytes.max(memory);
        }
        estimates.push(estimate);
    }

    for (i, contrast) in comparison.contrasts.iter().enumerate() {
        let place = format!("contrasts[{i}]");
        metrics::metric(&contrast.metric).map_err(|e| e.within(&place))?;
        for (field, arm) in [("arm", &contrast.arm), ("against", &contrast.against)] {
            if !(names.contains(arm.as_str()) || field == "against" && arm.is_empty()) {
                let problem = format!("'{}' is no arm of the comparison", arm.escape_debug());
                return Err(Error::field(format!("{place}.{field}"), problem));
            }
        }
    }
    Ok(estimates)
}

/// What is worth knowing of the steps of a checked comparison, by arm (`arms[2].steps[0].wanda`); `kinds` has
/// the kind of each data set.
pub fn warnings(
    comparison: &v1::Comparison,
    base: &Base,
    kinds: &BTreeMap<String, Kind>,
) -> Vec<v1::RecipeWarning> {
    let Ok(info) = base.info() else { return Vec::new() };
    let arms = comparison.arms.iter().enumerate().filter(|(_, arm)| !arm.steps.is_empty());
    let of_arm = |(i, arm): (usize, &v1::Arm)| {
        let plan = check_steps(&arm.steps, info);
        let mut found = plan.map(|plan| plan.warnings).unwrap_or_default();
        let recipe = v1::Recipe {
            steps: arm.steps.clone(),
            evaluation: evaluation_of(comparison, arm).cloned(),
            ..Default::default()
        };
        found.extend(rules::of_data(&recipe, kinds));
        found.into_iter().map(move |warning| v1::RecipeWarning {
            field: format!("arms[{i}].{}", warning.field),
            ..warning
        })
    };
    arms.flat_map(of_arm).collect()
}

/// Checks what an arm trains; gives the bytes of memory that it takes.
fn check_tuning(tuning: &v1::Tuning, base: &Base) -> Result<u64> {
    let training = tuning.training.as_ref();
    if training.is_none_or(|training| training.dataset.is_empty()) {
        return Err(Error::field("training.dataset", "missing; name the data to learn from"));
    }
    let model = (base.family.as_str(), &base.config);
    let plan = adapt::Plan::new(tuning.adaptation.as_ref(), training, model)?;
    Ok(plan.message(base.bytes).memory_bytes.unsigned_abs())
}

/// The same comparison, [expanded](expand), with every default written out that does not depend on the base.
pub fn resolve(comparison: &v1::Comparison) -> v1::Comparison {
    // What cannot be expanded is refused elsewhere.
    let mut comparison = expand(comparison).unwrap_or_else(|_| comparison.clone());
    if comparison.seeds.is_empty() {
        comparison.seeds = vec![0];
    }
    if comparison.keep() == KeepVersions::Unspecified {
        comparison.set_keep(KeepVersions::None);
    }
    comparison.evaluation.get_or_insert_default();
    for arm in &mut comparison.arms {
        if arm.display_name.is_empty() {
            arm.display_name.clone_from(&arm.name);
        }
        arm.steps = arm.steps.iter().map(registry::resolve).collect();
        if let Some(tuning) = &mut arm.tuning {
            let adaptation = tuning.adaptation.clone().unwrap_or_default();
            let training = tuning.training.clone().unwrap_or_default();
            let (adaptation, training) = adapt::resolve(&adaptation, &training);
            (tuning.adaptation, tuning.training) = (Some(adaptation), Some(training));
        }
    }
    for contrast in &mut comparison.contrasts {
        if contrast.against.is_empty() {
            contrast.against = BASE.to_owned();
        }
    }
    comparison
}

/// Resource names of the data sets that a comparison reads, each once, sorted.
pub fn datasets(comparison: &v1::Comparison) -> Vec<String> {
    let expanded = expand(comparison);
    let comparison = expanded.as_ref().unwrap_or(comparison);
    let arms = &comparison.arms;
    let of_tunings = arms.iter().filter_map(|arm| arm.tuning.as_ref()).flat_map(|tuning| {
        let adaptation = tuning.adaptation.clone().unwrap_or_default();
        let training = tuning.training.clone().unwrap_or_default();
        adapt::names(&adaptation, &training).unwrap_or_default()
    });
    let of_steps = arms.iter().flat_map(|arm| &arm.steps).flat_map(step_datasets);
    let evaluations = comparison.evaluation.iter().chain(arms.iter().flat_map(|a| &a.evaluation));
    unique(of_steps.chain(of_tunings).chain(evaluations.flat_map(evaluation_datasets)))
}

/// Resource names of the versions that a comparison reads.
pub fn versions(comparison: &v1::Comparison) -> Vec<String> {
    let of_arms = comparison.arms.iter().map(|arm| arm.version.clone());
    unique(of_arms.chain([comparison.model.clone()]))
}

/// Whether base and arms are measured alike: what an arm's own evaluation replaces.
pub fn evaluation_of<'a>(
    comparison: &'a v1::Comparison,
    arm: &'a v1::Arm,
) -> Option<&'a v1::Evaluation> {
    arm.evaluation.as_ref().or(comparison.evaluation.as_ref())
}

/// Checks a short name: 1 to 40 lower-case letters, digits and inner hyphens.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let good = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| plain(b) || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good {
        return Ok(());
    }
    Err(Error::field(
        "name",
        format!("use 1 to {MAX_NAME} lower-case letters, digits and inner hyphens"),
    ))
}

fn bad(field: impl Into<String>, problem: impl Into<String>) -> Error {
    Error::at(Reason::InvalidRecipe, field, problem)
}

#[cfg(test)]
pub mod testing;

#[cfg(test)]
mod tests {
    use super::testing::{arm, comparison, round, wanda};
    use super::*;
    use crate::models::decoder::random;

    #[test]
    fn what_is_wrong_is_named_by_its_place() {
        let info = random::model(random::tiny("llama"), 1).expect("a model").info();
        let base = Base::decoder(random::tiny("llama"), info.into());
        let good = comparison(vec![arm("a", vec![wanda(0.5)]), arm("b", vec![round(4)])]);
        assert_eq!(check(&good, &base).expect("fits").len(), 2);
        type Change = fn(&mut v1::Comparison);
        let cases: [(Change, &str); 12] = [
            (|c| c.arms.clear(), "arms"),
            (|c| c.arms[1].name = "a".into(), "arms[1].name"),
            (|c| c.arms[0].name = "base".into(), "arms[0].name"),
            (|c| c.arms[0].name = "A".into(), "arms[0].name"),
            (|c| c.arms[1].version = "models/x/versions/1".into(), "arms[1].version"),
            (|c| c.arms[1].steps.clear(), "arms[1]"),
            (|c| c.arms[0].steps = vec![wanda(1.5)], "arms[0].steps[0].wanda.sparsity.share"),
            (|c| c.seeds = vec![1, 1], "seeds"),
            (|c| c.keep = 9, "keep"),
            (|c| c.metrics = vec!["speed".into()], "metrics[0].metric"),
            (
                |c| {
                    c.contrasts = vec![v1::Contrast {
                        metric: "perplexity".into(),
                        arm: "c".into(),
                        against: String::new(),
                    }];
                },
                "contrasts[0].arm",
            ),
            (
                |c| {
                    c.evaluation = Some(v1::Evaluation { context: Some(1), ..Default::default() });
                },
                "evaluation.context",
            ),
        ];
        for (change, field) in cases {
            let mut bad = good.clone();
            change(&mut bad);
            let error = check(&bad, &base).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
        }
    }

    #[test]
    fn tunings_are_checked_like_adaptations() {
        let info = random::model(random::tiny("llama"), 1).expect("a model").info();
        let base = Base::decoder(random::tiny("llama"), info.into());
        let tuned = |json: Value| {
            let mut arm = arm("a", Vec::new());
            arm.tuning = Some(serde_json::from_value(json).expect("a tuning"));
            comparison(vec![arm])
        };
        let good = serde_json::json!({
            "adaptation": { "lora": {} }, "training": { "dataset": "datasets/d" },
        });
        let plan = check(&tuned(good.clone()), &base).expect("fits");
        assert!(plan[0].memory_bytes > base.bytes);
        for (path, value, field) in [
            ("/training/dataset", Value::from(""), "arms[0].tuning.training.dataset"),
            (
                "/training",
                serde_json::json!({ "dataset": "datasets/d", "batch_size": 0 }),
                "arms[0].tuning.training.batch_size",
            ),
            (
                "/adaptation",
                serde_json::json!({ "lora": { "adapter": { "r": 0 } } }),
                "arms[0].tuning.adaptation.lora.adapter.r",
            ),
            ("/adaptation", serde_json::json!({ "head_only": {} }), "arms[0].tuning.adaptation"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(path).expect("there") = value;
            let error = check(&tuned(bad), &base).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
        }
        let mut elsewhere = tuned(good.clone());
        elsewhere.arms[0].version = "models/x/versions/1".into();
        let error = check(&elsewhere, &base).unwrap_err();
        assert_eq!(error.violations()[0].field, "arms[0].tuning");

        // An encoder takes no steps and has no perplexity.
        let encoder = Base {
            family: encoder::FAMILY.into(),
            config: crate::models::encoder::random::tiny(),
            bytes: 1000,
            info: None,
        };
        assert!(check(&tuned(good), &encoder).is_ok());
        let error = check(&comparison(vec![arm("a", vec![wanda(0.5)])]), &encoder).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let mut text = comparison(vec![arm("a", Vec::new())]);
        text.evaluation =
            Some(v1::Evaluation { dataset: "datasets/d".into(), ..Default::default() });
        let error = check(&text, &encoder).unwrap_err();
        assert_eq!(error.violations()[0].field, "evaluation.dataset", "{error}");
    }

    #[test]
    fn defaults_are_written_out_once() {
        let given = comparison(vec![arm("a", vec![wanda(0.5)])]);
        let resolved = resolve(&given);
        assert_eq!(resolved.seeds, [0]);
        assert_eq!(resolved.keep(), KeepVersions::None);
        assert_eq!(resolved.arms[0].display_name, "a");
        assert_ne!(resolved.arms[0].steps, given.arms[0].steps);
        assert_eq!(resolve(&resolved), resolved);
    }

    #[test]
    fn every_data_set_and_version_is_listed() {
        let mut given = comparison(vec![arm("a", vec![wanda(0.5)]), arm("b", Vec::new())]);
        given.model = "models/m/versions/1".into();
        given.arms[1].version = "models/m/versions/2".into();
        given.evaluation = Some(v1::Evaluation {
            dataset: "datasets/text".into(),
            choice: Some(v1::ChoiceEvaluation {
                dataset: "datasets/questions".into(),
                max_items: None,
            }),
            ..Default::default()
        });
        let steps = &mut given.arms[0].steps;
        let Some(v1::step::Method::Wanda(wanda)) = &mut steps[0].method else { panic!("wanda") };
        wanda.calibration.get_or_insert_default().dataset = "datasets/calibration".into();
        let names = ["datasets/calibration", "datasets/questions", "datasets/text"];
        assert_eq!(datasets(&given), names);
        assert_eq!(versions(&given), ["models/m/versions/1", "models/m/versions/2"]);
    }
}
