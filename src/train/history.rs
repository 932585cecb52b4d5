//! What was measured on the way: a bounded record, kept in checkpoints and shown as a curve.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::loss::LossSums;
use crate::proto::v1;

/// Points of a run, at most; then two and two become one.
const MAX_POINTS: usize = 1000;

/// Validations that are kept, at most; then every second but the newest goes.
const MAX_VALIDATIONS: usize = 1000;

/// Training between two points.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The last update in it, from 1.
    pub step: u64,
    /// Sum of losses, and over how many.
    pub loss: f64,
    pub count: u64,
    /// Learning rate of the last update.
    pub rate: f64,
    /// Sum of the gradients' norms, and over how many updates.
    pub norm: f64,
    pub updates: u64,
    /// What a method measured besides, at the last update.
    pub metrics: BTreeMap<String, f64>,
}

impl Point {
    /// Mean loss.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.loss / self.count as f64 }
    }

    fn join(&mut self, later: Self) {
        self.loss += later.loss;
        self.count += later.count;
        self.norm += later.norm;
        self.updates += later.updates;
        (self.step, self.rate, self.metrics) = (later.step, later.rate, later.metrics);
    }
}

/// A measurement on validation data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// The update it came after; 0 before training.
    pub step: u64,
    pub loss: f64,
    pub accuracy: Option<f64>,
}

/// The record of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct History {
    pub points: Vec<Point>,
    /// Updates of a point.
    every: u64,
    /// Training since the last point.
    open: Point,
    pub validations: Vec<Validation>,
}

impl Default for History {
    fn default() -> Self {
        Self { points: Vec::new(), every: 1, open: Point::default(), validations: Vec::new() }
    }
}

impl History {
    /// Adds an update.
    pub fn add(
        &mut self,
        step: u64,
        sums: LossSums,
        (rate, norm): (f64, f64),
        metrics: BTreeMap<String, f64>,
    ) {
        let update =
            Point { step, loss: sums.loss, count: sums.count, rate, norm, updates: 1, metrics };
        self.open.join(update);
        if self.open.updates < self.every {
            return;
        }
        self.points.push(std::mem::take(&mut self.open));
        if self.points.len() >= MAX_POINTS {
            let mut joined: Vec<Point> = Vec::with_capacity(MAX_POINTS / 2);
            for (index, point) in self.points.drain(..).enumerate() {
                match joined.last_mut().filter(|_| index % 2 == 1) {
                    Some(last) => last.join(point),
                    None => joined.push(point),
                }
            }
            self.points = joined;
            self.every *= 2;
        }
    }

    /// Adds a validation.
    pub fn validated(&mut self, validation: Validation) {
        self.validations.push(validation);
        if self.validations.len() >= MAX_VALIDATIONS {
            let mut index = 0;
            self.validations.retain(|_| {
                index += 1;
                index % 2 == 1 || index == MAX_VALIDATIONS
            });
        }
    }

    /// Training points as the API has them, with what came after the last one.
    pub fn points_message(&self) -> Vec<v1::TrainingPoint> {
        let rest = (self.open.updates > 0).then_some(&self.open);
        let message = |point: &Point| v1::TrainingPoint {
            step: signed(point.step),
            loss: point.mean(),
            learning_rate: point.rate,
            gradient_norm: point.norm / point.updates.max(1) as f64,
            metrics: point.metrics.clone(),
        };
        self.points.iter().chain(rest).map(message).collect()
    }

    /// Validations as the API has them.
    pub fn validations_message(&self) -> Vec<v1::ValidationPoint> {
        let message = |point: &Validation| v1::ValidationPoint {
            step: signed(point.step),
            loss: point.loss,
            accuracy: point.accuracy,
        };
        self.validations.iter().map(message).collect()
    }
}

/// A number in the signed form of the API.
pub fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_runs_are_thinned_and_nothing_is_lost() {
        let mut history = History::default();
        let steps = 12_345u64;
        for step in 1..=steps {
            let sums = LossSums { loss: step as f64, count: 2, correct: 0 };
            history.add(step, sums, (0.1, 3.0), BTreeMap::new());
        }
        assert!(history.points.len() < MAX_POINTS);
        let points = history.points_message();
        assert_eq!(points.last().unwrap().step, 12_345);
        assert!(points.windows(2).all(|pair| pair[0].step < pair[1].step));
        assert!(points.iter().all(|point| point.gradient_norm == 3.0));
        let sum: f64 = history.points.iter().chain([&history.open]).map(|p| p.loss).sum();
        assert_eq!(sum, (steps * (steps + 1) / 2) as f64);
        // The first sixteen updates, of two counted each.
        assert_eq!((points[0].step, points[0].loss), (16, 4.25));
    }

    #[test]
    fn a_record_comes_back_from_json_as_it_was() {
        let mut history = History::default();
        for step in 1..=7u32 {
            let sums = LossSums { loss: 1.0 / f64::from(step), count: 3, correct: 0 };
            let metrics = BTreeMap::from([("rank".to_owned(), f64::from(step) / 3.0)]);
            history.add(step.into(), sums, (0.1 / f64::from(step), 0.7), metrics);
        }
        history.validated(Validation { step: 7, loss: 0.1 + 0.2, accuracy: Some(1.0 / 3.0) });
        let json = serde_json::to_string(&history).unwrap();
        assert_eq!(serde_json::from_str::<History>(&json).unwrap(), history);
    }

    #[test]
    fn validations_are_thinned_and_the_newest_stays() {
        let mut history = History::default();
        for step in 1..=5000 {
            history.validated(Validation { step, loss: 1.0, accuracy: None });
        }
        assert!(history.validations.len() < MAX_VALIDATIONS);
        assert_eq!(history.validations.last().unwrap().step, 5000);
    }
}
