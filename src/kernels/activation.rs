//! Nonlinearities: exp, gated SiLU and GELU, soft-capping. Relative errors stay near 1e-7, a few units
//! in the last place of f32.

use super::multiversion::{mul_add, multiversion};

const SMALLEST: f32 = -87.3;
const LARGEST: f32 = 88.3;
/// Adding 1.5 * 2^23 rounds an f32 to a whole number, which then stands in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// `e^x`; 0 below -87.3, held at `e^88.3` above. NaN stays NaN.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Comparisons in this order let NaN through.
    let t = if x > LARGEST { LARGEST } else { x };
    let t = if t < SMALLEST { SMALLEST } else { t };
    let rounded = mul_add::<FMA>(t, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    // ln 2 in two pieces: the first has so few bits that n times it is exact.
    let r = mul_add::<FMA>(n, -0.693_359_4, t);
    let r = mul_add::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = mul_add::<FMA>(p, r, c);
    }
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < SMALLEST { 0.0 } else { p * power }
}

/// `tanh x`, with an absolute error near 1e-7.
#[inline(always)]
pub(super) fn tanh<const FMA: bool>(x: f32) -> f32 {
    1.0 - 2.0 / (exp::<FMA>(2.0 * x) + 1.0)
}

multiversion! {
    /// `gate = silu(gate) * up`.
    pub fn silu_gated(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp::<FMA>(-*g)) * u;
        }
    }

    /// `gate = gelu(gate) * up`, with the tanh form of GELU.
    pub fn gelu_gated(gate: &mut [f32], up: &[f32]) {
        // (1 + tanh z) / 2 is the logistic function of 2 z.
        const A: f32 = 1.595_769; // 2 sqrt(2 / pi)
        for (g, u) in gate.iter_mut().zip(up) {
            let x = *g;
            let z = A * mul_add::<FMA>(0.044_715 * x * x, x, x);
            *g = x / (1.0 + exp::<FMA>(-z)) * u;
        }
    }

    /// `x = cap * tanh(x / cap)`.
    pub fn softcap(x: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for v in x {
            *v = cap * tanh::<FMA>(*v * inverse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relative(a: f32, b: f64) -> f64 {
        (f64::from(a) - b).abs() / b.abs().max(1e-30)
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for i in -8700..8830 {
            let x = i as f32 * 0.01;
            for got in [exp::<false>(x), exp::<true>(x)] {
                assert!(relative(got, f64::from(x).exp()) < 1e-6, "exp({x}) = {got}");
            }
        }
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-88.0), 0.0);
        assert!(exp::<true>(f32::INFINITY).is_finite());
        assert!(exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn gates_match_their_definitions() {
        let x: Vec<f32> = (-300..300).map(|i| i as f32 * 0.1).collect();
        let up = vec![2.0; x.len()];
        let (mut silu, mut gelu, mut capped) = (x.clone(), x.clone(), x.clone());
        silu_gated(&mut silu, &up);
        gelu_gated(&mut gelu, &up);
        softcap(&mut capped, 5.0);
        for (i, &x) in x.iter().enumerate() {
            let x = f64::from(x);
            let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            let want = [2.0 * x / (1.0 + (-x).exp()), x * (1.0 + z.tanh()), 5.0 * (x / 5.0).tanh()];
            for (got, want) in [silu[i], gelu[i], capped[i]].into_iter().zip(want) {
                assert!((f64::from(got) - want).abs() < 1e-6 * (1.0 + want.abs()), "{x}: {got}");
            }
        }
    }
}
