//! Multiple choice without examples: the likeliest answer to a question, by the model's own words.
//!
//! A question is put as `Question: ...\nAnswer:`, and each choice, with a space in front, is what may
//! follow. The score of a choice is the log-probability of its tokens divided by the bytes of its text,
//! so that long choices stand a chance; the highest wins, the lower index of equal ones.

use rayon::prelude::*;

use super::likelihood::LOGIT_BYTES;
use super::metrics;
use crate::data::choices::Item;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::kernels::softmax::log_sum_exp;
use crate::models::Model;
use crate::models::decoder::Config;
use crate::models::decoder::plan::{Cache, CacheFormat, Chunk, Decoder};
use crate::progress::Progress;

/// Questions that run side by side: enough rows for the matrix kernels when choices have a token or two.
const AT_ONCE: usize = 64;
/// Memory that the keys and values of questions side by side may take (a single one may take more).
const CACHE_BYTES: usize = 256 << 20;
/// Tokens that run between two looks at whether the work was cancelled.
const TOKENS: usize = 512;

/// What was measured, question by question.
#[derive(Debug)]
pub struct Found {
    /// Index of the choice with the highest score.
    pub predicted: Vec<usize>,
    pub correct: Vec<bool>,
    /// Number of classes, when every question has the same list of choices.
    pub classes: Option<usize>,
    /// Questions whose start was cut off to fit into the context.
    pub cut: usize,
}

impl Found {
    /// Mean F1 of the classes that `answers` or predictions name, where the choices are classes.
    /// `answers` are those of the items measured, in their order.
    pub fn macro_f1(&self, answers: &[usize]) -> Option<f64> {
        metrics::macro_f1(&self.predicted, answers, self.classes?)
    }
}

/// Answers `items` with the model; `context` is the longest sequence in tokens. A question that does
/// not fit together with its longest choice loses tokens at its start, but not the start token.
///
/// # Errors
/// `MODEL_UNSUITABLE` without a tokenizer or with one that does not fit, `DATASET_UNSUITABLE` without
/// items and for a choice that leaves no room for its question, `NON_FINITE` for scores that are not.
pub fn measure(
    model: &Model,
    items: &[Item],
    context: usize,
    progress: &Progress,
) -> Result<Found> {
    let tokenizer = model.tokenizer.as_deref().ok_or_else(super::no_tokenizer)?;
    let config = model.decoder()?;
    let Some(first) = items.first() else {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            "there is no question to answer; take a larger data set or more of its items",
        ));
    };
    let writer = Writer::new(tokenizer, config.vocab, context)?;
    let mut scorer = Scorer::new(model)?;
    let same = items.iter().all(|item| item.choices == first.choices);
    let mut found = Found {
        predicted: Vec::with_capacity(items.len()),
        correct: Vec::with_capacity(items.len()),
        classes: same.then_some(first.choices.len()),
        cut: 0,
    };
    let mut questions = items
        .iter()
        .enumerate()
        .map(|(i, item)| {
            progress.check()?;
            writer.question(item).map_err(|error| error.within(&format!("question {}", i + 1)))
        })
        .peekable();
    while questions.peek().is_some() {
        let batch = take_batch(&mut questions, config)?;
        let done = found.predicted.len();
        let part = progress.part(
            done as f64 / items.len() as f64,
            (done + batch.len()) as f64 / items.len() as f64,
        );
        let label = format!("question {} of {}", done + 1, items.len());
        let sums = scorer.sums(&batch, &part, &label)?;
        for (i, (item, sums)) in items[done..].iter().zip(&sums).enumerate() {
            let choice = choose(item, sums)
                .map_err(|error| error.within(&format!("question {}", done + i + 1)))?;
            found.predicted.push(choice);
            found.correct.push(choice == item.answer);
        }
        found.cut += batch.iter().filter(|question| question.cut).count();
    }
    Ok(found)
}

/// The choice with the highest score, from the sums of its tokens' log-probabilities.
fn choose(item: &Item, sums: &[f64]) -> Result<usize> {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, (choice, sum)) in item.choices.iter().zip(sums).enumerate() {
        let score = sum / choice.len().max(1) as f64;
        if !score.is_finite() {
            return Err(Error::new(
                Reason::NonFinite,
                format!("the likelihood of choice {i} is not finite; the model is broken"),
            ));
        }
        if score > best.1 {
            best = (i, score);
        }
    }
    // The same text gets the same score but for rounding, which must not break the tie.
    let same = |choice: &String| *choice == item.choices[best.0];
    Ok(item.choices.iter().position(same).unwrap_or(best.0))
}

/// A question in tokens.
struct Question {
    /// At least one.
    prompt: Vec<u32>,
    /// At least one each.
    choices: Vec<Vec<u32>>,
    /// Whether the prompt lost its start.
    cut: bool,
}

impl Question {
    /// Positions that run at most: the last token of a choice is only predicted.
    fn positions(&self) -> usize {
        self.prompt.len() + self.choices.iter().map(Vec::len).max().unwrap_or(1) - 1
    }
}

/// Turns questions into tokens.
struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    vocab: usize,
    context: usize,
    /// What stands in front of a choice.
    space: &'static str,
}

impl<'a> Writer<'a> {
    fn new(tokenizer: &'a Tokenizer, vocab: usize, context: usize) -> Result<Self> {
        // Sentencepiece vocabularies put a space in front of every text; a second one would be wrong.
        let first =
            tokenizer.encode("a", false, false)?.first().and_then(|id| tokenizer.token(*id));
        let spaced = first.is_some_and(|token| token.starts_with('\u{2581}'));
        Ok(Self { tokenizer, vocab, context, space: if spaced { "" } else { " " } })
    }

    fn question(&self, item: &Item) -> Result<Question> {
        let prompt = format!("Question: {}\nAnswer:", item.question);
        let mut prompt = self.tokens(&prompt, true).map_err(|error| error.within("the prompt"))?;
        let choices = item
            .choices
            .iter()
            .enumerate()
            .map(|(i, choice)| {
                self.tokens(&format!("{}{choice}", self.space), false)
                    .map_err(|error| error.within(&format!("choice {i}")))
            })
            .collect::<Result<Vec<_>>>()?;
        let longest = choices.iter().map(Vec::len).max().unwrap_or(0);
        let room = self.context.saturating_sub(longest);
        let cut = prompt.len() > room;
        if cut {
            let start = self.tokenizer.bos.filter(|_| self.tokenizer.add_bos);
            let kept = usize::from(start.is_some() && prompt.first() == start.as_ref());
            if room <= kept {
                return Err(Error::new(
                    Reason::DatasetUnsuitable,
                    format!(
                        "a choice has {longest} tokens, which leave no room for the question in a \
                         context of {}; raise the context or shorten the choice",
                        self.context
                    ),
                ));
            }
            prompt.drain(kept..kept + prompt.len() - room);
        }
        Ok(Question { prompt, choices, cut })
    }

    /// Tokens of a text, which must be some and inside the vocabulary.
    fn tokens(&self, text: &str, start: bool) -> Result<Vec<u32>> {
        let tokens = self.tokenizer.encode(text, start, false)?;
        let unsuitable = |what: String| {
            Err(Error::new(
                Reason::ModelUnsuitable,
                format!("{what}; import the model with the tokenizer that belongs to it"),
            ))
        };
        if tokens.is_empty() {
            return unsuitable("the tokenizer has no token for any part of the text".into());
        }
        match tokens.iter().find(|token| **token as usize >= self.vocab) {
            Some(token) => unsuitable(format!(
                "the tokenizer gives token {token}, but the model knows only {}",
                self.vocab
            )),
            None => Ok(tokens),
        }
    }
}

/// The next questions that run side by side: as many as the caches' memory allows, at least one.
fn take_batch(
    questions: &mut std::iter::Peekable<impl Iterator<Item = Result<Question>>>,
    config: &Config,
) -> Result<Vec<Question>> {
    let mut batch = Vec::new();
    let mut bytes = 0usize;
    while batch.len() < AT_ONCE {
        let next = questions.next_if(|question| match question {
            Ok(question) => {
                let need = Cache::bytes_for(config, question.positions(), CacheFormat::default());
                bytes = bytes.saturating_add(need);
                batch.is_empty() || bytes <= CACHE_BYTES
            }
            Err(_) => true,
        });
        match next {
            Some(question) => batch.push(question?),
            None => break,
        }
    }
    Ok(batch)
}

/// A question while it runs.
struct Lane {
    /// The prompt and what follows it; those that `cache` holds have run.
    tokens: Vec<u32>,
    cache: Cache,
    /// First position whose logits are wanted.
    from: usize,
}

/// A model that scores questions side by side.
struct Scorer {
    decoder: Decoder,
    /// Most tokens of one forward.
    tokens: usize,
    /// Most rows of logits of one forward.
    rows: usize,
}

impl Scorer {
    fn new(model: &Model) -> Result<Self> {
        let rows = (LOGIT_BYTES / 4 / model.decoder()?.vocab.max(1)).max(1);
        Ok(Self { decoder: Decoder::new(model)?, tokens: TOKENS, rows })
    }

    /// Sums of the log-probabilities of each choice's tokens, question by question. Each prompt runs
    /// once; the choices run one after the other behind its keys and values, all questions together.
    /// Progress goes by `label`.
    fn sums(
        &mut self,
        batch: &[Question],
        progress: &Progress,
        label: &str,
    ) -> Result<Vec<Vec<f64>>> {
        progress.report(0.0, label)?;
        let config = self.decoder.config();
        let mut lanes: Vec<Lane> = batch
            .iter()
            .map(|question| Lane {
                tokens: question.prompt.clone(),
                cache: Cache::new(config, question.positions()),
                from: question.prompt.len() - 1,
            })
            .collect();
        // A prompt's last logits predict the first token of every choice.
        let firsts = self.run(&mut lanes, progress, |lane, _, row| {
            let total = log_sum_exp(row);
            let choices = batch[lane].choices.iter();
            choices.map(|choice| f64::from(row[choice[0] as usize]) - total).collect::<Vec<_>>()
        })?;
        let mut sums = vec![Vec::new(); batch.len()];
        for (lane, first) in firsts {
            sums[lane] = first;
        }
        let rounds = batch.iter().map(|question| question.choices.len()).max().unwrap_or(0);
        for round in 0..rounds {
            progress.report((round + 1) as f64 / (rounds + 1) as f64, label)?;
            for (lane, Question { prompt, choices, .. }) in lanes.iter_mut().zip(batch) {
                let leading =
                    choices.get(round).map_or(&[][..], |choice| &choice[..choice.len() - 1]);
                // A choice of one token has its score.
                if leading.is_empty() {
                    continue;
                }
                lane.tokens.truncate(prompt.len());
                lane.tokens.extend_from_slice(leading);
                lane.from = prompt.len();
                // Local layers may have forgotten the prompt behind a long choice; then it runs again.
                lane.cache.truncate(prompt.len());
            }
            let terms = self.run(&mut lanes, progress, |lane, position, row| {
                let Question { prompt, choices, .. } = &batch[lane];
                // The logits at a position predict the next token.
                let token = choices[round][position - prompt.len() + 1];
                f64::from(row[token as usize]) - log_sum_exp(row)
            })?;
            for (lane, term) in terms {
                sums[lane][round] += term;
            }
        }
        Ok(sums)
    }

    /// Runs what has not run of every lane; gives what `read` makes of the wanted logits, with the
    /// lane, a lane's in the order of positions. `read` takes the lane, the position and its logits.
    fn run<T: Send>(
        &mut self,
        lanes: &mut [Lane],
        progress: &Progress,
        read: impl Fn(usize, usize, &[f32]) -> T + Sync,
    ) -> Result<Vec<(usize, T)>> {
        let vocab = self.decoder.config().vocab;
        let mut out = Vec::new();
        loop {
            progress.check()?;
            let (mut tokens, mut rows) = (self.tokens, self.rows);
            let (mut chunks, mut wanted) = (Vec::new(), Vec::new());
            for (i, lane) in lanes.iter_mut().enumerate() {
                let held = lane.cache.len();
                let silent = lane.from.saturating_sub(held);
                let take = (lane.tokens.len() - held).min(tokens).min(silent + rows);
                if take == 0 {
                    continue;
                }
                let logits = silent.min(take)..take;
                tokens -= take;
                rows -= logits.len();
                wanted.extend(logits.clone().map(|row| (i, held + row)));
                let tokens = &lane.tokens[held..held + take];
                chunks.push(Chunk { tokens, cache: &mut lane.cache, logits });
            }
            if chunks.is_empty() {
                return Ok(out);
            }
            let logits = self.decoder.forward(&mut chunks)?;
            out.par_extend(
                wanted
                    .par_iter()
                    .zip(logits.par_chunks(vocab))
                    .map(|((lane, position), row)| (*lane, read(*lane, *position, row))),
            );
        }
    }
}

#[cfg(test)]
mod tests;
