//! Small comparisons and made-up runs for tests.

use crate::eval::metrics::Metric;
use crate::proto::v1::{self, step::Method};

/// Prunes by text that the model samples: depends on the seed.
pub fn wanda(share: f64) -> v1::Step {
    let sparsity = v1::Sparsity { share: Some(share), ..Default::default() };
    let calibration =
        v1::Calibration { sequences: Some(2), sequence_length: Some(8), ..Default::default() };
    let wanda = v1::Wanda { sparsity: Some(sparsity), calibration: Some(calibration) };
    v1::Step { method: Some(Method::Wanda(wanda)) }
}

/// Rounds: does not depend on the seed.
pub fn round(bits: u32) -> v1::Step {
    let grid = v1::Grid { bits: Some(bits), group_size: Some(16), ..Default::default() };
    v1::Step { method: Some(Method::RoundToNearest(v1::RoundToNearest { grid: Some(grid) })) }
}

pub fn arm(name: &str, steps: Vec<v1::Step>) -> v1::Arm {
    v1::Arm { name: name.to_owned(), steps, ..Default::default() }
}

pub fn comparison(arms: Vec<v1::Arm>) -> v1::Comparison {
    v1::Comparison { arms, ..Default::default() }
}

/// A run with measurements: metric, samples (the value of metrics without samples is the first).
pub fn run(arm: &str, seed: Option<u64>, measured: &[(&Metric, &[f64])]) -> v1::ArmRun {
    let measurements = measured
        .iter()
        .map(|(metric, samples)| match metric.sample_of {
            "" => metric.measured(samples[0], "p"),
            _ => metric.sampled(samples.to_vec(), "p"),
        })
        .collect();
    v1::ArmRun { arm: arm.to_owned(), seed, measurements, ..Default::default() }
}
