//! The tensors that training changes.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};

/// A trained tensor (f32).
#[derive(Debug, Clone)]
pub struct Parameter {
    pub var: Var,
    /// Multiplies the learning rate of the schedule.
    pub rate: f64,
    /// Whether weight decay applies.
    pub decay: bool,
}

/// Trained tensors by name. Names order everything that is done to all of them, so that nothing
/// depends on the order they were made in.
pub type Parameters = BTreeMap<String, Parameter>;

/// Gradients by the name of their parameter; a parameter without one was not used.
pub type Gradients = BTreeMap<String, Tensor>;
