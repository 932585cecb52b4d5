//! Cross-entropy of rows of logits, and its gradient in their place.

use super::super::activation::{exp, tanh};
use super::super::multiversion::multiversion;
use super::super::softmax;
use super::super::threads::{self, Shared};

/// What the rows of a batch add up to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// Of the losses.
    pub loss: f64,
    /// Rows whose target has the largest logit.
    pub right: u64,
}

/// Sums `-ln softmax(row)[target]` over rows of `width` logits, which are capped first
/// (`cap * tanh(x / cap)`) where `cap` says so. If `gradient`, the logits become the gradient of the sum
/// with respect to them (before the cap); else they are left in an unspecified state.
///
/// # Panics
/// If there is not one target below `width` for each row.
pub fn cross_entropy(
    logits: &mut [f32],
    width: usize,
    targets: &[u32],
    cap: Option<f32>,
    gradient: bool,
) -> Sums {
    assert_eq!(logits.len(), targets.len() * width, "one target a row");
    assert!(targets.iter().all(|t| (*t as usize) < width), "a target outside the logits");
    let mut each = vec![Sums::default(); targets.len()];
    let shared = Shared::new(&mut each);
    threads::for_rows(logits, width, (1 << 13) / width + 1, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let target = targets[first + i] as usize;
            if let Some(cap) = cap {
                soft_cap(row, cap);
            }
            let (sum, own) = (softmax::log_sum_exp(row), row[target]);
            let sums =
                Sums { loss: sum - f64::from(own), right: u64::from(own >= softmax::max(row)) };
            // SAFETY: rows are disjoint.
            unsafe { shared.set(first + i, sums) };
            if gradient {
                let slope = cap.map_or(1.0, |cap| 1.0 - (own / cap).powi(2));
                let chance = (f64::from(own) - sum).exp() as f32;
                probabilities(row, sum as f32, cap.unwrap_or(0.0));
                row[target] = (chance - 1.0) * slope;
            }
        }
    });
    each.iter().fold(Sums::default(), |all, one| Sums {
        loss: all.loss + one.loss,
        right: all.right + one.right,
    })
}

/// `-ln softmax(row)[target]` of each row, capped as in [`cross_entropy`]; the logits are left in an
/// unspecified state.
///
/// # Panics
/// If there is not one target below `width` and one place for each row.
pub fn losses(
    logits: &mut [f32],
    width: usize,
    targets: &[u32],
    cap: Option<f32>,
    losses: &mut [f32],
) {
    assert_eq!(logits.len(), targets.len() * width, "one target a row");
    assert_eq!(losses.len(), targets.len(), "one loss a row");
    assert!(targets.iter().all(|t| (*t as usize) < width), "a target outside the logits");
    threads::for_row_pairs(logits, width, losses, 1, (1 << 13) / width + 1, |i, row, loss| {
        if let Some(cap) = cap {
            soft_cap(row, cap);
        }
        let own = row[targets[i] as usize];
        loss[0] = (softmax::log_sum_exp(row) - f64::from(own)) as f32;
    });
}

multiversion! {
    fn soft_cap(row: &mut [f32], cap: f32) {
        row.iter_mut().for_each(|v| *v = cap * tanh::<FMA>(*v / cap));
    }

    /// Capped logits to probabilities times the slope of the cap (if it is not 0).
    fn probabilities(row: &mut [f32], sum: f32, cap: f32) {
        if cap == 0.0 {
            row.iter_mut().for_each(|v| *v = exp::<FMA>(*v - sum));
        } else {
            for v in row {
                let t = *v / cap;
                *v = exp::<FMA>(*v - sum) * (1.0 - t * t);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_and_gradients_match_the_definition() {
        for cap in [None, Some(2.0_f32)] {
            let (rows, width) = (3, 21);
            let x: Vec<f32> =
                (0..rows * width).map(|i| ((i * 37) % 23) as f32 * 0.3 - 3.0).collect();
            let targets = [4, 20, 0];
            let loss = |x: &[f64]| -> f64 {
                x.chunks(width)
                    .zip(targets)
                    .map(|(row, target)| {
                        let capped =
                            |v: f64| cap.map(f64::from).map_or(v, |cap| cap * (v / cap).tanh());
                        let sum: f64 = row.iter().map(|v| capped(*v).exp()).sum();
                        sum.ln() - capped(row[target as usize])
                    })
                    .sum()
            };
            let wide: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            let mut gradient = x.clone();
            let sums = cross_entropy(&mut gradient, width, &targets, cap, true);
            assert!((sums.loss - loss(&wide)).abs() < 1e-5, "{sums:?}");
            for (i, got) in gradient.iter().enumerate() {
                let moved = |by: f64| {
                    let mut x = wide.clone();
                    x[i] += by;
                    loss(&x)
                };
                let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((f64::from(*got) - want).abs() < 1e-5, "{i}: {got} is not {want}");
            }
            assert_eq!(cross_entropy(&mut x.clone(), width, &targets, cap, false), sums);
        }
    }

    #[test]
    fn right_answers_are_counted_and_bad_numbers_show() {
        let mut x = [1.0, 3.0, 2.0, 0.0, 0.0, 5.0];
        let sums = cross_entropy(&mut x.clone(), 3, &[1, 0], None, false);
        assert_eq!(sums.right, 1);
        x[0] = f32::NAN;
        let sums = cross_entropy(&mut x, 3, &[1, 0], None, true);
        assert!(sums.loss.is_nan() && x[2].is_nan());
        assert!(x[3..].iter().all(|v| v.is_finite()));
    }
}
