//! The grid that a weight's values lie on, where it has one: codes with a scale for each group.
//!
//! `value = (code - zero) * scale`. The product is exact in f32 (a code has 8 bits and a scale 11), so the
//! offset `code - zero` is the quotient of the two, exactly, and every layout can be asked by its values.

use bytes::Bytes;
use half::f16;

use crate::error::{Error, Reason, Result};
use crate::nn::weight::{GgmlType, Record, ValueFormat, Weight};

/// A weight whose values are whole multiples of the scales of its groups.
pub(super) struct Grid<'a> {
    weight: &'a Weight,
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Columns that share a scale; divides the columns.
    pub group: usize,
    /// The zero point is `2^(bits-1)` everywhere.
    pub symmetric: bool,
    /// f16 by row and group.
    scales: Bytes,
    /// By row and group; empty where symmetric.
    zeros: Bytes,
}

impl<'a> Grid<'a> {
    /// The grid of `weight`; `None` for layouts without one. Of sparse weights what is pruned is offset 0.
    pub fn of(weight: &'a Weight) -> Option<Self> {
        let spec = match weight.record() {
            Record::Grouped { spec, .. } => spec,
            Record::Sparse { values: ValueFormat::Grouped(spec), .. } => spec,
            Record::Ggml { r#type: kind @ (GgmlType::Q4_0 | GgmlType::Q8_0), .. } => {
                let bits = if kind == GgmlType::Q4_0 { 4 } else { 8 };
                return Self::of_blocks(weight, kind, bits);
            }
            _ => return None,
        };
        let (mut scales, mut zeros) = (Bytes::new(), Bytes::new());
        for part in weight.parts() {
            match part.suffix {
                "scales" => scales = part.data,
                "zeros" => zeros = part.data,
                _ => {}
            }
        }
        let (bits, group, symmetric) = (spec.bits, spec.group, spec.symmetric);
        Some(Self { weight, bits, group, symmetric, scales, zeros })
    }

    /// Blocks begin with their scale.
    fn of_blocks(weight: &'a Weight, kind: GgmlType, bits: u8) -> Option<Self> {
        let Weight::Ggml(blocks) = weight else { return None };
        let data = blocks.data().chunks_exact(kind.block_bytes());
        let scales = data.flat_map(|block| [block[0], block[1]]).collect();
        let group = kind.block_elements();
        Some(Self { weight, bits, group, symmetric: true, scales, zeros: Bytes::new() })
    }

    pub fn rows(&self) -> usize {
        self.weight.rows()
    }

    pub fn cols(&self) -> usize {
        self.weight.cols()
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols() / self.group
    }

    pub fn scale(&self, row: usize, group: usize) -> f16 {
        let at = 2 * (row * self.groups() + group);
        f16::from_le_bytes([self.scales[at], self.scales[at + 1]])
    }

    /// The code that means 0.
    pub fn zero(&self, row: usize, group: usize) -> u8 {
        match self.symmetric {
            true => 1 << (self.bits - 1),
            false => self.zeros[row * self.groups() + group],
        }
    }

    /// A row's values and its offsets `code - zero`, `cols` of each.
    ///
    /// # Errors
    /// `NON_FINITE` for blocks of a file that hold such scales.
    pub fn read(&self, row: usize, values: &mut [f32], offsets: &mut [i16]) -> Result<()> {
        self.weight.read_rows(row, values);
        if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
            return Err(Error::new(
                Reason::NonFinite,
                format!("the tensor holds {bad}; the model is damaged"),
            ));
        }
        let groups = values.chunks_exact(self.group).zip(offsets.chunks_exact_mut(self.group));
        for (group, (values, offsets)) in groups.enumerate() {
            let scale = self.scale(row, group).to_f32();
            for (value, offset) in values.iter().zip(offsets) {
                // A scale of 0 makes every code 0; the cast makes 0 of what is not a number.
                *offset = (value / scale).round() as i16;
            }
        }
        Ok(())
    }

    /// Whether all offsets lie within `low ..= high`. Reads the weight once.
    pub fn within(&self, low: i16, high: i16, check: &dyn Fn() -> Result<()>) -> Result<bool> {
        let (mut values, mut offsets) = (vec![0.0; self.cols()], vec![0; self.cols()]);
        for row in 0..self.rows() {
            check()?;
            self.read(row, &mut values, &mut offsets)?;
            if offsets.iter().any(|q| !(low..=high).contains(q)) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::weight::{Dense, Ggml, Grouped, GroupedSpec, Sparse};
    use crate::nn::{dtype::Dtype, weight::Factored};

    fn offsets(grid: &Grid<'_>, row: usize) -> Vec<i16> {
        let (mut values, mut offsets) = (vec![0.0; grid.cols()], vec![0; grid.cols()]);
        grid.read(row, &mut values, &mut offsets).unwrap();
        offsets
    }

    #[test]
    fn offsets_worked_out_by_hand() {
        let spec = GroupedSpec { bits: 4, group: 2, symmetric: false };
        let (codes, zeros) = ([0, 15, 7, 3, 1, 1, 15, 0], [5, 3, 0, 15]);
        let scales = [0.1, 2.0, 3.0e-7, 0.0];
        let grouped = Grouped::pack([2, 4], spec, &codes, &scales, &zeros).unwrap();
        let weight = Weight::Grouped(grouped);
        let grid = Grid::of(&weight).unwrap();
        assert_eq!(offsets(&grid, 0), [-5, 10, 4, 0]);
        // A scale of 0 leaves nothing of its codes.
        assert_eq!(offsets(&grid, 1), [1, 1, 0, 0]);
        assert_eq!((grid.zero(0, 1), grid.zero(1, 1)), (3, 15));
        assert!(grid.within(-5, 10, &|| Ok(())).unwrap());
        assert!(!grid.within(-5, 9, &|| Ok(())).unwrap());

        let mask = [true, false, true, true, false, true, true, true];
        let spec = GroupedSpec { symmetric: true, ..spec };
        let sparse = Sparse::from_codes([2, 4], &mask, spec, &codes, &scales, &[], None).unwrap();
        let weight = Weight::Sparse(sparse);
        let grid = Grid::of(&weight).unwrap();
        assert_eq!(offsets(&grid, 0), [-8, 0, -1, -5]);
        assert_eq!(grid.zero(1, 0), 8);

        let values: Vec<f32> = (-16..16).map(|v| v as f32 / 2.0).collect();
        for (kind, bits, last) in [(GgmlType::Q8_0, 8, 119), (GgmlType::Q4_0, 4, 7)] {
            let weight = Weight::Ggml(Ggml::quantize([1, 32], kind, &values).unwrap());
            let grid = Grid::of(&weight).unwrap();
            assert_eq!((grid.bits, grid.group, grid.symmetric), (bits, 32, true));
            assert_eq!(offsets(&grid, 0)[31], last);
        }
    }

    #[test]
    fn what_has_no_grid_says_so() {
        let values = [1.0; 32];
        let dense = Dense::from_f32(vec![1, 32], &values, Dtype::F16).unwrap();
        assert!(Grid::of(&Weight::Dense(dense)).is_none());
        let blocks = Ggml::quantize([1, 32], GgmlType::Q4_1, &values).unwrap();
        assert!(Grid::of(&Weight::Ggml(blocks)).is_none());
        let factored = Factored::from_f32([1, 32], 1, &[1.0], &values, Dtype::F32).unwrap();
        assert!(Grid::of(&Weight::Factored(factored)).is_none());
        // Blocks whose scale is not finite are found when they are read.
        let mut data = vec![0x00, 0x7c];
        data.extend([1; 32]);
        let blocks = Ggml::new([1, 32], GgmlType::Q8_0, data.into()).unwrap();
        let weight = Weight::Ggml(blocks);
        let grid = Grid::of(&weight).unwrap();
        let error = grid.read(0, &mut [0.0; 32], &mut [0; 32]).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
    }
}
