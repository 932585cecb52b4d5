//! Which layout a changed weight is stored in, and what is known of it beforehand.

use crate::error::{Error, Reason, Result};
use crate::models::{ModelInfo, TensorInfo};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{
    Dense, Grouped, GroupedSpec, Record, RowGroupValues, RowGroups, Sparse, SparsePattern,
    ValueFormat, Weight,
};

use super::grid::Codes;
use super::mask::Mask;

/// A tensor's info and its `[rows, cols]`; it must be a matrix.
pub fn matrix<'a>(model: &'a ModelInfo, name: &str) -> Result<(&'a TensorInfo, [usize; 2])> {
    let tensor = model.tensors.get(name).ok_or_else(|| {
        Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
    })?;
    match tensor.shape.as_slice() {
        [rows, cols] if *rows > 0 && *cols > 0 => Ok((tensor, [*rows, *cols])),
        shape => Err(Error::new(
            Reason::UnsupportedModel,
            format!("'{name}' has shape {shape:?}, not that of a matrix"),
        )),
    }
}

/// Refuses to change a tensor that an earlier step rounded to a grid, or took apart: a change would undo what
/// that step did.
pub fn refuse_quantised(tensor: &TensorInfo, name: &str, verb: &str) -> Result<()> {
    let done = match tensor.record {
        Record::Grouped { .. }
        | Record::DualGrained { .. }
        | Record::RowGroups { values: RowGroupValues::Int8, .. }
        | Record::Sparse { values: ValueFormat::Grouped(_), .. } => "quantised it",
        Record::Sum { .. } => "given it a correction",
        Record::Factored { .. } => "made it a product of two matrices",
        _ => return Ok(()),
    };
    let remedy = match (verb, done) {
        ("prune", "quantised it") => "prune first, then quantise what is left",
        _ => "start from the version before, or leave this weight out of one of the scopes",
    };
    Err(Error::new(
        Reason::InvalidRecipe,
        format!("cannot {verb} '{name}': an earlier step has {done}; {remedy}"),
    ))
}

/// Zeros that the stored form of a tensor shows.
pub fn known_zeros(tensor: &TensorInfo) -> usize {
    let (shape, values, pattern) = match tensor.record {
        Record::Sparse { shape, values, pattern } => (shape, values, pattern),
        Record::RowGroups { shape, group, values } => {
            let kept = RowGroups::kept(shape, tensor.bytes, group as usize, values);
            return (shape[0] * shape[1]).saturating_sub(kept as usize * group as usize);
        }
        _ => return 0,
    };
    let elements = shape[0] * shape[1];
    if let SparsePattern::NOfM { keep, of } = pattern {
        return elements / usize::from(of) * usize::from(of - keep);
    }
    // Bytes grow with the kept elements, so they tell how many there are.
    let bytes = |kept: usize| Sparse::expected(shape, kept, values, None).1;
    let (mut low, mut high) = (0, elements);
    while low < high {
        let middle = low + (high - low) / 2;
        if bytes(middle) < tensor.bytes { low = middle + 1 } else { high = middle }
    }
    elements - low
}

/// Stores pruned values: sparse, or dense where that is no larger.
pub fn pruned(
    name: &str,
    shape: [usize; 2],
    values: &[f32],
    format: ValueFormat,
    hint: Option<(u8, u8)>,
) -> Result<Weight> {
    let too_large = |e: Error| match e.reason() {
        Reason::Internal => e,
        _ => Error::option("sparsity.values", format!("{} ('{name}')", e.message())),
    };
    let sparse = Sparse::from_dense(shape, values, format, hint).map_err(too_large)?;
    let dtype = dense_type(format);
    if sparse.bytes() < dense_bytes(shape, dtype) {
        return Ok(Weight::Sparse(sparse));
    }
    Ok(Weight::Dense(Dense::from_f32(shape.to_vec(), values, dtype).map_err(too_large)?))
}

/// What [`pruned`] makes of a matrix with this many zeros.
pub fn pruned_info(
    shape: [usize; 2],
    zeros: usize,
    values: ValueFormat,
    hint: Option<(u8, u8)>,
) -> TensorInfo {
    let kept = shape[0] * shape[1] - zeros;
    let (pattern, bytes) = Sparse::expected(shape, kept, values, hint);
    let dense = dense_bytes(shape, dense_type(values));
    if bytes < dense {
        let record = Record::Sparse { shape, pattern, values };
        TensorInfo { record, shape: shape.to_vec(), bytes }
    } else {
        let record = Record::Dense { shape: shape.to_vec() };
        TensorInfo { record, shape: shape.to_vec(), bytes: dense }
    }
}

/// Stores codes: with a mask of pruned weights where that is smaller, else all of them.
pub fn quantised(
    before: &Weight,
    shape: [usize; 2],
    spec: GroupedSpec,
    codes: &Codes,
    pruned: &Mask,
) -> Result<Weight> {
    let kept = pruned.pruned().len() - pruned.count();
    let hint = hint_of(&before.record());
    let (_, bytes) = Sparse::expected(shape, kept, ValueFormat::Grouped(spec), hint);
    let Codes { codes, scales, zeros } = codes;
    if bytes < spec.bytes(shape[0], shape[1]) {
        let mask: Vec<bool> = pruned.pruned().iter().map(|p| !p).collect();
        let sparse = Sparse::from_codes(shape, &mask, spec, codes, scales, zeros, hint)?;
        return Ok(Weight::Sparse(sparse));
    }
    Ok(Weight::Grouped(Grouped::pack(shape, spec, codes, scales, zeros)?))
}

/// What [`quantised`] makes of a tensor. Zeros of a dense tensor are not known beforehand; then this is
/// the most it can take.
pub fn quantised_info(shape: [usize; 2], before: &TensorInfo, spec: GroupedSpec) -> TensorInfo {
    let kept = shape[0] * shape[1] - known_zeros(before);
    let values = ValueFormat::Grouped(spec);
    let (pattern, sparse) = Sparse::expected(shape, kept, values, hint_of(&before.record));
    let grouped = spec.bytes(shape[0], shape[1]);
    let (record, bytes) = if sparse < grouped {
        (Record::Sparse { shape, pattern, values }, sparse)
    } else {
        (Record::Grouped { shape, spec }, grouped)
    };
    TensorInfo { record, shape: shape.to_vec(), bytes }
}

/// The pattern of a sparse record as a hint: zeros of each group, length of a group.
fn hint_of(record: &Record) -> Option<(u8, u8)> {
    match record {
        Record::Sparse { pattern: SparsePattern::NOfM { keep, of }, .. } => Some((of - keep, *of)),
        _ => None,
    }
}

fn dense_type(format: ValueFormat) -> Dtype {
    match format {
        ValueFormat::F32 => Dtype::F32,
        ValueFormat::BF16 => Dtype::BF16,
        ValueFormat::F16 | ValueFormat::Grouped(_) => Dtype::F16,
    }
}

fn dense_bytes([rows, cols]: [usize; 2], dtype: Dtype) -> u64 {
    (rows * cols * dtype.size()) as u64
}
