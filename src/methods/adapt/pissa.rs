//! PiSSA (Meng et al. 2024, "PiSSA: principal singular values and singular vectors adaptation", arXiv
//! 2404.02948, equations 2 to 4): the factors start as the `r` largest singular components of the weight,
//! `A = sqrt(S / s) V^T`, `B = U sqrt(S / s)`, and the base keeps the rest.
//!
//! Decided here: the base is not changed; the product at the start is subtracted instead, which is the
//! same function and leaves quantised bases as they are.

use super::lora::{cost, residual};
use super::module::Module;
use super::options::{self, Site, Usual};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build, finite_values};
use crate::error::Result;
use crate::methods::Card;
use crate::nn::linalg::{self, Svd};
use crate::proto::v1;
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "pissa",
    title: "PiSSA",
    verb: "adapt",
    summary: "LoRA that starts from the largest singular directions of each weight.",
    paper: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, \
            arXiv 2404.02948",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

const USUAL: Usual = Usual { fits: true, ..Usual::LORA };

/// A module that starts from the components `at` of `u diag(s) v^T`, `v` of any norm: each factor takes
/// the root of its share of the size.
pub fn components(site: &Site, svd: &Svd, at: std::ops::Range<usize>) -> Result<Module> {
    let root: Vec<f64> = svd.s[at.clone()].iter().map(|s| (s / site.scale()).sqrt()).collect();
    let ([rows, cols], first) = (site.shape, at.start);
    let mut a = Vec::with_capacity(at.len() * cols);
    for (i, root) in root.iter().enumerate() {
        a.extend((0..cols).map(|c| (root * svd.v[(c, first + i)]) as f32));
    }
    let mut b = Vec::with_capacity(rows * at.len());
    for r in 0..rows {
        b.extend(root.iter().enumerate().map(|(i, root)| (root * svd.u[(r, first + i)]) as f32));
    }
    residual(site, a, b)
}

impl Adapt for v1::Pissa {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &USUAL);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        let plan = options::plan(self.adapter.as_ref(), &USUAL, shapes)?;
        let frozen = plan.factors();
        Ok(Cost { frozen, ..cost(plan, shapes) })
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let plan = options::plan(self.adapter.as_ref(), &USUAL, setup.shapes)?;
        build(&plan, setup, |site, stored, _| {
            let [rows, cols] = site.shape;
            let w = linalg::from_rows(&finite_values(site, stored)?, rows, cols);
            components(site, &linalg::svd(w.as_ref(), &site.linear)?, 0..site.rank)
        })
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
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::super::export;
    use super::super::shapes::testing::smollm2;
    use super::super::testing::{Case, all_linear};
    use super::*;
    use crate::formats::peft::Use;
    use crate::formats::peft::contents::Contents;

    #[test]
    fn the_shared_contract() {
        let method = v1::Pissa { adapter: Some(all_linear(4)) };
        for case in [Case::decoder(), Case::encoder(), Case::quantised()] {
            let tuned = case.start(&method);
            // The start is subtracted inside one product, so it cancels up to rounding.
            case.equals_base(&tuned, 1e-6);
            case.contract(&method, &["lora_A", "lora_B"]);
        }
    }

    #[test]
    fn the_residual_form_of_the_paper_is_the_same_function() {
        let options = v1::AdapterOptions { alpha: Some(10.0), ..all_linear(4) };
        let method = v1::Pissa { adapter: Some(options) };
        let case = Case::decoder();
        let tuned = case.start(&method);
        let (name, stored) = case.some_linear();
        let module = &tuned.modules[name];
        let plain = || {
            let mut plain = module.clone();
            plain.start = None;
            plain.low_rank().unwrap()
        };
        // The best approximation of its rank: what is left has no component as large as those taken.
        let mut rest = stored.to_f32();
        let mut taken = plain();
        taken.scale = -taken.scale;
        taken.add_to(&mut rest);
        let svd = |values: &[f32]| {
            let w = linalg::from_rows(values, stored.rows(), stored.cols());
            linalg::svd(w.as_ref(), "w").unwrap().s
        };
        let (all, left) = (svd(&stored.to_f32()), svd(&rest));
        for (want, got) in all[4..].iter().zip(&left) {
            assert!((want - got).abs() < 1e-4, "{got} is not {want}");
        }
        // W - s B0 A0 + s B A, with B and A as they come from training.
        case.disturb(&tuned, 0.1);
        plain().add_to(&mut rest);
        for (got, want) in module.merged(stored).unwrap().iter().zip(&rest) {
            assert!((got - want).abs() < 1e-5, "{got} is not {want}");
        }
        let exported = module.low_rank().unwrap();
        assert_eq!((exported.rank, exported.alpha()), (8, 20.0));
    }

    /// The rank doubles, and alpha with it; where alpha is divided by the root of the rank, it grows by the
    /// root of 2.
    #[test]
    fn exports_of_twice_the_rank_keep_their_scale_under_the_root_too() {
        let options = v1::AdapterOptions {
            alpha: Some(10.0),
            rslora: Some(true),
            alpha_pattern: [("v_proj".to_owned(), 3.0)].into(),
            ..all_linear(4)
        };
        let method = v1::Pissa { adapter: Some(options) };
        let case = Case::decoder();
        let tuned = case.start(&method);
        case.equals_base(&tuned, 1e-5);
        for (name, module) in &tuned.modules {
            let low = module.low_rank().unwrap();
            let alpha = if name.contains("v_proj") { 3.0 } else { 10.0 };
            assert_eq!((low.rank, low.scale), (8, alpha / 2.0), "{name}");
            assert!((low.alpha() - alpha * 2_f64.sqrt()).abs() < 1e-9, "{name}: {}", low.alpha());
            // What was taken out of the weight at the start is what is added.
            let mut delta = vec![0.0; low.shape[0] * low.shape[1]];
            low.add_to(&mut delta);
            assert!(delta.iter().all(|d| d.abs() < 1e-9), "{name}");
        }
        case.disturb(&tuned, 0.1);
        let none = BTreeMap::new();
        let about = export::About {
            shapes: case.shapes(),
            base: "base",
            task: "CAUSAL_LM",
            inside: "",
            heads: &none,
        };
        let files = export::peft(&tuned, &about).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&files.config).unwrap();
        assert_eq!((&config["r"], &config["use_rslora"]), (&json!(8), &json!(true)));
        assert_eq!(config["init_lora_weights"], true, "the base is the one that everyone has");
        let contents = Contents::parse(&files.config, &files.tensors, Use::Keep).unwrap();
        let (loaded, _) = export::load(&contents, "", case.shapes(), case.weights()).unwrap();
        for (got, want) in case.outputs(&loaded).iter().zip(case.outputs(&tuned)) {
            assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{got} is not {want}");
        }
    }

    #[test]
    fn ranks_that_a_weight_does_not_have_are_refused() {
        // The narrowest linears have 192 rows.
        let check = |r| v1::Pissa { adapter: Some(all_linear(r)) }.check(&smollm2());
        assert!(check(192).is_ok());
        let error = check(193).unwrap_err();
        assert_eq!(error.violations()[0].field, "adapter.r");
        assert!(error.message().contains("k_proj") && error.message().contains("192"), "{error}");
    }
}
