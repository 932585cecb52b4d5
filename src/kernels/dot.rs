//! Rows of a layout: decoded into vectors, which are either stored or multiplied at once.

#![allow(unsafe_op_in_unsafe_fn, clippy::missing_safety_doc)]

use std::ops::Range;

use half::{bf16, f16};

use super::simd::{self, Level, Simd, Task};
use super::threads::{self, Shared};

/// A matrix whose rows can be decoded.
///
/// # Safety
/// `decode` calls the sink with every column in `0..cols()` exactly once and with no other.
pub unsafe trait Rows: Sync {
    fn rows(&self) -> usize;
    fn cols(&self) -> usize;

    /// Row `row` as it is, if it is stored as aligned f32.
    fn plain(&self, _row: usize) -> Option<&[f32]> {
        None
    }

    /// Gives the elements of a row to the sink. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// `row < rows()`, and the processor has the instructions of `S`.
    unsafe fn decode<S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K);
}

/// Takes decoded elements.
pub trait Sink<S: Simd> {
    /// Columns `at .. at + 16` and `at + 16 .. at + 32`.
    ///
    /// # Safety
    /// The columns exist, and the processor has the instructions of `S`.
    unsafe fn pair(&mut self, at: usize, a: S::F, b: S::F);

    /// Column `at`.
    ///
    /// # Safety
    /// The column exists.
    unsafe fn one(&mut self, at: usize, v: f32);
}

struct Store(*mut f32);

impl<S: Simd> Sink<S> for Store {
    #[inline(always)]
    unsafe fn pair(&mut self, at: usize, a: S::F, b: S::F) {
        S::store(self.0.add(at), a);
        S::store(self.0.add(at + 16), b);
    }
    #[inline(always)]
    unsafe fn one(&mut self, at: usize, v: f32) {
        self.0.add(at).write(v);
    }
}

struct Dot<S: Simd> {
    x: *const f32,
    a: S::F,
    b: S::F,
    rest: f32,
}

impl<S: Simd> Dot<S> {
    #[inline(always)]
    unsafe fn new(x: *const f32) -> Self {
        Self { x, a: S::splat(0.0), b: S::splat(0.0), rest: 0.0 }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        S::sum(S::add(self.a, self.b)) + self.rest
    }
}

impl<S: Simd> Sink<S> for Dot<S> {
    #[inline(always)]
    unsafe fn pair(&mut self, at: usize, a: S::F, b: S::F) {
        self.a = S::mul_add(a, S::load(self.x.add(at)), self.a);
        self.b = S::mul_add(b, S::load(self.x.add(at + 16)), self.b);
    }
    #[inline(always)]
    unsafe fn one(&mut self, at: usize, v: f32) {
        self.rest += v * *self.x.add(at);
    }
}

/// f32, f16 or bf16 elements in row order.
#[derive(Clone, Copy)]
pub struct DenseRows<'a> {
    data: &'a [u8],
    rows: usize,
    cols: usize,
    kind: DenseKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenseKind {
    F32,
    F16,
    BF16,
}

impl<'a> DenseRows<'a> {
    /// Panics if `data` is not `rows * cols` elements.
    pub fn new(data: &'a [u8], rows: usize, cols: usize, kind: DenseKind) -> Self {
        let size = if kind == DenseKind::F32 { 4 } else { 2 };
        assert_eq!(data.len(), rows * cols * size);
        Self { data, rows, cols, kind }
    }

    /// Elements, `[rows, cols]` and how the elements are stored.
    pub(super) fn parts(&self) -> (&'a [u8], [usize; 2], DenseKind) {
        (self.data, [self.rows, self.cols], self.kind)
    }
}

// SAFETY: the loops below step through 0..cols without gap or overlap.
unsafe impl Rows for DenseRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn plain(&self, row: usize) -> Option<&[f32]> {
        match self.kind {
            DenseKind::F32 => {
                super::cast::f32s(&self.data[row * self.cols * 4..(row + 1) * self.cols * 4])
            }
            _ => None,
        }
    }
    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K) {
        let whole = self.cols / 32 * 32;
        match self.kind {
            DenseKind::F32 => {
                let p = self.data.as_ptr().cast::<f32>().add(row * self.cols);
                for at in (0..whole).step_by(32) {
                    sink.pair(at, S::load(p.add(at)), S::load(p.add(at + 16)));
                }
                for at in whole..self.cols {
                    sink.one(at, p.add(at).read_unaligned());
                }
            }
            DenseKind::F16 => {
                let p = self.data.as_ptr().add(2 * row * self.cols);
                for at in (0..whole).step_by(32) {
                    sink.pair(at, S::load_f16(p.add(2 * at)), S::load_f16(p.add(2 * at + 32)));
                }
                for at in whole..self.cols {
                    let bits = p.cast::<u16>().add(at).read_unaligned();
                    sink.one(at, f16::from_bits(bits).to_f32_const());
                }
            }
            DenseKind::BF16 => {
                let p = self.data.as_ptr().add(2 * row * self.cols);
                for at in (0..whole).step_by(32) {
                    sink.pair(at, S::load_bf16(p.add(2 * at)), S::load_bf16(p.add(2 * at + 32)));
                }
                for at in whole..self.cols {
                    let bits = p.cast::<u16>().add(at).read_unaligned();
                    sink.one(at, bf16::from_bits(bits).to_f32_const());
                }
            }
        }
    }
}

struct Read<'a, R: Rows> {
    rows: &'a R,
    first: usize,
    out: &'a mut [f32],
}

impl<R: Rows> Task for Read<'_, R> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (i, out) in self.out.chunks_exact_mut(self.rows.cols()).enumerate() {
            self.rows.decode::<S, _>(self.first + i, &mut Store(out.as_mut_ptr()));
        }
    }
}

/// Writes the dense rows from `first` on into `out`, on this thread. Panics if rows are asked for
/// that do not exist.
pub fn read<R: Rows>(rows: &R, first: usize, out: &mut [f32]) {
    read_at(Level::best(), rows, first, out);
}

pub(super) fn read_at<R: Rows>(level: Level, rows: &R, first: usize, out: &mut [f32]) {
    let count = out.len() / rows.cols();
    assert!(first.checked_add(count).is_some_and(|end| end <= rows.rows()), "no such rows");
    simd::run(level, Read { rows, first, out });
}

/// Rows `range` times every token of `x`, into `y[token * stride + row]`.
struct Few<'a, R: Rows> {
    rows: &'a R,
    range: Range<usize>,
    x: &'a [f32],
    y: Shared<'a>,
    /// Room for a row, unless there is only one token.
    buffer: &'a mut [f32],
}

impl<R: Rows> Task for Few<'_, R> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (cols, stride) = (self.rows.cols(), self.rows.rows());
        if self.x.len() == cols {
            for row in self.range {
                let mut dot = Dot::<S>::new(self.x.as_ptr());
                self.rows.decode::<S, _>(row, &mut dot);
                self.y.set(row, dot.sum());
            }
            return;
        }
        // Decoding costs more than a product: decode once, into the first-level cache.
        for row in self.range {
            let dense = match self.rows.plain(row) {
                Some(dense) => dense,
                None => {
                    self.rows.decode::<S, _>(row, &mut Store(self.buffer.as_mut_ptr()));
                    &*self.buffer
                }
            };
            for (token, x) in self.x.chunks_exact(cols).enumerate() {
                self.y.set(token * stride + row, dot_slices::<S>(dense, x));
            }
        }
    }
}

/// Elements that are worth a thread of their own: some ten microseconds of work.
const GRAIN: usize = 1 << 17;

/// `y[t, o] = sum_i x[t, i] w[o, i]` for few tokens: each row is decoded and multiplied by one thread,
/// so that a result does not depend on how rows are split.
pub fn multiply_few<R: Rows>(rows: &R, x: &[f32], y: &mut [f32]) {
    multiply_few_at(Level::best(), rows, x, y);
}

pub(super) fn multiply_few_at<R: Rows>(level: Level, rows: &R, x: &[f32], y: &mut [f32]) {
    let cols = rows.cols();
    assert!(x.len().is_multiple_of(cols) && y.len() == x.len() / cols * rows.rows());
    let y = Shared::new(y);
    // With several tokens the products weigh more than the decoding.
    let grain = GRAIN / (cols * (x.len() / cols).max(1)) + 1;
    threads::for_ranges(rows.rows(), grain, |range| {
        // SAFETY of the writes in `Few`: ranges are disjoint, and so are the columns of y they set.
        threads::with_scratch(cols, |buffer| simd::run(level, Few { rows, range, x, y, buffer }));
    });
}

#[inline(always)]
unsafe fn dot_slices<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    let len = a.len().min(b.len());
    let (pa, pb) = (a.as_ptr(), b.as_ptr());
    let mut acc = [S::splat(0.0); 4];
    let mut at = 0;
    // Four independent sums hide the latency of the addition.
    while at + 64 <= len {
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = S::mul_add(S::load(pa.add(at + 16 * i)), S::load(pb.add(at + 16 * i)), *acc);
        }
        at += 64;
    }
    while at + 16 <= len {
        acc[0] = S::mul_add(S::load(pa.add(at)), S::load(pb.add(at)), acc[0]);
        at += 16;
    }
    let mut sum = S::sum(S::add(S::add(acc[0], acc[1]), S::add(acc[2], acc[3])));
    while at < len {
        sum += *pa.add(at) * *pb.add(at);
        at += 1;
    }
    sum
}

struct DotSlices<'a>(&'a [f32], &'a [f32]);

impl Task for DotSlices<'_> {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        dot_slices::<S>(self.0, self.1)
    }
}

/// Inner product of two slices of one length, on this thread.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    simd::run(Level::best(), DotSlices(a, b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_of_every_length_and_level() {
        for len in [0, 1, 15, 16, 17, 63, 64, 200] {
            let a: Vec<f32> = (0..len).map(|i| (i % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..len).map(|i| (i % 5) as f32).collect();
            let expected: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            for level in Level::available() {
                assert_eq!(simd::run(level, DotSlices(&a, &b)), expected, "{len} {level:?}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "no such rows")]
    fn rows_that_do_not_exist_are_refused() {
        let rows = DenseRows::new(&[0; 16], 2, 2, DenseKind::F32);
        read(&rows, 1, &mut [0.0; 4]);
    }
}
