//! SparseGPT (Frantar and Alistarh 2023, "SparseGPT: massive language models can be accurately pruned
//! in one-shot", arXiv 2301.00774, algorithm 1).
//!
//! Columns are taken from left to right; what pruning a weight costs the output is made good by the
//! weights of its row that are still to come. With `U` the upper Cholesky factor of the inverse
//! Hessian, weight (i, j) scores `W_ij^2 / U_jj^2`. Unstructured: for each slab of `block_size`
//! columns the `floor(p * R * width)` smallest of the whole slab go; n:m: decided per row when the
//! group is reached, on the weights as updated so far. The public code prunes one weight too many and
//! all ties; here counts are exact.
//!
//! Decided here: with n:m the slab is rounded down to a multiple of m (the result is the same for any
//! slab); the Hessian of a shared input is factored once for all its weights.

use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::hessian::Factor;
use super::mask::{Mask, mark_smallest};
use super::sparsity::{Amount, Sparsity};
use super::{calibrated, cost, options, prune_each, seeded};
use crate::calibrate;
use crate::error::Result;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Model, ModelInfo};
use crate::proto::v1;

static CARD: Card = Card {
    name: "sparsegpt",
    title: "SparseGPT",
    verb: "compress",
    summary: "Prunes column by column and corrects the columns to come with second-order updates.",
    paper: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv 2301.00774",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &["gptq", "magnitude", "round_to_nearest", "sparsegpt", "wanda"],
};

/// Prunes `weights` (`[rows, cols]`, overwritten with the corrected ones) in slabs of `block`
/// columns.
pub fn prune(weights: &mut [f32], factor: &Factor, amount: Amount, block: usize) -> Mask {
    let cols = factor.cols();
    let rows = weights.len() / cols;
    let slab = slab_width(amount, block);
    let mut mask = Mask::new(rows, cols);
    for row in weights.chunks_mut(cols) {
        row.iter_mut().zip(factor.dead()).filter(|(_, dead)| **dead).for_each(|(w, _)| *w = 0.0);
    }
    for start in (0..cols).step_by(slab) {
        let width = slab.min(cols - start);
        if let Amount::Share(_) = amount {
            mark_slab(weights, factor, start..start + width, amount, &mut mask);
        }
        let mut errors = vec![0f32; rows * width];
        let each = weights
            .par_chunks_mut(cols)
            .zip(mask.pruned_mut().par_chunks_mut(cols))
            .zip(errors.par_chunks_mut(width));
        each.for_each(|((row, pruned), errors)| {
            let (row, pruned) = (&mut row[start..start + width], &mut pruned[start..start + width]);
            for j in 0..width {
                if let Amount::NOfM { n, m } = amount
                    && (start + j).is_multiple_of(m)
                {
                    let scores = (j..j + m).map(|k| score(row[k], factor.diagonal(start + k)));
                    mark_smallest(scores, n, &mut pruned[j..j + m]);
                }
                if !pruned[j] {
                    continue;
                }
                let upper = &factor.row(start + j)[..width - j];
                let error = row[j] / upper[0];
                errors[j] = error;
                row[j] = 0.0;
                for (w, u) in row[j + 1..].iter_mut().zip(&upper[1..]) {
                    *w -= error * u;
                }
            }
        });
        correct_rest(weights, &errors, factor, start, width);
    }
    mask
}

/// Zeros of a `[rows, cols]` matrix pruned in slabs of `block` columns.
pub fn zeros(rows: usize, cols: usize, amount: Amount, block: usize) -> usize {
    let slab = slab_width(amount, block);
    (0..cols).step_by(slab).map(|start| amount.of(rows * slab.min(cols - start))).sum()
}

fn slab_width(amount: Amount, block: usize) -> usize {
    match amount {
        Amount::Share(_) => block,
        Amount::NOfM { m, .. } => (block / m).max(1) * m,
    }
}

fn score(weight: f32, diagonal: f32) -> f32 {
    let ratio = weight / diagonal;
    ratio * ratio
}

/// Marks the smallest scores of a slab as it now stands, all rows together.
fn mark_slab(
    weights: &[f32],
    factor: &Factor,
    columns: std::ops::Range<usize>,
    amount: Amount,
    mask: &mut Mask,
) {
    let (cols, width) = (factor.cols(), columns.len());
    let scores: Vec<f32> = weights
        .chunks(cols)
        .flat_map(|row| columns.clone().map(|j| score(row[j], factor.diagonal(j))))
        .collect();
    let mut pruned = vec![false; scores.len()];
    mark_smallest(scores.iter().copied(), amount.of(scores.len()), &mut pruned);
    for (row, slab) in mask.pruned_mut().chunks_mut(cols).zip(pruned.chunks(width)) {
        row[columns.clone()].copy_from_slice(slab);
    }
}

/// `W[:, end..] -= E U[start..end, end..]`: the errors of a slab reach the columns after it.
pub(super) fn correct_rest(
    weights: &mut [f32],
    errors: &[f32],
    factor: &Factor,
    start: usize,
    width: usize,
) {
    let (cols, rows, end) = (factor.cols(), errors.len() / width, start + width);
    if end == cols {
        return;
    }
    let upper = MatRef::from_row_major_slice(factor.upper(), cols, cols);
    faer::linalg::matmul::matmul(
        MatMut::from_row_major_slice_mut(weights, rows, cols).subcols_mut(end, cols - end),
        Accum::Add,
        MatRef::from_row_major_slice(errors, rows, width),
        upper.submatrix(start, end, width, cols - end),
        -1.0,
        Par::rayon(0),
    );
}

impl Method for v1::SparseGpt {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Sparsity::resolve(&mut self.sparsity);
        calibrate::Options::resolve(&mut self.calibration);
        self.damp.get_or_insert(options::DAMP);
        self.block_size.get_or_insert(options::BLOCK);
    }

    fn datasets(&self) -> Vec<&str> {
        self.calibration.iter().map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        seeded(self.calibration.as_ref())
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        calibration.check(model)?;
        options::damp(self.damp)?;
        let block = options::block(self.block_size)?;
        let after =
            sparsity.check(model, &|rows, cols| zeros(rows, cols, sparsity.amount, block))?;
        Ok((cost::calibrated(model, &after, &calibration, true), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let sparsity = Sparsity::read(self.sparsity.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        let (damp, block) = (options::damp(self.damp)?, options::block(self.block_size)?);
        let names = sparsity.names(&model.family)?;
        calibrated(cx, model, &names, &calibration, true, &mut |site, report| {
            let factor = report.factor(site, calibration.sequences, damp, None)?;
            let named = site.names.iter().zip(&site.dense);
            named
                .map(|(name, weights)| {
                    let mut new = weights.clone();
                    let mask = prune(&mut new, &factor, sparsity.amount, block);
                    prune_each(name, &new, factor.cols(), &mask, &sparsity)
                })
                .collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::gram::Gram;
    use crate::methods::compress::testing::{correlated, weights};
    use crate::methods::compress::{magnitude, wanda};

    const COLS: usize = 64;

    fn identity() -> Factor {
        let mut gram = Gram::new(COLS);
        for j in 0..COLS {
            let mut row = [0.0; COLS];
            row[j] = 1.0;
            gram.add(&row);
        }
        Factor::new(&gram, 1, 0.01, &(0..COLS).collect::<Vec<_>>(), "t").expect("factors")
    }

    #[test]
    fn uncorrelated_inputs_give_magnitude_by_slab_and_move_nothing() {
        let before = weights(48, COLS, 1);
        let mut after = before.clone();
        let mask = prune(&mut after, &identity(), Amount::Share(0.3), 16);
        assert_eq!(mask.count(), zeros(48, COLS, Amount::Share(0.3), 16));
        for start in (0..COLS).step_by(16) {
            let cut = |from: &[f32]| -> Vec<f32> {
                from.chunks(COLS).flat_map(|r| r[start..start + 16].to_vec()).collect()
            };
            let slab = magnitude::mask(&cut(&before), 16, Amount::Share(0.3));
            let mut want = cut(&before);
            slab.apply(&mut want);
            assert_eq!(cut(&after), want);
        }
    }

    #[test]
    fn nothing_pruned_is_nothing_changed() {
        let gram = correlated(COLS, 2);
        let order: Vec<usize> = (0..COLS).collect();
        let factor = Factor::new(&gram, 1, 0.01, &order, "t").expect("factors");
        let before = weights(8, COLS, 3);
        let mut after = before.clone();
        assert_eq!(prune(&mut after, &factor, Amount::Share(0.0), 16).count(), 0);
        assert_eq!(before, after);
    }

    #[test]
    fn two_columns_by_hand() {
        // X^T X = [[2, 1], [1, 1]] / 2 * 2 with one sequence gives H = [[2, 1], [1, 1]] * 2 / 2.
        // Rows of X: (1, 1), (1, 0) give X^T X = [[2, 1], [1, 1]], H = [[4, 2], [2, 2]].
        // Without damping U = [[1/sqrt 2, -1/sqrt 2], [0, 1/sqrt 2]]; pruning w_0 adds w_0 to w_1.
        let mut gram = Gram::new(2);
        gram.add(&[1.0, 1.0, 1.0, 0.0]);
        let factor = Factor::new(&gram, 1, 1e-9, &[0, 1], "t").expect("factors");
        let mut w = [1.0, 3.0];
        let mask = prune(&mut w, &factor, Amount::NOfM { n: 1, m: 2 }, 128);
        assert_eq!(mask.pruned(), [true, false]);
        assert!((w[1] - 4.0).abs() < 1e-5 && w[0] == 0.0, "{w:?}");
        // The best single weight for outputs (4, 1) on inputs (1, 0) in the second column is 4: right.
    }

    #[test]
    fn slabs_do_not_change_n_of_m() {
        let gram = correlated(COLS, 5);
        let order: Vec<usize> = (0..COLS).collect();
        let factor = Factor::new(&gram, 1, 0.01, &order, "t").expect("factors");
        let amount = Amount::NOfM { n: 2, m: 4 };
        let mut small = weights(16, COLS, 6);
        let mut large = small.clone();
        let a = prune(&mut small, &factor, amount, 6);
        let b = prune(&mut large, &factor, amount, 128);
        assert!(a.is_n_of_m((2, 4)));
        assert_eq!(a, b);
        for (s, l) in small.iter().zip(&large) {
            assert!((s - l).abs() < 1e-3 * (1.0 + l.abs()), "{s} {l}");
        }
    }

    #[test]
    fn errors_keep_their_order_on_correlated_inputs() {
        for seed in 0..20 {
            let gram = correlated(COLS, 100 + seed);
            let order: Vec<usize> = (0..COLS).collect();
            let factor = Factor::new(&gram, 1, 0.01, &order, "t").expect("factors");
            let w = weights(64, COLS, 200 + seed);
            let norms: Vec<f32> = (0..COLS).map(|j| gram.at(j, j).sqrt() as f32).collect();
            let amount = Amount::Share(0.5);
            let error = |new: &[f32]| {
                let delta: Vec<f32> = w.iter().zip(new).map(|(a, b)| a - b).collect();
                (gram.energy(&delta) / gram.energy(&w)).sqrt()
            };
            let masked = |mask: Mask| {
                let mut new = w.clone();
                mask.apply(&mut new);
                error(&new)
            };
            let mut corrected = w.clone();
            prune(&mut corrected, &factor, amount, 128);
            let sparsegpt = error(&corrected);
            let wanda = masked(wanda::mask(&w, &norms, amount));
            let magnitude = masked(magnitude::mask(&w, COLS, amount));
            assert!(sparsegpt <= wanda && wanda <= magnitude, "{sparsegpt} {wanda} {magnitude}");
        }
    }
}
