//! Methods that remove feed-forward channels by scores which are compared over all blocks. They differ in the
//! score, and in whether what a removed channel gave on average stays as a bias.

use serde_json::json;

use super::ffn_walk::{self, Block};
use super::slimming::{self, Slim};
use super::{cost, seeded};
use crate::calibrate;
use crate::error::Result;
use crate::methods::{Estimate, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;

/// What is added to the bias of what leads out of a block that keeps these channels.
type Bias = fn(&Model, &Block, &[usize]) -> Result<Vec<f32>>;

/// What makes such a method.
#[derive(Clone, Copy)]
pub struct Rule {
    /// Scores of a block's channels.
    pub score: fn(&Model, &Block) -> Result<Vec<f64>>,
    /// Where biases come in.
    pub bias: Option<Bias>,
}

/// The options as a message has them.
pub struct Given<'a> {
    /// Share of the channels that goes.
    pub ratio: Option<f64>,
    /// Multiple that widths become.
    pub round_to: Option<u32>,
    /// Numbers of what stays.
    pub values: i32,
    pub calibration: Option<&'a v1::Calibration>,
}

impl Given<'_> {
    /// Whether what comes out depends on random numbers.
    pub fn seeded(&self) -> bool {
        seeded(self.calibration) && self.ratio != Some(0.0)
    }

    fn read(&self) -> Result<(Slim, calibrate::Options)> {
        let slim = Slim::read(self.ratio, self.round_to, self.values)?;
        Ok((slim, calibrate::Options::read(self.calibration)?))
    }

    /// Refuses early and says what the step costs, and what the model will be.
    pub fn check(&self, rule: Rule, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let (slim, calibration) = self.read()?;
        calibration.check(model)?;
        let after = slim.check(model, true, rule.bias.is_some())?;
        Ok((cost::calibrated(model, &after, &calibration, false), after))
    }

    /// Runs the text, scores, and removes.
    pub fn apply(&self, rule: Rule, cx: &StepContext<'_>, model: Model) -> Result<Outcome> {
        let (slim, calibration) = self.read()?;
        let before = model.info();
        let seen = ffn_walk::collect(cx, &model, &calibration, &cx.progress.part(0.0, 0.9))?;
        let mut biases = None;
        let kept = if slim.nothing() {
            slimming::full(&model)?.into_iter().map(|wide| (0..wide).collect()).collect()
        } else {
            let each = seen.blocks.iter().map(|block| (rule.score)(&model, block));
            let kept = slimming::across_blocks(&each.collect::<Result<Vec<_>>>()?, &slim);
            if let Some(bias) = rule.bias {
                let each = seen.blocks.iter().zip(&kept).map(|(b, kept)| bias(&model, b, kept));
                biases = Some(each.collect::<Result<Vec<_>>>()?);
            }
            kept
        };
        let progress = cx.progress.part(0.9, 1.0);
        let model = slimming::slim(model, &kept, biases.as_deref(), slim.values, &progress)?;
        let (tokens, warnings) = (calibration.tokens(), seen.warnings);
        Ok(slimming::outcome((model, &before), &kept, json!({}), tokens, warnings))
    }
}
