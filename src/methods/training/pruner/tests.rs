use candle_core::{Device, Var};

use super::*;
use crate::train::optimizer::{AdamW, Optimizer, Rule as Updates};

const NAME: &str = "w";

/// A run of a matrix whose gradient pulls every weight towards 0.
struct Case {
    parameters: Parameters,
    optimizer: Optimizer,
    pruner: Pruner,
}

fn rule(last: f64, regrow: bool) -> Rule {
    let schedule = Schedule { initial: 0.0, last, begin: 1, end: 9, frequency: 2, power: 3.0 };
    Rule { schedule, pattern: Pattern::Unstructured, pool: Pool::Average, global: false, regrow }
}

fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.7 + 0.3).sin()).collect()
}

fn parameters(names: &[(&str, f32)]) -> Parameters {
    let parameter = |by: f32| Parameter {
        var: Var::from_vec(noise(40).iter().map(|v| v * by).collect(), (5, 8), &Device::Cpu)
            .unwrap(),
        rate: 1.0,
        decay: true,
    };
    names.iter().map(|(name, by)| ((*name).to_owned(), parameter(*by))).collect()
}

impl Case {
    fn new(rule: Rule, names: &[(&str, f32)]) -> Self {
        let shapes = names.iter().map(|(name, _)| ((*name).to_owned(), [5, 8]));
        let pruner = Pruner::new(rule, shapes, Rc::default());
        let optimizer = Optimizer::new(Updates::AdamW(AdamW::default()), 0.1, false);
        Self { parameters: parameters(names), optimizer, pruner }
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.parameters[name].var.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn place(step: u64) -> Place {
        Place { step, total: 12, rate: 0.02 }
    }

    /// One update with gradients that do not know of masks.
    fn step(&mut self, step: u64) {
        let mut gradients: Gradients = self
            .parameters
            .iter()
            .map(|(name, p)| {
                let g: Vec<f32> =
                    (0..40).map(|i| ((i + step as usize * 13) as f32 * 1.1).cos()).collect();
                (name.clone(), Tensor::from_vec(g, p.var.shape(), &Device::Cpu).unwrap())
            })
            .collect();
        let place = Self::place(step);
        self.pruner.losses.set(LossSums { loss: step as f64, count: 1, correct: 0 });
        self.pruner.after_backward(place, &self.parameters, &mut gradients).unwrap();
        for (name, gradient) in &gradients {
            let values: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            let mask = self.pruner.mask(name).unwrap();
            assert!(mask.iter().zip(&values).all(|(masked, g)| !masked || *g == 0.0));
        }
        self.optimizer.update(&self.parameters, &gradients, place.rate).unwrap();
        let updated = Updated {
            place,
            parameters: &mut self.parameters,
            gradients: &gradients,
            optimizer: &mut self.optimizer,
        };
        self.pruner.after_step(updated).unwrap();
    }

    /// What is masked is zero and has no moments.
    fn check(&self, name: &str) {
        let (values, mask) = (self.values(name), self.pruner.mask(name).unwrap());
        let moments = self.optimizer.moments(name);
        assert_eq!(moments.len(), 2);
        for (i, _) in mask.iter().enumerate().filter(|(_, masked)| **masked) {
            assert_eq!(values[i].to_bits(), 0, "{name}[{i}]");
            assert!(moments.iter().all(|moment| moment[i] == 0.0), "{name}[{i}]");
        }
    }
}

#[test]
fn counts_are_exact_and_what_is_masked_is_gone() {
    for regrow in [true, false] {
        let mut case = Case::new(rule(0.8, regrow), &[(NAME, 1.0)]);
        let schedule = case.pruner.rule.unwrap().schedule;
        let mut before = vec![false; 40];
        for step in 1..=12 {
            case.step(step);
            case.check(NAME);
            let masked = case.pruner.masked() as usize;
            let last_due = (1..=step).rev().find(|t| schedule.due(*t)).unwrap();
            assert_eq!(masked, Pattern::masked(40, schedule.target(last_due)), "step {step}");
            let mask = case.pruner.mask(NAME).unwrap().to_vec();
            if !regrow {
                assert!(before.iter().zip(&mask).all(|(old, new)| !old || *new), "step {step}");
            }
            before = mask;
        }
        assert_eq!(case.pruner.masked(), 32);
        let steps: Vec<u64> = case.pruner.history().iter().map(|u| u.step).collect();
        assert_eq!(steps, [1, 3, 5, 7, 9]);
        // The loss is that of the update before the masks.
        assert_eq!(case.pruner.history()[2], Update { step: 5, masked: 28, loss: 5.0 });
        assert!((case.pruner.metrics()["sparsity"] - 0.8).abs() < 1e-12);
    }
}

#[test]
fn values_come_back_when_the_others_have_shrunk_below_them() {
    for regrow in [true, false] {
        let mut case = Case::new(rule(0.5, regrow), &[(NAME, 1.0)]);
        case.pruner.renew(5, &case.parameters, None).unwrap();
        let first = case.pruner.mask(NAME).unwrap().to_vec();
        let largest_aside =
            (0..40).filter(|i| first[*i]).fold(0f32, |m, i| m.max(noise(40)[i].abs()));
        // All survivors fall below what is kept aside.
        tensors::change(&case.parameters[NAME].var, |values| {
            values.iter_mut().for_each(|v| *v *= 1e-3);
        })
        .unwrap();
        case.pruner.renew(5, &case.parameters, None).unwrap();
        let second = case.pruner.mask(NAME).unwrap();
        let returned: Vec<usize> = (0..40).filter(|i| first[*i] && !second[*i]).collect();
        assert_eq!(returned.is_empty(), !regrow);
        for i in returned {
            assert_eq!(case.values(NAME)[i], noise(40)[i]);
        }
        assert!(largest_aside > 0.0);
        assert_eq!(case.pruner.masked(), first.iter().filter(|m| **m).count() as u64);
    }
}

#[test]
fn tensors_have_their_own_share_unless_all_are_compared() {
    let names = [("large", 1.0), ("small", 1e-3)];
    let mut case = Case::new(rule(0.5, true), &names);
    case.pruner.renew(9, &case.parameters, None).unwrap();
    let count =
        |case: &Case, name: &str| case.pruner.mask(name).unwrap().iter().filter(|m| **m).count();
    assert_eq!((count(&case, "large"), count(&case, "small")), (20, 20));
    let mut case = Case::new(Rule { global: true, ..rule(0.5, true) }, &names);
    case.pruner.renew(9, &case.parameters, None).unwrap();
    assert_eq!((count(&case, "large"), count(&case, "small")), (0, 40));
    assert_eq!(case.pruner.masked(), 40);
}

#[test]
fn patterns_hold_after_every_update() {
    let groups = Rule { pattern: Pattern::Groups { n: 2, m: 4 }, ..rule(0.5, true) };
    let mut case = Case::new(groups, &[(NAME, 1.0)]);
    for step in 1..=9 {
        case.step(step);
        let mask = case.pruner.mask(NAME).unwrap();
        let zeros: Vec<usize> = mask.chunks(4).map(|g| g.iter().filter(|m| **m).count()).collect();
        assert!(zeros.iter().all(|z| *z == zeros[0]), "{zeros:?}");
    }
    assert_eq!(case.pruner.masked(), 20);
    let blocks = Rule { pattern: Pattern::Block { rows: 5, cols: 2 }, ..rule(0.5, true) };
    let mut case = Case::new(blocks, &[(NAME, 1.0)]);
    (1..=9).for_each(|step| case.step(step));
    let mask = case.pruner.mask(NAME).unwrap();
    for block in 0..4 {
        let of: Vec<bool> = (0..40).filter(|i| i % 8 / 2 == block).map(|i| mask[i]).collect();
        assert!(of.iter().all(|m| *m == of[0]));
    }
    assert_eq!(case.pruner.masked(), 20);
}

#[test]
fn what_is_saved_is_what_is_restored() {
    let mut case = Case::new(rule(0.8, true), &[(NAME, 1.0)]);
    (1..=6).for_each(|step| case.step(step));
    let saved = case.pruner.save().unwrap();
    let mut other = Case::new(rule(0.8, true), &[(NAME, 1.0)]);
    other.pruner.restore(saved, &mut other.parameters, &mut other.optimizer).unwrap();
    assert_eq!(other.pruner.mask(NAME), case.pruner.mask(NAME));
    assert_eq!(other.pruner.tensors[NAME].aside, case.pruner.tensors[NAME].aside);
    assert_eq!(other.pruner.history(), case.pruner.history());
    assert!(
        other.pruner.restore(BTreeMap::new(), &mut other.parameters, &mut other.optimizer).is_err()
    );
}

#[test]
fn masks_before_the_first_update_hold_in_it() {
    let mut rule = rule(0.5, true);
    (rule.schedule.begin, rule.schedule.initial) = (0, 0.5);
    let mut case = Case::new(rule, &[(NAME, 1.0)]);
    case.pruner.start(&case.parameters).unwrap();
    assert_eq!(case.pruner.masked(), 20);
    let before = case.pruner.mask(NAME).unwrap().to_vec();
    // No mask is due after the first update, so what was masked must still be zero.
    case.step(1);
    assert_eq!(case.pruner.mask(NAME).unwrap(), before);
    case.check(NAME);
    assert_eq!(case.pruner.history()[0], Update { step: 0, masked: 20, loss: 0.0 });
}

#[test]
fn fixed_masks_stay() {
    let mask: Vec<bool> = (0..40).map(|i| i % 3 == 0).collect();
    let mut case = Case::new(rule(0.5, true), &[(NAME, 1.0)]);
    tensors::change(&case.parameters[NAME].var, |values| {
        values.iter_mut().zip(&mask).for_each(|(v, m)| *v = if *m { 0.0 } else { *v });
    })
    .unwrap();
    case.pruner = Pruner::fixed([(NAME.to_owned(), 8, mask.clone())]);
    (1..=5).for_each(|step| case.step(step));
    case.check(NAME);
    assert_eq!(case.pruner.mask(NAME).unwrap(), mask);
    assert!(case.pruner.history().is_empty());
}
