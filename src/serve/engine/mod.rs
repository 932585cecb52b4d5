//! One engine thread per loaded model: takes requests, batches their steps, streams tokens.
//!
//! Requests wait in a bounded queue, clients taking turns, run in a bounded number of slots, and share
//! every forward: a step carries one token of each sequence that decodes and fills up with pieces of the
//! prompts that still prefill. A client that reads slowly skips steps; one that goes away frees its slot
//! at the next step.
//!
//! Keys and values live in pages of a pool with a budget. A request is admitted when the pages it may
//! come to need fit beside those that running ones may; what prompts have in common is computed once.

mod prefix;
mod queue;
mod sequence;
mod share;
mod stop;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use self::queue::{Job, Queue};
use super::constraint::{Constraint, Vocabulary};
use super::sample::Sampling;
use crate::error::{Error, Reason, Result};
use crate::models::Model;
use crate::models::decoder::plan::adapters::Mix;
use crate::models::decoder::plan::{Arithmetic, CacheFormat, Decoder, PAGE, PagePool};

/// Events a client may lag behind before its sequence skips steps.
const LAG: usize = 64;

/// Shortest and longest time after which a refused client is told to try again.
const RETRY: [f64; 2] = [0.1, 30.0];
/// Weight of the newest request in the running mean of what requests take.
const NEWEST: f64 = 0.2;

/// Limits of an engine.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests that run at once.
    pub slots: usize,
    /// Requests that wait; more are refused with LIMIT_REACHED.
    pub queue: usize,
    /// Positions (prompt and answer) a request may use at most; the model's own limit if smaller.
    pub context: usize,
    /// Bytes of all pages of keys and values, of requests that run and of prompts that are kept.
    pub kv_bytes: u64,
    pub kv_format: CacheFormat,
    /// Whether a prompt's beginning that is still known is not computed again.
    pub prefix_cache: bool,
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
    /// Who asks: waiting requests of different clients take turns.
    pub client: u64,
    /// Adapters of the request; they must fit the model. Only requests with the same ones share what their
    /// prompts begin with.
    pub adapters: Mix,
    /// When the answer is of no use any more: then the request ends with DEADLINE_EXCEEDED.
    pub deadline: Option<Instant>,
}

impl Request {
    /// Positions that the request takes at most.
    fn positions(&self, context: usize) -> usize {
        self.prompt.len().saturating_add(self.max_tokens).min(context)
    }
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
        /// Those of them whose keys and values were known.
        cached_prompt_tokens: usize,
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

/// Pages of keys and values of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// In use, by running requests or kept for prompts to come.
    pub live: usize,
    /// Those that are kept under the tokens they were made for; running requests may use them too.
    pub kept: usize,
    /// Most that may be in use.
    pub budget: usize,
    /// Bytes of each.
    pub bytes: usize,
}

/// What handles and the thread share.
struct Shared {
    model: Arc<Model>,
    /// Of the weights in memory.
    bytes: u64,
    limits: Limits,
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Jobs that were ever queued: the thread takes the lock only when this has changed.
    arrivals: AtomicU64,
    running: AtomicUsize,
    failed: AtomicBool,
    pool: PagePool,
    /// Pages in the tree of prefixes.
    kept: AtomicUsize,
    /// Bits of the mean seconds that requests lately took in their slots; 0 before the first.
    pace: AtomicU64,
}

impl Shared {
    /// For a model whose weights take `bytes` where they are used.
    fn new(model: Model, bytes: u64, limits: Limits) -> Result<Self> {
        let config = model.decoder()?;
        let context = limits.context.min(config.max_positions);
        let pool = PagePool::new(config, limits.kv_format, limits.kv_bytes);
        Ok(Self {
            model: Arc::new(model),
            bytes,
            limits: Limits { context, slots: limits.slots.max(1), ..limits },
            queue: Mutex::default(),
            wake: Condvar::new(),
            arrivals: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            pool,
            kept: AtomicUsize::new(0),
            pace: AtomicU64::new(0),
        })
    }

    /// Notes how long a request held its slot.
    fn took(&self, seconds: f64) {
        // Only the thread writes.
        let mean = f64::from_bits(self.pace.load(Ordering::Relaxed));
        let mean = if mean == 0.0 { seconds } else { mean + NEWEST * (seconds - mean) };
        self.pace.store(mean.to_bits(), Ordering::Relaxed);
    }

    /// When the queue should have room again: what waits now, at the pace of late.
    fn retry_after(&self, waiting: usize) -> Duration {
        let pace = match f64::from_bits(self.pace.load(Ordering::Relaxed)) {
            0.0 => 1.0,
            pace => pace,
        };
        let seconds = waiting.max(1) as f64 * pace / self.limits.slots as f64;
        Duration::from_secs_f64(seconds.clamp(RETRY[0], RETRY[1]))
    }

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
        // The decoder has what it needs of them; the rest would stay in memory twice.
        model.weights.clear();
        let shared = Arc::new(Shared::new(model, decoder.weight_bytes(), limits)?);
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
    /// LIMIT_REACHED for a full queue (with the time after which to try again), INVALID_FIELD for an
    /// empty prompt, ids outside the vocabulary and prompts that leave no room for an answer, TOO_LARGE
    /// for what the budget of keys and values could never hold, MODEL_UNSUITABLE for adapters of another
    /// model, NOT_READY after the thread has failed.
    pub fn generate(&self, request: Request) -> Result<mpsc::Receiver<Result<Event>>> {
        let context = self.shared().limits.context;
        self.check("prompt", &request.prompt, context.saturating_sub(1))?;
        self.check_pages("max_tokens", request.positions(context))?;
        request.adapters.check(self.shared().model.decoder()?)?;
        let (events, receiver) = mpsc::channel(LAG);
        self.submit(Job::Generate { request, events, queued: Instant::now() })?;
        Ok(receiver)
    }

    /// Log-probabilities of `tokens[1..]` given what stands before each, under the model with adapters.
    /// `client` and `deadline` are those of [`Request`].
    ///
    /// # Errors
    /// As [`Engine::generate`].
    pub async fn score(
        &self,
        tokens: Vec<u32>,
        adapters: Mix,
        client: u64,
        deadline: Option<Instant>,
    ) -> Result<Vec<f32>> {
        let scores = self.ask("input", tokens, Ask::Logprobs, adapters, client, deadline).await?;
        Ok(scores.values)
    }

    /// Logits `[tokens, vocab]`, or `[1, vocab]` after the last token alone. They take four bytes each
    /// until they are read: callers bound `tokens`.
    ///
    /// # Errors
    /// As [`Engine::generate`], the field being `input_ids`.
    pub async fn logits(
        &self,
        tokens: Vec<u32>,
        last_only: bool,
        client: u64,
        deadline: Option<Instant>,
    ) -> Result<Scores> {
        let ask = if last_only { Ask::LastLogits } else { Ask::Logits };
        self.ask("input_ids", tokens, ask, Mix::default(), client, deadline).await
    }

    async fn ask(
        &self,
        field: &str,
        tokens: Vec<u32>,
        ask: Ask,
        adapters: Mix,
        client: u64,
        deadline: Option<Instant>,
    ) -> Result<Scores> {
        self.check(field, &tokens, self.shared().limits.context)?;
        adapters.check(self.shared().model.decoder()?)?;
        self.check_pages(field, tokens.len())?;
        let (reply, answer) = oneshot::channel();
        let (reply, queued) = (Some(reply), Instant::now());
        self.submit(Job::Score { tokens, ask, adapters, client, deadline, queued, reply })?;
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
        (shared.running.load(Ordering::Relaxed), shared.queue().len())
    }

    /// False once the thread has failed.
    pub fn healthy(&self) -> bool {
        !self.shared().failed.load(Ordering::Acquire)
    }

    /// Bytes the weights take in memory.
    pub fn resident_bytes(&self) -> u64 {
        self.shared().bytes
    }

    /// Pages of keys and values now.
    pub fn pages(&self) -> Pages {
        let Shared { pool, kept, .. } = self.shared();
        Pages {
            live: pool.live(),
            kept: kept.load(Ordering::Acquire),
            budget: pool.budget(),
            bytes: pool.page_bytes(),
        }
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

    /// Refuses what would not fit if it ran alone.
    fn check_pages(&self, field: &str, positions: usize) -> Result<()> {
        let pool = &self.shared().pool;
        let pages = positions.div_ceil(PAGE);
        if pages <= pool.budget() {
            return Ok(());
        }
        Err(Error::at(
            Reason::TooLarge,
            field,
            format!(
                "{positions} tokens of prompt and answer may take {} bytes of keys and values, more \
                 than limits.kv_bytes allows ({}); ask for less or raise it",
                pages.saturating_mul(pool.page_bytes()),
                self.shared().limits.kv_bytes
            ),
        ))
    }

    fn submit(&self, job: Job) -> Result<()> {
        self.shared().submit(job)
    }
}

impl Shared {
    fn submit(&self, job: Job) -> Result<()> {
        let mut queue = self.queue();
        // Under the lock: the thread sets the flag before it empties the queue for the last time.
        if self.failed.load(Ordering::Acquire) {
            return Err(gone());
        }
        let running = self.running.load(Ordering::Relaxed);
        let room = self.limits.queue + self.limits.slots.saturating_sub(running);
        if queue.len() >= room {
            // Those whose clients have left make room.
            queue.sweep(Instant::now());
        }
        if queue.len() >= room {
            let message = format!(
                "{running} requests run and {} wait for this model; try again in a moment",
                queue.len()
            );
            let after = self.retry_after(queue.len());
            return Err(Error::new(Reason::LimitReached, message).with_retry_after(after));
        }
        queue.push(job);
        self.arrivals.fetch_add(1, Ordering::Release);
        drop(queue);
        self.wake.notify_one();
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
