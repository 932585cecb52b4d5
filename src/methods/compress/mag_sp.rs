//! Structured magnitude pruning, a yardstick: of every block the same share of feed-forward channels goes, those
//! with the shortest columns in the weight that leads out, `||W_down[:, j]||`.

use serde_json::json;

use super::slimming::{self, Parts, Slim};
use super::{check_finite, cost};
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;

static CARD: Card = Card {
    name: "mag_sp",
    title: "Structured magnitude",
    verb: "compress",
    summary: "Removes the same share of feed-forward channels from each block, those with the shortest \
              outgoing weights.",
    paper: "Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626, by \
            channels",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &["dsnot", "gptq", "round_to_nearest", "sparsegpt", "wanda"],
};

impl Method for v1::MagSp {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Slim::resolve(&mut self.ratio, &mut self.round_to, &mut self.values);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn seeded(&self) -> bool {
        false
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let slim = Slim::read(self.ratio, self.round_to, self.values)?;
        let after = slim.check(model, false, false)?;
        Ok((cost::alone(model, &after), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let slim = Slim::read(self.ratio, self.round_to, self.values)?;
        let before = model.info();
        let full = slimming::full(&model)?;
        let wanted: Vec<f64> = full.iter().map(|w| *w as f64 * (1.0 - slim.ratio)).collect();
        let widths = match slim.nothing() {
            true => full.clone(),
            false => slimming::widths(&wanted, &full, slim.unit, slimming::total(&full, &slim)),
        };
        let mut kept = Vec::with_capacity(full.len());
        for (block, width) in widths.iter().enumerate() {
            cx.progress.report(0.5 * block as f64 / full.len() as f64, "scoring channels")?;
            let name = Parts::of(&model.family, block)?.out;
            let weight = model.weight(&name)?;
            let values = weight.to_f32();
            check_finite(&name, &values)?;
            let squares = slimming::column_sums(&values, weight.cols(), |w| w * w);
            kept.push(slimming::best(&squares, *width));
        }
        let progress = cx.progress.part(0.5, 1.0);
        let model = slimming::slim(model, &kept, None, slim.values, &progress)?;
        Ok(slimming::outcome((model, &before), &kept, json!({}), 0, Vec::new()))
    }
}
