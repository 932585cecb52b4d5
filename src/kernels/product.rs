//! Products with the rows of any layout: decoded and multiplied at once for few tokens, decoded in
//! panels for a dense product for many.

use super::dot::{self, Rows};
use super::gemm::strips::{self, LANES, Line, Result, Right, STRIPS};
use super::gemm::{LINES, View, for_strips, pack};
use super::simd::Level;
use super::threads::{self, Shared, with_scratch};

/// Up to here a row is decoded and multiplied at once.
pub(super) const FEW: usize = 8;

/// Elements that are worth a thread of their own when they are decoded.
const GRAIN: usize = 1 << 15;

/// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten. Panics if sizes do not fit.
pub fn multiply<R: Rows>(rows: &R, x: &[f32], y: &mut [f32]) {
    let (out, cols) = (rows.rows(), rows.cols());
    let tokens = x.len() / cols;
    assert!(x.len() == tokens * cols && y.len() == tokens * out, "sizes of a product do not fit");
    if tokens <= FEW {
        return dot::multiply_few(rows, x, y);
    }
    let level = Level::best();
    let x = View::new(x, tokens, cols);
    // Rows of the weight are columns of a strip: some strips are decoded, then multiplied.
    let (all, each) = (out.div_ceil(LANES), (LINES / cols / STRIPS).max(1) * STRIPS);
    pack::with_lines(each.min(all) * cols, |lines| {
        for first in (0..all).step_by(each) {
            let lines = &mut lines[..each.min(all - first) * cols];
            for_strips(lines, cols, GRAIN / (LANES * cols) + 1, |strip, lines| {
                let row = (first + strip) * LANES;
                let count = LANES.min(out - row);
                with_scratch(count * cols, |dense| {
                    dot::read(rows, row, dense);
                    pack::columns(level, dense, cols, count, lines);
                });
            });
            let columns = (lines.len() / cols * LANES).min(out - first * LANES);
            let y = Shared::new(&mut y[first * LANES..]);
            let y = Result { c: y, stride: out, columns, of: out, accumulate: false };
            // SAFETY: the sizes fit, and `y` is borrowed mutably.
            unsafe { strips::multiply(level, x, Right::Packed(lines), y, true) };
        }
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
    // Rows of the weight are the steps: some of them are cut into strips, then multiplied.
    let strips = cols.div_ceil(LANES);
    let each = (LINES / strips).clamp(1, out);
    pack::with_lines(strips * each, |lines| {
        for first in (0..out).step_by(each) {
            let count = each.min(out - first);
            let lines = &mut lines[..strips * count];
            let shared = Shared::new(lines);
            threads::for_ranges(count, GRAIN / cols + 1, |range| {
                with_scratch(cols, |dense| {
                    for row in range {
                        dot::read(rows, first + row, dense);
                        let (whole, rest) = dense.as_chunks::<LANES>();
                        for (strip, values) in whole.iter().enumerate() {
                            // SAFETY: ranges are disjoint, so their rows are.
                            unsafe { shared.set(strip * count + row, Line(*values)) };
                        }
                        if !rest.is_empty() {
                            let mut line = Line::ZERO;
                            line.0[..rest.len()].copy_from_slice(rest);
                            // SAFETY: as above.
                            unsafe { shared.set(whole.len() * count + row, line) };
                        }
                    }
                });
            });
            let g = View::strided(&g[first..], tokens, count, out, 1);
            let c = Shared::new(dx);
            let dx = Result { c, stride: cols, columns: cols, of: cols, accumulate: first > 0 };
            // SAFETY: the sizes fit, and `dx` is borrowed mutably.
            unsafe { strips::multiply(Level::best(), g, Right::Packed(lines), dx, true) };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::dot::{DenseKind, DenseRows};
    use super::super::dual_grained::DualGrainedRows;
    use super::super::ggml::{GgmlRows, GgmlType};
    use super::super::grouped::{Grid, GroupedRows};
    use super::super::simd::Level;
    use super::super::sparse::{Places, SparseRows, Values, list_row_bytes};
    use super::*;

    /// Bytes none of whose pairs is an f16 or bf16 that is not finite or large.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_u32;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                (state >> 24) as u8 & 0xbf
            })
            .collect()
    }

    /// f32 elements as bytes.
    fn floats(len: usize) -> Vec<u8> {
        (0..len).flat_map(|i| (((i * 37) % 101) as f32 / 50.0 - 1.0).to_le_bytes()).collect()
    }

    /// All levels read the same bits and, up to rounding, compute the same products.
    fn check<R: Rows>(rows: &R, what: &str) {
        let (out, cols) = (rows.rows(), rows.cols());
        let mut dense = vec![f32::NAN; out * cols];
        dot::read_at(Level::Arrays, rows, 0, &mut dense);
        assert!(dense.iter().all(|v| v.is_finite()), "{what}");
        for level in Level::available() {
            let mut read = vec![f32::NAN; out * cols];
            dot::read_at(level, rows, 0, &mut read);
            assert_eq!(read, dense, "{what} {level:?}");
        }
        for tokens in [1, 2, 3, 8, 9, 17] {
            let x: Vec<f32> =
                (0..tokens * cols).map(|i| ((i * 7) % 19) as f32 / 9.0 - 1.0).collect();
            let close = |y: &[f32], who: &str| {
                for (i, y) in y.iter().enumerate() {
                    let x = &x[i / out * cols..][..cols];
                    let w = &dense[i % out * cols..][..cols];
                    let exact: f64 =
                        x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let size: f64 =
                        x.iter().zip(w).map(|(x, w)| (f64::from(*x) * f64::from(*w)).abs()).sum();
                    let error = (f64::from(*y) - exact).abs();
                    assert!(
                        error <= 1e-5 * size + 1e-30,
                        "{what} {who} {tokens} tokens: {y} not {exact}"
                    );
                }
            };
            for level in Level::available() {
                let mut y = vec![f32::NAN; tokens * out];
                dot::multiply_few_at(level, rows, &x, &mut y);
                close(&y, &format!("{level:?}"));
            }
            let mut y = vec![f32::NAN; tokens * out];
            multiply(rows, &x, &mut y);
            close(&y, "product");
        }
    }

    #[test]
    fn dense_rows() {
        for cols in [1, 31, 33, 96] {
            let (f32s, halves) = (floats(7 * cols), noise(14 * cols));
            check(&DenseRows::new(&f32s, 7, cols, DenseKind::F32), "f32");
            check(&DenseRows::new(&halves, 7, cols, DenseKind::F16), "f16");
            check(&DenseRows::new(&halves, 7, cols, DenseKind::BF16), "bf16");
        }
    }

    #[test]
    fn ggml_rows() {
        for kind in GgmlType::ALL {
            let data = noise(7 * 3 * kind.block_bytes());
            let rows = GgmlRows::new(&data, 7, 3 * kind.block_elements(), kind);
            check(&rows, &format!("{kind:?}"));
        }
    }

    #[test]
    fn grouped_rows() {
        for (cols, group) in [(96, 32), (192, 64), (96, 16), (48, 16), (144, 48), (35, 5), (24, 24)]
        {
            for bits in [2, 3, 4, 8] {
                let codes = noise(7 * (cols * usize::from(bits)).div_ceil(8));
                let scales = noise(2 * 7 * (cols / group));
                let zeros = noise(7 * (cols / group));
                for zeros in [None, Some(&zeros[..])] {
                    let grid = Grid::new(bits, group, [7, cols], &scales, zeros);
                    let rows = GroupedRows::new(&codes, 7, cols, grid);
                    check(&rows, &format!("{bits} bits, {cols} by {group}"));
                }
            }
        }
    }

    #[test]
    fn dual_grained_rows() {
        for (cols, group) in [(32, 32), (96, 32), (192, 64), (192, 96), (256, 128)] {
            let (codes, groups) = (noise(7 * cols / 2), 7 * (cols / group));
            let zeros: Vec<u8> = noise(groups).iter().map(|z| z % 16).collect();
            let factors: Vec<u8> = noise(groups).iter().map(|f| 1 + f % 127).collect();
            let scales = floats(7);
            let rows = DualGrainedRows::new([7, cols], group, &codes, &factors, &zeros, &scales);
            check(&rows, &format!("dual grained, {cols} by {group}"));
        }
    }

    #[test]
    fn sparse_rows() {
        for (cols, group, of) in
            [(96, 32, 16), (48, 16, 4), (36, 4, 12), (130, 10, 13), (33, 11, 3)]
        {
            let (row, list) = (cols / 8 + usize::from(cols % 8 > 0), list_row_bytes(cols, 1, of));
            let mut mask = noise(7 * row);
            if cols % 8 > 0 {
                mask.chunks_mut(row).for_each(|r| r[row - 1] &= (1 << (cols % 8)) - 1);
            }
            // Places that a file could not bring, but that must do no harm.
            let list = noise(7 * list);
            for places in [Places::Bitmap(&mask), Places::NOfM { places: &list, keep: 1, of }] {
                let mut starts = vec![0];
                let none =
                    SparseRows::new([7, cols], places, Values::Dense(&[], DenseKind::F32), &[0; 7]);
                for r in 0..7 {
                    let mut kept = vec![false; cols];
                    none.mask(r, &mut kept);
                    starts.push(starts[r] + kept.iter().filter(|k| **k).count());
                }
                let (f32s, halves) = (floats(starts[7]), noise(2 * starts[7]));
                for values in [
                    Values::Dense(&f32s, DenseKind::F32),
                    Values::Dense(&halves, DenseKind::F16),
                    Values::Dense(&halves, DenseKind::BF16),
                    Values::Dense(&f32s[..f32s.len() / 2], DenseKind::F32),
                ] {
                    let rows = SparseRows::new([7, cols], places, values, &starts);
                    check(&rows, "sparse values");
                    // The layout's own choice of a kernel.
                    for tokens in [1, 3, 7, 9] {
                        let x: Vec<f32> =
                            (0..tokens * cols).map(|i| (i % 13) as f32 - 6.0).collect();
                        let (mut y, mut same) = (vec![f32::NAN; 7 * tokens], vec![0.0; 7 * tokens]);
                        rows.multiply(&x, &mut y);
                        multiply(&rows, &x, &mut same);
                        let size = same.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
                        assert!(
                            y.iter().zip(&same).all(|(a, b)| (a - b).abs() <= 1e-4 * size),
                            "{cols} columns, {tokens} tokens: {y:?} not {same:?}"
                        );
                    }
                }
                for bits in [2, 3, 4, 8] {
                    let mut bytes = vec![0];
                    for r in 0..7 {
                        let kept = starts[r + 1] - starts[r];
                        bytes.push(bytes[r] + (kept * usize::from(bits)).div_ceil(8));
                    }
                    let codes = noise(bytes[7]);
                    let (scales, zeros) = (noise(14 * (cols / group)), noise(7 * (cols / group)));
                    let grid = Grid::new(bits, group, [7, cols], &scales, Some(&zeros));
                    let rows =
                        SparseRows::new([7, cols], places, Values::Codes(&codes, grid), &bytes);
                    check(&rows, &format!("sparse {bits} bits"));
                }
            }
        }
    }

    #[test]
    fn transposed_products_over_several_panels() {
        // Two panels of rows: W[r, c] = r for even c, 1 for odd.
        let (out, cols, tokens) = (LINES / 4 + 5, 64, 2);
        let w: Vec<u8> = (0..out * cols)
            .flat_map(|i| if i % 2 == 0 { (i / cols % 8) as f32 } else { 1.0 }.to_le_bytes())
            .collect();
        let rows = DenseRows::new(&w, out, cols, DenseKind::F32);
        let g: Vec<f32> = (0..tokens * out).map(|i| if i < out { 1.0 } else { 2.0 }).collect();
        let mut dx = vec![f32::NAN; tokens * cols];
        multiply_transposed(&rows, &g, &mut dx);
        let even: f32 = (0..out).map(|r| (r % 8) as f32).sum();
        for (i, dx) in dx.iter().enumerate() {
            let sum = if i % 2 == 0 { even } else { out as f32 };
            assert_eq!(*dx, if i < cols { sum } else { 2.0 * sum });
        }
        let mut y = vec![f32::NAN; 9 * out];
        multiply(&rows, &vec![1.0; 9 * cols], &mut y);
        assert!((0..9 * out).all(|i| y[i] == 32.0 * (1.0 + (i % out % 8) as f32)));
    }
}
