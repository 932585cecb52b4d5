//! What a method does inside the loop.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::optimizer::Optimizer;
use super::parameters::{Gradients, Parameters};
use crate::error::Result;

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// The update, from 1.
    pub step: u64,
    /// Updates that are planned.
    pub total: u64,
    /// Learning rate of the update, before the parameters' own factors.
    pub rate: f64,
}

/// An update that was made.
pub struct Updated<'a> {
    pub place: Place,
    /// Trained tensors, which a hook may change in place ([`super::tensors::change`]).
    pub parameters: &'a mut Parameters,
    /// Gradients of the mean loss (and the penalty), clipped: what the update was made from.
    pub gradients: &'a Gradients,
    pub optimizer: &'a mut Optimizer,
}

/// What a method does inside the loop. Every call comes once an update, in the order of declaration; what is
/// not needed does nothing.
pub trait Hooks {
    /// An extra loss that depends on the parameters alone, and its gradients; it is added to the mean loss
    /// of the update.
    fn penalty(
        &mut self,
        _place: Place,
        _parameters: &Parameters,
    ) -> Result<Option<(f64, Gradients)>> {
        Ok(None)
    }

    /// The loss or a gradient of an update is not finite: whether to go on without it. The parameters stay as
    /// they are, the update counts.
    fn skip(&mut self, _place: Place) -> bool {
        false
    }

    /// After the gradients of an update are complete (of the mean loss over all its batches) and before they
    /// are checked and clipped.
    fn after_backward(
        &mut self,
        _place: Place,
        _parameters: &Parameters,
        _gradients: &mut Gradients,
    ) -> Result<()> {
        Ok(())
    }

    /// After the optimiser changed the parameters.
    fn after_step(&mut self, _updated: Updated<'_>) -> Result<()> {
        Ok(())
    }

    /// Numbers to show and keep beside the loss, by name.
    fn metrics(&self) -> BTreeMap<String, f64> {
        BTreeMap::new()
    }

    /// What the hooks remember (f32 tensors), for a checkpoint.
    fn save(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(BTreeMap::new())
    }

    /// Takes up what [`Hooks::save`] gave, when a run goes on. Elements that the optimiser holds are to be
    /// held again.
    fn restore(
        &mut self,
        _saved: BTreeMap<String, Tensor>,
        _parameters: &mut Parameters,
        _optimizer: &mut Optimizer,
    ) -> Result<()> {
        Ok(())
    }
}

/// Nothing is done.
pub struct Plain;

impl Hooks for Plain {}
