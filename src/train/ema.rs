//! An exponential moving average of the parameters: `e <- d e + (1 - d) p` after every update, from the
//! parameters that training starts with.

use std::collections::BTreeMap;

use candle_core::Tensor;
use rayon::prelude::*;

use super::parameters::Parameters;
use super::tensors::{self, RUN};
use crate::error::{Error, Result};

/// The average.
pub struct Ema {
    pub decay: f64,
    /// By parameter, in its shape.
    pub averages: BTreeMap<String, Tensor>,
}

impl Ema {
    /// An average that begins with `parameters`.
    pub fn new(decay: f64, parameters: &Parameters) -> Result<Self> {
        let copy = |(name, parameter): (&String, &super::parameters::Parameter)| {
            Ok((name.clone(), parameter.var.as_tensor().copy()?.detach()))
        };
        Ok(Self { decay, averages: parameters.iter().map(copy).collect::<Result<_>>()? })
    }

    /// Takes the parameters of an update in.
    pub fn update(&mut self, parameters: &Parameters) -> Result<()> {
        let (keep, take) = (self.decay as f32, (1.0 - self.decay) as f32);
        for (name, parameter) in parameters {
            let average = self.averages.get(name).ok_or_else(|| unknown(name))?;
            tensors::read(&parameter.var, |new| {
                tensors::change(average, |average| {
                    let runs = average.par_chunks_mut(RUN).zip(new.par_chunks(RUN));
                    runs.for_each(|(average, new)| {
                        average.iter_mut().zip(new).for_each(|(a, p)| *a = keep * *a + take * p);
                    });
                })
            })??;
        }
        Ok(())
    }

    /// Exchanges the average and the parameters; twice changes nothing.
    pub fn swap(&mut self, parameters: &Parameters) -> Result<()> {
        for (name, parameter) in parameters {
            let average = self.averages.get(name).ok_or_else(|| unknown(name))?;
            tensors::change(average, |average| {
                tensors::change(&parameter.var, |values| average.swap_with_slice(values))
            })??;
        }
        Ok(())
    }
}

fn unknown(name: &str) -> Error {
    Error::internal(format!("the average lacks '{name}'"))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::parameters::Parameter;
    use super::*;

    #[test]
    fn the_average_follows_and_swaps() {
        let var = Var::from_tensor(&Tensor::new(&[8f32], &Device::Cpu).unwrap()).unwrap();
        let parameter = Parameter { var: var.clone(), rate: 1.0, decay: true };
        let parameters = Parameters::from([("a".to_owned(), parameter)]);
        let mut ema = Ema::new(0.75, &parameters).unwrap();
        let now = |t: &Tensor| t.to_vec1::<f32>().unwrap()[0];
        // 0.75 * 8 + 0.25 * 4, then 0.75 * 7 + 0.25 * 4.
        tensors::change(&var, |v| v[0] = 4.0).unwrap();
        ema.update(&parameters).unwrap();
        assert_eq!((now(&ema.averages["a"]), now(&var)), (7.0, 4.0));
        ema.update(&parameters).unwrap();
        assert_eq!(now(&ema.averages["a"]), 6.25);
        ema.swap(&parameters).unwrap();
        assert_eq!((now(&ema.averages["a"]), now(&var)), (4.0, 6.25));
        ema.swap(&parameters).unwrap();
        assert_eq!((now(&ema.averages["a"]), now(&var)), (6.25, 4.0));
    }
}
