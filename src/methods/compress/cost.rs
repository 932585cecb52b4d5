//! What a step is expected to cost.

use crate::calibrate::{Options, walk};
use crate::methods::Estimate;
use crate::models::ModelInfo;

/// Products a second that a plan is made with; a small machine reaches it, a large one does better.
const FLOPS: f64 = 6e10;
/// Weights a second read, compared and written anew.
const WEIGHTS: f64 = 2e7;
/// Tokens whose intermediates are in memory at once.
const CHUNK: usize = 2048;

/// A step that only reads weights.
pub fn alone(before: &ModelInfo, after: &ModelInfo) -> Estimate {
    let largest = before.tensors.values().map(|t| elements(&t.shape)).max().unwrap_or_default();
    let all: usize = linears(before).map(elements).sum();
    Estimate {
        weight_bytes: after.bytes(),
        // The changed weights beside the old ones; values, scores and mask of the largest.
        memory_bytes: before.bytes() + after.bytes() + 24 * largest as u64,
        seconds: all as f64 / WEIGHTS,
        calibration_tokens: 0,
    }
}

/// A step that runs text through the blocks, with or without Gram matrices.
pub fn calibrated(
    before: &ModelInfo,
    after: &ModelInfo,
    calibration: &Options,
    gram: bool,
) -> Estimate {
    let walk = walk::of(&before.family);
    let tokens = calibration.tokens();
    let chunk = CHUNK.max(calibration.length) as u64;
    let block: usize = linears(before).map(elements).sum::<usize>() / walk.blocks().max(1);
    let inputs = || linears(before).map(|shape| *shape.last().unwrap_or(&0) as f64);
    // Two passes through every weight; Gram matrices and their factors by shared input (about half
    // of the linears share).
    let mut flops = 4.0 * tokens as f64 * (block * walk.blocks()) as f64;
    let mut memory = 4 * tokens * walk.width() as u64
        + 4 * chunk * (walk.width() + walk.inner_width()) as u64
        + 24 * block as u64;
    if gram {
        let factors = |i: f64| i * i * i * 2.0 + i * i * tokens as f64;
        flops += inputs().map(factors).sum::<f64>() / 2.0;
        let widest = inputs().fold(0.0, f64::max) as u64;
        memory += 40 * widest * widest;
    }
    let alone = alone(before, after);
    Estimate {
        memory_bytes: alone.memory_bytes + memory,
        seconds: alone.seconds + flops / FLOPS,
        calibration_tokens: tokens,
        ..alone
    }
}

/// Shapes of the linears inside the blocks.
fn linears(model: &ModelInfo) -> impl Iterator<Item = &[usize]> {
    let walk = walk::of(&model.family);
    let names = (0..walk.blocks()).flat_map(|b| walk.linears(b).into_iter().flatten());
    names.filter_map(|n| model.tensors.get(&n)).map(|t| t.shape.as_slice())
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}
