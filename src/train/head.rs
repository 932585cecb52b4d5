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

/// Names of a head that tells hidden tokens: a linear layer's weight and bias, a norm's weight and bias, as
/// models for masked language modelling call them. Its outputs are the model's own table of embeddings.
pub const HIDDEN_TOKENS: [&str; 4] = [
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
];

/// A new head that tells hidden tokens from states of width `hidden`.
pub fn hidden_tokens(hidden: usize, rate: f64, random: &Stream) -> Result<Parameters> {
    let mut layer = head(hidden, hidden, rate, random)?;
    let [weight, bias, scale, shift] = HIDDEN_TOKENS.map(str::to_owned);
    let mut take = |name: &str| {
        layer.remove(name).ok_or_else(|| crate::error::Error::internal("a head lacks a part"))
    };
    let (own_weight, own_bias) = (take(HEAD_WEIGHT)?, take(HEAD_BIAS)?);
    let ones = Var::ones(hidden, DType::F32, &Device::Cpu)?;
    let zeros = Var::zeros(hidden, DType::F32, &Device::Cpu)?;
    Ok(Parameters::from([
        (weight, own_weight),
        (bias, own_bias),
        (scale, Parameter { var: ones, rate, decay: false }),
        (shift, Parameter { var: zeros, rate, decay: false }),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_for_hidden_tokens_have_four_parts() {
        let head = hidden_tokens(6, 1.0, &Stream::root(1)).unwrap();
        let shapes = HIDDEN_TOKENS.map(|name| head[name].var.dims().to_vec());
        assert_eq!(shapes, [vec![6, 6], vec![6], vec![6], vec![6]]);
        assert_eq!(head[HIDDEN_TOKENS[2]].var.to_vec1::<f32>().unwrap(), [1.0; 6]);
        assert!(head[HIDDEN_TOKENS[0]].decay && !head[HIDDEN_TOKENS[2]].decay);
    }

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
