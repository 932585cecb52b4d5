use std::collections::BTreeMap;

use super::super::{Cache, Chunk, Decoder};
use super::*;
use crate::models::Model;
use crate::models::decoder::graph::Graph;
use crate::models::decoder::random;
use crate::nn::adapter::Weighted;
use crate::nn::dtype::Dtype;
use crate::nn::ops::{Network, Pool, Precision, Run, Sequences, Tape};
use crate::nn::weight::{Dense, Weight};

fn config(architecture: &str) -> Config {
    Config::from_hugging_face(&random::tiny(architecture)).unwrap()
}

fn tokens(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 37 + seed * 11 + i * i) % 96) as u32).collect()
}

/// Logits of all tokens of each text, all in one step.
fn run(decoder: &mut Decoder, texts: &[Vec<u32>], mixes: &[Mix]) -> Vec<Vec<f32>> {
    let mut caches: Vec<Cache> =
        texts.iter().map(|t| Cache::new(decoder.config(), t.len())).collect();
    let mut chunks: Vec<Chunk<'_>> = texts
        .iter()
        .zip(&mut caches)
        .map(|(tokens, cache)| Chunk { tokens, cache, logits: 0..tokens.len() })
        .collect();
    let mut logits = decoder.forward_with(&mut chunks, mixes).unwrap();
    let mut split = Vec::new();
    for text in texts {
        let (own, rest) = logits.split_at(text.len() * 96);
        split.push(own.to_vec());
        logits = rest;
    }
    split
}

/// `W + sum of weight * scale * B A` in f32.
fn merged(model: &Model, adapters: &[(&Adapter, f32)]) -> Model {
    let mut model = model.clone();
    for (adapter, by) in adapters {
        for (name, factors) in &adapter.linears {
            let mut dense = model.weights[name].to_f32();
            factors.add_to(*by, &mut dense);
            let weight = Dense::from_f32(factors.shape().into(), &dense, Dtype::F32).unwrap();
            model.weights.insert(name.clone(), Arc::new(Weight::Dense(weight)));
        }
    }
    model
}

#[track_caller]
fn close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < 1e-4, "{what}: {got} is not {want}");
    }
}

/// Two adapters: one on all linears, one of an odd rank on some linears of some layers.
fn two(config: &Config) -> [Arc<Adapter>; 2] {
    let some = |name: &str| {
        name.contains("layers.1.") || name.contains("v_proj") || name.contains("down_proj")
    };
    [
        random::adapter(config, 8, 0.3, 1, |_| true).unwrap(),
        random::adapter(config, 3, 0.5, 2, some).unwrap(),
    ]
    .map(Arc::new)
}

#[test]
fn one_addition_worked_out_by_hand() {
    // A picks channel 3, B writes channel 5 of q: y[5] += 3 * 0.5 * 2 * x[3].
    let config = config("llama");
    let (mut a, mut b) = (vec![0.0; 32], vec![0.0; 64]);
    (a[3], b[5]) = (1.0, 2.0);
    let factors = Arc::new(Factors::from_f32([64, 32], 1, &a, &b, 0.5).unwrap());
    let linears = [("model.layers.2.self_attn.q_proj.weight".to_owned(), factors)].into();
    let fitted = Arc::new(Fitted::new("d", &Adapter { linears }, &config).unwrap());
    let (three, none) = (Mix::new([(fitted.clone(), 3.0)]), Mix::default());
    let minus = Mix::new([(fitted, -1.0)]);

    let mut adapters = Adapters::default();
    let parts = [(&three, 0..1), (&none, 1..3), (&minus, 3..4), (&three, 4..6)];
    adapters.start(6, parts.into_iter());
    let x: Vec<f32> = (0..6 * 32).map(|i| i as f32).collect();
    let mut y = vec![1.0; 6 * 64];
    for layer in [0, 1, 2] {
        adapters.add(layer, Site::Q, &x, &mut y);
    }
    let mut k = vec![1.0; 6 * 32];
    adapters.add(2, Site::K, &x, &mut k);
    adapters.end();
    adapters.add(2, Site::Q, &x, &mut y);
    for row in 0..6 {
        let at = x[row * 32 + 3];
        let want = 1.0 + [3.0 * at, 0.0, 0.0, -at, 3.0 * at, 3.0 * at][row];
        for (channel, y) in y[row * 64..][..64].iter().enumerate() {
            assert_eq!(*y, if channel == 5 { want } else { 1.0 }, "row {row} channel {channel}");
        }
    }
    assert_eq!(k, vec![1.0; 6 * 32]);
}

#[test]
fn mixed_batches_equal_merged_weights() {
    for architecture in ["llama", "qwen2", "qwen3", "gemma3_text"] {
        let config = config(architecture);
        let model = random::model(random::tiny(architecture), 3).unwrap();
        let adapters = two(&config);
        let fitted = ["a", "b"]
            .map(|d| Arc::new(Fitted::new(d, &adapters[usize::from(d == "b")], &config).unwrap()));
        let [a, b] = &fitted;
        let choices: [&[(usize, f32)]; 5] =
            [&[], &[(0, 1.0)], &[(1, 1.0)], &[(0, 0.5), (1, -0.75)], &[(0, 2.0)]];
        let mut decoders: BTreeMap<usize, Decoder> = BTreeMap::new();
        let mut plain = Decoder::new(&model).unwrap();
        for batch in 1..=9 {
            let texts: Vec<Vec<u32>> = (0..batch).map(|i| tokens(1 + (i * 5) % 13, i)).collect();
            let picked: Vec<usize> = (0..batch).map(|i| (i + batch) % choices.len()).collect();
            let mixes: Vec<Mix> = picked
                .iter()
                .map(|c| {
                    let part = |(which, by): &(usize, f32)| {
                        (Arc::clone(if *which == 0 { a } else { b }), *by)
                    };
                    Mix::new(choices[*c].iter().map(part))
                })
                .collect();
            let got = run(&mut plain, &texts, &mixes);
            for (i, choice) in picked.iter().enumerate() {
                let decoder = decoders.entry(*choice).or_insert_with(|| {
                    let parts: Vec<_> =
                        choices[*choice].iter().map(|(w, by)| (&*adapters[*w], *by)).collect();
                    Decoder::new(&merged(&model, &parts)).unwrap()
                });
                let want = run(decoder, &texts[i..=i], &[]);
                close(&got[i], &want[0], &format!("{architecture}, {batch} sequences, {i}"));
                // Alone and among others.
                let alone = run(&mut plain, &texts[i..=i], &mixes[i..=i]);
                close(&got[i], &alone[0], architecture);
            }
        }
        // They do something.
        let text = [tokens(7, 0)];
        let with = run(&mut plain, &text, &[Mix::new([(a.clone(), 1.0)])]);
        let without = run(&mut plain, &text, &[]);
        assert!(with[0].iter().zip(&without[0]).any(|(x, y)| (x - y).abs() > 0.05));
    }
}

#[test]
fn the_graph_equals_the_plan() {
    for architecture in ["llama", "qwen2", "gemma3_text"] {
        let config = config(architecture);
        let model = random::model(random::tiny(architecture), 5).unwrap();
        let [a, b] = two(&config);
        let fitted =
            |d: &str, adapter: &Adapter| Arc::new(Fitted::new(d, adapter, &config).unwrap());
        let mix = Mix::new([(fitted("a", &a), 0.5), (fitted("b", &b), 1.5)]);
        let text = tokens(11, 4);
        let got = run(&mut Decoder::new(&model).unwrap(), std::slice::from_ref(&text), &[mix]);

        let graph = Graph::new(&model, Precision::F32).unwrap();
        let (tape, sequences) = (Tape::forgetful(&Pool::default()), Sequences::of([11]));
        let tuning = Weighted(vec![(a, 0.5), (b, 1.5)]);
        let run = Run {
            tape: &tape,
            tuning: &tuning,
            sequences: &sequences,
            training: false,
            read: true,
        };
        let hidden = graph.through(&run, graph.start(&run, &text).unwrap()).unwrap();
        let want = graph.logits(&run, &graph.normed(&run, &hidden).unwrap()).unwrap();
        close(&got[0], &want.read(), architecture);
    }
}

#[test]
fn long_prompts_beside_decoding_rows() {
    // More rows than a step holds, cut in the middle of sequences.
    let config = config("llama");
    let mut settings = random::tiny("llama");
    settings["max_position_embeddings"] = 1024.into();
    let model = random::model(settings, 6).unwrap();
    let [a, b] = two(&config);
    let fitted = |d: &str, adapter: &Adapter| Arc::new(Fitted::new(d, adapter, &config).unwrap());
    let mixes =
        [Mix::new([(fitted("a", &a), 1.0)]), Mix::default(), Mix::new([(fitted("b", &b), 1.0)])];
    let texts = [tokens(301, 1), tokens(1, 2), tokens(299, 3)];
    let mut decoder = Decoder::new(&model).unwrap();
    let got = run(&mut decoder, &texts, &mixes);
    for (i, got) in got.iter().enumerate() {
        let alone = run(&mut decoder, &texts[i..=i], &mixes[i..=i]);
        close(got, &alone[0], "long");
    }
}

#[test]
fn weights_scale_linearly() {
    let config = config("llama");
    let adapter = random::adapter(&config, 5, 1.0, 7, |_| true).unwrap();
    let fitted = Arc::new(Fitted::new("d", &adapter, &config).unwrap());
    let x: Vec<f32> = (0..3 * 32).map(|i| (i % 9) as f32 - 4.0).collect();
    let added = |by: f32| {
        let mix = Mix::new([(fitted.clone(), by)]);
        let mut adapters = Adapters::default();
        adapters.start(3, [(&mix, 0..3)].into_iter());
        let mut y = vec![0.0; 3 * 80];
        adapters.add(1, Site::Gate, &x, &mut y);
        y
    };
    let one = added(1.0);
    assert!(one.iter().any(|v| v.abs() > 0.5));
    // Powers of two change no digit.
    for by in [0.0, 0.25, -2.0, 8.0] {
        let want: Vec<f32> = one.iter().map(|v| v * by).collect();
        assert_eq!(added(by), want, "{by}");
    }
}

#[test]
fn namespaces_stand_for_sets_and_weights() {
    let config = config("llama");
    let adapter = random::adapter(&config, 2, 1.0, 7, |_| true).unwrap();
    let fitted = |d: &str| Arc::new(Fitted::new(d, &adapter, &config).unwrap());
    let (a, b) = (fitted("a"), fitted("b"));
    let space = |parts: &[(&Arc<Fitted>, f32)]| {
        Mix::new(parts.iter().map(|(a, w)| (Arc::clone(a), *w))).namespace()
    };
    assert_eq!(space(&[]), 0);
    assert_eq!(space(&[(&a, 0.0)]), 0);
    assert_eq!(space(&[(&a, 1.0), (&b, 0.5)]), space(&[(&b, 0.5), (&a, 1.0)]));
    assert_eq!(space(&[(&a, 1.0), (&b, 0.0)]), space(&[(&fitted("a"), 1.0)]));
    let spaces = [
        space(&[]),
        space(&[(&a, 1.0)]),
        space(&[(&b, 1.0)]),
        space(&[(&a, 0.5)]),
        space(&[(&a, 1.0), (&b, 1.0)]),
        space(&[(&a, 1.0), (&b, 0.5)]),
        space(&[(&a, 0.5), (&b, 1.0)]),
    ];
    let distinct: std::collections::BTreeSet<_> = spaces.into_iter().collect();
    assert_eq!(distinct.len(), spaces.len());
}

#[test]
fn adapters_of_other_shapes_are_refused() {
    let config = config("llama");
    let on = |name: &str, shape: [usize; 2]| {
        let (a, b) = (vec![1.0; shape[1]], vec![1.0; shape[0]]);
        let factors = Arc::new(Factors::from_f32(shape, 1, &a, &b, 1.0).unwrap());
        let linears = [(name.to_owned(), factors)].into();
        Fitted::new("d", &Adapter { linears }, &config)
    };
    on("model.layers.0.self_attn.k_proj.weight", [32, 32]).unwrap();
    for (name, shape) in [
        ("model.layers.0.self_attn.k_proj.weight", [64, 32]),
        ("model.layers.0.self_attn.k_proj.weight", [32, 64]),
        ("model.layers.3.self_attn.k_proj.weight", [32, 32]),
        ("model.layers.00.self_attn.k_proj.weight", [32, 32]),
        ("model.layers.0.self_attn.k_proj", [32, 32]),
        ("lm_head.weight", [96, 32]),
        ("model.embed_tokens.weight", [96, 32]),
        ("", [1, 1]),
    ] {
        let error = on(name, shape).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable, "{name} {shape:?}");
    }
    assert!(Fitted::new("d", &Adapter::default(), &config).is_err());

    // Fitted to one model and asked of another: nothing happens.
    let fitted = on("model.layers.0.self_attn.k_proj.weight", [32, 32]).unwrap();
    let mix = Mix::new([(Arc::new(fitted), 1.0)]);
    let mut settings = random::tiny("llama");
    settings["num_hidden_layers"] = 2.into();
    let mut decoder = Decoder::new(&random::model(settings, 1).unwrap()).unwrap();
    let mut cache = Cache::new(decoder.config(), 4);
    let mut chunks = [Chunk { tokens: &[1], cache: &mut cache, logits: 0..1 }];
    let error = decoder.forward_with(&mut chunks, &[mix]).unwrap_err();
    assert_eq!((error.reason(), cache.len()), (Reason::ModelUnsuitable, 0));
}
