//! NOLA (Koohpayegani et al. 2023, "NOLA: compressing LoRA using linear combination of random basis", arXiv
//! 2310.02556, equation 2): `A = A0 + sum_i c_i a_i`, `B = sum_j d_j b_j` with random matrices that a seed
//! gives; only the coefficients are trained, so their number depends on neither rank nor width.
//!
//! Decided here: entries of the bases are uniform in plus and minus `1 / sqrt(count)`, `A0` is that of
//! LoRA, and the coefficients start at zero, as in the published programs for language models; the numbers
//! come from a counter (Philox), so any part can be made anew on any machine. Files of the published
//! program cannot be read: its numbers come from another generator.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use super::basis::{self, Basis, Combined};
use super::module::{Core, Factor, Module};
use super::options::{self, Plan, Site, Usual};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build};
use crate::error::{Error, Result};
use crate::methods::Card;
use crate::proto::v1;
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "nola",
    title: "NOLA",
    verb: "adapt",
    summary: "LoRA whose factors are combinations of random matrices; the coefficients are trained.",
    paper: "NOLA: Compressing LoRA using Linear Combination of Random Basis, arXiv 2310.02556",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// Most random matrices of a factor.
const MAX_BASIS: u32 = 1 << 20;

/// Numbers of random matrices of A and of B.
fn counts(options: &v1::Nola, plan: &Plan) -> Result<[usize; 2]> {
    if let Some(max) = options.max_parameters {
        if options.basis_a.is_some() || options.basis_b.is_some() {
            return Err(Error::option(
                "max_parameters",
                "stands instead of basis_a and basis_b; give one or the other",
            ));
        }
        let modules = 2 * plan.sites.len() as u64;
        let each = max / modules;
        return match u32::try_from(each) {
            Ok(each) if (1..=MAX_BASIS).contains(&each) => Ok([each as usize; 2]),
            _ => Err(Error::option(
                "max_parameters",
                format!(
                    "{max} parameters are {each} for each of {modules} factors; at least {modules} and \
                     at most {} are possible",
                    modules * u64::from(MAX_BASIS)
                ),
            )),
        };
    }
    let number = |field, value| options::number(field, value, 256, 1..=MAX_BASIS);
    let a = number("basis_a", options.basis_a)?;
    Ok([a as usize, number("basis_b", options.basis_b)? as usize])
}

fn check_bits(bits: Option<u32>) -> Result<u32> {
    match bits.unwrap_or(32) {
        bits @ (32 | 8 | 4) => Ok(bits),
        other => Err(Error::option("coefficient_bits", format!("{other} is none of 32, 8 and 4"))),
    }
}

/// A module with all coefficients zero. `key` decides the random matrices.
pub fn module(site: &Site, key: [u32; 2], [a, b]: [usize; 2]) -> Result<Module> {
    let [rows, cols] = site.shape;
    let zeros = |count| Var::zeros(count, DType::F32, &Device::Cpu);
    let combined = |basis: Basis, count| -> Result<Factor> {
        Ok(Factor::Combined(Arc::new(Combined::new(basis, zeros(count)?))))
    };
    Ok(Module {
        linear: site.linear.clone(),
        shape: site.shape,
        rank: site.rank,
        scale: site.scale(),
        rslora: site.rslora,
        a: combined(Basis::a(key, site.rank, cols, a), a)?,
        b: combined(Basis::b(key, rows, site.rank, b), b)?,
        core: Core::Identity,
        core_name: "",
        start: None,
        magnitude: None,
        ldu: None,
    })
}

/// Coefficients as codes of `bits` bits and the two numbers that give them back: `low + step * code`.
pub fn quantise(values: &[f32], bits: u32) -> (f32, f32, Vec<u8>) {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let top = f32::from((1u16 << bits.min(8)) - 1);
    let step = (high - low) / top;
    if !(step > 0.0 && step.is_finite()) {
        return (if low.is_finite() { low } else { 0.0 }, 0.0, vec![0; values.len()]);
    }
    let code = |v: &f32| ((v - low) / step).round().clamp(0.0, top) as u8;
    (low, step, values.iter().map(code).collect())
}

/// Rounds the coefficients of all modules to what is stored of them.
fn round(tuned: &Tuned, bits: u32) -> Result<()> {
    for module in tuned.modules.values() {
        for factor in [&module.a, &module.b] {
            let Factor::Combined(combined) = factor else { continue };
            let var = &combined.coefficients;
            let (low, step, codes) = quantise(&var.to_vec1::<f32>()?, bits);
            let values: Vec<f32> = codes.iter().map(|c| low + step * f32::from(*c)).collect();
            var.set(&Tensor::from_vec(values, codes.len(), &Device::Cpu)?)?;
            combined.note_grid(bits, low, step);
        }
    }
    Ok(())
}

impl Adapt for v1::Nola {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &Usual::LORA);
        if self.max_parameters.is_none() {
            self.basis_a.get_or_insert(256);
            self.basis_b.get_or_insert(256);
        }
        self.share_basis.get_or_insert(false);
        self.coefficient_bits.get_or_insert(32);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        check_bits(self.coefficient_bits)?;
        let plan = options::plan(self.adapter.as_ref(), &Usual::LORA, shapes)?;
        let [a, b] = counts(self, &plan)?;
        let parameters = (plan.sites.len() * (a + b)) as u64 + plan.whole(shapes);
        Ok(Cost { parameters, frozen: 0, warnings: plan.warnings })
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let plan = options::plan(self.adapter.as_ref(), &Usual::LORA, setup.shapes)?;
        let counts = counts(self, &plan)?;
        let shared = self.share_basis.unwrap_or_default();
        let seed = setup.random.child("basis");
        build(&plan, setup, |site, _, _| {
            let [rows, cols] = site.shape;
            let name = match shared {
                true => format!("{}/{rows} x {cols}", seed.path()),
                false => format!("{}/{}", seed.path(), site.linear),
            };
            module(site, basis::key(&name), counts)
        })
    }

    fn hooks(&self, _: &Tuned, _: u64) -> Result<Option<Box<dyn Hooks>>> {
        Ok(None)
    }

    fn finish(&self, tuned: Tuned) -> Result<Tuned> {
        let bits = check_bits(self.coefficient_bits)?;
        if bits < 32 {
            round(&tuned, bits)?;
        }
        Ok(tuned)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::export;
    use super::super::shapes::testing::{minilm, smollm2};
    use super::super::testing::{Case, all_linear};
    use super::*;
    use crate::formats::peft::Use;
    use crate::formats::peft::contents::Contents;
    use crate::nn::linalg::{self, from_rows};

    fn small(adapter: v1::AdapterOptions) -> v1::Nola {
        v1::Nola {
            adapter: Some(adapter),
            basis_a: Some(6),
            basis_b: Some(5),
            ..Default::default()
        }
    }

    #[test]
    fn zero_coefficients_equal_the_base_and_the_contract_holds() {
        let method = small(all_linear(3));
        for case in [Case::decoder(), Case::encoder()] {
            case.equals_base(&case.start(&method), 0.0);
            case.contract(&method, &["nola_A", "nola_B"]);
        }
    }

    #[test]
    fn counts_are_those_of_the_card() {
        let count = |k, shapes: &Shapes| {
            let method = v1::Nola { basis_a: Some(k), basis_b: Some(k), ..Default::default() };
            method.check(shapes).unwrap().parameters
        };
        assert_eq!(count(240, &smollm2()), 28_800);
        assert_eq!(count(192, &minilm()), 4_608);
        assert_eq!(count(96, &minilm()), 2_304);
        let budget = |max| v1::Nola { max_parameters: Some(max), ..Default::default() };
        assert_eq!(budget(4_700).check(&minilm()).unwrap().parameters, 12 * 2 * 195);
        let error = budget(23).check(&minilm()).unwrap_err();
        assert!(error.message().contains("at least 24"), "{error}");
        let both = v1::Nola { basis_a: Some(2), ..budget(4_700) };
        assert!(both.check(&minilm()).is_err());
        let bits = v1::Nola { coefficient_bits: Some(7), ..Default::default() };
        assert_eq!(bits.check(&minilm()).unwrap_err().violations()[0].field, "coefficient_bits");
        let none = v1::Nola { basis_b: Some(0), ..Default::default() };
        assert_eq!(none.check(&minilm()).unwrap_err().violations()[0].field, "basis_b");
    }

    #[test]
    fn shapes_share_their_matrices_when_asked() {
        let case = Case::decoder();
        let keys = |share| {
            let method = v1::Nola { share_basis: Some(share), ..small(all_linear(2)) };
            let tuned = case.start(&method);
            let key = |m: &Module| match &m.a {
                Factor::Combined(combined) => combined.basis.key,
                Factor::Plain(_) => panic!("combined"),
            };
            let mut keys: Vec<_> = tuned.modules.values().map(key).collect();
            keys.sort_unstable();
            keys.dedup();
            keys.len()
        };
        // Three layers of seven linears; k and v have one shape, gate and up another.
        assert_eq!(keys(false), 21);
        assert_eq!(keys(true), 5);
    }

    /// With as many matrices as a factor has elements, any pair of factors can be reached.
    #[test]
    fn enough_matrices_span_every_factor() {
        let (rank, inputs, outputs) = (2, 5, 6);
        for basis in [
            Basis::a([1, 2], rank, inputs, rank * inputs),
            Basis::b([1, 2], outputs, rank, outputs * rank),
        ] {
            let n = basis.count;
            let start = basis.combine(&vec![0.0; n]);
            let mut columns = vec![0.0; n * n];
            for i in 0..n {
                let mut c = vec![0.0; n];
                c[i] = 1.0;
                for (e, v) in basis.combine(&c).iter().zip(&start).map(|(v, s)| v - s).enumerate() {
                    columns[e * n + i] = v;
                }
            }
            let wanted: Vec<f32> = (0..n).map(|e| (e as f32 * 1.7).sin()).collect();
            let m = from_rows(&columns, n, n);
            // Least squares through the normal equations.
            let inverse =
                linalg::inverse(linalg::product(m.transpose(), m.as_ref()).as_ref()).unwrap();
            let target: Vec<f32> = wanted.iter().zip(&start).map(|(w, s)| w - s).collect();
            let right = linalg::product(m.transpose(), from_rows(&target, n, 1).as_ref());
            let c = linalg::to_rows(linalg::product(inverse.as_ref(), right.as_ref()).as_ref());
            for (got, want) in basis.combine(&c).iter().zip(&wanted) {
                assert!((got - want).abs() < 1e-4, "{got} is not {want}");
            }
        }
    }

    #[test]
    fn coefficients_are_rounded_by_no_more_than_half_a_step() {
        let values: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        for bits in [8, 4] {
            let (low, step, codes) = quantise(&values, bits);
            for (v, c) in values.iter().zip(&codes) {
                assert!((v - (low + step * f32::from(*c))).abs() <= 0.5001 * step);
                assert!(u32::from(*c) < 1 << bits);
            }
        }
        assert_eq!(quantise(&[2.5, 2.5], 8), (2.5, 0.0, vec![0, 0]));
        let case = Case::decoder();
        let method = v1::Nola { coefficient_bits: Some(4), ..small(all_linear(2)) };
        let tuned = case.start(&method);
        case.disturb(&tuned, 1.0);
        let tuned = method.finish(tuned).unwrap();
        for values in tuned.values().unwrap().values() {
            let mut distinct = values.clone();
            distinct.sort_by(f32::total_cmp);
            distinct.dedup();
            assert!(distinct.len() <= 16);
        }
    }

    #[test]
    fn the_rank_of_the_addition_is_bounded() {
        let case = Case::decoder();
        let tuned = case.start(&small(all_linear(2)));
        case.disturb(&tuned, 1.0);
        let (name, stored) = case.some_linear();
        let mut delta = vec![0.0; stored.rows() * stored.cols()];
        tuned.modules[name].low_rank().unwrap().add_to(&mut delta);
        let delta = from_rows(&delta, stored.rows(), stored.cols());
        let s = linalg::svd(delta.as_ref(), "delta").unwrap().s;
        assert!(s[1] > 1e-3 && s[2] < 1e-6 * s[0], "{s:?}");
    }

    /// A and B with all coefficients 1.
    fn ones(tuned: &Tuned, linear: &str) -> [Vec<f32>; 2] {
        let module = &tuned.modules[linear];
        [&module.a, &module.b].map(|factor| match factor {
            Factor::Combined(combined) => combined.basis.combine(&vec![1.0; combined.basis.count]),
            Factor::Plain(_) => panic!("combined"),
        })
    }

    #[test]
    fn random_matrices_follow_from_the_seed_and_the_name_alone() {
        let case = Case::decoder();
        let (name, _) = case.some_linear();
        let start = |options, seed| case.start_seeded(&small(options), seed).unwrap();
        let first = start(all_linear(3), 1);
        assert_eq!(ones(&first, name), ones(&start(all_linear(3), 1), name));
        assert_ne!(ones(&first, name), ones(&start(all_linear(3), 2), name));
        // Other targets do not shift them.
        let few = v1::AdapterOptions { targets: vec!["q_proj".into()], ..all_linear(3) };
        let few = start(few, 1);
        assert_eq!(few.modules.len(), 3);
        assert_eq!(ones(&first, name), ones(&few, name));
        let other = name.replace("layers.1", "layers.0");
        assert!(other != name && ones(&first, name) != ones(&first, &other));
    }

    #[test]
    fn at_the_start_the_coefficients_of_b_can_learn() {
        let case = Case::decoder();
        let tuned = case.start(&small(all_linear(3)));
        let (name, stored) = case.some_linear();
        let module = &tuned.modules[name];
        assert!(module.a.values().unwrap().iter().any(|v| *v != 0.0), "A starts from a matrix");
        assert!(module.b.values().unwrap().iter().all(|v| *v == 0.0));
        let y = module.forward(&case.inputs(name, 3), stored, None).unwrap();
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for (kind, var) in module.trained() {
            let got = gradients.get(var).unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(got.iter().all(|g| *g != 0.0), kind == "nola_B", "{kind}: {got:?}");
            assert_eq!(got.iter().all(|g| *g == 0.0), kind == "nola_A", "{kind}: {got:?}");
        }
    }

    #[test]
    fn exports_are_the_same_factors() {
        let case = Case::decoder();
        let tuned = case.start(&small(all_linear(3)));
        case.disturb(&tuned, 1.0);
        let none = BTreeMap::new();
        let about = export::About {
            shapes: case.shapes(),
            base: "base",
            task: "CAUSAL_LM",
            inside: "",
            heads: &none,
        };
        let files = export::peft(&tuned, &about).unwrap();
        let contents = Contents::parse(&files.config, &files.tensors, Use::Keep).unwrap();
        let (loaded, _) = export::load(&contents, "", case.shapes(), case.weights()).unwrap();
        for (name, module) in &tuned.modules {
            let other = &loaded.modules[name];
            assert_eq!(other.rank, 3);
            assert_eq!(other.a.values().unwrap(), module.a.values().unwrap(), "{name}");
            assert_eq!(other.b.values().unwrap(), module.b.values().unwrap(), "{name}");
        }
        for (got, want) in case.outputs(&loaded).iter().zip(case.outputs(&tuned)) {
            assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} is not {want}");
        }
    }

    #[test]
    fn ranks_that_are_of_no_use_are_warned_of_and_counts_of_none_refused() {
        let wide = v1::Nola { adapter: Some(all_linear(200)), ..Default::default() };
        let warnings = wide.check(&smollm2()).unwrap().warnings;
        assert!(warnings.len() == 1 && warnings[0].contains("200"), "{warnings:?}");
        let none = v1::Nola { basis_a: Some(0), ..Default::default() };
        assert_eq!(none.check(&minilm()).unwrap_err().violations()[0].field, "basis_a");
        // As large as is said, with both counts as they are by default.
        let usual = v1::Nola::default().check(&minilm()).unwrap().parameters;
        assert_eq!(usual, 12 * 2 * 256);
    }
}
