//! The fast forward against a naive one, and what configurations are refused.

use serde_json::json;

use super::plan::Plan;
use super::{Config, Layer, Model, random};
use crate::error::Reason;
use crate::seed::Stream;

fn noise(n: usize, by: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * by).sin()).collect()
}

/// A convolution and batch norm as they are written down, in f64; `depthwise` has one window a channel.
fn convolve(
    x: &[f64],
    [height, width, channels]: [usize; 3],
    weight: &[f32],
    (size, stride, depthwise): (usize, usize, bool),
    norm: [&[f32]; 4],
    eps: f64,
) -> (Vec<f64>, [usize; 3]) {
    let outputs = norm[0].len();
    let pad = (size - 1) / 2;
    let out = [height, width].map(|side| (side + 2 * pad - size) / stride + 1);
    let mut y = Vec::new();
    for place in 0..out[0] * out[1] {
        for o in 0..outputs {
            let mut sum = 0.0;
            for tap in 0..size * size {
                let row = (place / out[1] * stride + tap / size).wrapping_sub(pad);
                let column = (place % out[1] * stride + tap % size).wrapping_sub(pad);
                if row >= height || column >= width {
                    continue;
                }
                for c in 0..channels {
                    let w = match depthwise {
                        true if c == o => weight[o * size * size + tap],
                        true => 0.0,
                        false => weight[(o * size * size + tap) * channels + c],
                    };
                    sum += x[(row * width + column) * channels + c] * f64::from(w);
                }
            }
            let [scale, shift, mean, variance] = norm.map(|part| f64::from(part[o]));
            let z = (sum - mean) / (variance + eps).sqrt() * scale + shift;
            y.push(z.clamp(0.0, 6.0));
        }
    }
    (y, [out[0], out[1], outputs])
}

fn naive(model: &Model, image: &[u8]) -> Vec<f64> {
    let config = &model.family;
    let read = |name: &str| model.weights[name].to_f32();
    let mut x: Vec<f64> = image
        .iter()
        .enumerate()
        .map(|(i, v)| {
            let c = i % config.channels;
            let (mean, deviation) = (config.mean[c], config.deviation[c]);
            (f64::from(*v) / 255.0 - f64::from(mean)) / f64::from(deviation)
        })
        .collect();
    let mut shape = [config.sides[0], config.sides[1], config.channels];
    let eps = f64::from(config.norm_eps);
    let norm = |place: &str| {
        ["weight", "bias", "running_mean", "running_var"]
            .map(|part| read(&format!("{place}.{part}")))
    };
    for (i, layer) in config.layers.iter().enumerate() {
        let place = |part: &str| format!("layers.{i}.{part}");
        match layer {
            Layer::Plain { stride, .. } => {
                let (w, n) = (read(&place("conv.weight")), norm(&place("norm")));
                let n = [0, 1, 2, 3].map(|i| &n[i][..]);
                (x, shape) = convolve(&x, shape, &w, (3, *stride, false), n, eps);
            }
            Layer::Separable { stride, .. } => {
                let (w, n) = (read(&place("depthwise.weight")), norm(&place("depthwise_norm")));
                let n = [0, 1, 2, 3].map(|i| &n[i][..]);
                (x, shape) = convolve(&x, shape, &w, (3, *stride, true), n, eps);
                let (w, n) = (read(&place("pointwise.weight")), norm(&place("pointwise_norm")));
                let n = [0, 1, 2, 3].map(|i| &n[i][..]);
                (x, shape) = convolve(&x, shape, &w, (1, 1, false), n, eps);
            }
        }
    }
    let pixels = shape[0] * shape[1];
    let pooled: Vec<f64> = (0..shape[2])
        .map(|c| x.iter().skip(c).step_by(shape[2]).sum::<f64>() / pixels as f64)
        .collect();
    let (w, b) = (read("classifier.weight"), read("classifier.bias"));
    w.chunks(shape[2])
        .zip(b)
        .map(|(w, b)| {
            w.iter().zip(&pooled).map(|(w, p)| f64::from(*w) * p).sum::<f64>() + f64::from(b)
        })
        .collect()
}

/// A model whose norms do something.
fn model(config: serde_json::Value) -> Model {
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Weight};
    let mut model = random::model(config, &Stream::root(5)).unwrap();
    for (name, weight) in &mut model.weights {
        if weight.shape().len() == 1 {
            let more = noise(weight.shape()[0], 0.37 + name.len() as f32 / 10.0);
            let old = weight.to_f32();
            let values: Vec<f32> = old.iter().zip(more).map(|(v, n)| v + 0.4 * n).collect();
            let new = Dense::from_f32(weight.shape().to_vec(), &values, Dtype::F32).unwrap();
            *weight = std::sync::Arc::new(Weight::Dense(new));
        }
    }
    model
}

#[test]
fn the_fast_forward_is_the_one_that_is_written_down() {
    for config in [
        json!({ "model_type": "conv_net", "image_size": [9, 7], "num_channels": 2, "num_labels": 3,
                "channels": [5, 17], "strides": [1, 2], "image_mean": [0.2, 0.4] }),
        json!({ "model_type": "mobilenet_v1", "image_size": 12, "num_channels": 3, "num_labels": 4,
                "depth_multiplier": 0.1, "min_depth": 3, "first_stride": 1 }),
    ] {
        let model = model(config);
        let image = model.family.image();
        let bytes: Vec<u8> = (0..3 * image).map(|i| (i * 31 % 256) as u8).collect();
        let got = Plan::new(&model).unwrap().classify(&bytes).unwrap();
        let want: Vec<f64> = bytes.chunks(image).flat_map(|image| naive(&model, image)).collect();
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 1e-4 * (1.0 + want.abs()), "{got} {want}");
        }
        assert!(Plan::new(&model).unwrap().classify(&bytes[1..]).is_err());
    }
}

#[test]
fn row_groups_run_as_the_weights_they_stand_for() {
    use crate::nn::weight::{RowGroupValues, RowGroups, Weight};
    for (config, group) in [
        // Wide images, whose convolutions read planes, and narrow ones, whose rows are unfolded.
        (
            json!({ "model_type": "conv_net", "image_size": [6, 29], "num_channels": 2,
                    "num_labels": 3, "channels": [12, 17, 9], "strides": [1, 1, 2] }),
            8,
        ),
        (
            json!({ "model_type": "conv_net", "image_size": [9, 7], "num_channels": 2,
                    "num_labels": 3, "channels": [5, 17], "strides": [1, 2] }),
            4,
        ),
        (
            json!({ "model_type": "mobilenet_v1", "image_size": 12, "num_channels": 3,
                    "num_labels": 4, "depth_multiplier": 0.1, "min_depth": 3, "first_stride": 1 }),
            2,
        ),
    ] {
        let mut model = model(config);
        for name in model.family.prunable() {
            let weight = &model.weights[&name];
            let (shape, mut values) = ([weight.rows(), weight.cols()], weight.to_f32());
            let inputs = shape[1] / if name.ends_with("conv.weight") { 9 } else { 1 };
            for (row, values) in values.chunks_exact_mut(shape[1]).enumerate() {
                for (column, v) in values.iter_mut().enumerate() {
                    // The first group keeps no input, others about half.
                    let (g, c) = (row / group, column % inputs);
                    if g == 0 && inputs > 3 || (c * 5 + g * 3) % 7 < 3 {
                        *v = 0.0;
                    }
                }
            }
            let groups = RowGroups::from_dense(shape, &values, group, RowGroupValues::F32);
            let weight = Weight::RowGroups(groups.unwrap());
            model.weights.insert(name, std::sync::Arc::new(weight));
        }
        let image = model.family.image();
        let bytes: Vec<u8> = (0..3 * image).map(|i| (i * 31 % 256) as u8).collect();
        let plan = Plan::new(&model).unwrap();
        let got = plan.classify(&bytes).unwrap();
        let want: Vec<f64> = bytes.chunks(image).flat_map(|image| naive(&model, image)).collect();
        for (got, want) in got.iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 1e-4 * (1.0 + want.abs()), "{got} {want}");
        }
        let dense = Plan::with(&model.family, &|name| Ok(model.weights[name].to_f32())).unwrap();
        assert!(plan.bytes() < dense.bytes());
        // What enters each weight, in order, with its channels.
        let mut seen = Vec::new();
        dense
            .watch(&bytes[..image], &mut |name, rows, channels| {
                assert!(rows.len().is_multiple_of(channels));
                seen.push(name.to_owned());
            })
            .unwrap();
        let matrices = model.family.tensors().into_iter().filter(|(_, shape)| shape.len() == 2);
        assert_eq!(seen, matrices.map(|(name, _)| name).collect::<Vec<_>>());
    }
}

#[test]
fn sizes_are_those_of_the_papers() {
    let mobilenet = Config::from_hugging_face(&json!({
        "model_type": "mobilenet_v1", "image_size": 224, "num_channels": 3, "num_labels": 1000,
    }))
    .unwrap();
    let trained = mobilenet.tensors().into_iter().filter(|(name, _)| !name.contains("running"));
    let elements: usize = trained.map(|(_, shape)| shape.iter().product::<usize>()).sum();
    // MobileNet-v1 1.0: 4.2 million (4,231,976 with 1000 classes).
    assert_eq!(elements, 4_231_976);
    assert_eq!(mobilenet.images().last(), Some(&[7, 7]));
    let small = Config::from_hugging_face(&json!({ "model_type": "conv_net", "width": 0.5 }));
    let small = small.unwrap();
    let channels: Vec<usize> = small.layers.iter().map(|layer| layer.outputs()).collect();
    assert_eq!(channels, [16, 32, 64, 128]);
    assert_eq!(small.prunable().len(), 4);
}

#[test]
fn hostile_configurations_are_refused_by_key() {
    for (key, value) in [
        ("image_size", json!(0)),
        ("image_size", json!([3, 1e9])),
        ("num_channels", json!(1000)),
        ("num_labels", json!(-1)),
        ("channels", json!([])),
        ("channels", json!([0])),
        ("channels", json!("wide")),
        ("channels", json!(vec![65536; 256])),
        ("strides", json!([1])),
        ("strides", json!([0, 1, 1, 1])),
        ("width", json!(1e9)),
        ("hidden_act", json!("swish")),
        ("image_mean", json!([0.1, 0.2])),
        ("image_std", json!([0.0])),
        ("norm_momentum", json!(2)),
        ("layer_norm_eps", json!("x")),
        ("model_type", json!("resnet")),
    ] {
        let mut config = json!({ "model_type": "conv_net" });
        config[key] = value.clone();
        let found = Config::from_hugging_face(&config);
        match found {
            // So many wide layers are allowed as numbers; drawing them is not.
            Ok(family) => {
                assert_eq!(key, "channels");
                let error = random::model(config, &Stream::root(1)).err().expect("too large");
                assert_eq!(error.reason(), Reason::TooLarge, "{}", family.layers.len());
            }
            Err(error) => assert_eq!(error.reason(), Reason::UnsupportedModel, "{key} = {value}"),
        }
    }
}
