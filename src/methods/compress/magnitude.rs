//! Magnitude pruning (Han et al. 2015, "Learning both weights and connections for efficient neural
//! networks", arXiv 1506.02626).
//!
//! Unstructured: one comparison for the whole tensor, the `floor(p * R * C)` smallest absolute weights
//! go. n:m: within each m consecutive inputs of a row the n smallest go. Needs no text.

use super::mask::Mask;
use super::sparsity::{Amount, Sparsity};
use super::{alone, cost, prune_each};
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;

static CARD: Card = Card {
    name: "magnitude",
    title: "Magnitude pruning",
    verb: "compress",
    summary: "Sets the smallest absolute weights of each tensor to zero; the yardstick for every \
              other pruning.",
    paper: "Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &["gptq", "magnitude", "round_to_nearest", "sparsegpt", "wanda"],
};

/// The mask of `[rows, cols]` weights.
pub fn mask(weights: &[f32], cols: usize, amount: Amount) -> Mask {
    match amount {
        Amount::Share(_) => Mask::smallest(weights, cols, amount.of(weights.len()), f32::abs),
        Amount::NOfM { n, m } => Mask::n_of_m(weights, cols, (n, m), |w, _| w.abs()),
    }
}

impl Method for v1::Magnitude {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Sparsity::resolve(&mut self.sparsity);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn seeded(&self) -> bool {
        false
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let after = sparsity.check(model, &|rows, cols| sparsity.amount.of(rows * cols))?;
        Ok((cost::alone(model, &after), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let names = sparsity.names(&model.family)?;
        alone(cx, model, &names, &|name, weights, cols| {
            let mask = mask(weights, cols, sparsity.amount);
            prune_each(name, weights, cols, &mask, &sparsity)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::methods::compress::testing;
    use crate::models::decoder::random;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Weight};

    #[test]
    fn the_smallest_of_the_tensor_go() {
        let weights = [0.1, -5.0, 0.2, 0.3, -0.05, 4.0, 0.2, 9.0];
        let mask_half = mask(&weights, 4, Amount::Share(0.5));
        // Smallest: 0.05, 0.1, 0.2 (index 2), 0.2 (index 6).
        assert_eq!(mask_half.pruned(), [true, false, true, false, true, false, true, false]);
        assert_eq!(mask(&weights, 4, Amount::Share(0.49)).count(), 3);
        let groups = mask(&weights, 4, Amount::NOfM { n: 1, m: 4 });
        assert_eq!(groups.pruned(), [true, false, false, false, true, false, false, false]);
    }

    #[test]
    fn rows_that_lose_all_are_said_and_counts_add_up() {
        let mut model = random::model(random::tiny("llama"), 4).expect("a model");
        let name = "model.layers.1.self_attn.q_proj.weight";
        // A row far below all others.
        let mut values = model.weights[name].to_f32();
        values[..32].iter_mut().for_each(|v| *v *= 1e-4);
        let dense = Dense::from_f32(vec![64, 32], &values, Dtype::F32).expect("dense");
        model.weights.insert(name.to_owned(), Arc::new(Weight::Dense(dense)));
        let sparsity = v1::Sparsity { share: Some(0.25), ..Default::default() };
        let options = v1::Magnitude { sparsity: Some(sparsity) };
        let made = testing::apply(&options, &model).expect("prunes");
        assert_eq!(made.warnings, [format!("1 rows of '{name}' hold no weight any more")]);
        assert_eq!(made.record["warnings"], json!(made.warnings));
        // 64 x 32 twice, 32 x 32 twice and 80 x 32 three times in each of three blocks, a quarter of each.
        assert_eq!(made.record["tensors"][name]["zeros"], 512);
        for block in ["0", "1", "2"] {
            let counts = json!({ "zeros": 3456, "elements": 13_824 });
            assert_eq!(made.record["blocks"][block], counts, "block {block}");
        }
        assert_eq!(made.record["total"], json!({ "zeros": 10_368, "elements": 41_472 }));
    }
}
