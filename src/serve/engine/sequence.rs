//! A request in a slot: what it still has to feed, what it has said, where its answer goes.

use std::time::Instant;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use super::stop::{Shown, Stops};
use super::{Event, Finish, Job, Request, Token};
use crate::data::tokenizer::{TextStream, Tokenizer};
use crate::error::Result;
use crate::models::decoder::Config;
use crate::models::decoder::plan::Cache;
use crate::models::decoder::plan::adapters::Mix;
use crate::serve::sample::{Logprobs, Sampler};

/// A sequence at work.
pub struct Sequence<'a> {
    pub cache: Cache,
    /// Tokens to feed: the prompt, then the newest token.
    pub pending: Vec<u32>,
    /// Applied to all its tokens.
    pub adapters: Mix,
    pub task: Task<'a>,
}

pub enum Task<'a> {
    Generate(Box<Generation<'a>>),
    Score { tokens: Vec<u32>, scores: Vec<f32>, reply: Option<oneshot::Sender<Result<Vec<f32>>>> },
}

pub struct Generation<'a> {
    request: Request,
    events: mpsc::Sender<Result<Event>>,
    /// Events that the client has not taken yet.
    outbox: Vec<Event>,
    tokenizer: Option<&'a Tokenizer>,
    text: Option<TextStream<'a>>,
    stops: Stops,
    sampler: Sampler,
    generated: usize,
    queued: Instant,
    admitted: Instant,
    first_logits: Option<Instant>,
}

/// Whether a sequence goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Goes,
    Ends,
}

impl<'a> Sequence<'a> {
    /// Puts a job into a slot; None if its client has left already.
    pub fn new(
        job: Job,
        config: &Config,
        context: usize,
        tokenizer: Option<&'a Tokenizer>,
    ) -> Option<Self> {
        match job {
            Job::Score { tokens, adapters, reply } => (!reply.is_closed()).then(|| Self {
                cache: Cache::new(config, tokens.len()),
                pending: tokens.clone(),
                adapters,
                task: Task::Score { tokens, scores: Vec::new(), reply: Some(reply) },
            }),
            Job::Generate { request, events, queued } => (!events.is_closed()).then(|| Self {
                cache: Cache::new(
                    config,
                    request.prompt.len().saturating_add(request.max_tokens).min(context),
                ),
                pending: request.prompt.clone(),
                adapters: request.adapters.clone(),
                task: Task::Generate(Box::new(Generation {
                    sampler: Sampler::new(request.sampling, &request.prompt),
                    stops: Stops::new(request.stop.clone()),
                    text: tokenizer.map(TextStream::new),
                    request,
                    events,
                    outbox: Vec::new(),
                    tokenizer,
                    generated: 0,
                    queued,
                    admitted: Instant::now(),
                    first_logits: None,
                })),
            }),
        }
    }

    /// Whether the client has gone away.
    pub fn abandoned(&self) -> bool {
        match &self.task {
            Task::Generate(generation) => generation.events.is_closed(),
            Task::Score { reply, .. } => reply.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    /// Hands over what the client has room for; true when nothing is left behind.
    pub fn flush(&mut self) -> bool {
        match &mut self.task {
            Task::Generate(generation) => generation.flush(),
            Task::Score { .. } => true,
        }
    }

    /// True while the prompt is being fed.
    pub fn prefills(&self) -> bool {
        self.pending.len() > 1 || matches!(self.task, Task::Score { .. })
    }

    /// Which of the next `count` tokens' logits are wanted.
    pub fn wanted(&self, count: usize) -> std::ops::Range<usize> {
        match self.task {
            Task::Score { .. } => 0..count,
            Task::Generate(_) if count == self.pending.len() => count - 1..count,
            Task::Generate(_) => 0..0,
        }
    }

    /// Takes the logits `[wanted, vocab]` of the `count` tokens that were fed.
    pub fn advance(&mut self, count: usize, logits: &[f32], vocab: usize) -> Result<Fate> {
        let start = self.cache.len() - count;
        self.pending.drain(..count);
        match &mut self.task {
            Task::Score { tokens, scores, reply } => {
                for (at, row) in logits.chunks_exact(vocab).enumerate() {
                    if let Some(next) = tokens.get(start + at + 1) {
                        scores.push(Logprobs::new(row).of(*next));
                    }
                }
                if !self.pending.is_empty() {
                    return Ok(Fate::Goes);
                }
                if let Some(reply) = reply.take() {
                    // A caller that has left needs no answer.
                    let _ = reply.send(Ok(std::mem::take(scores)));
                }
                Ok(Fate::Ends)
            }
            Task::Generate(_) if logits.is_empty() => Ok(Fate::Goes),
            Task::Generate(generation) => {
                let full = self.cache.len() >= self.cache.capacity();
                let next = generation.take(logits, full)?;
                self.pending.extend(next);
                Ok(if next.is_some() { Fate::Goes } else { Fate::Ends })
            }
        }
    }

    /// Ends the request with an error.
    pub fn fail(self, error: crate::error::Error) {
        // A client that has left needs no answer.
        match self.task {
            Task::Generate(generation) => drop(generation.events.try_send(Err(error))),
            Task::Score { reply, .. } => drop(reply.map(|reply| reply.send(Err(error)))),
        }
    }
}

impl Generation<'_> {
    fn flush(&mut self) -> bool {
        while !self.outbox.is_empty() {
            match self.events.try_reserve() {
                Ok(permit) => permit.send(Ok(self.outbox.remove(0))),
                Err(TrySendError::Full(())) => return false,
                Err(TrySendError::Closed(())) => self.outbox.clear(),
            }
        }
        true
    }

    /// Chooses a token from one row of logits; None when it was the last. `full`: the cache has no room
    /// for another position.
    fn take(&mut self, logits: &[f32], full: bool) -> Result<Option<u32>> {
        let first = *self.first_logits.get_or_insert_with(Instant::now);
        let id = self.sampler.next(logits)?;
        if self.request.end.contains(&id) {
            self.end(Finish::Eos, first)?;
            return Ok(None);
        }
        self.generated += 1;
        let token = self.token(id, logits);
        let new_text = match &mut self.text {
            Some(stream) => stream.push(id)?,
            None => String::new(),
        };
        let (text, stopped) = match self.stops.push(&new_text) {
            Shown::Go(text) => (text, false),
            Shown::Stop(text) => (text, true),
        };
        self.outbox.push(Event::Tokens { tokens: vec![token], text });
        if stopped {
            self.done(Finish::Stop, String::new(), first);
            return Ok(None);
        }
        if full || self.generated >= self.request.max_tokens {
            self.end(Finish::Length, first)?;
            return Ok(None);
        }
        Ok(Some(id))
    }

    fn token(&self, id: u32, logits: &[f32]) -> Token {
        let name = |id| self.tokenizer.map_or_else(String::new, |t| t.token_text(id));
        if !self.request.logprobs {
            return Token { id, text: name(id), logprob: None, alternatives: Vec::new() };
        }
        let logprobs = Logprobs::new(logits);
        let top = logprobs.top(self.request.top_logprobs).into_iter();
        Token {
            id,
            text: name(id),
            logprob: Some(logprobs.of(id)),
            alternatives: top.map(|(id, logprob)| (id, name(id), logprob)).collect(),
        }
    }

    /// Ends with the text that is still open.
    fn end(&mut self, finish: Finish, first: Instant) -> Result<()> {
        let rest = match &mut self.text {
            Some(stream) => stream.finish()?,
            None => String::new(),
        };
        match self.stops.push(&rest) {
            Shown::Stop(text) => self.done(Finish::Stop, text, first),
            Shown::Go(text) => {
                let text = text + &self.stops.finish();
                self.done(finish, text, first);
            }
        }
        Ok(())
    }

    fn done(&mut self, finish: Finish, text: String, first: Instant) {
        self.outbox.push(Event::Done {
            finish,
            prompt_tokens: self.request.prompt.len(),
            generated_tokens: self.generated,
            queue_seconds: (self.admitted - self.queued).as_secs_f64(),
            prefill_seconds: (first - self.admitted).as_secs_f64(),
            decode_seconds: first.elapsed().as_secs_f64(),
            text,
        });
    }
}
