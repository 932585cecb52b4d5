//! AdaLoRA (Zhang et al. 2023, "Adaptive budget allocation for parameter-efficient fine-tuning", arXiv
//! 2303.10512, equations 3 to 12): `delta W = s B diag(E) A` with factors kept nearly orthogonal; the
//! triplets that matter least lose their entry of `E` as a budget falls, and may come back.
//!
//! Decided here: exactly as many triplets stay as the budget says, ties by name and index; the gradient of
//! the orthogonality loss is added as it is worked out, `2 G A / |G|` for `G = A A^T - I`, once a step.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use faer::Mat;

use super::cut::cut;
use super::lora::plain;
use super::module::{Core, Module, Part};
use super::options::{self, Usual};
use super::shapes::{Shapes, module};
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build, normal};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::nn::linalg::{from_rows, product, to_rows};
use crate::proto::v1;
use crate::train::hooks::{Hooks, Place, Updated};
use crate::train::optimizer::Optimizer;
use crate::train::parameters::{Gradients, Parameters};
use crate::train::tensors;

static CARD: Card = Card {
    name: "adalora",
    title: "AdaLoRA",
    verb: "adapt",
    summary: "LoRA whose ranks move to the linears where they matter, under a falling budget.",
    paper: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

const USUAL: Usual = Usual { rank: Some(12), alpha: None, all_linear: false, fits: false };

/// Deviation of the factors at the start.
const DEVIATION: f64 = 0.02;
/// Added to the rank that alpha is divided by.
const RANK_OFFSET: f64 = 1e-5;

/// How the budget falls.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// Triplets at the start and at the end, of all modules together.
    pub first: u64,
    pub last: u64,
    /// Steps before it falls, and at the end when it has fallen.
    pub initial: u64,
    pub fin: u64,
    pub interval: u64,
    pub steps: u64,
}

/// What is done with the triplets after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allot {
    /// All stay.
    Nothing,
    /// This many stay, chosen anew.
    Choose(u64),
    /// Those that were chosen last stay.
    Keep,
}

impl Budget {
    /// The budget's cubic fall and what is to be done at step `t`, from 1.
    pub fn at(&self, t: u64) -> Allot {
        let end = self.steps - self.fin;
        if t <= self.initial && t < end {
            return Allot::Nothing;
        }
        if t > end {
            return Allot::Keep;
        }
        if t == end {
            return Allot::Choose(self.last);
        }
        if !t.is_multiple_of(self.interval) {
            return Allot::Nothing;
        }
        let left = 1.0 - (t - self.initial) as f64 / (end - self.initial) as f64;
        let range = self.first.saturating_sub(self.last) as f64;
        Allot::Choose((range * left.powi(3) + self.last as f64) as u64)
    }
}

/// The options, checked.
struct Read {
    target: u32,
    initial: Option<u64>,
    fin: Option<u64>,
    interval: u64,
    betas: [f64; 2],
    weight: f64,
}

fn read(options: &v1::Adalora) -> Result<Read> {
    let beta = |field: &str, value: Option<f64>| {
        let value = value.unwrap_or(0.85);
        match value > 0.0 && value < 1.0 {
            true => Ok(value),
            false => Err(Error::option(field, format!("{value} is outside (0, 1)"))),
        }
    };
    let weight = options.orthogonality.unwrap_or(0.5);
    if !(weight.is_finite() && weight >= 0.0) {
        return Err(Error::option(
            "orthogonality",
            format!("{weight} is not a number of 0 or more"),
        ));
    }
    Ok(Read {
        target: options::number("target_r", options.target_r, 8, 1..=1 << 14)?,
        initial: options.initial_steps.map(u64::from),
        fin: options.final_steps.map(u64::from),
        interval: u64::from(options::number("interval", options.interval, 1, 1..=1 << 20)?),
        betas: [beta("beta1", options.beta1)?, beta("beta2", options.beta2)?],
        weight,
    })
}

impl Adapt for v1::Adalora {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &USUAL);
        self.target_r.get_or_insert(8);
        self.interval.get_or_insert(1);
        self.beta1.get_or_insert(0.85);
        self.beta2.get_or_insert(0.85);
        self.orthogonality.get_or_insert(0.5);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    /// Counts the ranks at the start.
    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        let Read { target, .. } = read(self)?;
        let plan = options::plan(self.adapter.as_ref(), &USUAL, shapes)?;
        let ranks: u64 = plan.sites.iter().map(|site| site.rank as u64).sum();
        if u64::from(target) * plan.sites.len() as u64 > ranks {
            return Err(Error::option(
                "target_r",
                format!("{target} is more than the mean rank at the start; raise adapter.r"),
            ));
        }
        let parameters = plan.factors() + ranks + plan.whole(shapes);
        Ok(Cost { parameters, frozen: 0, warnings: plan.warnings })
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let plan = options::plan(self.adapter.as_ref(), &USUAL, setup.shapes)?;
        build(&plan, setup, |site, _, random| {
            let ([rows, cols], rank) = (site.shape, site.rank);
            let a = normal(&mut random.child("a").rng(), rank * cols, DEVIATION);
            let b = normal(&mut random.child("b").rng(), rows * rank, DEVIATION);
            Ok(Module {
                scale: site.alpha / (rank as f64 + RANK_OFFSET),
                rslora: false,
                core: Core::Diagonal(Part::trained(vec![0.0; rank], &[rank])?),
                core_name: "lora_E",
                ..plain(site, a, b)?
            })
        })
    }

    fn hooks(&self, tuned: &Tuned, steps: u64) -> Result<Option<Box<dyn Hooks>>> {
        let Read { target, initial, fin, interval, betas, weight } = read(self)?;
        let budget = Budget {
            first: tuned.modules.values().map(|m| m.rank as u64).sum(),
            last: u64::from(target) * tuned.modules.len() as u64,
            initial: initial.unwrap_or(steps / 10),
            fin: fin.unwrap_or(steps / 5),
            interval,
            steps,
        };
        if budget.initial + budget.fin >= steps {
            return Err(Error::option(
                "final_steps",
                format!(
                    "{} steps at the start and {} at the end leave none of {steps} for the ranks to fall",
                    budget.initial, budget.fin
                ),
            ));
        }
        let modules =
            tuned.modules.values().map(|m| (module(&m.linear).to_owned(), m.rank)).collect();
        Ok(Some(Box::new(Allocator {
            modules,
            budget,
            betas,
            weight,
            seen: BTreeMap::new(),
            kept: BTreeMap::new(),
        })))
    }

    fn finish(&self, tuned: Tuned) -> Result<Tuned> {
        cut(tuned)
    }
}

/// Running mean of the importances and of their uncertainty, by element.
#[derive(Debug, Clone, Default)]
struct Importance {
    mean: Vec<f32>,
    spread: Vec<f32>,
}

impl Importance {
    fn update(&mut self, values: &[f32], gradient: &[f32], [one, two]: [f32; 2]) {
        self.mean.resize(values.len(), 0.0);
        self.spread.resize(values.len(), 0.0);
        let each = self.mean.iter_mut().zip(&mut self.spread).zip(values.iter().zip(gradient));
        for ((mean, spread), (value, gradient)) in each {
            let now = (value * gradient).abs();
            *mean = one * *mean + (1.0 - one) * now;
            *spread = two * *spread + (1.0 - two) * (now - *mean).abs();
        }
    }

    fn score(&self, at: usize) -> f64 {
        f64::from(self.mean[at]) * f64::from(self.spread[at])
    }
}

/// Importances, the budget, and the loss that keeps factors orthogonal.
pub struct Allocator {
    /// Paths and ranks, in the order of the names.
    modules: Vec<(String, usize)>,
    budget: Budget,
    betas: [f64; 2],
    weight: f64,
    seen: BTreeMap<String, Importance>,
    /// The triplets that the last choice left.
    kept: BTreeMap<String, Vec<bool>>,
}

const KINDS: [&str; 3] = ["lora_E", "lora_A", "lora_B"];

impl Allocator {
    /// Scores of a module's triplets: that of its entry of `E`, the mean over its row of `A`, the mean over
    /// its column of `B`.
    fn scores(&self, path: &str, rank: usize) -> Vec<f64> {
        let of = |kind: &str| self.seen.get(&format!("{path}.{kind}"));
        let [Some(e), Some(a), Some(b)] = KINDS.map(of) else { return vec![0.0; rank] };
        let (cols, rows) = (a.mean.len() / rank, b.mean.len() / rank);
        (0..rank)
            .map(|i| {
                let row = (i * cols..(i + 1) * cols).map(|at| a.score(at)).sum::<f64>();
                let column = (0..rows).map(|r| b.score(r * rank + i)).sum::<f64>();
                e.score(i) + row / cols as f64 + column / rows as f64
            })
            .collect()
    }

    /// Chooses the triplets with the highest scores.
    fn choose(&mut self, count: u64) {
        let mut all: Vec<(f64, usize, usize)> = Vec::new();
        for (m, (path, rank)) in self.modules.iter().enumerate() {
            all.extend(self.scores(path, *rank).into_iter().enumerate().map(|(i, s)| (s, m, i)));
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        self.kept = self.modules.iter().map(|(p, r)| (p.clone(), vec![false; *r])).collect();
        for (_, m, i) in all.into_iter().take(count as usize) {
            if let Some(kept) = self.kept.get_mut(&self.modules[m].0) {
                kept[i] = true;
            }
        }
    }

    /// Empties the entries of the triplets that were not chosen.
    fn mask(&self, parameters: &Parameters) -> Result<()> {
        for (path, kept) in &self.kept {
            let Some(parameter) = parameters.get(&format!("{path}.lora_E")) else { continue };
            let mut e = parameter.var.to_vec1::<f32>()?;
            e.iter_mut().zip(kept).filter(|(_, kept)| !**kept).for_each(|(e, _)| *e = 0.0);
            parameter.var.set(&Tensor::from_vec(e, kept.len(), &Device::Cpu)?)?;
        }
        Ok(())
    }
}

/// The norm of `p p^T - I` for a factor `[n, m]` of few rows, and the norm's gradient.
fn orthogonality(p: &Mat<f64>) -> (f64, Mat<f64>) {
    let n = p.nrows();
    let mut gram = product(p.as_ref(), p.transpose());
    (0..n).for_each(|i| gram[(i, i)] -= 1.0);
    let norm = gram.norm_l2();
    let mut gradient = product(gram.as_ref(), p.as_ref());
    // At the bottom the norm has no gradient; zero is one of its subgradients.
    let by = if norm > 0.0 { 2.0 / norm } else { 0.0 };
    for j in 0..gradient.ncols() {
        (0..n).for_each(|i| gradient[(i, j)] *= by);
    }
    (norm, gradient)
}

impl Hooks for Allocator {
    fn penalty(&mut self, _: Place, parameters: &Parameters) -> Result<Option<(f64, Gradients)>> {
        if self.weight == 0.0 {
            return Ok(None);
        }
        let by = self.weight / (2 * self.modules.len()).max(1) as f64;
        let (mut sum, mut gradients) = (0.0, Gradients::new());
        for (path, _) in &self.modules {
            for kind in ["lora_A", "lora_B"] {
                let name = format!("{path}.{kind}");
                let Some(parameter) = parameters.get(&name) else { continue };
                let (rows, cols) = parameter.var.dims2()?;
                let p = tensors::read(&parameter.var, |values| from_rows(values, rows, cols))?;
                let across = kind == "lora_B";
                let (norm, gradient) = match across {
                    true => orthogonality(&p.transpose().to_owned()),
                    false => orthogonality(&p),
                };
                sum += norm;
                let of = if across { gradient.transpose() } else { gradient.as_ref() };
                let values: Vec<f32> =
                    to_rows(of).iter().map(|g| (f64::from(*g) * by) as f32).collect();
                gradients.insert(name, Tensor::from_vec(values, (rows, cols), &Device::Cpu)?);
            }
        }
        Ok(Some((by * sum, gradients)))
    }

    fn after_step(&mut self, updated: Updated<'_>) -> Result<()> {
        let Updated { place, parameters, gradients, .. } = updated;
        if place.step < self.budget.steps.saturating_sub(self.budget.fin) {
            let betas = self.betas.map(|b| b as f32);
            for (path, _) in &self.modules {
                for kind in KINDS {
                    let name = format!("{path}.{kind}");
                    let (Some(parameter), Some(gradient)) =
                        (parameters.get(&name), gradients.get(&name))
                    else {
                        continue;
                    };
                    let importance = self.seen.entry(name).or_default();
                    tensors::read(&parameter.var, |values| {
                        tensors::read(gradient, |gradient| {
                            importance.update(values, gradient, betas);
                        })
                    })??;
                }
            }
        }
        match self.budget.at(place.step) {
            Allot::Nothing => return Ok(()),
            Allot::Choose(count) => self.choose(count),
            Allot::Keep => {}
        }
        self.mask(parameters)
    }

    fn metrics(&self) -> BTreeMap<String, f64> {
        let kept = self.kept.values().flatten().filter(|kept| **kept).count() as u64;
        let active = if self.kept.is_empty() { self.budget.first } else { kept };
        [("active_ranks".to_owned(), active as f64)].into()
    }

    fn save(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        let tensor = |v: &[f32]| Tensor::from_slice(v, v.len(), &Device::Cpu);
        for (name, importance) in &self.seen {
            state.insert(format!("mean/{name}"), tensor(&importance.mean)?);
            state.insert(format!("spread/{name}"), tensor(&importance.spread)?);
        }
        for (path, kept) in &self.kept {
            let flags: Vec<f32> = kept.iter().map(|k| f32::from(u8::from(*k))).collect();
            state.insert(format!("kept/{path}"), tensor(&flags)?);
        }
        Ok(state)
    }

    fn restore(
        &mut self,
        saved: BTreeMap<String, Tensor>,
        _: &mut Parameters,
        _: &mut Optimizer,
    ) -> Result<()> {
        let (mut seen, mut kept) = (BTreeMap::<String, Importance>::new(), BTreeMap::new());
        for (name, values) in saved {
            let values = values.to_vec1::<f32>()?;
            match name.split_once('/') {
                Some(("mean", name)) => seen.entry(name.to_owned()).or_default().mean = values,
                Some(("spread", name)) => seen.entry(name.to_owned()).or_default().spread = values,
                Some(("kept", path)) => {
                    let flags: Vec<bool> = values.iter().map(|v| *v != 0.0).collect();
                    kept.insert(path.to_owned(), flags);
                }
                _ => return Err(misfit(&name)),
            }
        }
        let ranks: BTreeMap<&str, usize> =
            self.modules.iter().map(|(path, rank)| (path.as_str(), *rank)).collect();
        for (path, flags) in &kept {
            if ranks.get(path.as_str()) != Some(&flags.len()) {
                return Err(misfit(path));
            }
        }
        for (name, importance) in &seen {
            let known = name.rsplit_once('.').is_some_and(|(path, _)| ranks.contains_key(path));
            if !known || importance.mean.len() != importance.spread.len() {
                return Err(misfit(name));
            }
        }
        (self.seen, self.kept) = (seen, kept);
        Ok(())
    }
}

fn misfit(name: &str) -> Error {
    Error::new(
        Reason::MalformedFile,
        format!(
            "the state '{name}' of a checkpoint does not fit AdaLoRA's modules; start the training anew"
        ),
    )
}

#[cfg(test)]
mod tests;
