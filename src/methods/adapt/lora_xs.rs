//! LoRA-XS (Bałazy et al. 2024, "LoRA-XS: low-rank adaptation with extremely small number of parameters",
//! arXiv 2405.17604, equation 2): `y = W x + s B R A x` with `B = U_r`, `A = S_r V_r^T` of the weight's
//! singular value decomposition, both frozen; only `R` `[r, r]` is trained, from nearly zero.

use super::module::{Core, Factor, Module, Part};
use super::options::{self, Plan, Site, Usual};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build, finite_values, normal};
use crate::error::Result;
use crate::methods::Card;
use crate::nn::linalg;
use crate::proto::v1;
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "lora_xs",
    title: "LoRA-XS",
    verb: "adapt",
    summary: "Trains an r x r matrix between frozen singular directions of each weight.",
    paper: "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv 2405.17604",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// Of methods that train an `[r, r]` matrix.
pub const USUAL: Usual = Usual { rank: Some(16), alpha: None, all_linear: true, fits: true };

/// Deviation of the matrix at the start.
const DEVIATION: f64 = 1e-5;

/// A module with frozen factors and a trained matrix between them.
pub fn between(
    site: &Site,
    scale: f64,
    a: Vec<f32>,
    b: Vec<f32>,
    core: Vec<f32>,
) -> Result<Module> {
    let ([rows, cols], rank) = (site.shape, site.rank);
    Ok(Module {
        linear: site.linear.clone(),
        shape: site.shape,
        rank,
        scale,
        rslora: site.rslora,
        a: Factor::Plain(Part::fixed(a, &[rank, cols])?),
        b: Factor::Plain(Part::fixed(b, &[rows, rank])?),
        core: Core::Matrix(Part::trained(core, &[rank, rank])?),
        core_name: "lora_R",
        start: None,
        magnitude: None,
        ldu: None,
    })
}

/// `r^2` trained elements a module; the factors are frozen.
pub fn cost(plan: Plan, shapes: &Shapes) -> Cost {
    let squares: u64 = plan.sites.iter().map(|site| (site.rank * site.rank) as u64).sum();
    let parameters = squares + plan.whole(shapes);
    Cost { parameters, frozen: plan.factors(), warnings: plan.warnings }
}

impl Adapt for v1::LoraXs {
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
        Ok(cost(options::plan(self.adapter.as_ref(), &USUAL, shapes)?, shapes))
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let plan = options::plan(self.adapter.as_ref(), &USUAL, setup.shapes)?;
        build(&plan, setup, |site, stored, random| {
            let ([rows, cols], rank) = (site.shape, site.rank);
            let w = linalg::from_rows(&finite_values(site, stored)?, rows, cols);
            let svd = linalg::svd(w.as_ref(), &site.linear)?;
            let a = (0..rank * cols)
                .map(|at| (svd.s[at / cols] * svd.v[(at % cols, at / cols)]) as f32)
                .collect();
            let b = (0..rows * rank).map(|at| svd.u[(at / rank, at % rank)] as f32).collect();
            let core = normal(&mut random.rng(), rank * rank, DEVIATION);
            between(site, site.scale(), a, b, core)
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
    use super::super::shapes::testing::{minilm, smollm2};
    use super::super::testing::{Case, all_linear};
    use super::*;

    #[test]
    fn starts_near_the_base_and_keeps_the_contract() {
        let method = v1::LoraXs { adapter: Some(all_linear(4)) };
        for case in [Case::decoder(), Case::encoder()] {
            case.equals_base(&case.start(&method), 1e-3);
            case.contract(&method, &["lora_R"]);
        }
    }

    #[test]
    fn counts_are_those_of_the_cards() {
        let xs = |r| v1::LoraXs { adapter: Some(all_linear(r)) };
        // LoRA-SB's card: r 16 on MiniLM and r 16 and 24 on SmolLM2, the same form.
        assert_eq!(xs(16).check(&minilm()).unwrap().parameters, 9_216);
        assert_eq!(xs(16).check(&smollm2()).unwrap().parameters, 53_760);
        assert_eq!(xs(24).check(&smollm2()).unwrap().parameters, 120_960);
        // LoLDU's card: r 19 on MiniLM.
        assert_eq!(xs(19).check(&minilm()).unwrap().parameters, 12_996);
        let default = v1::LoraXs { adapter: None };
        assert_eq!(default.check(&minilm()).unwrap().parameters, 9_216);
    }

    #[test]
    fn a_diagonal_core_of_ones_scales_the_weights_own_components() {
        // With R = I, s B R A is the weight's best approximation of rank r.
        let case = Case::decoder();
        let tuned = case.start(&v1::LoraXs { adapter: Some(all_linear(5)) });
        let (name, stored) = case.some_linear();
        let module = &tuned.modules[name];
        let identity =
            candle_core::Tensor::eye(5, candle_core::DType::F32, &candle_core::Device::Cpu);
        module.trained()[0].1.set(&identity.unwrap()).unwrap();
        let mut rest = stored.to_f32();
        let mut taken = module.low_rank().unwrap();
        taken.scale = -1.0;
        taken.add_to(&mut rest);
        let spectrum = |values: &[f32]| {
            let w = linalg::from_rows(values, stored.rows(), stored.cols());
            linalg::svd(w.as_ref(), "w").unwrap().s
        };
        let (all, left) = (spectrum(&stored.to_f32()), spectrum(&rest));
        assert!((all[5] - left[0]).abs() < 1e-4, "{} is not {}", left[0], all[5]);
    }

    #[test]
    fn the_matrix_starts_with_the_deviation_of_the_paper_and_ranks_must_fit() {
        let tuned = Case::decoder().start(&v1::LoraXs { adapter: Some(all_linear(8)) });
        let values = tuned.values().unwrap();
        let all: Vec<f32> = values.into_values().flatten().collect();
        assert_eq!(all.len(), 21 * 64);
        let square = all.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / all.len() as f64;
        assert!((square.sqrt() / 1e-5 - 1.0).abs() < 0.15, "{}", square.sqrt());
        let wide = v1::LoraXs { adapter: Some(all_linear(193)) };
        assert_eq!(wide.check(&smollm2()).unwrap_err().violations()[0].field, "adapter.r");
    }
}
