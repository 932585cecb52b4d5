//! `planish bench` through the built program: what it prints can be read, and adds up.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::Service;
use crate::support;

/// Runs `planish bench` with JSON output; the exit code, what was printed, and what was said.
fn bench(line: &str) -> (i32, Value, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_planish"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PLANISH_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null()).args(["--output", "json", "bench"]).args(line.split_whitespace());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let printed = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code().unwrap_or(-1), printed, said)
}

#[track_caller]
fn found(line: &str) -> Value {
    let (code, printed, said) = bench(line);
    assert_eq!(code, 0, "{line}: {said}");
    printed
}

#[track_caller]
fn number(value: &Value, path: &str) -> f64 {
    let number = value.pointer(path).and_then(Value::as_f64);
    number.unwrap_or_else(|| panic!("no number at {path} of {value:#}"))
}

/// The median lies between the ends, and all are positive numbers.
#[track_caller]
fn assert_spread(value: &Value, path: &str, repetitions: usize) {
    let at = |end: &str| number(value, &format!("{path}/{end}"));
    let (min, median, max) = (at("min"), at("median"), at("max"));
    assert!(0.0 < min && min <= median && median <= max && max.is_finite(), "{path}: {value:#}");
    let values = value.pointer(&format!("{path}/values")).and_then(Value::as_array).unwrap();
    assert_eq!(values.len(), repetitions, "{path}");
}

#[test]
fn a_model_is_measured_beside_the_limits_of_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let model = support::tiny_model(folder.path(), 2, 32).display().to_string();
    let line = format!("decode {model} --tokens 6 --prompt 3 --repetitions 2 --threads 1");
    let decode = found(&line);
    assert_eq!(decode["bench"], "decode");
    assert_eq!(decode["machine"]["threads"], 1);
    for path in ["/tokens_per_second", "/milliseconds_per_step", "/gigabytes_per_second"] {
        assert_spread(&decode, path, 2);
    }
    // Two blocks of q 32x32, k and v 16x32, o 32x32, gate, up and down 64x32; the head 257x32; in f32.
    let weights = 2 * (1024 + 2 * 512 + 1024 + 3 * 2048) + 257 * 32;
    assert_eq!(decode["weight_bytes"], 4 * weights);
    for path in ["/limits/memory", "/limits/reread"] {
        assert_spread(&decode, &format!("{path}/gigabytes_per_second"), 5);
        assert!(number(&decode, &format!("{path}/buffer_bytes")) > 0.0);
    }
    for path in ["/limits/integer", "/limits/single"] {
        assert_spread(&decode, &format!("{path}/gigaoperations_per_second"), 5);
    }
    let share = number(&decode, "/gigabytes_per_second/median")
        / number(&decode, "/limits/memory/gigabytes_per_second/median");
    assert!((number(&decode, "/share/of_memory") / share - 1.0).abs() < 1e-9);

    let prefill = found(&format!("prefill {model} --tokens 40 --repetitions 3 --no-limits"));
    assert_spread(&prefill, "/tokens_per_second", 3);
    let head = 257 * 32;
    assert_eq!(prefill["linear_operations"], 2 * (40 * (weights - head) + head));
    assert!(number(&prefill, "/attention_operations") > 0.0);
    assert!(prefill.get("limits").is_none() && prefill.get("share").is_none());

    let line = format!("batch {model} --sequences 1,3 --tokens 4 --repetitions 2 --no-limits");
    let batch = found(&line);
    let rows = batch["rows"].as_array().unwrap();
    assert_eq!(
        rows.iter().map(|r| r["sequences"].as_u64()).collect::<Vec<_>>(),
        [Some(1), Some(3)]
    );
    rows.iter().for_each(|row| assert_spread(row, "/tokens_per_second", 2));

    // More tokens than the model has positions, no model at all, and settings that measure nothing.
    let (code, _, said) = bench(&format!("decode {model} --tokens 1000 --no-limits"));
    assert_eq!(code, 65, "{said}");
    assert!(said.contains("512 positions"), "{said}");
    assert_eq!(bench("decode no/such/model --no-limits").0, 66);
    assert_eq!(bench(&format!("batch {model} --sequences 0 --no-limits")).0, 65);
}

#[test]
fn kernels_are_measured_by_layout_shape_and_tokens() {
    let line =
        "kernels --layout grouped-4 --shape 64x128,32x64 --tokens 1,9 --repetitions 2 --no-limits";
    let kernels = found(line);
    let rows = kernels["rows"].as_array().unwrap();
    // Two layouts carry the name, with and without zero points.
    assert_eq!(rows.len(), 2 * 2 * 2);
    for row in rows {
        assert!(row["layout"].as_str().unwrap().starts_with("grouped-4"));
        assert_spread(row, "/microseconds", 2);
        assert_spread(row, "/gigabytes_per_second", 2);
        assert_spread(row, "/gigaoperations_per_second", 2);
    }
    let (code, _, said) = bench("kernels --layout nothing --no-limits");
    assert_eq!(code, 65);
    assert!(said.contains("dense-f32"), "{said}");
}

#[test]
fn row_groups_are_measured_against_the_same_tiles_and_the_library() {
    let line = "kernels --row-groups --shape 64x32 --tokens 1,5 --density 0.5,1 --group 4 \
                --repetitions 2 --no-limits";
    let found = found(line);
    assert_eq!((&found["bench"], &found["group"]), (&"row-groups".into(), &4.into()));
    let rows = found["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2 * 2);
    for row in rows {
        for path in ["/microseconds", "/same_tile_microseconds", "/library_microseconds"] {
            assert_spread(row, path, 2);
        }
    }
    // One mean for each number of tokens and one for all, for each density.
    assert_eq!(found["means"].as_array().unwrap().len(), 2 * 3);
    let (code, _, said) = bench("kernels --row-groups --group 3 --no-limits");
    assert_eq!(code, 65, "{said}");
}

#[test]
fn an_image_classifier_is_measured_sparse_and_dense() {
    let net = r#"random:{"model_type":"mobilenet_v1","depth_multiplier":0.1,"image_size":16}"#;
    let line = format!("images {net} --batch 3 --sparsity 0.5 --repetitions 2 --no-limits");
    let found = found(&line);
    assert_spread(&found, "/images_per_second", 2);
    assert_spread(&found, "/dense_images_per_second", 2);
    assert!(number(&found, "/zero_share") > 0.3, "{found:#}");
    assert!(number(&found, "/difference") < 1e-4, "{found:#}");
    assert!(number(&found, "/weight_bytes") < number(&found, "/dense_bytes"));
    let folder = tempfile::tempdir().unwrap();
    let decoder = support::tiny_model(folder.path(), 1, 32).display().to_string();
    let (code, _, said) = bench(&format!("images {decoder} --no-limits"));
    assert_eq!(code, 65, "{said}");
    assert_eq!(bench("images random:{ --no-limits").0, 65);
}

#[test]
fn the_wire_is_measured_beside_the_call() {
    let folder = tempfile::tempdir().unwrap();
    let model = support::tiny_model(folder.path(), 1, 32).display().to_string();
    let line = format!("wire {model} --requests 4 --prompt-tokens 3 --repetitions 3 --threads 1");
    let wire = found(&line);
    assert_eq!((&wire["bench"], &wire["machine"]["threads"]), (&"wire".into(), &1.into()));
    assert_eq!(wire["run"]["requests"], 4);
    for path in ["/in_process_milliseconds", "/grpc_milliseconds"] {
        assert_spread(&wire, path, 3);
    }
    assert_eq!(wire["added_milliseconds"]["values"].as_array().unwrap().len(), 3);

    // Nothing to measure, more than fits the model, no model at all.
    assert_eq!(bench(&format!("wire {model} --requests 0")).0, 65);
    assert_eq!(bench(&format!("wire {model} --prompt-tokens 4096")).0, 65);
    assert_eq!(bench("wire no/such/model").0, 66);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_loaded_and_its_answers_are_counted() {
    let service = Service::start().await;
    let folder = tempfile::tempdir().unwrap();
    service.import("tiny", &support::tiny_model(folder.path(), 1, 32)).await;
    let endpoint = format!("http://{}", service.running.address());
    let run = move |line: &str| {
        let line = format!("serve --endpoint {endpoint} {line}");
        tokio::task::spawn_blocking(move || bench(&line))
    };

    let line = "--model tiny --clients 3 --requests 12 --prompt-tokens 8:16 --answer-tokens 5 \
                --shared-prefix 4 --seed 3";
    let (code, closed, said) = run(line).await.unwrap();
    assert_eq!(code, 0, "{said}");
    assert_eq!((&closed["bench"], &closed["model"]), (&"serve".into(), &"models/tiny".into()));
    assert_eq!((&closed["sent"], &closed["answered"]), (&12.into(), &12.into()), "{closed:#}");
    assert_eq!(closed["errors"], serde_json::json!({}));
    assert_eq!(closed["answer_tokens"], 12 * 5);
    let prompts = number(&closed, "/prompt_tokens");
    assert!((12.0 * 8.0..=12.0 * 16.0).contains(&prompts), "{prompts}");
    // Each answer has a first token and four gaps.
    for (name, count) in [("first_token", 12), ("between_tokens", 48), ("total", 12)] {
        let at = |p: &str| number(&closed, &format!("/{name}_milliseconds/{p}"));
        assert_eq!(at("count"), f64::from(count), "{name}");
        assert!(at("p50") <= at("p90") && at("p90") <= at("p99") && at("p99") <= at("max"));
    }
    let rate = number(&closed, "/requests_per_second") * number(&closed, "/seconds");
    assert!((rate - 12.0).abs() < 1e-6);

    // At a rate, requests do not wait for each other; the same seed asks the same.
    let line = format!("--rate 400 {line}");
    let (code, open, said) = run(&line).await.unwrap();
    assert_eq!(code, 0, "{said}");
    assert_eq!((&open["sent"], &open["answered"]), (&12.into(), &12.into()), "{open:#}");
    assert_eq!(open["prompt_tokens"], closed["prompt_tokens"]);

    // A prompt that the model has no positions for fails, is counted, and does not end the run.
    let line = "--model tiny --requests 2 --clients 1 --prompt-tokens 4096";
    let (code, failing, said) = run(line).await.unwrap();
    assert_eq!(code, 0, "{said}");
    assert_eq!(failing["answered"], 0);
    let errors: u64 =
        failing["errors"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert_eq!(errors, 2, "{failing:#}");
    assert!(failing["total_milliseconds"].is_null());

    // A model that is not there is an error of the command, and so is a load that cannot be.
    assert_eq!(run("--model absent").await.unwrap().0, 66);
    assert_eq!(run("--model tiny --requests 0").await.unwrap().0, 64);
    assert_eq!(run("--model tiny --shared-prefix 65").await.unwrap().0, 65);
}
