//! LoRA-SB (Ponkshe et al. 2024, "Initialization using update approximation is a silver bullet for extremely
//! efficient low-rank fine-tuning", arXiv 2411.19557): the form of LoRA-XS, whose frozen factors are the
//! singular directions of the first step of full tuning. With orthonormal `B` and `A` and a scale of 1, a
//! step of `R` moves the weight by the projection of its gradient, so there is no scale left to choose
//! (theorem 4 of the paper).
//!
//! Decided here: the rate of that first step is the one that the optimiser's first step really has; the
//! published program counts warm-up steps in passes of the sample, which makes it about ten times smaller.

use faer::Mat;
use rand::Rng;

use super::lora_xs::{USUAL, between, cost};
use super::options::{self, Plan, Site};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, finish_build, normal};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::nn::linalg;
use crate::proto::v1::{self, LoraSbBasis, LoraSbRule};
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "lora_sb",
    title: "LoRA-SB",
    verb: "adapt",
    summary: "LoRA-XS whose frozen factors approximate the first step of full tuning.",
    paper: "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank \
            Fine-Tuning, arXiv 2411.19557",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// What the first step would move a weight by, `[out, in]`.
pub fn update(sum: &[f32], passes: usize, rule: LoraSbRule, rate: f64) -> Vec<f32> {
    let sign = |g: f32| if g == 0.0 { 0.0 } else { f64::from(g.signum()) };
    let step = |g: &f32| match rule {
        LoraSbRule::Sgd => -rate * f64::from(*g) / passes.max(1) as f64,
        LoraSbRule::Unspecified | LoraSbRule::SignAdam => -rate * sign(*g),
    };
    sum.iter().map(|g| step(g) as f32).collect()
}

/// `A` `[r, in]` and `B` `[out, r]` with orthonormal rows and columns, and the diagonal of `R`, such that
/// `B R A` is the best approximation of an update of rank `r`.
pub fn factors(update: &[f32], site: &Site) -> Result<(Vec<f32>, Vec<f32>, Vec<f64>)> {
    let [rows, cols] = site.shape;
    let d = linalg::from_rows(update, rows, cols);
    let svd = linalg::svd(d.as_ref(), &site.linear)?;
    let a = (0..site.rank * cols).map(|at| svd.v[(at % cols, at / cols)] as f32).collect();
    let b =
        (0..rows * site.rank).map(|at| svd.u[(at / site.rank, at % site.rank)] as f32).collect();
    Ok((a, b, svd.s[..site.rank].to_vec()))
}

/// A matrix `[n, r]` of random orthonormal columns.
fn random_basis(rng: &mut impl Rng, n: usize, rank: usize) -> Result<Mat<f64>> {
    let drawn = linalg::from_rows(&normal(rng, n * rank, 1.0), n, rank);
    linalg::orthonormal(drawn.as_ref()).ok_or_else(|| {
        Error::new(
            Reason::NumericFailure,
            "random directions were not independent; take another seed",
        )
    })
}

/// The options, checked.
struct Read {
    samples: usize,
    batch: usize,
    rule: LoraSbRule,
    basis: LoraSbBasis,
    rate: Option<f64>,
    keep: bool,
}

fn read(options: &v1::LoraSb) -> Result<Read> {
    let samples = options::number("init_samples", options.init_samples, 50, 1..=1 << 20)?;
    let batch = options::number("init_batch", options.init_batch, 4, 1..=4096)?;
    if let Some(rate) = options.init_lr.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
        return Err(Error::option("init_lr", format!("{rate} is not a number above 0")));
    }
    Ok(Read {
        samples: samples as usize,
        batch: batch as usize,
        rule: options::choice("update_rule", options.update_rule)?,
        basis: options::choice("basis", options.basis)?,
        rate: options.init_lr,
        keep: options.keep_first_step.unwrap_or(true),
    })
}

fn plan(options: &v1::LoraSb, shapes: &Shapes) -> Result<Plan> {
    let plan = options::plan(options.adapter.as_ref(), &USUAL, shapes)?;
    for site in &plan.sites {
        if site.rank < 2 {
            return Err(Error::option("adapter.r", "the rank must be 2 or more"));
        }
        if (site.scale() - 1.0).abs() > 1e-9 {
            return Err(Error::option(
                "adapter.alpha",
                format!(
                    "alpha gives the scale {} for '{}'; it must be 1, so leave alpha and rslora out: the \
                     orthonormal factors leave no scale to choose",
                    site.scale(),
                    site.linear
                ),
            ));
        }
    }
    Ok(plan)
}

impl Adapt for v1::LoraSb {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &USUAL);
        self.init_samples.get_or_insert(50);
        self.init_batch.get_or_insert(4);
        self.keep_first_step.get_or_insert(true);
        if self.update_rule == LoraSbRule::Unspecified as i32 {
            self.update_rule = LoraSbRule::SignAdam as i32;
        }
        if self.basis == LoraSbBasis::Unspecified as i32 {
            self.basis = LoraSbBasis::Update as i32;
        }
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        read(self)?;
        Ok(cost(plan(self, shapes)?, shapes))
    }

    fn needs(&self) -> Result<Needs> {
        let Read { samples, batch, .. } = read(self)?;
        Ok(Needs::Gradients { samples, batch })
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let options = read(self)?;
        let plan = plan(self, setup.shapes)?;
        let mut tuned = Tuned::new(plan.dropout, setup.random.path());
        let rate = options.rate.unwrap_or(setup.first_rate);
        let names: Vec<String> = plan.sites.iter().map(|site| site.linear.clone()).collect();
        let init = setup.random.child("init");
        let source = setup
            .gradients
            .as_mut()
            .ok_or_else(|| Error::internal("LoRA-SB was started without gradients"))?;
        let passes = source.passes();
        let mut sites = plan.sites.iter();
        source.each(&names, &mut |name, sum| {
            let site = sites.next().filter(|site| site.linear == name).ok_or_else(|| {
                Error::internal(format!("the gradient of '{name}' came out of its turn"))
            })?;
            if sum.iter().all(|g| *g == 0.0) {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    format!(
                        "the gradient of '{name}' is zero on the sample: no output depends on it; leave \
                         it out with adapter.exclude"
                    ),
                ));
            }
            let ([rows, cols], rank) = (site.shape, site.rank);
            let step = update(&sum, passes, options.rule, rate);
            let (a, b, singular) = match options.basis {
                LoraSbBasis::Random => {
                    let rng = &mut init.child(name).rng();
                    let a = random_basis(rng, cols, rank)?;
                    let b = random_basis(rng, rows, rank)?;
                    (linalg::to_rows(a.transpose()), linalg::to_rows(b.as_ref()), vec![0.0; rank])
                }
                _ => factors(&step, site)?,
            };
            let mut core = vec![0.0; rank * rank];
            if options.keep {
                (0..rank).for_each(|i| core[i * rank + i] = singular[i] as f32);
            }
            let module = between(site, 1.0, a, b, core)?;
            tuned.modules.insert(name.to_owned(), module);
            Ok(())
        })?;
        finish_build(&mut tuned, &plan, setup)?;
        let rounded = |name: &&String| {
            setup.weights.get(*name).is_some_and(|weight| weight.record().few_bits())
        };
        let rounded = names.iter().filter(rounded).count();
        if rounded > 0 {
            tuned.notes.push(format!(
                "{rounded} of {} adapted weights are stored in codes: their first step follows the gradient at \
                 the numbers that the codes stand for, and the codes stay as they are",
                names.len()
            ));
        }
        Ok(tuned)
    }

    fn hooks(&self, _: &Tuned, _: u64) -> Result<Option<Box<dyn Hooks>>> {
        Ok(None)
    }

    fn finish(&self, tuned: Tuned) -> Result<Tuned> {
        Ok(tuned)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Tensor;
    use faer::MatRef;

    use super::super::shapes::testing::{minilm, smollm2};
    use super::super::testing::{Toy, all_linear};
    use super::*;
    use crate::methods::compress::round_to_nearest;
    use crate::nn::linalg::{from_rows, product};
    use crate::nn::weight::{Grouped, GroupedSpec, Weight};

    fn method(keep: bool, rule: LoraSbRule) -> v1::LoraSb {
        v1::LoraSb {
            adapter: Some(all_linear(3)),
            init_lr: Some(0.01),
            keep_first_step: Some(keep),
            update_rule: rule as i32,
            ..Default::default()
        }
    }

    fn norm(a: MatRef<'_, f64>) -> f64 {
        a.norm_l2()
    }

    /// `(A, B, R)` of the toy's first linear.
    fn parts(tuned: &Tuned, toy: &Toy) -> (Mat<f64>, Mat<f64>, Mat<f64>) {
        let name = &toy.names()[0];
        let module = &tuned.modules[name];
        let ([rows, cols], r) = (module.shape, module.rank);
        let super::super::module::Core::Matrix(core) = &module.core else { panic!("a matrix") };
        (
            from_rows(&module.a.values().unwrap(), r, cols),
            from_rows(&module.b.values().unwrap(), rows, r),
            from_rows(&core.values().unwrap(), r, r),
        )
    }

    #[test]
    fn factors_are_orthonormal_and_the_start_is_the_best_approximation() {
        for rule in [LoraSbRule::SignAdam, LoraSbRule::Sgd] {
            let toy = Toy::new(5);
            let tuned = toy.start(&method(true, rule), 2);
            let (a, b, r) = parts(&tuned, &toy);
            for gram in [product(a.as_ref(), a.transpose()), product(b.transpose(), b.as_ref())] {
                assert!(norm((&gram - Mat::<f64>::identity(3, 3)).as_ref()) < 1e-5);
            }
            let name = &toy.names()[0];
            let sum = toy.sum(name, 2);
            let step = update(&sum, 2, rule, 0.01);
            let d = from_rows(&step, b.nrows(), a.ncols());
            let bra = product(product(b.as_ref(), r.as_ref()).as_ref(), a.as_ref());
            let dropped: f64 =
                linalg::svd(d.as_ref(), "d").unwrap().s[3..].iter().map(|s| s * s).sum();
            let error = norm((&bra - &d).as_ref());
            assert!((error - dropped.sqrt()).abs() < 1e-3 * norm(d.as_ref()), "{error}");
            // Against the gradient, not along it.
            let along: f64 =
                step.iter().zip(&sum).map(|(s, g)| f64::from(*s) * f64::from(*g)).sum();
            assert!(along < 0.0);
        }
        let toy = Toy::new(5);
        let tuned = toy.start(&method(false, LoraSbRule::SignAdam), 2);
        let (_, _, r) = parts(&tuned, &toy);
        assert_eq!(norm(r.as_ref()), 0.0, "the step is not kept: the output is the base's");
    }

    #[test]
    fn weights_in_codes_are_reported() {
        let mut toy = Toy::new(5);
        assert!(toy.start(&method(true, LoraSbRule::SignAdam), 1).notes.is_empty());
        let stored = toy.weights.get_mut(&toy.shapes.linears[1].0).unwrap();
        let shape = [stored.rows(), stored.cols()];
        let spec = GroupedSpec { bits: 8, group: 24, symmetric: false };
        let codes = round_to_nearest::quantise(&stored.to_f32(), shape[1], spec);
        let packed = Grouped::pack(shape, spec, &codes.codes, &codes.scales, &codes.zeros);
        *stored = Arc::new(Weight::Grouped(packed.unwrap()));
        let notes = toy.start(&method(true, LoraSbRule::SignAdam), 1).notes;
        assert!(notes.len() == 1 && notes[0].starts_with("1 of 2 adapted weights"), "{notes:?}");
    }

    #[test]
    fn the_gradient_of_the_core_and_a_plain_step() {
        let toy = Toy::new(6);
        let tuned = toy.start(&method(false, LoraSbRule::SignAdam), 1);
        let (a, b, _) = parts(&tuned, &toy);
        let name = &toy.names()[0];
        // dL/dW of the same pass, at the same point: R = 0 is the base.
        let g = from_rows(&toy.sum(name, 1), b.nrows(), a.ncols());
        let want = product(product(b.transpose(), g.as_ref()).as_ref(), a.transpose());
        let parameters = tuned.parameters();
        let gradients = toy.gradients(0, &tuned, &parameters).unwrap();
        let key = format!("{}.lora_R", crate::methods::adapt::shapes::module(name));
        let got = gradients[&key].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let got = from_rows(&got, 3, 3);
        assert!(norm((&got - &want).as_ref()) < 1e-4 * norm(want.as_ref()));
        // R -= eta g_R moves W by -eta B B^T g A^T A.
        let before = toy.merged(&tuned, name);
        let r = &parameters[&key].var;
        let moved = (r.as_tensor() - (&gradients[&key] * 0.1).unwrap()).unwrap();
        r.set(&moved).unwrap();
        let after = toy.merged(&tuned, name);
        let projected = product(
            product(product(b.as_ref(), b.transpose()).as_ref(), g.as_ref()).as_ref(),
            product(a.transpose(), a.as_ref()).as_ref(),
        );
        let (rows, cols) = (b.nrows(), a.ncols());
        for at in 0..rows * cols {
            let got = f64::from(after[at] - before[at]);
            let want = -0.1 * projected[(at / cols, at % cols)];
            assert!((got - want).abs() < 1e-5, "{got} is not {want}");
        }
    }

    #[test]
    fn the_update_directions_hold_more_of_later_gradients_than_the_weights_own() {
        let energy = |a: &Mat<f64>, b: &Mat<f64>, g: &Mat<f64>| {
            let inner = product(product(b.transpose(), g.as_ref()).as_ref(), a.transpose());
            norm(inner.as_ref()) / norm(g.as_ref())
        };
        let toy = Toy::new(7);
        let name = toy.names()[0].clone();
        for rule in [LoraSbRule::SignAdam, LoraSbRule::Sgd] {
            let sb = toy.start(&method(true, rule), 4);
            let (a, b, _) = parts(&sb, &toy);
            let xs = toy.start(&v1::LoraXs { adapter: Some(all_linear(3)) }, 1);
            let (mut ax, bx, _) = parts(&xs, &toy);
            // Rows of A of LoRA-XS have the size of the singular values; the span is what counts.
            for i in 0..3 {
                let size = (0..ax.ncols()).map(|j| ax[(i, j)].powi(2)).sum::<f64>().sqrt();
                (0..ax.ncols()).for_each(|j| ax[(i, j)] /= size);
            }
            let held_out = from_rows(&toy.held_out(&name), b.nrows(), a.ncols());
            let (ours, theirs) = (energy(&a, &b, &held_out), energy(&ax, &bx, &held_out));
            assert!(ours >= 2.0 * theirs, "{rule:?}: {ours} against {theirs}");
        }
    }

    #[test]
    fn only_the_core_is_trained_and_the_same_seed_gives_the_same() {
        let toy = Toy::new(8);
        let start = || toy.start(&method(true, LoraSbRule::SignAdam), 2);
        let tuned = start();
        assert_eq!(tuned.values().unwrap(), start().values().unwrap());
        assert!(tuned.parameters().keys().all(|name| name.ends_with(".lora_R")));
        let random =
            v1::LoraSb { basis: LoraSbBasis::Random as i32, ..method(true, LoraSbRule::Sgd) };
        let (a, b, r) = parts(&toy.start(&random, 1), &toy);
        assert_eq!(norm(r.as_ref()), 0.0);
        for gram in [product(a.as_ref(), a.transpose()), product(b.transpose(), b.as_ref())] {
            assert!(norm((&gram - Mat::<f64>::identity(3, 3)).as_ref()) < 1e-5);
        }
        let low = tuned.modules.values().next().unwrap().low_rank().unwrap();
        assert_eq!((low.rank, low.scale), (3, 1.0));
        let sb = |r| v1::LoraSb { adapter: Some(all_linear(r)), ..Default::default() };
        assert_eq!(sb(16).check(&minilm()).unwrap().parameters, 9_216);
        assert_eq!(sb(24).check(&smollm2()).unwrap().parameters, 120_960);
    }

    #[test]
    fn bad_options_and_dead_weights_are_refused() {
        let shapes = smollm2();
        let bad = |change: &dyn Fn(&mut v1::LoraSb)| {
            let mut options = v1::LoraSb { adapter: Some(all_linear(16)), ..Default::default() };
            change(&mut options);
            options.check(&shapes).unwrap_err().violations()[0].field.clone()
        };
        let alpha = |o: &mut v1::LoraSb| o.adapter.as_mut().unwrap().alpha = Some(3.0);
        assert_eq!(bad(&alpha), "adapter.alpha");
        assert_eq!(bad(&|o| o.adapter.as_mut().unwrap().r = Some(1)), "adapter.r");
        assert_eq!(bad(&|o| o.init_samples = Some(0)), "init_samples");
        assert_eq!(bad(&|o| o.init_lr = Some(0.0)), "init_lr");
        assert_eq!(bad(&|o| o.update_rule = 7), "update_rule");
        let toy = Toy::new(9);
        let error = toy.start_with(&method(true, LoraSbRule::SignAdam), &mut |_, tuned| {
            let zero = |v: &candle_core::Var| Tensor::zeros_like(v.as_tensor()).unwrap();
            Ok(tuned.whole.iter().map(|(name, var)| (name.clone(), zero(var))).collect())
        });
        let error = error.unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        assert!(error.message().contains(&toy.names()[0]), "{error}");
    }

    #[test]
    fn first_steps_worked_out_by_hand() {
        let sum = [2.0, -3.0, 0.0];
        let near = |rule, want: [f32; 3]| {
            for (got, want) in update(&sum, 2, rule, 0.01).iter().zip(want) {
                assert!((got - want).abs() < 1e-8, "{rule:?}: {got} is not {want}");
            }
        };
        // Adam moves by the rate whatever the size; descent by the mean over the passes.
        near(LoraSbRule::SignAdam, [-0.01, 0.01, 0.0]);
        near(LoraSbRule::Sgd, [-0.01, 0.015, 0.0]);
    }

    #[test]
    fn the_first_rate_of_the_run_is_taken_where_none_is_given() {
        let toy = Toy::new(5);
        let of = |rate: Option<f64>| {
            let options = v1::LoraSb { init_lr: rate, ..method(true, LoraSbRule::SignAdam) };
            let (.., r) = parts(&toy.start(&options, 2), &toy);
            [0_usize, 1, 2].map(|i| r[(i, i)])
        };
        // The toy's run starts with 1e-3.
        let (given, own) = (of(Some(0.01)), of(None));
        for (given, own) in given.iter().zip(own) {
            assert!(own > 0.0 && (given / own - 10.0).abs() < 1e-3, "{given} {own}");
        }
    }

    #[test]
    fn scales_ranks_and_gradients_that_make_no_sense_are_refused() {
        let field = |change: &dyn Fn(&mut v1::AdapterOptions)| {
            let mut options = v1::LoraSb { adapter: Some(all_linear(16)), ..Default::default() };
            change(options.adapter.as_mut().unwrap());
            let error = options.check(&smollm2()).unwrap_err();
            (error.violations()[0].field.clone(), error.message().to_owned())
        };
        // The root of the rank makes the scale 4.
        let (name, message) = field(&|o| o.rslora = Some(true));
        assert_eq!(name, "adapter.alpha");
        assert!(message.contains("scale 4"), "{message}");
        assert_eq!(field(&|o| o.r = Some(193)).0, "adapter.r");
        let toy = Toy::new(9);
        let error = toy.start_with(&method(true, LoraSbRule::SignAdam), &mut |_, tuned| {
            let nan = |v: &candle_core::Var| {
                Tensor::full(f32::NAN, v.shape(), &candle_core::Device::Cpu).unwrap()
            };
            Ok(tuned.whole.iter().map(|(name, var)| (name.clone(), nan(var))).collect())
        });
        let error = error.unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
        assert!(error.message().contains(&toy.names()[0]), "{error}");
    }
}
