//! The forward against a naive one, and what configurations are refused.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use serde_json::json;

use super::{Config, Model, graph, random};
use crate::error::{Error, Reason};
use crate::nn::ops::{Pool, Tape};
use crate::seed::Stream;

fn model() -> Model {
    let config = json!({
        "model_type": "lstm", "vocab_size": 11, "hidden_size": 6, "embedding_size": 5,
        "num_hidden_layers": 2,
    });
    random::model(config, &Stream::root(3)).unwrap()
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Logits of one sequence, as the equations of PyTorch's LSTM say, in f64.
fn naive(model: &Model, tokens: &[u32]) -> Vec<f64> {
    let read = |name: &str| model.weights[name].to_f32();
    let product = |w: &[f32], x: &[f64]| -> Vec<f64> {
        w.chunks(x.len())
            .map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
            .collect()
    };
    let (h, table) = (model.family.hidden, read("embedding.weight"));
    let width = model.family.embedding;
    let mut rows: Vec<Vec<f64>> = tokens
        .iter()
        .map(|t| table[*t as usize * width..][..width].iter().map(|v| f64::from(*v)).collect())
        .collect();
    for layer in 0..model.family.layers {
        let part = |name: &str| read(&format!("layers.{layer}.{name}"));
        let (input, recurrent, bias) =
            (part("input.weight"), part("recurrent.weight"), part("bias"));
        let (mut state, mut cell) = (vec![0.0; h], vec![0.0; h]);
        for row in &mut rows {
            let (a, b) = (product(&input, row), product(&recurrent, &state));
            let gate = |i: usize| a[i] + b[i] + f64::from(bias[i]);
            for i in 0..h {
                cell[i] =
                    logistic(gate(h + i)) * cell[i] + logistic(gate(i)) * gate(2 * h + i).tanh();
                state[i] = logistic(gate(3 * h + i)) * cell[i].tanh();
            }
            row.clone_from(&state);
        }
    }
    let (w, b) = (read("head.weight"), read("head.bias"));
    rows.iter()
        .flat_map(|x| {
            let y = product(&w, x);
            y.into_iter().zip(&b).map(|(y, b)| y + f64::from(*b)).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn sequences_side_by_side_are_sequences_one_by_one() {
    let model = model();
    let tensors: BTreeMap<String, Tensor> = model
        .weights
        .iter()
        .map(|(name, w)| {
            let tensor = Tensor::from_vec(w.to_f32(), w.shape(), &Device::Cpu).unwrap();
            (name.clone(), tensor)
        })
        .collect();
    let tensor = |name: &str| tensors.get(name).ok_or_else(|| Error::internal("missing"));
    let tokens: Vec<u32> = (0..24).map(|i| (i * 7 + 3) % 11).collect();
    let (width, pool) = (8, Pool::default());
    // The second sequence holds two texts.
    let rows = graph::Rows::new(width, &tokens, |i| i % width == 0 || i == 12);
    let tape = Tape::forgetful(&pool);
    let states = graph::states(&tape, &model.family, &tensor, &rows).unwrap();
    let logits = graph::logits(&tape, &tensor, &states).unwrap();
    let logits = logits.read();
    let texts = [0..8, 8..12, 12..16, 16..24];
    for text in texts {
        let want = naive(&model, &tokens[text.clone()]);
        for (place, want) in text.zip(want.chunks(11)) {
            let got = &logits[rows.row(place) * 11..][..11];
            for (got, want) in got.iter().zip(want) {
                assert!((f64::from(*got) - want).abs() < 1e-5, "{place}: {got} {want}");
            }
        }
    }
}

#[test]
fn sizes_and_refusals() {
    let config = |extra: serde_json::Value| {
        let mut config = json!({ "model_type": "lstm", "vocab_size": 256 });
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        Config::from_hugging_face(&config)
    };
    let usual = config(json!({})).unwrap();
    assert_eq!((usual.hidden, usual.embedding, usual.layers), (512, 512, 1));
    let narrow = config(json!({ "width": 0.25, "num_hidden_layers": 2 })).unwrap();
    assert_eq!((narrow.hidden, narrow.embedding), (128, 128));
    assert_eq!(narrow.prunable().len(), 4);
    for bad in [
        json!({ "vocab_size": 0 }),
        json!({ "hidden_size": -1 }),
        json!({ "hidden_size": 1e30 }),
        json!({ "num_hidden_layers": 65 }),
        json!({ "width": 0 }),
        json!({ "model_type": "gru" }),
    ] {
        let error = config(bad.clone()).unwrap_err();
        assert_eq!(error.reason(), Reason::UnsupportedModel, "{bad}");
    }
}
