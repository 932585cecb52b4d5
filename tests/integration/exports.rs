//! Results on their way to other programs: a pruned and quantised model in each form, its card, and back.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use planish::models::{Model, import};
use planish::nn::weight::Weight;
use planish::proto::v1;
use tempfile::TempDir;
use tonic::Code;

use crate::harness::{Service, assert_error, response};
use crate::support::tiny_model;

/// Words in an order that follows no rule, to calibrate and measure on.
fn words() -> String {
    let mut state = 7_u32;
    let word = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        format!("w{} ", state >> 22)
    };
    (0..3000).map(word).collect()
}

fn evaluation() -> v1::Evaluation {
    v1::Evaluation {
        dataset: "datasets/words".into(),
        context: Some(64),
        max_tokens: Some(1024),
        ..Default::default()
    }
}

/// Wanda 2:4, then 4 bits in groups of 32 with zero points.
fn recipe() -> v1::Recipe {
    let wanda = v1::Wanda {
        sparsity: Some(v1::Sparsity { pattern: "2:4".into(), ..Default::default() }),
        calibration: Some(v1::Calibration {
            dataset: "datasets/words".into(),
            sequences: Some(4),
            sequence_length: Some(32),
            ..Default::default()
        }),
    };
    let grid = v1::Grid { bits: Some(4), group_size: Some(32), ..Default::default() };
    let steps = [
        v1::step::Method::Wanda(wanda),
        v1::step::Method::RoundToNearest(v1::RoundToNearest { grid: Some(grid) }),
    ];
    v1::Recipe {
        seed: 5,
        steps: steps.map(|method| v1::Step { method: Some(method) }).into(),
        evaluation: Some(evaluation()),
        ..Default::default()
    }
}

struct Export {
    folder: TempDir,
    files: BTreeMap<String, Vec<u8>>,
    report: Option<v1::ExportReport>,
}

impl Export {
    fn text(&self, name: &str) -> &str {
        std::str::from_utf8(&self.files[name]).unwrap()
    }

    fn card(&self) -> &str {
        self.text("README.md")
    }
}

fn request(name: &str, format: v1::ExportFormat, r#type: v1::ExportType) -> v1::ExportModelRequest {
    v1::ExportModelRequest {
        name: name.into(),
        format: format.into(),
        r#type: r#type.into(),
        ..Default::default()
    }
}

async fn export(service: &Service, request: v1::ExportModelRequest) -> Export {
    use v1::export_model_response::Part;
    let mut stream = service.models().export_model(request).await.unwrap().into_inner();
    let folder = tempfile::tempdir().unwrap();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let (mut sizes, mut current, mut report) = (BTreeMap::new(), String::new(), None);
    while let Some(message) = stream.message().await.unwrap() {
        match message.part.unwrap() {
            Part::Report(made) => {
                assert!(files.is_empty(), "the report comes first");
                report = Some(made);
            }
            Part::File(file) => {
                current = file.file_name;
                sizes.insert(current.clone(), file.size_bytes);
                assert!(files.insert(current.clone(), Vec::new()).is_none(), "{current} twice");
            }
            Part::Chunk(chunk) => files.get_mut(&current).unwrap().extend_from_slice(&chunk),
        }
    }
    for (name, bytes) in &files {
        assert_eq!(bytes.len() as i64, sizes[name], "{name}");
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    Export { folder, files, report }
}

/// The service with a compressed model, its recipe's report, and the model as it is stored.
async fn compressed() -> (Service, v1::RecipeReport, Model) {
    let service = Service::start().await;
    service.dataset("words", &words()).await.unwrap();
    let files = tempfile::tempdir().unwrap();
    service.import("m", &tiny_model(files.path(), 2, 64)).await;
    let request = v1::RunRecipeRequest {
        model: "models/m".into(),
        recipe: Some(recipe()),
        ..Default::default()
    };
    let operation = service.jobs().run_recipe(request).await.unwrap().into_inner();
    let report: v1::RecipeReport = response(service.finished(&operation.name).await);
    let native = request_native(&report.versions[1]);
    let stored = export(&service, native).await;
    assert!(stored.report.is_none());
    assert!(stored.card().contains("layouts kept"));
    let model = import::open(stored.folder.path()).unwrap();
    (service, report, model)
}

fn request_native(name: &str) -> v1::ExportModelRequest {
    request(name, v1::ExportFormat::Native, v1::ExportType::Unspecified)
}

fn assert_same_values(stored: &Model, path: &Path) -> Model {
    let again = import::open(path).unwrap();
    assert_eq!(again.weights.len(), stored.weights.len());
    for (name, weight) in &stored.weights {
        let (before, after) = (weight.to_f32(), again.weights[name].to_f32());
        assert!(before.iter().zip(&after).all(|(a, b)| a == b), "{name}");
    }
    again
}

async fn perplexity(service: &Service, model: &str) -> f64 {
    let request = v1::EvaluateRequest {
        model: model.into(),
        evaluation: Some(evaluation()),
        ..Default::default()
    };
    let operation = service.jobs().evaluate(request).await.unwrap().into_inner();
    let report: v1::EvaluationReport = response(service.finished(&operation.name).await);
    value(&report)
}

fn value(report: &v1::EvaluationReport) -> f64 {
    report.measurements.iter().find(|m| m.metric == "perplexity").unwrap().value
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compressed_model_goes_out_in_each_form_and_comes_back() {
    let (service, report, stored) = compressed().await;
    let name = report.versions[1].clone();
    let measured = value(report.after.as_ref().unwrap());
    let sparse = stored.weights.values().filter(|w| matches!(***w, Weight::Sparse(_))).count();
    assert_eq!(sparse, 2 * 7, "2:4 of 4-bit codes");

    // Dense: every layout decoded, the shared head not written twice.
    let f32 = v1::ExportType::F32;
    let dense = export(&service, request(&name, v1::ExportFormat::HuggingFace, f32)).await;
    assert_same_values(&stored, dense.folder.path());
    let made = dense.report.clone().unwrap();
    assert_eq!(made.tensors.len(), stored.weights.len());
    assert!(made.tensors.iter().all(|t| t.max_difference == 0.0 && t.written_as == "F32"));
    let back = service.import("dense", dense.folder.path()).await;
    let again = perplexity(&service, &back.name).await;
    assert!((again / measured - 1.0).abs() < 1e-4, "{again} and {measured}");

    // GGUF: codes with zero points in blocks that hold them to the bit.
    let gguf = export(&service, request(&name, v1::ExportFormat::Gguf, f32)).await;
    assert_eq!(gguf.files.keys().collect::<Vec<_>>(), ["README.md", "m.gguf"]);
    let read = assert_same_values(&stored, &gguf.folder.path().join("m.gguf"));
    let blocks = read.weights.values().filter(|w| matches!(***w, Weight::Ggml(_))).count();
    assert_eq!(blocks, sparse);
    let made = gguf.report.clone().unwrap();
    assert_eq!(made.tensors.iter().filter(|t| t.carried).count(), sparse);
    assert!(made.tensors.iter().all(|t| t.max_difference == 0.0));
    let back = service.import("gguf", gguf.folder.path()).await;
    assert!(back.weight_bytes < 4 * back.parameter_count);
    let again = perplexity(&service, &back.name).await;
    assert!((again / measured - 1.0).abs() < 1e-4, "{again} and {measured}");

    // Rounded anew where that is asked for, and the report says how far.
    let rounded = v1::ExportModelRequest {
        decode_grids: true,
        ..request(&name, v1::ExportFormat::Gguf, v1::ExportType::Q40)
    };
    let rounded = export(&service, rounded).await;
    let made = rounded.report.clone().unwrap();
    let moved = made.tensors.iter().filter(|t| t.written_as == "Q4_0" && t.max_difference > 0.0);
    assert_eq!(moved.clone().count(), sparse);
    assert!(moved.clone().all(|t| t.relative_difference < 0.2 && !t.carried));
    assert!(rounded.card().contains("Rounding moved the values of"));

    // compressed-tensors: codes packed; the version before it, whose values are floats, as 2:4.
    let form = v1::ExportFormat::CompressedTensors;
    let packed = export(&service, request(&name, form, v1::ExportType::Unspecified)).await;
    let config: serde_json::Value = serde_json::from_str(packed.text("config.json")).unwrap();
    let settings = &config["quantization_config"];
    assert_eq!(settings["format"], "pack-quantized");
    assert_eq!(settings["config_groups"]["group_0"]["weights"]["group_size"], 32);
    assert_eq!(config["torch_dtype"], "float16");
    let made = packed.report.clone().unwrap();
    let codes: Vec<_> = made.tensors.iter().filter(|t| t.carried).collect();
    assert_eq!(codes.len(), sparse);
    assert!(codes.iter().all(|t| t.max_difference == 0.0));
    let file = packed.folder.path().join("model.safetensors");
    let tensors = planish::formats::safetensors::open(&file).unwrap().tensors;
    let module = "model.layers.0.mlp.down_proj";
    assert_eq!(tensors[&format!("{module}.weight_packed")].shape, [64, 16]);
    assert_eq!(tensors[&format!("{module}.weight_scale")].shape, [64, 4]);
    assert_eq!(tensors[&format!("{module}.weight_zero_point")].shape, [8, 4]);

    let pruned = request(&report.versions[0], form, v1::ExportType::Unspecified);
    let pruned = export(&service, pruned).await;
    let config: serde_json::Value = serde_json::from_str(pruned.text("config.json")).unwrap();
    let settings = &config["quantization_config"]["sparsity_config"];
    assert_eq!(settings["format"], "sparse-24-bitmask");
    let file = pruned.folder.path().join("model.safetensors");
    let tensors = planish::formats::safetensors::open(&file).unwrap().tensors;
    assert_eq!(tensors[&format!("{module}.compressed")].shape, [64, 64]);
    assert_eq!(tensors[&format!("{module}.bitmask")].shape, [64, 16]);
    assert!(pruned.card().contains("up to its version 0.14"));

    // The base has neither codes nor zeros.
    let refused = service.models().export_model(request(&report.base, form, f32)).await;
    assert_error(refused.map(|_| ()), Code::FailedPrecondition, "MODEL_UNSUITABLE", "");
    let refused = service.models().export_model(request(&name, form, v1::ExportType::Q80)).await;
    assert_error(refused.map(|_| ()), Code::InvalidArgument, "INVALID_FIELD", "type");
    let decoded = v1::ExportModelRequest { decode_grids: true, ..request_native(&name) };
    let refused = service.models().export_model(decoded).await;
    assert_error(refused.map(|_| ()), Code::InvalidArgument, "INVALID_FIELD", "decode_grids");
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_card_tells_the_story_and_tells_it_twice_the_same() {
    let (service, report, _) = compressed().await;
    let name = report.versions[1].clone();
    let get = v1::GetModelRequest { name: "models/m".into() };
    let model = service.models().get_model(get).await.unwrap().into_inner();
    let update = v1::UpdateModelRequest {
        model: Some(v1::Model {
            labels: [("license".to_owned(), "apache-2.0".to_owned())].into(),
            display_name: "A small model".into(),
            ..model
        }),
        update_mask: None,
    };
    service.models().update_model(update).await.unwrap();

    let hugging_face = request(&name, v1::ExportFormat::HuggingFace, v1::ExportType::Bf16);
    let first = export(&service, hugging_face.clone()).await;
    let second = export(&service, hugging_face.clone()).await;
    assert_eq!(first.files, second.files, "the same version, the same bytes");
    let card = first.card();
    let get = v1::GetDatasetRequest { name: "datasets/words".into() };
    let digest = service.datasets().get_dataset(get).await.unwrap().into_inner().digest;
    let number =
        |report: &Option<v1::EvaluationReport>| format!("{:.3}", value(report.as_ref().unwrap()));
    for part in [
        "license: \"apache-2.0\"",
        "library_name: \"transformers\"",
        "- \"wanda\"\n- \"round_to_nearest\"",
        "A small model",
        "`models/m/versions/1`: imported from",
        "`models/m/versions/2`: Wanda",
        "`models/m/versions/3`: Round to nearest",
        "\"pattern\": \"2:4\"",
        "seed 5",
        &format!("| `datasets/words` | `{digest}` | made `models/m/versions/2` |"),
        &format!("| `datasets/words` | `{digest}` | measured |"),
        &format!("| perplexity | {} | {} |", number(&report.after), number(&report.before)),
        "AutoModelForCausalLM",
        "Rounding moved the values",
    ] {
        assert!(card.contains(part), "{part} is missing from\n{card}");
    }

    // What is measured later is told from then on.
    assert_eq!(card.matches("| perplexity |").count(), 1);
    perplexity(&service, &name).await;
    let later = export(&service, hugging_face).await;
    assert_eq!(later.card().matches("| perplexity |").count(), 2);

    // A card needs no operation: the lineage is the version's own.
    let operations = service
        .operations()
        .list_operations(planish::proto::google::longrunning::ListOperationsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .operations;
    for operation in operations {
        let name = operation.name;
        let delete = planish::proto::google::longrunning::DeleteOperationRequest { name };
        service.operations().delete_operation(delete).await.unwrap();
    }
    let bare = export(&service, request_native(&name)).await;
    assert!(bare.card().contains("Nothing was measured"));
    assert!(bare.card().contains("`models/m/versions/2`: Wanda"));
    assert!(bare.card().contains("elements in scope are 0"));
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_that_nobody_wants_leaves_nothing() {
    let (service, report, _) = compressed().await;
    let wanted = request(&report.versions[1], v1::ExportFormat::Gguf, v1::ExportType::F16);
    let mut stream = service.models().export_model(wanted.clone()).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    let mut client = service.models();
    let call = tokio::spawn(async move { client.export_model(wanted).await.map(|_| ()) });
    tokio::time::sleep(Duration::from_millis(1)).await;
    call.abort();
    let scratch = service.folder.path().join("scratch");
    let left = || {
        let entries = std::fs::read_dir(&scratch).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("export-")).count()
    };
    for _ in 0..500 {
        if left() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(left(), 0);
    service.running.stop().await.unwrap();
}
