//! FLAP (An et al. 2023, "Fluctuation-based adaptive structured pruning for large language models", arXiv
//! 2312.11983), for feed-forward channels.
//!
//! The score of channel `j` is `Var(h_j) sum_i W_down,ij^2`, taken relative to mean and spread of its block; the
//! highest of all blocks stay. What a removed channel gave on average stays as a bias,
//! `b = sum_j W_down[:, j] mean_j`.
//!
//! Decided here: the variance is the plain one over all tokens (the public code's running mean uses one number
//! for two). Biases come into `mlp_bias` of the configuration, gate's and up's being zero; readers other than
//! this one know that key of llama only.

use super::across::{Given, Rule};
use super::ffn_walk::Block;
use super::slimming::{self, Slim};
use crate::calibrate;
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;

static CARD: Card = Card {
    name: "flap",
    title: "FLAP",
    verb: "compress",
    summary: "Removes the feed-forward channels that fluctuate least, compared over all blocks; a bias \
              takes the place of their mean.",
    paper: "Fluctuation-based Adaptive Structured Pruning for Large Language Models, arXiv 2312.11983",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &["dsnot", "gptq", "round_to_nearest", "sparsegpt", "wanda"],
};

/// `sum_j W[:, j] mean_j` over the channels that go.
fn lost(weight: &[f32], cols: usize, mean: &[f64], kept: &[usize]) -> Vec<f32> {
    let mut gone = vec![true; cols];
    kept.iter().for_each(|j| gone[*j] = false);
    let row = |row: &[f32]| -> f64 {
        let each = row.iter().zip(mean).zip(&gone).filter(|(_, gone)| **gone);
        each.map(|((w, m), _)| f64::from(*w) * m).sum()
    };
    weight.chunks(cols).map(|r| row(r) as f32).collect()
}

fn scores(model: &Model, block: &Block) -> Result<Vec<f64>> {
    let weight = model.weight(&block.parts.out)?;
    let squares = slimming::column_sums(&weight.to_f32(), weight.cols(), |w| w * w);
    Ok(squares.iter().zip(block.channels.variance()).map(|(s, v)| s * v).collect())
}

fn bias(model: &Model, block: &Block, kept: &[usize]) -> Result<Vec<f32>> {
    let weight = model.weight(&block.parts.out)?;
    Ok(lost(&weight.to_f32(), weight.cols(), block.channels.mean(), kept))
}

const RULE: Rule = Rule { score: scores, bias: Some(bias) };

impl v1::Flap {
    fn given(&self) -> Given<'_> {
        let &Self { ratio, round_to, values, ref calibration } = self;
        Given { ratio, round_to, values, calibration: calibration.as_ref() }
    }
}

impl Method for v1::Flap {
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
    use crate::calibrate::walk;
    use crate::error::Error;
    use crate::methods::compress::ffn_walk::Moved;
    use crate::methods::compress::slimming::Parts;
    use crate::methods::compress::testing::{self, weights};
    use crate::models::decoder::random;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Weight};
    use crate::progress::Progress;
    use crate::seed::Stream;

    #[test]
    fn the_mean_of_the_output_does_not_change() {
        let (rows, cols, tokens) = (12, 40, 300);
        let w = weights(rows, cols, 5);
        let x: Vec<f32> = weights(tokens, cols, 6)
            .iter()
            .enumerate()
            .map(|(i, v)| v + (i % cols) as f32)
            .collect();
        let mut seen = Inputs::new(cols, false);
        seen.add(&x);
        let kept: Vec<usize> = (0..cols).filter(|j| j % 3 != 1).collect();
        let bias = lost(&w, cols, seen.mean(), &kept);
        for r in 0..rows {
            let mean = |wanted: &dyn Fn(usize) -> bool| -> f64 {
                let each = x.chunks(cols).map(|x| {
                    let columns = (0..cols).filter(|j| wanted(*j));
                    columns.map(|j| f64::from(w[r * cols + j]) * f64::from(x[j])).sum::<f64>()
                });
                each.sum::<f64>() / tokens as f64
            };
            let (dense, pruned) = (mean(&|_| true), mean(&|j| kept.contains(&j)));
            let scale = 1.0 + dense.abs();
            assert!((dense - pruned - f64::from(bias[r])).abs() < 1e-4 * scale, "{dense} {pruned}");
        }
    }

    #[test]
    fn scores_and_biases_by_hand() {
        // Means 4, 1, 1 and variances 1, 1, 0; squared columns 10, 8, 16.
        let mut model = random::model(random::tiny("llama"), 1).expect("a model");
        let weight = [1.0, -2.0, 0.0, 3.0, 2.0, 4.0];
        let dense = Dense::from_f32(vec![2, 3], &weight, Dtype::F32).expect("dense");
        model.weights.insert("down".to_owned(), Arc::new(Weight::Dense(dense)));
        let mut channels = Inputs::new(3, false);
        channels.add(&[3.0, 0.0, 1.0, 5.0, 2.0, 1.0]);
        let parts = Parts { into: Vec::new(), out: "down".to_owned() };
        let block = Block { moved: Moved::default(), channels, parts };
        assert_eq!(scores(&model, &block).expect("scores"), [10.0, 8.0, 0.0]);
        assert_eq!(bias(&model, &block, &[0]).expect("a bias"), [-2.0, 6.0]);
        assert_eq!(bias(&model, &block, &[0, 1, 2]).expect("a bias"), [0.0, 0.0]);
    }

    #[test]
    fn states_after_a_block_keep_their_mean_on_the_calibration_text() {
        let model = random::model(random::tiny("llama"), 9).expect("a model");
        let calibration =
            v1::Calibration { sequences: Some(4), sequence_length: Some(16), ..Default::default() };
        let options = v1::Flap {
            ratio: Some(0.4),
            round_to: Some(16),
            values: v1::ValueType::F32.into(),
            calibration: Some(calibration),
        };
        let made = testing::apply(&options, &model).expect("removes").model;
        // The windows that the step saw.
        let read = calibrate::Options::read(options.calibration.as_ref()).expect("options");
        let stream = Stream::root(5).child("step 0").child("calibration");
        let no_texts = |name: &str| Err(Error::not_found(name, "there are no data sets here"));
        let sources = calibrate::Sources {
            model: &model,
            texts: &no_texts,
            stream: &stream,
            progress: &Progress::silent(),
        };
        let windows = calibrate::Shared::default().windows(&read, "", &sources).expect("windows");
        let means = |model: &Model| -> Vec<f64> {
            let walk = walk::of(&model.family);
            let mut hidden = vec![0.0; windows.tokens.len() * walk.width()];
            walk.embed(&model.weights, &windows.tokens, &mut hidden).expect("embeds");
            let block = walk.block(&model.weights, 0).expect("a block");
            block.forward(&mut hidden, windows.length, None);
            let mut sums = vec![0.0; walk.width()];
            for row in hidden.chunks(walk.width()) {
                sums.iter_mut().zip(row).for_each(|(s, v)| *s += f64::from(*v));
            }
            sums.iter().map(|s| s / windows.tokens.len() as f64).collect()
        };
        let want = means(&model);
        for (got, want) in means(&made).iter().zip(&want) {
            assert!((got - want).abs() < 1e-4, "{got} is not {want}");
        }
        // Without the bias it is another mean.
        let mut bare = made;
        let none = Dense::from_f32(vec![32], &[0.0; 32], Dtype::F32).expect("dense");
        let name = "model.layers.0.mlp.down_proj.bias".to_owned();
        assert!(bare.weights.insert(name, Arc::new(Weight::Dense(none))).is_some());
        assert!(means(&bare).iter().zip(&want).any(|(got, want)| (got - want).abs() > 1e-3));
    }
}
