//! The one training loop: parameters, batches, optimisers, schedules, checkpoints.

pub mod parameters;
pub mod pass;
