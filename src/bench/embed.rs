//! Speed of an encoder: batches of texts of one length.

use std::time::Instant;

use serde::Serialize;

use super::stats::Spread;
use crate::error::{Error, Result};
use crate::models::encoder::plan::{Encoder, Input, Precision};
use crate::models::encoder::{Model, Pooling};

/// Most texts of a batch.
const MOST_TEXTS: usize = 1 << 14;
/// Seconds of a repetition at least.
const LEAST_SECONDS: f64 = 0.2;

/// How much is run, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Run {
    /// Texts that are embedded at once.
    pub batch: usize,
    /// Tokens of each text.
    pub length: usize,
    /// Measured repetitions, after one that warms up.
    pub repetitions: usize,
}

/// What embedding reaches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Embed {
    pub run: Run,
    pub sentences_per_second: Spread,
    /// Of a batch.
    pub milliseconds: Spread,
    /// Least cosine between a vector and that of the same text in f32, over one batch.
    pub least_cosine: f64,
    /// Bytes of the weights in memory.
    pub weight_bytes: u64,
}

/// Measures mean-pooled vectors of texts of pseudo-random tokens.
///
/// # Errors
/// `INVALID_FIELD` for runs that measure nothing or do not fit the model.
pub fn measure(model: &Model, precision: Precision, run: Run) -> Result<Embed> {
    if run.batch == 0 || run.batch > MOST_TEXTS || run.repetitions == 0 {
        let message = format!("between 1 and {MOST_TEXTS} texts and one repetition are needed");
        return Err(Error::field("batch", message));
    }
    let config = &model.family;
    if run.length == 0 || run.length > config.max_positions {
        let message = format!("between 1 and {} tokens fit the model", config.max_positions);
        return Err(Error::field("length", message));
    }
    let vocab = config.vocab;
    let texts: Vec<Vec<u32>> = (0..run.batch)
        .map(|t| (0..run.length).map(|i| ((t * 7919 + i * 104_729 + 13) % vocab) as u32).collect())
        .collect();
    let inputs: Vec<_> =
        texts.iter().map(|tokens| Input { tokens, pooling: Pooling::Mean }).collect();
    let mut exact = vec![0.0; run.batch * config.hidden];
    Encoder::new(model)?.embed(&inputs, &mut exact)?;

    let mut encoder = Encoder::with(model, precision)?;
    let mut out = vec![0.0; exact.len()];
    encoder.embed(&inputs, &mut out)?;
    let pairs = exact.chunks_exact(config.hidden).zip(out.chunks_exact(config.hidden));
    let least_cosine = pairs.map(|(a, b)| cosine(a, b)).fold(1.0, f64::min);
    let mut time = |count: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            encoder.embed(&inputs, &mut out)?;
        }
        Ok(start.elapsed().as_secs_f64().max(1e-9))
    };
    let mut count = 1;
    while time(count)? < LEAST_SECONDS {
        count *= 2;
    }
    let seconds = (0..run.repetitions).map(|_| Ok(time(count)? / count as f64));
    let seconds = Spread::of(seconds.collect::<Result<_>>()?);
    Ok(Embed {
        run,
        sentences_per_second: seconds.rate(run.batch as f64),
        milliseconds: seconds.times(1e3),
        least_cosine,
        weight_bytes: encoder.weight_bytes(),
    })
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::encoder::random;

    #[test]
    fn cosines_by_hand() {
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5_f64.sqrt()).abs() < 1e-12);
        assert!((cosine(&[2.0, -4.0], &[-1.0, 2.0]) + 1.0).abs() < 1e-12);
    }

    #[test]
    fn the_numbers_belong_together() {
        let model = random::model(random::tiny(), 1).expect("a model");
        let run = Run { batch: 3, length: 7, repetitions: 3 };
        let found = measure(&model, Precision::F32, run).expect("numbers");
        let rate = 3.0 / (found.milliseconds.median / 1e3);
        assert!((found.sentences_per_second.median / rate - 1.0).abs() < 1e-9);
        assert!(found.least_cosine > 1.0 - 1e-12 && found.weight_bytes > 0);
        let rounded = measure(&model, Precision::Int8, run).expect("numbers");
        assert!(rounded.least_cosine > 0.99 && rounded.least_cosine < 1.0);
        for bad in [
            Run { batch: 0, ..run },
            Run { length: 0, ..run },
            Run { length: 1 << 20, ..run },
            Run { repetitions: 0, ..run },
        ] {
            assert!(measure(&model, Precision::F32, bad).is_err());
        }
    }
}
