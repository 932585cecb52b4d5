//! The pictures of a report: quality against bytes, quality against latency.

use super::chart::{Axis, Chart, Point};
use super::report::{base_column, bytes, cell, points, quality};
use crate::error::{Error, Result};
use crate::eval::metrics::{self, ADAPTER_BYTES, DECODE_RATE, PRODUCT_1};
use crate::proto::v1;

/// A picture spans decades when its largest value is this many times its smallest.
const DECADES: f64 = 8.0;

/// Quality against the bytes of the weights. A field error where the report lacks one of them.
pub fn against_bytes(report: &v1::ComparisonReport) -> Result<Chart> {
    let cost = bytes(report).ok_or_else(|| missing("bytes"))?;
    let largest = report.arms.iter().filter_map(|a| cell(a, cost)).map(|c| c.mean);
    let largest = largest.fold(0.0, f64::max);
    let (unit, scale) = match largest {
        v if v >= 1e9 => ("GB", 1e9),
        v if v >= 1e6 => ("MB", 1e6),
        v if v >= 1e3 => ("kB", 1e3),
        _ => ("bytes", 1.0),
    };
    let what =
        if report.columns[cost].metric == ADAPTER_BYTES.name { "adapter" } else { "weights" };
    chart(report, cost, &format!("{what}, {unit}"), &|v| v / scale)
}

/// Quality against the time of a token: in decode where that was measured, else in the products alone.
pub fn against_latency(report: &v1::ComparisonReport) -> Result<Chart> {
    if let Some(cost) = base_column(report, DECODE_RATE.name) {
        return chart(report, cost, "decode, ms a token", &|rate| 1e3 / rate);
    }
    let cost = base_column(report, PRODUCT_1.name).ok_or_else(|| missing("latency"))?;
    chart(report, cost, "matrix products of a token, ms", &|ms| ms)
}

fn chart(
    report: &v1::ComparisonReport,
    cost: usize,
    label: &str,
    shown: &dyn Fn(f64) -> f64,
) -> Result<Chart> {
    let quality = quality(report).ok_or_else(|| missing("quality"))?;
    let column = &report.columns[quality];
    let share = metrics::metric(&column.metric).is_ok_and(metrics::Metric::is_share);
    let percent = if share { 100.0 } else { 1.0 };
    let points: Vec<Point> = points(report, Some(quality), Some(cost))
        .into_iter()
        .map(|placed| {
            let arm = &report.arms[placed.arm];
            let spread = cell(arm, quality).filter(|cell| cell.runs > 1);
            Point {
                label: arm.name.clone(),
                x: shown(placed.cost),
                y: placed.quality * percent,
                spread: spread.map(|cell| (cell.minimum * percent, cell.maximum * percent)),
                base: placed.arm == 0,
            }
        })
        .collect();
    let unit = match column.unit.as_str() {
        _ if share => ", %".to_owned(),
        "" => String::new(),
        unit => format!(", {unit}"),
    };
    let title = report.comparison.as_ref().map(|c| c.display_name.clone()).unwrap_or_default();
    Ok(Chart {
        title: if title.is_empty() { "comparison".to_owned() } else { title },
        x: axis(label.to_owned(), false, points.iter().map(|p| p.x)),
        y: axis(
            format!("{}{unit}", column.metric.replace('_', " ")),
            column.higher_is_better,
            points.iter().map(|p| p.y),
        ),
        points,
    })
}

fn axis(label: String, higher_is_better: bool, values: impl Iterator<Item = f64>) -> Axis {
    let range = values.fold((f64::INFINITY, 0.0f64), |(low, high), v| (low.min(v), high.max(v)));
    Axis { label, higher_is_better, log: range.0 > 0.0 && range.1 / range.0 >= DECADES }
}

fn missing(what: &str) -> Error {
    Error::field(
        "view",
        format!(
            "base and arms have no {what} in common to draw; ask for it in the comparison's evaluation"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::{Facts, report};
    use super::super::testing::{arm, comparison, round, run};
    use super::super::{BASE, resolve};
    use super::*;
    use crate::eval::metrics::{PERPLEXITY, WEIGHT_BYTES};

    fn example(speed: bool) -> v1::ComparisonReport {
        let comparison = comparison(vec![arm("round", vec![round(4)])]);
        let made = |arm: &str, nats: f64, bytes: f64, rate: f64| {
            let mut measured = vec![(&PERPLEXITY, vec![nats]), (&WEIGHT_BYTES, vec![bytes])];
            if speed {
                measured.push((&DECODE_RATE, vec![rate]));
            }
            let measured: Vec<_> = measured.iter().map(|(m, v)| (*m, v.as_slice())).collect();
            run(arm, None, &measured)
        };
        let runs = vec![made("round", 6.0, 5e7, 125.0)];
        let base = made(BASE, 3.0, 1e8, 100.0);
        report(&resolve(&comparison), &Facts::default(), Some(base), runs)
    }

    #[test]
    fn axes_have_units_and_the_base_is_marked() {
        let chart = against_bytes(&example(true)).expect("drawn");
        assert_eq!(chart.x.label, "weights, MB");
        assert!(!chart.x.log && chart.y.log, "e^6 is more than 8 times e^3");
        assert!(chart.points[0].base && !chart.points[1].base);
        assert_eq!(chart.points[1].x, 50.0);
        let chart = against_latency(&example(true)).expect("drawn");
        assert_eq!((chart.points[0].x, chart.points[1].x), (10.0, 8.0));
    }

    #[test]
    fn what_was_not_measured_is_not_drawn() {
        let error = against_latency(&example(false)).expect_err("no speed");
        assert!(error.message().contains("latency"), "{error}");
        assert!(against_bytes(&v1::ComparisonReport::default()).is_err());
    }
}
