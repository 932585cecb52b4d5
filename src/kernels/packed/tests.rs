use super::super::dual_grained::DualGrainedRows;
use super::super::ggml::{GgmlRows, testing::blocks};
use super::super::grouped::{Grid, GroupedRows};
use super::super::quantize::{Activations, Grain};
use super::super::simd::Level;
use super::super::sparse::{Places, SparseRows, Values, place_bits};
use super::super::{dot, dot::Rows};
use super::product::{Job, multiply, multiply_at};
use super::*;

/// Every source that has a kernel: name, rows, columns, bytes.
fn each(mut check: impl FnMut(&str, Source<'_>, usize, usize, &[f32])) {
    for (rows, blocks_each) in [(1, 1), (16, 3), (17, 2), (37, 5)] {
        for kind in GgmlType::ALL {
            let cols = blocks_each * kind.block_elements();
            let bytes = blocks(kind, rows * blocks_each);
            let mut dense = vec![0.0; rows * cols];
            dot::read(&GgmlRows::new(&bytes, rows, cols, kind), 0, &mut dense);
            let source = Source::Ggml { kind, blocks: &bytes };
            check(&format!("{kind:?} {rows}"), source, rows, cols, &dense);
        }
        for bits in [2, 3, 4, 8] {
            for group in [32, 64, 96] {
                let cols = blocks_each * group;
                let noise = |n: usize, k: usize| -> Vec<u8> {
                    (0..n).map(|i| (i * k + i * i * 7) as u8).collect()
                };
                let codes = noise(rows * (cols * bits as usize).div_ceil(8), 101);
                let scales: Vec<u8> = (0..rows * cols / group)
                    .flat_map(|i| half::f16::from_f32(0.01 * (i % 9) as f32 - 0.03).to_le_bytes())
                    .collect();
                let zeros: Vec<u8> =
                    noise(rows * cols / group, 59).iter().map(|z| z % (1 << (bits - 1))).collect();
                for zeros in [None, Some(&zeros[..])] {
                    let grid = Grid::new(bits, group, [rows, cols], &scales, zeros);
                    let mut dense = vec![0.0; rows * cols];
                    dot::read(&GroupedRows::new(&codes, rows, cols, grid), 0, &mut dense);
                    let (codes, scales) = (&codes, &scales);
                    let source = Source::Grouped { bits, group, codes, scales, zeros };
                    check(&format!("{bits} bits by {group}"), source, rows, cols, &dense);
                }
            }
        }
        for cols in [32 * blocks_each, 64 * blocks_each] {
            let codes: Vec<i8> = (0..rows * cols)
                .map(|i| ((i * 89 + i * i) % 255) as i8)
                .map(|c| c.max(-127))
                .collect();
            let scales: Vec<f32> = (0..rows).map(|i| 0.01 + 0.002 * i as f32).collect();
            let dense: Vec<f32> =
                codes.iter().enumerate().map(|(i, c)| f32::from(*c) * scales[i / cols]).collect();
            let source = Source::Rows { codes: &codes, scales: &scales };
            check(&format!("rows of {cols}"), source, rows, cols, &dense);

            // (code - zero) * factor fits into a signed byte.
            let group = cols / blocks_each;
            let groups = rows * blocks_each;
            let zeros: Vec<u8> = (0..groups).map(|i| (i * 5 % 16) as u8).collect();
            let factors: Vec<u8> = zeros
                .iter()
                .enumerate()
                .map(|(i, z)| 1 + (i % (127 / usize::from(*z.max(&(15 - z))))) as u8)
                .collect();
            let codes: Vec<u8> = (0..rows * cols).map(|i| ((i * 7 + i / 13) % 16) as u8).collect();
            let of = |i: usize| i / cols * blocks_each + i % cols / group;
            let dense: Vec<f32> = (0..rows * cols)
                .map(|i| {
                    let (code, zero) = (f32::from(codes[i]), f32::from(zeros[of(i)]));
                    (code - zero) * (scales[i / cols] * f32::from(factors[of(i)]))
                })
                .collect();
            let (codes, zeros, factors) = (&in_blocks(&codes), &zeros, &factors);
            let bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            let rows_of = DualGrainedRows::new([rows, cols], group, codes, factors, zeros, &bytes);
            let mut read = vec![0.0; rows * cols];
            dot::read(&rows_of, 0, &mut read);
            assert_eq!(read, dense);
            let source = Source::DualGrained { group, codes, factors, zeros, scales: &scales };
            check(&format!("dual grained {cols} by {group}"), source, rows, cols, &dense);
        }
    }
}

/// Codes as the dual grained layout stores them.
fn in_blocks(codes: &[u8]) -> Vec<u8> {
    let blocks = codes.as_chunks::<32>().0;
    blocks.iter().flat_map(|block| (0..16).map(|i| block[i] | block[i + 16] << 4)).collect()
}

/// Every way a product can be computed here.
fn paths() -> impl Iterator<Item = (Level, bool)> {
    Level::available().map(|level| (level, false)).chain([(Level::best(), true)])
}

#[test]
fn packed_elements_are_those_of_the_layout_to_the_bit() {
    let mut count = 0;
    each(|what, source, rows, cols, dense| {
        let Some(packed) = Packed::new(source, rows, cols) else {
            assert!(what.starts_with("Q2K") || what.starts_with("Q3K"), "{what}");
            return;
        };
        count += 1;
        let mut row = vec![0.0; cols];
        for r in 0..rows {
            packed.read_row(r, &mut row);
            assert_eq!(row, dense[r * cols..(r + 1) * cols], "{what} row {r}");
        }
    });
    assert_eq!(count, 4 * (8 + 4 * 3 * 2 + 2 * 2));
}

#[test]
fn products_are_those_of_rounded_activations_at_every_level() {
    each(|what, source, rows, cols, dense| {
        let Some(packed) = Packed::new(source, rows, cols) else { return };
        for tokens in [1, 2, 3, 4, 7, 9, 16, 31, 45] {
            let x: Vec<f32> =
                (0..tokens * cols).map(|i| ((i * 7919) % 1013) as f32 / 300.0 - 1.6).collect();
            let mut rounded = Activations::default();
            rounded.set(&x, cols, packed.grain());
            let x = rounded.to_f32();
            let mut first = None;
            for (level, tiles) in paths() {
                let mut y = vec![f32::NAN; tokens * rows];
                multiply_at(
                    level,
                    tiles,
                    &rounded,
                    &mut [Some(Job { weight: &packed, y: &mut y })],
                );
                for (i, y) in y.iter().enumerate() {
                    let x = &x[i / rows * cols..][..cols];
                    let w = &dense[i % rows * cols..][..cols];
                    let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let (exact, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                    // Weights with a minimum are added apart from it.
                    let error = (f64::from(*y) - exact).abs();
                    assert!(error <= 1e-5 * size + 1e-6, "{what} {level:?}: {y} not {exact}");
                }
                let y: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                assert_eq!(*first.get_or_insert_with(|| y.clone()), y, "{what} {level:?}");
            }
        }
    });
}

#[test]
fn the_largest_codes_do_not_overflow() {
    let cols = 4096;
    for (kind, byte) in [(GgmlType::Q8_0, 0x80), (GgmlType::Q8_0, 0x7f), (GgmlType::Q5_0, 0xff)] {
        let mut bytes = vec![byte; cols / 32 * kind.block_bytes()];
        for block in bytes.chunks_exact_mut(kind.block_bytes()) {
            block[..2].copy_from_slice(&half::f16::ONE.to_le_bytes());
        }
        let rows = GgmlRows::new(&bytes, 1, cols, kind);
        assert_eq!(rows.cols(), cols);
        let mut dense = vec![0.0; cols];
        dot::read(&rows, 0, &mut dense);
        let packed = Packed::new(Source::Ggml { kind, blocks: &bytes }, 1, cols).unwrap();
        for sign in [1.0, -1.0] {
            let mut x = Activations::default();
            x.set(&vec![127.0 * sign; cols], cols, Grain::Block);
            let expected: f32 = dense.iter().sum::<f32>() * 127.0 * sign;
            for (level, tiles) in paths() {
                let mut y = [0.0];
                multiply_at(level, tiles, &x, &mut [Some(Job { weight: &packed, y: &mut y })]);
                assert_eq!(y, [expected], "{kind:?} {level:?}");
            }
        }
    }
}

#[test]
fn dual_grained_sums_are_the_integers_of_their_8_bit_rows() {
    let rows = 19;
    let mut state = 77_u32;
    let mut next = |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    for (cols, group) in
        [(32, 32), (96, 32), (544, 32), (576, 64), (640, 128), (672, 96), (1056, 352)]
    {
        let groups = rows * cols / group;
        let zeros: Vec<u8> = (0..groups).map(|_| next(16) as u8).collect();
        let factors: Vec<u8> = (0..groups).map(|_| 1 + next(127) as u8).collect();
        // As far from the zero point as a byte allows, both ends often.
        let codes: Vec<u8> = (0..rows * cols)
            .map(|i| {
                let (zero, limit) = (zeros[i / group], 127 / factors[i / group]);
                let code = [0, 15, next(16) as u8, next(16) as u8][next(4) as usize];
                code.clamp(zero.saturating_sub(limit), (zero + limit).min(15))
            })
            .collect();
        let scales: Vec<f32> = (0..rows).map(|_| next(1000) as f32 / 3000.0).collect();
        let bytes: Vec<i8> = (0..rows * cols)
            .map(|i| {
                let code = i32::from(codes[i]) - i32::from(zeros[i / group]);
                i8::try_from(code * i32::from(factors[i / group])).unwrap()
            })
            .collect();
        let blocks = in_blocks(&codes);
        let source = Source::DualGrained {
            group,
            codes: &blocks,
            factors: &factors,
            zeros: &zeros,
            scales: &scales,
        };
        let factored = Packed::new(source, rows, cols).unwrap();
        let source = Source::Rows { codes: &bytes, scales: &scales };
        let expanded = Packed::new(source, rows, cols).unwrap();
        // All that were few, and enough for tiles.
        for tokens in (1..=9).chain([33]) {
            let values: Vec<f32> =
                (0..tokens * cols).map(|_| next(2001) as f32 / 1000.0 - 1.0).collect();
            let mut x = Activations::default();
            x.set(&values, cols, Grain::Token);
            let exact: Vec<u32> = (0..tokens * rows)
                .map(|i| {
                    let (token, row) = (i / rows, i % rows);
                    let x_codes = &x.codes()[token * cols..(token + 1) * cols];
                    let terms = x_codes.iter().zip(&bytes[row * cols..(row + 1) * cols]);
                    let sum: i32 = terms.map(|(x, w)| i32::from(*x) * i32::from(*w)).sum();
                    (sum as f32 * (scales[row] * x.scales()[token * (cols / 32)])).to_bits()
                })
                .collect();
            for (level, tiles) in paths() {
                for (weight, what) in [(&factored, "factored"), (&expanded, "expanded")] {
                    let mut y = vec![f32::NAN; tokens * rows];
                    multiply_at(level, tiles, &x, &mut [Some(Job { weight, y: &mut y })]);
                    let y: Vec<u32> = y.iter().map(|y| y.to_bits()).collect();
                    assert_eq!(y, exact, "{what} {cols} by {group}, {tokens} tokens, {level:?}");
                }
            }
        }
    }
}

#[test]
fn the_widest_dual_grained_rows_do_not_overflow() {
    let cols = super::whole::MOST_COLS / 32 * 32;
    for (code, zero, factor, group) in [
        (15, 0, 8, cols),
        (0, 15, 8, 32),
        (1, 0, 127, 32),
        (15, 14, 127, cols),
        (0, 1, 127, cols),
        (14, 15, 127, 32),
    ] {
        let weight = (i64::from(code) - i64::from(zero)) * i64::from(factor);
        let blocks = in_blocks(&vec![code; cols]);
        let (factors, zeros) = (vec![factor; cols / group], vec![zero; cols / group]);
        let source = Source::DualGrained {
            group,
            codes: &blocks,
            factors: &factors,
            zeros: &zeros,
            scales: &[1.0],
        };
        let packed = Packed::new(source, 1, cols).unwrap();
        for sign in [1.0, -1.0] {
            let mut x = Activations::default();
            // 33 tokens: tiles, eights and a single one.
            x.set(&vec![127.0 * sign; 33 * cols], cols, Grain::Token);
            let exact = (weight * 127 * cols as i64) as f32 * sign;
            for (level, tiles) in paths() {
                let mut y = [0.0; 33];
                let job = Job { weight: &packed, y: &mut y };
                multiply_at(level, tiles, &x, &mut [Some(job)]);
                assert_eq!(y, [exact; 33], "{code} {zero} {factor} {level:?}");
            }
        }
    }
    // One block more has no kernel in integers.
    let (codes, scales) = (vec![1; cols + 32], [1.0]);
    assert!(Packed::new(Source::Rows { codes: &codes, scales: &scales }, 1, cols + 32).is_none());
}

#[test]
fn several_matrices_share_their_input() {
    let weights: Vec<Packed> = [(5, 2), (40, 2), (16, 2)]
        .map(|(rows, n)| {
            let bytes = blocks(GgmlType::Q4_1, rows * n);
            let source = Source::Ggml { kind: GgmlType::Q4_1, blocks: &bytes };
            Packed::new(source, rows, 32 * n).unwrap()
        })
        .into();
    let mut x = Activations::default();
    x.set(&(0..3 * 64).map(|i| i as f32 / 64.0 - 1.0).collect::<Vec<_>>(), 64, Grain::Block);
    let alone = |w: &Packed| {
        let mut y = vec![f32::NAN; 3 * w.rows()];
        multiply(&x, &mut [Some(Job { weight: w, y: &mut y })]);
        y
    };
    let mut together: Vec<Vec<f32>> =
        weights.iter().map(|w| vec![f32::NAN; 3 * w.rows()]).collect();
    let mut jobs: Vec<_> =
        weights.iter().zip(&mut together).map(|(weight, y)| Some(Job { weight, y })).collect();
    multiply(&x, &mut jobs);
    for (weight, y) in weights.iter().zip(&together) {
        assert_eq!(*y, alone(weight));
    }
    // Codes and scales as the file has them: 20 bytes for 32 weights.
    assert_eq!(weights[2].bytes(), 16 * 2 * 20);
}

/// Codes of a sparse matrix in its own layout and, with the zero point where nothing is kept, in that of a full one.
struct Pruned {
    places: Vec<u8>,
    codes: Vec<u8>,
    starts: Vec<usize>,
    full: Vec<u8>,
    scales: Vec<u8>,
    zeros: Vec<u8>,
}

impl Pruned {
    /// Elements where `kept(row, column)`, with a bitmap or, of groups of `of`, with places.
    fn new(
        [rows, cols]: [usize; 2],
        bits: usize,
        group: usize,
        symmetric: bool,
        of: Option<u32>,
        kept: impl Fn(usize, usize) -> bool,
    ) -> Self {
        let mut state = (rows * cols * bits) as u32;
        let mut next = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % below
        };
        let groups = rows * cols / group;
        let scales: Vec<u8> = (0..groups)
            .flat_map(|_| half::f16::from_f32(0.001 + next(999) as f32 / 9000.0).to_le_bytes())
            .collect();
        let zeros: Vec<u8> = (0..groups).map(|_| next(1 << bits) as u8).collect();
        let (mut places, mut codes, mut full) = (Vec::new(), Vec::new(), Vec::new());
        let mut starts = Vec::new();
        for row in 0..rows {
            starts.push(codes.len());
            let code: Vec<u8> = (0..cols).map(|_| next(1 << bits) as u8).collect();
            let chosen: Vec<usize> = (0..cols).filter(|c| kept(row, *c)).collect();
            put_stream(chosen.iter().map(|c| code[*c]), bits, &mut codes);
            let place = |c: &usize| (*c % of.unwrap_or(1) as usize) as u8;
            match of {
                Some(of) => {
                    put_stream(chosen.iter().map(place), place_bits(of) as usize, &mut places);
                }
                None => put_stream((0..cols).map(|c| u8::from(kept(row, c))), 1, &mut places),
            }
            let absent = |c: usize| match symmetric {
                true => 1 << (bits - 1),
                false => zeros[(row * cols + c) / group],
            };
            let all = (0..cols).map(|c| if kept(row, c) { code[c] } else { absent(c) });
            put_stream(all, bits, &mut full);
        }
        Self { places, codes, starts, full, scales, zeros }
    }
}

fn put_stream(codes: impl Iterator<Item = u8>, bits: usize, out: &mut Vec<u8>) {
    let (mut word, mut have) = (0_u32, 0);
    for code in codes {
        word |= u32::from(code) << have;
        have += bits;
        while have >= 8 {
            out.push(word as u8);
            word >>= 8;
            have -= 8;
        }
    }
    if have > 0 {
        out.push(word as u8);
    }
}

#[test]
fn sparse_codes_multiply_as_full_ones_with_zeros_to_the_bit() {
    // Half of each four, a quarter of each eight, one of 32, anything, nothing in whole rows, all.
    type Pattern = (&'static str, Option<(u32, u32)>, fn(usize, usize) -> bool);
    let patterns: [Pattern; 6] = [
        ("2:4", Some((2, 4)), |r, c| (c + r + c / 4) % 4 < 2),
        ("2 of 8", Some((2, 8)), |r, c| matches!((c + 3 * (r + c / 8)) % 8, 0 | 5)),
        ("1 of 32", Some((1, 32)), |r, c| (c * 7 + r * 5 + c / 32) % 32 == 0),
        ("any", None, |r, c| (r * 31 + c * 17 + r * c) % 7 < 3),
        ("some rows", None, |r, c| r % 3 == 0 && (c / 5 + r) % 2 == 0),
        ("all", None, |_, _| true),
    ];
    for (name, list, kept) in patterns {
        for (rows, blocks_each) in [(1, 1), (16, 3), (37, 5)] {
            for (bits, group) in [(2, 32), (3, 64), (4, 32), (4, 96), (8, 32), (8, 64)] {
                for symmetric in [false, true] {
                    let (cols, what) =
                        (blocks_each * group, format!("{name}, {bits} bits, {rows}"));
                    let of = list.map(|(_, of)| of);
                    let p = Pruned::new([rows, cols], bits, group, symmetric, of, kept);
                    let zeros = (!symmetric).then_some(&p.zeros[..]);
                    let places = match list {
                        None => Places::Bitmap(&p.places),
                        Some((keep, of)) => Places::NOfM { places: &p.places, keep, of },
                    };
                    let bits = bits as u8;
                    let grid = Grid::new(bits, group, [rows, cols], &p.scales, zeros);
                    let values = Values::Codes(&p.codes, grid);
                    let from = SparseRows::new([rows, cols], places, values, &p.starts);
                    let sparse = Packed::sparse(&from).unwrap();
                    let (codes, scales) = (&p.full, &p.scales);
                    let source = Source::Grouped { bits, group, codes, scales, zeros };
                    let full = Packed::new(source, rows, cols).unwrap();
                    let (mut own, mut read, mut same) =
                        (vec![0.0; cols], vec![0.0; cols], vec![0.0; cols]);
                    for row in 0..rows {
                        dot::read(&from, row, &mut own);
                        sparse.read_row(row, &mut read);
                        full.read_row(row, &mut same);
                        assert_eq!((&own, &own), (&read, &same), "{what}, row {row}");
                    }
                    for tokens in [1, 2, 4, 7, 9, 16, 37] {
                        let x: Vec<f32> = (0..tokens * cols)
                            .map(|i| ((i * 7919) % 1013) as f32 / 300.0 - 1.6)
                            .collect();
                        let mut rounded = Activations::default();
                        rounded.set(&x, cols, sparse.grain());
                        for (level, tiles) in paths() {
                            let bits = |weight| {
                                let mut y = vec![f32::NAN; tokens * rows];
                                let jobs = &mut [Some(Job { weight, y: &mut y })];
                                multiply_at(level, tiles, &rounded, jobs);
                                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                            };
                            assert_eq!(bits(&sparse), bits(&full), "{what}, {tokens}, {level:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn sparse_codes_take_a_bit_an_element_and_their_own_bits() {
    let (rows, cols, group) = (32, 128, 64);
    for (bits, width) in [(2, 2), (3, 4), (4, 4), (8, 8)] {
        let p = Pruned::new([rows, cols], bits, group, true, Some(4), |r, c| (c + r) % 4 < 2);
        let grid = Grid::new(bits as u8, group, [rows, cols], &p.scales, None);
        let places = Places::NOfM { places: &p.places, keep: 2, of: 4 };
        let values = Values::Codes(&p.codes, grid);
        let packed = Packed::sparse(&SparseRows::new([rows, cols], places, values, &p.starts));
        let elements = rows * cols;
        let (scales, starts) = (2 * elements / group, 2 * size_of::<usize>());
        let codes = elements / 8 + elements / 2 * width / 8;
        assert_eq!(packed.unwrap().bytes(), codes + scales + starts);
    }
    // Groups that are no whole blocks, and values that are no codes, are left to their own layout.
    let (places, scales) = (vec![0; 8], vec![0; 8]);
    let values = Values::Codes(&[], Grid::new(4, 16, [1, 64], &scales, None));
    let rows = SparseRows::new([1, 64], Places::Bitmap(&places), values, &[0, 0]);
    assert!(Packed::sparse(&rows).is_none());
    let values = Values::Dense(&[], dot::DenseKind::F32);
    let rows = SparseRows::new([1, 64], Places::Bitmap(&places), values, &[0, 0]);
    assert!(Packed::sparse(&rows).is_none());
}
