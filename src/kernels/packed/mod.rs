//! Matrices packed for products with 8-bit activations.
//!
//! Sixteen rows make a *panel*: their codes stand side by side, four columns of each row at a time, so
//! that one instruction multiplies four columns of all sixteen rows, and a scale is one vector. Codes
//! keep their width (2 to 8 bits); nothing is rounded again, so a packed matrix stands for the same
//! numbers as the layout it was made from, in about the same bytes.
//!
//! Products are exact in integers within a group of columns that share a scale; groups are added in f32
//! in one order. Every instruction set gives the same bits.

#[cfg(target_arch = "x86_64")]
mod amx;
mod kept;
mod pack;
mod panels;
mod product;
mod scales;
#[cfg(test)]
mod tests;
mod tile;
mod whole;

pub use product::{Job, multiply};

use self::panels::{LANES, Panels};
use super::ggml::GgmlType;
use super::quantize::{BLOCK, Grain};
use super::sparse::SparseRows;

/// Where the codes and scales of a matrix come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// Blocks of a GGUF file, row by row.
    Ggml { kind: GgmlType, blocks: &'a [u8] },
    /// Groups as in [`super::grouped`].
    Grouped {
        bits: u8,
        group: usize,
        codes: &'a [u8],
        /// f16, `[rows, cols / group]`
        scales: &'a [u8],
        zeros: Option<&'a [u8]>,
    },
    /// Signed bytes `[rows, cols]` and a scale a row.
    Rows { codes: &'a [i8], scales: &'a [f32] },
    /// 4-bit codes in groups inside 8-bit rows (DGQ, arXiv 2310.04836): a weight is
    /// `(code - zero) * factor * scale`, and `(code - zero) * factor` fits into a signed byte.
    DualGrained {
        group: usize,
        /// Blocks of 32 columns as in [`super::dual_grained`].
        codes: &'a [u8],
        /// `[rows, cols / group]` each.
        factors: &'a [u8],
        zeros: &'a [u8],
        /// `[rows]`
        scales: &'a [f32],
    },
}

/// What a code of a panel stands for; decides the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A scale (f16) for 32 columns; the zero point is the same everywhere.
    Block { zero: u8 },
    /// A scale and a minimum (f16) for 32 columns.
    BlockMin,
    /// A scale and a minimum (f16) for 256 columns, and 6-bit factors of both for 32.
    Super,
    /// A scale (f16) for 256 columns and a signed factor for 16.
    SuperSigned,
    /// A scale (f16) for a group of columns.
    Group { blocks: usize, zero: u8 },
    /// A scale (f16) and a zero point (a byte) for a group of columns.
    GroupZero { blocks: usize },
    /// A scale (f32) for a row.
    Row,
    /// A scale (f32) for a row, a factor and a zero point (bytes) for a group of columns.
    Dual { blocks: usize },
}

impl Kind {
    /// What must share a scale among the activations.
    fn grain(self) -> Grain {
        match self {
            Self::Row | Self::Dual { .. } => Grain::Token,
            _ => Grain::Block,
        }
    }
}

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub struct Packed {
    rows: usize,
    cols: usize,
    bits: u8,
    kind: Kind,
    codes: Codes,
    scales: Panels,
    /// The step of activations, where it is fixed.
    activations: Option<f32>,
}

/// How the codes of a matrix are stored.
#[derive(Debug)]
enum Codes {
    All(Panels),
    /// Those of a sparse matrix, with a bit for each element.
    Kept(kept::Panels),
}

impl Codes {
    fn bytes(&self) -> usize {
        match self {
            Self::All(panels) => panels.bytes(),
            Self::Kept(panels) => panels.bytes(),
        }
    }

    /// Start of a panel; readable for the rest of the allocation and a line more.
    fn start(&self, panel: usize) -> *const u8 {
        match self {
            Self::All(panels) => panels.start(panel),
            Self::Kept(panels) => panels.start(panel),
        }
    }
}

impl Packed {
    /// Packs a matrix; `None` if its layout has no kernel here (then it runs from its own layout). Panics
    /// if the parts of the source do not have the sizes that their layout asks for.
    pub fn new(source: Source<'_>, rows: usize, cols: usize) -> Option<Self> {
        pack::pack(source, rows, cols)
    }

    /// Packs the codes of a sparse matrix; `None` if its values are no codes or their groups no whole blocks.
    pub fn sparse(rows: &SparseRows<'_>) -> Option<Self> {
        pack::sparse(rows)
    }

    /// The same matrix for activations that are rounded to multiples of one step, where there is one.
    #[must_use]
    pub fn with_activations(self, step: Option<f32>) -> Self {
        Self { activations: step, ..self }
    }

    /// The step that activations are to be rounded to; none: as they ask for.
    pub fn activations(&self) -> Option<f32> {
        self.activations
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How activations are to be rounded for products with this matrix.
    pub fn grain(&self) -> Grain {
        self.kind.grain()
    }

    /// Bytes in memory, rows that fill up the last panel included.
    pub fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.bytes()
    }

    /// Writes row `row` as f32 (`cols` elements).
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "no such row");
        let element = |column: usize, code: u8| {
            let (code, (scale, offset)) = (f32::from(code), self.scale(row, column));
            match self.kind {
                // The order of operations of the layouts that these came from.
                Kind::BlockMin => code * scale + offset,
                Kind::Super => code * scale - offset,
                _ => (code - offset) * scale,
            }
        };
        match &self.codes {
            Codes::All(panels) => {
                let each = panels::block_bytes(self.bits);
                let blocks = panels.panel(row / LANES).chunks_exact(each);
                for (b, (block, out)) in blocks.zip(out.chunks_exact_mut(BLOCK)).enumerate() {
                    for (i, out) in out.iter_mut().enumerate() {
                        let code = panels::get(block, self.bits, row % LANES, i);
                        *out = element(b * BLOCK + i, code);
                    }
                }
            }
            Codes::Kept(panels) => {
                out.fill(0.0);
                panels.row(row, self.bits, |column, code| out[column] = element(column, code));
            }
        }
    }

    fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }
}
