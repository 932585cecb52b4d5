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
mod tests {
    use super::super::cut::kept;
    use super::super::shapes::testing::smollm2;
    use super::super::testing::{self, Case, Toy, all_linear};
    use super::*;

    #[test]
    fn the_shared_contract_and_counts() {
        let method =
            v1::Adalora { adapter: Some(all_linear(4)), target_r: Some(2), ..Default::default() };
        let case = Case::decoder();
        let tuned = case.start(&method);
        case.equals_base(&tuned, 0.0);
        assert_eq!(tuned.modules.values().next().unwrap().scale, 4.0 / 4.00001);
        case.contract(&method, &["lora_A", "lora_B", "lora_E"]);
        let count = v1::Adalora::default().check(&smollm2()).unwrap().parameters;
        assert_eq!(count, 12 * 57_600 + 12 * 60);
        let bad = v1::Adalora { target_r: Some(13), ..Default::default() };
        assert_eq!(bad.check(&smollm2()).unwrap_err().violations()[0].field, "target_r");
        let bad = v1::Adalora { beta2: Some(1.0), ..Default::default() };
        assert_eq!(bad.check(&smollm2()).unwrap_err().violations()[0].field, "beta2");
    }

    #[test]
    fn the_budget_falls_as_a_cube() {
        let budget = Budget { first: 24, last: 8, initial: 10, fin: 10, interval: 1, steps: 60 };
        assert_eq!(budget.at(10), Allot::Nothing);
        // Half way: 8 + 16 / 8.
        assert_eq!(budget.at(30), Allot::Choose(10));
        assert_eq!(budget.at(50), Allot::Choose(8));
        assert_eq!(budget.at(51), Allot::Keep);
        let sparse = Budget { interval: 7, ..budget };
        assert_eq!((sparse.at(29), sparse.at(50)), (Allot::Nothing, Allot::Choose(8)));
        assert!(matches!(sparse.at(28), Allot::Choose(_)));
        let counts: Vec<u64> = (11..=50)
            .map(|t| match budget.at(t) {
                Allot::Choose(count) => count,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(counts.is_sorted_by(|a, b| a >= b));
    }

    #[test]
    fn orthogonality_worked_out_by_hand_and_by_differences() {
        let p = from_rows(&[2.0, 0.0], 1, 2);
        // |2 * 2 - 1| = 3 and its slope 2 * 2.
        let (norm, gradient) = orthogonality(&p);
        assert!((norm - 3.0).abs() < 1e-12 && (gradient[(0, 0)] - 4.0).abs() < 1e-12);
        let toy = Toy::new(3);
        let method =
            v1::Adalora { adapter: Some(all_linear(3)), target_r: Some(1), ..Default::default() };
        let tuned = toy.start(&method, 1);
        toy.disturb(&tuned, 0.5);
        let parameters = tuned.parameters();
        let mut hooks = method.hooks(&tuned, 100).unwrap().unwrap();
        let place = Place { step: 1, total: 100, rate: 0.0 };
        let (_, gradients) = hooks.penalty(place, &parameters).unwrap().unwrap();
        assert_eq!(gradients.len(), 4);
        for (name, gradient) in &gradients {
            let var = &parameters[name].var;
            let original = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut loss = |by: f32| {
                let mut values = original.clone();
                values[1] += by;
                var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
                hooks.penalty(place, &parameters).unwrap().unwrap().0
            };
            let want = (loss(1e-2) - loss(-1e-2)) / 2e-2;
            loss(0.0);
            let got = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap()[1];
            assert!((f64::from(got) - want).abs() < 1e-3, "{name}: {got} is not {want}");
        }
    }

    #[test]
    fn as_many_triplets_as_the_budget_says_and_they_can_come_back() {
        let toy = Toy::new(6);
        let method = v1::Adalora {
            adapter: Some(all_linear(4)),
            target_r: Some(2),
            initial_steps: Some(2),
            final_steps: Some(3),
            ..Default::default()
        };
        let tuned = toy.start(&method, 1);
        toy.disturb(&tuned, 0.3);
        let mut parameters = tuned.parameters();
        let mut hooks = method.hooks(&tuned, 12).unwrap().unwrap();
        let mut optimizer = testing::plain_descent();
        let budget = Budget { first: 8, last: 4, initial: 2, fin: 3, interval: 1, steps: 12 };
        let mut closed: Vec<Vec<bool>> = Vec::new();
        for step in 1..=12 {
            let place = Place { step, total: 12, rate: 0.1 };
            let mut gradients = toy.gradients(step as usize % 3, &tuned, &parameters).unwrap();
            let (_, more) = hooks.penalty(place, &parameters).unwrap().unwrap();
            for (name, more) in more {
                let sum = (&gradients[&name] + more).unwrap();
                gradients.insert(name, sum);
            }
            optimizer.update(&parameters, &gradients, 0.1).unwrap();
            let updated = Updated {
                place,
                parameters: &mut parameters,
                gradients: &gradients,
                optimizer: &mut optimizer,
            };
            hooks.after_step(updated).unwrap();
            let (open, _) = kept(&tuned).unwrap();
            match budget.at(step) {
                Allot::Nothing => assert_eq!(open, 8),
                Allot::Choose(count) => assert_eq!(open as u64, count, "step {step}"),
                Allot::Keep => assert_eq!(open, 4),
            }
            assert_eq!(hooks.metrics()["active_ranks"], open as f64);
            let e = tuned.values().unwrap();
            let e = e.iter().filter(|(name, _)| name.ends_with("lora_E"));
            closed.push(e.flat_map(|(_, v)| v.iter().map(|v| *v == 0.0)).collect());
            // Exact resume: what is saved is all there is.
            let state = hooks.save().unwrap();
            let count = state.len();
            hooks = method.hooks(&tuned, 12).unwrap().unwrap();
            hooks.restore(state, &mut parameters, &mut optimizer).unwrap();
            assert_eq!(hooks.save().unwrap().len(), count);
        }
        assert_eq!(closed[8], closed[11], "the last choice stays");
        let a = format!("{}.lora_A", module(&toy.names()[0]));
        assert!(tuned.values().unwrap()[&a].iter().all(|v| *v != 0.0), "A and B stay");
        let before = toy.outputs(&tuned);
        let tuned = method.finish(tuned).unwrap();
        assert_eq!(tuned.modules.values().map(|m| m.rank).sum::<usize>(), 4);
        for (got, want) in toy.outputs(&tuned).iter().zip(before) {
            assert!((got - want).abs() < 1e-5);
        }
        let stranger = Tensor::new(&[1f32], &Device::Cpu).unwrap();
        let state = [("kept/none".to_owned(), stranger)].into();
        assert!(hooks.restore(state, &mut parameters, &mut optimizer).is_err());
    }

    #[test]
    fn steps_that_leave_no_room_are_refused() {
        let toy = Toy::new(6);
        let method = v1::Adalora {
            adapter: Some(all_linear(4)),
            initial_steps: Some(6),
            final_steps: Some(6),
            ..Default::default()
        };
        let tuned = toy.start(&method, 1);
        assert!(method.hooks(&tuned, 12).is_err());
        assert!(method.hooks(&tuned, 13).is_ok());
    }

    #[test]
    fn factors_start_small_and_what_stands_between_at_zero() {
        let method =
            v1::Adalora { adapter: Some(all_linear(4)), target_r: Some(2), ..Default::default() };
        let values = Case::decoder().start(&method).values().unwrap();
        let (mut sum, mut count) = (0.0, 0);
        for (name, values) in &values {
            if name.ends_with("lora_E") {
                assert!(values.iter().all(|e| *e == 0.0), "{name}");
            } else {
                sum += values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
                count += values.len();
            }
        }
        let deviation = (sum / f64::from(u32::try_from(count).unwrap())).sqrt();
        assert!((deviation / 0.02 - 1.0).abs() < 0.05, "{deviation}");
    }

    /// Half of the mean, over both factors of all modules, of the norm (not its square).
    #[test]
    fn the_penalty_worked_out_by_hand() {
        let toy = Toy::new(3);
        let method =
            v1::Adalora { adapter: Some(all_linear(3)), target_r: Some(1), ..Default::default() };
        let tuned = toy.start(&method, 1);
        let parameters = tuned.parameters();
        let first = format!("{}.lora_A", module(&toy.names()[0]));
        for (name, parameter) in &parameters {
            let var = &parameter.var;
            let mut values = vec![0f32; var.elem_count()];
            if *name == first {
                // 2 I and zeros: A A^T - I = 3 I.
                let cols = values.len() / 3;
                (0..3).for_each(|i| values[i * cols + i] = 2.0);
            }
            var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
        }
        let mut hooks = method.hooks(&tuned, 100).unwrap().unwrap();
        let place = Place { step: 1, total: 100, rate: 0.0 };
        let (loss, gradients) = hooks.penalty(place, &parameters).unwrap().unwrap();
        // Norms of 3 I and three times of -I: 0.5 (3 + 1 + 1 + 1) sqrt 3 / 4.
        let root = 3_f64.sqrt();
        assert!((loss - 0.75 * root).abs() < 1e-6, "{loss}");
        // 0.5 / 4 times 2 (3 I) (2 I) / (3 sqrt 3).
        let got = gradients[&first].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!((f64::from(got[0]) - 0.5 / root).abs() < 1e-6, "{}", got[0]);
        assert_eq!(got[1], 0.0);
        let others = gradients.iter().filter(|(name, _)| **name != first);
        for (name, gradient) in others {
            let values = gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(values.iter().all(|g| *g == 0.0), "{name}");
        }
    }

    /// Two modules, of ranks 2 and 1, of which two triplets stay; betas of 0.85.
    #[test]
    fn scores_worked_out_by_hand_and_triplets_that_come_back() {
        let shapes: [(&str, &[usize]); 6] = [
            ("m.lora_E", &[2]),
            ("m.lora_A", &[2, 2]),
            ("m.lora_B", &[3, 2]),
            ("n.lora_E", &[1]),
            ("n.lora_A", &[1, 2]),
            ("n.lora_B", &[3, 1]),
        ];
        let tensor = |shape: &[usize], values: Vec<f32>| {
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let mut parameters = Parameters::new();
        for (name, shape) in shapes {
            let ones = tensor(shape, vec![1.0; shape.iter().product()]);
            let var = candle_core::Var::from_tensor(&ones).unwrap();
            let parameter = crate::train::parameters::Parameter { var, rate: 1.0, decay: true };
            parameters.insert(name.to_owned(), parameter);
        }
        let set = |parameters: &Parameters, name: &str, values: &[f32]| {
            let var = &parameters[name].var;
            var.set(&tensor(var.dims(), values.to_vec())).unwrap();
        };
        let gradients = |given: &[(&str, &[f32])]| -> Gradients {
            let of = |(name, shape): (&str, &[usize])| {
                let own = given.iter().find(|(given, _)| *given == name);
                let zeros = vec![0.0; shape.iter().product()];
                let values = own.map_or(zeros, |(_, values)| values.to_vec());
                (name.to_owned(), tensor(shape, values))
            };
            shapes.into_iter().map(of).collect()
        };
        let mut allocator = Allocator {
            modules: vec![("m".to_owned(), 2), ("n".to_owned(), 1)],
            budget: Budget { first: 2, last: 2, initial: 0, fin: 10, interval: 1, steps: 100 },
            betas: [0.85; 2],
            weight: 0.5,
            seen: BTreeMap::new(),
            kept: BTreeMap::new(),
        };
        let mut optimizer = testing::plain_descent();
        let mut after = |allocator: &mut Allocator,
                         parameters: &mut Parameters,
                         step: u64,
                         gradients: &Gradients| {
            let place = Place { step, total: 100, rate: 0.1 };
            let optimizer = &mut optimizer;
            let updated = Updated { place, parameters, gradients, optimizer };
            allocator.after_step(updated).unwrap();
        };
        let near = |got: Vec<f64>, want: &[f64]| {
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{got} is not {want}");
            }
        };

        // |p g|: E 6 and 1; A 2 in row 0; B 4 in column 1 of three rows. Means are 0.15 of that, spreads
        // 0.15 of what is 0.85 away.
        set(&parameters, "m.lora_E", &[2.0, 1.0]);
        let first = gradients(&[
            ("m.lora_E", &[3.0, -1.0]),
            ("m.lora_A", &[2.0, 0.0, 0.0, 0.0]),
            ("m.lora_B", &[0.0, 4.0, 0.0, 0.0, 0.0, 0.0]),
        ]);
        after(&mut allocator, &mut parameters, 1, &first);
        let e = [0.9 * 0.765, 0.15 * 0.1275];
        let row = 0.3 * 0.255 / 2.0;
        let column = 0.6 * 0.51 / 3.0;
        near(allocator.scores("m", 2), &[e[0] + row, e[1] + column]);
        near(allocator.scores("n", 1), &[0.0]);
        let e_of = |parameters: &Parameters, name: &str| -> Vec<f32> {
            parameters[name].var.to_vec1().unwrap()
        };
        assert_eq!(e_of(&parameters, "m.lora_E"), [2.0, 1.0]);
        assert_eq!(e_of(&parameters, "n.lora_E"), [0.0], "ranked over the whole model");
        let b = parameters["n.lora_B"].var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(b, [1.0; 3], "only the entry of E is emptied");

        // The optimiser moved the entry that was emptied, and now it matters.
        set(&parameters, "n.lora_E", &[0.5]);
        after(&mut allocator, &mut parameters, 2, &gradients(&[("n.lora_E", &[100.0])]));
        near(allocator.scores("n", 1), &[7.5 * 6.375]);
        // What has no gradient: means and spreads of E 0.765 and 0.1275, of A 0.255, of B 0.51.
        let want = [0.765 * 0.765 + 0.255 * 0.255 / 2.0, 0.1275 * 0.1275 + 0.51 * 0.51 / 3.0];
        near(allocator.scores("m", 2), &want);
        assert_eq!(e_of(&parameters, "n.lora_E"), [0.5], "it came back");
        assert_eq!(e_of(&parameters, "m.lora_E"), [2.0, 0.0]);

        // From the end of the fall on nothing is learnt of importance, and the last choice stays.
        let before = allocator.scores("m", 2);
        let large = gradients(&[("m.lora_E", &[0.0, 1e6])]);
        set(&parameters, "m.lora_E", &[2.0, 9.0]);
        after(&mut allocator, &mut parameters, 90, &large);
        set(&parameters, "m.lora_E", &[2.0, 9.0]);
        after(&mut allocator, &mut parameters, 91, &large);
        assert_eq!(allocator.scores("m", 2), before);
        assert_eq!(e_of(&parameters, "m.lora_E"), [2.0, 0.0]);
    }
}
