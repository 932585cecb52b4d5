//! `pack-quantized`: codes in 32-bit words along the rows, scales beside them, zero points in words down the
//! columns.
//!
//! A word holds its first code in its lowest bits. Codes of 2 and 3 bits are written in 4: the values are the
//! same, while readers disagree on how words are filled with codes that do not divide them.

use std::fmt;
use std::io::Write;

use half::f16;

use super::super::grid::Grid;
use super::super::{Drift, put_dense};
use crate::error::Result;
use crate::nn::dtype::Dtype;
use crate::progress::Progress;

/// How the codes of a matrix are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Scheme {
    /// 4 or 8.
    pub bits: u8,
    pub group: usize,
    pub symmetric: bool,
    /// A group is a row.
    pub channel: bool,
}

impl Scheme {
    pub fn of(grid: &Grid<'_>) -> Self {
        let (group, symmetric) = (grid.group, grid.symmetric);
        Self { bits: grid.bits.max(4), group, symmetric, channel: group == grid.cols() }
    }

    /// Codes of a word.
    fn per_word(self) -> usize {
        32 / usize::from(self.bits)
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.symmetric { ", symmetric" } else { "" };
        write!(f, "{} bits in groups of {}{kind}, packed", self.bits, self.group)
    }
}

/// A tensor that a matrix is taken apart into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Codes,
    Scales,
    Zeros,
    Shape,
}

/// The parts of a matrix: name, type and shape of each.
pub(super) fn parts(
    module: &str,
    shape: &[usize],
    scheme: &Scheme,
    dtype: Dtype,
) -> Vec<(Part, (String, Dtype, Vec<usize>))> {
    let (rows, cols) = (shape[0], shape[1]);
    let groups = cols / scheme.group;
    let words = |codes: usize| codes.div_ceil(scheme.per_word());
    let part = |part, suffix: &str, dtype, shape: &[usize]| {
        (part, (format!("{module}.{suffix}"), dtype, shape.to_vec()))
    };
    let mut parts = vec![
        part(Part::Codes, "weight_packed", Dtype::I32, &[rows, words(cols)]),
        part(Part::Scales, "weight_scale", dtype, &[rows, groups]),
        part(Part::Shape, "weight_shape", Dtype::I64, &[2]),
    ];
    if !scheme.symmetric {
        parts.push(part(Part::Zeros, "weight_zero_point", Dtype::I32, &[words(rows), groups]));
    }
    parts
}

/// Bytes of all parts.
pub(super) fn bytes(shape: &[usize], scheme: &Scheme, dtype: Dtype) -> u64 {
    let parts = parts("", shape, scheme, dtype);
    parts.iter().map(|(_, (_, dtype, shape))| super::dense_bytes(shape, *dtype)).sum()
}

/// Writes a part. Codes count the drift that the type of the scales brings.
pub(super) fn put(
    grid: &Grid<'_>,
    scheme: &Scheme,
    part: Part,
    dtype: Dtype,
    out: &mut dyn Write,
    drift: &mut Drift,
    progress: &Progress,
) -> Result<()> {
    match part {
        Part::Codes => codes(grid, scheme, dtype, out, drift, progress),
        Part::Scales => {
            let mut scales = vec![0.0; grid.groups()];
            for row in 0..grid.rows() {
                progress.check()?;
                for (group, scale) in scales.iter_mut().enumerate() {
                    *scale = grid.scale(row, group).to_f32();
                }
                put_dense(&scales, dtype, out, &mut Drift::default())?;
            }
            Ok(())
        }
        Part::Zeros => zeros(grid, scheme, out, progress),
        Part::Shape => {
            for size in [grid.rows(), grid.cols()] {
                out.write_all(&(size as u64).to_le_bytes())?;
            }
            Ok(())
        }
    }
}

fn codes(
    grid: &Grid<'_>,
    scheme: &Scheme,
    dtype: Dtype,
    out: &mut dyn Write,
    drift: &mut Drift,
    progress: &Progress,
) -> Result<()> {
    let cols = grid.cols();
    let (mut values, mut offsets) = (vec![0.0; cols], vec![0_i16; cols]);
    let mut codes = vec![0_u32; cols];
    let mut bytes = Vec::with_capacity(4 * cols.div_ceil(scheme.per_word()));
    for row in 0..grid.rows() {
        progress.check()?;
        grid.read(row, &mut values, &mut offsets)?;
        for (i, code) in codes.iter_mut().enumerate() {
            let group = i / grid.group;
            let scale = stored(grid.scale(row, group), dtype);
            drift.add(values[i], f32::from(offsets[i]) * scale);
            let middle = match scheme.symmetric {
                true => 1 << (scheme.bits - 1),
                false => i16::from(grid.zero(row, group)),
            };
            *code = u32::from((offsets[i] + middle).unsigned_abs());
        }
        bytes.clear();
        bytes.extend(codes.chunks(scheme.per_word()).flat_map(|c| word(c, scheme).to_le_bytes()));
        out.write_all(&bytes)?;
    }
    Ok(())
}

/// A scale as the file holds it.
fn stored(scale: f16, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => half::bf16::from_f32(scale.to_f32()).to_f32(),
        _ => scale.to_f32(),
    }
}

/// Zero points of a group in words down the rows.
fn zeros(grid: &Grid<'_>, scheme: &Scheme, out: &mut dyn Write, progress: &Progress) -> Result<()> {
    let rows: Vec<usize> = (0..grid.rows()).collect();
    for rows in rows.chunks(scheme.per_word()) {
        progress.check()?;
        for group in 0..grid.groups() {
            let zeros: Vec<u32> =
                rows.iter().map(|row| u32::from(grid.zero(*row, group))).collect();
            out.write_all(&word(&zeros, scheme).to_le_bytes())?;
        }
    }
    Ok(())
}

/// The first code in the lowest bits.
fn word(codes: &[u32], scheme: &Scheme) -> u32 {
    let bits = u32::from(scheme.bits);
    codes.iter().rev().fold(0, |word, code| word << bits | code)
}
