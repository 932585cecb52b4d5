//! The products of a plan, in the numbers that were asked for.

use std::sync::Arc;

use half::f16;

use super::super::Model;
use super::layer::{tensor, vector};
use crate::error::Result;
use crate::kernels::bf16::{Bf16Panels, Rounded};
use crate::kernels::f32_panels::F32Panels;
use crate::kernels::packed::{self, Job, Packed, Source};
use crate::kernels::quantize::{Activations, BLOCK, Grain};
use crate::nn::weight::Weight;

/// The numbers in which an encoder computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Weights as their layout has them (dense ones packed as f32), activations f32.
    #[default]
    F32,
    /// Weights and activations rounded to bf16, sums in f32.
    Bf16,
    /// Activations rounded to 8 bits, and so are weights that have more.
    Int8,
}

enum Matrix {
    /// In a layout of its own.
    Plain(Arc<Weight>),
    F32(F32Panels),
    Bf16(Bf16Panels),
    Int8(Packed),
}

impl Matrix {
    fn new(weight: &Arc<Weight>, precision: Precision, grain: Grain) -> Self {
        let (rows, cols) = (weight.rows(), weight.cols());
        let read = |row: usize, out: &mut [f32]| weight.read_rows(row, out);
        match (precision, &**weight) {
            (Precision::F32, Weight::Dense(_)) => Self::F32(F32Panels::pack(rows, cols, read)),
            (Precision::F32, _) => Self::Plain(Arc::clone(weight)),
            (Precision::Bf16, _) => Self::Bf16(Bf16Panels::pack(rows, cols, read)),
            (Precision::Int8, _) => match weight.packed().or_else(|| round(weight, grain)) {
                Some(packed) => Self::Int8(packed),
                // Of a width that the kernels do not have.
                None => Self::Plain(Arc::clone(weight)),
            },
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Plain(weight) => weight.bytes(),
            Self::F32(panels) => panels.bytes() as u64,
            Self::Bf16(panels) => panels.bytes() as u64,
            Self::Int8(packed) => packed.bytes() as u64,
        }
    }
}

/// The weight in 8 bits, the largest magnitude of what shares a scale being 127. `None` for widths that are
/// not whole blocks, and for weights beyond the range of the scales.
fn round(weight: &Weight, grain: Grain) -> Option<Packed> {
    let (rows, cols) = (weight.rows(), weight.cols());
    if !cols.is_multiple_of(BLOCK) {
        return None;
    }
    let each = match grain {
        Grain::Block => BLOCK,
        Grain::Token => cols,
    };
    let mut codes = Vec::with_capacity(rows * cols);
    let mut scales = Vec::with_capacity(rows * (cols / each));
    let mut row = vec![0.0; cols];
    for index in 0..rows {
        weight.read_rows(index, &mut row);
        for group in row.chunks_exact(each) {
            let top = group.iter().fold(0.0_f32, |top, v| top.max(v.abs()));
            // What is not finite must show.
            let poison: f32 = group.iter().map(|v| v * 0.0).sum();
            let scale = match grain {
                Grain::Block => f16::from_f32(top / 127.0).to_f32(),
                Grain::Token => top / 127.0,
            };
            if scale.is_infinite() && top.is_finite() {
                return None;
            }
            // A group of zeros, or of numbers too small to divide by, is one of zeros.
            let inverse = if scale > 1e-37 { 1.0 / scale } else { 0.0 };
            let code = |v: &f32| (v * inverse).clamp(-127.0, 127.0).round_ties_even() as i8;
            codes.extend(group.iter().map(code));
            scales.push(scale + poison);
        }
    }
    match grain {
        Grain::Token => Packed::new(Source::Rows { codes: &codes, scales: &scales }, rows, cols),
        Grain::Block => {
            let codes: Vec<u8> = codes.into_iter().map(|code| code as u8 ^ 0x80).collect();
            let scales: Vec<u8> =
                scales.into_iter().flat_map(|s| f16::from_f32(s).to_le_bytes()).collect();
            let (codes, scales) = (&codes[..], &scales[..]);
            let source = Source::Grouped { bits: 8, group: BLOCK, codes, scales, zeros: None };
            Packed::new(source, rows, cols)
        }
    }
}

/// The input of products in fewer bits, rounded once for all that share it.
#[derive(Default)]
pub(super) struct Inputs {
    int8: Activations,
    bf16: Rounded,
}

/// A product and the bias that whatever comes next adds.
pub(super) struct Linear {
    matrix: Matrix,
    pub bias: Vec<f32>,
}

impl Linear {
    /// `grain` is what shares a scale where the weight is rounded to 8 bits, and so do its inputs.
    pub fn new(
        model: &Model,
        name: &str,
        shape: [usize; 2],
        precision: Precision,
        grain: Grain,
    ) -> Result<Self> {
        let weight = tensor(model, &format!("{name}.weight"), &shape)?;
        Ok(Self {
            matrix: Matrix::new(weight, precision, grain),
            bias: vector(model, &format!("{name}.bias"), shape[0])?,
        })
    }

    /// Bytes of the matrix in memory.
    pub fn bytes(&self) -> u64 {
        self.matrix.bytes()
    }
}

/// `y = x w^T`, without the biases, for linears that share their input `[rows, width]`; `inputs` is
/// scratch.
pub(super) fn products<const N: usize>(
    x: &[f32],
    width: usize,
    inputs: &mut Inputs,
    outputs: [(&Linear, &mut [f32]); N],
) {
    if outputs.iter().any(|(linear, _)| matches!(linear.matrix, Matrix::Bf16(_))) {
        inputs.bf16.set(x, width);
    }
    let mut jobs = outputs.map(|(linear, y)| match &linear.matrix {
        Matrix::Plain(weight) => {
            weight.multiply(x, y);
            None
        }
        Matrix::F32(panels) => {
            panels.multiply(x, y);
            None
        }
        Matrix::Bf16(panels) => {
            panels.multiply(&inputs.bf16, y);
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
            inputs.int8.set(x, width, grain);
            packed::multiply(&inputs.int8, &mut some);
        }
    }
}
