//! Products with the rows of any layout: decoded and multiplied at once for few tokens, decoded in
//! panels for a dense product for many.

use super::dot::{self, Rows};
use super::gemm::{View, gemm};
use super::threads::{self, Shared, with_scratch};

/// Up to here a row is decoded and multiplied at once.
const FEW: usize = 8;

/// Elements of a panel: a few megabytes, so that it stays in the shared cache while it is used.
const PANEL: usize = 1 << 20;

/// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten. Panics if sizes do not fit.
pub fn multiply<R: Rows>(rows: &R, x: &[f32], y: &mut [f32]) {
    let (out, cols) = (rows.rows(), rows.cols());
    let tokens = x.len() / cols;
    assert!(x.len() == tokens * cols && y.len() == tokens * out, "sizes of a product do not fit");
    if tokens <= FEW {
        return dot::multiply_few(rows, x, y);
    }
    let x = View::new(x, tokens, cols);
    for_panels(rows, |first, panel| {
        let w = View::new(panel, panel.len() / cols, cols);
        gemm(x, w.t(), &mut y[first..], out, false, true);
    });
}

/// `dx[t, i] = sum_o g[t, o] w[o, i]`, overwritten. Panics if sizes do not fit.
pub fn multiply_transposed<R: Rows>(rows: &R, g: &[f32], dx: &mut [f32]) {
    let (out, cols) = (rows.rows(), rows.cols());
    let tokens = g.len() / out;
    assert!(g.len() == tokens * out && dx.len() == tokens * cols, "sizes of a product do not fit");
    if tokens == 0 {
        return;
    }
    for_panels(rows, |first, panel| {
        let count = panel.len() / cols;
        let g = View::strided(&g[first..], tokens, count, out, 1);
        gemm(g, View::new(panel, count, cols), dx, cols, first > 0, true);
    });
}

/// Calls `work` with the first row and the dense elements of consecutive panels.
fn for_panels<R: Rows>(rows: &R, mut work: impl FnMut(usize, &[f32])) {
    let (out, cols) = (rows.rows(), rows.cols());
    let count = (PANEL / cols).clamp(1, out);
    with_scratch(count * cols, |panel| {
        for first in (0..out).step_by(count) {
            let panel = &mut panel[..count.min(out - first) * cols];
            let shared = Shared::new(panel);
            threads::for_ranges(shared.len() / cols, (1 << 15) / cols + 1, |range| {
                // SAFETY: ranges are disjoint.
                let part = unsafe { shared.slice(range.start * cols..range.end * cols) };
                dot::read(rows, first + range.start, part);
            });
            work(first, panel);
        }
    });
}
