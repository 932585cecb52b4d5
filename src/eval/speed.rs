//! Speed from inside: tokens a second of prefill and decode, one sequence, computed as serving does.

use std::time::Instant;

use super::metrics;
use crate::error::Result;
use crate::models::Model;
use crate::models::decoder::plan::{Arithmetic, Cache, CacheFormat, Chunk, Decoder};
use crate::progress::Progress;
use crate::proto::v1;

const PREFILL: usize = 512;
const PROMPT: usize = 32;
const DECODE: usize = 128;
const REPETITIONS: usize = 5;

/// `prefill_tokens_per_second` and `decode_tokens_per_second`: medians of repetitions after one that
/// warms up. Weights are packed, activations rounded, keys and values kept in 16 bits as a service does unless
/// told otherwise, whatever quality is measured with: these rates say what a client gets. Lengths shrink with
/// the model's positions; the protocol says what was run.
pub fn measure(model: &Model, progress: &Progress) -> Result<Vec<v1::Measurement>> {
    let config = model.decoder()?;
    let room = config.max_positions;
    let prefill = PREFILL.min(room);
    let prompt = PROMPT.min(room.div_ceil(2));
    let decode = DECODE.min(room - prompt).max(1);
    let mut decoder = Decoder::with(model, Arithmetic::Integer)?;
    let mut cache = Cache::with_format(config, prefill.max(prompt + decode), CacheFormat::F16);
    // Speed does not depend on which tokens run; these spread over the vocabulary.
    let tokens: Vec<u32> = (0..prefill.max(prompt + decode))
        .map(|i| ((i * 7919 + 17) % config.vocab) as u32)
        .collect();
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for repetition in 0..=REPETITIONS {
        let done = repetition as f64 / (REPETITIONS + 1) as f64;
        progress.report(done, "measuring speed")?;
        cache.truncate(0);
        let start = Instant::now();
        forward(&mut decoder, &mut cache, &tokens[..prefill], prefill - 1)?;
        let prefilled = start.elapsed();
        cache.truncate(0);
        forward(&mut decoder, &mut cache, &tokens[..prompt], prompt - 1)?;
        let start = Instant::now();
        for token in tokens[prompt..].chunks(1).take(decode) {
            progress.check()?;
            forward(&mut decoder, &mut cache, token, 0)?;
        }
        if repetition > 0 {
            prefills.push(prefill as f64 / prefilled.as_secs_f64().max(1e-9));
            decodes.push(decode as f64 / start.elapsed().as_secs_f64().max(1e-9));
        }
    }
    let threads = rayon::current_num_threads();
    let of = format!("one sequence, as served, median of {REPETITIONS}, {threads} threads");
    Ok(vec![
        metrics::PREFILL_RATE
            .sampled(prefills, format!("{prefill} tokens at once, logits of the last, {of}")),
        metrics::DECODE_RATE
            .sampled(decodes, format!("{decode} tokens one by one after {prompt}, {of}")),
    ])
}

fn forward(decoder: &mut Decoder, cache: &mut Cache, tokens: &[u32], wanted: usize) -> Result<()> {
    decoder.forward(&mut [Chunk { tokens, cache, logits: wanted..wanted + 1 }])?;
    Ok(())
}
