//! Codes of 2, 3, 4 or 8 bits with a scale and a zero point for each group of inputs of a row.

use super::*;

/// The grid: `weight = (code - zero) * scale`, codes in `0 .. 2^bits`. A symmetric grid has the fixed
/// zero `2^(bits-1)` and stores none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupedSpec {
    pub bits: u8,
    pub group: usize,
    pub symmetric: bool,
}

impl GroupedSpec {
    /// Checks bits (2, 3, 4, 8) and that the group divides `cols`; the error suggests divisors.
    pub fn check(&self, _cols: usize) -> Result<()> {
        todo!()
    }
    /// Scale and zero of the grid that spans `values` (one group of a row) and contains 0. The scale is
    /// rounded to f16, the way it is stored.
    pub fn fit(&self, _values: &[f32]) -> (f32, u8) {
        todo!()
    }
    /// Nearest code of `value`.
    pub fn code(&self, _value: f32, _scale: f32, _zero: u8) -> u8 {
        todo!()
    }
    /// Bytes of the parts of a `[rows, cols]` weight.
    pub fn bytes(&self, _rows: usize, _cols: usize) -> u64 {
        todo!()
    }
}

#[derive(Debug, Clone)]
pub struct Grouped {
    shape: [usize; 2],
    spec: GroupedSpec,
    codes: Bytes,
    scales: Bytes,
    zeros: Bytes,
}

impl Grouped {
    /// Packs codes `[rows, cols]`, scales and zeros `[rows, cols / group]` (zeros ignored if symmetric).
    pub fn pack(
        shape: [usize; 2],
        spec: GroupedSpec,
        codes: &[u8],
        scales: &[f32],
        zeros: &[u8],
    ) -> Result<Self> {
        let _ = (shape, spec, codes, scales, zeros);
        todo!()
    }
    pub fn spec(&self) -> GroupedSpec {
        self.spec
    }
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    pub fn bytes(&self) -> u64 {
        (self.codes.len() + self.scales.len() + self.zeros.len()) as u64
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
        Record::Grouped { shape: self.shape, spec: self.spec }
    }
    pub fn from_parts(
        _shape: [usize; 2],
        _spec: GroupedSpec,
        _parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        todo!()
    }
}
