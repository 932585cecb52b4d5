//! Units of group sparsity: which there are in a matrix, what they weigh, and which go.

use super::mask::mark_smallest;
use crate::error::Result;
use crate::models::TensorInfo;
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Record, RowGroupValues, RowGroups, Weight};

/// What the absolute weights of a matrix are multiplied by.
#[derive(Debug, Clone, PartialEq)]
pub enum Factors {
    None,
    /// One for each input channel; the columns of a convolution hold all channels once a tap.
    Inputs(Vec<f32>),
    /// One for each row: the inputs of depthwise filters.
    Rows(Vec<f32>),
}

/// How a `[rows, cols]` matrix is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Units {
    pub shape: [usize; 2],
    /// Consecutive rows of a group; the last may have fewer.
    pub group: usize,
    /// Columns that belong to an input, as far apart as there are inputs.
    pub taps: usize,
    /// Whether whole rows go.
    pub filters: bool,
}

impl Units {
    /// Inputs of a row.
    fn inputs(&self) -> usize {
        self.shape[1] / self.taps.max(1)
    }

    /// Units that there are.
    pub fn count(&self) -> usize {
        match self.filters {
            true => self.shape[0],
            false => self.shape[0].div_ceil(self.group) * self.inputs(),
        }
    }

    /// Units that go: the share of all, rounded down.
    pub fn dropped(&self, sparsity: f64) -> usize {
        (sparsity * self.count() as f64).floor() as usize
    }

    /// The unit of an element.
    fn of(&self, row: usize, column: usize) -> usize {
        match self.filters {
            true => row,
            false => row / self.group * self.inputs() + column % self.inputs(),
        }
    }

    /// The sum of a unit's absolute weights, each times its factor.
    pub fn scores(&self, values: &[f32], factors: &Factors) -> Vec<f32> {
        let mut sums = vec![0.0_f64; self.count()];
        let inputs = self.inputs();
        for (row, values) in values.chunks_exact(self.shape[1]).enumerate() {
            for (column, v) in values.iter().enumerate() {
                let by = match factors {
                    Factors::None => 1.0,
                    Factors::Inputs(by) => by[column % inputs],
                    Factors::Rows(by) => by[row],
                };
                sums[self.of(row, column)] += f64::from(v.abs()) * f64::from(by);
            }
        }
        sums.into_iter().map(|sum| sum as f32).collect()
    }

    /// The elements of the units that go, true in row order: those with the smallest scores, equal ones by
    /// their place.
    pub fn mask(&self, scores: &[f32], sparsity: f64) -> Vec<bool> {
        let mut units = vec![false; scores.len()];
        mark_smallest(scores.iter().copied(), self.dropped(sparsity), &mut units);
        self.spread(&units)
    }

    /// The elements of units in which nothing is left.
    #[cfg(test)]
    pub fn empty(&self, values: &[f32]) -> Vec<bool> {
        let units: Vec<bool> =
            self.scores(values, &Factors::None).into_iter().map(|sum| sum == 0.0).collect();
        self.spread(&units)
    }

    fn spread(&self, units: &[bool]) -> Vec<bool> {
        let [rows, cols] = self.shape;
        let places = (0..rows).flat_map(|row| (0..cols).map(move |column| (row, column)));
        places.map(|(row, column)| units[self.of(row, column)]).collect()
    }

    /// What a matrix becomes: row groups, or dense where that is no larger. Values in 8 bits are always row
    /// groups.
    pub fn store(&self, values: &[f32], format: RowGroupValues) -> Result<Weight> {
        let groups = RowGroups::from_dense(self.shape, values, self.group, format)?;
        match dense(format) {
            Some(dtype) if groups.bytes() >= self.dense_bytes(dtype) => {
                Ok(Weight::Dense(Dense::from_f32(self.shape.to_vec(), values, dtype)?))
            }
            _ => Ok(Weight::RowGroups(groups)),
        }
    }

    /// What [`Units::store`] makes of a matrix from which a share went, at most.
    pub fn stored(&self, sparsity: f64, format: RowGroupValues) -> TensorInfo {
        let [rows, cols] = self.shape;
        let left = self.count() - self.dropped(sparsity);
        let columns = match self.filters {
            // Each row that stays keeps all columns of its group.
            true => cols * left.min(rows.div_ceil(self.group)),
            false => left * self.taps,
        };
        let bytes = RowGroups::expected(self.shape, columns as u64, self.group, format);
        let shape = self.shape.to_vec();
        match dense(format) {
            Some(dtype) if bytes >= self.dense_bytes(dtype) => TensorInfo {
                record: Record::Dense { shape: shape.clone() },
                shape,
                bytes: self.dense_bytes(dtype),
            },
            _ => {
                let group = self.group as u32;
                let record = Record::RowGroups { shape: self.shape, group, values: format };
                TensorInfo { record, shape, bytes }
            }
        }
    }

    fn dense_bytes(&self, dtype: Dtype) -> u64 {
        (self.shape[0] * self.shape[1] * dtype.size()) as u64
    }
}

/// The dense numbers that values of row groups are held against.
fn dense(format: RowGroupValues) -> Option<Dtype> {
    match format {
        RowGroupValues::F32 => Some(Dtype::F32),
        RowGroupValues::BF16 => Some(Dtype::BF16),
        RowGroupValues::Int8 => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINEAR: Units = Units { shape: [5, 3], group: 2, taps: 1, filters: false };

    #[test]
    fn units_by_hand() {
        let values: Vec<f32> = vec![
            1.0, -2.0, 0.5, // group 0
            -1.0, 0.0, 0.5, //
            3.0, 0.1, 0.0, // group 1
            0.0, -0.1, 4.0, //
            0.2, 9.0, 0.3, // a short group
        ];
        assert_eq!(LINEAR.count(), 9);
        let scores = LINEAR.scores(&values, &Factors::None);
        for (got, want) in scores.iter().zip([2.0, 2.0, 1.0, 3.0, 0.2, 4.0, 0.2, 9.0, 0.3]) {
            assert!((got - want).abs() < 1e-6);
        }
        // Four of nine at 0.5, rounded down: both of 0.2, 0.3, 1.
        assert_eq!(LINEAR.dropped(0.5), 4);
        let mask = LINEAR.mask(&scores, 0.5);
        let gone = |row: usize, column: usize| mask[row * 3 + column];
        assert!(gone(2, 1) && gone(3, 1) && gone(4, 0) && gone(4, 2) && gone(0, 2) && gone(1, 2));
        assert_eq!(mask.iter().filter(|m| **m).count(), 6);
        assert!(LINEAR.mask(&scores, 0.0).iter().all(|m| !m));
        // Ties go by the place.
        let tied = LINEAR.mask(&[1.0; 9], 0.12);
        assert_eq!(tied.iter().position(|m| *m), Some(0));
        assert_eq!(tied.iter().filter(|m| **m).count(), 2);
        // Inputs that are large keep their weights.
        let factors = Factors::Inputs(vec![1.0, 1.0, 10.0]);
        let scores = LINEAR.scores(&values, &factors);
        assert!((scores[2] - 10.0).abs() < 1e-6 && (scores[8] - 3.0).abs() < 1e-5);
        let rows = LINEAR.scores(&values, &Factors::Rows(vec![1.0, 0.0, 1.0, 1.0, 1.0]));
        assert_eq!(&rows[..3], [1.0, 2.0, 0.5]);
        let kept: Vec<f32> =
            values.iter().zip(&mask).map(|(v, m)| if *m { 0.0 } else { *v }).collect();
        assert_eq!(LINEAR.empty(&kept), mask);
    }

    #[test]
    fn taps_of_an_input_go_together_and_filters_as_a_whole() {
        let units = Units { shape: [2, 6], group: 2, taps: 2, filters: false };
        assert_eq!(units.count(), 3);
        // Input 1 is small in one tap and large in the other.
        let values = [1.0, 0.1, 1.0, 1.0, 5.0, 0.2, 1.0, 0.1, 1.0, 1.0, 5.0, 0.2];
        let mask = units.mask(&units.scores(&values, &Factors::None), 0.34);
        let want = [false, false, true, false, false, true];
        assert_eq!(mask, [want, want].concat());
        let filters = Units { shape: [4, 2], group: 2, taps: 1, filters: true };
        let scores = filters.scores(&[1.0, 1.0, 0.1, 0.1, 3.0, 0.0, 0.0, 0.5], &Factors::None);
        let mask = filters.mask(&scores, 0.5);
        assert_eq!(mask, [false, false, true, true, false, false, true, true]);
    }

    #[test]
    fn bytes_are_as_expected() {
        let values: Vec<f32> = (0..64 * 48).map(|i| ((i as f32) * 0.37).sin()).collect();
        for taps in [1, 3] {
            for group in [2, 4, 8, 16, 32] {
                let units = Units { shape: [64, 48], group, taps, filters: false };
                for format in [RowGroupValues::F32, RowGroupValues::BF16, RowGroupValues::Int8] {
                    for sparsity in [0.0, 0.01, 0.3, 0.5, 0.97] {
                        let mask = units.mask(&units.scores(&values, &Factors::None), sparsity);
                        let kept: Vec<f32> = values
                            .iter()
                            .zip(&mask)
                            .map(|(v, m)| if *m { 0.0 } else { *v })
                            .collect();
                        let made = units.store(&kept, format).unwrap();
                        let info = units.stored(sparsity, format);
                        assert_eq!(made.record(), info.record);
                        assert_eq!(made.bytes(), info.bytes, "{group} {format:?} {sparsity}");
                        if format == RowGroupValues::F32 {
                            assert_eq!(made.to_f32(), kept, "every bit comes back");
                        }
                        let columns = (units.count() - units.dropped(sparsity)) * taps;
                        if let (Weight::RowGroups(_), RowGroupValues::F32) = (&made, format) {
                            let groups = 64 / group;
                            let formula = columns * (group * 4 + 2) + 4 * (groups + 1);
                            assert_eq!(made.bytes(), formula as u64);
                        }
                    }
                }
            }
        }
    }
}
