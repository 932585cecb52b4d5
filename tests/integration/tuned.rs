//! What was trained here at work: DoRA, norms, biases and heads beside their base, merged into it, and
//! carried to another server.

use std::path::Path;

use planish::proto::google::longrunning as lro;
use planish::proto::v1;
use planish::proto::v1::import_adapter_request::Source;
use planish::proto::v1::prediction::Kind;
use planish::proto::v1::prediction_service_client::PredictionServiceClient;
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::adaptation::{World, request};
use crate::embedding;
use crate::harness::{assert_error, response};

const TEXT: &str = "[user] colour 3?\n[assistant] blue blue";

fn training(steps: u32) -> Value {
    json!({
        "dataset": "datasets/chat", "steps": steps, "batch_size": 6, "learning_rate": 0.01,
        "warmup_share": 0.0,
    })
}

impl World {
    fn prediction(&self) -> PredictionServiceClient<Channel> {
        PredictionServiceClient::new(self.service.channel.clone())
    }

    /// Log-probabilities of a text.
    async fn logprobs(&self, model: &str, adapters: &[(&str, f32)]) -> Result<Vec<f32>, Status> {
        let request = v1::ScoreRequest {
            model: model.into(),
            input: Some(v1::score_request::Input::Text(TEXT.into())),
            adapters: uses(adapters),
        };
        let answer = self.service.generation().score(request).await?.into_inner();
        Ok(answer.tokens.iter().filter_map(|t| t.logprob).collect())
    }

    async fn merge(&self, request: v1::MergeAdapterRequest) -> Result<lro::Operation, Status> {
        let operation = self.adapters().merge_adapter(request).await?.into_inner();
        if operation.done {
            return Ok(operation);
        }
        Ok(self.service.finished(&operation.name).await)
    }

    async fn merged(&self, request: v1::MergeAdapterRequest) -> v1::MergeReport {
        response(self.merge(request).await.unwrap())
    }

    async fn vectors(
        &self,
        model: &str,
        texts: &[&str],
        adapters: &[(&str, f32)],
    ) -> Vec<Vec<f32>> {
        let request = v1::EmbedRequest {
            model: model.into(),
            texts: texts.iter().map(|t| (*t).to_owned()).collect(),
            adapters: uses(adapters),
            ..Default::default()
        };
        let answer = self.service.retrieval().embed(request).await.unwrap().into_inner();
        answer.embeddings.into_iter().map(|e| e.values).collect()
    }

    /// An encoder as `models/reader` and three adapters with heads.
    async fn with_reader(&self) {
        let files = tempfile::tempdir().unwrap();
        embedding::write_encoder(files.path());
        self.service.import("reader", files.path()).await;
        let mut classes = String::from("text,label\n");
        let mut numbers = String::from("text,label\n");
        let mut tags = String::new();
        for i in 0..30 {
            let (word, label) = if i % 2 == 0 { ("w1", "up") } else { ("w70", "down") };
            classes += &format!("{word} w{} {word},{label}\n", 10 + i);
            numbers += &format!("{word} w{},{}\n", 10 + i, i % 2);
            tags += &format!("{word} {label}\nw{} O\n\n", 10 + i);
        }
        for (id, file, kind, text) in [
            ("classes", "a.csv", v1::DatasetKind::Classification, &classes),
            ("numbers", "b.csv", v1::DatasetKind::Regression, &numbers),
            ("tags", "c.conll", v1::DatasetKind::Tagging, &tags),
        ] {
            self.data(id, file, kind, text).await.unwrap();
        }
        for (data, method) in [
            ("classes", json!({ "dora": { "adapter": { "targets": ["all-linear"] } } })),
            ("numbers", json!({ "head_only": {} })),
            ("tags", json!({ "bitfit": {} })),
        ] {
            let training = json!({
                "dataset": format!("datasets/{data}"), "steps": 120, "batch_size": 10,
                "learning_rate": 0.01,
            });
            let request = v1::AdaptRequest {
                model: "models/reader".into(),
                ..request(data, method, training)
            };
            self.made(request).await;
        }
    }
}

fn uses(adapters: &[(&str, f32)]) -> Vec<v1::AdapterUse> {
    let one = |(id, weight): &(&str, f32)| v1::AdapterUse {
        name: format!("adapters/{id}"),
        weight: Some(*weight),
    };
    adapters.iter().map(one).collect()
}

fn merge(adapter: &str, model: &str) -> v1::MergeAdapterRequest {
    v1::MergeAdapterRequest {
        name: format!("adapters/{adapter}"),
        model: model.into(),
        ..Default::default()
    }
}

#[track_caller]
fn near(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < tolerance, "{got} is not {want}");
    }
}

/// Factors serve as bf16, so what serves differs from what merges by a small share of the change.
#[track_caller]
fn alike(served: &[f32], merged: &[f32], base: &[f32]) {
    let largest = |a: &[f32], b: &[f32]| {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    let (error, change) = (largest(served, merged), largest(served, base));
    assert!(error < 0.02 * change + 1e-3, "{error} of {change}");
}

#[track_caller]
fn differ(a: &[f32], b: &[f32]) {
    assert!(a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-2), "nothing changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dora_and_norms_serve_as_they_merge() {
    let world = World::start().await;
    let all = json!({ "r": 4, "targets": ["all-linear"] });
    let norms = json!({
        "r": 4, "targets": ["q_proj"],
        "modules_to_save": ["model.norm", "input_layernorm", "post_attention_layernorm"],
    });
    let dora =
        world.made(request("dora", json!({ "dora": { "adapter": all } }), training(40))).await;
    assert!(dora.warnings.is_empty(), "{:?}", dora.warnings);
    world.made(request("norms", json!({ "lora": { "adapter": norms } }), training(40))).await;

    let base = world.logprobs("models/tiny/versions/1", &[]).await.unwrap();
    for (id, method) in [("dora", v1::AdapterMethod::Dora), ("norms", v1::AdapterMethod::Tensors)] {
        let get = v1::GetAdapterRequest { name: format!("adapters/{id}") };
        let adapter = world.adapters().get_adapter(get).await.unwrap().into_inner();
        assert_eq!(adapter.method(), method);
        assert!(adapter.resident_bytes > 0);
        let with = world.logprobs("models/tiny/versions/1", &[(id, 1.0)]).await.unwrap();
        differ(&with, &base);
        let checked = v1::MergeAdapterRequest { validate_only: true, ..merge(id, "") };
        let checked = world.merge(checked).await.unwrap();
        assert!(checked.done && checked.name.is_empty());
        let report = world.merged(merge(id, "")).await;
        assert_eq!((report.base.as_str(), report.weight), ("models/tiny/versions/1", 1.0));
        assert!(report.tensor_count >= 5 && report.drifts.is_empty(), "{report:?}");
        assert_eq!(report.bytes_before, report.bytes_after);
        alike(&with, &world.logprobs(&report.version, &[]).await.unwrap(), &base);
        let get = v1::GetModelVersionRequest { name: report.version.clone() };
        let version = world.service.models().get_model_version(get).await.unwrap().into_inner();
        let lineage = version.lineage.unwrap();
        assert_eq!(lineage.parent, "models/tiny/versions/1");
        let merged = lineage.merged.unwrap();
        assert_eq!((merged.digest, merged.weight), (adapter.digest, 1.0));
        // Half of it serves as half of it merges.
        let half =
            v1::MergeAdapterRequest { weight: Some(0.5), ..merge(id, "models/tiny/versions/1") };
        let half = world.merged(half).await.version;
        let with = world.logprobs("models/tiny/versions/1", &[(id, 0.5)]).await.unwrap();
        alike(&with, &world.logprobs(&half, &[]).await.unwrap(), &base);
    }

    // A quantised version: the adapter serves beside it, and merges with leave.
    let recipe = json!({ "steps": [{ "round_to_nearest": { "grid": { "group_size": 16 } } }] });
    let rounded = v1::RunRecipeRequest {
        model: "models/tiny/versions/1".into(),
        recipe: Some(serde_json::from_value(recipe).unwrap()),
        ..Default::default()
    };
    let operation = world.service.jobs().run_recipe(rounded).await.unwrap().into_inner();
    let rounded: v1::RecipeReport = response(world.service.finished(&operation.name).await);
    let rounded = &rounded.versions[0];
    let plain = world.logprobs(rounded, &[]).await.unwrap();
    differ(&world.logprobs(rounded, &[("dora", 1.0)]).await.unwrap(), &plain);
    let refused = world.merge(merge("dora", rounded)).await.unwrap();
    let Some(lro::operation::Result::Error(error)) = refused.result else { panic!("merged") };
    assert!(error.message.contains("requantising"), "{error:?}");
    let leave = v1::MergeAdapterRequest { allow_requantise: true, ..merge("dora", rounded) };
    let report = world.merged(leave).await;
    assert!(report.warnings[0].contains("was made beside"), "{:?}", report.warnings);
    assert_eq!(report.drifts.len(), 14);
    assert!(report.max_drift > 0.0 && report.max_drift < 0.2, "{report:?}");
    assert!(report.mean_drift <= report.max_drift);
    differ(&world.logprobs(&report.version, &[]).await.unwrap(), &plain);

    // Bad requests.
    let heavy = v1::MergeAdapterRequest { weight: Some(1e9), ..merge("dora", "") };
    assert_error(world.merge(heavy).await, Code::InvalidArgument, "INVALID_FIELD", "weight");
    let none = world.merge(merge("none", "")).await;
    assert_error(none, Code::NotFound, "RESOURCE_NOT_FOUND", "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fully_tuned_model_is_merged() {
    let world = World::start().await;
    let training = json!({
        "dataset": "datasets/chat", "steps": 20, "batch_size": 6, "learning_rate": 1e-3,
    });
    let report = world.made(request("full", json!({ "full": {} }), training)).await;
    assert!(report.warnings.iter().any(|w| w.contains("merge")), "{:?}", report.warnings);
    let error = world.logprobs("models/tiny", &[("full", 1.0)]).await.unwrap_err();
    assert!(error.message().contains("planish adapters merge"), "{error:?}");
    let base = world.logprobs("models/tiny/versions/1", &[]).await.unwrap();
    let report = world.merged(merge("full", "")).await;
    let tuned = world.logprobs(&report.version, &[]).await.unwrap();
    assert!(tuned.iter().zip(&base).any(|(a, b)| (a - b).abs() > 1e-3));
    assert_eq!(report.tensor_count, 2 * 9 + 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_predict_and_encoders_embed_with_adapters() {
    let world = World::start().await;
    world.with_reader().await;
    let ask = |adapters: &[(&str, f32)], texts: &[&str]| v1::PredictRequest {
        model: "models/reader".into(),
        adapters: uses(adapters),
        texts: texts.iter().map(|t| (*t).to_owned()).collect(),
        all_scores: true,
        ..Default::default()
    };
    let predict = async |request: v1::PredictRequest| {
        world.prediction().predict(request).await.map(|a| a.into_inner().predictions)
    };
    let classes = predict(ask(&[("classes", 1.0)], &["w1 w12 w1", "w70 w15 w70", "w1 w30 w1"]))
        .await
        .unwrap();
    for (prediction, want) in classes.iter().zip(["up", "down", "up"]) {
        let Some(Kind::Classification(class)) = &prediction.kind else { panic!("{prediction:?}") };
        assert_eq!(class.label, want, "{prediction:?}");
        assert!(class.score > 0.5 && class.scores.len() == 2);
        assert!((class.scores.iter().map(|s| s.score).sum::<f32>() - 1.0).abs() < 1e-5);
        assert_eq!(prediction.token_count, 5);
    }
    let numbers = predict(ask(&[("numbers", 1.0)], &["w1 w12", "w70 w15"])).await.unwrap();
    let value = |p: &v1::Prediction| match p.kind {
        Some(Kind::Value(value)) => value,
        _ => panic!("{p:?}"),
    };
    assert!(value(&numbers[0]) < value(&numbers[1]), "{numbers:?}");
    let tags = predict(ask(&[("tags", 1.0)], &["w1, w12 w70", "", "w70 w15"])).await.unwrap();
    let Some(Kind::Tagging(found)) = &tags[0].kind else { panic!("{tags:?}") };
    let words: Vec<_> =
        found.words.iter().map(|w| (w.word.as_str(), w.start, w.end, w.tag.as_str())).collect();
    assert_eq!(words.len(), 4);
    assert_eq!(words[0], ("w1", 0, 2, "up"));
    let places: Vec<_> = words[1..].iter().map(|w| (w.0, w.1, w.2)).collect();
    assert_eq!(places, [(",", 2, 3), ("w12", 4, 7), ("w70", 8, 11)]);
    assert!(matches!(&tags[1].kind, Some(Kind::Tagging(none)) if none.words.is_empty()));
    let Some(Kind::Tagging(found)) = &tags[2].kind else { panic!("{tags:?}") };
    let found: Vec<_> = found.words.iter().map(|w| w.tag.as_str()).collect();
    assert_eq!(found, ["down", "O"]);
    let own = v1::PredictRequest {
        words: vec![v1::Words { words: vec!["w1".into(), "w12".into()] }],
        ..ask(&[("tags", 1.0)], &[])
    };
    let own = predict(own).await.unwrap();
    let Some(Kind::Tagging(own)) = &own[0].kind else { panic!("{own:?}") };
    assert_eq!((own.words[0].tag.as_str(), own.words[1].tag.as_str()), ("up", "O"));

    // Texts with different adapters at the same time get their own.
    let both = futures::future::join_all((0..12).map(|i| {
        let id = ["classes", "numbers", "tags"][i % 3];
        predict(ask(&[(id, 1.0)], &["w1 w12 w1"]))
    }));
    for (i, answer) in both.await.into_iter().enumerate() {
        let kind = answer.unwrap().remove(0).kind.unwrap();
        let right = match i % 3 {
            0 => kind == classes_first(&classes),
            1 => matches!(kind, Kind::Value(_)),
            _ => matches!(&kind, Kind::Tagging(t) if t.words.len() == 3),
        };
        assert!(right, "{i}: {kind:?}");
    }

    // Vectors with an adapter are those of the merged version.
    let texts = ["w1 w2", "w70 w3 w4 w5", "w9"];
    let base = world.vectors("models/reader/versions/1", &texts, &[]).await;
    for id in ["classes", "tags"] {
        let with = world.vectors("models/reader/versions/1", &texts, &[(id, 1.0)]).await;
        differ(&with.concat(), &base.concat());
        let report = world.merged(merge(id, "models/reader/versions/1")).await;
        assert!(report.warnings[0].contains("head"), "{report:?}");
        let merged = world.vectors(&report.version, &texts, &[]).await;
        near(&with.concat(), &merged.concat(), 1e-4);
    }
    let first = v1::EmbedStreamRequest {
        model: "models/reader/versions/1".into(),
        adapters: uses(&[("tags", 1.0)]),
        texts: vec![texts[0].into()],
        ..Default::default()
    };
    let second = v1::EmbedStreamRequest { texts: vec![texts[1].into()], ..Default::default() };
    let stream = futures::stream::iter([first, second]);
    let mut answers = world.service.retrieval().embed_stream(stream).await.unwrap().into_inner();
    let mut streamed = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        streamed.extend(answer.embeddings.into_iter().map(|e| e.values));
    }
    let want = world.vectors("models/reader/versions/1", &texts[..2], &[("tags", 1.0)]).await;
    near(&streamed.concat(), &want.concat(), 1e-6);

    // What cannot be predicted.
    let field = async |request: v1::PredictRequest, code: Code, reason: &str, field: &str| {
        assert_error(predict(request).await, code, reason, field);
    };
    let invalid = (Code::InvalidArgument, "INVALID_FIELD");
    field(ask(&[], &["w1"]), invalid.0, invalid.1, "adapters").await;
    let two = ask(&[("tags", 1.0), ("numbers", 1.0)], &["w1"]);
    field(two, invalid.0, invalid.1, "adapters[1].name").await;
    let tokens = v1::PredictRequest {
        tokens: vec![v1::TokenIds { ids: vec![1] }],
        ..ask(&[("tags", 1.0)], &[])
    };
    field(tokens, invalid.0, invalid.1, "tokens").await;
    let long = "w1 ".repeat(40);
    let long = v1::PredictRequest { truncate: Some(false), ..ask(&[("numbers", 1.0)], &[&long]) };
    field(long, invalid.0, invalid.1, "texts[0]").await;
    let decoder = v1::PredictRequest { model: "models/tiny".into(), ..ask(&[], &["a"]) };
    field(decoder, Code::FailedPrecondition, "MODEL_UNSUITABLE", "").await;
}

fn classes_first(classes: &[v1::Prediction]) -> Kind {
    classes[0].kind.clone().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_files_travel_to_another_server() {
    let (here, there) = (World::start().await, World::start().await);
    let adapter = json!({ "r": 4, "targets": ["q_proj", "v_proj"] });
    let folder = tempfile::tempdir().unwrap();
    for (id, method) in [
        ("nola", json!({ "nola": { "adapter": adapter, "basis_a": 8, "basis_b": 8 } })),
        ("xs", json!({ "lora_xs": { "adapter": adapter } })),
        ("full", json!({ "full": { "modules": ["model.norm"] } })),
    ] {
        let made = here.made(request(id, method, training(5))).await;
        let path = folder.path().join(id);
        here.export(&made.adapter, &path).await;
        let import = |uploaded: Vec<v1::ModelFile>, base: &str| v1::ImportAdapterRequest {
            adapter_id: id.into(),
            base: base.into(),
            source: Some(Source::Uploaded(v1::UploadedFiles { files: uploaded })),
            ..Default::default()
        };
        let all = files(&there, &path, &[]).await;
        let back =
            there.adapters().import_adapter(import(all, "models/tiny")).await.unwrap().into_inner();
        assert_eq!(back.digest, made.digest, "{id}: the same files");
        assert!(back.lineage.unwrap().adaptation.is_some());
        let (a, b) = (
            here.logprobs("models/tiny", &[(id, 1.0)]).await.unwrap(),
            there.logprobs("models/tiny", &[(id, 1.0)]).await.unwrap(),
        );
        assert_eq!(a, b, "{id}");
        // The two of ours say it all.
        let delete = v1::DeleteAdapterRequest { name: back.name, etag: String::new() };
        there.adapters().delete_adapter(delete).await.unwrap();
        let own = files(&there, &path, &["adapter.json", "adapter.safetensors"]).await;
        let back =
            there.adapters().import_adapter(import(own, "models/tiny")).await.unwrap().into_inner();
        assert_eq!(there.logprobs("models/tiny", &[(id, 1.0)]).await.unwrap(), a, "{id}");
        // Another version is another base.
        let delete = v1::DeleteAdapterRequest { name: back.name, etag: String::new() };
        there.adapters().delete_adapter(delete).await.unwrap();
    }
    let other = crate::support::tiny(2, 64);
    let model = tempfile::tempdir().unwrap();
    planish::models::export::hugging_face(&other, model.path(), planish::nn::dtype::Dtype::F32)
        .unwrap();
    there.service.import("other", model.path()).await;
    let uploaded = files(&there, &folder.path().join("nola"), &[]).await;
    let wrong = v1::ImportAdapterRequest {
        adapter_id: "wrong".into(),
        base: "models/other".into(),
        source: Some(Source::Uploaded(v1::UploadedFiles { files: uploaded })),
        ..Default::default()
    };
    let refused = there.adapters().import_adapter(wrong).await;
    assert_error(refused, Code::FailedPrecondition, "MODEL_UNSUITABLE", "");
}

/// Uploads the files of a folder, or those of these names.
async fn files(world: &World, folder: &Path, names: &[&str]) -> Vec<v1::ModelFile> {
    let mut uploaded = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy().into_owned();
        if !names.is_empty() && !names.contains(&name.as_str()) {
            continue;
        }
        let bytes = std::fs::read(entry.path()).unwrap();
        let mut file = crate::harness::upload(world.service.models(), &bytes).await.unwrap();
        file.file_name = name;
        uploaded.push(file);
    }
    uploaded
}
