//! Optimisers: one rule for all trained tensors, and what it remembers of each. A tensor that never had a
//! gradient costs nothing.

mod adamw;
mod blocks;
mod moment;
mod sgd;

use std::collections::BTreeMap;

use rayon::prelude::*;

pub use adamw::AdamW;
pub use moment::Moment;
pub use sgd::Sgd;

use super::parameters::{Gradients, Parameter, Parameters};
use super::tensors::{self, RUN};
use crate::error::{Error, Result};
use blocks::BLOCK;
use moment::Run;

/// How gradients become updates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    AdamW(AdamW),
    Sgd(Sgd),
}

impl Rule {
    /// Moments that are kept of a tensor.
    pub fn moments(&self) -> usize {
        match self {
            Self::AdamW(_) => 2,
            Self::Sgd(sgd) => usize::from(sgd.momentum != 0.0),
        }
    }
}

/// What is remembered of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Updates it took part in.
    pub updates: u64,
    /// The first moment and the second, as far as the rule has them.
    pub moments: Vec<Moment>,
}

/// A rule and what it remembers.
pub struct Optimizer {
    rule: Rule,
    decay: f64,
    eight_bit: bool,
    states: BTreeMap<String, State>,
    /// Elements that are held where they are.
    held: BTreeMap<String, Vec<bool>>,
}

impl Optimizer {
    /// An optimiser that remembers nothing yet. `decay` is the weight decay of the parameters that have one.
    pub fn new(rule: Rule, decay: f64, eight_bit: bool) -> Self {
        let (states, held) = (BTreeMap::new(), BTreeMap::new());
        Self { rule, decay, eight_bit, states, held }
    }

    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Bytes it comes to remember of a tensor with so many elements.
    pub fn bytes(&self, elements: usize) -> u64 {
        self.rule.moments() as u64 * Moment::bytes(elements, self.eight_bit)
    }

    /// What is remembered of each tensor that had a gradient.
    pub fn states(&self) -> &BTreeMap<String, State> {
        &self.states
    }

    /// Takes up what was remembered of a tensor.
    pub fn restore(&mut self, name: &str, parameter: &Parameter, state: State) -> Result<()> {
        let elements = parameter.var.elem_count();
        let fresh = self.fresh(elements);
        let same = |(a, b): (&Moment, &Moment)| {
            a.len() == b.len() && std::mem::discriminant(a) == std::mem::discriminant(b)
        };
        if state.moments.len() != fresh.moments.len()
            || !state.moments.iter().zip(&fresh.moments).all(same)
        {
            return Err(Error::internal(format!(
                "the moments of '{name}' are of another optimiser"
            )));
        }
        self.states.insert(name.to_owned(), state);
        Ok(())
    }

    /// The first and second moments of a tensor in f32, as far as there are any.
    pub fn moments(&self, name: &str) -> Vec<Vec<f32>> {
        let moments = self.states.get(name).map(|state| state.moments.as_slice());
        moments.unwrap_or_default().iter().map(Moment::values).collect()
    }

    /// Replaces a moment (0 or 1) of a tensor that has had a gradient.
    pub fn set_moment(&mut self, name: &str, index: usize, values: &[f32]) -> Result<()> {
        let moment = self.states.get_mut(name).and_then(|state| state.moments.get_mut(index));
        match moment {
            Some(moment) if moment.len() == values.len() => {
                moment.set(values);
                Ok(())
            }
            _ => Err(Error::internal(format!("'{name}' has no moment {index} of this size"))),
        }
    }

    /// Forgets a tensor, which then begins anew.
    pub fn forget(&mut self, name: &str) {
        self.states.remove(name);
        self.held.remove(name);
    }

    /// Holds the elements of a tensor that are `true` where they are, without moments and without decay, from
    /// the next update on; `None` lets all go. This is not part of a checkpoint: who asked for it asks again.
    pub fn hold(&mut self, name: &str, elements: Option<Vec<bool>>) {
        match elements {
            Some(elements) => self.held.insert(name.to_owned(), elements),
            None => self.held.remove(name),
        };
    }

    /// Changes every parameter that has a gradient. `rate` is the schedule's.
    pub fn update(
        &mut self,
        parameters: &Parameters,
        gradients: &Gradients,
        rate: f64,
    ) -> Result<()> {
        for (name, gradient) in gradients {
            let parameter = parameters
                .get(name)
                .ok_or_else(|| Error::internal(format!("'{name}' is not trained")))?;
            let elements = parameter.var.elem_count();
            let held = self.held.get(name).map(Vec::as_slice);
            if held.is_some_and(|held| held.len() != elements) {
                return Err(Error::internal(format!("'{name}' is held in another shape")));
            }
            if !self.states.contains_key(name) {
                let fresh = self.fresh(elements);
                self.states.insert(name.clone(), fresh);
            }
            let Some(state) = self.states.get_mut(name) else { continue };
            if gradient.elem_count() != elements
                || state.moments.iter().any(|m| m.len() != elements)
            {
                return Err(Error::internal(format!("the shape of '{name}' has changed")));
            }
            state.updates += 1;
            let decay = if parameter.decay { self.decay } else { 0.0 };
            let rates = (rate * parameter.rate, decay);
            let rule = &self.rule;
            tensors::read(gradient, |gradient| {
                tensors::change(&parameter.var, |values| {
                    update(rule, rates, values, gradient, state, held);
                })
            })??;
        }
        Ok(())
    }

    fn fresh(&self, elements: usize) -> State {
        // The second moment has no sign.
        let moment = |index| Moment::zeros(elements, index == 0, self.eight_bit);
        State { updates: 0, moments: (0..self.rule.moments()).map(moment).collect() }
    }
}

fn update(
    rule: &Rule,
    rates: (f64, f64),
    values: &mut [f32],
    gradient: &[f32],
    state: &mut State,
    held: Option<&[bool]>,
) {
    let updates = state.updates;
    let mut runs: Vec<(usize, Vec<Run<'_>>)> =
        (0..values.len().div_ceil(RUN)).map(|run| (run * RUN, Vec::new())).collect();
    for moment in &mut state.moments {
        for ((_, moments), run) in runs.iter_mut().zip(moment.runs()) {
            moments.push(run);
        }
    }
    let parts = values.par_chunks_mut(RUN).zip(gradient.par_chunks(RUN)).zip(runs);
    parts.for_each(|((values, gradient), (start, mut moments))| {
        let blocks = values.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK)).enumerate();
        for (index, (values, gradient)) in blocks {
            let n = values.len();
            let (mut m, mut v, mut before) = ([0f32; BLOCK], [0f32; BLOCK], [0f32; BLOCK]);
            before[..n].copy_from_slice(values);
            for (run, buffer) in moments.iter().zip([&mut m, &mut v]) {
                run.load(index, &mut buffer[..n]);
            }
            match rule {
                Rule::AdamW(rule) => {
                    rule.update(updates, rates, values, gradient, (&mut m[..n], &mut v[..n]));
                }
                Rule::Sgd(rule) => rule.update(rates, values, gradient, &mut m[..n]),
            }
            if let Some(held) = held {
                let first = start + index * BLOCK;
                for (i, _) in held[first..first + n].iter().enumerate().filter(|(_, held)| **held) {
                    (values[i], m[i], v[i]) = (before[i], 0.0, 0.0);
                }
            }
            for (run, buffer) in moments.iter_mut().zip([&m, &v]) {
                run.store(index, &buffer[..n]);
            }
        }
    });
}

#[cfg(test)]
mod tests;
