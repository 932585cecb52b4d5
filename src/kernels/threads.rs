//! Splitting work over rayon's current pool, and scratch memory of the threads.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

/// Calls `work` with disjoint ranges that cover `0..count`, each at least `grain` long where `count`
/// allows. Runs on the caller's thread alone if there is too little to share. The ranges depend on
/// nothing but `count`, `grain` and the number of threads.
pub fn for_ranges(count: usize, grain: usize, work: impl Fn(Range<usize>) + Sync) {
    let threads = rayon::current_num_threads();
    // More parts than threads let a thread that was held up hand its rest to another.
    let parts = (count / grain.max(1)).min(if threads == 1 { 1 } else { 4 * threads });
    if parts <= 1 {
        if count > 0 {
            work(0..count);
        }
        return;
    }
    (0..parts).into_par_iter().with_max_len(1).for_each(|part| {
        work(part * count / parts..(part + 1) * count / parts);
    });
}

/// Calls `work` with disjoint runs of whole rows of a matrix and the index of each run's first row; as
/// [`for_ranges`] otherwise.
pub fn for_rows(
    matrix: &mut [f32],
    width: usize,
    grain: usize,
    work: impl Fn(usize, &mut [f32]) + Sync,
) {
    let shared = Shared::new(matrix);
    for_ranges(shared.len() / width, grain, |range| {
        // SAFETY: ranges are disjoint, so their rows are.
        let rows = unsafe { shared.slice(range.start * width..range.end * width) };
        work(range.start, rows);
    });
}

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `work` with `len` f32 elements of unspecified content, kept by the thread between calls.
pub fn with_scratch<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    // Taken out of the cell, not borrowed: inside `work` rayon may run another task of this kind on
    // this thread, which then gets a buffer of its own.
    let mut buffer = SCRATCH.take();
    if buffer.len() < len {
        buffer = vec![0.0; len];
    }
    let out = work(&mut buffer[..len]);
    SCRATCH.set(buffer);
    out
}

/// A slice that several threads write disjoint elements of.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    slice: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: access goes through `slice`, whose caller promises that ranges are disjoint.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: std::marker::PhantomData }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// # Safety
    /// No two live slices may overlap.
    pub(super) unsafe fn slice(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion; disjoint by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(range.start), range.end - range.start)
        }
    }

    /// # Safety
    /// No other thread may access element `at`.
    #[inline(always)]
    pub(super) unsafe fn set(&self, at: usize, value: f32) {
        debug_assert!(at < self.len);
        // SAFETY: the caller's promise.
        unsafe { self.start.add(at).write(value) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn ranges_cover_everything_once() {
        for (count, grain) in [(0, 4), (1, 4), (7, 1), (100, 3), (5, 100)] {
            let seen = Mutex::new(vec![0; count]);
            for_ranges(count, grain, |range| {
                for i in range {
                    seen.lock().unwrap()[i] += 1;
                }
            });
            assert!(seen.into_inner().unwrap().iter().all(|n| *n == 1), "{count} by {grain}");
        }
    }

    #[test]
    fn rows_are_visited_once_under_their_own_index() {
        let mut matrix = vec![0.0; 7 * 3];
        for_rows(&mut matrix, 3, 1, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(3).enumerate() {
                row.iter_mut().for_each(|v| *v += (first + i) as f32);
            }
        });
        assert!((0..21).all(|i| matrix[i] == (i / 3) as f32), "{matrix:?}");
    }

    #[test]
    fn nested_scratch_does_not_alias() {
        with_scratch(4, |a| {
            a.fill(1.0);
            with_scratch(8, |b| b.fill(2.0));
            assert_eq!(a, [1.0; 4]);
        });
    }
}
