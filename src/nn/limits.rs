//! When gradients of attention can be taken in almost linear time (Hu et al. 2025, "Computational limits of
//! low-rank adaptation fine-tuning for transformers", arXiv 2406.03136): the threshold on the sizes of queries
//! and keys, verdicts, and the rule that chooses between the exact and the factored gradient. Nothing here
//! runs a model.

use crate::kernels::training::factored::{count, degree_within};

pub use crate::kernels::training::factored::{MAX_DEGREE, sure_degree};

/// Largest head size that is factored whatever the degree.
pub const MAX_HEAD: usize = 16;
/// Highest degree that larger heads are factored with.
pub const MAX_LARGE_DEGREE: usize = 2;
/// Elements of the sums of a head, at most: 64 MiB.
const MAX_STATE: usize = 1 << 24;

/// `sqrt(ln L)`: with larger entries no algorithm is much faster than the exact one (theorem 3 of the paper,
/// under the strong exponential time hypothesis).
pub fn threshold(length: usize) -> f64 {
    (length.max(1) as f64).ln().sqrt()
}

/// Entries of queries and keys up to `gamma` as they would be if the scale were `1 / dim`: no score is larger
/// than the square of this.
pub fn normalised(gamma: f64, scale: f64, dim: usize) -> f64 {
    (scale.abs() * dim as f64).sqrt() * gamma
}

/// What the sizes of a head's queries and keys say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Well below the threshold, and few features are enough.
    Fast,
    /// Below the threshold, but near it, or with too many features.
    Border,
    /// Above the threshold.
    Quadratic,
    /// Not plain softmax attention over all that came before.
    NotApplicable,
}

/// The verdict on a head whose entries are `margin` times the threshold; `affordable` says whether few enough
/// features give the error that is asked for.
pub fn verdict(margin: f64, affordable: bool) -> Verdict {
    if margin < 0.5 && affordable {
        Verdict::Fast
    } else if margin < 1.0 {
        Verdict::Border
    } else {
        Verdict::Quadratic
    }
}

/// How gradients are factored, where they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factoring {
    /// Largest error of a query's weights, summed over the keys, in (0, 1).
    pub eps: f64,
    /// Most features of a head; where absent a quarter of the tokens, and not so many that the exact gradient
    /// is cheaper.
    pub max_features: Option<usize>,
    /// Queries and keys are projected on so many directions before features are made.
    pub project: Option<usize>,
}

impl Default for Factoring {
    fn default() -> Self {
        Self { eps: 1e-3, max_features: None, project: None }
    }
}

/// Which gradient a head gets.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Degree and features of the factored one; the exact one if absent.
    pub factored: Option<(usize, usize)>,
    /// Why, in words.
    pub reason: String,
}

impl Choice {
    fn exact(reason: impl Into<String>) -> Self {
        Self { factored: None, reason: reason.into() }
    }
}

/// Floating-point operations of the exact gradient of a query head, with scores that are made again.
fn exact_cost(length: usize, dim: usize, causal: bool) -> f64 {
    // Five products and some twenty operations a score.
    let pairs = (length as f64).powi(2) * if causal { 0.5 } else { 1.0 };
    pairs * (10.0 * dim as f64 + 20.0)
}

/// Those of the factored one: sums over keys and over queries, each made and used.
fn factored_cost(length: usize, dim: usize, features: usize) -> f64 {
    let pairs = (dim * (dim + 2)) as f64;
    length as f64 * features as f64 * 8.0 * pairs
}

/// The highest degree that `factoring` affords for sequences of `length` and heads of `dim` channels, or
/// why there is none.
pub fn affordable(
    factoring: &Factoring,
    length: usize,
    dim: usize,
    causal: bool,
) -> Result<usize, Choice> {
    if length < 2 {
        return Err(Choice::exact("a sequence of one token has no gradient of scores"));
    }
    let width = factoring.project.map_or(dim, |p| p.min(dim));
    let mut most = factoring.max_features.unwrap_or(length / 4);
    most = most.min(MAX_STATE / (dim * (dim + 2)));
    let limit = if width > MAX_HEAD { MAX_LARGE_DEGREE } else { MAX_DEGREE };
    let mut degree = degree_within(width, most, limit);
    if factoring.max_features.is_none() {
        let exact = exact_cost(length, dim, causal);
        let cheaper = |degree: usize| {
            count(width, degree).is_some_and(|m| factored_cost(length, dim, m) < exact)
        };
        while degree > 0 && !cheaper(degree) {
            degree -= 1;
        }
    }
    match degree {
        0 => Err(Choice::exact(format!(
            "{length} tokens are too few for the features of heads of {width} channels"
        ))),
        degree => Ok(degree),
    }
}

/// Chooses for a head that needs `needed` (a degree, `None` if more than is affordable) for its error.
pub fn choose(
    factoring: &Factoring,
    length: usize,
    dim: usize,
    causal: bool,
    needed: Option<usize>,
) -> Choice {
    let most = match affordable(factoring, length, dim, causal) {
        Ok(most) => most,
        Err(choice) => return choice,
    };
    let width = factoring.project.map_or(dim, |p| p.min(dim));
    match needed.filter(|degree| *degree <= most) {
        Some(degree) => {
            let features = count(width, degree).unwrap_or(usize::MAX);
            let ratio = exact_cost(length, dim, causal) / factored_cost(length, dim, features);
            Choice {
                factored: Some((degree, features)),
                reason: format!(
                    "degree {degree} with {features} features is enough for {length} tokens: about {} \
                     times fewer operations",
                    digits(ratio)
                ),
            }
        }
        None => Choice::exact(format!(
            "scores are too large: degree {most}, the most that pays off for {length} tokens, leaves an \
             error above {}",
            factoring.eps
        )),
    }
}

fn digits(ratio: f64) -> String {
    if ratio < 10.0 { format!("{ratio:.1}") } else { format!("{ratio:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_and_verdicts_are_those_of_the_paper() {
        for (length, want) in [(512, 2.498), (2048, 2.761), (8192, 3.002)] {
            assert!((threshold(length) - want).abs() < 1e-3);
        }
        assert_eq!(threshold(0), 0.0);
        // With the scale 1 / d nothing changes; with 1 / sqrt(d) the fourth root of d comes in.
        assert!((normalised(1.5, 0.25, 4) - 1.5).abs() < 1e-12);
        assert!((normalised(1.5, 0.25, 16) - 3.0).abs() < 1e-12);
        assert_eq!(verdict(0.4, true), Verdict::Fast);
        assert_eq!(verdict(0.4, false), Verdict::Border);
        assert_eq!(verdict(0.9, true), Verdict::Border);
        assert_eq!(verdict(1.0, true), Verdict::Quadratic);
        assert_eq!(verdict(f64::NAN, true), Verdict::Quadratic);
    }

    #[test]
    fn the_rule_asks_for_long_sequences_small_heads_and_small_scores() {
        let usual = Factoring::default();
        let short = choose(&usual, 8, 4, true, Some(2));
        assert!(short.factored.is_none() && short.reason.contains("too few"), "{short:?}");
        let long = choose(&usual, 8192, 4, true, Some(3));
        assert_eq!(long.factored, Some((3, 35)));
        assert!(long.reason.contains("fewer operations"));
        let large = choose(&usual, 8192, 4, true, None);
        assert!(large.factored.is_none() && large.reason.contains("too large"));
        // 64 channels: degree 2 has 2,145 features, more than a quarter of 8,192.
        assert!(affordable(&usual, 8192, 64, true).is_ok_and(|degree| degree <= 1));
        let allowed = Factoring { max_features: Some(2145), ..usual };
        assert_eq!(affordable(&allowed, 8192, 64, true), Ok(2));
        let allowed = Factoring { max_features: Some(100_000), ..usual };
        assert_eq!(affordable(&allowed, 8192, 64, true), Ok(MAX_LARGE_DEGREE));
        let projected = Factoring { project: Some(4), max_features: Some(1000), ..usual };
        assert_eq!(affordable(&projected, 8192, 64, true), Ok(9));
        assert!(affordable(&allowed, 1, 4, true).is_err());
        // Longer sequences never afford less.
        let mut last = 0;
        for length in [512, 2048, 8192, 32_768] {
            let degree = affordable(&usual, length, 4, false).unwrap_or(0);
            assert!(degree >= last);
            last = degree;
        }
        assert!(last >= 8);
    }
}
