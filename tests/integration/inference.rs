//! The Open Inference Protocol over the wire: answers equal to those of the other services, hostile tensors,
//! the repository. Triton's own client has a journey in `clients`.

use bytes::Bytes;
use futures::StreamExt as _;
use planish::models::decoder::plan::{Cache, CacheFormat, Chunk, Decoder};
use planish::models::import;
use planish::proto::inference::infer_parameter::ParameterChoice;
use planish::proto::inference::model_infer_request::{
    InferInputTensor, InferRequestedOutputTensor,
};
use planish::proto::inference::{
    self as pb, InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
};
use planish::proto::v1;
use tonic::{Code, Request};

use crate::harness::{Service, assert_error, reason};
use crate::support;

async fn with_model() -> (Service, std::path::PathBuf) {
    let service = Service::start().await;
    let model = support::tiny_model(service.folder.path(), 2, 64);
    service.import("m", &model).await;
    (service, model)
}

fn text(prompt: &str) -> InferInputTensor {
    InferInputTensor {
        name: "text_input".into(),
        datatype: "BYTES".into(),
        shape: vec![1],
        contents: Some(InferTensorContents {
            bytes_contents: vec![Bytes::copy_from_slice(prompt.as_bytes())],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn ids(values: &[i64]) -> InferInputTensor {
    InferInputTensor {
        name: "input_ids".into(),
        datatype: "INT64".into(),
        shape: vec![1, values.len() as i64],
        contents: Some(InferTensorContents {
            int64_contents: values.to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn infer(model: &str, input: InferInputTensor) -> ModelInferRequest {
    ModelInferRequest { model_name: model.into(), inputs: vec![input], ..Default::default() }
}

fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter { parameter_choice: Some(choice) }
}

/// A greedy request for `count` tokens.
fn greedy(prompt: &str, count: i64) -> ModelInferRequest {
    let mut request = infer("m", text(prompt));
    for (key, choice) in [
        ("max_tokens", ParameterChoice::Int64Param(count)),
        ("temperature", ParameterChoice::DoubleParam(0.0)),
        ("ignore_eos", ParameterChoice::BoolParam(true)),
    ] {
        request.parameters.insert(key.into(), parameter(choice));
    }
    request
}

/// The text of a response: a length in four bytes, and the bytes.
fn text_of(response: &ModelInferResponse) -> &[u8] {
    assert_eq!(response.outputs.len(), 1);
    let output = &response.outputs[0];
    assert_eq!((output.name.as_str(), output.datatype.as_str()), ("text_output", "BYTES"));
    assert_eq!(output.shape, [1]);
    let (length, text) = response.raw_output_contents[0].split_first_chunk::<4>().unwrap();
    assert_eq!(u32::from_le_bytes(*length) as usize, text.len());
    text
}

fn is_final(response: &ModelInferResponse) -> bool {
    match response.parameters["triton_final_response"].parameter_choice {
        Some(ParameterChoice::BoolParam(last)) => last,
        ref other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_is_that_of_the_generation_service() {
    let (service, _) = with_model().await;
    let request = v1::GenerateRequest {
        model: "models/m".into(),
        prompt: Some(v1::generate_request::Prompt::Text("hello".into())),
        max_tokens: 20,
        sampling: Some(v1::SamplingOptions { temperature: Some(0.0), ..Default::default() }),
        ignore_eos: true,
        ..Default::default()
    };
    let mut parts = service.generation().generate(request).await.unwrap().into_inner();
    let mut expected = String::new();
    while let Some(part) = parts.message().await.unwrap() {
        expected.push_str(&part.text);
    }
    assert!(!expected.is_empty());

    let mut client = service.inference();
    let whole = client.model_infer(greedy("hello", 20)).await.unwrap().into_inner();
    assert_eq!(text_of(&whole), expected.as_bytes());
    assert_eq!((whole.model_name.as_str(), whole.model_version.as_str()), ("m", "1"));
    let tokens = ParameterChoice::Int64Param(20);
    assert_eq!(whole.parameters["generated_tokens"].parameter_choice, Some(tokens));

    // The same bytes raw, by the full name, with the output named.
    let raw = ModelInferRequest {
        model_name: "models/m/versions/1".into(),
        raw_input_contents: vec![Bytes::from_static(b"\x05\0\0\0hello")],
        outputs: vec![InferRequestedOutputTensor {
            name: "text_output".into(),
            ..Default::default()
        }],
        inputs: vec![InferInputTensor { contents: None, ..text("") }],
        ..greedy("", 20)
    };
    let raw = client.model_infer(raw).await.unwrap().into_inner();
    assert_eq!(text_of(&raw), expected.as_bytes());

    // Several requests on a stream, one of them bad: pieces come by id, and the bad one ends nothing.
    let requests = [
        ModelInferRequest { id: "a".into(), ..greedy("hello", 20) },
        ModelInferRequest { id: "b".into(), ..infer("m", ids(&[])) },
        ModelInferRequest { id: "c".into(), ..greedy("hello", 20) },
    ];
    let stream = client.model_stream_infer(futures::stream::iter(requests)).await.unwrap();
    let answers: Vec<_> = stream.into_inner().map(Result::unwrap).collect().await;
    for id in ["a", "c"] {
        let mine: Vec<_> = answers
            .iter()
            .filter_map(|a| a.infer_response.as_ref())
            .filter(|response| response.id == id)
            .collect();
        let joined: Vec<u8> = mine.iter().flat_map(|r| text_of(r).to_vec()).collect();
        assert_eq!(joined, expected.as_bytes());
        let (last, before) = mine.split_last().unwrap();
        assert!(is_final(last) && !before.is_empty() && before.iter().all(|r| !is_final(r)));
    }
    let failed: Vec<_> = answers.iter().filter(|a| !a.error_message.is_empty()).collect();
    assert_eq!(failed.len(), 1);
    let response = failed[0].infer_response.as_ref().unwrap();
    assert_eq!(response.id, "b");
    let why = ParameterChoice::StringParam("INVALID_FIELD".into());
    assert_eq!(response.parameters["reason"].parameter_choice, Some(why));
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logits_are_those_of_the_decoder() {
    let (service, folder) = with_model().await;
    let model = import::open(&folder).unwrap();
    // More than one step of the engine.
    let tokens: Vec<u32> = (0..150).map(|i| i * 31 % 256).collect();
    // As the engine keeps keys and values.
    let config = model.decoder().unwrap();
    let mut cache = Cache::with_format(config, tokens.len(), CacheFormat::F16);
    let mut decoder = Decoder::new(&model).unwrap();
    let chunk = Chunk { tokens: &tokens, cache: &mut cache, logits: 0..tokens.len() };
    let expected = decoder.forward(&mut [chunk]).unwrap();

    let values: Vec<i64> = tokens.iter().map(|t| i64::from(*t)).collect();
    let mut client = service.inference();
    let check = |response: &ModelInferResponse, rows: usize, expected: &[f32]| {
        let output = &response.outputs[0];
        assert_eq!((output.name.as_str(), output.datatype.as_str()), ("logits", "FP32"));
        assert_eq!(output.shape, [1, rows as i64, 257]);
        let raw = &response.raw_output_contents[0];
        assert_eq!(raw.len(), rows * 257 * 4);
        for (bytes, want) in raw.as_chunks::<4>().0.iter().zip(expected) {
            let got = f32::from_le_bytes(*bytes);
            assert!((got - want).abs() < 1e-4, "{got} is not {want}");
        }
    };
    let all = client.model_infer(infer("m", ids(&values))).await.unwrap().into_inner();
    check(&all, 150, expected);

    // The last position alone, the ids in 32 bits and raw.
    let mut request = infer("m", ids(&values));
    request.inputs[0].datatype = "INT32".into();
    request.inputs[0].contents = None;
    let raw: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    request.raw_input_contents = vec![raw.into()];
    request.parameters.insert("last_only".into(), parameter(ParameterChoice::BoolParam(true)));
    let last = client.model_infer(request).await.unwrap().into_inner();
    check(&last, 1, &expected[149 * 257..]);

    let outside = client.model_infer(infer("m", ids(&[257]))).await;
    assert_error(outside, Code::InvalidArgument, "INVALID_FIELD", "input_ids");
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_tensors_are_refused() {
    let service = Service::start_with(|c| c.limits.message_bytes = 256 << 10).await;
    let model = support::tiny_model(service.folder.path(), 1, 32);
    service.import("m", &model).await;
    let mut client = service.inference();
    let invalid = Code::InvalidArgument;
    let shaped = |shape: &[i64]| InferInputTensor { shape: shape.to_vec(), ..ids(&[1]) };
    for shape in [
        &[1, i64::MAX][..],
        &[1 << 62, 8],
        &[-1, 1],
        &[i64::MIN],
        &[1; 20],
        &[0, i64::MAX, i64::MAX],
    ] {
        let bad = client.model_infer(infer("m", shaped(shape))).await;
        assert_error(bad, invalid, "INVALID_FIELD", "inputs[0].shape");
    }
    let raw = |bytes: &'static [u8], input| ModelInferRequest {
        raw_input_contents: vec![Bytes::from_static(bytes)],
        inputs: vec![InferInputTensor { contents: None, ..input }],
        ..infer("m", text(""))
    };
    for (bytes, input) in [
        (&b"\xff\xff\xff\xffx"[..], text("")),
        (b"\x01", text("")),
        (b"\x01\0\0\0xy", text("")),
        (b"\x01\0\0\0\0\0\0", ids(&[1])),
    ] {
        let bad = client.model_infer(raw(bytes, input)).await;
        assert_error(bad, invalid, "INVALID_FIELD", "raw_input_contents[0]");
    }
    let many =
        ModelInferRequest { raw_input_contents: vec![Bytes::new(); 9], ..infer("m", text("x")) };
    assert_error(client.model_infer(many).await, invalid, "INVALID_FIELD", "raw_input_contents");
    let long = ModelInferRequest { id: "x".repeat(129), ..infer("m", text("x")) };
    assert_error(client.model_infer(long).await, invalid, "INVALID_FIELD", "id");
    let bad = client.model_infer(infer("../m", text("x"))).await;
    assert_error(bad, invalid, "INVALID_NAME", "");
    let wild = ModelInferRequest { model_version: "-1".into(), ..infer("m", text("x")) };
    assert_error(client.model_infer(wild).await, invalid, "INVALID_FIELD", "model_version");

    // 300 positions of 257 floats do not fit 256 KiB; the last one does.
    let mut request = infer("m", ids(&[7; 300]));
    let bad = client.model_infer(request.clone()).await;
    assert_error(bad, Code::ResourceExhausted, "TOO_LARGE", "input_ids");
    request.parameters.insert("last_only".into(), parameter(ParameterChoice::BoolParam(true)));
    client.model_infer(request).await.unwrap();
    service.running.stop().await.unwrap();
}

async fn states(service: &Service, ready: bool) -> Vec<(String, String, String)> {
    let request = pb::RepositoryIndexRequest { ready, ..Default::default() };
    let index = service.inference().repository_index(request).await.unwrap().into_inner();
    index.models.into_iter().map(|m| (m.name, m.version, m.state)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_repository_lists_loads_and_unloads() {
    let (service, folder) = with_model().await;
    // The same name again, with other content.
    let other = support::tiny_model(&folder.join("other"), 1, 32);
    service.import("m", &other).await;
    let mut client = service.inference();
    let entry = |version: &str, state: &str| ("m".to_owned(), version.to_owned(), state.to_owned());
    assert_eq!(
        states(&service, false).await,
        [entry("2", "UNAVAILABLE"), entry("1", "UNAVAILABLE")]
    );

    let load = |name: &str| pb::RepositoryModelLoadRequest {
        model_name: name.into(),
        ..Default::default()
    };
    client.repository_model_load(load("models/m/versions/1")).await.unwrap();
    assert_eq!(states(&service, false).await, [entry("2", "UNAVAILABLE"), entry("1", "READY")]);
    assert_eq!(states(&service, true).await, [entry("1", "READY")]);
    client.repository_model_load(load("m")).await.unwrap();
    assert_eq!(states(&service, true).await, [entry("2", "READY"), entry("1", "READY")]);
    let statistics = async |name: &str, version: &str| {
        let request = pb::ModelStatisticsRequest { name: name.into(), version: version.into() };
        let stats = service.inference().model_statistics(request).await;
        stats.map(|s| s.into_inner().model_stats)
    };
    // Loaded counts as known; nothing was asked yet.
    let all = statistics("", "").await.unwrap();
    assert_eq!(all.len(), 2);
    assert!(all.iter().all(|s| s.inference_count == 0 && s.memory_usage[0].byte_size > 0));

    client.model_infer(infer("m", ids(&[1, 2]))).await.unwrap();
    client.model_infer(infer("m", ids(&[]))).await.unwrap_err();
    let one = statistics("m", "2").await.unwrap();
    assert_eq!(one.len(), 1);
    let counted = one[0].inference_stats.as_ref().unwrap();
    assert_eq!((one[0].inference_count, counted.fail.unwrap().count), (1, 1));
    assert_eq!(statistics("m", "1").await.unwrap()[0].inference_count, 0);
    assert_eq!(statistics("models/m", "").await.unwrap().len(), 2);
    let missing = statistics("m", "3").await;
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let odd = statistics("", "1").await;
    assert_error(odd, Code::InvalidArgument, "INVALID_FIELD", "version");

    let unload = |name: &str| pb::RepositoryModelUnloadRequest {
        model_name: name.into(),
        ..Default::default()
    };
    client.repository_model_unload(unload("models/m/versions/2")).await.unwrap();
    assert_eq!(states(&service, true).await, [entry("1", "READY")]);
    client.repository_model_load(load("m")).await.unwrap();
    client.repository_model_unload(unload("m")).await.unwrap();
    assert!(states(&service, true).await.is_empty());
    // Never loaded is no error, never imported is one.
    client.repository_model_unload(unload("m")).await.unwrap();
    let missing = client.repository_model_unload(unload("n")).await;
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let missing = client.repository_model_load(load("n")).await;
    assert_error(missing, Code::NotFound, "RESOURCE_NOT_FOUND", "");
    let elsewhere = pb::RepositoryModelLoadRequest { repository_name: "r".into(), ..load("m") };
    let bad = client.repository_model_load(elsewhere).await;
    assert_error(bad, Code::InvalidArgument, "INVALID_FIELD", "repository_name");
    let mut changed = load("m");
    changed.parameters.insert("config".into(), pb::ModelRepositoryParameter::default());
    let bad = client.repository_model_load(changed).await;
    assert_error(bad, Code::InvalidArgument, "INVALID_FIELD", "parameters");
    let ready = pb::ModelReadyRequest { name: "n".into(), ..Default::default() };
    assert!(!client.model_ready(ready).await.unwrap().into_inner().ready);
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn probes_pass_without_a_token_and_all_else_needs_one() {
    let token = "0123456789abcdef0123456789abcdef";
    let service = Service::start_with(|c| {
        c.server.token = Some(planish::config::Secret::new(token));
    })
    .await;
    let mut client = service.inference();
    assert!(client.server_live(pb::ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(pb::ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let refused = client.server_metadata(pb::ServerMetadataRequest {}).await.unwrap_err();
    assert_eq!(reason(&refused), "UNAUTHENTICATED");
    let refused = client.repository_index(pb::RepositoryIndexRequest::default()).await.unwrap_err();
    assert_eq!(reason(&refused), "UNAUTHENTICATED");
    let mut request = Request::new(pb::ServerMetadataRequest {});
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    let metadata = client.server_metadata(request).await.unwrap().into_inner();
    assert_eq!(
        (metadata.name.as_str(), metadata.version.as_str()),
        ("planish", env!("CARGO_PKG_VERSION"))
    );
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_without_a_tokenizer_takes_tokens_only() {
    let service = Service::start().await;
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": true,
    });
    let model = planish::models::decoder::random::model(config, 1).unwrap();
    let folder = service.folder.path().join("bare");
    std::fs::create_dir(&folder).unwrap();
    planish::models::export::hugging_face(&model, &folder, planish::nn::dtype::Dtype::F32).unwrap();
    service.import("m", &folder).await;
    let mut client = service.inference();
    let request = pb::ModelMetadataRequest { name: "m".into(), ..Default::default() };
    let metadata = client.model_metadata(request).await.unwrap().into_inner();
    let names = |tensors: &[pb::model_metadata_response::TensorMetadata]| {
        tensors.iter().map(|t| t.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(&metadata.inputs), ["input_ids", "last_only"]);
    assert_eq!(names(&metadata.outputs), ["logits"]);
    assert_eq!(metadata.outputs[0].shape, [1, -1, 32]);
    let config = pb::ModelConfigRequest { name: "m".into(), version: "1".into() };
    let config = client.model_config(config).await.unwrap().into_inner().config.unwrap();
    let needed: Vec<_> = config.input.iter().filter(|i| !i.optional).map(|i| &i.name).collect();
    assert_eq!(needed, ["input_ids"]);
    let bad = client.model_infer(infer("m", text("x"))).await;
    assert_error(bad, Code::FailedPrecondition, "MODEL_UNSUITABLE", "");
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_stream_ends_well_when_the_server_stops() {
    let service = Service::start_with(|c| c.shutdown.deadline_seconds = 60).await;
    service.import("m", &support::tiny_model(service.folder.path(), 2, 64)).await;
    let (asking, questions) = tokio::sync::mpsc::channel(1);
    let questions = tokio_stream::wrappers::ReceiverStream::new(questions);
    let stream = service.inference().model_stream_infer(questions).await.unwrap();
    let mut stream = stream.into_inner();
    asking.send(greedy("hello", 400)).await.unwrap();
    let first = stream.message().await.unwrap().unwrap();
    assert!(!is_final(first.infer_response.as_ref().unwrap()));
    // The client reads on while the server stops: the request under way ends, and then the stream, although
    // the client's side stays open.
    let reading = tokio::spawn(async move {
        let mut last = None;
        while let Some(answer) = stream.message().await.unwrap() {
            assert!(answer.error_message.is_empty(), "{answer:?}");
            last = answer.infer_response;
        }
        last
    });
    service.running.stop().await.unwrap();
    let last = reading.await.unwrap().unwrap();
    assert!(is_final(&last));
    let tokens = ParameterChoice::Int64Param(400);
    assert_eq!(last.parameters["generated_tokens"].parameter_choice, Some(tokens));
    drop(asking);
}
