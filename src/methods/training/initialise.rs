//! New random weights in the place of a model's: so that arms of one comparison can train nets of different
//! widths from one base.

use serde_json::{Map, Value, json};

use super::net::not_trained;
use crate::error::{Error, Reason, Result};
use crate::methods::{AnyOutcome, Card, Estimate, Learning, Method, Outcome, StepContext};
use crate::models::{AnyFamily, AnyInfo, AnyModel, Model, ModelInfo, footprint, random};
use crate::proto::v1;

static CARD: Card = Card {
    name: "initialise",
    title: "New weights",
    verb: "train",
    summary: "Draws new random weights, for layers that may be wider or narrower: where training from scratch \
              begins.",
    paper: "none: He et al. (arXiv 1502.01852) for convolutions, the usual uniform one for LSTM layers, normal \
            ones for towers",
    needs_calibration: false,
    families: &["vision", "lstm", "two_tower"],
    followed_by: &["train", "gradual"],
};

/// Keys that say which kind of model it is and what its data are.
const FIXED: [&str; 3] = ["model_type", "vocab_size", "num_labels"];

/// The configuration of the new model.
fn config(given: &v1::Initialise, before: &Value) -> Result<Value> {
    let mut config = before.clone();
    let map = config.as_object_mut().ok_or_else(|| Error::internal("config.json is no object"))?;
    let overrides = given.overrides.clone().unwrap_or_default();
    let overrides = serde_json::to_value(overrides)
        .map_err(|e| Error::internal(format!("overrides have no JSON form: {e}")))?;
    let overrides: Map<String, Value> =
        random::whole(overrides).as_object().cloned().unwrap_or_default();
    for (key, value) in overrides {
        if FIXED.contains(&key.as_str()) {
            let problem = format!("'{key}' is the base's to say; create a model with another one");
            return Err(Error::option("overrides", problem));
        }
        map.insert(key, value);
    }
    if let Some(width) = given.width {
        if !(width > 0.0 && width <= 64.0) {
            return Err(Error::option("width", format!("{width} is outside (0, 64]")));
        }
        let key = match map.get("model_type").and_then(Value::as_str) {
            Some("mobilenet_v1") => "depth_multiplier",
            _ => "width",
        };
        let before = map.get(key).and_then(Value::as_f64).unwrap_or(1.0);
        map.insert(key.to_owned(), json!(before * width));
    }
    Ok(config)
}

/// A configuration that is bad is the options' fault.
fn blame(error: Error) -> Error {
    match error.reason() {
        Reason::UnsupportedModel | Reason::TooLarge => Error::option("overrides", error.message()),
        _ => error,
    }
}

impl Method for v1::Initialise {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        self.width.get_or_insert(1.0);
        self.overrides.get_or_insert_default();
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
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
        match &model.family {
            AnyFamily::Vision(_) | AnyFamily::Lstm(_) | AnyFamily::TwoTower(_) => {}
            AnyFamily::Encoder(config) => return Err(not_trained(&config.architecture)),
            AnyFamily::Decoder(_) => {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    "decoders are not trained from scratch here; name an image classifier, an LSTM or two \
                     towers, as `planish models create` makes them",
                ));
            }
        }
        let mut after = random::info(config(self, &model.config)?).map_err(blame)?;
        after.has_tokenizer = model.has_tokenizer;
        let bytes = after.bytes();
        let estimate = Estimate {
            weight_bytes: bytes,
            memory_bytes: 2 * bytes,
            seconds: 0.01 + bytes as f64 / 1e8,
            calibration_tokens: 0,
        };
        Ok((estimate, after))
    }

    fn apply_any(
        &self,
        cx: &mut StepContext<'_>,
        _learning: &mut Learning<'_>,
        model: AnyModel,
    ) -> Result<AnyOutcome> {
        cx.progress.report(0.0, "drawing weights")?;
        let stream = cx.random.child("weights");
        let mut new = random::model(config(self, model.config())?, &stream).map_err(blame)?;
        new.set_tokenizer(model.tokenizer().cloned());
        let found = footprint::footprint(new.weights());
        Ok(Outcome {
            record: json!({ "parameters": new.parameters(), "nonzero_parameters": found.nonzero }),
            model: new,
            calibration_tokens: 0,
            zero_share: 0.0,
            warnings: Vec::new(),
        })
    }
}
