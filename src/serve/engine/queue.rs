//! What waits for a slot: in order within one client, in turns between clients.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use tokio::sync::{mpsc, oneshot};

use super::{Ask, Event, Request, Scores};
use crate::error::{Error, Reason, Result};
use crate::models::decoder::plan::adapters::Mix;

/// What waits for a slot.
pub enum Job {
    Generate {
        request: Request,
        events: mpsc::Sender<Result<Event>>,
        queued: Instant,
    },
    Score {
        tokens: Vec<u32>,
        ask: Ask,
        adapters: Mix,
        client: u64,
        deadline: Option<Instant>,
        queued: Instant,
        /// Present until the job has ended.
        reply: Option<oneshot::Sender<Result<Scores>>>,
    },
}

impl Job {
    fn client(&self) -> u64 {
        match self {
            Self::Generate { request, .. } => request.client,
            Self::Score { client, .. } => *client,
        }
    }

    pub fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Generate { request, .. } => request.deadline,
            Self::Score { deadline, .. } => *deadline,
        }
    }

    /// Positions that the job takes at most.
    pub fn positions(&self, context: usize) -> usize {
        match self {
            Self::Generate { request, .. } => request.positions(context),
            Self::Score { tokens, .. } => tokens.len(),
        }
    }

    /// Whether the client has gone away.
    fn abandoned(&self) -> bool {
        match self {
            Self::Generate { events, .. } => events.is_closed(),
            Self::Score { reply, .. } => reply.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    /// Ends the job with an error. A client that has left needs no answer.
    pub fn fail(&mut self, error: Error) {
        match self {
            Self::Generate { events, .. } => drop(events.try_send(Err(error))),
            Self::Score { reply, .. } => drop(reply.take().map(|reply| reply.send(Err(error)))),
        }
    }
}

/// The error of a request whose deadline passed before its end.
pub fn expired() -> Error {
    Error::new(
        Reason::DeadlineExceeded,
        "the deadline of the request passed; allow more time or ask for fewer tokens",
    )
}

/// Jobs by client.
#[derive(Default)]
pub struct Queue {
    lanes: BTreeMap<u64, VecDeque<Job>>,
    /// Clients with jobs, whose turn is next first.
    turns: VecDeque<u64>,
    len: usize,
    /// Nobody can put anything into the queue any more.
    pub closed: bool,
}

impl Queue {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn push(&mut self, job: Job) {
        let client = job.client();
        let lane = self.lanes.entry(client).or_default();
        if lane.is_empty() {
            self.turns.push_back(client);
        }
        lane.push_back(job);
        self.len += 1;
    }

    /// The job that [`Queue::pop`] would give.
    pub fn peek(&self) -> Option<&Job> {
        self.lanes.get(self.turns.front()?)?.front()
    }

    /// The first job of the client whose turn it is; then it is the next one's.
    pub fn pop(&mut self) -> Option<Job> {
        let client = self.turns.pop_front()?;
        let lane = self.lanes.get_mut(&client)?;
        let job = lane.pop_front()?;
        self.len -= 1;
        if lane.is_empty() {
            self.lanes.remove(&client);
        } else {
            self.turns.push_back(client);
        }
        Some(job)
    }

    /// Takes out what nobody waits for any more and what is too late, the latter with an error. Gives
    /// the next deadline of what is left.
    pub fn sweep(&mut self, now: Instant) -> Option<Instant> {
        let mut next: Option<Instant> = None;
        let before = self.len;
        self.len = 0;
        for lane in self.lanes.values_mut() {
            lane.retain_mut(|job| {
                if job.abandoned() {
                    return false;
                }
                if let Some(deadline) = job.deadline() {
                    if deadline <= now {
                        job.fail(expired());
                        return false;
                    }
                    next = Some(next.map_or(deadline, |next| next.min(deadline)));
                }
                true
            });
            self.len += lane.len();
        }
        if self.len < before {
            self.lanes.retain(|_, lane| !lane.is_empty());
            self.turns.retain(|client| self.lanes.contains_key(client));
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    type Reply = oneshot::Receiver<Result<Scores>>;

    fn job(client: u64, mark: u32, deadline: Option<Instant>) -> (Job, Reply) {
        let (reply, receiver) = oneshot::channel();
        let (ask, queued, reply) = (Ask::Logprobs, Instant::now(), Some(reply));
        let adapters = Mix::default();
        (
            Job::Score { tokens: vec![mark], ask, adapters, client, deadline, queued, reply },
            receiver,
        )
    }

    fn mark(job: &Job) -> u32 {
        match job {
            Job::Score { tokens, .. } => tokens[0],
            Job::Generate { .. } => panic!(),
        }
    }

    #[test]
    fn clients_take_turns_and_each_keeps_its_order() {
        let mut queue = Queue::default();
        let mut replies = Vec::new();
        for (client, mark) in [(7, 1), (7, 2), (7, 3), (3, 10), (9, 20), (3, 11)] {
            let (job, reply) = job(client, mark, None);
            queue.push(job);
            replies.push(reply);
        }
        let mut order = Vec::new();
        while let Some(next) = queue.peek().map(mark) {
            let job = queue.pop().unwrap();
            assert_eq!(mark(&job), next);
            order.push(next);
            if order.len() == 4 {
                // Client 9 is served; who comes back stands behind those who wait.
                let (job, reply) = self::job(9, 21, None);
                queue.push(job);
                replies.push(reply);
            }
        }
        assert_eq!(order, [1, 10, 20, 2, 11, 3, 21]);
        assert!(queue.is_empty() && queue.pop().is_none());
    }

    #[test]
    fn sweeping_takes_out_the_late_and_the_lost() {
        let now = Instant::now();
        let later = now + Duration::from_secs(100);
        let mut queue = Queue::default();
        let (late, mut late_reply) = job(1, 1, Some(now));
        let (lost, lost_reply) = job(2, 2, None);
        let (kept, mut kept_reply) = job(2, 3, Some(later));
        [late, lost, kept].into_iter().for_each(|job| queue.push(job));
        drop(lost_reply);
        assert_eq!(queue.sweep(now), Some(later));
        let error = late_reply.try_recv().unwrap().unwrap_err();
        assert_eq!(error.reason(), Reason::DeadlineExceeded);
        assert_eq!(queue.len(), 1);
        assert_eq!(mark(&queue.pop().unwrap()), 3);
        assert!(kept_reply.try_recv().is_err());
        assert_eq!(queue.sweep(now), None);
    }
}
