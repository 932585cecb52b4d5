//! What may be learnt besides, and how: preferences, hidden tokens, several classes, pairs of texts, factored
//! attention, 4-bit normal floats; and sizes of queries and keys, by the API.

use planish::proto::google::longrunning as lro;
use planish::proto::v1;
use planish::proto::v1::prediction::Kind;
use planish::proto::v1::prediction_service_client::PredictionServiceClient;
use serde_json::{Value, json};
use tonic::Code;

use crate::adaptation::{World, lora, request};
use crate::embedding;
use crate::harness::{assert_error, response};

fn plan(operation: lro::Operation) -> v1::AdaptPlan {
    let Some(lro::operation::Result::Response(any)) = operation.result else { panic!("no plan") };
    prost::Message::decode(any.value).unwrap()
}

async fn norms(world: &World, bounds: Value) -> v1::NormReport {
    let request = v1::EvaluateRequest {
        model: "models/tiny".into(),
        evaluation: Some(serde_json::from_value(json!({ "norm_bounds": bounds })).unwrap()),
        ..Default::default()
    };
    let operation = world.service.jobs().evaluate(request).await.unwrap().into_inner();
    let report: v1::EvaluationReport = response(world.service.finished(&operation.name).await);
    report.norms.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_are_measured_with_an_adapter_and_watched_in_training() {
    let world = World::start().await;
    let training = json!({
        "dataset": "datasets/prose", "steps": 6, "batch_size": 2, "max_length": 128,
        "learning_rate": 0.05, "warmup_share": 0.0,
        "attention": { "factored": { "eps": 0.2, "max_features": 2000 }, "watch_every": 1 },
    });
    let factored = world.made(request("fast", lora(), training.clone())).await.training.unwrap();
    let metrics = &factored.points.last().unwrap().metrics;
    for name in ["attention_gamma", "attention_margin", "attention_factored_share"] {
        assert!(metrics.contains_key(name), "{metrics:?}");
    }
    let first = &factored.points[0];
    assert!(first.metrics["attention_factored_share"] > 0.0, "{:?}", first.metrics);
    let mut exact = training.clone();
    exact["attention"] = json!({ "exact": {} });
    let exact = world.made(request("exact", lora(), exact)).await.training.unwrap();
    // The same loss up to what was allowed, and not the same to the bit.
    let (near, far) = (first.loss, exact.points[0].loss);
    assert!((near - far).abs() < 0.05 * far && near != far, "{near} {far}");
    assert!(exact.points[0].metrics.is_empty());

    let bounds = json!({ "dataset": "datasets/prose", "sequences": 2, "tokens": 64 });
    let plain = norms(&world, bounds.clone()).await;
    assert_eq!((plain.sequences, plain.tokens, plain.heads.len()), (2, 64, 8));
    assert!((plain.threshold - 64.0_f64.ln().sqrt()).abs() < 1e-9 && !plain.hint.is_empty());
    assert!(plain.base_heads.is_empty());
    let mut with = bounds.clone();
    with["adapter"] = json!("adapters/exact");
    let with = norms(&world, with).await;
    assert_eq!(with.base_heads, plain.heads);
    assert!(with.heads.iter().all(|head| head.adapter_query > 0.0 && head.adapter_key > 0.0));
    assert_ne!(with.heads, plain.heads);

    let ask = async |bounds: Value| {
        let evaluation = serde_json::from_value(json!({ "norm_bounds": bounds })).unwrap();
        let request = v1::EvaluateRequest {
            model: "models/tiny".into(),
            evaluation: Some(evaluation),
            ..Default::default()
        };
        world.service.jobs().evaluate(request).await
    };
    let field = "evaluation.norm_bounds";
    let none = json!({ "dataset": "datasets/prose", "sequences": 0 });
    let invalid = Code::InvalidArgument;
    assert_error(ask(none).await, invalid, "INVALID_FIELD", &format!("{field}.sequences"));
    let mut absent = bounds.clone();
    absent["adapter"] = json!("adapters/none");
    let missing = ask(absent).await;
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", &format!("{field}.adapter"));
    let absent = json!({ "dataset": "datasets/none" });
    let missing = ask(absent).await;
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", &format!("{field}.dataset"));
    // What no head could get is refused before anything is read.
    let short =
        json!({ "dataset": "datasets/prose", "attention": { "factored": {} }, "max_length": 8 });
    let refused = world.adapt(request("short", lora(), short)).await;
    assert_error(refused, invalid, "INVALID_OPTION", "training.attention.factored");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decoder_learns_what_is_preferred() {
    let world = World::start().await;
    let pair = |i: usize| {
        json!({
            "prompt": format!("colour {i}?"), "chosen": "red red", "rejected": "blue blue blue",
        })
    };
    let pairs: String = (0..16).map(|i| format!("{}\n", pair(i))).collect();
    world.data("pairs", "pairs.jsonl", v1::DatasetKind::Preferences, &pairs).await.unwrap();
    let training = json!({
        "dataset": "datasets/pairs", "steps": 30, "batch_size": 4, "learning_rate": 5e-3,
        "beta": 0.3, "validation": { "share": 0.25, "every_steps": 15 },
    });
    let report = world.made(request("taste", lora(), training.clone())).await;
    let training_report = report.training.unwrap();
    let (first, last) =
        (&training_report.validations[0], training_report.validations.last().unwrap());
    // The base prefers nothing to itself.
    assert!((first.loss - std::f64::consts::LN_2).abs() < 1e-3, "{first:?}");
    assert_eq!(first.accuracy, Some(0.0));
    assert!(last.loss < 0.4 && last.accuracy == Some(1.0), "{last:?}");
    let data = report.data.unwrap();
    assert_eq!((data.records, data.sequences), (16, 12));
    let again = world.made(request("again", lora(), training)).await;
    assert_eq!(again.digest, report.digest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encoder_learns_hidden_tokens_several_classes_and_pairs() {
    let world = World::start().await;
    let files = tempfile::tempdir().unwrap();
    embedding::write_encoder(files.path());
    world.service.import("reader", files.path()).await;
    // Words come in one order, so that a hidden one follows from its neighbours.
    let prose: String =
        (0..40).map(|i| format!("w{} w{} w{}\n\n", i % 5, i % 5 + 10, i % 5 + 20)).collect();
    world.data("order", "order.txt", v1::DatasetKind::Text, &prose).await.unwrap();
    let (mut several, mut two) =
        (String::from("text,labels\n"), String::from("premise,hypothesis,label\n"));
    for i in 0..32 {
        let (a, b) = (i % 2, i / 2 % 2);
        let names = ["", "up", "left", "up|left"][a + 2 * b];
        several += &format!("w{} w{},{names}\n", 30 + a, 40 + b);
        two += &format!("w{} w5,w{} w6,{}\n", 50 + a, 60 + b, ["no", "yes"][usize::from(a == 1)]);
    }
    world.data("several", "s.csv", v1::DatasetKind::MultiLabel, &several).await.unwrap();
    world.data("two", "t.csv", v1::DatasetKind::Classification, &two).await.unwrap();
    for (data, objective) in [
        ("order", "TRAINING_OBJECTIVE_MASKED_LM"),
        ("several", "TRAINING_OBJECTIVE_UNSPECIFIED"),
        ("two", "TRAINING_OBJECTIVE_CLASSIFICATION"),
    ] {
        let training = json!({
            "dataset": format!("datasets/{data}"), "steps": 150, "batch_size": 8, "max_length": 16,
            "learning_rate": 0.01, "objective": objective,
            "validation": { "share": 0.2, "every_steps": 50 },
        });
        let method = json!({ "lora": { "adapter": { "targets": ["all-linear"] } } });
        let request =
            v1::AdaptRequest { model: "models/reader".into(), ..request(data, method, training) };
        let report = world.made(request).await;
        let training = report.training.unwrap();
        let (first, last) = (&training.validations[0], training.validations.last().unwrap());
        assert!(last.loss < 0.8 * first.loss, "{data}: {:?}", training.validations);
        match data {
            "order" => assert_eq!(last.accuracy, None),
            _ => assert!(last.accuracy.unwrap() > 0.7, "{data}: {:?}", training.validations),
        }
        let get = v1::GetAdapterRequest { name: report.adapter };
        let adapter = world.adapters().get_adapter(get).await.unwrap().into_inner();
        // A head for hidden tokens predicts nothing.
        let wanted = match data {
            "order" => v1::AdapterMethod::Lora,
            _ => v1::AdapterMethod::Head,
        };
        assert_eq!(adapter.method(), wanted, "{data}");
        assert_eq!(adapter.lineage.unwrap().labels.len(), if data == "order" { 0 } else { 2 });
    }

    // What was learnt is a task, and predicts; hidden tokens are neither.
    let task = |adapter: &str, data: &str| v1::EvaluateRequest {
        model: "models/reader".into(),
        adapter: format!("adapters/{adapter}"),
        evaluation: Some(v1::Evaluation {
            task: Some(v1::TaskEvaluation {
                dataset: format!("datasets/{data}"),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    for data in ["several", "two"] {
        let operation = world.service.jobs().evaluate(task(data, data)).await.unwrap().into_inner();
        let report: v1::EvaluationReport = response(world.service.finished(&operation.name).await);
        let found = |metric: &str| report.measurements.iter().find(|m| m.metric == metric);
        assert!(found("task_accuracy").unwrap().value > 0.7, "{data}: {report:?}");
        assert!(found("task_loss").unwrap().value < 0.6, "{data}: {report:?}");
    }
    for data in ["order", "several"] {
        let error = world.service.jobs().evaluate(task("order", data)).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    }
    let request = |adapter: &str| v1::PredictRequest {
        model: "models/reader".into(),
        adapters: vec![v1::AdapterUse {
            name: format!("adapters/{adapter}"),
            ..Default::default()
        }],
        texts: vec!["w31 w41".into(), "w30 w40".into()],
        all_scores: true,
        ..Default::default()
    };
    let mut client = PredictionServiceClient::new(world.service.channel.clone());
    let answer = client.predict(request("several")).await.unwrap().into_inner();
    for prediction in &answer.predictions {
        let Some(Kind::Labels(found)) = &prediction.kind else { panic!("{prediction:?}") };
        let likely = found.scores.iter().filter(|label| label.score > 0.5).count();
        assert_eq!((found.scores.len(), found.labels.len()), (2, likely), "{prediction:?}");
    }
    let error = client.predict(request("order")).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_is_rounded_to_normal_floats_for_a_training_or_for_good() {
    let world = World::start().await;
    let training = json!({ "dataset": "datasets/chat", "steps": 3, "batch_size": 4 });
    let asked = json!({ "qlora": { "quantise_base": true } });
    let report = world.made(request("on-the-fly", asked.clone(), training.clone())).await;
    let said =
        |report: &v1::AdaptReport, what: &str| report.warnings.iter().any(|w| w.contains(what));
    assert!(said(&report, "14 linears were rounded"), "{:?}", report.warnings);
    let refused =
        world.adapt(request("not", json!({ "qlora": {} }), training.clone())).await.unwrap();
    let Some(lro::operation::Result::Error(status)) = refused.result else { panic!("not refused") };
    assert!(status.message.contains("quantise_base"), "{}", status.message);

    let recipe = v1::RunRecipeRequest {
        model: "models/tiny".into(),
        recipe: Some(serde_json::from_value(json!({ "steps": [{ "normal_float": {} }] })).unwrap()),
        ..Default::default()
    };
    let operation = world.service.jobs().run_recipe(recipe).await.unwrap().into_inner();
    let rounded: v1::RecipeReport = response(world.service.finished(&operation.name).await);
    let step = &rounded.steps[0];
    assert!(step.bytes_after < step.bytes_before, "{step:?}");
    let method = json!({ "qlora": {} });
    let mut on_it = request("on-it", method, training.clone());
    on_it.model.clone_from(&rounded.versions[0]);
    let stored = world.made(on_it).await;
    // The same base in either way: the same losses.
    let losses = |report: &v1::AdaptReport| -> Vec<f64> {
        report.training.as_ref().unwrap().points.iter().map(|p| p.loss).collect()
    };
    assert_eq!(losses(&stored), losses(&report));
    let checked = v1::AdaptRequest { validate_only: true, ..request("plan", asked, training) };
    assert_eq!(
        plan(world.adapt(checked).await.unwrap()).trained_parameters,
        report.trained_parameters
    );
}
