//! What is in memory: loading by request and by hand, leaving by time, by hand, and for lack of room.

use std::path::Path;
use std::time::{Duration, Instant};

use planish::proto::v1;
use tonic::Code;

use crate::harness::{PATIENCE, Service, assert_error};
use crate::support;

fn generate(model: &str, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: format!("models/{model}"),
        prompt: Some(v1::generate_request::Prompt::Text("hello".into())),
        max_tokens,
        ignore_eos: true,
        ..Default::default()
    }
}

async fn answer(service: &Service, model: &str) {
    let mut parts = service.generation().generate(generate(model, 2)).await.unwrap().into_inner();
    while parts.message().await.unwrap().is_some() {}
}

async fn loaded(service: &Service) -> Vec<v1::LoadedModel> {
    let request = v1::ListLoadedModelsRequest {};
    let mut models =
        service.models().list_loaded_models(request).await.unwrap().into_inner().loaded_models;
    models.sort_by(|a, b| a.versions.cmp(&b.versions));
    models
}

fn names(loaded: &[v1::LoadedModel]) -> Vec<&str> {
    loaded.iter().map(|l| l.versions[0].as_str()).collect()
}

/// Two models of different content, `a` and `b`, of the same size.
async fn import_two(service: &Service, folder: &Path) -> i64 {
    let a = support::tiny_model(&folder.join("a"), 1, 32);
    let b = support::tiny_model(&folder.join("b"), 1, 32);
    // A byte more of configuration makes other content.
    let config = std::fs::read_to_string(b.join("config.json")).unwrap();
    let changed = config.replacen("0.00001", "0.00002", 1).replacen("1e-5", "2e-5", 1);
    assert_ne!(config, changed, "{config}");
    std::fs::write(b.join("config.json"), changed).unwrap();
    let bytes = service.import("a", &a).await.weight_bytes;
    assert_eq!(service.import("b", &b).await.weight_bytes, bytes);
    bytes
}

fn load(name: &str) -> v1::LoadModelRequest {
    v1::LoadModelRequest { name: name.into() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_models_leave_and_pinned_ones_stay() {
    let service = Service::start_with(|c| c.limits.idle_unload_seconds = 1).await;
    import_two(&service, service.folder.path()).await;
    let pinned = service.models().load_model(load("models/a")).await.unwrap().into_inner();
    assert!(pinned.resident_bytes > 0);
    answer(&service, "b").await;
    // Time is on nobody's side here: `b` may already have left, `a` must not.
    let started = Instant::now();
    loop {
        let now = loaded(&service).await;
        let a = now.iter().find(|l| l.versions == ["models/a/versions/1"]).unwrap();
        assert!(a.pinned && a.resident_bytes == pinned.resident_bytes);
        if now.len() == 1 && a.idle_seconds > 1.5 {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{now:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // It comes back with the next request, and what is pinned leaves when it is told to.
    answer(&service, "b").await;
    let unload = v1::UnloadModelRequest { name: "models/a".into() };
    service.models().unload_model(unload).await.unwrap();
    assert!(!names(&loaded(&service).await).contains(&"models/a/versions/1"));
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pinned_models_do_not_make_room() {
    let folder = tempfile::tempdir().unwrap();
    // Room for one model of the two: found by loading one into a server without that limit.
    let bytes = {
        let service = Service::start().await;
        let bytes = import_two(&service, folder.path()).await;
        let got = service.models().load_model(load("models/a")).await.unwrap().into_inner();
        assert_eq!(got.resident_bytes, bytes);
        service.running.stop().await.unwrap();
        bytes
    };
    let service =
        Service::start_with(|c| c.limits.models_bytes = u64::try_from(bytes).unwrap() * 3 / 2)
            .await;
    let again = tempfile::tempdir().unwrap();
    import_two(&service, again.path()).await;
    answer(&service, "a").await;
    answer(&service, "b").await;
    assert_eq!(names(&loaded(&service).await), ["models/b/versions/1"], "the idle one makes room");

    service.models().load_model(load("models/a")).await.unwrap();
    assert_eq!(names(&loaded(&service).await), ["models/a/versions/1"]);
    let refused = service.generation().generate(generate("b", 1)).await;
    assert_error(refused, Code::ResourceExhausted, "LIMIT_REACHED", "");
    assert_eq!(names(&loaded(&service).await), ["models/a/versions/1"]);
    let unload = v1::UnloadModelRequest { name: "models/a/versions/1".into() };
    service.models().unload_model(unload).await.unwrap();
    answer(&service, "b").await;
    let now = loaded(&service).await;
    assert_eq!(names(&now), ["models/b/versions/1"]);
    assert!(!now[0].pinned && now[0].resident_bytes == bytes);
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unloaded_model_finishes_what_it_has_begun() {
    let service = Service::start().await;
    import_two(&service, service.folder.path()).await;
    let mut parts = service.generation().generate(generate("a", 400)).await.unwrap().into_inner();
    let mut tokens = parts.message().await.unwrap().unwrap().tokens.len();
    let unload = v1::UnloadModelRequest { name: "models/a".into() };
    service.models().unload_model(unload).await.unwrap();
    assert!(loaded(&service).await.is_empty());
    while let Some(part) = parts.message().await.unwrap() {
        tokens += part.tokens.len();
    }
    assert_eq!(tokens, 400);
    service.running.stop().await.unwrap();
}
