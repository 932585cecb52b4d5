use serde_json::json;

use super::super::{random, reference};
use super::*;

const ARCHITECTURES: [&str; 5] = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"];

/// Some tokens below the tiny vocabulary.
fn tokens(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 37 + seed * 11 + i * i) % 96) as u32).collect()
}

fn assert_close(got: &[f32], want: impl IntoIterator<Item = f64>, what: &str) {
    let want: Vec<f64> = want.into_iter().collect();
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*got) - want).abs() < 1e-4, "{what}: {got} is not {want} at {i}");
    }
}

fn floats(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// All logits of one sequence, run at once.
fn whole(decoder: &mut Decoder, tokens: &[u32]) -> Vec<f32> {
    let mut cache = Cache::new(decoder.config(), tokens.len());
    let logits = 0..tokens.len();
    decoder.forward(&mut [Chunk { tokens, cache: &mut cache, logits }]).unwrap().to_vec()
}

#[test]
fn equals_the_naive_reference() {
    for architecture in ARCHITECTURES {
        for tied in [true, false] {
            let mut config = random::tiny(architecture);
            config["tie_word_embeddings"] = json!(tied);
            let model = random::model(config, 3).unwrap();
            let tokens = tokens(23, 1);
            let got = whole(&mut Decoder::new(&model).unwrap(), &tokens);
            let want = reference::logits(&model, &tokens).concat();
            assert_close(&got, want, architecture);
        }
    }
}

#[test]
fn llama_biases_and_odd_shapes() {
    // Head width no multiple of a vector, one key head, biases everywhere.
    let mut config = random::tiny("llama");
    for (key, value) in [
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("head_dim", json!(10)),
        ("num_attention_heads", json!(3)),
        ("num_key_value_heads", json!(1)),
        ("intermediate_size", json!(37)),
    ] {
        config[key] = value;
    }
    let model = random::model(config, 5).unwrap();
    let tokens = tokens(9, 2);
    let got = whole(&mut Decoder::new(&model).unwrap(), &tokens);
    assert_close(&got, reference::logits(&model, &tokens).concat(), "llama with biases");
}

#[test]
fn blocks_of_different_widths() {
    for architecture in ARCHITECTURES {
        let mut config = random::tiny(architecture);
        let layers = config["num_hidden_layers"].as_u64().unwrap();
        let widths: Vec<u64> = (0..layers).map(|layer| 16 + 24 * ((layer + 1) % 3)).collect();
        config["intermediate_size"] = json!(widths);
        config["mlp_bias"] = json!(true);
        let model = random::model(config, 6).unwrap();
        let tokens = tokens(11, 4);
        let got = whole(&mut Decoder::new(&model).unwrap(), &tokens);
        assert_close(&got, reference::logits(&model, &tokens).concat(), architecture);
    }
}

#[test]
fn pieces_equal_the_whole() {
    for architecture in ARCHITECTURES {
        let model = random::model(random::tiny(architecture), 7).unwrap();
        let mut decoder = Decoder::new(&model).unwrap();
        let tokens = tokens(60, 3);
        let want = whole(&mut decoder, &tokens);
        for format in [CacheFormat::F32, CacheFormat::F16, CacheFormat::Q8] {
            let mut cache = Cache::with_format(decoder.config(), 64, format);
            let mut got = Vec::new();
            for range in [0..1, 1..30, 30..31, 31..33, 33..60] {
                let (tokens, logits) = (&tokens[range.clone()], 0..range.len());
                let mut chunks = [Chunk { tokens, cache: &mut cache, logits }];
                got.extend_from_slice(decoder.forward(&mut chunks).unwrap());
            }
            assert_eq!(cache.len(), 60);
            match format {
                CacheFormat::F32 => assert_close(&got, floats(&want), architecture),
                // f16 keeps eleven bits.
                CacheFormat::F16 => assert!(largest(&got, &want) < 0.02, "{architecture}"),
                // 8 bits keep a 254th of the largest element; logits here reach about 5.
                CacheFormat::Q8 => {
                    assert!(largest(&got, &want) < 0.25, "{architecture}: {}", largest(&got, &want))
                }
            }
        }
    }
}

/// The largest difference.
fn largest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn windows_and_long_inputs() {
    // More tokens than a step, many windows of the local layers.
    for architecture in ["mistral", "gemma3_text"] {
        let mut config = random::tiny(architecture);
        config["num_hidden_layers"] = json!(2);
        let model = random::model(config, 8).unwrap();
        let mut decoder = Decoder::new(&model).unwrap();
        let tokens = tokens(1100, 4);
        let mut cache = Cache::new(decoder.config(), 1200);
        let mut chunk = [Chunk { tokens: &tokens, cache: &mut cache, logits: 1095..1100 }];
        let got = decoder.forward(&mut chunk).unwrap().to_vec();
        let want = reference::logits(&model, &tokens);
        assert_close(&got, want[1095..].concat(), architecture);

        // Nothing is forgotten: one can go back by a step or almost to the beginning.
        for back in [1099, 100] {
            assert_eq!(cache.truncate(back), back);
            let mut chunk =
                [Chunk { tokens: &tokens[back..=back], cache: &mut cache, logits: 0..1 }];
            let again = decoder.forward(&mut chunk).unwrap();
            assert_close(again, want[back].clone(), architecture);
        }
        assert_eq!(cache.truncate(5000), 101);
    }
}

#[test]
fn batches_equal_single_sequences() {
    for architecture in ARCHITECTURES {
        let model = random::model(random::tiny(architecture), 9).unwrap();
        let mut decoder = Decoder::new(&model).unwrap();
        let texts: Vec<Vec<u32>> = [1, 17, 0, 5, 40].map(|n| tokens(n, n)).to_vec();
        let want: Vec<f32> = texts.iter().flat_map(|t| whole(&mut decoder, t)).collect();
        let mut caches: Vec<Cache> =
            texts.iter().map(|t| Cache::new(decoder.config(), t.len())).collect();
        let mut chunks: Vec<Chunk<'_>> = texts
            .iter()
            .zip(&mut caches)
            .map(|(tokens, cache)| Chunk { tokens, cache, logits: 0..tokens.len() })
            .collect();
        let got = decoder.forward(&mut chunks).unwrap();
        assert_close(got, floats(&want), architecture);
    }
}

/// Runs tokens behind what a cache holds; all their logits.
fn run(decoder: &mut Decoder, tokens: &[u32], cache: &mut Cache) -> Vec<f32> {
    let mut chunks = [Chunk { tokens, cache, logits: 0..tokens.len() }];
    decoder.forward(&mut chunks).unwrap().to_vec()
}

#[test]
fn batches_of_any_size_decode_as_if_alone() {
    for architecture in ["llama", "gemma3_text"] {
        let model = random::model(random::tiny(architecture), 12).unwrap();
        let mut decoder = Decoder::new(&model).unwrap();
        for batch in 1..=9 {
            // Prompts that end before, at and behind the ends of pages.
            let lengths = (0..batch).map(|i| [1, 63, 64, 65, 130, 7, 127, 128, 33][i]);
            let texts: Vec<Vec<u32>> = lengths.map(|n| tokens(n + 3, n)).collect();
            let mut caches: Vec<Cache> =
                texts.iter().map(|t| Cache::new(decoder.config(), t.len())).collect();
            for (text, cache) in texts.iter().zip(&mut caches) {
                run(&mut decoder, &text[..text.len() - 3], cache);
            }
            for step in 0..3 {
                let mut chunks: Vec<Chunk<'_>> = texts
                    .iter()
                    .zip(&mut caches)
                    .map(|(text, cache)| {
                        let at = text.len() - 3 + step;
                        Chunk { tokens: &text[at..=at], cache, logits: 0..1 }
                    })
                    .collect();
                let got = decoder.forward(&mut chunks).unwrap().to_vec();
                for (text, got) in texts.iter().zip(got.chunks(96)) {
                    let upto = &text[..text.len() - 2 + step];
                    let want = whole(&mut decoder, upto);
                    assert_close(got, floats(&want[want.len() - 96..]), architecture);
                }
            }
        }
    }
}

#[test]
fn attached_pages_give_the_same_logits_to_the_bit() {
    for architecture in ARCHITECTURES {
        let model = random::model(random::tiny(architecture), 13).unwrap();
        let mut decoder = Decoder::new(&model).unwrap();
        let text = tokens(150, 5);
        let mut first = Cache::new(decoder.config(), 150);
        run(&mut decoder, &text[..128], &mut first);
        let want = run(&mut decoder, &text[128..], &mut first);
        let mut second = Cache::in_pool(first.pool(), 150);
        second.attach(first.pages()[..2].iter().cloned());
        assert_eq!((second.len(), first.pool().live()), (128, 3));
        let got = run(&mut decoder, &text[128..], &mut second);
        assert_eq!(got, want, "{architecture}");
        assert_eq!(first.pool().live(), 4);
    }
}

#[test]
fn a_shared_page_is_copied_before_it_is_written() {
    let model = random::model(random::tiny("gemma3_text"), 14).unwrap();
    let mut decoder = Decoder::new(&model).unwrap();
    for format in [CacheFormat::F32, CacheFormat::F16, CacheFormat::Q8] {
        let text = tokens(100, 7);
        let mut undisturbed = Cache::with_format(decoder.config(), 100, format);
        run(&mut decoder, &text[..64], &mut undisturbed);
        let want = run(&mut decoder, &text[64..], &mut undisturbed);

        let mut first = Cache::with_format(decoder.config(), 100, format);
        run(&mut decoder, &text[..64], &mut first);
        let mut second = Cache::in_pool(first.pool(), 100);
        second.attach(first.pages().iter().cloned());
        assert_eq!(second.truncate(40), 40);
        assert_eq!((second.missing_pages(1), second.missing_pages(30)), (1, 2));
        run(&mut decoder, &tokens(30, 50), &mut second);
        // The other still reads what it wrote.
        assert_eq!(run(&mut decoder, &text[64..], &mut first), want, "{format:?}");
        // And the copy kept the first 40 positions.
        let mut alone = Cache::with_format(decoder.config(), 100, format);
        run(&mut decoder, &text[..40], &mut alone);
        run(&mut decoder, &tokens(30, 50), &mut alone);
        let (a, b) = (run(&mut decoder, &[5], &mut second), run(&mut decoder, &[5], &mut alone));
        // Computed in pieces of other sizes, an element may fall to the other side of a rounding.
        let bound = if format == CacheFormat::F32 { 1e-4 } else { 1e-2 };
        assert!(largest(&a, &b) < bound, "{format:?}");
    }
}

#[test]
fn a_pool_keeps_to_its_budget_and_gets_its_pages_back() {
    let model = random::model(random::tiny("llama"), 15).unwrap();
    let mut decoder = Decoder::new(&model).unwrap();
    let config = decoder.config().clone();
    // 3 layers, keys and values, 2 heads of 16 channels, 64 positions.
    let each = 3 * 2 * 2 * 16 * PAGE;
    for (format, bytes) in [
        (CacheFormat::F32, 4 * each),
        (CacheFormat::F16, 2 * each),
        (CacheFormat::Q8, each + 4 * each / 16),
    ] {
        let pool = PagePool::new(&config, format, 3 * bytes as u64 - 1);
        assert_eq!((pool.budget(), pool.page_bytes()), (2, bytes));
        assert_eq!(Cache::bytes_for(&config, 65, format), 2 * bytes);
        let mut a = Cache::in_pool(&pool, 200);
        let mut b = Cache::in_pool(&pool, 200);
        run(&mut decoder, &tokens(65, 1), &mut a);
        let text = tokens(10, 1);
        let mut chunks = [Chunk { tokens: &text, cache: &mut b, logits: 0..0 }];
        let error = decoder.forward(&mut chunks).unwrap_err();
        assert_eq!((error.reason(), b.len(), pool.live()), (Reason::LimitReached, 0, 2));
        // What is let go can be taken again.
        assert_eq!((a.truncate(64), pool.live()), (64, 1));
        run(&mut decoder, &text, &mut b);
        drop((a, b));
        assert_eq!(pool.live(), 0);
    }
}

#[test]
fn only_wanted_logits_come_back() {
    let model = random::model(random::tiny("qwen3"), 1).unwrap();
    let mut decoder = Decoder::new(&model).unwrap();
    let tokens = tokens(12, 1);
    let want = whole(&mut decoder, &tokens);
    let mut caches = [(); 3].map(|()| Cache::new(decoder.config(), 12));
    let [a, b, c] = &mut caches;
    let mut chunks = [
        Chunk { tokens: &tokens, cache: a, logits: 3..5 },
        Chunk { tokens: &tokens, cache: b, logits: 7..7 },
        Chunk { tokens: &tokens, cache: c, logits: 11..12 },
    ];
    let got = decoder.forward(&mut chunks).unwrap();
    let want = [&want[3 * 96..5 * 96], &want[11 * 96..]].concat();
    assert_close(got, floats(&want), "wanted rows");
}

#[test]
fn truncated_caches_continue() {
    for architecture in ARCHITECTURES {
        let model = random::model(random::tiny(architecture), 2).unwrap();
        let mut decoder = Decoder::new(&model).unwrap();
        let tokens = tokens(20, 6);
        let want = whole(&mut decoder, &tokens);
        let mut cache = Cache::new(decoder.config(), 20);
        let other = [&tokens[..12], &[1, 2, 3, 4]].concat();
        let mut run = |tokens: &[u32], cache: &mut Cache| {
            let mut chunks = [Chunk { tokens, cache, logits: 0..tokens.len() }];
            decoder.forward(&mut chunks).unwrap().to_vec()
        };
        run(&other, &mut cache);
        assert_eq!(cache.truncate(12), 12);
        let got = run(&tokens[12..], &mut cache);
        assert_close(&got, floats(&want[12 * 96..]), architecture);
    }
}

#[test]
fn walking_the_blocks_equals_the_decoder() {
    for architecture in ARCHITECTURES {
        let model = random::model(random::tiny(architecture), 4).unwrap();
        let mut decoder = Decoder::new(&model).unwrap();
        let config = decoder.config().clone();
        let texts = [tokens(24, 1), tokens(24, 2)];
        let want: Vec<f32> = texts.iter().flat_map(|t| whole(&mut decoder, t)).collect();

        let mut hidden = vec![0.0; 48 * config.hidden];
        embed(&config, &model.weights[EMBEDDING], &texts.concat(), &mut hidden);
        for layer in 0..config.layers.len() {
            let block = Block::new(&config, &model.weights, layer).unwrap();
            let mut seen = Vec::new();
            let mut tap = |group: usize, rows: &[f32]| seen.push((group, rows.len()));
            block.forward(&mut hidden, 24, Some(&mut tap));
            let widths =
                [config.hidden, config.query_channels(), config.hidden, config.intermediate];
            assert_eq!(seen, [0, 1, 2, 3].map(|g| (g, 48 * widths[g])));
        }
        let mut logits = vec![0.0; want.len()];
        Head::new(&config, &model.weights).unwrap().finish(&mut hidden, &mut logits);
        assert_close(&logits, floats(&want), architecture);
    }
}

#[test]
fn weights_of_low_rank_and_with_corrections() {
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Factored, Ggml, GgmlType, Sum};

    let mut config = random::tiny("llama");
    config["intermediate_size"] = json!(96);
    let mut model = random::model(config, 6).unwrap();
    let projections = model.weights.iter_mut().filter(|(name, _)| name.contains("_proj."));
    for (i, (_, weight)) in projections.enumerate() {
        let &[rows, cols] = weight.shape() else { panic!("not a matrix") };
        let values = weight.to_f32();
        let low = |by: f32| {
            let left: Vec<f32> = values[..3 * rows].iter().map(|v| v * by).collect();
            Factored::from_f32([rows, cols], 3, &left, &values[..3 * cols], Dtype::F32).unwrap()
        };
        let blocks = Ggml::quantize([rows, cols], GgmlType::Q8_0, &values).unwrap();
        *weight = Arc::new(match i % 3 {
            0 => Weight::Factored(low(3.0)),
            1 => Weight::Sum(Sum::new(Weight::Ggml(blocks), low(0.5)).unwrap()),
            _ => Weight::Sum(Sum::new((**weight).clone(), low(0.5)).unwrap()),
        });
    }
    let tokens = tokens(21, 3);
    let want = reference::logits(&model, &tokens).concat();
    let exact = whole(&mut Decoder::new(&model).unwrap(), &tokens);
    assert_close(&exact, want, "low rank");
    let mut packed = Decoder::with(&model, Arithmetic::Integer).unwrap();
    let rounded = whole(&mut packed, &tokens);
    let off = largest(&exact, &rounded);
    let size = exact.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    // Activations of a third of the products are rounded to 8 bits: something moves, and little.
    assert!(off > 0.0 && off < 0.05 * size, "{off} of {size}");
    assert!(packed.weight_bytes() > 0);
}

#[test]
fn a_step_of_decoding_allocates_nothing() {
    use crate::kernels::{allocations, threads};
    use crate::nn::weight::{Ggml, GgmlType};

    for (architecture, packed) in
        ARCHITECTURES.into_iter().zip([false; 5]).chain([("llama", true), ("gemma3_text", true)])
    {
        let mut config = random::tiny(architecture);
        config["intermediate_size"] = json!(96);
        let mut model = random::model(config, 4).unwrap();
        if packed {
            for (name, weight) in &mut model.weights {
                if let (&[rows, cols], true) = (weight.shape(), name.contains("_proj.")) {
                    let blocks = Ggml::quantize([rows, cols], GgmlType::Q4_1, &weight.to_f32());
                    *weight = Arc::new(Weight::Ggml(blocks.unwrap()));
                }
            }
        }
        let mut decoder = Decoder::with(&model, Arithmetic::Integer).unwrap();
        let adapter = random::adapter(decoder.config(), 3, 1.0, 5, |_| true).unwrap();
        let fitted = Arc::new(adapters::Fitted::new("a", &adapter, decoder.config()).unwrap());
        let with = Mix::new([(fitted, 0.5)]);
        let mixes = [with.clone(), Mix::default(), with];
        let mut caches = [(); 3].map(|()| Cache::new(decoder.config(), 40));
        let mut counts = Vec::new();
        let mut steps = || {
            for (rows, mixes) in [(1, &[][..]), (3, &[]), (1, &mixes), (3, &mixes)] {
                for round in 0..5_u32 {
                    let (tokens, before) = ([7 * round + 3], allocations::count());
                    let mut chunks = caches.each_mut().map(|cache| Chunk {
                        tokens: &tokens,
                        cache,
                        logits: 0..1,
                    });
                    decoder.forward_with(&mut chunks[..rows], mixes).unwrap();
                    let made = allocations::count() - before;
                    // What the first steps allocate is kept.
                    counts.push(if round < 2 { 0 } else { made });
                }
            }
        };
        // As a part of shared work a step runs on one thread, whose allocations are counted.
        let once = std::sync::Mutex::new(&mut steps);
        threads::share(2, &|part| {
            if part == 0 {
                (once.lock().unwrap())();
            }
        });
        assert_eq!(counts, [0; 20], "{architecture} {packed}");
    }
}

#[test]
fn bad_calls_are_refused_and_change_nothing() {
    let model = random::model(random::tiny("llama"), 4).unwrap();
    let mut decoder = Decoder::new(&model).unwrap();
    let config = decoder.config().clone();
    let mut cache = Cache::new(&config, 4);
    let mut refuse = |tokens: &[u32], logits: Range<usize>, cache: &mut Cache| {
        let error = decoder.forward(&mut [Chunk { tokens, cache, logits }]).unwrap_err();
        assert_eq!(cache.len(), 0);
        error
    };
    assert_eq!(refuse(&[1, 96], 0..0, &mut cache).reason(), Reason::InvalidField);
    assert_eq!(refuse(&[1; 5], 0..0, &mut cache).reason(), Reason::LimitReached);
    assert_eq!(refuse(&[1; 3], 2..4, &mut cache).reason(), Reason::Internal);
    let mut other = Config::clone(&config);
    other.kv_heads = 4;
    assert_eq!(refuse(&[1], 0..0, &mut Cache::new(&other, 4)).reason(), Reason::Internal);
    assert!(decoder.forward(&mut []).unwrap().is_empty());
}

#[test]
fn missing_and_misshapen_tensors_are_refused() {
    let mut model = random::model(random::tiny("qwen2"), 4).unwrap();
    let name = "model.layers.1.self_attn.k_proj.bias";
    let bias = model.weights.remove(name).unwrap();
    assert_eq!(Decoder::new(&model).err().unwrap().reason(), Reason::TensorNotFound);
    model.weights.insert(name.to_owned(), model.weights[FINAL_NORM].clone());
    model.weights.insert(
        FINAL_NORM.to_owned(),
        Arc::clone(&model.weights["model.layers.0.self_attn.q_proj.bias"]),
    );
    assert_eq!(Decoder::new(&model).err().unwrap().reason(), Reason::MalformedFile);
    model.weights.insert(name.to_owned(), bias);
}
