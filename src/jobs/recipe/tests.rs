//! Recipes and imports on tiny random models, through the queue.

use std::sync::mpsc;
use std::time::Duration;

use prost::Message;

use crate::error::Reason;
use crate::jobs::testing::{HeldAt, Service};
use crate::jobs::work::Models;
use crate::proto::v1;
use crate::proto::v1::step::Method;
use crate::store::operations::{Kind, Operation, State};

fn step(method: Method) -> v1::Step {
    v1::Step { method: Some(method) }
}

fn prune(share: f64) -> v1::Step {
    let sparsity = v1::Sparsity { share: Some(share), ..Default::default() };
    step(Method::Magnitude(v1::Magnitude { sparsity: Some(sparsity) }))
}

/// Prunes by a text that the model samples, so that the seed matters; then rounds.
fn recipe() -> v1::Recipe {
    let calibration =
        v1::Calibration { sequences: Some(2), sequence_length: Some(8), ..Default::default() };
    let wanda = v1::Wanda { calibration: Some(calibration), ..Default::default() };
    let grid = v1::Grid { group_size: Some(16), ..Default::default() };
    let round = v1::RoundToNearest { grid: Some(grid) };
    let steps = vec![step(Method::Wanda(wanda)), step(Method::RoundToNearest(round))];
    v1::Recipe { seed: 7, steps, ..Default::default() }
}

fn report(operation: &Operation) -> v1::RecipeReport {
    assert_eq!(operation.state, State::Succeeded, "{:?}", operation.error);
    v1::RecipeReport::decode(operation.response.as_deref().unwrap()).unwrap()
}

#[tokio::test]
async fn a_recipe_writes_a_version_a_step_and_reports() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = service.base("m").await;
    let operation = service.run_recipe(&base, recipe()).await;
    let ended = service.end(&operation).await;
    let report = report(&ended);
    assert_eq!(report.base, "models/m/versions/1");
    assert_eq!(report.versions, ["models/m/versions/2", "models/m/versions/3"]);
    assert_eq!(report.versions, ended.versions);
    let methods: Vec<_> = report.steps.iter().map(|step| step.method.as_str()).collect();
    assert_eq!(methods, ["wanda", "round_to_nearest"]);
    assert_eq!(report.steps[0].calibration_tokens, 16);
    assert!((report.steps[0].zero_share - 0.5).abs() < 1e-9);
    assert_eq!(report.steps[0].bytes_before, base.weight_bytes);
    assert_eq!(report.steps[0].bytes_after, report.steps[1].bytes_before);
    assert!(report.peak_memory_bytes > 0 || !cfg!(target_os = "linux"));
    let bytes = |report: &Option<v1::EvaluationReport>| {
        let report = report.as_ref().unwrap();
        report.measurements.iter().find(|m| m.metric == "disk_bytes").unwrap().value
    };
    assert!(bytes(&report.after) < bytes(&report.before));

    let second = service.store.version("models/m/versions/2").await.unwrap();
    let lineage = second.lineage().unwrap();
    assert_eq!((lineage.parent, lineage.parent_digest), (base.name(), base.digest.clone()));
    assert_eq!((lineage.seed, lineage.step_index), (7, 0));
    assert_eq!(lineage.operation, operation.name());
    let Some(Method::Wanda(wanda)) = lineage.step.unwrap().method else { panic!("wanda") };
    assert_eq!(wanda.sparsity.unwrap().share, Some(0.5), "defaults are written out");
    let model = service.store.open_version(&second).await.unwrap();
    assert_eq!(model.bytes(), second.weight_bytes.unsigned_abs());
    assert_eq!(second.layout_bytes.values().sum::<i64>(), second.weight_bytes);

    // The same again: other names, the same bytes. Another seed: another text, other bytes.
    let again = service.run_recipe(&base, recipe()).await;
    let again = service.end(&again).await;
    assert_eq!(service.digests(&again).await, service.digests(&ended).await);
    assert_eq!(again.versions, ["models/m/versions/4", "models/m/versions/5"]);
    let other = service.run_recipe(&base, v1::Recipe { seed: 8, ..recipe() }).await;
    let other = service.end(&other).await;
    assert_ne!(service.digests(&other).await, service.digests(&ended).await);
}

#[tokio::test]
async fn an_interrupted_recipe_goes_on_after_its_last_finished_step() {
    let folder = tempfile::tempdir().unwrap();
    let whole = Service::start(&folder.path().join("whole"), Models).await;
    let base = whole.base("m").await;
    let undisturbed = whole.run_recipe(&base, recipe()).await;
    let undisturbed = whole.end(&undisturbed).await;

    let (tell, told) = mpsc::channel();
    let cut = folder.path().join("cut");
    let service = Service::start(&cut, HeldAt("step 2", tell)).await;
    assert_eq!(service.base("m").await.digest, base.digest);
    let operation = service.run_recipe(&base, recipe()).await;
    tokio::task::spawn_blocking(move || told.recv_timeout(Duration::from_secs(60)))
        .await
        .unwrap()
        .unwrap();
    service.jobs.stop(Duration::from_secs(60)).await;
    let stopped = service.store.operation(&operation.id).await.unwrap();
    assert_eq!((stopped.state, stopped.versions.len()), (State::Queued, 1));
    let first = service.store.version(&stopped.versions[0]).await.unwrap();
    drop(service);

    let service = Service::start(&cut, Models).await;
    let ended = service.end(&operation).await;
    assert_eq!(ended.attempt, 2);
    assert_eq!(service.store.version(&ended.versions[0]).await.unwrap(), first);
    assert_eq!(service.digests(&ended).await, whole.digests(&undisturbed).await);
    let timeless = |report: v1::RecipeReport| {
        let measured = |report: Option<v1::EvaluationReport>| {
            report.map(|report| v1::EvaluationReport { seconds: 0.0, ..report })
        };
        let steps = report.steps.into_iter();
        v1::RecipeReport {
            before: measured(report.before),
            after: measured(report.after),
            steps: steps
                .map(|step| v1::StepReport { seconds: 0.0, peak_memory_bytes: 0, ..step })
                .collect(),
            seconds: 0.0,
            peak_memory_bytes: 0,
            ..report
        }
    };
    assert_eq!(timeless(report(&ended)), timeless(report(&undisturbed)));
}

#[tokio::test]
async fn a_step_that_is_cancelled_or_fails_leaves_nothing_of_itself() {
    let folder = tempfile::tempdir().unwrap();
    let (tell, told) = mpsc::channel();
    let service = Service::start(folder.path(), HeldAt("step 2 of 2: round", tell)).await;
    let base = service.base("m").await;
    let operation = service.run_recipe(&base, recipe()).await;
    tokio::task::spawn_blocking(move || told.recv_timeout(Duration::from_secs(60)))
        .await
        .unwrap()
        .unwrap();
    service.jobs.cancel(&operation.id).await.unwrap();
    let ended = service.end(&operation).await;
    assert_eq!((ended.state, ended.versions.len()), (State::Cancelled, 1));
    let error = ended.error.unwrap();
    assert_eq!(error.reason(), Reason::Cancelled);
    assert!(error.message.contains("models/m/versions/2"), "{}", error.message);

    let bad = v1::Recipe { steps: vec![prune(0.3), prune(1.5)], ..Default::default() };
    let failed = service.run_recipe(&base, bad).await;
    let failed = service.end(&failed).await;
    let error = failed.error.unwrap();
    assert_eq!((failed.state, error.reason()), (State::Failed, Reason::InvalidOption));
    let field = &error.violations[0].0;
    assert!(field.starts_with("recipe.steps[1].magnitude."), "{field}");
    assert_eq!(failed.versions, ["models/m/versions/3"]);

    // With the finished versions gone too, only the base's objects are left.
    for version in [3, 2] {
        let name = format!("models/m/versions/{version}");
        service.store.delete_version(&name).await.unwrap();
    }
    let objects = std::fs::read_dir(folder.path().join("objects")).unwrap();
    let files = objects.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap());
    assert_eq!(files.count(), base.files.len());
    assert_eq!(std::fs::read_dir(folder.path().join("scratch/jobs")).unwrap().count(), 0);
}

#[tokio::test]
async fn uploaded_files_are_imported() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = service.base("m").await;
    let files: Vec<_> = base
        .files
        .iter()
        .map(|(name, object)| v1::ModelFile {
            file_name: name.clone(),
            digest: object.digest.clone(),
            ..Default::default()
        })
        .collect();
    let import = async |files: Vec<v1::ModelFile>| {
        let uploaded = v1::import_model_request::Source::Uploaded(v1::UploadedFiles { files });
        let request = v1::ImportModelRequest {
            model_id: "copy".into(),
            display_name: "a copy".into(),
            source: Some(uploaded),
            ..Default::default()
        };
        let operation = service.submit(Kind::Import, "models/copy", &request).await;
        service.end(&operation).await
    };
    let ended = import(files.clone()).await;
    assert_eq!(ended.state, State::Succeeded, "{:?}", ended.error);
    let version = v1::ModelVersion::decode(ended.response.as_deref().unwrap()).unwrap();
    assert_eq!(version.name, "models/copy/versions/1");
    assert_eq!(version.parameter_count, base.parameters);
    assert_eq!(version.lineage.unwrap().source, "upload");
    assert_eq!(service.store.model("copy").await.unwrap().display_name, "a copy");

    let mut hostile = files.clone();
    hostile[0].file_name = "../../escape".into();
    let failed = import(hostile).await.error.unwrap();
    assert_eq!(failed.violations[0].0, "uploaded.files[0].file_name");
    let twice = import(vec![files[0].clone(), files[0].clone()]).await.error.unwrap();
    assert_eq!(twice.violations[0].0, "uploaded.files[1].file_name");
    assert!(import(Vec::new()).await.error.is_some());
}

#[tokio::test]
async fn a_version_is_evaluated() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start(folder.path(), Models).await;
    let base = service.base("m").await;
    let request = v1::EvaluateRequest { model: base.name(), ..Default::default() };
    let operation = service.submit(Kind::Evaluate, &base.name(), &request).await;
    let ended = service.end(&operation).await;
    let report = v1::EvaluationReport::decode(ended.response.as_deref().unwrap()).unwrap();
    assert_eq!((report.version, report.digest), (base.name(), base.digest));
    let disk = report.measurements.iter().find(|m| m.metric == "disk_bytes").unwrap();
    assert_eq!(disk.value, base.total_bytes as f64);

    let missing = v1::EvaluateRequest { model: "models/x/versions/1".into(), ..Default::default() };
    let operation = service.submit(Kind::Evaluate, "models/x", &missing).await;
    let error = service.end(&operation).await.error.unwrap();
    assert_eq!(error.reason(), Reason::ResourceNotFound);
}
