//! The products of a plan: as the layout has them, or packed and with 8-bit activations.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::block::each_row;
use super::{tensor, vector};
use crate::error::Result;
use crate::kernels::norm;
use crate::kernels::packed::{self, Job, Packed};
use crate::kernels::quantize::{Activations, Grain};
use crate::nn::weight::{Factored, Weight};

/// The numbers in which products run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// Activations stay f32: what evaluation and calibration use.
    #[default]
    Exact,
    /// Activations are rounded to 8 bits wherever the layout of a weight has a kernel in integers: what
    /// serves. The weights are the same numbers.
    Integer,
}

/// A matrix, ready to multiply.
#[derive(Clone)]
pub(super) enum Matrix {
    Plain(Arc<Weight>),
    Packed(Arc<Packed>),
    /// The packed base of a sum, and the sum, whose correction is added in f32.
    Corrected(Arc<Packed>, Arc<Factored>),
}

impl Matrix {
    pub fn new(weight: &Arc<Weight>, arithmetic: Arithmetic) -> Self {
        if arithmetic == Arithmetic::Exact {
            return Self::Plain(Arc::clone(weight));
        }
        if let Weight::Sum(sum) = &**weight
            && let Some(base) = sum.base().packed()
        {
            return Self::Corrected(Arc::new(base), Arc::new(sum.correction().clone()));
        }
        match weight.packed() {
            Some(packed) => Self::Packed(Arc::new(packed)),
            None => Self::Plain(weight.faster().map_or_else(|| Arc::clone(weight), Arc::new)),
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Plain(weight) => weight.bytes(),
            Self::Packed(packed) => packed.bytes() as u64,
            Self::Corrected(packed, correction) => packed.bytes() as u64 + correction.bytes(),
        }
    }

    /// What shares a scale among the activations, where they are rounded by their own size.
    fn grain(&self) -> Option<Grain> {
        match self {
            Self::Plain(_) => None,
            Self::Packed(packed) | Self::Corrected(packed, _) => {
                packed.activations().is_none().then(|| packed.grain())
            }
        }
    }

    /// Writes a row as f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Plain(weight) => weight.read_rows(row, out),
            Self::Packed(packed) => packed.read_row(row, out),
            Self::Corrected(packed, correction) => {
                packed.read_row(row, out);
                correction.add_rows(row, out);
            }
        }
    }
}

/// A product with its bias.
pub(super) struct Linear {
    matrix: Matrix,
    bias: Option<Vec<f32>>,
}

impl Linear {
    pub fn new(
        weights: &BTreeMap<String, Arc<Weight>>,
        name: &str,
        shape: [usize; 2],
        biased: bool,
        arithmetic: Arithmetic,
    ) -> Result<Self> {
        let weight = tensor(weights, &format!("{name}.weight"), &shape)?;
        let bias = match biased {
            true => Some(vector(weights, &format!("{name}.bias"), shape[0])?),
            false => None,
        };
        Ok(Self { matrix: Matrix::new(weight, arithmetic), bias })
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        self.matrix.bytes() + self.bias.as_ref().map_or(0, |bias| size_of_val(&bias[..]) as u64)
    }

    fn add_bias(&self, y: &mut [f32]) {
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(bias.len()).for_each(|row| norm::add(row, bias));
        }
    }
}

/// `y = x w^T + bias` for up to four linears that share their input, `[tokens, width]`; `rounded` is
/// scratch.
pub(super) fn run<const N: usize>(
    x: &[f32],
    width: usize,
    rounded: &mut Activations,
    mut outputs: [(&Linear, &mut [f32]); N],
) {
    let products = outputs.each_mut().map(|(linear, y)| (&linear.matrix, &mut **y));
    multiply(x, width, rounded, products);
    for (linear, y) in outputs {
        linear.add_bias(y);
    }
}

/// [`run`] over rows of `x` that are made now, each rounded while it is near, where a matrix asks for that: `make`
/// gets the index of a row, its row of `a` (`[tokens, widths[0]]`) and the row of `x` (`[tokens, widths[1]]`).
pub(super) fn run_made<const N: usize>(
    [a, x]: [&mut [f32]; 2],
    widths: [usize; 2],
    rounded: &mut Activations,
    mut outputs: [(&Linear, &mut [f32]); N],
    make: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    let ready = outputs.iter().find_map(|(linear, _)| linear.matrix.grain());
    match ready {
        Some(grain) => rounded.set_made([a, &mut *x], widths, grain, make),
        None => each_row(a, widths[0], x, widths[1], make),
    }
    let products = outputs.each_mut().map(|(linear, y)| (&linear.matrix, &mut **y));
    multiply_rounded(x, widths[1], rounded, ready, products);
    for (linear, y) in outputs {
        linear.add_bias(y);
    }
}

/// `y = x w^T` for up to four matrices that share their input, `[tokens, width]`; `rounded` is scratch.
pub(super) fn multiply<const N: usize>(
    x: &[f32],
    width: usize,
    rounded: &mut Activations,
    products: [(&Matrix, &mut [f32]); N],
) {
    multiply_rounded(x, width, rounded, None, products);
}

/// [`multiply`] where `x` may be rounded already, with scales of `ready`.
fn multiply_rounded<const N: usize>(
    x: &[f32],
    width: usize,
    rounded: &mut Activations,
    ready: Option<Grain>,
    products: [(&Matrix, &mut [f32]); N],
) {
    let (mut products, mut ready) = (products, ready);
    let mut jobs = products.each_mut().map(|(matrix, y)| match matrix {
        Matrix::Plain(weight) => {
            weight.multiply(x, y);
            None
        }
        Matrix::Packed(packed) | Matrix::Corrected(packed, _) => Some(Job { weight: packed, y }),
    });
    // Layouts differ in what shares a scale among the activations, and whether it is fixed.
    while let Some(weight) = jobs.iter().flatten().map(|job| job.weight).next() {
        let (grain, step) = (weight.grain(), weight.activations());
        let mut some = [const { None }; N];
        for (job, some) in jobs.iter_mut().zip(&mut some) {
            let alike =
                |job: &mut Job<'_>| job.weight.grain() == grain && job.weight.activations() == step;
            *some = job.take_if(alike);
        }
        match step {
            Some(step) => {
                ready = None;
                rounded.set_fixed(x, width, step);
            }
            None if ready.take() == Some(grain) => {}
            None => rounded.set(x, width, grain),
        }
        packed::multiply(rounded, &mut some);
    }
    for (matrix, y) in products {
        if let Matrix::Corrected(_, correction) = matrix {
            ROOM.with_borrow_mut(|room| correction.add_product(x, y, room));
        }
    }
}

thread_local! {
    /// What corrections take, kept between steps.
    static ROOM: RefCell<Vec<f32>> = RefCell::default();
}
