//! One pass of the calibration text through a model as it is: what each block does to the states, and what the
//! channels of its feed-forward network hold.

use std::sync::Arc;

use super::slimming::Parts;
use crate::calibrate::inputs::Inputs;
use crate::calibrate::walk::{self, Weights};
use crate::calibrate::{self, Windows};
use crate::error::{Error, Reason, Result};
use crate::methods::StepContext;
use crate::models::Model;
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Weight};
use crate::progress::Progress;

/// Tokens that run through a block at once.
const CHUNK_TOKENS: usize = 2048;

/// Means over tokens of how the states that enter a block and those that leave it differ.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moved {
    /// Angle over pi, 0 to 1.
    pub angular: f64,
    /// One minus the cosine.
    pub cosine: f64,
    /// Of the mean over channels of the squared difference.
    pub mse: f64,
    /// Of the mean over channels of the absolute difference.
    pub mae: f64,
}

impl Moved {
    /// Adds two rows, the same token before and after.
    pub fn add(&mut self, before: &[f32], after: &[f32]) {
        let (mut dot, mut a, mut b, mut square, mut absolute) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (x, y) in before.iter().zip(after) {
            let (x, y) = (f64::from(*x), f64::from(*y));
            dot += x * y;
            a += x * x;
            b += y * y;
            square += (x - y) * (x - y);
            absolute += (x - y).abs();
        }
        let norm = (a * b).sqrt();
        // Rounding puts the cosine of nearly equal states above 1, where there is no angle.
        let cosine = if norm > 0.0 { (dot / norm).clamp(-1.0, 1.0) } else { 1.0 };
        let width = before.len().max(1) as f64;
        self.angular += cosine.acos() / std::f64::consts::PI;
        self.cosine += 1.0 - cosine;
        self.mse += square / width;
        self.mae += absolute / width;
    }

    fn over(self, tokens: usize) -> Self {
        let n = tokens.max(1) as f64;
        Self {
            angular: self.angular / n,
            cosine: self.cosine / n,
            mse: self.mse / n,
            mae: self.mae / n,
        }
    }
}

/// What was seen of a block.
pub struct Block {
    pub moved: Moved,
    /// Of the channels of the feed-forward network, as they enter the weight that leads out.
    pub channels: Inputs,
    pub parts: Parts,
}

/// What was seen of all blocks, and what is worth knowing of the text.
pub struct Seen {
    pub blocks: Vec<Block>,
    pub sequences: usize,
    pub warnings: Vec<String>,
}

/// Runs the calibration text of a step through the model once.
pub fn collect(
    cx: &StepContext<'_>,
    model: &Model,
    options: &calibrate::Options,
    progress: &Progress,
) -> Result<Seen> {
    let sources = calibrate::Sources {
        model,
        texts: cx.texts,
        stream: &cx.random.child("calibration"),
        progress,
    };
    let windows = cx.calibrations.windows(options, cx.digest, &sources)?;
    let blocks = through(model, &windows, progress)?;
    Ok(Seen { blocks, sequences: windows.sequences(), warnings: windows.warnings.clone() })
}

fn through(model: &Model, windows: &Windows, progress: &Progress) -> Result<Vec<Block>> {
    let walk = walk::of(&model.family);
    let (width, length) = (walk.width(), windows.length);
    let mut hidden = vec![0.0; windows.tokens.len() * width];
    walk.embed(&model.weights, &windows.tokens, &mut hidden)?;
    let chunk = (CHUNK_TOKENS / length).max(1) * length * width;
    let mut seen = Vec::with_capacity(walk.blocks());
    let mut before = Vec::new();
    for b in 0..walk.blocks() {
        let message = format!("block {} of {}", b + 1, walk.blocks());
        progress.report(b as f64 / walk.blocks() as f64, &message)?;
        let parts = Parts::of(&model.family, b)?;
        let last = walk.linears(b).len() - 1;
        let mut channels = Inputs::new(model.weight(&parts.out)?.cols(), false);
        let mut moved = Moved::default();
        let block = walk.block(&dense(model, walk.linears(b).concat())?, b)?;
        for part in hidden.chunks_mut(chunk) {
            progress.check()?;
            before.clear();
            before.extend_from_slice(part);
            let mut tap = |group: usize, rows: &[f32]| {
                if group == last {
                    channels.add(rows);
                }
            };
            block.forward(part, length, Some(&mut tap));
            for (x, y) in before.chunks(width).zip(part.chunks(width)) {
                moved.add(x, y);
            }
        }
        if !channels.finite() || !hidden.iter().all(|v| v.is_finite()) {
            return Err(Error::new(
                Reason::NonFinite,
                format!(
                    "a number that is not finite comes out of block {b} on the calibration text; the \
                     model is broken, or an earlier step damaged it: evaluate the version this step \
                     starts from"
                ),
            ));
        }
        seen.push(Block { moved: moved.over(windows.tokens.len()), channels, parts });
    }
    progress.report(1.0, "all blocks seen")?;
    Ok(seen)
}

/// The weights with those of `names` as f32, which multiply fast.
fn dense(model: &Model, names: Vec<String>) -> Result<Weights> {
    let mut view = model.weights.clone();
    for name in names {
        let stored = model.weight(&name)?;
        let dense = Dense::from_f32(stored.shape().to_vec(), &stored.to_f32(), Dtype::F32)?;
        view.insert(name, Arc::new(Weight::Dense(dense)));
    }
    Ok(view)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;

    #[test]
    fn distances_by_hand() {
        let mut moved = Moved::default();
        moved.add(&[1.0, 0.0], &[0.0, 2.0]);
        moved.add(&[1.0, 1.0], &[1.0, 1.0]);
        let mean = moved.over(2);
        assert_eq!((mean.angular, mean.cosine), (0.25, 0.5));
        assert_eq!((mean.mse, mean.mae), (1.25, 0.75));
        // Equal up to rounding: an angle, not a NaN.
        let row = [0.1f32, 0.7, -0.3, 1e-3];
        let mut same = Moved::default();
        same.add(&row, &row.map(|v| v * 3.0));
        assert!(same.angular >= 0.0 && same.angular < 1e-6);
        let mut none = Moved::default();
        none.add(&[0.0; 2], &[1.0; 2]);
        assert_eq!(none.angular, 0.0);
    }

    #[test]
    fn channels_are_those_of_the_last_weight() {
        let model = random::model(random::tiny("llama"), 2).expect("a model");
        let tokens: Vec<u32> = (0..40).map(|i| (i * 29 + 1) % 96).collect();
        let windows = Windows { tokens, length: 10, warnings: Vec::new() };
        let seen = through(&model, &windows, &Progress::silent()).expect("runs");
        assert_eq!(seen.len(), 3);
        for block in &seen {
            assert_eq!((block.channels.count(), block.channels.cols()), (40, 80));
            assert!(block.moved.angular > 0.0 && block.moved.angular < 1.0);
        }
    }

    #[test]
    fn twice_the_text_is_no_other_distance() {
        let model = random::model(random::tiny("llama"), 2).expect("a model");
        let tokens: Vec<u32> = (0..40).map(|i| (i * 29 + 1) % 96).collect();
        let seen = |tokens: Vec<u32>| {
            let windows = Windows { tokens, length: 10, warnings: Vec::new() };
            through(&model, &windows, &Progress::silent()).expect("runs")
        };
        for (once, twice) in seen(tokens.clone()).iter().zip(&seen(tokens.repeat(2))) {
            let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-4 * (1.0 + b), "{a} {b}");
            near(once.moved.angular, twice.moved.angular);
            near(once.moved.cosine, twice.moved.cosine);
            near(once.moved.mse, twice.moved.mse);
            near(once.moved.mae, twice.moved.mae);
            for (a, b) in once.channels.squares().iter().zip(twice.channels.squares()) {
                near(2.0 * a, *b);
            }
        }
    }
}
