//! Normalisation of each channel over all rows (pixels of all images of a batch).

// Many slices are read side by side; zipped they would be harder to read and no faster.
#![allow(clippy::needless_range_loop)]

use super::super::multiversion::{mul_add, multiversion};
use super::super::threads;

/// Rows that are summed up together; sums of such runs are added in their order.
const RUN: usize = 512;

/// Sums over rows of what `f` adds for a run of rows into a buffer of `size` elements.
fn sums(rows: usize, size: usize, f: impl Fn(usize, usize, &mut [f32]) + Sync) -> Vec<f64> {
    let mut parts = vec![0.0; rows.div_ceil(RUN) * size];
    threads::for_rows(&mut parts, size, 1, |first, parts| {
        for (i, part) in parts.chunks_exact_mut(size).enumerate() {
            let start = (first + i) * RUN;
            f(start, rows.min(start + RUN), part);
        }
    });
    let mut total = vec![0.0; size];
    for part in parts.chunks_exact(size) {
        total.iter_mut().zip(part).for_each(|(t, p)| *t += f64::from(*p));
    }
    total
}

/// Mean and variance (of all, not of a sample) of each channel of rows `[.., channels]`.
pub fn moments(x: &[f32], channels: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = x.len() / channels;
    let share = |total: Vec<f64>| -> Vec<f32> {
        total.into_iter().map(|t| (t / rows.max(1) as f64) as f32).collect()
    };
    let mean = share(sums(rows, channels, |from, to, part| {
        add_rows(&x[from * channels..to * channels], part);
    }));
    let variance = share(sums(rows, channels, |from, to, part| {
        add_squares(&x[from * channels..to * channels], &mean, part);
    }));
    (mean, variance)
}

/// `y = (x - mean) * scale + shift` of each channel.
pub fn apply(x: &[f32], mean: &[f32], scale: &[f32], shift: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "sizes of a batch norm");
    let channels = mean.len();
    threads::for_rows(y, channels, super::grain(channels), |first, y| {
        apply_part(&x[first * channels..][..y.len()], mean, scale, shift, y);
    });
}

/// What the gradient of a batch norm is made from, and `[channels]` each: `sum g` and `sum g xhat`.
pub fn gradient_sums(x: &[f32], g: &[f32], mean: &[f32], inverse: &[f32]) -> [Vec<f32>; 2] {
    let channels = mean.len();
    let rows = x.len() / channels;
    let total = sums(rows, 2 * channels, |from, to, part| {
        let places = from * channels..to * channels;
        add_products(&x[places.clone()], &g[places], mean, inverse, part);
    });
    let part = |from: usize| total[from..from + channels].iter().map(|t| *t as f32).collect();
    [part(0), part(channels)]
}

/// `dx = weight inverse (g - (sum g + xhat sum(g xhat)) / rows)`, overwritten.
pub fn backward(
    x: &[f32],
    g: &[f32],
    (mean, inverse, weight): (&[f32], &[f32], &[f32]),
    [sum, product]: &[Vec<f32>; 2],
    dx: &mut [f32],
) {
    let channels = mean.len();
    let share = 1.0 / (x.len() / channels) as f32;
    let scale: Vec<f32> = weight.iter().zip(inverse).map(|(w, i)| w * i).collect();
    // `dx = scale g - a - b (x - mean)`
    let a: Vec<f32> = scale.iter().zip(sum).map(|(s, t)| s * t * share).collect();
    let b: Vec<f32> =
        scale.iter().zip(product).zip(inverse).map(|((s, t), i)| s * t * share * i).collect();
    threads::for_rows(dx, channels, super::grain(channels), |first, dx| {
        let places = first * channels..first * channels + dx.len();
        back_part(&x[places.clone()], &g[places], mean, &scale, &a, &b, dx);
    });
}

/// `x = min(max(x, 0), 6)`.
pub fn relu6(x: &mut [f32]) {
    threads::for_rows(x, 1, super::GRAIN, |_, x| relu6_part(x));
}

/// `g = 0` where [`relu6`] gave one of its ends.
pub fn relu6_backward(y: &[f32], g: &mut [f32]) {
    assert_eq!(y.len(), g.len(), "sizes of a nonlinearity");
    threads::for_rows(g, 1, super::GRAIN, |first, g| {
        let y = &y[first..first + g.len()];
        relu6_back_part(y, g);
    });
}

multiversion! {
    fn add_rows(x: &[f32], out: &mut [f32]) {
        for row in x.chunks_exact(out.len()) {
            out.iter_mut().zip(row).for_each(|(o, x)| *o += x);
        }
    }

    fn add_squares(x: &[f32], mean: &[f32], out: &mut [f32]) {
        for row in x.chunks_exact(mean.len()) {
            for ((o, x), m) in out.iter_mut().zip(row).zip(mean) {
                let d = x - m;
                *o = mul_add::<FMA>(d, d, *o);
            }
        }
    }

    fn apply_part(x: &[f32], mean: &[f32], scale: &[f32], shift: &[f32], y: &mut [f32]) {
        let channels = mean.len();
        for (x, y) in x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)) {
            for ((((y, x), m), s), b) in y.iter_mut().zip(x).zip(mean).zip(scale).zip(shift) {
                *y = mul_add::<FMA>(x - m, *s, *b);
            }
        }
    }

    fn add_products(x: &[f32], g: &[f32], mean: &[f32], inverse: &[f32], out: &mut [f32]) {
        let channels = mean.len();
        let (sum, product) = out.split_at_mut(channels);
        for (x, g) in x.chunks_exact(channels).zip(g.chunks_exact(channels)) {
            sum.iter_mut().zip(g).for_each(|(s, g)| *s += g);
            for ((((p, g), x), m), i) in product.iter_mut().zip(g).zip(x).zip(mean).zip(inverse) {
                *p = mul_add::<FMA>(*g, (x - m) * i, *p);
            }
        }
    }

    fn back_part(
        x: &[f32],
        g: &[f32],
        mean: &[f32],
        scale: &[f32],
        a: &[f32],
        b: &[f32],
        dx: &mut [f32],
    ) {
        let channels = mean.len();
        let rows = x.chunks_exact(channels).zip(g.chunks_exact(channels));
        for ((x, g), dx) in rows.zip(dx.chunks_exact_mut(channels)) {
            for c in 0..channels {
                dx[c] = scale[c] * g[c] - a[c] - b[c] * (x[c] - mean[c]);
            }
        }
    }

    fn relu6_part(x: &mut [f32]) {
        // Not a number must show, so this is no clamp of the kind that loses it.
        x.iter_mut().for_each(|x| {
            let low = if *x < 0.0 { 0.0 } else { *x };
            *x = if low > 6.0 { 6.0 } else { low };
        });
    }

    fn relu6_back_part(y: &[f32], g: &mut [f32]) {
        g.iter_mut().zip(y).for_each(|(g, y)| *g = if *y > 0.0 && *y < 6.0 { *g } else { 0.0 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_by_hand_and_of_many_rows() {
        let (mean, variance) = moments(&[1.0, 10.0, 3.0, 10.0], 2);
        assert_eq!((mean, variance), (vec![2.0, 10.0], vec![1.0, 0.0]));
        let x: Vec<f32> = (0..3 * (2 * RUN + 7)).map(|i| 100.0 + (i as f32 * 0.3).cos()).collect();
        let (mean, variance) = moments(&x, 3);
        for c in 0..3 {
            let of: Vec<f64> = x.iter().skip(c).step_by(3).map(|v| f64::from(*v)).collect();
            let m = of.iter().sum::<f64>() / of.len() as f64;
            let v = of.iter().map(|v| (v - m).powi(2)).sum::<f64>() / of.len() as f64;
            assert!((f64::from(mean[c]) - m).abs() < 1e-4);
            assert!((f64::from(variance[c]) - v).abs() < 1e-4);
        }
    }

    #[test]
    fn ends_and_missing_numbers() {
        let mut x = [-1.0, 0.0, 3.0, 6.0, 7.0, f32::NAN];
        relu6(&mut x);
        assert_eq!(x[..5], [0.0, 0.0, 3.0, 6.0, 6.0]);
        assert!(x[5].is_nan());
        let mut g = [1.0; 5];
        relu6_backward(&x[..5], &mut g);
        assert_eq!(g, [0.0, 0.0, 1.0, 0.0, 0.0]);
    }
}
