//! Weight layouts: how a tensor is stored, and how to multiply by it without changing that.
//!
//! Every layout knows its shape and its bytes, gives back dense rows, multiplies, and takes itself
//! apart into plain tensors ([`Part`]s) for saving. A weight is written and read back as it is;
//! nothing is densified on the way. One file per layout.

mod bits;
mod dense;
mod dual_grained;
mod factored;
mod ggml;
mod graph;
mod grouped;
mod nf4;
mod row_groups;
mod sparse;
mod sum;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Reason, Result};
use crate::kernels::packed::Packed;
use crate::nn::dtype::Dtype;

pub use dense::Dense;
pub use dual_grained::DualGrained;
pub use factored::Factored;
pub use ggml::{Ggml, GgmlType};
pub use graph::product;
pub use grouped::{Grouped, GroupedSpec};
pub use nf4::Nf4;
pub use row_groups::{RowGroupValues, RowGroups};
pub use sparse::{Sparse, SparsePattern, ValueFormat};
pub use sum::Sum;

/// A named tensor of a model in one of the layouts. Matrices are `[out, in]`: `y = W x`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// f32, f16 or bf16 elements in row order; the only layout of tensors that are not matrices.
    Dense(Dense),
    /// 2, 3, 4 or 8 bit codes with a scale (and a zero point) for each group of inputs of a row.
    Grouped(Grouped),
    /// 4-bit codes in groups inside rows that are those of an 8-bit matrix.
    DualGrained(DualGrained),
    /// The block types of GGUF files, byte for byte as they came.
    Ggml(Ggml),
    /// Non-zero elements and where they stand.
    Sparse(Sparse),
    /// Groups of consecutive rows that share the list of their kept columns.
    RowGroups(RowGroups),
    /// A product of two narrow matrices.
    Factored(Factored),
    /// A weight in another layout and a low-rank correction.
    Sum(Sum),
    /// 4-bit normal floats.
    Nf4(Nf4),
}

/// One plain tensor of a stored weight. The tensor's name in the file is the weight's name, followed
/// by `.suffix` where the suffix is not empty.
#[derive(Debug, Clone)]
pub struct Part {
    pub suffix: &'static str,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Little-endian elements in row order.
    pub data: Bytes,
}

/// What `planish.json` says of a weight: all that its parts do not say themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "layout", rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    Dense {
        shape: Vec<usize>,
    },
    Grouped {
        shape: [usize; 2],
        #[serde(flatten)]
        spec: GroupedSpec,
    },
    DualGrained {
        shape: [usize; 2],
        group: usize,
        /// Whether the step of 8-bit activations is stored with the weight.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        static_activations: bool,
    },
    Ggml {
        shape: [usize; 2],
        r#type: GgmlType,
    },
    Sparse {
        shape: [usize; 2],
        pattern: SparsePattern,
        values: ValueFormat,
    },
    RowGroups {
        shape: [usize; 2],
        group: u32,
        values: RowGroupValues,
    },
    Factored {
        shape: [usize; 2],
        rank: usize,
    },
    Sum {
        base: Box<Record>,
        rank: usize,
    },
    Nf4 {
        shape: [usize; 2],
    },
}

impl Record {
    /// Whether the weights are stored in fewer than 16 bits.
    pub fn few_bits(&self) -> bool {
        match self {
            Self::Grouped { .. }
            | Self::DualGrained { .. }
            | Self::Ggml { .. }
            | Self::Nf4 { .. }
            | Self::Sparse { values: ValueFormat::Grouped(_), .. }
            | Self::RowGroups { values: RowGroupValues::Int8, .. } => true,
            Self::Sum { base, .. } => base.few_bits(),
            _ => false,
        }
    }

    /// Logical shape; `[out, in]` for matrices.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Dense { shape } => shape,
            Self::Grouped { shape, .. }
            | Self::DualGrained { shape, .. }
            | Self::Ggml { shape, .. }
            | Self::Sparse { shape, .. }
            | Self::RowGroups { shape, .. }
            | Self::Factored { shape, .. }
            | Self::Nf4 { shape } => shape,
            Self::Sum { base, .. } => base.shape(),
        }
    }
}

macro_rules! each {
    ($self:ident, $w:ident => $e:expr) => {
        match $self {
            Weight::Dense($w) => $e,
            Weight::Grouped($w) => $e,
            Weight::DualGrained($w) => $e,
            Weight::Ggml($w) => $e,
            Weight::Sparse($w) => $e,
            Weight::RowGroups($w) => $e,
            Weight::Factored($w) => $e,
            Weight::Sum($w) => $e,
            Weight::Nf4($w) => $e,
        }
    };
}

impl Weight {
    /// Logical shape; `[out, in]` for matrices.
    pub fn shape(&self) -> &[usize] {
        each!(self, w => w.shape())
    }

    /// Outputs of a matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        let shape = self.shape();
        shape[..shape.len().saturating_sub(1)].iter().product()
    }

    /// Inputs of a matrix; the length of a vector.
    pub fn cols(&self) -> usize {
        self.shape().last().copied().unwrap_or(1)
    }

    /// Bytes of the stored parts, on disk and in memory.
    pub fn bytes(&self) -> u64 {
        each!(self, w => w.bytes())
    }

    /// Number of elements that are exactly zero.
    pub fn zeros(&self) -> u64 {
        let mut row = vec![0.0; self.cols()];
        (0..self.rows())
            .map(|r| {
                self.read_rows(r, &mut row);
                row.iter().filter(|v| **v == 0.0).count() as u64
            })
            .sum()
    }

    /// Writes the dense rows from `first` on into `out` (`out.len()` is a multiple of `cols`).
    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        debug_assert!(out.len().is_multiple_of(self.cols()));
        each!(self, w => w.read_rows(first, out));
    }

    /// All elements as f32 in row order.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows() * self.cols()];
        self.read_rows(0, &mut out);
        out
    }

    /// `y[t, o] = sum_i x[t, i] w[o, i]`: `x` is `[tokens, in]`, `y` is `[tokens, out]`, overwritten.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        debug_assert_eq!(x.len() / self.cols(), y.len() / self.rows());
        each!(self, w => w.multiply(x, y));
    }

    /// `dx[t, i] = sum_o g[t, o] w[o, i]`: the gradient of [`Weight::multiply`]'s input, overwritten.
    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        debug_assert_eq!(g.len() / self.rows(), dx.len() / self.cols());
        each!(self, w => w.multiply_transposed(g, dx));
    }

    /// The same numbers packed for products with 8-bit activations; `None` where the layout has no such
    /// kernel.
    pub fn packed(&self) -> Option<Packed> {
        match self {
            Self::Ggml(weight) => weight.packed(),
            Self::Grouped(weight) => weight.packed(),
            Self::DualGrained(weight) => weight.packed(),
            Self::Sparse(weight) => weight.packed(),
            Self::Dense(_)
            | Self::RowGroups(_)
            | Self::Factored(_)
            | Self::Sum(_)
            | Self::Nf4(_) => None,
        }
    }

    /// The same numbers in another layout whose products are faster, not equal to the bit: a bitmap for lists of
    /// places. `None` where there is none.
    pub fn faster(&self) -> Option<Self> {
        match self {
            Self::Sparse(weight) => weight.with_bitmap().map(Self::Sparse),
            _ => None,
        }
    }

    /// The plain tensors the weight is stored as.
    pub fn parts(&self) -> Vec<Part> {
        each!(self, w => w.parts())
    }

    /// What is stored beside the parts.
    pub fn record(&self) -> Record {
        each!(self, w => w.record())
    }

    /// Puts a weight together from its record and parts (keyed by suffix), checking every size.
    pub fn from_parts(record: &Record, mut parts: BTreeMap<String, Part>) -> Result<Self> {
        let weight = match record {
            Record::Dense { shape } => Self::Dense(Dense::from_parts(shape, &mut parts)?),
            Record::Grouped { shape, spec } => {
                Self::Grouped(Grouped::from_parts(*shape, *spec, &mut parts)?)
            }
            Record::DualGrained { shape, group, static_activations } => Self::DualGrained(
                DualGrained::from_parts(*shape, *group, *static_activations, &mut parts)?,
            ),
            Record::Ggml { shape, r#type } => {
                Self::Ggml(Ggml::from_parts(*shape, *r#type, &mut parts)?)
            }
            Record::Sparse { shape, pattern, values } => {
                Self::Sparse(Sparse::from_parts(*shape, *pattern, *values, &mut parts)?)
            }
            Record::RowGroups { shape, group, values } => {
                Self::RowGroups(RowGroups::from_parts(*shape, *group, *values, &mut parts)?)
            }
            Record::Factored { shape, rank } => {
                Self::Factored(Factored::from_parts(*shape, *rank, &mut parts)?)
            }
            Record::Sum { base, rank } => Self::Sum(Sum::from_parts(base, *rank, &mut parts)?),
            Record::Nf4 { shape } => Self::Nf4(Nf4::from_parts(*shape, &mut parts)?),
        };
        match parts.keys().next() {
            None => Ok(weight),
            Some(extra) => Err(Error::new(
                Reason::MalformedFile,
                format!("unexpected part '{extra}'; the layout record and the tensors disagree"),
            )),
        }
    }
}

fn malformed(message: impl Into<String>) -> Error {
    Error::new(Reason::MalformedFile, message)
}

/// Takes the part called `suffix`.
fn take(parts: &mut BTreeMap<String, Part>, suffix: &str) -> Result<Part> {
    parts.remove(suffix).ok_or_else(|| {
        let name = if suffix.is_empty() { "the tensor itself" } else { suffix };
        malformed(format!("part '{name}' is missing; the layout record and the tensors disagree"))
    })
}

/// Takes the data of part `suffix`, whose type and shape must be these.
fn take_exact(
    parts: &mut BTreeMap<String, Part>,
    suffix: &str,
    dtype: Dtype,
    shape: &[usize],
) -> Result<Bytes> {
    let part = take(parts, suffix)?;
    if part.dtype != dtype || part.shape != shape {
        return Err(malformed(format!(
            "part '{suffix}' is {} {:?} but the layout record asks for {dtype} {shape:?}",
            part.dtype, part.shape
        )));
    }
    let wanted = byte_size(shape, dtype.size())?;
    if part.data.len() != wanted {
        return Err(malformed(format!(
            "part '{suffix}' has {} bytes but its shape {shape:?} takes {wanted}",
            part.data.len()
        )));
    }
    Ok(part.data)
}

/// Bytes of a tensor without empty dimensions, checked against overflow.
fn byte_size(shape: &[usize], element: usize) -> Result<usize> {
    let size = shape.iter().try_fold(element, |n, &dim| n.checked_mul(dim));
    match size {
        Some(0) => Err(malformed(format!("shape {shape:?} has an empty dimension"))),
        Some(size) if size <= isize::MAX as usize && !shape.contains(&0) => Ok(size),
        _ => Err(malformed(format!("shape {shape:?} is absurd"))),
    }
}
