//! How sure a difference is: paired bootstrap over seeds and over the parts of a measurement.
//!
//! Two arms run with the same seeds on the same windows or questions, so their differences are taken
//! pair by pair. Chance enters twice, by the seed and by the text, and the two are crossed: a resample
//! draws seeds and, independently, parts, with replacement, the same for both arms (Efron's percentile
//! interval). Repetitions of a clock have no partner; each arm draws its own. Where only one seed and no
//! parts are known, nothing says how far chance moves the value, unless the metric is a plain count.

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;

use crate::eval::metrics::Metric;
use crate::proto::v1::{ContrastVerdict, Estimated};
use crate::seed::Stream;

const RESAMPLES: usize = 2000;
/// Resamples are fewer, but not below this, where they would take more draws than the budget.
const LEAST_RESAMPLES: usize = 200;
const BUDGET: usize = 200_000_000;
/// Shares of the resamples below and above the interval, together 5 %.
const TAIL: f64 = 0.025;

/// The values of an arm in a column: one a seed, in the order of the seeds.
pub struct Series<'a> {
    pub values: Vec<f64>,
    /// Samples of each value; empty where there are none.
    pub samples: Vec<&'a [f64]>,
    /// Whether one run stands for all seeds: chance enters it once, not once a seed.
    pub constant: bool,
}

/// Mean, sample standard deviation (for two values and more), smallest and largest.
pub fn summary(values: &[f64]) -> (f64, Option<f64>, f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    let deviation = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (mean, deviation, low, high)
}

/// A difference of two arms, and their ratio where both are positive.
pub struct Contrast {
    pub difference: Estimated,
    pub ratio: Option<Estimated>,
    pub verdict: ContrastVerdict,
}

/// `a - b` and `a / b`, with 95 % intervals. Both series have one value for each of the same seeds
/// (at least one). `stream` makes the resamples repeatable.
pub fn contrast(metric: &Metric, a: &Series<'_>, b: &Series<'_>, stream: &Stream) -> Contrast {
    let point = (summary(&a.values).0, summary(&b.values).0);
    let resamples = resamples(metric, a, b, &mut stream.rng());
    let interval = |of: &dyn Fn(f64, f64) -> f64| {
        let mut values: Vec<f64> = resamples.iter().map(|(a, b)| of(*a, *b)).collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = (share * values.len() as f64) as usize;
            values.get(place.min(values.len().saturating_sub(1))).copied()
        };
        let ends = (at(TAIL), at(1.0 - TAIL));
        let value = of(point.0, point.1);
        // The interval of a median or a nonlinear mean may miss its own estimate by a rounding.
        Estimated { value, low: ends.0.map(|l| l.min(value)), high: ends.1.map(|h| h.max(value)) }
    };
    let difference = interval(&|a, b| a - b);
    let positive = a.values.iter().chain(&b.values).all(|v| *v > 0.0);
    Contrast {
        verdict: verdict(metric, &difference),
        ratio: positive.then(|| interval(&|a, b| a / b)),
        difference,
    }
}

fn verdict(metric: &Metric, difference: &Estimated) -> ContrastVerdict {
    let better = |up: bool| {
        if up == metric.higher_is_better { ContrastVerdict::Better } else { ContrastVerdict::Worse }
    };
    match (difference.low, difference.high) {
        (Some(low), Some(high)) if low == 0.0 && high == 0.0 && metric.exact => {
            ContrastVerdict::Equal
        }
        (Some(low), _) if low > 0.0 => better(true),
        (_, Some(high)) if high < 0.0 => better(false),
        _ => ContrastVerdict::Unclear,
    }
}

/// Pairs of values as chance could have made them; none where chance cannot be told.
fn resamples(
    metric: &Metric,
    a: &Series<'_>,
    b: &Series<'_>,
    rng: &mut ChaCha8Rng,
) -> Vec<(f64, f64)> {
    let seeds = a.values.len();
    let parts = |series: &Series<'_>| {
        series.samples.len() == seeds && series.samples.iter().all(|s| !s.is_empty())
    };
    let with_parts = parts(a) && parts(b);
    if seeds == 1 && !with_parts {
        return if metric.exact { vec![(a.values[0], b.values[0])] } else { Vec::new() };
    }
    let length = |series: &Series<'_>| series.samples.first().map_or(0, |s| s.len());
    let same = |n: usize| a.samples.iter().chain(&b.samples).all(|s| s.len() == n);
    let crossed = metric.paired && with_parts && same(length(a));
    let draws: usize = a.samples.iter().chain(&b.samples).map(|s| s.len()).sum();
    let count = (BUDGET / draws.max(1)).clamp(LEAST_RESAMPLES, RESAMPLES);
    let mut resamples = Vec::with_capacity(count);
    let (mut places, mut chosen) = (Vec::new(), Vec::new());
    for _ in 0..count {
        if crossed {
            places.clear();
            places.extend((0..length(a)).map(|_| rng.random_range(0..length(a))));
        }
        chosen.clear();
        chosen.extend((0..seeds).map(|_| rng.random_range(0..seeds)));
        let mut mean = |series: &Series<'_>| {
            let mut value = |seed: usize| match series.samples.get(seed) {
                Some(samples) if crossed => {
                    metric.statistic.of(&places.iter().map(|i| samples[*i]).collect::<Vec<_>>())
                }
                Some(samples) if with_parts => {
                    let any = |_| samples[rng.random_range(0..samples.len())];
                    metric.statistic.of(&(0..samples.len()).map(any).collect::<Vec<_>>())
                }
                _ => series.values[seed],
            };
            if series.constant {
                return value(0);
            }
            chosen.iter().map(|seed| value(*seed)).sum::<f64>() / seeds as f64
        };
        resamples.push((mean(a), mean(b)));
    }
    resamples
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::metrics::{ACCURACY, DECODE_RATE, MAKE_SECONDS, PERPLEXITY, WEIGHT_BYTES};

    fn series<'a>(metric: &Metric, samples: &[&'a [f64]]) -> Series<'a> {
        let values = samples.iter().map(|s| metric.statistic.of(s)).collect();
        Series { values, samples: samples.to_vec(), constant: false }
    }

    fn plain(values: &[f64]) -> Series<'static> {
        Series { values: values.to_vec(), samples: Vec::new(), constant: false }
    }

    fn of(metric: &Metric, a: &Series<'_>, b: &Series<'_>) -> Contrast {
        contrast(metric, a, b, &Stream::root(0))
    }

    #[test]
    fn summaries_by_hand() {
        assert_eq!(summary(&[1.0, 2.0, 6.0]), (3.0, Some(7f64.sqrt()), 1.0, 6.0));
        assert_eq!(summary(&[4.0]), (4.0, None, 4.0, 4.0));
    }

    #[test]
    fn pairing_finds_a_small_constant_difference_in_wide_data() {
        // Windows differ by whole nats; the arms by 0.05 in each of them.
        let b: Vec<f64> = (0..40).map(|i| 2.0 + (i * 7 % 40) as f64 / 10.0).collect();
        let a: Vec<f64> = b.iter().map(|v| v + 0.05).collect();
        let found = of(&PERPLEXITY, &series(&PERPLEXITY, &[&a]), &series(&PERPLEXITY, &[&b]));
        let ratio = found.ratio.expect("positive");
        for end in [ratio.value, ratio.low.expect("low"), ratio.high.expect("high")] {
            assert!((end - 0.05f64.exp()).abs() < 1e-9, "{ratio:?}");
        }
        assert_eq!(found.verdict, ContrastVerdict::Worse);
        // The same values in another order have no partners any more and prove nothing.
        let mut turned = a.clone();
        turned.rotate_left(13);
        let found = of(&PERPLEXITY, &series(&PERPLEXITY, &[&turned]), &series(&PERPLEXITY, &[&b]));
        assert_eq!(found.verdict, ContrastVerdict::Unclear);
    }

    #[test]
    fn intervals_cover_the_truth_about_as_often_as_they_say() {
        // Differences are normal with mean 1; an interval of 95 % misses now and then.
        let mut rng = Stream::root(5).rng();
        let mut normal = || (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
        let mut covered = 0;
        for trial in 0..100 {
            let b: Vec<f64> = (0..50).map(|_| normal()).collect();
            let a: Vec<f64> = b.iter().map(|v| v + 1.0 + normal()).collect();
            let stream = Stream::root(trial);
            let (a, b) = (series(&ACCURACY, &[&a]), series(&ACCURACY, &[&b]));
            let found = contrast(&ACCURACY, &a, &b, &stream).difference;
            let inside = found.low.expect("low") < 1.0 && 1.0 < found.high.expect("high");
            covered += u32::from(inside);
        }
        assert!((88..=99).contains(&covered), "{covered} of 100");
    }

    #[test]
    fn seeds_widen_the_interval() {
        let (low, high) = (vec![1.0; 30], vec![2.0; 30]);
        let base = vec![1.4; 30];
        let a = series(&ACCURACY, &[&low, &high, &low]);
        let b = series(&ACCURACY, &[&base, &base, &base]);
        let found = of(&ACCURACY, &a, &b);
        assert!((found.difference.value + 1.4 - 4.0 / 3.0).abs() < 1e-9);
        assert_eq!(found.verdict, ContrastVerdict::Unclear);
    }

    #[test]
    fn without_parts_only_counts_are_sure_after_one_run() {
        let found = of(&WEIGHT_BYTES, &plain(&[80.0]), &plain(&[100.0]));
        assert_eq!(found.verdict, ContrastVerdict::Better);
        assert_eq!(found.difference.low, Some(-20.0));
        let found = of(&WEIGHT_BYTES, &plain(&[80.0]), &plain(&[80.0]));
        assert_eq!(found.verdict, ContrastVerdict::Equal);
        let found = of(&MAKE_SECONDS, &plain(&[80.0]), &plain(&[100.0]));
        assert_eq!((found.difference.low, found.verdict), (None, ContrastVerdict::Unclear));
        let found = of(&MAKE_SECONDS, &plain(&[80.0, 81.0]), &plain(&[100.0, 99.0]));
        assert_eq!(found.verdict, ContrastVerdict::Better);
    }

    #[test]
    fn repetitions_are_not_paired_and_need_not_be_as_many() {
        let a = series(&DECODE_RATE, &[&[120.0, 121.0, 119.0, 122.0, 118.0]]);
        let b = series(&DECODE_RATE, &[&[100.0, 101.0, 99.0]]);
        let found = of(&DECODE_RATE, &a, &b);
        assert_eq!(found.verdict, ContrastVerdict::Better);
        assert!((found.ratio.expect("positive").value - 1.2).abs() < 1e-9);
    }

    #[test]
    fn one_run_does_not_grow_surer_by_standing_for_many_seeds() {
        let speeds: Vec<f64> = (0..9).map(|i| 100.0 + f64::from(i * 7 % 9)).collect();
        let steady = [104.0; 9];
        let width = |seeds: usize, constant: bool| {
            let mut a = series(&DECODE_RATE, &vec![&speeds[..]; seeds]);
            a.constant = constant;
            let b = series(&DECODE_RATE, &vec![&steady[..]; seeds]);
            let found = of(&DECODE_RATE, &a, &b).difference;
            found.high.expect("high") - found.low.expect("low")
        };
        assert!(width(3, false) < 0.8 * width(1, false));
        assert!(width(3, true) > 0.8 * width(1, true));
    }

    #[test]
    fn a_ratio_needs_positive_values_and_the_same_stream_gives_the_same_interval() {
        let found = of(&ACCURACY, &plain(&[0.0, 1.0]), &plain(&[1.0, 1.0]));
        assert!(found.ratio.is_none());
        let samples = [1.0, 2.0, 3.0, 5.0];
        let other = [1.5, 1.0, 3.5, 4.0];
        let (a, b) = (series(&ACCURACY, &[&samples]), series(&ACCURACY, &[&other]));
        assert_eq!(of(&ACCURACY, &a, &b).difference, of(&ACCURACY, &a, &b).difference);
    }
}
