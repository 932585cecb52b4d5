//! What weights come to in bytes when zeros are left out, counted the same way for every model.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::nn::weight::{ValueFormat, Weight};

/// Elements and bytes of all weights of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Elements that are not zero.
    pub nonzero: u64,
    /// With all zeros.
    pub dense: u64,
    /// Elements that are not zero, and one bit an element for each matrix that has zeros.
    pub bitmap: u64,
    /// Elements that are not zero with an index each (2 bytes below 65536 columns, else 4) and 4 bytes for the
    /// end of each row and the beginning of the first, for each matrix that has zeros.
    pub rows: u64,
}

/// Counts. Weights in layouts of codes or factors count as they are stored.
pub fn footprint(weights: &BTreeMap<String, Arc<Weight>>) -> Footprint {
    let mut total = Footprint::default();
    for weight in weights.values() {
        let elements = weight.shape().iter().product::<usize>() as u64;
        let size = match &**weight {
            Weight::Dense(dense) => Some(dense.dtype().size() as u64),
            Weight::Sparse(sparse) => match sparse.values() {
                ValueFormat::F32 => Some(4),
                ValueFormat::F16 | ValueFormat::BF16 => Some(2),
                ValueFormat::Grouped(_) => None,
            },
            _ => None,
        };
        let matrix = weight.shape().len() == 2;
        let values = weight.to_f32();
        let kept = values.iter().filter(|v| **v != 0.0).count() as u64;
        total.nonzero += kept;
        let Some(size) = size else {
            total.dense += weight.bytes();
            total.bitmap += weight.bytes();
            total.rows += weight.bytes();
            continue;
        };
        total.dense += elements * size;
        if !matrix || kept == elements {
            total.bitmap += elements * size;
            total.rows += elements * size;
            continue;
        }
        let index = if weight.cols() < 1 << 16 { 2 } else { 4 };
        total.bitmap += kept * size + elements.div_ceil(8);
        total.rows += kept * (size + index) + 4 * (weight.rows() as u64 + 1);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Dense, Sparse};

    #[test]
    fn bytes_by_hand() {
        let mut values = vec![0.0f32; 20];
        (values[3], values[7], values[19]) = (1.0, -2.0, 3.0);
        let dense = |shape: Vec<usize>, values: &[f32], dtype| {
            Arc::new(Weight::Dense(Dense::from_f32(shape, values, dtype).unwrap()))
        };
        let sparse = Sparse::from_dense([4, 5], &values, ValueFormat::F32, None).unwrap();
        let weights = BTreeMap::from([
            ("full".to_owned(), dense(vec![2, 2], &[1.0; 4], Dtype::F16)),
            ("vector".to_owned(), dense(vec![3], &[0.0; 3], Dtype::F32)),
            ("zeros".to_owned(), dense(vec![4, 5], &values, Dtype::F32)),
            ("sparse".to_owned(), Arc::new(Weight::Sparse(sparse))),
        ]);
        let found = footprint(&weights);
        // Each of the two: 3 elements and 20 bits; 3 elements with 2 bytes more and 5 ends.
        let wanted = Footprint {
            nonzero: 4 + 3 + 3,
            dense: 8 + 12 + 80 + 80,
            bitmap: 8 + 12 + 2 * (12 + 3),
            rows: 8 + 12 + 2 * (18 + 20),
        };
        assert_eq!(found, wanted);
    }
}
