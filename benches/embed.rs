//! Sentences per second of an encoder: batches of 32 and single texts, of 32 and 128 tokens.
//!
//! `cargo bench --bench embed -- [model folder] [repetitions]`; without a model, random f32 weights in the
//! shape of all-MiniLM-L6-v2.

use std::path::Path;
use std::time::Instant;

use planish::error::Result;
use planish::models::encoder::plan::{Encoder, Input};
use planish::models::encoder::{Model, Pooling, random};
use planish::models::import;

fn main() -> Result<()> {
    // Cargo adds `--bench` to the arguments.
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let model = match arguments.next().filter(|path| path != "random") {
        Some(path) => import::open_any(Path::new(&path))?.encoder()?,
        None => minilm()?,
    };
    let repetitions = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(7_usize).max(1);
    let mut encoder = Encoder::new(&model)?;
    let (vocab, hidden) = (encoder.config().vocab as u32, encoder.config().hidden);
    for (batch, length, calls) in [(1, 32, 32), (32, 32, 8), (1, 128, 16), (32, 128, 2)] {
        let texts: Vec<Vec<u32>> = (0..batch)
            .map(|t| (0..length).map(|i| (t * 7919 + i * 104_729 + 13) % vocab).collect())
            .collect();
        let inputs: Vec<_> =
            texts.iter().map(|tokens| Input { tokens, pooling: Pooling::Mean }).collect();
        let mut out = vec![0.0; inputs.len() * hidden];
        let mut rates = Vec::new();
        encoder.embed(&inputs, &mut out)?;
        for _ in 0..repetitions {
            let start = Instant::now();
            for _ in 0..calls {
                encoder.embed(&inputs, &mut out)?;
            }
            rates.push((inputs.len() * calls) as f64 / start.elapsed().as_secs_f64());
        }
        rates.sort_by(f64::total_cmp);
        let (low, middle, high) = (rates[0], rates[rates.len() / 2], rates[rates.len() - 1]);
        println!(
            "batch {batch:>2} length {length:>3} {middle:>9.1} sentences/s  ({low:.1} to {high:.1})"
        );
    }
    Ok(())
}

fn minilm() -> Result<Model> {
    random::model(
        serde_json::json!({
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
        }),
        1,
    )
}
