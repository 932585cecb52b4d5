//! Adapters in whole models: the differentiable forward with what is tuned against the forward of the merged
//! model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::testing::{Case, all_linear, low_rank_methods};
use super::{export, merge};
use crate::data::sequence::{Sequence, Target};
use crate::formats::peft::Folder;
use crate::models::Model;
use crate::models::decoder::graph::Graph;
use crate::models::decoder::plan::adapters::{Fitted, Mix};
use crate::models::decoder::plan::{Cache, Chunk, Decoder};
use crate::models::export::{GgufFormat, gguf, hugging_face};
use crate::models::import;
use crate::nn::dtype::Dtype;
use crate::nn::ops::{Network, Pool, Precision, Run, Sequences, Tape};
use crate::nn::tuning::{Frozen, Tuning};
use crate::progress::Progress;
use crate::proto::v1;
use crate::train::pass::{Options, Pass};

fn tokens() -> Vec<u32> {
    (0..24).map(|i| (i * 29 + 7) % 96).collect()
}

/// Logits `[tokens, vocab]` of one sequence.
fn logits(model: &Model, tuning: &dyn Tuning) -> Vec<f32> {
    let ids = tokens();
    let tape = Tape::forgetful(&Pool::default());
    let sequences = Sequences::of([ids.len()]);
    let run = Run { tape: &tape, tuning, sequences: &sequences, training: false, read: true };
    let graph = Graph::new(model, Precision::F32).unwrap();
    let hidden = graph.through(&run, graph.start(&run, &ids).unwrap()).unwrap();
    let normed = graph.normed(&run, &hidden).unwrap();
    graph.logits(&run, &normed).unwrap().read().to_vec()
}

fn near(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= tolerance, "{what}: {got} is not {want}");
    }
}

#[test]
fn tuned_logits_are_those_of_the_merged_model() {
    let case = Case::decoder();
    let model = case.decoder_model();
    let base = logits(model, &Frozen);
    for method in low_rank_methods() {
        let name = method.card().name;
        let tuned = case.start(method.as_ref());
        let tolerance = if name == "lora_xs" { 1e-3 } else { 1e-4 };
        near(&logits(model, &tuned), &base, tolerance, name);
        case.disturb(&tuned, 0.05);
        let got = logits(model, &tuned);
        let moved = got.iter().zip(&base).any(|(a, b)| (a - b).abs() > 1e-3);
        assert!(moved, "{name} changes nothing");
        let merged = merge::merge(&tuned, case.weights(), false, &Progress::silent()).unwrap();
        let mut whole = model.clone();
        whole.weights.extend(merged.weights);
        near(&got, &logits(&whole, &Frozen), 1e-4, name);
    }
}

#[test]
fn served_logits_are_those_of_the_merged_factors() {
    let case = Case::decoder();
    let model = case.decoder_model();
    let ids = tokens();
    for method in low_rank_methods() {
        let tuned = case.start(method.as_ref());
        case.disturb(&tuned, 0.05);
        let Ok(adapter) = export::served(&tuned) else { continue };
        // The factors that serve are bf16; the model that they are merged into takes the same.
        let mut whole = model.clone();
        for (name, factors) in &adapter.linears {
            let stored = &whole.weights[name];
            let mut values = stored.to_f32();
            factors.add_to(1.0, &mut values);
            let dense =
                crate::nn::weight::Dense::from_f32(stored.shape().to_vec(), &values, Dtype::F32);
            let weight = crate::nn::weight::Weight::Dense(dense.unwrap());
            whole.weights.insert(name.clone(), Arc::new(weight));
        }
        let want = logits(&whole, &Frozen);
        let mut decoder = Decoder::new(model).unwrap();
        let mut cache = Cache::new(decoder.config(), ids.len());
        let fitted = Arc::new(Fitted::new("digest", &adapter, decoder.config()).unwrap());
        let mix = Mix::new([(fitted, 1.0)]);
        let mut chunks = [Chunk { tokens: &ids, cache: &mut cache, logits: 0..ids.len() }];
        let got = decoder.forward_with(&mut chunks, &[mix]).unwrap();
        near(got, &want, 1e-4, method.card().name);
    }
}

#[test]
fn gradients_reach_what_is_trained_and_checkpoints_change_no_bit() {
    let case = Case::decoder();
    let model = case.decoder_model();
    let ids = tokens();
    let target = Target::Next((0..ids.len()).map(|i| i > 2).collect());
    let sequence = Sequence { tokens: ids, target, line: 1 };
    for method in low_rank_methods() {
        let name = method.card().name;
        let mut tuned = case.start(method.as_ref());
        tuned.dropout = 0.1;
        case.disturb(&tuned, 0.05);
        tuned.set_pass(Some(3));
        let parameters = tuned.parameters();
        let run = |checkpoint_activations| {
            let graph = Graph::new(model, Precision::F32).unwrap();
            let options = Options { checkpoint_activations, ..Options::default() };
            let pass = Pass::decoder(graph, &tuned, options);
            pass.loss_and_gradients(&[&sequence], &parameters).unwrap()
        };
        let (sums, gradients) = run(false);
        assert_eq!(
            gradients.keys().collect::<Vec<_>>(),
            parameters.keys().collect::<Vec<_>>(),
            "{name}"
        );
        let (again, recomputed) = run(true);
        assert_eq!(sums, again, "{name}");
        for (parameter, gradient) in &gradients {
            let values =
                |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (got, want) = (values(&recomputed[parameter]), values(gradient));
            assert!(want.iter().any(|v| *v != 0.0), "{name}: {parameter} has no gradient");
            let size = want.iter().fold(0.0f32, |a, v| a.max(v.abs()));
            near(&got, &want, 1e-5 * size.max(1e-3), parameter);
        }
        tuned.set_pass(Some(4));
        assert_ne!(run(false).0, sums, "{name}: another pass drops other elements");
        tuned.set_pass(None);
        let (still, _) = run(false);
        assert_eq!(still, run(false).0, "{name}");
    }
}

/// Writes a model, adapters in PEFT's form and the logits that they give into `PLANISH_PEFT_OUT`, for
/// `benches/peers/peft_load.py`; into a temporary folder where that is not set.
#[test]
fn files_for_the_peer() {
    let temporary = tempfile::tempdir().unwrap();
    let out = std::env::var_os("PLANISH_PEFT_OUT").map_or(temporary.path().into(), PathBuf::from);
    let case = Case::decoder();
    let model = case.decoder_model();
    hugging_face(model, &out.join("base"), Dtype::F32).unwrap();
    let write = |path: &Path, value: &serde_json::Value| {
        std::fs::write(path, serde_json::to_vec(value).unwrap()).unwrap();
    };
    write(&out.join("tokens.json"), &json!(tokens()));
    write(&out.join("base.json"), &json!(logits(model, &Frozen)));
    let none = BTreeMap::new();
    let base = out.join("base").display().to_string();
    let about = export::About {
        shapes: case.shapes(),
        base: &base,
        task: "CAUSAL_LM",
        inside: "",
        heads: &none,
    };
    let uneven = v1::AdapterOptions {
        rslora: Some(true),
        alpha: Some(5.0),
        rank_pattern: [("layers.1.mlp.up_proj".to_owned(), 7)].into(),
        alpha_pattern: [("q_proj".to_owned(), 2.0)].into(),
        modules_to_save: vec!["model.norm".into()],
        ..all_linear(3)
    };
    let mut methods: Vec<(String, Box<dyn super::Adapt>)> = low_rank_methods()
        .into_iter()
        .map(|method| (method.card().name.to_owned(), method))
        .collect();
    methods.push((
        "lora_uneven".to_owned(),
        Box::new(v1::Lora { adapter: Some(uneven), ..Default::default() }),
    ));
    for (name, method) in methods {
        let tuned = case.start(method.as_ref());
        case.disturb(&tuned, 0.05);
        let folder = out.join(&name);
        std::fs::create_dir_all(&folder).unwrap();
        export::peft(&tuned, &about).unwrap().write(&folder).unwrap();
        let got = logits(model, &tuned);
        write(&folder.join("logits.json"), &json!(got));
        // What was written gives these logits.
        let files = Folder::read(&folder).unwrap();
        let contents = crate::formats::peft::contents::Contents::parse(
            &files.config,
            &files.tensors,
            crate::formats::peft::Use::Keep,
        )
        .unwrap();
        let (loaded, _) = export::load(&contents, "", case.shapes(), case.weights()).unwrap();
        near(&logits(model, &loaded), &got, 1e-4, &name);
        if name == "lora" || name == "lora_uneven" {
            let folder = out.join(format!("{name}_as_adalora"));
            std::fs::create_dir_all(&folder).unwrap();
            export::adalora(&tuned, &about).unwrap().write(&folder).unwrap();
            write(&folder.join("logits.json"), &json!(got));
        }
    }
}

/// Files of GGUF hold the rows of rotated heads in another order; adapters in the usual files fit all the same.
#[test]
fn adapters_in_the_usual_files_fit_a_base_from_gguf() {
    let case = Case::decoder();
    let model = case.decoder_model();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    gguf(model, &path, GgufFormat::F32, &Progress::silent()).unwrap();
    // Heads of 16 rows: row 1 there is row 8 here, the first of the second half.
    let file = crate::formats::gguf::open(&path).unwrap();
    let theirs = file.tensors["blk.0.attn_q.weight"].weight().unwrap().to_f32();
    let ours = case.stored("model.layers.0.self_attn.q_proj.weight").to_f32();
    assert_eq!(theirs[32..64], ours[8 * 32..9 * 32]);
    let base = import::open(&path).unwrap();

    let tuned = case.start(&v1::Lora { adapter: Some(all_linear(3)), ..Default::default() });
    case.disturb(&tuned, 0.1);
    let none = BTreeMap::new();
    let about = export::About {
        shapes: case.shapes(),
        base: "base",
        task: "CAUSAL_LM",
        inside: "",
        heads: &none,
    };
    export::peft(&tuned, &about).unwrap().write(folder.path()).unwrap();
    let files = Folder::read(folder.path()).unwrap();
    let contents = crate::formats::peft::contents::Contents::parse(
        &files.config,
        &files.tensors,
        crate::formats::peft::Use::Keep,
    )
    .unwrap();
    let (loaded, _) = export::load(&contents, "", case.shapes(), &base.weights).unwrap();
    let (got, want) = (logits(&base, &loaded), logits(model, &tuned));
    near(&got, &want, 1e-3, "a base from a GGUF file");
    let bare = logits(model, &Frozen);
    assert!(want.iter().zip(&bare).any(|(a, b)| (a - b).abs() > 1e-2), "the adapter does nothing");
}
