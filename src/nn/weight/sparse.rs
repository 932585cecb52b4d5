//! Non-zero elements and where they stand: n:m index lists or a bitmap, whichever is smaller.

use super::*;

/// How positions are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SparsePattern {
    /// One bit an element.
    Bitmap,
    /// `keep` elements of each `of` consecutive inputs of a row, with their places.
    NOfM { keep: u8, of: u8 },
}

/// How the non-zero elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ValueFormat {
    F32,
    F16,
    BF16,
    /// Grid codes, with scales and zeros by group of the row's original columns.
    Grouped(GroupedSpec),
}

#[derive(Debug, Clone)]
pub struct Sparse {
    shape: [usize; 2],
    pattern: SparsePattern,
    values: ValueFormat,
}

impl Sparse {
    /// Stores the non-zero elements of dense rows in F32, F16 or BF16. `n_of_m` is a hint: where every
    /// group of `m` has at most `m - n` non-zeros and the index list is smaller than the bitmap, it is
    /// taken (n counts zeros, as in recipes). Rounding to F16 that overflows is an error.
    pub fn from_dense(
        shape: [usize; 2],
        dense: &[f32],
        values: ValueFormat,
        n_of_m: Option<(u8, u8)>,
    ) -> Result<Self> {
        let _ = (shape, dense, values, n_of_m);
        todo!()
    }
    /// Stores grid codes of the elements where `mask` is true; scales and zeros as in [`Grouped::pack`].
    pub fn from_codes(
        shape: [usize; 2],
        mask: &[bool],
        spec: GroupedSpec,
        codes: &[u8],
        scales: &[f32],
        zeros: &[u8],
        n_of_m: Option<(u8, u8)>,
    ) -> Result<Self> {
        let _ = (shape, mask, spec, codes, scales, zeros, n_of_m);
        todo!()
    }
    pub fn pattern(&self) -> SparsePattern {
        self.pattern
    }
    pub fn values(&self) -> ValueFormat {
        self.values
    }
    /// True where an element is kept, `[rows, cols]`.
    pub fn mask(&self) -> Vec<bool> {
        todo!()
    }
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    pub fn bytes(&self) -> u64 {
        todo!()
    }
    pub fn read_rows(&self, _first: usize, _out: &mut [f32]) {
        todo!()
    }
    pub fn multiply(&self, _x: &[f32], _y: &mut [f32]) {
        todo!()
    }
    pub fn multiply_transposed(&self, _g: &[f32], _dx: &mut [f32]) {
        todo!()
    }
    pub fn parts(&self) -> Vec<Part> {
        todo!()
    }
    pub fn record(&self) -> Record {
        Record::Sparse { shape: self.shape, pattern: self.pattern, values: self.values }
    }
    pub fn from_parts(
        _shape: [usize; 2],
        _pattern: SparsePattern,
        _values: ValueFormat,
        _parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        todo!()
    }
}
