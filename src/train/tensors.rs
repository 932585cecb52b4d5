//! Elements of tensors, without copies.

use std::cell::RefCell;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor};
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Elements that one thread handles at a time. Sums are made of the sums of such runs, so that they do not
/// depend on how many threads there are.
pub const RUN: usize = 1 << 14;

/// What `f` gives for the elements of an f32 tensor in row order.
pub fn read<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    if tensor.dtype() != DType::F32 {
        let kind = tensor.dtype();
        return Err(Error::internal(format!("a trained tensor or gradient is {kind:?}")));
    }
    let whole = tensor.contiguous()?;
    let (storage, layout) = whole.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(f(&values[start..end])),
        _ => Err(Error::internal("a trained tensor is not in the memory of this machine")),
    }
}

/// Lets `f` change the elements of a contiguous f32 tensor in place: everything that shares them sees it.
pub fn change<R>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
    let op = Change { f: RefCell::new(Some(f)), result: RefCell::new(None) };
    tensor.inplace_op1(&op)?;
    op.result.into_inner().ok_or_else(|| Error::internal("a trained tensor was not changed"))
}

struct Change<F, R> {
    f: RefCell<Option<F>>,
    result: RefCell<Option<R>>,
}

impl<F: FnOnce(&mut [f32]) -> R, R> InplaceOp1 for Change<F, R> {
    fn name(&self) -> &'static str {
        "change"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets())
        else {
            candle_core::bail!("only contiguous f32 tensors are changed in place");
        };
        if let Some(f) = self.f.take() {
            *self.result.borrow_mut() = Some(f(&mut values[start..end]));
        }
        Ok(())
    }
}

/// Sum of squares, in f64.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let square = |v: &f32| f64::from(*v) * f64::from(*v);
    let runs: Vec<f64> =
        values.par_chunks(RUN).map(|run| run.iter().map(square).sum::<f64>()).collect();
    runs.iter().sum()
}

/// Whether every element is finite.
pub fn finite(tensor: &Tensor) -> Result<bool> {
    read(tensor, |values| values.par_chunks(RUN).all(|run| run.iter().all(|v| v.is_finite())))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn elements_are_read_in_row_order_and_changed_in_place() {
        let t = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        assert_eq!(read(&t.t().unwrap(), <[f32]>::to_vec).unwrap(), [1.0, 3.0, 2.0, 4.0]);
        let var = Var::from_tensor(&t).unwrap();
        let seen = var.as_detached_tensor();
        let last = change(&var, |values| {
            values[3] = 9.0;
            values.len()
        });
        assert_eq!(last.unwrap(), 4);
        assert_eq!(seen.to_vec2::<f32>().unwrap(), [[1.0, 2.0], [3.0, 9.0]]);
        assert_eq!(t.to_vec2::<f32>().unwrap()[1][1], 4.0);
        assert!(change(&t.t().unwrap(), |_| ()).is_err());
        assert!(read(&t.to_dtype(DType::F64).unwrap(), |_| ()).is_err());
    }

    #[test]
    fn sums_do_not_depend_on_threads() {
        let values: Vec<f32> = (0..3 * RUN + 17).map(|i| (i as f32 * 0.37).sin()).collect();
        let plain: f64 = values
            .chunks(RUN)
            .map(|run| run.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>())
            .sum();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(pool.install(|| sum_of_squares(&values)), plain);
        assert_eq!(sum_of_squares(&values), plain);
        assert_eq!(sum_of_squares(&[3.0, 4.0]), 25.0);
    }
}
