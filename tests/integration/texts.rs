//! Several texts in one evaluation: a perplexity of each, alike in comparisons and alone, and the one command that
//! brings everything it needs.

use std::process::{Command, Stdio};

use planish::proto::v1;
use serde_json::{Value, json};
use tonic::Code;

use crate::harness::{Service, assert_error, response};
use crate::support;

const SAW: &str = "All that is gold does not glitter, not all those who wander are lost. ";
const COUNT: &str = "one two three four five six seven eight nine ten eleven twelve. ";

fn perplexities(measurements: &[v1::Measurement]) -> Vec<(&str, f64)> {
    let found = measurements.iter().filter(|m| m.metric == "perplexity");
    found.map(|m| (m.protocol.split(',').next().unwrap(), m.value)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn arms_are_measured_on_every_text() {
    let service = Service::start().await;
    let files = tempfile::tempdir().unwrap();
    service.import("tiny", &support::tiny_model(files.path(), 2, 64)).await;
    service.dataset("saw", &SAW.repeat(20)).await.unwrap();
    service.dataset("count", &COUNT.repeat(20)).await.unwrap();
    let window = json!({ "context": 32, "max_tokens": 256 });
    let with = |more: Value| {
        let mut all = window.clone();
        let both = all.as_object_mut().unwrap();
        both.extend(more.as_object().unwrap().clone());
        all
    };
    let both = with(json!({
        "dataset": "datasets/saw", "texts": [{ "dataset": "datasets/count", "max_tokens": 128 }],
        "compare_with_base": true,
    }));
    let compare = |evaluation: &Value| v1::CompareRequest {
        comparison: Some(
            serde_json::from_value(json!({
                "model": "models/tiny",
                "evaluation": evaluation,
                "metrics": ["perplexity", "weight_bytes"],
                "arms": [
                    { "name": "rtn-4", "steps": [
                        { "round_to_nearest": { "grid": { "bits": 4, "group_size": 32 } } },
                    ] },
                    { "name": "half", "steps": [{ "magnitude": {} }] },
                ],
                "contrasts": [{ "metric": "perplexity", "arm": "half", "against": "rtn-4" }],
            }))
            .unwrap(),
        ),
        ..Default::default()
    };
    let started = service.jobs().compare(compare(&both)).await.unwrap().into_inner();
    let report: v1::ComparisonReport = response(service.finished(&started.name).await);
    let columns: Vec<_> = report.columns.iter().filter(|c| c.metric == "perplexity").collect();
    assert_eq!(columns.len(), 2);
    assert!(columns[0].protocol.starts_with("datasets/saw, context 32"), "{columns:?}");
    assert!(columns[1].protocol.starts_with("datasets/count, context 32"), "{columns:?}");
    assert!(columns[1].protocol.contains("128 tokens"), "{columns:?}");
    let runs: Vec<_> = report.arms.iter().map(|arm| &arm.runs[0]).collect();
    assert_eq!(runs.len(), 3);
    for run in &runs {
        let found = perplexities(&run.measurements);
        assert_eq!(found.len(), 2, "{}", run.arm);
        assert_ne!(found[0].1, found[1].1, "{}", run.arm);
        // Divergence from the base is told of the first text alone.
        let divergences = run.measurements.iter().filter(|m| m.metric == "kl_divergence").count();
        assert_eq!(divergences, usize::from(run.arm != "base"));
    }
    assert_eq!(report.contrasts[0].protocol, columns[0].protocol);
    assert_eq!(report.data_digests.len(), 2);

    // A row an arm, a column a text.
    let request = v1::RenderComparisonRequest {
        source: Some(v1::render_comparison_request::Source::Name(started.name)),
        view: v1::ComparisonView::Markdown.into(),
    };
    let table = service.jobs().render_comparison(request).await.unwrap().into_inner().content;
    let table = String::from_utf8(table.to_vec()).unwrap();
    let header = table.lines().next().unwrap();
    assert_eq!(header, "| arm | perplexity [1] | perplexity [2] | weight bytes [3] |", "{table}");
    assert_eq!(table.lines().filter(|line| line.starts_with("| ")).count(), 4, "{table}");

    // The same numbers alone.
    let evaluate = |evaluation: Value| v1::EvaluateRequest {
        model: "models/tiny".into(),
        evaluation: Some(serde_json::from_value(evaluation).unwrap()),
        ..Default::default()
    };
    let alone = json!({ "dataset": "datasets/count", "context": 32, "max_tokens": 128 });
    let started = service.jobs().evaluate(evaluate(alone)).await.unwrap().into_inner();
    let alone: v1::EvaluationReport = response(service.finished(&started.name).await);
    assert_eq!(perplexities(&alone.measurements), perplexities(&runs[0].measurements)[1..]);

    let texts = |dataset: &str| {
        with(json!({ "dataset": "datasets/saw", "texts": [{ "dataset": dataset }] }))
    };
    let missing = service.jobs().compare(compare(&texts("datasets/none"))).await;
    let place = "comparison.evaluation.texts[0].dataset";
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", place);
    let twice = service.jobs().compare(compare(&texts("datasets/saw"))).await;
    assert_error(twice, Code::InvalidArgument, "INVALID_FIELD", place);
    service.running.stop().await.unwrap();
}

#[test]
fn one_command_brings_what_a_comparison_needs() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = support::tiny_model(at, 2, 64);
    std::fs::write(at.join("saw.txt"), SAW.repeat(20)).unwrap();
    std::fs::write(at.join("count.txt"), COUNT.repeat(20)).unwrap();
    let file = "metrics = [\"perplexity\", \"weight_bytes\"]\n\
                evaluation = { dataset = \"datasets/saw\", context = 32, max_tokens = 256, \
                texts = [{ dataset = \"datasets/count\" }] }\n\
                [[arms]]\nname = \"rtn-8\"\nsteps = [{ round_to_nearest = { grid = { bits = 8 } } }]\n";
    std::fs::write(at.join("table.toml"), file).unwrap();
    let compare = |texts: [&str; 2]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_planish"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PLANISH_") {
                command.env_remove(name);
            }
        }
        command.stdin(Stdio::null()).current_dir(at).arg("compare").arg("table.toml");
        command.arg("--source").arg(&model).args(["--folder", "service"]);
        for text in texts {
            command.arg("--text").arg(text);
        }
        let output = command.output().unwrap();
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), shown(&output.stdout), shown(&output.stderr))
    };
    for _ in 0..2 {
        let (code, out, problem) = compare(["saw=saw.txt", "count=count.txt"]);
        assert_eq!(code, Some(0), "{out}\n{problem}");
        let header = out.lines().next().unwrap();
        assert!(header.contains("perplexity [1]") && header.contains("perplexity [2]"), "{out}");
        let row = out.lines().find(|line| line.starts_with("rtn-8")).unwrap();
        assert_eq!(row.split_whitespace().filter(|w| *w != "*").count(), 5, "{row}");
        assert!(out.contains("datasets/saw, ") && out.contains("datasets/count, "), "{out}");
    }
    // Another content under a name that is taken.
    let (code, _, problem) = compare(["saw=count.txt", "count=count.txt"]);
    assert_ne!(code, Some(0));
    assert!(problem.contains("datasets/saw") && problem.contains("another name"), "{problem}");
    let (code, _, problem) = compare(["saw", "count=count.txt"]);
    assert_eq!(code, Some(64));
    assert!(problem.contains("NAME=FILE"), "{problem}");
}
