//! The right matrix of a product as strips.

#![allow(unsafe_op_in_unsafe_fn)]

use std::cell::Cell;

use super::View;
use super::strips::{LANES, Line};
use crate::kernels::simd::{self, Level, Simd, Task};

thread_local! {
    static LINES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Calls `work` with `len` lines of unspecified content, kept by the thread between calls.
pub fn with_lines<T>(len: usize, work: impl FnOnce(&mut [Line]) -> T) -> T {
    let mut lines = LINES.take();
    if lines.len() < len {
        // Nothing of the old ones is needed, and both at once would be.
        drop(lines);
        lines = vec![Line::ZERO; len];
    }
    let out = work(&mut lines[..len]);
    LINES.set(lines);
    out
}

/// Writes columns `first .. first + 16` of `b`, as many as there are, into a strip of `b.rows` lines.
pub fn strip(level: Level, b: View<'_>, first: usize, lines: &mut [Line]) {
    let count = LANES.min(b.cols - first);
    if b.col_stride == 1 {
        for (row, line) in lines.iter_mut().enumerate() {
            let values = &b.data[row * b.row_stride + first..];
            match values.first_chunk() {
                Some(values) if count == LANES => line.0 = *values,
                _ => line.0[..count].copy_from_slice(&values[..count]),
            }
        }
    } else if b.row_stride == 1 {
        columns(level, &b.data[first * b.col_stride..], b.col_stride, count, lines);
    } else {
        for (row, line) in lines.iter_mut().enumerate() {
            for (i, out) in line.0[..count].iter_mut().enumerate() {
                *out = b.data[row * b.row_stride + (first + i) * b.col_stride];
            }
        }
    }
}

/// Writes `count <= 16` columns, each `lines.len()` elements side by side, the next one `stride` on, as a
/// strip. Panics if `data` is shorter.
pub fn columns(level: Level, data: &[f32], stride: usize, count: usize, lines: &mut [Line]) {
    assert!(count <= LANES && (count == 0 || (count - 1) * stride + lines.len() <= data.len()));
    simd::run(level, Columns { data, stride, count, lines });
}

struct Columns<'a> {
    data: &'a [f32],
    stride: usize,
    count: usize,
    lines: &'a mut [Line],
}

impl Task for Columns<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { data, stride, count, lines } = self;
        let whole = if count == LANES { lines.len() / LANES * LANES } else { 0 };
        for row in (0..whole).step_by(LANES) {
            let block = std::array::from_fn(|i| S::load(data.as_ptr().add(i * stride + row)));
            for (line, v) in lines[row..row + LANES].iter_mut().zip(S::transpose(block)) {
                S::store(line.0.as_mut_ptr(), v);
            }
        }
        for (row, line) in lines.iter_mut().enumerate().skip(whole) {
            for (i, out) in line.0[..count].iter_mut().enumerate() {
                *out = data[i * stride + row];
            }
        }
    }
}
