//! Softmax and log-sum-exp over long rows, the way sampling and scoring need them.

use super::activation::exp;
use super::multiversion::multiversion;

const LANES: usize = 16;
/// Partial sums this long are added up in f32, the partial sums in f64.
const PIECE: usize = 1024;

multiversion! {
    /// Largest element; NaN where there is one, negative infinity for an empty row.
    pub fn max(row: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut nan = [false; LANES];
        let chunks = row.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for ((lane, bad), v) in lanes.iter_mut().zip(&mut nan).zip(chunk) {
                *lane = if *v > *lane { *v } else { *lane };
                *bad |= v.is_nan();
            }
        }
        if nan.contains(&true) || rest.iter().any(|v| v.is_nan()) {
            return f32::NAN;
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| a.max(*b))
    }

    /// `sum(exp((x - shift) * scale))`, added up in f64.
    pub fn sum_exp(row: &[f32], shift: f32, scale: f32) -> f64 {
        let mut sum = 0.0;
        for piece in row.chunks(PIECE) {
            let mut lanes = [0.0_f32; LANES];
            let chunks = piece.chunks_exact(LANES);
            for v in chunks.remainder() {
                sum += f64::from(exp::<FMA>((*v - shift) * scale));
            }
            for chunk in chunks {
                for (lane, v) in lanes.iter_mut().zip(chunk) {
                    *lane += exp::<FMA>((*v - shift) * scale);
                }
            }
            sum += lanes.iter().map(|v| f64::from(*v)).sum::<f64>();
        }
        sum
    }

    /// `sum_i exp(t_i - shift) (t_i - s_i)`: with the log-sum-exp of `t` as its shift, how far `t` lies above
    /// `s` in the mean over the distribution of `t`. What `t` excludes (minus infinity) adds nothing.
    pub fn mean_gap(s: &[f32], t: &[f32], shift: f32) -> f64 {
        let gap = |s: f32, t: f32| if t > f32::NEG_INFINITY { t - s } else { 0.0 };
        let mut sum = 0.0;
        for (s, t) in s.chunks(PIECE).zip(t.chunks(PIECE)) {
            let mut lanes = [0.0_f32; LANES];
            let (s, t) = (s.as_chunks::<LANES>(), t.as_chunks::<LANES>());
            for (s, t) in s.0.iter().zip(t.0) {
                for ((lane, s), t) in lanes.iter_mut().zip(s).zip(t) {
                    *lane += exp::<FMA>(*t - shift) * gap(*s, *t);
                }
            }
            for (s, t) in s.1.iter().zip(t.1) {
                sum += f64::from(exp::<FMA>(*t - shift) * gap(*s, *t));
            }
            sum += lanes.iter().map(|v| f64::from(*v)).sum::<f64>();
        }
        sum
    }

    /// `x = exp((x - shift) * scale)`.
    pub fn exp_in_place(row: &mut [f32], shift: f32, scale: f32) {
        for v in row {
            *v = exp::<FMA>((*v - shift) * scale);
        }
    }
}

/// `ln(sum(exp(x)))`: subtract it from a logit to get a log-probability.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let shift = max(row);
    if !shift.is_finite() {
        return f64::from(shift);
    }
    f64::from(shift) + sum_exp(row, shift, 1.0).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_sum_exp_of_known_rows() {
        // 3,000 equal logits: ln 3000 above each of them.
        let row = vec![50.0_f32; 3000];
        assert!((log_sum_exp(&row) - 50.0 - 3000.0_f64.ln()).abs() < 1e-6);
        let row: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 * 0.1 - 5.0).collect();
        let want = row.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        assert!((log_sum_exp(&row) - want).abs() < 1e-6);
        assert_eq!(max(&row), 5.0);
    }

    #[test]
    fn mean_gap_of_known_rows() {
        // A half of 3 and a half of -1; the third is excluded by `t`, whatever `s` says of it.
        let t = [0.5f32.ln(), 0.5f32.ln(), f32::NEG_INFINITY];
        let s = [t[0] - 3.0, t[1] + 1.0, f32::NEG_INFINITY];
        assert!((mean_gap(&s, &t, 0.0) - 1.0).abs() < 1e-6);
        let t: Vec<f32> = (0..2500).map(|i| ((i * 37) % 101) as f32 * 0.1 - 5.0).collect();
        let s: Vec<f32> = (0..2500).map(|i| ((i * 53) % 89) as f32 * 0.1 - 4.0).collect();
        let all = log_sum_exp(&t);
        let gap = |(s, t): (&f32, &f32)| (f64::from(*t) - all).exp() * f64::from(*t - *s);
        let want: f64 = s.iter().zip(&t).map(gap).sum();
        assert!((mean_gap(&s, &t, all as f32) - want).abs() < 1e-5);
    }

    #[test]
    fn not_a_number_is_not_hidden() {
        let mut row = vec![0.0_f32; 40];
        assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
        for place in [3, 39] {
            row[place] = f32::NAN;
            assert!(log_sum_exp(&row).is_nan());
            row[place] = 0.0;
        }
    }
}
