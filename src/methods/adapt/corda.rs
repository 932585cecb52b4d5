//! CorDA (Yang et al. 2024, "CorDA: context-oriented decomposition adaptation of large language models",
//! arXiv 2406.05223, equations 1 to 5): with `C` the second moments of a linear's inputs on a text,
//! `W C = U S V^T` and `W = U S (V^T C^-1)`; the adapter starts from the components with the smallest `S`
//! (knowledge of the text is kept) or the largest (the text previews the task).
//!
//! Decided here: a sample is divided by its largest absolute entry (the published program takes the
//! absolute value of its largest entry, which is at hand as a choice); the base is not changed, the start
//! is subtracted, so a quantised base is taken too: its numbers are decomposed as they are; the square root of `C`, which would weigh the error of activations, is a choice.

use std::collections::{BTreeMap, BTreeSet};

use faer::Mat;
use rayon::prelude::*;

use super::lora::cost;
use super::module::Module;
use super::moments;
use super::options::{self, Plan, Site, Usual};
use super::pissa::components;
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, find, finish_build, finite_values};
use crate::calibrate;
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::nn::linalg::{self, Svd, product};
use crate::proto::v1::{self, CordaMode, CordaNormalisation};
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "corda",
    title: "CorDA",
    verb: "adapt",
    summary: "LoRA that starts from directions of the weight chosen by the inputs of a text.",
    paper: "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware \
            Parameter-Efficient Fine-tuning, arXiv 2406.05223",
    needs_calibration: true,
    families: &["decoder"],
    followed_by: &[],
};

const USUAL: Usual = Usual { rank: Some(16), alpha: None, all_linear: true, fits: true };

/// The inverse is good enough when its product with the matrix is this near the identity.
const TOLERANCE: f64 = 0.05;
/// Dampening above this is refused.
const MAX_DAMP: f64 = 1.0;

/// A matrix that orients a decomposition, and its inverse.
#[derive(Debug, Clone)]
pub struct Orientation {
    matrix: Mat<f64>,
    inverse: Mat<f64>,
    /// The share of the mean diagonal that was added in the end.
    pub damp: f64,
}

impl Orientation {
    /// From second moments; `power` is 1 or 0.5. Dampening is doubled until the inverse is good.
    ///
    /// # Errors
    /// NUMERIC_FAILURE naming `what` where no dampening up to 1 helps.
    pub fn new(c: &Mat<f64>, damp: f64, power: f64, what: &str) -> Result<Self> {
        let n = c.nrows();
        let mean = (0..n).map(|i| c[(i, i)]).sum::<f64>() / n.max(1) as f64;
        let mut damp = damp;
        while mean > 0.0 && mean.is_finite() && damp <= MAX_DAMP {
            let mut matrix = c.clone();
            (0..n).for_each(|i| matrix[(i, i)] += damp * mean);
            if power != 1.0 {
                matrix = linalg::symmetric_power(matrix.as_ref(), power, what)?;
            }
            if let Some(inverse) = linalg::inverse(matrix.as_ref()) {
                let mut error = product(matrix.as_ref(), inverse.as_ref());
                (0..n).for_each(|i| error[(i, i)] -= 1.0);
                if error.norm_l2() < TOLERANCE {
                    return Ok(Self { matrix, inverse, damp });
                }
            }
            damp *= 2.0;
        }
        Err(Error::new(
            Reason::NumericFailure,
            format!(
                "the second moments of the input of '{what}' have no inverse even with dampening; the \
                 input may always be zero on this text: leave the linear out, or take another text"
            ),
        ))
    }

    /// From a positive diagonal.
    pub fn diagonal(d: &[f64]) -> Self {
        let n = d.len();
        let of =
            |f: &dyn Fn(f64) -> f64| Mat::from_fn(n, n, |i, j| if i == j { f(d[i]) } else { 0.0 });
        Self { matrix: of(&|d| d), inverse: of(&|d| 1.0 / d), damp: 0.0 }
    }

    /// The decomposition `w = u diag(s) v^T` with the singular values of `w` times the matrix. The columns
    /// of `v` are not orthonormal.
    pub fn decompose(&self, w: &Mat<f64>, what: &str) -> Result<Svd> {
        let Svd { u, s, v } =
            linalg::svd(product(w.as_ref(), self.matrix.as_ref()).as_ref(), what)?;
        // The matrix is symmetric, so its inverse is.
        Ok(Svd { u, s, v: product(self.inverse.as_ref(), v.as_ref()) })
    }
}

/// `w` without its `drop` smallest components: CorDA as a compression.
pub fn truncated(svd: &Svd, drop: usize) -> Mat<f64> {
    let kept = svd.s.len().saturating_sub(drop);
    let us = Mat::from_fn(svd.u.nrows(), kept, |i, j| svd.u[(i, j)] * svd.s[j]);
    product(us.as_ref(), svd.v.as_ref().subcols(0, kept).transpose())
}

/// The components that an adapter of `rank` starts from, of `count`.
fn chosen(mode: CordaMode, rank: usize, count: usize) -> std::ops::Range<usize> {
    match mode {
        CordaMode::KnowledgePreserved => count - rank..count,
        _ => 0..rank,
    }
}

/// The options, checked.
struct Read {
    mode: CordaMode,
    damp: f64,
    power: f64,
    settings: moments::Settings,
}

fn resolve_context(context: &mut Option<v1::Calibration>) {
    context.get_or_insert_default().sequences.get_or_insert(256);
    calibrate::Options::resolve(context);
}

fn read(options: &v1::Corda) -> Result<Read> {
    let mode: CordaMode = options::choice("mode", options.mode)?;
    if mode == CordaMode::Unspecified {
        return Err(Error::option(
            "mode",
            "say what the text stands for: CORDA_MODE_KNOWLEDGE_PRESERVED (what to keep) or \
             CORDA_MODE_INSTRUCTION_PREVIEWED (the task)",
        ));
    }
    let damp = options.damp.unwrap_or(0.01);
    if !(damp > 0.0 && damp <= MAX_DAMP) {
        return Err(Error::option("damp", format!("{damp} is outside (0, {MAX_DAMP}]")));
    }
    let power = options.power.unwrap_or(1.0);
    if power != 1.0 && power != 0.5 {
        return Err(Error::option("power", format!("{power} is neither 1 nor 0.5")));
    }
    let mut context = options.context.clone();
    resolve_context(&mut context);
    let inside = |error: Error| match error.violations().first() {
        Some(violation) => Error::option(
            violation.field.replacen("calibration.", "context.", 1),
            violation.description.clone(),
        ),
        None => error,
    };
    let context = calibrate::Options::read(context.as_ref()).map_err(inside)?;
    if context.dataset.is_none() {
        return Err(Error::option(
            "context.dataset",
            "name the text data set: the knowledge to keep, or a sample of the task",
        ));
    }
    let normalisation: CordaNormalisation =
        options::choice("normalisation", options.normalisation)?;
    Ok(Read { mode, damp, power, settings: moments::Settings { context, normalisation } })
}

fn plan(options: &v1::Corda, shapes: &Shapes) -> Result<Plan> {
    let mut plan = options::plan(options.adapter.as_ref(), &USUAL, shapes)?;
    let half = |site: &&Site| 2 * site.rank > site.shape[0].min(site.shape[1]);
    if let Some(site) = plan.sites.iter().find(half) {
        plan.warnings.push(format!(
            "rank {} is more than half of the components of '{}': what is kept and what is tuned overlap \
             between the two modes",
            site.rank, site.linear
        ));
    }
    Ok(plan)
}

impl Adapt for v1::Corda {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &USUAL);
        resolve_context(&mut self.context);
        self.damp.get_or_insert(0.01);
        self.power.get_or_insert(1.0);
        if self.normalisation == CordaNormalisation::Unspecified as i32 {
            self.normalisation = CordaNormalisation::SampleMax as i32;
        }
    }

    fn datasets(&self) -> Vec<&str> {
        self.context.iter().map(|c| c.dataset.as_str()).filter(|d| !d.is_empty()).collect()
    }

    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        read(self)?;
        let plan = plan(self, shapes)?;
        let frozen = plan.factors();
        Ok(Cost { frozen, ..cost(plan, shapes) })
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Moments(read(self)?.settings))
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let Read { mode, damp, power, .. } = read(self)?;
        let plan = plan(self, setup.shapes)?;
        let sites: BTreeMap<&str, &Site> =
            plan.sites.iter().map(|site| (site.linear.as_str(), site)).collect();
        let names: BTreeSet<String> = sites.keys().map(|name| (*name).to_owned()).collect();
        let mut tuned = Tuned::new(plan.dropout, setup.random.path());
        let weights = setup.weights;
        let source = setup
            .moments
            .as_mut()
            .ok_or_else(|| Error::internal("CorDA was started without moments"))?;
        source.each(&names, &mut |group, c| {
            let first = group.first().map_or("", String::as_str);
            let orientation = Orientation::new(c, damp, power, first)?;
            let made: Vec<Module> = group
                .par_iter()
                .map(|name| {
                    let site = sites.get(name.as_str()).ok_or_else(|| {
                        Error::internal(format!("moments of '{name}', which is no target"))
                    })?;
                    let [rows, cols] = site.shape;
                    let values = finite_values(site, find(weights, name)?)?;
                    let w = linalg::from_rows(&values, rows, cols);
                    let svd = orientation.decompose(&w, name)?;
                    components(site, &svd, chosen(mode, site.rank, rows.min(cols)))
                })
                .collect::<Result<_>>()?;
            tuned.modules.extend(made.into_iter().map(|m| (m.linear.clone(), m)));
            Ok(())
        })?;
        if tuned.modules.len() != plan.sites.len() {
            return Err(Error::internal("some linears got no second moments"));
        }
        finish_build(&mut tuned, &plan, setup)?;
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
    use super::super::shapes::testing::smollm2;
    use super::super::testing::{Case, all_linear};
    use super::*;

    fn method(mode: CordaMode, r: u32) -> v1::Corda {
        let context = v1::Calibration { dataset: "datasets/text".into(), ..Default::default() };
        v1::Corda {
            adapter: Some(all_linear(r)),
            mode: mode as i32,
            context: Some(context),
            ..Default::default()
        }
    }

    const KEEP: CordaMode = CordaMode::KnowledgePreserved;
    const PREVIEW: CordaMode = CordaMode::InstructionPreviewed;

    /// Second moments of a model's linears on a random text.
    fn moments_of(case: &Case) -> BTreeMap<String, Mat<f64>> {
        let mut all = BTreeMap::new();
        let names = case.linears().iter().map(|(name, _)| name.clone()).collect();
        case.with_moments(|source| {
            source
                .each(&names, &mut |group, c| {
                    all.extend(group.iter().map(|n| (n.clone(), c.clone())));
                    Ok(())
                })
                .unwrap();
        });
        all
    }

    #[test]
    fn the_decomposition_gives_the_weight_back() {
        let case = Case::decoder();
        let moments = moments_of(&case);
        for (name, stored) in &case.linears() {
            let w = linalg::from_rows(&stored.to_f32(), stored.rows(), stored.cols());
            for power in [1.0, 0.5] {
                let orientation = Orientation::new(&moments[name], 0.01, power, name).unwrap();
                let svd = orientation.decompose(&w, name).unwrap();
                let error = (&truncated(&svd, 0) - &w).norm_l2() / w.norm_l2();
                assert!(error < 1e-3, "{name}: {error}");
            }
        }
    }

    #[test]
    fn both_modes_start_from_the_base_and_from_different_components() {
        let case = Case::decoder();
        let (keep, preview) = (method(KEEP, 4), method(PREVIEW, 4));
        for method in [&keep, &preview] {
            let tuned = case.start(method);
            // The start is subtracted inside one product, so it cancels up to rounding.
            case.equals_base(&tuned, 1e-6);
            case.contract(method, &["lora_A", "lora_B"]);
        }
        assert_eq!(chosen(KEEP, 4, 32), 28..32);
        assert_eq!(chosen(PREVIEW, 4, 32), 0..4);
        // At full rank both are all of the weight.
        let (name, stored) = case.some_linear();
        let full = stored.rows().min(stored.cols()) as u32;
        for mode in [KEEP, PREVIEW] {
            let options = v1::AdapterOptions { targets: vec!["k_proj".into()], ..all_linear(full) };
            let method = v1::Corda { adapter: Some(options), ..method(mode, full) };
            let tuned = case.start(&method);
            let name = name.replace("q_proj", "k_proj");
            let mut module = tuned.modules[&name].clone();
            module.start = None;
            let mut delta = vec![0.0; module.shape[0] * module.shape[1]];
            module.low_rank().unwrap().add_to(&mut delta);
            for (got, want) in delta.iter().zip(case.stored(&name).to_f32()) {
                assert!((got - want).abs() < 1e-3, "{got} is not {want}");
            }
        }
    }

    #[test]
    fn white_inputs_give_pissa() {
        let case = Case::decoder();
        let (name, stored) = case.some_linear();
        let [rows, cols] = [stored.rows(), stored.cols()];
        let w = linalg::from_rows(&stored.to_f32(), rows, cols);
        let orientation = Orientation::new(&Mat::identity(cols, cols), 0.01, 1.0, name).unwrap();
        let site = Site {
            linear: name.to_owned(),
            shape: [rows, cols],
            rank: 5,
            alpha: 5.0,
            rslora: false,
        };
        let delta = |svd: &Svd| {
            let mut module = components(&site, svd, 0..5).unwrap();
            module.start = None;
            let mut delta = vec![0.0; rows * cols];
            module.low_rank().unwrap().add_to(&mut delta);
            delta
        };
        let ours = delta(&orientation.decompose(&w, name).unwrap());
        let pissa = delta(&linalg::svd(w.as_ref(), name).unwrap());
        for (got, want) in ours.iter().zip(&pissa) {
            assert!((got - want).abs() < 1e-5, "{got} is not {want}");
        }
    }

    /// Truncation in the direction of the inputs errs less on them than plain truncation does.
    #[test]
    fn oriented_truncation_keeps_what_the_inputs_need() {
        let case = Case::decoder();
        let moments = moments_of(&case);
        let mut better = 0;
        let linears = case.linears();
        for (name, stored) in &linears {
            let w = linalg::from_rows(&stored.to_f32(), stored.rows(), stored.cols());
            let c = &moments[name];
            // tr(E C E^T): the squared error on the inputs.
            let error = |svd: &Svd| {
                let e = &w - &truncated(svd, svd.s.len() / 2);
                let through = product(product(e.as_ref(), c.as_ref()).as_ref(), e.transpose());
                (0..through.nrows()).map(|i| through[(i, i)]).sum::<f64>()
            };
            let root = Orientation::new(c, 0.01, 0.5, name).unwrap().decompose(&w, name).unwrap();
            let plain = linalg::svd(w.as_ref(), name).unwrap();
            better += usize::from(error(&root) <= error(&plain) * 1.001);
        }
        assert_eq!(better, linears.len());
        let d = Orientation::diagonal(&[2.0, 0.5, 1.0]);
        let w = linalg::from_rows(&[1.0, 2.0, 3.0, -1.0, 0.5, 2.0], 2, 3);
        let svd = d.decompose(&w, "w").unwrap();
        assert!((&truncated(&svd, 0) - &w).norm_l2() < 1e-9);
        assert_eq!(truncated(&svd, 2).norm_l2(), 0.0);
    }

    #[test]
    fn dead_inputs_and_bad_options_are_refused() {
        let zero = Mat::<f64>::zeros(3, 3);
        let error = Orientation::new(&zero, 0.01, 1.0, "model.q").unwrap_err();
        assert_eq!(error.reason(), Reason::NumericFailure);
        assert!(error.message().contains("model.q"));
        let shapes = smollm2();
        assert_eq!(method(KEEP, 16).check(&shapes).unwrap().parameters, 16 * 305_280);
        assert_eq!(method(KEEP, 128).check(&shapes).unwrap().warnings.len(), 1);
        let of = |change: &dyn Fn(&mut v1::Corda)| {
            let mut options = method(KEEP, 16);
            change(&mut options);
            options.check(&shapes).unwrap_err().violations()[0].field.clone()
        };
        assert_eq!(of(&|o| o.mode = 0), "mode");
        assert_eq!(of(&|o| o.damp = Some(0.0)), "damp");
        assert_eq!(of(&|o| o.power = Some(2.0)), "power");
        assert_eq!(of(&|o| o.context = None), "context.dataset");
        assert_eq!(of(&|o| o.context.as_mut().unwrap().sequences = Some(0)), "context.sequences");
        assert_eq!(of(&|o| o.adapter.as_mut().unwrap().r = Some(193)), "adapter.r");
    }

    /// The matrix of the inputs stands on the right, and the power is that of the matrix itself.
    #[test]
    fn orientations_worked_out_by_hand() {
        let c = Mat::from_fn(2, 2, |i, j| [[4.0, 0.0], [0.0, 1.0]][i][j]);
        // Mean diagonal 2.5, of which a fifth is added: 4.5 and 1.5.
        let damped = Orientation::new(&c, 0.2, 1.0, "w").unwrap();
        assert_eq!(damped.damp, 0.2);
        for (i, want) in [4.5, 1.5].into_iter().enumerate() {
            assert!((damped.matrix[(i, i)] - want).abs() < 1e-12);
            assert!((damped.inverse[(i, i)] - 1.0 / want).abs() < 1e-12);
        }
        let w = linalg::from_rows(&[1.0, 1.0, 0.0, 0.0], 2, 2);
        for (power, want) in [(1.0, 17_f64.sqrt()), (0.5, 5_f64.sqrt())] {
            let svd = Orientation::new(&c, 1e-12, power, "w").unwrap().decompose(&w, "w").unwrap();
            // [1, 1] times diag(4, 1), or diag(2, 1).
            assert!((svd.s[0] - want).abs() < 1e-9, "{power}: {:?}", svd.s);
            assert!((&truncated(&svd, 0) - &w).norm_l2() < 1e-9);
        }
    }

    #[test]
    fn dampening_doubles_until_the_inverse_is_good() {
        // 1 and 1 + 1e-20 are the same number: this has no inverse until the dampening is much larger.
        let ones = Mat::from_fn(2, 2, |_, _| 1.0);
        let found = Orientation::new(&ones, 1e-20, 1.0, "w").unwrap();
        let doublings = (found.damp / 1e-20).log2();
        assert!(found.damp > 1e-17 && found.damp < 1e-3, "{}", found.damp);
        assert!((doublings - doublings.round()).abs() < 1e-6, "{doublings}");
        let mut error = product(found.matrix.as_ref(), found.inverse.as_ref());
        (0..2_usize).for_each(|i| error[(i, i)] -= 1.0);
        assert!(error.norm_l2() < TOLERANCE);
    }

    #[test]
    fn components_of_the_modes_do_not_overlap() {
        for count in [2, 5, 32, 192] {
            for rank in 1..=count {
                let (keep, preview) = (chosen(KEEP, rank, count), chosen(PREVIEW, rank, count));
                assert_eq!((keep.len(), preview.len()), (rank, rank));
                assert_eq!((keep.end, preview.start), (count, 0));
                assert_eq!(preview.end <= keep.start, 2 * rank <= count, "{rank} of {count}");
            }
        }
    }

    #[test]
    fn exports_of_twice_the_rank_add_nothing_at_the_start_and_the_scale_counts_once() {
        let case = Case::decoder();
        let delta = |module: &Module| {
            let mut delta = vec![0.0; module.shape[0] * module.shape[1]];
            module.low_rank().unwrap().add_to(&mut delta);
            delta
        };
        for mode in [KEEP, PREVIEW] {
            // All components of the narrow linears, with a scale of 1 / 4.
            let options = v1::AdapterOptions {
                targets: vec!["k_proj".into()],
                alpha: Some(8.0),
                ..all_linear(32)
            };
            let method = v1::Corda { adapter: Some(options), ..method(mode, 32) };
            let tuned = case.start(&method);
            assert_eq!(tuned.modules.len(), 3);
            for (name, module) in &tuned.modules {
                let low = module.low_rank().unwrap();
                assert_eq!((low.rank, low.scale), (64, 0.25), "{name}");
                assert!(delta(module).iter().all(|d| d.abs() < 1e-9), "{name}");
                let mut taken = module.clone();
                taken.start = None;
                for (got, want) in delta(&taken).iter().zip(case.stored(name).to_f32()) {
                    assert!((got - want).abs() < 1e-3, "{name}: {got} is not {want}");
                }
            }
            case.disturb(&tuned, 0.1);
            assert!(tuned.modules.values().all(|m| delta(m).iter().any(|d| d.abs() > 1e-3)));
        }
    }

    #[test]
    fn tables_and_heads_are_no_targets() {
        for table in ["embed_tokens", "lm_head"] {
            let options = v1::AdapterOptions { targets: vec![table.into()], ..all_linear(16) };
            let method = v1::Corda { adapter: Some(options), ..method(KEEP, 16) };
            let error = method.check(&smollm2()).unwrap_err();
            assert_eq!(error.violations()[0].field, "adapter.targets", "{table}");
        }
    }
}
