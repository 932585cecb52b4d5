//! Training of all weights of a model, from random ones or from what it has learnt.

use std::collections::BTreeSet;

use serde_json::json;

use super::pruner::Pruner;
use super::run;
use crate::error::Result;
use crate::methods::{AnyOutcome, Card, Estimate, Learning, Method, Outcome, StepContext};
use crate::models::{AnyInfo, AnyModel, Model, ModelInfo};
use crate::proto::v1;

static CARD: Card = Card {
    name: "train",
    title: "Training",
    verb: "train",
    summary: "Trains all weights of a model; weights that are stored sparse keep their zeros.",
    paper: "none: the usual way, with AdamW (arXiv 1711.05101) or SGD",
    needs_calibration: false,
    families: &["decoder", "vision", "lstm", "two_tower"],
    followed_by: &["train", "gradual", "ecoflap"],
};

impl Method for v1::Train {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        run::resolve(&mut self.training);
    }

    fn datasets(&self) -> Vec<&str> {
        run::datasets(self.training.as_ref())
    }

    fn seeded(&self) -> bool {
        true
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let (estimate, after) = self.check_any(&AnyInfo::from(model.clone()))?;
        Ok((estimate, after.walked()?))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let mut learning = Learning::none(cx);
        self.apply_any(cx, &mut learning, model.into())?.walked()
    }

    fn check_any(&self, model: &AnyInfo) -> Result<(Estimate, AnyInfo)> {
        let settings = run::check(self.training.as_ref(), model)?;
        Ok((run::estimate(&settings, model, model.bytes()), model.clone()))
    }

    fn apply_any(
        &self,
        cx: &mut StepContext<'_>,
        learning: &mut Learning<'_>,
        model: AnyModel,
    ) -> Result<AnyOutcome> {
        let settings = run::check(self.training.as_ref(), &model.info())?;
        let training = self.training.clone().unwrap_or_default();
        let masks = run::sparse_masks(&model);
        let names: BTreeSet<String> = masks.iter().map(|(name, ..)| name.clone()).collect();
        let mut ended = run::train((&*cx, &*learning), &model, (&training, &settings), |_, _| {
            Ok((!masks.is_empty()).then(|| Pruner::fixed(masks)))
        })?;
        let model = run::stored(model, &ended, |_| None)?;
        let (tensors, zeros, elements) = run::record(&model, &names);
        learning.training = Some(std::mem::take(&mut ended.report));
        Ok(Outcome {
            record: json!({
                "tensors": tensors,
                "total": { "zeros": zeros, "elements": elements },
                "warnings": ended.warnings,
            }),
            model,
            calibration_tokens: 0,
            zero_share: zeros as f64 / elements.max(1) as f64,
            warnings: ended.warnings,
        })
    }
}
