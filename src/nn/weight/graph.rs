//! The product with a weight as a candle operation: forward through the layout, gradient of the input.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::Weight;
use crate::error::{Error, Result};

/// `x [.., in] -> [.., out]` through any layout; differentiable with respect to `x`. `x` is f32 with any
/// strides; a shape whose last dimension is not `in` is an error.
pub fn product(x: &Tensor, weight: &Arc<Weight>) -> Result<Tensor> {
    match x.dims().last() {
        Some(&last) if last == weight.cols() => Ok(x
            .contiguous()?
            .apply_op1(Product { weight: Arc::clone(weight), transposed: false })?),
        _ => Err(Error::internal(format!(
            "a tensor of shape {:?} cannot be multiplied by a weight of shape {:?}",
            x.dims(),
            weight.shape()
        ))),
    }
}

struct Product {
    weight: Arc<Weight>,
    transposed: bool,
}

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "weight-product"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        // Both callers made it contiguous.
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("the input of a weight product is not contiguous")
        };
        let x = &storage.as_slice::<f32>()?[start..end];
        let (rows, cols) = (self.weight.rows(), self.weight.cols());
        let (inner, outer) = if self.transposed { (rows, cols) } else { (cols, rows) };
        let mut y = vec![0.0; x.len() / inner * outer];
        if self.transposed {
            self.weight.multiply_transposed(x, &mut y);
        } else {
            self.weight.multiply(x, &mut y);
        }
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = outer;
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }

    /// The two products are each other's gradients, so gradients of gradients exist too.
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let op = Self { weight: Arc::clone(&self.weight), transposed: !self.transposed };
        grad.contiguous()?.apply_op1(op).map(Some)
    }
}
