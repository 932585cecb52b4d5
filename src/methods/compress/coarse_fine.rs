//! The two scores of CFSP as functions of numbers: what a block gets, and which of its channels stay.

/// The published code sums the angles of 128 sequences of 1024 tokens and divides by 10 000; with means over
/// tokens this factor gives the same whatever the calibration.
pub const ANGLES: f64 = 128.0 * 1024.0 / 1e4;

/// What the blocks get.
#[derive(Debug, Clone, PartialEq)]
pub struct Budget {
    /// Importance of each block.
    pub importance: Vec<f64>,
    /// Share of its channels that each block keeps; their mean is `1 - ratio`.
    pub keep: Vec<f64>,
}

/// Shares by what blocks do (means over tokens), `a` the sharpness.
pub fn budget(moved: &[f64], a: f64, ratio: f64) -> Budget {
    let n = moved.len().max(1) as f64;
    let mean_of = |v: &[f64]| v.iter().sum::<f64>() / n;
    let centre = mean_of(moved);
    let mut importance: Vec<f64> =
        moved.iter().map(|b| 1.0 / (1.0 + (-a * ANGLES * (b - centre)).exp())).collect();
    let share = |importance: &[f64]| -> Vec<f64> {
        let mean = mean_of(importance);
        importance.iter().map(|s| s / mean * (1.0 - ratio)).collect()
    };
    let mut keep = share(&importance);
    let most = importance.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mean = mean_of(&importance);
    if keep.iter().any(|k| *k >= 1.0) && most > mean {
        // Drawn together until the largest fits.
        let f = mean * (1.0 / (1.0 - ratio) - 1.0) / (most - mean) / 1.05;
        importance.iter_mut().for_each(|s| *s = mean + (*s - mean) * f);
        keep = share(&importance);
    }
    Budget { importance, keep }
}

/// The weights of a feed-forward network: `down` is `[d, I]`, each of `into` `[I, d]`.
pub struct Weights<'a> {
    pub down: &'a [f32],
    pub into: Vec<&'a [f32]>,
    /// `I`
    pub wide: usize,
}

impl Weights<'_> {
    fn rows(&self) -> usize {
        self.down.len() / self.wide
    }
}

/// Weights relative to those of the same row, over the channels, times the activation: `mean_i (U_ij / sum_j U_ij
/// + |up_ji| / sum_j |up_ji| + ...) A_j^c` with `U = |down| A^b`.
pub fn row_relative(weights: &Weights<'_>, activation: &[f64], (b, c): (f64, f64)) -> Vec<f64> {
    let (wide, rows) = (weights.wide, weights.rows());
    let powers: Vec<f64> = activation.iter().map(|a| a.powf(b)).collect();
    let mut scores = vec![0.0; wide];
    let mut line = vec![0.0; wide];
    let mut add = |line: &[f64]| {
        let sum: f64 = line.iter().sum();
        if sum > 0.0 {
            scores.iter_mut().zip(line).for_each(|(s, v)| *s += v / sum);
        }
    };
    for row in weights.down.chunks(wide) {
        for ((v, w), p) in line.iter_mut().zip(row).zip(&powers) {
            *v = f64::from(w.abs()) * p;
        }
        add(&line);
    }
    for into in &weights.into {
        for i in 0..rows {
            for (j, v) in line.iter_mut().enumerate() {
                *v = f64::from(into[j * rows + i].abs());
            }
            add(&line);
        }
    }
    let each = scores.iter().zip(activation);
    each.map(|(s, a)| s / rows.max(1) as f64 * a.powf(c)).collect()
}

/// The activation alone, `A_j^c`: the published formula divides each column by its own sum before the mean over
/// that column, so the weights cancel.
pub fn activation(activation: &[f64], c: f64) -> Vec<f64> {
    activation.iter().map(|a| a.powf(c)).collect()
}

/// Ranks of the blocks' factors: the mean rank times their relative importance.
pub fn ranks(importance: &[f64], mean: usize, least: usize) -> Vec<usize> {
    let average = importance.iter().sum::<f64>() / importance.len().max(1) as f64;
    let rank = |s: &f64| {
        let share = if average > 0.0 { s / average } else { 1.0 };
        (mean as f64 * share).round() as usize
    };
    importance.iter().map(|s| rank(s).max(least)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::compress::slimming::best;
    use crate::methods::compress::testing::weights;

    #[test]
    fn shares_have_the_mean_that_was_asked_for() {
        let moved = [0.3, 0.05, 0.1, 0.02, 0.4];
        for ratio in [0.0, 0.1, 0.2, 0.5, 0.8] {
            for a in [0.0, 0.5, 1.0, 5.0, -1.0] {
                let Budget { keep, .. } = budget(&moved, a, ratio);
                let mean = keep.iter().sum::<f64>() / 5.0;
                assert!((mean - (1.0 - ratio)).abs() < 1e-6, "{ratio} {a}: {mean}");
                assert!(ratio == 0.0 || keep.iter().all(|k| *k < 1.0 && *k >= 0.0), "{keep:?}");
            }
        }
        // Who does more keeps more.
        let Budget { keep, importance } = budget(&moved, 1.0, 0.5);
        assert!(keep[4] > keep[0] && keep[0] > keep[2] && keep[2] > keep[1] && keep[1] > keep[3]);
        assert!(importance[4] > importance[3]);
        // Equal blocks get equal shares.
        assert_eq!(budget(&[0.2; 4], 1.0, 0.3).keep, [0.7; 4]);
        assert_eq!(budget(&moved, 0.0, 0.3).keep, [0.7; 5]);
    }

    /// The published formula, word by word.
    fn literal(weights: &Weights<'_>, activation: &[f64], b: f64, c: f64) -> Vec<f64> {
        let (wide, rows) = (weights.wide, weights.rows());
        let down = |i: usize, j: usize| {
            f64::from(weights.down[i * wide + j].abs()) * activation[j].powf(b)
        };
        let into = |k: usize, i: usize, j: usize| f64::from(weights.into[k][j * rows + i].abs());
        (0..wide)
            .map(|j| {
                let column = |of: &dyn Fn(usize) -> f64| -> Vec<f64> {
                    let sum: f64 = (0..rows).map(of).sum();
                    (0..rows).map(|i| of(i) / sum).collect()
                };
                let mut total = column(&|i| down(i, j));
                for k in 0..weights.into.len() {
                    let part = column(&|i| into(k, i, j));
                    total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
                }
                total.iter().map(|t| t * activation[j].powf(c)).sum::<f64>() / rows as f64
            })
            .collect()
    }

    #[test]
    fn the_published_formula_is_the_activation() {
        let (rows, wide) = (6, 40);
        let (down, gate, up) =
            (weights(rows, wide, 1), weights(wide, rows, 2), weights(wide, rows, 3));
        let acts: Vec<f64> = weights(1, wide, 4).iter().map(|v| f64::from(v.abs()) + 0.1).collect();
        let all = Weights { down: &down, into: vec![&gate, &up], wide };
        let literal = literal(&all, &acts, 1.0, 1.0);
        for (l, a) in literal.iter().zip(&acts) {
            assert!((l - 3.0 * a / rows as f64).abs() < 1e-12);
        }
        for count in [5, 20, 33] {
            assert_eq!(best(&literal, count), best(&activation(&acts, 1.0), count));
        }
        // The other reading sees the weights.
        let relative = row_relative(&all, &acts, (1.0, 1.0));
        assert_ne!(best(&relative, 20), best(&literal, 20));
    }

    #[test]
    fn relative_to_the_row_by_hand() {
        // down [[1, 3], [2, 2]] with A = [2, 1]: U = [[2, 3], [4, 2]], shares 0.4 0.6 and 2/3 1/3.
        // up^T = [[1, 1], [0, 4]]: shares 0.5 0.5 and 0 1. Mean over rows, times A.
        let all =
            Weights { down: &[1.0, 3.0, 2.0, 2.0], into: vec![&[1.0, 0.0, 1.0, -4.0]], wide: 2 };
        let found = row_relative(&all, &[2.0, 1.0], (1.0, 1.0));
        let want = [(0.4 + 2.0 / 3.0 + 0.5) / 2.0 * 2.0, (0.6 + 1.0 / 3.0 + 1.5) / 2.0];
        assert!(found.iter().zip(want).all(|(f, w)| (f - w).abs() < 1e-12), "{found:?}");
    }

    #[test]
    fn ranks_follow_importance_and_keep_their_sum() {
        let importance = [0.5, 0.7, 0.31, 0.45, 0.62, 0.4];
        let found = ranks(&importance, 8, 2);
        let sum: usize = found.iter().sum();
        assert!(sum.abs_diff(8 * 6) <= 3, "{found:?}");
        assert!(found[1] > found[0] && found[0] > found[2]);
        assert_eq!(ranks(&[1.0, 1e-9], 4, 2), [8, 2]);
        assert_eq!(ranks(&[0.3; 4], 8, 2), [8; 4]);
    }

    #[test]
    fn the_published_scale_and_the_cap_by_hand() {
        assert!((ANGLES - 13.1072).abs() < 1e-12);
        let near = |found: &[f64], want: [f64; 2]| {
            assert!(
                found.iter().zip(want).all(|(f, w)| (f - w).abs() < 1e-9),
                "{found:?} {want:?}"
            );
        };
        // A tenth above and below the mean: 1.31072 and its negative, through the logistic function.
        let high = 1.0 / (1.0 + (-1.31072_f64).exp());
        let Budget { importance, keep } = budget(&[0.3, 0.1], 1.0, 0.5);
        near(&importance, [high, 1.0 - high]);
        near(&keep, [high, 1.0 - high]);
        // With a fifth gone the first would keep 1.26 of itself: what is above the mean shrinks to 1 / 1.05 of
        // the room there is.
        let most = 0.8 + 0.2 / 1.05;
        let Budget { importance, keep } = budget(&[0.3, 0.1], 1.0, 0.2);
        near(&keep, [most, 1.6 - most]);
        near(&importance, [most / 1.6, 1.0 - most / 1.6]);
    }
}
