//! The products of a plan, in the numbers that were asked for.

use std::sync::Arc;

use super::super::Model;
use super::layer::{tensor, vector};
use crate::error::Result;
use crate::kernels::bf16::Bf16Panels;
use crate::kernels::packed::{self, Job, Packed, Source};
use crate::kernels::quantize::{Activations, BLOCK, Grain};
use crate::nn::weight::Weight;

/// The numbers in which an encoder computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Weights as their layout has them, activations f32.
    #[default]
    F32,
    /// Weights and activations rounded to bf16, sums in f32.
    Bf16,
    /// Activations rounded to 8 bits, and so are the rows of weights that have more.
    Int8,
}

enum Matrix {
    Plain(Arc<Weight>),
    Bf16(Bf16Panels),
    Int8(Packed),
}

impl Matrix {
    fn new(weight: &Arc<Weight>, precision: Precision) -> Self {
        let (rows, cols) = (weight.rows(), weight.cols());
        match precision {
            Precision::F32 => Self::Plain(Arc::clone(weight)),
            Precision::Bf16 => {
                Self::Bf16(Bf16Panels::pack(rows, cols, |row, out| weight.read_rows(row, out)))
            }
            Precision::Int8 => match weight.packed().or_else(|| round(weight)) {
                Some(packed) => Self::Int8(packed),
                // Of a width that the kernels do not have.
                None => Self::Plain(Arc::clone(weight)),
            },
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Plain(weight) => weight.bytes(),
            Self::Bf16(panels) => panels.bytes() as u64,
            Self::Int8(packed) => packed.bytes() as u64,
        }
    }
}

/// The weight in 8 bits with a scale a row, the largest magnitude of each row being 127.
fn round(weight: &Weight) -> Option<Packed> {
    let (rows, cols) = (weight.rows(), weight.cols());
    if !cols.is_multiple_of(BLOCK) {
        return None;
    }
    let mut codes = Vec::with_capacity(rows * cols);
    let mut scales = Vec::with_capacity(rows);
    let mut row = vec![0.0; cols];
    for index in 0..rows {
        weight.read_rows(index, &mut row);
        let top = row.iter().fold(0.0_f32, |top, v| top.max(v.abs()));
        // A row of zeros, or of numbers too small to divide by, is one of zeros.
        let inverse = if top > 1e-35 { 127.0 / top } else { 0.0 };
        codes.extend(row.iter().map(|v| (v * inverse).round_ties_even() as i8));
        // What is not finite must show.
        let poison: f32 = row.iter().map(|v| v * 0.0).sum();
        scales.push(top / 127.0 + poison);
    }
    Packed::new(Source::Rows { codes: &codes, scales: &scales }, rows, cols)
}

/// A product and the bias that whatever comes next adds.
pub(super) struct Linear {
    matrix: Matrix,
    pub bias: Vec<f32>,
}

impl Linear {
    pub fn new(model: &Model, name: &str, shape: [usize; 2], precision: Precision) -> Result<Self> {
        Ok(Self {
            matrix: Matrix::new(tensor(model, &format!("{name}.weight"), &shape)?, precision),
            bias: vector(model, &format!("{name}.bias"), shape[0])?,
        })
    }

    /// Bytes of the matrix in memory.
    pub fn bytes(&self) -> u64 {
        self.matrix.bytes()
    }
}

/// `y = x w^T`, without the biases, for linears that share their input `[rows, width]`; `rounded` is
/// scratch.
pub(super) fn products<const N: usize>(
    x: &[f32],
    width: usize,
    rounded: &mut Activations,
    outputs: [(&Linear, &mut [f32]); N],
) {
    let mut jobs = outputs.map(|(linear, y)| match &linear.matrix {
        Matrix::Plain(weight) => {
            weight.multiply(x, y);
            None
        }
        Matrix::Bf16(panels) => {
            panels.multiply(x, y);
            None
        }
        Matrix::Int8(weight) => Some(Job { weight, y }),
    });
    for grain in [Grain::Block, Grain::Token] {
        let mut some = [const { None }; N];
        for (job, some) in jobs.iter_mut().zip(&mut some) {
            *some = job.take_if(|job| job.weight.grain() == grain);
        }
        if some.iter().any(Option::is_some) {
            rounded.set(x, width, grain);
            packed::multiply(rounded, &mut some);
        }
    }
}
