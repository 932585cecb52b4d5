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
use super::{Adapt, At, Cost, Hooks, Needs, Setup, build, normal, uniform};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::proto::v1::{self, SoraGates, SoraGrowth, SoraProximal};
use crate::train::parameters::{Gradients, Parameters};

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
        let still = Stepping { rate: 1.0, decay: false };
        // The hook makes rows decay whose gate is open.
        tuned.stepping.insert("lora_A", still);
        tuned.stepping.insert("lora_B", still);
        tuned.stepping.insert(GATES, Stepping { rate: options.gate_rate, decay: false });
        Ok(tuned)
    }

    fn hooks(&self, tuned: &Tuned, steps: u64) -> Result<Option<Box<dyn Hooks>>> {
        let Read { xi, l1, kind, schedule, .. } = read(self)?;
        let xi = xi.unwrap_or(2.0 / steps.max(1) as f64);
        let stages = schedule.as_ref().map_or_else(|| vec![xi], |s| thresholds(xi, s));
        let modules = tuned.modules.keys().map(|name| module(name).to_owned()).collect();
        let target_keep = schedule.and_then(|s| s.target_keep);
        Ok(Some(Box::new(Gates { modules, l1, kind, stages, target_keep, stopped: None })))
    }

    fn finish(&self, tuned: Tuned) -> Result<Tuned> {
        cut(tuned)
    }
}

/// The proximal step, and decay of the rows that are open.
pub struct Gates {
    modules: Vec<String>,
    l1: f64,
    kind: SoraProximal,
    /// Threshold of each stage; training is cut into as many equal parts.
    stages: Vec<f64>,
    target_keep: Option<f64>,
    /// The stage whose threshold stays, once few enough ranks are left.
    stopped: Option<usize>,
}

impl Gates {
    fn stage(&self, at: &At) -> usize {
        let count = self.stages.len() as u64;
        let stage = (at.step.saturating_sub(1) * count / at.steps.max(1)).min(count - 1) as usize;
        self.stopped.map_or(stage, |stopped| stage.min(stopped))
    }

    /// The threshold at a step.
    pub fn threshold(&self, at: &At) -> f64 {
        self.stages[self.stage(at)]
    }
}

fn values(parameters: &Parameters, name: &str) -> Result<Vec<f32>> {
    let parameter = parameters
        .get(name)
        .ok_or_else(|| Error::internal(format!("the parameter '{name}' is not there")))?;
    Ok(parameter.var.flatten_all()?.to_vec1::<f32>()?)
}

fn set(parameters: &Parameters, name: &str, values: Vec<f32>) -> Result<()> {
    if let Some(parameter) = parameters.get(name) {
        let shape = parameter.var.shape().clone();
        parameter.var.set(&Tensor::from_vec(values, shape, &Device::Cpu)?)?;
    }
    Ok(())
}

impl Hooks for Gates {
    fn after_backward(
        &mut self,
        at: &At,
        parameters: &Parameters,
        gradients: &mut Gradients,
    ) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for path in &self.modules {
            let gates = values(parameters, &format!("{path}.{GATES}"))?;
            count += gates.len();
            sum += gates.iter().map(|g| f64::from(g.abs())).sum::<f64>();
            let factor = (1.0 - at.rate * at.decay) as f32;
            if factor < 1.0 {
                let rank = gates.len();
                let (a, b) = (format!("{path}.lora_A"), format!("{path}.lora_B"));
                let mut rows = values(parameters, &a)?;
                let width = rows.len() / rank;
                for (row, _) in rows.chunks_mut(width).zip(&gates).filter(|(_, g)| **g != 0.0) {
                    row.iter_mut().for_each(|v| *v *= factor);
                }
                set(parameters, &a, rows)?;
                let mut columns = values(parameters, &b)?;
                for row in columns.chunks_mut(rank) {
                    for (v, _) in row.iter_mut().zip(&gates).filter(|(_, g)| **g != 0.0) {
                        *v *= factor;
                    }
                }
                set(parameters, &b, columns)?;
            }
        }
        if self.l1 == 0.0 || count == 0 {
            return Ok(0.0);
        }
        let by = self.l1 / count as f64;
        for path in &self.modules {
            let name = format!("{path}.{GATES}");
            let Some(parameter) = parameters.get(&name) else { continue };
            let push = (parameter.var.sign()? * by)?.detach();
            let sum = match gradients.get(&name) {
                Some(gradient) => (gradient + push)?,
                None => push,
            };
            gradients.insert(name, sum);
        }
        Ok(by * sum)
    }

    fn after_step(&mut self, at: &At, parameters: &Parameters, _: &Gradients) -> Result<()> {
        let stage = self.stage(at);
        let xi = self.stages[stage];
        let (mut kept, mut all) = (0, 0);
        for path in &self.modules {
            let name = format!("{path}.{GATES}");
            let mut gates = values(parameters, &name)?;
            gates.iter_mut().for_each(|g| *g = proximal(*g, xi as f32, self.kind));
            kept += gates.iter().filter(|g| **g != 0.0).count();
            all += gates.len();
            set(parameters, &name, gates)?;
        }
        if kept == 0 {
            return Err(Error::new(
                Reason::NumericFailure,
                format!(
                    "the threshold xi = {xi} closed the last gate at step {}; take a smaller xi, or more \
                     steps",
                    at.step
                ),
            ));
        }
        let few = |share: f64| kept as f64 <= share * all as f64;
        if self.stopped.is_none() && self.target_keep.is_some_and(few) {
            self.stopped = Some(stage);
        }
        Ok(())
    }

    fn state(&self) -> BTreeMap<String, Vec<f32>> {
        let stopped = self.stopped.map(|stage| ("stopped".to_owned(), vec![stage as f32]));
        stopped.into_iter().collect()
    }

    fn restore(&mut self, state: BTreeMap<String, Vec<f32>>) -> Result<()> {
        let stage = state.get("stopped").and_then(|v| v.first());
        self.stopped = stage.map(|stage| (*stage as usize).min(self.stages.len() - 1));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::cut;
    use super::super::shapes::testing::minilm;
    use super::super::testing::{Case, Toy, all_linear};
    use super::*;

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
        };
        let at = |step| At { step, steps: 9, rate: 0.0, decay: 0.0 };
        let all: Vec<f64> = (1..=9).map(|s| gates.threshold(&at(s))).collect();
        assert_eq!(all, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0]);
        gates.restore([("stopped".to_owned(), vec![1.0])].into()).unwrap();
        assert_eq!(gates.threshold(&at(9)), 2.0);
        assert_eq!(gates.state()["stopped"], [1.0]);
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

    #[test]
    fn closed_gates_get_no_gradient_and_do_not_decay() {
        let toy = Toy::new(4);
        let method = v1::Sora { adapter: Some(all_linear(3)), ..Default::default() };
        let tuned = toy.start(&method, 1);
        toy.disturb(&tuned, 0.3);
        let parameters = tuned.parameters();
        let path = crate::methods::adapt::shapes::module(&toy.names()[0]).to_owned();
        let [a, b, g] = ["lora_A", "lora_B", GATES].map(|kind| format!("{path}.{kind}"));
        set(&parameters, &g, vec![1.0, 0.0, -2.0]).unwrap();
        let mut gradients = toy.gradients(0, &tuned, &parameters).unwrap();
        let of = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let row = of(&gradients[&a]);
        let width = row.len() / 3;
        assert!(row[width..2 * width].iter().all(|v| *v == 0.0));
        assert!(row[..width].iter().any(|v| *v != 0.0));
        assert!(of(&gradients[&b]).chunks(3).all(|row| row[1] == 0.0));
        let before = values(&parameters, &a).unwrap();
        let mut hooks = method.hooks(&tuned, 10).unwrap().unwrap();
        let at = At { step: 1, steps: 10, rate: 0.5, decay: 0.2 };
        assert_eq!(hooks.after_backward(&at, &parameters, &mut gradients).unwrap(), 0.0);
        let after = values(&parameters, &a).unwrap();
        assert_eq!(after[width..2 * width], before[width..2 * width]);
        assert!((after[0] - 0.9 * before[0]).abs() < 1e-6);
        // xi = 2 / 10.
        hooks.after_step(&at, &parameters, &gradients).unwrap();
        let gates = values(&parameters, &g).unwrap();
        for (got, want) in gates.iter().zip([0.8, 0.0, -1.8]) {
            assert!((got - want).abs() < 1e-6);
        }
    }

    #[test]
    fn the_penalty_and_its_gradient() {
        let toy = Toy::new(4);
        let method =
            v1::Sora { adapter: Some(all_linear(2)), l1: Some(6.0), xi: Some(9.0), ..Default::default() };
        let tuned = toy.start(&method, 1);
        let parameters = tuned.parameters();
        for path in toy.names().iter().map(|n| crate::methods::adapt::shapes::module(n)) {
            set(&parameters, &format!("{path}.{GATES}"), vec![0.5, -1.0]).unwrap();
        }
        let mut hooks = method.hooks(&tuned, 10).unwrap().unwrap();
        let at = At { step: 3, steps: 10, rate: 0.1, decay: 0.0 };
        let mut gradients = Gradients::new();
        let added = hooks.after_backward(&at, &parameters, &mut gradients).unwrap();
        // 6 / 4 gates * (2 * 1.5).
        assert!((added - 4.5).abs() < 1e-6, "{added}");
        let pushed: Vec<f32> = gradients.values().next().unwrap().to_vec1().unwrap();
        assert_eq!(pushed, [1.5, -1.5]);
        let error = hooks.after_step(&at, &parameters, &gradients).unwrap_err();
        assert!(error.message().contains("xi = 9") && error.message().contains("step 3"), "{error}");
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
        for step in 1..=5 {
            let at = At { step, steps: 5, rate: 0.1, decay: 0.0 };
            for (tuned, hooks) in [(&gated, Some(&mut hooks)), (&plain, None)] {
                let parameters = tuned.parameters();
                let mut gradients = toy.gradients(0, tuned, &parameters).unwrap();
                gradients.retain(|name, _| !name.ends_with(GATES));
                toy.descend(&parameters, &gradients, 0.1);
                if let Some(hooks) = hooks {
                    hooks.after_backward(&at, &parameters, &mut gradients).unwrap();
                    hooks.after_step(&at, &parameters, &gradients).unwrap();
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
            (
                v1::Sora { xi: Some(2.0), ..schedule(good) },
                "schedule.xi_max",
            ),
            (schedule(v1::SoraSchedule { growth: 3, ..good }), "xi"),
            (
                schedule(v1::SoraSchedule { target_keep: Some(1.5), ..good }),
                "schedule.target_keep",
            ),
        ] {
            let error = options.check(&minilm()).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
        }
    }
}
