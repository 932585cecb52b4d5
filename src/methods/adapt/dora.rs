//! DoRA (Liu et al. 2024, "DoRA: weight-decomposed low-rank adaptation", arXiv 2402.09353, equations 5, 6
//! and 11): `W' = m / |W + s B A| (W + s B A)` by output rows, with the norm as a constant in the backward
//! pass. The magnitudes start as the norms of the base's rows, so training starts from the base.

use super::lora::{cost, fresh};
use super::module::{Magnitude, row_squares};
use super::options::{self, Usual};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build, finite_values};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::proto::v1::{self, LoraStart};
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "dora",
    title: "DoRA",
    verb: "adapt",
    summary: "LoRA on the direction of each weight row, and a trained magnitude for each row.",
    paper: "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

impl Adapt for v1::Dora {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &Usual::LORA);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        let plan = options::plan(self.adapter.as_ref(), &Usual::LORA, shapes)?;
        let magnitudes: u64 = plan.sites.iter().map(|site| site.shape[0] as u64).sum();
        let lora = cost(plan, shapes);
        Ok(Cost { parameters: lora.parameters + magnitudes, ..lora })
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let plan = options::plan(self.adapter.as_ref(), &Usual::LORA, setup.shapes)?;
        build(&plan, setup, |site, stored, random| {
            finite_values(site, stored)?;
            let squares = row_squares(stored);
            if squares.contains(&0.0) {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    format!(
                        "'{}' has a row of zeros, which has no direction to tune; leave it out with \
                         adapter.exclude",
                        site.linear
                    ),
                ));
            }
            let norms = squares.iter().map(|s| s.sqrt() as f32).collect();
            let mut module = fresh(site, LoraStart::Uniform, random)?;
            module.magnitude = Some(Magnitude::new(norms, stored, squares)?);
            Ok(module)
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
    use candle_core::{Device, Tensor};

    use super::super::shapes::testing::smollm2;
    use super::super::testing::{Case, all_linear};
    use super::*;
    use crate::nn::tuning::Tuning;

    #[test]
    fn the_shared_contract_and_counts() {
        let method = v1::Dora { adapter: Some(all_linear(3)) };
        Case::decoder().contract(&method, &["lora_A", "lora_B", "lora_magnitude_vector"]);
        Case::quantised().contract(&method, &["lora_A", "lora_B", "lora_magnitude_vector"]);
        let rows = 576 + 2 * 192 + 576 + 2 * 1536 + 576;
        let method = v1::Dora { adapter: Some(all_linear(8)) };
        let count = method.check(&smollm2()).unwrap().parameters;
        assert_eq!(count, 8 * 305_280 + 30 * rows);
    }

    /// With the norm held, the gradient of the magnitude is that of a plain factor, and the gradients of
    /// A and B have no part through the norm.
    #[test]
    fn gradients_hold_the_norm() {
        let case = Case::decoder();
        let tuned = case.start(&v1::Dora { adapter: Some(all_linear(2)) });
        case.disturb(&tuned, 0.2);
        let (name, stored) = case.some_linear();
        let module = &tuned.modules[name];
        let x = case.inputs(name, 5);
        let weights = Tensor::randn(0f32, 1.0, (5, stored.rows()), &Device::Cpu).unwrap();
        let y = tuned.linear(name, &x, stored).unwrap().unwrap();
        let loss = (y * &weights).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        // The norms as they stand, from the merged weight: |merged row| = m.
        let merged = module.merged(stored).unwrap();
        let magnitude = module.magnitude.as_ref().unwrap().values.values().unwrap();
        for (row, m) in merged.chunks(stored.cols()).zip(&magnitude) {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            assert!((norm - m.abs()).abs() < 1e-4 * m.abs(), "{norm} is not {m}");
        }
        let held: Vec<f32> = {
            let mut plain = stored.to_f32();
            module.low_rank_part().unwrap().add_to(&mut plain);
            plain
                .chunks(stored.cols())
                .map(|r| r.iter().map(|v| v * v).sum::<f32>().sqrt())
                .collect()
        };
        let value = || {
            let mut plain = stored.to_f32();
            module.low_rank_part().unwrap().add_to(&mut plain);
            let m = module.magnitude.as_ref().unwrap().values.values().unwrap();
            for (row, (m, n)) in plain.chunks_mut(stored.cols()).zip(m.iter().zip(&held)) {
                row.iter_mut().for_each(|v| *v *= m / n);
            }
            let w = Tensor::from_vec(plain, stored.shape(), &Device::Cpu).unwrap();
            let y = super::super::module::whole(&x, &w).unwrap();
            f64::from((y * &weights).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap())
        };
        for (kind, var) in module.trained() {
            let got = gradients.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let at = got.len() / 2;
            let original = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let moved = |by: f32| {
                let mut values = original.clone();
                values[at] += by;
                var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
                let value = value();
                let back = Tensor::from_vec(original.clone(), var.shape(), &Device::Cpu).unwrap();
                var.set(&back).unwrap();
                value
            };
            let want = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            let got = f64::from(got[at]);
            assert!((got - want).abs() < 1e-3 * want.abs().max(1.0), "{kind}: {got} is not {want}");
        }
    }

    #[test]
    fn starts_as_the_base_with_the_norms_of_its_rows() {
        let method = v1::Dora { adapter: Some(all_linear(3)) };
        for case in [Case::decoder(), Case::encoder(), Case::quantised()] {
            let tuned = case.start(&method);
            case.equals_base(&tuned, 1e-5);
            for (name, module) in &tuned.modules {
                let stored = case.stored(name);
                let magnitudes = module.magnitude.as_ref().unwrap().values.values().unwrap();
                assert_eq!(magnitudes.len(), stored.rows(), "{name}");
                // Of rows of the output, not of columns.
                for (row, m) in stored.to_f32().chunks(stored.cols()).zip(magnitudes) {
                    let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                    assert!((f64::from(m) - norm).abs() < 1e-5 * norm, "{name}: {m} is not {norm}");
                }
            }
        }
    }
}
