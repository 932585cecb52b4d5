//! What the loop trains: a network with its tuned parts.

use super::basis;
use super::tuned::Tuned;
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Result};
use crate::train::batch::{Batch, NO_LABEL, Targets};
use crate::train::loss::{LossAndGradients, LossSums};
use crate::train::parameters::{Gradients, Parameters};
use crate::train::pass::Pass;

/// A pass through a network that is tuned so.
pub struct Learner<'a> {
    pass: Pass<'a>,
    tuned: &'a Tuned,
}

impl<'a> Learner<'a> {
    /// `pass` must ask `tuned` for what is tuned.
    pub fn new(pass: Pass<'a>, tuned: &'a Tuned) -> Self {
        Self { pass, tuned }
    }
}

impl LossAndGradients for Learner<'_> {
    fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<(LossSums, Gradients)> {
        let sequences = documents(batch)?;
        // What is dropped follows from the batch, not from how many came before: a run that goes on from a
        // checkpoint drops the same.
        let [low, high] = basis::key(batch.random.path());
        self.tuned.set_pass(Some(u64::from(low) | (u64::from(high >> 1) << 32)));
        let found = self.pass.loss_and_gradients(&sequences.iter().collect::<Vec<_>>(), parameters);
        self.tuned.set_pass(None);
        found
    }

    fn loss(&mut self, batch: &Batch, parameters: &Parameters) -> Result<LossSums> {
        let sequences = documents(batch)?;
        self.pass.loss(&sequences.iter().collect::<Vec<_>>(), parameters)
    }
}

/// The documents of a batch, without padding.
fn documents(batch: &Batch) -> Result<Vec<Sequence>> {
    let short = || Error::internal("a batch has fewer targets than rows");
    let mut all = Vec::with_capacity(batch.rows);
    if let Targets::Pairs(labels) = &batch.targets {
        for pair in batch.documents().chunks(2) {
            let [chosen, rejected] = pair else { return Err(short()) };
            let counts = |places: &std::ops::Range<usize>| {
                let start = places.start;
                places.clone().map(move |i| i > start && labels[i - 1] != NO_LABEL)
            };
            let target = Target::Pair {
                chosen: chosen.len(),
                counts: counts(chosen).chain(counts(rejected)).collect(),
            };
            let tokens = batch.tokens[chosen.start..rejected.end].to_vec();
            all.push(Sequence { tokens, target, line: 0 });
        }
        return Ok(all);
    }
    for (row, places) in batch.documents().into_iter().enumerate() {
        let target = match &batch.targets {
            Targets::Next(labels) => {
                // The label before a token says whether that counts.
                let counts = |i: usize| i > places.start && labels[i - 1] != NO_LABEL;
                Target::Next(places.clone().map(counts).collect())
            }
            Targets::Tags(labels) => {
                let tag = |label: &u32| (*label != NO_LABEL).then_some(*label);
                Target::Tags(labels[places.clone()].iter().map(tag).collect())
            }
            Targets::Classes(classes) => Target::Class(*classes.get(row).ok_or_else(short)?),
            Targets::Values(values) => Target::Value(*values.get(row).ok_or_else(short)?),
            Targets::Labels(classes) => Target::Labels(classes.get(row).ok_or_else(short)?.clone()),
            Targets::Masked(labels) => {
                let token = |label: &u32| (*label != NO_LABEL).then_some(*label);
                Target::Hidden(labels[places.clone()].iter().map(token).collect())
            }
            Targets::Pairs(_) => return Err(short()),
        };
        all.push(Sequence { tokens: batch.tokens[places].to_vec(), target, line: 0 });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Stream;

    fn batch(segments: &[u32], targets: Targets, rows: usize) -> Batch {
        let size = segments.len();
        Batch {
            rows,
            width: size / rows,
            tokens: (10..10 + size as u32).collect(),
            positions: vec![0; size],
            segments: segments.to_vec(),
            targets,
            random: Stream::root(1),
        }
    }

    #[test]
    fn documents_ask_for_what_their_batch_asks_for() {
        let n = NO_LABEL;
        // Two documents in the first row, one and padding in the second.
        let labels = vec![11, n, 13, n, n, 16, n, n];
        let found = documents(&batch(&[1, 1, 2, 2, 1, 1, 1, 0], Targets::Next(labels), 2)).unwrap();
        let seen: Vec<_> = found.into_iter().map(|s| (s.tokens, s.target)).collect();
        assert_eq!(
            seen,
            [
                (vec![10, 11], Target::Next(vec![false, true])),
                (vec![12, 13], Target::Next(vec![false, true])),
                (vec![14, 15, 16], Target::Next(vec![false, false, true])),
            ]
        );
        let tags = documents(&batch(&[1, 1, 1, 0], Targets::Tags(vec![n, 2, n, n]), 1)).unwrap();
        assert_eq!(tags[0].target, Target::Tags(vec![None, Some(2), None]));
        let classes = documents(&batch(&[1, 0, 1, 1], Targets::Classes(vec![3, 1]), 2)).unwrap();
        assert_eq!(classes[1].tokens, [12, 13]);
        assert_eq!(classes[1].target, Target::Class(1));
        assert!(documents(&batch(&[1, 1], Targets::Classes(vec![0]), 2)).is_err());
        let masked = documents(&batch(&[1, 1], Targets::Masked(vec![n, 4]), 1)).unwrap();
        assert_eq!(masked[0].target, Target::Hidden(vec![None, Some(4)]));
        let labels = vec![vec![1, 2], vec![]];
        let several = documents(&batch(&[1, 1], Targets::Labels(labels), 2)).unwrap();
        assert_eq!(several[1].target, Target::Labels(vec![]));
        // Two tokens are preferred to three; the first of each is never predicted.
        let labels = vec![11, n, 13, 14, n];
        let pairs = documents(&batch(&[1, 1, 2, 2, 2], Targets::Pairs(labels), 1)).unwrap();
        assert_eq!(pairs[0].tokens, [10, 11, 12, 13, 14]);
        let counts = vec![false, true, false, true, true];
        assert_eq!(pairs[0].target, Target::Pair { chosen: 2, counts });
        assert!(documents(&batch(&[1, 1], Targets::Pairs(vec![n, n]), 1)).is_err());
    }
}
