//! The report of a comparison, put together from the runs that are finished.

use super::front::front;
use super::stats::{self, Series};
use super::{BASE, plan::Plan};
use crate::error::Result;
use crate::eval::metrics::{self, Metric};
use crate::proto::v1::{self, ContrastVerdict};
use crate::seed::Stream;

/// What is known of a comparison besides its runs.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Resource name of the base.
    pub base: String,
    pub base_digest: String,
    /// Digests of the data sets by resource name.
    pub data_digests: std::collections::BTreeMap<String, String>,
    pub shared: v1::SharedWork,
    pub seconds: f64,
    pub peak_memory_bytes: i64,
}

/// The report of a resolved comparison. `base` is the run of the base, `runs` those of the arms that are
/// finished, in any order.
pub fn report(
    comparison: &v1::Comparison,
    facts: &Facts,
    base: Option<v1::ArmRun>,
    runs: Vec<v1::ArmRun>,
) -> v1::ComparisonReport {
    let complete = base.is_some() && runs.len() == Plan::new(comparison).runs.len();
    let mut arms = vec![v1::ArmReport {
        name: BASE.to_owned(),
        display_name: BASE.to_owned(),
        runs: base.into_iter().collect(),
        ..Default::default()
    }];
    arms.extend(comparison.arms.iter().map(|arm| v1::ArmReport {
        name: arm.name.clone(),
        display_name: arm.display_name.clone(),
        ..Default::default()
    }));
    for run in runs {
        if let Some(arm) = arms[1..].iter_mut().find(|arm| arm.name == run.arm) {
            arm.runs.push(run);
        }
    }
    let order = |seed: Option<u64>| comparison.seeds.iter().position(|s| Some(*s) == seed);
    for arm in &mut arms {
        arm.runs.sort_by_key(|run| order(run.seed));
    }
    let mut report = v1::ComparisonReport {
        comparison: Some(comparison.clone()),
        base: facts.base.clone(),
        base_digest: facts.base_digest.clone(),
        data_digests: facts.data_digests.clone(),
        arms,
        complete,
        shared: Some(facts.shared),
        seconds: facts.seconds,
        peak_memory_bytes: facts.peak_memory_bytes,
        ..Default::default()
    };
    derive(&mut report);
    report
}

/// Writes what follows from the runs: columns, cells, front, contrasts.
pub fn derive(report: &mut v1::ComparisonReport) {
    report.columns = columns(&report.arms);
    for arm in &mut report.arms {
        arm.cells = cells(arm, &report.columns);
        arm.on_front = false;
    }
    let points = points(report, quality(report), bytes(report));
    let coordinates: Vec<_> = points.iter().map(|point| (point.cost, point.quality)).collect();
    let higher = quality(report).is_some_and(|q| report.columns[q].higher_is_better);
    for index in front(&coordinates, false, higher) {
        report.arms[points[index].arm].on_front = true;
    }
    let contrasts = report.comparison.iter().flat_map(|c| &c.contrasts);
    let contrasts: Vec<_> = contrasts.map(|asked| contrast(report, asked)).collect();
    report.contrasts = contrasts;
}

/// A column for each metric and protocol, in the order of the registry.
fn columns(arms: &[v1::ArmReport]) -> Vec<v1::Column> {
    let mut columns: Vec<v1::Column> = Vec::new();
    for m in arms.iter().flat_map(|arm| &arm.runs).flat_map(|run| &run.measurements) {
        if !columns.iter().any(|c| c.metric == m.metric && c.protocol == m.protocol) {
            columns.push(v1::Column {
                metric: m.metric.clone(),
                unit: m.unit.clone(),
                higher_is_better: m.higher_is_better,
                protocol: m.protocol.clone(),
            });
        }
    }
    let rank = |metric: &str| metrics::ALL.iter().position(|m| m.name == metric);
    columns.sort_by_key(|c| rank(&c.metric).unwrap_or(usize::MAX));
    columns
}

pub(super) fn in_column<'a>(
    run: &'a v1::ArmRun,
    column: &v1::Column,
) -> Option<&'a v1::Measurement> {
    run.measurements.iter().find(|m| m.metric == column.metric && m.protocol == column.protocol)
}

fn cells(arm: &v1::ArmReport, columns: &[v1::Column]) -> Vec<v1::Cell> {
    let mut cells = Vec::new();
    for (index, column) in columns.iter().enumerate() {
        let values: Vec<f64> =
            arm.runs.iter().filter_map(|run| in_column(run, column)).map(|m| m.value).collect();
        if values.is_empty() {
            continue;
        }
        let (mean, deviation, minimum, maximum) = stats::summary(&values);
        cells.push(v1::Cell {
            column: i32::try_from(index).unwrap_or(i32::MAX),
            runs: i32::try_from(values.len()).unwrap_or(i32::MAX),
            mean,
            deviation,
            minimum,
            maximum,
        });
    }
    cells
}

/// The cell of an arm in a column.
pub fn cell(arm: &v1::ArmReport, column: usize) -> Option<&v1::Cell> {
    arm.cells.iter().find(|cell| usize::try_from(cell.column) == Ok(column))
}

/// The column that says how good the arms are: of the metrics asked for, else of the registry, the first
/// quality that the base has too; where the base has none, as it has no head for a task, the first that an arm
/// has.
pub fn quality(report: &v1::ComparisonReport) -> Option<usize> {
    let asked = report.comparison.iter().flat_map(|c| &c.metrics).map(String::as_str);
    let all = metrics::ALL.iter().map(|m| m.name);
    let qualities = asked.chain(all).filter(|name| metrics::metric(name).is_ok_and(|m| m.quality));
    let qualities: Vec<&str> = qualities.collect();
    let of_base = qualities.iter().find_map(|name| base_column(report, name));
    of_base.or_else(|| qualities.iter().find_map(|name| arm_column(report, name)))
}

/// The column of stored bytes: of the weights, or, where no arm has weights of its own, of the adapters.
pub fn bytes(report: &v1::ComparisonReport) -> Option<usize> {
    let arms = report.comparison.iter().flat_map(|c| &c.arms);
    let tuned = |arm: &v1::Arm| arm.tuning.is_some() || arm.steps.is_empty();
    let some = arms.clone().any(|arm| arm.tuning.is_some());
    if some && arms.clone().all(tuned) {
        return arm_column(report, metrics::ADAPTER_BYTES.name);
    }
    base_column(report, metrics::WEIGHT_BYTES.name)
}

/// The first column of `metric`.
fn arm_column(report: &v1::ComparisonReport, metric: &str) -> Option<usize> {
    report.columns.iter().position(|column| column.metric == metric)
}

/// The column of `metric` in which the base has a value.
pub fn base_column(report: &v1::ComparisonReport, metric: &str) -> Option<usize> {
    let base = report.arms.first()?;
    (0..report.columns.len())
        .find(|c| report.columns[*c].metric == metric && cell(base, *c).is_some())
}

/// An arm in a plane of two columns.
pub struct Placed {
    /// Index of the arm in the report.
    pub arm: usize,
    pub cost: f64,
    pub quality: f64,
}

/// The arms that have a value in both columns.
pub fn points(
    report: &v1::ComparisonReport,
    quality: Option<usize>,
    cost: Option<usize>,
) -> Vec<Placed> {
    let (Some(quality), Some(cost)) = (quality, cost) else { return Vec::new() };
    let arms = report.arms.iter().enumerate();
    arms.filter_map(|(arm, found)| {
        let (cost, quality) = (cell(found, cost)?.mean, cell(found, quality)?.mean);
        Some(Placed { arm, cost, quality })
    })
    .collect()
}

/// The values of an arm in a column for these seeds; a run without a seed stands for each.
pub(super) fn series<'a>(
    arm: &'a v1::ArmReport,
    column: &v1::Column,
    seeds: &[Option<u64>],
) -> Option<Series<'a>> {
    let constant = arm.runs.iter().all(|run| run.seed.is_none());
    let mut series = Series { values: Vec::new(), samples: Vec::new(), constant };
    for seed in seeds {
        let run = arm.runs.iter().find(|run| run.seed == *seed || run.seed.is_none())?;
        let measured = in_column(run, column)?;
        series.values.push(measured.value);
        if !measured.samples.is_empty() {
            series.samples.push(&measured.samples);
        }
    }
    Some(series)
}

/// Two arms held against each other in the first column that both have; nothing but the names where
/// there is none.
pub fn contrast(report: &v1::ComparisonReport, asked: &v1::Contrast) -> v1::ContrastReport {
    let mut out = v1::ContrastReport {
        metric: asked.metric.clone(),
        arm: asked.arm.clone(),
        against: asked.against.clone(),
        ..Default::default()
    };
    let find = |name: &str| report.arms.iter().find(|arm| arm.name == name);
    let (Some(arm), Some(against)) = (find(&asked.arm), find(&asked.against)) else { return out };
    let Ok(metric) = metrics::metric(&asked.metric) else { return out };
    for column in report.columns.iter().filter(|c| c.metric == metric.name) {
        if let Some(found) = pair(metric, arm, against, column) {
            out.protocol.clone_from(&column.protocol);
            out.difference = Some(found.difference);
            out.ratio = found.ratio;
            out.set_verdict(found.verdict);
            return out;
        }
    }
    out.set_verdict(ContrastVerdict::Unspecified);
    out
}

/// Both arms over the seeds that both have run with.
fn pair(
    metric: &Metric,
    arm: &v1::ArmReport,
    against: &v1::ArmReport,
    column: &v1::Column,
) -> Option<stats::Contrast> {
    let runs = |arm: &v1::ArmReport| -> Vec<Option<u64>> {
        let runs = arm.runs.iter().filter(|run| in_column(run, column).is_some());
        runs.map(|run| run.seed).collect()
    };
    let (mine, theirs) = (runs(arm), runs(against));
    let one = |seeds: &[Option<u64>]| seeds.contains(&None);
    let seeds: Vec<Option<u64>> = match (one(&mine), one(&theirs)) {
        (true, _) => theirs,
        (false, true) => mine,
        (false, false) => mine.into_iter().filter(|seed| theirs.contains(seed)).collect(),
    };
    if seeds.is_empty() {
        return None;
    }
    let stream =
        Stream::root(0).child("contrast").child(metric.name).child(&arm.name).child(&against.name);
    Some(stats::contrast(
        metric,
        &series(arm, column, &seeds)?,
        &series(against, column, &seeds)?,
        &stream,
    ))
}

/// Checks that a report's derived numbers are those of its runs.
pub fn consistent(report: &v1::ComparisonReport) -> Result<bool> {
    let mut again = report.clone();
    derive(&mut again);
    Ok(close(&again, report))
}

/// Equal up to what another machine's exponential function makes of the same samples.
fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs()) || a == b
}

fn maybe_near(a: Option<f64>, b: Option<f64>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => near(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// Whether two estimates are the same, up to the last bits.
pub fn estimates_agree(a: &Option<v1::Estimated>, b: &Option<v1::Estimated>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => {
            near(a.value, b.value) && maybe_near(a.low, b.low) && maybe_near(a.high, b.high)
        }
        (None, None) => true,
        _ => false,
    }
}

/// Whether two reports derive the same from their runs.
fn close(a: &v1::ComparisonReport, b: &v1::ComparisonReport) -> bool {
    let cell = |a: &v1::Cell, b: &v1::Cell| {
        (a.column, a.runs) == (b.column, b.runs)
            && near(a.mean, b.mean)
            && maybe_near(a.deviation, b.deviation)
            && near(a.minimum, b.minimum)
            && near(a.maximum, b.maximum)
    };
    a.columns == b.columns
        && a.arms.len() == b.arms.len()
        && a.arms.iter().zip(&b.arms).all(|(a, b)| {
            a.on_front == b.on_front
                && a.cells.len() == b.cells.len()
                && a.cells.iter().zip(&b.cells).all(|(a, b)| cell(a, b))
        })
        && a.contrasts.len() == b.contrasts.len()
        && a.contrasts.iter().zip(&b.contrasts).all(|(a, b)| {
            (&a.metric, &a.arm, &a.against, &a.protocol, a.verdict)
                == (&b.metric, &b.arm, &b.against, &b.protocol, b.verdict)
                && estimates_agree(&a.difference, &b.difference)
                && estimates_agree(&a.ratio, &b.ratio)
        })
}

#[cfg(test)]
mod tests {
    use super::super::resolve;
    use super::super::testing::{arm, comparison, round, run, wanda};
    use super::*;
    use crate::eval::metrics::{PERPLEXITY, WEIGHT_BYTES};

    fn example() -> v1::ComparisonReport {
        let arms = vec![
            arm("wanda", vec![wanda(0.5)]),
            arm("round", vec![round(4)]),
            arm("late", vec![round(8)]),
        ];
        let mut comparison = comparison(arms);
        comparison.seeds = vec![3, 1];
        for (arm, against) in [("wanda", "round"), ("wanda", ""), ("late", "round")] {
            comparison.contrasts.push(v1::Contrast {
                metric: "perplexity".into(),
                arm: arm.into(),
                against: against.into(),
            });
        }
        let of = |nats: &[f64], bytes: f64| [nats.to_vec(), vec![bytes]];
        let made = |arm: &str, seed: Option<u64>, [nats, bytes]: [Vec<f64>; 2]| {
            run(arm, seed, &[(&PERPLEXITY, &nats), (&WEIGHT_BYTES, &bytes)])
        };
        let runs = vec![
            made("wanda", Some(1), of(&[2.0, 3.0, 2.5], 80.0)),
            made("round", None, of(&[2.1, 3.1, 2.6], 60.0)),
            made("wanda", Some(3), of(&[2.02, 3.02, 2.52], 80.0)),
        ];
        let base = made(BASE, None, of(&[1.0, 2.0, 1.5], 100.0));
        report(&resolve(&comparison), &Facts::default(), Some(base), runs)
    }

    #[test]
    fn runs_become_cells_with_their_spread() {
        let report = example();
        assert!(!report.complete, "an arm is missing");
        assert_eq!(report.arms.iter().map(|a| a.runs.len()).collect::<Vec<_>>(), [1, 2, 1, 0]);
        assert_eq!(report.arms[1].runs[0].seed, Some(3), "in the order of the seeds");
        let metrics: Vec<_> = report.columns.iter().map(|c| c.metric.as_str()).collect();
        assert_eq!(metrics, ["perplexity", "weight_bytes"]);
        let wanda = cell(&report.arms[1], 0).expect("measured");
        assert_eq!(wanda.runs, 2);
        assert!((wanda.mean - f64::midpoint(2.5f64.exp(), 2.52f64.exp())).abs() < 1e-9);
        assert!(wanda.deviation.expect("two runs") > 0.0);
        let round = cell(&report.arms[2], 0).expect("measured");
        assert_eq!((round.runs, round.deviation), (1, None));
        assert!(cell(&report.arms[3], 0).is_none());
        let fronts: Vec<_> = report.arms.iter().map(|a| a.on_front).collect();
        assert_eq!(fronts, [true, true, true, false]);
    }

    #[test]
    fn contrasts_pair_what_both_arms_have() {
        let report = example();
        let ratio = report.contrasts[0].ratio.expect("positive");
        let expected = f64::midpoint(2.5f64.exp(), 2.52f64.exp()) / 2.6f64.exp();
        assert!((ratio.value - expected).abs() < 1e-9);
        assert_eq!(report.contrasts[0].verdict(), ContrastVerdict::Better);
        assert_eq!(report.contrasts[1].against, BASE);
        assert_eq!(report.contrasts[1].verdict(), ContrastVerdict::Worse);
        assert_eq!(report.contrasts[2].verdict(), ContrastVerdict::Unspecified);
        assert!(report.contrasts[2].difference.is_none());
    }

    #[test]
    fn two_protocols_never_share_a_column() {
        let mut report = example();
        report.arms[2].runs[0].measurements[0].protocol = "another text".into();
        derive(&mut report);
        let columns: Vec<_> =
            report.columns.iter().map(|c| (c.metric.as_str(), c.protocol.as_str())).collect();
        let expected = [("perplexity", "p"), ("perplexity", "another text"), ("weight_bytes", "p")];
        assert_eq!(columns, expected);
        assert!(cell(&report.arms[2], 0).is_none() && cell(&report.arms[2], 1).is_some());
        // What is in no column with the others is held against none of them.
        assert!(report.contrasts[0].difference.is_none());
        assert!(!report.arms[2].on_front);
    }

    #[test]
    fn arms_that_only_tune_are_held_against_the_bytes_of_their_adapters() {
        let tuned =
            |name: &str| v1::Arm { tuning: Some(v1::Tuning::default()), ..arm(name, Vec::new()) };
        let comparison = comparison(vec![tuned("small"), tuned("large"), tuned("worse")]);
        let made = |name: &str, right: &[f64], bytes: f64| {
            let bytes = [bytes];
            run(
                name,
                Some(0),
                &[
                    (&metrics::TASK_ACCURACY, right),
                    (&metrics::ADAPTER_BYTES, &bytes),
                    (&metrics::WEIGHT_BYTES, &[1e6]),
                ],
            )
        };
        let runs = vec![
            made("small", &[1.0, 0.0, 1.0, 0.0], 10.0),
            made("large", &[1.0, 1.0, 1.0, 0.0], 100.0),
            made("worse", &[1.0, 1.0, 0.0, 0.0], 200.0),
        ];
        // The base has no head for the task, so no value in its column.
        let base = run(BASE, None, &[(&metrics::WEIGHT_BYTES, &[1e6])]);
        let report = report(&comparison, &Facts::default(), Some(base), runs);
        let metric = |column: Option<usize>| &report.columns[column.expect("a column")].metric;
        assert_eq!(metric(quality(&report)), "task_accuracy");
        assert_eq!(metric(bytes(&report)), "adapter_bytes");
        let front: Vec<bool> = report.arms.iter().map(|arm| arm.on_front).collect();
        assert_eq!(front, [false, true, true, false]);
    }

    #[test]
    fn edited_numbers_do_not_follow_from_the_runs() {
        let report = example();
        assert!(consistent(&report).expect("compares"));
        let text = serde_json::to_string(&report).expect("json");
        let travelled: v1::ComparisonReport = serde_json::from_str(&text).expect("json");
        assert!(consistent(&travelled).expect("compares"));
        let edits: [fn(&mut v1::ComparisonReport); 4] = [
            |r| r.arms[1].cells[0].mean *= 0.99,
            |r| r.arms[1].runs[0].measurements[0].value *= 0.99,
            |r| r.arms[3].on_front = true,
            |r| r.contrasts[0].ratio.as_mut().expect("a ratio").low = None,
        ];
        for edit in edits {
            let mut edited = report.clone();
            edit(&mut edited);
            assert!(!consistent(&edited).expect("compares"));
        }
    }
}
