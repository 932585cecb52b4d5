//! Nonlinearities: exp, gated SiLU and GELU, soft-capping. Relative errors stay near 1e-7, a few units
//! in the last place of f32.

use super::multiversion::{mul_add, multiversion};

const SMALLEST: f32 = -87.3;
const LARGEST: f32 = 88.3;
/// Adding 1.5 * 2^23 rounds an f32 to a whole number, which then stands in the lowest bits.
const ROUND: f32 = 12_582_912.0;
/// `2 sqrt(2 / pi)`, for the tanh form of GELU: `(1 + tanh z) / 2` is the logistic function of `2 z`.
const SLOPE: f32 = 1.595_769;
/// Coefficients of [`tail`], highest power first.
const TAIL: [f32; 5] = [-0.106_402_97, 0.330_974_9, -0.040_150_087, 0.186_241_61, 0.129_334_21];

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

/// The normal distribution's tail beyond `|x|`: `exp(-t^2 / 2)` times a polynomial in `1 / (1 + 0.34 t)`,
/// fitted so that `t` times it has an absolute error below 5e-8.
#[inline(always)]
fn tail<const FMA: bool>(x: f32) -> f32 {
    // Beyond 14 the tail is 0 in f32; the bound keeps infinity away from 0.
    let t = if x.abs() > 14.0 { 14.0 } else { x.abs() };
    let s = 1.0 / mul_add::<FMA>(0.34, t, 1.0);
    let mut p = TAIL[0];
    for c in &TAIL[1..] {
        p = mul_add::<FMA>(p, s, *c);
    }
    p * s * exp::<FMA>(-0.5 * t * t)
}

/// The normal distribution function.
#[inline(always)]
pub(super) fn cumulative<const FMA: bool>(x: f32) -> f32 {
    let tail = tail::<FMA>(x);
    if x < 0.0 { tail } else { 1.0 - tail }
}

/// `x Phi(x)`, the exact GELU: `max(x, 0)` less `|x|` times the normal distribution's tail beyond it.
#[inline(always)]
fn gelu<const FMA: bool>(x: f32) -> f32 {
    let t = if x.abs() > 14.0 { 14.0 } else { x.abs() };
    let above = if x < 0.0 { 0.0 } else { x };
    above - t * tail::<FMA>(x)
}

multiversion! {
    /// `x = gelu(x + bias)` with the exact GELU, for rows of the length of `bias`.
    pub fn bias_gelu(rows: &mut [f32], bias: &[f32]) {
        for row in rows.chunks_exact_mut(bias.len()) {
            for (x, b) in row.iter_mut().zip(bias) {
                *x = gelu::<FMA>(*x + *b);
            }
        }
    }

    /// `x = gelu(x + bias)` with the tanh form of GELU, for rows of the length of `bias`.
    pub fn bias_gelu_tanh(rows: &mut [f32], bias: &[f32]) {
        for row in rows.chunks_exact_mut(bias.len()) {
            for (v, b) in row.iter_mut().zip(bias) {
                let x = *v + *b;
                let z = SLOPE * mul_add::<FMA>(0.044_715 * x * x, x, x);
                *v = x / (1.0 + exp::<FMA>(-z));
            }
        }
    }

    /// `x = max(x + bias, 0)`, for rows of the length of `bias`.
    pub fn bias_relu(rows: &mut [f32], bias: &[f32]) {
        for row in rows.chunks_exact_mut(bias.len()) {
            for (x, b) in row.iter_mut().zip(bias) {
                let y = *x + *b;
                *x = if y < 0.0 { 0.0 } else { y };
            }
        }
    }

    /// `gate = silu(gate) * up`.
    pub fn silu_gated(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp::<FMA>(-*g)) * u;
        }
    }

    /// `gate = gelu(gate) * up`, with the tanh form of GELU.
    pub fn gelu_gated(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            let x = *g;
            let z = SLOPE * mul_add::<FMA>(0.044_715 * x * x, x, x);
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

    /// The normal distribution function by its series, for `|x| < 6`.
    fn phi(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / (2.0 * f64::from(n));
            sum += term / f64::from(2 * n + 1);
        }
        0.5 + sum / (2.0 * std::f64::consts::PI).sqrt()
    }

    #[test]
    fn biased_activations_match_their_definitions() {
        // 5.99 is where the series above still has ten digits.
        let x: Vec<f32> = (-599..600).map(|i| i as f32 * 0.01).collect();
        let bias = vec![0.0; x.len()];
        let mut exact = x.clone();
        bias_gelu(&mut exact, &bias);
        for (got, x) in exact.iter().zip(&x) {
            let want = f64::from(*x) * phi(f64::from(*x));
            assert!((f64::from(*got) - want).abs() < 5e-7, "gelu({x}) = {got} not {want}");
        }
        for (x, want) in [(20.0, 20.0), (-20.0, 0.0), (f32::INFINITY, f32::INFINITY)] {
            let mut one = [x];
            bias_gelu(&mut one, &[0.0]);
            assert_eq!(one[0], want);
        }
        let mut bad = [f32::NAN];
        bias_gelu(&mut bad, &[0.0]);
        assert!(bad[0].is_nan());

        // Two rows, so that the bias starts again: 1 - 3 and 1 + 1, then 2 - 3 and 2 + 1.
        let mut relu = [1.0, 1.0, 2.0, 2.0];
        let mut tanh_form = relu;
        bias_relu(&mut relu, &[-3.0, 1.0]);
        assert_eq!(relu, [0.0, 2.0, 0.0, 3.0]);
        bias_gelu_tanh(&mut tanh_form, &[-3.0, 1.0]);
        for (got, x) in tanh_form.iter().zip([-2.0_f64, 2.0, -1.0, 3.0]) {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            assert!((f64::from(*got) - 0.5 * x * (1.0 + z.tanh())).abs() < 1e-6, "{x}: {got}");
        }
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
