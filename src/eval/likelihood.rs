//! Likelihood of a text, and agreement of two models on it, window by window: no logits are kept.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use tempfile::NamedTempFile;

use crate::error::{Error, Reason, Result};
use crate::kernels::softmax::{self, log_sum_exp, mean_gap};
use crate::models::Model;
use crate::models::decoder::plan::{Arithmetic, Cache, Chunk, Decoder, Head};
use crate::progress::Progress;

/// Bytes of logits that a model gives at once; windows run in parts where they would need more.
pub(super) const LOGIT_BYTES: usize = 128 << 20;

/// How a text is cut and scored.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    pub fn first_scored(&self, index: usize) -> usize {
        if index == 0 { 1 } else { (self.context - self.stride).max(1) }
    }

    /// Number of predictions in the windows before `index`.
    fn predictions_before(&self, index: usize) -> usize {
        (0..index.min(2)).map(|i| self.context - self.first_scored(i)).sum::<usize>()
            + index.saturating_sub(2) * (self.context - self.first_scored(2))
    }

    /// The tokens of window `index`.
    pub fn window(&self, tokens: &[u32], index: usize) -> Vec<u32> {
        let from = index * self.stride;
        let mut window = tokens[from..from + self.context].to_vec();
        if let Some(start) = self.start {
            window[0] = start;
        }
        window
    }
}

/// What was measured: means over the predictions of each window.
pub struct Found {
    /// Negative log-likelihood in nats.
    pub nll: Vec<f64>,
    pub predictions: usize,
    pub agreement: Option<Agreement>,
}

pub struct Agreement {
    /// KL(base || model) in nats.
    pub kl: Vec<f64>,
    /// Share of predictions whose likeliest token is the same.
    pub top1: Vec<f64>,
}

/// Where the logits of a model come from.
pub enum Source<'a> {
    /// The model runs.
    Run(&'a Model),
    /// It runs as it serves: activations are rounded to 8 bits where a layout has products in integers.
    Rounded(&'a Model),
    /// It ran before, on the same tokens with the same protocol.
    Known(&'a States),
}

/// Measures a model (and its agreement with `base`) on `tokens`, which hold at least one window.
pub fn measure(
    model: &Source<'_>,
    base: Option<&Source<'_>>,
    tokens: &[u32],
    protocol: &Protocol,
    progress: &Progress,
) -> Result<Found> {
    let mut model = Runner::new(model, tokens, protocol)?;
    let mut base = base.map(|base| Runner::new(base, tokens, protocol)).transpose()?;
    let vocab = model.vocab;
    if let Some(base) = &base
        && base.vocab != vocab
    {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            format!(
                "the base knows {} tokens, the model {vocab}; only versions with one vocabulary can be \
                 compared",
                base.vocab
            ),
        ));
    }
    let windows = protocol.windows(tokens.len());
    let mut found = Found {
        nll: Vec::with_capacity(windows),
        predictions: 0,
        agreement: base.as_ref().map(|_| Agreement { kl: Vec::new(), top1: Vec::new() }),
    };
    for index in 0..windows {
        let done = index as f64 / windows as f64;
        progress.report(done, &format!("window {} of {windows}", index + 1))?;
        let window = protocol.window(tokens, index);
        model.start(index)?;
        if let Some(base) = &mut base {
            base.start(index)?;
        }
        let (mut nll, mut kl, mut same) = (0.0, 0.0, 0usize);
        for (part, wanted) in parts(protocol, index, vocab) {
            progress.check()?;
            let targets = &window[wanted.start + 1..wanted.end + 1];
            let logits = model.run(&window, part.clone(), wanted.clone())?;
            let rows = logits.par_chunks(vocab);
            match &mut base {
                None => {
                    let scores: Vec<f64> = rows
                        .zip(targets)
                        .map(|(row, t)| log_sum_exp(row) - f64::from(row[*t as usize]))
                        .collect();
                    nll += scores.iter().sum::<f64>();
                }
                Some(base) => {
                    let expected = base.run(&window, part, wanted)?.par_chunks(vocab);
                    let scores: Vec<_> = rows
                        .zip(expected)
                        .zip(targets)
                        .map(|((row, expected), t)| compare(row, expected, *t as usize))
                        .collect();
                    for score in scores {
                        nll += score.nll;
                        kl += score.kl;
                        same += usize::from(score.same);
                    }
                }
            }
        }
        let scored = protocol.context - protocol.first_scored(index);
        found.predictions += scored;
        if !nll.is_finite() {
            return Err(Error::new(
                Reason::NonFinite,
                format!("the likelihood of window {index} is not finite; the model is broken"),
            ));
        }
        let mean = |sum: f64| sum / scored as f64;
        found.nll.push(mean(nll));
        if let Some(agreement) = &mut found.agreement {
            // Rounding can leave a divergence of almost nothing below zero.
            agreement.kl.push(mean(kl).max(0.0));
            agreement.top1.push(mean(same as f64));
        }
    }
    Ok(found)
}

/// The parts in which a window runs: positions, and those among them whose logits are wanted. The
/// logits at position p predict the token at p + 1.
fn parts(
    protocol: &Protocol,
    index: usize,
    vocab: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let step = (LOGIT_BYTES / 4 / vocab.max(1)).clamp(1, protocol.context);
    let (context, first) = (protocol.context, protocol.first_scored(index));
    (0..context).step_by(step).filter_map(move |at| {
        let end = (at + step).min(context);
        let wanted = at.max(first - 1).min(end)..end.min(context - 1).max(at);
        // Nothing is asked of a last part that only holds the last token.
        (!(wanted.is_empty() && end == context)).then_some((at..end, wanted))
    })
}

/// The final hidden states of a model on a text, on disk: they are small where logits are not, and the
/// head alone makes those of them. One pass of the base serves all that are compared with it.
pub struct States {
    file: NamedTempFile,
    head: Head,
    vocab: usize,
    width: usize,
    protocol: Protocol,
    tokens: Vec<u32>,
}

impl States {
    /// Runs `tokens` through the model; the file lies in the folder `scratch`.
    pub fn new(
        model: &Model,
        tokens: Vec<u32>,
        protocol: Protocol,
        scratch: &Path,
        progress: &Progress,
    ) -> Result<Self> {
        let config = model.decoder()?;
        let mut decoder = Decoder::new(model)?;
        let mut cache = Cache::new(config, protocol.context);
        let file = NamedTempFile::new_in(scratch)?;
        let mut out = BufWriter::new(file.as_file());
        let windows = protocol.windows(tokens.len());
        for index in 0..windows {
            let done = index as f64 / windows as f64;
            progress.report(done, &format!("window {} of {windows} of the base", index + 1))?;
            cache.truncate(0);
            let window = protocol.window(&tokens, index);
            for (part, wanted) in parts(&protocol, index, config.vocab) {
                progress.check()?;
                let logits = wanted.start - part.start..wanted.end - part.start;
                let chunk = Chunk { tokens: &window[part], cache: &mut cache, logits };
                out.write_all(bytemuck::cast_slice(decoder.states(&mut [chunk])?))?;
            }
        }
        out.flush()?;
        drop(out);
        Ok(Self {
            file,
            head: Head::new(config, &model.weights)?,
            vocab: config.vocab,
            width: config.hidden,
            protocol,
            tokens,
        })
    }
}

/// A model that gives the logits of windows.
struct Runner<'a> {
    vocab: usize,
    way: Way<'a>,
}

enum Way<'a> {
    Run { decoder: Box<Decoder>, cache: Cache },
    Known { states: &'a States, file: BufReader<File>, rows: Vec<f32>, logits: Vec<f32> },
}

impl<'a> Runner<'a> {
    fn new(source: &Source<'a>, tokens: &[u32], protocol: &Protocol) -> Result<Self> {
        Ok(match source {
            Source::Run(model) | Source::Rounded(model) => Self {
                vocab: model.decoder()?.vocab,
                way: Way::Run {
                    decoder: Box::new(Decoder::with(
                        model,
                        match source {
                            Source::Rounded(_) => Arithmetic::Integer,
                            _ => Arithmetic::Exact,
                        },
                    )?),
                    cache: Cache::new(model.decoder()?, protocol.context),
                },
            },
            Source::Known(states) => {
                if states.protocol != *protocol || states.tokens != tokens {
                    return Err(Error::new(
                        Reason::ModelUnsuitable,
                        "the base cuts the text into other tokens than the model, so they cannot be \
                         compared prediction by prediction; leave compare_with_base out",
                    ));
                }
                let file = BufReader::new(states.file.reopen()?);
                let way = Way::Known { states, file, rows: Vec::new(), logits: Vec::new() };
                Self { vocab: states.vocab, way }
            }
        })
    }

    /// Goes to the start of window `index`.
    fn start(&mut self, index: usize) -> Result<()> {
        match &mut self.way {
            Way::Run { cache, .. } => {
                cache.truncate(0);
            }
            Way::Known { states, file, .. } => {
                let row = states.protocol.predictions_before(index) as u64;
                file.seek(SeekFrom::Start(row * states.width as u64 * 4))?;
            }
        }
        Ok(())
    }

    /// Runs the positions `part` of a window whose earlier ones have run; logits of positions `wanted`.
    fn run(&mut self, window: &[u32], part: Range<usize>, wanted: Range<usize>) -> Result<&[f32]> {
        match &mut self.way {
            Way::Run { decoder, cache } => {
                let logits = wanted.start - part.start..wanted.end - part.start;
                decoder.forward(&mut [Chunk { tokens: &window[part], cache, logits }])
            }
            Way::Known { states, file, rows, logits } => {
                rows.resize(wanted.len() * states.width, 0.0);
                file.read_exact(bytemuck::cast_slice_mut(rows))?;
                logits.resize(wanted.len() * states.vocab, 0.0);
                if !wanted.is_empty() {
                    states.head.finish(rows, logits);
                }
                Ok(logits)
            }
        }
    }
}

struct Score {
    nll: f64,
    kl: f64,
    same: bool,
}

/// One prediction of two models: the model's loss, KL(base || model), and whether their likeliest
/// tokens agree (the lower id where several are).
fn compare(row: &[f32], base: &[f32], target: usize) -> Score {
    let (mine, theirs) = (log_sum_exp(row), log_sum_exp(base));
    Score {
        nll: mine - f64::from(row[target]),
        kl: mean_gap(row, base, theirs as f32) - theirs + mine,
        same: top(row) == top(base),
    }
}

fn top(row: &[f32]) -> Option<usize> {
    let most = softmax::max(row);
    row.iter().position(|v| *v == most)
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
    }

    #[test]
    fn parts_cover_every_prediction_once() {
        for (context, stride) in [(8, 8), (8, 3), (9, 1), (2, 2)] {
            let protocol = Protocol { context, stride, start: None };
            let mut before = 0;
            for index in 0..4 {
                assert_eq!(protocol.predictions_before(index), before, "{context} {stride}");
                // A vocabulary so large that a part holds two or three positions.
                let parts: Vec<_> = parts(&protocol, index, LOGIT_BYTES / 4 / 3).collect();
                let wanted: Vec<usize> = parts.iter().flat_map(|(_, w)| w.clone()).collect();
                let first = protocol.first_scored(index);
                assert_eq!(wanted, (first - 1..context - 1).collect::<Vec<_>>());
                for pair in parts.windows(2) {
                    assert_eq!(pair[0].0.end, pair[1].0.start);
                }
                before += context - first;
            }
        }
    }

    #[test]
    fn known_states_give_the_bits_of_a_run() {
        use crate::models::decoder::random;
        let base = random::model(random::tiny("llama"), 1).expect("a model");
        let other = random::model(random::tiny("llama"), 2).expect("a model");
        let vocab = base.decoder().expect("a decoder").vocab as u32;
        let tokens: Vec<u32> = (0..70).map(|i| (i * 31 + 7) % vocab).collect();
        let progress = Progress::silent();
        let scratch = tempfile::tempdir().expect("a folder");
        for stride in [16, 5] {
            let protocol = Protocol { context: 16, stride, start: Some(1) };
            let states =
                States::new(&base, tokens.clone(), protocol.clone(), scratch.path(), &progress)
                    .expect("runs");
            let run = |model: &Source<'_>, base: &Source<'_>| {
                measure(model, Some(base), &tokens, &protocol, &progress).expect("measures")
            };
            let known = run(&Source::Run(&other), &Source::Known(&states));
            let plain = run(&Source::Run(&other), &Source::Run(&base));
            assert_eq!(known.nll, plain.nll);
            let (known, plain) = (known.agreement.expect("kl"), plain.agreement.expect("kl"));
            assert_eq!((known.kl, known.top1), (plain.kl, plain.top1));
            let alone = measure(&Source::Known(&states), None, &tokens, &protocol, &progress);
            let plain = measure(&Source::Run(&base), None, &tokens, &protocol, &progress);
            assert_eq!(alone.expect("known").nll, plain.expect("runs").nll);
        }
        assert_eq!(std::fs::read_dir(scratch.path()).expect("a folder").count(), 0);
    }
}
