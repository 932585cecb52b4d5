//! Adapters as they are trained here: by the API and by the command, on small models, to what serves.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use planish::formats::peft;
use planish::methods::docs;
use planish::models::export;
use planish::nn::dtype::Dtype;
use planish::nn::weight::{Dense, Weight};
use planish::proto::google::longrunning as lro;
use planish::proto::v1;
use planish::proto::v1::adapter_service_client::AdapterServiceClient;
use planish::proto::v1::import_adapter_request::Source;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::cli::Service as Program;
use crate::embedding;
use crate::harness::{Service, assert_error, import_dataset, metadata, response, upload};
use crate::support;

/// Questions with one answer each.
pub fn chats() -> String {
    let chat = |i: usize| {
        let answer = ["red, red, red", "blue blue"][i % 2];
        json!({ "messages": [
            { "role": "user", "content": format!("colour {i}?") },
            { "role": "assistant", "content": answer },
        ] })
    };
    (0..24).map(|i| format!("{}\n", chat(i))).collect()
}

pub struct World {
    pub service: Service,
    _files: TempDir,
}

impl World {
    /// A server with `models/tiny`, conversations as `datasets/chat` and a text as `datasets/prose`.
    pub async fn start() -> Self {
        let files = tempfile::tempdir().unwrap();
        let allowed = files.path().to_owned();
        let service = Service::start_with(|c| c.import.allow_paths = vec![allowed]).await;
        let world = Self { service, _files: files };
        let folder = support::tiny_model(world._files.path(), 2, 32);
        world.service.import("tiny", &folder).await;
        world.data("chat", "chat.jsonl", v1::DatasetKind::Chat, &chats()).await.unwrap();
        let prose = "The sea is wide and the night is long. ".repeat(40);
        world.data("prose", "prose.txt", v1::DatasetKind::Text, &prose).await.unwrap();
        world
    }

    pub async fn data(
        &self,
        id: &str,
        file: &str,
        kind: v1::DatasetKind,
        text: &str,
    ) -> Result<v1::Dataset, Status> {
        let header = v1::DatasetHeader {
            dataset_id: id.into(),
            file_name: file.into(),
            size_bytes: text.len() as i64,
            kind: kind.into(),
            ..Default::default()
        };
        import_dataset(self.service.datasets(), header, &[text.as_bytes()]).await
    }

    pub fn adapters(&self) -> AdapterServiceClient<Channel> {
        AdapterServiceClient::new(self.service.channel.clone())
    }

    pub async fn adapt(&self, request: v1::AdaptRequest) -> Result<lro::Operation, Status> {
        let operation = self.service.jobs().adapt(request).await?.into_inner();
        if operation.done {
            return Ok(operation);
        }
        Ok(self.service.finished(&operation.name).await)
    }

    pub async fn made(&self, request: v1::AdaptRequest) -> v1::AdaptReport {
        response(self.adapt(request).await.unwrap())
    }

    pub async fn ids(&self, model: &str, adapter: Option<&str>) -> Vec<u32> {
        let uses = adapter.map(|name| v1::AdapterUse { name: name.to_owned(), weight: None });
        let request = v1::GenerateRequest {
            model: model.into(),
            prompt: Some(v1::generate_request::Prompt::Text("[user] colour 3?\n".into())),
            max_tokens: 12,
            sampling: Some(v1::SamplingOptions { temperature: Some(0.0), ..Default::default() }),
            ignore_eos: true,
            adapters: uses.into_iter().collect(),
            ..Default::default()
        };
        let stream = self.service.generation().generate(request).await.unwrap().into_inner();
        let parts: Vec<_> = stream.map(Result::unwrap).collect().await;
        parts.iter().flat_map(|p| p.tokens.iter().map(|t| t.id)).collect()
    }

    pub async fn export(&self, name: &str, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        let request = v1::ExportAdapterRequest { name: name.to_owned(), form: 0 };
        let mut stream = self.adapters().export_adapter(request).await.unwrap().into_inner();
        let mut files: Vec<(String, Vec<u8>)> = Vec::new();
        while let Some(message) = stream.message().await.unwrap() {
            match message.part.unwrap() {
                v1::export_adapter_response::Part::File(f) => files.push((f.file_name, Vec::new())),
                v1::export_adapter_response::Part::Chunk(chunk) => {
                    files.last_mut().unwrap().1.extend_from_slice(&chunk);
                }
            }
        }
        for (name, bytes) in files {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
    }
}

/// A request from the JSON of its method and training.
pub fn request(id: &str, method: Value, training: Value) -> v1::AdaptRequest {
    v1::AdaptRequest {
        model: "models/tiny".into(),
        adapter_id: id.into(),
        adaptation: Some(serde_json::from_value(method).unwrap()),
        training: Some(serde_json::from_value(training).unwrap()),
        seed: 7,
        ..Default::default()
    }
}

pub fn lora() -> Value {
    json!({ "lora": { "adapter": { "r": 8, "alpha": 16, "targets": ["all-linear"] } } })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adapter_is_trained_serves_and_travels() {
    let world = World::start().await;
    let training = json!({
        "dataset": "datasets/chat", "steps": 600, "batch_size": 6, "learning_rate": 0.01,
        "validation": { "share": 0.25, "every_steps": 100 },
    });
    let plan = v1::AdaptRequest { validate_only: true, ..request("a", lora(), training.clone()) };
    let plan: v1::AdaptPlan = {
        let done = world.adapt(plan).await.unwrap();
        let Some(lro::operation::Result::Response(any)) = done.result else { panic!("no plan") };
        prost::Message::decode(any.value).unwrap()
    };
    assert!(plan.memory_bytes > 4 * plan.trained_parameters, "{plan:?}");
    assert_eq!(plan.training.as_ref().unwrap().batch_size, Some(6));

    let operation = world.service.jobs().adapt(request("a", lora(), training.clone())).await;
    let name = operation.unwrap().into_inner().name;
    let watch = v1::WatchOperationRequest { name: name.clone(), after_sequence: 0 };
    let mut looks = world.service.jobs().watch_operation(watch).await.unwrap().into_inner();
    let (mut seen, mut last) = (BTreeMap::new(), None);
    while let Some(look) = looks.message().await.unwrap() {
        seen.extend(look.event.into_iter().flat_map(|event| event.metrics));
        last = look.operation;
    }
    assert!(seen.contains_key("step") && seen.contains_key("steps"), "{seen:?}");
    let report: v1::AdaptReport = response(last.unwrap());
    let trained = report.training.clone().unwrap();
    assert_eq!((trained.steps, trained.points.len()), (600, 600));
    let first = &trained.validations[0];
    let best = trained.validations.iter().find(|v| v.step == trained.kept_step).unwrap();
    assert!(best.loss < 0.6 * first.loss, "{:?}", trained.validations);
    assert_eq!(report.trained_parameters, plan.trained_parameters);
    let (data, held) = (report.data.unwrap(), report.validation.unwrap());
    assert_eq!((data.records, data.sequences, held.sequences), (24, 18, 6));
    let curve = v1::RenderTrainingRequest {
        source: Some(v1::render_training_request::Source::Name(name.clone())),
        view: v1::TrainingView::Csv.into(),
    };
    let curve = world.service.jobs().render_training(curve).await.unwrap().into_inner();
    assert!(curve.content.iter().filter(|b| **b == b'\n').count() > 600);

    // It answers otherwise, and as the merged model does.
    let adapter = v1::GetAdapterRequest { name: report.adapter.clone() };
    let adapter = world.adapters().get_adapter(adapter).await.unwrap().into_inner();
    assert_eq!((adapter.source, adapter.digest.clone()), (name, report.digest.clone()));
    assert_eq!((adapter.max_rank, adapter.linear_count), (8, 14));
    let lineage = adapter.lineage.unwrap();
    assert_eq!((lineage.seed, lineage.data_digests.len()), (7, 1));
    let files = tempfile::tempdir().unwrap();
    world.export("adapters/a", files.path()).await;
    let mut merged = support::tiny(2, 32);
    for (name, factors) in &peft::read(files.path()).unwrap().linears {
        let mut dense = merged.weights[name].to_f32();
        factors.add_to(1.0, &mut dense);
        let weight = Dense::from_f32(factors.shape().into(), &dense, Dtype::F32).unwrap();
        merged.weights.insert(name.clone(), Arc::new(Weight::Dense(weight)));
    }
    let folder = tempfile::tempdir().unwrap();
    export::hugging_face(&merged, folder.path(), Dtype::F32).unwrap();
    world.service.import("merged", folder.path()).await;
    let with = world.ids("models/tiny", Some("adapters/a")).await;
    assert_eq!(with, world.ids("models/merged", None).await);
    assert_ne!(with, world.ids("models/tiny", None).await);

    // The same files come in again as the same bytes.
    let mut uploaded = Vec::new();
    for name in [peft::CONFIG, peft::WEIGHTS] {
        let bytes = std::fs::read(files.path().join(name)).unwrap();
        let mut file = upload(world.service.models(), &bytes).await.unwrap();
        file.file_name = name.to_owned();
        uploaded.push(file);
    }
    let import = v1::ImportAdapterRequest {
        adapter_id: "back".into(),
        base: "models/tiny".into(),
        source: Some(Source::Uploaded(v1::UploadedFiles { files: uploaded })),
        ..Default::default()
    };
    let back = world.adapters().import_adapter(import).await.unwrap().into_inner();
    assert_eq!((back.digest, back.lineage), (report.digest.clone(), None));
    // So does the same training.
    assert_eq!(world.made(request("again", lora(), training)).await.digest, report.digest);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_trained_is_refused_with_a_reason() {
    let world = World::start().await;
    let training = |more: Value| {
        let mut all = json!({ "dataset": "datasets/chat", "steps": 4, "batch_size": 4 });
        for (name, value) in more.as_object().unwrap() {
            all[name] = value.clone();
        }
        all
    };
    let ask = |method: Value, more: Value| world.adapt(request("x", method, training(more)));
    let invalid = Code::InvalidArgument;
    for (method, more, reason, field) in [
        (json!({}), json!({}), "INVALID_RECIPE", ""),
        (
            json!({ "lora": { "adapter": { "r": 0 } } }),
            json!({}),
            "INVALID_OPTION",
            "adaptation.lora.adapter.r",
        ),
        (lora(), json!({ "batch_size": 0 }), "INVALID_OPTION", "training.batch_size"),
        (lora(), json!({ "dataset": "" }), "INVALID_FIELD", "training.dataset"),
    ] {
        assert_error(ask(method, more).await, invalid, reason, field);
    }
    let missing = ask(lora(), json!({ "dataset": "datasets/none" })).await;
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", "training.dataset");
    world
        .data("classes", "c.csv", v1::DatasetKind::Classification, "text,label\na,b\nc,d\n")
        .await
        .unwrap();
    let other = ask(lora(), json!({ "dataset": "datasets/classes" })).await.unwrap_err();
    assert!(other.message().contains("texts or conversations"), "{other:?}");
    // A line that is no conversation never becomes a data set.
    let broken = chats().replacen("\"assistant\"", "\"assistant", 1);
    let broken =
        world.data("broken", "chat.jsonl", v1::DatasetKind::Chat, &broken).await.unwrap_err();
    assert!(broken.message().contains("line 1"), "{broken:?}");

    let failed = |operation: lro::Operation| match operation.result {
        Some(lro::operation::Result::Error(status)) => status.message,
        other => panic!("no error: {other:?}"),
    };
    let small = ask(lora(), json!({ "memory_bytes": 1000 })).await.unwrap();
    let message = failed(small);
    assert!(message.contains("of memory") && message.contains("may be used"), "{message}");
    let wild = json!({ "learning_rate": 1e6, "warmup_share": 0.0, "clip_norm": 0.0, "steps": 9 });
    let strong = json!({ "lora": { "adapter": { "targets": ["all-linear"], "alpha": 1e38 } } });
    let message = failed(ask(strong, wild).await.unwrap());
    for part in ["update ", "not finite", "lower learning_rate"] {
        assert!(message.contains(part), "{message}");
    }
    let get = v1::GetAdapterRequest { name: "adapters/x".into() };
    assert_error(world.adapters().get_adapter(get).await, Code::NotFound, "RESOURCE_NOT_FOUND", "");

    // Cancelled: nothing stays.
    let long = request("x", lora(), training(json!({ "steps": 1_000_000, "checkpoint_every": 2 })));
    let name = world.service.jobs().adapt(long).await.unwrap().into_inner().name;
    let watch = v1::WatchOperationRequest { name: name.clone(), after_sequence: 0 };
    let mut looks = world.service.jobs().watch_operation(watch).await.unwrap().into_inner();
    while let Some(look) = looks.message().await.unwrap() {
        let metrics = look.event.map(|event| event.metrics).unwrap_or_default();
        if metrics.get("step").is_some_and(|step| *step > 2.0) {
            break;
        }
    }
    let cancel = lro::CancelOperationRequest { name: name.clone() };
    world.service.operations().cancel_operation(cancel).await.unwrap();
    let ended = world.service.finished(&name).await;
    assert_eq!(metadata(&ended).state(), v1::OperationState::Cancelled);
    let get = v1::GetAdapterRequest { name: "adapters/x".into() };
    assert_error(world.adapters().get_adapter(get).await, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let mut kept = Vec::new();
    walk(world.service.folder.path(), &mut |path| {
        if path.to_string_lossy().contains("/kept/") {
            kept.push(path.to_owned());
        }
    });
    assert!(kept.is_empty(), "{kept:?}");
}

fn walk(folder: &Path, see: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        see(&path);
        if path.is_dir() {
            walk(&path, see);
        }
    }
}

/// A method with options that suit tiny models.
fn small(method: &str) -> Value {
    let adapter = json!({ "r": 4, "targets": ["q_proj", "v_proj"] });
    let options = match method {
        "full" | "head_only" | "bitfit" => json!({}),
        "adalora" => json!({ "adapter": adapter, "target_r": 2 }),
        "lora_sb" => json!({ "adapter": adapter, "init_samples": 6, "init_batch": 3 }),
        "sora" => json!({ "adapter": adapter, "xi": 1e-4 }),
        "nola" => json!({ "adapter": adapter, "basis_a": 8, "basis_b": 8 }),
        "corda" => json!({
            "adapter": adapter, "mode": "CORDA_MODE_INSTRUCTION_PREVIEWED",
            "context": { "dataset": "datasets/prose", "sequences": 4, "sequence_length": 16 },
        }),
        _ => json!({ "adapter": adapter }),
    };
    json!({ method: options })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_trains_a_decoder_as_it_said() {
    let world = World::start().await;
    let rounded = v1::RunRecipeRequest {
        model: "models/tiny".into(),
        recipe: Some(
            serde_json::from_value(
                json!({ "steps": [{ "round_to_nearest": { "grid": { "group_size": 16 } } }] }),
            )
            .unwrap(),
        ),
        ..Default::default()
    };
    let operation = world.service.jobs().run_recipe(rounded).await.unwrap().into_inner();
    let rounded: v1::RecipeReport = response(world.service.finished(&operation.name).await);
    for method in docs::adaptations() {
        // The tiny Llama has no biases, and no head but its own.
        if matches!(method.as_str(), "head_only" | "bitfit") {
            let training = json!({ "dataset": "datasets/chat", "steps": 3 });
            let refused = world.adapt(request("none", small(&method), training)).await.unwrap_err();
            assert_eq!(refused.code(), Code::FailedPrecondition, "{method}: {refused:?}");
            continue;
        }
        let ask = |id: &str, seed: u64| {
            let training = json!({
                "dataset": "datasets/chat", "steps": 3, "batch_size": 4, "learning_rate": 1e-3,
                "warmup_share": 0.0,
            });
            let id = format!("{}-{id}", method.replace('_', "-"));
            let mut request = v1::AdaptRequest { seed, ..request(&id, small(&method), training) };
            if method == "qlora" {
                request.model.clone_from(&rounded.versions[0]);
            }
            request
        };
        let plan = world.adapt(v1::AdaptRequest { validate_only: true, ..ask("a", 1) }).await;
        let Some(lro::operation::Result::Response(any)) = plan.unwrap().result else {
            panic!("{method}: no plan")
        };
        let plan: v1::AdaptPlan = prost::Message::decode(any.value).unwrap();
        let a = world.made(ask("a", 1)).await;
        let b = world.made(ask("b", 1)).await;
        assert_eq!(a.trained_parameters, plan.trained_parameters, "{method}");
        assert_eq!(a.frozen_parameters, plan.frozen_parameters, "{method}");
        assert_eq!(a.digest, b.digest, "{method}: the same seed gives the same bytes");
        assert_ne!(a.digest, world.made(ask("c", 2)).await.digest, "{method}: seeds differ");
        let training = a.training.unwrap();
        assert!(training.points.iter().all(|p| p.loss.is_finite()), "{method}");
        let get = v1::GetAdapterRequest { name: a.adapter.clone() };
        let adapter = world.adapters().get_adapter(get).await.unwrap().into_inner();
        let served = method != "full";
        let plain = served && method != "dora";
        assert_eq!(adapter.method() == v1::AdapterMethod::Lora, plain, "{method}");
        assert_eq!(a.warnings.iter().any(|w| w.contains("merge")), !served, "{method}");
        let load = v1::LoadAdapterRequest { name: a.adapter.clone() };
        let loaded = world.adapters().load_adapter(load).await;
        match served {
            true => assert!(loaded.unwrap().into_inner().resident_bytes > 0, "{method}"),
            false => assert!(loaded.unwrap_err().message().contains("merge"), "{method}"),
        }
        let own = ["lora_xs", "lora_sb", "loldu", "nola", "full"].contains(&method.as_str());
        let names: Vec<_> = adapter.files.iter().map(|f| f.file_name.as_str()).collect();
        assert_eq!(names.contains(&"adapter.safetensors"), own, "{method}: {names:?}");
        assert_eq!(names.contains(&peft::WEIGHTS), method != "full", "{method}: {names:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encoder_learns_classes_tags_and_numbers() {
    let world = World::start().await;
    let files = tempfile::tempdir().unwrap();
    embedding::write_encoder(files.path());
    world.service.import("reader", files.path()).await;
    let mut classes = String::from("text,label\n");
    let mut numbers = String::from("text,label\n");
    let mut tags = String::new();
    for i in 0..30 {
        let (word, label) = if i % 2 == 0 { ("w1", "up") } else { ("w70", "down") };
        classes += &format!("{word} w{} {word},{label}\n", 10 + i);
        numbers += &format!("{word} w{},{}\n", 10 + i, i % 2);
        tags += &format!("{word} {label}\nw{} O\n\n", 10 + i);
    }
    world.data("classes", "a.csv", v1::DatasetKind::Classification, &classes).await.unwrap();
    world.data("numbers", "b.csv", v1::DatasetKind::Regression, &numbers).await.unwrap();
    world.data("tags", "c.conll", v1::DatasetKind::Tagging, &tags).await.unwrap();
    for (data, method) in [
        ("classes", json!({ "lora": { "adapter": { "targets": ["all-linear"] } } })),
        ("numbers", json!({ "head_only": {} })),
        ("tags", json!({ "bitfit": {} })),
    ] {
        let training = json!({
            "dataset": format!("datasets/{data}"), "steps": 60, "batch_size": 10,
            "learning_rate": 0.01, "validation": { "share": 0.2, "every_steps": 20 },
        });
        let request =
            v1::AdaptRequest { model: "models/reader".into(), ..request(data, method, training) };
        let report = world.made(request).await;
        let training = report.training.unwrap();
        let (first, last) = (&training.validations[0], training.validations.last().unwrap());
        assert!(last.loss < first.loss, "{data}: {:?}", training.validations);
        assert_eq!(last.accuracy.is_some(), data != "numbers");
        if data == "classes" {
            assert!(last.accuracy.unwrap() > 0.9, "{:?}", training.validations);
        }
        let get = v1::GetAdapterRequest { name: report.adapter };
        let adapter = world.adapters().get_adapter(get).await.unwrap().into_inner();
        assert_eq!(adapter.method(), v1::AdapterMethod::Head);
        let labels = adapter.lineage.unwrap().labels.len();
        assert_eq!(
            labels,
            match data {
                "classes" => 2,
                "tags" => 3,
                _ => 0,
            }
        );
        assert!(report.warnings.is_empty(), "{:?}", report.warnings);
    }
    let text = json!({ "dataset": "datasets/prose" });
    let method = json!({ "lora": {} });
    let text = v1::AdaptRequest { model: "models/reader".into(), ..request("t", method, text) };
    let error = world.adapt(text).await.unwrap_err();
    assert!(error.message().contains("classes, numbers or tags"), "{error:?}");
}

#[test]
fn a_killed_service_finishes_its_adapter_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    support::tiny_model(folder.path(), 4, 128);
    let at = folder.path().display().to_string();
    std::fs::write(folder.path().join("chat.jsonl"), chats()).unwrap();
    let file = "seed = 5\n[adaptation.lora.adapter]\nr = 8\ndropout = 0.1\n\
                targets = [\"all-linear\"]\n[training]\ndataset = \"datasets/chat\"\n\
                steps = 400\nbatch_size = 12\nlearning_rate = 1e-3\ncheckpoint_every = 3\n\
                checkpoint_activations = true\n[training.validation]\nshare = 0.25\n\
                every_steps = 100\n";
    std::fs::write(folder.path().join("lora.toml"), file).unwrap();
    let prepare = |service: &Program| {
        service.run(&format!("models import {at}/tiny"));
        service.run(&format!("datasets import {at}/chat.jsonl --kind chat"));
    };
    let adapt = format!("adapt {at}/lora.toml --model tiny --adapter poems");

    let calm = Program::start(&folder.path().join("calm"), &[]);
    prepare(&calm);
    let shown = calm.run(&adapt);
    for part in ["validation loss", "adapters/poems made for tiny@1", "learnt from datasets/chat"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let expected = calm.json("adapters show poems")["digest"].clone();
    let again = calm.fail(1, &adapt);
    assert!(again.contains("exists"), "{again}");
    let checked = calm.json(&format!("{} --validate-only", adapt.replace("poems", "more")));
    assert_eq!(checked["response"]["training"]["steps"], 400);
    calm.kill();

    let data = folder.path().join("data");
    let service = Program::start(&data, &[]);
    prepare(&service);
    let job = service.json(&format!("{adapt} --detach"))["name"].as_str().unwrap().to_owned();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = service.json(&format!("jobs show {job}"));
        assert_ne!(now["done"], true, "the job is too short to be interrupted: {now}");
        if now["metadata"]["metrics"]["step"].as_f64().is_some_and(|step| step >= 6.0) {
            break;
        }
        assert!(Instant::now() < deadline, "the job does not get on: {now}");
    }
    service.kill();

    let service = Program::start(&data, &[]);
    service.run(&format!("jobs watch {job} --timeout 120s"));
    let done = service.json(&format!("jobs show {job}"));
    assert_eq!(done["metadata"]["state"], "OPERATION_STATE_SUCCEEDED");
    assert_eq!(done["metadata"]["attempt"], 2);
    assert_eq!(done["response"]["digest"], expected);
    assert_eq!(service.json("adapters show poems")["digest"], expected);
}
