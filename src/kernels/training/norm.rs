//! RMS and layer normalisation of rows, and their gradients.

use super::super::multiversion::{mul_add, multiversion};
use super::super::norm;
use super::super::threads::{self, Shared};
use super::{elementwise, grain};

const LANES: usize = 16;

/// What is divided out of a row: `(mean, 1 / deviation)`, the mean being 0 for RMS norms.
type Scale = (f32, f32);

/// `out = x / rms(x) * weight` for each row.
pub fn rms(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert_eq!(x.len(), out.len(), "sizes of a norm");
    threads::for_rows(out, width, grain(width), |first, out| {
        let x = x[first * width..].chunks_exact(width);
        for (out, x) in out.chunks_exact_mut(width).zip(x) {
            norm::rms_norm(x, weight, eps, out);
        }
    });
}

/// `out = (x - mean) / deviation * weight + shift` for each row.
pub fn layer(x: &[f32], weight: &[f32], shift: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(x.len() == out.len() && shift.len() == width, "sizes of a norm");
    threads::for_rows(out, width, grain(width), |first, out| {
        out.copy_from_slice(&x[first * width..][..out.len()]);
        norm::layer_norm(out, weight, shift, eps);
    });
}

/// Where gradients go.
pub struct Gradients<'a> {
    /// Of the input; added to if `accumulate`, else overwritten.
    pub x: Option<(&'a mut [f32], bool)>,
    /// Of the weight; added to.
    pub weight: Option<&'a mut [f32]>,
    /// Of the shift; added to.
    pub shift: Option<&'a mut [f32]>,
}

/// The gradients of [`rms`] (`centred` false) or [`layer`], `g` being that of the output.
pub fn backward(centred: bool, x: &[f32], weight: &[f32], eps: f32, g: &[f32], to: Gradients<'_>) {
    let width = weight.len();
    assert_eq!(x.len(), g.len(), "sizes of a norm");
    let mut scales: Vec<Scale> = vec![(0.0, 0.0); x.len() / width];
    {
        let shared = Shared::new(&mut scales);
        threads::for_ranges(shared.len(), grain(width), |rows| {
            for row in rows {
                let scale = measure(centred, &x[row * width..][..width], eps);
                // SAFETY: rows are disjoint.
                unsafe { shared.set(row, scale) };
            }
        });
    }
    if let Some((dx, accumulate)) = to.x {
        assert_eq!(dx.len(), x.len(), "sizes of a norm");
        threads::for_rows(dx, width, grain(width), |first, dx| {
            for (i, dx) in dx.chunks_exact_mut(width).enumerate() {
                let at = (first + i) * width;
                let (x, g) = (&x[at..at + width], &g[at..at + width]);
                input(centred, x, weight, g, scales[first + i], accumulate, dx);
            }
        });
    }
    if let Some(weight) = to.weight {
        threads::for_rows(weight, 1, 64, |first, out| {
            let columns = first..first + out.len();
            let rows = x.chunks_exact(width).zip(g.chunks_exact(width)).zip(&scales);
            for ((x, g), scale) in rows {
                add_weight(&x[columns.clone()], &g[columns.clone()], *scale, out);
            }
        });
    }
    if let Some(shift) = to.shift {
        elementwise::add_columns(g, shift);
    }
}

/// `sum f(i)` in lanes.
#[inline(always)]
fn sum_of(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let whole = n / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(start + l);
        }
    }
    lanes.iter().sum::<f32>() + (whole..n).map(f).sum::<f32>()
}

multiversion! {
    fn measure(centred: bool, x: &[f32], eps: f32) -> Scale {
        let n = x.len();
        let mean = if centred { sum_of(n, |i| x[i]) / n as f32 } else { 0.0 };
        let square = sum_of(n, |i| (x[i] - mean) * (x[i] - mean)) / n as f32;
        (mean, 1.0 / (square + eps).sqrt())
    }

    /// With `h = (x - mean) s`: `dx = s (w g - mean(w g) - h mean(w g h))`, without the middle term where
    /// nothing is centred.
    fn input(
        centred: bool,
        x: &[f32],
        weight: &[f32],
        g: &[f32],
        scale: Scale,
        accumulate: bool,
        dx: &mut [f32],
    ) {
        let n = dx.len();
        let (x, weight, g) = (&x[..n], &weight[..n], &g[..n]);
        let (mean, s) = scale;
        let along = sum_of(n, |i| weight[i] * g[i] * (x[i] - mean)) * s / n as f32;
        let level = if centred { sum_of(n, |i| weight[i] * g[i]) / n as f32 } else { 0.0 };
        let slope = -along * s;
        for i in 0..n {
            let d = s * mul_add::<FMA>(slope, x[i] - mean, weight[i] * g[i] - level);
            dx[i] = if accumulate { dx[i] + d } else { d };
        }
    }

    fn add_weight(x: &[f32], g: &[f32], scale: Scale, out: &mut [f32]) {
        for ((out, x), g) in out.iter_mut().zip(x).zip(g) {
            *out = mul_add::<FMA>((*x - scale.0) * scale.1, *g, *out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// The loss `sum(norm(x) r)` in f64.
    fn loss(centred: bool, x: &[f64], w: &[f64], b: &[f64], r: &[f32], eps: f64) -> f64 {
        let n = w.len();
        let rows = x.chunks(n).zip(r.chunks(n));
        rows.map(|(x, r)| {
            let mean = if centred { x.iter().sum::<f64>() / n as f64 } else { 0.0 };
            let square = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            let s = 1.0 / (square + eps).sqrt();
            (0..n).map(|i| ((x[i] - mean) * s * w[i] + b[i]) * f64::from(r[i])).sum::<f64>()
        })
        .sum()
    }

    #[test]
    fn gradients_match_differences() {
        for (centred, width) in [(false, 5), (true, 5), (false, 37), (true, 40)] {
            let (x, w, r) = (noise(3 * width, 1), noise(width, 2), noise(3 * width, 3));
            let b = if centred { noise(width, 4) } else { vec![0.0; width] };
            let mut out = vec![0.0; x.len()];
            match centred {
                true => layer(&x, &w, &b, 1e-3, &mut out),
                false => rms(&x, &w, 1e-3, &mut out),
            }
            let wide = |v: &[f32]| -> Vec<f64> { v.iter().map(|v| f64::from(*v)).collect() };
            let (x64, w64, b64) = (wide(&x), wide(&w), wide(&b));
            let total = loss(centred, &x64, &w64, &b64, &r, 1e-3);
            let got: f64 = out.iter().zip(&r).map(|(o, r)| f64::from(*o) * f64::from(*r)).sum();
            assert!((total - got).abs() < 1e-4, "{total} and {got}");

            let (mut dx, mut dw, mut db) = (vec![1.0; x.len()], vec![0.5; width], vec![0.0; width]);
            let to =
                Gradients { x: Some((&mut dx, true)), weight: Some(&mut dw), shift: Some(&mut db) };
            backward(centred, &x, &w, 1e-3, &r, to);
            let check = |got: f32, of: &dyn Fn(f64) -> f64| {
                let want = (of(1e-5) - of(-1e-5)) / 2e-5;
                assert!((f64::from(got) - want).abs() < 1e-4, "{got} is not {want}");
            };
            for i in 0..x.len() {
                check(dx[i] - 1.0, &|by| {
                    let mut x = x64.clone();
                    x[i] += by;
                    loss(centred, &x, &w64, &b64, &r, 1e-3)
                });
            }
            for i in 0..width {
                check(dw[i] - 0.5, &|by| {
                    let mut w = w64.clone();
                    w[i] += by;
                    loss(centred, &x64, &w, &b64, &r, 1e-3)
                });
                check(db[i], &|by| {
                    let mut b = b64.clone();
                    b[i] += by;
                    loss(centred, &x64, &w64, &b, &r, 1e-3)
                });
            }
        }
    }
}
