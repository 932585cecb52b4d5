//! The differentiable forward of a model of any family, ready to be tuned in any way.

use std::sync::Arc;

use super::pass::{Options, Pass};
use crate::error::Result;
use crate::models::{AnyModel, decoder, encoder, not_for_text};
use crate::nn::ops::Precision;
use crate::nn::ops::attend::Choosing;
use crate::nn::tuning::Tuning;

/// A model as [`Pass`] runs it.
pub struct Network<'a> {
    graph: Graph<'a>,
    options: Options,
    choosing: Option<Arc<Choosing>>,
}

enum Graph<'a> {
    Decoder(Arc<decoder::graph::Graph<'a>>),
    Encoder(Arc<encoder::graph::Graph<'a>>),
}

impl<'m> Network<'m> {
    /// `precision` is that of the frozen parts; with `checkpoint_activations` blocks are computed again for
    /// their gradients.
    pub fn new(
        model: &'m AnyModel,
        precision: Precision,
        checkpoint_activations: bool,
    ) -> Result<Self> {
        Self::choosing(model, precision, checkpoint_activations, None)
    }

    /// The same with attention computed by `choosing`, where that is given.
    pub fn choosing(
        model: &'m AnyModel,
        precision: Precision,
        checkpoint_activations: bool,
        choosing: Option<Arc<Choosing>>,
    ) -> Result<Self> {
        let attend = choosing.clone();
        let mut options = Options { checkpoint_activations, ..Default::default() };
        let graph = match model {
            AnyModel::Decoder(model) => {
                let graph = decoder::graph::Graph::new(model, precision)?;
                Graph::Decoder(Arc::new(match attend {
                    None => graph,
                    Some(attend) => graph.with_attention(Box::new(attend)),
                }))
            }
            AnyModel::Encoder(model) => {
                options.pooling = model.family.pooling;
                options.separator = separator(model)?;
                let graph = encoder::graph::Graph::new(model, precision)?;
                Graph::Encoder(Arc::new(match attend {
                    None => graph,
                    Some(attend) => graph.with_attention(Box::new(attend)),
                }))
            }
            model => return Err(not_for_text(model.family())),
        };
        Ok(Self { graph, options, choosing })
    }

    /// How strongly preferences hold to the model that is not tuned.
    #[must_use]
    pub fn with_beta(mut self, beta: f32) -> Self {
        self.options.beta = beta;
        self
    }

    /// What computes attention, where that is not as usual.
    pub fn attention(&self) -> Option<&Arc<Choosing>> {
        self.choosing.as_ref()
    }

    /// A pass that asks `tuning` for what is tuned.
    pub fn pass<'a>(&'a self, tuning: &'a dyn Tuning) -> Pass<'a>
    where
        'm: 'a,
    {
        match &self.graph {
            Graph::Decoder(graph) => Pass::decoder(graph.clone(), tuning, self.options),
            Graph::Encoder(graph) => Pass::encoder(graph.clone(), tuning, self.options),
        }
    }
}

/// The token behind which a second text begins, for encoders that tell texts apart.
fn separator(model: &encoder::Model) -> Result<Option<u32>> {
    let Some(tokenizer) = model.tokenizer.as_ref().filter(|_| model.family.types > 1) else {
        return Ok(None);
    };
    let (between, kind) = tokenizer.between()?;
    Ok(between.last().copied().filter(|_| kind == 1))
}
