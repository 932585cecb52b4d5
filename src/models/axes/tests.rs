//! What is permuted computes what it did.

use serde_json::json;

use super::*;
use crate::models::decoder::plan::{Cache, Chunk, Decoder};
use crate::models::vision::plan::Plan;
use crate::models::{decoder, vision};
use crate::seed::Stream;

fn noise(n: usize, by: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * by + by).sin()).collect()
}

fn put(weights: &mut Weights, name: &str, shape: &[usize], values: &[f32]) {
    let dense = Dense::from_f32(shape.to_vec(), values, Dtype::F32).unwrap();
    weights.insert(name.to_owned(), Arc::new(Weight::Dense(dense)));
}

/// `y = W x`, of one row.
fn product(weights: &Weights, name: &str, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; weights[name].rows()];
    weights[name].multiply(x, &mut y);
    y
}

fn assert_close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-5 * (1.0 + want.abs()), "{got} is not {want}");
    }
}

/// Reorders every set that may be, and says how many there were and stayed.
fn rearrange(graph: &Graph, weights: &mut Weights) -> (usize, usize) {
    let sets = graph.sets();
    let (mut moved, mut stayed) = (0, 0);
    for set in &sets {
        if set.fixed.is_some() || set.makers.is_empty() {
            stayed += 1;
            continue;
        }
        let order = set.order(weights).unwrap();
        assert!(order.windows(2).any(|pair| pair[0] > pair[1]), "an order that changes nothing");
        set.apply(&order, weights).unwrap();
        // What is in order stays.
        let again: Vec<usize> = (0..set.channels).collect();
        assert_eq!(set.order(weights).unwrap(), again);
        moved += 1;
    }
    (moved, stayed)
}

#[test]
fn orders_and_permutations_by_hand() {
    let mut weights = Weights::new();
    put(&mut weights, "a", &[3, 2], &[1.0, -1.0, 3.0, 0.0, -1.0, 1.0]);
    put(&mut weights, "b", &[3], &[10.0, 20.0, 30.0]);
    // Two taps of three channels.
    put(&mut weights, "c", &[1, 6], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let mut graph = Graph::default();
    let a = graph.maker(Axis::rows("a", 3));
    let b = graph.other(Axis::rows("b", 3));
    let c = graph.other(Axis::columns("c", 3).at(vec![0, 3]));
    graph.tie_all(a, [b, c]).unwrap();
    let sets = graph.sets();
    assert_eq!((sets.len(), sets[0].others.len()), (1, 2));
    // Sums 2, 3, 2: equal ones by index.
    let order = sets[0].order(&weights).unwrap();
    assert_eq!(order, [1, 0, 2]);
    sets[0].apply(&order, &mut weights).unwrap();
    assert_eq!(weights["a"].to_f32(), [3.0, 0.0, 1.0, -1.0, -1.0, 1.0]);
    assert_eq!(weights["b"].to_f32(), [20.0, 10.0, 30.0]);
    assert_eq!(weights["c"].to_f32(), [2.0, 1.0, 3.0, 5.0, 4.0, 6.0]);
    for bad in [&[0, 1][..], &[0, 0, 1], &[0, 1, 3]] {
        assert!(sets[0].apply(bad, &mut weights).is_err());
    }
    let short = graph.other(Axis::rows("b", 2));
    assert_eq!(graph.tie(a, short).unwrap_err().reason(), Reason::Internal);
    let beyond = Set { makers: vec![Axis::rows("b", 4)], channels: 4, ..sets[0].clone() };
    assert_eq!(beyond.order(&weights).unwrap_err().reason(), Reason::UnsupportedModel);
    let gone = Set { makers: vec![Axis::rows("d", 3)], ..sets[0].clone() };
    assert_eq!(gone.order(&weights).unwrap_err().reason(), Reason::TensorNotFound);
}

#[test]
fn formats_stay_where_they_are_dense() {
    let mut weights = Weights::new();
    let dense = Dense::from_f32(vec![2, 2], &[1.0, 0.5, 4.0, 0.25], Dtype::BF16).unwrap();
    weights.insert("a".into(), Arc::new(Weight::Dense(dense)));
    let mut graph = Graph::default();
    graph.maker(Axis::rows("a", 2));
    graph.sets()[0].apply(&[1, 0], &mut weights).unwrap();
    assert_eq!(weights["a"].to_f32(), [4.0, 0.25, 1.0, 0.5]);
    assert_eq!(weights["a"].bytes(), 8);
}

#[test]
fn a_network_of_two_layers_computes_the_same() {
    let mut weights = Weights::new();
    put(&mut weights, "up", &[24, 10], &noise(240, 0.7));
    put(&mut weights, "bias", &[24], &noise(24, 0.3));
    put(&mut weights, "down", &[5, 24], &noise(120, 1.1));
    let forward = |weights: &Weights| {
        let mut h = product(weights, "up", &noise(10, 0.9));
        h.iter_mut().zip(weights["bias"].to_f32()).for_each(|(h, b)| *h = (*h + b).max(0.0));
        product(weights, "down", &h)
    };
    let want = forward(&weights);
    let mut graph = Graph::default();
    let up = graph.maker(Axis::rows("up", 24));
    let rest = [Axis::rows("bias", 24), Axis::columns("down", 24)].map(|axis| graph.other(axis));
    graph.tie_all(up, rest).unwrap();
    let before = weights["up"].to_f32();
    assert_eq!(rearrange(&graph, &mut weights), (1, 0));
    assert_ne!(weights["up"].to_f32(), before);
    assert_close(&forward(&weights), &want);
}

#[test]
fn branches_that_are_added_share_an_order() {
    // x -> a; r = a + relu(c relu(b a)); y = d r: rows of a and c, columns of b and d are one set.
    let mut weights = Weights::new();
    put(&mut weights, "a", &[12, 6], &noise(72, 0.7));
    put(&mut weights, "b", &[16, 12], &noise(192, 1.3));
    put(&mut weights, "c", &[12, 16], &noise(192, 0.4));
    put(&mut weights, "d", &[3, 12], &noise(36, 2.3));
    let forward = |weights: &Weights| {
        let relu = |x: Vec<f32>| x.into_iter().map(|v| v.max(0.0)).collect::<Vec<_>>();
        let a = product(weights, "a", &noise(6, 0.9));
        let c = relu(product(weights, "c", &relu(product(weights, "b", &a))));
        let sum: Vec<f32> = a.iter().zip(&c).map(|(a, c)| a + c).collect();
        product(weights, "d", &sum)
    };
    let want = forward(&weights);
    let mut graph = Graph::default();
    let a = graph.maker(Axis::rows("a", 12));
    let reads_b = graph.other(Axis::columns("b", 12));
    let b = graph.maker(Axis::rows("b", 16));
    let reads_c = graph.other(Axis::columns("c", 16));
    let c = graph.maker(Axis::rows("c", 12));
    let d = graph.other(Axis::columns("d", 12));
    graph.tie(a, reads_b).unwrap();
    graph.tie(b, reads_c).unwrap();
    graph.tie(c, d).unwrap();
    // The residual ties what was two sets.
    assert_eq!(graph.sets().len(), 3);
    graph.tie(a, c).unwrap();
    let sets = graph.sets();
    assert_eq!(sets.len(), 2);
    assert_eq!((sets[0].makers.len(), sets[0].others.len()), (2, 2));
    let sums = |name: &str| -> Vec<f32> {
        let cols = weights[name].cols();
        weights[name].to_f32().chunks(cols).map(|r| r.iter().map(|v| v.abs()).sum()).collect()
    };
    let both: Vec<f32> = sums("a").iter().zip(sums("c")).map(|(a, c)| a + c).collect();
    let order = sets[0].order(&weights).unwrap();
    assert!(order.windows(2).all(|pair| both[pair[0]] >= both[pair[1]]));
    assert_eq!(rearrange(&graph, &mut weights), (2, 0));
    assert_close(&forward(&weights), &want);
    // A set that is fixed in one place is fixed.
    graph.fix(d, "someone else reads it");
    assert_eq!(graph.sets()[0].fixed.as_deref(), Some("someone else reads it"));
}

#[test]
fn image_classifiers_compute_the_same() {
    for config in [
        json!({ "model_type": "conv_net", "image_size": [9, 7], "num_channels": 2, "num_labels": 3,
                "channels": [5, 17, 12], "strides": [1, 2, 1] }),
        json!({ "model_type": "mobilenet_v1", "image_size": 12, "num_channels": 3, "num_labels": 4,
                "depth_multiplier": 0.1, "min_depth": 6, "first_stride": 1 }),
    ] {
        let mut model = vision::random::model(config, &Stream::root(5)).unwrap();
        for (name, weight) in &mut model.weights {
            if weight.shape().len() == 1 {
                let more = noise(weight.shape()[0], 0.37 + name.len() as f32 / 10.0);
                let old = weight.to_f32();
                let values: Vec<f32> = old.iter().zip(more).map(|(v, n)| v + 0.4 * n).collect();
                let dense = Dense::from_f32(weight.shape().to_vec(), &values, Dtype::F32).unwrap();
                *weight = Arc::new(Weight::Dense(dense));
            }
        }
        let layers = model.family.layers.len();
        let bytes: Vec<u8> = (0..2 * model.family.image()).map(|i| (i * 31 % 256) as u8).collect();
        let want = Plan::new(&model).unwrap().classify(&bytes).unwrap();
        let graph = families::vision(&model.family).unwrap();
        // Images and classes stay.
        assert_eq!(rearrange(&graph, &mut model.weights), (layers, 2));
        let got = Plan::new(&model).unwrap().classify(&bytes).unwrap();
        assert_close(&got, &want);
        // Statistics and depthwise filters moved with the rest: without one of them it is another network.
        let place = "layers.1.norm.running_mean";
        let place = if model.weights.contains_key(place) {
            place
        } else {
            "layers.1.depthwise_norm.running_mean"
        };
        let mut values = model.weights[place].to_f32();
        values.reverse();
        let dense = Dense::from_f32(vec![values.len()], &values, Dtype::F32).unwrap();
        model.weights.insert(place.into(), Arc::new(Weight::Dense(dense)));
        assert_ne!(Plan::new(&model).unwrap().classify(&bytes).unwrap(), got);
    }
}

#[test]
fn decoders_with_grouped_queries_compute_the_same() {
    for architecture in ["llama", "qwen2", "qwen3", "gemma3_text"] {
        let mut model = decoder::random::model(decoder::random::tiny(architecture), 5).unwrap();
        let config = model.decoder().unwrap().clone();
        assert!(config.heads > config.kv_heads && config.kv_heads > 1);
        let logits = |model: &crate::models::Model| {
            let ids: Vec<u32> = (0..24).map(|i| (i * 29 + 7) % 96).collect();
            let mut decoder = Decoder::new(model).unwrap();
            let mut cache = Cache::new(decoder.config(), ids.len());
            let mut chunks = [Chunk { tokens: &ids, cache: &mut cache, logits: 0..ids.len() }];
            decoder.forward(&mut chunks).unwrap().to_vec()
        };
        let want = logits(&model);
        let graph = families::decoder(&config).unwrap();
        let layers = config.layers.len();
        // Each block has a feed-forward network and heads of values; queries, keys and the stream stay.
        let moved = rearrange(&graph, &mut model.weights);
        assert_eq!(moved, (layers * (1 + config.kv_heads), 2 * layers + 1));
        assert_close(&logits(&model), &want);
        let stream = graph.sets().into_iter().find(|set| set.makers.len() == 2 * layers).unwrap();
        assert!(stream.fixed.unwrap().contains("residual"));
    }
}

#[test]
fn sets_together_are_one_after_the_other() {
    let mut model = decoder::random::model(decoder::random::tiny("llama"), 5).unwrap();
    let graph = families::decoder(&model.decoder().unwrap().clone()).unwrap();
    // One number format of 16 bits, which values must come back to.
    let name = "model.layers.0.self_attn.o_proj.weight";
    let weight = &model.weights[name];
    let half = Dense::from_f32(weight.shape().to_vec(), &weight.to_f32(), Dtype::BF16).unwrap();
    model.weights.insert(name.to_owned(), Arc::new(Weight::Dense(half)));
    let sets = graph.sets();
    let free: Vec<&Set> =
        sets.iter().filter(|set| set.fixed.is_none() && !set.makers.is_empty()).collect();
    let (mut single, mut seen) = (model.weights.clone(), Vec::new());
    for set in &free {
        let order = set.order(&single).unwrap();
        set.apply(&order, &mut single).unwrap();
    }
    let mut together = model.weights.clone();
    reorder(&free, &mut together, |i| {
        seen.push(i);
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, (0..free.len()).collect::<Vec<_>>());
    for (name, weight) in &together {
        assert_eq!(weight.to_f32(), single[name].to_f32(), "{name}");
        assert_eq!(weight.bytes(), single[name].bytes(), "{name}");
    }
    assert_ne!(together[name].to_f32(), model.weights[name].to_f32());
    assert_eq!(together[name].bytes(), 2 * (weight_elements(&together[name])));
}

fn weight_elements(weight: &Weight) -> u64 {
    weight.shape().iter().product::<usize>() as u64
}
