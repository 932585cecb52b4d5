//! Tokens per second of a decoder: prefill of 512 tokens (last logits only), a scored window of 512 (all
//! logits), and decoding 128 tokens after 32.
//!
//! `cargo bench --bench decode -- [model file or folder] [repetitions]`; without a model, random f32
//! weights in the shape of SmolLM2-135M.

use std::path::Path;
use std::time::Instant;

use planish::error::Result;
use planish::models::decoder::plan::{Arithmetic, Cache, CacheFormat, Chunk, Decoder};
use planish::models::{Model, decoder::random, import};

/// Tokens and seconds of one run.
type Run<'a> = dyn Fn(&mut Decoder) -> Result<(usize, f64)> + 'a;

fn main() -> Result<()> {
    // Cargo adds `--bench` to the arguments.
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let model = match arguments.next().filter(|path| path != "random") {
        Some(path) => import::open(Path::new(&path))?,
        None => smol()?,
    };
    let repetitions = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(5_usize).max(1);
    let arithmetic = match std::env::var_os("EXACT") {
        Some(_) => Arithmetic::Exact,
        None => Arithmetic::Integer,
    };
    let mut decoder = Decoder::with(&model, arithmetic)?;
    let vocab = decoder.config().vocab as u32;
    let tokens: Vec<u32> = (0..512).map(|i| (i * 7919 + 13) % vocab).collect();

    let mut bench = |name: &str, run: &Run<'_>| -> Result<()> {
        let mut rates = Vec::new();
        for _ in 0..repetitions {
            let (count, seconds) = run(&mut decoder)?;
            rates.push(count as f64 / seconds);
        }
        rates.sort_by(f64::total_cmp);
        let (low, middle, high) = (rates[0], rates[rates.len() / 2], rates[rates.len() - 1]);
        println!("{name:<24} {middle:>9.1} tokens/s  ({low:.1} to {high:.1})");
        Ok(())
    };
    for (name, first) in [("prefill 512", 511), ("score 512", 0)] {
        bench(name, &|decoder| {
            let mut cache = Cache::new(decoder.config(), 512);
            let start = Instant::now();
            let mut chunks = [Chunk { tokens: &tokens, cache: &mut cache, logits: first..512 }];
            decoder.forward(&mut chunks)?;
            Ok((512, start.elapsed().as_secs_f64()))
        })?;
    }
    for (name, context, format) in [
        ("decode 128 after 32", 32, CacheFormat::F32),
        ("decode 128 after 32 f16", 32, CacheFormat::F16),
        ("decode 128 after 512", 512, CacheFormat::F32),
        ("decode 128 after 512 f16", 512, CacheFormat::F16),
        ("decode 128 after 512 q8", 512, CacheFormat::Q8),
    ] {
        bench(name, &|decoder| {
            let mut cache = Cache::with_format(decoder.config(), context + 128, format);
            let prompt = &tokens[..context];
            decoder.forward(&mut [Chunk { tokens: prompt, cache: &mut cache, logits: 0..0 }])?;
            let mut next = [1];
            let start = Instant::now();
            for _ in 0..128 {
                let mut chunks = [Chunk { tokens: &next, cache: &mut cache, logits: 0..1 }];
                let logits = decoder.forward(&mut chunks)?;
                let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                next = [best.map_or(0, |(i, _)| i as u32)];
            }
            Ok((128, start.elapsed().as_secs_f64()))
        })?;
    }
    Ok(())
}

fn smol() -> Result<Model> {
    random::model(
        serde_json::json!({
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": true,
            "rope_theta": 100_000,
        }),
        1,
    )
}
