//! Heads that training puts on a model: a linear layer from a state to classes, tags or one number, trained
//! with the rest. Their losses are [`super::pass`]'s; the head over the vocabulary is the model's own.

use candle_core::{DType, Device, Var};
use rand::Rng;

use super::parameters::{Parameter, Parameters};
use crate::error::Result;
use crate::seed::Stream;

/// Name of a head's weight, `[outputs, hidden]`, as models for tasks call it.
pub const HEAD_WEIGHT: &str = "classifier.weight";

/// Name of a head's bias, `[outputs]`.
pub const HEAD_BIAS: &str = "classifier.bias";

/// Standard deviation of a new head's weight.
const DEVIATION: f64 = 0.02;

/// A new head with `outputs` classes or tags (1 for a number) over states of width `hidden`. The weight is
/// drawn from a normal distribution, the bias is zero; `rate` multiplies the learning rate.
pub fn head(outputs: usize, hidden: usize, rate: f64, random: &Stream) -> Result<Parameters> {
    let mut random = random.rng();
    let weight: Vec<f32> = (0..outputs * hidden)
        .map(|_| {
            // Box and Muller; the first number is never 0.
            let (a, b): (f64, f64) = (1.0 - random.random::<f64>(), random.random());
            (DEVIATION * (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
        })
        .collect();
    let weight = Var::from_vec(weight, (outputs, hidden), &Device::Cpu)?;
    let bias = Var::zeros(outputs, DType::F32, &Device::Cpu)?;
    Ok(Parameters::from([
        (HEAD_WEIGHT.to_owned(), Parameter { var: weight, rate, decay: true }),
        (HEAD_BIAS.to_owned(), Parameter { var: bias, rate, decay: false }),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_follow_their_stream() {
        let weight = |seed| {
            let head = head(4, 500, 2.0, &Stream::root(seed)).unwrap();
            assert_eq!((head[HEAD_WEIGHT].rate, head[HEAD_BIAS].decay), (2.0, false));
            let values: Vec<f32> = head[HEAD_WEIGHT].var.flatten_all().unwrap().to_vec1().unwrap();
            values
        };
        let first = weight(1);
        assert_eq!(first, weight(1));
        assert_ne!(first, weight(2));
        let deviation = first.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 2000.0;
        assert!((deviation.sqrt() - 0.02).abs() < 0.002);
    }
}
