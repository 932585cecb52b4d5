//! Arms that tune, and adapters measured on tasks: over the wire, by the command, and as claims.

use std::time::{Duration, Instant};

use planish::proto::v1;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::adaptation::{World, chats, lora, request};
use crate::cli::Service as Program;
use crate::embedding;
use crate::harness::{assert_error, response};
use crate::support;

/// Short texts of two classes that their words tell, from the `from`-th on.
fn classes(from: usize, count: usize) -> String {
    let mut rows = String::from("text,label\n");
    for i in from..from + count {
        let (word, label) = if i % 2 == 0 { ("w1", "up") } else { ("w70", "down") };
        rows += &format!("{word} w{} {word},{label}\n", 10 + i % 40);
    }
    rows
}

async fn compare(world: &World, comparison: Value) -> Result<v1::ComparisonReport, Status> {
    let request = v1::CompareRequest {
        comparison: Some(serde_json::from_value(comparison).unwrap()),
        ..Default::default()
    };
    let operation = world.service.jobs().compare(request).await?.into_inner();
    Ok(response(world.service.finished(&operation.name).await))
}

fn value(run: &v1::ArmRun, metric: &str) -> Option<f64> {
    run.measurements.iter().find(|m| m.metric == metric).map(|m| m.value)
}

/// A world with `models/reader`, an encoder, and classes to learn and to be measured on.
async fn readers() -> World {
    let world = World::start().await;
    let files = tempfile::tempdir().unwrap();
    embedding::write_encoder(files.path());
    world.service.import("reader", files.path()).await;
    let kind = v1::DatasetKind::Classification;
    world.data("learn", "a.csv", kind, &classes(0, 40)).await.unwrap();
    world.data("held-out", "b.csv", kind, &classes(41, 31)).await.unwrap();
    world
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decoders_are_tuned_side_by_side_and_forget() {
    let world = World::start().await;
    let adaptation =
        |r: u32| json!({ "lora": { "adapter": { "r": r, "targets": ["down_proj"] } } });
    let comparison = json!({
        "model": "models/tiny",
        "seeds": [3, 4],
        "keep": "KEEP_VERSIONS_ALL",
        "training": {
            "dataset": "datasets/chat", "steps": 120, "batch_size": 4, "learning_rate": 0.01,
        },
        "evaluation": {
            "dataset": "datasets/prose", "context": 64, "compare_with_base": true,
            "task": { "dataset": "datasets/chat", "max_records": 10 },
        },
        "arms": [
            { "name": "small", "tuning": { "adaptation": adaptation(2) } },
            { "name": "large", "tuning": { "adaptation": adaptation(8) } },
            {
                "name": "rounded",
                "steps": [{ "round_to_nearest": { "grid": { "group_size": 16 } } }],
                "tuning": {
                    "adaptation": { "qlora": { "adapter": { "r": 2 } } }, "training": { "steps": 5 },
                },
            },
        ],
        "contrasts": [{ "metric": "task_loss", "arm": "large" }],
    });
    let report = compare(&world, comparison.clone()).await.unwrap();
    assert!(report.complete);
    let runs: Vec<_> = report.arms.iter().map(|arm| arm.runs.len()).collect();
    assert_eq!(runs, [1, 2, 2, 2]);
    assert_eq!(report.shared.unwrap().steps_taken, 1, "rounding draws no random numbers");
    let before = value(&report.arms[0].runs[0], "task_loss").unwrap();
    for (arm, r) in report.arms[1..3].iter().zip([2.0, 8.0]) {
        for run in &arm.runs {
            // down_proj of two layers is 32 x 64.
            assert_eq!(value(run, "trainable_parameters"), Some(2.0 * r * 96.0));
            assert_eq!(value(run, "kept_parameters"), Some(2.0 * r * 96.0));
            assert_eq!(
                (value(run, "kept_ranks"), value(run, "kept_ranks_deviation")),
                (Some(r), Some(0.0))
            );
            assert!(value(run, "task_loss").unwrap() < before - 0.05, "{}", arm.name);
            assert!(value(run, "kl_divergence").unwrap() > 1e-4, "the text sees what was tuned");
            assert!(value(run, "step_milliseconds").unwrap() > 0.0);
            assert!(value(run, "adapter_bytes").unwrap() > 2.0 * r * 96.0 * 4.0);
            assert_eq!(value(run, "task_accuracy"), None, "texts have no classes");
            assert_eq!(run.training.as_ref().unwrap().steps, 120);
        }
        assert_ne!(arm.runs[0].measurements, arm.runs[1].measurements, "seeds differ");
    }
    assert_eq!(report.arms[3].runs[0].training.as_ref().unwrap().steps, 5);
    assert_eq!(report.arms[3].runs[0].steps.len(), 1);
    assert!(report.contrasts[0].difference.unwrap().high.unwrap() < 0.0, "{:?}", report.contrasts);
    // Sizes are those of the model as it is stored, not of the copy that read the text.
    let bytes = |run: &v1::ArmRun| value(run, "weight_bytes");
    assert_eq!(bytes(&report.arms[1].runs[0]), bytes(&report.arms[0].runs[0]));
    assert!(bytes(&report.arms[3].runs[0]) < bytes(&report.arms[0].runs[0]));

    // What was kept is what an adaptation alone makes, and measures the same.
    let run = &report.arms[2].runs[1];
    let kept = v1::GetAdapterRequest { name: run.adapter.clone() };
    let kept = world.adapters().get_adapter(kept).await.unwrap().into_inner();
    let training = comparison["training"].clone();
    // The rounded model is the newest version by now.
    let first = "models/tiny/versions/1";
    let alone = v1::AdaptRequest {
        model: first.into(),
        seed: 4,
        ..request("alone", adaptation(8), training)
    };
    world.made(alone).await;
    let alone = v1::GetAdapterRequest { name: "adapters/alone".into() };
    let alone = world.adapters().get_adapter(alone).await.unwrap().into_inner();
    assert_eq!(alone.lineage, kept.lineage);
    assert_eq!(alone.files, kept.files);
    assert_eq!(alone.digest, kept.digest);
    let evaluate = v1::EvaluateRequest {
        model: first.into(),
        base: first.into(),
        evaluation: Some(serde_json::from_value(comparison["evaluation"].clone()).unwrap()),
        adapter: "adapters/alone".into(),
        ..Default::default()
    };
    let operation = world.service.jobs().evaluate(evaluate.clone()).await.unwrap().into_inner();
    let found: v1::EvaluationReport = response(world.service.finished(&operation.name).await);
    assert_eq!((found.adapter.as_str(), found.adapter_digest), ("adapters/alone", kept.digest));
    for metric in ["task_loss", "perplexity", "kl_divergence"] {
        let of = |all: &[v1::Measurement]| {
            let found = all.iter().find(|m| m.metric == metric).unwrap();
            (found.value, found.protocol.clone())
        };
        let (alone, arm) = (of(&found.measurements), of(&run.measurements));
        assert!((alone.0 / arm.0 - 1.0).abs() < 1e-3 && alone.1 == arm.1, "{alone:?} {arm:?}");
    }
    // An adapter is measured with the version it was made for only.
    let rounded = report.arms[3].runs[0].version.clone();
    let other = v1::EvaluateRequest { model: rounded, ..evaluate };
    let refused = world.service.jobs().evaluate(other).await;
    assert_error(refused, Code::FailedPrecondition, "MODEL_UNSUITABLE", "adapter");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encoders_are_tuned_for_several_tasks() {
    let world = readers().await;
    let kind = v1::DatasetKind::Tagging;
    let tags: String = (0..20).map(|i| format!("w1 A\nw{} O\n\n", 10 + i)).collect();
    world.data("tags", "c.conll", kind, &tags).await.unwrap();
    let comparison = json!({
        "model": "models/reader",
        "training": { "steps": 60, "batch_size": 10, "learning_rate": 0.01, "head_rate": 2.0 },
        "tasks": [
            {
                "name": "classes", "training": { "dataset": "datasets/learn" },
                "evaluation": { "dataset": "datasets/held-out", "max_records": 30 },
            },
            {
                "name": "tags", "training": { "dataset": "datasets/tags" },
                "evaluation": { "dataset": "datasets/tags" },
            },
        ],
        "arms": [
            { "name": "head", "tuning": { "adaptation": { "head_only": {} }, "tasks": ["classes"] } },
            {
                "name": "sora",
                "tuning": { "adaptation": { "sora": { "adapter": { "r": 4 }, "xi": 0.02 } } },
            },
        ],
        "contrasts": [{ "metric": "task_accuracy", "arm": "sora-classes", "against": "head-classes" }],
    });
    let report = compare(&world, comparison.clone()).await.unwrap();
    let names: Vec<_> = report.arms.iter().map(|arm| arm.name.as_str()).collect();
    assert_eq!(names, ["base", "head-classes", "sora-classes", "sora-tags"]);
    assert_eq!(value(&report.arms[0].runs[0], "task_loss"), None, "no head, no task");
    assert!(value(&report.arms[0].runs[0], "weight_bytes").unwrap() > 0.0);
    let run = |arm: usize| &report.arms[arm].runs[0];
    assert_eq!(value(run(1), "trainable_parameters"), Some(0.0));
    assert!(value(run(2), "task_accuracy").unwrap() > 0.9);
    assert!(value(run(3), "task_accuracy").unwrap() > 0.9);
    let accuracy = run(2).measurements.iter().find(|m| m.metric == "task_accuracy").unwrap();
    assert_eq!(accuracy.samples.len(), 30);
    // Of 4 ranks on each of 18 linears some were closed, and what is left was counted.
    let (trained, kept) = (value(run(2), "trainable_parameters"), value(run(2), "kept_parameters"));
    assert!(kept.unwrap() < trained.unwrap(), "{kept:?} of {trained:?}");
    assert!(value(run(2), "kept_ranks").unwrap() < 4.0);
    assert!(report.arms[1..].iter().any(|arm| arm.on_front), "quality against adapter bytes");
    assert!(report.contrasts[0].difference.is_some());

    for (change, code, field) in [
        (
            json!({ "evaluation": { "dataset": "datasets/prose" } }),
            Code::FailedPrecondition,
            "comparison.evaluation.dataset",
        ),
        (json!({ "tasks": [] }), Code::InvalidArgument, "comparison.arms[0].tuning.tasks"),
        (
            json!({ "training": { "steps": 0 } }),
            Code::InvalidArgument,
            "comparison.arms[0].tuning.training.steps",
        ),
    ] {
        let mut bad = comparison.clone();
        for (name, value) in change.as_object().unwrap() {
            bad[name] = value.clone();
        }
        let error = compare(&world, bad).await.unwrap_err();
        assert_eq!(error.code(), code, "{error:?}");
        assert!(format!("{error:?}").contains(field), "{field}: {error:?}");
    }
    let mut wrong = comparison.clone();
    wrong["tasks"][0]["evaluation"]["dataset"] = json!("datasets/chat");
    let error = compare(&world, wrong).await.unwrap_err();
    assert!(error.message().contains("classes, numbers or tags"), "{error:?}");
    let mut wrong = comparison;
    wrong["tasks"][0]["evaluation"]["dataset"] = json!("datasets/tags");
    let error = compare(&world, wrong).await.unwrap_err();
    assert!(error.message().contains("it holds"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_with_heads_are_measured_on_tasks() {
    let world = readers().await;
    let training = json!({
        "dataset": "datasets/learn", "steps": 60, "batch_size": 10, "learning_rate": 0.01,
    });
    for (id, method) in [
        ("lora", lora()),
        ("nola", json!({ "nola": { "basis_a": 16, "basis_b": 16 } })),
        ("head", json!({ "head_only": {} })),
        ("full", json!({ "full": {} })),
    ] {
        let mut asked = request(id, method, training.clone());
        asked.model = "models/reader".into();
        if id == "full" {
            asked.training.as_mut().unwrap().learning_rate = Some(1e-3);
        }
        let made = world.made(asked).await;
        let trained = made.training.unwrap();
        let evaluate = v1::EvaluateRequest {
            model: "models/reader".into(),
            adapter: made.adapter,
            evaluation: Some(v1::Evaluation {
                task: Some(v1::TaskEvaluation {
                    dataset: "datasets/learn".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let operation = world.service.jobs().evaluate(evaluate).await.unwrap().into_inner();
        let found: v1::EvaluationReport = response(world.service.finished(&operation.name).await);
        let of = |metric: &str| found.measurements.iter().find(|m| m.metric == metric).unwrap();
        let last = trained.points.last().unwrap().loss;
        assert!(of("task_loss").value < trained.points[0].loss, "{id}: {last}");
        assert_eq!(of("task_accuracy").samples.len(), 40);
        if id == "lora" {
            assert!(of("task_accuracy").value > 0.9 && of("task_macro_f1").value > 0.9);
            assert!((of("task_loss").value - last).abs() < 0.2, "{} {last}", of("task_loss").value);
        }
    }
    let bare = v1::EvaluateRequest {
        model: "models/reader".into(),
        evaluation: Some(v1::Evaluation {
            task: Some(v1::TaskEvaluation {
                dataset: "datasets/learn".into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let refused = world.service.jobs().evaluate(bare).await;
    assert_error(refused, Code::FailedPrecondition, "MODEL_UNSUITABLE", "adapter");
}

#[test]
fn a_killed_comparison_of_tunings_ends_as_if_nothing_had_happened() {
    let folder = tempfile::tempdir().unwrap();
    support::tiny_model(folder.path(), 4, 128);
    let at = folder.path().display().to_string();
    std::fs::write(folder.path().join("chat.jsonl"), chats()).unwrap();
    let file = "model = \"models/tiny\"\nseeds = [1, 2]\n[training]\n\
                dataset = \"datasets/chat\"\nsteps = 120\nbatch_size = 12\n\
                learning_rate = 1e-3\ncheckpoint_every = 3\n[evaluation.task]\n\
                dataset = \"datasets/chat\"\n\
                [[arms]]\nname = \"lora\"\n[arms.tuning.adaptation.lora.adapter]\nr = 8\n\
                [[arms]]\nname = \"nola\"\n[arms.tuning.adaptation.nola]\nbasis_a = 32\n";
    std::fs::write(folder.path().join("arms.toml"), file).unwrap();
    let prepare = |service: &Program| {
        service.run(&format!("models import {at}/tiny"));
        service.run(&format!("datasets import {at}/chat.jsonl --kind chat"));
    };
    let losses = |report: &Value| -> Vec<Value> {
        let runs = report["arms"].as_array().unwrap().iter();
        let runs = runs.flat_map(|arm| arm["runs"].as_array().unwrap());
        let loss = |m: &&Value| m["metric"] == "task_loss";
        let measured = runs.map(|run| run["measurements"].as_array().unwrap().iter().find(loss));
        measured.map(|found| found.unwrap()["value"].clone()).collect()
    };
    let calm = Program::start(&folder.path().join("calm"), &[]);
    prepare(&calm);
    let expected = calm.json(&format!("compare {at}/arms.toml"));
    let expected = losses(&expected["response"]);
    assert_eq!(expected.len(), 5);
    let shown = calm.run("evaluate --model tiny --task chat --max-records 5");
    assert!(shown.contains("task loss") || shown.contains("task_loss"), "{shown}");
    calm.kill();

    let data = folder.path().join("data");
    let service = Program::start(&data, &[]);
    prepare(&service);
    let job = service.json(&format!("compare {at}/arms.toml --detach"));
    let job = job["name"].as_str().unwrap().to_owned();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = service.json(&format!("jobs show {job}"));
        assert_ne!(now["done"], true, "the job is too short to be interrupted: {now}");
        let message = now["metadata"]["message"].as_str().unwrap_or_default();
        let second = message.contains("nola") && message.contains("seed 1");
        let step = now["metadata"]["metrics"]["step"].as_f64();
        if second && step.is_some_and(|step| step >= 6.0) {
            break;
        }
        assert!(Instant::now() < deadline, "the job does not get on: {now}");
    }
    service.kill();
    let service = Program::start(&data, &[]);
    service.run(&format!("jobs watch {job} --timeout 120s"));
    let done = service.json(&format!("jobs show {job}"));
    assert_eq!(done["metadata"]["attempt"], 2);
    assert_eq!(losses(&done["response"]), expected);
}
