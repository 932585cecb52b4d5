//! Masks inside the loop: what is masked is zero, has no gradient, no moments, no decay.
//!
//! The values of masked elements are kept aside, so that the forward pass is that of the network with zeros and
//! needs no masks of its own; new masks are chosen among all values.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use candle_core::{Device, Tensor};

use super::masks::{Pattern, Pool};
use super::schedule::Schedule;
use crate::error::{Error, Result};
use crate::methods::compress::mask::mark_smallest;
use crate::train::hooks::{Hooks, Place, Updated};
use crate::train::loss::LossSums;
use crate::train::optimizer::Optimizer;
use crate::train::parameters::{Gradients, Parameter, Parameters};
use crate::train::tensors;

/// New masks that are kept in the record, at most; then every second but the newest goes.
const MAX_HISTORY: usize = 1000;

/// Numbers of an update in a checkpoint.
const FIELDS: usize = 5;

/// f32 holds whole numbers below 2^24: larger ones are kept in two parts.
const PART: u64 = 1 << 20;

/// What chooses new masks.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub schedule: Schedule,
    pub pattern: Pattern,
    pub pool: Pool,
    /// One comparison for all tensors.
    pub global: bool,
    /// Masked elements keep their value and compete.
    pub regrow: bool,
}

/// New masks, and when.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    pub step: u64,
    /// Masked elements of all tensors.
    pub masked: u64,
    /// Mean loss of the update before; 0 where there was none.
    pub loss: f32,
}

/// A tensor under a mask.
#[derive(Debug, Clone)]
struct Masked {
    cols: usize,
    masked: Vec<bool>,
    /// The values of masked elements, unseen; 0 elsewhere. Empty where none comes back.
    aside: Vec<f32>,
}

/// The masks of a run.
pub struct Pruner {
    /// None: masks stay as they are.
    rule: Option<Rule>,
    tensors: BTreeMap<String, Masked>,
    /// Loss since the last update, which the model adds to.
    losses: Rc<Cell<LossSums>>,
    history: Vec<Update>,
    /// Whether the optimiser knows the masks.
    held: bool,
}

impl Pruner {
    /// Masks for tensors by name with their columns, none of them masked yet.
    pub fn new(
        rule: Rule,
        tensors: impl IntoIterator<Item = (String, [usize; 2])>,
        losses: Rc<Cell<LossSums>>,
    ) -> Self {
        let masked = |[rows, cols]: [usize; 2]| Masked {
            cols,
            masked: vec![false; rows * cols],
            aside: if rule.regrow { vec![0.0; rows * cols] } else { Vec::new() },
        };
        let tensors = tensors.into_iter().map(|(name, shape)| (name, masked(shape))).collect();
        Self { rule: Some(rule), tensors, losses, history: Vec::new(), held: false }
    }

    /// Masks that stay as they are, by name with their columns.
    pub fn fixed(masks: impl IntoIterator<Item = (String, usize, Vec<bool>)>) -> Self {
        let tensor = |(name, cols, masked)| (name, Masked { cols, masked, aside: Vec::new() });
        Self {
            rule: None,
            tensors: masks.into_iter().map(tensor).collect(),
            losses: Rc::default(),
            history: Vec::new(),
            held: false,
        }
    }

    /// Masks before the first update, where the schedule begins there.
    pub fn start(&mut self, parameters: &Parameters) -> Result<()> {
        if self.rule.is_some_and(|rule| rule.schedule.due(0)) {
            self.renew(0, parameters, None)?;
        }
        Ok(())
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.masked.len() as u64).sum()
    }

    /// Masked elements of all tensors.
    pub fn masked(&self) -> u64 {
        let count = |tensor: &Masked| tensor.masked.iter().filter(|m| **m).count() as u64;
        self.tensors.values().map(count).sum()
    }

    /// Share of zeros now in force.
    pub fn sparsity(&self) -> f64 {
        self.masked() as f64 / self.elements().max(1) as f64
    }

    /// New masks so far.
    pub fn history(&self) -> &[Update] {
        &self.history
    }

    /// The mask of a tensor: true where it is zero.
    pub fn mask(&self, name: &str) -> Option<&[bool]> {
        self.tensors.get(name).map(|tensor| tensor.masked.as_slice())
    }

    /// Chooses masks anew and puts them into the parameters and the optimiser.
    fn renew(
        &mut self,
        step: u64,
        parameters: &Parameters,
        mut optimizer: Option<&mut Optimizer>,
    ) -> Result<()> {
        let Some(rule) = self.rule else { return Ok(()) };
        let share = rule.schedule.target(step);
        let mut values = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let mut all = tensors::read(&variable(parameters, name)?.var, <[f32]>::to_vec)?;
            for (i, _) in tensor.masked.iter().enumerate().filter(|(_, masked)| **masked) {
                all[i] = tensor.aside.get(i).copied().unwrap_or(0.0);
            }
            values.insert(name, all);
        }
        // Where nothing comes back, what is masked is below everything else, zeros included.
        let score = |value: f32, masked: bool| match (rule.regrow, masked) {
            (true, _) => value.abs(),
            (false, true) => 0.0,
            (false, false) => value.abs().max(f32::MIN_POSITIVE),
        };
        let units: BTreeMap<&String, Vec<f32>> = self
            .tensors
            .iter()
            .map(|(name, tensor)| {
                let elements = values[name].iter().zip(&tensor.masked);
                let scores: Vec<f32> = elements.map(|(v, m)| score(*v, *m)).collect();
                (name, rule.pattern.scores(&scores, tensor.cols, rule.pool))
            })
            .collect();
        let mut chosen: BTreeMap<String, Vec<bool>> = BTreeMap::new();
        if rule.global {
            // Blocks of all tensors are of one size.
            let scores = units.values().flatten().copied();
            let total = units.values().map(Vec::len).sum();
            let mut masked = vec![false; total];
            mark_smallest(scores, Pattern::masked(total, share), &mut masked);
            let mut rest = masked.as_slice();
            for (name, scores) in &units {
                let (own, others) = rest.split_at(scores.len());
                chosen.insert((*name).clone(), own.to_vec());
                rest = others;
            }
        } else {
            for (name, scores) in &units {
                chosen.insert((*name).clone(), rule.pattern.mask(scores, share));
            }
        }
        drop(units);
        let values: BTreeMap<String, Vec<f32>> =
            values.into_iter().map(|(name, all)| (name.clone(), all)).collect();
        for (name, tensor) in &mut self.tensors {
            let (all, new) = (&values[name], rule.pattern.spread(&chosen[name], tensor.cols));
            if new == tensor.masked {
                continue;
            }
            tensors::change(&variable(parameters, name)?.var, |to| {
                for (i, masked) in new.iter().enumerate() {
                    if *masked {
                        to[i] = 0.0;
                    } else if tensor.masked[i] {
                        to[i] = all[i];
                    }
                }
            })?;
            if rule.regrow {
                for (i, masked) in new.iter().enumerate() {
                    tensor.aside[i] = if *masked { all[i] } else { 0.0 };
                }
            }
            tensor.masked = new;
            if let Some(optimizer) = &mut optimizer {
                let moments = optimizer.moments(name);
                for (index, mut moment) in moments.into_iter().enumerate() {
                    let masked = tensor.masked.iter().enumerate().filter(|(_, masked)| **masked);
                    masked.for_each(|(i, _)| moment[i] = 0.0);
                    optimizer.set_moment(name, index, &moment)?;
                }
                optimizer.hold(name, Some(tensor.masked.clone()));
            }
        }
        let update = Update { step, masked: self.masked(), loss: self.losses.get().mean() as f32 };
        self.history.push(update);
        if self.history.len() >= MAX_HISTORY {
            let last = self.history.len() - 1;
            let mut index = 0;
            self.history.retain(|_| {
                index += 1;
                index % 2 == 1 || index > last
            });
        }
        Ok(())
    }

    fn hold(&mut self, optimizer: &mut Optimizer) {
        for (name, tensor) in &self.tensors {
            if tensor.masked.iter().any(|masked| *masked) {
                optimizer.hold(name, Some(tensor.masked.clone()));
            }
        }
        self.held = true;
    }
}

impl Hooks for Pruner {
    fn after_backward(
        &mut self,
        _: Place,
        _: &Parameters,
        gradients: &mut Gradients,
    ) -> Result<()> {
        // What is masked has no part in the norm either.
        for (name, tensor) in &self.tensors {
            if !tensor.masked.iter().any(|masked| *masked) {
                continue;
            }
            let Some(gradient) = gradients.get_mut(name) else { continue };
            let mut values = tensors::read(gradient, <[f32]>::to_vec)?;
            let masked = tensor.masked.iter().enumerate().filter(|(_, masked)| **masked);
            masked.for_each(|(i, _)| values[i] = 0.0);
            *gradient = Tensor::from_vec(values, gradient.shape(), &Device::Cpu)?;
        }
        Ok(())
    }

    fn after_step(&mut self, updated: Updated<'_>) -> Result<()> {
        let Updated { place, parameters, optimizer, .. } = updated;
        if !self.held {
            self.hold(optimizer);
        }
        if self.rule.is_some_and(|rule| rule.schedule.due(place.step)) {
            self.renew(place.step, parameters, Some(optimizer))?;
        }
        self.losses.set(LossSums::default());
        Ok(())
    }

    fn metrics(&self) -> BTreeMap<String, f64> {
        BTreeMap::from([("sparsity".to_owned(), self.sparsity())])
    }

    fn save(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut saved = BTreeMap::new();
        let tensor = |values: Vec<f32>| Tensor::new(values, &Device::Cpu);
        for (name, own) in &self.tensors {
            let masked = own.masked.iter().map(|m| f32::from(u8::from(*m))).collect();
            saved.insert(format!("masked/{name}"), tensor(masked)?);
            if !own.aside.is_empty() {
                saved.insert(format!("aside/{name}"), tensor(own.aside.clone())?);
            }
        }
        if !self.history.is_empty() {
            let parts = |n: u64| [(n / PART) as f32, (n % PART) as f32];
            let fields = self.history.iter().flat_map(|u| {
                let ([a, b], [c, d]) = (parts(u.step), parts(u.masked));
                [a, b, c, d, u.loss]
            });
            saved.insert("history".to_owned(), tensor(fields.collect())?);
        }
        Ok(saved)
    }

    fn restore(
        &mut self,
        saved: BTreeMap<String, Tensor>,
        _: &mut Parameters,
        optimizer: &mut Optimizer,
    ) -> Result<()> {
        let read = |name: &str| -> Result<Option<Vec<f32>>> {
            saved.get(name).map(|tensor| Ok(tensor.flatten_all()?.to_vec1()?)).transpose()
        };
        for (name, tensor) in &mut self.tensors {
            let masked = read(&format!("masked/{name}"))?.unwrap_or_default();
            if masked.len() != tensor.masked.len() {
                return Err(Error::internal(format!(
                    "the mask of '{name}' is not in the checkpoint"
                )));
            }
            tensor.masked = masked.iter().map(|masked| *masked != 0.0).collect();
            if let Some(aside) = read(&format!("aside/{name}"))? {
                tensor.aside = aside;
            }
        }
        let whole = |parts: &[f32]| parts[0] as u64 * PART + parts[1] as u64;
        let history = read("history")?.unwrap_or_default();
        let update =
            |f: &[f32]| Update { step: whole(&f[..2]), masked: whole(&f[2..4]), loss: f[4] };
        self.history = history.chunks_exact(FIELDS).map(update).collect();
        self.hold(optimizer);
        Ok(())
    }
}

fn variable<'a>(parameters: &'a Parameters, name: &str) -> Result<&'a Parameter> {
    parameters.get(name).ok_or_else(|| Error::internal(format!("'{name}' is not trained")))
}

#[cfg(test)]
mod tests;
