//! A request in a slot: what it still has to feed, what it has said, where its answer goes.

use std::time::Instant;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use super::prefix::{NodeId, Prefixes};
use super::queue::Job;
use super::stop::{Shown, Stops};
use super::{Ask, Event, Finish, Request, Scores, Token};
use crate::data::tokenizer::{TextStream, Tokenizer};
use crate::error::{Error, Result};
use crate::models::decoder::plan::adapters::Mix;
use crate::models::decoder::plan::{Cache, PAGE, PagePool};
use crate::serve::sample::{Logprobs, Sampler};

/// Tokens of an answer that room is made for at once.
const LISTED: usize = 1 << 16;

/// A sequence at work.
pub struct Sequence<'a> {
    pub cache: Cache,
    /// The prompt and what was generated; those behind the cache's length are still to be fed.
    pub tokens: Vec<u32>,
    pub admitted: Instant,
    pub deadline: Option<Instant>,
    pub beginning: Beginning,
    /// Applied to all its tokens.
    pub adapters: Mix,
    task: Task<'a>,
}

/// What a sequence has in common with the tree of prefixes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Beginning {
    namespace: u64,
    /// Whether its pages enter the tree.
    shared: bool,
    /// Pages of the cache that the tree has too.
    pub pages: usize,
    /// The node of the last of them.
    last: Option<NodeId>,
}

enum Task<'a> {
    Generate(Box<Generation<'a>>),
    Score { ask: Ask, scores: Scores, reply: Option<oneshot::Sender<Result<Scores>>> },
}

/// What a sequence asks of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Nothing,
    /// The next token of an answer.
    Token,
    /// Up to so many tokens of a prompt.
    Prompt(usize),
    /// The same, with the logits of each.
    Scores(usize),
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
    /// Why it ended before its time; told after what is in the outbox.
    failure: Option<Error>,
    generated: usize,
    /// Tokens of the prompt that were not computed again.
    cached: usize,
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
    /// Puts a job into a slot. `path` are the nodes of `tree` whose pages its prompt begins with.
    pub fn new(
        job: Job,
        pool: &PagePool,
        context: usize,
        tokenizer: Option<&'a Tokenizer>,
        tree: Option<&mut Prefixes>,
        path: &[NodeId],
    ) -> Self {
        let mut cache = Cache::in_pool(pool, job.positions(context));
        let admitted = Instant::now();
        let deadline = job.deadline();
        match job {
            Job::Score { tokens, ask, adapters, queued, reply, .. } => {
                let queue_seconds = (admitted - queued).as_secs_f64();
                let scores = Scores { values: Vec::new(), queue_seconds };
                let task = Task::Score { ask, scores, reply };
                let beginning = Beginning::default();
                Self { cache, tokens, admitted, deadline, beginning, adapters, task }
            }
            Job::Generate { request, events, queued } => {
                let mut beginning =
                    Beginning { namespace: request.adapters.namespace(), ..Beginning::default() };
                if let Some(tree) = tree {
                    path.iter().for_each(|id| tree.hold(*id));
                    cache.attach(path.iter().map(|id| tree.page(*id).clone()));
                    beginning.shared = true;
                    beginning.pages = path.len();
                    beginning.last = path.last().copied();
                }
                // The room at once, so that no step allocates for it; beyond that the list grows.
                let room = cache.capacity().min(request.prompt.len() + LISTED);
                let mut tokens = Vec::with_capacity(room.max(request.prompt.len()) + 1);
                tokens.extend_from_slice(&request.prompt);
                let adapters = request.adapters.clone();
                let generation = Generation {
                    sampler: Sampler::new(request.sampling, &request.prompt),
                    stops: Stops::new(request.stop.clone()),
                    text: tokenizer.map(|tokenizer| {
                        let stream = TextStream::new(tokenizer);
                        // A constraint counts every byte.
                        if request.constraint.is_some() { stream.continuing() } else { stream }
                    }),
                    request,
                    events,
                    outbox: Vec::new(),
                    tokenizer,
                    failure: None,
                    generated: 0,
                    cached: cache.len(),
                    queued,
                    admitted,
                    first_logits: None,
                };
                let task = Task::Generate(Box::new(generation));
                Self { cache, tokens, admitted, deadline, beginning, adapters, task }
            }
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

    /// What the next step should do for the sequence.
    pub fn need(&self) -> Need {
        let pending = self.tokens.len() - self.cache.len();
        match self.task {
            Task::Score { ask: Ask::LastLogits, .. } => Need::Prompt(pending),
            Task::Score { .. } => Need::Scores(pending),
            Task::Generate(_) if pending == 1 => Need::Token,
            Task::Generate(_) => Need::Prompt(pending),
        }
    }

    /// Which of the next `count` tokens' logits are wanted.
    pub fn wanted(&self, count: usize) -> std::ops::Range<usize> {
        match self.task {
            Task::Score { ask: Ask::Logprobs | Ask::Logits, .. } => 0..count,
            _ if self.cache.len() + count == self.tokens.len() => count - 1..count,
            _ => 0..0,
        }
    }

    /// How many rows of logits the `count` tokens that were just fed have given.
    pub fn gave(&self, count: usize) -> usize {
        match self.task {
            Task::Score { ask: Ask::Logprobs | Ask::Logits, .. } => count,
            _ => usize::from(self.cache.len() == self.tokens.len()),
        }
    }

    /// Takes the logits `[wanted, vocab]` of the `count` tokens that were fed.
    pub fn advance(&mut self, count: usize, logits: &[f32], vocab: usize) -> Result<Fate> {
        match &mut self.task {
            Task::Score { ask, scores, reply } => {
                if *ask == Ask::Logprobs {
                    let start = self.cache.len() - count;
                    for (at, row) in logits.chunks_exact(vocab).enumerate() {
                        if let Some(next) = self.tokens.get(start + at + 1) {
                            scores.values.push(Logprobs::new(row).of(*next));
                        }
                    }
                } else {
                    scores.values.extend_from_slice(logits);
                }
                if self.cache.len() < self.tokens.len() {
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
                self.tokens.extend(next);
                Ok(if next.is_some() { Fate::Goes } else { Fate::Ends })
            }
        }
    }

    /// Pages that the sequence may still take before its end.
    pub fn pages_to_come(&self) -> usize {
        self.cache.capacity().div_ceil(PAGE).saturating_sub(self.cache.pages().len())
    }

    /// Gives pages that have become full to the tree. Where the tree knows the tokens already, its page
    /// takes the place of the sequence's own, which is free then.
    pub fn share(&mut self, tree: &mut Prefixes) {
        let Self { cache, tokens, beginning, .. } = self;
        while beginning.shared && beginning.pages < cache.full_pages() {
            let at = beginning.pages;
            let text = &tokens[at * PAGE..(at + 1) * PAGE];
            let id = tree.enter(beginning.namespace, beginning.last, text, &cache.pages()[at]);
            cache.replace(at, tree.page(id));
            beginning.last = Some(id);
            beginning.pages += 1;
        }
    }

    /// Lets go of all pages.
    pub fn release(&mut self, tree: &mut Prefixes) {
        tree.release(self.beginning.last.take());
        self.beginning.pages = 0;
        self.cache.truncate(0);
    }

    /// Ends the request with an error, which [`Sequence::flush`] hands over.
    pub fn fail(&mut self, error: Error) {
        match &mut self.task {
            Task::Generate(generation) => generation.failure = Some(error),
            // A client that has left needs no answer.
            Task::Score { reply, .. } => drop(reply.take().map(|reply| reply.send(Err(error)))),
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
        let Some(failure) = self.failure.take() else { return true };
        match self.events.try_reserve() {
            Ok(permit) => permit.send(Err(failure)),
            Err(TrySendError::Full(())) => {
                self.failure = Some(failure);
                return false;
            }
            Err(TrySendError::Closed(())) => {}
        }
        true
    }

    /// Chooses a token from one row of logits; None when it was the last. `full`: the cache has no room
    /// for another position.
    fn take(&mut self, logits: &[f32], full: bool) -> Result<Option<u32>> {
        let first = *self.first_logits.get_or_insert_with(Instant::now);
        let id = match &mut self.request.constraint {
            Some(constraint) => self.sampler.next_allowed(logits, constraint.allowed()?)?,
            None => self.sampler.next(logits)?,
        };
        if self.request.end.contains(&id) {
            self.end(Finish::Eos, first)?;
            return Ok(None);
        }
        let complete = match &mut self.request.constraint {
            Some(constraint) => constraint.advance(id)?,
            None => false,
        };
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
        if complete {
            self.end(Finish::Eos, first)?;
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
            cached_prompt_tokens: self.cached,
            generated_tokens: self.generated,
            queue_seconds: (self.admitted - self.queued).as_secs_f64(),
            prefill_seconds: (first - self.admitted).as_secs_f64(),
            decode_seconds: first.elapsed().as_secs_f64(),
            text,
        });
    }
}
