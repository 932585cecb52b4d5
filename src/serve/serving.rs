//! A loaded model of whatever family, as memory is kept for it.

use super::embed::Embedder;
use super::engine::{Engine, Limits};
use crate::error::Result;
use crate::models::encoder::plan::Precision;
use crate::models::{AnyModel, not_a_decoder, not_an_encoder, not_for_text};

/// What serves a model.
#[derive(Clone)]
pub enum Serving {
    Decoder(Engine),
    Encoder(Embedder),
}

macro_rules! each {
    ($self:ident, $engine:ident => $e:expr) => {
        match $self {
            Serving::Decoder($engine) => $e,
            Serving::Encoder($engine) => $e,
        }
    };
}

impl Serving {
    /// Loads the model on a thread of its own; `precision` is that of encoders.
    pub fn start(model: AnyModel, limits: Limits, precision: Precision) -> Result<Self> {
        match model {
            AnyModel::Decoder(model) => Engine::start(model, limits).map(Self::Decoder),
            AnyModel::Encoder(model) => {
                Embedder::start(model, limits, precision).map(Self::Encoder)
            }
            model => Err(not_for_text(model.family())),
        }
    }

    /// What generates; MODEL_UNSUITABLE for an encoder.
    pub fn decoder(self) -> Result<Engine> {
        match self {
            Self::Decoder(engine) => Ok(engine),
            Self::Encoder(embedder) => Err(not_a_decoder(&embedder.model().family.architecture)),
        }
    }

    /// What embeds; MODEL_UNSUITABLE for a decoder.
    pub fn encoder(self) -> Result<Embedder> {
        match self {
            Self::Encoder(embedder) => Ok(embedder),
            Self::Decoder(engine) => Err(not_an_encoder(&engine.model().decoder()?.architecture)),
        }
    }

    /// Requests running and waiting now.
    pub fn load(&self) -> (usize, usize) {
        each!(self, engine => engine.load())
    }

    /// False once the thread has failed.
    pub fn healthy(&self) -> bool {
        each!(self, engine => engine.healthy())
    }

    /// Bytes the weights take in memory.
    pub fn resident_bytes(&self) -> u64 {
        each!(self, engine => engine.resident_bytes())
    }
}
