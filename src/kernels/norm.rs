//! RMS normalisation, alone and fused with the residual addition before it.

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

multiversion! {
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
    fn zero_rows_stay_zero() {
        let mut out = vec![1.0; 8];
        rms_norm(&[0.0; 8], &[1.0; 8], 1e-6, &mut out);
        assert_eq!(out, [0.0; 8]);
    }
}
