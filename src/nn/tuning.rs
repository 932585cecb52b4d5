//! What is tuned in a differentiable forward: the graphs of the families ask at every linear layer and at
//! every tensor that they read whole.

use std::sync::Arc;

use candle_core::Tensor;

use super::weight::Weight;
use crate::error::Result;

/// What is added to a linear weight `W` `[out, in]` as a product of two thin matrices: the layer gives
/// `rows * (W x + scale * b a dropout(x))`. The tensors are variables, or computed from variables by the
/// tensor library, or constants; gradients go to the variables.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[r, in]`
    pub a: Tensor,
    /// `[out, r]`
    pub b: Tensor,
    /// `[out]`; factors on the outputs.
    pub rows: Option<Tensor>,
    pub scale: f64,
    /// On the input of `a` alone.
    pub dropout: Option<Dropout>,
}

/// Elements that are set to 0 while training. The same seed drops the same elements: whoever computes a
/// layer again for its gradient must find what was there before, so a seed is one of a step and a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Below 1.
    pub probability: f32,
    pub seed: u64,
}

/// Trained parts that take the place of stored ones, or stand beside them.
pub trait Tuning {
    /// The change of the linear weight `name` where it has this form, which is much the fastest; it is asked
    /// for before [`Tuning::linear`].
    fn low_rank(&self, _name: &str) -> Result<Option<LowRank>> {
        Ok(None)
    }

    /// `y [.., out]` of the linear weight `name` for `x [.., in]`, without bias; `None` where nothing is
    /// tuned and the product with the stored weight is meant.
    fn linear(&self, name: &str, x: &Tensor, stored: &Arc<Weight>) -> Result<Option<Tensor>>;

    /// Whether [`Tuning::linear`] may have something to say of the weight `name`; asking it costs a copy of
    /// the input.
    fn computes(&self, _name: &str) -> bool {
        true
    }

    /// What stands in place of the tensor `name` (a norm, a bias, an embedding table, a whole linear weight),
    /// in its shape; `None` where the stored one is meant. It is asked for before all others.
    fn tensor(&self, name: &str) -> Result<Option<Tensor>>;
}

/// Nothing is tuned.
pub struct Frozen;

impl Tuning for Frozen {
    fn linear(&self, _: &str, _: &Tensor, _: &Arc<Weight>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn computes(&self, _: &str) -> bool {
        false
    }

    fn tensor(&self, _: &str) -> Result<Option<Tensor>> {
        Ok(None)
    }
}
