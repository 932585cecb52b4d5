//! Choosing the next token.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use llguidance::toktrie::SimpleVob;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Reason, Result};
use crate::seed::Stream;

/// How tokens are chosen; see the API's `SamplingOptions` for the meaning of each value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    pub top_k: usize,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
    };

    /// Whether it matters what was said before.
    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// The sampler of one request: its options, its random stream, and what it has seen.
pub struct Sampler {
    options: Sampling,
    rng: ChaCha8Rng,
    /// Tokens of the prompt and the answer, with how often each was generated; empty where nothing is
    /// penalised.
    seen: BTreeMap<u32, u32>,
    /// Candidates, reused from token to token.
    pool: Vec<(f32, u32)>,
}

/// Best first; among equals the lower id.
fn by_rank(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl Sampler {
    /// A sampler whose penalties know the prompt.
    pub fn new(options: Sampling, prompt: &[u32]) -> Self {
        let rng = Stream::root(options.seed).child("sample").rng();
        let seen = match options.repetition_penalty {
            1.0 => BTreeMap::new(),
            _ => prompt.iter().map(|id| (*id, 0)).collect(),
        };
        Self { options, rng, seen, pool: Vec::new() }
    }

    /// The next token given the logits `[vocab]`.
    ///
    /// # Errors
    /// NON_FINITE when no logit can be preferred because some are not numbers.
    pub fn next(&mut self, logits: &[f32]) -> Result<u32> {
        self.pool.clear();
        self.pool.extend(logits.iter().copied().zip(0..));
        self.choose()
    }

    /// The next token among those `allowed`, as if the model had no others.
    ///
    /// # Errors
    /// As [`Sampler::next`]; no token is allowed that has a logit.
    pub fn next_allowed(&mut self, logits: &[f32], allowed: &SimpleVob) -> Result<u32> {
        self.pool.clear();
        let pool = &mut self.pool;
        allowed.iter_set_entries(|id| pool.extend(logits.get(id).map(|l| (*l, id as u32))));
        if pool.is_empty() {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                "no token of the model can continue the answer in the form that was asked for; \
                 change the json_schema, regex or grammar",
            ));
        }
        self.choose()
    }

    fn choose(&mut self) -> Result<u32> {
        self.penalise();
        let best = *self
            .pool
            .iter()
            .min_by(|a, b| by_rank(a, b))
            .filter(|best| best.0.is_finite())
            .ok_or_else(|| {
                Error::new(
                    Reason::NonFinite,
                    "the model's logits are not finite; its weights may be damaged, import it again",
                )
            })?;
        let id = if self.options.temperature == 0.0 { best.1 } else { self.draw(best.0) };
        if self.options.penalises() {
            *self.seen.entry(id).or_default() += 1;
        }
        Ok(id)
    }

    fn penalise(&mut self) {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.options;
        for (&id, &count) in &self.seen {
            // The pool is in the order of ids, and mostly it holds all of them.
            let at = match self.pool.get(id as usize) {
                Some((_, there)) if *there == id => Ok(id as usize),
                _ => self.pool.binary_search_by_key(&id, |(_, there)| *there),
            };
            let Some((logit, _)) = at.ok().and_then(|at| self.pool.get_mut(at)) else { continue };
            *logit = if *logit > 0.0 {
                *logit / repetition_penalty
            } else {
                *logit * repetition_penalty
            };
            if count > 0 {
                *logit -= presence_penalty + frequency_penalty * count as f32;
            }
        }
    }

    /// Draws from the tempered distribution, cut by top-k, then top-p, then min-p. `max` is the largest
    /// logit.
    fn draw(&mut self, max: f32) -> u32 {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.options;
        for (value, _) in &mut self.pool {
            // From here on a candidate's value is its weight, at most 1.
            *value = ((*value - max) / temperature).exp();
        }
        if top_k > 0 && top_k < self.pool.len() {
            self.pool.select_nth_unstable_by(top_k - 1, by_rank);
            self.pool.truncate(top_k);
        }
        if top_p < 1.0 {
            self.keep_share(top_p);
        }
        if min_p > 0.0 {
            self.pool.retain(|(weight, _)| *weight >= min_p);
        }
        // Selection shuffles; a fixed order makes the draw depend on the seed alone.
        self.pool.sort_unstable_by_key(|(_, id)| *id);
        let total: f64 = self.pool.iter().map(|(weight, _)| f64::from(*weight)).sum();
        let mut left = self.rng.random::<f64>() * total;
        for (weight, id) in &self.pool {
            left -= f64::from(*weight);
            if left < 0.0 && *weight > 0.0 {
                return *id;
            }
        }
        // Rounding may leave a hair: the last candidate that can be drawn gets it.
        self.pool.iter().rev().find(|(weight, _)| *weight > 0.0).map_or(0, |(_, id)| *id)
    }

    /// Keeps the fewest best candidates whose weights reach `share` of all.
    fn keep_share(&mut self, share: f32) {
        let wanted =
            f64::from(share) * self.pool.iter().map(|(weight, _)| f64::from(*weight)).sum::<f64>();
        // Sorting a large vocabulary is slow and mostly in vain: sort a growing head.
        let mut head = 64.min(self.pool.len());
        loop {
            if head < self.pool.len() {
                self.pool.select_nth_unstable_by(head - 1, by_rank);
            }
            self.pool[..head].sort_unstable_by(by_rank);
            let mut sum = 0.0;
            let reached = self.pool[..head].iter().position(|(weight, _)| {
                sum += f64::from(*weight);
                sum >= wanted
            });
            if let Some(last) = reached {
                self.pool.truncate(last + 1);
                return;
            }
            if head == self.pool.len() {
                return;
            }
            head = (head * 8).min(self.pool.len());
        }
    }
}

/// Log-probabilities under the model itself, before penalties and temperature.
pub struct Logprobs<'a> {
    logits: &'a [f32],
    log_total: f64,
}

impl<'a> Logprobs<'a> {
    /// Of the logits `[vocab]`.
    pub fn new(logits: &'a [f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from((l - max).exp())).sum();
        Self { logits, log_total: f64::from(max) + sum.ln() }
    }

    /// Of one token.
    pub fn of(&self, id: u32) -> f32 {
        (f64::from(self.logits[id as usize]) - self.log_total) as f32
    }

    /// The `count` likeliest tokens, best first.
    pub fn top(&self, count: usize) -> Vec<(u32, f32)> {
        let mut best: Vec<(f32, u32)> = self.logits.iter().copied().zip(0..).collect();
        let count = count.min(best.len());
        if count == 0 {
            return Vec::new();
        }
        best.select_nth_unstable_by(count - 1, by_rank);
        best.truncate(count);
        best.sort_unstable_by(by_rank);
        best.into_iter().map(|(_, id)| (id, self.of(id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(options: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for seed in 0..draws {
            let mut sampler = Sampler::new(Sampling { seed: seed as u64, ..options }, &[]);
            counts[sampler.next(logits).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_the_best() {
        let mut sampler = Sampler::new(Sampling::GREEDY, &[]);
        assert_eq!(sampler.next(&[0.0, 3.0, 3.0, 1.0]).unwrap(), 1);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [3.0_f32.ln(), 0.0, f32::NEG_INFINITY];
        let warm = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        let counts = count(warm, &logits, 4000);
        // 3 : 1 within five standard deviations of 4000 draws.
        assert!((2863..=3137).contains(&counts[0]), "{counts:?}");
        assert_eq!(counts[2], 0);
    }

    #[test]
    fn cuts_leave_what_they_promise() {
        // Probabilities 0.5, 0.25, 0.15, 0.1.
        let logits: Vec<f32> = [0.5_f32, 0.25, 0.15, 0.1].iter().map(|p| p.ln()).collect();
        let warm = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        let alive = |options| {
            let counts = count(options, &logits, 300);
            counts.iter().map(|c| *c > 0).collect::<Vec<_>>()
        };
        assert_eq!(alive(Sampling { top_k: 2, ..warm }), [true, true, false, false]);
        assert_eq!(alive(Sampling { top_p: 0.76, ..warm }), [true, true, true, false]);
        assert_eq!(alive(Sampling { top_p: 0.74, ..warm }), [true, true, false, false]);
        assert_eq!(alive(Sampling { min_p: 0.29, ..warm }), [true, true, true, false]);
        assert_eq!(alive(Sampling { top_p: 1e-6, ..warm }), [true, false, false, false]);
    }

    #[test]
    fn top_p_of_a_flat_vocabulary_keeps_the_share() {
        let mut sampler =
            Sampler::new(Sampling { temperature: 1.0, top_p: 0.5, ..Sampling::GREEDY }, &[]);
        sampler.next(&[0.0; 1000]).unwrap();
        assert_eq!(sampler.pool.len(), 500);
    }

    #[test]
    fn penalties_change_what_was_seen() {
        let options = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        // 3 / 2 < 2: the prompt's token loses; -1 * 2 < -1.5.
        assert_eq!(Sampler::new(options, &[0]).next(&[3.0, 2.0]).unwrap(), 1);
        assert_eq!(Sampler::new(options, &[0]).next(&[-1.0, -1.5]).unwrap(), 1);
        let mut sampler =
            Sampler::new(Sampling { frequency_penalty: 1.0, ..Sampling::GREEDY }, &[0]);
        let chosen: Vec<_> = (0..4).map(|_| sampler.next(&[2.5, 1.0]).unwrap()).collect();
        // 2.5, 1.5, then 0.5 < 1; after that 0.5 > 0.
        assert_eq!(chosen, [0, 0, 1, 0]);
        let mut sampler =
            Sampler::new(Sampling { presence_penalty: 1.0, ..Sampling::GREEDY }, &[0]);
        let chosen: Vec<_> = (0..3).map(|_| sampler.next(&[1.5, 1.0]).unwrap()).collect();
        assert_eq!(chosen, [0, 1, 0]);
    }

    /// A set of some of `vocab` tokens.
    fn set(vocab: usize, ids: &[u32]) -> SimpleVob {
        let mut set = SimpleVob::alloc(vocab);
        ids.iter().for_each(|id| set.allow_token(*id));
        set
    }

    #[test]
    fn only_allowed_tokens_come_and_as_if_there_were_no_others() {
        let logits = [9.0, 0.0, 3.0_f32.ln(), 8.0, f32::NAN, 0.0];
        let allowed = set(6, &[1, 2]);
        let mut greedy = Sampler::new(Sampling::GREEDY, &[]);
        assert_eq!(greedy.next_allowed(&logits, &allowed).unwrap(), 2);
        let count = |options: Sampling| {
            let mut counts = [0; 6];
            for seed in 0..4000 {
                let mut sampler = Sampler::new(Sampling { seed, ..options }, &[]);
                counts[sampler.next_allowed(&logits, &allowed).unwrap() as usize] += 1;
            }
            counts
        };
        let warm = Sampling { temperature: 1.0, ..Sampling::GREEDY };
        let counts = count(warm);
        // 1 : 3 within five standard deviations of 4000 draws.
        assert!((863..=1137).contains(&counts[1]) && counts[1] + counts[2] == 4000, "{counts:?}");
        // Cut after the mask: the likeliest allowed one is kept, not the likeliest of all.
        assert_eq!(count(Sampling { top_k: 1, ..warm })[2], 4000);
        assert_eq!(count(Sampling { top_p: 0.7, ..warm })[2], 4000);
        assert_eq!(count(Sampling { min_p: 0.5, ..warm })[2], 4000);
    }

    #[test]
    fn penalties_find_their_tokens_behind_a_mask() {
        let options = Sampling { frequency_penalty: 1.0, ..Sampling::GREEDY };
        let (logits, allowed) = ([7.0, 2.5, 7.0, 1.0], set(4, &[1, 3]));
        let mut sampler = Sampler::new(options, &[]);
        let chosen: Vec<_> =
            (0..4).map(|_| sampler.next_allowed(&logits, &allowed).unwrap()).collect();
        // 2.5, 1.5, then 0.5 < 1; after that 0.5 > 0.
        assert_eq!(chosen, [1, 1, 3, 1]);
        // A token that was seen and is not allowed changes nothing.
        let options = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        assert_eq!(Sampler::new(options, &[2]).next_allowed(&logits, &allowed).unwrap(), 1);
        assert_eq!(
            Sampler::new(options, &[1]).next_allowed(&[0.0, 1.5, 0.0, 1.0], &allowed).unwrap(),
            3
        );
    }

    #[test]
    fn allowed_tokens_without_a_logit_are_refused() {
        let mut sampler = Sampler::new(Sampling::GREEDY, &[]);
        assert!(sampler.next_allowed(&[1.0, 2.0], &set(9, &[5])).is_err());
        assert_eq!(sampler.next_allowed(&[1.0, 2.0], &set(9, &[0, 5])).unwrap(), 0);
    }

    #[test]
    fn logits_that_are_not_numbers_are_refused() {
        let mut sampler = Sampler::new(Sampling::GREEDY, &[]);
        for bad in [[f32::NAN, 1.0], [f32::NEG_INFINITY; 2], [f32::INFINITY, 0.0]] {
            assert_eq!(sampler.next(&bad).unwrap_err().reason(), Reason::NonFinite);
        }
    }

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        let logits = [1.0, 1.0, 1.0 + 2.0_f32.ln()];
        let logprobs = Logprobs::new(&logits);
        assert!((logprobs.of(0) - 0.25_f32.ln()).abs() < 1e-6);
        let top = logprobs.top(2);
        assert_eq!((top[0].0, top[1].0), (2, 0));
        assert!((top[0].1 - 0.5_f32.ln()).abs() < 1e-6);
    }
}
