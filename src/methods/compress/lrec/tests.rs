//! Corrections of a tiny model.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};

use super::*;
use crate::methods::compress::folding::testing::tiny;
use crate::methods::compress::testing;
use crate::models::decoder::plan::adapters::{Fitted, Mix};
use crate::models::decoder::plan::{Arithmetic, Cache, Chunk, Decoder};
use crate::models::decoder::random;
use crate::nn::adapter::Adapter;
use crate::nn::weight::Dense;
use crate::train::optimizer::{AdamW, Optimizer, Rule};
use crate::train::parameters::Parameter;

fn model() -> Model {
    random::model(random::tiny("llama"), 11).unwrap()
}

fn options(change: impl Fn(&mut v1::Lrec)) -> v1::Lrec {
    let windows = |sequences| {
        Some(v1::Calibration {
            sequences: Some(sequences),
            sequence_length: Some(24),
            ..Default::default()
        })
    };
    let grid = v1::Grid { bits: Some(2), group_size: Some(16), ..Default::default() };
    let mut options = v1::Lrec {
        grid: Some(grid),
        calibration: windows(6),
        text: windows(64),
        epochs: Some(4.0),
        rank: Some(8),
        learning_rate: Some(1e-2),
        validate_every: Some(8),
        ..Default::default()
    };
    change(&mut options);
    options
}

fn run(method: &dyn Method, model: &Model) -> Result<Outcome> {
    testing::apply(method, model)
}

fn number(outcome: &Outcome, path: [&str; 2]) -> f64 {
    outcome.record["validation"][path[0]][path[1]].as_f64().unwrap()
}

#[test]
fn the_correction_brings_the_model_back_and_the_base_is_the_quantisers() {
    let model = model();
    for (teacher, quantiser) in [
        (LrecTeacher::Online, LrecQuantiser::Gptq),
        (LrecTeacher::TopK, LrecQuantiser::RoundToNearest),
    ] {
        let method = options(|o| {
            (o.teacher, o.quantiser) = (teacher as i32, quantiser as i32);
            o.top_k = Some(24);
        });
        let made = run(&method, &model).unwrap();
        let plain = run(method.first_step().as_ref(), &model).unwrap();
        let (before, after) =
            (number(&made, ["quantised", "kl"]), number(&made, ["corrected", "kl"]));
        assert!(after < 0.8 * before, "{after} of {before}");
        assert!(number(&made, ["teacher", "perplexity"]) > 1.0);
        for (name, weight) in &made.model.weights {
            let base = &plain.model.weights[name];
            match &**weight {
                Weight::Sum(sum) => {
                    assert_eq!(sum.base().record(), base.record());
                    assert_eq!(sum.base().to_f32(), base.to_f32(), "{name}");
                    assert_eq!(sum.correction().rank(), 8);
                }
                other => assert_eq!(other.to_f32(), base.to_f32(), "{name}"),
            }
        }
        let bits = &made.record["bits_per_weight"];
        // 2 bits, and 16 + 8 for 16 inputs.
        assert_eq!(bits["quantised"].as_f64().unwrap(), 3.5);
        assert!(bits["corrected"].as_f64().unwrap() > 3.5);
    }
}

#[test]
fn it_starts_as_the_bare_quantised_model() {
    let model = model();
    let method = options(|o| o.learning_rate = Some(1e-30));
    let made = run(&method, &model).unwrap();
    let [before, after] = ["quantised", "corrected"]
        .map(|of| (number(&made, [of, "kl"]), number(&made, [of, "perplexity"])));
    assert!((before.0 - after.0).abs() < 1e-6 && (before.1 - after.1).abs() < 1e-3);
    for weight in made.model.weights.values() {
        let Weight::Sum(sum) = &**weight else { continue };
        let mut added = vec![0.0; sum.shape().iter().product()];
        sum.correction().add_rows(0, &mut added);
        assert!(added.iter().all(|v| v.abs() < 1e-6));
    }
}

#[test]
fn cross_entropy_alone_needs_no_teacher() {
    let made = run(&options(|o| o.kl = Some(0.0)), &model()).unwrap();
    assert_eq!(made.record["validation"]["training_divergence"], "none");
    assert!(number(&made, ["corrected", "kl"]) > 0.0, "it is measured all the same");
}

#[test]
fn a_second_adapter_stands_beside_the_correction() {
    let made = run(&options(|o| o.epochs = Some(1.0)), &model()).unwrap().model;
    let config = made.decoder().unwrap();
    let on = |name: &str| name.contains("q_proj") || name.contains("down_proj");
    let adapter = random::adapter(config, 2, 0.5, 7, on).unwrap();
    let ids: Vec<u32> = (0..20).map(|i| (i * 29 + 7) % 96).collect();
    let logits = |model: &Model, adapter: Option<&Adapter>, by: Arithmetic| -> Vec<f32> {
        let mut decoder = Decoder::with(model, by).unwrap();
        let mixes: Vec<Mix> = adapter
            .map(|adapter| {
                let fitted = Fitted::new("second", adapter, decoder.config()).unwrap();
                Mix::new([(Arc::new(fitted), 1.0)])
            })
            .into_iter()
            .collect();
        let mut cache = Cache::new(decoder.config(), ids.len());
        let mut chunks = [Chunk { tokens: &ids, cache: &mut cache, logits: 0..ids.len() }];
        decoder.forward_with(&mut chunks, &mixes).unwrap().to_vec()
    };
    // One dense weight that is base, correction and adapter added up.
    let mut whole = made.clone();
    for (name, weight) in &mut whole.weights {
        let mut values = weight.to_f32();
        if let Weight::Sum(sum) = &**weight {
            let parts = [sum.base().to_f32(), {
                let mut added = vec![0.0; values.len()];
                sum.correction().add_rows(0, &mut added);
                added
            }];
            let both = parts[0].iter().zip(&parts[1]).map(|(a, b)| a + b);
            assert!(values.iter().zip(both).all(|(v, b)| (v - b).abs() < 1e-6));
        }
        if let Some(factors) = adapter.linears.get(name) {
            factors.add_to(1.0, &mut values);
        }
        let dense = Dense::from_f32(weight.shape().to_vec(), &values, Dtype::F32).unwrap();
        *weight = Arc::new(Weight::Dense(dense));
    }
    let want = logits(&whole, None, Arithmetic::Exact);
    let got = logits(&made, Some(&adapter), Arithmetic::Exact);
    for (got, want) in got.iter().zip(&want) {
        assert!((got - want).abs() < 1e-4, "{got} is not {want}");
    }
    let bare = logits(&made, None, Arithmetic::Exact);
    assert!(bare.iter().zip(&want).any(|(a, b)| (a - b).abs() > 0.05));
    // As it serves: the base packed, activations rounded to 8 bits.
    let served = logits(&made, Some(&adapter), Arithmetic::Integer);
    for (got, want) in served.iter().zip(&want) {
        assert!((got - want).abs() < 0.2, "{got} is not {want}");
    }
}

#[test]
fn decay_is_a_part_of_the_gradient_that_adam_sees() {
    // p = 2, g = 0.5, decay 0.25: Adam sees 1, and its first step is the rate whatever that is.
    let var = Var::from_vec(vec![2f32], 1, &Device::Cpu).unwrap();
    let parameters =
        BTreeMap::from([("w".to_owned(), Parameter { var: var.clone(), rate: 1.0, decay: true })]);
    let mut gradients =
        BTreeMap::from([("w".to_owned(), Tensor::new(&[0.5f32], &Device::Cpu).unwrap())]);
    let mut hooks = Decay { by: 0.25, in_a_row: 0, skipped: 0 };
    let place = Place { step: 1, total: 1, rate: 0.1 };
    hooks.after_backward(place, &parameters, &mut gradients).unwrap();
    assert_eq!(gradients["w"].to_vec1::<f32>().unwrap(), [1.0]);
    let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.0, false);
    optimizer.update(&parameters, &gradients, 0.1).unwrap();
    assert!((var.to_vec1::<f32>().unwrap()[0] - 1.9).abs() < 1e-5);
    // Nine in a row pass, the tenth ends it.
    assert!((0..9).all(|_| hooks.skip(place)));
    assert!(!hooks.skip(place) && hooks.skipped == 9);
}

#[test]
fn bad_options_are_refused_by_name() {
    let info = model().info();
    let refused = |field: &str, change: &dyn Fn(&mut v1::Lrec)| {
        let error = options(change).check(&info).unwrap_err();
        assert_eq!(error.violations()[0].field, field, "{error}");
    };
    refused("rank", &|o| o.rank = Some(0));
    refused("rank", &|o| o.rank = Some(33));
    refused("alpha", &|o| o.alpha = Some(0.0));
    refused("kl", &|o| o.kl = Some(-1.0));
    refused("kl", &|o| (o.kl, o.ce) = (Some(0.0), Some(0.0)));
    refused("ce", &|o| o.ce = Some(f64::NAN));
    refused("top_k", &|o| o.top_k = Some(0));
    refused("text.sequences", &|o| {
        o.text.get_or_insert_default().sequences = Some(1);
    });
    refused("text.sequence_length", &|o| {
        o.text.get_or_insert_default().sequence_length = Some(257);
    });
    refused("validation_share", &|o| o.validation_share = Some(0.6));
    refused("validate_every", &|o| o.validate_every = Some(0));
    refused("epochs", &|o| o.epochs = Some(0.0));
    refused("batch_size", &|o| o.batch_size = Some(0));
    refused("learning_rate", &|o| o.learning_rate = Some(-1.0));
    refused("weight_decay", &|o| o.weight_decay = Some(-1.0));
    refused("quantiser", &|o| o.quantiser = 9);
    refused("teacher", &|o| o.teacher = 9);
    refused("precision", &|o| o.precision = 9);
}

#[test]
fn encoders_are_refused_before_anything_is_quantised() {
    let error = options(|_| ()).check(&tiny("bert").info()).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
    assert_eq!(error.violations()[0].field, "teacher");
    assert!(error.message().contains("gptq"), "{error}");
}

#[test]
fn defaults_are_those_of_the_card() {
    let mut usual = v1::Lrec { rank: Some(5), ..Default::default() };
    usual.resolve();
    assert_eq!((usual.alpha, usual.kl, usual.ce), (Some(20.0), Some(1.0), Some(0.1)));
    assert_eq!((usual.top_k, usual.batch_size), (Some(64), Some(4)));
    assert_eq!((usual.weight_decay, usual.learning_rate), (Some(1e-5), Some(1e-3)));
    assert_eq!(usual.quantiser, LrecQuantiser::Gptq as i32);
    assert_eq!(usual.teacher, LrecTeacher::Online as i32);
    assert_eq!(usual.grid.unwrap().group_size, Some(64));
    assert_eq!(usual.text.unwrap().sequence_length, Some(128));
}

#[test]
fn grids_that_do_not_fit_are_refused_by_name() {
    let info = model().info();
    for (bits, group, field) in [(5, 16, "grid.bits"), (2, 12, "grid.group_size")] {
        let grid = v1::Grid { bits: Some(bits), group_size: Some(group), ..Default::default() };
        for quantiser in [LrecQuantiser::Gptq, LrecQuantiser::RoundToNearest] {
            let method =
                options(|o| (o.grid, o.quantiser) = (Some(grid.clone()), quantiser as i32));
            let error = method.check(&info).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
        }
    }
}

#[test]
fn plans_say_the_bytes_and_the_correction_takes_what_its_factors_do() {
    let model = model();
    for quantiser in [LrecQuantiser::Gptq, LrecQuantiser::RoundToNearest] {
        let method = options(|o| {
            (o.quantiser, o.rank, o.epochs) = (quantiser as i32, Some(4), Some(1.0));
        });
        let (_, after) = method.check(&model.info()).unwrap();
        let made = run(&method, &model).unwrap();
        assert_eq!(made.model.bytes(), after.bytes());
        for (name, weight) in &made.model.weights {
            assert_eq!(weight.record(), after.tensors[name].record, "{name}");
        }
        // Rows and columns of the seven linears of a block add up to 656, their elements to 13,824; factors of
        // rank 4 in 16 bits.
        let bits = made.record["bits_per_weight"]["corrected"].as_f64().unwrap();
        assert!((bits - (3.5 + 16.0 * 4.0 * 656.0 / 13_824.0)).abs() < 1e-9, "{bits}");
        assert!(number(&made, ["quantised", "kl"]) > 0.0);
        assert!(number(&made, ["corrected", "kl"]) >= 0.0);
    }
}
