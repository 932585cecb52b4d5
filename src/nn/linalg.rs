//! Decompositions of small dense matrices in f64, the same bits on every run: one thread a matrix (share
//! the matrices over threads instead), fixed signs, ties to the lowest index.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor;
use faer::linalg::{matmul, svd as faer_svd, triangular_inverse};
use faer::{Accum, Mat, MatRef, Par, Spec};

use crate::error::{Error, Reason, Result};

/// A matrix from f32 elements in row order. Panics for another number of elements.
pub fn from_rows(values: &[f32], rows: usize, cols: usize) -> Mat<f64> {
    assert_eq!(values.len(), rows * cols, "no [{rows}, {cols}] matrix");
    Mat::from_fn(rows, cols, |r, c| f64::from(values[r * cols + c]))
}

/// The elements in row order, rounded to f32.
pub fn to_rows(matrix: MatRef<'_, f64>) -> Vec<f32> {
    let mut out = Vec::with_capacity(matrix.nrows() * matrix.ncols());
    for r in 0..matrix.nrows() {
        out.extend((0..matrix.ncols()).map(|c| matrix[(r, c)] as f32));
    }
    out
}

/// `a b`.
pub fn product(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    matmul::matmul(out.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
    out
}

/// `a = u diag(s) v^T` with `k = min(m, n)` components.
#[derive(Debug, Clone)]
pub struct Svd {
    /// `[m, k]`, orthonormal columns.
    pub u: Mat<f64>,
    /// Falling, none negative.
    pub s: Vec<f64>,
    /// `[n, k]`, orthonormal columns.
    pub v: Mat<f64>,
}

/// The thin singular value decomposition. A decomposition leaves the sign of each component open; here
/// the entry of `u`'s column with the largest absolute value (the first of equal ones) is positive.
///
/// # Errors
/// NUMERIC_FAILURE naming `what` where the iteration does not converge or an entry is not finite.
pub fn svd(a: MatRef<'_, f64>, what: &str) -> Result<Svd> {
    let (m, n) = (a.nrows(), a.ncols());
    let k = m.min(n);
    let (mut u, mut v) = (Mat::zeros(m, k), Mat::zeros(n, k));
    let mut s = Diag::<f64>::zeros(k);
    let failed = || {
        Error::new(
            Reason::NumericFailure,
            format!("'{what}' has no singular value decomposition; its entries are not all finite"),
        )
    };
    if k == 0 {
        return Ok(Svd { u, s: Vec::new(), v });
    }
    let thin = faer_svd::ComputeSvdVectors::Thin;
    let scratch = faer_svd::svd_scratch::<f64>(m, n, thin, thin, Par::Seq, Spec::default());
    faer_svd::svd(
        a,
        s.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    )
    .map_err(|_| failed())?;
    let s: Vec<f64> = (0..k).map(|i| s.column_vector()[i]).collect();
    if !s.iter().all(|s| s.is_finite()) {
        return Err(failed());
    }
    for j in 0..k {
        let mut top = 0;
        for i in 1..m {
            if u[(i, j)].abs() > u[(top, j)].abs() {
                top = i;
            }
        }
        if u[(top, j)] < 0.0 {
            (0..m).for_each(|i| u[(i, j)] = -u[(i, j)]);
            (0..n).for_each(|i| v[(i, j)] = -v[(i, j)]);
        }
    }
    Ok(Svd { u, s, v })
}

/// `a[p[i], ..] = l[i, ..] diag(d) u`, with `k = min(m, n)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Ldu {
    /// The row of `a` that became row `i`.
    pub rows: Vec<usize>,
    /// `[m, k]`: ones on the diagonal, zeros above.
    pub l: Mat<f64>,
    pub d: Vec<f64>,
    /// `[k, n]`: ones on the diagonal, zeros below. Rows whose `d` is zero have the row of the upper
    /// factor undivided, with a one on the diagonal.
    pub u: Mat<f64>,
}

/// The decomposition with partial pivoting: the largest absolute value of a column, the lowest row of
/// equal ones. A column without one is passed over and gives `d = 0`.
pub fn ldu(a: MatRef<'_, f64>) -> Ldu {
    let (m, n) = (a.nrows(), a.ncols());
    let k = m.min(n);
    let mut w: Vec<Vec<f64>> = (0..m).map(|i| (0..n).map(|j| a[(i, j)]).collect()).collect();
    let mut rows: Vec<usize> = (0..m).collect();
    for step in 0..k {
        let mut top = step;
        for i in step + 1..m {
            if w[i][step].abs() > w[top][step].abs() {
                top = i;
            }
        }
        w.swap(step, top);
        rows.swap(step, top);
        let (done, rest) = w.split_at_mut(step + 1);
        let pivot = &done[step];
        if pivot[step] == 0.0 {
            continue;
        }
        for row in rest {
            let factor = row[step] / pivot[step];
            row[step] = factor;
            if factor != 0.0 {
                for (x, p) in row[step + 1..].iter_mut().zip(&pivot[step + 1..]) {
                    *x -= factor * p;
                }
            }
        }
    }
    let d: Vec<f64> = (0..k).map(|i| w[i][i]).collect();
    let l = Mat::from_fn(m, k, |i, j| match i.cmp(&j) {
        std::cmp::Ordering::Less => 0.0,
        std::cmp::Ordering::Equal => 1.0,
        // Below a pivot of zero all entries are zero.
        std::cmp::Ordering::Greater => w[i][j],
    });
    let u = Mat::from_fn(k, n, |i, j| match i.cmp(&j) {
        std::cmp::Ordering::Less if d[i] != 0.0 => w[i][j] / d[i],
        std::cmp::Ordering::Less => w[i][j],
        std::cmp::Ordering::Equal => 1.0,
        std::cmp::Ordering::Greater => 0.0,
    });
    Ldu { rows, l, d, u }
}

/// The inverse of a symmetric positive definite matrix; none if it is not that.
pub fn inverse(a: MatRef<'_, f64>) -> Option<Mat<f64>> {
    let n = a.nrows();
    let mut l = a.to_owned();
    let scratch = factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, Spec::default());
    factor::cholesky_in_place(
        l.as_mut(),
        factor::LltRegularization::default(),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Spec::default(),
    )
    .ok()?;
    // What stands above the diagonal is not part of the factor.
    let l = Mat::from_fn(n, n, |i, j| if i >= j { l[(i, j)] } else { 0.0 });
    let mut inverse = Mat::<f64>::zeros(n, n);
    triangular_inverse::invert_lower_triangular(inverse.as_mut(), l.as_ref(), Par::Seq);
    let out = product(inverse.transpose(), inverse.as_ref());
    let finite = (0..n).all(|j| (0..n).all(|i| out[(i, j)].is_finite()));
    finite.then_some(out)
}

/// `a` to the power `power` for a symmetric matrix without negative eigenvalues (small negative ones,
/// which rounding makes, count as zero).
///
/// # Errors
/// As [`svd`].
pub fn symmetric_power(a: MatRef<'_, f64>, power: f64, what: &str) -> Result<Mat<f64>> {
    // For such a matrix the singular vectors are the eigenvectors.
    let Svd { u, s, .. } = svd(a, what)?;
    let scaled = Mat::from_fn(u.nrows(), s.len(), |i, j| u[(i, j)] * s[j].powf(power));
    Ok(product(scaled.as_ref(), u.transpose()))
}

/// An orthonormal basis of the columns of `a` `[m, n]`, `m >= n`, by Gram and Schmidt run twice over each
/// column; none if they depend on each other.
pub fn orthonormal(a: MatRef<'_, f64>) -> Option<Mat<f64>> {
    let (m, n) = (a.nrows(), a.ncols());
    let mut q = a.to_owned();
    for j in 0..n {
        let before = column_norm(q.as_ref(), j);
        for _ in 0..2 {
            for i in 0..j {
                let dot: f64 = (0..m).map(|r| q[(r, i)] * q[(r, j)]).sum();
                (0..m).for_each(|r| q[(r, j)] -= dot * q[(r, i)]);
            }
        }
        let norm = column_norm(q.as_ref(), j);
        if norm.is_nan() || norm <= 1e-10 * before {
            return None;
        }
        (0..m).for_each(|r| q[(r, j)] /= norm);
    }
    Some(q)
}

fn column_norm(a: MatRef<'_, f64>, j: usize) -> f64 {
    (0..a.nrows()).map(|r| a[(r, j)] * a[(r, j)]).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;
    use crate::seed::Stream;

    fn random(m: usize, n: usize, seed: u64) -> Mat<f64> {
        let mut rng = Stream::root(seed).rng();
        Mat::from_fn(m, n, |_, _| 2.0 * rng.random::<f64>() - 1.0)
    }

    fn distance(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> f64 {
        assert_eq!((a.nrows(), a.ncols()), (b.nrows(), b.ncols()));
        let each = (0..a.nrows()).flat_map(|i| (0..a.ncols()).map(move |j| (i, j)));
        each.map(|at| (a[at] - b[at]).abs()).fold(0.0, f64::max)
    }

    fn identity(n: usize) -> Mat<f64> {
        Mat::identity(n, n)
    }

    #[test]
    fn singular_values_worked_out_by_hand_and_fixed_signs() {
        // [[0, -2], [3, 0]] = e2 3 e1^T + e1 2 (-e2)^T.
        let a = Mat::from_fn(2, 2, |i, j| [[0.0, -2.0], [3.0, 0.0]][i][j]);
        let Svd { u, s, v } = svd(a.as_ref(), "a").unwrap();
        assert!((s[0] - 3.0).abs() < 1e-12 && (s[1] - 2.0).abs() < 1e-12);
        let want = |m: &Mat<f64>, rows: [[f64; 2]; 2]| {
            distance(m.as_ref(), Mat::from_fn(2, 2, |i, j| rows[i][j]).as_ref()) < 1e-12
        };
        assert!(want(&u, [[0.0, 1.0], [1.0, 0.0]]), "{u:?}");
        assert!(want(&v, [[1.0, 0.0], [0.0, -1.0]]), "{v:?}");
        for (m, n) in [(7, 4), (4, 7), (5, 5), (1, 3)] {
            let a = random(m, n, 3);
            let first = svd(a.as_ref(), "a").unwrap();
            let minus = Mat::from_fn(m, n, |i, j| -a[(i, j)]);
            let second = svd(minus.as_ref(), "a").unwrap();
            assert!(distance(first.u.as_ref(), second.u.as_ref()) < 1e-9, "signs are fixed");
            let k = m.min(n);
            let us = Mat::from_fn(m, k, |i, j| first.u[(i, j)] * first.s[j]);
            assert!(
                distance(product(us.as_ref(), first.v.transpose()).as_ref(), a.as_ref()) < 1e-12
            );
            let gram = product(first.v.transpose(), first.v.as_ref());
            assert!(distance(gram.as_ref(), identity(k).as_ref()) < 1e-12);
        }
        let bad = Mat::from_fn(2, 2, |_, _| f64::NAN);
        assert_eq!(svd(bad.as_ref(), "w").unwrap_err().reason(), Reason::NumericFailure);
    }

    /// `p l diag(d) u`.
    fn assembled(f: &Ldu) -> Mat<f64> {
        let k = f.d.len();
        let ld = Mat::from_fn(f.l.nrows(), k, |i, j| f.l[(i, j)] * f.d[j]);
        let permuted = product(ld.as_ref(), f.u.as_ref());
        let mut out = Mat::zeros(permuted.nrows(), permuted.ncols());
        for (i, row) in f.rows.iter().enumerate() {
            (0..out.ncols()).for_each(|j| out[(*row, j)] = permuted[(i, j)]);
        }
        out
    }

    #[test]
    fn the_triangles_give_the_matrix_back() {
        for (m, n) in [(6, 4), (4, 6), (5, 5), (1, 4), (4, 1)] {
            let a = random(m, n, 9);
            let f = ldu(a.as_ref());
            assert!(distance(assembled(&f).as_ref(), a.as_ref()) < 1e-12, "{m} x {n}");
            let k = m.min(n);
            for j in 0..k {
                assert_eq!((f.l[(j, j)], f.u[(j, j)]), (1.0, 1.0));
                assert!((0..j).all(|i| f.l[(i, j)] == 0.0 && f.u[(j, i)] == 0.0));
                assert!((j..m).all(|i| f.l[(i, j)].abs() <= 1.0));
            }
            assert_eq!(ldu(a.as_ref()), f);
        }
    }

    #[test]
    fn equal_pivots_take_the_lowest_row_and_zero_pivots_divide_nothing() {
        let a = Mat::from_fn(3, 2, |i, j| [[1.0, 1.0], [-2.0, 4.0], [2.0, 0.0]][i][j]);
        let f = ldu(a.as_ref());
        assert_eq!(f.rows[0], 1, "-2 stands before 2");
        // Two equal columns: the second pivot is zero.
        let a =
            Mat::from_fn(3, 3, |i, j| [[1.0, 1.0, 2.0], [2.0, 2.0, 1.0], [3.0, 3.0, 5.0]][i][j]);
        let f = ldu(a.as_ref());
        assert_eq!(f.d[1], 0.0);
        assert!((0..3).all(|i| (0..3).all(|j| f.l[(i, j)].is_finite() && f.u[(i, j)].is_finite())));
    }

    #[test]
    fn inverses_powers_and_bases() {
        // [[2, 1], [1, 1]]^-1 = [[1, -1], [-1, 2]].
        let a = Mat::from_fn(2, 2, |i, j| [[2.0, 1.0], [1.0, 1.0]][i][j]);
        let want = Mat::from_fn(2, 2, |i, j| [[1.0, -1.0], [-1.0, 2.0]][i][j]);
        assert!(distance(inverse(a.as_ref()).unwrap().as_ref(), want.as_ref()) < 1e-12);
        assert!(
            inverse(Mat::from_fn(2, 2, |i, j| if i == j { 1.0 } else { 2.0 }).as_ref()).is_none()
        );
        let root = symmetric_power(a.as_ref(), 0.5, "a").unwrap();
        assert!(distance(product(root.as_ref(), root.as_ref()).as_ref(), a.as_ref()) < 1e-12);
        let q = orthonormal(random(6, 3, 1).as_ref()).unwrap();
        let gram = product(q.transpose(), q.as_ref());
        assert!(distance(gram.as_ref(), identity(3).as_ref()) < 1e-12);
        assert!(orthonormal(Mat::from_fn(3, 2, |i, _| i as f64).as_ref()).is_none());
        assert_eq!(to_rows(from_rows(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3).as_ref())[4], 5.0);
    }
}
