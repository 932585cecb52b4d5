//! SoRA (Ding et al. 2023, "Sparse low-rank adaptation of pre-trained language models", arXiv 2311.11696,
//! equations 5 to 8 and algorithm 1): a gate on each rank, `y = W x + s B (g * A x)`; after each step of the
//! optimiser the gates go through a soft threshold, and ranks whose gate is zero at the end are cut.
//!
//! Decided here: the threshold is `xi` itself, not multiplied by the learning rate, as in the published
//! program; rows of closed gates do not decay, for their gradient is zero and decay alone would shrink
//! them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::cut::cut;
use super::lora::plain;
use super::module::{Core, Module, Part};
use super::options::{self, Usual};
use super::shapes::{Shapes, module};
use super::tuned::{Stepping, Tuned};
use super::{Adapt, Cost, Needs, Setup, build, normal, uniform};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::proto::v1::{self, SoraGates, SoraGrowth, SoraProximal};
use crate::train::hooks::{Hooks, Place, Updated};
use crate::train::optimizer::Optimizer;
use crate::train::parameters::{Gradients, Parameter, Parameters};
use crate::train::tensors;

static CARD: Card = Card {
    name: "sora",
    title: "SoRA",
    verb: "adapt",
    summary: "LoRA with a gate on each rank; gates are trained by proximal gradient and closed ranks cut.",
    paper: "Sparse Low-rank Adaptation of Pre-trained Language Models, arXiv 2311.11696",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

const USUAL: Usual = Usual { rank: Some(16), alpha: Some(16.0), all_linear: true, fits: false };

/// Name of the gates.
const GATES: &str = "lora_g";

/// What a gate becomes after a step.
pub fn proximal(g: f32, xi: f32, kind: SoraProximal) -> f32 {
    let soft = if g.abs() > xi { g - xi.copysign(g) } else { 0.0 };
    match kind {
        SoraProximal::Official if soft.abs() < xi => 0.0,
        _ => soft,
    }
}

/// A growing threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Schedule {
    growth: SoraGrowth,
    max: f64,
    stages: u32,
    target_keep: Option<f64>,
}

/// The thresholds of the stages, the first `xi` and the last `max`.
fn thresholds(xi: f64, schedule: &Schedule) -> Vec<f64> {
    let last = f64::from(schedule.stages - 1);
    let at = |i: u32| {
        let share = f64::from(i) / last;
        match schedule.growth {
            SoraGrowth::Unspecified | SoraGrowth::Linear => xi + (schedule.max - xi) * share,
            SoraGrowth::LogLinear => {
                let (low, high) = (xi.exp(), schedule.max.exp());
                (low + (high - low) * share).ln()
            }
            SoraGrowth::ExpLinear => xi * (schedule.max / xi).powf(share),
        }
    };
    (0..schedule.stages).map(at).collect()
}

/// The options, checked. `xi` is none where it follows from the number of steps.
struct Read {
    xi: Option<f64>,
    l1: f64,
    kind: SoraProximal,
    gates: SoraGates,
    gate_rate: f64,
    schedule: Option<Schedule>,
}

fn read(options: &v1::Sora) -> Result<Read> {
    let positive = |field: &str, value: f64| match value.is_finite() && value >= 0.0 {
        true => Ok(value),
        false => Err(Error::option(field, format!("{value} is not a number of 0 or more"))),
    };
    let xi = options.xi.map(|xi| positive("xi", xi)).transpose()?;
    let gate_rate = options.gate_rate.unwrap_or(1.0);
    if !(gate_rate.is_finite() && gate_rate > 0.0) {
        return Err(Error::option("gate_rate", format!("{gate_rate} is not a number above 0")));
    }
    let schedule = options.schedule.as_ref().map(|s| {
        let schedule = Schedule {
            growth: options::choice("schedule.growth", s.growth)?,
            max: positive("schedule.xi_max", s.xi_max)?,
            stages: options::number("schedule.stages", Some(s.stages), 2, 2..=1000)?,
            target_keep: s.target_keep,
        };
        let first = xi.unwrap_or_default();
        if schedule.max < first {
            return Err(Error::option(
                "schedule.xi_max",
                format!("{} is below the threshold of the first stage, {first}", schedule.max),
            ));
        }
        if schedule.growth == SoraGrowth::ExpLinear && first == 0.0 {
            return Err(Error::option(
                "xi",
                "equal factors need a threshold above 0 to start from; give xi",
            ));
        }
        if let Some(keep) = schedule.target_keep.filter(|k| !(*k > 0.0 && *k <= 1.0)) {
            return Err(Error::option("schedule.target_keep", format!("{keep} is outside (0, 1]")));
        }
        Ok(schedule)
    });
    Ok(Read {
        xi,
        l1: positive("l1", options.l1.unwrap_or_default())?,
        kind: options::choice("proximal", options.proximal)?,
        gates: options::choice("gates", options.gates)?,
        gate_rate,
        schedule: schedule.transpose()?,
    })
}

impl Adapt for v1::Sora {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &USUAL);
        self.l1.get_or_insert(0.0);
        self.gate_rate.get_or_insert(1.0);
        if self.proximal == SoraProximal::Unspecified as i32 {
            self.proximal = SoraProximal::Exact as i32;
        }
        if self.gates == SoraGates::Unspecified as i32 {
            self.gates = SoraGates::Normal as i32;
        }
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    /// Counts the ranks at the start, gates included.
    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        read(self)?;
        let plan = options::plan(self.adapter.as_ref(), &USUAL, shapes)?;
        let gates: u64 = plan.sites.iter().map(|site| site.rank as u64).sum();
        let parameters = plan.factors() + gates + plan.whole(shapes);
        Ok(Cost { parameters, frozen: 0, warnings: plan.warnings })
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let options = read(self)?;
        let plan = options::plan(self.adapter.as_ref(), &USUAL, setup.shapes)?;
        let mut tuned = build(&plan, setup, |site, _, random| {
            let ([rows, cols], rank) = (site.shape, site.rank);
            let a = uniform(&mut random.rng(), rank * cols, 1.0 / (cols as f32).sqrt());
            let gates = match options.gates {
                SoraGates::Ones => vec![1.0; rank],
                _ => normal(&mut random.child("gates").rng(), rank, 1.0),
            };
            Ok(Module {
                core: Core::Diagonal(Part::trained(gates, &[rank])?),
                core_name: GATES,
                ..plain(site, a, vec![0.0; rows * rank])?
            })
        })?;
        tuned.stepping.insert(GATES, Stepping { rate: options.gate_rate, decay: false });
        Ok(tuned)
    }

    fn hooks(&self, tuned: &Tuned, steps: u64) -> Result<Option<Box<dyn Hooks>>> {
        let Read { xi, l1, kind, schedule, .. } = read(self)?;
        let xi = xi.unwrap_or(2.0 / steps.max(1) as f64);
        if let Some(schedule) = schedule.as_ref().filter(|schedule| schedule.max < xi) {
            let problem = format!(
                "{} is below {xi}, two over the number of updates, where a threshold starts; give a lower xi",
                schedule.max
            );
            return Err(Error::option("schedule.xi_max", problem));
        }
        let stages = schedule.as_ref().map_or_else(|| vec![xi], |s| thresholds(xi, s));
        let modules = tuned.modules.keys().map(|name| module(name).to_owned()).collect();
        let target_keep = schedule.and_then(|s| s.target_keep);
        let xi = stages[0];
        let gates = Gates { modules, l1, kind, stages, target_keep, stopped: None, open: 1.0, xi };
        Ok(Some(Box::new(gates)))
    }

    fn finish(&self, tuned: Tuned) -> Result<Tuned> {
        cut(tuned)
    }
}

/// The proximal step. Rows of closed gates are held, so that they do not decay.
pub struct Gates {
    modules: Vec<String>,
    l1: f64,
    kind: SoraProximal,
    /// Threshold of each stage; training is cut into as many equal parts.
    stages: Vec<f64>,
    target_keep: Option<f64>,
    /// The stage whose threshold stays, once few enough ranks are left.
    stopped: Option<usize>,
    /// Share of the ranks that are open.
    open: f64,
    /// The threshold that was used last.
    xi: f64,
}

impl Gates {
    fn stage(&self, place: Place) -> usize {
        let count = self.stages.len() as u64;
        let stage = (place.step.saturating_sub(1) * count / place.total.max(1)).min(count - 1);
        self.stopped.map_or(stage as usize, |stopped| (stage as usize).min(stopped))
    }

    /// Holds what belongs to closed gates, and lets the rest go.
    fn hold(&self, parameters: &Parameters, optimizer: &mut Optimizer) -> Result<()> {
        for path in &self.modules {
            let gates = values(parameters, &format!("{path}.{GATES}"))?;
            let closed: Vec<bool> = gates.iter().map(|g| *g == 0.0).collect();
            let any = closed.contains(&true);
            let (a, b) = (format!("{path}.lora_A"), format!("{path}.lora_B"));
            let width = |name: &str| {
                let elements = parameters.get(name).map_or(0, |p| p.var.elem_count());
                elements / closed.len().max(1)
            };
            let rows = closed.iter().flat_map(|c| std::iter::repeat_n(*c, width(&a)));
            optimizer.hold(&a, any.then(|| rows.collect()));
            optimizer.hold(&b, any.then(|| closed.repeat(width(&b))));
        }
        Ok(())
    }
}

fn values(parameters: &Parameters, name: &str) -> Result<Vec<f32>> {
    tensors::read(&find(parameters, name)?.var, <[f32]>::to_vec)
}

fn find<'a>(parameters: &'a Parameters, name: &str) -> Result<&'a Parameter> {
    parameters
        .get(name)
        .ok_or_else(|| Error::internal(format!("the parameter '{name}' is not there")))
}

impl Hooks for Gates {
    fn penalty(&mut self, _: Place, parameters: &Parameters) -> Result<Option<(f64, Gradients)>> {
        if self.l1 == 0.0 {
            return Ok(None);
        }
        let names = self.modules.iter().map(|path| format!("{path}.{GATES}"));
        let gates: Vec<(String, Vec<f32>)> =
            names.map(|n| values(parameters, &n).map(|v| (n, v))).collect::<Result<_>>()?;
        let count: usize = gates.iter().map(|(_, g)| g.len()).sum();
        let by = self.l1 / count.max(1) as f64;
        let sum: f64 = gates.iter().flat_map(|(_, g)| g).map(|g| f64::from(g.abs())).sum();
        let sign = |g: &f32| if *g == 0.0 { 0.0 } else { by as f32 * g.signum() };
        let gradients = gates
            .into_iter()
            .map(|(name, g)| {
                let push: Vec<f32> = g.iter().map(sign).collect();
                Ok((name, Tensor::from_vec(push, g.len(), &Device::Cpu)?))
            })
            .collect::<Result<_>>()?;
        Ok(Some((by * sum, gradients)))
    }

    fn after_step(&mut self, updated: Updated<'_>) -> Result<()> {
        let stage = self.stage(updated.place);
        self.xi = self.stages[stage];
        let (mut kept, mut all) = (0, 0);
        for path in &self.modules {
            let parameter = find(updated.parameters, &format!("{path}.{GATES}"))?;
            let (xi, kind) = (self.xi as f32, self.kind);
            tensors::change(&parameter.var, |gates| {
                gates.iter_mut().for_each(|g| *g = proximal(*g, xi, kind));
                kept += gates.iter().filter(|g| **g != 0.0).count();
                all += gates.len();
            })?;
        }
        if kept == 0 {
            return Err(Error::new(
                Reason::NumericFailure,
                format!(
                    "the threshold xi = {} closed the last gate at step {}; take a smaller xi, or more \
                     steps",
                    self.xi, updated.place.step
                ),
            ));
        }
        self.open = kept as f64 / all.max(1) as f64;
        if self.stopped.is_none() && self.target_keep.is_some_and(|keep| self.open <= keep) {
            self.stopped = Some(stage);
        }
        self.hold(updated.parameters, updated.optimizer)
    }

    fn metrics(&self) -> BTreeMap<String, f64> {
        [("kept_ranks".to_owned(), self.open), ("threshold".to_owned(), self.xi)].into()
    }

    fn save(&self) -> Result<BTreeMap<String, Tensor>> {
        let stopped = self.stopped.map_or(-1.0, |stage| stage as f32);
        let state = vec![stopped, self.open as f32];
        Ok([("gates".to_owned(), Tensor::from_vec(state, 2, &Device::Cpu)?)].into())
    }

    fn restore(
        &mut self,
        saved: BTreeMap<String, Tensor>,
        parameters: &mut Parameters,
        optimizer: &mut Optimizer,
    ) -> Result<()> {
        let state = saved.get("gates").map(|state| state.to_vec1::<f32>()).transpose()?;
        if let Some([stopped, open]) = state.as_deref() {
            let last = self.stages.len() - 1;
            self.stopped = (*stopped >= 0.0).then(|| (*stopped as usize).min(last));
            self.open = f64::from(*open);
        }
        self.hold(parameters, optimizer)
    }
}

#[cfg(test)]
mod tests;
