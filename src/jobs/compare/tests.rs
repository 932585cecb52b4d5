//! Comparisons and claims on tiny random models, through the queue.

use std::sync::mpsc;
use std::time::Duration;

use prost::Message;

use super::report;
use crate::error::Reason;
use crate::eval::metrics;
use crate::jobs::testing::{HeldAt, Service};
use crate::jobs::work::Models;
use crate::models::decoder::random;
use crate::proto::v1::{self, KeepVersions};
use crate::recipe::claim;
use crate::recipe::compare::testing::{arm, round, wanda};
use crate::recipe::compare::{self, BASE};
use crate::store::models::VersionRow;
use crate::store::operations::{Kind, Operation, State};

/// Two arms that begin alike, one without random numbers, and the base measured in another way; two
/// seeds.
fn comparison(base: &VersionRow, keep: KeepVersions) -> v1::Comparison {
    let mut itself = arm("itself", Vec::new());
    itself.evaluation = Some(v1::Evaluation { counts: true, ..Default::default() });
    let mut comparison = v1::Comparison {
        model: base.name(),
        seeds: vec![7, 8],
        arms: vec![
            arm("both", vec![wanda(0.5), round(4)]),
            arm("pruned", vec![wanda(0.5)]),
            arm("rounded", vec![round(4)]),
            itself,
        ],
        ..Default::default()
    };
    comparison.set_keep(keep);
    compare::resolve(&comparison)
}

async fn submit(service: &Service, comparison: &v1::Comparison) -> Operation {
    let request = v1::CompareRequest { comparison: Some(comparison.clone()), ..Default::default() };
    service.submit(Kind::Compare, &comparison.model, &request).await
}

fn finished(operation: &Operation) -> v1::ComparisonReport {
    assert_eq!(operation.state, State::Succeeded, "{:?}", operation.error);
    v1::ComparisonReport::decode(operation.response.as_deref().unwrap()).unwrap()
}

/// The report without clocks and memory.
fn timeless(mut report: v1::ComparisonReport) -> v1::ComparisonReport {
    let noisy = |m: &v1::Measurement| {
        metrics::metric(&m.metric).unwrap().unit == "s"
            || m.metric == metrics::PEAK_MEMORY_BYTES.name
    };
    for run in report.arms.iter_mut().flat_map(|arm| &mut arm.runs) {
        run.seconds = 0.0;
        run.measurements.retain(|m| !noisy(m));
        for step in &mut run.steps {
            (step.seconds, step.peak_memory_bytes) = (0.0, 0);
        }
    }
    report.seconds = 0.0;
    report.peak_memory_bytes = 0;
    report.shared = None;
    compare::report::derive(&mut report);
    report
}

fn runs(report: &v1::ComparisonReport) -> Vec<usize> {
    report.arms.iter().map(|arm| arm.runs.len()).collect()
}

async fn wait_for(told: mpsc::Receiver<()>) {
    let wait = move || told.recv_timeout(Duration::from_secs(60));
    tokio::task::spawn_blocking(wait).await.unwrap().unwrap();
}

fn objects(folder: &std::path::Path) -> usize {
    let objects = std::fs::read_dir(folder.join("objects")).unwrap();
    objects.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap()).count()
}

#[tokio::test]
async fn arms_run_side_by_side_and_share_what_they_have_in_common() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = service.base("m").await;
    let operation = submit(&service, &comparison(&base, KeepVersions::None)).await;
    let ended = service.end(&operation).await;
    let found = finished(&ended);
    assert!(found.complete);
    assert_eq!(runs(&found), [1, 2, 2, 1, 1]);
    assert_eq!((found.base.as_str(), &found.base_digest), (base.name().as_str(), &base.digest));
    let shared = found.shared.unwrap();
    // wanda and what follows it with each seed, and one round: 5 of the 8 that all would take alone.
    assert_eq!((shared.steps_taken, shared.steps_shared), (5, 3));
    assert_eq!((shared.calibrations_made, shared.calibrations_shared), (2, 0));
    // Nothing was written: neither versions nor objects nor temporary files.
    assert!(ended.versions.is_empty());
    assert_eq!(objects(folder.path()), base.files.len());
    assert_eq!(std::fs::read_dir(folder.path().join("scratch/jobs")).unwrap().count(), 0);

    // An arm's digest is that of the version which its recipe makes alone.
    let steps = vec![wanda(0.5), round(4)];
    let recipe = v1::Recipe { seed: 8, steps, ..Default::default() };
    let alone = service.run_recipe(&base, recipe).await;
    let alone = service.end(&alone).await;
    let digests = service.digests(&alone).await;
    assert_eq!(found.arms[1].runs[1].seed, Some(8));
    assert_eq!(found.arms[1].runs[1].digest, digests[1]);
    assert_eq!(found.arms[2].runs[1].digest, digests[0]);
    let disk = |run: &v1::ArmRun| {
        run.measurements.iter().find(|m| m.metric == "disk_bytes").unwrap().value
    };
    let version = service.store.version(&alone.versions[1]).await.unwrap();
    assert_eq!(disk(&found.arms[1].runs[1]), version.total_bytes as f64);
    // Where the seed decides nothing, it does not show: any other gives the same version.
    let recipe = v1::Recipe { seed: 99, steps: vec![round(4)], ..Default::default() };
    let rounded = service.run_recipe(&base, recipe).await;
    let rounded = service.end(&rounded).await;
    assert_eq!(service.digests(&rounded).await, [found.arms[3].runs[0].digest.clone()]);
    // Counting is no reason to hide what every arm has.
    assert_eq!(found.arms[4].runs[0].digest, base.digest);
    assert!(found.arms[4].runs[0].measurements.iter().any(|m| m.metric == "multiply_accumulates"));
    // The same report is read by the operation's name.
    assert_eq!(report(&service.store, &ended).await.unwrap(), found);
}

#[tokio::test]
async fn a_killed_comparison_goes_on_after_its_last_finished_arm() {
    let folder = tempfile::tempdir().unwrap();
    for keep in [KeepVersions::None, KeepVersions::All] {
        let folder = folder.path().join(keep.as_str_name());
        let whole = Service::start(&folder.join("whole"), Models).await;
        let base = whole.base("m").await;
        let undisturbed = submit(&whole, &comparison(&base, keep)).await;
        let undisturbed = finished(&whole.end(&undisturbed).await);

        let (tell, told) = mpsc::channel();
        let cut = folder.join("cut");
        let service = Service::start(&cut, HeldAt("measuring arm pruned, seed 7", tell)).await;
        let base = service.base("m").await;
        let operation = submit(&service, &comparison(&base, keep)).await;
        wait_for(told).await;
        // What is finished can be read while the rest is at work.
        let row = service.store.operation(&operation.id).await.unwrap();
        let so_far = report(&service.store, &row).await.unwrap();
        assert!(!so_far.complete);
        assert_eq!(runs(&so_far), [1, 0, 0, 0, 1]);
        service.jobs.stop(Duration::from_secs(60)).await;
        drop(service);

        let service = Service::start(&cut, Models).await;
        let ended = service.end(&operation).await;
        assert_eq!(ended.attempt, 2);
        let found = finished(&ended);
        let (taken, again) = (found.shared.unwrap(), undisturbed.shared.unwrap());
        // The step of the arm that was being measured is taken again where it was not kept.
        let more = i32::from(keep == KeepVersions::None);
        assert_eq!(taken.steps_taken, again.steps_taken + more);
        assert_eq!(timeless(found), timeless(undisturbed));
    }
}

#[tokio::test]
async fn a_cancelled_comparison_keeps_its_finished_arms() {
    let folder = tempfile::tempdir().unwrap();
    let (tell, told) = mpsc::channel();
    let service = Service::start(folder.path(), HeldAt("arms both and pruned, seed 8", tell)).await;
    let base = service.base("m").await;
    let operation = submit(&service, &comparison(&base, KeepVersions::None)).await;
    wait_for(told).await;
    service.jobs.cancel(&operation.id).await.unwrap();
    let ended = service.end(&operation).await;
    assert_eq!(ended.state, State::Cancelled);
    let error = ended.error.clone().unwrap();
    assert_eq!(error.reason(), Reason::Cancelled);
    assert!(error.message.contains("finished stay"), "{}", error.message);
    let found = report(&service.store, &ended).await.unwrap();
    assert!(!found.complete);
    assert_eq!(runs(&found), [1, 1, 1, 1, 1]);
    assert!(found.seconds > 0.0 && found.arms[1].runs[0].seed == Some(7));
    assert_eq!(objects(folder.path()), base.files.len());
    // Forgetting the operation forgets them.
    service.store.delete_operation(&ended.id).await.unwrap();
    assert!(service.store.saved_results(&ended.id).await.unwrap().is_empty());
}

#[tokio::test]
async fn versions_stay_as_it_was_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = service.base("m").await;
    let all = submit(&service, &comparison(&base, KeepVersions::All)).await;
    let all = service.end(&all).await;
    assert_eq!(all.versions.len(), 5);
    let kept = finished(&all);
    let run = &kept.arms[1].runs[0];
    assert_eq!(service.store.version(&run.version).await.unwrap().digest, run.digest);
    assert_eq!(run.steps[1].version, run.version);
    let lineage = service.store.version(&run.version).await.unwrap().lineage().unwrap();
    assert_eq!((lineage.parent, lineage.step_index), (run.steps[0].version.clone(), 1));

    // Without a text there is no quality, so no front: nothing stays.
    let front = submit(&service, &comparison(&base, KeepVersions::Front)).await;
    let front = service.end(&front).await;
    assert!(front.versions.is_empty(), "{:?}", front.versions);
    assert!(finished(&front).arms[1].runs.iter().all(|run| run.version.is_empty()));
}

#[tokio::test]
async fn an_arm_that_fails_names_itself_and_what_ran_before_stays() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = service.base("m").await;
    let mut comparison = comparison(&base, KeepVersions::None);
    comparison.arms[2].steps = vec![wanda(1.5)];
    let operation = submit(&service, &comparison).await;
    let ended = service.end(&operation).await;
    assert_eq!(ended.state, State::Failed);
    let error = ended.error.clone().unwrap();
    assert!(error.message.contains("arm rounded"), "{}", error.message);
    assert!(error.violations[0].0.contains("steps[0].wanda.sparsity.share"), "{error:?}");
    assert_eq!(runs(&report(&service.store, &ended).await.unwrap()), [1, 1, 1, 0, 1]);
}

/// A text data set of a few lines, written the way an upload would be.
async fn dataset(service: &Service, id: &str) {
    let mut upload = service.store.objects.upload(1 << 20).await.unwrap();
    let text: String =
        (0..200).map(|i| format!("line {} of {} words\n", i * 37 % 101, i % 7)).collect();
    upload.write(text.as_bytes()).await.unwrap();
    let object = upload.finish(None, None).await.unwrap();
    let file = (crate::store::datasets::DatasetKind::Text, "text.txt");
    service.store.create_dataset(id, "", file, object, "").await.unwrap();
}

/// A tiny base that reads bytes.
async fn reader(service: &Service) -> VersionRow {
    let mut config = random::tiny("llama");
    config["vocab_size"] = 257.into();
    let mut model = random::model(config, 1).unwrap();
    model.tokenizer = Some(std::sync::Arc::new(crate::data::tokenizer::testing::bytes()));
    let scratch = tempfile::tempdir().unwrap();
    let lineage = (&v1::Lineage::default(), 0);
    service.store.write_version("m", "tiny", &model, lineage, scratch.path()).await.unwrap()
}

/// `wanda` calibrated on the data set.
fn wanda_on(share: f64, dataset: &str) -> v1::Step {
    let mut step = wanda(share);
    if let Some(v1::step::Method::Wanda(wanda)) = &mut step.method {
        wanda.calibration.get_or_insert_default().dataset = dataset.into();
    }
    step
}

#[tokio::test]
async fn twelve_arms_share_calibration_and_one_pass_of_the_base() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = reader(&service).await;
    dataset(&service, "text").await;
    let arms = (1..=12)
        .map(|i| arm(&format!("w{i}"), vec![wanda_on(f64::from(i) / 16.0, "datasets/text")]));
    let comparison = compare::resolve(&v1::Comparison {
        model: base.name(),
        arms: arms.collect(),
        evaluation: Some(v1::Evaluation {
            dataset: "datasets/text".into(),
            context: Some(32),
            max_tokens: Some(200),
            compare_with_base: true,
            ..Default::default()
        }),
        contrasts: vec![v1::Contrast {
            metric: "perplexity".into(),
            arm: "w12".into(),
            against: BASE.into(),
        }],
        ..Default::default()
    });
    let operation = submit(&service, &comparison).await;
    let found = finished(&service.end(&operation).await);
    let shared = found.shared.unwrap();
    assert_eq!((shared.steps_taken, shared.steps_shared), (12, 0));
    assert_eq!((shared.calibrations_made, shared.calibrations_shared), (1, 11));
    assert_eq!((shared.base_passes, shared.base_passes_shared), (1, 12));
    assert!(found.arms.iter().all(|arm| arm.runs.len() == 1));
    assert!(found.contrasts[0].ratio.is_some());

    // What was shared changes no number: the recipe alone measures the same.
    let recipe = v1::Recipe {
        steps: comparison.arms[5].steps.clone(),
        evaluation: comparison.evaluation.clone(),
        ..Default::default()
    };
    let alone = service.run_recipe(&base, recipe).await;
    let alone = service.end(&alone).await;
    let alone = v1::RecipeReport::decode(alone.response.as_deref().unwrap()).unwrap();
    let only = |measurements: &[v1::Measurement]| -> Vec<v1::Measurement> {
        let quality = |m: &&v1::Measurement| metrics::metric(&m.metric).unwrap().quality;
        measurements.iter().filter(quality).cloned().collect()
    };
    let arm = &found.arms[6].runs[0];
    assert_eq!(only(&arm.measurements), only(&alone.after.unwrap().measurements));
    assert_eq!(only(&arm.measurements).len(), 3);
    assert_eq!(
        arm.digest,
        service
            .digests(
                &service
                    .store
                    .operation(&operation_of(&service, &alone.versions[0]).await)
                    .await
                    .unwrap()
            )
            .await[0]
    );
    let base_only = only(&found.arms[0].runs[0].measurements);
    assert_eq!(base_only, only(&alone.before.unwrap().measurements));
}

/// The id of the operation that made a version.
async fn operation_of(service: &Service, version: &str) -> String {
    let lineage = service.store.version(version).await.unwrap().lineage().unwrap();
    lineage.operation.trim_start_matches("operations/").to_owned()
}

#[tokio::test]
async fn a_front_keeps_what_nothing_beats() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = reader(&service).await;
    dataset(&service, "text").await;
    let mut comparison = comparison(&base, KeepVersions::Front);
    comparison.evaluation = Some(v1::Evaluation {
        dataset: "datasets/text".into(),
        context: Some(32),
        max_tokens: Some(200),
        ..Default::default()
    });
    let operation = submit(&service, &comparison).await;
    let ended = service.end(&operation).await;
    let found = finished(&ended);
    let arms = &found.arms[1..4];
    let front = arms.iter().filter(|arm| arm.on_front).flat_map(|arm| &arm.runs);
    let steps: Vec<&str> =
        front.flat_map(|run| &run.steps).map(|step| step.version.as_str()).collect();
    for arm in arms {
        for run in &arm.runs {
            // What the front was made from stays with it.
            let kept = arm.on_front || steps.contains(&run.version.as_str());
            assert_eq!(kept, !run.version.is_empty(), "{}", arm.name);
            if kept {
                assert_eq!(service.store.version(&run.version).await.unwrap().digest, run.digest);
            }
        }
    }
    let made: usize = found.arms[1..4].iter().map(|arm| arm.runs.len()).sum();
    let on_front: usize =
        found.arms[1..4].iter().filter(|arm| arm.on_front).map(|arm| arm.runs.len()).sum();
    assert!(on_front > 0 && on_front < made, "the case decides something: {on_front} of {made}");
}

#[tokio::test]
async fn a_claim_is_run_judged_and_sealed() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = reader(&service).await;
    dataset(&service, "text").await;
    let evaluation = v1::Evaluation {
        dataset: "datasets/text".into(),
        context: Some(32),
        max_tokens: Some(200),
        ..Default::default()
    };
    let expectation = |relation: v1::Relation, bound: f64| v1::Expectation {
        effect: "half of the weights are smaller".into(),
        metric: "weight_bytes".into(),
        arm: "wanda".into(),
        against: BASE.into(),
        relation: relation.into(),
        bound,
        headline: true,
    };
    let given = v1::Claim {
        name: "tiny".into(),
        system: "tiny".into(),
        statement: "smaller".into(),
        model_source: "upload".into(),
        data: vec![v1::ClaimData { dataset: "datasets/text".into(), ..Default::default() }],
        comparison: Some(v1::Comparison {
            seeds: vec![0, 1],
            arms: vec![arm("wanda", vec![wanda_on(0.5, "datasets/text")])],
            evaluation: Some(evaluation),
            ..Default::default()
        }),
        expectations: vec![expectation(v1::Relation::RatioAtMost, 1.0)],
        ..Default::default()
    };
    for short in [false, true] {
        let request = v1::RunClaimRequest {
            claim: Some(given.clone()),
            model: base.name(),
            short,
            checkout: Some(v1::Checkout { commit: "abc".into(), dirty: true }),
            ..Default::default()
        };
        let operation = service.submit(Kind::Claim, &base.name(), &request).await;
        let ended = service.end(&operation).await;
        assert_eq!(ended.state, State::Succeeded, "{:?}", ended.error);
        let result = v1::ClaimResult::decode(ended.response.as_deref().unwrap()).unwrap();
        let measured = result.report.clone().unwrap();
        assert_eq!(runs(&measured), if short { [1, 1] } else { [1, 2] });
        assert_eq!(report(&service.store, &ended).await.unwrap(), measured);
        let provenance = result.provenance.clone().unwrap();
        assert!(provenance.checkout.unwrap().dirty && provenance.threads > 0);
        assert!(provenance.method_code["wanda"].starts_with("sha256:"));
        assert_eq!(measured.data_digests.len(), 1);
        let verdict =
            if short { v1::ClaimVerdict::Unspecified } else { v1::ClaimVerdict::Reproduced };
        assert_eq!(result.verdict(), verdict);
        let checked = claim::verify::verify(&given, Some(&result)).unwrap();
        let kinds: Vec<_> = checked.problems.iter().map(v1::ClaimProblem::kind).collect();
        let expected = if short { vec![v1::ClaimProblemKind::Missing] } else { Vec::new() };
        assert_eq!(kinds, expected, "{:?}", checked.problems);
        if short {
            continue;
        }
        // Code that changed and makes the same renews the result; had it made others, it would not.
        let mut stale = result;
        let code = &mut stale.provenance.as_mut().unwrap().method_code;
        code.insert("wanda".into(), "sha256:before".into());
        let mut other = stale.clone();
        other.report.as_mut().unwrap().arms[1].runs[0].digest = "sha256:other".into();
        for (mut before, same) in [(stale, true), (other, false)] {
            before.seal = claim::seal(&before).unwrap();
            let request = v1::RunClaimRequest { confirm: Some(before), ..request.clone() };
            let operation = service.submit(Kind::Claim, &base.name(), &request).await;
            let ended = service.end(&operation).await;
            if !same {
                let error = format!("{:?}", ended.error);
                assert_eq!(ended.state, State::Failed);
                assert!(error.contains("makes other numbers"), "{error}");
                continue;
            }
            assert_eq!(ended.state, State::Succeeded, "{:?}", ended.error);
            let renewed = v1::ClaimResult::decode(ended.response.as_deref().unwrap()).unwrap();
            let checked = claim::verify::verify(&given, Some(&renewed)).unwrap();
            assert!(checked.problems.is_empty(), "{:?}", checked.problems);
            assert_eq!(renewed.report.unwrap(), measured);
            assert_eq!(
                (&renewed.renewals[0].arms[..], renewed.renewals[0].seed),
                (&["wanda".to_owned()][..], 0)
            );
        }
    }
}
