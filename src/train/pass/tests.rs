//! Gradients of whole models against differences, with all that may be trained.

use std::sync::Arc;

use candle_core::Device;
use serde_json::{Value as Json, json};

use super::*;
use crate::models::Model;
use crate::nn::ops::Precision;
use crate::nn::tuning::{Dropout, Frozen, LowRank};
use crate::nn::weight::Weight;
use crate::train::parameters::Parameter;

fn noise(len: usize, seed: usize) -> Vec<f32> {
    let mut state = (seed as u32).wrapping_mul(747_796_405) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn parameter(dims: &[usize], values: Vec<f32>) -> Parameter {
    let tensor = Tensor::from_vec(values, dims, &Device::Cpu).unwrap();
    Parameter { var: Var::from_tensor(&tensor).unwrap(), rate: 1.0, decay: false }
}

/// Adapters on the linears that have parameters.
struct Lora<'a> {
    parameters: &'a Parameters,
    dropout: Option<Dropout>,
}

impl Tuning for Lora<'_> {
    fn low_rank(&self, name: &str) -> Result<Option<LowRank>> {
        let get = |part: &str| self.parameters.get(&format!("{name}.{part}"));
        let (Some(a), Some(b)) = (get("a"), get("b")) else { return Ok(None) };
        let [a, b] = [a, b].map(|p| p.var.as_tensor().clone());
        Ok(Some(LowRank { a, b, rows: None, scale: 0.5, dropout: self.dropout }))
    }

    fn linear(&self, _: &str, _: &Tensor, _: &Arc<Weight>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn computes(&self, _: &str) -> bool {
        false
    }

    fn tensor(&self, _: &str) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

fn adapters(shapes: &[(String, Vec<usize>)], on: impl Fn(&str) -> bool) -> Parameters {
    let mut parameters = Parameters::new();
    for (i, (name, shape)) in shapes.iter().enumerate() {
        if let (&[rows, cols], true) = (&shape[..], on(name)) {
            let a = parameter(&[2, cols], noise(2 * cols, i));
            let b = parameter(&[rows, 2], noise(2 * rows, i + 1000));
            parameters.insert(format!("{name}.a"), a);
            parameters.insert(format!("{name}.b"), b);
        }
    }
    parameters
}

fn tokens(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 37 + seed * 11 + i * i) % 96) as u32).collect()
}

fn next(count: usize, seed: usize) -> Sequence {
    let counts = (0..count).map(|i| i % 3 != 1).collect();
    Sequence { tokens: tokens(count, seed), target: Target::Next(counts), line: 1 }
}

fn decoder(architecture: &str, tied: bool) -> Model {
    let mut config = decoder::random::tiny(architecture);
    config["tie_word_embeddings"] = json!(tied);
    config["num_hidden_layers"] = json!(2);
    decoder::random::model(config, 5).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Compares gradients with differences of the loss at some places of each parameter.
fn compare(pass: &Pass<'_>, sequences: &[&Sequence], parameters: &Parameters, what: &str) {
    let (sums, gradients) = pass.loss_and_gradients(sequences, parameters).unwrap();
    let again = pass.loss(sequences, parameters).unwrap();
    assert!((sums.loss - again.loss).abs() < 1e-4 * sums.loss, "{what}: {sums:?} {again:?}");
    assert_eq!((sums.count, sums.correct), (again.count, again.correct));
    assert_eq!(gradients.keys().collect::<Vec<_>>(), parameters.keys().collect::<Vec<_>>());
    for (name, parameter) in parameters {
        let start = values(parameter.var.as_tensor());
        let got = values(&gradients[name]);
        // The place of the largest gradient and one of the middle.
        let largest = (0..got.len()).max_by(|a, b| got[*a].abs().total_cmp(&got[*b].abs()));
        for at in [largest.unwrap(), got.len() / 2] {
            let moved = |by: f32| {
                let mut values = start.clone();
                values[at] += by;
                let moved = Tensor::from_vec(values, parameter.var.shape(), &Device::Cpu).unwrap();
                parameter.var.set(&moved).unwrap();
                pass.loss(sequences, parameters).unwrap().loss
            };
            // Of a small step the rounding of the f32 loss is seen, of a large one its curvature.
            let wants = [1e-3, 1e-2].map(|by| (moved(by) - moved(-by)) / f64::from(2.0 * by));
            moved(0.0);
            let close = |want: &f64| (f64::from(got[at]) - want).abs() < 1e-2 + 0.03 * want.abs();
            assert!(wants.iter().any(close), "{what} {name}: {} not {wants:?}", got[at]);
        }
    }
}

#[test]
fn adapters_of_decoders() {
    for architecture in ["llama", "qwen2", "qwen3", "gemma3_text"] {
        let model = decoder(architecture, true);
        let config = model.decoder().unwrap();
        let parameters = adapters(&config.tensors(), |name| name.contains("_proj."));
        let tuning = Lora { parameters: &parameters, dropout: None };
        let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
        let pass = Pass::decoder(graph, &tuning, Options::default());
        compare(&pass, &[&next(9, 1), &next(5, 2)], &parameters, architecture);
    }
}

/// All tensors of a model as parameters.
fn all(shapes: &[(String, Vec<usize>)], weight: impl Fn(&str) -> Vec<f32>) -> Parameters {
    shapes.iter().map(|(name, dims)| (name.clone(), parameter(dims, weight(name)))).collect()
}

#[test]
fn all_tensors_of_decoders() {
    for (architecture, tied) in
        [("llama", true), ("qwen2", false), ("qwen3", true), ("gemma3_text", true)]
    {
        let model = decoder(architecture, tied);
        let shapes = model.decoder().unwrap().tensors();
        let parameters = all(&shapes, |name| model.weights[name].to_f32());
        let tuning = InPlace(&parameters);
        let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
        let pass = Pass::decoder(graph, &tuning, Options::default());
        let sequences = [&next(9, 1), &next(5, 2)];
        compare(&pass, &sequences, &parameters, architecture);
        // The same tensors, so the same loss as of the model as it is.
        let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
        let frozen = Pass::decoder(graph, &Frozen, Options::default());
        let (a, b) = (pass.loss(&sequences, &parameters), frozen.loss(&sequences, &parameters));
        assert!((a.unwrap().loss - b.unwrap().loss).abs() < 1e-4);
        let (_, none) = frozen.loss_and_gradients(&sequences, &parameters).unwrap();
        assert!(none.is_empty());
    }
}

fn encoder_model(changes: &Json) -> encoder::Model {
    let mut config = encoder::random::tiny();
    config["num_hidden_layers"] = json!(2);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    encoder::random::model(config, 4).unwrap()
}

fn with_head(mut parameters: Parameters, outputs: usize) -> Parameters {
    let weight = parameter(&[outputs, 32], noise(outputs * 32, 70));
    parameters.insert(CLASSIFIER[0].to_owned(), weight);
    parameters.insert(CLASSIFIER[1].to_owned(), parameter(&[outputs], noise(outputs, 71)));
    parameters
}

/// A pair whose answers begin after three tokens.
fn pair(first: usize, second: usize, seed: usize) -> Sequence {
    let counts = (0..first).chain(0..second).map(|i| i > 2).collect();
    let tokens = [tokens(first, seed), tokens(second, seed + 5)].concat();
    Sequence { tokens, target: Target::Pair { chosen: first, counts }, line: 1 }
}

#[test]
fn preferences_of_decoders() {
    for (architecture, checkpoint_activations) in [("llama", false), ("gemma3_text", true)] {
        let model = decoder(architecture, true);
        let config = model.decoder().unwrap();
        let parameters = adapters(&config.tensors(), |name| name.contains("_proj."));
        let tuning = Lora { parameters: &parameters, dropout: None };
        let options = Options { beta: 0.3, checkpoint_activations, ..Options::default() };
        let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
        let pass = Pass::decoder(graph, &tuning, options);
        let (a, b) = (pair(9, 7, 1), pair(5, 8, 2));
        compare(&pass, &[&a, &b], &parameters, architecture);
        // What is not tuned prefers nothing.
        let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
        let frozen = Pass::decoder(graph, &Frozen, options);
        let sums = frozen.loss(&[&a, &b], &parameters).unwrap();
        assert!((sums.loss - 2.0 * std::f64::consts::LN_2).abs() < 1e-6);
        assert_eq!((sums.count, sums.correct), (2, 0));
        // A loss of two pairs is the sum of the losses of each.
        let each = [&a, &b].map(|pair| pass.loss(&[pair], &parameters).unwrap().loss);
        let both = pass.loss(&[&a, &b], &parameters).unwrap().loss;
        assert!((each[0] + each[1] - both).abs() < 1e-4);
    }
    let model = encoder_model(&json!({}));
    let graph = encoder::graph::Graph::new(&model, Precision::F32).unwrap();
    let pass = Pass::encoder(graph, &Frozen, Options::default());
    let error = pass.loss(&[&pair(5, 5, 1)], &Parameters::new()).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
}

#[test]
fn hidden_tokens_and_several_classes_of_encoders() {
    let model = encoder_model(&json!({}));
    let on = |name: &str| name.starts_with("encoder.layer") && name.ends_with(".weight");
    let hidden = |n: usize| {
        let places = (0..n).map(|i| (i % 3 == 1).then_some((i * 7 % 96) as u32)).collect();
        Sequence { tokens: tokens(n, n), target: Target::Hidden(places), line: 1 }
    };
    let mut parameters = adapters(&model.family.tensors(), on);
    let head = crate::train::head::hidden_tokens(32, 1.0, &crate::seed::Stream::root(3)).unwrap();
    parameters.extend(head);
    let tuning = Lora { parameters: &parameters, dropout: None };
    let graph = || encoder::graph::Graph::new(&model, Precision::F32).unwrap();
    for checkpoint_activations in [false, true] {
        let options = Options { checkpoint_activations, ..Options::default() };
        let pass = Pass::encoder(graph(), &tuning, options);
        compare(&pass, &[&hidden(9), &hidden(4)], &parameters, "hidden tokens");
    }
    let mut whole = all(&model.family.tensors(), |name| model.weights[name].to_f32());
    whole
        .extend(crate::train::head::hidden_tokens(32, 1.0, &crate::seed::Stream::root(3)).unwrap());
    let tuning = InPlace(&whole);
    let pass = Pass::encoder(graph(), &tuning, Options::default());
    // The pooler has no part in it, where there is one.
    let (_, gradients) = pass.loss_and_gradients(&[&hidden(9)], &whole).unwrap();
    assert!(gradients.contains_key("embeddings.word_embeddings.weight"));

    let text = |n: usize, classes: &[u32]| Sequence {
        tokens: tokens(n, n),
        target: Target::Labels(classes.to_vec()),
        line: 1,
    };
    let parameters = with_head(adapters(&model.family.tensors(), on), 4);
    let tuning = Lora { parameters: &parameters, dropout: None };
    let pass = Pass::encoder(graph(), &tuning, Options::default());
    compare(&pass, &[&text(7, &[0, 3]), &text(4, &[])], &parameters, "classes");
}

#[test]
fn the_second_text_of_an_encoder_has_a_type_of_its_own() {
    let model = encoder_model(&json!({}));
    let parameters = with_head(Parameters::new(), 3);
    let options = Options { separator: Some(50), ..Options::default() };
    let graph = || encoder::graph::Graph::new(&model, Precision::F32).unwrap();
    let (typed, plain) = (
        Pass::encoder(graph(), &Frozen, options),
        Pass::encoder(graph(), &Frozen, Options::default()),
    );
    let text =
        |tokens: &[u32]| Sequence { tokens: tokens.to_vec(), target: Target::Class(1), line: 1 };
    let loss = |pass: &Pass<'_>, tokens: &[u32]| {
        pass.loss(&[&text(tokens), &text(&[3, 4])], &parameters).unwrap().loss
    };
    // One text ends in its separator.
    assert_eq!(loss(&typed, &[2, 7, 9, 50]), loss(&plain, &[2, 7, 9, 50]));
    let two = [2, 7, 50, 9, 50];
    assert_ne!(loss(&typed, &two), loss(&plain, &two));
    let sequences = Sequences::of([5, 2]);
    assert_eq!(types(&[2, 7, 50, 9, 50, 50, 1], &sequences, 50)[..], [0, 0, 0, 1, 1, 0, 1]);
}

#[test]
fn heads_and_adapters_of_encoders() {
    let text = |n: usize, target: Target| Sequence { tokens: tokens(n, n), target, line: 1 };
    let tags =
        |n: usize| Target::Tags((0..n).map(|i| (i % 4 != 0).then_some(i as u32 % 3)).collect());
    let classes = [text(7, Target::Class(2)), text(3, Target::Class(0))];
    let numbers = [text(7, Target::Value(1.5)), text(3, Target::Value(-0.5))];
    let tagged = [text(7, tags(7)), text(3, tags(3))];
    for (sequences, outputs) in [(&classes, 3), (&numbers, 1), (&tagged, 3)] {
        let sequences = sequences.each_ref();
        for pooling in [Pooling::Mean, Pooling::Cls, Pooling::Max] {
            let model = encoder_model(&json!({}));
            let on = |name: &str| name.starts_with("encoder.layer") && name.ends_with(".weight");
            let parameters = with_head(adapters(&model.family.tensors(), on), outputs);
            let tuning = Lora { parameters: &parameters, dropout: None };
            let graph = encoder::graph::Graph::new(&model, Precision::F32).unwrap();
            let pass = Pass::encoder(graph, &tuning, Options { pooling, ..Options::default() });
            compare(&pass, &sequences, &parameters, "encoder");
        }
    }
    for act in ["gelu", "relu", "gelu_new"] {
        let model = encoder_model(&json!({ "hidden_act": act }));
        let shapes = model.family.tensors();
        let parameters = with_head(all(&shapes, |name| model.weights[name].to_f32()), 3);
        let tuning = InPlace(&parameters);
        let graph = encoder::graph::Graph::new(&model, Precision::F32).unwrap();
        let pass = Pass::encoder(graph, &tuning, Options::default());
        compare(&pass, &classes.each_ref(), &parameters, act);
    }
}

#[test]
fn checkpointing_gives_the_same_gradients_in_less_memory() {
    let mut config = decoder::random::tiny("llama");
    config["num_hidden_layers"] = json!(6);
    let model = decoder::random::model(config, 5).unwrap();
    let shapes = model.decoder().unwrap().tensors();
    let sequences = [&next(40, 1), &next(31, 2)];
    let dropout = Some(Dropout { probability: 0.3, seed: 5 });
    let compare = |parameters: &Parameters, tuning: &dyn Tuning, smaller: bool| {
        let run = |checkpoint_activations: bool| {
            let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
            let options = Options { checkpoint_activations, ..Options::default() };
            let pass = Pass::decoder(graph, tuning, options);
            let out = pass.loss_and_gradients(&sequences, parameters).unwrap();
            assert_eq!(pass.pool().live_bytes(), 0);
            (out, pass.pool().peak_bytes())
        };
        let (((sums, a), whole), ((same, b), blocks)) = (run(false), run(true));
        assert_eq!(sums, same);
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        for (name, a) in &a {
            let (a, b) = (values(a), values(&b[name]));
            let largest = a.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let close = a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= 1e-6 * largest);
            assert!(close && largest > 0.0, "{name}");
        }
        assert!(!smaller || blocks * 2 < whole, "{blocks} of {whole} bytes");
    };
    let parameters = adapters(&shapes, |name| name.contains("q_proj") || name.contains("v_proj"));
    compare(&parameters, &Lora { parameters: &parameters, dropout: None }, true);
    compare(&parameters, &Lora { parameters: &parameters, dropout }, true);
    // Adapters of one block in the middle only: nothing is asked of those below.
    let middle = adapters(&shapes, |name| name.contains("layers.3.self_attn.q_proj"));
    compare(&middle, &Lora { parameters: &middle, dropout: None }, false);
    let everything = all(&shapes, |name| model.weights[name].to_f32());
    compare(&everything, &InPlace(&everything), false);
}

#[test]
fn dropout_is_of_training_only() {
    let model = decoder("llama", true);
    let shapes = model.decoder().unwrap().tensors();
    let parameters = adapters(&shapes, |name| name.contains("q_proj"));
    let sequences = [&next(20, 1)];
    let run = |seed: Option<u64>| {
        let dropout = seed.map(|seed| Dropout { probability: 0.5, seed });
        let tuning = Lora { parameters: &parameters, dropout };
        let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
        let pass = Pass::decoder(graph, &tuning, Options::default());
        let (sums, _) = pass.loss_and_gradients(&sequences, &parameters).unwrap();
        (sums.loss, pass.loss(&sequences, &parameters).unwrap().loss)
    };
    let (plain, first, same, second) = (run(None), run(Some(1)), run(Some(1)), run(Some(2)));
    assert_eq!(first, same);
    assert!(first.0 != second.0 && first.0 != plain.0);
    assert!(first.1 == plain.1 && second.1 == plain.1);
}

#[test]
fn rounded_products_give_nearly_the_same_gradients() {
    let model = decoder("llama", true);
    let shapes = model.decoder().unwrap().tensors();
    let parameters = adapters(&shapes, |name| name.contains("_proj."));
    let sequences = [&next(30, 1), &next(22, 2)];
    let run = |precision: Precision| {
        let tuning = Lora { parameters: &parameters, dropout: None };
        let graph = decoder::graph::Graph::new(&model, precision).unwrap();
        let pass = Pass::decoder(graph, &tuning, Options::default());
        pass.loss_and_gradients(&sequences, &parameters).unwrap()
    };
    let ((exact, a), (rounded, b)) = (run(Precision::F32), run(Precision::Bf16));
    assert!((exact.loss - rounded.loss).abs() < 0.01 * exact.loss, "{exact:?} {rounded:?}");
    assert_ne!(exact.loss, rounded.loss);
    for (name, a) in &a {
        let (a, b) = (values(a), values(&b[name]));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let cosine = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
        assert!(cosine > 0.97, "{name}: {cosine}");
    }
}

#[test]
fn batches_add_up_and_rows_that_do_not_count_do_not() {
    let model = decoder("llama", true);
    let shapes = model.decoder().unwrap().tensors();
    let parameters = adapters(&shapes, |name| name.contains("v_proj"));
    let tuning = Lora { parameters: &parameters, dropout: None };
    let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
    let pass = Pass::decoder(graph, &tuning, Options::default());
    let (a, b) = (next(12, 1), next(7, 2));
    let (both, all) = pass.loss_and_gradients(&[&a, &b], &parameters).unwrap();
    let (mut sums, mut gradients) = pass.loss_and_gradients(&[&a], &parameters).unwrap();
    let (second, more) = pass.loss_and_gradients(&[&b], &parameters).unwrap();
    sums.add(second);
    // Of 12 tokens those at 2, 3, 5, 6, 8, 9, 11 count, of 7 those at 2, 3, 5, 6.
    assert_eq!((both.count, sums.count), (11, 11));
    assert!((both.loss - sums.loss).abs() < 1e-4 && both.correct == sums.correct);
    for (name, gradient) in &mut gradients {
        let sum = (&*gradient + &more[name]).unwrap();
        let (a, b) = (values(&sum), values(&all[name]));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4), "{name}");
    }
    let none = Sequence { target: Target::Next(vec![false; 12]), ..a.clone() };
    let (sums, gradients) = pass.loss_and_gradients(&[&none], &parameters).unwrap();
    assert_eq!(sums, LossSums::default());
    assert!(gradients.is_empty());
    // The first token is never predicted.
    let first = Sequence { target: Target::Next(vec![true]), tokens: vec![1], line: 1 };
    assert_eq!(pass.loss(&[&first], &parameters).unwrap().count, 0);
}

#[test]
fn what_does_not_fit_is_refused() {
    let model = decoder("llama", true);
    let graph = decoder::graph::Graph::new(&model, Precision::F32).unwrap();
    let pass = Pass::decoder(graph, &Frozen, Options::default());
    let parameters = with_head(Parameters::new(), 3);
    let of = |tokens: Vec<u32>, target: Target| Sequence { tokens, target, line: 3 };
    let class = of(vec![1, 2], Target::Class(0));
    let refuse =
        |sequences: &[&Sequence]| pass.loss_and_gradients(sequences, &parameters).unwrap_err();
    assert_eq!(refuse(&[&class]).reason(), Reason::ModelUnsuitable);
    let short = of(vec![1, 2, 3], Target::Next(vec![true; 2]));
    assert!(refuse(&[&short]).message().contains("line 3"));
    let good = next(5, 1);
    assert!(refuse(&[&good, &class]).message().contains("different kinds"));
    assert!(refuse(&[&class, &good]).message().contains("different kinds"));
    let value = of(vec![1, 2], Target::Value(0.5));
    assert!(refuse(&[&class, &value]).message().contains("different kinds"));
    let outside = of(vec![1, 96], Target::Next(vec![true; 2]));
    assert_eq!(refuse(&[&outside]).reason(), Reason::InvalidField);

    let model = encoder_model(&json!({}));
    let graph = encoder::graph::Graph::new(&model, Precision::F32).unwrap();
    let pass = Pass::encoder(graph, &Frozen, Options::default());
    assert_eq!(pass.loss(&[&good], &parameters).unwrap_err().reason(), Reason::ModelUnsuitable);
    // A class that the head does not have, and no head at all.
    let third = of(vec![1, 2], Target::Class(3));
    assert!(pass.loss(&[&third], &parameters).is_err());
    let error = pass.loss(&[&class], &Parameters::new()).unwrap_err();
    assert!(error.message().contains("classifier.weight"));
    let (sums, gradients) = pass.loss_and_gradients(&[&class], &parameters).unwrap();
    assert_eq!((sums.count, gradients.len()), (1, 2));
}
