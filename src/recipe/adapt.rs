//! Adaptations: which method on which model, with what data, checked before anything is read.

use serde_json::Value;

use crate::data::records::Kind;
use crate::error::{Error, Reason, Result};
use crate::methods::adapt::shapes::Shapes;
use crate::methods::adapt::{Adapt, Cost, registry};
use crate::models::{decoder, encoder};
use crate::proto::v1;
use crate::train::memory::{Estimate, Transformer};
use crate::train::settings::{self, Objective, Precision, Settings};

/// Outputs of a decoder's head that are computed at once, at most.
const HEAD_ROWS: usize = 256;
const HEAD_OUTPUTS: usize = 16 << 20;

/// A checked adaptation with every default written out that does not depend on the weights.
#[derive(Debug, Clone)]
pub struct Plan {
    pub adaptation: v1::Adaptation,
    pub training: v1::Training,
    pub settings: Settings,
    pub shapes: Shapes,
    pub cost: Cost,
    /// Width of the model's states.
    pub hidden: usize,
    network: Transformer,
    /// Elements of the matrices.
    matrices: u64,
}

/// The settings of a model, by family.
enum Config {
    Decoder(decoder::Config),
    Encoder(encoder::Config),
}

impl Plan {
    /// Checks the messages against a model of this family and `config.json`.
    ///
    /// # Errors
    /// `INVALID_OPTION` and others that name the option; `MODEL_UNSUITABLE` for a method that does not adapt
    /// the family.
    pub fn new(
        adaptation: Option<&v1::Adaptation>,
        training: Option<&v1::Training>,
        (family, config): (&str, &Value),
    ) -> Result<Self> {
        let adaptation = adaptation.ok_or_else(|| Error::field("adaptation", "missing"))?;
        let training = training.ok_or_else(|| Error::field("training", "missing"))?;
        let adaptation = registry::resolve(adaptation);
        let method = registry::method(&adaptation)?;
        let card = method.card();
        if !card.families.contains(&family) {
            return Err(Error::at(
                Reason::ModelUnsuitable,
                "adaptation",
                format!(
                    "{} adapts {}, and this is another kind",
                    card.name,
                    card.families.join(", ")
                ),
            ));
        }
        let config = match family {
            encoder::FAMILY => Config::Encoder(encoder::Config::from_hugging_face(config)?),
            _ => Config::Decoder(decoder::Config::from_hugging_face(config)?),
        };
        let shapes = config.shapes();
        let mut cost =
            method.check(&shapes).map_err(|e| e.within(&format!("adaptation.{}", card.name)))?;
        if family != encoder::FAMILY && cost.parameters == 0 {
            return Err(Error::at(
                Reason::ModelUnsuitable,
                "adaptation",
                format!("{} trains nothing of this model; choose another method", card.name),
            ));
        }
        if card.name == "full" {
            cost.warnings.push(NOT_SERVED.to_owned());
        }

        let rate = usual_rate(card.name);
        let mut training = training.clone();
        let seen = config.positions();
        let longest = u32::try_from(seen).unwrap_or(u32::MAX);
        training.max_length.get_or_insert(longest.min(512));
        let settings = Settings::read(&training, rate).map_err(|e| e.within("training"))?;
        settings::resolve(&mut training, rate);
        if settings.max_length > seen {
            let problem =
                format!("{} is more than the {seen} that the model sees", settings.max_length);
            return Err(Error::option("training.max_length", problem));
        }
        let (dim, causal) = config.heads();
        let suits = settings.attention.suits(settings.max_length, dim, causal);
        suits.map_err(|e| e.within("training"))?;
        let encodes = matches!(config, Config::Encoder(_));
        match settings.objective {
            Some(Objective::MaskedLm) if !encodes => {
                return Err(Error::option(
                    "training.objective",
                    "a decoder has no head that tells hidden tokens; take an encoder",
                ));
            }
            Some(Objective::CausalLm | Objective::Preferences) if encodes => {
                return Err(Error::option(
                    "training.objective",
                    "an encoder does not continue text; take a decoder, or masked_lm",
                ));
            }
            _ => {}
        }
        let matrices = shapes.tensors.values().filter(|shape| shape.len() == 2);
        let matrices = matrices.map(|shape| shape.iter().product::<usize>() as u64).sum();
        let (hidden, network) = (config.hidden(), config.network());
        Ok(Self { adaptation, training, settings, shapes, cost, hidden, network, matrices })
    }

    /// The method.
    pub fn method(&self) -> Result<&dyn Adapt> {
        registry::method(&self.adaptation)
    }

    /// Whether the model reads text, and does not continue it.
    pub fn is_encoder(&self) -> bool {
        self.shapes.family == encoder::FAMILY
    }

    /// Whether hidden tokens are learnt.
    pub fn hides(&self) -> bool {
        self.settings.objective == Some(Objective::MaskedLm)
    }

    /// Refuses data that the model cannot learn from. `field` names the data set.
    pub fn suits(&self, field: &str, kind: Kind) -> Result<()> {
        suits(Learner::of(self.is_encoder(), self.hides()), field, kind)
    }

    /// Resource names of all data sets, in the order of the lineage.
    pub fn datasets(&self) -> Result<Vec<String>> {
        names(&self.adaptation, &self.training)
    }

    /// What the backward pass of a batch of so many tokens finds, and what is packed for it.
    pub fn activations(&self, tokens: usize) -> u64 {
        let packed = match self.settings.precision {
            Precision::F32 => 0,
            // What is packed for the backward pass is packed one matrix at a time.
            Precision::Bf16 => self.matrices.saturating_mul(2),
        };
        let kept = self.network.activation_bytes(tokens, self.settings.checkpoint_activations);
        kept.saturating_add(packed)
    }

    /// Bytes of a model with weights of so many bytes, and of what the method keeps beside it.
    pub fn held(&self, weights: u64) -> u64 {
        weights.saturating_add(self.cost.frozen.saturating_mul(4))
    }

    /// The plan as a message, for a model with weights of so many bytes.
    pub fn message(&self, weights: u64) -> v1::AdaptPlan {
        let tokens = self.settings.batch_size.saturating_mul(self.settings.max_length);
        let size = usize::try_from(self.cost.parameters).unwrap_or(usize::MAX);
        let estimate =
            Estimate::of(&self.settings, &[size], self.held(weights), self.activations(tokens));
        let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        v1::AdaptPlan {
            adaptation: Some(self.adaptation.clone()),
            training: Some(self.training.clone()),
            trained_parameters: signed(self.cost.parameters),
            frozen_parameters: signed(self.cost.frozen),
            memory_bytes: signed(estimate.total()),
            warnings: self.cost.warnings.clone(),
        }
    }
}

/// Refuses data that a model cannot learn from, nor be measured on as a task. `field` names the data set.
///
/// # Errors
/// `DATASET_UNSUITABLE`.
pub fn suits(learner: Learner, field: &str, kind: Kind) -> Result<()> {
    let fits = match (learner, kind) {
        (_, Kind::Choices | Kind::Images) => false,
        (Learner::Decoder, Kind::Text | Kind::Chat | Kind::Preferences) => true,
        (Learner::HiddenTokens, kind) => kind == Kind::Text,
        (
            Learner::Encoder,
            Kind::Classification | Kind::Regression | Kind::Tagging | Kind::MultiLabel,
        ) => true,
        (Learner::Decoder | Learner::Encoder, _) => false,
    };
    if fits {
        return Ok(());
    }
    let wanted = match learner {
        Learner::HiddenTokens => "hidden tokens are learnt from texts",
        Learner::Encoder => {
            "an encoder learns classes, numbers or tags, or with the objective masked_lm from texts"
        }
        Learner::Decoder => "a decoder learns from texts or conversations, or from preferences",
    };
    let problem = format!("the data set holds {}, and {wanted}; name another one", kind.name());
    Err(Error::at(Reason::DatasetUnsuitable, field, problem))
}

/// What learns from data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learner {
    Decoder,
    /// An encoder with a head for what its records hold.
    Encoder,
    /// An encoder that tells tokens that were hidden.
    HiddenTokens,
}

impl Learner {
    pub fn of(encoder: bool, hides: bool) -> Self {
        match (encoder, hides) {
            (true, true) => Self::HiddenTokens,
            (true, false) => Self::Encoder,
            (false, _) => Self::Decoder,
        }
    }
}

/// The same with every default written out that does not depend on the model.
pub fn resolve(
    adaptation: &v1::Adaptation,
    training: &v1::Training,
) -> (v1::Adaptation, v1::Training) {
    let (adaptation, mut training) = (registry::resolve(adaptation), training.clone());
    if let Ok(method) = registry::method(&adaptation) {
        // How long rows are by default depends on what the model sees.
        let length = training.max_length;
        settings::resolve(&mut training, usual_rate(method.card().name));
        training.max_length = length;
    }
    (adaptation, training)
}

/// Resource names of the data sets of a request, in the order of the lineage.
pub fn datasets(request: &v1::AdaptRequest) -> Result<Vec<String>> {
    let (adaptation, training) = (request.adaptation.clone(), request.training.clone());
    names(&adaptation.unwrap_or_default(), &training.unwrap_or_default())
}

/// Resource names of the data sets of a tuning, in the order of the lineage.
pub fn names(adaptation: &v1::Adaptation, training: &v1::Training) -> Result<Vec<String>> {
    let validation = training.validation.as_ref().map(|v| v.dataset.as_str());
    let trained = [Some(training.dataset.as_str()), validation];
    let all = trained.into_iter().flatten().chain(registry::method(adaptation)?.datasets());
    Ok(all.filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

/// Said of what the engine cannot apply.
pub const NOT_SERVED: &str = "what comes out has whole matrices, which do not serve beside their base: merge it into a version, or \
     export it";

impl Config {
    fn shapes(&self) -> Shapes {
        match self {
            Self::Decoder(config) => Shapes::decoder(config),
            Self::Encoder(config) => Shapes::encoder(config),
        }
    }

    fn positions(&self) -> usize {
        match self {
            Self::Decoder(config) => config.max_positions,
            Self::Encoder(config) => config.max_tokens,
        }
    }

    /// Channels of a head, and whether positions see only what came before.
    fn heads(&self) -> (usize, bool) {
        match self {
            Self::Decoder(config) => (config.head_dim, true),
            Self::Encoder(config) => (config.head_dim(), false),
        }
    }

    fn hidden(&self) -> usize {
        match self {
            Self::Decoder(config) => config.hidden,
            Self::Encoder(config) => config.hidden,
        }
    }

    fn network(&self) -> Transformer {
        match self {
            Self::Decoder(config) => Transformer {
                layers: config.layers.len(),
                hidden: config.hidden,
                query: config.heads * config.head_dim,
                key_value: config.kv_heads * config.head_dim,
                inner: config.intermediate,
                gates: 2,
                head: config.vocab.saturating_mul(HEAD_ROWS).min(HEAD_OUTPUTS),
            },
            Self::Encoder(config) => Transformer {
                layers: config.layers,
                hidden: config.hidden,
                query: config.hidden,
                key_value: config.hidden,
                inner: config.intermediate,
                gates: 1,
                head: 0,
            },
        }
    }
}

/// The learning rate that a method takes where the options say nothing: what trains few numbers, or starts
/// small ones, takes larger steps than what moves the base itself.
fn usual_rate(method: &str) -> f64 {
    match method {
        "full" => 2e-5,
        "lora_xs" | "lora_sb" | "loldu" | "nola" | "sora" | "bitfit" | "head_only" | "adalora" => {
            1e-3
        }
        _ => 2e-4,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::models::{decoder::random, encoder::random as encoders};

    fn plan(adaptation: Value, training: Value, family: &str) -> Result<Plan> {
        let adaptation: v1::Adaptation = serde_json::from_value(adaptation).unwrap();
        let training: v1::Training = serde_json::from_value(training).unwrap();
        let config = match family {
            encoder::FAMILY => encoders::tiny(),
            _ => random::tiny("llama"),
        };
        Plan::new(Some(&adaptation), Some(&training), (family, &config))
    }

    #[test]
    fn counts_defaults_and_memory_are_said_before_anything_is_read() {
        let found = plan(json!({"lora": {}}), json!({"dataset": "datasets/d"}), "decoder").unwrap();
        let sites = found
            .shapes
            .linears
            .iter()
            .filter(|(name, _)| name.contains("q_proj") || name.contains("v_proj"));
        let wanted: usize = sites.map(|(_, [rows, cols])| 8 * (rows + cols)).sum();
        assert_eq!(found.cost.parameters, wanted as u64);
        assert_eq!(found.training.learning_rate, Some(2e-4));
        assert!(found.training.max_length.is_some_and(|length| length <= 512));
        assert_eq!(found.datasets().unwrap(), ["datasets/d"]);
        let message = found.message(1000);
        let wide = plan(json!({"lora": {}}), json!({"batch_size": 16}), "decoder").unwrap();
        assert!(wide.message(1000).memory_bytes > message.memory_bytes);
        assert_eq!(found.message(2000).memory_bytes, message.memory_bytes + 1000);
        assert!(message.warnings.is_empty());
        let dora = plan(json!({"dora": {}}), json!({}), "decoder").unwrap();
        assert!(dora.cost.warnings.is_empty());
        let full = plan(json!({"full": {}}), json!({}), "decoder").unwrap();
        assert_eq!(full.cost.warnings, [NOT_SERVED]);
    }

    #[test]
    fn what_does_not_suit_is_refused_by_its_field() {
        let field = |result: Result<Plan>| result.unwrap_err().violations()[0].field.clone();
        assert_eq!(
            field(plan(json!({"lora": {"adapter": {"r": 0}}}), json!({}), "decoder")),
            "adaptation.lora.adapter.r"
        );
        assert_eq!(
            field(plan(json!({"lora": {}}), json!({"learning_rate": -1.0}), "decoder")),
            "training.learning_rate"
        );
        assert_eq!(
            field(plan(json!({"lora": {}}), json!({"max_length": 100_000}), "decoder")),
            "training.max_length"
        );
        let error = plan(json!({"head_only": {}}), json!({}), "decoder").unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let error = plan(json!({"corda": {}}), json!({}), encoder::FAMILY).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let decoder = plan(json!({"lora": {}}), json!({}), "decoder").unwrap();
        let encoder = plan(json!({"lora": {}}), json!({}), encoder::FAMILY).unwrap();
        for kind in Kind::ALL {
            let both =
                [&decoder, &encoder].map(|plan| plan.suits("training.dataset", kind).is_ok());
            let wanted = match kind {
                Kind::Text | Kind::Chat | Kind::Preferences => [true, false],
                Kind::Choices | Kind::Images => [false, false],
                _ => [false, true],
            };
            assert_eq!(both, wanted, "{kind:?}");
        }
        let objective =
            |name: &str, family| plan(json!({"lora": {}}), json!({ "objective": name }), family);
        let masked = objective("TRAINING_OBJECTIVE_MASKED_LM", encoder::FAMILY).unwrap();
        assert!(masked.hides() && masked.suits("d", Kind::Text).is_ok());
        assert!(masked.suits("d", Kind::Classification).is_err());
        for (name, family) in [
            ("TRAINING_OBJECTIVE_MASKED_LM", "decoder"),
            ("TRAINING_OBJECTIVE_CAUSAL_LM", encoder::FAMILY),
            ("TRAINING_OBJECTIVE_PREFERENCES", encoder::FAMILY),
        ] {
            assert_eq!(field(objective(name, family)), "training.objective");
        }
        let fast = json!({"attention": {"factored": {}}});
        assert_eq!(
            field(plan(json!({"lora": {}}), fast, "decoder")),
            "training.attention.factored"
        );
    }
}
