//! Wanda by channels, as the code of CFSP (arXiv 2409.13199) has it for a yardstick: the score of channel `j` is
//! `mean_i |W_down,ij| ||h_j||`, taken relative to mean and spread of its block; the highest of all blocks stay.

use serde_json::json;

use super::slimming::{self, Slim};
use super::{cost, ffn_walk, seeded};
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
        seeded(self.calibration.as_ref()) && self.ratio != Some(0.0)
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let slim = Slim::read(self.ratio, self.round_to, self.values)?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        calibration.check(model)?;
        let after = slim.check(model, true, false)?;
        Ok((cost::calibrated(model, &after, &calibration, false), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let slim = Slim::read(self.ratio, self.round_to, self.values)?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        let before = model.info();
        let seen = ffn_walk::collect(cx, &model, &calibration, &cx.progress.part(0.0, 0.9))?;
        let mut scores = Vec::with_capacity(seen.blocks.len());
        for block in &seen.blocks {
            let weight = model.weight(&block.parts.out)?;
            let rows = weight.rows().max(1) as f64;
            let sums = slimming::column_sums(&weight.to_f32(), weight.cols(), f64::abs);
            let norms = block.channels.squares();
            scores.push(sums.iter().zip(norms).map(|(s, n)| s / rows * n.sqrt()).collect());
        }
        let kept = match slim.nothing() {
            true => slimming::full(&model)?.iter().map(|w| (0..*w).collect()).collect(),
            false => slimming::across_blocks(&scores, &slim),
        };
        let progress = cx.progress.part(0.9, 1.0);
        let model = slimming::slim(model, &kept, None, slim.values, &progress)?;
        let tokens = calibration.tokens();
        Ok(slimming::outcome((model, &before), &kept, json!({}), tokens, seen.warnings))
    }
}
