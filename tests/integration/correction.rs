//! Quantised models with a trained correction, over the network: made by a recipe, tuned, served with a second
//! adapter; and cancelled in the middle of their training.

use futures::StreamExt as _;
use planish::proto::google::longrunning as lro;
use planish::proto::v1;
use serde_json::{Value, json};
use tonic::Code;

use crate::harness::{Service, assert_error, metadata, response};
use crate::support;

/// A recipe with one step.
fn recipe(model: &str, step: Value) -> v1::RunRecipeRequest {
    let recipe = json!({ "seed": 3, "steps": [step] });
    v1::RunRecipeRequest {
        model: model.into(),
        recipe: Some(serde_json::from_value(recipe).unwrap()),
        ..Default::default()
    }
}

fn lrec(change: impl Fn(&mut Value)) -> Value {
    let windows = |sequences: u32| json!({ "dataset": "datasets/prose", "sequences": sequences, "sequence_length": 32 });
    let mut options = json!({
        "grid": { "bits": 2, "group_size": 32 }, "calibration": windows(8), "text": windows(48),
        "rank": 4, "learning_rate": 0.01, "epochs": 4.0, "validate_every": 10,
    });
    change(&mut options);
    json!({ "lrec": options })
}

async fn world() -> (Service, tempfile::TempDir) {
    let files = tempfile::tempdir().unwrap();
    let allowed = files.path().to_owned();
    let service = Service::start_with(|c| c.import.allow_paths = vec![allowed]).await;
    let folder = support::tiny_model(files.path(), 2, 32);
    service.import("tiny", &folder).await;
    let prose = "The sea is wide and the night is long; a ship goes by without a song. ".repeat(60);
    service.dataset("prose", &prose).await.unwrap();
    (service, files)
}

async fn ids(service: &Service, model: &str, adapter: Option<&str>) -> Vec<u32> {
    let uses = adapter.map(|name| v1::AdapterUse { name: name.to_owned(), weight: None });
    let request = v1::GenerateRequest {
        model: model.into(),
        prompt: Some(v1::generate_request::Prompt::Text("The sea is".into())),
        max_tokens: 12,
        sampling: Some(v1::SamplingOptions { temperature: Some(0.0), ..Default::default() }),
        ignore_eos: true,
        adapters: uses.into_iter().collect(),
        ..Default::default()
    };
    let stream = service.generation().generate(request).await.unwrap().into_inner();
    let parts: Vec<_> = stream.map(Result::unwrap).collect().await;
    parts.iter().flat_map(|p| p.tokens.iter().map(|t| t.id)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrected_model_is_made_tuned_and_served_with_a_second_adapter() {
    let (service, _files) = world().await;
    let run = |request| async {
        let operation = service.jobs().run_recipe(request).await.unwrap().into_inner();
        response::<v1::RecipeReport>(service.finished(&operation.name).await)
    };
    let made = run(recipe("models/tiny/versions/1", lrec(|_| ()))).await;
    let version = &made.versions[0];
    let get = v1::GetModelVersionRequest { name: version.clone() };
    let row = service.models().get_model_version(get).await.unwrap().into_inner();
    let record = row.lineage.unwrap().record.unwrap();
    let number = |path: [&str; 3]| -> f64 {
        let value = serde_json::to_value(&record).unwrap();
        value[path[0]][path[1]][path[2]].as_f64().unwrap_or_else(|| panic!("{path:?} in {value}"))
    };
    let [before, after] = ["quantised", "corrected"].map(|of| number(["validation", of, "kl"]));
    assert!(after < before, "{after} of {before}");
    // The same again gives the same bytes.
    let again = run(recipe("models/tiny/versions/1", lrec(|_| ()))).await;
    let get = v1::GetModelVersionRequest { name: again.versions[0].clone() };
    let second = service.models().get_model_version(get).await.unwrap().into_inner();
    assert_eq!(second.digest, row.digest);

    // A second adapter is trained over base and correction, and served beside them.
    let adapt = v1::AdaptRequest {
        model: version.clone(),
        adapter_id: "second".into(),
        adaptation: Some(
            serde_json::from_value(json!({ "qlora": { "adapter": { "r": 4 } } })).unwrap(),
        ),
        training: Some(
            serde_json::from_value(json!({
                "dataset": "datasets/prose", "steps": 40, "batch_size": 4, "max_length": 32,
                "learning_rate": 0.02,
            }))
            .unwrap(),
        ),
        ..Default::default()
    };
    let operation = service.jobs().adapt(adapt).await.unwrap().into_inner();
    let report: v1::AdaptReport = response(service.finished(&operation.name).await);
    let points = report.training.unwrap().points;
    assert!(points[39].loss < points[0].loss, "{points:?}");
    let bare = ids(&service, version, None).await;
    let tuned = ids(&service, version, Some("adapters/second")).await;
    assert_eq!((bare.len(), tuned.len()), (12, 12));
    assert_ne!(bare, tuned);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_correction_that_is_cancelled_leaves_no_version() {
    let (service, _files) = world().await;
    let bad = recipe("models/tiny", lrec(|o| o["rank"] = json!(99)));
    let refused = service.jobs().run_recipe(bad).await;
    assert_error(refused, Code::InvalidArgument, "INVALID_OPTION", "recipe.steps[0].lrec.rank");
    let long = recipe("models/tiny", lrec(|o| o["epochs"] = json!(9000.0)));
    let name = service.jobs().run_recipe(long).await.unwrap().into_inner().name;
    let watch = v1::WatchOperationRequest { name: name.clone(), after_sequence: 0 };
    let mut looks = service.jobs().watch_operation(watch).await.unwrap().into_inner();
    while let Some(look) = looks.message().await.unwrap() {
        let metrics = look.event.map(|event| event.metrics).unwrap_or_default();
        if metrics.get("step").is_some_and(|step| *step > 2.0) {
            break;
        }
    }
    let cancel = lro::CancelOperationRequest { name: name.clone() };
    service.operations().cancel_operation(cancel).await.unwrap();
    let ended = service.finished(&name).await;
    assert_eq!(metadata(&ended).state(), v1::OperationState::Cancelled);
    let get = v1::GetModelVersionRequest { name: "models/tiny/versions/2".into() };
    let missing = service.models().get_model_version(get).await;
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", "");
}
