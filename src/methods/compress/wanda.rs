//! Wanda (Sun et al. 2023, "A simple and effective pruning approach for large language models",
//! arXiv 2306.11695).
//!
//! Score of weight (i, j): `|W_ij| * ||X_j||`, equation 1. Compared within each output row: the
//! `floor(p * C)` smallest go; n:m: the n smallest of each m consecutive inputs. No weight is
//! updated. Block by block: later blocks see what the pruned ones before them give.

use super::mask::Mask;
use super::sparsity::{Amount, Sparsity};
use super::{calibrated, cost, prune_each, seeded};
use crate::calibrate;
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;

static CARD: Card = Card {
    name: "wanda",
    title: "Wanda",
    verb: "compress",
    summary: "Prunes by weight times input norm, compared within each output row; no weight is \
              updated.",
    paper: "A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &["gptq", "magnitude", "round_to_nearest", "sparsegpt", "wanda"],
};

/// The mask of `[rows, cols]` weights whose inputs have these norms.
pub fn mask(weights: &[f32], norms: &[f32], amount: Amount) -> Mask {
    let cols = norms.len();
    let score = |w: f32, j: usize| w.abs() * norms[j];
    match amount {
        Amount::Share(_) => Mask::smallest_of_rows(weights, cols, amount.of(cols), score),
        Amount::NOfM { n, m } => Mask::n_of_m(weights, cols, (n, m), score),
    }
}

impl Method for v1::Wanda {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Sparsity::resolve(&mut self.sparsity);
        calibrate::Options::resolve(&mut self.calibration);
    }

    fn datasets(&self) -> Vec<&str> {
        self.calibration.iter().map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        seeded(self.calibration.as_ref())
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        calibration.check(model)?;
        let after = sparsity.check(model, &|rows, cols| rows * sparsity.amount.of(cols))?;
        Ok((cost::calibrated(model, &after, &calibration, false), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        let names = sparsity.names(&model.family)?;
        calibrated(cx, model, &names, &calibration, false, &mut |site, _| {
            let norms = site.inputs.norms();
            let named = site.names.iter().zip(&site.dense);
            named
                .map(|(name, weights)| {
                    let mask = mask(weights, &norms, sparsity.amount);
                    prune_each(name, weights, norms.len(), &mask, &sparsity)
                })
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::compress::magnitude;

    #[test]
    fn norms_decide_and_rows_do_not_see_each_other() {
        let weights = [1.0, 2.0, 3.0, 4.0, 100.0, 1.0, 1.0, 1.0];
        // Scores of row 0: 10, 2, 3, 4; of row 1: 1000, 1, 1, 1.
        let both = mask(&weights, &[10.0, 1.0, 1.0, 1.0], Amount::Share(0.5));
        assert_eq!(both.pruned(), [false, true, true, false, false, true, true, false]);
        let one = mask(&weights[..4], &[10.0, 1.0, 1.0, 1.0], Amount::Share(0.5));
        assert_eq!(one.pruned(), &both.pruned()[..4]);
    }

    #[test]
    fn equal_norms_give_magnitude_by_row() {
        let weights: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.5) / 8.0).collect();
        for amount in [Amount::Share(0.5), Amount::NOfM { n: 2, m: 4 }] {
            let wanda = mask(&weights, &[3.0; 16], amount);
            for (row, pruned) in weights.chunks(16).zip(wanda.pruned().chunks(16)) {
                assert_eq!(magnitude::mask(row, 16, amount).pruned(), pruned);
            }
        }
    }
}
