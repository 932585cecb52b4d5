//! What SparseGPT and GPTQ know of a layer's error: the upper Cholesky factor of the inverse Hessian.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor;
use faer::linalg::triangular_inverse;
use faer::{Mat, Par, Spec};

use crate::calibrate::gram::Gram;
use crate::error::{Error, Reason, Result};

/// Dampening is raised tenfold this often before giving up.
const RETRIES: u32 = 3;

/// `U` with `H^-1 = U^T U`, for `H = 2/n X^T X + damp * mean(diag) * I`.
#[derive(Debug, Clone)]
pub struct Factor {
    cols: usize,
    /// `[cols, cols]` in row order; zeros below the diagonal.
    upper: Vec<f32>,
    /// Columns whose inputs were always zero.
    dead: Vec<bool>,
    /// The share of the mean diagonal that was added in the end.
    pub damp: f64,
}

impl Factor {
    /// Factors the Hessian of inputs whose Gram matrix is `gram`, collected over `sequences`
    /// sequences. Column `j` of the factor stands for input `order[j]`. A matrix that is not positive
    /// definite is tried again with ten, a hundred and a thousand times the dampening, then is NUMERIC_FAILURE
    /// naming `tensor`.
    pub fn new(
        gram: &Gram,
        sequences: usize,
        damp: f64,
        order: &[usize],
        tensor: &str,
    ) -> Result<Self> {
        let scale = 2.0 / sequences.max(1) as f64;
        let diagonal = |j: usize| gram.at(order[j], order[j]) * scale;
        let cols = order.len();
        let dead: Vec<bool> = (0..cols).map(|j| diagonal(j) == 0.0).collect();
        let alive = |j: usize| if dead[j] { 1.0 } else { diagonal(j) };
        let mean = (0..cols).map(alive).sum::<f64>() / cols as f64;
        let mut damp = damp;
        for attempt in 0..=RETRIES {
            if attempt > 0 {
                damp *= 10.0;
            }
            let hessian = |i: usize, j: usize| {
                if i == j { alive(i) + damp * mean } else { gram.at(order[i], order[j]) * scale }
            };
            if let Some(upper) = inverse_factor(cols, hessian) {
                return Ok(Self { cols, upper, dead, damp });
            }
        }
        Err(Error::new(
            Reason::NumericFailure,
            format!(
                "the Hessian of '{tensor}' cannot be factored even with dampening {damp}; use more \
                 calibration text or a larger damp"
            ),
        ))
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The factor, `[cols, cols]` in row order.
    pub fn upper(&self) -> &[f32] {
        &self.upper
    }

    /// Row `j` from the diagonal on.
    pub fn row(&self, j: usize) -> &[f32] {
        &self.upper[j * self.cols + j..(j + 1) * self.cols]
    }

    /// Element `(j, j)`.
    pub fn diagonal(&self, j: usize) -> f32 {
        self.upper[j * self.cols + j]
    }

    /// True for columns whose inputs were always zero.
    pub fn dead(&self) -> &[bool] {
        &self.dead
    }
}

/// The upper Cholesky factor of the inverse of a symmetric matrix, or none if the matrix is not
/// positive definite.
///
/// With `J` reversing the order, `J H J = L L^T` gives `H = R R^T` for the upper triangular
/// `R = J L J`, so `H^-1 = R^-T R^-1`, and `U = R^-1 = J L^-1 J`. That is the same matrix as the
/// Cholesky factor of an explicit inverse (which is unique), at a third of the work and without
/// rounding the inverse first.
fn inverse_factor(n: usize, hessian: impl Fn(usize, usize) -> f64) -> Option<Vec<f32>> {
    let mut l = Mat::from_fn(n, n, |i, j| if i >= j { hessian(n - 1 - i, n - 1 - j) } else { 0.0 });
    let par = Par::rayon(0);
    let scratch = factor::cholesky_in_place_scratch::<f64>(n, par, Spec::default());
    factor::cholesky_in_place(
        l.as_mut(),
        factor::LltRegularization::default(),
        par,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    )
    .ok()?;
    let mut inverse = Mat::<f64>::zeros(n, n);
    triangular_inverse::invert_lower_triangular(inverse.as_mut(), l.as_ref(), par);
    let mut upper = vec![0f32; n * n];
    for i in 0..n {
        for j in i..n {
            upper[i * n + j] = inverse[(n - 1 - i, n - 1 - j)] as f32;
        }
    }
    let sound = upper.iter().all(|v| v.is_finite()) && (0..n).all(|i| upper[i * n + i] > 0.0);
    sound.then_some(upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factor_of_a_two_by_two_worked_out_by_hand() {
        // H = [[2, 1], [1, 1]], H^-1 = [[1, -1], [-1, 2]] = U^T U with U = [[1, -1], [0, 1]].
        let h = [[2.0, 1.0], [1.0, 1.0]];
        let upper = inverse_factor(2, |i, j| h[i][j]).expect("positive definite");
        for (got, want) in upper.iter().zip([1.0, -1.0, 0.0, 1.0]) {
            assert!((got - want).abs() < 1e-6, "{upper:?}");
        }
        assert!(inverse_factor(2, |i, j| if i == j { 1.0 } else { 2.0 }).is_none());
    }

    #[test]
    fn dead_columns_and_dampening() {
        let mut gram = Gram::new(2);
        gram.add(&[2.0, 0.0]);
        // H = diag(4, 0) * 2: dead column set to 1, mean diagonal (8 + 1) / 2, damp 0.1.
        let factor = Factor::new(&gram, 1, 0.1, &[0, 1], "t").expect("factors");
        assert_eq!(factor.dead(), [false, true]);
        assert!((factor.diagonal(0) - (1.0 / 8.45f32).sqrt()).abs() < 1e-6);
        assert!((factor.diagonal(1) - (1.0 / 1.45f32).sqrt()).abs() < 1e-6);
        // Reordered, the same inputs stand at other places.
        let factor = Factor::new(&gram, 1, 0.1, &[1, 0], "t").expect("factors");
        assert_eq!(factor.dead(), [true, false]);
    }

    #[test]
    fn not_finite_is_a_numeric_failure_naming_the_tensor() {
        let mut gram = Gram::new(1);
        gram.add(&[f32::INFINITY]);
        let error = Factor::new(&gram, 1, 0.01, &[0], "model.w").unwrap_err();
        assert_eq!(error.reason(), Reason::NumericFailure);
        assert!(error.message().contains("model.w"));
    }

    #[test]
    fn dampening_is_raised_tenfold_thrice_and_then_given_up() {
        // Two inputs that are always the same: [[4, 4], [4, 4]]. A share of 1e-16 or less is lost beside 4.
        let mut gram = Gram::new(2);
        gram.add(&[2.0, 2.0]);
        let factor = Factor::new(&gram, 2, 1e-18, &[0, 1], "w").expect("at the fourth attempt");
        assert!((factor.damp / 1e-15 - 1.0).abs() < 1e-9, "{}", factor.damp);
        let error = Factor::new(&gram, 2, 1e-19, &[0, 1], "model.w").unwrap_err();
        assert_eq!(error.reason(), Reason::NumericFailure);
        assert!(error.message().contains("model.w"), "{error}");
        // What does without is not raised.
        assert_eq!(Factor::new(&gram, 2, 0.01, &[0, 1], "w").expect("factors").damp, 0.01);
    }
}
