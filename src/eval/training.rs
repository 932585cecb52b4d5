//! What a tuning trained, what it took, and what is left of it.

use super::metrics::{
    ADAPTER_BYTES, KEPT_PARAMETERS, KEPT_RANKS, KEPT_RANKS_DEVIATION, STEP_MILLISECONDS,
    TRAIN_LOSS, TRAIN_PEAK_MEMORY_BYTES, TRAIN_SECONDS, TRAINABLE_PARAMETERS,
};
use crate::proto::v1;

/// A tuning that ended.
#[derive(Debug)]
pub struct Facts<'a> {
    pub report: &'a v1::TrainingReport,
    /// Numbers that were trained, and those that are kept; without a new head.
    pub trained: u64,
    pub kept: u64,
    /// Ranks of the linears after training, 0 where nothing is left; empty where nothing has ranks.
    pub ranks: &'a [usize],
    /// Of the files.
    pub bytes: u64,
    /// The start of the method included.
    pub seconds: f64,
    /// 0 where the system does not say.
    pub peak_bytes: u64,
}

/// The measurements of a tuning.
pub fn measure(facts: &Facts<'_>) -> Vec<v1::Measurement> {
    let Facts { report, .. } = facts;
    let threads = rayon::current_num_threads();
    let timed = format!("{} updates, {threads} threads", report.steps);
    let mut out = vec![
        TRAINABLE_PARAMETERS.measured(facts.trained as f64, "without the head"),
        KEPT_PARAMETERS.measured(facts.kept as f64, "without the head"),
        ADAPTER_BYTES.measured(facts.bytes as f64, "the files that the adapter needs"),
        TRAIN_SECONDS.measured(facts.seconds, &timed),
        STEP_MILLISECONDS.measured(report.step_seconds * 1e3, &timed),
    ];
    if let Some(loss) = last_loss(report) {
        out.push(TRAIN_LOSS.measured(loss, "the last tenth of the updates, dropout included"));
    }
    if facts.peak_bytes > 0 {
        let protocol = format!("the whole process, {threads} threads");
        out.push(TRAIN_PEAK_MEMORY_BYTES.measured(facts.peak_bytes as f64, protocol));
    }
    if !facts.ranks.is_empty() {
        let ranks: Vec<f64> = facts.ranks.iter().map(|rank| *rank as f64).collect();
        let mean = ranks.iter().sum::<f64>() / ranks.len() as f64;
        let squares: f64 = ranks.iter().map(|rank| (rank - mean).powi(2)).sum();
        let protocol = format!("{} linears", ranks.len());
        out.push(KEPT_RANKS.measured(mean, &protocol));
        out.push(KEPT_RANKS_DEVIATION.measured((squares / ranks.len() as f64).sqrt(), &protocol));
    }
    out
}

/// Mean loss over the last tenth of the updates, by the points that end in it.
fn last_loss(report: &v1::TrainingReport) -> Option<f64> {
    let from = report.steps - report.steps / 10;
    let last = report.points.iter().filter(|point| point.step >= from);
    let losses: Vec<f64> = last.map(|point| point.loss).collect();
    (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_losses_by_hand() {
        let point = |step: i64, loss: f64| v1::TrainingPoint { step, loss, ..Default::default() };
        let report = v1::TrainingReport {
            steps: 20,
            points: (1..=20).map(|step| point(step, step as f64)).collect(),
            step_seconds: 0.25,
            ..Default::default()
        };
        let facts = Facts {
            report: &report,
            trained: 100,
            kept: 60,
            ranks: &[2, 4, 0],
            bytes: 500,
            seconds: 3.0,
            peak_bytes: 0,
        };
        let found = measure(&facts);
        let value = |metric: &str| found.iter().find(|m| m.metric == metric).map(|m| m.value);
        assert_eq!(value("train_loss"), Some(19.0));
        assert_eq!(value("step_milliseconds"), Some(250.0));
        assert_eq!(
            (value("trainable_parameters"), value("kept_parameters")),
            (Some(100.0), Some(60.0))
        );
        assert_eq!(value("kept_ranks"), Some(2.0));
        let deviation = (8f64 / 3.0).sqrt();
        assert!((value("kept_ranks_deviation").unwrap() - deviation).abs() < 1e-12);
        assert_eq!(value("train_peak_memory_bytes"), None);
        let none = measure(&Facts { ranks: &[], ..facts });
        assert!(none.iter().all(|m| m.metric != "kept_ranks"));
    }
}
