use half::bf16;

use super::*;

fn noise(len: usize, mut state: u32) -> Vec<f32> {
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 0.999_99
        })
        .collect()
}

fn rounded(v: f32) -> f64 {
    f64::from(bf16::from_f32(v).to_f32())
}

#[test]
fn products_are_those_of_the_rounded_matrices() {
    for [rows, cols] in [[1, 1], [7, 5], [16, 64], [17, 33], [32, 8], [50, 129], [100, 320]] {
        let w = noise(rows * cols, 1);
        let read = |row: usize, out: &mut [f32]| out.copy_from_slice(&w[row * cols..][..cols]);
        let packed = Bf16Panels::pack(rows, cols, read);
        let strips = rows.div_ceil(16) * 16;
        assert_eq!(packed.bytes(), strips * cols.next_multiple_of(32) * 2);
        for tokens in [0, 1, 2, 3, 5, 8, 9, 12, 16, 17, 31, 32, 33, 50, 130] {
            let x = noise(tokens * cols, 3);
            for path in [Path::Plain, Path::Pairs, Path::Tiles] {
                if path > Path::best() {
                    continue;
                }
                let mut y = vec![f32::NAN; tokens * rows];
                let mut input = Rounded::default();
                input.set_by(path, &x, cols);
                packed.multiply_by(path, &input, &mut y);
                for (i, y) in y.iter().enumerate() {
                    let (x, w) = (&x[i / rows * cols..], &w[i % rows * cols..][..cols]);
                    let terms = x.iter().zip(w).map(|(x, w)| rounded(*x) * rounded(*w));
                    let size: f64 = terms.clone().map(f64::abs).sum();
                    let error = (f64::from(*y) - terms.sum::<f64>()).abs();
                    assert!(
                        error <= 1e-5 * size + 1e-30,
                        "{path:?} [{rows}, {cols}] {tokens} tokens: off by {error} of {size}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_transposed_matrix_is_packed_as_its_transpose() {
    let mut kept = Bf16Panels::default();
    // The memory of a larger one is used again.
    for [rows, cols] in [[70, 90], [1, 1], [33, 17], [16, 64], [129, 50]] {
        let w = noise(rows * cols, 1);
        kept.set_transposed(rows, cols, |row, out| out.copy_from_slice(&w[row * cols..][..cols]));
        let expected = Bf16Panels::pack(cols, rows, |column, out| {
            out.iter_mut().enumerate().for_each(|(row, out)| *out = w[row * cols + column]);
        });
        assert_eq!((kept.rows(), kept.cols()), (cols, rows));
        assert_eq!(kept.bytes(), expected.bytes());
        assert!(kept.lines.iter().zip(&expected.lines).all(|(a, b)| a.0 == b.0));
    }
}

#[test]
fn a_result_does_not_depend_on_the_other_tokens() {
    let (rows, cols) = (48, 70);
    let w = noise(rows * cols, 1);
    let packed =
        Bf16Panels::pack(rows, cols, |row, out| out.copy_from_slice(&w[row * cols..][..cols]));
    let x = noise(29 * cols, 2);
    let (mut all, mut rounded) = (vec![0.0; 29 * rows], Rounded::default());
    rounded.set(&x, cols);
    packed.multiply(&rounded, &mut all);
    for first in [0, 8, 16] {
        let mut some = vec![0.0; 12 * rows];
        rounded.set(&x[first * cols..][..12 * cols], cols);
        packed.multiply(&rounded, &mut some);
        assert_eq!(some, all[first * rows..][..12 * rows]);
    }
}

#[test]
fn rounding_is_to_even_and_keeps_what_is_no_number() {
    let values =
        [1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::NAN, f32::MAX, -f32::INFINITY, 1e-42];
    let mut halves = [0; 8];
    round(&values, &mut halves);
    for (half, v) in halves.iter().zip(values) {
        let expected = bf16::from_f32(v);
        let got = bf16::from_bits(*half);
        assert!(got == expected || got.is_nan() && expected.is_nan(), "{v}: {got}");
    }
    assert_eq!(halves[7], 0);
}

#[test]
fn every_way_of_rounding_gives_the_same_tiles() {
    for (tokens, cols) in [(1, 32), (16, 64), (19, 96), (37, 33)] {
        let mut x = noise(tokens * cols, 5);
        (x[0], x[1], x[31]) = (f32::INFINITY, 1.0 + 1.0 / 256.0, -3.0e38);
        // What was there before must not shine through.
        let before = noise(40 * 128, 6);
        let tiles: Vec<Vec<u32>> = [Path::Plain, Path::best()]
            .into_iter()
            .map(|path| {
                let mut rounded = Rounded::default();
                rounded.set_by(path, &before, 128);
                rounded.set_by(path, &x, cols);
                let tiles = 0..tokens.div_ceil(LANES);
                tiles.flat_map(|t| rounded.tile(t).to_vec()).flat_map(|l| l.0).collect()
            })
            .collect();
        assert_eq!(tiles[0], tiles[1], "{tokens} tokens of {cols}");
        let (token, col) = (tokens - 1, cols - 1);
        let line = token / LANES * count(cols) + col / 32 * LANES + token % LANES;
        let pair = tiles[0][line * LANES + col % 32 / 2];
        let got = bf16::from_bits((pair >> (16 * (col % 2))) as u16);
        assert_eq!(got, bf16::from_f32(x[token * cols + col]));
    }
}
