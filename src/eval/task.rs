//! Tasks: how many records of a data set a tuned model gets right, and at which loss.
//!
//! [`classes`], [`values`] and [`losses`] make the measurements of anything that gives scores for records,
//! whatever family it is of; [`measure`] asks models that read text.

use sha2::{Digest, Sha256};

use super::metrics::{self, TASK_ACCURACY, TASK_LOSS, TASK_MACRO_F1};
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::nn::tuning::Tuning;
use crate::progress::Progress;
use crate::proto::v1;
use crate::train::network::Network;
use crate::train::parameters::Parameters;
use crate::train::pass::CLASSIFIER;

/// Records that go through a model together.
const BATCH: usize = 32;

/// A model that reads text, with what was tuned.
pub struct Subject<'a> {
    pub network: &'a Network<'a>,
    pub tuning: &'a dyn Tuning,
    /// Empty where the model has its own.
    pub head: &'a Parameters,
}

/// Measures a model on records, which all ask for the same. `name` is the data set's.
///
/// # Errors
/// DATASET_UNSUITABLE without records, MODEL_UNSUITABLE for records that the model's family has no head for,
/// NON_FINITE for scores that are not.
pub fn measure(
    subject: &Subject<'_>,
    records: &[Sequence],
    name: &str,
    progress: &Progress,
) -> Result<Vec<v1::Measurement>> {
    let Some(first) = records.first() else {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            format!("'{name}' has no record to measure on"),
        ));
    };
    let protocol = format!(
        "{name}, {} records ({}), {} tokens at most, {} threads",
        records.len(),
        mark(records),
        records.iter().map(|record| record.tokens.len()).max().unwrap_or_default(),
        rayon::current_num_threads(),
    );
    let pass = subject.network.pass(subject.tuning);
    let message = "measuring the task";
    if let Target::Next(_) = first.target {
        let mut found = Vec::with_capacity(records.len());
        for (i, record) in records.iter().enumerate() {
            progress.report(i as f64 / records.len() as f64, message)?;
            let sums = pass.loss(&[record], subject.head)?;
            if sums.count > 0 {
                found.push(sums.mean());
            }
        }
        return Ok(vec![losses(found, &protocol)?]);
    }
    let mut scores = Vec::new();
    for (i, batch) in records.chunks(BATCH).enumerate() {
        progress.report((i * BATCH) as f64 / records.len() as f64, message)?;
        scores.extend(pass.scores(&batch.iter().collect::<Vec<_>>(), subject.head)?);
    }
    let outputs = subject.head.get(CLASSIFIER[0]).map_or(0, |weight| weight.var.dims()[0]);
    match first.target {
        Target::Value(_) => {
            let wanted = records.iter().filter_map(|record| match record.target {
                Target::Value(value) => Some(value),
                _ => None,
            });
            Ok(vec![values(&scores, &wanted.collect::<Vec<_>>(), &protocol)?])
        }
        Target::Class(_) => {
            let wanted = records.iter().filter_map(|record| match record.target {
                Target::Class(class) => Some(class),
                _ => None,
            });
            classes(&scores, outputs, &wanted.collect::<Vec<_>>(), &protocol)
        }
        Target::Tags(_) => {
            let tags = records.iter().flat_map(|record| match &record.target {
                Target::Tags(tags) => tags.as_slice(),
                _ => &[],
            });
            let wanted: Vec<u32> = tags.filter_map(|tag| *tag).collect();
            classes(&scores, outputs, &wanted, &protocol)
        }
        Target::Next(_) => Err(Error::internal("texts have no scores")),
    }
}

/// `task_accuracy`, `task_macro_f1` and `task_loss` (cross-entropy in nats) of scores `[records, outputs]`
/// before the softmax.
///
/// # Errors
/// INTERNAL for another number of scores, NON_FINITE for scores that are not finite.
pub fn classes(
    scores: &[f32],
    outputs: usize,
    wanted: &[u32],
    protocol: &str,
) -> Result<Vec<v1::Measurement>> {
    if outputs == 0 || scores.len() != wanted.len().saturating_mul(outputs) {
        return Err(Error::internal(format!(
            "{} scores for {} records of {outputs} classes",
            scores.len(),
            wanted.len()
        )));
    }
    let (mut right, mut predicted, mut loss) = (Vec::new(), Vec::new(), 0.0);
    for (row, class) in scores.chunks_exact(outputs).zip(wanted) {
        let class = *class as usize;
        let best = (0..outputs).max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a)));
        let best = best.unwrap_or_default();
        let most = f64::from(row[best]);
        let sum: f64 = row.iter().map(|score| (f64::from(*score) - most).exp()).sum();
        let own = row.get(class).map(|score| f64::from(*score));
        // A class that the head does not know is wrong, and as unlikely as can be told.
        loss += sum.ln() + most - own.unwrap_or(most - 1e3);
        right.push(f64::from(u8::from(best == class)));
        predicted.push(best);
    }
    let loss = finite(loss / wanted.len().max(1) as f64)?;
    let wanted: Vec<usize> = wanted.iter().map(|class| *class as usize).collect();
    let mut out = vec![TASK_ACCURACY.sampled(right, protocol)];
    let f1 = metrics::macro_f1(&predicted, &wanted, outputs);
    out.extend(f1.map(|f1| TASK_MACRO_F1.measured(f1, protocol)));
    out.push(TASK_LOSS.measured(loss, protocol));
    Ok(out)
}

/// `task_loss` of numbers: their squared errors.
///
/// # Errors
/// INTERNAL for another number of scores, NON_FINITE for scores that are not finite.
pub fn values(scores: &[f32], wanted: &[f32], protocol: &str) -> Result<v1::Measurement> {
    if scores.len() != wanted.len() {
        return Err(Error::internal(format!("{} scores for {}", scores.len(), wanted.len())));
    }
    let squares = scores.iter().zip(wanted).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    losses(squares.collect(), protocol)
}

/// `task_loss` of records by their losses.
///
/// # Errors
/// DATASET_UNSUITABLE for none, NON_FINITE for losses that are not finite.
pub fn losses(losses: Vec<f64>, protocol: &str) -> Result<v1::Measurement> {
    if losses.is_empty() {
        return Err(Error::new(
            Reason::DatasetUnsuitable,
            "no record of the task has anything to predict; choose another data set",
        ));
    }
    let found = TASK_LOSS.sampled(losses, protocol);
    finite(found.value)?;
    Ok(found)
}

fn finite(loss: f64) -> Result<f64> {
    if loss.is_finite() {
        return Ok(loss);
    }
    Err(Error::new(
        Reason::NonFinite,
        "the model's scores for the task are not finite; the adapter or the model is broken",
    ))
}

/// The first digits of a digest: other records, or other tokens, are another protocol.
fn mark(records: &[Sequence]) -> String {
    let mut hash = Sha256::new();
    for record in records {
        hash.update(bytemuck::cast_slice::<u32, u8>(&record.tokens));
        hash.update(format!("{:?}", record.target));
    }
    hash.finalize().iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(found: &[v1::Measurement], metric: &str) -> f64 {
        found.iter().find(|m| m.metric == metric).expect(metric).value
    }

    #[test]
    fn scores_are_held_against_classes() {
        // ln of the softmax by hand: two equal scores are half each.
        let scores = [0.0, 0.0, 3f32.ln(), 0.0, 0.0, 3f32.ln(), 3f32.ln(), 0.0];
        let found = classes(&scores, 2, &[0, 0, 1, 1], "p").unwrap();
        // The first of equal ones is taken; the last is wrong.
        assert_eq!(found[0].samples, [1.0, 1.0, 1.0, 0.0]);
        assert_eq!(value(&found, "task_accuracy"), 0.75);
        // Class 0: TP 2, FP 1, FN 0; class 1: TP 1, FP 0, FN 1.
        let f1 = (4.0 / 5.0 + 2.0 / 3.0) / 2.0;
        assert!((value(&found, "task_macro_f1") - f1).abs() < 1e-12);
        let loss = (2f64.ln() + 2.0 * (4.0f64 / 3.0).ln() + 4f64.ln()) / 4.0;
        assert!((value(&found, "task_loss") - loss).abs() < 1e-6);
        assert!(classes(&scores, 3, &[0, 0, 1, 1], "p").is_err());
        let broken = classes(&[f32::NAN, 0.0], 2, &[0], "p").unwrap_err();
        assert_eq!(broken.reason(), Reason::NonFinite);
    }

    #[test]
    fn numbers_have_squared_errors() {
        let found = values(&[1.0, 2.0], &[1.0, 5.0], "p").unwrap();
        assert_eq!((found.value, found.samples), (4.5, vec![0.0, 9.0]));
        assert!(values(&[1.0], &[], "p").is_err());
        assert!(losses(Vec::new(), "p").is_err());
    }
}
