//! The block types of GGUF files.

use half::f16;

use super::*;
use crate::kernels::ggml::GgmlRows;
use crate::kernels::packed::{Packed, Source};
use crate::kernels::{dot, product};

pub use crate::kernels::ggml::GgmlType;

#[derive(Debug, Clone)]
pub struct Ggml {
    shape: [usize; 2],
    kind: GgmlType,
    data: Bytes,
}

/// Bytes of a row of `cols` elements.
fn row_bytes(cols: usize, kind: GgmlType) -> Result<usize> {
    let block = kind.block_elements();
    if cols == 0 || !cols.is_multiple_of(block) {
        return Err(malformed(format!(
            "{kind:?} blocks hold {block} elements, which does not divide rows of {cols}"
        )));
    }
    Ok(cols / block * kind.block_bytes())
}

impl Ggml {
    /// From the blocks of a file; `data` holds `rows * cols / block` of them.
    pub fn new(shape: [usize; 2], kind: GgmlType, data: Bytes) -> Result<Self> {
        let wanted = byte_size(&[shape[0], row_bytes(shape[1], kind)?], 1)?;
        if data.len() != wanted {
            return Err(malformed(format!(
                "a {kind:?} tensor of shape {shape:?} takes {wanted} bytes but has {}",
                data.len()
            )));
        }
        byte_size(&shape, size_of::<f32>())?;
        Ok(Self { shape, kind, data })
    }

    /// Rounds f32 rows to blocks (Q8_0, Q4_0 and Q4_1) as ggml's reference does. Values that are not
    /// finite, or too large for a scale in f16, are an error.
    pub fn quantize(shape: [usize; 2], kind: GgmlType, values: &[f32]) -> Result<Self> {
        row_bytes(shape[1], kind)?;
        if shape[0].checked_mul(shape[1]) != Some(values.len()) {
            return Err(malformed(format!("{} values do not make {shape:?}", values.len())));
        }
        let block = match kind {
            GgmlType::Q8_0 => quantize_q8_0,
            GgmlType::Q4_0 => quantize_q4_0,
            GgmlType::Q4_1 => quantize_q4_1,
            other => {
                return Err(Error::new(
                    Reason::UnsupportedFormat,
                    format!("{other:?} blocks are read but not made; take Q8_0, Q4_0 or Q4_1"),
                ));
            }
        };
        let mut data = Vec::with_capacity(values.len() / 32 * kind.block_bytes());
        for values in values.chunks_exact(32) {
            block(values, &mut data)?;
        }
        Self::new(shape, kind, data.into())
    }

    pub fn kind(&self) -> GgmlType {
        self.kind
    }

    /// The blocks as in the file.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The same rows in another order: row `r` of the result is row `order[r]` of this one. Panics if
    /// `order` does not name one existing row for each row.
    pub fn permute_rows(&self, order: &[usize]) -> Self {
        assert_eq!(order.len(), self.shape[0]);
        let row = self.data.len() / self.shape[0];
        let mut data = Vec::with_capacity(self.data.len());
        for &from in order {
            data.extend_from_slice(&self.data[from * row..(from + 1) * row]);
        }
        Self { data: data.into(), ..*self }
    }

    fn view(&self) -> GgmlRows<'_> {
        GgmlRows::new(&self.data, self.shape[0], self.shape[1], self.kind)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn bytes(&self) -> u64 {
        self.data.len() as u64
    }

    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        dot::read(&self.view(), first, out);
    }

    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        product::multiply(&self.view(), x, y);
    }

    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        product::multiply_transposed(&self.view(), g, dx);
    }

    /// Packed for products with 8-bit activations, if there is a kernel for the block type.
    pub fn packed(&self) -> Option<Packed> {
        let source = Source::Ggml { kind: self.kind, blocks: &self.data };
        Packed::new(source, self.shape[0], self.shape[1])
    }

    /// One part: `blocks`, bytes by row.
    pub fn parts(&self) -> Vec<Part> {
        vec![Part {
            suffix: "blocks",
            dtype: Dtype::U8,
            shape: vec![self.shape[0], self.data.len() / self.shape[0]],
            data: self.data.clone(),
        }]
    }

    pub fn record(&self) -> Record {
        Record::Ggml { shape: self.shape, r#type: self.kind }
    }

    pub fn from_parts(
        shape: [usize; 2],
        kind: GgmlType,
        parts: &mut BTreeMap<String, Part>,
    ) -> Result<Self> {
        let row = row_bytes(shape[1], kind)?;
        Self::new(shape, kind, take_exact(parts, "blocks", Dtype::U8, &[shape[0], row])?)
    }
}

fn put_f16(value: f32, out: &mut Vec<u8>) -> Result<()> {
    let rounded = f16::from_f32(value);
    if !rounded.is_finite() {
        return Err(Error::new(
            Reason::NonFinite,
            format!("a block's scale or minimum would be {value}, which f16 cannot hold"),
        ));
    }
    out.extend_from_slice(&rounded.to_le_bytes());
    Ok(())
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Puts codes i and i + 16 into one byte.
fn put_nibbles(codes: impl Fn(usize) -> u8, out: &mut Vec<u8>) {
    out.extend((0..16).map(|i| codes(i) | codes(i + 16) << 4));
}

/// Scale and minimum must be finite before they are used; a NaN among values would hide from `max`.
fn finite(values: &[f32]) -> Result<()> {
    match values.iter().find(|v| !v.is_finite()) {
        None => Ok(()),
        Some(v) => Err(Error::new(Reason::NonFinite, format!("a weight to be rounded is {v}"))),
    }
}

fn quantize_q8_0(values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    finite(values)?;
    let d = values.iter().fold(0.0_f32, |m, v| m.max(v.abs())) / 127.0;
    put_f16(d, out)?;
    let id = inverse(d);
    out.extend(values.iter().map(|v| (v * id).round() as i8 as u8));
    Ok(())
}

fn quantize_q4_0(values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    finite(values)?;
    // The first value of largest magnitude, with its sign, takes code 0.
    let max = values.iter().fold(0.0_f32, |m, v| if v.abs() > m.abs() { *v } else { m });
    let d = max / -8.0;
    put_f16(d, out)?;
    let id = inverse(d);
    put_nibbles(|i| ((values[i] * id + 8.5) as u8).min(15), out);
    Ok(())
}

fn quantize_q4_1(values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    finite(values)?;
    let (min, max) =
        values.iter().fold((f32::MAX, f32::MIN), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    let d = (max - min) / 15.0;
    put_f16(d, out)?;
    put_f16(min, out)?;
    let id = inverse(d);
    put_nibbles(|i| (((values[i] - min) * id + 0.5) as u8).min(15), out);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fnv(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    /// Two blocks of pseudo-random thirty-seconds, one of zeros, one of thirds of the first.
    fn values() -> Vec<f32> {
        let mut state = 777_u32;
        let mut x: Vec<f32> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 24) as f32 - 131.0) * 0.03125
        })
        .take(96)
        .collect();
        x[64..].fill(0.0);
        x.extend_from_within(..32);
        x[96..].iter_mut().for_each(|v| *v *= 1.0 / 3.0);
        x
    }

    // Digests (FNV-1a) and first bytes were computed with the `gguf` Python package.
    #[test]
    fn rounding_is_that_of_the_reference_to_the_bit() {
        let expected = [
            (GgmlType::Q8_0, 0x3a30_054a_a368_7e6f, [79, 39, 7, 68, 91, 232, 176, 22]),
            (GgmlType::Q4_0, 0x40aa_179a_4062_8d36, [64, 183, 88, 244, 162, 90, 141, 39]),
            (GgmlType::Q4_1, 0xa7bb_cc26_1afc_7e3e, [51, 55, 64, 194, 167, 11, 93, 165]),
        ];
        for (kind, digest, first) in expected {
            let w = Ggml::quantize([2, 64], kind, &values()).unwrap();
            assert_eq!(w.data()[..8], first, "{kind:?}");
            assert_eq!(fnv(w.data()), digest, "{kind:?}");
        }
    }

    #[test]
    fn rounding_refuses_what_blocks_cannot_hold() {
        let mut x = vec![1.0; 32];
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            x[5] = bad;
            for kind in [GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4_1] {
                assert_eq!(
                    Ggml::quantize([1, 32], kind, &x).unwrap_err().reason(),
                    Reason::NonFinite
                );
            }
        }
        assert!(Ggml::quantize([1, 32], GgmlType::Q4K, &[0.0; 32]).is_err());
        assert!(Ggml::quantize([1, 16], GgmlType::Q4_0, &[0.0; 16]).is_err());
        assert!(Ggml::quantize([2, 32], GgmlType::Q4_0, &[0.0; 32]).is_err());
    }

    #[test]
    fn rows_are_permuted_whole() {
        let x: Vec<f32> = (0..96).map(|i| (i / 32) as f32).collect();
        let w = Ggml::quantize([3, 32], GgmlType::Q8_0, &x).unwrap().permute_rows(&[2, 0, 1]);
        let mut out = [0.0; 96];
        w.read_rows(0, &mut out);
        assert_eq!([out[0], out[32], out[64]].map(f32::round), [2.0, 0.0, 1.0]);
    }

    #[test]
    fn lying_sizes_are_refused() {
        let data = Bytes::from_static(&[0; 36]);
        assert!(Ggml::new([2, 32], GgmlType::Q4_0, data.clone()).is_ok());
        for shape in [[1, 32], [2, 33], [0, 32], [2, 0], [usize::MAX, 32], [2, usize::MAX - 31]] {
            let error = Ggml::new(shape, GgmlType::Q4_0, data.clone()).unwrap_err();
            assert_eq!(error.reason(), Reason::MalformedFile, "{shape:?}");
        }
    }
}
