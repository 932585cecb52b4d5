//! A factor that is a combination of random matrices which a seed gives (NOLA): the matrices are made anew
//! in the forward and in the backward pass, element by element, and never kept.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, Var};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::kernels::philox::{self, Family};
use crate::nn::tuning::Dropout;

/// Which random numbers a matrix takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Use {
    /// The matrix that A starts from.
    Start = 0,
    A = 1,
    B = 2,
    Dropout = 3,
}

/// The key of a name below a seed.
pub fn key(name: &str) -> [u32; 2] {
    let digest = Sha256::digest(name.as_bytes());
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| digest[at + i]));
    [word(0), word(4)]
}

/// What a factor is combined from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Basis {
    pub key: [u32; 2],
    /// Of the factor.
    pub rows: usize,
    pub cols: usize,
    /// Random matrices.
    pub count: usize,
    /// The factor is A: it starts from a fixed random matrix, uniform in plus and minus this; B starts
    /// from zero.
    pub start: Option<f32>,
}

impl Basis {
    /// Basis of an `A` `[rank, inputs]`.
    pub fn a(key: [u32; 2], rank: usize, inputs: usize, count: usize) -> Self {
        Self { key, rows: rank, cols: inputs, count, start: Some(1.0 / (inputs as f32).sqrt()) }
    }

    /// Basis of a `B` `[outputs, rank]`.
    pub fn b(key: [u32; 2], outputs: usize, rank: usize, count: usize) -> Self {
        Self { key, rows: outputs, cols: rank, count, start: None }
    }

    fn family(&self) -> Family {
        let family = if self.start.is_some() { Use::A } else { Use::B };
        Family { key: self.key, family: family as u32 }
    }

    /// Entries are uniform in plus and minus this.
    fn width(&self) -> f32 {
        1.0 / (self.count as f32).sqrt()
    }

    /// The factor for `coefficients`, `[rows, cols]` in row order; the same bits on every machine and for
    /// every number of threads.
    pub fn combine(&self, coefficients: &[f32]) -> Vec<f32> {
        let width = self.width();
        let scaled: Vec<f32> = coefficients.iter().map(|c| c * width).collect();
        let mut out = vec![0.0; self.rows * self.cols];
        philox::combine(self.family(), &scaled, &mut out);
        if let Some(bound) = self.start {
            let mut start = vec![0.0; out.len()];
            let family = Family { key: self.key, family: Use::Start as u32 };
            philox::combine(family, &[bound], &mut start);
            out.iter_mut().zip(start).for_each(|(o, s)| *o += s);
        }
        out
    }

    /// Inner products of a gradient `[rows, cols]` with the random matrices.
    pub fn project(&self, gradient: &[f32]) -> Vec<f32> {
        let width = self.width();
        let products = philox::project(self.family(), self.count, gradient);
        products.into_iter().map(|p| p * width).collect()
    }
}

/// Coefficients as they are stored in few bits: `low + step * code`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rounded {
    pub bits: u32,
    pub low: f32,
    pub step: f32,
    pub codes: Vec<u8>,
}

/// A combined factor whose coefficients are trained.
#[derive(Debug)]
pub struct Combined {
    pub basis: Basis,
    pub coefficients: Var,
    /// The coefficients that the factor was last made for, and what was made: a step asks for it once
    /// for each pass through its linear.
    made: Mutex<Option<(Vec<f32>, Tensor)>>,
    /// Bits, low and step of coefficients that were rounded.
    grid: Mutex<Option<(u32, f32, f32)>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Combined {
    pub fn new(basis: Basis, coefficients: Var) -> Self {
        Self { basis, coefficients, made: Mutex::new(None), grid: Mutex::new(None) }
    }

    /// Says that the coefficients are on a grid, which files may then use.
    pub fn note_grid(&self, bits: u32, low: f32, step: f32) {
        *locked(&self.grid) = Some((bits, low, step));
    }

    /// The coefficients as codes, where they are still on the grid they were rounded to.
    pub fn rounded(&self) -> Result<Option<Rounded>> {
        let Some((bits, low, step)) = *locked(&self.grid) else { return Ok(None) };
        let values = self.coefficients.to_vec1::<f32>()?;
        let code = |v: &f32| if step > 0.0 { ((v - low) / step).round() as u8 } else { 0 };
        let codes: Vec<u8> = values.iter().map(code).collect();
        let on = codes.iter().zip(&values).all(|(c, v)| low + step * f32::from(*c) == *v);
        Ok(on.then_some(Rounded { bits, low, step, codes }))
    }

    /// The factor, differentiable in its coefficients.
    pub fn tensor(&self) -> Result<Tensor> {
        let now = self.coefficients.to_vec1::<f32>()?;
        let mut made = locked(&self.made);
        if let Some((then, tensor)) = made.as_ref() {
            // Bits, not values: -0 and 0 combine alike, but NaN must not be made for ever.
            if then.iter().zip(&now).all(|(a, b)| a.to_bits() == b.to_bits()) {
                return Ok(tensor.clone());
            }
        }
        let op = Combine { basis: self.basis };
        let tensor = self.coefficients.as_tensor().apply_op1(op)?;
        *made = Some((now, tensor.clone()));
        Ok(tensor)
    }
}

struct Combine {
    basis: Basis,
}

/// A slice of contiguous f32 storage.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("a tensor is not contiguous"),
    }
}

impl CustomOp1 for Combine {
    fn name(&self) -> &'static str {
        "combine-basis"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = self.basis.combine(slice(storage, layout)?);
        Ok((CpuStorage::F32(out), (self.basis.rows, self.basis.cols).into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let grad = grad.flatten_all()?.to_vec1::<f32>()?;
        let products = self.basis.project(&grad);
        Ok(Some(Tensor::from_vec(products, self.basis.count, &candle_core::Device::Cpu)?))
    }
}

/// Multiplies by 0 or `1 / (1 - probability)`, by numbers that follow from the seed and an element's place.
pub fn dropout(x: &Tensor, Dropout { probability, seed }: Dropout) -> Result<Tensor> {
    let mut numbers = vec![0.0; x.elem_count()];
    // The sum over one matrix with the coefficient 1 is that matrix.
    let family = Family { key: [seed as u32, (seed >> 32) as u32], family: Use::Dropout as u32 };
    philox::combine(family, &[1.0], &mut numbers);
    // Uniform in [-1, 1): below 2 p - 1 with probability p.
    let (keep, limit) = (1.0 / (1.0 - probability), 2.0 * probability - 1.0);
    numbers.iter_mut().for_each(|v| *v = if *v < limit { 0.0 } else { keep });
    Ok((x * Tensor::from_vec(numbers, x.shape(), x.device())?)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn gradients_are_those_of_a_kept_basis_and_of_differences() {
        let basis = Basis::a(key("7/q"), 3, 10, 4);
        let kept: Vec<Vec<f32>> = (0..4)
            .map(|i| {
                let mut c = [0.0; 4];
                c[i] = 1.0;
                let zero = basis.combine(&[0.0; 4]);
                basis.combine(&c).iter().zip(zero).map(|(a, b)| a - b).collect()
            })
            .collect();
        let c = Var::from_slice(&[0.1f32, -0.2, 0.3, 0.4], 4, &Device::Cpu).unwrap();
        let combined = Combined::new(basis, c.clone());
        let loss = |c: &Combined| c.tensor().unwrap().sqr().unwrap().sum_all().unwrap();
        let got = loss(&combined).backward().unwrap();
        let got = got.get(&c).unwrap().to_vec1::<f32>().unwrap();
        let value = combined.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for i in 0..4 {
            let dense: f32 = value.iter().zip(&kept[i]).map(|(v, k)| 2.0 * v * k).sum();
            assert!((got[i] - dense).abs() < 1e-5, "{} is not {dense}", got[i]);
            let moved = |by: f32| {
                let mut values = c.to_vec1::<f32>().unwrap();
                values[i] += by;
                basis.combine(&values).iter().map(|v| f64::from(v * v)).sum::<f64>()
            };
            let difference = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((f64::from(got[i]) - difference).abs() < 1e-3);
        }
    }

    #[test]
    fn a_factor_follows_its_coefficients() {
        let c = Var::zeros(5, candle_core::DType::F32, &Device::Cpu).unwrap();
        let combined = Combined::new(Basis::b(key("x"), 4, 2, 5), c.clone());
        let values =
            |c: &Combined| c.tensor().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values(&combined).iter().all(|v| *v == 0.0));
        c.set(&Tensor::ones(5, candle_core::DType::F32, &Device::Cpu).unwrap()).unwrap();
        assert!(values(&combined).iter().any(|v| *v != 0.0));
        assert_eq!(values(&combined), combined.basis.combine(&[1.0; 5]));
        assert_ne!(key("x"), key("y"));
    }

    #[test]
    fn dropped_shares_and_repeatability() {
        let x = Tensor::ones((100, 40), candle_core::DType::F32, &Device::Cpu).unwrap();
        let run = |pass: u64| {
            let y = dropout(&x, Dropout { probability: 0.25, seed: pass << 32 }).unwrap();
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let first = run(1);
        assert_eq!(first, run(1));
        assert_ne!(first, run(2));
        let zeros = first.iter().filter(|v| **v == 0.0).count();
        assert!((800..1200).contains(&zeros), "{zeros} of 4000");
        assert!(first.iter().all(|v| *v == 0.0 || *v == 4.0 / 3.0));
    }

    /// Uniform in plus and minus `1 / sqrt(count)`, and the start of A in plus and minus `1 / sqrt(inputs)`.
    #[test]
    fn entries_have_the_widths_of_the_card() {
        let check = |values: &[f32], bound: f32, what: &str| {
            assert!(values.iter().all(|v| v.abs() <= bound * 1.0001), "{what}");
            let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
            let share = 3.0 * square / (bound * bound);
            assert!((share - 1.0).abs() < 0.15, "{what}: {share}");
        };
        let less =
            |a: Vec<f32>, b: &[f32]| -> Vec<f32> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
        let a = Basis::a(key("7/q"), 30, 40, 4);
        let start = a.combine(&[0.0; 4]);
        check(&start, 1.0 / 40_f32.sqrt(), "the start of A");
        let second = less(a.combine(&[0.0, 1.0, 0.0, 0.0]), &start);
        check(&second, 0.5, "a matrix of A");
        let b = Basis::b(key("7/q"), 40, 30, 9);
        assert!(b.combine(&[0.0; 9]).iter().all(|v| *v == 0.0), "B starts from nothing");
        let mut c = [0.0; 9];
        c[8] = 1.0;
        let last = b.combine(&c);
        check(&last, 1.0 / 3.0, "a matrix of B");
        // The matrices of A and of B are not the same numbers.
        let scaled = |values: &[f32], by: f32| values.iter().map(|v| v * by).collect::<Vec<_>>();
        let first_of_b = b.combine(&[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let first_of_a = less(a.combine(&[1.0, 0.0, 0.0, 0.0]), &start);
        let (one, other) = (scaled(&first_of_a, 2.0), scaled(&first_of_b, 3.0));
        assert!(one.iter().zip(other).any(|(a, b)| (a - b).abs() > 0.1));
    }
}
