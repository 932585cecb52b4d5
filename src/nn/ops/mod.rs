//! Differentiable operations of networks over rows of activations, with kernels of their own for both
//! directions. Sequences stand one after another without padding; what works on sequences gets their
//! ranges of rows.
//!
//! A frozen weight has no gradient here, only that of its input is ever computed; and where nothing that
//! went into a value is trained, nothing is kept and no gradient is taken.

mod activation;
pub mod attend;
mod attention;
mod buffer;
mod contrast;
mod convolution;
mod distillation;
mod head;
mod linear;
mod lstm;
mod network;
mod norm;
mod preference;
mod rows;
mod tape;
#[cfg(test)]
mod tests;

pub use crate::kernels::training::activation::Function;
pub use crate::kernels::training::attention::Shape as Attention;
pub use attention::Angles;
pub use buffer::{Buffer, Pool};
pub use convolution::{Moments, Window, transposed};
pub use distillation::{Answers, Distilled, Weights};
pub use head::{Loss, Matrix, Sums};
pub use linear::{Linear, Precision};
pub use network::{Network, Run, Sequences, Stored};
pub use preference::{Head, Preferred};
pub use tape::{Read, Shared, Sink, Taken, Tape, Value};
