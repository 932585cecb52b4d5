//! Products of row groups are those of their dense rows, on every path, for sizes that divide nothing.

use super::int8::Path;
use super::*;
use crate::kernels::dot;
use crate::kernels::simd::Level;

/// Values between -1 and 1, the same ones every time.
fn noise(len: usize, mut state: u32) -> Vec<f32> {
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 0.999_99
        })
        .collect()
}

/// A pattern in which group 1 keeps nothing, group 2 one column, group 3 all, others about half.
fn pattern(rows: usize, cols: usize, group: usize) -> Pattern {
    let (mut starts, mut columns) = (vec![0], Vec::new());
    for g in 0..rows.div_ceil(group) {
        columns.extend((0..cols).filter(|c| match g {
            1 => false,
            2 => *c == cols / 2,
            3 => true,
            _ => (c * 7 + g * 5) % 11 < 6,
        }));
        starts.push(columns.len());
    }
    Pattern::new([rows, cols], group, starts.into(), columns.into_iter()).unwrap()
}

const SHAPES: [[usize; 2]; 6] = [[3, 5], [32, 64], [71, 129], [130, 33], [160, 320], [5, 1]];
const TOKENS: [usize; 13] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33, 70];

/// What the product must be, with the sum of the sizes of its terms.
fn exact(w: &[f32], x: &[f32], rows: usize, cols: usize) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for x in x.chunks_exact(cols) {
        for w in w.chunks_exact(cols) {
            let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            out.push((terms.clone().sum(), terms.map(f64::abs).sum()));
        }
    }
    assert_eq!(out.len(), x.len() / cols * rows);
    out
}

#[test]
fn products_in_f32_are_those_of_the_dense_rows() {
    for [rows, cols] in SHAPES {
        for group in Pattern::GROUPS {
            let p = pattern(rows, cols, group);
            let values = noise(p.values(), 7);
            let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let halves: Vec<u8> =
                values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
            for w in [Values::F32(&f32s), Values::BF16(&halves)] {
                let w = RowGroups::new(&p, w);
                let mut dense = vec![f32::NAN; rows * cols];
                dot::read(&w, 0, &mut dense);
                let kept: usize = (0..p.groups()).map(|g| p.kept(g) * p.lanes(g)).sum();
                assert_eq!(dense.iter().filter(|v| **v != 0.0).count(), kept);
                for tokens in TOKENS {
                    let x = noise(tokens * cols, 99);
                    let exact = exact(&dense, &x, rows, cols);
                    for level in Level::available() {
                        let mut y = vec![f32::NAN; tokens * rows];
                        float::multiply(level, &w, &x, &mut y);
                        for (y, (exact, size)) in y.iter().zip(&exact) {
                            let error = (f64::from(*y) - exact).abs();
                            assert!(
                                error <= 1e-5 * size + 1e-30,
                                "{level:?} [{rows}, {cols}] by {group}, {tokens}: {y} not {exact}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn products_in_8_bits_are_the_same_bits_on_every_path() {
    for [rows, cols] in SHAPES {
        for group in Pattern::GROUPS {
            let p = pattern(rows, cols, group);
            // All bytes, also -128, which no rounding gives.
            let values: Vec<u8> = (0..p.values()).map(|i| (i * 89 + 128) as u8).collect();
            let scales: Vec<f32> = (0..rows).map(|r| 0.001 * (r + 1) as f32).collect();
            let sums = row_sums(&p, &values);
            let view =
                RowGroups::new(&p, Values::Int8 { values: &values, scales: &scales, sums: &sums });
            let mut dense = vec![f32::NAN; rows * cols];
            dot::read(&view, 0, &mut dense);
            for tokens in TOKENS {
                let mut x = noise(tokens * cols, 5);
                // A token of zeros.
                x[(tokens - 1) * cols..].fill(if tokens % 2 == 0 { 0.0 } else { 0.25 });
                let mut rounded = vec![0.0; x.len()];
                for (x, out) in x.chunks_exact(cols).zip(rounded.chunks_exact_mut(cols)) {
                    let most = x.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
                    if most > 0.0 {
                        for (x, out) in x.iter().zip(out) {
                            *out = (x * (127.0 / most)).round_ties_even() * (most / 127.0);
                        }
                    }
                }
                let exact = exact(&dense, &rounded, rows, cols);
                let mut first = vec![f32::NAN; tokens * rows];
                int8::multiply(Path::Plain, &p, &values, &scales, &sums, &x, &mut first);
                for (y, (exact, size)) in first.iter().zip(&exact) {
                    let error = (f64::from(*y) - exact).abs();
                    assert!(
                        error <= 1e-6 * size + 1e-30,
                        "[{rows}, {cols}] by {group}: {y} {exact}"
                    );
                }
                for path in Path::available() {
                    let mut y = vec![f32::NAN; tokens * rows];
                    int8::multiply(path, &p, &values, &scales, &sums, &x, &mut y);
                    assert_eq!(y, first, "{path:?} [{rows}, {cols}] by {group}, {tokens} tokens");
                }
            }
        }
    }
}

#[test]
fn patterns_that_lie_are_refused() {
    let new = |group, starts: &[usize], columns: &[usize]| {
        Pattern::new([5, 9], group, starts.into(), columns.iter().copied())
    };
    assert!(new(4, &[0, 2, 3], &[0, 8, 4]).is_ok());
    for group in [0, 1, 3, 64] {
        assert!(new(group, &[0, 2, 3], &[0, 8, 4]).is_err());
    }
    for (starts, columns) in [
        (&[0, 2][..], &[0, 8][..]),
        (&[0, 2, 3, 3], &[0, 8, 4]),
        (&[1, 2, 3], &[0, 8, 4]),
        (&[0, 2, 4], &[0, 8, 4]),
        (&[0, 2, 2], &[0, 8, 4]),
        (&[0, 4, 3], &[0, 8, 4]),
        (&[0, 2, 3], &[8, 0, 4]),
        (&[0, 2, 3], &[8, 8, 4]),
        (&[0, 2, 3], &[0, 9, 4]),
        (&[0, 10, 10], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 8]),
        (&[], &[]),
    ] {
        assert!(new(4, starts, columns).is_err(), "{starts:?} {columns:?}");
    }
}
