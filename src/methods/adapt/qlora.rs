//! QLoRA (Dettmers et al. 2023, "QLoRA: efficient finetuning of quantized LLMs", arXiv 2305.14314): LoRA on
//! all linears of a base that is quantised and stays so; gradients pass through its weights to its inputs.
//!
//! This is also the memory-efficient tuning (EMEF) of INT2.1 (arXiv 2306.08162): nothing of the base is kept
//! for the backward pass, its weights are decoded a panel at a time in both directions and never whole, they
//! get no gradient, and their bytes stay as they are. With `checkpoint_activations` what is left are the base
//! as stored, 16 bytes a trained number, the inputs of the blocks and the inside of one. That holds with
//! precision f32; bf16 trades memory for speed, it packs every weight once for each direction.
//!
//! Decided here: the base may be in any quantised layout, the blocks of GGUF files or what the quantising
//! methods make, the paper's own 4-bit normal floats among them. A base that is not quantised is rounded to
//! those for the time of the training where that is asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::lora::{cost, fresh};
use super::options::{self, Usual};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build, find, finite_values};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::nn::weight::{Nf4, Weight};
use crate::proto::v1::{self, LoraStart};
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "qlora",
    title: "QLoRA",
    verb: "adapt",
    summary: "LoRA on all linears of a quantised base, which stays quantised in training.",
    paper: "QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314; the memory-efficient tuning of \
            INT2.1, arXiv 2306.08162",
    needs_calibration: false,
    families: &["decoder"],
    followed_by: &[],
};

const USUAL: Usual = Usual { all_linear: true, ..Usual::LORA };

impl Adapt for v1::Qlora {
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

    fn prepare(
        &self,
        weights: &mut BTreeMap<String, Arc<Weight>>,
        shapes: &Shapes,
    ) -> Result<Vec<String>> {
        if !self.quantise_base {
            return Ok(Vec::new());
        }
        let plan = options::plan(self.adapter.as_ref(), &USUAL, shapes)?;
        let (mut error, mut norm, mut rounded) = (0.0, 0.0, 0);
        for site in &plan.sites {
            let stored = find(weights, &site.linear)?;
            if !matches!(**stored, Weight::Dense(_)) {
                continue;
            }
            let values = finite_values(site, stored)?;
            let new = Weight::Nf4(Nf4::round(site.shape, &values)?);
            for (a, b) in new.to_f32().iter().zip(&values) {
                error += f64::from(a - b).powi(2);
                norm += f64::from(*b).powi(2);
            }
            weights.insert(site.linear.clone(), Arc::new(new));
            rounded += 1;
        }
        Ok(match rounded {
            0 => vec!["the base is quantised already; it was trained on as it is".to_owned()],
            n => vec![format!(
                "{n} linears were rounded to 4-bit normal floats for the training (relative error {:.3}); \
                 quantise the base with normal_float to serve the adapter on what it was trained on",
                (error / norm.max(f64::MIN_POSITIVE)).sqrt()
            )],
        })
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let plan = options::plan(self.adapter.as_ref(), &USUAL, setup.shapes)?;
        for site in &plan.sites {
            if let Weight::Dense(_) = **find(setup.weights, &site.linear)? {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    format!(
                        "'{}' is not quantised; quantise the model first (normal_float, gptq), set \
                         quantise_base, or take lora",
                        site.linear
                    ),
                ));
            }
        }
        build(&plan, setup, |site, _, random| fresh(site, LoraStart::Uniform, random))
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
    use super::super::testing::{Case, all_linear};
    use super::*;

    #[test]
    fn wants_a_quantised_base_and_keeps_it() {
        let method = v1::Qlora { adapter: Some(all_linear(4)), ..Default::default() };
        let error = Case::decoder().try_start(&method).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let case = Case::quantised();
        case.contract(&method, &["lora_A", "lora_B"]);
    }

    #[test]
    fn rounds_a_dense_base_for_the_training_where_asked() {
        let method = v1::Qlora { adapter: Some(all_linear(4)), quantise_base: true };
        let case = Case::decoder();
        let mut weights = case.weights().clone();
        let shapes = Shapes::of(case.model()).unwrap();
        let said = method.prepare(&mut weights, &shapes).unwrap();
        assert!(said.len() == 1 && said[0].starts_with("21 linears"), "{said:?}");
        for (name, weight) in &weights {
            let is_linear = name.contains("_proj");
            assert_eq!(matches!(**weight, Weight::Nf4(_)), is_linear, "{name}");
        }
        let before = weights.clone();
        let said = method.prepare(&mut weights, &shapes).unwrap();
        assert!(said[0].contains("already"));
        assert!(before.iter().all(|(name, weight)| Arc::ptr_eq(weight, &weights[name])));
        let plain = v1::Qlora { adapter: Some(all_linear(4)), quantise_base: false };
        assert!(plain.prepare(&mut weights, &shapes).unwrap().is_empty());
        let on = Case::with(weights);
        on.contract(&method, &["lora_A", "lora_B"]);
    }
}
