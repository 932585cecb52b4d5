//! Gradients of an update: summed over its batches, made those of the mean, checked, clipped.

use super::parameters::{Gradients, Parameters};
use super::tensors;
use crate::error::{Error, Result};

/// Adds the gradients of another batch.
pub fn add(sum: &mut Gradients, other: Gradients) -> Result<()> {
    for (name, gradient) in other {
        let total = match sum.remove(&name) {
            Some(known) => known.add(&gradient)?,
            None => gradient,
        };
        sum.insert(name, total);
    }
    Ok(())
}

/// Multiplies all by `factor`, into memory of their own.
pub fn scale(gradients: &mut Gradients, factor: f64) -> Result<()> {
    for gradient in gradients.values_mut() {
        *gradient = gradient.affine(factor, 0.0)?;
    }
    Ok(())
}

/// Refuses gradients of tensors that are not trained or have another shape.
pub fn check(gradients: &Gradients, parameters: &Parameters) -> Result<()> {
    for (name, gradient) in gradients {
        let Some(parameter) = parameters.get(name) else {
            return Err(Error::internal(format!("a gradient of '{name}', which is not trained")));
        };
        if parameter.var.shape() != gradient.shape() {
            return Err(Error::internal(format!(
                "the gradient of '{name}' has the shape {:?}, not {:?}",
                gradient.shape(),
                parameter.var.shape()
            )));
        }
    }
    Ok(())
}

/// The norm of all gradients together, `sqrt(sum of squares)`; the name of the first tensor with a value
/// that is not finite where there is one.
pub fn norm(gradients: &Gradients) -> Result<Result<f64, String>> {
    let mut sum = 0.0;
    for (name, gradient) in gradients {
        // Squares of finite f32 numbers are finite in f64, and stay so over any number that fits into memory.
        let squares = tensors::read(gradient, tensors::sum_of_squares)?;
        if !squares.is_finite() {
            return Ok(Err(name.clone()));
        }
        sum += squares;
    }
    Ok(Ok(sum.sqrt()))
}

/// Scales gradients whose norm is `norm` to the norm `most` where it is larger.
pub fn clip(gradients: &mut Gradients, norm: f64, most: f64) -> Result<()> {
    if norm > most { scale(gradients, most / norm) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::super::parameters::Parameter;
    use super::*;

    fn gradients(values: &[(&str, &[f32])]) -> Gradients {
        let tensor = |v: &[f32]| Tensor::new(v, &Device::Cpu).unwrap();
        values.iter().map(|(name, v)| ((*name).to_owned(), tensor(v))).collect()
    }

    fn values(gradients: &Gradients, name: &str) -> Vec<f32> {
        gradients[name].to_vec1().unwrap()
    }

    #[test]
    fn sums_keep_what_only_one_batch_has() {
        let mut sum = gradients(&[("a", &[1.0, 2.0])]);
        add(&mut sum, gradients(&[("a", &[10.0, 20.0]), ("b", &[5.0])])).unwrap();
        scale(&mut sum, 0.5).unwrap();
        assert_eq!(values(&sum, "a"), [5.5, 11.0]);
        assert_eq!(values(&sum, "b"), [2.5]);
    }

    #[test]
    fn clipping_is_exact_and_over_all_tensors() {
        // 2, 3, 6: the norm is 7.
        let mut clipped = gradients(&[("a", &[2.0, 3.0]), ("b", &[6.0])]);
        let before = norm(&clipped).unwrap().unwrap();
        assert_eq!(before, 7.0);
        clip(&mut clipped, before, 7.0).unwrap();
        assert_eq!(values(&clipped, "a"), [2.0, 3.0]);
        clip(&mut clipped, before, 3.5).unwrap();
        assert_eq!((values(&clipped, "a"), values(&clipped, "b")), (vec![1.0, 1.5], vec![3.0]));
        assert_eq!(norm(&clipped).unwrap().unwrap(), 3.5);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let bad = gradients(&[("a", &[1.0]), ("b", &[f32::NAN]), ("c", &[f32::INFINITY])]);
        assert_eq!(norm(&bad).unwrap(), Err("b".to_owned()));
        let large = gradients(&[("a", &[f32::MAX; 4])]);
        assert!(norm(&large).unwrap().unwrap().is_finite());
    }

    #[test]
    fn gradients_belong_to_parameters() {
        let var = Var::from_tensor(&Tensor::new(&[0f32, 0.0], &Device::Cpu).unwrap()).unwrap();
        let parameter = Parameter { var, rate: 1.0, decay: true };
        let parameters = Parameters::from([("a".to_owned(), parameter)]);
        check(&gradients(&[("a", &[1.0, 1.0])]), &parameters).unwrap();
        assert!(check(&gradients(&[("a", &[1.0])]), &parameters).is_err());
        assert!(check(&gradients(&[("b", &[1.0])]), &parameters).is_err());
    }
}
