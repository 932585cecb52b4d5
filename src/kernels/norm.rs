//! RMS and layer normalisation.

use super::multiversion::{mul_add, multiversion};

const LANES: usize = 16;

#[inline(always)]
fn inverse_rms<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|v| v * v).sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = mul_add::<FMA>(*v, *v, *lane);
        }
    }
    let sum = lanes.iter().sum::<f32>() + rest;
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn sum<const FMA: bool>(x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += *v;
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Layer normalisation of one row in place. The mean goes first, so that the sum of squares loses
/// nothing where the mean is large.
#[inline(always)]
fn normalise<const FMA: bool>(x: &mut [f32], weight: &[f32], shift: &[f32], eps: f32) {
    let mean = sum::<FMA>(x) / x.len() as f32;
    x.iter_mut().for_each(|v| *v -= mean);
    let s = inverse_rms::<FMA>(x, eps);
    for ((v, w), b) in x.iter_mut().zip(weight).zip(shift) {
        *v = mul_add::<FMA>(*v * s, *w, *b);
    }
}

multiversion! {
    /// `x = (x - mean) / sqrt(variance + eps) * weight + shift` for each row of the length of `weight`.
    pub fn layer_norm(rows: &mut [f32], weight: &[f32], shift: &[f32], eps: f32) {
        for row in rows.chunks_exact_mut(weight.len()) {
            normalise::<FMA>(row, weight, shift, eps);
        }
    }

    /// [`layer_norm`] of `x + delta + bias`: the end of a block's half. `bias` has the length of a row.
    pub fn add_layer_norm(
        rows: &mut [f32],
        delta: &[f32],
        bias: &[f32],
        weight: &[f32],
        shift: &[f32],
        eps: f32,
    ) {
        let width = weight.len();
        for (row, delta) in rows.chunks_exact_mut(width).zip(delta.chunks_exact(width)) {
            for ((x, d), b) in row.iter_mut().zip(delta).zip(bias) {
                *x += *d + *b;
            }
            normalise::<FMA>(row, weight, shift, eps);
        }
    }

    /// `out = x / rms(x) * weight`, all of the same length.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let s = inverse_rms::<FMA>(x, eps);
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = *v * s * *w;
        }
    }

    /// `x = x / rms(x) * weight`.
    pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
        let s = inverse_rms::<FMA>(x, eps);
        for (v, w) in x.iter_mut().zip(weight) {
            *v *= s * *w;
        }
    }

    /// `x += y`.
    pub fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += *y;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalises_to_unit_mean_square() {
        // rms of (3, 4, 0, ...) over 20 values is sqrt(25 / 20); one remainder element counts too.
        let mut x = vec![0.0; 20];
        (x[0], x[19]) = (3.0, 4.0);
        let weight: Vec<f32> = (0..20).map(|i| 1.0 + i as f32).collect();
        let mut out = vec![0.0; 20];
        rms_norm(&x, &weight, 0.0, &mut out);
        let rms = (25.0_f32 / 20.0).sqrt();
        assert!((out[0] - 3.0 / rms).abs() < 1e-6);
        assert!((out[19] - 20.0 * 4.0 / rms).abs() < 1e-5);
        rms_norm_in_place(&mut x, &weight, 0.0);
        assert!((x[19] - out[19]).abs() < 1e-5);
        add(&mut x, &out);
        assert!((x[0] - 2.0 * out[0]).abs() < 1e-6);
    }

    #[test]
    fn layer_norm_by_hand() {
        // Mean 2, variance 2 over (0, 2, 4, 2): (-2, 0, 2, 0) / sqrt 2.
        let (weight, shift) = ([1.0, 1.0, 2.0, 1.0], [0.5, 0.0, 0.0, 0.0]);
        let mut rows = [0.0, 2.0, 4.0, 2.0, 100.0, 102.0, 104.0, 102.0];
        layer_norm(&mut rows, &weight, &shift, 0.0);
        let root = 2.0_f32.sqrt();
        for row in rows.chunks_exact(4) {
            for (got, want) in row.iter().zip([0.5 - root, 0.0, 2.0 * root, 0.0]) {
                assert!((got - want).abs() < 1e-6, "{row:?}");
            }
        }
        let mut summed = [0.0, 1.0, 2.0, 0.0];
        add_layer_norm(
            &mut summed,
            &[0.0, 1.0, 1.0, 2.0],
            &[0.0, 0.0, 1.0, 0.0],
            &weight,
            &shift,
            0.0,
        );
        assert_eq!(summed, rows[..4]);
        // Longer than the lanes, with a remainder: unit variance and no mean.
        let mut long: Vec<f32> = (0..37).map(|i| ((i * 7) % 11) as f32).collect();
        layer_norm(&mut long, &[1.0; 37], &[0.0; 37], 0.0);
        let mean = long.iter().sum::<f32>() / 37.0;
        let square = long.iter().map(|v| v * v).sum::<f32>() / 37.0;
        assert!(mean.abs() < 1e-6 && (square - 1.0).abs() < 1e-5, "{mean} {square}");
    }

    #[test]
    fn zero_rows_stay_zero() {
        let mut out = vec![1.0; 8];
        rms_norm(&[0.0; 8], &[1.0; 8], 1e-6, &mut out);
        assert_eq!(out, [0.0; 8]);
    }
}
