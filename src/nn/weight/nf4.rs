//! 4-bit normal floats with double quantisation (Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, section 3):
//! blocks of 64 elements, each a level times the largest absolute value of its block; the sizes of blocks are
//! kept as 8-bit numbers of steps above their mean, 256 to a step. 4.127 bits an element.
//!
//! Decided here: sizes are spaced evenly (the published program takes a table of its own for them), and codes
//! are chosen for the sizes as they are kept, which costs nothing and errs less.

use super::*;
use crate::kernels::nf4::{BLOCK, LEVELS, Nf4Rows, SHARED, size_of_block};
use crate::kernels::{dot, product};

/// The code of zero.
const ZERO: u8 = 7;

#[derive(Debug, Clone)]
pub struct Nf4 {
    shape: [usize; 2],
    codes: Bytes,
    sizes: Bytes,
    steps: Bytes,
    mean: f32,
}

/// The nearest level of a number in -1 to 1; the lower one of two.
fn code(value: f32) -> u8 {
    let above = LEVELS.windows(2).filter(|pair| value > f32::midpoint(pair[0], pair[1])).count();
    above as u8
}

impl Nf4 {
    /// Rounds `[rows, cols]` values.
    ///
    /// # Errors
    /// `NON_FINITE` for values that are not finite, `INTERNAL` for another number of values.
    pub fn round(shape: [usize; 2], values: &[f32]) -> Result<Self> {
        byte_size(&shape, size_of::<f32>())?;
        if values.len() != shape[0] * shape[1] {
            return Err(Error::internal(format!("{} values for shape {shape:?}", values.len())));
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::new(Reason::NonFinite, "values that are not finite have no codes"));
        }
        let sizes: Vec<f32> = values
            .chunks(BLOCK)
            .map(|block| block.iter().fold(0.0_f32, |most, v| most.max(v.abs())))
            .collect();
        let sum: f64 = sizes.iter().map(|v| f64::from(*v)).sum();
        let mean = (sum / sizes.len() as f64) as f32;
        let (mut stored, mut steps) = (Vec::with_capacity(sizes.len()), Vec::new());
        let mut kept = Vec::with_capacity(sizes.len());
        for shared in sizes.chunks(SHARED) {
            let far = shared.iter().fold(0.0_f32, |most, v| most.max((v - mean).abs()));
            let step = far / 127.0;
            steps.extend(step.to_le_bytes());
            for size in shared {
                // A cast saturates, and a step of 0 gives 0.
                let above = if step > 0.0 { ((size - mean) / step).round_ties_even() } else { 0.0 };
                let above = above.clamp(-127.0, 127.0);
                stored.push(above as i8 as u8);
                kept.push(size_of_block(above, step, mean));
            }
        }
        let mut codes = vec![0; values.len().div_ceil(2)];
        for (i, value) in values.iter().enumerate() {
            let size = kept[i / BLOCK];
            let code = if size > 0.0 { code(value / size) } else { ZERO };
            codes[i / 2] |= code << (4 * (i % 2));
        }
        Ok(Self { shape, codes: codes.into(), sizes: stored.into(), steps: steps.into(), mean })
    }

    /// Bytes of a `[rows, cols]` weight.
    pub fn expected([rows, cols]: [usize; 2]) -> u64 {
        let elements = rows as u64 * cols as u64;
        let blocks = elements.div_ceil(BLOCK as u64);
        elements.div_ceil(2) + blocks + 4 * blocks.div_ceil(SHARED as u64) + 4
    }

    fn view(&self) -> Nf4Rows<'_> {
        Nf4Rows::new((&self.codes, &self.sizes, &self.steps), self.mean, self.shape)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn bytes(&self) -> u64 {
        (self.codes.len() + self.sizes.len() + self.steps.len() + size_of::<f32>()) as u64
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

    /// `codes` (U8, two a byte in row order, the first in the low half), `sizes` (I8, one a
    /// block), `steps` (F32, one for 256 blocks), `mean` (one F32).
    pub fn parts(&self) -> Vec<Part> {
        let part = |suffix, dtype: Dtype, data: &Bytes| Part {
            suffix,
            dtype,
            shape: vec![data.len() / dtype.size()],
            data: data.clone(),
        };
        vec![
            part("codes", Dtype::U8, &self.codes),
            part("sizes", Dtype::I8, &self.sizes),
            part("steps", Dtype::F32, &self.steps),
            part("mean", Dtype::F32, &Bytes::copy_from_slice(&self.mean.to_le_bytes())),
        ]
    }

    pub fn record(&self) -> Record {
        Record::Nf4 { shape: self.shape }
    }

    pub fn from_parts(shape: [usize; 2], parts: &mut BTreeMap<String, Part>) -> Result<Self> {
        byte_size(&shape, size_of::<f32>())?;
        let elements = shape[0] * shape[1];
        let blocks = elements.div_ceil(BLOCK);
        let codes = take_exact(parts, "codes", Dtype::U8, &[elements.div_ceil(2)])?;
        let sizes = take_exact(parts, "sizes", Dtype::I8, &[blocks])?;
        let steps = take_exact(parts, "steps", Dtype::F32, &[blocks.div_ceil(SHARED)])?;
        let mean = take_exact(parts, "mean", Dtype::F32, &[1])?;
        let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let mean = number(&mean);
        // The largest size that a step can give.
        let fits =
            |step: f32| (step * 128.0).is_finite() && (step * 128.0 + mean.abs()).is_finite();
        if !mean.is_finite() || !steps.chunks_exact(4).map(number).all(fits) {
            return Err(malformed("parts 'steps' and 'mean' give sizes that are not finite"));
        }
        Ok(Self { shape, codes, sizes, steps, mean })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sixteen_levels_come_back_exactly() {
        for size in [1.0_f32, 0.037, 12.5] {
            let values: Vec<f32> = (0..128).map(|i| LEVELS[(i * 7 + i / 16) % 16] * size).collect();
            let weight = Nf4::round([2, 64], &values).unwrap();
            let mut out = vec![0.0; 128];
            weight.read_rows(0, &mut out);
            assert_eq!(out, values);
        }
        for (i, level) in LEVELS.iter().enumerate() {
            assert_eq!(usize::from(code(*level)), i);
        }
        assert_eq!(LEVELS[usize::from(ZERO)], 0.0);
    }

    #[test]
    fn an_element_takes_a_little_over_four_bits() {
        let weight = Nf4::round([512, 1024], &vec![0.5; 512 * 1024]).unwrap();
        assert_eq!(weight.bytes(), Nf4::expected([512, 1024]));
        let bits = weight.bytes() as f64 * 8.0 / (512.0 * 1024.0);
        assert!((bits - 4.127).abs() < 1e-3, "{bits}");
        for shape in [[1, 1], [3, 5], [7, 65], [257, 64]] {
            let weight = Nf4::round(shape, &vec![1.0; shape[0] * shape[1]]).unwrap();
            assert_eq!(weight.bytes(), Nf4::expected(shape), "{shape:?}");
        }
    }

    #[test]
    fn rounding_errs_by_half_of_the_widest_gap_and_the_step_of_sizes() {
        let values: Vec<f32> = (0..640 * 64)
            .map(|i| ((i * 7919 % 9973) as f32 / 4986.5 - 1.0) * (1.0 + (i / 64 % 5) as f32))
            .collect();
        let weight = Nf4::round([640, 64], &values).unwrap();
        let mut out = vec![0.0; values.len()];
        weight.read_rows(0, &mut out);
        for (block, out) in values.chunks(64).zip(out.chunks(64)) {
            let most = block.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
            for (a, b) in block.iter().zip(out) {
                // The widest gap is that of the two lowest levels; sizes err by half of 4 / 127 at most.
                assert!((a - b).abs() <= 0.152 * (most + 0.02) + 0.02, "{a} came back as {b}");
            }
        }
        let zeros = Nf4::round([2, 64], &[0.0; 128]).unwrap();
        let mut out = vec![1.0; 128];
        zeros.read_rows(0, &mut out);
        assert_eq!(out, [0.0; 128]);
    }

    #[test]
    fn rows_that_are_no_whole_blocks_are_read_element_by_element() {
        let values: Vec<f32> = (0..3 * 37).map(|i| (i as f32 * 0.37).sin()).collect();
        let weight = Nf4::round([3, 37], &values).unwrap();
        let mut out = vec![0.0; 37];
        weight.read_rows(2, &mut out);
        for (a, b) in out.iter().zip(&values[74..]) {
            assert!((a - b).abs() < 0.18, "{a} is not near {b}");
        }
    }

    #[test]
    fn broken_values_and_parts_are_refused() {
        assert!(Nf4::round([1, 2], &[1.0, f32::NAN]).is_err());
        assert!(Nf4::round([1, 2], &[1.0]).is_err());
        assert!(Nf4::round([0, 2], &[]).is_err());
        let weight = Nf4::round([3, 64], &[0.25; 192]).unwrap();
        let parts = || -> BTreeMap<String, Part> {
            weight.parts().into_iter().map(|p| (p.suffix.to_owned(), p)).collect()
        };
        assert!(Nf4::from_parts([3, 64], &mut parts()).is_ok());
        for shape in [[3, 65], [4, 64], [usize::MAX, 2], [0, 64]] {
            assert!(Nf4::from_parts(shape, &mut parts()).is_err(), "{shape:?}");
        }
        for name in ["codes", "sizes", "steps", "mean"] {
            let mut lacking = parts();
            lacking.remove(name);
            assert!(Nf4::from_parts([3, 64], &mut lacking).is_err(), "{name}");
            let mut short = parts();
            let part = short.get_mut(name).unwrap();
            part.data = part.data.slice(..part.data.len() - 1);
            assert!(Nf4::from_parts([3, 64], &mut short).is_err(), "{name}");
        }
        for (name, number) in [
            ("mean", f32::NAN),
            ("steps", f32::INFINITY),
            ("steps", f32::MAX),
            ("mean", -f32::INFINITY),
        ] {
            let mut bad = parts();
            bad.get_mut(name).unwrap().data = Bytes::copy_from_slice(&number.to_le_bytes());
            assert!(Nf4::from_parts([3, 64], &mut bad).is_err(), "{name} {number}");
        }
        // Sizes below zero are none.
        let mut negative = parts();
        negative.get_mut("mean").unwrap().data = Bytes::copy_from_slice(&(-5.0_f32).to_le_bytes());
        let weight = Nf4::from_parts([3, 64], &mut negative).unwrap();
        let mut out = vec![1.0; 192];
        weight.read_rows(0, &mut out);
        assert!(out.iter().all(|v| *v == 0.0));
    }

    #[test]
    fn the_levels_are_those_of_the_paper() {
        let wanted = [
            -1.0,
            -0.696_192_8,
            -0.525_073_1,
            -0.394_917_5,
            -0.284_441_4,
            -0.184_773_4,
            -0.091_050,
            0.0,
            0.079_580_3,
            0.160_930_2,
            0.246_112_3,
            0.337_915_2,
            0.440_709_8,
            0.562_617,
            0.722_956_8,
            1.0,
        ];
        for (got, want) in LEVELS.iter().zip(wanted) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} is not {want}");
        }
        // Numbers on either side of the middle of two levels go to different ones.
        let middle = f32::midpoint(LEVELS[8], LEVELS[9]);
        assert_eq!([code(middle - 1e-4), code(middle + 1e-4)], [8, 9]);
    }
}
