//! The product with a weight as a candle operation: forward through the layout, gradient of the input.

use std::sync::Arc;

use candle_core::Tensor;

use super::Weight;
use crate::error::Result;

/// `x [.., in] -> [.., out]` through any layout; differentiable with respect to `x`.
pub fn product(_x: &Tensor, _weight: &Arc<Weight>) -> Result<Tensor> {
    todo!()
}
