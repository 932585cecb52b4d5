//! Resources, lists, errors, health and reflection.

use futures::StreamExt as _;
use planish::proto::google::longrunning as lro;
use planish::proto::v1;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::{Service, assert_error, digest, import_dataset, upload, upload_as};

const SERVICES: &[&str] = &[
    "planish.v1.ModelService",
    "planish.v1.AdapterService",
    "planish.v1.DatasetService",
    "planish.v1.MethodService",
    "planish.v1.JobService",
    "planish.v1.GenerationService",
    "inference.GRPCInferenceService",
    "planish.v1.PredictionService",
    "planish.v1.RetrievalService",
    "google.longrunning.Operations",
];

#[tokio::test]
async fn health_knows_every_service() {
    let service = Service::start().await;
    let mut health = HealthClient::new(service.channel.clone());
    for name in SERVICES.iter().chain(&[""]) {
        let request = HealthCheckRequest { service: (*name).to_owned() };
        let status = health.check(request).await.unwrap().into_inner().status;
        assert_eq!(status, 1, "{name} is not serving");
    }
    let unknown = HealthCheckRequest { service: "planish.v1.Nothing".into() };
    assert_error(health.check(unknown).await, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn reflection_lists_the_services() {
    macro_rules! list {
        ($v:ident, $channel:expr) => {{
            use tonic_reflection::pb::$v::ServerReflectionRequest;
            use tonic_reflection::pb::$v::server_reflection_client::ServerReflectionClient;
            use tonic_reflection::pb::$v::server_reflection_request::MessageRequest;
            use tonic_reflection::pb::$v::server_reflection_response::MessageResponse;
            let ask = |message| ServerReflectionRequest {
                host: String::new(),
                message_request: Some(message),
            };
            let requests = futures::stream::iter([
                ask(MessageRequest::ListServices(String::new())),
                ask(MessageRequest::FileContainingSymbol("planish.v1.ModelService".into())),
                ask(MessageRequest::FileContainingSymbol("google.rpc.ErrorInfo".into())),
            ]);
            let mut client = ServerReflectionClient::new($channel);
            let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
            let Some(MessageResponse::ListServicesResponse(list)) =
                answers.next().await.unwrap().unwrap().message_response
            else {
                panic!("no list")
            };
            for _ in 0..2 {
                let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
                assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{answer:?}");
            }
            list.service.into_iter().map(|s| s.name).collect::<Vec<_>>()
        }};
    }
    let service = Service::start().await;
    let v1 = list!(v1, service.channel.clone());
    let v1alpha = list!(v1alpha, service.channel.clone());
    assert_eq!(v1, v1alpha);
    for name in SERVICES {
        assert!(v1.contains(&(*name).to_owned()), "{name} is missing from {v1:?}");
    }
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn datasets_come_and_go() {
    let service = Service::start().await;
    let mut client = service.datasets();
    for id in ["b", "a", "c"] {
        service.dataset(id, &format!("the text of {id}")).await.unwrap();
    }
    let got = v1::GetDatasetRequest { name: "datasets/a".into() };
    let dataset = client.get_dataset(got.clone()).await.unwrap().into_inner();
    assert_eq!(dataset.digest, digest(b"the text of a"));
    assert_eq!((dataset.size_bytes, dataset.record_count), (13, 1));

    let list = |page_size, page_token: &str| v1::ListDatasetsRequest {
        page_size,
        page_token: page_token.into(),
    };
    let first = client.list_datasets(list(2, "")).await.unwrap().into_inner();
    let names: Vec<_> = first.datasets.iter().map(|d| d.name.as_str()).collect();
    assert_eq!(names, ["datasets/a", "datasets/b"]);
    let token = first.next_page_token;
    let second = client.list_datasets(list(5, &token)).await.unwrap().into_inner();
    assert_eq!(second.datasets[0].name, "datasets/c");
    assert_eq!((second.datasets.len(), second.next_page_token.as_str()), (1, ""));
    let bad = client.list_datasets(list(-1, "")).await;
    assert_error(bad, Code::InvalidArgument, "INVALID_FIELD", "page_size");
    let bad = client.list_datasets(list(0, "bogus")).await;
    assert_error(bad, Code::InvalidArgument, "INVALID_PAGE_TOKEN", "page_token");
    let other = v1::ListModelsRequest { page_token: token, ..Default::default() };
    let bad = service.models().list_models(other).await;
    assert_error(bad, Code::InvalidArgument, "INVALID_PAGE_TOKEN", "page_token");

    let download = v1::DownloadDatasetRequest { name: "datasets/a".into() };
    let mut stream = client.download_dataset(download).await.unwrap().into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = stream.next().await {
        bytes.extend_from_slice(&part.unwrap().chunk);
    }
    assert_eq!(bytes, b"the text of a");

    let delete =
        |etag: &str| v1::DeleteDatasetRequest { name: "datasets/a".into(), etag: etag.into() };
    let stale = client.delete_dataset(delete("stale")).await;
    assert_error(stale, Code::Aborted, "ETAG_MISMATCH", "");
    client.delete_dataset(delete(&dataset.etag)).await.unwrap();
    assert_error(client.get_dataset(got).await, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn imports_of_datasets_are_checked() {
    let service = Service::start_with(|c| c.limits.upload_bytes = 1000).await;
    let header = || v1::DatasetHeader {
        dataset_id: "d".into(),
        file_name: "d.txt".into(),
        size_bytes: 4,
        request_id: "r".into(),
        ..Default::default()
    };
    let import = |header, chunks: &'static [&'static [u8]]| {
        import_dataset(service.datasets(), header, chunks)
    };
    let invalid = Code::InvalidArgument;
    let bad = import(v1::DatasetHeader { dataset_id: "D".into(), ..header() }, &[b"text"]).await;
    assert_error(bad, invalid, "INVALID_NAME", "header.dataset_id");
    let bad = import(v1::DatasetHeader { file_name: "../d".into(), ..header() }, &[b"text"]).await;
    assert_error(bad, invalid, "INVALID_FIELD", "header.file_name");
    let bad = import(v1::DatasetHeader { size_bytes: -4, ..header() }, &[b"text"]).await;
    assert_error(bad, invalid, "INVALID_FIELD", "header.size_bytes");
    let bad = import(v1::DatasetHeader { kind: 77, ..header() }, &[b"text"]).await;
    assert_error(bad, invalid, "INVALID_FIELD", "header.kind");
    let bad = import(v1::DatasetHeader { size_bytes: 1001, ..header() }, &[]).await;
    assert_error(bad, Code::ResourceExhausted, "TOO_LARGE", "header.size_bytes");
    let bad = import(header(), &[b"te"]).await;
    assert_error(bad, invalid, "DIGEST_MISMATCH", "");
    let bad = import(header(), &[b"text", b"more"]).await;
    assert_error(bad, invalid, "DIGEST_MISMATCH", "chunk");
    let bad = import(v1::DatasetHeader { file_name: "d.exe".into(), ..header() }, &[b"text"]).await;
    assert_error(bad, invalid, "UNSUPPORTED_FORMAT", "");
    let long = v1::DatasetHeader { request_id: "x".repeat(65), ..header() };
    assert_error(import(long, &[b"text"]).await, invalid, "INVALID_FIELD", "header.request_id");

    let first = import(header(), &[b"te", b"xt"]).await.unwrap();
    let again = import(header(), &[b"text"]).await.unwrap();
    assert_eq!(first, again, "the same request id gives the same answer");
    let other = import(header(), &[b"tixt"]).await;
    assert_error(other, Code::AlreadyExists, "REQUEST_ID_REUSED", "");
    let taken = import(v1::DatasetHeader { request_id: "s".into(), ..header() }, &[b"text"]).await;
    assert_error(taken, Code::AlreadyExists, "RESOURCE_EXISTS", "");

    // Chunks without a header, and an empty stream.
    let part = v1::import_dataset_request::Part::Chunk("text".into());
    let chunk = futures::stream::iter([v1::ImportDatasetRequest { part: Some(part) }]);
    assert_error(
        service.datasets().import_dataset(chunk).await,
        invalid,
        "INVALID_FIELD",
        "header",
    );
    let none = futures::stream::iter(Vec::new());
    assert_error(service.datasets().import_dataset(none).await, invalid, "INVALID_FIELD", "header");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn uploads_are_checked() {
    let service = Service::start_with(|c| c.limits.upload_bytes = 3 << 20).await;
    let bytes = vec![1u8; 3 << 20];
    let file = upload(service.models(), &bytes).await.unwrap();
    assert_eq!((file.digest, file.size_bytes), (digest(&bytes), 3 << 20));

    let header = |size_bytes, digest: &str| v1::UploadHeader {
        file_name: "f".into(),
        size_bytes,
        digest: digest.into(),
    };
    let send = |header| upload_as(service.models(), header, b"abc");
    let invalid = Code::InvalidArgument;
    let bad = send(header(3, &digest(b"abd"))).await;
    assert_error(bad, invalid, "DIGEST_MISMATCH", "");
    assert_error(send(header(3, "md5:1")).await, invalid, "INVALID_FIELD", "header.digest");
    assert_error(send(header(-1, "")).await, invalid, "INVALID_FIELD", "header.size_bytes");
    assert_error(send(header(4, "")).await, invalid, "DIGEST_MISMATCH", "");
    let bad = send(header((3 << 20) + 1, "")).await;
    assert_error(bad, Code::ResourceExhausted, "TOO_LARGE", "header.size_bytes");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn requests_on_models_are_checked() {
    let service = Service::start().await;
    let mut client = service.models();
    let invalid = Code::InvalidArgument;
    let get = |name: &str| v1::GetModelRequest { name: name.into() };
    assert_error(client.get_model(get("gpt")).await, invalid, "INVALID_NAME", "");
    let missing = client.get_model(get("models/gpt")).await;
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", "");

    let import = |model_id: &str, source| v1::ImportModelRequest {
        model_id: model_id.into(),
        source,
        validate_only: true,
        ..Default::default()
    };
    use v1::import_model_request::Source;
    let uri = |uri: &str| Some(Source::Uri(uri.into()));
    let bad = client.import_model(import("a b", uri("hf:a/b"))).await;
    assert_error(bad, invalid, "INVALID_NAME", "model_id");
    let bad = client.import_model(import("a", None)).await;
    assert_error(bad, invalid, "INVALID_FIELD", "source");
    let bad = client.import_model(import("a", uri("/etc"))).await;
    assert_error(bad, Code::PermissionDenied, "PERMISSION_DENIED", "uri");
    let bad = client.import_model(import("a", uri("/does/not/exist"))).await;
    assert_error(bad, Code::PermissionDenied, "PERMISSION_DENIED", "uri");
    let files = |file_name: &str, digest: String| {
        let file = v1::ModelFile { file_name: file_name.into(), digest, size_bytes: 0 };
        Some(Source::Uploaded(v1::UploadedFiles { files: vec![file] }))
    };
    let bad = client.import_model(import("a", files("../x", digest(b"")))).await;
    assert_error(bad, invalid, "INVALID_FIELD", "uploaded.files[0].file_name");
    let bad = client.import_model(import("a", files("x", "sha256:12".into()))).await;
    assert_error(bad, invalid, "INVALID_FIELD", "uploaded.files[0].digest");
    let bad = client.import_model(import("a", files("x", digest(b"never sent")))).await;
    assert_error(bad, Code::NotFound, "RESOURCE_NOT_FOUND", "uploaded.files[0].digest");
    let checked =
        client.import_model(import("a", uri("hf:owner/name"))).await.unwrap().into_inner();
    assert!(checked.done && checked.name.is_empty());
    assert_error(client.get_model(get("models/a")).await, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn requests_on_jobs_and_generation_are_checked() {
    let service = Service::start().await;
    let (mut jobs, mut operations) = (service.jobs(), service.operations());
    let invalid = Code::InvalidArgument;
    let bad = jobs.run_recipe(v1::RunRecipeRequest::default()).await;
    assert_error(bad, invalid, "INVALID_FIELD", "recipe");
    let request = v1::RunRecipeRequest {
        model: "models/none".into(),
        recipe: Some(v1::Recipe::default()),
        ..Default::default()
    };
    let bad = jobs.run_recipe(request).await;
    assert_error(bad, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let watch = |name: &str, after_sequence| v1::WatchOperationRequest {
        name: name.into(),
        after_sequence,
    };
    let bad = jobs.watch_operation(watch("operations/none", 0)).await;
    assert_error(bad, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let bad = jobs.watch_operation(watch("operations/none", -1)).await;
    assert_error(bad, invalid, "INVALID_FIELD", "after_sequence");

    let list =
        |filter: &str| lro::ListOperationsRequest { filter: filter.into(), ..Default::default() };
    assert!(operations.list_operations(list("")).await.unwrap().into_inner().operations.is_empty());
    operations.list_operations(list("done = true")).await.unwrap();
    let bad = operations.list_operations(list("state=done")).await;
    assert_error(bad, invalid, "INVALID_FIELD", "filter");

    let generate = v1::GenerateRequest {
        model: "models/none".into(),
        prompt: Some(v1::generate_request::Prompt::Text("x".into())),
        ..Default::default()
    };
    let mut client = service.generation();
    let bad = client.generate(v1::GenerateRequest { prompt: None, ..generate.clone() }).await;
    assert_error(bad, invalid, "INVALID_FIELD", "prompt");
    let sampling = v1::SamplingOptions { top_p: Some(2.0), ..Default::default() };
    let bad = client.generate(v1::GenerateRequest { sampling: Some(sampling), ..generate.clone() });
    assert_error(bad.await, invalid, "INVALID_FIELD", "sampling.top_p");
    let message = v1::ChatMessage { role: "wizard".into(), content: "x".into() };
    let chat = v1::generate_request::Prompt::Chat(v1::Chat { messages: vec![message] });
    let bad = client.generate(v1::GenerateRequest { prompt: Some(chat), ..generate.clone() });
    assert_error(bad.await, invalid, "INVALID_FIELD", "chat.messages[0].role");
    assert_error(client.generate(generate).await, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn methods_are_listed_and_read() {
    let service = Service::start().await;
    let mut client = service.methods();
    let mut names = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListMethodsRequest {
            page_size: 2,
            page_token,
            verb: "compress".into(),
            ..Default::default()
        };
        let page = client.list_methods(request).await.unwrap().into_inner();
        assert!(page.methods.len() <= 2);
        names.extend(page.methods.into_iter().map(|m| m.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert!(names.is_sorted());
    for name in ["magnitude", "wanda", "sparsegpt", "round_to_nearest", "gptq"] {
        let name = format!("methods/{name}");
        assert!(names.contains(&name), "{name} is missing");
        let method = client
            .get_method(v1::GetMethodRequest { name: name.clone() })
            .await
            .unwrap()
            .into_inner();
        assert_eq!((method.name, method.verb.as_str()), (name, "compress"));
        assert!(!method.description.is_empty() && !method.families.is_empty());
    }
    let free = v1::ListMethodsRequest {
        family: "quantisation".into(),
        data_need: "none".into(),
        ..Default::default()
    };
    let page = client.list_methods(free).await.unwrap().into_inner();
    let found: Vec<_> = page.methods.iter().map(|m| m.name.as_str()).collect();
    assert_eq!(found, ["methods/normal_float", "methods/round_to_nearest"]);
    for (field, request) in [
        ("family", v1::ListMethodsRequest { family: "magic".into(), ..Default::default() }),
        ("speeds_up", v1::ListMethodsRequest { speeds_up: "sleep".into(), ..Default::default() }),
    ] {
        let refused = client.list_methods(request).await;
        assert_error(refused, Code::InvalidArgument, "INVALID_FIELD", field);
    }
    let bad = client.get_method(v1::GetMethodRequest { name: "methods/magic".into() }).await;
    assert_error(bad, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let bad = v1::ListMethodsRequest { verb: "dance".into(), ..Default::default() };
    assert_error(client.list_methods(bad).await, Code::InvalidArgument, "INVALID_FIELD", "verb");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn trainings_are_rendered() {
    use v1::render_training_request::Source;
    let service = Service::start().await;
    let point =
        |step: i64| v1::TrainingPoint { step, loss: 3.0 / step as f64, ..Default::default() };
    let report = v1::TrainingReport { points: (1..=50).map(point).collect(), ..Default::default() };
    let render = async |source: Source, view: v1::TrainingView| {
        let request = v1::RenderTrainingRequest { source: Some(source), view: view.into() };
        service.jobs().render_training(request).await.map(tonic::Response::into_inner)
    };
    for (view, media_type, begins) in [
        (v1::TrainingView::Text, "text/plain; charset=utf-8", b"  update".as_slice()),
        (v1::TrainingView::Csv, "text/csv; charset=utf-8", b"kind,step,loss"),
        (v1::TrainingView::Svg, "image/svg+xml", b"<svg"),
        (v1::TrainingView::Png, "image/png", b"\x89PNG"),
    ] {
        let rendered = render(Source::Report(report.clone()), view).await.unwrap();
        assert_eq!(rendered.media_type, media_type);
        assert!(rendered.content.starts_with(begins), "{media_type}");
    }
    let large = vec![v1::TrainingPoint::default(); 10_001];
    let large = v1::TrainingReport { points: large, ..Default::default() };
    let refused = render(Source::Report(large), v1::TrainingView::Png).await;
    assert_error(refused, Code::ResourceExhausted, "TOO_LARGE", "report");
    let unknown = render(Source::Name("operations/none".into()), v1::TrainingView::Text).await;
    assert_error(unknown, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    service.running.stop().await.unwrap();
}
