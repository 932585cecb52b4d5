//! What the loop asks of a model: losses as sums, and the gradients of those sums.

use super::batch::Batch;
use super::parameters::{Gradients, Parameters};
use crate::error::Result;

/// Sums over what a batch counts: tokens, or rows where the target is of a whole row. They are sums so
/// that those of many batches add up to those of one batch with all the rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// Sum of the losses: nats, or squared errors.
    pub loss: f64,
    /// What is counted, [`Batch::counted`].
    pub count: u64,
    /// Those whose likeliest class is the right one; 0 where nothing is classified.
    pub correct: u64,
}

impl LossSums {
    /// Adds those of another batch.
    pub fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.count += other.count;
        self.correct += other.correct;
    }

    /// Mean loss; 0 of nothing.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.loss / self.count as f64 }
    }

    /// Share that is right; 0 of nothing.
    pub fn accuracy(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.correct as f64 / self.count as f64 }
    }
}

/// A model with an objective, as the loop sees it.
pub trait LossAndGradients {
    /// The sums of a batch in training (dropout from [`Batch::random`]) and the gradients of
    /// [`LossSums::loss`] by the parameters, in their shapes. Parameters that took no part have none.
    fn loss_and_gradients(
        &mut self,
        batch: &Batch,
        parameters: &Parameters,
    ) -> Result<(LossSums, Gradients)>;

    /// The sums of a batch as the model answers, without dropout.
    fn loss(&mut self, batch: &Batch, parameters: &Parameters) -> Result<LossSums>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_give_the_mean_over_all_and_not_the_mean_of_means() {
        let mut sums = LossSums { loss: 6.0, count: 3, correct: 1 };
        sums.add(LossSums { loss: 1.0, count: 1, correct: 1 });
        assert_eq!((sums.mean(), sums.accuracy()), (1.75, 0.5));
        assert_eq!((LossSums::default().mean(), LossSums::default().accuracy()), (0.0, 0.0));
    }
}
