//! Full fine-tuning: every tensor of the base is trained, or those of some modules.

use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::proto::v1;
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "full",
    title: "Full tuning",
    verb: "adapt",
    summary: "Trains all weights; the result is a model, not an adapter.",
    paper: "none: the usual way, to compare with",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// The tensors of the modules called `modules` (all when empty) that `wanted` accepts, in order.
pub fn tensors(
    modules: &[String],
    shapes: &Shapes,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<String>> {
    let mut names: Vec<String> = if modules.is_empty() {
        shapes.tensors.keys().cloned().collect()
    } else {
        let mut names = Vec::new();
        for module in modules {
            let found = shapes.saved(module);
            if found.is_empty() {
                return Err(Error::at(
                    Reason::TensorNotFound,
                    "modules",
                    format!(
                        "the model has no module '{module}'; name parts of its modules, '{}' for instance",
                        shapes.modules().first().copied().unwrap_or_default()
                    ),
                ));
            }
            names.extend(found.into_iter().map(str::to_owned));
        }
        names
    };
    names.retain(|name| wanted(name));
    names.sort();
    names.dedup();
    Ok(names)
}

/// What training tensors whole costs.
pub fn cost(names: &[String], shapes: &Shapes) -> Cost {
    let parameters = names.iter().map(|name| shapes.elements(name)).sum();
    Cost { parameters, frozen: 0, warnings: Vec::new() }
}

impl Adapt for v1::FullTuning {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {}

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        Ok(cost(&tensors(&self.modules, shapes, |_| true)?, shapes))
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let names = tensors(&self.modules, setup.shapes, |_| true)?;
        let mut tuned = Tuned::new(0.0, setup.random.path());
        tuned.add_whole(names.iter(), setup.weights)?;
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
    use super::super::shapes::testing::{minilm, smollm2};
    use super::super::testing::Case;
    use super::*;
    use crate::nn::tuning::Tuning;

    #[test]
    fn all_weights_are_trained_and_start_as_they_are() {
        let method = v1::FullTuning::default();
        // SmolLM2-135M with its tied head, and MiniLM without its pooler.
        assert_eq!(method.check(&smollm2()).unwrap().parameters, 134_515_008);
        assert_eq!(method.check(&minilm()).unwrap().parameters, 22_565_376);
        for case in [Case::decoder(), Case::quantised()] {
            let tuned = case.start(&method);
            assert_eq!(tuned.count(), method.check(case.shapes()).unwrap().parameters);
            case.equals_base(&tuned, 1e-5);
            let norm = tuned.tensor("model.norm.weight").unwrap().unwrap();
            assert_eq!(norm.to_vec1::<f32>().unwrap(), case.stored("model.norm.weight").to_f32());
        }
    }

    #[test]
    fn some_modules() {
        let method = v1::FullTuning { modules: vec!["mlp".into(), "layers.0".into()] };
        let case = Case::decoder();
        let tuned = case.start(&method);
        assert!(tuned.whole.contains_key("model.layers.0.self_attn.q_proj.weight"));
        assert!(tuned.whole.contains_key("model.layers.2.mlp.up_proj.weight"));
        assert!(!tuned.whole.contains_key("model.layers.2.self_attn.q_proj.weight"));
        let bad = v1::FullTuning { modules: vec!["pooler".into()] };
        assert_eq!(bad.check(case.shapes()).unwrap_err().reason(), Reason::TensorNotFound);
        let parameters = tuned.parameters();
        assert!(parameters["model.layers.0.mlp.up_proj.weight"].decay);
        assert!(!parameters["model.layers.0.input_layernorm.weight"].decay);
    }
}
