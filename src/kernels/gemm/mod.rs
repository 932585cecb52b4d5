//! Dense f32 products.

pub(super) mod pack;
#[cfg(target_arch = "x86_64")]
mod parts;
pub(super) mod strips;

use self::strips::{LANES, Line, Result, Right, STRIPS};
use super::simd::Level;
use super::threads::{self, Shared};

/// Lines of strips that are packed at once: four megabytes, which stay in a cache while they are used.
pub(super) const LINES: usize = 1 << 16;
/// Rows up to which packing a right matrix costs more than reading it where it is.
const FEW: usize = 16;

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
/// (gaps are left alone). Parallel over tiles of `c` if `parallel`, on the team of threads; every
/// element is summed in one order, so the result does not depend on scheduling.
pub fn gemm(
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    c_stride: usize,
    accumulate: bool,
    parallel: bool,
) {
    gemm_at(Level::best(), a, b, c, c_stride, accumulate, parallel);
}

fn gemm_at(
    level: Level,
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
    if k == 0 {
        if !accumulate {
            (0..m).for_each(|row| c[row * c_stride..][..n].fill(0.0));
        }
        return;
    }
    if b.col_stride == 1 && n.is_multiple_of(LANES) && m <= FEW {
        let right = Right::Plain { data: b.data, stride: b.row_stride };
        let c = Result { c: Shared::new(c), stride: c_stride, columns: n, of: n, accumulate };
        // SAFETY: `check` proved that all elements lie inside the slices; `c` is borrowed mutably.
        unsafe { strips::multiply(level, a, right, c, parallel) };
        return;
    }
    let each = (LINES / k / STRIPS).max(1) * STRIPS;
    let all = n.div_ceil(LANES);
    pack::with_lines(each.min(all) * k, |lines| {
        for first in (0..all).step_by(each) {
            let count = each.min(all - first);
            let lines = &mut lines[..count * k];
            let grain = if parallel { (1 << 15) / (LANES * k) + 1 } else { count };
            for_strips(lines, k, grain, |strip, lines| {
                pack::strip(level, b, (first + strip) * LANES, lines);
            });
            let columns = (count * LANES).min(n - first * LANES);
            let right = Right::Packed(lines);
            let c = Shared::new(&mut c[first * LANES..]);
            let c = Result { c, stride: c_stride, columns, of: n, accumulate };
            // SAFETY: as above; the columns begin at the start of this part of `c`.
            unsafe { strips::multiply(level, a, right, c, parallel) };
        }
    });
}

/// Calls `work` with the number and the lines of each strip of `depth` lines; parallel, at least `grain`
/// strips a thread.
pub(super) fn for_strips(
    lines: &mut [Line],
    depth: usize,
    grain: usize,
    work: impl Fn(usize, &mut [Line]) + Sync,
) {
    let shared = Shared::new(lines);
    threads::for_ranges(shared.len() / depth, grain, |strips| {
        for strip in strips {
            // SAFETY: each strip is in one range.
            work(strip, unsafe { shared.slice(strip * depth..(strip + 1) * depth) });
        }
    });
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

    fn noise(len: usize, mut state: u32) -> Vec<f32> {
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 0.999_99
            })
            .collect()
    }

    /// All ways in which the elements of a matrix may lie, sizes around those of tiles, strips, passes and
    /// steps, against sums in f64.
    #[test]
    fn products_match_the_definition_at_all_levels() {
        let sizes = [
            [1, 1, 1],
            [3, 16, 5],
            [6, 64, 96],
            [7, 65, 97],
            [16, 32, 40],
            [17, 48, 33],
            [13, 200, 130],
            [97, 70, 20],
            [200, 17, 9],
            [5, 20, 1700],
            [96, 16, 32],
            [97, 50, 97],
            [110, 33, 700],
            [300, 65, 641],
        ];
        for [m, n, k] in sizes {
            let (a, b, start) = (noise(m * k, 1), noise(k * n, 2), noise(m * (n + 3), 3));
            for (turned_a, turned_b) in [(false, false), (false, true), (true, false), (true, true)]
            {
                let a = if turned_a { View::new(&a, k, m).t() } else { View::new(&a, m, k) };
                let b = if turned_b { View::new(&b, n, k).t() } else { View::new(&b, k, n) };
                let at = |v: View<'_>, r: usize, c: usize| {
                    f64::from(v.data[r * v.row_stride + c * v.col_stride])
                };
                for accumulate in [false, true] {
                    for level in Level::available() {
                        let mut c = start.clone();
                        gemm_at(level, a, b, &mut c, n + 3, accumulate, true);
                        let mut alone = start.clone();
                        gemm_at(level, a, b, &mut alone, n + 3, accumulate, false);
                        assert_eq!(c, alone, "{level:?} {m} {n} {k}");
                        for (i, (c, start)) in c.iter().zip(&start).enumerate() {
                            let (row, column) = (i / (n + 3), i % (n + 3));
                            if column >= n {
                                assert_eq!(c, start, "a gap was written");
                                continue;
                            }
                            let terms = (0..k).map(|step| at(a, row, step) * at(b, step, column));
                            let before = if accumulate { f64::from(*start) } else { 0.0 };
                            let size = terms.clone().map(f64::abs).sum::<f64>() + before.abs();
                            let error = (f64::from(*c) - before - terms.sum::<f64>()).abs();
                            assert!(
                                error <= 1e-5 * size,
                                "{level:?} {m} {n} {k} {turned_a} {turned_b}: off by {error} of {size}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn products_in_parts_are_as_near_as_those_of_vectors() {
        let (m, n, k) = (130, 70, 1300);
        if !parts::suit(Level::best(), m, k, n) {
            eprintln!("there are no tiles here");
            return;
        }
        // Numbers of many sizes, so that each part of them counts.
        let wide = |values: Vec<f32>| -> Vec<f32> {
            let sized = |(i, v): (usize, f32)| v * 2f32.powi((i % 29) as i32 - 14);
            values.into_iter().enumerate().map(sized).collect()
        };
        let (a, b) = (wide(noise(m * k, 5)), wide(noise(k * n, 6)));
        let (a, b) = (View::new(&a, m, k), View::new(&b, k, n));
        let mut parts = vec![0.0; m * n];
        gemm(a, b, &mut parts, n, false, true);
        let mut vectors = vec![0.0; m * n];
        let lines = (0..n.div_ceil(LANES)).flat_map(|strip| {
            let mut lines = vec![Line::ZERO; k];
            pack::strip(Level::best(), b, strip * LANES, &mut lines);
            lines
        });
        let lines: Vec<Line> = lines.collect();
        let c = Shared::new(&mut vectors);
        let result = Result { c, stride: n, columns: n, of: n, accumulate: false };
        // SAFETY: the sizes fit.
        unsafe { strips::by_vectors(Level::best(), a, Right::Packed(&lines), result, true) };
        assert_ne!(parts, vectors, "both are by vectors");
        let far = |c: &[f32]| {
            let worst = c.iter().enumerate().map(|(i, c)| {
                let at = |step: usize| {
                    f64::from(a.data[i / n * k + step]) * f64::from(b.data[step * n + i % n])
                };
                let size: f64 = (0..k).map(|step| at(step).abs()).sum();
                (f64::from(*c) - (0..k).map(at).sum::<f64>()).abs() / size
            });
            worst.fold(0.0, f64::max)
        };
        let (parts, vectors) = (far(&parts), far(&vectors));
        assert!(parts < 1e-6 && parts < 4.0 * vectors, "off by {parts}, {vectors}");
    }

    /// Products in parts where there are tiles: parts of such numbers have more bits than a bf16 number.
    #[test]
    fn numbers_below_the_smallest_normal_one_change_nothing_else() {
        let (m, n, k) = (100, 50, 64);
        for tiny in [1e-36, 1e-40, f32::from_bits(0x4000), 2.4e-37] {
            let put = |values: &mut [f32], depth: usize, at: &dyn Fn(usize, usize) -> usize| {
                for line in 0..values.len() / depth {
                    for step in 0..depth {
                        values[at(line, step)] = match step % 32 {
                            16.. => tiny * (1.0 + step as f32 / 7.0),
                            s if s % 3 == 0 => 0.0,
                            s => 1.23 + (s + line) as f32 / 64.0,
                        };
                    }
                }
            };
            let (mut a, mut b) = (vec![0.0; m * k], vec![0.0; k * n]);
            put(&mut a, k, &|row, step| row * k + step);
            put(&mut b, k, &|column, step| step * n + column);
            let mut c = vec![0.0; m * n];
            gemm(View::new(&a, m, k), View::new(&b, k, n), &mut c, n, false, true);
            for (i, c) in c.iter().enumerate() {
                let (row, column) = (i / n, i % n);
                let terms = (0..k)
                    .map(|step| f64::from(a[row * k + step]) * f64::from(b[step * n + column]));
                let exact: f64 = terms.sum();
                assert!((f64::from(*c) - exact).abs() <= 1e-5 * exact, "{tiny}: {c} not {exact}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none_and_in_its_row() {
        let (m, n, k) = (100, 40, 64);
        let (mut a, b) = (noise(m * k, 1), noise(k * n, 2));
        a[3 * k + 5] = f32::from_bits(0xffff_ffff);
        a[50 * k] = f32::INFINITY;
        let mut c = vec![0.0; m * n];
        gemm(View::new(&a, m, k), View::new(&b, k, n), &mut c, n, false, true);
        for (row, c) in c.chunks(n).enumerate() {
            assert!(c.iter().all(|c| c.is_finite() != (row == 3 || row == 50)), "row {row}");
        }
    }

    #[test]
    fn a_product_over_nothing_is_zero() {
        let mut c = [1.0, 2.0, 3.0];
        gemm(View::new(&[], 1, 0), View::new(&[], 0, 2), &mut c, 2, true, false);
        assert_eq!(c, [1.0, 2.0, 3.0]);
        gemm(View::new(&[], 1, 0), View::new(&[], 0, 2), &mut c, 2, false, false);
        assert_eq!(c, [0.0, 0.0, 3.0]);
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_view_beyond_its_slice_is_refused() {
        View::new(&[0.0; 5], 2, 3);
    }
}
