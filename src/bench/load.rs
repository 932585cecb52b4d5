//! A load on a server: when requests come, what they ask, and what became of them. Knows nothing of the
//! wire; `planish bench serve` sends what is planned here.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::stats::Percentiles;
use crate::error::{Error, Result};
use crate::seed::Stream;

/// Most requests of a run, most tokens of a prompt or an answer, and most tokens of all answers (the time
/// of each is kept).
pub const MOST_REQUESTS: usize = 1_000_000;
pub const MOST_TOKENS: u32 = 1 << 20;
pub const MOST_ANSWER_TOKENS: u64 = 50_000_000;

/// What is asked, drawn anew for each request.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shape {
    /// Tokens of a prompt, the shared ones included.
    pub prompt_tokens: RangeInclusive<u32>,
    pub answer_tokens: RangeInclusive<u32>,
    /// Tokens that all prompts begin with.
    pub shared_prefix: u32,
    /// Requests a second in a Poisson stream; 0 for clients that wait for their answer before they ask
    /// again.
    pub rate: f64,
    pub seed: u64,
}

impl Shape {
    /// Refuses what cannot be asked.
    pub fn check(&self) -> Result<()> {
        for (name, range) in
            [("prompt-tokens", &self.prompt_tokens), ("answer-tokens", &self.answer_tokens)]
        {
            if range.is_empty() || *range.start() == 0 || *range.end() > MOST_TOKENS {
                let message = format!("lies between 1 and {MOST_TOKENS}, the smaller number first");
                return Err(Error::field(name, message));
            }
        }
        if self.shared_prefix > *self.prompt_tokens.start() {
            return Err(Error::field(
                "shared-prefix",
                format!(
                    "is longer than the shortest prompt, {} tokens",
                    self.prompt_tokens.start()
                ),
            ));
        }
        if !self.rate.is_finite() || !(0.0..=1e6).contains(&self.rate) {
            return Err(Error::field("rate", "lies between 0 and 1000000 requests a second"));
        }
        Ok(())
    }
}

/// A request to be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// From the start of the run; zero where clients wait for answers.
    pub at: Duration,
    pub prompt: Vec<u32>,
    pub answer_tokens: u32,
}

/// Draws requests; the same seed draws the same ones, whoever sends them.
pub struct Plan {
    shape: Shape,
    vocab: u32,
    prefix: Arc<[u32]>,
    stream: Stream,
    arrivals: ChaCha8Rng,
    clock: f64,
    drawn: usize,
}

impl Plan {
    /// For a model of `vocab` tokens.
    pub fn new(shape: Shape, vocab: u32) -> Result<Self> {
        shape.check()?;
        if vocab == 0 {
            return Err(Error::field("model", "has an empty vocabulary"));
        }
        let stream = Stream::root(shape.seed).child("load");
        let mut rng = stream.child("prefix").rng();
        let prefix = (0..shape.shared_prefix).map(|_| rng.random_range(0..vocab)).collect();
        let arrivals = stream.child("arrivals").rng();
        Ok(Self { shape, vocab, prefix, stream, arrivals, clock: 0.0, drawn: 0 })
    }
}

impl Iterator for Plan {
    type Item = Planned;

    fn next(&mut self) -> Option<Planned> {
        let mut rng = self.stream.child(&format!("request {}", self.drawn)).rng();
        self.drawn += 1;
        if self.shape.rate > 0.0 {
            // The gaps of a Poisson stream are exponential; 1 - u is never 0.
            let u: f64 = self.arrivals.random();
            self.clock -= (1.0 - u).ln() / self.shape.rate;
        }
        let length = rng.random_range(self.shape.prompt_tokens.clone()) as usize;
        let answer_tokens = rng.random_range(self.shape.answer_tokens.clone());
        let mut prompt = self.prefix.to_vec();
        let own = length.saturating_sub(prompt.len());
        prompt.extend((0..own).map(|_| rng.random_range(0..self.vocab)));
        let at = Duration::try_from_secs_f64(self.clock).unwrap_or(Duration::MAX);
        Some(Planned { at, prompt, answer_tokens })
    }
}

/// What became of the requests, collected by who sends them.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    sent: u64,
    unsent: u64,
    prompt_tokens: u64,
    answer_tokens: u64,
    first: Vec<f64>,
    between: Vec<f64>,
    total: Vec<f64>,
    errors: BTreeMap<String, u64>,
}

/// An answer: when its tokens came, from when the request was due.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    pub prompt_tokens: u64,
    /// Time of each message and how many tokens it brought.
    pub arrivals: Vec<(Duration, usize)>,
    pub total: Duration,
}

impl Tally {
    /// A request was answered to its end.
    pub fn answered(&mut self, answer: &Answer) {
        self.sent += 1;
        self.prompt_tokens += answer.prompt_tokens;
        self.total.push(answer.total.as_secs_f64());
        let mut before = None;
        for (at, tokens) in answer.arrivals.iter().filter(|(_, tokens)| *tokens > 0) {
            self.answer_tokens += *tokens as u64;
            match before {
                None => self.first.push(at.as_secs_f64()),
                // Tokens that come together share their gap.
                Some(before) => {
                    let gap = at.saturating_sub(before).as_secs_f64() / *tokens as f64;
                    self.between.extend(std::iter::repeat_n(gap, *tokens));
                }
            }
            before = Some(*at);
        }
    }

    /// A request failed with the code of this name.
    pub fn failed(&mut self, code: &str) {
        self.sent += 1;
        *self.errors.entry(code.to_owned()).or_default() += 1;
    }

    /// A request was due but not sent, because too many were under way.
    pub fn unsent(&mut self) {
        self.unsent += 1;
    }

    /// Sums up a run that lasted this long.
    pub fn report(self, elapsed: Duration) -> Report {
        let seconds = elapsed.as_secs_f64().max(1e-9);
        let milliseconds = |values: Vec<f64>| {
            Percentiles::of(values.into_iter().map(|seconds| seconds * 1e3).collect())
        };
        let answered = self.total.len() as u64;
        Report {
            seconds,
            sent: self.sent,
            answered,
            unsent: self.unsent,
            errors: self.errors,
            prompt_tokens: self.prompt_tokens,
            answer_tokens: self.answer_tokens,
            requests_per_second: answered as f64 / seconds,
            tokens_per_second: self.answer_tokens as f64 / seconds,
            prompt_tokens_per_second: self.prompt_tokens as f64 / seconds,
            first_token_milliseconds: milliseconds(self.first),
            between_tokens_milliseconds: milliseconds(self.between),
            total_milliseconds: milliseconds(self.total),
        }
    }
}

/// A run summed up. Times count from when a request was due, so a server that falls behind shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// From the first request to the end of the last answer.
    pub seconds: f64,
    pub sent: u64,
    /// Requests answered to their end.
    pub answered: u64,
    /// Requests that were due while too many were under way.
    pub unsent: u64,
    /// Requests that failed, by the name of the code.
    pub errors: BTreeMap<String, u64>,
    /// Of answered requests.
    pub prompt_tokens: u64,
    pub answer_tokens: u64,
    pub requests_per_second: f64,
    /// Tokens of answers.
    pub tokens_per_second: f64,
    pub prompt_tokens_per_second: f64,
    pub first_token_milliseconds: Option<Percentiles>,
    pub between_tokens_milliseconds: Option<Percentiles>,
    pub total_milliseconds: Option<Percentiles>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> Shape {
        Shape { prompt_tokens: 8..=12, answer_tokens: 3..=5, shared_prefix: 4, rate: 50.0, seed: 7 }
    }

    #[test]
    fn the_same_seed_plans_the_same_requests() {
        let plan = |shape| Plan::new(shape, 100).expect("a plan").take(50).collect::<Vec<_>>();
        let first = plan(shape());
        assert_eq!(first, plan(shape()));
        assert_ne!(first, plan(Shape { seed: 8, ..shape() }));
        let prefix = &first[0].prompt[..4];
        for planned in &first {
            assert!((8..=12).contains(&planned.prompt.len()));
            assert!((3..=5).contains(&planned.answer_tokens));
            assert_eq!(&planned.prompt[..4], prefix);
            assert!(planned.prompt.iter().all(|t| *t < 100));
        }
        assert!(first.windows(2).all(|w| w[0].at <= w[1].at));
        // What is asked does not depend on when.
        let closed = plan(Shape { rate: 0.0, ..shape() });
        assert!(closed.iter().all(|p| p.at.is_zero()));
        assert!(closed.iter().zip(&first).all(|(a, b)| a.prompt == b.prompt));
    }

    #[test]
    fn arrivals_come_at_the_rate_with_exponential_gaps() {
        let times: Vec<f64> =
            Plan::new(shape(), 9).expect("a plan").take(4000).map(|p| p.at.as_secs_f64()).collect();
        let rate = 4000.0 / times[3999];
        assert!((rate / 50.0 - 1.0).abs() < 0.06, "{rate}");
        // A share of 1 - 1/e of exponential gaps is below their mean.
        let short = times.windows(2).filter(|w| w[1] - w[0] < 0.02).count() as f64 / 3999.0;
        assert!((short - 0.632).abs() < 0.03, "{short}");
    }

    #[test]
    fn loads_that_cannot_be_are_refused() {
        let refused = |shape: Shape| Plan::new(shape, 10).is_err();
        assert!(refused(Shape { prompt_tokens: 0..=4, ..shape() }));
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = 5..=4;
        assert!(refused(Shape { answer_tokens: backwards, ..shape() }));
        assert!(refused(Shape { answer_tokens: 1..=u32::MAX, ..shape() }));
        assert!(refused(Shape { shared_prefix: 9, ..shape() }));
        assert!(refused(Shape { rate: f64::NAN, ..shape() }));
        assert!(refused(Shape { rate: -1.0, ..shape() }));
        assert!(Plan::new(shape(), 0).is_err());
    }

    #[test]
    fn reports_by_hand() {
        let ms = Duration::from_millis;
        let mut tally = Tally::default();
        // Three tokens: at 100, and two together at 140, which share 40 ms.
        let arrivals = vec![(ms(50), 0), (ms(100), 1), (ms(140), 2)];
        tally.answered(&Answer { prompt_tokens: 10, arrivals, total: ms(150) });
        tally.answered(&Answer { prompt_tokens: 6, arrivals: vec![(ms(300), 1)], total: ms(310) });
        tally.failed("RESOURCE_EXHAUSTED");
        tally.failed("RESOURCE_EXHAUSTED");
        tally.unsent();
        let report = tally.report(Duration::from_secs(2));
        assert_eq!((report.sent, report.answered, report.unsent), (4, 2, 1));
        assert_eq!(report.errors["RESOURCE_EXHAUSTED"], 2);
        assert_eq!((report.prompt_tokens, report.answer_tokens), (16, 4));
        assert_eq!(report.requests_per_second, 1.0);
        assert_eq!(report.tokens_per_second, 2.0);
        let first = report.first_token_milliseconds.expect("first tokens");
        assert_eq!((first.count, first.p50, first.max), (2, 100.0, 300.0));
        let between = report.between_tokens_milliseconds.expect("gaps");
        assert_eq!((between.count, between.p50), (2, 20.0));
        assert_eq!(report.total_milliseconds.expect("totals").max, 310.0);
        // Nothing came back: nothing is made up.
        let mut nothing = Tally::default();
        nothing.failed("UNAVAILABLE");
        assert!(nothing.report(ms(1)).total_milliseconds.is_none());
    }
}
