//! The forward against the naive one, in all batches.

use std::sync::Arc;

use serde_json::{Value, json};

use super::super::{random, reference};
use super::*;
use crate::error::Reason;
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Ggml, GgmlType};

fn model(changes: &Value, seed: u64) -> Model {
    let mut config = random::tiny();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    random::model(config, seed).unwrap()
}

fn text(length: usize, seed: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * 37 + seed * 11 + i * i) % 96) as u32).collect()
}

fn one(encoder: &mut Encoder, tokens: &[u32], pooling: Pooling) -> Vec<f32> {
    let mut out = vec![0.0; encoder.config().hidden];
    encoder.embed(&[Input { tokens, pooling }], &mut out).unwrap();
    out
}

fn pooled(states: &[Vec<f64>], pooling: Pooling) -> Vec<f64> {
    let channel = |c: usize| states.iter().map(move |row| row[c]);
    (0..states[0].len())
        .map(|c| match pooling {
            Pooling::Mean => channel(c).sum::<f64>() / states.len() as f64,
            Pooling::Cls => states[0][c],
            Pooling::Max => channel(c).fold(f64::NEG_INFINITY, f64::max),
        })
        .collect()
}

#[test]
fn every_setting_matches_the_naive_forward() {
    for (changes, seed) in [
        (json!({}), 1),
        (json!({ "hidden_act": "relu", "num_hidden_layers": 1 }), 2),
        (json!({ "hidden_act": "gelu_new", "layer_norm_eps": 1e-3 }), 3),
        // Heads of 9 channels, widths that are no multiple of anything.
        (json!({ "hidden_size": 27, "num_attention_heads": 3, "intermediate_size": 41 }), 4),
        (json!({ "hidden_size": 40, "num_attention_heads": 1, "type_vocab_size": 1 }), 5),
        (json!({ "intermediate_size": [48, 16, 33] }), 6),
    ] {
        let model = model(&changes, seed);
        let mut encoder = Encoder::new(&model).unwrap();
        for length in [1, 2, 3, 7, 16, 33, 64] {
            let tokens = text(length, seed as usize);
            let states = reference::states(&model, &tokens);
            for pooling in [Pooling::Mean, Pooling::Cls, Pooling::Max] {
                let got = one(&mut encoder, &tokens, pooling);
                for (got, want) in got.iter().zip(pooled(&states, pooling)) {
                    assert!(
                        (f64::from(*got) - want).abs() < 1e-4,
                        "{changes} {length} {pooling:?}: {got} not {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn blocks_one_by_one_are_the_whole() {
    let model = model(&json!({ "intermediate_size": [48, 16, 200] }), 8);
    let config = &model.family;
    let texts = [text(20, 1), text(20, 2)];
    let mut states = vec![0.0; 40 * 32];
    for (row, token) in states.chunks_mut(32).zip(texts.concat()) {
        model.weights[WORDS].read_rows(token as usize, row);
    }
    for layer in 0..3 {
        let block = Block::new(config, &model.weights, layer).unwrap();
        let mut seen = [0; 4];
        let mut tap = |group: usize, rows: &[f32]| seen[group] += rows.len();
        block.forward(&mut states, 20, Some(&mut tap));
        assert_eq!(seen, [32, 32, 32, config.wide(layer)].map(|width| 40 * width));
    }
    let mut encoder = Encoder::new(&model).unwrap();
    for (text, states) in texts.iter().zip(states.chunks(20 * 32)) {
        let whole = one(&mut encoder, text, Pooling::Cls);
        assert!(whole.iter().zip(states).all(|(a, b)| (a - b).abs() < 1e-5));
    }
    assert!(Block::new(config, &model.weights, 3).is_err());
}

#[test]
fn a_vector_does_not_depend_on_its_batch() {
    let model = model(&json!({}), 7);
    let mut encoder = Encoder::new(&model).unwrap();
    // More rows than a step takes, in no order.
    let texts: Vec<Vec<u32>> = (0..60).map(|i| text(1 + (i * 29) % 64, i)).collect();
    assert!(texts.iter().map(Vec::len).sum::<usize>() > encoder.step_rows());
    let poolings = [Pooling::Mean, Pooling::Cls, Pooling::Max];
    let inputs: Vec<_> = texts
        .iter()
        .enumerate()
        .map(|(i, tokens)| Input { tokens, pooling: poolings[i % 3] })
        .collect();
    let mut out = vec![f32::NAN; texts.len() * 32];
    encoder.embed(&inputs, &mut out).unwrap();
    for (input, got) in inputs.iter().zip(out.chunks_exact(32)) {
        let alone = one(&mut encoder, input.tokens, input.pooling);
        for (a, b) in alone.iter().zip(got) {
            // Many rows are multiplied in another way than few: only sums are rounded differently.
            assert!((a - b).abs() < 1e-5, "{}: {a} and {b}", input.tokens.len());
        }
    }
    // No inputs, no output.
    encoder.embed(&[], &mut []).unwrap();
}

#[test]
fn weights_run_in_their_layouts() {
    let dense = model(&json!({}), 9);
    let mut stored = dense.clone();
    for (name, weight) in &mut stored.weights {
        let [rows, cols] = weight.shape() else { continue };
        let (shape, values) = ([*rows, *cols], weight.to_f32());
        *weight = Arc::new(match (name.contains("dense"), cols % 32) {
            (true, 0) => Weight::Ggml(Ggml::quantize(shape, GgmlType::Q8_0, &values).unwrap()),
            _ => Weight::Dense(Dense::from_f32(shape.to_vec(), &values, Dtype::BF16).unwrap()),
        });
    }
    let mut encoder = Encoder::new(&stored).unwrap();
    let tokens = text(20, 3);
    let want = pooled(&reference::states(&stored, &tokens), Pooling::Mean);
    for (got, want) in one(&mut encoder, &tokens, Pooling::Mean).iter().zip(want) {
        assert!((f64::from(*got) - want).abs() < 1e-4, "{got} not {want}");
    }
}

#[test]
fn inputs_that_have_no_rows_are_refused_by_place() {
    let mut encoder = Encoder::new(&model(&json!({}), 1)).unwrap();
    let (good, long) = (text(3, 1), text(65, 1));
    for bad in [&[][..], &[1, 96], &long] {
        let inputs = [&good[..], bad].map(|tokens| Input { tokens, pooling: Pooling::Mean });
        let error = encoder.embed(&inputs, &mut [0.0; 64]).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidField);
        assert_eq!(error.violations()[0].field, "inputs[1].ids");
    }
}

#[test]
fn missing_and_wrong_tensors_are_refused() {
    let mut broken = model(&json!({}), 1);
    let name = "encoder.layer.1.attention.self.key.bias";
    let bias = broken.weights.remove(name).unwrap();
    let reason = |model: &Model| Encoder::new(model).err().unwrap().reason();
    assert_eq!(reason(&broken), Reason::TensorNotFound);
    let longer = Dense::from_f32(vec![33], &[0.0; 33], Dtype::F32).unwrap();
    broken.weights.insert(name.to_owned(), Arc::new(Weight::Dense(longer)));
    assert_eq!(reason(&broken), Reason::MalformedFile);
    broken.weights.insert(name.to_owned(), bias);
    assert!(Encoder::new(&broken).is_ok());
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn fewer_bits_are_close_to_f32() {
    let plain = model(&json!({ "hidden_size": 64, "intermediate_size": 128 }), 11);
    // As in models that were trained, some channels of all states are much larger than the others.
    let mut uneven = plain.clone();
    for (name, weight) in &mut uneven.weights {
        if name.ends_with("LayerNorm.bias") {
            let mut values = weight.to_f32();
            (values[5], values[40]) = (15.0, -9.0);
            let dense = Dense::from_f32(vec![64], &values, Dtype::F32).unwrap();
            *weight = Arc::new(Weight::Dense(dense));
        }
    }
    let texts: Vec<Vec<u32>> = [1, 5, 16, 40, 64].map(|n| text(n, n)).into();
    let inputs: Vec<_> =
        texts.iter().map(|tokens| Input { tokens, pooling: Pooling::Mean }).collect();
    for model in [plain, uneven] {
        let run = |precision: Precision| {
            let mut out = vec![f32::NAN; texts.len() * 64];
            Encoder::with(&model, precision).unwrap().embed(&inputs, &mut out).unwrap();
            out
        };
        let exact = run(Precision::F32);
        for (precision, least) in [(Precision::Bf16, 0.9999), (Precision::Int8, 0.995)] {
            for (a, b) in exact.chunks_exact(64).zip(run(precision).chunks_exact(64)) {
                let cosine = cosine(a, b);
                assert!(cosine > least, "{precision:?}: {cosine}");
            }
            assert_ne!(run(precision), exact, "{precision:?} rounds");
        }
    }
}

#[test]
#[allow(clippy::single_range_in_vec_init)]
fn groups_tile_the_texts_and_keep_threads_at_work() {
    let sequences = |lengths: &[usize]| {
        let mut end = 0;
        let next = lengths.iter().map(|n| {
            end += n;
            end - n..end
        });
        next.collect::<Vec<_>>()
    };
    let all = |lengths: &[usize], threads| groups(&sequences(lengths), threads);
    // 1024 rows are four groups of 256, or one for each of eight threads.
    assert_eq!(all(&[32; 32], 2), [0..8, 8..16, 16..24, 24..32]);
    assert_eq!(all(&[32; 32], 8).len(), 8);
    assert_eq!(all(&[64, 64], 2), [0..1, 1..2]);
    // One text, and one that is longer than all others together, are for all threads at once.
    assert_eq!(all(&[512], 2), [0..1]);
    assert_eq!(all(&[512, 16, 16], 2), [0..3]);
    assert_eq!(all(&[512, 512], 1), [0..1, 1..2]);
    for lengths in [&[7, 3, 3, 2, 1, 1][..], &[300, 299, 100, 99, 5], &[1; 100], &[64; 16]] {
        for threads in 1..6 {
            let groups = all(lengths, threads);
            let mut next = 0;
            for group in &groups {
                assert!(group.start == next && group.end > next, "{lengths:?}: {groups:?}");
                next = group.end;
            }
            assert_eq!(next, lengths.len());
        }
    }
}

#[test]
fn a_vector_does_not_depend_on_its_batch_in_fewer_bits() {
    let model = model(&json!({ "hidden_size": 64, "intermediate_size": 128 }), 3);
    let texts: Vec<Vec<u32>> = (0..40).map(|i| text(1 + (i * 29) % 64, i)).collect();
    let inputs: Vec<_> =
        texts.iter().map(|tokens| Input { tokens, pooling: Pooling::Mean }).collect();
    for precision in [Precision::Bf16, Precision::Int8] {
        let mut encoder = Encoder::with(&model, precision).unwrap();
        let mut out = vec![f32::NAN; texts.len() * 64];
        encoder.embed(&inputs, &mut out).unwrap();
        for (input, got) in inputs.iter().zip(out.chunks_exact(64)) {
            let alone = one(&mut encoder, input.tokens, input.pooling);
            // Sums in another order may round to another neighbour.
            assert!(cosine(&alone, got) > 0.9999, "{precision:?}: {}", input.tokens.len());
        }
    }
}

#[test]
fn widths_without_kernels_run_as_they_are() {
    let narrow = model(&json!({ "hidden_size": 27, "num_attention_heads": 3 }), 4);
    let mut exact = Encoder::new(&narrow).unwrap();
    let mut rounded = Encoder::with(&narrow, Precision::Int8).unwrap();
    let tokens = text(9, 2);
    let (a, b) = (one(&mut exact, &tokens, Pooling::Cls), one(&mut rounded, &tokens, Pooling::Cls));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 0.1), "{a:?} {b:?}");
}
