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
mod tests {
    use super::super::shapes::testing::minilm;
    use super::super::testing::{self, Case, Toy, all_linear};
    use super::super::{cut, export};
    use super::*;
    use crate::formats::peft::Use;
    use crate::formats::peft::contents::Contents;

    #[test]
    fn thresholding_worked_out_by_hand() {
        let xi = 0.5;
        let points = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0].map(|n: f32| n * xi);
        let exact = points.map(|g| proximal(g, xi, SoraProximal::Exact));
        assert_eq!(exact, [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
        assert_eq!(proximal(0.75, xi, SoraProximal::Exact), 0.25);
        assert_eq!(proximal(0.75, xi, SoraProximal::Official), 0.0);
        assert_eq!(proximal(1.5, xi, SoraProximal::Official), 1.0);
        assert_eq!(proximal(0.3, 0.0, SoraProximal::Official), 0.3);
    }

    #[test]
    fn thresholds_of_the_stages() {
        let of = |growth, xi| {
            thresholds(xi, &Schedule { growth, max: 8.0, stages: 4, target_keep: None })
        };
        assert_eq!(of(SoraGrowth::Linear, 2.0), [2.0, 4.0, 6.0, 8.0]);
        for (got, want) in of(SoraGrowth::ExpLinear, 1.0).iter().zip([1.0, 2.0, 4.0, 8.0]) {
            assert!((got - want).abs() < 1e-12);
        }
        let log = of(SoraGrowth::LogLinear, 0.0);
        assert!(log[0].abs() < 1e-12 && (log[3] - 8.0).abs() < 1e-12);
        assert!((log[1].exp() - 1.0 - (8f64.exp() - 1.0) / 3.0).abs() < 1e-9);
        let mut gates = Gates {
            modules: Vec::new(),
            l1: 0.0,
            kind: SoraProximal::Exact,
            stages: vec![1.0, 2.0, 3.0],
            target_keep: None,
            stopped: None,
            open: 1.0,
            xi: 1.0,
        };
        let place = |step| Place { step, total: 9, rate: 0.0 };
        let all: Vec<f64> = (1..=9).map(|s| gates.stages[gates.stage(place(s))]).collect();
        assert_eq!(all, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0]);
        let saved = |stopped: f32| {
            let state = Tensor::new(&[stopped, 0.5], &Device::Cpu).unwrap();
            [("gates".to_owned(), state)].into()
        };
        let mut optimizer = testing::plain_descent();
        gates.restore(saved(1.0), &mut Parameters::new(), &mut optimizer).unwrap();
        assert_eq!((gates.stage(place(9)), gates.metrics()["kept_ranks"]), (1, 0.5));
        assert_eq!(gates.save().unwrap()["gates"].to_vec1::<f32>().unwrap(), [1.0, 0.5]);
        gates.restore(saved(-1.0), &mut Parameters::new(), &mut optimizer).unwrap();
        assert_eq!(gates.stage(place(9)), 2);
    }

    #[test]
    fn the_shared_contract_and_the_cut() {
        let method = v1::Sora { adapter: Some(all_linear(4)), ..Default::default() };
        let case = Case::decoder();
        case.equals_base(&case.start(&method), 0.0);
        case.contract(&method, &["lora_A", "lora_B", GATES]);
        let count = v1::Sora::default().check(&minilm()).unwrap().parameters;
        assert_eq!(count, 16 * 41_472 + 16 * 36);

        // Some gates closed, all gates of one module.
        let tuned = case.start(&method);
        case.disturb(&tuned, 0.3);
        for (i, module) in tuned.modules.values().enumerate() {
            let Core::Diagonal(Part::Trained(gates)) = &module.core else { panic!("gates") };
            let open: [f32; 4] = match i {
                0 => [0.0; 4],
                _ => std::array::from_fn(|j| if (i + j) % 3 == 0 { 0.0 } else { 0.5 + j as f32 }),
            };
            gates.set(&Tensor::new(&open, &Device::Cpu).unwrap()).unwrap();
        }
        let (kept, all) = cut::kept(&tuned).unwrap();
        assert_eq!(all, 84);
        let gated = case.outputs(&tuned);
        let ranks: BTreeMap<String, usize> = tuned
            .modules
            .iter()
            .map(|(name, m)| {
                let Core::Diagonal(core) = &m.core else { panic!("gates") };
                (name.clone(), core.values().unwrap().iter().filter(|g| **g != 0.0).count())
            })
            .collect();
        let tuned = method.finish(tuned).unwrap();
        assert_eq!(tuned.modules.len(), 20);
        assert_eq!(tuned.modules.values().map(|m| m.rank).sum::<usize>(), kept);
        for (name, module) in &tuned.modules {
            assert_eq!(module.rank, ranks[name]);
            // alpha' = s r' keeps the scale.
            assert_eq!(module.scale, 4.0);
        }
        for (got, want) in case.outputs(&tuned).iter().zip(&gated) {
            assert!((got - want).abs() < 1e-4, "{got} is not {want}");
        }
        let sides = |m: &Module| m.rank * (m.shape[0] + m.shape[1]);
        let want: usize = tuned.modules.values().map(sides).sum();
        assert_eq!(tuned.count(), want as u64);
    }

    fn set(parameters: &Parameters, name: &str, values: &[f32]) {
        let var = &parameters[name].var;
        var.set(&Tensor::from_vec(values.to_vec(), var.shape(), &Device::Cpu).unwrap()).unwrap();
    }

    #[test]
    fn closed_gates_get_no_gradient_and_do_not_decay() {
        let toy = Toy::new(4);
        let method = v1::Sora { adapter: Some(all_linear(3)), ..Default::default() };
        let tuned = toy.start(&method, 1);
        toy.disturb(&tuned, 0.3);
        let mut parameters = tuned.parameters();
        let path = module(&toy.names()[0]).to_owned();
        let [a, b, g] = ["lora_A", "lora_B", GATES].map(|kind| format!("{path}.{kind}"));
        set(&parameters, &g, &[1.0, 0.0, -2.0]);
        let gradients = toy.gradients(0, &tuned, &parameters).unwrap();
        let of = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let row = of(&gradients[&a]);
        let width = row.len() / 3;
        assert!(row[width..2 * width].iter().all(|v| *v == 0.0));
        assert!(row[..width].iter().any(|v| *v != 0.0));
        assert!(of(&gradients[&b]).chunks(3).all(|row| row[1] == 0.0));
        let mut hooks = method.hooks(&tuned, 10).unwrap().unwrap();
        let place = Place { step: 1, total: 10, rate: 0.5 };
        assert!(hooks.penalty(place, &parameters).unwrap().is_none());
        let mut optimizer = testing::descent(0.2);
        let updated = Updated {
            place,
            parameters: &mut parameters,
            gradients: &gradients,
            optimizer: &mut optimizer,
        };
        hooks.after_step(updated).unwrap();
        // xi = 2 / 10.
        for (got, want) in values(&parameters, &g).unwrap().iter().zip([0.8, 0.0, -1.8]) {
            assert!((got - want).abs() < 1e-6);
        }
        let (a_before, b_before) =
            (values(&parameters, &a).unwrap(), values(&parameters, &b).unwrap());
        let zeros = gradients.iter().map(|(n, g)| (n.clone(), g.zeros_like().unwrap())).collect();
        optimizer.update(&parameters, &zeros, 0.5).unwrap();
        let (a_after, b_after) =
            (values(&parameters, &a).unwrap(), values(&parameters, &b).unwrap());
        assert_eq!(a_after[width..2 * width], a_before[width..2 * width]);
        // The open rows decay by 0.5 * 0.2.
        assert!((a_after[0] - 0.9 * a_before[0]).abs() < 1e-6);
        for (after, before) in b_after.chunks(3).zip(b_before.chunks(3)) {
            assert_eq!(after[1], before[1]);
            assert!((after[2] - 0.9 * before[2]).abs() < 1e-6);
        }
    }

    #[test]
    fn the_penalty_and_its_gradient() {
        let toy = Toy::new(4);
        let method = v1::Sora {
            adapter: Some(all_linear(2)),
            l1: Some(6.0),
            xi: Some(9.0),
            ..Default::default()
        };
        let tuned = toy.start(&method, 1);
        let mut parameters = tuned.parameters();
        for path in toy.names().iter().map(|n| module(n)) {
            set(&parameters, &format!("{path}.{GATES}"), &[0.5, -1.0]);
        }
        let mut hooks = method.hooks(&tuned, 10).unwrap().unwrap();
        let place = Place { step: 3, total: 10, rate: 0.1 };
        let (added, gradients) = hooks.penalty(place, &parameters).unwrap().unwrap();
        // 6 / 4 gates * (2 * 1.5).
        assert!((added - 4.5).abs() < 1e-6, "{added}");
        let pushed: Vec<f32> = gradients.values().next().unwrap().to_vec1().unwrap();
        assert_eq!(pushed, [1.5, -1.5]);
        let updated = Updated {
            place,
            parameters: &mut parameters,
            gradients: &gradients,
            optimizer: &mut testing::plain_descent(),
        };
        let error = hooks.after_step(updated).unwrap_err();
        assert!(
            error.message().contains("xi = 9") && error.message().contains("step 3"),
            "{error}"
        );
    }

    /// With gates that are ones and stay, and no threshold, this is LoRA.
    #[test]
    fn without_a_threshold_it_is_lora() {
        let toy = Toy::new(12);
        let adapter = v1::AdapterOptions { alpha: Some(4.0), ..all_linear(3) };
        let sora = v1::Sora {
            adapter: Some(adapter.clone()),
            xi: Some(0.0),
            gates: SoraGates::Ones as i32,
            ..Default::default()
        };
        let lora = v1::Lora { adapter: Some(adapter), ..Default::default() };
        let (gated, plain) = (toy.start(&sora, 1), toy.start(&lora, 1));
        let mut hooks = sora.hooks(&gated, 5).unwrap().unwrap();
        let mut optimizers = [testing::plain_descent(), testing::plain_descent()];
        for step in 1..=5 {
            for (tuned, optimizer) in [&gated, &plain].into_iter().zip(&mut optimizers) {
                let mut parameters = tuned.parameters();
                let mut gradients = toy.gradients(0, tuned, &parameters).unwrap();
                gradients.retain(|name, _| !name.ends_with(GATES));
                optimizer.update(&parameters, &gradients, 0.1).unwrap();
                if std::ptr::eq(tuned, &raw const gated) {
                    let place = Place { step, total: 5, rate: 0.1 };
                    let parameters = &mut parameters;
                    let gradients = &gradients;
                    hooks.after_step(Updated { place, parameters, gradients, optimizer }).unwrap();
                }
            }
        }
        let (gated, plain) = (gated.values().unwrap(), plain.values().unwrap());
        for (name, want) in &plain {
            for (got, want) in gated[name].iter().zip(want) {
                assert!((got - want).abs() < 1e-6, "{name}");
            }
        }
    }

    #[test]
    fn bad_options_name_their_field() {
        let schedule = |s: v1::SoraSchedule| v1::Sora { schedule: Some(s), ..Default::default() };
        let good = v1::SoraSchedule { growth: 1, xi_max: 1.0, stages: 3, target_keep: None };
        for (options, field) in [
            (v1::Sora { xi: Some(-1.0), ..Default::default() }, "xi"),
            (v1::Sora { l1: Some(f64::NAN), ..Default::default() }, "l1"),
            (v1::Sora { gate_rate: Some(0.0), ..Default::default() }, "gate_rate"),
            (v1::Sora { proximal: 5, ..Default::default() }, "proximal"),
            (schedule(v1::SoraSchedule { stages: 1, ..good }), "schedule.stages"),
            (v1::Sora { xi: Some(2.0), ..schedule(good) }, "schedule.xi_max"),
            (schedule(v1::SoraSchedule { growth: 3, ..good }), "xi"),
            (schedule(v1::SoraSchedule { target_keep: Some(1.5), ..good }), "schedule.target_keep"),
        ] {
            let error = options.check(&minilm()).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
        }
    }

    /// Some gates of a decoder open, all of the first module closed; gives those that are open by module.
    fn some_open(tuned: &Tuned) -> BTreeMap<String, usize> {
        let mut kept = BTreeMap::new();
        for (i, (name, module)) in tuned.modules.iter().enumerate() {
            let Core::Diagonal(Part::Trained(gates)) = &module.core else { panic!("gates") };
            let open: [f32; 4] = match i {
                0 => [0.0; 4],
                _ => std::array::from_fn(|j| if (i + j) % 3 == 0 { 0.0 } else { 0.5 - j as f32 }),
            };
            gates.set(&Tensor::new(&open, &Device::Cpu).unwrap()).unwrap();
            kept.insert(name.clone(), open.iter().filter(|g| **g != 0.0).count());
        }
        kept
    }

    #[test]
    fn the_cut_is_the_gated_model_to_the_bit_and_its_files_say_the_ranks() {
        let adapter = v1::AdapterOptions { alpha: Some(4.0), ..all_linear(4) };
        let method = v1::Sora { adapter: Some(adapter), ..Default::default() };
        let case = Case::decoder();
        let tuned = case.start(&method);
        case.disturb(&tuned, 0.05);
        let kept = some_open(&tuned);
        let first = tuned.modules.keys().next().unwrap().clone();
        let gated = case.outputs(&tuned);
        let parts: BTreeMap<String, _> = tuned
            .modules
            .iter()
            .map(|(name, module)| (name.clone(), module.low_rank().unwrap()))
            .collect();
        let cut = method.finish(tuned).unwrap();
        assert!(!cut.modules.contains_key(&first) && cut.modules.len() == 20);
        for (name, module) in &cut.modules {
            assert_eq!(module.rank, kept[name], "{name}");
            assert_eq!(module.low_rank().unwrap(), parts[name], "{name}");
        }
        for (got, want) in case.outputs(&cut).iter().zip(&gated) {
            assert!((got - want).abs() < 1e-6 * want.abs().max(1.0), "{got} is not {want}");
        }

        let none = BTreeMap::new();
        let about = export::About {
            shapes: case.shapes(),
            base: "base",
            task: "CAUSAL_LM",
            inside: "",
            heads: &none,
        };
        let files = export::peft(&cut, &about).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&files.config).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let targets: Vec<String> =
            config["target_modules"].as_array().unwrap().iter().map(text).collect();
        assert!(targets.len() == 20 && !targets.contains(&module(&first).to_owned()));
        let usual = config["r"].as_u64().unwrap();
        let usual_alpha = config["lora_alpha"].as_f64().unwrap();
        for (name, rank) in kept.iter().filter(|(name, _)| **name != first) {
            let path = module(name);
            let written = config["rank_pattern"][path].as_u64().unwrap_or(usual);
            assert_eq!(written, *rank as u64, "{name}");
            // The scale is 1, so alpha is the rank.
            let alpha = config["alpha_pattern"][path].as_f64().unwrap_or(usual_alpha);
            assert!((alpha - *rank as f64).abs() < 1e-9, "{name}: {alpha}");
        }
        let contents = Contents::parse(&files.config, &files.tensors, Use::Keep).unwrap();
        let (loaded, _) = export::load(&contents, "", case.shapes(), case.weights()).unwrap();
        for (name, module) in &loaded.modules {
            assert_eq!((module.rank, module.scale), (kept[name], 1.0), "{name}");
        }
        for (got, want) in case.outputs(&loaded).iter().zip(&gated) {
            assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{got} is not {want}");
        }
    }

    /// The toy's two modules with gates that are given, and what happens after a step.
    struct Gated {
        tuned: Tuned,
        parameters: Parameters,
        hooks: Box<dyn Hooks>,
        optimizer: Optimizer,
        gates: [String; 2],
    }

    impl Gated {
        fn new(method: &v1::Sora, steps: u64) -> Self {
            let toy = Toy::new(4);
            let tuned = toy.start(method, 1);
            let hooks = method.hooks(&tuned, steps).unwrap().unwrap();
            let gates = [0, 1].map(|i| format!("{}.{GATES}", module(&toy.names()[i])));
            let parameters = tuned.parameters();
            Self { tuned, parameters, hooks, optimizer: testing::plain_descent(), gates }
        }

        fn after(&mut self, step: u64, total: u64) {
            let gradients = Gradients::new();
            let updated = Updated {
                place: Place { step, total, rate: 0.1 },
                parameters: &mut self.parameters,
                gradients: &gradients,
                optimizer: &mut self.optimizer,
            };
            self.hooks.after_step(updated).unwrap();
        }
    }

    #[test]
    fn shares_of_open_gates_are_counted_and_closed_ones_open_again() {
        let method =
            v1::Sora { adapter: Some(all_linear(3)), xi: Some(0.25), ..Default::default() };
        let mut toy = Gated::new(&method, 10);
        let [one, two] = toy.gates.clone();
        set(&toy.parameters, &one, &[1.0, 0.25, -0.75]);
        set(&toy.parameters, &two, &[0.125, 0.0, -0.5]);
        toy.after(1, 10);
        assert_eq!(values(&toy.parameters, &one).unwrap(), [0.75, 0.0, -0.5]);
        assert_eq!(values(&toy.parameters, &two).unwrap(), [0.0, 0.0, -0.25]);
        assert_eq!(toy.hooks.metrics()["kept_ranks"], 0.5);
        assert_eq!(cut::kept(&toy.tuned).unwrap(), (3, 6));
        // A gate is not held: a step of more than the threshold opens it.
        let push = Tensor::new(&[0f32, -10.0, 0.0], &Device::Cpu).unwrap();
        let gradients = [(one.clone(), push)].into();
        toy.optimizer.update(&toy.parameters, &gradients, 0.1).unwrap();
        toy.after(2, 10);
        assert_eq!(values(&toy.parameters, &one).unwrap(), [0.5, 0.75, -0.25]);
        assert_eq!(toy.hooks.metrics()["threshold"], 0.25);
    }

    #[test]
    fn the_threshold_rises_until_few_enough_are_left() {
        let schedule = v1::SoraSchedule {
            growth: SoraGrowth::Linear as i32,
            xi_max: 1.0,
            stages: 3,
            target_keep: Some(0.5),
        };
        let method = v1::Sora {
            adapter: Some(all_linear(3)),
            xi: Some(0.0),
            schedule: Some(schedule),
            ..Default::default()
        };
        let mut toy = Gated::new(&method, 9);
        let gates = toy.gates.clone();
        for gate in &gates {
            set(&toy.parameters, gate, &[0.4, 0.4, 9.0]);
        }
        let mut seen = Vec::new();
        for step in 1..=9 {
            toy.after(step, 9);
            let metrics = toy.hooks.metrics();
            seen.push((metrics["threshold"], metrics["kept_ranks"]));
        }
        // Nothing happens at 0; 0.5 leaves a third, which is less than a half: 1 never comes.
        assert!(seen[..3].iter().all(|s| *s == (0.0, 1.0)), "{seen:?}");
        assert!(seen[3..].iter().all(|s| *s == (0.5, 1.0 / 3.0)), "{seen:?}");
        assert_eq!(values(&toy.parameters, &gates[0]).unwrap(), [0.0, 0.0, 6.0]);
        // Where it starts at two over the updates, it does not fall from there.
        let fall = v1::Sora { xi: None, ..method };
        assert!(fall.hooks(&toy.tuned, 2).is_ok());
        let error = fall.hooks(&toy.tuned, 1).err().expect("refused");
        assert_eq!(error.violations()[0].field, "schedule.xi_max");
    }

    #[test]
    fn gates_have_a_rate_of_their_own_and_never_decay() {
        let method =
            v1::Sora { adapter: Some(all_linear(3)), gate_rate: Some(0.25), ..Default::default() };
        let tuned = Toy::new(4).start(&method, 1);
        for (name, parameter) in tuned.parameters() {
            let gate = name.ends_with(GATES);
            assert_eq!(parameter.rate, if gate { 0.25 } else { 1.0 }, "{name}");
            assert_eq!(parameter.decay, !gate, "{name}");
        }
        // Gates are normal where nothing is said.
        let many = v1::Sora { adapter: Some(all_linear(20)), ..Default::default() };
        let tuned = Case::decoder().start(&many);
        let gates: Vec<f32> = tuned
            .values()
            .unwrap()
            .into_iter()
            .filter(|(name, _)| name.ends_with(GATES))
            .flat_map(|(_, gates)| gates)
            .collect();
        assert_eq!(gates.len(), 21 * 20);
        let square = gates.iter().map(|g| g * g).sum::<f32>() / 420.0;
        assert!((square - 1.0).abs() < 0.35, "{square}");
        let zero = v1::Sora { adapter: Some(all_linear(0)), ..Default::default() };
        assert_eq!(zero.check(&minilm()).unwrap_err().violations()[0].field, "adapter.r");
    }
}
