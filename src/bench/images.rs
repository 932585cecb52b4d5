//! Speed of an image classifier from end to end: as it is stored, and as the same numbers in dense weights.

use std::time::Instant;

use serde::Serialize;

use super::stats::Spread;
use crate::error::{Error, Result};
use crate::models::vision::Model;
use crate::models::vision::plan::Plan;

/// Most images of a batch.
const MOST_IMAGES: usize = 1 << 14;
/// Seconds of a repetition at least.
const LEAST_SECONDS: f64 = 0.05;

/// How much is run, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Run {
    /// Images that are classified at once.
    pub batch: usize,
    /// Measured repetitions, after one that warms up.
    pub repetitions: usize,
}

/// What classifying reaches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Images {
    pub run: Run,
    /// In the layouts that the model has.
    pub images_per_second: Spread,
    /// The same numbers in dense weights.
    pub dense_images_per_second: Spread,
    /// Median over median.
    pub over_dense: f64,
    /// Share of the elements of matrices that are zero.
    pub zero_share: f64,
    /// Bytes of the weights as they are multiplied.
    pub weight_bytes: u64,
    pub dense_bytes: u64,
    /// Largest difference between the two ways' logits.
    pub difference: f64,
}

/// Measures images of pseudo-random bytes. The two ways take turns.
///
/// # Errors
/// `INVALID_FIELD` for runs that measure nothing.
pub fn measure(model: &Model, run: Run) -> Result<Images> {
    if run.batch == 0 || run.batch > MOST_IMAGES || run.repetitions == 0 {
        let message = format!("between 1 and {MOST_IMAGES} images and one repetition are needed");
        return Err(Error::field("batch", message));
    }
    let elements = run.batch.saturating_mul(model.family.image());
    if elements > 1 << 28 {
        let message = format!("{} images of this size are too many; take fewer", run.batch);
        return Err(Error::field("batch", message));
    }
    let bytes: Vec<u8> = (0..elements).map(|i| (i * 7919 % 251) as u8).collect();
    let own = Plan::new(model)?;
    let dense = Plan::with(&model.family, &|name| Ok(model.weight(name)?.to_f32()))?;
    let pairs = own.classify(&bytes)?.into_iter().zip(dense.classify(&bytes)?);
    let difference = pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    let time = |plan: &Plan, count: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            std::hint::black_box(plan.classify(&bytes)?);
        }
        Ok(start.elapsed().as_secs_f64().max(1e-9))
    };
    let mut count = 1;
    while time(&own, count)? < LEAST_SECONDS {
        count *= 2;
    }
    let (mut seconds, mut others) = (Vec::new(), Vec::new());
    for _ in 0..run.repetitions {
        seconds.push(time(&own, count)? / count as f64);
        others.push(time(&dense, count)? / count as f64);
    }
    let rate = |seconds: Vec<f64>| Spread::of(seconds).rate(run.batch as f64);
    let (own_rate, dense_rate) = (rate(seconds), rate(others));
    let (mut zeros, mut all) = (0, 0);
    for weight in model.weights.values().filter(|weight| weight.shape().len() == 2) {
        zeros += weight.zeros();
        all += (weight.rows() * weight.cols()) as u64;
    }
    Ok(Images {
        run,
        over_dense: own_rate.median / dense_rate.median,
        images_per_second: own_rate,
        dense_images_per_second: dense_rate,
        zero_share: zeros as f64 / all.max(1) as f64,
        weight_bytes: own.bytes(),
        dense_bytes: dense.bytes(),
        difference,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::models::vision::random;
    use crate::seed::Stream;

    #[test]
    fn the_numbers_belong_together() {
        let config = json!({ "model_type": "conv_net", "image_size": 8, "channels": [4, 8] });
        let model = random::model(config, &Stream::root(1)).expect("a model");
        let run = Run { batch: 3, repetitions: 2 };
        let found = measure(&model, run).expect("numbers");
        let ratio = found.images_per_second.median / found.dense_images_per_second.median;
        assert!((found.over_dense / ratio - 1.0).abs() < 1e-9);
        // A dense model is multiplied as its dense self.
        assert_eq!((found.difference, found.zero_share), (0.0, 0.0));
        assert_eq!(found.weight_bytes, found.dense_bytes);
        assert!(measure(&model, Run { batch: 0, ..run }).is_err());
        assert!(measure(&model, Run { batch: 1 << 20, ..run }).is_err());
        assert!(measure(&model, Run { repetitions: 0, ..run }).is_err());
    }
}
