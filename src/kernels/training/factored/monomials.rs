//! The features of the polynomial method: products of coordinates, so scaled that the features of two
//! vectors multiply to the Taylor polynomial of the exponential of their product.

use super::super::super::multiversion::multiversion;

/// All monomials of `dim` coordinates up to a degree. Monomial `a` of `x` is `x^a / sqrt(a!)`: summed over all
/// of degree `n`, products of the features of `x` and `y` give `(x . y)^n / n!`.
#[derive(Debug, Clone)]
pub struct Monomials {
    dim: usize,
    /// All but the constant one, each as one before it times a coordinate.
    steps: Vec<Step>,
}

#[derive(Debug, Clone, Copy)]
struct Step {
    /// The monomial that is multiplied.
    from: u32,
    coordinate: u32,
    factor: f32,
}

/// Monomials of `dim` coordinates up to `degree`, `C(dim + degree, degree)`; `None` beyond 2^32.
pub fn count(dim: usize, degree: usize) -> Option<usize> {
    let mut count: u64 = 1;
    for i in 1..=degree as u64 {
        // Divisible at every step: these are binomial coefficients.
        count = count.checked_mul(dim as u64 + i)? / i;
        if count > u64::from(u32::MAX) {
            return None;
        }
    }
    usize::try_from(count).ok()
}

/// The largest degree with at most `most` monomials of `dim` coordinates, up to `limit`.
pub fn degree_within(dim: usize, most: usize, limit: usize) -> usize {
    let fits = |degree: &usize| count(dim, *degree).is_some_and(|count| count <= most);
    (1..=limit).take_while(fits).last().unwrap_or(0)
}

impl Monomials {
    /// In the order of their degrees.
    pub fn new(dim: usize, degree: usize) -> Self {
        let mut steps = Vec::with_capacity(count(dim, degree).unwrap_or(1).saturating_sub(1));
        // Of the degree before: the monomial, its last coordinate and that coordinate's power.
        let mut last = vec![(0_u32, 0_usize, 0_u32)];
        for _ in 0..degree {
            let mut next = Vec::new();
            for (from, coordinate, power) in last {
                for c in coordinate..dim {
                    let power = if c == coordinate { power + 1 } else { 1 };
                    let factor = 1.0 / (power as f32).sqrt();
                    steps.push(Step { from, coordinate: c as u32, factor });
                    next.push((steps.len() as u32, c, power));
                }
            }
            last = next;
        }
        Self { dim, steps }
    }

    /// Their number, the constant one included.
    pub fn count(&self) -> usize {
        self.steps.len() + 1
    }

    /// The features of `rows` vectors, whose coordinates are the rows of `x` `[dim, rows]`, as the rows of
    /// `out` `[count, rows]`.
    pub fn expand(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        assert!(
            x.len() == self.dim * rows && out.len() == self.count() * rows,
            "sizes of features"
        );
        out[..rows].fill(1.0);
        for (i, step) in self.steps.iter().enumerate() {
            let (before, rest) = out.split_at_mut((i + 1) * rows);
            let from = &before[step.from as usize * rows..][..rows];
            let x = &x[step.coordinate as usize * rows..][..rows];
            multiply(from, x, step.factor, &mut rest[..rows]);
        }
    }
}

multiversion! {
    /// `out = a b by`.
    fn multiply(a: &[f32], b: &[f32], by: f32, out: &mut [f32]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = a * b * by;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_binomial() {
        assert_eq!([count(4, 2), count(4, 8), count(4, 14)], [Some(15), Some(495), Some(3060)]);
        assert_eq!([count(64, 3), count(64, 2), count(7, 0)], [Some(47_905), Some(2145), Some(1)]);
        assert_eq!(count(1 << 40, 9), None);
        for (dim, degree) in [(1, 5), (3, 4), (5, 2)] {
            assert_eq!(Some(Monomials::new(dim, degree).count()), count(dim, degree));
        }
        assert_eq!([degree_within(4, 15, 9), degree_within(4, 14, 9)], [2, 1]);
        assert_eq!([degree_within(4, 4, 9), degree_within(4, 1 << 20, 9)], [0, 9]);
    }

    #[test]
    fn features_multiply_to_the_taylor_polynomial() {
        let (x, y) = ([0.3_f32, -0.7, 0.5], [1.1_f32, 0.4, -0.2]);
        let dot: f32 = x.iter().zip(&y).map(|(a, b)| a * b).sum();
        for degree in 0..6 {
            let monomials = Monomials::new(3, degree);
            let features = |x: &[f32]| {
                let mut out = vec![0.0; monomials.count()];
                monomials.expand(x, 1, &mut out);
                out
            };
            let got: f32 = features(&x).iter().zip(features(&y)).map(|(a, b)| a * b).sum();
            let (mut term, mut want) = (1.0, 1.0);
            for n in 1..=degree {
                term *= dot / n as f32;
                want += term;
            }
            assert!((got - want).abs() < 1e-6, "{degree}: {got} is not {want}");
        }
        // Two vectors at once: (2, 3) and (1, 0), by hand.
        let monomials = Monomials::new(2, 2);
        let mut out = vec![0.0; 12];
        monomials.expand(&[2.0, 1.0, 3.0, 0.0], 2, &mut out);
        let root = 2.0_f32.sqrt();
        let want =
            [1.0, 1.0, 2.0, 1.0, 3.0, 0.0, 4.0 / root, 1.0 / root, 6.0, 0.0, 9.0 / root, 0.0];
        assert!(out.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{out:?}");
    }
}
