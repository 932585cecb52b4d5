//! From a model to files other programs read. Tensors stream through one after the other, some rows at a
//! time; files appear under their names when they are whole; every form says how far its values are from
//! those of the model ([`Report`]).

mod blocks;
mod compressed_tensors;
mod gguf;
mod grid;
mod hugging_face;
mod report;

use std::io::Write;
use std::path::PathBuf;

use half::{bf16, f16};

use crate::error::{Error, Reason, Result};
use crate::nn::dtype::Dtype;
use crate::nn::weight::Weight;
use crate::progress::Progress;

pub use compressed_tensors::compressed_tensors;
pub use gguf::{Gguf, GgufFormat, gguf};
pub use hugging_face::{dense, hugging_face};
pub use report::{Drift, Report, TensorReport};

/// What was written.
#[derive(Debug)]
pub struct Exported {
    /// Paths of the files.
    pub files: Vec<PathBuf>,
    pub report: Report,
}

/// Elements that are converted at a time: a few megabytes, whatever the size of the tensor.
const CHUNK: usize = 1 << 20;

/// Reads a weight's rows as f32 in the given order (or their own), some at a time, and hands each batch
/// to `put`.
fn each_rows(
    weight: &Weight,
    order: Option<&[usize]>,
    progress: &Progress,
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
        progress.check()?;
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

/// Refuses values that no reader could use.
fn finite(values: &[f32]) -> Result<()> {
    match values.iter().find(|v| !v.is_finite()) {
        None => Ok(()),
        Some(bad) => Err(Error::new(
            Reason::NonFinite,
            format!("the tensor holds {bad}; the model is damaged"),
        )),
    }
}

/// Writes values as little-endian elements and counts what rounding did to them.
fn put_dense(values: &[f32], dtype: Dtype, out: &mut dyn Write, drift: &mut Drift) -> Result<()> {
    finite(values)?;
    let bytes: Vec<u8> = match dtype {
        Dtype::F32 => {
            drift.add_all(values, values);
            values.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        Dtype::BF16 => {
            let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            values.iter().zip(&rounded).for_each(|(v, r)| drift.add(*v, r.to_f32()));
            rounded.iter().flat_map(|r| r.to_le_bytes()).collect()
        }
        Dtype::F16 => {
            let rounded: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            if let Some((large, _)) = values.iter().zip(&rounded).find(|(_, r)| r.is_infinite()) {
                return Err(Error::new(
                    Reason::NonFinite,
                    format!("{large} does not fit into f16; export as bf16 or f32"),
                ));
            }
            values.iter().zip(&rounded).for_each(|(v, r)| drift.add(*v, r.to_f32()));
            rounded.iter().flat_map(|r| r.to_le_bytes()).collect()
        }
        other => return Err(not_dense(other)),
    };
    out.write_all(&bytes)?;
    Ok(())
}

/// Name of a type of dense elements in configurations of Hugging Face.
fn torch_name(dtype: Dtype) -> Result<&'static str> {
    match dtype {
        Dtype::F32 => Ok("float32"),
        Dtype::F16 => Ok("float16"),
        Dtype::BF16 => Ok("bfloat16"),
        other => Err(not_dense(other)),
    }
}

fn not_dense(dtype: Dtype) -> Error {
    Error::field("type", format!("{dtype} is not one of F32, F16, BF16"))
}

/// Bytes of a tensor of dense elements.
fn dense_bytes(shape: &[usize], dtype: Dtype) -> u64 {
    (shape.iter().product::<usize>() * dtype.size()) as u64
}

#[cfg(test)]
mod tests;
