//! Tokens per second of eight sequences decoding together: without adapters, with one for all, with
//! a different one for each, out of a hundred of rank 8 in memory. The kinds alternate, so that
//! what else the machine does meets all of them.
//!
//! `cargo bench --bench adapters -- [model file or folder] [repetitions]`; without a model, random
//! f32 weights in the shape of SmolLM2-135M.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use planish::error::Result;
use planish::models::decoder::plan::adapters::{Fitted, Mix};
use planish::models::decoder::plan::{Arithmetic, Cache, Chunk, Decoder};
use planish::models::{Model, decoder::random, import};

const SEQUENCES: usize = 8;
const RESIDENT: usize = 100;
const RANK: usize = 8;
const CONTEXT: usize = 32;
const STEPS: usize = 24;

fn main() -> Result<()> {
    // Cargo adds `--bench` to the arguments.
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let model = match arguments.next().filter(|path| path != "random") {
        Some(path) => import::open(Path::new(&path))?,
        None => smol()?,
    };
    let repetitions = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(5_usize).max(1);
    let mut decoder = Decoder::with(&model, Arithmetic::Integer)?;
    let places: [(&str, fn(&str) -> bool); 2] = [
        ("q and v", |name| name.contains("q_proj") || name.contains("v_proj")),
        ("all linears", |_| true),
    ];
    for (place, on) in places {
        let config = model.decoder()?;
        let mixes = (0..RESIDENT).map(|i| {
            let adapter = random::adapter(config, RANK, 0.1, i as u64, on)?;
            let fitted = Fitted::new(&i.to_string(), &adapter, config)?;
            Ok((fitted.bytes(), Mix::new([(Arc::new(fitted), 1.0)])))
        });
        let mixes = mixes.collect::<Result<Vec<_>>>()?;
        let bytes: u64 = mixes.iter().map(|(bytes, _)| bytes).sum();
        println!(
            "{RESIDENT} adapters of rank {RANK} on {place}, {:.1} MB together",
            bytes as f64 / 1e6
        );
        let mut rates = [const { Vec::new() }; 3];
        for repetition in 0..=repetitions {
            for (kind, rates) in rates.iter_mut().enumerate() {
                let mut steps = (0..STEPS).map(|step| -> Vec<Mix> {
                    // Other adapters in each step: they come from memory, not from a cache.
                    let first = (repetition * STEPS + step) * SEQUENCES;
                    let pick = |i: usize| mixes[(first + i) % RESIDENT].1.clone();
                    match kind {
                        0 => Vec::new(),
                        1 => (0..SEQUENCES).map(|_| pick(0)).collect(),
                        _ => (0..SEQUENCES).map(pick).collect(),
                    }
                });
                let rate = decode(&mut decoder, &mut steps)?;
                // The first one warms up.
                if repetition > 0 {
                    rates.push(rate);
                }
            }
        }
        let mut base = 0.0;
        for (name, mut rates) in ["none", "one for all", "eight different"].into_iter().zip(rates) {
            rates.sort_by(f64::total_cmp);
            let (low, middle, high) = (rates[0], rates[rates.len() / 2], rates[rates.len() - 1]);
            base = if name == "none" { middle } else { base };
            println!(
                "{name:<18} {middle:>9.1} tokens/s  ({low:.1} to {high:.1})  {:>5.1} %",
                100.0 * middle / base
            );
        }
    }
    Ok(())
}

/// Tokens per second of the steps.
fn decode(decoder: &mut Decoder, steps: &mut dyn Iterator<Item = Vec<Mix>>) -> Result<f64> {
    let vocab = decoder.config().vocab as u32;
    let prompt: Vec<u32> = (0..CONTEXT as u32).map(|i| (i * 7919 + 13) % vocab).collect();
    let mut caches: Vec<Cache> =
        (0..SEQUENCES).map(|_| Cache::new(decoder.config(), CONTEXT + STEPS)).collect();
    for cache in &mut caches {
        decoder.forward(&mut [Chunk { tokens: &prompt, cache, logits: 0..0 }])?;
    }
    let steps: Vec<_> = steps.collect();
    let start = Instant::now();
    for (i, mixes) in steps.iter().enumerate() {
        let tokens = [i as u32 % vocab];
        let mut chunks: Vec<Chunk<'_>> =
            caches.iter_mut().map(|cache| Chunk { tokens: &tokens, cache, logits: 0..1 }).collect();
        decoder.forward_with(&mut chunks, mixes)?;
    }
    Ok((SEQUENCES * steps.len()) as f64 / start.elapsed().as_secs_f64())
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
