//! The one training loop: batches, optimisers, schedules, losses, checkpoints.
//!
//! A method brings [`parameters`] (tensors by name), a model that gives losses and gradients of a batch
//! ([`loss::LossAndGradients`]) and, where it needs more, [`hooks`]; [`run`] does the rest.
//!
//! # One update
//!
//! With the batches `b` of an update, the losses `l_i` of what is counted in them, and `n` of them counted in
//! all:
//!
//! ```text
//! g  = (sum over b of d(sum l_i)/dp) / n + d(penalty)/dp      mean over all batches, not mean of means
//! g <- g min(1, c / |g|)                                      |g| over all tensors together
//! p <- optimiser(p, g, lr(t) rate_p)                          AdamW or SGD, see `optimizer`
//! e <- d e + (1 - d) p                                        average, where one is kept
//! ```
//!
//! # What is exact
//!
//! - The same options, data, seed and number of threads give the same bits.
//! - A run that was cut off anywhere goes on from its last checkpoint and ends with the same bits. The order
//!   of the data and all random numbers follow from the seed and the number of the update, so there is no
//!   state of generators to keep.
//! - Packed documents do not see each other, and every token that counts is predicted once an epoch, however
//!   texts are cut and packed.

pub mod batch;
mod checkpoint;
pub mod distillation;
mod ema;
mod gradients;
pub mod head;
pub mod history;
pub mod hooks;
pub mod loss;
pub mod memory;
pub mod network;
pub mod optimizer;
pub mod order;
pub mod parameters;
pub mod pass;
pub mod run;
pub mod schedule;
pub mod settings;
pub mod tensors;
