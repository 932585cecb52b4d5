//! Medians with their spread, and percentiles.

use serde::Serialize;

use crate::eval::metrics::median;
use crate::recipe::compare::stats::summary;

/// Repetitions of one measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// In the order in which they were measured.
    pub values: Vec<f64>,
}

impl Spread {
    /// Of at least one value; not a number of none.
    pub fn of(values: Vec<f64>) -> Self {
        let (_, _, min, max) = summary(&values);
        Self { median: median(&values), min, max, values }
    }

    /// Every value times `factor`, which must be positive.
    #[must_use]
    pub fn times(&self, factor: f64) -> Self {
        Self::of(self.values.iter().map(|v| v * factor).collect())
    }

    /// `amount` over every value: the rate that goes with durations.
    #[must_use]
    pub fn rate(&self, amount: f64) -> Self {
        Self::of(self.values.iter().map(|v| amount / v).collect())
    }
}

/// Places in a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Percentiles {
    /// By nearest rank: `p` is the smallest value that at least `p` percent of the values do not exceed, so
    /// it is one of them. `None` of no values.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        let at = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1];
        let (mean, ..) = summary(&values);
        Some(Self {
            count: values.len(),
            mean,
            p50: at(50),
            p90: at(90),
            p95: at(95),
            p99: at(99),
            max,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_by_hand() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0, 10.0]);
        assert_eq!((spread.median, spread.min, spread.max), (2.5, 1.0, 10.0));
        assert_eq!(spread.values, [3.0, 1.0, 2.0, 10.0]);
        let rate = spread.rate(30.0);
        assert_eq!((rate.median, rate.min, rate.max), (12.5, 3.0, 30.0));
        assert_eq!(spread.times(2.0).median, 5.0);
    }

    #[test]
    fn percentiles_by_hand() {
        // 1 to 200 in another order: rank 100 is 100, rank 180 is 180, rank 190 is 190, rank 198 is 198.
        let values: Vec<f64> = (0..200).map(|i| f64::from(i * 7 % 200 + 1)).collect();
        let found = Percentiles::of(values).expect("values");
        assert_eq!((found.p50, found.p90, found.p95, found.p99), (100.0, 180.0, 190.0, 198.0));
        assert_eq!((found.count, found.max, found.mean), (200, 200.0, 100.5));
        // Of three values rank ceil(1.5) = 2 is the middle one, and every higher percentile is the last.
        let found = Percentiles::of(vec![9.0, 1.0, 4.0]).expect("values");
        assert_eq!((found.p50, found.p90, found.p99, found.max), (4.0, 9.0, 9.0, 9.0));
        let found = Percentiles::of(vec![5.0]).expect("a value");
        assert_eq!((found.p50, found.p99, found.mean), (5.0, 5.0, 5.0));
        assert!(Percentiles::of(Vec::new()).is_none());
    }
}
