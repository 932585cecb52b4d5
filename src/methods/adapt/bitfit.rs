//! BitFit (Ben Zaken et al. 2021, "BitFit: simple parameter-efficient fine-tuning for transformer-based masked
//! language-models", arXiv 2106.10199): only biases are trained, those of linears and of norms.

use super::full::{cost, tensors};
use super::shapes::Shapes;
use super::tuned::Tuned;
use super::{Adapt, Cost, Needs, Setup};
use crate::error::{Error, Reason, Result};
use crate::methods::Card;
use crate::proto::v1;
use crate::train::hooks::Hooks;

static CARD: Card = Card {
    name: "bitfit",
    title: "BitFit",
    verb: "adapt",
    summary: "Trains the biases of the base and nothing else of it.",
    paper: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, \
            arXiv 2106.10199",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

fn biases(options: &v1::BitFit, shapes: &Shapes) -> Result<Vec<String>> {
    let names = tensors(&options.modules, shapes, |name| name.ends_with(".bias"))?;
    if names.is_empty() {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            "the model has no biases to train there; take lora, or name modules that have some",
        ));
    }
    Ok(names)
}

impl Adapt for v1::BitFit {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {}

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn check(&self, shapes: &Shapes) -> Result<Cost> {
        Ok(cost(&biases(self, shapes)?, shapes))
    }

    fn needs(&self) -> Result<Needs> {
        Ok(Needs::Nothing)
    }

    fn start(&self, setup: &mut Setup<'_>) -> Result<Tuned> {
        let names = biases(self, setup.shapes)?;
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

    #[test]
    fn counts_and_models_without_biases() {
        let method = v1::BitFit::default();
        // A layer: four linears and two norms of 384 and the wide linear of 1536 and its way back.
        let layer = 4 * 384 + 1536 + 384 + 2 * 384;
        assert_eq!(method.check(&minilm()).unwrap().parameters, 6 * layer + 384);
        let error = method.check(&smollm2()).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let case = Case::encoder();
        let tuned = case.start(&method);
        assert!(tuned.parameters().iter().all(|(name, p)| name.ends_with(".bias") && !p.decay));
        assert_eq!(tuned.count(), method.check(case.shapes()).unwrap().parameters);
        let some = v1::BitFit { modules: vec!["query".into()] };
        assert_eq!(case.start(&some).whole.len(), 3);
    }
}
