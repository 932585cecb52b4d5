//! Heads that training puts on a model, and their losses.
//!
//! A head is a linear layer from a state to classes, tags or one number; it is trained with the rest. The
//! losses are sums over what is counted: `-log softmax(z)[label]` for classes and tags, `(z - y)^2` for
//! numbers. (The head over the vocabulary is the model's own, see [`super::loss::LossAndGradients`].)

use candle_core::{D, DType, Device, Tensor, Var};
use rand::Rng;

use super::batch::{NO_LABEL, Targets};
use super::loss::LossSums;
use super::parameters::{Parameter, Parameters};
use crate::error::{Error, Reason, Result};
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

/// What a head says of states `[n, hidden]`: `[n, outputs]`.
pub fn scores(states: &Tensor, parameters: &Parameters) -> Result<Tensor> {
    let find = |name: &str| {
        parameters.get(name).ok_or_else(|| Error::internal(format!("'{name}' is not trained")))
    };
    let (weight, bias) = (find(HEAD_WEIGHT)?, find(HEAD_BIAS)?);
    Ok(states.matmul(&weight.var.t()?)?.broadcast_add(&bias.var)?)
}

/// The sum of the losses of scores `[n, outputs]`, as a tensor to differentiate and as numbers. `n` is the
/// number of rows for classes and numbers, of positions for tags.
pub fn loss(scores: &Tensor, targets: &Targets) -> Result<(Tensor, LossSums)> {
    let (n, outputs) = scores.dims2()?;
    let wanted = match targets {
        Targets::Classes(labels) | Targets::Tags(labels) => labels,
        Targets::Values(values) if values.len() == n && outputs == 1 => {
            let wanted = Tensor::from_slice(values, (n, 1), scores.device())?;
            let sum = (scores - wanted)?.sqr()?.sum_all()?;
            let loss = f64::from(sum.to_scalar::<f32>()?);
            return Ok((sum, LossSums { loss, count: n as u64, correct: 0 }));
        }
        _ => return Err(Error::internal("these targets have no head")),
    };
    if wanted.len() != n {
        return Err(Error::internal(format!("{n} scores for {} labels", wanted.len())));
    }
    let counted: Vec<usize> = (0..n).filter(|i| wanted[*i] != NO_LABEL).collect();
    if counted.is_empty() {
        return Ok(((scores.sum_all()? * 0.0)?, LossSums::default()));
    }
    let mut labels = Vec::with_capacity(counted.len());
    let mut places = Vec::with_capacity(counted.len());
    for i in counted {
        let label = wanted[i];
        if label as usize >= outputs {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                format!("label {label} is beyond the {outputs} that the head has"),
            ));
        }
        labels.push(label);
        // Rows of a tensor in memory are fewer than 2^32.
        places.push(u32::try_from(i).unwrap_or(u32::MAX));
    }
    let count = labels.len();
    let labels = Tensor::from_vec(labels, (count, 1), scores.device())?;
    let rows = scores.index_select(&Tensor::from_vec(places, count, scores.device())?, 0)?;
    // Shifting by the largest score keeps the exponentials finite and changes nothing.
    let shifted = rows.broadcast_sub(&rows.max_keepdim(D::Minus1)?.detach())?;
    let normaliser = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let sum = (normaliser - shifted.gather(&labels, 1)?)?.sum_all()?;
    let likeliest = rows.argmax_keepdim(D::Minus1)?.eq(&labels)?.to_dtype(DType::U32)?;
    let correct = u64::from(likeliest.sum_all()?.to_scalar::<u32>()?);
    let loss = f64::from(sum.to_scalar::<f32>()?);
    Ok((sum, LossSums { loss, count: count as u64, correct }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    }

    fn tensor(rows: &[[f32; 2]]) -> Tensor {
        Tensor::from_slice(rows.as_flattened(), (rows.len(), 2), &Device::Cpu).unwrap()
    }

    #[test]
    fn classes_are_counted_and_lost_as_by_hand() {
        let scores = tensor(&[[0.0, 0.0], [1.0, -1.0]]);
        let (_, sums) = loss(&scores, &Targets::Classes(vec![1, 0])).unwrap();
        close(sums.loss, 2f64.ln() + (1.0 + (-2f64).exp()).ln());
        // Of equal scores the first is the likeliest.
        assert_eq!((sums.count, sums.correct), (2, 1));
        let huge = tensor(&[[1000.0, 0.0]]);
        close(loss(&huge, &Targets::Classes(vec![1])).unwrap().1.loss, 1000.0);
        assert!(loss(&scores, &Targets::Classes(vec![1, 2])).is_err());
        assert!(loss(&scores, &Targets::Classes(vec![1])).is_err());
    }

    #[test]
    fn only_wanted_tags_count() {
        let scores = tensor(&[[0.0, 0.0], [5.0, 5.0], [1.0, -1.0]]);
        let (_, sums) = loss(&scores, &Targets::Tags(vec![0, NO_LABEL, 1])).unwrap();
        close(sums.loss, 2f64.ln() + (1.0 + 2f64.exp()).ln());
        assert_eq!((sums.count, sums.correct), (2, 1));
        let (_, none) = loss(&scores, &Targets::Tags(vec![NO_LABEL; 3])).unwrap();
        assert_eq!(none, LossSums::default());
    }

    #[test]
    fn numbers_lose_their_squared_error() {
        let scores = Tensor::new(&[[1f32], [3.0]], &Device::Cpu).unwrap();
        let (_, sums) = loss(&scores, &Targets::Values(vec![0.5, 5.0])).unwrap();
        assert_eq!((sums.loss, sums.count), (4.25, 2));
        assert!(loss(&tensor(&[[0.0, 0.0]]), &Targets::Values(vec![0.5])).is_err());
        assert!(loss(&scores, &Targets::Next(vec![0, 0])).is_err());
    }

    /// Gradients of the head against differences of the loss.
    #[test]
    fn gradients_are_those_of_finite_differences() {
        let states = Tensor::new(&[[0.5f32, -1.0, 2.0], [1.5, 0.3, -0.7]], &Device::Cpu).unwrap();
        for (outputs, targets) in
            [(3, Targets::Classes(vec![2, 0])), (1, Targets::Values(vec![0.3, -0.2]))]
        {
            let parameters = head(outputs, 3, 1.0, &Stream::root(5)).unwrap();
            let value = || loss(&scores(&states, &parameters).unwrap(), &targets).unwrap();
            let gradients = value().0.backward().unwrap();
            for (name, parameter) in &parameters {
                let gradient = gradients.get(&parameter.var).unwrap();
                let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
                for (i, gradient) in gradient.iter().enumerate() {
                    let at = |shift: f32| {
                        crate::train::tensors::change(&parameter.var, |v| v[i] += shift).unwrap();
                        value().1.loss
                    };
                    let (up, down) = (at(1e-2), at(-2e-2));
                    at(1e-2);
                    let slope = (up - down) / 2e-2;
                    assert!((slope - f64::from(*gradient)).abs() < 2e-3, "{name} {i}: {slope}");
                }
            }
        }
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
