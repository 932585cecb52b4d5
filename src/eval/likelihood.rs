//! Likelihood of a text, and agreement of two models on it, window by window: no logits are kept.

use rayon::prelude::*;

use crate::error::{Error, Reason, Result};
use crate::models::Model;
use crate::models::decoder::plan::{Cache, Chunk, Decoder};
use crate::progress::Progress;

/// Bytes of logits that a model gives at once; windows run in parts where they would need more.
const LOGIT_BYTES: usize = 128 << 20;

/// How a text is cut and scored.
pub struct Protocol {
    pub context: usize,
    pub stride: usize,
    /// Stands in place of each window's first token.
    pub start: Option<u32>,
}

impl Protocol {
    /// Number of full windows in a text of `tokens` tokens.
    pub fn windows(&self, tokens: usize) -> usize {
        tokens.checked_sub(self.context).map_or(0, |rest| rest / self.stride + 1)
    }

    /// The first position of window `index` whose token is scored. (Positions count from 0; the token
    /// at position 0 has nothing before it and is never scored.)
    fn first_scored(&self, index: usize) -> usize {
        if index == 0 { 1 } else { (self.context - self.stride).max(1) }
    }
}

/// What was measured.
pub struct Found {
    /// Mean over windows of the mean negative log-likelihood, in nats.
    pub mean_nll: f64,
    pub predictions: usize,
    pub agreement: Option<Agreement>,
}

/// Means over all scored predictions.
pub struct Agreement {
    /// KL(base || model) in nats.
    pub kl: f64,
    /// Share of predictions whose likeliest token is the same.
    pub top1: f64,
}

/// Measures `model` (and its agreement with `base`) on `tokens`, which hold at least one window.
pub fn measure(
    model: &Model,
    base: Option<&Model>,
    tokens: &[u32],
    protocol: &Protocol,
    progress: &Progress,
) -> Result<Found> {
    let vocab = model.decoder()?.vocab;
    let mut runner = Runner::new(model, protocol.context)?;
    let mut base = base.map(|base| Runner::new(base, protocol.context)).transpose()?;
    if let Some(base) = &base
        && base.decoder.config().vocab != vocab
    {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            format!(
                "the base knows {} tokens, the model {vocab}; only versions with one vocabulary can be \
                 compared",
                base.decoder.config().vocab
            ),
        ));
    }
    let windows = protocol.windows(tokens.len());
    let step = (LOGIT_BYTES / 4 / vocab.max(1)).clamp(1, protocol.context);
    let (mut nll, mut kl, mut same, mut predictions) = (0.0, 0.0, 0usize, 0usize);
    for index in 0..windows {
        progress
            .report(index as f64 / windows as f64, &format!("window {} of {windows}", index + 1))?;
        let from = index * protocol.stride;
        let mut window = tokens[from..from + protocol.context].to_vec();
        if let Some(start) = protocol.start {
            window[0] = start;
        }
        runner.cache.truncate(0);
        if let Some(base) = &mut base {
            base.cache.truncate(0);
        }
        let first = protocol.first_scored(index);
        let mut window_nll = 0.0;
        for at in (0..protocol.context).step_by(step) {
            progress.check()?;
            let end = (at + step).min(protocol.context);
            // The logits at position p predict the token at p + 1.
            let wanted = at.max(first - 1)..end.min(protocol.context - 1);
            if wanted.is_empty() && end < protocol.context {
                runner.run(&window, at..end, end..end)?;
                if let Some(base) = &mut base {
                    base.run(&window, at..end, end..end)?;
                }
                continue;
            } else if wanted.is_empty() {
                continue;
            }
            let targets = &window[wanted.start + 1..wanted.end + 1];
            let logits = runner.run(&window, at..end, wanted.clone())?;
            let rows = logits.par_chunks(vocab);
            match &mut base {
                None => {
                    let scores: Vec<f64> = rows
                        .zip(targets)
                        .map(|(row, t)| log_sum(row) - f64::from(row[*t as usize]))
                        .collect();
                    window_nll += scores.iter().sum::<f64>();
                }
                Some(base) => {
                    let expected = base.run(&window, at..end, wanted)?.par_chunks(vocab);
                    let scores: Vec<_> = rows
                        .zip(expected)
                        .zip(targets)
                        .map(|((row, expected), t)| compare(row, expected, *t as usize))
                        .collect();
                    for score in scores {
                        window_nll += score.nll;
                        kl += score.kl;
                        same += usize::from(score.same);
                    }
                }
            }
        }
        let scored = protocol.context - first;
        predictions += scored;
        if !window_nll.is_finite() {
            return Err(Error::new(
                Reason::NonFinite,
                format!("the likelihood of window {index} is not finite; the model is broken"),
            ));
        }
        nll += window_nll / scored as f64;
    }
    let mean = |sum: f64| sum / predictions.max(1) as f64;
    Ok(Found {
        mean_nll: nll / windows as f64,
        predictions,
        // Rounding can leave a divergence of almost nothing below zero.
        agreement: base.map(|_| Agreement { kl: mean(kl).max(0.0), top1: mean(same as f64) }),
    })
}

/// A model that runs windows.
struct Runner {
    decoder: Decoder,
    cache: Cache,
}

impl Runner {
    fn new(model: &Model, context: usize) -> Result<Self> {
        Ok(Self { decoder: Decoder::new(model)?, cache: Cache::new(model.decoder()?, context) })
    }

    /// Runs the positions `part` of a window whose earlier ones have run; logits of positions `wanted`.
    fn run(
        &mut self,
        window: &[u32],
        part: std::ops::Range<usize>,
        wanted: std::ops::Range<usize>,
    ) -> Result<&[f32]> {
        let logits = wanted.start - part.start..wanted.end - part.start;
        let mut chunk = [Chunk { tokens: &window[part], cache: &mut self.cache, logits }];
        self.decoder.forward(&mut chunk)
    }
}

/// `ln sum exp` of logits.
fn log_sum(row: &[f32]) -> f64 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|l| f64::from((l - top).exp())).sum();
    f64::from(top) + sum.ln()
}

struct Score {
    nll: f64,
    kl: f64,
    same: bool,
}

/// One prediction of two models: the model's loss, KL(base || model), and whether their likeliest
/// tokens agree (the lower id where several are).
fn compare(row: &[f32], base: &[f32], target: usize) -> Score {
    let (mine, theirs) = (log_sum(row), log_sum(base));
    let distance: f64 = row
        .iter()
        .zip(base)
        .map(|(m, b)| {
            let p = f64::from((f64::from(*b) - theirs) as f32).exp();
            // A token that the base excludes (a logit of minus infinity) adds nothing.
            if p > 0.0 { p * (f64::from(*b) - f64::from(*m)) } else { 0.0 }
        })
        .sum();
    Score {
        nll: mine - f64::from(row[target]),
        kl: distance - theirs + mine,
        same: top(row) == top(base),
    }
}

fn top(row: &[f32]) -> usize {
    let better = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
    (1..row.len()).fold(0, better)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_and_what_they_score() {
        let plain = Protocol { context: 512, stride: 512, start: None };
        assert_eq!(plain.windows(20_000), 39);
        assert_eq!((plain.first_scored(0), plain.first_scored(5)), (1, 1));
        assert_eq!((plain.windows(511), plain.windows(512)), (0, 1));
        let strided = Protocol { context: 8, stride: 2, start: None };
        assert_eq!(strided.windows(12), 3);
        // Window 1 covers tokens 2 to 9; 8 and 9 are new and stand at its positions 6 and 7.
        assert_eq!(strided.first_scored(1), 6);
    }

    #[test]
    fn scores_by_hand() {
        // Model: 1/2, 1/4, 1/4. Base: 1/4, 1/4, 1/2.
        let (h, q) = (0.5f32.ln(), 0.25f32.ln());
        let score = compare(&[h, q, q], &[q, q, h], 0);
        assert!((score.nll - 2f64.ln()).abs() < 1e-6);
        // 1/4 ln(1/2) + 0 + 1/2 ln 2 = 1/4 ln 2.
        assert!((score.kl - 0.25 * 2f64.ln()).abs() < 1e-6);
        assert!(!score.same);
        let same = compare(&[1.0, 5.0, 5.0], &[1.0, 5.0, 5.0], 1);
        assert!(same.same && same.kl.abs() < 1e-9);
        assert!((log_sum(&[1000.0, 1000.0]) - 1000.0 - 2f64.ln()).abs() < 1e-9);
    }
}
