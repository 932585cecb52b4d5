//! What the wire adds to a request: two ways to the same answer, measured in turn.

use serde::Serialize;

use super::stats::Spread;
use crate::error::{Error, Result};
use crate::eval::metrics::median;

/// Most requests of a repetition, each way.
pub const MOST_REQUESTS: usize = 100_000;

/// How much is run, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Run {
    /// Requests of a repetition, each way.
    pub requests: usize,
    /// Tokens of each prompt; the answer has one.
    pub prompt_tokens: usize,
    /// Measured repetitions, after one that warms up.
    pub repetitions: usize,
}

impl Run {
    /// # Errors
    /// INVALID_FIELD for runs that measure nothing or do not end.
    pub fn check(&self) -> Result<()> {
        if !(1..=MOST_REQUESTS).contains(&self.requests) || self.repetitions == 0 {
            let message = format!("between 1 and {MOST_REQUESTS} and one repetition are needed");
            return Err(Error::field("requests", message));
        }
        if self.prompt_tokens == 0 {
            return Err(Error::field("prompt-tokens", "at least one is needed"));
        }
        Ok(())
    }
}

/// Milliseconds of a request, the median of each repetition.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Wire {
    pub run: Run,
    /// Through the engine's call in this process.
    pub in_process_milliseconds: Spread,
    /// Over gRPC on the loopback.
    pub grpc_milliseconds: Spread,
    /// What gRPC took longer than the call beside it.
    pub added_milliseconds: Spread,
}

/// Sums up repetitions of pairs: seconds in this process, and seconds over gRPC of the request beside it.
/// No repetition may be empty.
pub fn summary(run: Run, repetitions: &[Vec<[f64; 2]>]) -> Wire {
    let of = |number: fn(&[f64; 2]) -> f64| {
        let medians = repetitions.iter().map(|pairs| {
            let values: Vec<f64> = pairs.iter().map(|pair| 1e3 * number(pair)).collect();
            median(&values)
        });
        Spread::of(medians.collect())
    };
    Wire {
        run,
        in_process_milliseconds: of(|pair| pair[0]),
        grpc_milliseconds: of(|pair| pair[1]),
        added_milliseconds: of(|pair| pair[1] - pair[0]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_by_hand() {
        let run = Run { requests: 3, prompt_tokens: 1, repetitions: 2 };
        // Differences 1, 2 and 9 ms, then 4, 4 and 4.
        let first = vec![[0.010, 0.011], [0.030, 0.032], [0.020, 0.029]];
        let second = vec![[0.016, 0.020], [0.026, 0.030], [0.006, 0.010]];
        let found = summary(run, &[first, second]);
        let close = |spread: &Spread, median: f64, min: f64, max: f64| {
            let got = [spread.median, spread.min, spread.max];
            let near = got.iter().zip([median, min, max]).all(|(a, b)| (a - b).abs() < 1e-9);
            assert!(near && spread.values.len() == 2, "{spread:?}");
        };
        close(&found.in_process_milliseconds, 18.0, 16.0, 20.0);
        close(&found.grpc_milliseconds, 24.5, 20.0, 29.0);
        // Of the differences, not the difference of the medians, which would be 9.
        close(&found.added_milliseconds, 3.0, 2.0, 4.0);
    }

    #[test]
    fn runs_that_measure_nothing_are_refused() {
        let run = Run { requests: 1, prompt_tokens: 1, repetitions: 1 };
        assert!(run.check().is_ok());
        assert!(Run { requests: 0, ..run }.check().is_err());
        assert!(Run { requests: MOST_REQUESTS + 1, ..run }.check().is_err());
        assert!(Run { prompt_tokens: 0, ..run }.check().is_err());
        assert!(Run { repetitions: 0, ..run }.check().is_err());
    }
}
