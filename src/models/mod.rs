//! Models: a family's configuration, named weights, and the text side (tokenizer, chat template).

pub mod axes;
pub mod decoder;
pub mod encoder;
pub mod export;
mod files;
pub mod footprint;
mod gguf;
pub mod import;
pub mod lstm;
pub mod package;
pub mod random;
pub mod two_tower;
pub mod vision;

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::nn::weight::{Record, Weight};

/// The configuration of a model whose blocks methods walk through, by family.
#[derive(Debug, Clone, PartialEq)]
pub enum Family {
    /// Decoder-only language models (Llama, Mistral, Qwen, Gemma and their relatives).
    Decoder(decoder::Config),
    /// Encoders that turn texts into vectors (BERT).
    Encoder(encoder::Config),
}

impl Family {
    /// Name used in method cards and messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Decoder(_) => "decoder",
            Self::Encoder(_) => encoder::FAMILY,
        }
    }

    /// The architecture within the family, `llama` or `bert` for instance.
    pub fn architecture(&self) -> &str {
        match self {
            Self::Decoder(config) => &config.architecture,
            Self::Encoder(config) => &config.architecture,
        }
    }
}

/// A model in memory. Weights are shared: cloning a model copies no tensor. Methods, calibration and
/// evaluation take the families of [`Family`]; [`encoder::Model`] is this with an encoder's settings alone.
#[derive(Clone)]
pub struct Model<F = Family> {
    pub family: F,
    /// `config.json` in Hugging Face form, kept whole so that exports lose nothing.
    pub config: serde_json::Value,
    /// Weights by their Hugging Face names (`model.layers.0.self_attn.q_proj.weight`).
    pub weights: BTreeMap<String, Arc<Weight>>,
    /// Absent when the source had none; such a model takes and gives token ids only.
    pub tokenizer: Option<Arc<Tokenizer>>,
}

/// What a file or a version may hold.
#[derive(Clone)]
pub enum AnyModel {
    Decoder(Model),
    Encoder(encoder::Model),
    Vision(vision::Model),
    Lstm(lstm::Model),
    TwoTower(two_tower::Model),
}

macro_rules! each {
    ($self:ident, $model:ident => $e:expr) => {
        match $self {
            AnyModel::Decoder($model) => $e,
            AnyModel::Encoder($model) => $e,
            AnyModel::Vision($model) => $e,
            AnyModel::Lstm($model) => $e,
            AnyModel::TwoTower($model) => $e,
        }
    };
}

impl AnyModel {
    /// The family's name, as method cards and versions have it.
    pub fn family(&self) -> &'static str {
        match self {
            Self::Decoder(model) => model.family.name(),
            Self::Encoder(_) => encoder::FAMILY,
            Self::Vision(_) => vision::FAMILY,
            Self::Lstm(_) => lstm::FAMILY,
            Self::TwoTower(_) => two_tower::FAMILY,
        }
    }

    /// The architecture within the family, `llama` or `bert` for instance.
    pub fn architecture(&self) -> &str {
        match self {
            Self::Decoder(model) => model.family.architecture(),
            Self::Encoder(model) => &model.family.architecture,
            Self::Vision(model) => &model.family.architecture,
            Self::Lstm(model) => &model.family.architecture,
            Self::TwoTower(model) => &model.family.architecture,
        }
    }

    /// The model as one whose blocks can be walked.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for what is neither a decoder nor an encoder.
    pub fn walked(self) -> Result<Model> {
        match self {
            Self::Decoder(model) => Ok(model),
            Self::Encoder(Model { family, config, weights, tokenizer }) => {
                Ok(Model { family: Family::Encoder(family), config, weights, tokenizer })
            }
            _ => Err(not_for_text(self.family())),
        }
    }

    /// The model as one that the engine serves.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for any other family.
    pub fn decoder(self) -> Result<Model> {
        match self {
            Self::Decoder(model) => Ok(model),
            Self::Encoder(model) => Err(not_a_decoder(&model.family.architecture)),
            _ => Err(not_for_text(self.family())),
        }
    }

    /// The model as one that embeds.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for any other family.
    pub fn encoder(self) -> Result<encoder::Model> {
        match self {
            Self::Encoder(model) => Ok(model),
            Self::Decoder(_) => Err(not_an_encoder(self.architecture())),
            _ => Err(not_for_text(self.family())),
        }
    }

    /// `config.json` in Hugging Face form.
    pub fn config(&self) -> &serde_json::Value {
        each!(self, model => &model.config)
    }

    /// Weights by their names.
    pub fn weights(&self) -> &BTreeMap<String, Arc<Weight>> {
        each!(self, model => &model.weights)
    }

    /// The weights, to be changed in memory.
    pub fn weights_mut(&mut self) -> &mut BTreeMap<String, Arc<Weight>> {
        each!(self, model => &mut model.weights)
    }

    /// The tokenizer, if the model came with one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        each!(self, model => model.tokenizer.as_ref())
    }

    /// Puts another tokenizer, or none, in the place of the model's.
    pub fn set_tokenizer(&mut self, tokenizer: Option<Arc<Tokenizer>>) {
        each!(self, model => model.tokenizer = tokenizer);
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> u64 {
        each!(self, model => model.bytes())
    }

    /// Number of weights' elements.
    pub fn parameters(&self) -> u64 {
        each!(self, model => model.parameters())
    }
}

impl From<Model> for AnyModel {
    fn from(model: Model) -> Self {
        let Model { family, config, weights, tokenizer } = model;
        match family {
            Family::Decoder(_) => Self::Decoder(Model { family, config, weights, tokenizer }),
            Family::Encoder(family) => Self::Encoder(Model { family, config, weights, tokenizer }),
        }
    }
}

impl From<encoder::Model> for AnyModel {
    fn from(model: encoder::Model) -> Self {
        Self::Encoder(model)
    }
}

impl From<vision::Model> for AnyModel {
    fn from(model: vision::Model) -> Self {
        Self::Vision(model)
    }
}

impl From<lstm::Model> for AnyModel {
    fn from(model: lstm::Model) -> Self {
        Self::Lstm(model)
    }
}

impl From<two_tower::Model> for AnyModel {
    fn from(model: two_tower::Model) -> Self {
        Self::TwoTower(model)
    }
}

/// A copy that shares the weights.
impl<T: Clone + Into<AnyModel>> From<&T> for AnyModel {
    fn from(model: &T) -> Self {
        model.clone().into()
    }
}

/// The error of an encoder where a language model is needed.
pub fn not_a_decoder(architecture: &str) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!(
            "the model is an encoder ({architecture}): it embeds texts, but generation and measuring on \
             texts need a decoder; name a language model, llama for instance"
        ),
    )
}

/// The error of a decoder where an encoder is needed.
pub fn not_an_encoder(architecture: &str) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!(
            "the model is a decoder ({architecture}) and makes no embeddings; name an encoder, bert for \
             instance"
        ),
    )
}

/// The error of a family that neither generates nor embeds.
pub fn not_for_text(family: &str) -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        format!(
            "the model is of the family {family}, which is trained, pruned and measured, but does not \
             generate, embed or take this method; name a model of another family"
        ),
    )
}

impl<F> Model<F> {
    /// The weight called `name`.
    pub fn weight(&self, name: &str) -> Result<&Arc<Weight>> {
        self.weights.get(name).ok_or_else(|| {
            Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
        })
    }

    /// Bytes of all weights.
    pub fn bytes(&self) -> u64 {
        self.weights.values().map(|w| w.bytes()).sum()
    }

    /// Number of weights' elements.
    pub fn parameters(&self) -> u64 {
        self.weights.values().map(|w| w.shape().iter().product::<usize>() as u64).sum()
    }
}

impl Model {
    /// The decoder's configuration.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for an encoder.
    pub fn decoder(&self) -> Result<&decoder::Config> {
        match &self.family {
            Family::Decoder(config) => Ok(config),
            Family::Encoder(config) => Err(not_a_decoder(&config.architecture)),
        }
    }

    /// Shapes, layouts and sizes without the data.
    pub fn info(&self) -> ModelInfo {
        ModelInfo {
            family: self.family.clone(),
            config: self.config.clone(),
            has_tokenizer: self.tokenizer.is_some(),
            tensors: tensor_infos(&self.weights),
        }
    }
}

impl AnyModel {
    /// Shapes, layouts and sizes without the data.
    pub fn info(&self) -> AnyInfo {
        let family = match self {
            Self::Decoder(model) => model.family.clone().into(),
            Self::Encoder(model) => AnyFamily::Encoder(model.family.clone()),
            Self::Vision(model) => AnyFamily::Vision(model.family.clone()),
            Self::Lstm(model) => AnyFamily::Lstm(model.family.clone()),
            Self::TwoTower(model) => AnyFamily::TwoTower(model.family.clone()),
        };
        AnyInfo {
            family,
            config: self.config().clone(),
            has_tokenizer: self.tokenizer().is_some(),
            tensors: tensor_infos(self.weights()),
        }
    }
}

fn tensor_infos(weights: &BTreeMap<String, Arc<Weight>>) -> BTreeMap<String, TensorInfo> {
    let info = |w: &Arc<Weight>| TensorInfo {
        record: w.record(),
        shape: w.shape().to_vec(),
        bytes: w.bytes(),
    };
    weights.iter().map(|(name, w)| (name.clone(), info(w))).collect()
}

/// The configuration of a model of any family.
#[derive(Debug, Clone, PartialEq)]
pub enum AnyFamily {
    Decoder(decoder::Config),
    Encoder(encoder::Config),
    Vision(vision::Config),
    Lstm(lstm::Config),
    TwoTower(two_tower::Config),
}

impl From<Family> for AnyFamily {
    fn from(family: Family) -> Self {
        match family {
            Family::Decoder(config) => Self::Decoder(config),
            Family::Encoder(config) => Self::Encoder(config),
        }
    }
}

impl AnyFamily {
    /// The family's name, as method cards and versions have it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Decoder(_) => "decoder",
            Self::Encoder(_) => encoder::FAMILY,
            Self::Vision(_) => vision::FAMILY,
            Self::Lstm(_) => lstm::FAMILY,
            Self::TwoTower(_) => two_tower::FAMILY,
        }
    }

    /// Every tensor that a model must have, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        files::Parts::tensors(self)
    }
}

/// What is known of a model before its data is read: enough to refuse or estimate a recipe.
#[derive(Debug, Clone)]
pub struct ModelInfo<F = Family> {
    pub family: F,
    /// `config.json`.
    pub config: serde_json::Value,
    pub has_tokenizer: bool,
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Shape, layout and stored size of one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    pub record: Record,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

/// [`ModelInfo`] of whatever family.
pub type AnyInfo = ModelInfo<AnyFamily>;

impl AnyInfo {
    /// The same of what can be walked.
    ///
    /// # Errors
    /// `MODEL_UNSUITABLE` for what is neither a decoder nor an encoder.
    pub fn walked(&self) -> Result<ModelInfo> {
        let family = match &self.family {
            AnyFamily::Decoder(config) => Family::Decoder(config.clone()),
            AnyFamily::Encoder(config) => Family::Encoder(config.clone()),
            family => return Err(not_for_text(family.name())),
        };
        Ok(ModelInfo {
            family,
            config: self.config.clone(),
            has_tokenizer: self.has_tokenizer,
            tensors: self.tensors.clone(),
        })
    }
}

impl From<ModelInfo> for AnyInfo {
    fn from(info: ModelInfo) -> Self {
        Self {
            family: info.family.into(),
            config: info.config,
            has_tokenizer: info.has_tokenizer,
            tensors: info.tensors,
        }
    }
}

impl<F> ModelInfo<F> {
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.bytes).sum()
    }
}
