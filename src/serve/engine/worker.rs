//! The engine thread: admits, batches, runs, hands out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::prefix::{NodeId, Prefixes};
use super::queue::{Job, Queue, expired};
use super::sequence::{Fate, Need, Sequence};
use super::share::Shares;
use super::{Shared, gone};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::kernels::threads;
use crate::models::decoder::plan::adapters::Mix;
use crate::models::decoder::plan::{Chunk, Decoder, PAGE};

/// How often the thread looks again whether slow clients have made room.
const LOOK: Duration = Duration::from_millis(2);

/// Runs until all handles are gone and all work is done, or until a defect ends it.
pub fn run(shared: &Shared, decoder: Decoder) {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut worker = Worker::new(shared, decoder);
        while worker.turn() {}
    }));
    if outcome.is_err() {
        tracing::error!("the engine thread failed; the model must be loaded again");
        let mut queue = shared.queue();
        shared.failed.store(true, Ordering::Release);
        shared.running.store(0, Ordering::Relaxed);
        let left = std::mem::take(&mut *queue);
        drop(queue);
        fail_all(left);
    }
}

fn fail_all(mut queue: Queue) {
    while let Some(mut job) = queue.pop() {
        job.fail(gone());
    }
}

/// What the thread works with. Its lists are kept between steps, so that a step without news neither
/// allocates nor locks; only the events that it hands out are made anew.
pub struct Worker<'a> {
    shared: &'a Shared,
    decoder: Decoder,
    tokenizer: Option<&'a Tokenizer>,
    tree: Prefixes,
    /// Sequences that go on, and answers that are complete but not yet taken.
    active: Vec<Sequence<'a>>,
    leaving: Vec<Sequence<'a>>,
    /// Which of the active ones have handed over all they said.
    ready: Vec<bool>,
    shares: Shares,
    fates: Vec<Result<Fate>>,
    /// Empty between steps: only its memory is kept.
    chunks: Vec<Chunk<'static>>,
    /// The adapters of each chunk.
    mixes: Vec<Mix>,
    path: Vec<NodeId>,
    /// Arrivals at the last look into the queue, whether something was left there, and the first
    /// deadline of that.
    seen: u64,
    waiting: bool,
    next_deadline: Option<Instant>,
    /// A slot or pages have become free since then.
    vacated: bool,
}

impl<'a> Worker<'a> {
    pub fn new(shared: &'a Shared, decoder: Decoder) -> Self {
        Self {
            shared,
            decoder,
            tokenizer: shared.model.tokenizer.as_deref(),
            tree: Prefixes::default(),
            active: Vec::new(),
            leaving: Vec::new(),
            ready: Vec::new(),
            shares: Shares::default(),
            fates: Vec::new(),
            chunks: Vec::new(),
            mixes: Vec::new(),
            path: Vec::new(),
            seen: 0,
            waiting: false,
            next_deadline: None,
            vacated: false,
        }
    }

    /// One step, or a wait for work. False at the end of all work.
    pub fn turn(&mut self) -> bool {
        let now = Instant::now();
        self.clear(now);
        if !self.admit(now) {
            return false;
        }
        if self.ready.contains(&true) {
            self.step();
            let news = self.shared.arrivals.load(Ordering::Acquire) != self.seen;
            if self.active.is_empty() && !self.waiting && !news {
                // The answer goes through other threads, which need the processors now.
                threads::rest();
            }
            // At once: the next turn may wait for work.
            self.flush();
            self.leaving.retain_mut(|s| !s.abandoned() && !s.flush());
        }
        self.shared.kept.store(self.tree.len(), Ordering::Release);
        self.shared.running.store(self.active.len(), Ordering::Release);
        true
    }

    /// Ends what nobody waits for any more and what is too late.
    fn clear(&mut self, now: Instant) {
        for at in (0..self.active.len()).rev() {
            let sequence = &mut self.active[at];
            if sequence.abandoned() {
                self.end(at);
                // Nobody takes what it still had to say.
                self.leaving.pop();
            } else if sequence.deadline.is_some_and(|deadline| deadline <= now) {
                sequence.fail(expired());
                self.end(at);
            }
        }
        self.leaving.retain_mut(|s| !s.abandoned() && !s.flush());
    }

    /// Takes a sequence out of its slot; what it still has to say stays.
    fn end(&mut self, at: usize) {
        let mut sequence = self.active.remove(at);
        sequence.release(&mut self.tree);
        self.leaving.push(sequence);
        self.vacated = true;
    }

    /// Fills free slots from the queue and sets `ready`; waits while there is nothing to do. False at
    /// the end of all work.
    fn admit(&mut self, now: Instant) -> bool {
        let shared = self.shared;
        self.flush();
        let news = shared.arrivals.load(Ordering::Acquire) != self.seen
            || (self.waiting && self.vacated)
            || self.next_deadline.is_some_and(|deadline| deadline <= now);
        if self.ready.contains(&true) && !news {
            return true;
        }
        let mut queue = shared.queue();
        loop {
            self.seen = shared.arrivals.load(Ordering::Acquire);
            self.next_deadline = queue.sweep(now);
            self.vacated = false;
            while self.active.len() < shared.limits.slots
                && queue.peek().is_some_and(|job| self.fits(job))
            {
                let Some(job) = queue.pop() else { break };
                self.start(job);
            }
            self.waiting = !queue.is_empty();
            shared.running.store(self.active.len(), Ordering::Release);
            self.flush();
            if self.ready.contains(&true) {
                return true;
            }
            if !(self.active.is_empty() && self.leaving.is_empty()) {
                // Somebody reads slowly: look again soon, without a lock that senders need.
                drop(shared.wake.wait_timeout(queue, LOOK));
                return true;
            }
            // Nothing runs, so whatever waited would have fitted.
            if queue.closed {
                return false;
            }
            shared.kept.store(self.tree.len(), Ordering::Release);
            queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn flush(&mut self) {
        self.ready.clear();
        self.ready.extend(self.active.iter_mut().map(Sequence::flush));
    }

    /// Whether a job's pages fit beside all that the running sequences hold and may come to need, once
    /// prefixes that nobody uses are evicted. Leaves the prefix it would begin with in `path`.
    fn fits(&mut self, job: &Job) -> bool {
        let Self { shared, tree, active, path, .. } = self;
        path.clear();
        if let (Job::Generate { request, .. }, true) = (job, shared.limits.prefix_cache) {
            // The last token runs in any case: its logits are wanted.
            let text = &request.prompt[..request.prompt.len().saturating_sub(1)];
            tree.find(request.adapters.namespace(), text, path);
        }
        let held = tree.held() + path.iter().filter(|id| !tree.is_held(**id)).count();
        let own: usize = active
            .iter()
            .map(|s| s.cache.pages().len() - s.beginning.pages + s.pages_to_come())
            .sum();
        let new = job.positions(shared.limits.context).div_ceil(PAGE).saturating_sub(path.len());
        held + own + new <= shared.pool.budget()
    }

    fn start(&mut self, job: Job) {
        let Shared { pool, limits, .. } = self.shared;
        let tree = limits.prefix_cache.then_some(&mut self.tree);
        let sequence = Sequence::new(job, pool, limits.context, self.tokenizer, tree, &self.path);
        self.active.push(sequence);
    }

    /// One forward over all sequences that are ready: a token of each that decodes, and pieces of the
    /// prompts.
    fn step(&mut self) {
        let Self { shared, decoder, tree, active, ready, shares, fates, chunks, mixes, .. } = self;
        let vocab = decoder.config().vocab;
        shares.set(active.iter().zip(&*ready).map(|(sequence, ready)| match ready {
            true => sequence.need(),
            false => Need::Nothing,
        }));
        let counts = &shares.counts;

        // Admission made sure that there are enough for all that run.
        let missing: usize =
            active.iter().zip(counts).map(|(s, count)| s.cache.missing_pages(*count)).sum();
        while shared.pool.budget() - shared.pool.live() < missing && tree.evict() {}

        let outcome = {
            let mut step = recycled(std::mem::take(chunks));
            mixes.clear();
            for (sequence, &count) in active.iter_mut().zip(counts) {
                if count > 0 {
                    mixes.push(sequence.adapters.clone());
                    let logits = sequence.wanted(count);
                    let first = sequence.cache.len();
                    let tokens = &sequence.tokens[first..first + count];
                    step.push(Chunk { tokens, cache: &mut sequence.cache, logits });
                }
            }
            let outcome = decoder.forward_with(&mut step, mixes);
            *chunks = recycled(step);
            // Adapters that nobody uses any more can make room.
            mixes.clear();
            outcome
        };
        fates.clear();
        match outcome {
            Err(error) => fates.extend(counts.iter().map(|count| match count {
                0 => Ok(Fate::Goes),
                _ => Err(Error::new(error.reason(), error.message())),
            })),
            Ok(mut logits) => {
                for (sequence, &count) in active.iter_mut().zip(counts) {
                    if count == 0 {
                        fates.push(Ok(Fate::Goes));
                        continue;
                    }
                    let (own, rest) = logits.split_at(sequence.gave(count) * vocab);
                    logits = rest;
                    fates.push(sequence.advance(count, own, vocab));
                    sequence.share(tree);
                }
            }
        }
        for at in (0..self.active.len()).rev() {
            match self.fates.pop() {
                None | Some(Ok(Fate::Goes)) => {}
                Some(Ok(Fate::Ends)) => {
                    self.shared.took(self.active[at].admitted.elapsed().as_secs_f64());
                    self.end(at);
                }
                Some(Err(error)) => {
                    self.active[at].fail(error);
                    self.end(at);
                }
            }
        }
    }
}

/// The memory of an emptied list for elements of another lifetime.
fn recycled<'b>(mut chunks: Vec<Chunk<'_>>) -> Vec<Chunk<'b>> {
    chunks.clear();
    // Collecting a vector's own iterator keeps its memory.
    chunks.into_iter().map(|_| unreachable!("the list was emptied")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emptied_list_keeps_its_memory() {
        let list: Vec<Chunk<'_>> = Vec::with_capacity(10);
        let start = list.as_ptr() as usize;
        let again: Vec<Chunk<'static>> = recycled(list);
        assert_eq!((again.capacity(), again.as_ptr() as usize), (10, start));
    }
}
