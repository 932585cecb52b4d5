//! The differentiable forward of a model of any family, ready to be tuned in any way.

use std::sync::Arc;

use super::pass::{Options, Pass};
use crate::error::Result;
use crate::models::{AnyModel, decoder, encoder, not_for_text};
use crate::nn::ops::Precision;
use crate::nn::tuning::Tuning;

/// A model as [`Pass`] runs it.
pub struct Network<'a> {
    graph: Graph<'a>,
    options: Options,
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
        let mut options = Options { checkpoint_activations, ..Default::default() };
        let graph = match model {
            AnyModel::Decoder(model) => {
                Graph::Decoder(Arc::new(decoder::graph::Graph::new(model, precision)?))
            }
            AnyModel::Encoder(model) => {
                options.pooling = model.family.pooling;
                Graph::Encoder(Arc::new(encoder::graph::Graph::new(model, precision)?))
            }
            AnyModel::Vision(_) | AnyModel::Lstm(_) => return Err(not_for_text(model.family())),
        };
        Ok(Self { graph, options })
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
