//! Products of a few query rows with keys and values as they are stored. Every element is read and
//! converted once for up to four rows; keys of a page are in the first cache when the next four come.

use half::f16;

use super::{Elements, Rows, TILE};
use crate::kernels::simd::{Level, Simd, Task, run};

/// f32 of a vector.
const WIDTH: usize = 16;

/// Elements of one kind that a vector is made of.
trait Load: Copy {
    /// # Safety
    /// As for [`Simd`]; `at .. at + 16` are elements.
    unsafe fn vector<S: Simd>(self, at: usize) -> S::F;

    /// # Safety
    /// `at` is an element.
    unsafe fn one(self, at: usize) -> f32;

    /// What the elements of a row are multiplied with.
    ///
    /// # Safety
    /// `row` is a row.
    unsafe fn scale(self, row: usize) -> f32;
}

#[derive(Clone, Copy)]
struct Floats(*const f32);

impl Load for Floats {
    #[inline(always)]
    unsafe fn vector<S: Simd>(self, at: usize) -> S::F {
        // SAFETY: the caller's promise, here and below.
        unsafe { S::load(self.0.add(at)) }
    }
    #[inline(always)]
    unsafe fn one(self, at: usize) -> f32 {
        // SAFETY: as above.
        unsafe { *self.0.add(at) }
    }
    #[inline(always)]
    unsafe fn scale(self, _: usize) -> f32 {
        1.0
    }
}

#[derive(Clone, Copy)]
struct Halves(*const f16);

impl Load for Halves {
    #[inline(always)]
    unsafe fn vector<S: Simd>(self, at: usize) -> S::F {
        // SAFETY: as above.
        unsafe { S::load_f16(self.0.add(at).cast()) }
    }
    #[inline(always)]
    unsafe fn one(self, at: usize) -> f32 {
        // SAFETY: as above.
        unsafe { *self.0.add(at) }.to_f32()
    }
    #[inline(always)]
    unsafe fn scale(self, _: usize) -> f32 {
        1.0
    }
}

#[derive(Clone, Copy)]
struct Codes(*const i8, *const f32);

impl Load for Codes {
    #[inline(always)]
    unsafe fn vector<S: Simd>(self, at: usize) -> S::F {
        // SAFETY: as above.
        unsafe { S::signed(S::bytes(self.0.add(at).cast())) }
    }
    #[inline(always)]
    unsafe fn one(self, at: usize) -> f32 {
        // SAFETY: as above.
        f32::from(unsafe { *self.0.add(at) })
    }
    #[inline(always)]
    unsafe fn scale(self, row: usize) -> f32 {
        // SAFETY: as above.
        unsafe { *self.1.add(row) }
    }
}

/// Calls `$body` with `$load` standing for the elements of `$rows`, of which `$count` rows of `$dim`
/// must be there.
macro_rules! with_elements {
    ($rows:expr, $count:expr, $dim:expr, |$load:ident| $body:expr) => {{
        let need = ($count - 1) * $rows.stride + $dim;
        match $rows.data {
            Elements::F32(data) => {
                assert!(data.len() >= need, "keys or values are missing");
                let $load = Floats(data.as_ptr());
                $body
            }
            Elements::F16(data) => {
                assert!(data.len() >= need, "keys or values are missing");
                let $load = Halves(data.as_ptr());
                $body
            }
            Elements::Q8 { codes, scales } => {
                assert!(codes.len() >= need && scales.len() >= $count, "codes are missing");
                let $load = Codes(codes.as_ptr(), scales.as_ptr());
                $body
            }
        }
    }};
}

/// `scores[r, j] = q[r] . keys[j]` for the first `count` keys; rows of scores are `TILE` apart.
pub(super) fn scores(q: &[f32], keys: Rows<'_>, count: usize, dim: usize, scores: &mut [f32]) {
    let rows = q.len() / dim;
    if rows == 0 || count == 0 {
        return;
    }
    assert!(scores.len() >= (rows - 1) * TILE + count, "the scores do not fit");
    with_elements!(keys, count, dim, |load| run(
        Level::best(),
        Scores { q, load, stride: keys.stride, count, dim, scores }
    ));
}

struct Scores<'a, L> {
    q: &'a [f32],
    load: L,
    stride: usize,
    count: usize,
    dim: usize,
    scores: &'a mut [f32],
}

impl<L: Load> Task for Scores<'_, L> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.q.len() / self.dim;
        let mut row = 0;
        while row < rows {
            // SAFETY: sizes were checked by `scores`.
            let (q, out) = unsafe {
                (self.q.as_ptr().add(row * self.dim), self.scores.as_mut_ptr().add(row * TILE))
            };
            let Self { load, stride, count, dim, .. } = self;
            // SAFETY: as above.
            unsafe {
                match rows - row {
                    1 => scores_of::<S, L, 1>(q, load, stride, count, dim, out),
                    2 => scores_of::<S, L, 2>(q, load, stride, count, dim, out),
                    3 => scores_of::<S, L, 3>(q, load, stride, count, dim, out),
                    _ => scores_of::<S, L, 4>(q, load, stride, count, dim, out),
                }
            }
            row += 4;
        }
    }
}

/// Scores of `R` rows, two keys at a time.
#[inline(always)]
unsafe fn scores_of<S: Simd, L: Load, const R: usize>(
    q: *const f32,
    load: L,
    stride: usize,
    count: usize,
    dim: usize,
    out: *mut f32,
) {
    let mut j = 0;
    // SAFETY: sizes were checked by `scores`.
    unsafe {
        while j + 2 <= count {
            keys_at::<S, L, R, 2>(q, load, stride, j, dim, out);
            j += 2;
        }
        if j < count {
            keys_at::<S, L, R, 1>(q, load, stride, j, dim, out);
        }
    }
}

#[inline(always)]
unsafe fn keys_at<S: Simd, L: Load, const R: usize, const K: usize>(
    q: *const f32,
    load: L,
    stride: usize,
    j: usize,
    dim: usize,
    out: *mut f32,
) {
    let whole = dim / WIDTH * WIDTH;
    // SAFETY: sizes were checked by `scores`.
    unsafe {
        let mut sums = [[S::splat(0.0); K]; R];
        let mut c = 0;
        while c < whole {
            let mut keys = [S::splat(0.0); K];
            for (k, key) in keys.iter_mut().enumerate() {
                *key = load.vector::<S>((j + k) * stride + c);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let q = S::load(q.add(r * dim + c));
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = S::mul_add(q, key, *sum);
                }
            }
            c += WIDTH;
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (k, sum) in sums.into_iter().enumerate() {
                let mut sum = S::sum(sum);
                for c in whole..dim {
                    sum += *q.add(r * dim + c) * load.one((j + k) * stride + c);
                }
                *out.add(r * TILE + j + k) = sum * load.scale(j + k);
            }
        }
    }
}

/// `sums[r] += sum_j weights[r, j] values[j]` over the first `count` values; rows of weights are `TILE`
/// apart.
pub(super) fn add_values(
    weights: &[f32],
    values: Rows<'_>,
    count: usize,
    dim: usize,
    sums: &mut [f32],
) {
    let rows = sums.len() / dim;
    if rows == 0 || count == 0 {
        return;
    }
    assert!(weights.len() >= (rows - 1) * TILE + count, "weights are missing");
    with_elements!(values, count, dim, |load| run(
        Level::best(),
        Values { weights, load, stride: values.stride, count, dim, sums }
    ));
}

struct Values<'a, L> {
    weights: &'a [f32],
    load: L,
    stride: usize,
    count: usize,
    dim: usize,
    sums: &'a mut [f32],
}

impl<L: Load> Task for Values<'_, L> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.sums.len() / self.dim;
        let mut row = 0;
        while row < rows {
            // SAFETY: sizes were checked by `add_values`.
            let (weights, out) = unsafe {
                (self.weights.as_ptr().add(row * TILE), self.sums.as_mut_ptr().add(row * self.dim))
            };
            let Self { load, stride, count, dim, .. } = self;
            // SAFETY: as above.
            unsafe {
                match rows - row {
                    1 => values_of::<S, L, 1>(weights, load, stride, count, dim, out),
                    2 => values_of::<S, L, 2>(weights, load, stride, count, dim, out),
                    3 => values_of::<S, L, 3>(weights, load, stride, count, dim, out),
                    _ => values_of::<S, L, 4>(weights, load, stride, count, dim, out),
                }
            }
            row += 4;
        }
    }
}

/// Sums of `R` rows: a block of channels stays in registers over all values.
#[inline(always)]
unsafe fn values_of<S: Simd, L: Load, const R: usize>(
    weights: *const f32,
    load: L,
    stride: usize,
    count: usize,
    dim: usize,
    out: *mut f32,
) {
    let mut c = 0;
    // SAFETY: sizes were checked by `add_values`.
    unsafe {
        while c + 4 * WIDTH <= dim {
            channels_at::<S, L, R, 4>(weights, load, stride, count, dim, c, out);
            c += 4 * WIDTH;
        }
        while c + WIDTH <= dim {
            channels_at::<S, L, R, 1>(weights, load, stride, count, dim, c, out);
            c += WIDTH;
        }
        for r in 0..R {
            for c in c..dim {
                let mut sum = *out.add(r * dim + c);
                for j in 0..count {
                    sum += *weights.add(r * TILE + j) * load.scale(j) * load.one(j * stride + c);
                }
                *out.add(r * dim + c) = sum;
            }
        }
    }
}

#[inline(always)]
unsafe fn channels_at<S: Simd, L: Load, const R: usize, const W: usize>(
    weights: *const f32,
    load: L,
    stride: usize,
    count: usize,
    dim: usize,
    c: usize,
    out: *mut f32,
) {
    // SAFETY: sizes were checked by `add_values`.
    unsafe {
        let mut sums = [[S::splat(0.0); W]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (w, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(out.add(r * dim + c + w * WIDTH));
            }
        }
        for j in 0..count {
            let scale = load.scale(j);
            let mut values = [S::splat(0.0); W];
            for (w, value) in values.iter_mut().enumerate() {
                *value = load.vector::<S>(j * stride + c + w * WIDTH);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(r * TILE + j) * scale);
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = S::mul_add(weight, value, *sum);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (w, sum) in sums.into_iter().enumerate() {
                S::store(out.add(r * dim + c + w * WIDTH), sum);
            }
        }
    }
}

/// The first `count` rows as f32, `[count, dim]`.
pub(super) fn read(rows: Rows<'_>, count: usize, dim: usize, out: &mut [f32]) {
    if count == 0 {
        return;
    }
    assert!(out.len() >= count * dim, "the rows do not fit");
    with_elements!(rows, count, dim, |load| run(
        Level::best(),
        Read { load, stride: rows.stride, count, dim, out }
    ));
}

struct Read<'a, L> {
    load: L,
    stride: usize,
    count: usize,
    dim: usize,
    out: &'a mut [f32],
}

impl<L: Load> Task for Read<'_, L> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { load, stride, count, dim, out } = self;
        let whole = dim / WIDTH * WIDTH;
        for j in 0..count {
            // SAFETY: sizes were checked by `read`.
            unsafe {
                let scale = load.scale(j);
                let out = out.as_mut_ptr().add(j * dim);
                let mut c = 0;
                while c < whole {
                    let v = load.vector::<S>(j * stride + c);
                    S::store(out.add(c), S::mul(v, S::splat(scale)));
                    c += WIDTH;
                }
                for c in whole..dim {
                    *out.add(c) = load.one(j * stride + c) * scale;
                }
            }
        }
    }
}
