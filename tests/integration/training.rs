//! Nets that are made, trained, pruned and measured over the wire: images from a tiny IDX file, a text.

use std::time::{Duration, Instant};

use planish::proto::google::longrunning as lro;
use planish::proto::v1;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::harness::{Service, assert_error, import_dataset, metadata, response};

/// Eight by eight images of a bar in one of three places, and their labels, as `cat` joins the files.
fn idx(count: u32) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, 3];
    for side in [count, 8, 8] {
        bytes.extend(side.to_be_bytes());
    }
    for image in 0..count {
        for pixel in 0..64u32 {
            let bar = pixel % 8 / 2 == image % 3;
            bytes.push(if bar { 220 } else { (image * 5 + pixel * 3) as u8 % 60 });
        }
    }
    bytes.extend([0, 0, 8, 1]);
    bytes.extend(count.to_be_bytes());
    bytes.extend((0..count).map(|image| (image % 3) as u8));
    bytes
}

async fn images(
    service: &Service,
    id: &str,
    name: &str,
    bytes: &[u8],
) -> Result<v1::Dataset, Status> {
    let header = v1::DatasetHeader {
        dataset_id: id.into(),
        file_name: name.into(),
        size_bytes: bytes.len() as i64,
        kind: v1::DatasetKind::Images.into(),
        ..Default::default()
    };
    import_dataset(service.datasets(), header, &[bytes]).await
}

fn create(id: &str, config: Value) -> v1::CreateModelRequest {
    v1::CreateModelRequest {
        model_id: id.into(),
        config: Some(serde_json::from_value(config).unwrap()),
        seed: 3,
        ..Default::default()
    }
}

async fn made(service: &Service, request: v1::CreateModelRequest) -> v1::ModelVersion {
    let operation = service.models().create_model(request).await.unwrap().into_inner();
    response(service.finished(&operation.name).await)
}

fn net() -> Value {
    json!({ "model_type": "conv_net", "image_size": 8, "num_labels": 3, "channels": [8, 16] })
}

async fn run(service: &Service, model: &str, recipe: Value) -> Result<lro::Operation, Status> {
    let request = v1::RunRecipeRequest {
        model: model.into(),
        recipe: Some(serde_json::from_value(recipe).unwrap()),
        ..Default::default()
    };
    let operation = service.jobs().run_recipe(request).await?.into_inner();
    Ok(service.finished(&operation.name).await)
}

fn value(report: &v1::EvaluationReport, metric: &str) -> f64 {
    let found = report.measurements.iter().find(|m| m.metric == metric);
    found.unwrap_or_else(|| panic!("no {metric} in {report:?}")).value
}

#[tokio::test(flavor = "multi_thread")]
async fn a_net_is_made_pruned_while_it_learns_and_measured() {
    let service = Service::start().await;
    let data = images(&service, "bars", "train.idx", &idx(60)).await.unwrap();
    assert_eq!((data.record_count, data.label_count), (60, 3));
    images(&service, "more", "test-ubyte", &idx(30)).await.unwrap();

    let version = made(&service, create("net", net())).await;
    assert_eq!((version.family.as_str(), version.architecture.as_str()), ("vision", "conv_net"));
    // The same seed gives the same weights, another one others.
    let again = made(&service, create("again", net())).await;
    let other = made(&service, v1::CreateModelRequest { seed: 4, ..create("other", net()) }).await;
    let weights = |version: &v1::ModelVersion| {
        version.files.iter().find(|f| f.file_name.ends_with("tensors")).unwrap().digest.clone()
    };
    assert_eq!(weights(&version), weights(&again));
    assert_ne!(weights(&version), weights(&other));

    let training = json!({
        "dataset": "datasets/bars", "steps": 120, "batch_size": 16, "learning_rate": 0.01,
        "validation": { "dataset": "datasets/more", "every_steps": 60 },
    });
    let recipe = json!({
        "seed": 1,
        "steps": [
            { "initialise": { "overrides": { "channels": [8, 24] } } },
            { "gradual": { "training": training, "final_sparsity": 0.75, "frequency": 10 } },
        ],
        "evaluation": { "images": { "dataset": "datasets/more" } },
    });
    let report: v1::RecipeReport = response(run(&service, "models/net", recipe).await.unwrap());
    let (before, after) = (report.before.unwrap(), report.after.unwrap());
    assert!(value(&before, "task_accuracy") < 0.9, "an untrained net guesses");
    assert!(value(&after, "task_accuracy") > 0.9, "{after:?}");
    assert!(value(&after, "task_loss") < value(&before, "task_loss"));
    let pruning = report.steps[1].pruning.clone().unwrap();
    // 72 and 24 * 72 weights, a quarter of each kept.
    assert_eq!((pruning.elements, pruning.kept), (72 + 1728, 18 + 432));
    assert_eq!(value(&after, "nonzero_parameters") as i64, pruning.nonzero_parameters);
    assert_eq!(value(&after, "bitmap_bytes") as i64, pruning.bitmap_bytes);
    assert!(value(&after, "bitmap_bytes") < value(&after, "parameters") * 4.0);
    assert_eq!(pruning.updates.last().unwrap().step, 90);
    assert_eq!(pruning.updates.last().unwrap().sparsity, 0.75);
    let learnt = report.steps[1].training.clone().unwrap();
    assert_eq!((learnt.steps, learnt.kept_step, learnt.validations.len()), (120, 120, 3));
    // The version holds sparse weights and is measured as the recipe's end was.
    let name = report.versions[1].clone();
    let request = v1::GetModelVersionRequest { name: name.clone() };
    let stored = service.models().get_model_version(request).await.unwrap().into_inner();
    assert!(stored.layout_bytes.keys().any(|layout| layout.contains("sparse")), "{stored:?}");
    assert_eq!(stored.lineage.unwrap().parent, report.versions[0]);
    let request = v1::EvaluateRequest {
        model: name,
        evaluation: Some(
            serde_json::from_value(
                json!({ "images": { "dataset": "datasets/more", "max_items": 30 } }),
            )
            .unwrap(),
        ),
        ..Default::default()
    };
    let operation = service.jobs().evaluate(request).await.unwrap().into_inner();
    let measured: v1::EvaluationReport = response(service.finished(&operation.name).await);
    assert_eq!(value(&measured, "task_loss"), value(&after, "task_loss"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_net_loses_groups_and_is_tuned_with_the_rest() {
    let service = Service::start().await;
    images(&service, "bars", "train.idx", &idx(60)).await.unwrap();
    made(&service, create("net", net())).await;
    let training = |rate: f64| {
        json!({
            "dataset": "datasets/bars", "steps": 80, "batch_size": 16, "learning_rate": rate,
        })
    };
    let recipe = json!({
        "steps": [
            { "train": { "training": training(0.01) } },
            { "group_sparse": { "sparsity": 0.5, "group": 4, "training": training(0.001) } },
        ],
        "evaluation": { "images": { "dataset": "datasets/bars" }, "speed": true },
    });
    let report: v1::RecipeReport = response(run(&service, "models/net", recipe).await.unwrap());
    let after = report.after.unwrap();
    assert!(value(&after, "task_accuracy") > 0.9, "{after:?}");
    assert!(value(&after, "images_per_second") > 0.0);
    let step = &report.steps[1];
    let kept = step.measures["kept_weight_share"];
    assert!(kept > 0.5 && kept < 1.0, "{kept}");
    assert_eq!(step.training.clone().unwrap().steps, 80);
    // The second convolution: 4 groups of 8 channels, half of them with nine taps of four outputs.
    let kept: i64 = 16 * 9;
    let request = v1::GetModelVersionRequest { name: report.versions[1].clone() };
    let stored = service.models().get_model_version(request).await.unwrap().into_inner();
    let bytes = stored.layout_bytes.iter().find(|(layout, _)| layout.contains("group")).unwrap();
    assert_eq!(*bytes.1, kept * (4 * 4 + 2) + 4 * 5);
    // What it left has another pattern to be trained in than `train` knows.
    let recipe = json!({ "steps": [{ "train": { "training": training(0.01) } }] });
    let error = run(&service, &report.versions[1], recipe).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    let recipe = json!({ "steps": [{ "group_sparse": { "group": 5 } }] });
    let result = run(&service, "models/net", recipe).await;
    let field = "recipe.steps[0].group_sparse.group";
    assert_error(result, Code::InvalidArgument, "INVALID_OPTION", field);
}

#[tokio::test(flavor = "multi_thread")]
async fn arms_of_different_widths_are_compared_from_one_base() {
    let service = Service::start().await;
    images(&service, "bars", "train.idx", &idx(60)).await.unwrap();
    made(&service, create("net", net())).await;
    let training = json!({ "dataset": "datasets/bars", "steps": 20, "batch_size": 8 });
    let arm = |name: &str, width: f64, step: Value| json!({ "name": name, "steps": [{ "initialise": { "width": width } }, step] });
    let comparison = json!({
        "model": "models/net",
        "seeds": [0, 1],
        "evaluation": { "images": { "dataset": "datasets/bars" } },
        "arms": [
            arm("dense", 1.0, json!({ "train": { "training": training } })),
            arm("sparse", 1.0, json!({ "gradual": {
                "training": training, "final_sparsity": 0.5, "frequency": 5 } })),
            arm("small", 0.5, json!({ "train": { "training": training } })),
        ],
        "contrasts": [{ "metric": "task_accuracy", "arm": "sparse", "against": "small" }],
    });
    let request = v1::CompareRequest {
        comparison: Some(serde_json::from_value(comparison).unwrap()),
        ..Default::default()
    };
    let operation = service.jobs().compare(request).await.unwrap().into_inner();
    let report: v1::ComparisonReport = response(service.finished(&operation.name).await);
    assert!(report.complete);
    let runs = |name: &str| report.arms.iter().find(|arm| arm.name == name).unwrap().runs.clone();
    let metric = |run: &v1::ArmRun, name: &str| {
        run.measurements.iter().find(|m| m.metric == name).unwrap().value
    };
    let [dense, sparse, small] = ["dense", "sparse", "small"].map(runs);
    assert_eq!((dense.len(), sparse.len(), small.len()), (2, 2, 2));
    assert!(metric(&sparse[0], "nonzero_parameters") < metric(&dense[0], "nonzero_parameters"));
    assert!(metric(&small[0], "parameters") < metric(&sparse[0], "parameters"));
    assert_ne!(sparse[0].digest, sparse[1].digest, "another seed, other weights");
    // The same new weights began two arms of each seed.
    assert!(report.shared.unwrap().steps_shared >= 2);
    assert_eq!(report.contrasts.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_language_model_of_lstm_layers_reads_what_its_tokenizer_was_made_from() {
    let service = Service::start().await;
    let text = "the cat sat on the mat. the dog sat on the log.\n".repeat(60);
    service.dataset("prose", &text).await.unwrap();
    let config = json!({ "model_type": "lstm", "hidden_size": 24 });
    let tokenizer = v1::NewTokenizer { dataset: "datasets/prose".into(), vocab_size: 280 };
    let request =
        v1::CreateModelRequest { tokenizer: Some(tokenizer), ..create("lm", config.clone()) };
    let version = made(&service, request).await;
    assert_eq!(version.family, "lstm");
    let training = json!({ "dataset": "datasets/prose", "steps": 60, "max_length": 24, "learning_rate": 0.02 });
    let recipe = json!({
        "steps": [{ "gradual": { "training": training, "final_sparsity": 0.5, "frequency": 5 } }],
        "evaluation": { "dataset": "datasets/prose", "context": 32, "max_tokens": 512 },
    });
    let report: v1::RecipeReport = response(run(&service, "models/lm", recipe).await.unwrap());
    let (before, after) = (report.before.unwrap(), report.after.unwrap());
    assert!(value(&before, "perplexity") > 100.0);
    assert!(value(&after, "perplexity") < 0.3 * value(&before, "perplexity"), "{after:?}");
    // One token a byte where no text is named.
    let bytes = made(&service, create("bytes", config)).await;
    let vocab = |version: v1::ModelVersion| {
        let config = serde_json::to_value(version.config.unwrap()).unwrap();
        config["vocab_size"].as_f64().unwrap()
    };
    assert_eq!(vocab(bytes), 256.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_towers_learn_images_by_captions_and_are_pruned() {
    let service = Service::start().await;
    let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let layout = v1::DatasetLayout {
        labels: words(&["left", "middle", "right"]),
        templates: words(&["a bar on the {}", "{}"]),
        ..Default::default()
    };
    let named = |id: &str, layout: v1::DatasetLayout, bytes: &[u8]| {
        let header = v1::DatasetHeader {
            dataset_id: id.into(),
            file_name: "bars.idx".into(),
            size_bytes: bytes.len() as i64,
            kind: v1::DatasetKind::Images.into(),
            layout: Some(layout),
            ..Default::default()
        };
        let bytes = bytes.to_vec();
        let datasets = service.datasets();
        async move { import_dataset(datasets, header, &[&bytes]).await }
    };
    let data = named("bars", layout.clone(), &idx(60)).await.unwrap();
    assert_eq!(data.layout.unwrap().templates, layout.templates);
    named("more", layout.clone(), &idx(30)).await.unwrap();
    let bad = v1::DatasetLayout { templates: words(&["a bar"]), ..layout };
    let field = "header.layout.templates[0]";
    let found = named("bad", bad, &idx(30)).await;
    assert_error(found, Code::InvalidArgument, "INVALID_FIELD", field);

    let config = json!({
        "model_type": "two_tower", "image_size": 8, "patch_size": 4, "embedding_size": 16,
        "image_hidden_size": 32, "image_layers": 2, "text_hidden_size": 24, "text_layers": 2,
        "max_position_embeddings": 24,
    });
    let version = made(&service, create("towers", config)).await;
    assert_eq!(version.family, "two_tower");
    let training = json!({
        "dataset": "datasets/bars", "steps": 120, "batch_size": 16, "learning_rate": 0.003,
        "validation": { "dataset": "datasets/more", "every_steps": 60 },
    });
    let ecoflap = json!({
        "share": 0.3, "max_share": 0.5, "n_data": 16, "batch": 8, "per_tower": true,
        "calibration": { "dataset": "datasets/bars", "sequences": 32 },
    });
    let recipe = json!({
        "seed": 1,
        "steps": [
            { "initialise": {} },
            { "train": { "training": training } },
            { "ecoflap": ecoflap },
        ],
        "evaluation": { "images": { "dataset": "datasets/more" } },
    });
    let report: v1::RecipeReport = response(run(&service, "models/towers", recipe).await.unwrap());
    let (before, after) = (report.before.unwrap(), report.after.unwrap());
    assert!(value(&before, "zero_shot_accuracy") < 0.9, "untrained towers guess");
    for metric in ["zero_shot_accuracy", "image_to_text_recall", "text_to_image_recall"] {
        assert!(value(&after, metric) > 0.8, "{after:?}");
    }
    assert_eq!(report.steps[1].training.clone().unwrap().validations.len(), 3);
    assert!((report.steps[2].zero_share - 0.3).abs() < 0.01);
    let request = v1::GetModelVersionRequest { name: report.versions[2].clone() };
    let stored = service.models().get_model_version(request).await.unwrap().into_inner();
    assert!(stored.layout_bytes.keys().any(|layout| layout.contains("sparse")), "{stored:?}");
    // What it does not do is said.
    let refused = |steps: Value| run(&service, "models/towers", json!({ "steps": [steps] }));
    let found = refused(json!({ "ecoflap": {} })).await;
    let field = "recipe.steps[0].ecoflap.calibration.dataset";
    assert_error(found, Code::InvalidArgument, "INVALID_OPTION", field);
    let found = refused(json!({ "wanda": {} })).await;
    assert_error(found, Code::FailedPrecondition, "MODEL_UNSUITABLE", "");
    let request = v1::LoadModelRequest { name: "models/towers".into() };
    let error = service.models().load_model(request).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_name_their_fields() {
    let service = Service::start().await;
    images(&service, "bars", "train.idx", &idx(30)).await.unwrap();
    service.dataset("prose", "some text to read").await.unwrap();
    made(&service, create("net", net())).await;
    let service = &service;

    let bad = images(service, "bad", "bad.idx", &idx(30)[..500]).await;
    assert_error(bad, Code::InvalidArgument, "MALFORMED_FILE", "");
    let creation = |request| async move { service.models().create_model(request).await };
    let taken = creation(create("net", net())).await;
    assert_error(taken, Code::AlreadyExists, "RESOURCE_EXISTS", "");
    let llama = creation(create("x", json!({ "model_type": "llama" }))).await;
    assert_error(llama, Code::InvalidArgument, "INVALID_FIELD", "config");
    let text = v1::NewTokenizer { dataset: "datasets/prose".into(), vocab_size: 0 };
    let reads = v1::CreateModelRequest { tokenizer: Some(text), ..create("x", net()) };
    assert_error(creation(reads).await, Code::InvalidArgument, "INVALID_FIELD", "tokenizer");

    let refuse = |steps: Value| async move {
        run(service, "models/net", json!({ "steps": [steps] })).await.map(|_| ())
    };
    let training = |dataset: &str| json!({ "dataset": dataset, "steps": 10 });
    let found = refuse(json!({ "gradual": {
        "training": training("datasets/bars"), "end_step": 11 } }));
    let field = "recipe.steps[0].gradual.end_step";
    assert_error(found.await, Code::InvalidArgument, "INVALID_OPTION", field);
    let found = refuse(json!({ "train": { "training": training("datasets/none") } })).await;
    assert_error(found, Code::NotFound, "RESOURCE_NOT_FOUND", "steps[0].train.training.dataset");
    let found = refuse(json!({ "wanda": {} })).await;
    assert_error(found, Code::FailedPrecondition, "MODEL_UNSUITABLE", "");
    // A text is no data set of images: the job says so, with the field.
    let operation = run(
        service,
        "models/net",
        json!({ "steps": [{ "train": { "training": training("datasets/prose") } }] }),
    );
    let operation = operation.await.unwrap();
    let Some(lro::operation::Result::Error(status)) = operation.result else { panic!("no error") };
    assert!(status.message.contains("holds text"), "{status:?}");
    // What neither generates nor embeds says so.
    let request = v1::LoadModelRequest { name: "models/net".into() };
    let error = service.models().load_model(request).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn training_can_be_cancelled() {
    let service = Service::start().await;
    images(&service, "bars", "train.idx", &idx(60)).await.unwrap();
    made(&service, create("net", net())).await;
    let training = json!({ "dataset": "datasets/bars", "steps": 1_000_000 });
    let request = v1::RunRecipeRequest {
        model: "models/net".into(),
        recipe: Some(
            serde_json::from_value(json!({ "steps": [{ "train": { "training": training } }] }))
                .unwrap(),
        ),
        ..Default::default()
    };
    let operation = service.jobs().run_recipe(request).await.unwrap().into_inner();
    let patience = Instant::now();
    loop {
        let request = lro::GetOperationRequest { name: operation.name.clone() };
        let now = service.operations().get_operation(request).await.unwrap().into_inner();
        if metadata(&now).metrics.get("step").is_some_and(|step| *step > 0.0) {
            break;
        }
        assert!(patience.elapsed() < Duration::from_secs(30), "{now:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let request = lro::CancelOperationRequest { name: operation.name.clone() };
    service.operations().cancel_operation(request).await.unwrap();
    let ended = service.finished(&operation.name).await;
    let Some(lro::operation::Result::Error(status)) = ended.result else { panic!("no error") };
    assert_eq!(status.code, Code::Cancelled as i32);
}
