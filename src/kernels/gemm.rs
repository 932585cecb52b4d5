//! Dense f32 products, through the `gemm` crate.

use gemm::Parallelism;

/// A matrix inside a slice: element `(r, c)` is at `r * row_stride + c * col_stride`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix without gaps. Panics if `data` is shorter.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols, 1)
    }

    /// A matrix with any strides. Panics if an element would lie outside `data`.
    pub fn strided(
        data: &'a [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Self {
        check(data.len(), rows, cols, row_stride, col_stride);
        Self { data, rows, cols, row_stride, col_stride }
    }

    /// The transposed matrix; nothing is copied.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) {
    if rows > 0 && cols > 0 {
        let last = (rows - 1) * row_stride + (cols - 1) * col_stride;
        assert!(last < len, "a [{rows}, {cols}] matrix does not fit into {len} elements");
    }
}

/// `c = a b`, or `c += a b` if `accumulate`; `c` is row-major, its rows `c_stride` elements apart
/// (gaps are left alone). Parallel over tiles of `c` if `parallel`, on rayon's current pool; every
/// element is summed in one order, so the result does not depend on scheduling.
pub fn gemm(
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
    parallel: bool,
) {
    assert_eq!(a.cols, b.rows, "inner dimensions differ");
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert!(c_stride >= n || m <= 1, "rows of the result overlap");
    check(c.len(), m, n, c_stride, 1);
    if m == 0 || n == 0 {
        return;
    }
    let parallelism = if parallel { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: `check` proved that all elements of the three matrices lie inside their slices (slices
    // are at most isize::MAX bytes, so the strides fit), and `c` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `y[t, o] = sum_i x[t, i] w[o, i]` for row-major `x [.., inner]` and `w [.., inner]`; parallel.
pub fn multiply(x: &[f32], w: &[f32], y: &mut [f32], inner: usize) {
    let (tokens, out) = (x.len() / inner, w.len() / inner);
    gemm(View::new(x, tokens, inner), View::new(w, out, inner).t(), y, out, false, true);
}

/// `dx[t, i] = sum_o g[t, o] w[o, i]` for row-major `g [.., outer]` and `w [outer, ..]`; parallel.
pub fn multiply_transposed(g: &[f32], w: &[f32], dx: &mut [f32], outer: usize) {
    let (tokens, inner) = (g.len() / outer, w.len() / outer);
    gemm(View::new(g, tokens, outer), View::new(w, outer, inner), dx, inner, false, true);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_small_matrices() {
        // x = [[1, 2, 3]], w = [[1, 0, 1], [2, -1, 0]]
        let (x, w) = ([1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 2.0, -1.0, 0.0]);
        let mut y = [f32::NAN; 2];
        multiply(&x, &w, &mut y, 3);
        assert_eq!(y, [4.0, 0.0]);
        let mut dx = [f32::NAN; 3];
        multiply_transposed(&[1.0, 2.0], &w, &mut dx, 2);
        assert_eq!(dx, [5.0, -2.0, 1.0]);
    }

    #[test]
    fn strides_leave_gaps_alone_and_accumulate_adds() {
        let a = [1.0, 2.0, 9.0, 3.0, 4.0];
        let mut c = [1.0; 6];
        gemm(View::strided(&a, 2, 2, 3, 1), View::new(&[1.0, 1.0], 2, 1), &mut c, 3, true, false);
        assert_eq!(c, [4.0, 1.0, 1.0, 8.0, 1.0, 1.0]);
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_view_beyond_its_slice_is_refused() {
        View::new(&[0.0; 5], 2, 3);
    }
}
