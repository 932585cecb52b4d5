//! One engine thread per loaded model: takes requests, batches their steps, streams tokens.
//!
//! Requests wait in a bounded queue, run in a bounded number of slots, and share every forward: a step
//! carries one token of each sequence that decodes and fills up with a piece of the prompts that still
//! prefill. A client that reads slowly skips steps; one that goes away frees its slot at the next step.

mod sequence;
mod stop;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::constraint::{Constraint, Vocabulary};
use super::sample::Sampling;
use crate::error::{Error, Reason, Result};
use crate::models::Model;
use crate::models::decoder::plan::{Arithmetic, Decoder};

/// Events a client may lag behind before its sequence skips steps.
const LAG: usize = 64;

/// Limits of an engine.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests that run at once.
    pub slots: usize,
    /// Requests that wait; more are refused with LIMIT_REACHED.
    pub queue: usize,
    /// Positions (prompt and answer) a request may use at most; the model's own limit if smaller.
    pub context: usize,
}

/// A generation request in tokens.
#[derive(Debug, Clone)]
pub struct Request {
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampling: Sampling,
    /// Tokens that end generation.
    pub end: Vec<u32>,
    pub stop: Vec<String>,
    pub logprobs: bool,
    pub top_logprobs: usize,
    /// What the answer must look like, made by the engine's own [`Engine::vocabulary`].
    pub constraint: Option<Constraint>,
}

/// What the engine says of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// New tokens and the text they complete.
    Tokens { tokens: Vec<Token>, text: String },
    /// The end.
    Done {
        finish: Finish,
        prompt_tokens: usize,
        generated_tokens: usize,
        queue_seconds: f64,
        prefill_seconds: f64,
        decode_seconds: f64,
        /// Text that was held back until the end.
        text: String,
    },
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub id: u32,
    pub text: String,
    /// Under the model itself, when asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens of its place: id, text, log-probability.
    pub alternatives: Vec<(u32, String, f32)>,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// An end token came; it is not part of the answer.
    Eos,
    /// A stop string came; the text ends before it.
    Stop,
    /// The limit of tokens or positions was reached.
    Length,
}

/// What waits for a slot.
enum Job {
    Generate { request: Request, events: mpsc::Sender<Result<Event>>, queued: Instant },
    Score { tokens: Vec<u32>, ask: Ask, queued: Instant, reply: oneshot::Sender<Result<Scores>> },
}

/// What is asked of a text that is given whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Logprobs,
    Logits,
    LastLogits,
}

/// What a text that was given whole gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// Log-probabilities `[tokens - 1]`, or logits `[rows, vocab]`.
    pub values: Vec<f32>,
    pub queue_seconds: f64,
}

/// What handles and the thread share.
struct Shared {
    model: Arc<Model>,
    /// Of the weights in memory.
    bytes: u64,
    limits: Limits,
    queue: Mutex<Queue>,
    wake: Condvar,
    running: AtomicUsize,
    failed: AtomicBool,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Job>,
    closed: bool,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A loaded model. Dropping the last handle ends the thread after what runs and waits.
#[derive(Clone)]
pub struct Engine(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    /// Made at the first request with a constraint.
    vocabulary: OnceLock<Result<Vocabulary>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_one();
    }
}

impl Engine {
    /// Packs the model's weights and serves it on a thread of its own.
    pub fn start(mut model: Model, limits: Limits) -> Result<Self> {
        let decoder = Decoder::with(&model, Arithmetic::Integer)?;
        let bytes = decoder.weight_bytes();
        // The decoder has what it needs of them; the rest would stay in memory twice.
        model.weights.clear();
        let context = limits.context.min(decoder.config().max_positions);
        let shared = Arc::new(Shared {
            model: Arc::new(model),
            bytes,
            limits: Limits { context, slots: limits.slots.max(1), ..limits },
            queue: Mutex::default(),
            wake: Condvar::new(),
            running: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        });
        let for_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || worker::run(&for_thread, decoder))?;
        Ok(Self(Arc::new(Handle { shared, vocabulary: OnceLock::new() })))
    }

    /// Queues a request. The receiver gets events, the last of them `Done`, or one error; dropping it
    /// frees the slot at the next step.
    ///
    /// # Errors
    /// LIMIT_REACHED for a full queue, INVALID_FIELD for an empty prompt, ids outside the vocabulary and
    /// prompts that leave no room for an answer, NOT_READY after the thread has failed.
    pub fn generate(&self, request: Request) -> Result<mpsc::Receiver<Result<Event>>> {
        self.check("prompt", &request.prompt, self.shared().limits.context.saturating_sub(1))?;
        let (events, receiver) = mpsc::channel(LAG);
        self.submit(Job::Generate { request, events, queued: Instant::now() })?;
        Ok(receiver)
    }

    /// Log-probabilities of `tokens[1..]` given what stands before each.
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub async fn score(&self, tokens: Vec<u32>) -> Result<Vec<f32>> {
        self.check("input", &tokens, self.shared().limits.context)?;
        self.ask(tokens, Ask::Logprobs).await.map(|scores| scores.values)
    }

    /// Logits `[tokens, vocab]`, or `[1, vocab]` after the last token alone. They take four bytes each
    /// until they are read: callers bound `tokens`.
    ///
    /// # Errors
    /// As [`Engine::generate`], the field being `input_ids`.
    pub async fn logits(&self, tokens: Vec<u32>, last_only: bool) -> Result<Scores> {
        self.check("input_ids", &tokens, self.shared().limits.context)?;
        self.ask(tokens, if last_only { Ask::LastLogits } else { Ask::Logits }).await
    }

    async fn ask(&self, tokens: Vec<u32>, ask: Ask) -> Result<Scores> {
        let (reply, answer) = oneshot::channel();
        self.submit(Job::Score { tokens, ask, queued: Instant::now(), reply })?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// The model without its weights.
    pub fn model(&self) -> &Arc<Model> {
        &self.shared().model
    }

    /// The model's tokens, for compiling constraints; the first call takes up to a second.
    ///
    /// # Errors
    /// MODEL_UNSUITABLE without a tokenizer, and what [`Vocabulary::new`] finds.
    pub fn vocabulary(&self) -> Result<&Vocabulary> {
        let model = &self.shared().model;
        let made = self.0.vocabulary.get_or_init(|| match model.tokenizer.as_deref() {
            Some(tokenizer) => Vocabulary::new(tokenizer, model.decoder()?.vocab),
            None => Err(Error::new(
                Reason::ModelUnsuitable,
                "the model has no tokenizer; leave out json_schema, regex and grammar, or import it \
                 with one",
            )),
        });
        made.as_ref().map_err(|e| Error::new(e.reason(), e.message()))
    }

    /// Requests running and waiting now.
    pub fn load(&self) -> (usize, usize) {
        let shared = self.shared();
        (shared.running.load(Ordering::Relaxed), shared.queue().waiting.len())
    }

    /// False once the thread has failed.
    pub fn healthy(&self) -> bool {
        !self.shared().failed.load(Ordering::Acquire)
    }

    /// Bytes the weights take in memory.
    pub fn resident_bytes(&self) -> u64 {
        self.shared().bytes
    }

    fn shared(&self) -> &Shared {
        &self.0.shared
    }

    fn check(&self, field: &str, tokens: &[u32], most: usize) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::field(field, "no tokens; give at least one"));
        }
        if tokens.len() > most {
            return Err(Error::field(
                field,
                format!(
                    "{} tokens do not fit, at most {most} do; shorten it or raise limits.context \
                     up to what the model takes",
                    tokens.len()
                ),
            ));
        }
        let vocab = self.shared().model.decoder()?.vocab;
        match tokens.iter().find(|id| **id as usize >= vocab) {
            Some(id) => {
                Err(Error::field(field, format!("id {id} is outside the vocabulary of {vocab}")))
            }
            None => Ok(()),
        }
    }

    fn submit(&self, job: Job) -> Result<()> {
        let shared = self.shared();
        let mut queue = shared.queue();
        // Under the lock: the thread sets the flag before it empties the queue for the last time.
        if shared.failed.load(Ordering::Acquire) {
            return Err(gone());
        }
        let idle = shared.limits.slots.saturating_sub(shared.running.load(Ordering::Relaxed));
        if queue.waiting.len() >= shared.limits.queue + idle {
            return Err(Error::new(
                Reason::LimitReached,
                format!(
                    "{} requests run and {} wait for this model; try again in a moment",
                    shared.running.load(Ordering::Relaxed),
                    queue.waiting.len()
                ),
            ));
        }
        queue.waiting.push_back(job);
        drop(queue);
        shared.wake.notify_one();
        Ok(())
    }
}

/// The error of requests that a failed engine leaves behind.
fn gone() -> Error {
    Error::new(
        Reason::NotReady,
        "the engine of this model has failed; unload the model and send the request again",
    )
}
