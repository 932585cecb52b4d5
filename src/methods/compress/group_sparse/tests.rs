//! What the method promises on tiny models of both families, and what it refuses.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::*;
use crate::data::captions::Captions;
use crate::data::images::Images;
use crate::data::records::Source;
use crate::methods::{Datasets, registry};
use crate::models::{decoder, random};
use crate::nn::weight::{Grouped, GroupedSpec, Sparse};
use crate::seed::Stream;

/// Sixteen by sixteen images with a bar in one of four places.
struct Bars;

impl Datasets for Bars {
    fn source(&self, name: &str) -> Result<Source> {
        Err(Error::not_found(name, "there are images only"))
    }

    fn images(&self, name: &str) -> Result<Images> {
        if name != "datasets/bars" {
            return Err(Error::not_found(name, "list the data sets"));
        }
        let classes: Vec<u8> = (0..48).map(|i| i % 4).collect();
        let pixels = classes.iter().enumerate().flat_map(|(i, class)| {
            (0..256).map(move |p| {
                let bar = p % 16 / 4 == usize::from(*class);
                if bar { 200 } else { ((i * 7 + p * 3) % 40) as u8 }
            })
        });
        let pixels = pixels.collect();
        let captions = Captions::default();
        Ok(Images { height: 16, width: 16, channels: 1, pixels, classes, captions })
    }
}

fn net() -> AnyModel {
    let config = json!({
        "model_type": "conv_net", "image_size": 16, "num_labels": 4, "channels": [8, 20, 12],
    });
    random::model(config, &Stream::root(1)).unwrap()
}

fn mobile() -> AnyModel {
    let config = json!({
        "model_type": "mobilenet_v1", "image_size": 16, "num_labels": 4, "depth_multiplier": 0.125,
        "min_depth": 8, "first_stride": 1,
    });
    random::model(config, &Stream::root(1)).unwrap()
}

fn llama() -> AnyModel {
    decoder::random::model(decoder::random::tiny("llama"), 3).unwrap().into()
}

fn step(options: Value) -> v1::GroupSparse {
    let step: v1::Step = serde_json::from_value(json!({ "group_sparse": options })).unwrap();
    match registry::resolve(&step).method {
        Some(v1::step::Method::GroupSparse(step)) => step,
        _ => panic!("another method"),
    }
}

fn run(
    step: &v1::GroupSparse,
    model: AnyModel,
) -> Result<(AnyOutcome, Option<v1::TrainingReport>)> {
    let kept = tempfile::tempdir().unwrap();
    let no_texts = |name: &str| Err(Error::not_found(name, "there are no texts"));
    let mut cx = StepContext {
        random: Stream::root(7).child("step 0"),
        progress: &Progress::silent(),
        texts: &no_texts,
        calibrations: &calibrate::Shared::default(),
        digest: "",
        scratch: PathBuf::new(),
    };
    let mut learning = Learning::new(&Bars, kept.path().to_owned());
    let (estimate, after) = step.check_any(&model.info())?;
    let outcome = step.apply_any(&mut cx, &mut learning, model)?;
    assert_eq!(estimate.weight_bytes, after.bytes());
    for (name, weight) in outcome.model.weights() {
        // What the last, short group keeps is not known before.
        let most = after.tensors[name].bytes;
        assert!(weight.bytes() <= most, "{name}: {} for {most}", weight.bytes());
        let columns = step.unit() == GroupSparseUnit::Column;
        let whole = weight.rows().is_multiple_of(step.group() as usize);
        if columns && whole && learning.training.is_none() {
            assert_eq!(
                (weight.bytes(), weight.record()),
                (most, after.tensors[name].record.clone())
            );
        }
    }
    Ok((outcome, learning.training))
}

fn logits(model: &AnyModel) -> Vec<f32> {
    match model {
        AnyModel::Vision(model) => {
            let images = Bars.images("datasets/bars").unwrap();
            Plan::new(model).unwrap().classify(&images.pixels[..5 * images.image()]).unwrap()
        }
        AnyModel::Decoder(model) => {
            use crate::models::decoder::plan::{Cache, Chunk, Decoder};
            let ids: Vec<u32> = (0..24).map(|i| (i * 29 + 7) % 96).collect();
            let mut decoder = Decoder::new(model).unwrap();
            let mut cache = Cache::new(decoder.config(), ids.len());
            let mut chunks = [Chunk { tokens: &ids, cache: &mut cache, logits: 0..ids.len() }];
            decoder.forward(&mut chunks).unwrap().to_vec()
        }
        _ => panic!("another family"),
    }
}

fn names(record: &Value, list: &str) -> BTreeSet<String> {
    let entries = record[list].as_array().unwrap().iter();
    entries
        .flat_map(|entry| entry["outputs_of"].as_array().unwrap().clone())
        .map(|name| name.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn nothing_removed_is_the_same_model_in_another_order() {
    for model in [net(), mobile(), llama()] {
        let (outcome, _) = run(&step(json!({ "sparsity": 0.0 })), model.clone()).unwrap();
        let mut moved = 0;
        for (name, weight) in outcome.model.weights() {
            assert_eq!(weight.record(), model.weights()[name].record());
            moved += usize::from(weight.to_f32() != model.weights()[name].to_f32());
        }
        assert!(moved >= 3, "{moved}");
        for (got, want) in logits(&outcome.model).iter().zip(logits(&model)) {
            assert!((got - want).abs() <= 1e-5 * (1.0 + want.abs()), "{got} is not {want}");
        }
        let still = json!({ "sparsity": 0.0, "rearrange": false });
        let (outcome, _) = run(&step(still), model.clone()).unwrap();
        for (name, weight) in outcome.model.weights() {
            assert_eq!(weight.to_f32(), model.weights()[name].to_f32());
        }
        assert_eq!(outcome.record["permuted"], json!([]));
    }
}

#[test]
fn what_stays_is_as_the_formula_and_runs_as_its_dense_values() {
    for model in [net(), mobile(), llama()] {
        for (group, sparsity) in [(8, 0.5), (2, 0.3), (4, 0.97)] {
            let options = json!({ "sparsity": sparsity, "group": group });
            let (outcome, _) = run(&step(options), model.clone()).unwrap();
            let tensors = outcome.record["tensors"].as_object().unwrap();
            assert!(!tensors.is_empty());
            for (name, entry) in tensors {
                let weight = &outcome.model.weights()[name];
                let taps = if name.ends_with(".conv.weight") { 9 } else { 1 };
                let inputs = weight.cols() / taps;
                let units = weight.rows().div_ceil(group) * inputs;
                let kept = units - (sparsity * units as f64).floor() as usize;
                assert_eq!(entry["units"], units);
                assert_eq!(entry["kept_units"], kept);
                let values = weight.to_f32();
                // Units of the pattern that hold something.
                let mut held = BTreeSet::new();
                for (at, v) in values.iter().enumerate().filter(|(_, v)| **v != 0.0) {
                    assert!(v.is_finite());
                    held.insert((at / weight.cols() / group, at % weight.cols() % inputs));
                }
                assert_eq!(held.len(), kept, "{name}");
                assert_eq!(entry["zeros"], weight.zeros());
                if let Weight::RowGroups(groups) = &**weight {
                    assert_eq!(groups.group(), group);
                    let columns = groups.units().iter().filter(|kept| **kept).count();
                    assert_eq!(columns, kept * taps, "{name}");
                }
            }
            let some = |w: &Arc<Weight>| matches!(**w, Weight::RowGroups(_));
            assert!(outcome.model.weights().values().any(some));
            let mut dense = outcome.model.clone();
            for weight in dense.weights_mut().values_mut() {
                let values = Dense::from_f32(weight.shape().to_vec(), &weight.to_f32(), Dtype::F32);
                *weight = Arc::new(Weight::Dense(values.unwrap()));
            }
            for (got, want) in logits(&outcome.model).iter().zip(logits(&dense)) {
                assert!((got - want).abs() <= 1e-4 * (1.0 + want.abs()), "{got} is not {want}");
            }
            // What is excluded when nothing is said.
            for name in outcome.model.weights().keys() {
                let alone = name.starts_with("layers.0.conv")
                    || ["depthwise", "classifier", "embed", "lm_head", "norm"]
                        .iter()
                        .any(|part| name.contains(part));
                assert_eq!(!alone, tensors.contains_key(name), "{name}");
            }
        }
    }
}

#[test]
fn like_outputs_together_lose_less() {
    for model in [net(), mobile(), llama()] {
        // Outputs of very different sizes, in no order.
        let mut model = model;
        let names: Vec<String> = model.weights().keys().cloned().collect();
        for name in &names {
            let weight = &model.weights()[name];
            if weight.shape().len() != 2 {
                continue;
            }
            let (shape, cols) = (weight.shape().to_vec(), weight.cols());
            let mut values = weight.to_f32();
            for (row, values) in values.chunks_mut(cols).enumerate() {
                let by = [0.1, 1.0, 0.3, 3.0, 0.5][row * 7 % 5];
                values.iter_mut().for_each(|v| *v *= by);
            }
            let dense = Dense::from_f32(shape, &values, Dtype::F32).unwrap();
            model.weights_mut().insert(name.clone(), Arc::new(Weight::Dense(dense)));
        }
        let share = |rearrange: bool| {
            let options = json!({ "group": 4, "rearrange": rearrange });
            let (outcome, _) = run(&step(options), model.clone()).unwrap();
            let tensors = outcome.record["tensors"].as_object().unwrap().clone();
            let shares = tensors.values().map(|t| t["kept_weight_share"].as_f64().unwrap());
            shares.sum::<f64>() / tensors.len() as f64
        };
        assert!(share(true) > 1.02 * share(false), "{} {}", share(true), share(false));
    }
}

#[test]
fn axes_that_are_not_free_are_listed() {
    let (outcome, _) = run(&step(json!({})), llama()).unwrap();
    let (moved, left) =
        (names(&outcome.record, "permuted"), names(&outcome.record, "left_in_place"));
    for part in ["mlp.gate_proj", "mlp.up_proj", "self_attn.v_proj"] {
        assert!(moved.iter().any(|name| name.contains(part)), "{part}");
    }
    for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"] {
        assert!(left.iter().any(|name| name.contains(part)), "{part}");
    }
    assert!(moved.is_disjoint(&left));
    // Codes outside of the scope cannot move: what is tied to them stays.
    let AnyModel::Decoder(mut model) = llama() else { panic!("a decoder") };
    let name = "model.layers.1.mlp.down_proj.weight";
    let shape = [model.weights[name].rows(), model.weights[name].cols()];
    let spec = GroupedSpec { bits: 8, group: 16, symmetric: true };
    let codes = vec![3_u8; shape[0] * shape[1]];
    let scales = vec![0.01; codes.len() / 16];
    let grouped = Grouped::pack(shape, spec, &codes, &scales, &[]).unwrap();
    model.weights.insert(name.into(), Arc::new(Weight::Grouped(grouped)));
    let before = model.weights[name].to_f32();
    let model = AnyModel::from(model);
    let error = step(json!({})).check_any(&model.info()).unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidRecipe);
    assert!(error.message().contains("down_proj"), "{error}");
    let (outcome, _) = run(&step(json!({ "exclude": ["*.down_proj.*"] })), model).unwrap();
    let left = names(&outcome.record, "left_in_place");
    assert!(left.contains("model.layers.1.mlp.up_proj.weight"));
    assert!(!left.contains("model.layers.0.mlp.up_proj.weight"));
    assert_eq!(outcome.model.weights()[name].to_f32(), before);
    assert!(matches!(&*outcome.model.weights()[name].clone(), Weight::Grouped(_)));
}

#[test]
fn activations_have_a_say() {
    for (model, calibration) in [
        (net(), json!({ "dataset": "datasets/bars", "sequences": 6 })),
        (mobile(), json!({ "dataset": "datasets/bars", "sequences": 6 })),
        (llama(), json!({ "sequences": 4, "sequence_length": 16 })),
    ] {
        let options = json!({
            "score": "GROUP_SPARSE_SCORE_L1_ACTIVATION", "calibration": calibration,
            "exclude": ["layers.0.conv.*", "classifier.*"],
        });
        let options = match model {
            AnyModel::Decoder(_) => {
                let mut options = options;
                options["exclude"] = json!(["*embed*"]);
                options
            }
            _ => options,
        };
        let (seen, _) = run(&step(options.clone()), model.clone()).unwrap();
        let (again, _) = run(&step(options.clone()), model.clone()).unwrap();
        assert_eq!(seen.record, again.record);
        let mut plain = options;
        plain["score"] = json!("GROUP_SPARSE_SCORE_L1");
        let (plain, _) = run(&step(plain), model).unwrap();
        let differ = |name: &String| {
            seen.model.weights()[name].to_f32() != plain.model.weights()[name].to_f32()
        };
        let tensors: Vec<String> =
            seen.record["tensors"].as_object().unwrap().keys().cloned().collect();
        assert!(tensors.iter().filter(|name| differ(name)).count() > tensors.len() / 3);
        // The sizes of weights alone keep more of them.
        for name in &tensors {
            let share =
                |of: &AnyOutcome| of.record["tensors"][name]["kept_weight_share"].as_f64().unwrap();
            assert!(share(&seen) <= share(&plain) + 1e-9, "{name}");
        }
    }
}

#[test]
fn training_keeps_what_went_at_zero_and_moves_the_rest() {
    let training = json!({
        "dataset": "datasets/bars", "steps": 12, "batch_size": 8, "learning_rate": 0.01,
        "weight_decay": 0.05,
    });
    for model in [net(), mobile()] {
        for unit in ["GROUP_SPARSE_UNIT_COLUMN", "GROUP_SPARSE_UNIT_FILTER"] {
            let options = json!({ "sparsity": 0.5, "group": 4, "unit": unit });
            let (pruned, none) = run(&step(options.clone()), model.clone()).unwrap();
            assert!(none.is_none());
            let mut tuned = options;
            tuned["training"] = training.clone();
            let (tuned, report) = run(&step(tuned), model.clone()).unwrap();
            assert_eq!(report.unwrap().steps, 12);
            for (name, weight) in pruned.model.weights() {
                let after = &tuned.model.weights()[name];
                let (before, values) = (weight.to_f32(), after.to_f32());
                assert_ne!(before, values, "{name} was not trained");
                if pruned.record["tensors"].get(name).is_none() {
                    continue;
                }
                assert_eq!(weight.record(), after.record(), "{name}");
                for (before, after) in before.iter().zip(&values) {
                    assert_eq!(*before == 0.0, *after == 0.0, "{name}");
                }
            }
            assert_eq!(
                pruned.record["total"]["zeros"], tuned.record["total"]["zeros"],
                "what went is what went"
            );
        }
    }
}

#[test]
fn zeros_of_earlier_pruning_outside_of_the_targets_stay() {
    // Half of a weight goes one by one; another one keeps two of four.
    let mut model = net();
    let (bitmap, places) = ("layers.1.conv.weight", "layers.0.conv.weight");
    let mut prune = |name: &str, gone: &dyn Fn(usize) -> bool, hint| {
        let weight = &model.weights()[name];
        let (shape, mut values) = ([weight.rows(), weight.cols()], weight.to_f32());
        values.iter_mut().enumerate().filter(|(i, _)| gone(*i)).for_each(|(_, v)| *v = 0.0);
        let sparse = Sparse::from_dense(shape, &values, ValueFormat::F32, hint).unwrap();
        model.weights_mut().insert(name.to_owned(), Arc::new(Weight::Sparse(sparse)));
    };
    prune(bitmap, &|i| i * 7 % 11 < 6, None);
    prune(places, &|i| i % 3 > 0, Some((2, 3)));
    let training = json!({
        "dataset": "datasets/bars", "steps": 6, "batch_size": 8, "learning_rate": 0.01,
    });
    let options = json!({
        "group": 4, "exclude": ["layers.0.*", "layers.1.*", "classifier.*"], "training": training,
    });
    let (tuned, _) = run(&step(options.clone()), model.clone()).unwrap();
    for name in [bitmap, places] {
        let (before, after) = (&model.weights()[name], &tuned.model.weights()[name]);
        assert_eq!(before.record(), after.record());
        assert_ne!(before.to_f32(), after.to_f32(), "{name} was not trained");
        for (before, after) in before.to_f32().iter().zip(after.to_f32()) {
            assert!(*before != 0.0 || after == 0.0, "{name}");
        }
    }
    // The rule of gradual pruning is one for all that is masked.
    let mut mobile = mobile();
    let name = "layers.1.pointwise.weight";
    let weight = &mobile.weights()[name];
    let mut values = weight.to_f32();
    values.iter_mut().step_by(2).for_each(|v| *v = 0.0);
    let shape = [weight.rows(), weight.cols()];
    let sparse = Sparse::from_dense(shape, &values, ValueFormat::F32, None).unwrap();
    mobile.weights_mut().insert(name.to_owned(), Arc::new(Weight::Sparse(sparse)));
    let mut options = options;
    options["group"] = json!(8);
    options["schedule"] = json!("GROUP_SPARSE_SCHEDULE_GRADUAL");
    options["exclude"] = json!(["layers.0.conv.*", "*.depthwise.*", "classifier.*", name]);
    let error = step(options.clone()).check_any(&mobile.info()).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
    assert_eq!(error.violations()[0].field, "schedule");
    options["exclude"] = json!(["layers.0.conv.*", "*.depthwise.*", "classifier.*"]);
    step(options).check_any(&mobile.info()).unwrap();
}

#[test]
fn what_is_decoded_counts_as_memory() {
    let memory = |model: &AnyModel, rearrange: bool| {
        let step = step(json!({ "rearrange": rearrange }));
        step.check_any(&model.info()).unwrap().0.memory_bytes
    };
    for mut model in [mobile(), llama()] {
        assert_eq!(memory(&model, true), memory(&model, false));
        let half = json!({ "sparsity": 0.5, "values": "GROUP_SPARSE_VALUES_BF16" });
        model = run(&step(half), model).unwrap().0.model;
        let groups = model.weights().values().filter(|w| matches!(***w, Weight::RowGroups(_)));
        let elements: usize = groups.map(|w| w.rows() * w.cols()).sum();
        assert!(elements > 0);
        assert_eq!(memory(&model, true), memory(&model, false) + 4 * elements as u64);
    }
}

#[test]
fn gradual_pruning_ends_with_whole_groups() {
    let training = json!({ "dataset": "datasets/bars", "steps": 20, "batch_size": 4 });
    let options = json!({
        "sparsity": 0.5, "schedule": "GROUP_SPARSE_SCHEDULE_GRADUAL", "training": training,
    });
    let (outcome, report) = run(&step(options.clone()), mobile()).unwrap();
    assert!(report.is_some());
    for name in outcome.record["tensors"].as_object().unwrap().keys() {
        let weight = &outcome.model.weights()[name];
        let units =
            Units { shape: [weight.rows(), weight.cols()], group: 8, taps: 1, filters: false };
        let empty = units.empty(&weight.to_f32()).iter().filter(|gone| **gone).count();
        assert_eq!(empty, units.count() / 2 * 8, "{name}");
        assert!(matches!(**weight, Weight::RowGroups(_)));
    }
    let error = step(options).check_any(&net().info()).unwrap_err();
    assert_eq!(error.violations()[0].field, "schedule");
}

#[test]
fn bad_options_are_refused_by_name() {
    let field = |options: Value, model: &AnyModel| {
        let error = step(options.clone()).check_any(&model.info()).err();
        let error = error.unwrap_or_else(|| panic!("{options} is taken"));
        (error.reason(), error.violations().first().map(|v| v.field.clone()).unwrap_or_default())
    };
    let invalid = |name: &str| (Reason::InvalidOption, name.to_owned());
    for (options, name) in [
        (json!({ "sparsity": 1.0 }), "sparsity"),
        (json!({ "sparsity": -0.1 }), "sparsity"),
        (json!({ "group": 3 }), "group"),
        (json!({ "group": 0 }), "group"),
        (json!({ "group": 32 }), "group"),
        (json!({ "exclude": ["*"] }), "exclude"),
        (json!({ "schedule": "GROUP_SPARSE_SCHEDULE_GRADUAL" }), "schedule"),
        (json!({ "score": "GROUP_SPARSE_SCORE_L1_ACTIVATION" }), "calibration.dataset"),
        (json!({ "training": {} }), "training.dataset"),
        (
            json!({ "training": { "dataset": "datasets/bars", "ema_decay": 0.9 } }),
            "training.ema_decay",
        ),
    ] {
        assert_eq!(field(options, &net()), invalid(name));
    }
    for (name, change) in [
        ("unit", v1::GroupSparse { unit: 9, ..Default::default() }),
        ("score", v1::GroupSparse { score: 9, ..Default::default() }),
        ("schedule", v1::GroupSparse { schedule: 9, ..Default::default() }),
        ("values", v1::GroupSparse { values: 9, ..Default::default() }),
    ] {
        let error = change.check_any(&net().info()).unwrap_err();
        assert_eq!(error.violations()[0].field, name);
    }
    let gone = (Reason::TensorNotFound, "exclude".to_owned());
    assert_eq!(field(json!({ "exclude": ["*.q_prjo.*"] }), &llama()), gone);
    let config = json!({ "model_type": "lstm", "vocab_size": 32, "hidden_size": 8 });
    let lstm = random::model(config, &Stream::root(1)).unwrap();
    assert_eq!(field(json!({}), &lstm).0, Reason::ModelUnsuitable);
    // Codes of an earlier step.
    let (outcome, _) = run(&step(json!({ "values": "GROUP_SPARSE_VALUES_INT8" })), net()).unwrap();
    assert_eq!(field(json!({}), &outcome.model).0, Reason::InvalidRecipe);
    // 16-bit values can be pruned on.
    let half = json!({ "sparsity": 0.3, "values": "GROUP_SPARSE_VALUES_BF16" });
    let (outcome, _) = run(&step(half), mobile()).unwrap();
    let (again, _) = run(&step(json!({ "sparsity": 0.6 })), outcome.model).unwrap();
    assert!(again.zero_share > 0.59);
}

#[test]
fn depthwise_filters_lose_a_tap_of_neighbouring_channels_together() {
    let exclude = ["layers.0.conv.*", "*.pointwise.*", "classifier.*"];
    let options = json!({ "sparsity": 0.5, "rearrange": false, "exclude": exclude });
    let model = mobile();
    let (outcome, _) = run(&step(options), model.clone()).unwrap();
    let tensors = outcome.record["tensors"].as_object().unwrap();
    assert!(!tensors.is_empty());
    for name in tensors.keys() {
        assert!(name.ends_with(".depthwise.weight"), "{name}");
        let (before, after) = (&model.weights()[name], &outcome.model.weights()[name]);
        let (before, values) = (before.to_f32(), after.to_f32());
        assert_eq!(after.cols(), 9);
        let groups = after.rows().div_ceil(8);
        let mut kept = 0;
        for (group, tap) in (0..groups).flat_map(|g| (0..9).map(move |tap| (g, tap))) {
            let places = (group * 8..(group * 8 + 8).min(after.rows())).map(|row| row * 9 + tap);
            let places: Vec<usize> = places.collect();
            let gone = values[places[0]] == 0.0;
            for at in places {
                assert_eq!(values[at], if gone { 0.0 } else { before[at] }, "{name}");
            }
            kept += usize::from(!gone);
        }
        assert_eq!(kept, groups * 9 - groups * 9 / 2, "{name}");
    }
    assert!(logits(&outcome.model).iter().all(|v| v.is_finite()));
}

#[test]
fn silent_inputs_lose_their_weights_and_loud_ones_keep_them() {
    let AnyModel::Decoder(mut model) = llama() else { panic!("a decoder") };
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        let name = format!("model.layers.0.{norm}.weight");
        let mut values = model.weights[&name].to_f32();
        (values[3], values[7]) = (0.0, 1000.0);
        let dense = Dense::from_f32(vec![values.len()], &values, Dtype::F32).unwrap();
        model.weights.insert(name, Arc::new(Weight::Dense(dense)));
    }
    let calibration = json!({ "sequences": 4, "sequence_length": 16 });
    let options = json!({
        "sparsity": 0.3, "rearrange": false, "calibration": calibration,
        "score": "GROUP_SPARSE_SCORE_L1_ACTIVATION",
    });
    let (outcome, _) = run(&step(options), model.into()).unwrap();
    for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"] {
        let name = format!("model.layers.0.{part}.weight");
        let values = outcome.model.weights()[&name].to_f32();
        for row in values.chunks(32) {
            assert!(row[3] == 0.0 && row[7] != 0.0, "{name}");
        }
        let zeros = values.iter().filter(|v| **v == 0.0).count();
        // Of each eight rows 32 units: three tenths of all, rounded down.
        let units = values.len() / 8;
        assert_eq!(zeros, 8 * (3 * units / 10), "{name}");
    }
}
