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
//! methods make; the paper's own number format is not among them.

use super::lora::{cost, fresh};
use super::options::{self, Usual};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup, build, find};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::nn::weight::Weight;
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
                        "'{}' is not quantised; quantise the model first (round_to_nearest, gptq), or \
                         take lora",
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
        let method = v1::Qlora { adapter: Some(all_linear(4)) };
        let error = Case::decoder().try_start(&method).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let case = Case::quantised();
        case.contract(&method, &["lora_A", "lora_B"]);
    }
}
