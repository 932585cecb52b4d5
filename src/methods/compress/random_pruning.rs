//! Random pruning: which weights go is drawn, every choice of so many being as likely. What any score of
//! weights has to beat.
//!
//! Magnitude pruning of drawn numbers says which. Each tensor has a stream of random numbers by its name, so a
//! mask does not depend on what else is pruned. Needs no text.

use rand::Rng;

use super::mask::Mask;
use super::sparsity::{Amount, Sparsity};
use super::{alone, magnitude, prune_each};
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;
use crate::seed::Stream;

static CARD: Card = Card {
    name: "random_pruning",
    title: "Random pruning",
    verb: "compress",
    summary: "Sets weights that are drawn at random to zero; what every score of weights has to beat.",
    paper: "Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626, as a \
            yardstick of it",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &["gptq", "magnitude", "round_to_nearest", "sparsegpt", "wanda"],
};

/// The mask of a `[len / cols, cols]` weight.
pub fn mask(len: usize, cols: usize, amount: Amount, random: &Stream) -> Mask {
    let mut rng = random.rng();
    // 24 random bits each: of two that are alike the first goes, which is too rare to see.
    let drawn: Vec<f32> = (0..len).map(|_| rng.random()).collect();
    magnitude::mask(&drawn, cols, amount)
}

impl Method for v1::RandomPruning {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Sparsity::resolve(&mut self.sparsity);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn seeded(&self) -> bool {
        true
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        // As many go, and as few are left to store.
        v1::Magnitude { sparsity: self.sparsity.clone() }.check(model)
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let names = sparsity.names(&model.family)?;
        let random = cx.random.clone();
        alone(cx, model, &names, &|name, weights, cols| {
            let mask = mask(weights.len(), cols, sparsity.amount, &random.child(name));
            prune_each(name, weights, cols, &mask, &sparsity)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_exact_and_the_seed_decides_which_go() {
        let stream = Stream::root(7);
        for share in [0.0, 0.1, 0.37, 0.5, 0.999] {
            let amount = Amount::Share(share);
            let count = mask(48 * 31, 31, amount, &stream).count();
            assert_eq!(count, (share * 48.0 * 31.0).floor() as usize, "{share}");
        }
        let half = |seed| mask(4096, 64, Amount::Share(0.5), &Stream::root(seed));
        assert_eq!(half(1).pruned(), half(1).pruned());
        let alike = half(1).pruned().iter().zip(half(2).pruned()).filter(|(a, b)| a == b).count();
        // Two independent halves agree on half of the places: 2048, with a deviation of 32.
        assert!((1888..2208).contains(&alike), "{alike}");
    }

    #[test]
    fn every_group_loses_n_and_every_place_goes_as_often() {
        let mask = mask(4 * 4096, 64, Amount::NOfM { n: 1, m: 4 }, &Stream::root(3));
        let mut places = [0_usize; 4];
        for group in mask.pruned().chunks(4) {
            assert_eq!(group.iter().filter(|gone| **gone).count(), 1);
            places.iter_mut().zip(group).for_each(|(sum, gone)| *sum += usize::from(*gone));
        }
        // 1024 of 4096 groups each, with a deviation of 28.
        assert!(places.iter().all(|count| (884..1164).contains(count)), "{places:?}");
    }
}
