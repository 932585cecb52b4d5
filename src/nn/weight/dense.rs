//! f32, f16 and bf16 elements in row order.

use super::*;

#[derive(Debug, Clone)]
pub struct Dense {
    shape: Vec<usize>,
    dtype: Dtype,
    data: Bytes,
}

impl Dense {
    /// From stored elements; sizes are checked.
    pub fn new(shape: Vec<usize>, dtype: Dtype, data: Bytes) -> Result<Self> {
        let _ = (&shape, dtype, &data);
        todo!()
    }
    /// f32 elements rounded to `dtype` (F32, F16 or BF16). F16 overflow is an error.
    pub fn from_f32(shape: Vec<usize>, values: &[f32], dtype: Dtype) -> Result<Self> {
        let _ = (shape, values, dtype);
        todo!()
    }
    pub fn dtype(&self) -> Dtype {
        self.dtype
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
        Record::Dense { shape: self.shape.clone() }
    }
    pub fn from_parts(_shape: &[usize], _parts: &mut BTreeMap<String, Part>) -> Result<Self> {
        todo!()
    }
}
