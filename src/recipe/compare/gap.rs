//! How much of a gap an arm closes: what another lost to the base, and how much of that came back.

use rand::Rng as _;

use super::BASE;
use super::report::{in_column, series};
use super::stats::Series;
use crate::eval::metrics::{self, Metric, Statistic};
use crate::proto::v1::{self, Estimated};
use crate::seed::Stream;

const RESAMPLES: usize = 2000;
/// Share of the resamples below and above the interval, together 5 %.
const TAIL: f64 = 0.025;

/// `(against - arm) / (against - base)` with a 95 % interval, in the first column that all three have; of
/// metrics that are exponentials of means, perplexity for instance, in their logarithms. Where nothing says
/// how far chance moves the value, it has no interval. None where one of them was not measured, or where
/// there is no gap.
pub fn closed(
    report: &v1::ComparisonReport,
    metric: &str,
    arm: &str,
    against: &str,
) -> Option<Estimated> {
    let metric = metrics::metric(metric).ok()?;
    let find = |name: &str| report.arms.iter().find(|arm| arm.name == name);
    let arms = [find(arm)?, find(against)?, find(BASE)?];
    let column =
        report.columns.iter().filter(|column| column.metric == metric.name).find(|column| {
            arms.iter().all(|arm| arm.runs.iter().any(|run| in_column(run, column).is_some()))
        })?;
    let seeds = common(&arms, column);
    let mut all = Vec::new();
    for arm in arms {
        all.push(series(arm, column, &seeds)?);
    }
    let [arm, against, base] = &all[..] else { return None };
    let share = |[arm, against, base]: [f64; 3]| {
        let gap = against - base;
        (gap != 0.0 && gap.is_finite()).then(|| (against - arm) / gap)
    };
    let value = share([arm, against, base].map(|series| mean(metric, series, None, &[])))?;
    let stream = Stream::root(0).child("gap").child(metric.name);
    let mut shares = resamples(metric, [arm, against, base], &stream)
        .into_iter()
        .map(share)
        .collect::<Option<Vec<f64>>>()
        .unwrap_or_default();
    shares.sort_by(f64::total_cmp);
    let at = |part: f64| {
        let place = (part * shares.len() as f64) as usize;
        shares.get(place.min(shares.len().saturating_sub(1))).copied()
    };
    Some(Estimated {
        value,
        low: at(TAIL).map(|low| low.min(value)),
        high: at(1.0 - TAIL).map(|high| high.max(value)),
    })
}

/// Seeds that all have run with; an arm without random numbers has run with all.
fn common(arms: &[&v1::ArmReport; 3], column: &v1::Column) -> Vec<Option<u64>> {
    let seeds = |arm: &v1::ArmReport| -> Vec<Option<u64>> {
        let runs = arm.runs.iter().filter(|run| in_column(run, column).is_some());
        runs.map(|run| run.seed).collect()
    };
    let mut random = arms.iter().map(|arm| seeds(arm)).filter(|seeds| !seeds.contains(&None));
    let Some(mut all) = random.next() else { return vec![None] };
    for other in random {
        all.retain(|seed| other.contains(seed));
    }
    all
}

/// The mean over seeds, in logarithms where the metric is the exponential of a mean.
fn mean(metric: &Metric, series: &Series<'_>, seeds: Option<&[usize]>, places: &[usize]) -> f64 {
    let log = metric.statistic == Statistic::ExpMean;
    let one = |seed: usize| {
        let value = match series.samples.get(seed) {
            Some(samples) if !places.is_empty() => {
                metric.statistic.of(&places.iter().map(|i| samples[*i]).collect::<Vec<_>>())
            }
            _ => series.values[seed],
        };
        if log { value.ln() } else { value }
    };
    match seeds {
        Some(seeds) => seeds.iter().map(|seed| one(*seed)).sum::<f64>() / seeds.len() as f64,
        None => (0..series.values.len()).map(one).sum::<f64>() / series.values.len() as f64,
    }
}

/// Triples as chance could have made them: seeds and windows are drawn with replacement, the same for all
/// three.
fn resamples(metric: &Metric, all: [&Series<'_>; 3], stream: &Stream) -> Vec<[f64; 3]> {
    let seeds = all[0].values.len();
    let length = all[0].samples.first().map_or(0, |samples| samples.len());
    let windows = metric.paired
        && length > 1
        && all.iter().all(|series| {
            series.samples.len() == seeds && series.samples.iter().all(|s| s.len() == length)
        });
    if seeds == 1 && !windows {
        return Vec::new();
    }
    let mut rng = stream.rng();
    (0..RESAMPLES)
        .map(|_| {
            let count = if windows { length } else { 0 };
            let places: Vec<usize> = (0..count).map(|_| rng.random_range(0..length)).collect();
            let chosen: Vec<usize> = (0..seeds).map(|_| rng.random_range(0..seeds)).collect();
            all.map(|series| mean(metric, series, Some(&chosen), &places))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::metrics::{PERPLEXITY, WEIGHT_BYTES};
    use crate::recipe::compare::testing::{arm, comparison, round, run, wanda};
    use crate::recipe::compare::{report, resolve};

    fn measured(base: &[f64], bad: &[f64], good: &[f64], seeds: &[u64]) -> v1::ComparisonReport {
        let mut given = comparison(vec![arm("good", vec![wanda(0.5)]), arm("bad", vec![round(4)])]);
        given.seeds = seeds.to_vec();
        let mut runs: Vec<v1::ArmRun> = seeds
            .iter()
            .map(|seed| run("good", Some(*seed), &[(&PERPLEXITY, good), (&WEIGHT_BYTES, &[7.0])]))
            .collect();
        runs.push(run("bad", None, &[(&PERPLEXITY, bad)]));
        let base = run(BASE, None, &[(&PERPLEXITY, base), (&WEIGHT_BYTES, &[9.0])]);
        report::report(&resolve(&given), &report::Facts::default(), Some(base), runs)
    }

    #[test]
    fn shares_are_of_the_logarithms() {
        // Nats 2 and 6: of a gap of 4, an arm at 3 closes three quarters.
        let base = [1.9, 2.1, 2.0, 2.0];
        let shifted = |by: f64| base.map(|v| v + by);
        let report = measured(&base, &shifted(4.0), &shifted(1.0), &[0, 1]);
        let found = closed(&report, "perplexity", "good", "bad").unwrap();
        assert!((found.value - 0.75).abs() < 1e-9);
        // All windows say the same.
        assert!(
            (found.low.unwrap() - 0.75).abs() < 1e-9 && (found.high.unwrap() - 0.75).abs() < 1e-9
        );
        // Windows that disagree give an interval, with one seed too.
        let report = measured(&base, &shifted(4.0), &[2.5, 3.6, 2.4, 3.5], &[3]);
        let found = closed(&report, "perplexity", "good", "bad").unwrap();
        assert!((found.value - 0.75).abs() < 1e-9);
        assert!(found.low.unwrap() < 0.73 && found.high.unwrap() > 0.77, "{found:?}");
        // The other way round: worse than what it is held against.
        let found = closed(&report, "perplexity", "bad", "good").unwrap();
        assert!((found.value + 3.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_measured_or_has_no_gap_has_no_share() {
        let base = [2.0, 2.2];
        let report = measured(&base, &base, &[3.0, 3.0], &[0]);
        assert!(closed(&report, "perplexity", "good", "bad").is_none(), "no gap");
        assert!(closed(&report, "perplexity", "nobody", "bad").is_none());
        assert!(closed(&report, "weight_bytes", "good", "bad").is_none(), "not measured of one");
        assert!(closed(&report, "no metric", "good", "bad").is_none());
        // One seed and one window say nothing of chance.
        let report = measured(&[2.0], &[6.0], &[3.0], &[0]);
        let found = closed(&report, "perplexity", "good", "bad").unwrap();
        assert_eq!((found.low, found.high), (None, None));
    }
}
