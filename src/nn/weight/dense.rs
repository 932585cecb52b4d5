//! f32, f16 and bf16 elements in row order.

use half::{bf16, f16};

use super::*;
use crate::kernels::dot::{self, DenseKind, DenseRows};
use crate::kernels::{cast, few, gemm, product};

/// More tokens than this go through the dense product, fewer through inner products with the rows as they are stored.
const FEW: usize = 8;

#[derive(Debug, Clone)]
pub struct Dense {
    shape: Vec<usize>,
    kind: DenseKind,
    data: Bytes,
}

impl Dense {
    /// From stored elements, F32, F16 or BF16. Sizes are checked; f32 elements that are not aligned in
    /// memory are copied once.
    pub fn new(shape: Vec<usize>, dtype: Dtype, data: Bytes) -> Result<Self> {
        let kind = match dtype {
            Dtype::F32 => DenseKind::F32,
            Dtype::F16 => DenseKind::F16,
            Dtype::BF16 => DenseKind::BF16,
            other => {
                return Err(Error::new(
                    Reason::UnsupportedFormat,
                    format!("a dense weight cannot be {other}; convert it to F32, F16 or BF16"),
                ));
            }
        };
        let wanted = byte_size(&shape, dtype.size())?;
        if data.len() != wanted {
            return Err(malformed(format!(
                "a {dtype} tensor of shape {shape:?} takes {wanted} bytes but has {}",
                data.len()
            )));
        }
        let data = match kind {
            DenseKind::F32 if cast::f32s(&data).is_none() => cast::to_bytes(
                data.chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
            ),
            _ => data,
        };
        Ok(Self { shape, kind, data })
    }

    /// f32 elements rounded to `dtype` (F32, F16 or BF16). F16 overflow is an error.
    pub fn from_f32(shape: Vec<usize>, values: &[f32], dtype: Dtype) -> Result<Self> {
        Self::new(shape, dtype, encode(values, dtype)?)
    }

    pub fn dtype(&self) -> Dtype {
        match self.kind {
            DenseKind::F32 => Dtype::F32,
            DenseKind::F16 => Dtype::F16,
            DenseKind::BF16 => Dtype::BF16,
        }
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn bytes(&self) -> u64 {
        self.data.len() as u64
    }

    /// The elements themselves, if they are f32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match self.kind {
            DenseKind::F32 => cast::f32s(&self.data),
            _ => None,
        }
    }

    fn view(&self) -> DenseRows<'_> {
        let cols = self.shape.last().copied().unwrap_or(1);
        let rows = self.shape[..self.shape.len().saturating_sub(1)].iter().product();
        DenseRows::new(&self.data, rows, cols, self.kind)
    }

    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        dot::read(&self.view(), first, out);
    }

    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        let cols = self.shape.last().copied().unwrap_or(1);
        match self.as_f32() {
            _ if x.len() <= FEW * cols => few::multiply(&self.view(), x, y),
            Some(w) => gemm::multiply(x, w, y, cols),
            None => product::multiply(&self.view(), x, y),
        }
    }

    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        let cols = self.shape.last().copied().unwrap_or(1);
        match self.as_f32() {
            Some(w) => gemm::multiply_transposed(g, w, dx, w.len() / cols),
            None => product::multiply_transposed(&self.view(), g, dx),
        }
    }

    /// One part without a suffix.
    pub fn parts(&self) -> Vec<Part> {
        vec![Part {
            suffix: "",
            dtype: self.dtype(),
            shape: self.shape.clone(),
            data: self.data.clone(),
        }]
    }

    pub fn record(&self) -> Record {
        Record::Dense { shape: self.shape.clone() }
    }

    pub fn from_parts(shape: &[usize], parts: &mut BTreeMap<String, Part>) -> Result<Self> {
        let part = take(parts, "")?;
        if part.shape != shape {
            return Err(malformed(format!(
                "the tensor has shape {:?} but its record says {shape:?}",
                part.shape
            )));
        }
        Self::new(part.shape, part.dtype, part.data)
    }
}

/// f32 elements as little-endian F32, F16 or BF16; an error if one overflows F16.
pub(super) fn encode(values: &[f32], dtype: Dtype) -> Result<Bytes> {
    match dtype {
        Dtype::F32 => Ok(cast::to_bytes(values.to_vec())),
        Dtype::F16 => {
            let mut out = Vec::with_capacity(values.len() * 2);
            for &value in values {
                let rounded = f16::from_f32(value);
                if rounded.is_infinite() && value.is_finite() {
                    return Err(Error::new(
                        Reason::NonFinite,
                        format!("{value} is too large for F16; store the tensor as BF16 or F32"),
                    ));
                }
                out.extend_from_slice(&rounded.to_le_bytes());
            }
            Ok(out.into())
        }
        Dtype::BF16 => Ok(values
            .iter()
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect::<Vec<_>>()
            .into()),
        other => Err(Error::new(
            Reason::UnsupportedFormat,
            format!("elements cannot be rounded to {other}; take F32, F16 or BF16"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rounded_to_the_type() {
        let values = [1.0, -0.1, 65504.0, 3.0];
        let f16 = Dense::from_f32(vec![2, 2], &values, Dtype::F16).unwrap();
        let mut out = [0.0; 4];
        f16.read_rows(0, &mut out);
        assert_eq!(out, [1.0, -0.099_975_586, 65504.0, 3.0]);
        let bf16 = Dense::from_f32(vec![2, 2], &values, Dtype::BF16).unwrap();
        bf16.read_rows(1, &mut out[..2]);
        assert_eq!(out[..2], [65536.0, 3.0]);
        let error = Dense::from_f32(vec![1], &[65520.0], Dtype::F16).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
    }

    #[test]
    fn misaligned_elements_are_copied() {
        let mut bytes = vec![0];
        bytes.extend([1.5_f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
        let dense = Dense::new(vec![2], Dtype::F32, Bytes::from(bytes).slice(1..)).unwrap();
        assert_eq!(dense.as_f32(), Some(&[1.5, -2.0][..]));
    }

    #[test]
    fn lying_sizes_are_refused() {
        let data = Bytes::from_static(&[0; 8]);
        for shape in [vec![3], vec![usize::MAX, 2], vec![0], vec![2, 0], vec![usize::MAX, 0]] {
            let error = Dense::new(shape, Dtype::F32, data.clone()).unwrap_err();
            assert_eq!(error.reason(), Reason::MalformedFile);
        }
        assert!(Dense::new(vec![1], Dtype::I64, data).is_err());
    }
}
