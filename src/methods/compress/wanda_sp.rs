//! Wanda by channels, as the code of CFSP (arXiv 2409.13199) has it for a yardstick: the score of channel `j` is
//! `mean_i |W_down,ij| ||h_j||`, taken relative to mean and spread of its block; the highest of all blocks stay.

use super::across::{Given, Rule};
use super::ffn_walk::Block;
use super::slimming::{self, Slim};
use crate::calibrate;
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;

static CARD: Card = Card {
    name: "wanda_sp",
    title: "Structured Wanda",
    verb: "compress",
    summary: "Removes the feed-forward channels with the smallest outgoing weights times activations, \
              compared over all blocks.",
    paper: "A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695, by \
            channels as in arXiv 2409.13199",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &["dsnot", "gptq", "round_to_nearest", "sparsegpt", "wanda"],
};

fn scores(model: &Model, block: &Block) -> Result<Vec<f64>> {
    let weight = model.weight(&block.parts.out)?;
    let rows = weight.rows().max(1) as f64;
    let sums = slimming::column_sums(&weight.to_f32(), weight.cols(), f64::abs);
    let norms = block.channels.squares();
    Ok(sums.iter().zip(norms).map(|(s, n)| s / rows * n.sqrt()).collect())
}

const RULE: Rule = Rule { score: scores, bias: None };

impl v1::WandaSp {
    fn given(&self) -> Given<'_> {
        let &Self { ratio, round_to, values, ref calibration } = self;
        Given { ratio, round_to, values, calibration: calibration.as_ref() }
    }
}

impl Method for v1::WandaSp {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Slim::resolve(&mut self.ratio, &mut self.round_to, &mut self.values);
        calibrate::Options::resolve(&mut self.calibration);
    }

    fn datasets(&self) -> Vec<&str> {
        self.calibration.iter().map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        self.given().seeded()
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        self.given().check(RULE, model)
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        self.given().apply(RULE, cx, model)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::calibrate::inputs::Inputs;
    use crate::methods::compress::ffn_walk::Moved;
    use crate::methods::compress::slimming::Parts;
    use crate::models::decoder::random;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Weight};

    #[test]
    fn scores_are_mean_weights_times_lengths_of_activations() {
        // Mean absolute weights 2, 2 and 2 over two outputs; activations (3, 0, 1) and (5, 2, 1).
        let mut model = random::model(random::tiny("llama"), 1).expect("a model");
        let weight = [1.0, -2.0, 0.0, 3.0, 2.0, 4.0];
        let dense = Dense::from_f32(vec![2, 3], &weight, Dtype::F32).expect("dense");
        model.weights.insert("down".to_owned(), Arc::new(Weight::Dense(dense)));
        let mut channels = Inputs::new(3, false);
        channels.add(&[3.0, 0.0, 1.0, 5.0, 2.0, 1.0]);
        let parts = Parts { into: Vec::new(), out: "down".to_owned() };
        let block = Block { moved: Moved::default(), channels, parts };
        let found = scores(&model, &block).expect("scores");
        let want = [2.0 * 34.0_f64.sqrt(), 2.0 * 2.0, 2.0 * 2.0_f64.sqrt()];
        assert!(found.iter().zip(want).all(|(f, w)| (f - w).abs() < 1e-12), "{found:?}");
    }
}
