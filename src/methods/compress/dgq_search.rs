//! The two searches of dual grained quantisation, on plain matrices: scales of groups that err least on the
//! outputs of their own inputs, then the scale of each row whose whole multiples they become.

use rayon::prelude::*;

use super::grid::Codes;
use crate::error::{Error, Result};
use crate::kernels::gemm;

/// The largest code of a weight.
const TOP_CODE: f32 = 15.0;
/// The largest magnitude of an 8-bit value.
const TOP: f32 = 127.0;

/// Weights `[rows, cols]` in groups, and the Gram matrix `[cols, cols]` of their inputs.
pub struct Problem<'a> {
    pub weights: &'a [f32],
    pub gram: &'a [f32],
    pub cols: usize,
    pub group: usize,
}

/// Grids of 16 codes by row and group: steps, which may be 0 for groups of zeros, and zero points.
#[derive(Debug, Clone, PartialEq)]
pub struct Grids {
    pub steps: Vec<f32>,
    pub zeros: Vec<u8>,
}

/// Codes `[rows, cols]`, factors and zero points by group, scales by row.
#[derive(Debug, Clone, PartialEq)]
pub struct Dual {
    pub codes: Vec<u8>,
    pub factors: Vec<u8>,
    pub zeros: Vec<u8>,
    pub scales: Vec<f32>,
}

/// The shares of the full range that the first search tries: 1.009 down to 0.8.
fn group_ratio(i: usize, steps: usize) -> f32 {
    1.02 - 0.22 * (i + 1) as f32 / steps as f32
}

/// The shares of the largest weight that the second tries: 1.01 down to 0.2, and 1.
fn row_ratio(i: usize, steps: usize) -> f32 {
    if i == steps { 1.0 } else { 1.02 - 0.82 * (i + 1) as f32 / steps as f32 }
}

/// The code of a value on a grid.
fn code(value: f32, step: f32, zero: u8) -> u8 {
    if step == 0.0 {
        return zero;
    }
    ((value / step).round_ties_even() + f32::from(zero)).clamp(0.0, TOP_CODE) as u8
}

fn value(code: u8, step: f32, zero: u8) -> f32 {
    (f32::from(code) - f32::from(zero)) * step
}

/// The grid of each group with the least squared error of the group's share of the outputs,
/// `e G e^T` with the group's block `G` of the Gram matrix. Grids span a share of the group's values and 0.
pub fn groups(problem: &Problem<'_>, steps: usize, round: impl Fn(f32) -> f32 + Sync) -> Grids {
    let Problem { weights, gram, cols, group } = *problem;
    let per_row = cols / group;
    // Blocks of the Gram matrix, one after another: each is read for every row.
    let blocks: Vec<f32> = (0..per_row)
        .flat_map(|g| (0..group).flat_map(move |i| (0..group).map(move |j| (g, i, j))))
        .map(|(g, i, j)| gram[(g * group + i) * cols + g * group + j])
        .collect();
    let found: Vec<(f32, u8)> = weights
        .par_chunks_exact(cols)
        .flat_map_iter(|row| {
            let mut error = vec![0.0_f32; group];
            let blocks = &blocks;
            let round = &round;
            row.chunks_exact(group)
                .enumerate()
                .map(move |(g, values)| {
                    let gram = &blocks[g * group * group..][..group * group];
                    best_grid(values, gram, steps, &mut error, round)
                })
                .collect::<Vec<_>>()
        })
        .collect();
    let (steps, zeros) = found.into_iter().unzip();
    Grids { steps, zeros }
}

fn best_grid(
    values: &[f32],
    gram: &[f32],
    steps: usize,
    error: &mut [f32],
    round: &(impl Fn(f32) -> f32 + Sync),
) -> (f32, u8) {
    let (low, high) =
        values.iter().fold((0.0_f32, 0.0_f32), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    let range = high / TOP_CODE - low / TOP_CODE;
    if range == 0.0 {
        return (0.0, 0);
    }
    let zero = (-low / range).round_ties_even().min(TOP_CODE) as u8;
    let mut best = (f64::INFINITY, range);
    for i in 0..steps {
        let step = round(group_ratio(i, steps) * range);
        for (e, v) in error.iter_mut().zip(values) {
            *e = v - value(code(*v, step, zero), step, zero);
        }
        let energy = energy(error, gram);
        if energy < best.0 {
            best = (energy, step);
        }
    }
    (best.1, zero)
}

/// `e G e^T`
fn energy(e: &[f32], gram: &[f32]) -> f64 {
    let rows = gram.chunks_exact(e.len()).zip(e).filter(|(_, e)| **e != 0.0);
    rows.map(|(row, own)| {
        let mut lanes = [0.0_f32; 16];
        let (a, b) = (row.as_chunks::<16>(), e.as_chunks::<16>());
        for (a, b) in a.0.iter().zip(b.0) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a * b;
            }
        }
        let rest: f32 = a.1.iter().zip(b.1).map(|(a, b)| a * b).sum();
        f64::from(*own) * f64::from(lanes.iter().sum::<f32>() + rest)
    })
    .sum()
}

/// The codes of grids with 16-bit scales, the form before the second search.
pub fn codes(problem: &Problem<'_>, grids: &Grids) -> Codes {
    let group = problem.group;
    let parts = problem.weights.chunks_exact(group).zip(grids.steps.iter().zip(&grids.zeros));
    let codes = parts.flat_map(|(values, (step, zero))| {
        values.iter().map(|v| code(*v, *step, *zero)).collect::<Vec<_>>()
    });
    // A scale is never 0 in storage; all codes of such a group are the zero point.
    let scales = grids.steps.iter().map(|step| if *step == 0.0 { 1.0 } else { *step });
    Codes { codes: codes.collect(), scales: scales.collect(), zeros: grids.zeros.clone() }
}

/// A row with a scale: its codes and factors. The clamp keeps `(code - zero) * factor` in a signed byte.
fn dual_row(
    row: &[f32],
    (steps, zeros): (&[f32], &[u8]),
    scale: f32,
    codes: &mut [u8],
    factors: &mut [u8],
) {
    let group = row.len() / steps.len();
    let groups = row.chunks_exact(group).zip(codes.chunks_exact_mut(group));
    for (((values, codes), factor), (step, zero)) in
        groups.zip(factors).zip(steps.iter().zip(zeros))
    {
        if scale == 0.0 {
            *factor = 1;
            codes.fill(*zero);
            continue;
        }
        // A cast saturates.
        *factor = ((step / scale).round_ties_even() as u8).clamp(1, TOP as u8);
        let limit = TOP as u8 / *factor;
        let low = f32::from(zero.saturating_sub(limit));
        let high = f32::from((zero + limit).min(TOP_CODE as u8));
        let (unit, most) = (scale * f32::from(*factor), TOP * scale);
        for (code, v) in codes.iter_mut().zip(values) {
            let nearest = (v.clamp(-most, most) / unit).round_ties_even() + f32::from(*zero);
            *code = nearest.clamp(low, high) as u8;
        }
    }
}

/// The numbers that a row stands for.
fn dual_values(codes: &[u8], factors: &[u8], zeros: &[u8], scale: f32, out: &mut [f32]) {
    let group = codes.len() / factors.len();
    let groups = codes.chunks_exact(group).zip(out.chunks_exact_mut(group));
    for ((codes, out), (factor, zero)) in groups.zip(factors.iter().zip(zeros)) {
        let unit = f32::from(*factor) * scale;
        for (v, code) in out.iter_mut().zip(codes) {
            *v = (f32::from(*code) - f32::from(*zero)) * unit;
        }
    }
}

/// The scale of each row with the least squared error of the row's output, `e H e^T` with the whole Gram
/// matrix; codes and factors with it. Also the sum of the errors found, and of those with the scale that the
/// largest weight asks for.
///
/// # Errors
/// What `check`, which is called for every scale tried, gives.
pub fn rows(
    problem: &Problem<'_>,
    grids: &Grids,
    steps: usize,
    mut check: impl FnMut() -> Result<()>,
) -> Result<(Dual, [f64; 2])> {
    let Problem { weights, gram, cols, group } = *problem;
    let (count, per_row) = (weights.len() / cols, cols / group);
    let tops: Vec<f32> = weights
        .par_chunks_exact(cols)
        .map(|row| row.iter().fold(0.0_f32, |top, v| top.max(v.abs())))
        .collect();
    let mut best = vec![(f64::INFINITY, 0.0_f32); count];
    let (mut errors, mut products) = (vec![0.0; weights.len()], vec![0.0; weights.len()]);
    let mut plain = 0.0;
    for i in 0..=steps {
        check()?;
        let ratio = row_ratio(i, steps);
        errors.par_chunks_exact_mut(cols).enumerate().for_each(|(r, error)| {
            let row = &weights[r * cols..][..cols];
            let places = r * per_row..(r + 1) * per_row;
            let grid = (&grids.steps[places.clone()], &grids.zeros[places]);
            let (mut codes, mut factors) = (vec![0; cols], vec![0; per_row]);
            let scale = ratio * tops[r] / TOP;
            dual_row(row, grid, scale, &mut codes, &mut factors);
            dual_values(&codes, &factors, grid.1, scale, error);
            error.iter_mut().zip(row).for_each(|(e, v)| *e = v - *e);
        });
        // The Gram matrix is symmetric: the product with its rows is that with its columns.
        gemm::multiply(&errors, gram, &mut products, cols);
        let each = errors.par_chunks_exact(cols).zip(products.par_chunks_exact(cols));
        let energies: Vec<f64> = each
            .map(|(e, p)| e.iter().zip(p).map(|(e, p)| f64::from(*e) * f64::from(*p)).sum())
            .collect();
        if i == steps {
            plain = energies.iter().sum();
        }
        for (best, (energy, top)) in best.iter_mut().zip(energies.iter().zip(&tops)) {
            if *energy < best.0 {
                *best = (*energy, ratio * top / TOP);
            }
        }
    }
    if best.iter().any(|(energy, _)| !energy.is_finite()) {
        return Err(Error::new(
            crate::error::Reason::NumericFailure,
            "no scale of a row gives an error that is finite; the weights or the inputs are too large",
        ));
    }
    let mut dual = Dual {
        codes: vec![0; weights.len()],
        factors: vec![0; count * per_row],
        zeros: grids.zeros.clone(),
        scales: best.iter().map(|(_, scale)| *scale).collect(),
    };
    for (r, row) in weights.chunks_exact(cols).enumerate() {
        let places = r * per_row..(r + 1) * per_row;
        let grid = (&grids.steps[places.clone()], &grids.zeros[places.clone()]);
        let codes = &mut dual.codes[r * cols..][..cols];
        dual_row(row, grid, dual.scales[r], codes, &mut dual.factors[places]);
    }
    Ok((dual, [best.iter().map(|(energy, _)| energy).sum(), plain]))
}

/// What the columns of channels are multiplied by so that the largest come down to a percentile: with `m` the
/// largest values of `n` channels and `b` the `floor(top n + 1.5)`-th largest of them, `max(1, m / b)`. None
/// where that is too small to divide by.
pub fn smoothing(tops: &[f32], top: f64) -> Option<Vec<f32>> {
    let mut sorted = tops.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let place = (top * tops.len() as f64 + 1.5).floor() as usize;
    let base = *sorted.get(place.max(1) - 1)?;
    (base >= 1e-4).then(|| tops.iter().map(|m| (m / base).max(1.0)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::methods::compress::testing::{correlated, weights};
    use crate::nn::weight::{DualGrained, Weight};

    fn flat(cols: usize, seed: u64) -> Vec<f32> {
        let gram = correlated(cols, seed);
        (0..cols * cols).map(|i| gram.at(i / cols, i % cols) as f32).collect()
    }

    fn identity(cols: usize) -> Vec<f32> {
        (0..cols * cols).map(|i| if i / cols == i % cols { 1.0 } else { 0.0 }).collect()
    }

    #[test]
    fn the_largest_channels_come_down_to_the_next() {
        // Ten channels, a tenth: floor(2.5) = 2, so the second largest is the base.
        let tops = [1.0, 8.0, 2.0, 0.5, 0.0, 1.0, 1.0, 1.0, 4.0, 1.0];
        let by = smoothing(&tops, 0.1).unwrap();
        assert_eq!(by, [1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(smoothing(&tops, 0.0).unwrap(), vec![1.0; 10], "the largest itself");
        assert_eq!(smoothing(&[1e-5; 4], 0.1), None);
        assert_eq!(smoothing(&[], 0.1), None);
    }

    #[test]
    fn grids_are_the_best_of_those_tried() {
        // One group, uncorrelated inputs: the error of the chosen step is the least over all ratios.
        let w = weights(1, 32, 3);
        let gram = identity(32);
        let problem = Problem { weights: &w, gram: &gram, cols: 32, group: 32 };
        let grids = groups(&problem, 20, |s| s);
        let error = |step: f32| -> f64 {
            let zero = grids.zeros[0];
            w.iter().map(|v| f64::from(v - value(code(*v, step, zero), step, zero)).powi(2)).sum()
        };
        let (low, high) = w.iter().fold((0.0_f32, 0.0_f32), |(a, b), v| (a.min(*v), b.max(*v)));
        let least = (0..20)
            .map(|i| error(group_ratio(i, 20) * (high / 15.0 - low / 15.0)))
            .fold(f64::INFINITY, f64::min);
        assert!((error(grids.steps[0]) - least).abs() < 1e-6 * least);
        assert!(
            (group_ratio(0, 20) - 1.009).abs() < 1e-6 && (group_ratio(19, 20) - 0.8).abs() < 1e-6
        );
        assert!((row_ratio(79, 80) - 0.2).abs() < 1e-6 && row_ratio(80, 80) == 1.0);
    }

    #[test]
    fn both_searches_help_and_the_weights_are_what_the_layout_says() {
        for seed in 0..4 {
            let (cols, group) = (64, 32);
            let w = weights(24, cols, 70 + seed);
            let gram = flat(cols, seed);
            let problem = Problem { weights: &w, gram: &gram, cols, group };
            let grids = groups(&problem, 20, |s| s);
            let (dual, [error, plain]) = rows(&problem, &grids, 80, || Ok(())).unwrap();
            assert!(error <= plain && error > 0.0, "{error} over {plain}");
            let Dual { codes, factors, zeros, scales } = &dual;
            let made = DualGrained::pack([24, cols], group, codes, factors, zeros, scales).unwrap();
            let energy = |made: &Weight| -> f64 {
                let delta: Vec<f32> = w.iter().zip(made.to_f32()).map(|(a, b)| a - b).collect();
                delta.chunks(cols).map(|e| super::energy(e, &gram)).sum()
            };
            let found = energy(&Weight::DualGrained(made));
            assert!((found / error - 1.0).abs() < 1e-3, "{found} is not {error}");
            let rounded = DualGrained::round([24, cols], group, &w).unwrap();
            assert!(found < energy(&Weight::DualGrained(rounded)), "seed {seed}");
        }
    }

    #[test]
    fn rows_of_zeros_and_groups_of_one_sign_fit() {
        let mut w = weights(3, 64, 1);
        w[..64].fill(0.0);
        w[64..128].iter_mut().for_each(|v| *v = v.abs() + 1.0);
        let gram = identity(64);
        let problem = Problem { weights: &w, gram: &gram, cols: 64, group: 32 };
        let grids = groups(&problem, 20, |s| s);
        let (dual, _) = rows(&problem, &grids, 80, || Ok(())).unwrap();
        assert_eq!((dual.scales[0], &dual.factors[..2]), (0.0, &[1, 1][..]));
        assert!(dual.codes[..64].iter().zip(0..).all(|(c, i)| *c == dual.zeros[i / 32]));
        let codes = codes(&problem, &grids);
        assert!(codes.scales.iter().all(|s| *s > 0.0));
        assert!(codes.codes[..64].iter().all(|c| *c == 0));
    }

    proptest! {
        #[test]
        fn eight_bit_values_never_overflow(
            values in prop::collection::vec(-1.0_f32..1.0, 64),
            outliers in prop::collection::vec((0_usize..64, -1e4_f32..1e4), 0..4),
            positive: bool,
        ) {
            let mut w = values;
            outliers.iter().for_each(|(at, v)| w[*at] = *v);
            if positive {
                w.iter_mut().for_each(|v| *v = v.abs());
            }
            let gram = identity(64);
            let problem = Problem { weights: &w, gram: &gram, cols: 64, group: 32 };
            let grids = groups(&problem, 5, |s| s);
            let (dual, [error, plain]) = rows(&problem, &grids, 10, || Ok(())).unwrap();
            prop_assert!(error <= plain);
            for (i, code) in dual.codes.iter().enumerate() {
                let byte = (i32::from(*code) - i32::from(dual.zeros[i / 32]))
                    * i32::from(dual.factors[i / 32]);
                prop_assert!(byte.abs() <= 127, "{byte}");
            }
            let packed =
                DualGrained::pack([1, 64], 32, &dual.codes, &dual.factors, &dual.zeros, &dual.scales);
            prop_assert!(packed.is_ok());
        }
    }

    #[test]
    fn correlated_inputs_get_the_best_of_all_that_is_tried_too() {
        let (rows_, cols, group) = (5, 64, 32);
        let w = weights(rows_, cols, 31);
        let gram = flat(cols, 9);
        // By the definition, of inputs from `first` on.
        let error = |e: &[f32], first: usize| -> f64 {
            let at = |i: usize, j: usize| f64::from(gram[(first + i) * cols + first + j]);
            let pairs = (0..e.len()).flat_map(|i| (0..e.len()).map(move |j| (i, j)));
            pairs.map(|(i, j)| f64::from(e[i]) * f64::from(e[j]) * at(i, j)).sum()
        };
        let problem = Problem { weights: &w, gram: &gram, cols, group };
        let grids = groups(&problem, 20, |s| s);
        for (g, values) in w.chunks(group).enumerate() {
            let zero = grids.zeros[g];
            let (low, high) =
                values.iter().fold((0.0_f32, 0.0_f32), |(a, b), v| (a.min(*v), b.max(*v)));
            let of = |step: f32| {
                let e: Vec<f32> =
                    values.iter().map(|v| v - value(code(*v, step, zero), step, zero)).collect();
                error(&e, g % (cols / group) * group)
            };
            let tried = (0..20).map(|i| of(group_ratio(i, 20) * (high / 15.0 - low / 15.0)));
            let least = tried.fold(f64::INFINITY, f64::min);
            assert!(of(grids.steps[g]) <= 1.001 * least, "group {g}");
        }
        let (dual, [found, _]) = rows(&problem, &grids, 80, || Ok(())).unwrap();
        let mut sum = 0.0;
        for (r, row) in w.chunks(cols).enumerate() {
            let places = r * 2..(r + 1) * 2;
            let grid = (&grids.steps[places.clone()], &grids.zeros[places]);
            let of = |scale: f32| {
                let (mut codes, mut factors, mut made) =
                    (vec![0; cols], vec![0; 2], vec![0.0; cols]);
                dual_row(row, grid, scale, &mut codes, &mut factors);
                dual_values(&codes, &factors, grid.1, scale, &mut made);
                let e: Vec<f32> = row.iter().zip(&made).map(|(v, m)| v - m).collect();
                error(&e, 0)
            };
            let top = row.iter().fold(0.0_f32, |top, v| top.max(v.abs()));
            let tried = (0..=80).map(|i| of(row_ratio(i, 80) * top / TOP));
            let least = tried.fold(f64::INFINITY, f64::min);
            assert!(of(dual.scales[r]) <= 1.001 * least, "row {r}");
            sum += least;
        }
        assert!((found / sum - 1.0).abs() < 1e-3, "{found} is not {sum}");
    }
}
