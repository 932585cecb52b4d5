//! What tuning over a quantised base promises (EMEF, INT2.1, arXiv 2306.08162): the gradients of the dense
//! layer that the codes stand for, in the memory of the codes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Setup};
use crate::data::sequence::{Sequence, Target};
use crate::kernels::{allocations, threads};
use crate::methods::compress::round_to_nearest;
use crate::models::decoder::graph::Graph;
use crate::models::decoder::random;
use crate::models::{AnyModel, Model};
use crate::nn::dtype::Dtype;
use crate::nn::ops::Precision;
use crate::nn::weight::{Dense, Ggml, GgmlType, Grouped, GroupedSpec, Weight};
use crate::progress::Progress;
use crate::proto::v1;
use crate::seed::Stream;
use crate::train::optimizer::{AdamW, Optimizer, Rule};
use crate::train::pass::{Options, Pass};

const WIDE: usize = 512;
const INNER: usize = 1024;

/// A model of one block whose linears `change` stores anew.
fn model(change: impl Fn(&Weight) -> Weight) -> Model {
    let mut config = random::tiny("llama");
    config["hidden_size"] = json!(WIDE);
    config["intermediate_size"] = json!(INNER);
    config["num_hidden_layers"] = json!(2);
    config["head_dim"] = json!(64);
    let mut model = random::model(config, 3).unwrap();
    for (_, weight) in model.weights.iter_mut().filter(|(name, _)| name.contains("_proj")) {
        *weight = Arc::new(change(weight));
    }
    model
}

fn grouped(bits: u8) -> impl Fn(&Weight) -> Weight {
    move |weight| {
        let (shape, spec) =
            ([weight.rows(), weight.cols()], GroupedSpec { bits, group: 64, symmetric: false });
        let codes = round_to_nearest::quantise(&weight.to_f32(), shape[1], spec);
        let packed = Grouped::pack(shape, spec, &codes.codes, &codes.scales, &codes.zeros);
        Weight::Grouped(packed.unwrap())
    }
}

fn ggml(kind: GgmlType) -> impl Fn(&Weight) -> Weight {
    move |weight| {
        let shape = [weight.rows(), weight.cols()];
        Weight::Ggml(Ggml::quantize(shape, kind, &weight.to_f32()).unwrap())
    }
}

fn dense(model: &Model) -> Model {
    let mut dense = model.clone();
    for weight in dense.weights.values_mut() {
        let values = Dense::from_f32(weight.shape().to_vec(), &weight.to_f32(), Dtype::F32);
        *weight = Arc::new(Weight::Dense(values.unwrap()));
    }
    dense
}

/// An adapter on all linears whose second factors are not zero any more.
fn tuned(model: &Model) -> Tuned {
    let method = v1::Lora { adapter: Some(super::testing::all_linear(4)), ..Default::default() };
    let any = AnyModel::from(model);
    let shapes = Shapes::of(&any).unwrap();
    let mut setup = Setup {
        weights: any.weights(),
        shapes: &shapes,
        random: Stream::root(2),
        progress: &Progress::silent(),
        first_rate: 1e-3,
        gradients: None,
        moments: None,
    };
    let tuned = Adapt::start(&method, &mut setup).unwrap();
    for (name, parameter) in tuned.parameters() {
        let count = parameter.var.elem_count();
        let values = super::uniform(&mut Stream::root(8).child(&name).rng(), count, 0.05);
        let shape = parameter.var.shape().clone();
        let tensor = candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu);
        parameter.var.set(&tensor.unwrap()).unwrap();
    }
    tuned
}

fn sequences() -> Vec<Sequence> {
    let sequence = |start: u32, length: u32| Sequence {
        tokens: (0..length).map(|i| (i * 29 + start) % 96).collect(),
        target: Target::Next((0..length).map(|i| i > 0).collect()),
        line: 1,
    };
    vec![sequence(5, 14), sequence(50, 10)]
}

/// The loss and all gradients of a step.
fn step(model: &Model, tuned: &Tuned, checkpoint: bool) -> (f64, BTreeMap<String, Vec<f32>>) {
    let options = Options { checkpoint_activations: checkpoint, ..Options::default() };
    let pass = Pass::decoder(Graph::new(model, Precision::F32).unwrap(), tuned, options);
    let sequences = sequences();
    let sequences: Vec<&Sequence> = sequences.iter().collect();
    let (sums, gradients) = pass.loss_and_gradients(&sequences, &tuned.parameters()).unwrap();
    let flat = |g: candle_core::Tensor| g.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    (sums.loss, gradients.into_iter().map(|(name, g)| (name, flat(g))).collect())
}

#[test]
fn gradients_are_those_of_the_dense_layer_and_the_base_keeps_its_bytes() {
    let bases = [
        model(grouped(2)),
        model(grouped(3)),
        model(grouped(4)),
        model(grouped(8)),
        model(ggml(GgmlType::Q4_0)),
        model(ggml(GgmlType::Q8_0)),
    ];
    for base in bases {
        let tuned = tuned(&base);
        let parts = |model: &Model| -> Vec<Vec<u8>> {
            let parts = model.weights.values().flat_map(|w| w.parts());
            parts.map(|part| part.data.to_vec()).collect()
        };
        let before = parts(&base);
        let (loss, gradients) = step(&base, &tuned, false);
        let (again, checked) = step(&base, &tuned, true);
        let (want, wanted) = step(&dense(&base), &tuned, false);
        assert!((loss - want).abs() <= 1e-5 * want.abs() && (again - loss).abs() < 1e-6 * loss);
        assert_eq!(gradients.len(), 2 * 7 * 2, "two factors on seven linears of two blocks");
        for (name, want) in &wanted {
            let size = want.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            assert!(size > 0.0, "{name}");
            for got in [&gradients[name], &checked[name]] {
                let error = got.iter().zip(want).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(error <= 1e-4 * size, "{name}: {error} of {size}");
            }
        }
        let mut optimizer = Optimizer::new(Rule::AdamW(AdamW::default()), 0.0, false);
        let tensors = gradients.into_iter().map(|(name, g)| {
            let shape = tuned.parameters()[&name].var.shape().clone();
            (name, candle_core::Tensor::from_vec(g, shape, &candle_core::Device::Cpu).unwrap())
        });
        optimizer.update(&tuned.parameters(), &tensors.collect(), 1e-3).unwrap();
        assert_ne!(step(&base, &tuned, true).0, loss);
        assert!(parts(&base) == before, "the base was changed");
    }
}

#[test]
fn one_product_is_that_of_the_dense_matrix() {
    for bits in [2, 3, 4, 8] {
        let values: Vec<f32> = super::uniform(&mut Stream::root(1).rng(), 96 * 128, 1.0);
        let plain = Dense::from_f32(vec![96, 128], &values, Dtype::F32).unwrap();
        let packed = grouped(bits)(&Weight::Dense(plain));
        let exact = packed.to_f32();
        for tokens in [1, 5, 33] {
            let x = super::uniform(&mut Stream::root(2).rng(), tokens * 128, 1.0);
            let g = super::uniform(&mut Stream::root(3).rng(), tokens * 96, 1.0);
            let (mut y, mut dx) = (vec![f32::NAN; tokens * 96], vec![f32::NAN; tokens * 128]);
            packed.multiply(&x, &mut y);
            packed.multiply_transposed(&g, &mut dx);
            let dot = |f: &dyn Fn(usize) -> (f32, f32), n: usize| -> (f64, f64) {
                (0..n).map(f).fold((0.0, 0.0), |(sum, size), (a, b)| {
                    let product = f64::from(a) * f64::from(b);
                    (sum + product, size + product.abs())
                })
            };
            for (i, y) in y.iter().enumerate() {
                let (t, o) = (i / 96, i % 96);
                let (want, size) = dot(&|c| (x[t * 128 + c], exact[o * 128 + c]), 128);
                assert!((f64::from(*y) - want).abs() <= 1e-5 * size, "{bits} bits");
            }
            for (i, dx) in dx.iter().enumerate() {
                let (t, c) = (i / 128, i % 128);
                let (want, size) = dot(&|o| (g[t * 96 + o], exact[o * 128 + c]), 96);
                assert!((f64::from(*dx) - want).abs() <= 1e-5 * size, "{bits} bits");
            }
        }
    }
}

#[test]
fn no_step_holds_a_matrix_in_f32() {
    let base = model(grouped(2));
    let tuned = tuned(&base);
    let mut largest = 0;
    let work = Mutex::new(|| {
        // What threads keep between products is as large as a cache, whatever the matrix.
        step(&base, &tuned, true);
        largest = allocations::largest(|| drop(step(&base, &tuned, true)));
    });
    // As a part of shared work the step runs on one thread, whose allocations are counted.
    threads::share(2, &|part| {
        if part == 0 {
            (work.lock().unwrap())();
        }
    });
    let matrix = WIDE * INNER * size_of::<f32>();
    assert!(largest < matrix / 4, "{largest} of {matrix}");
}
