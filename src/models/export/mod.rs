//! From a model to files other programs read.

mod gguf;
mod hugging_face;

use std::io::Write;

use half::{bf16, f16};

use crate::error::{Error, Reason, Result};
use crate::nn::dtype::Dtype;
use crate::nn::weight::Weight;

pub use gguf::{GgufFormat, gguf};
pub use hugging_face::{any, hugging_face};

/// Elements that are converted at a time: a few megabytes, whatever the size of the tensor.
const CHUNK: usize = 1 << 20;

/// Reads a weight's rows as f32 in the given order (or their own), some at a time, and hands each batch
/// to `put`. What is not finite is refused: no reader could use it.
fn each_rows(
    weight: &Weight,
    order: Option<&[usize]>,
    mut put: impl FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    // A vector is a row; reordering one moves its elements.
    if let (Some(order), 1) = (order, weight.shape().len()) {
        let values = weight.to_f32();
        let moved: Vec<f32> = order.iter().map(|&i| values[i]).collect();
        return put(&moved);
    }
    let (rows, cols) = (weight.rows(), weight.cols());
    let batch = (CHUNK / cols.max(1)).max(1);
    let mut values = vec![0.0; batch.min(rows) * cols];
    for first in (0..rows).step_by(batch) {
        let count = batch.min(rows - first);
        let values = &mut values[..count * cols];
        match order {
            None => weight.read_rows(first, values),
            Some(order) => {
                for (row, &from) in values.chunks_exact_mut(cols).zip(&order[first..]) {
                    weight.read_rows(from, row);
                }
            }
        }
        put(values)?;
    }
    Ok(())
}

/// Writes values as little-endian elements.
fn put_dense(values: &[f32], dtype: Dtype, out: &mut dyn Write) -> Result<()> {
    if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
        return Err(Error::new(
            Reason::NonFinite,
            format!("the tensor holds {bad}; the model is damaged"),
        ));
    }
    let bytes: Vec<u8> = match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::F16 => {
            if let Some(large) = values.iter().find(|v| f16::from_f32(**v).is_infinite()) {
                return Err(Error::new(
                    Reason::NonFinite,
                    format!("{large} does not fit into f16; export as bf16 or f32"),
                ));
            }
            values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()
        }
        other => {
            return Err(Error::field("dtype", format!("{other} is not one of F32, F16, BF16")));
        }
    };
    out.write_all(&bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests;
