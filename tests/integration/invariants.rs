//! More that every method that compresses owes: bytes to a percent in the files, values that are not touched,
//! orders that are called sensible, numbers that are not finite, and nothing that holds a model after its step
//! was cancelled. As the contract, over all registered methods and every architecture.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use planish::error::{Class, Reason};
use planish::methods::Card;
use planish::models::{AnyInfo, Model, encoder};
use planish::nn::dtype::Dtype;
use planish::nn::weight::{Dense, Weight};
use planish::progress::Progress;
use planish::proto::v1;
use planish::recipe;
use serde_json::{Value, json};

use crate::contract::{
    ARCHITECTURES, compressing, model, package_bytes, prunes, run, run_with, slims, step,
};

fn takes(card: &Card, architecture: &str) -> bool {
    let family = if architecture == "bert" { encoder::FAMILY } else { "decoder" };
    card.families.contains(&family)
}

fn each(mut check: impl FnMut(&'static Card, &'static str)) {
    for card in compressing() {
        ARCHITECTURES.into_iter().filter(|a| takes(card, a)).for_each(|a| check(card, a));
    }
}

fn of(steps: &[v1::Step]) -> v1::Recipe {
    v1::Recipe { seed: 5, steps: steps.to_vec(), ..Default::default() }
}

/// Bytes of weights that a plan promises.
fn promised(steps: &[v1::Step], model: &Model) -> f64 {
    let info = AnyInfo::from(model.info());
    recipe::check(&of(steps), &info).expect("fits").total.weight_bytes as f64
}

#[test]
fn files_hold_the_bytes_that_were_promised() {
    each(|card, architecture| {
        let before = model(architecture);
        // Widths of the tiny models are a few times what they are rounded to otherwise.
        let patch = if slims(card) { json!({ "round_to": 2 }) } else { json!({}) };
        let steps = [step(card.name, &patch)];
        let want = promised(&steps, &before);
        let made = run(&steps, before).expect("runs").model;
        let folder = tempfile::tempdir().expect("a folder");
        let mut data = 0;
        for (name, bytes) in package_bytes(&made, folder.path()) {
            if name.ends_with(".safetensors") {
                let header: [u8; 8] = bytes[..8].try_into().expect("eight bytes");
                data += bytes.len() as u64 - 8 - u64::from_le_bytes(header);
            }
        }
        let what = format!("{} on {architecture}", card.name);
        assert_eq!(data, made.bytes(), "{what}");
        // Shares of ECoFLaP's blocks are known when they were scored, and each rounds down in its rows.
        let most = if card.name == "ecoflap" { 0.1 } else { 0.01 };
        assert!((data as f64 / want - 1.0).abs() <= most, "{what}: {data} for {want}");
    });
}

#[test]
fn what_stays_of_a_pruning_without_updates_is_what_it_was() {
    each(|card, architecture| {
        let patch = match card.name {
            "ecoflap" => json!({ "values": "VALUE_TYPE_F32" }),
            // Its weights make good what went.
            "sparsegpt" => return,
            _ if prunes(card) => json!({ "sparsity.values": "VALUE_TYPE_F32" }),
            _ => return,
        };
        let before = model(architecture);
        let made = run(&[step(card.name, &patch)], before.clone()).expect("runs").model;
        for (name, weight) in &made.weights {
            let (old, new) = (before.weights[name].to_f32(), weight.to_f32());
            let kept = old.iter().zip(&new).all(|(o, n)| *n == 0.0 || o.to_bits() == n.to_bits());
            assert!(kept, "{name} after {} on {architecture}", card.name);
        }
    });
}

#[test]
fn orders_that_are_called_sensible_run_and_take_what_was_promised() {
    let mut walked = 0;
    for first in compressing().filter(|card| !card.followed_by.is_empty()) {
        for architecture in ["llama", "gemma3_text", "bert"] {
            if !takes(first, architecture) {
                continue;
            }
            let base = model(architecture);
            let one = step(first.name, &json!({}));
            let between = run(std::slice::from_ref(&one), base.clone()).expect("runs").model;
            for second in first.followed_by {
                let what = format!("{}, then {second} on {architecture}", first.name);
                let two = step(second, &json!({}));
                let want = promised(&[one.clone(), two.clone()], &base);
                let made = run(&[two], between.clone()).unwrap_or_else(|e| panic!("{what}: {e}"));
                let got = made.model.bytes() as f64;
                assert!((got / want - 1.0).abs() < 0.1, "{what}: {got} for {want}");
                let finite = |w: &Arc<Weight>| w.to_f32().iter().all(|v| v.is_finite());
                assert!(made.model.weights.values().all(finite), "{what}");
                walked += 1;
            }
        }
    }
    assert!(walked > 80, "{walked}");
}

#[test]
fn weights_that_are_not_finite_are_refused_by_every_method() {
    each(|card, architecture| {
        let mut broken = model(architecture);
        let name = match architecture {
            "bert" => "encoder.layer.1.output.dense.weight",
            _ => "model.layers.1.mlp.down_proj.weight",
        };
        let mut values = broken.weights[name].to_f32();
        values[5] = f32::INFINITY;
        let shape = broken.weights[name].shape().to_vec();
        let dense = Dense::from_f32(shape, &values, Dtype::F32).expect("stored");
        broken.weights.insert(name.to_owned(), Arc::new(Weight::Dense(dense)));
        let what = format!("{} on {architecture}", card.name);
        let error = run(&[step(card.name, &json!({}))], broken).err();
        let error = error.unwrap_or_else(|| panic!("{what} went on"));
        assert_eq!(error.reason(), Reason::NonFinite, "{what}: {error}");
        assert_eq!(error.reason().class(), Class::DataLoss);
    });
}

#[test]
fn nothing_holds_a_model_whose_step_was_cancelled() {
    each(|card, architecture| {
        let base = model(architecture);
        let held = |reports: usize| {
            let scratch = tempfile::tempdir().expect("a folder");
            let cancelled = Arc::new(AtomicBool::new(false));
            let seen = Arc::new(AtomicUsize::new(0));
            let (flag, count) = (cancelled.clone(), seen.clone());
            let sink = move |_: f64, _: &str| {
                if count.fetch_add(1, Ordering::Relaxed) >= reports {
                    flag.store(true, Ordering::Relaxed);
                }
            };
            let progress = Progress::new(Arc::new(sink), cancelled);
            let recipe = of(&[step(card.name, &Value::Null)]);
            let result = run_with(&recipe, 0, base.clone(), &progress, scratch.path());
            (result.err().map(|error| error.reason()), seen.load(Ordering::Relaxed))
        };
        let (whole, said) = held(usize::MAX);
        assert_eq!(whole, None, "{} on {architecture}", card.name);
        // In the middle of what it says.
        let (cut, _) = held(said / 2);
        assert_eq!(cut, Some(Reason::Cancelled), "{} on {architecture}", card.name);
        for (name, weight) in &base.weights {
            assert_eq!(Arc::strong_count(weight), 1, "{name} is held by {}", card.name);
        }
    });
}
