//! Masks with exact counts: which weights of a matrix go.
//!
//! Scores are compared as numbers, ties go by the lower index. A count is always met exactly, where
//! thresholding would take all ties or none. (Weights dequantised from small grids tie often.)

use rayon::prelude::*;

/// Longest group of an n:m pattern.
const GROUP: usize = 32;

/// Which elements of a `[rows, cols]` matrix are pruned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    cols: usize,
    pruned: Vec<bool>,
}

impl Mask {
    /// A mask that prunes nothing.
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { cols, pruned: vec![false; rows * cols] }
    }

    /// The mask whose pruned elements are the zeros of `values`.
    pub fn zeros_of(values: &[f32], cols: usize) -> Self {
        Self { cols, pruned: values.iter().map(|v| *v == 0.0).collect() }
    }

    /// Prunes the `count` smallest of `score(value)` over the whole matrix.
    pub fn smallest(values: &[f32], cols: usize, count: usize, score: impl Fn(f32) -> f32) -> Self {
        let mut pruned = vec![false; values.len()];
        mark_smallest(values.iter().map(|v| score(*v)), count, &mut pruned);
        Self { cols, pruned }
    }

    /// In every row, prunes the `count` smallest of `score(value, column)`.
    pub fn smallest_of_rows(
        values: &[f32],
        cols: usize,
        count: usize,
        score: impl Fn(f32, usize) -> f32 + Sync,
    ) -> Self {
        Self::by_rows(values, cols, |row, pruned| {
            mark_smallest(row.iter().enumerate().map(|(j, v)| score(*v, j)), count, pruned);
        })
    }

    /// In every row, prunes the `n` smallest of `score(value, column)` among each `m` consecutive
    /// columns; `m` divides the columns.
    pub fn n_of_m(
        values: &[f32],
        cols: usize,
        (n, m): (usize, usize),
        score: impl Fn(f32, usize) -> f32 + Sync,
    ) -> Self {
        Self::by_rows(values, cols, |row, pruned| {
            for (g, (group, pruned)) in row.chunks(m).zip(pruned.chunks_mut(m)).enumerate() {
                let scores = group.iter().enumerate().map(|(j, v)| score(*v, g * m + j));
                mark_smallest(scores, n, pruned);
            }
        })
    }

    fn by_rows(values: &[f32], cols: usize, mark: impl Fn(&[f32], &mut [bool]) + Sync) -> Self {
        let mut pruned = vec![false; values.len()];
        let rows = values.par_chunks(cols).zip(pruned.par_chunks_mut(cols));
        rows.for_each(|(row, pruned)| mark(row, pruned));
        Self { cols, pruned }
    }

    /// True where an element goes, in row order.
    pub fn pruned(&self) -> &[bool] {
        &self.pruned
    }

    /// The same, to write.
    pub fn pruned_mut(&mut self) -> &mut [bool] {
        &mut self.pruned
    }

    /// Number of pruned elements.
    pub fn count(&self) -> usize {
        self.pruned.iter().filter(|p| **p).count()
    }

    /// Number of pruned elements of each row.
    pub fn row_counts(&self) -> Vec<usize> {
        let rows = self.pruned.chunks(self.cols);
        rows.map(|row| row.iter().filter(|p| **p).count()).collect()
    }

    /// Whether each `m` consecutive elements of every row hold exactly `n` pruned ones.
    pub fn is_n_of_m(&self, (n, m): (usize, usize)) -> bool {
        self.cols.is_multiple_of(m)
            && self.pruned.chunks(m).all(|g| g.iter().filter(|p| **p).count() == n)
    }

    /// Sets the pruned elements of `values` to zero.
    pub fn apply(&self, values: &mut [f32]) {
        for (value, pruned) in values.iter_mut().zip(&self.pruned) {
            if *pruned {
                *value = 0.0;
            }
        }
    }
}

/// Marks the `count` smallest scores (none negative); equal scores by position.
pub fn mark_smallest(scores: impl Iterator<Item = f32>, count: usize, pruned: &mut [bool]) {
    // Groups of n:m patterns are many and short: they need no memory of their own.
    let mut few = [0u64; GROUP];
    if pruned.len() <= GROUP {
        let keys = &mut few[..pruned.len()];
        keys.iter_mut().zip(scores.enumerate()).for_each(|(slot, (i, s))| *slot = key(i, s));
        mark(keys, count, pruned);
    } else {
        let mut keys: Vec<u64> = scores.enumerate().map(|(i, s)| key(i, s)).collect();
        mark(&mut keys, count, pruned);
    }
}

/// Sorts as the score does, then as the position: bits of floats that are not negative sort as the
/// numbers do.
fn key(position: usize, score: f32) -> u64 {
    (u64::from((score + 0.0).to_bits()) << 32) | position as u64
}

fn mark(keys: &mut [u64], count: usize, pruned: &mut [bool]) {
    let count = count.min(keys.len());
    if count == 0 {
        return;
    }
    keys.select_nth_unstable(count - 1);
    for key in &keys[..count] {
        pruned[(*key & u64::from(u32::MAX)) as usize] = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_by_the_lower_index_and_counts_are_exact() {
        let mask = Mask::smallest(&[2.0, 1.0, 1.0, 1.0, -0.5, 3.0], 3, 3, f32::abs);
        assert_eq!(mask.pruned(), [false, true, true, false, true, false]);
        assert_eq!((mask.count(), mask.row_counts()), (3, vec![2, 1]));
        let none = Mask::smallest(&[0.0, 0.0], 2, 0, f32::abs);
        assert_eq!(none.count(), 0);
        let zeros = Mask::smallest(&[0.0, -0.0, 0.0], 3, 2, |v| v);
        assert_eq!(zeros.pruned(), [true, true, false]);
    }

    #[test]
    fn rows_are_apart_and_groups_keep_the_largest() {
        let values = [1.0, 5.0, 2.0, 4.0, 40.0, 10.0, 10.0, 10.0];
        let rows = Mask::smallest_of_rows(&values, 4, 2, |v, _| v);
        assert_eq!(rows.pruned(), [true, false, true, false, false, true, true, false]);
        let groups = Mask::n_of_m(&values, 4, (1, 2), |v, j| if j == 3 { 100.0 } else { v });
        assert_eq!(groups.pruned(), [true, false, true, false, false, true, true, false]);
        assert!(groups.is_n_of_m((1, 2)) && !groups.is_n_of_m((2, 2)));
        let mut pruned = values;
        groups.apply(&mut pruned);
        assert_eq!(pruned, [0.0, 5.0, 0.0, 4.0, 40.0, 0.0, 0.0, 10.0]);
        assert_eq!(Mask::zeros_of(&pruned, 4), groups);
    }

    #[test]
    fn ties_inside_of_a_group_go_by_the_place() {
        // As weights of few levels have them.
        let values = [1.0, 2.0, -1.0, 1.0, 2.0, 2.0, 2.0, 2.0];
        let mask = Mask::n_of_m(&values, 4, (2, 4), |v, _| v.abs());
        assert_eq!(mask.pruned(), [true, false, true, false, true, true, false, false]);
        // The same order in rows that are longer than a group: 34 zeros, then the first 16 of 33 ones.
        let long: Vec<f32> = (0..100).map(|i| (i % 3) as f32).collect();
        let mask = Mask::smallest_of_rows(&long, 100, 50, |v, _| v);
        let goes = |i: usize| i.is_multiple_of(3) || (i % 3 == 1 && i / 3 < 16);
        assert_eq!(mask.pruned(), (0..100).map(goes).collect::<Vec<_>>());
    }
}
