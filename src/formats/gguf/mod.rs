//! GGUF files, versions 2 and 3: little-endian metadata, tensor descriptions, aligned tensors.

mod metadata;
mod read;
mod write;

pub use metadata::{Array, Metadata, Value, missing};
pub use read::{File, Tensor, is_gguf, open};
pub use write::{Plan, Sink, write};

use crate::nn::weight::GgmlType;

/// The first four bytes of a file.
const MAGIC: [u8; 4] = *b"GGUF";

/// Alignment of tensors where the metadata does not say otherwise.
const ALIGNMENT: u64 = 32;

/// Metadata key of the alignment.
const ALIGNMENT_KEY: &str = "general.alignment";

/// Numbers of the value types.
mod kind {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;
}

/// Element or block type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    F32,
    F16,
    BF16,
    Blocks(GgmlType),
}

impl TensorType {
    /// The type with this number in a file.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::F32),
            1 => Some(Self::F16),
            30 => Some(Self::BF16),
            n => GgmlType::from_number(n).map(Self::Blocks),
        }
    }

    /// The number in a file.
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::BF16 => 30,
            Self::Blocks(kind) => kind as u32,
        }
    }

    /// Elements and bytes of the smallest unit.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Blocks(kind) => (kind.block_elements(), kind.block_bytes()),
        }
    }

    /// Bytes of a tensor of `shape` (row order), if its rows are whole blocks.
    pub fn bytes(self, shape: &[usize]) -> Option<usize> {
        let (elements, bytes) = self.block();
        let (cols, rows) = shape.split_last()?;
        if !cols.is_multiple_of(elements) {
            return None;
        }
        rows.iter().try_fold((cols / elements).checked_mul(bytes)?, |n, &d| n.checked_mul(d))
    }
}

/// What other programs call the types that are not read here.
fn foreign_type(number: u32) -> String {
    let name = match number {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("number {number}"),
    };
    name.to_owned()
}
