//! Speed of a decoder: prefill, decoding one sequence, decoding several in one step.

use std::time::Instant;

use serde::Serialize;

use super::cost::{Costs, attention_operations, cache_bytes};
use super::limits::Limits;
use super::stats::Spread;
use crate::error::{Error, Reason, Result};
use crate::machine;
use crate::models::Model;
use crate::models::decoder::Config;
use crate::models::decoder::plan::{Arithmetic, Cache, CacheFormat, Chunk, Decoder};

/// Most tokens of a prompt or an answer, and most sequences of a step, that are measured.
pub const MOST_TOKENS: usize = 1 << 20;
pub const MOST_SEQUENCES: usize = 1 << 10;

/// How much is run, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Run {
    /// Tokens before what is measured.
    pub prompt_tokens: usize,
    /// Tokens that are measured.
    pub tokens: usize,
    /// Measured repetitions, after one that warms up.
    pub repetitions: usize,
    #[serde(serialize_with = "format_name")]
    pub cache: CacheFormat,
}

fn format_name<S: serde::Serializer>(format: &CacheFormat, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(match format {
        CacheFormat::F32 => "f32",
        CacheFormat::F16 => "f16",
        CacheFormat::Q8 => "q8",
    })
}

impl Run {
    /// Refuses what would measure nothing, what the model has no positions for, and what does not fit
    /// into memory.
    fn check(&self, config: &Config, sequences: usize) -> Result<()> {
        if sequences == 0 || sequences > MOST_SEQUENCES {
            let message = format!("a step has between 1 and {MOST_SEQUENCES} sequences");
            return Err(Error::field("sequences", message));
        }
        if self.tokens == 0 || self.repetitions == 0 {
            let message = "at least one token and one repetition are needed to measure anything";
            return Err(Error::field("tokens", message));
        }
        let length = self.prompt_tokens.saturating_add(self.tokens);
        let most = config.max_positions.min(MOST_TOKENS);
        if length > most {
            let message = format!(
                "{length} tokens with the prompt are more than the {most} positions of the model; \
                 take fewer"
            );
            return Err(Error::field("tokens", message));
        }
        let bytes = Cache::bytes_for(config, length, self.cache).saturating_mul(sequences) as u64;
        if machine::memory_bytes().is_some_and(|memory| bytes > memory / 2) {
            let message = format!(
                "keys and values of {sequences} sequences of {length} tokens take {bytes} bytes, more \
                 than half of the memory; take fewer"
            );
            return Err(Error::new(Reason::TooLarge, message));
        }
        Ok(())
    }
}

/// What decoding reads and how fast.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decode {
    pub run: Run,
    /// Sequences that each step advances by a token.
    pub sequences: usize,
    /// Of all sequences together.
    pub tokens_per_second: Spread,
    pub milliseconds_per_step: Spread,
    /// Bytes of weights that a step reads.
    pub weight_bytes: u64,
    /// Bytes of keys and values that a step reads, on average.
    pub cache_bytes: u64,
    /// Of weights.
    pub gigabytes_per_second: Spread,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<ReadShare>,
}

/// Median rate of reading weights over the machine's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ReadShare {
    /// Over the bandwidth of the memory.
    pub of_memory: f64,
    /// Over that of reading as many bytes again and again.
    pub of_reread: f64,
}

/// What prefill computes and how fast.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prefill {
    pub run: Run,
    pub tokens_per_second: Spread,
    pub milliseconds: Spread,
    /// Operations of the linear layers in one run: two for each product of a stored weight and a token, the
    /// head for the last token only.
    pub linear_operations: u64,
    /// Operations of attention in one run.
    pub attention_operations: u64,
    /// Of the linear layers over the whole time.
    pub gigaoperations_per_second: Spread,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<ComputeShare>,
}

/// Median rate of the linear layers over the machine's peaks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ComputeShare {
    pub of_integer: f64,
    pub of_single: f64,
}

/// A model ready to be measured.
pub struct Subject {
    decoder: Decoder,
    costs: Costs,
}

impl Subject {
    pub fn new(model: &Model, arithmetic: Arithmetic) -> Result<Self> {
        Ok(Self { decoder: Decoder::with(model, arithmetic)?, costs: Costs::of(model)? })
    }

    pub fn costs(&self) -> Costs {
        self.costs
    }

    /// Tokens spread over the vocabulary, others for each sequence; speed does not depend on which.
    fn tokens(&self, count: usize, sequence: usize) -> Vec<u32> {
        let vocab = self.decoder.config().vocab;
        (0..count).map(|i| ((i * 7919 + sequence * 104_729 + 13) % vocab) as u32).collect()
    }

    /// Runs `run.tokens` tokens at once after `run.prompt_tokens`, with the logits of the last.
    pub fn prefill(&mut self, run: Run, limits: Option<&Limits>) -> Result<Prefill> {
        let config = self.decoder.config();
        run.check(config, 1)?;
        let length = run.prompt_tokens + run.tokens;
        let mut cache = Cache::with_format(config, length, run.cache);
        let attention = attention_operations(config, run.prompt_tokens, run.tokens);
        let tokens = self.tokens(length, 0);
        let (before, measured) = tokens.split_at(run.prompt_tokens);
        let mut seconds = Vec::with_capacity(run.repetitions);
        for repetition in 0..=run.repetitions {
            cache.truncate(0);
            forward(&mut self.decoder, &mut cache, before, false)?;
            let start = Instant::now();
            forward(&mut self.decoder, &mut cache, measured, true)?;
            if repetition > 0 {
                seconds.push(start.elapsed().as_secs_f64().max(1e-9));
            }
        }
        let seconds = Spread::of(seconds);
        let operations = self.costs.operations(run.tokens, 1);
        let reached = seconds.rate(operations as f64 / 1e9);
        let share = limits.map(|limits| ComputeShare {
            of_integer: reached.median / limits.integer.gigaoperations_per_second.median,
            of_single: reached.median / limits.single.gigaoperations_per_second.median,
        });
        Ok(Prefill {
            run,
            tokens_per_second: seconds.rate(run.tokens as f64),
            milliseconds: seconds.times(1e3),
            linear_operations: operations,
            attention_operations: attention,
            gigaoperations_per_second: reached,
            share,
        })
    }

    /// Takes `run.tokens` steps, each of one token for every of `sequences` sequences, after prompts of
    /// `run.prompt_tokens`; the likeliest token is taken. Choosing it is measured too.
    pub fn decode(
        &mut self,
        run: Run,
        sequences: usize,
        limits: Option<&Limits>,
    ) -> Result<Decode> {
        let config = self.decoder.config();
        run.check(config, sequences)?;
        let (vocab, length) = (config.vocab, run.prompt_tokens + run.tokens);
        let read = cache_bytes(config, run.cache, run.prompt_tokens, run.tokens);
        let mut caches: Vec<Cache> =
            (0..sequences).map(|_| Cache::with_format(config, length, run.cache)).collect();
        let prompts: Vec<Vec<u32>> =
            (0..sequences).map(|s| self.tokens(run.prompt_tokens, s)).collect();
        let mut seconds = Vec::with_capacity(run.repetitions);
        for repetition in 0..=run.repetitions {
            for (cache, prompt) in caches.iter_mut().zip(&prompts) {
                cache.truncate(0);
                forward(&mut self.decoder, cache, prompt, false)?;
            }
            let mut next: Vec<u32> = (0..sequences).map(|s| (s % vocab) as u32).collect();
            let start = Instant::now();
            for _ in 0..run.tokens {
                let mut chunks: Vec<Chunk<'_>> = caches
                    .iter_mut()
                    .zip(&next)
                    .map(|(cache, token)| Chunk {
                        tokens: std::slice::from_ref(token),
                        cache,
                        logits: 0..1,
                    })
                    .collect();
                let logits = self.decoder.forward(&mut chunks)?;
                next = logits.chunks_exact(vocab).map(likeliest).collect();
            }
            if repetition > 0 {
                seconds.push(start.elapsed().as_secs_f64().max(1e-9));
            }
        }
        let seconds = Spread::of(seconds);
        let bytes = self.costs.bytes();
        let reached = seconds.rate(bytes as f64 * run.tokens as f64 / 1e9);
        let share = limits.map(|limits| ReadShare {
            of_memory: reached.median / limits.memory.gigabytes_per_second.median,
            of_reread: reached.median / limits.reread.gigabytes_per_second.median,
        });
        Ok(Decode {
            run,
            sequences,
            tokens_per_second: seconds.rate((run.tokens * sequences) as f64),
            milliseconds_per_step: seconds.times(1e3 / run.tokens as f64),
            weight_bytes: bytes,
            cache_bytes: read / run.tokens as u64 * sequences as u64,
            gigabytes_per_second: reached,
            share,
        })
    }
}

fn forward(decoder: &mut Decoder, cache: &mut Cache, tokens: &[u32], last: bool) -> Result<()> {
    let end = tokens.len();
    let logits = if last { end.saturating_sub(1)..end } else { end..end };
    decoder.forward(&mut [Chunk { tokens, cache, logits }])?;
    Ok(())
}

fn likeliest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (token as u32, *logit);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;

    fn subject() -> Subject {
        Subject::new(
            &random::model(random::tiny("llama"), 1).expect("a model"),
            Arithmetic::Integer,
        )
        .expect("a subject")
    }

    fn run(prompt_tokens: usize, tokens: usize) -> Run {
        Run { prompt_tokens, tokens, repetitions: 3, cache: CacheFormat::F32 }
    }

    #[test]
    fn the_numbers_of_a_decode_belong_together() {
        let found = subject().decode(run(4, 6), 2, None).expect("a decode");
        assert_eq!(found.tokens_per_second.values.len(), 3);
        let steps = 1e3 / found.milliseconds_per_step.median;
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-9;
        assert!(close(found.tokens_per_second.median, 2.0 * steps));
        assert!(close(found.gigabytes_per_second.median, found.weight_bytes as f64 * steps / 1e9));
        // Positions 4 to 9 see 5 to 10 positions, 45 over 6 steps; 3 layers, 2 * 32 channels of 4 bytes,
        // 2 sequences.
        assert_eq!(found.cache_bytes, 45 * 3 * 2 * 32 * 4 / 6 * 2);
        assert!(found.share.is_none());
    }

    #[test]
    fn the_numbers_of_a_prefill_belong_together() {
        let found = subject().prefill(run(0, 20), None).expect("a prefill");
        assert_eq!(found.linear_operations, 2 * (20 * 3 * 13_824 + 96 * 32));
        assert_eq!(found.attention_operations, 4 * 64 * 3 * 210);
        let rate = found.linear_operations as f64 / found.milliseconds.median / 1e6;
        assert!((found.gigaoperations_per_second.median / rate - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let mut subject = subject();
        for (prompt, tokens) in [(0, 0), (200, 100), (usize::MAX, 1)] {
            assert!(subject.decode(run(prompt, tokens), 1, None).is_err(), "{prompt} {tokens}");
            assert!(subject.prefill(run(prompt, tokens), None).is_err(), "{prompt} {tokens}");
        }
        assert!(subject.decode(run(1, 1), 0, None).is_err());
        assert!(subject.decode(Run { repetitions: 0, ..run(1, 1) }, 1, None).is_err());
    }

    #[test]
    fn the_likeliest_token_is_the_first_of_the_largest() {
        assert_eq!(likeliest(&[0.0, 3.0, -1.0, 3.0]), 1);
        assert_eq!(likeliest(&[f32::NAN, -5.0]), 1);
    }
}
