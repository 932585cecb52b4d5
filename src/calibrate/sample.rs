//! Calibration text that the model itself writes: no data set, no tokenizer needed.

use rand::Rng as _;
use rayon::prelude::*;

use crate::error::{Error, Reason, Result};
use crate::models::decoder::plan::{Cache, CacheFormat, Chunk, Decoder};
use crate::models::{Family, Model};
use crate::progress::Progress;
use crate::seed::Stream;

/// Memory that the keys and values of the sequences written at once may take.
const CACHE_BYTES: usize = 256 << 20;

/// `sequences` sequences of `length` tokens: the start token, then tokens drawn at temperature 1.
/// Sequence `i` draws from the stream's child `i`. An encoder writes no text: its tokens are drawn evenly.
pub fn sample(
    model: &Model,
    sequences: usize,
    length: usize,
    stream: &Stream,
    progress: &Progress,
) -> Result<Vec<u32>> {
    if let Family::Encoder(config) = &model.family {
        let mut rng = stream.rng();
        let vocab = u32::try_from(config.vocab).unwrap_or(u32::MAX);
        return Ok((0..sequences * length).map(|_| rng.random_range(0..vocab)).collect());
    }
    let config = model.decoder()?;
    let mut decoder = Decoder::new(model)?;
    let start = start_token(model, config.vocab);
    let each = Cache::bytes_for(config, length, CacheFormat::default()).max(1);
    let at_once = (CACHE_BYTES / each).clamp(1, 64);
    let mut out = vec![start; sequences * length];
    for (batch, part) in out.chunks_mut(at_once * length).enumerate() {
        let first = batch * at_once;
        let mut writers: Vec<_> = part
            .chunks_mut(length)
            .enumerate()
            .map(|(i, tokens)| {
                let rng = stream.child(&format!("sequence {}", first + i)).rng();
                (tokens, Cache::new(config, length), rng)
            })
            .collect();
        for at in 1..length {
            let done = (first * length + at * writers.len()) as f64 / (sequences * length) as f64;
            // The walk that follows owns the progress; this only says what goes on.
            progress.report(0.0, &format!("sampling calibration text: {:.0}%", 100.0 * done))?;
            let mut chunks: Vec<_> = writers
                .iter_mut()
                .map(|(tokens, cache, _)| Chunk {
                    tokens: &tokens[at - 1..at],
                    cache,
                    logits: 0..1,
                })
                .collect();
            let logits = decoder.forward(&mut chunks)?;
            drop(chunks);
            let drawn = writers.par_iter_mut().zip(logits.par_chunks(config.vocab));
            drawn.try_for_each(|((tokens, _, rng), logits)| {
                tokens[at] = draw(logits, rng.random())?;
                Ok::<_, Error>(())
            })?;
        }
    }
    Ok(out)
}

/// The index at which the softmax of `logits`, summed up from the left, passes `point` in [0, 1).
fn draw(logits: &[f32], point: f64) -> Result<u32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |l: &f32| f64::from(*l - top).exp();
    let total: f64 = logits.iter().map(weight).sum();
    if !total.is_finite() {
        return Err(Error::new(
            Reason::NonFinite,
            "the model's logits are not finite; it cannot write calibration text: give a data set",
        ));
    }
    let (mut sum, mut last) = (0.0, 0);
    for (i, logit) in logits.iter().enumerate() {
        let w = weight(logit);
        if w > 0.0 {
            last = i;
            sum += w;
            if sum > point * total {
                break;
            }
        }
    }
    Ok(last as u32)
}

/// The token that opens a text: the tokenizer's, else the configuration's, else an end token (which
/// separates documents), else 0.
fn start_token(model: &Model, vocab: usize) -> u32 {
    let tokenizer = model.tokenizer.as_deref();
    let written = |key: &str| {
        let value = &model.config[key];
        value.as_u64().or_else(|| value[0].as_u64()).and_then(|v| u32::try_from(v).ok())
    };
    tokenizer
        .and_then(|t| t.bos)
        .or_else(|| written("bos_token_id"))
        .or_else(|| tokenizer.and_then(|t| t.eos.first().copied()))
        .or_else(|| written("eos_token_id"))
        .filter(|t| (*t as usize) < vocab)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_softmax() {
        // Probabilities 1/4, 1/4, 1/2.
        let logits = [0.0, 0.0, 2f32.ln()];
        assert_eq!(draw(&logits, 0.0).expect("finite"), 0);
        assert_eq!(draw(&logits, 0.3).expect("finite"), 1);
        assert_eq!(draw(&logits, 0.51).expect("finite"), 2);
        assert_eq!(draw(&logits, 0.999_999_999).expect("finite"), 2);
        assert_eq!(draw(&[f32::NEG_INFINITY, 0.0], 0.0).expect("finite"), 1);
        assert_eq!(draw(&[f32::NAN], 0.5).unwrap_err().reason(), Reason::NonFinite);
    }
}
