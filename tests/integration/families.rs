//! Every method that compresses, on every family it is for: what a little of it does is nearer to the model
//! than what much of it does, what it makes is served in each arithmetic there is, and families it is not for
//! and options that are wrong are refused before work starts.

use std::collections::BTreeMap;
use std::path::PathBuf;

use planish::error::Reason;
use planish::methods::{Card, docs, registry};
use planish::models::decoder::plan::{Arithmetic, Cache, Chunk, Decoder};
use planish::models::encoder::plan::{Encoder, Input, Precision};
use planish::models::encoder::{self, Pooling};
use planish::models::{AnyInfo, AnyModel, Family, Model, package};
use planish::proto::v1;
use planish::recipe;
use serde_json::{Value, json};
use tonic::Code;

use crate::contract::{
    ARCHITECTURES, compressing, model, package_bytes, prunes, quantises, run, slims, step,
};
use crate::harness::{Service, assert_error};
use crate::support;

fn family(architecture: &str) -> &'static str {
    if architecture == "bert" { encoder::FAMILY } else { "decoder" }
}

fn tokens() -> Vec<u32> {
    (0..24).map(|i| (i * 29 + 7) % 96).collect()
}

/// What a model answers: logits of a decoder, vectors of an encoder. `fast` is how it is served where integers
/// run, instead of in f32.
fn answers(model: &Model, fast: bool) -> Vec<f32> {
    let ids = tokens();
    if let Family::Encoder(config) = &model.family {
        let precision = if fast { Precision::Int8 } else { Precision::F32 };
        let model = AnyModel::from(model).encoder().expect("an encoder");
        let mut encoder = Encoder::with(&model, precision).expect("runs");
        let texts: Vec<Input<'_>> =
            ids.chunks(6).map(|tokens| Input { tokens, pooling: Pooling::Mean }).collect();
        let mut out = vec![0.0; texts.len() * config.hidden];
        encoder.embed(&texts, &mut out).expect("embeds");
        return out;
    }
    let arithmetic = if fast { Arithmetic::Integer } else { Arithmetic::Exact };
    let mut decoder = Decoder::with(model, arithmetic).expect("runs");
    let mut cache = Cache::new(decoder.config(), ids.len());
    let mut chunks = [Chunk { tokens: &ids, cache: &mut cache, logits: 0..ids.len() }];
    decoder.forward(&mut chunks).expect("answers").to_vec()
}

/// Distance over the length of what is wanted.
fn off(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |v: f32| f64::from(v) * f64::from(v);
    let distance: f64 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (distance / want.iter().map(|w| square(*w)).sum::<f64>()).sqrt()
}

/// Options that ask for little, and for much.
fn little_and_much(card: &Card) -> [Value; 2] {
    match card.name {
        "ecoflap" => [0.1, 0.7].map(|share| json!({ "share": share, "batch": 2 })),
        "low_rank" => [1, 26].map(|drop| json!({ "drop": drop })),
        "dgq" => ["DUAL_GRAINED", "ROWS"].map(|form| json!({ "form": format!("DGQ_FORM_{form}") })),
        // A tenth of the weights, drawn, is much already.
        "random_pruning" => [0.01, 0.7].map(|share| json!({ "sparsity.share": share })),
        "group_sparse" => [0.1, 0.7].map(|sparsity| json!({ "sparsity": sparsity, "group": 4 })),
        // One size only.
        "normal_float" => [json!({}), json!({})],
        _ if slims(card) => [0.1, 0.6].map(|ratio| json!({ "ratio": ratio, "round_to": 4 })),
        _ if prunes(card) => [0.1, 0.7].map(|share| json!({ "sparsity.share": share })),
        _ if quantises(card) => [8, 2].map(|bits| json!({ "grid.bits": bits })),
        name => panic!("say what little and much are of {name}"),
    }
}

#[test]
fn a_little_changes_answers_less_than_much_and_is_served_as_it_is_measured() {
    let (mut walked, mut encoders) = (0, 0);
    for architecture in ARCHITECTURES {
        let before = model(architecture);
        let want = answers(&before, false);
        // What 8-bit activations alone do to the answers.
        let rounding = off(&answers(&before, true), &want);
        for card in compressing().filter(|card| card.families.contains(&family(architecture))) {
            let what = format!("{} on {architecture}", card.name);
            let mut far = Vec::new();
            for patch in little_and_much(card) {
                let made = run(&[step(card.name, &patch)], before.clone()).expect("runs").model;
                let exact = answers(&made, false);
                assert!(exact.iter().all(|v| v.is_finite()), "{what}");
                let distance = off(&exact, &want);
                assert!(distance > 1e-6, "{what} changed nothing");
                far.push(distance);

                // Stored and loaded it answers the same, and so it does where it is served.
                let folder = tempfile::tempdir().expect("a folder");
                let names = package_bytes(&made, folder.path()).into_keys();
                let files: BTreeMap<String, PathBuf> =
                    names.map(|name| (name.clone(), folder.path().join(name))).collect();
                let loaded = package::read(&files).expect("loads");
                assert_eq!(answers(&loaded, false), exact, "{what}");
                let served = off(&answers(&loaded, true), &exact);
                assert!(served < 0.15 + 3.0 * rounding, "{what}: {served} of {rounding}");
            }
            let [little, much] = far[..] else { panic!("two of each") };
            match card.name {
                "normal_float" => assert!(little < 0.4, "{what}: {little}"),
                // Two grids of four bits, of which the finer is the nearer.
                "dgq" => assert!(little < 0.8 && little < 1.3 * much, "{what}: {little} {much}"),
                _ => assert!(little < 0.8 * much && little < 0.6, "{what}: {little} {much}"),
            }
            walked += 1;
            encoders += usize::from(architecture == "bert");
        }
    }
    assert!(walked > 55 && encoders >= 15, "{walked} {encoders}");
}

#[test]
fn families_that_a_method_is_not_for_are_refused_before_work() {
    let mut refused = Vec::new();
    for card in compressing() {
        for architecture in ["llama", "bert"] {
            if card.families.contains(&family(architecture)) {
                continue;
            }
            let recipe =
                v1::Recipe { steps: vec![step(card.name, &json!({}))], ..Default::default() };
            let info = AnyInfo::from(model(architecture).info());
            let error = recipe::check(&recipe, &info).err().expect("refused");
            assert_eq!(error.reason(), Reason::ModelUnsuitable, "{}", card.name);
            if let Some(violation) = error.violations().first() {
                let field = &violation.field;
                assert!(field.starts_with(&format!("steps[0].{}", card.name)), "{field}");
            }
            assert!(error.message().contains("encoder"), "{error}");
            refused.push(card.name);
        }
    }
    refused.sort_unstable();
    assert_eq!(refused, ["group_sparse", "lrec"]);
}

/// An option of a method that is wrong, and a value for it. The first of these that it has.
fn wrong(card: &Card) -> (&'static str, Value) {
    let all = [
        ("sparsity.share", json!(1.5)),
        ("drop", json!(0)),
        ("rank", json!(0)),
        ("search_steps", json!(0)),
        ("smooth_top", json!(0.9)),
        ("grid.bits", json!(5)),
        ("ratio", json!(0.95)),
        ("max_share", json!(0.01)),
        ("group", json!(3)),
        ("scope", json!(["*.k_prof.*"])),
    ];
    let options = docs::options(card.name);
    let has = |name: &str| options.iter().any(|option| option.name == name);
    let found = all.into_iter().find(|(name, _)| has(name));
    found.unwrap_or_else(|| panic!("say what is wrong of {}", card.name))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_options_of_every_method_are_refused_over_the_wire_and_nothing_is_queued() {
    let service = Service::start().await;
    let files = tempfile::tempdir().unwrap();
    service.import("tiny", &support::tiny_model(files.path(), 1, 32)).await;
    let list = v1::ListModelVersionsRequest { parent: "models/tiny".into(), ..Default::default() };
    let before = operations(&service).await;
    let mut asked = 0;
    for card in registry::cards().into_iter().filter(|card| card.verb == "compress") {
        let (name, value) = wrong(card);
        let step = step(card.name, &json!({ name: value }));
        let recipe = v1::Recipe { steps: vec![step], ..Default::default() };
        let request = v1::RunRecipeRequest {
            model: "models/tiny".into(),
            recipe: Some(recipe),
            ..Default::default()
        };
        let refused = service.jobs().run_recipe(request).await;
        let field = format!("recipe.steps[0].{}.{name}", card.name);
        match name {
            "scope" => assert_error(refused, Code::NotFound, "TENSOR_NOT_FOUND", &field),
            _ => assert_error(refused, Code::InvalidArgument, "INVALID_OPTION", &field),
        }
        asked += 1;
    }
    assert!(asked >= 16, "{asked}");
    assert_eq!(operations(&service).await, before);
    let versions = service.models().list_model_versions(list).await.unwrap().into_inner();
    assert_eq!(versions.versions.len(), 1);
    service.running.stop().await.unwrap();
}

/// How many operations there are.
async fn operations(service: &Service) -> usize {
    use planish::proto::google::longrunning::ListOperationsRequest;
    let all = ListOperationsRequest { page_size: 100, ..Default::default() };
    service.operations().list_operations(all).await.unwrap().into_inner().operations.len()
}
