//! One thread per loaded encoder: takes requests, batches their texts, gives vectors.
//!
//! Requests wait in a bounded queue. Those at work take turns, a text each, until a step is full, so a
//! large request holds nobody up for longer than a step. One whose client has left is dropped at the next.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::engine::Limits;
use super::head::Head;
use crate::error::{Error, Reason, Result};
use crate::models::encoder::plan::adapters::Mix;
use crate::models::encoder::plan::{Encoder, Input, Precision, check_tokens, pool};
use crate::models::encoder::{Model, Pooling};

/// Requests whose texts share steps.
const ACTIVE: usize = 32;

/// Texts in tokens and what their vectors are to be like.
#[derive(Debug, Clone)]
pub struct Request {
    pub inputs: Vec<Vec<u32>>,
    /// As the model says where absent.
    pub pooling: Option<Pooling>,
    /// As the model says where absent.
    pub normalize: Option<bool>,
    /// Leading values that are kept, before normalisation; 0 keeps all.
    pub dimensions: usize,
    pub adapters: Mix,
    /// Makes scores of the states, which are the answer then: of the vector of a text as the model pools it,
    /// or of each token. Not normalised.
    pub head: Option<Arc<Head>>,
}

/// A text in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub truncated: bool,
}

/// A request in the queue or at work.
struct Job {
    request: Request,
    reply: oneshot::Sender<Result<Vec<Vec<f32>>>>,
    /// Vectors of the first inputs.
    done: Vec<Vec<f32>>,
}

struct Shared {
    model: Arc<Model>,
    /// Of the weights in memory.
    bytes: u64,
    /// Special tokens before and after every text.
    around: (Vec<u32>, Vec<u32>),
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

/// A loaded encoder. Dropping the last handle ends the thread after what runs and waits.
#[derive(Clone)]
pub struct Embedder(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.wake.notify_one();
    }
}

impl Embedder {
    /// Loads the model on a thread of its own. Of the limits, `queue` is the one that counts here.
    ///
    /// # Errors
    /// `MALFORMED_FILE` for tensors or a tokenizer that do not fit.
    pub fn start(mut model: Model, limits: Limits, precision: Precision) -> Result<Self> {
        let encoder = Encoder::with(&model, precision)?;
        let bytes = encoder.weight_bytes();
        let around = match &model.tokenizer {
            Some(tokenizer) => tokenizer.around()?,
            None => Default::default(),
        };
        // The encoder has what it needs of them; the rest would stay in memory twice.
        model.weights.clear();
        let shared = Arc::new(Shared {
            model: Arc::new(model),
            bytes,
            around,
            limits,
            queue: Mutex::default(),
            wake: Condvar::new(),
            running: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        });
        let for_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("embedder".to_owned())
            .spawn(move || run(&for_thread, encoder))?;
        Ok(Self(Arc::new(Handle { shared })))
    }

    /// The tokens of a text, between the special tokens that the tokenizer puts round every text. A text
    /// longer than the model takes is cut, or refused where `truncate` is false. Long texts take a while.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` without a tokenizer, `INVALID_FIELD` (of `text`) for texts that are too long.
    pub fn encode(&self, text: &str, truncate: bool) -> Result<Encoded> {
        let Shared { model, around: (before, after), .. } = self.shared();
        let tokenizer = model.tokenizer.as_deref().ok_or_else(|| {
            Error::new(
                Reason::ModelUnsuitable,
                "the model has no tokenizer; send token ids, or import it with one",
            )
        })?;
        let lower = model.family.lowercase.then(|| text.to_lowercase());
        // Whoever joins parts of a text by special tokens means them.
        let mut ids = tokenizer.encode(lower.as_deref().unwrap_or(text), false, true)?;
        let most = model.family.max_tokens;
        let room = most.saturating_sub(before.len() + after.len());
        let truncated = ids.len() > room;
        if truncated && !truncate {
            return Err(Error::field(
                "text",
                format!(
                    "{} tokens are more than the {most} that the model takes; shorten the text or let \
                     it be truncated",
                    ids.len() + before.len() + after.len()
                ),
            ));
        }
        ids.truncate(room);
        ids.splice(0..0, before.iter().copied());
        ids.extend(after);
        Ok(Encoded { ids, truncated })
    }

    /// One vector for each input, in order. Dropping the future drops the request at the next step.
    ///
    /// # Errors
    /// LIMIT_REACHED for a full queue, INVALID_FIELD for inputs that the model cannot take (named
    /// `inputs[i]`) and too many dimensions, NON_FINITE, NOT_READY after the thread has failed.
    pub async fn embed(&self, request: Request) -> Result<Vec<Vec<f32>>> {
        let shared = self.shared();
        let config = &shared.model.family;
        for (i, ids) in request.inputs.iter().enumerate() {
            check_tokens(config, ids).map_err(|e| e.within(&format!("inputs[{i}]")))?;
        }
        if request.dimensions > config.hidden {
            return Err(Error::field(
                "dimensions",
                format!("the vectors of this model have {} values", config.hidden),
            ));
        }
        request.adapters.check(config)?;
        if request.inputs.is_empty() {
            return Ok(Vec::new());
        }
        let (reply, answer) = oneshot::channel();
        self.submit(Job { request, reply, done: Vec::new() })?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// The model without its weights.
    pub fn model(&self) -> &Arc<Model> {
        &self.shared().model
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

    fn submit(&self, job: Job) -> Result<()> {
        let shared = self.shared();
        let mut queue = shared.queue();
        // Under the lock: the thread sets the flag before it empties the queue for the last time.
        if shared.failed.load(Ordering::Acquire) {
            return Err(gone());
        }
        let running = shared.running.load(Ordering::Relaxed);
        let most = shared.limits.queue + ACTIVE.saturating_sub(running);
        if queue.waiting.len() >= most {
            // Those whose clients have left take no place.
            queue.waiting.retain(|job| !job.reply.is_closed());
        }
        if queue.waiting.len() >= most {
            return Err(Error::new(
                Reason::LimitReached,
                format!(
                    "{running} requests run and {} wait for this model; try again in a moment",
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

/// The error of requests that a failed thread leaves behind.
fn gone() -> Error {
    Error::new(
        Reason::NotReady,
        "the thread of this model has failed; unload the model and send the request again",
    )
}

/// Runs until all handles are gone and all work is done, or until a defect ends it.
fn run(shared: &Shared, encoder: Encoder) {
    if catch_unwind(AssertUnwindSafe(|| serve(shared, encoder))).is_err() {
        tracing::error!("the thread of an encoder failed; the model must be loaded again");
        let mut queue = shared.queue();
        shared.failed.store(true, Ordering::Release);
        shared.running.store(0, Ordering::Relaxed);
        let left = std::mem::take(&mut queue.waiting);
        drop(queue);
        for job in left {
            job.answer(Err(gone()));
        }
    }
}

fn serve(shared: &Shared, mut encoder: Encoder) {
    let config = &shared.model.family;
    let mut active: Vec<Job> = Vec::new();
    while admit(shared, &mut active) {
        let picked = pick(&active, encoder.step_rows());
        let inputs: Vec<Input<'_>> = picked
            .iter()
            .map(|&(job, input)| {
                let request = &active[job].request;
                let pooling = request.pooling.unwrap_or(config.pooling);
                Input { tokens: &request.inputs[input], pooling }
            })
            .collect();
        let adapters: Vec<Mix> =
            picked.iter().map(|&(job, _)| active[job].request.adapters.clone()).collect();
        let mut vectors: Vec<Vec<f32>> = vec![Vec::new(); inputs.len()];
        let outcome = encoder.run(&inputs, &adapters, &mut |i, states| {
            let vector = || {
                let mut vector = vec![0.0; config.hidden];
                pool(inputs[i].pooling, states, &mut vector);
                vector
            };
            vectors[i] = match &active[picked[i].0].request.head {
                None => vector(),
                Some(head) if head.of_tokens() => head.scores(states),
                Some(head) => head.scores(&vector()),
            };
        });
        drop(inputs);
        let mut failures: Vec<Option<Error>> = active.iter().map(|_| None).collect();
        for (&(job, _), vector) in picked.iter().zip(vectors) {
            let (job, failure) = (&mut active[job], &mut failures[job]);
            let result = match &outcome {
                Ok(()) => finish(vector, &job.request, config.normalize),
                Err(error) => Err(Error::new(error.reason(), error.message())),
            };
            match result {
                Ok(vector) => job.done.push(vector),
                Err(error) => *failure = Some(error),
            }
        }
        for at in (0..active.len()).rev() {
            if let Some(error) = failures[at].take() {
                active.remove(at).answer(Err(error));
            } else if active[at].done.len() == active[at].request.inputs.len() {
                let mut job = active.remove(at);
                let done = std::mem::take(&mut job.done);
                job.answer(Ok(done));
            }
        }
    }
}

impl Job {
    fn answer(self, result: Result<Vec<Vec<f32>>>) {
        // A client that has left needs no answer.
        let _ = self.reply.send(result);
    }
}

/// Drops what nobody waits for, takes in what waits; sleeps while there is nothing to do. False at the
/// end of all work.
fn admit(shared: &Shared, active: &mut Vec<Job>) -> bool {
    let mut queue = shared.queue();
    loop {
        active.retain(|job| !job.reply.is_closed());
        while active.len() < ACTIVE {
            let Some(job) = queue.waiting.pop_front() else { break };
            if !job.reply.is_closed() {
                active.push(job);
            }
        }
        shared.running.store(active.len(), Ordering::Relaxed);
        if !active.is_empty() {
            return true;
        }
        if queue.closed {
            return false;
        }
        queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Texts of the next step as (job, input): each job gives one in turn until the rows are used up.
fn pick(active: &[Job], rows: usize) -> Vec<(usize, usize)> {
    let mut picked = Vec::new();
    let mut next: Vec<usize> = active.iter().map(|job| job.done.len()).collect();
    let mut left = rows;
    loop {
        let before = picked.len();
        for (at, (job, next)) in active.iter().zip(&mut next).enumerate() {
            let Some(input) = job.request.inputs.get(*next) else { continue };
            if input.len() > left && !picked.is_empty() {
                return picked;
            }
            picked.push((at, *next));
            left = left.saturating_sub(input.len());
            *next += 1;
        }
        if picked.len() == before {
            return picked;
        }
    }
}

/// What a request makes of a pooled vector.
fn finish(mut out: Vec<f32>, request: &Request, normalize: bool) -> Result<Vec<f32>> {
    if request.dimensions > 0 {
        out.truncate(request.dimensions);
    }
    if out.iter().any(|v| !v.is_finite()) {
        return Err(Error::new(
            Reason::NonFinite,
            "a vector has values that are not finite; the model is damaged",
        ));
    }
    if request.head.is_none() && request.normalize.unwrap_or(normalize) {
        let length = out.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        // What is all zeros has no direction.
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        out.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::tokenizer::testing;
    use crate::models::decoder::plan::CacheFormat;
    use crate::models::encoder::random;

    const LIMITS: Limits = Limits {
        slots: 1,
        queue: 2,
        context: 64,
        kv_bytes: 1 << 20,
        kv_format: CacheFormat::F32,
        prefix_cache: false,
    };

    fn model() -> Model {
        let mut config = random::tiny();
        config["sentence_transformers"] = json!({ "pooling": "cls", "max_seq_length": 8 });
        let mut model = random::model(config, 5).unwrap();
        model.tokenizer = Some(Arc::new(testing::word_pieces()));
        model
    }

    fn embedder(limits: Limits) -> Embedder {
        Embedder::start(model(), limits, Precision::F32).unwrap()
    }

    fn request(inputs: Vec<Vec<u32>>) -> Request {
        Request {
            inputs,
            pooling: None,
            normalize: None,
            dimensions: 0,
            adapters: Mix::default(),
            head: None,
        }
    }

    fn direct(tokens: &[u32], pooling: Pooling) -> Vec<f32> {
        let mut out = vec![0.0; 32];
        let mut encoder = Encoder::new(&model()).unwrap();
        encoder.embed(&[Input { tokens, pooling }], &mut out).unwrap();
        out
    }

    fn close(a: &[f32], b: &[f32]) {
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6), "{a:?} {b:?}");
    }

    #[tokio::test]
    async fn requests_in_one_batch_get_their_own_vectors_in_order() {
        let embedder = embedder(Limits { queue: 100, ..LIMITS });
        let requests = (0..20_u32).map(|i| {
            // Up to 60 texts of up to 60 tokens: several steps.
            let inputs = (0..1 + (i * 13) % 60).map(|t| (0..1 + (t * 7) % 60).collect()).collect();
            let embedder = &embedder;
            async move { (embedder.embed(request(inputs)).await.unwrap(), i) }
        });
        for (vectors, i) in futures::future::join_all(requests).await {
            assert_eq!(vectors.len(), 1 + (i as usize * 13) % 60);
            for (t, vector) in (0..).zip(&vectors).step_by(7) {
                let ids: Vec<u32> = (0..1 + (t * 7) % 60).collect();
                close(vector, &direct(&ids, Pooling::Cls));
            }
        }
        // The thread counts once more before it sleeps.
        while embedder.load() != (0, 0) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn options_win_over_the_model() {
        let embedder = embedder(LIMITS);
        let ids = vec![3, 1, 4, 1, 5];
        let plain = direct(&ids, Pooling::Max);
        let asked = Request { pooling: Some(Pooling::Max), ..request(vec![ids.clone()]) };
        close(&embedder.embed(asked.clone()).await.unwrap()[0], &plain);
        // Cut first, then scaled: three values of length 1 in the same direction.
        let asked = Request { normalize: Some(true), dimensions: 3, ..asked };
        let got = embedder.embed(asked).await.unwrap().remove(0);
        let length = plain[..3].iter().map(|v| v * v).sum::<f32>().sqrt();
        close(&got, &plain[..3].iter().map(|v| v / length).collect::<Vec<_>>());
        let wide = Request { dimensions: 33, ..request(vec![ids]) };
        let error = embedder.embed(wide).await.unwrap_err();
        assert_eq!(error.violations()[0].field, "dimensions");
    }

    #[tokio::test]
    async fn bad_inputs_are_named_and_run_nothing() {
        let embedder = embedder(LIMITS);
        let error = embedder.embed(request(vec![vec![1], vec![96]])).await.unwrap_err();
        assert_eq!(error.violations()[0].field, "inputs[1].ids");
        let error = embedder.embed(request(vec![vec![]])).await.unwrap_err();
        assert_eq!(error.violations()[0].field, "inputs[0].ids");
        assert!(embedder.embed(request(Vec::new())).await.unwrap().is_empty());
    }

    #[test]
    fn texts_are_cut_between_the_special_tokens() {
        let embedder = embedder(LIMITS);
        // Ids of the testing vocabulary: [CLS] 2, [SEP] 3, a 5.
        let short = embedder.encode("a a", false).unwrap();
        assert_eq!(short, Encoded { ids: vec![2, 5, 5, 3], truncated: false });
        let exact = embedder.encode("a a a a a a", false).unwrap();
        assert_eq!((exact.ids.len(), exact.truncated), (8, false));
        let cut = embedder.encode("a a a a a a a", true).unwrap();
        assert_eq!(cut, Encoded { ids: vec![2, 5, 5, 5, 5, 5, 5, 3], truncated: true });
        let error = embedder.encode("a a a a a a a", false).unwrap_err();
        assert!(error.message().contains("9 tokens"), "{error}");
        assert_eq!(embedder.encode("", true).unwrap().ids, [2, 3]);
    }

    #[test]
    fn turns_are_fair_and_steps_bounded() {
        let job = |lengths: &[usize], done: usize| Job {
            request: request(lengths.iter().map(|n| vec![0; *n]).collect()),
            reply: oneshot::channel().0,
            done: vec![Vec::new(); done],
        };
        let active = [job(&[4, 4, 4], 1), job(&[1], 0), job(&[9], 1)];
        // One each, then what is left of the first; the third has nothing left.
        assert_eq!(pick(&active, 100), [(0, 1), (1, 0), (0, 2)]);
        assert_eq!(pick(&active, 5), [(0, 1), (1, 0)]);
        // A text longer than a step runs alone.
        assert_eq!(pick(&active, 2), [(0, 1)]);
        assert!(pick(&[], 5).is_empty());
    }

    #[tokio::test]
    async fn a_full_queue_refuses_and_leavers_make_room() {
        let embedder = embedder(LIMITS);
        let long = || request(vec![vec![1; 64]; 4000]);
        // More at once than run and wait together.
        let mut asked: Vec<_> =
            (0..ACTIVE + 40).map(|_| Box::pin(embedder.embed(long()))).collect();
        let mut refused = 0;
        asked.retain_mut(|future| match futures::FutureExt::now_or_never(future.as_mut()) {
            None => true,
            Some(result) => {
                assert_eq!(result.unwrap_err().reason(), Reason::LimitReached);
                refused += 1;
                false
            }
        });
        assert!(refused > 0 && asked.len() >= ACTIVE, "{refused} {}", asked.len());
        // Everybody leaves: a new request is taken and answered long before the old ones would be done.
        asked.clear();
        let answer = embedder.embed(request(vec![vec![7, 8]])).await.unwrap();
        close(&answer[0], &direct(&[7, 8], Pooling::Cls));
        assert!(embedder.healthy() && embedder.resident_bytes() > 0);
    }
}
