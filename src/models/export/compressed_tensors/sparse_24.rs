//! `sparse-24-bitmask`: exactly two values of each four consecutive columns, and a bit for each column that
//! says which they are.

use std::io::Write;

use super::super::{CHUNK, Drift, each_rows, put_dense};
use crate::error::Result;
use crate::nn::dtype::Dtype;
use crate::nn::weight::Weight;
use crate::progress::Progress;

/// Columns of which two are kept.
const OF: usize = 4;

/// A tensor that a matrix is taken apart into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Values,
    Bits,
    Shape,
}

/// The parts of a matrix: name, type and shape of each.
pub(super) fn parts(
    module: &str,
    shape: &[usize],
    dtype: Dtype,
) -> Vec<(Part, (String, Dtype, Vec<usize>))> {
    let (rows, cols) = (shape[0], shape[1]);
    let part = |part, suffix: &str, dtype, shape: &[usize]| {
        (part, (format!("{module}.{suffix}"), dtype, shape.to_vec()))
    };
    vec![
        part(Part::Values, "compressed", dtype, &[rows, cols / 2]),
        part(Part::Bits, "bitmask", Dtype::U8, &[rows, cols.div_ceil(8)]),
        part(Part::Shape, "shape", Dtype::I64, &[2, 1]),
    ]
}

/// Bytes of all parts.
pub(super) fn bytes(shape: &[usize], dtype: Dtype) -> u64 {
    let parts = parts("", shape, dtype);
    parts.iter().map(|(_, (_, dtype, shape))| super::dense_bytes(shape, *dtype)).sum()
}

/// Whether no four columns hold more than two values. Ends at the first that do.
pub(super) fn holds(weight: &Weight, progress: &Progress) -> Result<bool> {
    let cols = weight.cols();
    if !cols.is_multiple_of(OF) {
        return Ok(false);
    }
    let batch = (CHUNK / 16 / cols.max(1)).max(1).min(weight.rows());
    let mut values = vec![0.0; batch * cols];
    for first in (0..weight.rows()).step_by(batch) {
        progress.check()?;
        let values = &mut values[..batch.min(weight.rows() - first) * cols];
        weight.read_rows(first, values);
        let kept = |group: &[f32; OF]| group.iter().filter(|v| **v != 0.0).count();
        if values.as_chunks::<OF>().0.iter().any(|group| kept(group) > 2) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The two places of a group: those of its values, and the first others where there are fewer.
fn places(group: &[f32; OF]) -> [bool; OF] {
    let mut kept = group.map(|v| v != 0.0);
    let mut missing = 2_usize.saturating_sub(kept.iter().filter(|k| **k).count());
    for kept in &mut kept {
        if !*kept && missing > 0 {
            *kept = true;
            missing -= 1;
        }
    }
    kept
}

/// Writes a part. Values count the drift that their type brings.
pub(super) fn put(
    weight: &Weight,
    part: Part,
    dtype: Dtype,
    out: &mut dyn Write,
    drift: &mut Drift,
    progress: &Progress,
) -> Result<()> {
    let cols = weight.cols();
    match part {
        Part::Values => each_rows(weight, None, progress, |rows| {
            let mut kept = Vec::with_capacity(rows.len() / 2);
            for group in rows.as_chunks::<OF>().0 {
                let places = places(group);
                kept.extend(group.iter().zip(places).filter_map(|(v, kept)| kept.then_some(*v)));
            }
            put_dense(&kept, dtype, out, drift)
        }),
        Part::Bits => each_rows(weight, None, progress, |rows| {
            let mut bits = Vec::with_capacity(rows.len() / 8);
            for row in rows.chunks_exact(cols) {
                let kept: Vec<bool> = row.as_chunks::<OF>().0.iter().flat_map(places).collect();
                let byte = |bits: &[bool]| {
                    bits.iter().rev().fold(0_u8, |byte, bit| byte << 1 | u8::from(*bit))
                };
                bits.extend(kept.chunks(8).map(byte));
            }
            out.write_all(&bits)?;
            Ok(())
        }),
        Part::Shape => {
            for size in [weight.rows(), cols] {
                out.write_all(&(size as u64).to_le_bytes())?;
            }
            Ok(())
        }
    }
}
