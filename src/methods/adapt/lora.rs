//! LoRA (Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv 2106.09685, equation
//! 3): `y = W x + s B A x`, `A` random, `B` zero, `s = alpha / r`, or `alpha / sqrt(r)` (rsLoRA, Kalajdzievski
//! 2023, arXiv 2312.03732).

use std::sync::Arc;

use candle_core::Tensor;

use super::module::{Core, Factor, Module, Part, Start};
use super::options::{self, Plan, Site, Usual};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build, normal, uniform};
use crate::error::Result;
use crate::methods::Card;
use crate::nn::weight::Weight;
use crate::proto::v1::{self, LoraStart};
use crate::seed::Stream;
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "lora",
    title: "LoRA",
    verb: "adapt",
    summary: "Trains a product of two narrow matrices beside each chosen linear; the base stays.",
    paper: "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// A module of two trained factors and nothing else.
pub fn plain(site: &Site, a: Vec<f32>, b: Vec<f32>) -> Result<Module> {
    let [rows, cols] = site.shape;
    Ok(Module {
        linear: site.linear.clone(),
        shape: site.shape,
        rank: site.rank,
        scale: site.scale(),
        rslora: site.rslora,
        a: Factor::Plain(Part::trained(a, &[site.rank, cols])?),
        b: Factor::Plain(Part::trained(b, &[rows, site.rank])?),
        core: Core::Identity,
        core_name: "",
        start: None,
        magnitude: None,
        ldu: None,
    })
}

/// A module of two trained factors whose product at the start is subtracted: what papers write as a
/// changed base.
pub fn residual(site: &Site, a: Vec<f32>, b: Vec<f32>) -> Result<Module> {
    let fixed = |part: &Factor| -> Result<Tensor> { Ok(part.tensor()?.copy()?.detach()) };
    let mut module = plain(site, a, b)?;
    module.start = Some(Start::Factors { a: fixed(&module.a)?, b: fixed(&module.b)? });
    Ok(module)
}

/// A zero product: `A` as `start` says, `B` zero.
pub fn fresh(site: &Site, start: LoraStart, random: &Stream) -> Result<Module> {
    let [rows, cols] = site.shape;
    let (rng, count) = (&mut random.rng(), site.rank * cols);
    let a = match start {
        LoraStart::Unspecified | LoraStart::Uniform => {
            uniform(rng, count, 1.0 / (cols as f32).sqrt())
        }
        LoraStart::Gaussian => normal(rng, count, 1.0 / site.rank as f64),
    };
    plain(site, a, vec![0.0; rows * site.rank])
}

/// What two trained factors cost.
pub fn cost(plan: Plan, shapes: &Shapes) -> Cost {
    Cost { parameters: plan.factors() + plan.whole(shapes), frozen: 0, warnings: plan.warnings }
}

impl Adapt for v1::Lora {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        options::resolve(&mut self.adapter, &Usual::LORA);
        if self.start == LoraStart::Unspecified as i32 {
            self.start = LoraStart::Uniform as i32;
        }
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        options::choice::<LoraStart>("start", self.start)?;
        Ok(cost(options::plan(self.adapter.as_ref(), &Usual::LORA, shapes)?, shapes))
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let start = options::choice("start", self.start)?;
        let plan = options::plan(self.adapter.as_ref(), &Usual::LORA, setup.shapes)?;
        build(&plan, setup, |site, _: &Arc<Weight>, random| fresh(site, start, random))
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
    use super::super::basis;
    use super::super::shapes::testing::{minilm, smollm2};
    use super::super::testing::{Case, all_linear};
    use super::*;
    use crate::nn::tuning::Tuning;
    use crate::nn::weight::product;

    #[test]
    fn counts_are_those_of_the_card() {
        let lora = |r| v1::Lora { adapter: Some(all_linear(r)), ..Default::default() };
        assert_eq!(lora(1).check(&smollm2()).unwrap().parameters, 305_280);
        assert_eq!(lora(8).check(&smollm2()).unwrap().parameters, 2_442_240);
        assert_eq!(lora(8).check(&minilm()).unwrap().parameters, 331_776);
        let usual = v1::Lora { adapter: None, ..Default::default() };
        assert_eq!(usual.check(&smollm2()).unwrap().parameters, 8 * 57_600);
        assert_eq!(usual.check(&minilm()).unwrap().parameters, 8 * 9_216);
    }

    #[test]
    fn starts_as_the_base_with_the_spread_of_the_paper() {
        for start in [LoraStart::Uniform, LoraStart::Gaussian] {
            let method = v1::Lora { adapter: Some(all_linear(4)), start: start as i32 };
            let case = Case::decoder();
            let tuned = case.start(&method);
            case.equals_base(&tuned, 0.0);
            for module in tuned.modules.values() {
                let (a, cols) = (module.a.values().unwrap(), module.shape[1] as f32);
                let square = a.iter().map(|v| v * v).sum::<f32>() / a.len() as f32;
                match start {
                    LoraStart::Gaussian => assert!((square.sqrt() - 0.25).abs() < 0.1),
                    _ => {
                        assert!(a.iter().all(|v| v.abs() <= 1.0 / cols.sqrt()));
                        assert!((square * 3.0 * cols - 1.0).abs() < 0.4, "{square}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_shared_contract() {
        let method = v1::Lora { adapter: Some(all_linear(4)), ..Default::default() };
        Case::decoder().contract(&method, &["lora_A", "lora_B"]);
        Case::encoder().contract(&method, &["lora_A", "lora_B"]);
        let rslora = v1::AdapterOptions { rslora: Some(true), alpha: Some(3.0), ..all_linear(4) };
        let method = v1::Lora { adapter: Some(rslora), ..Default::default() };
        Case::decoder().contract(&method, &["lora_A", "lora_B"]);
    }

    #[test]
    fn dropout_acts_on_the_adapters_input_alone_and_in_training_alone() {
        let options = v1::AdapterOptions { dropout: Some(0.5), ..all_linear(4) };
        let case = Case::decoder();
        let tuned = case.start(&v1::Lora { adapter: Some(options), ..Default::default() });
        tuned.set_pass(Some(1));
        // B is zero: the base's product is whole, whatever is dropped.
        case.equals_base(&tuned, 0.0);
        case.disturb(&tuned, 0.1);
        let (name, stored) = case.some_linear();
        let x = case.inputs(name, 4);
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let change = tuned.low_rank(name).unwrap().unwrap();
        let seen = basis::dropout(&x, change.dropout.expect("a training")).unwrap();
        assert!(flat(&seen).contains(&0.0) && flat(&seen) != flat(&x));
        let inner = seen.matmul(&change.a.t().unwrap()).unwrap();
        let added = (inner.matmul(&change.b.t().unwrap()).unwrap() * change.scale).unwrap();
        let base = flat(&product(&x, stored).unwrap());
        let got = flat(&tuned.linear(name, &x, stored).unwrap().unwrap());
        for ((got, base), added) in got.iter().zip(base).zip(flat(&added)) {
            assert!((got - (base + added)).abs() < 1e-5, "{got} is not {base} + {added}");
        }
        tuned.set_pass(None);
        assert!(tuned.low_rank(name).unwrap().unwrap().dropout.is_none());
    }
}
