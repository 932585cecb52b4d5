//! The whole way of a model: uploaded, imported, compressed, watched, measured, asked, exported.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use futures::StreamExt as _;
use planish::config::KvFormat;
use planish::models::decoder::random;
use planish::models::export;
use planish::nn::dtype::Dtype;
use planish::proto::google::longrunning as lro;
use planish::proto::v1;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::harness::{Service, assert_error, metadata, reason, response};

/// A random Llama as a Hugging Face folder; no tokenizer, so it speaks token ids.
fn write_model(folder: &Path, seed: u64) {
    let model = random::model(random::tiny("llama"), seed).unwrap();
    export::hugging_face(&model, folder, Dtype::F32).unwrap();
}

async fn with_model(id: &str) -> (Service, v1::ModelVersion) {
    let service = Service::start().await;
    let files = tempfile::tempdir().unwrap();
    write_model(files.path(), 1);
    let version = service.import(id, files.path()).await;
    (service, version)
}

fn generate(model: &str, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: model.into(),
        prompt: Some(v1::generate_request::Prompt::Tokens(v1::TokenIds { ids: vec![1, 2, 3] })),
        max_tokens,
        sampling: Some(v1::SamplingOptions { seed: Some(7), ..Default::default() }),
        ignore_eos: true,
        ..Default::default()
    }
}

async fn collect(service: &Service, request: v1::GenerateRequest) -> Vec<v1::GenerateResponse> {
    let stream = service.generation().generate(request).await.unwrap().into_inner();
    stream.map(Result::unwrap).collect().await
}

fn magnitude(pattern: &str) -> v1::Recipe {
    let sparsity = v1::Sparsity { pattern: pattern.into(), ..Default::default() };
    let method = v1::step::Method::Magnitude(v1::Magnitude { sparsity: Some(sparsity) });
    let quantise = v1::step::Method::RoundToNearest(v1::RoundToNearest {
        grid: Some(v1::Grid { bits: Some(8), group_size: Some(16), ..Default::default() }),
    });
    v1::Recipe {
        seed: 3,
        steps: [method, quantise].map(|m| v1::Step { method: Some(m) }).into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_imported_compressed_asked_and_exported() {
    let (service, base) = with_model("tiny").await;
    assert_eq!(base.name, "models/tiny/versions/1");
    assert_eq!((base.family.as_str(), base.architecture.as_str()), ("decoder", "llama"));
    assert_eq!(base.weight_bytes, 4 * base.parameter_count);

    // Only a look first, which leaves nothing.
    let request = v1::RunRecipeRequest {
        model: "models/tiny".into(),
        recipe: Some(magnitude("2:4")),
        validate_only: true,
        request_id: "r".into(),
    };
    let checked = service.jobs().run_recipe(request.clone()).await.unwrap().into_inner();
    let plan: v1::RecipePlan = response(checked);
    assert_eq!(plan.steps.len(), 2);
    assert!(plan.total.unwrap().weight_bytes < base.weight_bytes);

    let request = v1::RunRecipeRequest { validate_only: false, ..request };
    let operation = service.jobs().run_recipe(request.clone()).await.unwrap().into_inner();
    let watch = v1::WatchOperationRequest { name: operation.name.clone(), after_sequence: 0 };
    let mut stream = service.jobs().watch_operation(watch).await.unwrap().into_inner();
    let mut last = None;
    let mut sequence = 0;
    while let Some(look) = stream.message().await.unwrap() {
        assert!(!last.is_some_and(|l: lro::Operation| l.done), "only the last look is done");
        if let Some(event) = &look.event {
            assert!(event.sequence > sequence, "events come in order");
            sequence = event.sequence;
        }
        last = look.operation;
    }
    let last = last.unwrap();
    let facts = metadata(&last);
    assert_eq!(facts.state(), v1::OperationState::Succeeded);
    assert_eq!((facts.kind.as_str(), facts.progress, facts.attempt), ("recipe", 1.0, 1));
    let report: v1::RecipeReport = response(last);
    assert_eq!(report.base, base.name);
    assert_eq!(report.versions, ["models/tiny/versions/2", "models/tiny/versions/3"]);
    assert!(report.steps[1].bytes_after < report.steps[0].bytes_before);

    // The same request again, though `models/tiny` now means another version.
    let again = service.jobs().run_recipe(request.clone()).await.unwrap().into_inner();
    assert_eq!(again.name, operation.name);
    let other = v1::RunRecipeRequest { recipe: Some(magnitude("1:4")), ..request };
    let reused = service.jobs().run_recipe(other).await;
    assert_error(reused, Code::AlreadyExists, "REQUEST_ID_REUSED", "");

    let list = v1::ListModelVersionsRequest {
        parent: "models/tiny".into(),
        page_size: 2,
        ..Default::default()
    };
    let page = service.models().list_model_versions(list.clone()).await.unwrap().into_inner();
    let names: Vec<_> = page.versions.iter().map(|v| v.name.as_str()).collect();
    assert_eq!(names, ["models/tiny/versions/3", "models/tiny/versions/2"]);
    let lineage = page.versions[0].lineage.clone().unwrap();
    assert_eq!((lineage.parent.as_str(), lineage.step_index), ("models/tiny/versions/2", 1));
    let rest = v1::ListModelVersionsRequest { page_token: page.next_page_token, ..list };
    let rest = service.models().list_model_versions(rest).await.unwrap().into_inner();
    assert_eq!(rest.versions[0].name, base.name);

    let answer = collect(&service, generate("models/tiny", 12)).await;
    assert_eq!(answer[0].model, "models/tiny/versions/3");
    let end = answer.last().unwrap();
    assert_eq!(end.finish_reason(), v1::FinishReason::Length);
    assert_eq!(
        end.usage,
        Some(v1::Usage { prompt_tokens: 3, generated_tokens: 12, cached_prompt_tokens: 0 })
    );
    assert_eq!(end.seed, 7);
    let ids = |answer: &[v1::GenerateResponse]| -> Vec<u32> {
        answer.iter().flat_map(|part| part.tokens.iter().map(|t| t.id)).collect()
    };
    assert_eq!(ids(&answer).len(), 12);
    assert_eq!(ids(&answer), ids(&collect(&service, generate("models/tiny", 12)).await));

    let files = exported(&service, "models/tiny/versions/3", v1::ExportFormat::HuggingFace).await;
    assert!(files.contains_key("config.json"), "{:?}", files.keys());
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in &files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let back = service.import("back", folder.path()).await;
    assert_eq!(back.parameter_count, base.parameter_count);
    let scratch = service.folder.path().join("scratch");
    let left: Vec<_> = std::fs::read_dir(scratch).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(!left.iter().any(|p| p.to_string_lossy().contains("export-")), "{left:?}");
    service.running.stop().await.unwrap();
}

/// The files of an export; sizes and headers are checked.
async fn exported(
    service: &Service,
    name: &str,
    format: v1::ExportFormat,
) -> BTreeMap<String, Vec<u8>> {
    use v1::export_model_response::Part;
    let request =
        v1::ExportModelRequest { name: name.into(), format: format.into(), ..Default::default() };
    let mut stream = service.models().export_model(request).await.unwrap().into_inner();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut sizes = BTreeMap::new();
    let mut current = String::new();
    while let Some(message) = stream.message().await.unwrap() {
        match message.part.unwrap() {
            Part::File(file) => {
                current = file.file_name;
                files.insert(current.clone(), Vec::new());
                sizes.insert(current.clone(), file.size_bytes);
            }
            Part::Chunk(chunk) => files.get_mut(&current).unwrap().extend_from_slice(&chunk),
            Part::Report(report) => assert_eq!(report.format(), format),
        }
    }
    for (name, bytes) in &files {
        assert_eq!(bytes.len() as i64, sizes[name], "{name}");
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_change_and_go() {
    let (service, version) = with_model("m").await;
    let mut client = service.models();
    let get = v1::GetModelRequest { name: "models/m".into() };
    let model = client.get_model(get.clone()).await.unwrap().into_inner();
    assert_eq!((model.version_count, model.latest_version.as_str()), (1, version.name.as_str()));

    let update = |paths: &[&str], etag: &str| v1::UpdateModelRequest {
        model: Some(v1::Model {
            name: "models/m".into(),
            display_name: "new".into(),
            labels: [("team".to_owned(), "a".to_owned())].into(),
            etag: etag.into(),
            ..Default::default()
        }),
        update_mask: Some(pbjson_types::FieldMask {
            paths: paths.iter().map(|p| (*p).to_owned()).collect(),
        }),
    };
    let updated = client.update_model(update(&["labels"], &model.etag)).await.unwrap().into_inner();
    assert_eq!(updated.display_name, model.display_name, "not in the mask");
    assert_eq!(updated.labels["team"], "a");
    let stale = client.update_model(update(&[], &model.etag)).await;
    assert_error(stale, Code::Aborted, "ETAG_MISMATCH", "");
    let bad = client.update_model(update(&["name"], "")).await;
    assert_error(bad, Code::InvalidArgument, "INVALID_FIELD", "update_mask");
    let updated = client.update_model(update(&[], "")).await.unwrap().into_inner();
    assert_eq!(updated.display_name, "new");

    let load = v1::LoadModelRequest { name: "models/m".into() };
    let loaded = client.load_model(load).await.unwrap().into_inner();
    assert_eq!(loaded.name, version.name);
    assert!(loaded.resident_bytes > 0);
    let unload = v1::UnloadModelRequest { name: "models/m".into() };
    client.unload_model(unload.clone()).await.unwrap();
    client.unload_model(unload).await.unwrap();

    let native = exported(&service, &version.name, v1::ExportFormat::Native).await;
    assert_eq!(native.len(), version.files.len() + 1, "the files and the card");
    assert!(native["README.md"].starts_with(b"---\n"));
    let gguf = exported(&service, &version.name, v1::ExportFormat::Gguf).await;
    assert!(gguf["m.gguf"].starts_with(b"GGUF"));

    let delete = v1::DeleteModelRequest { name: "models/m".into(), etag: updated.etag };
    client.delete_model(delete).await.unwrap();
    assert_error(client.get_model(get).await, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_need_a_tokenizer_and_scores_do_not() {
    let (service, version) = with_model("m").await;
    let mut client = service.generation();
    let text = v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Text("hello".into())),
        ..generate(&version.name, 1)
    };
    let failed = Code::FailedPrecondition;
    assert_error(client.generate(text).await, failed, "MODEL_UNSUITABLE", "");
    let tokenize = v1::TokenizeRequest {
        model: version.name.clone(),
        input: Some(v1::tokenize_request::Input::Text("hello".into())),
        ..Default::default()
    };
    assert_error(client.tokenize(tokenize).await, failed, "MODEL_UNSUITABLE", "");

    let score = |ids: &[u32]| v1::ScoreRequest {
        model: version.name.clone(),
        input: Some(v1::score_request::Input::Tokens(v1::TokenIds { ids: ids.into() })),
        ..Default::default()
    };
    let scored = client.score(score(&[1, 2, 3])).await.unwrap().into_inner();
    assert_eq!(scored.tokens.len(), 3);
    assert_eq!(scored.tokens[0].logprob, None);
    let sum: f64 = scored.tokens.iter().filter_map(|t| t.logprob).map(f64::from).sum();
    assert!((scored.total_logprob - sum).abs() < 1e-9 && sum < 0.0);
    assert!((scored.perplexity - (-sum / 2.0).exp()).abs() < 1e-9);
    let bad = client.score(score(&[])).await;
    assert_error(bad, Code::InvalidArgument, "INVALID_FIELD", "input");
    let bad = client.score(score(&[1, 4_000_000])).await.unwrap_err();
    assert_eq!((bad.code(), reason(&bad).as_str()), (Code::InvalidArgument, "INVALID_FIELD"));
    let prompt = v1::generate_request::Prompt::Tokens(v1::TokenIds { ids: Vec::new() });
    let bad = v1::GenerateRequest { prompt: Some(prompt), ..generate(&version.name, 1) };
    assert_eq!(client.generate(bad).await.unwrap_err().code(), Code::InvalidArgument);
    service.running.stop().await.unwrap();
}

/// A model with so many positions that a generation outlasts any test.
async fn with_endless_model(slots: usize) -> (Service, String) {
    let service = Service::start_with(|config| {
        config.limits.generation_slots = slots;
        config.limits.generation_queue = 0;
        config.limits.context = 1 << 20;
    })
    .await;
    let mut settings = random::tiny("llama");
    settings["max_position_embeddings"] = (1 << 20).into();
    let files = tempfile::tempdir().unwrap();
    let model = random::model(settings, 1).unwrap();
    export::hugging_face(&model, files.path(), Dtype::F32).unwrap();
    let name = service.import("endless", files.path()).await.name;
    (service, name)
}

/// Starts a generation as soon as there is a slot.
async fn eventually_generates(service: &Service, name: &str) -> Result<(), Status> {
    let started = std::time::Instant::now();
    loop {
        match service.generation().generate(generate(name, 1)).await {
            Ok(stream) => {
                let parts: Vec<_> = stream.into_inner().collect().await;
                return parts.into_iter().try_for_each(|p| p.map(|_| ()));
            }
            Err(status) if status.code() == Code::ResourceExhausted => {
                assert!(started.elapsed() < Duration::from_secs(10), "the slot was never freed");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(status) => return Err(status),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_or_runs_late_frees_its_slot() {
    let (service, name) = with_endless_model(1).await;
    let mut client = service.generation();
    let mut stream = client.generate(generate(&name, 1 << 19)).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let refused = client.generate(generate(&name, 1)).await;
    let retry = refused.as_ref().unwrap_err().get_error_details().retry_info().cloned().unwrap();
    let seconds = retry.retry_delay.unwrap().as_secs_f64();
    assert!((0.1..=30.0).contains(&seconds), "{seconds}");
    assert_error(refused, Code::ResourceExhausted, "LIMIT_REACHED", "");
    drop(stream);
    eventually_generates(&service, &name).await.unwrap();

    let mut request = Request::new(generate(&name, 1 << 19));
    request.metadata_mut().insert("grpc-timeout", "300m".parse().unwrap());
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let late = loop {
        match stream.message().await {
            Ok(part) => assert!(part.is_some(), "the stream ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(
        (late.code(), reason(&late).as_str()),
        (Code::DeadlineExceeded, "DEADLINE_EXCEEDED")
    );
    eventually_generates(&service, &name).await.unwrap();
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_that_begin_alike_are_computed_once_within_the_memory_for_them() {
    let service = Service::start_with(|config| {
        config.limits.kv_bytes = 1 << 20;
        config.limits.kv_format = KvFormat::Q8;
        config.limits.context = 1 << 20;
    })
    .await;
    let mut settings = random::tiny("llama");
    settings["max_position_embeddings"] = (1 << 20).into();
    let files = tempfile::tempdir().unwrap();
    let model = random::model(settings, 1).unwrap();
    export::hugging_face(&model, files.path(), Dtype::F32).unwrap();
    let name = service.import("tiny", files.path()).await.name;
    let ask = |ids: Vec<u32>, max_tokens| v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Tokens(v1::TokenIds { ids })),
        ..generate(&name, max_tokens)
    };
    let prompt: Vec<u32> = (0..150).map(|i| i % 96).collect();
    let mut answers = Vec::new();
    for known in [0, 128] {
        let answer = collect(&service, ask(prompt.clone(), 5)).await;
        let usage = answer.last().unwrap().usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.generated_tokens), (150, 5));
        assert_eq!(usage.cached_prompt_tokens, known);
        answers.push(answer.iter().flat_map(|a| &a.tokens).map(|t| t.id).collect::<Vec<_>>());
    }
    assert_eq!(answers[0], answers[1]);
    // 3 layers, keys and values of 2 heads: 16 codes and a scale each, 240 bytes a position.
    let refused = service.generation().generate(ask(prompt.clone(), 5000)).await;
    assert_error(refused, Code::ResourceExhausted, "TOO_LARGE", "max_tokens");
    let answer = collect(&service, ask(prompt, 300)).await;
    assert_eq!(answer.last().unwrap().usage.unwrap().generated_tokens, 300);
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_ends_watched_operations_and_they_resume() {
    let folder = tempfile::tempdir().unwrap();
    let service = Service::start_with(|c| c.data.folder = folder.path().to_owned()).await;
    let files = tempfile::tempdir().unwrap();
    write_model(files.path(), 1);
    service.import("m", files.path()).await;
    let request = v1::RunRecipeRequest {
        model: "models/m".into(),
        recipe: Some(magnitude("2:4")),
        ..Default::default()
    };
    let operation = service.jobs().run_recipe(request).await.unwrap().into_inner();
    let watch = v1::WatchOperationRequest { name: operation.name.clone(), after_sequence: 0 };
    let mut stream = service.jobs().watch_operation(watch).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    service.running.stop().await.unwrap();
    // It ended with the operation or with the server, but it ended.
    while let Ok(Some(_)) = stream.message().await {}

    let service = Service::start_with(|c| c.data.folder = folder.path().to_owned()).await;
    let finished = service.finished(&operation.name).await;
    let report: v1::RecipeReport = response(finished);
    assert_eq!(report.versions.len(), 2);

    let mut operations = service.operations();
    let request = lro::ListOperationsRequest { filter: "done=true".into(), ..Default::default() };
    let list = operations.list_operations(request).await.unwrap().into_inner().operations;
    assert_eq!(list.len(), 2);
    assert_eq!(list[0].name, operation.name, "newest first");
    let delete = lro::DeleteOperationRequest { name: operation.name.clone() };
    operations.delete_operation(delete).await.unwrap();
    let get = lro::GetOperationRequest { name: operation.name };
    let gone = operations.get_operation(get).await;
    assert_error(gone, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    service.running.stop().await.unwrap();
}
