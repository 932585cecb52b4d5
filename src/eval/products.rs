//! Kernel time alone: the products of the linear weights inside the blocks, without attention, norms
//! and head.

use std::time::Instant;

use super::metrics::{self, Metric};
use crate::calibrate::walk;
use crate::error::Result;
use crate::models::Model;
use crate::progress::Progress;
use crate::proto::v1;

const REPETITIONS: usize = 5;

/// `products_1_token_ms` and `products_512_tokens_ms`: medians of repetitions after one that warms up.
pub fn measure(model: &Model, progress: &Progress) -> Result<Vec<v1::Measurement>> {
    let one = time(model, 1, &metrics::PRODUCT_1, &progress.part(0.0, 0.2))?;
    let many = time(model, 512, &metrics::PRODUCT_512, &progress.part(0.2, 1.0))?;
    Ok(vec![one, many])
}

fn time(
    model: &Model,
    tokens: usize,
    metric: &Metric,
    progress: &Progress,
) -> Result<v1::Measurement> {
    let walk = walk::of(&model.family);
    let names: Vec<String> =
        (0..walk.blocks()).flat_map(|b| walk.linears(b).into_iter().flatten()).collect();
    let weights = names.iter().map(|n| model.weight(n)).collect::<Result<Vec<_>>>()?;
    let widest = |side: fn(&crate::nn::weight::Weight) -> usize| {
        weights.iter().map(|w| side(w)).max().unwrap_or_default()
    };
    let inputs: Vec<f32> =
        (0..tokens * widest(|w| w.cols())).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let mut outputs = vec![0.0; tokens * widest(|w| w.rows())];
    let mut samples = Vec::with_capacity(REPETITIONS);
    for repetition in 0..=REPETITIONS {
        let done = repetition as f64 / (REPETITIONS + 1) as f64;
        progress.report(done, "timing the products")?;
        let start = Instant::now();
        for weight in &weights {
            let (x, y) = (tokens * weight.cols(), tokens * weight.rows());
            weight.multiply(&inputs[..x], &mut outputs[..y]);
        }
        if repetition > 0 {
            samples.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let protocol = format!(
        "{} matrices, {tokens} tokens at once, median of {REPETITIONS}, {} threads",
        weights.len(),
        rayon::current_num_threads()
    );
    Ok(metric.sampled(samples, protocol))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random;

    #[test]
    fn times_have_samples_and_a_protocol() {
        let model = random::model(random::tiny("llama"), 1).expect("a model");
        let found = measure(&model, &Progress::silent()).expect("times");
        assert_eq!(found.len(), 2);
        for measured in found {
            assert_eq!(measured.samples.len(), REPETITIONS);
            assert!(measured.value > 0.0 && measured.protocol.contains("matrices"));
        }
    }
}
