//! Sums, copies, biases, columns, dropout.

use super::super::multiversion::multiversion;
use super::super::threads::{self, Shared};
use super::super::{norm, rope};
use super::{GRAIN, grain};

/// Columns of a sum over rows that are worth a task.
const COLUMNS: usize = 64;

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "lengths of a sum");
    threads::for_rows(x, 1, GRAIN, |first, x| norm::add(x, &y[first..first + x.len()]));
}

/// `out = a + b`.
pub fn sum(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(a.len() == out.len() && b.len() == out.len(), "lengths of a sum");
    threads::for_rows(out, 1, GRAIN, |first, out| {
        sum_part(&a[first..first + out.len()], &b[first..first + out.len()], out);
    });
}

/// `out = x`.
pub fn copy(x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "lengths of a copy");
    threads::for_rows(out, 1, GRAIN, |first, out| {
        out.copy_from_slice(&x[first..first + out.len()]);
    });
}

/// `x += bias` for each row of the length of `bias`.
pub fn add_bias(rows: &mut [f32], bias: &[f32]) {
    threads::for_rows(rows, bias.len(), grain(bias.len()), |_, rows| {
        rows.chunks_exact_mut(bias.len()).for_each(|row| norm::add(row, bias));
    });
}

/// `x *= by` for each row of the length of `by`.
pub fn scale_columns(rows: &mut [f32], by: &[f32]) {
    threads::for_rows(rows, by.len(), grain(by.len()), |_, rows| scale_part(rows, by));
}

/// `x *= by`.
pub fn scale(x: &mut [f32], by: f32) {
    if by == 1.0 {
        return;
    }
    threads::for_rows(x, 1, GRAIN, |_, x| scale_all(x, by));
}

/// `out[c] += sum_r rows[r, c]`, `out` being a row.
pub fn add_columns(rows: &[f32], out: &mut [f32]) {
    let width = out.len();
    threads::for_rows(out, 1, COLUMNS, |first, out| {
        for row in rows.chunks_exact(width) {
            norm::add(out, &row[first..first + out.len()]);
        }
    });
}

/// `out[c] += sum_r a[r, c] b[r, c]`, `out` being a row.
pub fn add_column_products(a: &[f32], b: &[f32], out: &mut [f32]) {
    assert_eq!(a.len(), b.len(), "lengths of a product");
    let width = out.len();
    threads::for_rows(out, 1, COLUMNS, |first, out| {
        let columns = first..first + out.len();
        for (a, b) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
            multiply_add(&a[columns.clone()], &b[columns.clone()], out);
        }
    });
}

/// Turns every row by the angles of its position: `angles(row)` gives cosines and sines of `dim / 2`
/// channels each; `back` turns the other way, which is the gradient.
pub fn rotate<'a>(
    rows: &mut [f32],
    width: usize,
    back: bool,
    angles: impl Fn(usize) -> (&'a [f32], &'a [f32]) + Sync,
) {
    threads::for_rows(rows, width, grain(width), |first, rows| {
        let mut negative = Vec::new();
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let (cos, sin) = angles(first + i);
            if back {
                negative.clear();
                negative.extend(sin.iter().map(|s| -s));
                rope::rotate(row, cos, &negative);
            } else {
                rope::rotate(row, cos, sin);
            }
        }
    });
}

/// `out = x / keep` where the numbers of `seed` say that an element stays, 0 elsewhere: each element
/// stays with probability `keep`. The same seed drops the same elements, whatever the threads.
pub fn dropout(x: &[f32], keep: f32, seed: u64, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "lengths of dropout");
    threads::for_rows(out, 1, GRAIN, |first, out| {
        drop_part(&x[first..first + out.len()], keep, seed, first as u64, out);
    });
}

multiversion! {
    fn sum_part(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = *a + *b;
        }
    }

    fn scale_part(rows: &mut [f32], by: &[f32]) {
        for row in rows.chunks_exact_mut(by.len()) {
            for (x, by) in row.iter_mut().zip(by) {
                *x *= *by;
            }
        }
    }

    fn scale_all(x: &mut [f32], by: f32) {
        x.iter_mut().for_each(|x| *x *= by);
    }

    fn multiply_add(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = super::super::multiversion::mul_add::<FMA>(*a, *b, *out);
        }
    }

    fn drop_part(x: &[f32], keep: f32, seed: u64, first: u64, out: &mut [f32]) {
        // An element stays if its number of 24 bits is below this.
        let bound = (f64::from(keep) * f64::from(1 << 24)) as u64;
        let by = 1.0 / keep;
        for ((i, x), out) in (first..).zip(x).zip(out) {
            *out = if mix(seed, i) >> 40 < bound { *x * by } else { 0.0 };
        }
    }
}

/// A number of 64 bits for each place of a stream (the finaliser of SplitMix64).
#[inline(always)]
fn mix(seed: u64, place: u64) -> u64 {
    let mut z = seed.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Adds rows of `source` to rows of a table: row `i` to row `at[i]`, which may come again.
pub fn scatter_add(table: &mut [f32], width: usize, at: &[u32], source: &[f32]) {
    assert_eq!(source.len(), at.len() * width, "rows of a table");
    // Columns are split: several rows may go to one.
    let all = table.len();
    let shared = Shared::new(table);
    threads::for_ranges(width, COLUMNS, |columns| {
        for (row, at) in source.chunks_exact(width).zip(at) {
            let start = *at as usize * width;
            assert!(start + width <= all, "a row outside the table");
            // SAFETY: columns are disjoint between threads, and rows come one after another.
            let out = unsafe { shared.slice(start + columns.start..start + columns.end) };
            norm::add(out, &row[columns.clone()]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_by_hand() {
        let mut x = [1.0, 2.0, 3.0, 4.0];
        add(&mut x, &[1.0; 4]);
        assert_eq!(x, [2.0, 3.0, 4.0, 5.0]);
        add_bias(&mut x, &[10.0, 20.0]);
        assert_eq!(x, [12.0, 23.0, 14.0, 25.0]);
        let mut out = [1.0, 0.0];
        add_columns(&x, &mut out);
        assert_eq!(out, [27.0, 48.0]);
        add_column_products(&x, &[1.0, 0.0, 2.0, 1.0], &mut out);
        assert_eq!(out, [27.0 + 12.0 + 28.0, 48.0 + 25.0]);
        scale_columns(&mut x, &[0.5, 0.0]);
        assert_eq!(x, [6.0, 0.0, 7.0, 0.0]);
        let mut table = [0.0; 6];
        scatter_add(&mut table, 2, &[2, 0, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(table, [3.0, 4.0, 0.0, 0.0, 6.0, 8.0]);
    }

    #[test]
    fn turning_back_undoes_a_turn() {
        let (cos, sin) = ([0.6, 0.0], [0.8, 1.0]);
        let start: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let mut x = start.clone();
        rotate(&mut x, 8, false, |_| (&cos, &sin));
        assert_ne!(x, start);
        rotate(&mut x, 8, true, |_| (&cos, &sin));
        assert!(x.iter().zip(&start).all(|(a, b)| (a - b).abs() < 1e-5), "{x:?}");
    }

    #[test]
    fn dropout_keeps_its_share_and_repeats() {
        let x = vec![1.0; 100_000];
        let (mut a, mut b, mut c) = (x.clone(), x.clone(), x.clone());
        dropout(&x, 0.75, 5, &mut a);
        dropout(&x, 0.75, 5, &mut b);
        dropout(&x, 0.75, 6, &mut c);
        assert_eq!(a, b);
        assert_ne!(a, c);
        let kept = a.iter().filter(|v| **v != 0.0).count();
        assert!(a.iter().all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6));
        // Five deviations of a binomial variable.
        assert!((kept as f64 - 75_000.0).abs() < 5.0 * (100_000.0_f64 * 0.75 * 0.25).sqrt());
        dropout(&x, 1.0, 5, &mut a);
        assert_eq!(a, x);
    }
}
