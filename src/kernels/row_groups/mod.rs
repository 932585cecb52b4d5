//! Products with weights in which groups of consecutive rows share the list of kept columns.
//!
//! A group has 2 to 32 rows, so its values are vectors: for each kept column the rows' values lie side by
//! side. Few tokens of 8-bit values are bound by reading where groups keep all columns (56 GB/s at 1536 x 576, what the
//! machine gives); where they keep half, packing the activations takes a fourth of the time (40 GB/s). Many tokens are bound by arithmetic, at 13 to 17 % of the integer peak. The list becomes a bitmap when a weight is loaded: a product packs the activations that a group
//! keeps by it, and then reads values only. See [`float`] and [`int8`] for the two kinds of kernels.

// Every unsafe function here asks that the processor has the instructions of its name or of `S`, and that
// pointers are valid for what its comment says.
#![allow(unsafe_op_in_unsafe_fn)]

mod float;
mod int8;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod taps;
#[cfg(test)]
mod tests;

use half::bf16;

use super::dot::{Rows, Sink};
use super::product;
use super::simd::Simd;
use super::threads::Shared;

/// Columns that a dot product of 8-bit values may have: what an i32 surely holds.
pub const MAX_INT8_COLS: usize = 1 << 17;

/// Kept columns whose values lie together, by row, in 8-bit form.
pub const QUAD: usize = 4;

/// Which columns each group of rows keeps.
#[derive(Debug)]
pub struct Pattern {
    rows: usize,
    cols: usize,
    group: usize,
    /// Kept columns before each group, and of all.
    starts: Box<[usize]>,
    /// A bit a column, `words` words a group, as many bits set as the group keeps columns.
    masks: Box<[u64]>,
    words: usize,
}

impl Pattern {
    /// Rows that may share a list.
    pub const GROUPS: [usize; 5] = [2, 4, 8, 16, 32];

    /// `starts` counts the kept columns before each group and, last, of all; `columns` are the groups'
    /// kept columns, rising within a group. What does not fit is an error that says so.
    pub fn new(
        [rows, cols]: [usize; 2],
        group: usize,
        starts: Box<[usize]>,
        columns: impl ExactSizeIterator<Item = usize>,
    ) -> Result<Self, String> {
        if !Self::GROUPS.contains(&group) {
            return Err(format!("groups of {group} rows; take 2, 4, 8, 16 or 32"));
        }
        let (groups, words) = (rows.div_ceil(group), cols.div_ceil(64));
        let kept = columns.len();
        if starts.len() != groups + 1 || starts[0] != 0 || starts[groups] != kept {
            return Err(format!("starts do not lead from 0 to {kept} in {groups} groups"));
        }
        if kept.checked_mul(group).is_none() {
            return Err(format!("{kept} kept columns are absurd"));
        }
        if let Some(at) = (0..groups)
            .find(|&g| starts[g + 1].checked_sub(starts[g]).is_none_or(|kept| kept > cols))
        {
            return Err(format!("group {at} has less than no columns or more than {cols}"));
        }
        let mut masks = vec![0_u64; groups * words].into_boxed_slice();
        let mut columns = columns;
        for (g, mask) in masks.chunks_exact_mut(words.max(1)).enumerate() {
            let mut least = 0;
            for column in columns.by_ref().take(starts[g + 1] - starts[g]) {
                if column < least || column >= cols {
                    return Err(format!(
                        "column {column} where one in {least}..{cols} must follow (group {g})"
                    ));
                }
                mask[column / 64] |= 1 << (column % 64);
                least = column + 1;
            }
        }
        Ok(Self { rows, cols, group, starts, masks, words })
    }

    pub fn groups(&self) -> usize {
        self.starts.len() - 1
    }

    /// Rows of a whole group; the last one may have fewer.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Rows of group `g`.
    pub fn lanes(&self, g: usize) -> usize {
        self.group.min(self.rows - g * self.group)
    }

    /// Columns that group `g` keeps.
    pub fn kept(&self, g: usize) -> usize {
        self.starts[g + 1] - self.starts[g]
    }

    /// Stored values.
    pub fn values(&self) -> usize {
        let groups = self.groups();
        match groups.checked_sub(1) {
            Some(last) => self.starts[last] * self.group + self.kept(last) * self.lanes(last),
            None => 0,
        }
    }

    /// The kept columns of group `g`, rising.
    pub fn columns(&self, g: usize) -> impl Iterator<Item = usize> {
        self.mask(g).iter().enumerate().flat_map(|(i, &word)| Bits(word).map(move |b| 64 * i + b))
    }

    fn mask(&self, g: usize) -> &[u64] {
        &self.masks[g * self.words..(g + 1) * self.words]
    }

    /// Groups that are worth a thread of their own with `tokens`.
    fn grain(&self, tokens: usize) -> usize {
        const GRAIN: usize = 1 << 16;
        // Packing activations passes over all columns, whatever is kept.
        let group = self.values() / self.groups().max(1) + self.cols;
        GRAIN / (group * tokens).max(1) + 1
    }
}

/// Writes a tile of `R` rows and `P` vectors of places, of which there are `count`: row `r` of place `i` goes to
/// element `at + i * step + r`.
///
/// # Safety
/// The processor has the instructions; the elements exist and are written by nobody else.
#[inline(always)]
unsafe fn put<S: Simd, const R: usize, const P: usize>(
    acc: [[S::F; P]; R],
    y: Shared<'_>,
    (at, step): (usize, usize),
    count: usize,
) {
    if R == 8 {
        // Rows of up to two vectors fill a block that is turned around in registers.
        let row = |i: usize| if i / R < P { acc[i % R][i / R] } else { S::splat(0.0) };
        let turned = S::transpose(std::array::from_fn(row));
        for (i, vector) in turned.into_iter().enumerate().take(count) {
            let mut out = [0.0_f32; 16];
            S::store(out.as_mut_ptr(), vector);
            for (p, part) in out.chunks_exact(R).enumerate().take(P) {
                let place = 16 * p + i;
                if place < count {
                    let first = at + place * step;
                    y.slice(first..first + R).copy_from_slice(part);
                }
            }
        }
        return;
    }
    let mut out = [[[0.0_f32; 16]; P]; R];
    for (out, acc) in out.iter_mut().zip(acc) {
        for (out, acc) in out.iter_mut().zip(acc) {
            S::store(out.as_mut_ptr(), acc);
        }
    }
    for place in 0..(16 * P).min(count) {
        for (r, out) in out.iter().enumerate() {
            y.set(at + place * step + r, out[place / 16][place % 16]);
        }
    }
}

/// The places of the bits that are set, rising.
struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;
    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        let at = self.0.trailing_zeros() as usize;
        self.0 &= self.0.wrapping_sub(1);
        (at < 64).then_some(at)
    }
}

/// Stored values, group after group.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// `[kept][rows of the group]` little-endian f32.
    F32(&'a [u8]),
    /// The same as bf16.
    BF16(&'a [u8]),
    /// Signed bytes, `[kept / 4][rows of the group][4]`, then the rest of `r < 4` columns as
    /// `[rows of the group][r]`; a scale for each row of the weight, and the sum of each row's bytes.
    Int8 { values: &'a [u8], scales: &'a [f32], sums: &'a [i32] },
}

/// A weight as the kernels see it.
#[derive(Debug, Clone, Copy)]
pub struct RowGroups<'a> {
    pattern: &'a Pattern,
    values: Values<'a>,
}

impl<'a> RowGroups<'a> {
    /// Panics if the values are not as many as the pattern keeps.
    pub fn new(pattern: &'a Pattern, values: Values<'a>) -> Self {
        let wanted = pattern.values();
        match values {
            Values::F32(data) => assert_eq!(data.len(), 4 * wanted),
            Values::BF16(data) => assert_eq!(data.len(), 2 * wanted),
            Values::Int8 { values, scales, sums } => {
                assert!(pattern.cols <= MAX_INT8_COLS);
                assert_eq!(values.len(), wanted);
                assert!(scales.len() == pattern.rows && sums.len() == pattern.rows);
            }
        }
        Self { pattern, values }
    }

    /// `y[t, o] = sum_i x[t, i] w[o, i]`, overwritten. 8-bit values meet activations rounded to 8 bits, with
    /// one scale a token, and the sums are exact. Panics if sizes do not fit.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        let (rows, cols) = (self.pattern.rows, self.pattern.cols);
        let tokens = x.len() / cols;
        assert!(x.len() == tokens * cols && y.len() == tokens * rows, "sizes of a product");
        if tokens == 0 {
            return;
        }
        match self.values {
            Values::Int8 { values, scales, sums } => {
                int8::multiply(int8::Path::best(), self.pattern, values, scales, sums, x, y);
            }
            Values::F32(_) | Values::BF16(_) => {
                float::multiply(super::simd::Level::best(), self, x, y);
            }
        }
    }

    /// `dx[t, i] = sum_o g[t, o] w[o, i]`, overwritten; activations are not rounded.
    pub fn multiply_transposed(&self, g: &[f32], dx: &mut [f32]) {
        product::multiply_transposed(self, g, dx);
    }

    /// The stored value of row `lane` of group `g` in its `k`-th kept column.
    fn value(&self, g: usize, lane: usize, k: usize) -> f32 {
        let (lanes, kept) = (self.pattern.lanes(g), self.pattern.kept(g));
        let start = self.pattern.starts[g] * self.pattern.group;
        let at = start + k * lanes + lane;
        match self.values {
            Values::F32(data) => f32::from_le_bytes([0, 1, 2, 3].map(|i| data[4 * at + i])),
            Values::BF16(data) => {
                bf16::from_le_bytes([data[2 * at], data[2 * at + 1]]).to_f32_const()
            }
            Values::Int8 { values, scales, .. } => {
                let at = start + quad_place(lanes, kept, lane, k);
                f32::from(values[at] as i8) * scales[g * self.pattern.group + lane]
            }
        }
    }
}

/// The sum of each row's 8-bit values. Panics if they are not as many as the pattern keeps.
pub fn row_sums(pattern: &Pattern, values: &[u8]) -> Vec<i32> {
    assert_eq!(values.len(), pattern.values());
    let mut sums = vec![0_i32; pattern.rows];
    for (g, sums) in sums.chunks_mut(pattern.group).enumerate() {
        let (lanes, kept) = (sums.len(), pattern.kept(g));
        let values = &values[pattern.starts[g] * pattern.group..][..kept * lanes];
        for quad in values.chunks(QUAD * lanes) {
            for (row, sum) in quad.chunks_exact(quad.len() / lanes).zip(&mut *sums) {
                *sum += row.iter().map(|v| i32::from(*v as i8)).sum::<i32>();
            }
        }
    }
    sums
}

/// Where the value of row `lane` in the `k`-th kept column stands among a group's 8-bit values.
pub fn quad_place(lanes: usize, kept: usize, lane: usize, k: usize) -> usize {
    let first = k / QUAD * QUAD;
    first * lanes + lane * QUAD.min(kept - first) + (k - first)
}

// SAFETY: kept columns rise, so the loop gives 0..cols once each.
unsafe impl Rows for RowGroups<'_> {
    fn rows(&self) -> usize {
        self.pattern.rows
    }
    fn cols(&self) -> usize {
        self.pattern.cols
    }
    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(&self, row: usize, sink: &mut K) {
        let (g, lane) = (row / self.pattern.group, row % self.pattern.group);
        let mut next = 0;
        for (k, column) in self.pattern.columns(g).enumerate() {
            for zero in next..column {
                sink.one(zero, 0.0);
            }
            sink.one(column, self.value(g, lane, k));
            next = column + 1;
        }
        for zero in next..self.pattern.cols {
            sink.one(zero, 0.0);
        }
    }
}
