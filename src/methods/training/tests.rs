//! The steps on tiny models: what they promise, and what they refuse.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::run::{RATE, check as check_training};
use crate::calibrate;
use crate::data::captions::Captions;
use crate::data::images::Images;
use crate::data::records::{Kind, Layout, Source};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::methods::{AnyOutcome, Datasets, Learning, StepContext, registry};
use crate::models::{AnyModel, decoder, random};
use crate::nn::weight::{Sparse, ValueFormat, Weight};
use crate::progress::Progress;
use crate::proto::v1;
use crate::seed::Stream;

/// Eight by eight images with a bar in one of four places, and a text.
struct Data {
    text: tempfile::NamedTempFile,
}

impl Data {
    fn new() -> Self {
        let text = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(text.path(), "abcabcabd ".repeat(60)).unwrap();
        Self { text }
    }

    fn images(count: usize) -> Images {
        let classes: Vec<u8> = (0..count).map(|i| (i % 4) as u8).collect();
        let pixels = classes.iter().enumerate().flat_map(|(i, class)| {
            (0..64).map(move |p| {
                let bar = p % 8 / 2 == usize::from(*class);
                if bar { 200 } else { ((i * 7 + p * 3) % 40) as u8 }
            })
        });
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect();
        let captions = Captions {
            names: words(&["left", "near left", "near right", "right"]),
            templates: words(&["a bar {}", "{}"]),
        };
        let pixels = pixels.collect();
        Images { height: 8, width: 8, channels: 1, pixels, classes, captions }
    }
}

impl Datasets for Data {
    fn source(&self, name: &str) -> Result<Source> {
        let kind = match name {
            "datasets/text" => Kind::Text,
            "datasets/labels" => Kind::Classification,
            _ => return Err(Error::not_found(name, "list the data sets")),
        };
        Ok(Source {
            path: self.text.path().to_owned(),
            file_name: "a.txt".into(),
            kind,
            layout: Layout::default(),
            max_bytes: 1 << 20,
        })
    }

    fn images(&self, name: &str) -> Result<Images> {
        match name {
            "datasets/bars" => Ok(Self::images(48)),
            "datasets/more" => Ok(Self::images(20)),
            _ => Err(Error::not_found(name, "list the data sets")),
        }
    }
}

fn vision() -> AnyModel {
    let config = json!({
        "model_type": "conv_net", "image_size": 8, "num_labels": 4, "channels": [4, 8],
    });
    random::model(config, &Stream::root(1)).unwrap()
}

fn mobile() -> AnyModel {
    let config = json!({
        "model_type": "mobilenet_v1", "image_size": 8, "num_labels": 4, "depth_multiplier": 0.05,
        "min_depth": 4, "first_stride": 1,
    });
    random::model(config, &Stream::root(1)).unwrap()
}

fn lstm() -> AnyModel {
    let config = json!({ "model_type": "lstm", "vocab_size": 256, "hidden_size": 8 });
    let mut model = random::model(config, &Stream::root(1)).unwrap();
    model.set_tokenizer(Some(Arc::new(Tokenizer::bytes().unwrap())));
    model
}

fn two_tower() -> AnyModel {
    let config = json!({
        "model_type": "two_tower", "image_size": 8, "patch_size": 4, "vocab_size": 256, "embedding_size": 8,
        "image_hidden_size": 16, "image_layers": 1, "image_heads": 2, "text_hidden_size": 16,
        "text_layers": 1, "text_heads": 2, "max_position_embeddings": 24,
    });
    let mut model = random::model(config, &Stream::root(1)).unwrap();
    model.set_tokenizer(Some(Arc::new(Tokenizer::bytes().unwrap())));
    model
}

fn text_decoder() -> AnyModel {
    let mut config = decoder::random::tiny("llama");
    config["vocab_size"] = json!(256);
    let mut model = decoder::random::model(config, 1).unwrap();
    model.tokenizer = Some(Arc::new(Tokenizer::bytes().unwrap()));
    model.into()
}

fn dataset(model: &AnyModel) -> &'static str {
    let sees = matches!(model, AnyModel::Vision(_) | AnyModel::TwoTower(_));
    if sees { "datasets/bars" } else { "datasets/text" }
}

/// A step of `method` with the options of `extra` on top of a short training.
fn step(method: &str, model: &AnyModel, extra: Value) -> v1::Step {
    let mut options = json!({
        "training": { "dataset": dataset(model), "steps": 20, "batch_size": 4, "max_length": 16,
                      "learning_rate": 0.01, "weight_decay": 0.05 },
    });
    merge(&mut options, extra);
    let step = serde_json::from_value(json!({ method: options })).unwrap();
    registry::resolve(&step)
}

fn merge(to: &mut Value, from: Value) {
    match (to, from) {
        (Value::Object(to), Value::Object(from)) => {
            from.into_iter()
                .for_each(|(key, value)| merge(to.entry(key).or_insert(Value::Null), value));
        }
        (to, from) => *to = from,
    }
}

/// What a step made, with its reports.
struct Made {
    outcome: AnyOutcome,
    training: v1::TrainingReport,
    pruning: Option<v1::PruningReport>,
}

fn run_in(step: &v1::Step, model: AnyModel, kept: &Path, progress: &Progress) -> Result<Made> {
    let (scratch, data) = (tempfile::tempdir().unwrap(), Data::new());
    let no_texts = |name: &str| Err(Error::not_found(name, "there are no texts"));
    let mut cx = StepContext {
        random: Stream::root(7).child("step 0"),
        progress,
        texts: &no_texts,
        calibrations: &calibrate::Shared::default(),
        digest: "",
        scratch: scratch.path().to_owned(),
    };
    let mut learning = Learning::new(&data, kept.to_owned());
    let method = registry::method(step)?;
    method.check_any(&model.info())?;
    let outcome = method.apply_any(&mut cx, &mut learning, model)?;
    Ok(Made { outcome, training: learning.training.unwrap_or_default(), pruning: learning.pruning })
}

fn run(step: &v1::Step, model: AnyModel) -> Result<Made> {
    run_in(step, model, tempfile::tempdir().unwrap().path(), &Progress::silent())
}

fn values(model: &AnyModel) -> BTreeMap<String, Vec<f32>> {
    model.weights().iter().map(|(name, w)| (name.clone(), w.to_f32())).collect()
}

fn gradual() -> Value {
    json!({ "begin_step": 2, "end_step": 15, "frequency": 4, "final_sparsity": 0.8 })
}

#[test]
fn training_lowers_the_loss_of_every_family() {
    for model in [vision(), mobile(), lstm(), text_decoder(), two_tower()] {
        let family = model.family();
        let made = run(
            &step("train", &model, json!({ "training": { "steps": 60, "batch_size": 16 } })),
            model.clone(),
        );
        let made = made.unwrap();
        let points = &made.training.points;
        let mean = |points: &[v1::TrainingPoint]| {
            points.iter().map(|point| point.loss).sum::<f64>() / points.len() as f64
        };
        let (first, last) = (mean(&points[..5]), mean(&points[points.len() - 5..]));
        assert!(last < 0.9 * first, "{family}: {first} {last}");
        let statistics = |name: &str| name.contains("running_");
        let trained: usize = model
            .weights()
            .iter()
            .filter(|(name, _)| !statistics(name))
            .map(|(_, w)| w.shape().iter().product::<usize>())
            .sum();
        assert_eq!(made.training.trained_parameters as usize, trained);
        // Everything moved, running statistics too, and kept its layout.
        let (before, after) = (values(&model), values(&made.outcome.model));
        for (name, old) in &before {
            assert_ne!(old, &after[name], "{family} {name}");
            assert_eq!(made.outcome.model.weights()[name].record(), model.weights()[name].record());
        }
    }
}

#[test]
fn the_share_at_the_end_is_exact_and_reported() {
    for model in [vision(), mobile(), lstm(), text_decoder()] {
        let step = step("gradual", &model, gradual());
        let info = model.info();
        let (_, after) = registry::method(&step).unwrap().check_any(&info).unwrap();
        let made = run(&step, model.clone()).unwrap();
        let pruning = made.pruning.unwrap();
        let (mut elements, mut zeros) = (0, 0);
        for (name, weight) in made.outcome.model.weights() {
            let size = weight.shape().iter().product::<usize>();
            let Some(own) = made.outcome.record["tensors"].get(name) else {
                assert!(matches!(**weight, Weight::Dense(_)), "{name}");
                continue;
            };
            let masked = super::masks::Pattern::masked(size, 0.8);
            assert_eq!(weight.zeros() as usize, masked, "{name}");
            assert_eq!(own["zeros"], masked);
            assert_eq!(weight.bytes(), after.tensors[name].bytes, "{name} is not as estimated");
            (elements, zeros) = (elements + size, zeros + masked);
        }
        assert!(elements > 0);
        assert_eq!(
            (pruning.elements as usize, pruning.kept as usize),
            (elements, elements - zeros)
        );
        let steps: Vec<i64> = pruning.updates.iter().map(|u| u.step).collect();
        assert_eq!(steps, [2, 6, 10, 14, 15]);
        assert!(pruning.updates.windows(2).all(|u| u[0].sparsity <= u[1].sparsity));
        assert!(pruning.updates.iter().all(|u| u.loss > 0.0));
        assert_eq!(pruning.updates[4].target, 0.8);
        assert!(pruning.bitmap_bytes < pruning.dense_bytes);
        let last = made.training.points.last().unwrap();
        assert_eq!(last.metrics["sparsity"], zeros as f64 / elements as f64);
        assert_eq!((made.training.kept_step, made.training.steps), (20, 20));
    }
}

#[test]
fn nothing_to_prune_is_plain_training_bit_for_bit() {
    for model in [vision(), lstm()] {
        let plain = run(&step("train", &model, json!({})), model.clone()).unwrap();
        let mut options = gradual();
        options["final_sparsity"] = json!(0.0);
        let pruned = run(&step("gradual", &model, options), model.clone()).unwrap();
        assert_eq!(values(&plain.outcome.model), values(&pruned.outcome.model));
        assert_eq!(pruned.pruning.unwrap().kept, pruned.outcome.record["total"]["elements"]);
    }
}

#[test]
fn a_run_that_was_cut_off_in_mid_schedule_ends_the_same() {
    for (model, regrow) in [(vision(), true), (vision(), false), (lstm(), true)] {
        let mut options = gradual();
        options["regrow"] = json!(regrow);
        options["training"] = json!({ "checkpoint_every": 3 });
        let step = step("gradual", &model, options);
        let whole = run(&step, model.clone()).unwrap();
        let kept = tempfile::tempdir().unwrap();
        let cancelled = Arc::new(AtomicBool::new(false));
        let (seen, flag) = (AtomicUsize::new(0), Arc::clone(&cancelled));
        let sink = move |_: f64, message: &str| {
            if message.starts_with("training: update 11 of") {
                seen.fetch_add(1, Ordering::Relaxed);
                flag.store(true, Ordering::Relaxed);
            }
        };
        let stopped = Progress::new(Arc::new(sink), cancelled);
        let error = run_in(&step, model.clone(), kept.path(), &stopped).err().expect("stopped");
        assert_eq!(error.reason(), Reason::Cancelled);
        let rest = run_in(&step, model.clone(), kept.path(), &Progress::silent()).unwrap();
        assert_eq!(values(&rest.outcome.model), values(&whole.outcome.model));
        assert_eq!(rest.outcome.record, whole.outcome.record);
        let updates = |made: &Made| made.pruning.as_ref().unwrap().updates.clone();
        assert_eq!(updates(&rest), updates(&whole));
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_validation_is_of_other_images() {
    for model in [vision(), two_tower()] {
        let extra = json!({
            "training": { "validation": { "dataset": "datasets/more", "every_steps": 10 } },
        });
        let step = step("train", &model, extra);
        let [a, b] = [0, 1].map(|_| run(&step, model.clone()).unwrap());
        assert_eq!(values(&a.outcome.model), values(&b.outcome.model));
        let steps: Vec<i64> = a.training.validations.iter().map(|v| v.step).collect();
        assert_eq!(steps, [0, 10, 20]);
        assert!(a.training.validations.iter().all(|v| v.accuracy.is_some()));
    }
}

#[test]
fn towers_that_were_cut_off_draw_the_same_captions() {
    let model = two_tower();
    let step = step("train", &model, json!({ "training": { "checkpoint_every": 3 } }));
    let whole = run(&step, model.clone()).unwrap();
    let kept = tempfile::tempdir().unwrap();
    let cancelled = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&cancelled);
    let sink = move |_: f64, message: &str| {
        if message.starts_with("training: update 11 of") {
            flag.store(true, Ordering::Relaxed);
        }
    };
    let stopped = Progress::new(Arc::new(sink), cancelled);
    let error = run_in(&step, model.clone(), kept.path(), &stopped).err().expect("stopped");
    assert_eq!(error.reason(), Reason::Cancelled);
    let rest = run_in(&step, model, kept.path(), &Progress::silent()).unwrap();
    assert_eq!(values(&rest.outcome.model), values(&whole.outcome.model));
}

#[test]
fn sparse_weights_keep_their_zeros_in_training() {
    let mut model = vision();
    let name = "layers.1.conv.weight";
    if let AnyModel::Vision(model) = &mut model {
        let weight = &model.weights[name];
        let mut dense = weight.to_f32();
        dense.iter_mut().enumerate().filter(|(i, _)| i % 4 != 1).for_each(|(_, v)| *v = 0.0);
        let shape = [weight.rows(), weight.cols()];
        let sparse = Sparse::from_dense(shape, &dense, ValueFormat::F32, None).unwrap();
        model.weights.insert(name.into(), Arc::new(Weight::Sparse(sparse)));
    }
    let made = run(&step("train", &model, json!({})), model.clone()).unwrap();
    let (before, after) = (model.weights()[name].to_f32(), &made.outcome.model.weights()[name]);
    assert!(matches!(**after, Weight::Sparse(_)));
    let after = after.to_f32();
    assert_ne!(before, after);
    assert!(before.iter().zip(&after).all(|(a, b)| (*a == 0.0) == (*b == 0.0)));
}

#[test]
fn new_weights_have_the_width_that_is_asked_for() {
    let model = vision();
    let draw = |options: Value, seed: u64| {
        let given: v1::Step = serde_json::from_value(json!({ "initialise": options })).unwrap();
        let step = registry::resolve(&given);
        let scratch = tempfile::tempdir().unwrap();
        let no_texts = |name: &str| Err(Error::not_found(name, "there are no texts"));
        let mut cx = StepContext {
            random: Stream::root(seed).child("step 0"),
            progress: &Progress::silent(),
            texts: &no_texts,
            calibrations: &calibrate::Shared::default(),
            digest: "",
            scratch: scratch.path().to_owned(),
        };
        let mut learning = Learning::none(&cx);
        let method = registry::method(&step).unwrap();
        let (_, after) = method.check_any(&model.info())?;
        let made = method.apply_any(&mut cx, &mut learning, model.clone())?.model;
        assert_eq!(made.bytes(), after.bytes());
        Ok::<_, Error>(made)
    };
    let half = draw(json!({ "width": 0.5 }), 1).unwrap();
    assert_eq!(half.weights()["layers.1.conv.weight"].shape(), [4, 9 * 2]);
    assert_eq!(half.config()["width"], 0.5);
    let deep = draw(json!({ "overrides": { "channels": [3, 5, 7] } }), 1).unwrap();
    assert_eq!(deep.weights()["layers.2.conv.weight"].shape(), [7, 45]);
    assert_eq!(values(&draw(json!({}), 1).unwrap()), values(&draw(json!({}), 1).unwrap()));
    assert_ne!(values(&draw(json!({}), 1).unwrap()), values(&draw(json!({}), 2).unwrap()));
    for (options, field) in [
        (json!({ "width": 0.0 }), "width"),
        (json!({ "overrides": { "num_labels": 3 } }), "overrides"),
        (json!({ "overrides": { "channels": [] } }), "overrides"),
    ] {
        let error = draw(options, 1).err().expect("refused");
        assert_eq!(error.violations()[0].field, field);
    }
}

#[test]
fn bad_input_is_refused_before_the_work() {
    let refused = |model: &AnyModel, method: &str, extra: Value| {
        let step = step(method, model, extra);
        let error = registry::method(&step).unwrap().check_any(&model.info()).expect_err("refused");
        let field = error.violations().first().map(|v| v.field.clone()).unwrap_or_default();
        (error.reason(), field)
    };
    let model = vision();
    for (extra, field) in [
        (json!({ "final_sparsity": 0.2, "initial_sparsity": 0.3 }), "final_sparsity"),
        (json!({ "final_sparsity": 1.0 }), "final_sparsity"),
        (json!({ "initial_sparsity": -0.5 }), "initial_sparsity"),
        (json!({ "begin_step": 9, "end_step": 9 }), "begin_step"),
        (json!({ "frequency": 0 }), "frequency"),
        (json!({ "end_step": 21 }), "end_step"),
        (json!({ "pattern": "5:4" }), "pattern"),
        // 9 inputs are no groups of 4; 4 outputs are no blocks of 3.
        (json!({ "pattern": "2:4" }), "pattern"),
        (json!({ "pattern": "block 3x1" }), "pattern"),
        (json!({ "pattern": "3:9", "final_sparsity": 0.9 }), "final_sparsity"),
        (json!({ "pattern": "3:9", "granularity": "PRUNING_GRANULARITY_GLOBAL" }), "granularity"),
        (json!({ "training": { "ema_decay": 0.9 } }), "training.ema_decay"),
        (
            json!({ "training": { "validation": { "patience": 2 } } }),
            "training.validation.patience",
        ),
        (json!({ "training": { "dataset": "" } }), "training.dataset"),
        (json!({ "training": { "precision": "TRAINING_PRECISION_BF16" } }), "training.precision"),
        (json!({ "training": { "batch_size": 0 } }), "training.batch_size"),
    ] {
        assert_eq!(refused(&model, "gradual", extra), (Reason::InvalidOption, field.to_owned()));
    }
    let (reason, field) = refused(&model, "gradual", json!({ "scope": ["*.gate_proj.*"] }));
    assert_eq!((reason, field.as_str()), (Reason::TensorNotFound, "scope"));
    // Quantised weights cannot be trained.
    let quantised = {
        let AnyModel::Decoder(mut model) = text_decoder() else { panic!("a decoder") };
        let name = "model.layers.0.mlp.up_proj.weight";
        let weight = &model.weights[name];
        let values = weight.to_f32();
        let blocks = crate::nn::weight::Ggml::quantize(
            [weight.rows(), weight.cols()],
            crate::nn::weight::GgmlType::Q8_0,
            &values,
        );
        model.weights.insert(name.into(), Arc::new(Weight::Ggml(blocks.unwrap())));
        AnyModel::from(model)
    };
    assert_eq!(refused(&quantised, "gradual", json!({})).0, Reason::ModelUnsuitable);
    // Towers are trained in batches, and pruned when they are trained.
    let towers = two_tower();
    assert_eq!(refused(&towers, "gradual", json!({})).0, Reason::ModelUnsuitable);
    for (extra, field) in [
        (json!({ "training": { "batch_size": 1 } }), "training.batch_size"),
        (json!({ "training": { "precision": "TRAINING_PRECISION_BF16" } }), "training.precision"),
    ] {
        let found = refused(&towers, "train", extra);
        assert_eq!(found, (Reason::InvalidOption, field.to_owned()));
    }
    // Other methods are for decoders.
    let wanda = registry::resolve(&serde_json::from_value(json!({ "wanda": {} })).unwrap());
    for model in [&model, &towers] {
        let error =
            registry::method(&wanda).unwrap().check_any(&model.info()).expect_err("refused");
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
    }
    assert!(check_training(None, &model.info()).is_err());
    assert_eq!(RATE, 1e-3);
}

#[test]
fn data_that_does_not_fit_is_said() {
    let model = vision();
    let fails = |model: &AnyModel, dataset: &str| {
        let step = step("train", model, json!({ "training": { "dataset": dataset } }));
        run(&step, model.clone()).err().expect("refused")
    };
    assert_eq!(fails(&model, "datasets/none").reason(), Reason::ResourceNotFound);
    let error = fails(&lstm(), "datasets/labels");
    assert_eq!(error.reason(), Reason::DatasetUnsuitable);
    assert_eq!(error.violations()[0].field, "training.dataset");
    let config =
        json!({ "model_type": "conv_net", "image_size": 9, "num_labels": 4, "channels": [4] });
    let larger = random::model(config, &Stream::root(1)).unwrap();
    assert_eq!(fails(&larger, "datasets/bars").reason(), Reason::DatasetUnsuitable);
}

#[test]
fn small_tensors_are_skipped_and_listed_and_globs_reach_everything() {
    let config = json!({
        "model_type": "conv_net", "image_size": 8, "num_labels": 4, "channels": [1, 8],
    });
    let model = random::model(config, &Stream::root(1)).unwrap();
    let made = run(&step("gradual", &model, gradual()), model.clone()).unwrap();
    assert_eq!(made.pruning.unwrap().skipped, ["layers.0.conv.weight"]);
    assert!(made.outcome.warnings.iter().any(|w| w.contains("layers.0.conv.weight")));
    let model = lstm();
    let mut options = gradual();
    options["scope"] = json!(["embedding.*", "head.weight"]);
    let made = run(&step("gradual", &model, options), model).unwrap();
    let names: Vec<&String> = made.outcome.record["tensors"].as_object().unwrap().keys().collect();
    assert_eq!(names, ["embedding.weight", "head.weight"]);
}

#[test]
fn a_loss_that_is_no_number_says_how_much_was_masked() {
    let model = vision();
    let mut options = gradual();
    options["training"] = json!({ "learning_rate": 1e6, "clip_norm": 0.0, "warmup_steps": 0,
        "schedule": "LEARNING_RATE_SCHEDULE_CONSTANT", "steps": 400, "sgd": {} });
    if let Err(error) = run(&step("gradual", &model, options), model) {
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains("update ") && error.message().contains("were masked"));
    } else {
        panic!("a learning rate of a million converges");
    }
}

#[test]
fn zeros_are_where_the_masks_are_and_are_counted_honestly() {
    let model = lstm();
    let made = run(&step("gradual", &model, gradual()), model.clone()).unwrap();
    let tensors = made.outcome.record["tensors"].as_object().unwrap();
    let names: Vec<&String> = tensors.keys().collect();
    assert_eq!(names, ["layers.0.input.weight", "layers.0.recurrent.weight"]);
    let mut all = 0;
    for (name, weight) in made.outcome.model.weights() {
        let values = weight.to_f32();
        let zeros = values.iter().filter(|v| **v == 0.0).count();
        // Values that wait to come back are not in what is kept; tables and vectors lose nothing.
        let wanted = tensors.get(name).map_or(0, |own| own["zeros"].as_u64().unwrap());
        assert_eq!(zeros as u64, wanted, "{name}");
        all += values.len() - zeros;
    }
    assert_eq!(made.pruning.unwrap().nonzero_parameters as usize, all);
}

#[test]
fn growing_shares_leave_a_weight_in_every_tensor() {
    let model = vision();
    let mut options = gradual();
    options["final_sparsity"] = json!(0.999);
    let made = run(&step("gradual", &model, options), model.clone()).unwrap();
    let tensors = made.outcome.record["tensors"].as_object().unwrap();
    assert_eq!(tensors.len(), 2);
    for (name, own) in tensors {
        // A thousandth of 36 and of 288 weights is none, and one stays.
        let (zeros, elements) = (own["zeros"].as_u64().unwrap(), own["elements"].as_u64().unwrap());
        assert_eq!(elements - zeros, 1, "{name}");
    }
}
