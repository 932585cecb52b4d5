//! The block types of GGUF files.

use super::*;

/// Block types that are read; the discriminants are the numbers in GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GgmlType {
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2K = 10,
    Q3K = 11,
    Q4K = 12,
    Q5K = 13,
    Q6K = 14,
}

impl GgmlType {
    /// The type with this number in a GGUF file.
    pub fn from_number(_n: u32) -> Option<Self> {
        todo!()
    }
    /// Elements of a block.
    pub const fn block_elements(self) -> usize {
        32
    }
    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        18
    }
}

#[derive(Debug, Clone)]
pub struct Ggml {
    shape: [usize; 2],
    kind: GgmlType,
    data: Bytes,
}

impl Ggml {
    pub fn new(shape: [usize; 2], kind: GgmlType, data: Bytes) -> Result<Self> {
        let _ = (shape, kind, &data);
        todo!()
    }
    /// Rounds f32 rows to blocks (Q8_0, Q4_0 and Q4_1).
    pub fn quantize(shape: [usize; 2], kind: GgmlType, values: &[f32]) -> Result<Self> {
        let _ = (shape, kind, values);
        todo!()
    }
    pub fn kind(&self) -> GgmlType {
        self.kind
    }
    /// The blocks as in the file.
    pub fn data(&self) -> &Bytes {
        &self.data
    }
    /// The same rows in another order: row `r` of the result is row `order[r]` of this one.
    pub fn permute_rows(&self, _order: &[usize]) -> Self {
        todo!()
    }
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    pub fn bytes(&self) -> u64 {
        self.data.len() as u64
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
        Record::Ggml { shape: self.shape, r#type: self.kind }
    }
    pub fn from_parts(
        _shape: [usize; 2],
        _kind: GgmlType,
        _parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        todo!()
    }
}
