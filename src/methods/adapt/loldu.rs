//! LoLDU (Shi et al. 2024, "LoLDU: low-rank adaptation via lower-diag-upper decomposition", arXiv 2410.13618,
//! equations 3 to 6): `W = P L diag(D) U` by pivoted LU; `P`, `L` and `U` are frozen, and the diagonal `z`
//! is trained: `y = W x + s P L diag(z - z0) U x`.
//!
//! Decided here: `s = alpha / r` is 1 unless alpha is given (the published program has 1 / r, and needs
//! large learning rates for it); the residual weight is not made, the start is subtracted; components
//! whose pivot is below a millionth of the largest are left out, for their row of `U` would be divided by
//! nearly nothing.

use rand::Rng;
use rand::seq::SliceRandom;

use super::module::{Core, Factor, Module, Part, Start};
use super::options::{self, Plan, Site, Usual};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build, finite_values, normal, uniform};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::nn::linalg::{self, Ldu};
use crate::proto::v1::{self, LolduPick, LolduStart};
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "loldu",
    title: "LoLDU",
    verb: "adapt",
    summary: "Trains the diagonal of an LDU decomposition of each weight; the triangles are frozen.",
    paper: "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient \
            Fine-Tuning, arXiv 2410.13618",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

const USUAL: Usual = Usual { rank: None, alpha: None, all_linear: true, fits: true };

/// Pivots below this share of the largest are left out.
const SMALLEST: f64 = 1e-6;

/// The frozen parts of a module and the diagonal of the decomposition.
pub struct Frozen {
    /// `U` `[r, in]`.
    pub a: Vec<f32>,
    /// `P L` `[out, r]`.
    pub b: Vec<f32>,
    pub d: Vec<f32>,
    /// Which components they are.
    pub kept: Vec<usize>,
}

/// The components that are kept of a decomposition: at most `rank`.
pub fn keep(ldu: &Ldu, rank: usize, pick: LolduPick) -> Vec<usize> {
    let largest = ldu.d.iter().fold(0.0_f64, |top, d| top.max(d.abs()));
    let usable = |i: &usize| ldu.d[*i].abs() >= SMALLEST * largest && ldu.d[*i] != 0.0;
    let all = 0..ldu.d.len();
    match pick {
        // The first r, of which the ones without a pivot fall out.
        LolduPick::Unspecified | LolduPick::First => all.take(rank).filter(usable).collect(),
        LolduPick::Largest => {
            let mut order: Vec<usize> = all.filter(usable).collect();
            order.sort_by(|i, j| ldu.d[*j].abs().total_cmp(&ldu.d[*i].abs()));
            order.truncate(rank);
            order.sort_unstable();
            order
        }
    }
}

/// The frozen parts of the components `kept`.
pub fn frozen(ldu: &Ldu, kept: &[usize]) -> Frozen {
    let (rows, cols, rank) = (ldu.l.nrows(), ldu.u.ncols(), kept.len());
    let mut b = vec![0.0; rows * rank];
    for (i, row) in ldu.rows.iter().enumerate() {
        for (r, k) in kept.iter().enumerate() {
            b[row * rank + r] = ldu.l[(i, *k)] as f32;
        }
    }
    let mut a = Vec::with_capacity(rank * cols);
    for k in kept {
        a.extend((0..cols).map(|c| ldu.u[(*k, c)] as f32));
    }
    Frozen { a, b, d: kept.iter().map(|k| ldu.d[*k] as f32).collect(), kept: kept.to_vec() }
}

/// Where the trained diagonal starts.
fn start(kind: LolduStart, d: &[f32], rng: &mut impl Rng) -> Vec<f32> {
    let n = d.len() as f64;
    let mean = d.iter().map(|d| f64::from(*d)).sum::<f64>() / n;
    let spread = d.iter().map(|d| (f64::from(*d) - mean).powi(2)).sum::<f64>() / n;
    match kind {
        LolduStart::Unspecified | LolduStart::Lu => d.to_vec(),
        LolduStart::Uniform => uniform(rng, d.len(), (mean.abs() / 2.0) as f32),
        LolduStart::Normal => {
            normal(rng, d.len(), spread.sqrt()).iter().map(|v| v + mean as f32).collect()
        }
        LolduStart::Constant => vec![mean as f32; d.len()],
        LolduStart::Ones => vec![1.0; d.len()],
        LolduStart::Zeros => vec![0.0; d.len()],
        LolduStart::Shuffled => {
            let mut d = d.to_vec();
            d.shuffle(rng);
            d
        }
    }
}

/// A module from its frozen parts and the trained diagonal.
pub fn module(site: &Site, frozen: Frozen, z: Vec<f32>) -> Result<Module> {
    let ([rows, cols], rank) = (site.shape, z.len());
    let core = Part::trained(z, &[rank])?;
    let start = core.tensor().copy()?.detach();
    Ok(Module {
        linear: site.linear.clone(),
        shape: site.shape,
        rank,
        scale: site.scale(),
        rslora: site.rslora,
        a: Factor::Plain(Part::fixed(frozen.a, &[rank, cols])?),
        b: Factor::Plain(Part::fixed(frozen.b, &[rows, rank])?),
        core: Core::Diagonal(core),
        core_name: "lora_z",
        start: Some(Start::Diagonal(start)),
        magnitude: None,
        ldu: Some(frozen.kept),
    })
}

/// What is said of components without a pivot that can be used.
fn left_out(plan: &Plan, tuned: &Tuned) -> Option<String> {
    let rank = |site: &Site| tuned.modules.get(&site.linear).map_or(0, |module| module.rank);
    let sites = plan.sites.iter().map(|site| (site.linear.as_str(), site.rank - rank(site)));
    let some: Vec<_> = sites.filter(|(_, left)| *left > 0).collect();
    let most = some.iter().max_by_key(|(_, left)| *left)?;
    let all: usize = some.iter().map(|(_, left)| left).sum();
    Some(format!(
        "components left out because their pivot is too small to divide by: {all} in {} weights, {} of them in \
         '{}'",
        some.len(),
        most.1,
        most.0
    ))
}

impl Adapt for v1::Loldu {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &USUAL);
        if self.start == LolduStart::Unspecified as i32 {
            self.start = LolduStart::Lu as i32;
        }
        if self.pick == LolduPick::Unspecified as i32 {
            self.pick = LolduPick::First as i32;
        }
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    /// Counts all components; those without a pivot are known when the weights are read.
    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        options::choice::<LolduStart>("start", self.start)?;
        options::choice::<LolduPick>("pick", self.pick)?;
        let plan = options::plan(self.adapter.as_ref(), &USUAL, shapes)?;
        let diagonals: u64 = plan.sites.iter().map(|site| site.rank as u64).sum();
        let parameters = diagonals + plan.whole(shapes);
        Ok(Cost { parameters, frozen: plan.factors(), warnings: plan.warnings })
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let kind = options::choice("start", self.start)?;
        let pick = options::choice("pick", self.pick)?;
        let plan = options::plan(self.adapter.as_ref(), &USUAL, setup.shapes)?;
        let mut tuned = build(&plan, setup, |site, stored, random| {
            let [rows, cols] = site.shape;
            let w = linalg::from_rows(&finite_values(site, stored)?, rows, cols);
            let ldu = linalg::ldu(w.as_ref());
            let kept = keep(&ldu, site.rank, pick);
            if kept.is_empty() {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    format!(
                        "none of the {} pivots of '{}' can be used; leave it out with adapter.exclude",
                        site.rank, site.linear
                    ),
                ));
            }
            let frozen = frozen(&ldu, &kept);
            let z = start(kind, &frozen.d, &mut random.rng());
            module(site, frozen, z)
        })?;
        tuned.notes.extend(left_out(&plan, &tuned));
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

    use super::super::shapes::testing::{minilm, smollm2};
    use super::super::testing::{Case, all_linear};
    use super::*;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Weight};
    use crate::seed::Stream;

    fn full() -> v1::AdapterOptions {
        v1::AdapterOptions { r: None, ..all_linear(1) }
    }

    #[test]
    fn all_components_give_the_weight() {
        let case = Case::decoder();
        for (name, stored) in &case.linears() {
            let [rows, cols] = [stored.rows(), stored.cols()];
            let w = linalg::from_rows(&stored.to_f32(), rows, cols);
            let ldu = linalg::ldu(w.as_ref());
            let kept = keep(&ldu, rows.min(cols), LolduPick::First);
            assert_eq!(kept.len(), rows.min(cols), "{name}");
            let Frozen { a, b, d, .. } = frozen(&ldu, &kept);
            let scaled: Vec<f32> =
                b.chunks(d.len()).flat_map(|b| b.iter().zip(&d).map(|(b, d)| b * d)).collect();
            let ld = linalg::from_rows(&scaled, rows, d.len());
            let product =
                linalg::product(ld.as_ref(), linalg::from_rows(&a, d.len(), cols).as_ref());
            let error = (&product - &w).norm_l2() / w.norm_l2();
            assert!(error < 1e-5, "{name}: {error}");
        }
    }

    #[test]
    fn every_start_equals_the_base() {
        for kind in [
            LolduStart::Lu,
            LolduStart::Uniform,
            LolduStart::Normal,
            LolduStart::Constant,
            LolduStart::Ones,
            LolduStart::Zeros,
            LolduStart::Shuffled,
        ] {
            for options in [full(), all_linear(5)] {
                let method =
                    v1::Loldu { adapter: Some(options), start: kind as i32, ..Default::default() };
                let case = Case::decoder();
                case.equals_base(&case.start(&method), 0.0);
            }
        }
    }

    #[test]
    fn the_shared_contract_and_counts() {
        let method = v1::Loldu { adapter: Some(full()), ..Default::default() };
        Case::decoder().contract(&method, &["lora_z"]);
        Case::encoder().contract(&method, &["lora_z"]);
        let largest = v1::Loldu {
            adapter: Some(all_linear(4)),
            pick: LolduPick::Largest as i32,
            ..Default::default()
        };
        Case::decoder().contract(&largest, &["lora_z"]);
        let count = |r: Option<u32>, shapes: &Shapes| {
            let adapter = Some(v1::AdapterOptions { r, ..full() });
            v1::Loldu { adapter, ..Default::default() }.check(shapes).unwrap().parameters
        };
        assert_eq!(count(None, &smollm2()), 97_920);
        assert_eq!(count(Some(16), &smollm2()), 3_360);
        assert_eq!(count(Some(4), &smollm2()), 840);
        assert_eq!(count(None, &minilm()), 13_824);
        // The ratios that the card names.
        assert_eq!(2_442_240 / 97_920, 24);
        assert_eq!(2_442_240 / 840, 2_907);
    }

    #[test]
    fn small_pivots_are_left_out() {
        let w = [1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 3.0, 3.0, 5.0];
        let ldu = linalg::ldu(linalg::from_rows(&w, 3, 3).as_ref());
        let kept = keep(&ldu, 3, LolduPick::First);
        assert_eq!(kept, [0, 2]);
        let Frozen { a, b, d, .. } = frozen(&ldu, &kept);
        assert!(a.iter().chain(&b).chain(&d).all(|v| v.is_finite()));
        assert_eq!(keep(&ldu, 1, LolduPick::Largest), [0]);
        let nothing = linalg::ldu(linalg::from_rows(&[0.0; 4], 2, 2).as_ref());
        assert!(keep(&nothing, 2, LolduPick::Largest).is_empty());
    }

    #[test]
    fn components_that_are_left_out_are_reported() {
        let mut weights = Case::decoder().weights().clone();
        let method = v1::Loldu { adapter: Some(full()), ..Default::default() };
        assert!(Case::decoder().start(&method).notes.is_empty());
        let name = Case::decoder().some_linear().0.to_owned();
        let stored = &weights[&name];
        let (cols, mut values) = (stored.cols(), stored.to_f32());
        // Two columns alike: one pivot fewer.
        values.chunks_mut(cols).for_each(|row| row[cols - 1] = row[0]);
        let twins = Dense::from_f32(stored.shape().to_vec(), &values, Dtype::F32).unwrap();
        weights.insert(name.clone(), Arc::new(Weight::Dense(twins)));
        let tuned = Case::with(weights).start(&method);
        let [note] = tuned.notes.as_slice() else { panic!("{:?}", tuned.notes) };
        assert!(note.contains(": 1 in 1 weights") && note.contains(&name), "{note}");
    }

    #[test]
    fn diagonals_start_as_their_names_say() {
        // Mean 3, squares of the distances (4 + 1 + 0 + 9) / 4.
        let d = [1.0, 2.0, 3.0, 6.0];
        let mut rng = Stream::root(1).rng();
        let mut draw = |kind| start(kind, &d, &mut rng);
        assert_eq!(draw(LolduStart::Lu), d);
        assert_eq!(draw(LolduStart::Unspecified), d);
        assert_eq!(draw(LolduStart::Constant), [3.0; 4]);
        assert_eq!(draw(LolduStart::Ones), [1.0; 4]);
        assert_eq!(draw(LolduStart::Zeros), [0.0; 4]);
        let mut shuffled = draw(LolduStart::Shuffled);
        shuffled.sort_by(f32::total_cmp);
        assert_eq!(shuffled, d);
        let uniform: Vec<f32> = (0..100).flat_map(|_| draw(LolduStart::Uniform)).collect();
        assert!(uniform.iter().all(|v| v.abs() <= 1.5));
        assert!(uniform.iter().any(|v| *v > 1.2) && uniform.iter().any(|v| *v < -1.2));
        let normal: Vec<f32> = (0..500).flat_map(|_| draw(LolduStart::Normal)).collect();
        let mean = normal.iter().sum::<f32>() / 2000.0;
        let square = normal.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 2000.0;
        assert!((mean - 3.0).abs() < 0.2 && (square - 3.5).abs() < 0.6, "{mean} {square}");
    }

    #[test]
    fn the_scale_is_one_unless_alpha_is_given_and_z_alone_is_trained() {
        let case = Case::decoder();
        let scales = |options| -> Vec<f64> {
            let method = v1::Loldu { adapter: Some(options), ..Default::default() };
            case.start(&method).modules.values().map(|m| m.scale).collect()
        };
        assert!(scales(full()).iter().all(|s| *s == 1.0));
        assert!(scales(all_linear(5)).iter().all(|s| *s == 1.0));
        let given = v1::AdapterOptions { alpha: Some(2.0), ..all_linear(5) };
        assert!(scales(given).iter().all(|s| *s == 0.4));
        let tuned = case.start(&v1::Loldu { adapter: Some(full()), ..Default::default() });
        let (name, stored) = case.some_linear();
        let module = &tuned.modules[name];
        // W + s P L diag(z - z0) U with z = 2 z0 is twice the weight.
        let z = module.trained()[0].1;
        z.set(&(z.as_tensor() * 2.0).unwrap()).unwrap();
        for (got, want) in module.merged(stored).unwrap().iter().zip(stored.to_f32()) {
            assert!((got - 2.0 * want).abs() < 1e-4, "{got} is not twice {want}");
        }
    }

    /// The tiny decoder with one linear changed; gives its name.
    fn with_linear(change: impl Fn(&mut [f32], usize)) -> (Case, String) {
        let case = Case::decoder();
        let (name, stored) = case.some_linear();
        let mut values = stored.to_f32();
        change(&mut values, stored.cols());
        let dense = Dense::from_f32(stored.shape().to_vec(), &values, Dtype::F32).unwrap();
        let mut weights = case.weights().clone();
        weights.insert(name.to_owned(), Arc::new(Weight::Dense(dense)));
        (Case::with(weights), name.to_owned())
    }

    #[test]
    fn weights_with_equal_columns_are_tuned_and_empty_ones_are_named() {
        let method = v1::Loldu { adapter: Some(full()), ..Default::default() };
        let (case, name) = with_linear(|values, cols| {
            values.chunks_mut(cols).for_each(|row| row[4] = row[3]);
        });
        let tuned = case.start(&method);
        assert_eq!(tuned.modules[&name].rank, 31, "the component without a pivot is left out");
        case.equals_base(&tuned, 0.0);
        case.disturb(&tuned, 0.1);
        assert!(case.outputs(&tuned).iter().all(|y| y.is_finite()));
        let (case, name) = with_linear(|values, _| values.fill(0.0));
        let error = case.try_start(&method).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        assert!(error.message().contains(&name), "{error}");
    }

    #[test]
    fn bad_ranks_scales_and_places_are_refused() {
        let field = |options: v1::AdapterOptions| {
            let method = v1::Loldu { adapter: Some(options), ..Default::default() };
            method.check(&smollm2()).unwrap_err().violations()[0].field.clone()
        };
        assert_eq!(field(all_linear(193)), "adapter.r");
        assert_eq!(field(v1::AdapterOptions { alpha: Some(0.0), ..full() }), "adapter.alpha");
        for table in ["embed_tokens", "lm_head"] {
            let targets = vec![table.to_owned()];
            assert_eq!(field(v1::AdapterOptions { targets, ..full() }), "adapter.targets");
        }
        let start = v1::Loldu { start: 99, ..Default::default() };
        assert_eq!(start.check(&smollm2()).unwrap_err().violations()[0].field, "start");
    }
}
