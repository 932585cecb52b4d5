//! Nonlinearities, gated and not, and their gradients.

use super::super::activation::{cumulative, exp, softcap};
use super::super::multiversion::{mul_add, multiversion};
use super::super::threads::{self, Shared};
use super::GRAIN;

/// `2 sqrt(2 / pi)`, for the tanh form of GELU: `(1 + tanh z) / 2` is the logistic function of `2 z`.
const SLOPE: f32 = 1.595_769;
/// `1 / sqrt(2 pi)`.
const DENSITY: f32 = 0.398_942_3;

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Function {
    /// `x / (1 + e^-x)`
    Silu,
    /// `x Phi(x)`, with the normal distribution function.
    Gelu,
    GeluTanh,
    Relu,
}

/// `out = f(x)`.
pub fn apply(f: Function, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "sizes of an activation");
    threads::for_rows(out, 1, GRAIN, |first, out| {
        let x = &x[first..first + out.len()];
        match f {
            Function::Silu => silu(x, out),
            Function::Gelu => gelu(x, out),
            Function::GeluTanh => gelu_tanh(x, out),
            Function::Relu => relu(x, out),
        }
    });
}

/// `dx = g f'(x)`.
pub fn backward(f: Function, x: &[f32], g: &[f32], dx: &mut [f32]) {
    assert!(x.len() == dx.len() && g.len() == dx.len(), "sizes of an activation");
    threads::for_rows(dx, 1, GRAIN, |first, dx| {
        let places = first..first + dx.len();
        let (x, g) = (&x[places.clone()], &g[places]);
        match f {
            Function::Silu => silu_back(x, g, dx),
            Function::Gelu => gelu_back(x, g, dx),
            Function::GeluTanh => gelu_tanh_back(x, g, dx),
            Function::Relu => relu_back(x, g, dx),
        }
    });
}

/// `x = cap * tanh(x / cap)`.
pub fn cap(x: &mut [f32], cap: f32) {
    threads::for_rows(x, 1, GRAIN, |_, x| softcap(x, cap));
}

/// `g *= 1 - (y / cap)^2`: the gradient of [`cap`], `y` being its result.
pub fn cap_backward(y: &[f32], cap: f32, g: &mut [f32]) {
    assert_eq!(y.len(), g.len(), "sizes of a cap");
    threads::for_rows(g, 1, GRAIN, |first, g| cap_back(&y[first..first + g.len()], cap, g));
}

/// `out = f(gate) * up`, for SiLU and the tanh form of GELU.
///
/// # Panics
/// For another function.
pub fn gated(f: Function, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len(), "sizes of a gate");
    threads::for_rows(out, 1, GRAIN, |first, out| {
        let places = first..first + out.len();
        let (gate, up) = (&gate[places.clone()], &up[places]);
        match f {
            Function::Silu => silu_gated(gate, up, out),
            Function::GeluTanh => gelu_gated(gate, up, out),
            other => panic!("{other:?} is not a gate"),
        }
    });
}

/// The gradients of [`gated`], in the places of `gate` and `up`.
///
/// # Panics
/// For a function that is no gate.
pub fn gated_backward(
    f: Function,
    gate: &[f32],
    up: &[f32],
    g: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) {
    let n = g.len();
    let sizes = [gate.len(), up.len(), dgate.len(), dup.len()];
    assert!(sizes.iter().all(|s| *s == n), "sizes of a gate");
    let (dgate, dup) = (Shared::new(dgate), Shared::new(dup));
    threads::for_ranges(n, GRAIN, |range| {
        // SAFETY: ranges are disjoint.
        let (dgate, dup) = unsafe { (dgate.slice(range.clone()), dup.slice(range.clone())) };
        let (gate, up, g) = (&gate[range.clone()], &up[range.clone()], &g[range]);
        match f {
            Function::Silu => silu_gated_back(gate, up, g, dgate, dup),
            Function::GeluTanh => gelu_gated_back(gate, up, g, dgate, dup),
            other => panic!("{other:?} is not a gate"),
        }
    });
}

/// SiLU and its slope.
#[inline(always)]
fn silu_at<const FMA: bool>(x: f32) -> (f32, f32) {
    let s = 1.0 / (1.0 + exp::<FMA>(-x));
    let y = x * s;
    (y, mul_add::<FMA>(y, 1.0 - s, s))
}

/// The tanh form of GELU and its slope.
#[inline(always)]
fn gelu_tanh_at<const FMA: bool>(x: f32) -> (f32, f32) {
    let square = 0.044_715 * x * x;
    let s = 1.0 / (1.0 + exp::<FMA>(-SLOPE * mul_add::<FMA>(square, x, x)));
    let y = x * s;
    (y, mul_add::<FMA>(y * (1.0 - s), SLOPE * mul_add::<FMA>(3.0, square, 1.0), s))
}

/// GELU and its slope.
#[inline(always)]
fn gelu_at<const FMA: bool>(x: f32) -> (f32, f32) {
    let below = cumulative::<FMA>(x);
    (x * below, mul_add::<FMA>(x * DENSITY, exp::<FMA>(-0.5 * x * x), below))
}

macro_rules! plain {
    ($($forward:ident $backward:ident $at:ident),+) => {
        multiversion! {
            $(
                fn $forward(x: &[f32], out: &mut [f32]) {
                    for (x, out) in x.iter().zip(out) {
                        *out = $at::<FMA>(*x).0;
                    }
                }

                fn $backward(x: &[f32], g: &[f32], dx: &mut [f32]) {
                    for ((x, g), dx) in x.iter().zip(g).zip(dx) {
                        *dx = *g * $at::<FMA>(*x).1;
                    }
                }
            )+
        }
    };
}
plain!(silu silu_back silu_at, gelu gelu_back gelu_at, gelu_tanh gelu_tanh_back gelu_tanh_at);

macro_rules! gates {
    ($($forward:ident $backward:ident $at:ident),+) => {
        multiversion! {
            $(
                fn $forward(gate: &[f32], up: &[f32], out: &mut [f32]) {
                    for ((gate, up), out) in gate.iter().zip(up).zip(out) {
                        *out = $at::<FMA>(*gate).0 * *up;
                    }
                }

                fn $backward(
                    gate: &[f32],
                    up: &[f32],
                    g: &[f32],
                    dgate: &mut [f32],
                    dup: &mut [f32],
                ) {
                    let outs = dgate.iter_mut().zip(dup);
                    for (((gate, up), g), (dgate, dup)) in gate.iter().zip(up).zip(g).zip(outs) {
                        let (y, slope) = $at::<FMA>(*gate);
                        *dgate = *g * *up * slope;
                        *dup = *g * y;
                    }
                }
            )+
        }
    };
}
gates!(silu_gated silu_gated_back silu_at, gelu_gated gelu_gated_back gelu_tanh_at);

multiversion! {
    fn relu(x: &[f32], out: &mut [f32]) {
        for (x, out) in x.iter().zip(out) {
            *out = if *x < 0.0 { 0.0 } else { *x };
        }
    }

    fn cap_back(y: &[f32], cap: f32, g: &mut [f32]) {
        for (y, g) in y.iter().zip(g) {
            let t = *y / cap;
            *g *= 1.0 - t * t;
        }
    }

    fn relu_back(x: &[f32], g: &[f32], dx: &mut [f32]) {
        for ((x, g), dx) in x.iter().zip(g).zip(dx) {
            *dx = if *x > 0.0 { *g } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Function; 4] = [Function::Silu, Function::Gelu, Function::GeluTanh, Function::Relu];

    /// The definitions, in f64.
    fn exact(f: Function, x: f64) -> f64 {
        match f {
            Function::Silu => x / (1.0 + (-x).exp()),
            Function::Relu => x.max(0.0),
            Function::GeluTanh => {
                let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + z.tanh())
            }
            Function::Gelu => {
                let (mut term, mut sum) = (x, x);
                for n in 1..200 {
                    term *= -x * x / (2.0 * f64::from(n));
                    sum += term / f64::from(2 * n + 1);
                }
                x * (0.5 + sum / (2.0 * std::f64::consts::PI).sqrt())
            }
        }
    }

    #[test]
    fn values_and_slopes_match_the_definitions() {
        let x: Vec<f32> = (-250..250).map(|i| i as f32 * 0.02 + 0.01).collect();
        let (g, mut out, mut dx) = (vec![2.0; x.len()], vec![0.0; x.len()], vec![0.0; x.len()]);
        for f in ALL {
            apply(f, &x, &mut out);
            backward(f, &x, &g, &mut dx);
            for ((x, out), dx) in x.iter().zip(&out).zip(&dx) {
                let at = f64::from(*x);
                let slope = (exact(f, at + 1e-4) - exact(f, at - 1e-4)) / 2e-4;
                assert!((f64::from(*out) - exact(f, at)).abs() < 2e-6, "{f:?}({x}) = {out}");
                assert!((f64::from(*dx) - 2.0 * slope).abs() < 1e-5, "{f:?}'({x}): {dx}");
            }
        }
    }

    #[test]
    fn gates_are_products_of_both_sides() {
        let gate: Vec<f32> = (0..77).map(|i| i as f32 * 0.1 - 3.8).collect();
        let up: Vec<f32> = (0..77).map(|i| (i % 7) as f32 - 3.0).collect();
        let g: Vec<f32> = (0..77).map(|i| (i % 5) as f32 - 2.0).collect();
        for f in [Function::Silu, Function::GeluTanh] {
            let [mut y, mut slope, mut out, mut dgate, mut dup] = [const { [0.0; 77] }; 5];
            apply(f, &gate, &mut y);
            backward(f, &gate, &g, &mut slope);
            gated(f, &gate, &up, &mut out);
            gated_backward(f, &gate, &up, &g, &mut dgate, &mut dup);
            for i in 0..77 {
                assert!((out[i] - y[i] * up[i]).abs() < 1e-5);
                assert!((dgate[i] - slope[i] * up[i]).abs() < 1e-5);
                assert!((dup[i] - g[i] * y[i]).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn not_a_number_stays_one() {
        for f in ALL {
            let mut out = [0.0];
            apply(f, &[f32::NAN], &mut out);
            assert!(out[0].is_nan(), "{f:?}");
        }
    }
}
