//! What is tuned in a differentiable forward: the graphs of the families ask at every linear layer and at
//! every tensor that they read whole.

use std::sync::Arc;

use candle_core::Tensor;

use super::weight::Weight;
use crate::error::Result;

/// Trained parts that take the place of stored ones, or stand beside them.
pub trait Tuning {
    /// `y [.., out]` of the linear weight `name` for `x [.., in]`, without bias; `None` where nothing is
    /// tuned and the product with the stored weight is meant.
    fn linear(&self, name: &str, x: &Tensor, stored: &Arc<Weight>) -> Result<Option<Tensor>>;

    /// What stands in place of the tensor `name` (a norm, a bias, an embedding table), in its shape;
    /// `None` where the stored one is meant.
    fn tensor(&self, name: &str) -> Result<Option<Tensor>>;
}

/// Nothing is tuned.
pub struct Frozen;

impl Tuning for Frozen {
    fn linear(&self, _: &str, _: &Tensor, _: &Arc<Weight>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    fn tensor(&self, _: &str) -> Result<Option<Tensor>> {
        Ok(None)
    }
}
