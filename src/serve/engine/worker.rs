//! The engine thread: admits, batches, runs, hands out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::sequence::{Fate, Sequence};
use super::{Job, Shared, gone};
use crate::data::tokenizer::Tokenizer;
use crate::error::Error;
use crate::models::decoder::plan::adapters::Mix;
use crate::models::decoder::plan::{Chunk, Decoder};

/// Rows of a step: so long can a running stream be held up by another's prompt.
const STEP: usize = 256;
/// Rows of a step whose logits are all wanted: they take `vocab` floats each.
const SCORE: usize = 64;
/// How often the thread looks again whether slow clients have made room.
const LOOK: Duration = Duration::from_millis(2);

/// Runs until all handles are gone and all work is done, or until a defect ends it.
pub fn run(shared: &Shared, decoder: Decoder) {
    let outcome = catch_unwind(AssertUnwindSafe(|| serve(shared, decoder)));
    if outcome.is_err() {
        tracing::error!("the engine thread failed; the model must be loaded again");
        let mut queue = shared.queue();
        shared.failed.store(true, Ordering::Release);
        shared.running.store(0, Ordering::Relaxed);
        let left = std::mem::take(&mut queue.waiting);
        drop(queue);
        for job in left {
            // A client that has left needs no answer.
            match job {
                Job::Generate { events, .. } => drop(events.try_send(Err(gone()))),
                Job::Score { reply, .. } => drop(reply.send(Err(gone()))),
            }
        }
    }
}

fn serve(shared: &Shared, mut decoder: Decoder) {
    let tokenizer = shared.model.tokenizer.as_deref();
    // Sequences that go on, and answers that are complete but not yet taken.
    let mut active: Vec<Sequence<'_>> = Vec::new();
    let mut leaving: Vec<Sequence<'_>> = Vec::new();
    loop {
        active.retain(|s| !s.abandoned());
        leaving.retain_mut(|s| !s.abandoned() && !s.flush());
        if !admit(shared, &decoder, tokenizer, &mut active, &leaving) {
            return;
        }
        let mut ready: Vec<bool> = active.iter_mut().map(Sequence::flush).collect();
        if !ready.contains(&true) {
            continue;
        }
        let fates = step(&mut decoder, &mut active, &ready);
        ready.clear();
        for (at, fate) in fates.into_iter().enumerate().rev() {
            match fate {
                Ok(Fate::Goes) => {}
                Ok(Fate::Ends) => leaving.push(active.remove(at)),
                Err(error) => active.remove(at).fail(error),
            }
        }
        shared.running.store(active.len(), Ordering::Relaxed);
    }
}

/// Fills free slots from the queue; waits while there is nothing to do. False at the end of all work.
fn admit<'a>(
    shared: &Shared,
    decoder: &Decoder,
    tokenizer: Option<&'a Tokenizer>,
    active: &mut Vec<Sequence<'a>>,
    leaving: &[Sequence<'_>],
) -> bool {
    let mut queue = shared.queue();
    loop {
        while active.len() < shared.limits.slots {
            let Some(job) = queue.waiting.pop_front() else { break };
            active.extend(Sequence::new(job, decoder.config(), shared.limits.context, tokenizer));
        }
        shared.running.store(active.len(), Ordering::Relaxed);
        let blocked = !active.is_empty() && active.iter_mut().all(|s| !s.flush());
        if !active.is_empty() && !blocked {
            return true;
        }
        if blocked || !leaving.is_empty() {
            // Somebody reads slowly: look again soon, without a lock that senders need.
            drop(shared.wake.wait_timeout(queue, LOOK));
            return true;
        }
        if queue.closed {
            return false;
        }
        queue = shared.wake.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
}

/// One forward over all sequences that are ready: a token of each that decodes, then prompts in order of
/// arrival up to the step's rows. Gives each sequence's fate.
fn step(
    decoder: &mut Decoder,
    active: &mut [Sequence<'_>],
    ready: &[bool],
) -> Vec<Result<Fate, Error>> {
    let vocab = decoder.config().vocab;
    let decoding = active.iter().zip(ready).filter(|(s, ready)| **ready && !s.prefills()).count();
    let mut room = STEP.saturating_sub(decoding).max(1);
    let counts: Vec<usize> = active
        .iter()
        .zip(ready)
        .map(|(sequence, ready)| match (ready, sequence.prefills()) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => {
                let most = if sequence.wanted(1).is_empty() { STEP } else { SCORE };
                let count = sequence.pending.len().min(room).min(most);
                room -= count;
                count
            }
        })
        .collect();

    let fed = active.iter().zip(&counts).filter(|(_, count)| **count > 0);
    let adapters: Vec<Mix> = fed.map(|(sequence, _)| sequence.adapters.clone()).collect();
    let outcome = {
        let mut chunks: Vec<Chunk<'_>> = active
            .iter_mut()
            .zip(&counts)
            .filter(|(_, count)| **count > 0)
            .map(|(sequence, &count)| {
                let logits = sequence.wanted(count);
                Chunk { tokens: &sequence.pending[..count], cache: &mut sequence.cache, logits }
            })
            .collect();
        decoder.forward_with(&mut chunks, &adapters)
    };
    match outcome {
        Err(error) => counts
            .iter()
            .map(|count| match count {
                0 => Ok(Fate::Goes),
                _ => Err(Error::new(error.reason(), error.message())),
            })
            .collect(),
        Ok(mut logits) => active
            .iter_mut()
            .zip(counts)
            .map(|(sequence, count)| {
                if count == 0 {
                    return Ok(Fate::Goes);
                }
                let (own, rest) = logits.split_at(sequence.wanted(count).len() * vocab);
                logits = rest;
                sequence.advance(count, own, vocab)
            })
            .collect(),
    }
}
