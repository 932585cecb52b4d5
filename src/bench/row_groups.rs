//! Row groups against what they must beat: our own product with the same tiles in which every column is kept, and
//! the product of the tensor library. All three in f32, with weights that stay in the caches, measured in turn.

use std::time::Instant;

use candle_core::{Device, Tensor};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::Serialize;

use super::stats::Spread;
use crate::error::{Error, Result};
use crate::nn::weight::{RowGroupValues, RowGroups};
use crate::seed::Stream;

/// Shapes of 1 x 1 convolutions and linears, `[out, in]`.
pub const SHAPES: [[usize; 2]; 4] = [[256, 256], [512, 512], [576, 1536], [1536, 576]];
/// Columns of activations: one token, a few, an image of 14 x 14.
pub const TOKENS: [usize; 3] = [1, 16, 196];
/// Shares of columns that a group keeps.
pub const DENSITIES: [f64; 3] = [0.7, 0.5, 0.3];
/// Rows that share their columns.
pub const GROUP: usize = 8;

/// Seconds of a repetition of one product at least.
const LEAST_SECONDS: f64 = 0.01;
/// Most weights of a product, and most activations.
const MOST_ELEMENTS: usize = 1 << 26;

/// What is timed.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub shapes: Vec<[usize; 2]>,
    pub tokens: Vec<usize>,
    pub densities: Vec<f64>,
    pub group: usize,
    pub repetitions: usize,
}

/// One shape, density and number of tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Outputs and inputs.
    pub shape: [usize; 2],
    pub tokens: usize,
    pub density: f64,
    pub microseconds: Spread,
    /// With every column kept.
    pub same_tile_microseconds: Spread,
    /// Of the tensor library.
    pub library_microseconds: Spread,
    /// Medians over that of the row groups: above 1 is faster.
    pub over_same_tile: f64,
    pub over_library: f64,
}

/// Geometric means of the speed-ups over all shapes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mean {
    pub density: f64,
    /// Of one number of tokens; none for all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    pub over_same_tile: f64,
    pub over_library: f64,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Found {
    pub group: usize,
    pub rows: Vec<Row>,
    pub means: Vec<Mean>,
}

impl Settings {
    fn check(&self) -> Result<()> {
        let refuse = |field: &str, problem: String| Err(Error::field(field, problem));
        let size = |a: usize, b: usize| (1..=MOST_ELEMENTS).contains(&a.saturating_mul(b));
        if let Some(shape) = self.shapes.iter().find(|s| !size(s[0], s[1])) {
            let problem = format!("{shape:?} has no elements or more than {MOST_ELEMENTS}");
            return refuse("shape", problem);
        }
        let widest = self.shapes.iter().flatten().copied().max().unwrap_or(1);
        if let Some(tokens) = self.tokens.iter().find(|t| !size(**t, widest)) {
            let problem = format!("{tokens} tokens of {widest} channels are none or too many");
            return refuse("tokens", problem);
        }
        if let Some(density) = self.densities.iter().find(|d| !(0.0..=1.0).contains(*d)) {
            return refuse("density", format!("{density} is outside 0 to 1"));
        }
        if ![2, 4, 8, 16, 32].contains(&self.group) {
            return refuse("group", format!("{} is none of 2, 4, 8, 16 and 32", self.group));
        }
        if self.repetitions == 0 {
            return refuse("repetitions", "at least one is needed".into());
        }
        Ok(())
    }
}

/// Measures every combination.
///
/// # Errors
/// `INVALID_FIELD` for settings that measure nothing; INTERNAL from the tensor library.
pub fn measure(settings: &Settings) -> Result<Found> {
    settings.check()?;
    let stream = Stream::root(0);
    let mut rows = Vec::new();
    for &shape in &settings.shapes {
        let [outputs, inputs] = shape;
        let mut rng = stream.child(&format!("{outputs}x{inputs}")).rng();
        let values: Vec<f32> = (0..outputs * inputs).map(|_| rng.random::<f32>() - 0.5).collect();
        let most = settings.tokens.iter().max().copied().unwrap_or(0);
        let x: Vec<f32> = (0..most * inputs).map(|_| rng.random::<f32>() - 0.5).collect();
        let groups = outputs.div_ceil(settings.group);
        let all = pack(shape, &values, &vec![true; groups * inputs], settings.group)?;
        let library = Tensor::from_slice(&values, shape.as_slice(), &Device::Cpu)?.t()?;
        for &density in &settings.densities {
            let kept = (density * inputs as f64).round() as usize;
            let mut units = Vec::with_capacity(groups * inputs);
            for _ in 0..groups {
                let mut own: Vec<bool> = (0..inputs).map(|i| i < kept).collect();
                own.shuffle(&mut rng);
                units.extend(own);
            }
            let sparse = pack(shape, &values, &units, settings.group)?;
            for &tokens in &settings.tokens {
                let x = &x[..tokens * inputs];
                let mut y = vec![0.0; tokens * outputs];
                let tensor = Tensor::from_slice(x, (tokens, inputs), &Device::Cpu)?;
                let mut times = [Vec::new(), Vec::new(), Vec::new()];
                let mut run = |which: usize, count: usize| -> Result<f64> {
                    let start = Instant::now();
                    for _ in 0..count {
                        match which {
                            0 => sparse.multiply(x, &mut y),
                            1 => all.multiply(x, &mut y),
                            _ => drop(std::hint::black_box(tensor.matmul(&library)?)),
                        }
                    }
                    Ok(start.elapsed().as_secs_f64().max(1e-9))
                };
                let mut counts = [1; 3];
                for (which, count) in counts.iter_mut().enumerate() {
                    while run(which, *count)? < LEAST_SECONDS {
                        *count *= 2;
                    }
                }
                for _ in 0..settings.repetitions {
                    for (which, times) in times.iter_mut().enumerate() {
                        times.push(run(which, counts[which])? / counts[which] as f64);
                    }
                }
                let [own, same, library] = times.map(|times| Spread::of(times).times(1e6));
                rows.push(Row {
                    shape,
                    tokens,
                    density,
                    over_same_tile: same.median / own.median,
                    over_library: library.median / own.median,
                    microseconds: own,
                    same_tile_microseconds: same,
                    library_microseconds: library,
                });
            }
        }
    }
    let means = means(&rows, settings);
    Ok(Found { group: settings.group, rows, means })
}

fn pack(shape: [usize; 2], values: &[f32], units: &[bool], group: usize) -> Result<RowGroups> {
    RowGroups::from_units(shape, values, units, group, RowGroupValues::F32)
}

fn means(rows: &[Row], settings: &Settings) -> Vec<Mean> {
    let mut means = Vec::new();
    for &density in &settings.densities {
        let each = settings.tokens.iter().map(|tokens| Some(*tokens));
        for tokens in each.chain([None]) {
            let own = rows.iter().filter(|row| {
                row.density == density && tokens.is_none_or(|tokens| row.tokens == tokens)
            });
            let own: Vec<&Row> = own.collect();
            let mean = |of: fn(&Row) -> f64| {
                let logs: f64 = own.iter().map(|row| of(row).ln()).sum();
                (logs / own.len().max(1) as f64).exp()
            };
            means.push(Mean {
                density,
                tokens,
                over_same_tile: mean(|row| row.over_same_tile),
                over_library: mean(|row| row.over_library),
            });
        }
    }
    means
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            shapes: vec![[32, 24], [20, 16]],
            tokens: vec![1, 5],
            densities: vec![0.5, 0.0],
            group: 8,
            repetitions: 3,
        }
    }

    #[test]
    fn rows_and_means_belong_together() {
        let found = measure(&settings()).expect("numbers");
        assert_eq!((found.rows.len(), found.means.len()), (8, 6));
        for row in &found.rows {
            assert_eq!(row.microseconds.values.len(), 3);
            let ratio = row.same_tile_microseconds.median / row.microseconds.median;
            assert_eq!(row.over_same_tile, ratio);
        }
        let of = |density: f64, tokens: usize| -> Vec<f64> {
            let rows = found.rows.iter().filter(|r| r.density == density && r.tokens == tokens);
            rows.map(|r| r.over_library).collect()
        };
        let (a, mean) = (of(0.5, 1), &found.means[0]);
        assert_eq!((mean.density, mean.tokens, a.len()), (0.5, Some(1), 2));
        assert!((mean.over_library - (a[0] * a[1]).sqrt()).abs() < 1e-9 * mean.over_library);
        assert_eq!(found.means[2].tokens, None);
    }

    #[test]
    fn settings_that_measure_nothing_are_refused() {
        let refused = |change: fn(&mut Settings)| {
            let mut settings = settings();
            change(&mut settings);
            measure(&settings).is_err()
        };
        assert!(refused(|s| s.shapes = vec![[0, 4]]));
        assert!(refused(|s| s.shapes = vec![[usize::MAX, 2]]));
        assert!(refused(|s| s.tokens = vec![0]));
        assert!(refused(|s| s.tokens = vec![1 << 40]));
        assert!(refused(|s| s.densities = vec![1.5]));
        assert!(refused(|s| s.densities = vec![f64::NAN]));
        assert!(refused(|s| s.group = 3));
        assert!(refused(|s| s.repetitions = 0));
    }
}
