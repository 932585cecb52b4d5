//! Forward and backward of what stands between the products of a network, over whole matrices and on all
//! threads. Sums over rows are split by columns, so that every sum is made by one thread in one order.

pub mod activation;
pub mod attention;
pub mod batch_norm;
pub mod contrast;
pub mod convolution;
pub mod distillation;
pub mod elementwise;
pub mod entropy;
pub mod factored;
pub mod halves;
pub mod lstm;
pub mod norm;

/// Elements that are worth a task of their own.
const GRAIN: usize = 1 << 14;

/// Rows of `width` that are worth a task.
fn grain(width: usize) -> usize {
    GRAIN / width.max(1) + 1
}
