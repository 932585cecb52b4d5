//! GPTQ (Frantar et al. 2022, "GPTQ: accurate post-training quantization for generative pre-trained
//! transformers", arXiv 2210.17323, algorithm 1).
//!
//! Columns are rounded one after the other; the rounding error of a column, divided by the diagonal of
//! the upper Cholesky factor `U` of the inverse Hessian, is taken from the columns to come along the
//! row of `U`. A group's grid is fitted when the group is entered, on the weights as corrected so far.
//!
//! Decided here: weights that are zero in a pruned input stay exactly zero (their error is made good
//! by the columns to come, as in SparseGPT); slabs are whole groups, so that a group is corrected to
//! the last column before its grid is fitted; `activation_order` takes columns by falling input energy
//! with grids fitted beforehand on groups of the original columns (what others call static groups), so
//! that storage does not depend on the order.

use rayon::prelude::*;

use super::grid::{Codes, Grid, value};
use super::hessian::Factor;
use super::mask::Mask;
use super::sparsegpt::correct_rest;
use super::{calibrated, cost, options, quantise_each, seeded};
use crate::calibrate;
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::nn::weight::GroupedSpec;
use crate::proto::v1;

static CARD: Card = Card {
    name: "gptq",
    title: "GPTQ",
    verb: "compress",
    summary: "Rounds weights to a grouped grid column by column and corrects the columns to come; \
              zeros stay zero.",
    paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, \
            arXiv 2210.17323",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// Codes of `[rows, cols]` weights. `factor` belongs to the inputs in the order `order` (none: as they
/// stand); `pruned` weights get the code of zero.
pub fn quantise(
    weights: &[f32],
    spec: GroupedSpec,
    factor: &Factor,
    order: Option<&[usize]>,
    pruned: &Mask,
    block: usize,
) -> Codes {
    let cols = factor.cols();
    let rows = weights.len() / cols;
    // Everything below works on columns in the order in which they are taken.
    let (mut w, pruned) = match order {
        None => (weights.to_vec(), pruned.pruned().to_vec()),
        Some(order) => (permuted(weights, order), permuted(pruned.pruned(), order)),
    };
    for row in w.chunks_mut(cols) {
        row.iter_mut().zip(factor.dead()).filter(|(_, dead)| **dead).for_each(|(w, _)| *w = 0.0);
    }
    let mut out = Codes::new(rows, cols, spec);
    if order.is_some() {
        let grids = out.scales.iter_mut().zip(&mut out.zeros);
        for (group, (scale, zero)) in weights.chunks(spec.group).zip(grids) {
            (*scale, *zero) = spec.fit(group);
        }
    }
    let groups = cols / spec.group;
    let slab = (block / spec.group).max(1) * spec.group;
    for start in (0..cols).step_by(slab) {
        let width = slab.min(cols - start);
        let mut errors = vec![0f32; rows * width];
        let each = w
            .par_chunks_mut(cols)
            .zip(pruned.par_chunks(cols))
            .zip(errors.par_chunks_mut(width))
            .zip(out.codes.par_chunks_mut(cols))
            .zip(out.scales.par_chunks_mut(groups).zip(out.zeros.par_chunks_mut(groups)));
        each.for_each(|((((row, pruned), errors), codes), (scales, zeros))| {
            let row = &mut row[start..start + width];
            for j in 0..width {
                let column = order.map_or(start + j, |o| o[start + j]);
                let group = column / spec.group;
                if order.is_none() && column.is_multiple_of(spec.group) {
                    (scales[group], zeros[group]) = spec.fit(&row[j..j + spec.group]);
                }
                let (scale, zero) = (scales[group], zeros[group]);
                // The code of zero is the zero point, in symmetric grids too.
                let kept = if pruned[start + j] { 0.0 } else { row[j] };
                let code = spec.code(kept, scale, zero);
                codes[column] = code;
                let upper = &factor.row(start + j)[..width - j];
                let error = (row[j] - value(code, scale, zero)) / upper[0];
                errors[j] = error;
                for (w, u) in row[j + 1..].iter_mut().zip(&upper[1..]) {
                    *w -= error * u;
                }
            }
        });
        correct_rest(&mut w, &errors, factor, start, width);
    }
    out
}

/// Columns by falling energy of their inputs, equal ones as they stand.
pub fn by_energy(squares: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..squares.len()).collect();
    order.sort_by(|a, b| squares[*b].total_cmp(&squares[*a]));
    order
}

fn permuted<T: Copy>(matrix: &[T], order: &[usize]) -> Vec<T> {
    matrix.chunks(order.len()).flat_map(|row| order.iter().map(|j| row[*j])).collect()
}

impl Method for v1::Gptq {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Grid::resolve(&mut self.grid);
        calibrate::Options::resolve(&mut self.calibration);
        self.damp.get_or_insert(options::DAMP);
        self.block_size.get_or_insert(options::BLOCK);
        self.activation_order.get_or_insert(false);
    }

    fn datasets(&self) -> Vec<&str> {
        self.calibration.iter().map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        seeded(self.calibration.as_ref())
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let grid = Grid::read(self.grid.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        calibration.check(model)?;
        options::damp(self.damp)?;
        options::block(self.block_size)?;
        let after = grid.check(model)?;
        Ok((cost::calibrated(model, &after, &calibration, true), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let grid = Grid::read(self.grid.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        let (damp, block) = (options::damp(self.damp)?, options::block(self.block_size)?);
        let by_activation = self.activation_order.unwrap_or_default();
        let names = grid.names(&model.family)?;
        calibrated(cx, model, &names, &calibration, true, &mut |site, report| {
            let order = by_activation.then(|| by_energy(site.inputs.squares()));
            let factor = report.factor(site, calibration.sequences, damp, order.as_deref())?;
            let stored = site.weights.iter().zip(&site.dense);
            stored
                .map(|(stored, weights)| {
                    let mask = Mask::zeros_of(weights, factor.cols());
                    let order = order.as_deref();
                    let codes = quantise(weights, grid.spec, &factor, order, &mask, block);
                    quantise_each(stored, factor.cols(), grid.spec, &codes, &mask)
                })
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::gram::Gram;
    use crate::methods::compress::round_to_nearest;
    use crate::methods::compress::testing::{correlated, weights};

    const COLS: usize = 64;
    const SPEC: GroupedSpec = GroupedSpec { bits: 3, group: 16, symmetric: false };

    fn factor(gram: &Gram, order: &[usize]) -> Factor {
        Factor::new(gram, 1, 0.01, order, "t").expect("factors")
    }

    fn straight() -> Vec<usize> {
        (0..COLS).collect()
    }

    #[test]
    fn uncorrelated_inputs_give_rounding_to_nearest() {
        let mut gram = Gram::new(COLS);
        for j in 0..COLS {
            let mut row = [0.0; COLS];
            row[j] = 1.0 + j as f32;
            gram.add(&row);
        }
        let w = weights(8, COLS, 9);
        let plain = round_to_nearest::quantise(&w, COLS, SPEC);
        let mask = Mask::new(8, COLS);
        let got = quantise(&w, SPEC, &factor(&gram, &straight()), None, &mask, 32);
        assert_eq!(got, plain);
        let order = by_energy(&(0..COLS).map(|j| gram.at(j, j)).collect::<Vec<_>>());
        assert_eq!(order, (0..COLS).rev().collect::<Vec<_>>());
        let got = quantise(&w, SPEC, &factor(&gram, &order), Some(&order), &mask, 32);
        assert_eq!(got, plain);
    }

    #[test]
    fn errs_less_than_rounding_and_keeps_pruned_weights_zero() {
        for seed in 0..5 {
            let gram = correlated(COLS, seed);
            let mut w = weights(32, COLS, 50 + seed);
            let mask = crate::methods::compress::magnitude::mask(
                &w,
                COLS,
                crate::methods::compress::sparsity::Amount::Share(0.5),
            );
            let error = |w: &[f32], codes: &Codes| {
                let values = codes.values(SPEC);
                let delta: Vec<f32> = w.iter().zip(&values).map(|(a, b)| a - b).collect();
                gram.energy(&delta)
            };
            let none = Mask::new(32, COLS);
            let plain = error(&w, &round_to_nearest::quantise(&w, COLS, SPEC));
            let order = by_energy(&(0..COLS).map(|j| gram.at(j, j)).collect::<Vec<_>>());
            let dense = quantise(&w, SPEC, &factor(&gram, &straight()), None, &none, 32);
            assert!(error(&w, &dense) < plain);
            let ordered = quantise(&w, SPEC, &factor(&gram, &order), Some(&order), &none, 32);
            assert!(error(&w, &ordered) < plain);

            mask.apply(&mut w);
            let plain = error(&w, &round_to_nearest::quantise(&w, COLS, SPEC));
            for (factor, order) in
                [(factor(&gram, &straight()), None), (factor(&gram, &order), Some(&order))]
            {
                let order = order.map(Vec::as_slice);
                let sparse = quantise(&w, SPEC, &factor, order, &mask, 32);
                assert!(error(&w, &sparse) < plain);
                let values = sparse.values(SPEC);
                assert!(values.iter().zip(mask.pruned()).all(|(v, p)| !p || *v == 0.0));
            }
        }
    }

    #[test]
    fn slabs_do_not_change_the_result_beyond_rounding() {
        let gram = correlated(COLS, 77);
        let w = weights(16, COLS, 78);
        let mask = Mask::new(16, COLS);
        let factor = factor(&gram, &straight());
        let spec = GroupedSpec { bits: 8, ..SPEC };
        let a = quantise(&w, spec, &factor, None, &mask, 16).values(spec);
        let b = quantise(&w, spec, &factor, None, &mask, 64).values(spec);
        let far = a.iter().zip(&b).filter(|(a, b)| (*a - *b).abs() > 0.05).count();
        assert!(far == 0, "{far}");
    }
}
