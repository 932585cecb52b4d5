//! Adapters: imported, listed, loaded, asked for by requests, and taken out again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use futures::StreamExt as _;
use planish::config::Config;
use planish::formats::{peft, safetensors};
use planish::models::decoder::{Config as Decoder, random};
use planish::models::{Model, export};
use planish::nn::adapter::Adapter;
use planish::nn::dtype::Dtype;
use planish::nn::weight::{Dense, Weight};
use planish::proto::v1;
use planish::proto::v1::adapter_service_client::AdapterServiceClient;
use planish::proto::v1::import_adapter_request::Source;
use serde_json::json;
use tonic::Code;
use tonic::transport::Channel;

use crate::cli::Service as Program;
use crate::harness::{Service, assert_error, upload};

const RANK: usize = 8;

fn model() -> Model {
    random::model(random::tiny("llama"), 1).unwrap()
}

fn adapter(seed: u64) -> Adapter {
    let config = Decoder::from_hugging_face(&random::tiny("llama")).unwrap();
    random::adapter(&config, RANK, 1.0, seed, |name| !name.contains("k_proj")).unwrap()
}

/// The folder that PEFT would write.
fn write(adapter: &Adapter, folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "base_model_name_or_path": "tiny", "init_lora_weights": true, "use_dora": false,
    });
    std::fs::write(folder.join(peft::CONFIG), config.to_string()).unwrap();
    let mut tensors = BTreeMap::new();
    for (name, factors) in &adapter.linears {
        let module = name.strip_suffix(".weight").unwrap();
        let ([rows, cols], rank) = (factors.shape(), factors.rank());
        let a: Vec<f32> = factors.a().iter().map(|v| v.to_f32()).collect();
        // Kept transposed.
        let b: Vec<f32> =
            (0..rows * rank).map(|i| factors.b()[i % rank * rows + i / rank].to_f32()).collect();
        tensors.insert(format!("base_model.model.{module}.lora_A.weight"), (vec![rank, cols], a));
        tensors.insert(format!("base_model.model.{module}.lora_B.weight"), (vec![rows, rank], b));
    }
    let plans: Vec<_> = tensors
        .iter()
        .map(|(name, (shape, _))| safetensors::Plan {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: shape.clone(),
        })
        .collect();
    let mut data = |plan: &safetensors::Plan, out: &mut dyn std::io::Write| {
        for value in &tensors[&plan.name].1 {
            out.write_all(&value.to_le_bytes())?;
        }
        Ok(())
    };
    safetensors::write(&folder.join(peft::WEIGHTS), &plans, &mut data).unwrap();
}

/// The model with an adapter put into its weights.
fn merged(parts: &[(&Adapter, f32)]) -> Model {
    let mut model = model();
    for (adapter, by) in parts {
        for (name, factors) in &adapter.linears {
            let mut dense = model.weights[name].to_f32();
            factors.add_to(*by, &mut dense);
            let weight = Dense::from_f32(factors.shape().into(), &dense, Dtype::F32).unwrap();
            model.weights.insert(name.clone(), Arc::new(Weight::Dense(weight)));
        }
    }
    model
}

/// A service with `models/m` and, as `adapters/a` and `adapters/b`, adapters of seeds 1 and 2.
struct World {
    service: Service,
    files: tempfile::TempDir,
}

impl World {
    async fn start(change: impl FnOnce(&mut Config)) -> Self {
        let files = tempfile::tempdir().unwrap();
        let allowed = files.path().to_owned();
        let service = Service::start_with(|config| {
            config.import.allow_paths = vec![allowed];
            change(config);
        })
        .await;
        let world = Self { service, files };
        world.import_model("m", &model()).await;
        for (id, seed) in [("a", 1), ("b", 2)] {
            write(&adapter(seed), &world.files.path().join(id));
            world.adapters().import_adapter(world.import(id)).await.unwrap();
        }
        world
    }

    async fn import_model(&self, id: &str, model: &Model) -> v1::ModelVersion {
        let folder = tempfile::tempdir().unwrap();
        export::hugging_face(model, folder.path(), Dtype::F32).unwrap();
        self.service.import(id, folder.path()).await
    }

    fn adapters(&self) -> AdapterServiceClient<Channel> {
        AdapterServiceClient::new(self.service.channel.clone())
    }

    fn import(&self, id: &str) -> v1::ImportAdapterRequest {
        let path = self.files.path().join(id).to_str().unwrap().to_owned();
        v1::ImportAdapterRequest {
            adapter_id: id.into(),
            base: "models/m".into(),
            source: Some(Source::Path(path)),
            ..Default::default()
        }
    }

    /// The likeliest tokens, with adapters.
    async fn ids(&self, model: &str, adapters: &[(&str, f32)]) -> Vec<u32> {
        let mut client = self.service.generation();
        let stream = loop {
            match client.generate(generate(model, adapters, 12)).await {
                Ok(stream) => break stream.into_inner(),
                // The request before this one has answered, but its slot still holds its adapters.
                Err(status) if status.code() == Code::ResourceExhausted => {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                }
                Err(status) => panic!("{status:?}"),
            }
        };
        let parts: Vec<_> = stream.map(Result::unwrap).collect().await;
        parts.iter().flat_map(|p| p.tokens.iter().map(|t| t.id)).collect()
    }
}

fn uses(adapters: &[(&str, f32)]) -> Vec<v1::AdapterUse> {
    let one = |(id, weight): &(&str, f32)| v1::AdapterUse {
        name: format!("adapters/{id}"),
        weight: (*weight != 1.0).then_some(*weight),
    };
    adapters.iter().map(one).collect()
}

fn generate(model: &str, adapters: &[(&str, f32)], max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: model.into(),
        prompt: Some(v1::generate_request::Prompt::Tokens(v1::TokenIds {
            ids: vec![1, 2, 3, 4, 5],
        })),
        max_tokens,
        sampling: Some(v1::SamplingOptions { temperature: Some(0.0), ..Default::default() }),
        ignore_eos: true,
        adapters: uses(adapters),
        ..Default::default()
    }
}

fn named(name: &str) -> String {
    format!("adapters/{name}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_in_one_batch_have_their_own_adapters() {
    let world = World::start(|_| {}).await;
    let (a, b) = (adapter(1), adapter(2));
    type Choice<'a> = (&'a str, &'a [(&'a str, f32)], &'a [(&'a Adapter, f32)]);
    let choices: [Choice<'_>; 5] = [
        ("none", &[], &[]),
        ("with-a", &[("a", 1.0)], &[(&a, 1.0)]),
        ("with-b", &[("b", 1.0)], &[(&b, 1.0)]),
        ("both", &[("a", 0.5), ("b", -0.5)], &[(&a, 0.5), (&b, -0.5)]),
        ("off", &[("a", 0.0)], &[]),
    ];
    let mut want = Vec::new();
    for (id, _, parts) in choices {
        world.import_model(id, &merged(parts)).await;
        want.push(world.ids(&format!("models/{id}"), &[]).await);
    }
    let together = choices.iter().map(|(_, adapters, _)| world.ids("models/m", adapters));
    let got = futures::future::join_all(together).await;
    assert_eq!(got, want);
    assert_eq!(want[0], want[4]);
    for (i, ids) in want.iter().enumerate().take(4) {
        assert_eq!(ids.len(), 12);
        assert!(!want[..i].contains(ids), "the adapters change the answer");
    }

    // Scores too.
    let score = |model: &str, adapters: &[(&str, f32)]| v1::ScoreRequest {
        model: model.into(),
        input: Some(v1::score_request::Input::Tokens(v1::TokenIds { ids: want[1].clone() })),
        adapters: uses(adapters),
    };
    let mut client = world.service.generation();
    let with = client.score(score("models/m", &[("a", 1.0)])).await.unwrap().into_inner();
    let alone = client.score(score("models/with-a", &[])).await.unwrap().into_inner();
    let base = client.score(score("models/m", &[])).await.unwrap().into_inner();
    assert!((with.total_logprob - alone.total_logprob).abs() < 1e-3);
    assert!((with.total_logprob - base.total_logprob).abs() > 0.1);

    // An adapter serves the compressed versions of its model as well.
    let grid = v1::Grid { bits: Some(8), group_size: Some(16), ..Default::default() };
    let method = v1::step::Method::RoundToNearest(v1::RoundToNearest { grid: Some(grid) });
    let recipe =
        v1::Recipe { steps: vec![v1::Step { method: Some(method) }], ..Default::default() };
    let request = v1::RunRecipeRequest {
        model: "models/m".into(),
        recipe: Some(recipe),
        ..Default::default()
    };
    let operation = world.service.jobs().run_recipe(request).await.unwrap().into_inner();
    world.service.finished(&operation.name).await;
    let small = client.score(score("models/m/versions/2", &[("a", 1.0)])).await.unwrap();
    assert!((small.into_inner().total_logprob - with.total_logprob).abs() < 1.0);
    world.service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_come_and_go() {
    let world = World::start(|_| {}).await;
    let mut client = world.adapters();
    let a = client.get_adapter(v1::GetAdapterRequest { name: named("a") }).await;
    let a = a.unwrap().into_inner();
    assert_eq!((a.name.as_str(), a.base_model.as_str()), ("adapters/a", "models/m"));
    assert_eq!(
        (a.base_version.as_str(), a.method()),
        ("models/m/versions/1", v1::AdapterMethod::Lora)
    );
    assert_eq!((a.min_rank, a.max_rank, a.max_scale, a.linear_count), (8, 8, 1.0, 18));
    assert_eq!(
        a.target_modules,
        ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    );
    assert_eq!(a.parameter_count as u64, adapter(1).parameters());
    assert_eq!(a.resident_bytes, 2 * a.parameter_count);

    // The same again, by upload this time: the same content has the same digest.
    let mut files = Vec::new();
    for name in [peft::CONFIG, peft::WEIGHTS] {
        let bytes = std::fs::read(world.files.path().join("a").join(name)).unwrap();
        let mut file = upload(world.service.models(), &bytes).await.unwrap();
        file.file_name = name.into();
        files.push(file);
    }
    let uploaded = v1::ImportAdapterRequest {
        adapter_id: "c".into(),
        base: "models/m/versions/1".into(),
        source: Some(Source::Uploaded(v1::UploadedFiles { files: files.clone() })),
        display_name: "a copy".into(),
        request_id: "r".into(),
        validate_only: true,
    };
    let looked = client.import_adapter(uploaded.clone()).await.unwrap().into_inner();
    assert_eq!((looked.max_rank, looked.etag.as_str()), (8, ""));
    let gone = client.get_adapter(v1::GetAdapterRequest { name: named("c") }).await;
    assert_error(gone, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let uploaded = v1::ImportAdapterRequest { validate_only: false, ..uploaded };
    let c = client.import_adapter(uploaded.clone()).await.unwrap().into_inner();
    assert_eq!((c.digest == a.digest, c.source.as_str()), (true, "upload"));
    let again = client.import_adapter(uploaded.clone()).await.unwrap().into_inner();
    assert_eq!(again, c);
    let other = v1::ImportAdapterRequest { adapter_id: "d".into(), ..uploaded.clone() };
    let reused = client.import_adapter(other).await;
    assert_error(reused, Code::AlreadyExists, "REQUEST_ID_REUSED", "");
    let taken = v1::ImportAdapterRequest { request_id: String::new(), ..uploaded };
    let taken = client.import_adapter(taken).await;
    assert_error(taken, Code::AlreadyExists, "RESOURCE_EXISTS", "");

    let list = v1::ListAdaptersRequest {
        page_size: 2,
        base_model: "models/m".into(),
        ..Default::default()
    };
    let page = client.list_adapters(list.clone()).await.unwrap().into_inner();
    let names: Vec<_> = page.adapters.iter().map(|a| a.name.as_str()).collect();
    assert_eq!(names, ["adapters/a", "adapters/b"]);
    let rest = v1::ListAdaptersRequest { page_token: page.next_page_token, ..list };
    let rest = client.list_adapters(rest).await.unwrap().into_inner();
    assert_eq!((rest.adapters.len(), rest.next_page_token.as_str()), (1, ""));
    let others = v1::ListAdaptersRequest { base_model: "models/x".into(), ..Default::default() };
    assert!(client.list_adapters(others).await.unwrap().into_inner().adapters.is_empty());

    // What comes out is what went in.
    let export = v1::ExportAdapterRequest { name: named("a"), form: 0 };
    let mut stream = client.export_adapter(export).await.unwrap().into_inner();
    let mut got: Vec<(String, Vec<u8>)> = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        match message.part.unwrap() {
            v1::export_adapter_response::Part::File(file) => got.push((file.file_name, Vec::new())),
            v1::export_adapter_response::Part::Chunk(chunk) => {
                got.last_mut().unwrap().1.extend_from_slice(&chunk);
            }
        }
    }
    assert_eq!(got.len(), 2);
    for (name, bytes) in got {
        assert_eq!(bytes, std::fs::read(world.files.path().join("a").join(name)).unwrap());
    }

    // Loaded, held by a request, deleted meanwhile.
    let load = v1::LoadAdapterRequest { name: named("b") };
    let loaded = client.load_adapter(load).await.unwrap().into_inner();
    assert_eq!(loaded.resident_bytes, a.resident_bytes);
    let want = world.ids("models/m", &[("b", 1.0)]).await;
    let long = generate("models/m", &[("b", 1.0)], 200);
    let mut stream = world.service.generation().generate(long).await.unwrap().into_inner();
    let mut ids: Vec<u32> = Vec::new();
    ids.extend(stream.message().await.unwrap().unwrap().tokens.iter().map(|t| t.id));
    let stale = v1::DeleteAdapterRequest { name: named("b"), etag: "stale".into() };
    assert_error(client.delete_adapter(stale).await, Code::Aborted, "ETAG_MISMATCH", "");
    let delete = |id: &str| v1::DeleteAdapterRequest { name: named(id), etag: String::new() };
    client.delete_adapter(delete("b")).await.unwrap();
    while let Some(part) = stream.message().await.unwrap() {
        ids.extend(part.tokens.iter().map(|t| t.id));
    }
    assert_eq!(ids.len(), 200);
    assert_eq!(ids[..12], want);
    let gone = world.service.generation().generate(generate("models/m", &[("b", 1.0)], 1)).await;
    assert_error(gone, Code::NotFound, "RESOURCE_NOT_FOUND", "adapters[0].name");

    let unload = v1::UnloadAdapterRequest { name: named("a") };
    client.unload_adapter(unload).await.unwrap();
    world.ids("models/m", &[("a", 1.0)]).await;

    // A model goes after its adapters; an object that two adapters share goes with the last of
    // them.
    let models =
        |id: &str| v1::DeleteModelRequest { name: format!("models/{id}"), ..Default::default() };
    let used = world.service.models().delete_model(models("m")).await;
    assert_error(used, Code::FailedPrecondition, "RESOURCE_IN_USE", "");
    client.delete_adapter(delete("a")).await.unwrap();
    world.ids("models/m", &[("c", 1.0)]).await;
    client.delete_adapter(delete("c")).await.unwrap();
    world.service.models().delete_model(models("m")).await.unwrap();
    world.service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_adapters_and_requests_are_refused() {
    let world = World::start(|_| {}).await;
    let mut settings = random::tiny("llama");
    settings["hidden_size"] = 48.into();
    world.import_model("other", &random::model(settings, 1).unwrap()).await;
    world.import_model("twin", &model()).await;
    let mut client = world.service.generation();
    let bad = Code::InvalidArgument;
    let nine: Vec<_> = (0..9).map(|_| ("a", 1.0)).collect();
    for (model, adapters, code, reason, field) in [
        ("m", &[("nobody", 1.0)][..], Code::NotFound, "RESOURCE_NOT_FOUND", "adapters[0].name"),
        ("twin", &[("a", 1.0)], Code::FailedPrecondition, "MODEL_UNSUITABLE", "adapters[0].name"),
        ("m", &[("a", 1.0), ("b", f32::NAN)], bad, "INVALID_FIELD", "adapters[1].weight"),
        ("m", &[("a", 101.0)], bad, "INVALID_FIELD", "adapters[0].weight"),
        ("m", &[("a", 1.0), ("a", 0.5)], bad, "INVALID_FIELD", "adapters[1].name"),
        ("m", &[("A b", 1.0)], bad, "INVALID_NAME", "adapters[0].name"),
        ("m", &nine, bad, "INVALID_FIELD", "adapters"),
    ] {
        let model = format!("models/{model}");
        assert_error(client.generate(generate(&model, adapters, 1)).await, code, reason, field);
        let score = v1::ScoreRequest {
            model,
            input: Some(v1::score_request::Input::Tokens(v1::TokenIds { ids: vec![1, 2] })),
            adapters: uses(adapters),
        };
        assert_error(client.score(score).await, code, reason, field);
    }

    let mut client = world.adapters();
    let import = v1::ImportAdapterRequest { adapter_id: "n".into(), ..world.import("a") };
    let misfit = v1::ImportAdapterRequest { base: "models/other".into(), ..import.clone() };
    assert_error(
        client.import_adapter(misfit).await,
        Code::FailedPrecondition,
        "MODEL_UNSUITABLE",
        "",
    );
    let nobody = v1::ImportAdapterRequest { base: "models/nobody".into(), ..import.clone() };
    assert_error(client.import_adapter(nobody).await, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let unnamed = v1::ImportAdapterRequest { base: "m".into(), ..import.clone() };
    assert_error(client.import_adapter(unnamed).await, bad, "INVALID_NAME", "base");
    let id = v1::ImportAdapterRequest { adapter_id: "N".into(), ..import.clone() };
    assert_error(client.import_adapter(id).await, bad, "INVALID_NAME", "adapter_id");
    let sourceless = v1::ImportAdapterRequest { source: None, ..import.clone() };
    assert_error(client.import_adapter(sourceless).await, bad, "INVALID_FIELD", "source");
    for path in ["/etc", "/", "relative", ""] {
        let request =
            v1::ImportAdapterRequest { source: Some(Source::Path(path.into())), ..import.clone() };
        let refused = client.import_adapter(request).await;
        assert_error(refused, Code::PermissionDenied, "PERMISSION_DENIED", "path");
    }

    // Folders that lie, and a link out of an allowed folder.
    let folder = world.files.path().join("n");
    let lying = v1::ImportAdapterRequest {
        source: Some(Source::Path(folder.to_str().unwrap().into())),
        ..import.clone()
    };
    write(&adapter(3), &folder);
    std::fs::write(folder.join(peft::CONFIG), r#"{"peft_type": "LORA", "r": 4}"#).unwrap();
    assert_error(client.import_adapter(lying.clone()).await, bad, "MALFORMED_FILE", "");
    std::fs::write(folder.join(peft::CONFIG), r#"{"peft_type": "VERA"}"#).unwrap();
    assert_error(client.import_adapter(lying.clone()).await, bad, "UNSUPPORTED_FORMAT", "");
    std::fs::remove_file(folder.join(peft::CONFIG)).unwrap();
    let inside = world.files.path().join("a").join(peft::CONFIG);
    std::os::unix::fs::symlink(inside, folder.join(peft::CONFIG)).unwrap();
    let refused = client.import_adapter(lying).await;
    assert_error(refused, Code::FailedPrecondition, "SOURCE_UNAVAILABLE", "");

    let file = |name: &str, digest: String| v1::ModelFile {
        file_name: name.into(),
        digest,
        size_bytes: 0,
    };
    let digest = format!("sha256:{}", "0".repeat(64));
    for (files, code, reason, field) in [
        (vec![], bad, "INVALID_FIELD", "uploaded.files"),
        (vec![file("../x", digest.clone())], bad, "INVALID_FIELD", "uploaded.files[0].file_name"),
        (vec![file("x", "y".into())], bad, "INVALID_FIELD", "uploaded.files[0].digest"),
        (vec![file("x", digest)], Code::NotFound, "RESOURCE_NOT_FOUND", "uploaded.files[0].digest"),
    ] {
        let source = Some(Source::Uploaded(v1::UploadedFiles { files }));
        let request = v1::ImportAdapterRequest { source, ..import.clone() };
        assert_error(client.import_adapter(request).await, code, reason, field);
    }
    let list = client.list_adapters(v1::ListAdaptersRequest::default()).await.unwrap();
    assert_eq!(list.into_inner().adapters.len(), 2, "nothing was kept");
    world.service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_share_a_budget() {
    let bytes = adapter(1).bytes();
    let world = World::start(|config| config.limits.adapters_bytes = bytes + bytes / 2).await;
    let (a, b) =
        (world.ids("models/m", &[("a", 1.0)]).await, world.ids("models/m", &[("b", 1.0)]).await);
    assert_ne!(a, b);
    // Each makes room for the other, and comes back the same.
    assert_eq!(world.ids("models/m", &[("a", 1.0)]).await, a);
    assert_eq!(world.ids("models/m", &[("b", 1.0)]).await, b);
    // Both at once do not fit.
    let both = generate("models/m", &[("a", 1.0), ("b", 1.0)], 1);
    let refused = world.service.generation().generate(both).await;
    assert_error(refused, Code::ResourceExhausted, "LIMIT_REACHED", "");
    assert_eq!(world.ids("models/m", &[("a", 1.0)]).await, a);
    world.service.running.stop().await.unwrap();
}

#[test]
fn the_command_has_a_verb_for_everything() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    export::hugging_face(&model(), &at("model"), Dtype::F32).unwrap();
    write(&adapter(1), &at("poems"));
    let program = Program::start(&at("data"), &[]);
    program.run(&format!("models import {} --id m", at("model").display()));
    let import = format!("adapters import {} --base m", at("poems").display());
    let shown = program.run(&format!("{import} --validate-only"));
    assert!(shown.contains("18 linears: down_proj, gate_proj"), "{shown}");
    assert!(program.run("adapters list").contains("no adapters"));
    program.run(&import);
    let list = program.json("adapters list --base m");
    assert_eq!(list["adapters"][0]["name"], "adapters/poems");
    assert!(program.run("adapters show poems").contains("models/m"));
    assert!(program.run("adapters load poems").starts_with("adapters/poems loaded"));

    let score = |adapters: &str| {
        let answer = program.json(&format!("score --model m --tokens 1,2,3,4,5,6 {adapters}"));
        answer["total_logprob"].as_f64().unwrap()
    };
    let (none, with) = (score(""), score("--adapter poems"));
    assert!((none - with).abs() > 0.01, "{none} {with}");
    assert_eq!(none, score("--adapter adapters/poems=0"));
    assert_ne!(with, score("--adapter poems=0.5"));
    program.run("generate --model m --tokens 1,2 --max-tokens 2 --adapter poems");
    program.fail(66, "generate --model m --tokens 1,2 --adapter nobody");

    program.run(&format!("adapters export poems --to {}", at("out").display()));
    for name in [peft::CONFIG, peft::WEIGHTS] {
        let read = |folder: &str| std::fs::read(at(folder).join(name)).unwrap();
        assert_eq!(read("out"), read("poems"));
    }
    assert!(program.run("adapters unload poems").contains("unloaded"));
    program.run("adapters delete poems");
    program.fail(66, "adapters show poems");
}
