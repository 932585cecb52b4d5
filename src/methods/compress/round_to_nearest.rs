//! Rounding to the nearest point of each group's grid: the yardstick of weight quantisation.
//!
//! A group's grid spans its smallest and largest weight and contains zero, so pruned weights stay
//! exactly zero. Needs no text.

use rayon::prelude::*;

use super::grid::{Codes, Grid};
use super::mask::Mask;
use super::{alone, cost, quantise_each};
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::nn::weight::GroupedSpec;
use crate::proto::v1;

static CARD: Card = Card {
    name: "round_to_nearest",
    title: "Round to nearest",
    verb: "compress",
    summary: "Rounds each weight to the nearest point of its group's grid; zeros stay zero.",
    paper: "The baseline of GPTQ: Accurate Post-Training Quantization for Generative Pre-trained \
            Transformers, arXiv 2210.17323",
    needs_calibration: false,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// Codes of `[rows, cols]` weights.
pub fn quantise(weights: &[f32], cols: usize, spec: GroupedSpec) -> Codes {
    let mut out = Codes::new(weights.len() / cols, cols, spec);
    let groups = weights
        .par_chunks(spec.group)
        .zip(out.codes.par_chunks_mut(spec.group))
        .zip(out.scales.par_iter_mut().zip(out.zeros.par_iter_mut()));
    groups.for_each(|((weights, codes), (scale, zero))| {
        (*scale, *zero) = spec.fit(weights);
        for (code, weight) in codes.iter_mut().zip(weights) {
            *code = spec.code(*weight, *scale, *zero);
        }
    });
    out
}

impl Method for v1::RoundToNearest {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Grid::resolve(&mut self.grid);
    }

    fn datasets(&self) -> Vec<&str> {
        Vec::new()
    }

    fn seeded(&self) -> bool {
        false
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let after = Grid::read(self.grid.as_ref())?.check(model)?;
        Ok((cost::alone(model, &after), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let grid = Grid::read(self.grid.as_ref())?;
        let names = grid.names(&model.family)?;
        let stored = model.weights.clone();
        alone(cx, model, &names, &|name, weights, cols| {
            let mask = Mask::zeros_of(weights, cols);
            let codes = quantise(weights, cols, grid.spec);
            quantise_each(&stored[name], cols, grid.spec, &codes, &mask)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::weight::{Grouped, Weight};

    #[test]
    fn rounding_errs_by_half_a_step_at_most_and_keeps_zeros() {
        let mut weights = crate::methods::compress::testing::weights(8, 64, 4);
        weights.iter_mut().step_by(3).for_each(|w| *w = 0.0);
        for (bits, symmetric) in [(2, false), (3, true), (4, false), (4, true), (8, false)] {
            let spec = GroupedSpec { bits, group: 16, symmetric };
            let codes = quantise(&weights, 64, spec);
            let values = codes.values(spec);
            for ((v, w), scale) in values
                .iter()
                .zip(&weights)
                .zip(codes.scales.iter().flat_map(|s| std::iter::repeat_n(s, 16)))
            {
                // The grid's ends may lie up to a step inside the group's range (rounded zero point,
                // scale rounded to f16).
                assert!((v - w).abs() <= 1.02 * scale, "{v} {w} {scale} {bits}");
                assert!(*w != 0.0 || *v == 0.0);
            }
        }
    }

    #[test]
    fn what_is_stored_is_what_was_rounded_bit_for_bit() {
        let bits_of = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let weights = crate::methods::compress::testing::weights(8, 96, 4);
        for bits in [2, 3, 4, 8] {
            for (group, symmetric) in [(16, false), (32, true), (48, false), (96, true)] {
                let spec = GroupedSpec { bits, group, symmetric };
                let Codes { codes, scales, zeros } = quantise(&weights, 96, spec);
                let packed = Grouped::pack([8, 96], spec, &codes, &scales, &zeros).expect("packs");
                let stored = Weight::Grouped(packed).to_f32();
                let values = Codes { codes, scales, zeros }.values(spec);
                assert_eq!(bits_of(stored), bits_of(values), "{bits} bits by {group}");
            }
        }
    }
}
