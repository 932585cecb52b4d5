//! Claims: the statement of a paper, the comparison that measures it, what counts as reproduced.
//!
//! [`judge`] holds a report against the expectations, [`verify`] says whether a written result can still
//! be believed, [`confirm`] whether changed code makes the same, [`page`] shows all of them.

pub mod confirm;
pub mod judge;
pub mod page;
pub mod verify;

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::compare::{self, BASE};
use crate::error::{Error, Result};
use crate::eval::metrics;
use crate::methods::{adapt, registry};
use crate::proto::v1::{self, Relation};
use crate::{code, machine};

const MAX_TEXT: usize = 4096;
const MAX_EXPECTATIONS: usize = 256;

/// Checks what a claim says by itself; its comparison is checked against the base like any other.
pub fn check_text(claim: &v1::Claim) -> Result<()> {
    compare::check_name(&claim.name)?;
    for (field, text) in [
        ("system", &claim.system),
        ("statement", &claim.statement),
        ("model_source", &claim.model_source),
    ] {
        if text.trim().is_empty() || text.len() > MAX_TEXT {
            return Err(Error::field(field, format!("write 1 to {MAX_TEXT} bytes")));
        }
    }
    let comparison = &given(claim)?;
    compare::check_counts(comparison).map_err(|e| e.within("comparison"))?;
    if comparison.arms.iter().any(|arm| !arm.version.is_empty()) {
        let problem = "a claim's arms take steps: a version elsewhere is another one";
        return Err(Error::field("comparison.arms.version", problem));
    }
    if !comparison.model.is_empty() {
        let problem = "is not for claims; model_source says where the base comes from";
        return Err(Error::field("comparison.model", problem));
    }
    let known: BTreeSet<&str> = claim.data.iter().map(|data| data.dataset.as_str()).collect();
    for (i, data) in claim.data.iter().enumerate() {
        if v1::DatasetKind::try_from(data.kind).is_err() {
            let problem = format!("{} is no kind of data set", data.kind);
            return Err(Error::field(format!("data[{i}].kind"), problem));
        }
    }
    for dataset in compare::datasets(comparison) {
        if !known.contains(dataset.as_str()) {
            let problem = format!("says nothing of '{dataset}', which the comparison reads");
            return Err(Error::field("data", problem));
        }
    }
    if let Some(short) = &claim.short
        && (short.arms.len() > comparison.arms.len() || short.seeds.len() > comparison.seeds.len())
    {
        return Err(Error::field("short", "has more arms or seeds than the full form"));
    }
    if claim.expectations.is_empty() || claim.expectations.len() > MAX_EXPECTATIONS {
        let problem = format!("a claim has 1 to {MAX_EXPECTATIONS}");
        return Err(Error::field("expectations", problem));
    }
    if !claim.expectations.iter().any(|e| e.headline) {
        let problem = "mark at least one as the headline: what the paper is known for";
        return Err(Error::field("expectations", problem));
    }
    let arms: BTreeSet<&str> =
        comparison.arms.iter().map(|arm| arm.name.as_str()).chain([BASE]).collect();
    for (i, expectation) in claim.expectations.iter().enumerate() {
        check_expectation(expectation, &arms)
            .map_err(|e| e.within(&format!("expectations[{i}]")))?;
    }
    form(claim, true).map(|_| ())
}

fn check_expectation(expectation: &v1::Expectation, arms: &BTreeSet<&str>) -> Result<()> {
    metrics::metric(&expectation.metric)?;
    let value = match expectation.relation() {
        Relation::Unspecified => {
            return Err(Error::field("relation", "is missing or no number of Relation"));
        }
        Relation::ValueAtLeast | Relation::ValueAtMost => true,
        _ => false,
    };
    let names = [("arm", &expectation.arm, false), ("against", &expectation.against, value)];
    for (field, arm, absent) in names {
        if absent && !arm.is_empty() {
            return Err(Error::field(field, "a value is held against its bound alone"));
        }
        if !absent && !arms.contains(arm.as_str()) {
            return Err(Error::field(field, format!("'{}' is no arm", arm.escape_debug())));
        }
    }
    if !expectation.bound.is_finite() {
        return Err(Error::field("bound", "is not a finite number"));
    }
    Ok(())
}

/// The comparison, with its tasks put into its arms.
fn given(claim: &v1::Claim) -> Result<v1::Comparison> {
    let given = claim.comparison.as_ref();
    let given = given.ok_or_else(|| Error::field("comparison", "is missing"))?;
    compare::check_counts(given)
        .and_then(|()| compare::expand(given))
        .map_err(|e| e.within("comparison"))
}

/// The comparison that a form of a claim runs; its model is empty. Each expectation becomes a contrast
/// of it.
pub fn form(claim: &v1::Claim, short: bool) -> Result<v1::Comparison> {
    let mut comparison = given(claim)?;
    if short {
        let short = claim.short.clone().unwrap_or_default();
        shorten(&mut comparison, &short)?;
    }
    let arms: BTreeSet<String> =
        comparison.arms.iter().map(|arm| arm.name.clone()).chain([BASE.to_owned()]).collect();
    comparison
        .contrasts
        .retain(|c| arms.contains(&c.arm) && (c.against.is_empty() || arms.contains(&c.against)));
    for expectation in &claim.expectations {
        let contrast = judge::contrast_of(expectation);
        let known = comparison.contrasts.contains(&contrast);
        if !known && arms.contains(&contrast.arm) && arms.contains(&contrast.against) {
            comparison.contrasts.push(contrast);
        }
    }
    Ok(comparison)
}

fn shorten(comparison: &mut v1::Comparison, short: &v1::ShortForm) -> Result<()> {
    comparison.seeds = match short.seeds.as_slice() {
        [] => comparison.seeds.iter().take(1).copied().collect(),
        seeds => seeds.to_vec(),
    };
    for name in &short.arms {
        if !comparison.arms.iter().any(|arm| arm.name == *name) {
            let problem = format!("'{}' is no arm", name.escape_debug());
            return Err(Error::field("short.arms", problem));
        }
    }
    if !short.arms.is_empty() {
        comparison.arms.retain(|arm| short.arms.contains(&arm.name));
    }
    let evaluations = comparison
        .evaluation
        .iter_mut()
        .chain(comparison.arms.iter_mut().flat_map(|a| &mut a.evaluation));
    for evaluation in evaluations {
        if let Some(tokens) = short.max_tokens {
            evaluation.max_tokens = Some(tokens);
            evaluation.texts.iter_mut().for_each(|text| text.max_tokens = None);
        }
        if let Some(speed) = short.speed {
            evaluation.speed = speed;
        }
        if let (Some(choice), Some(items)) = (&mut evaluation.choice, short.max_items) {
            choice.max_items = Some(items);
        }
        if let (Some(task), Some(items)) = (&mut evaluation.task, short.max_items) {
            task.max_records = Some(items);
        }
    }
    if let Some(sequences) = short.calibration_sequences {
        for step in comparison.arms.iter_mut().flat_map(|arm| &mut arm.steps) {
            *step = with_sequences(&registry::resolve(step), sequences)?;
        }
    }
    if let Some(steps) = short.training_steps {
        for step in comparison.arms.iter_mut().flat_map(|arm| &mut arm.steps) {
            *step = with_updates(step, steps)?;
        }
    }
    for tuning in comparison.arms.iter_mut().filter_map(|arm| arm.tuning.as_mut()) {
        if let (Some(adaptation), Some(sequences)) =
            (&mut tuning.adaptation, short.calibration_sequences)
        {
            *adaptation = with_sequences(&adapt::registry::resolve(adaptation), sequences)?;
        }
        if let (Some(training), Some(steps)) = (&mut tuning.training, short.training_steps) {
            (training.steps, training.epochs) = (Some(steps), None);
        }
    }
    Ok(())
}

/// The message of a method with another number of calibration sequences, whatever method it is: it is
/// searched for `calibration`, for what CorDA calls `context`, and for the `text` that a step learns from, so
/// that new methods need nothing here.
fn with_sequences<M: Serialize + DeserializeOwned>(method: &M, sequences: u32) -> Result<M> {
    changed(method, &|name, fields| {
        if matches!(name, "calibration" | "context" | "text") {
            fields.insert("sequences".to_owned(), sequences.into());
        }
    })
}

/// The message of a method with another number of updates, where it has a `training`.
fn with_updates<M: Serialize + DeserializeOwned>(method: &M, updates: u32) -> Result<M> {
    changed(method, &|name, fields| {
        if name == "training" {
            fields.remove("epochs");
            fields.insert("steps".to_owned(), updates.into());
        }
    })
}

/// A message in which every inner message was changed, by the name of its field.
fn changed<M: Serialize + DeserializeOwned>(
    message: &M,
    change: &dyn Fn(&str, &mut Map<String, Value>),
) -> Result<M> {
    fn descend(value: &mut Value, change: &dyn Fn(&str, &mut Map<String, Value>)) {
        let Value::Object(fields) = value else { return };
        for (name, value) in fields {
            if let Value::Object(fields) = value {
                change(name, fields);
            }
            descend(value, change);
        }
    }
    let mut json = serde_json::to_value(message).map_err(unwritable)?;
    descend(&mut json, change);
    serde_json::from_value(json).map_err(unwritable)
}

fn unwritable(error: serde_json::Error) -> Error {
    let problem = format!("has no JSON form: {error}; is a number of an enum unknown?");
    Error::field("claim", problem).with_source(error)
}

/// Resource names that a run of the claim reads besides its model.
pub fn uses(claim: &v1::Claim) -> Vec<String> {
    let comparison = claim.comparison.clone().unwrap_or_default();
    compare::datasets(&comparison).into_iter().chain(compare::versions(&comparison)).collect()
}

/// Digest of what a form of a claim runs and on what. Words and expectations are not in it: changing
/// them asks for no new run.
pub fn digest(claim: &v1::Claim, short: bool) -> Result<String> {
    let mut comparison = form(claim, short)?;
    comparison.contrasts.clear();
    comparison.display_name.clear();
    comparison.metrics.clear();
    for arm in &mut comparison.arms {
        arm.display_name.clear();
    }
    let run = v1::Claim {
        model_source: claim.model_source.clone(),
        model_digest: claim.model_digest.clone(),
        data: claim.data.clone(),
        comparison: Some(comparison),
        ..Default::default()
    };
    Ok(sha256(&run.encode_to_vec()))
}

/// The seal of a result: a digest over all of it, in JSON with sorted keys.
pub fn seal(result: &v1::ClaimResult) -> Result<String> {
    let open = v1::ClaimResult { seal: String::new(), ..result.clone() };
    let json = sorted(serde_json::to_value(&open).map_err(unwritable)?);
    Ok(sha256(json.to_string().as_bytes()))
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let fields: BTreeMap<_, _> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            Value::Object(fields.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

fn sha256(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// Names of the methods that a comparison runs.
pub fn methods(comparison: &v1::Comparison) -> BTreeSet<&'static str> {
    let steps = comparison.arms.iter().flat_map(|arm| &arm.steps);
    let steps = steps.filter_map(|step| registry::method(step).ok()).map(|m| m.card().name);
    let tunings = comparison.arms.iter().filter_map(|arm| arm.tuning.as_ref());
    let tunings = tunings.filter_map(|tuning| tuning.adaptation.as_ref());
    let tunings = tunings.filter_map(|a| adapt::registry::method(a).ok()).map(|m| m.card().name);
    steps.chain(tunings).collect()
}

/// Where and with what this program measures.
pub fn provenance(comparison: &v1::Comparison, checkout: Option<v1::Checkout>) -> v1::Provenance {
    let digests = methods(comparison)
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), code::of_method(name)?.to_owned())));
    v1::Provenance {
        code_version: env!("CARGO_PKG_VERSION").to_owned(),
        method_code: digests.collect(),
        checkout,
        processor: machine::processor(),
        instructions: machine::instructions().to_owned(),
        threads: i32::try_from(rayon::current_num_threads()).unwrap_or(i32::MAX),
        memory_bytes: machine::memory_bytes().and_then(|b| i64::try_from(b).ok()).unwrap_or(0),
        system: machine::system(),
    }
}

#[cfg(test)]
mod testing;

#[cfg(test)]
mod tests {
    use super::testing::claim;
    use super::*;

    #[test]
    fn what_is_wrong_with_a_claim_is_named() {
        check_text(&claim()).expect("a good claim");
        type Change = fn(&mut v1::Claim);
        let cases: [(Change, &str); 10] = [
            (|c| c.name = "A b".into(), "name"),
            (|c| c.statement.clear(), "statement"),
            (|c| c.comparison = None, "comparison"),
            (|c| c.data.clear(), "data"),
            (
                |c| {
                    let arm = &mut c.comparison.as_mut().expect("given").arms[0];
                    arm.version = "models/m".into();
                },
                "comparison.arms.version",
            ),
            (|c| c.expectations.clear(), "expectations"),
            (|c| c.expectations[0].headline = false, "expectations"),
            (|c| c.expectations[1].arm = "nobody".into(), "expectations[1].arm"),
            (|c| c.expectations[0].relation = 0, "expectations[0].relation"),
            (|c| c.short.get_or_insert_default().arms = vec!["nobody".into()], "short.arms"),
        ];
        for (change, field) in cases {
            let mut bad = claim();
            change(&mut bad);
            let error = check_text(&bad).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
        }
    }

    #[test]
    fn the_short_form_is_a_part_of_the_full_one() {
        let mut claim = claim();
        claim.short = Some(v1::ShortForm {
            arms: vec!["wanda".into()],
            max_tokens: Some(600),
            calibration_sequences: Some(3),
            ..Default::default()
        });
        let full = form(&claim, false).expect("full");
        assert_eq!((full.arms.len(), full.seeds.len()), (2, 3));
        assert_eq!(full.contrasts.len(), claim.expectations.len());
        let short = form(&claim, true).expect("short");
        assert_eq!((short.arms.len(), short.seeds.as_slice()), (1, &[0][..]));
        assert_eq!(short.evaluation.expect("given").max_tokens, Some(600));
        let Some(v1::step::Method::Wanda(wanda)) = &short.arms[0].steps[0].method else {
            panic!("wanda")
        };
        let calibration = wanda.calibration.as_ref().expect("given");
        assert_eq!(calibration.sequences, Some(3));
        assert_eq!(calibration.dataset, "datasets/text", "nothing else is changed");
        // Only what is held against the base is left: the other arm is gone.
        assert!(short.contrasts.iter().all(|c| c.arm == "wanda" && c.against == BASE));
    }

    #[test]
    fn the_short_form_cuts_the_trainings_of_steps() {
        let step = |training: Value| -> v1::Step {
            serde_json::from_value(serde_json::json!({ "train": { "training": training } }))
                .expect("a step")
        };
        let whole = serde_json::json!({ "dataset": "datasets/d", "epochs": 2.0, "batchSize": 4 });
        let cut = serde_json::json!({ "dataset": "datasets/d", "steps": 7, "batchSize": 4 });
        let mut claim = claim();
        let arms = &mut claim.comparison.as_mut().expect("given").arms;
        arms[0].steps.push(step(whole.clone()));
        let short = v1::ShortForm { training_steps: Some(7), ..Default::default() };
        claim.short = Some(short);
        let last = |short: bool| form(&claim, short).expect("a form").arms[0].steps.last().cloned();
        assert_eq!((last(false), last(true)), (Some(step(whole)), Some(step(cut))));
    }

    #[test]
    fn the_digest_covers_what_is_run_and_not_what_is_said() {
        let given = claim();
        let before = digest(&given, false).expect("digest");
        let mut said = given.clone();
        said.statement = "something else".into();
        said.expectations[0].bound = 9.0;
        said.comparison.as_mut().expect("given").display_name = "another title".into();
        assert_eq!(digest(&said, false).expect("digest"), before);
        let mut run = given.clone();
        run.comparison.as_mut().expect("given").seeds.pop();
        assert_ne!(digest(&run, false).expect("digest"), before);
        let mut data = given;
        data.data[0].digest = "sha256:other".into();
        assert_ne!(digest(&data, false).expect("digest"), before);
    }
}
