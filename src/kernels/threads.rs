//! Splitting work over a team of threads, and scratch memory of the threads.
//!
//! The team waits for the next piece of work by spinning for a moment before it goes to sleep, because
//! a token takes some hundred pieces of work of a few microseconds each: waking a thread costs as much.

use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::thread::Thread;

/// Looks for new work before a member of the team goes to sleep: some hundred microseconds.
const SPINS: u32 = 4000;

/// Calls `work` with disjoint ranges that cover `0..count`, each at least `grain` long where `count`
/// allows. Runs on the caller's thread alone if there is too little to share or the team is at work
/// for another caller. The ranges depend on nothing but `count`, `grain` and the number of threads.
pub fn for_ranges(count: usize, grain: usize, work: impl Fn(Range<usize>) + Sync) {
    let threads = threads();
    // More parts than threads let a thread that was held up leave its rest to another.
    let parts = (count / grain.max(1)).min(if threads == 1 { 1 } else { 4 * threads });
    // A part beyond a whole number for each thread would be done by one while all others wait.
    let parts = if parts > threads { parts / threads * threads } else { parts };
    if parts <= 1 {
        if count > 0 {
            work(0..count);
        }
        return;
    }
    share(parts, &|part| work(part * count / parts..(part + 1) * count / parts));
}

/// Calls `f` with the index and the rows of two matrices of equally many rows, at least `grain` rows a
/// thread.
pub fn for_row_pairs(
    a: &mut [f32],
    a_width: usize,
    b: &mut [f32],
    b_width: usize,
    grain: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    let rows = a.len() / a_width;
    assert!(a.len() == rows * a_width && b.len() == rows * b_width, "rows do not fit");
    let (a, b) = (Shared::new(a), Shared::new(b));
    for_ranges(rows, grain, |range| {
        // SAFETY: ranges are disjoint.
        let own = unsafe { a.slice(range.start * a_width..range.end * a_width) };
        // SAFETY: as above.
        let other = unsafe { b.slice(range.start * b_width..range.end * b_width) };
        let rows = own.chunks_exact_mut(a_width).zip(other.chunks_exact_mut(b_width));
        range.zip(rows).for_each(|(i, (a, b))| f(i, a, b));
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

/// Calls `work` with every number below `parts`, on whichever thread of the team is free.
pub fn share(parts: usize, work: &(dyn Fn(usize) + Sync)) {
    if parts > 1 && threads() > 1 && !BUSY.get() {
        match team().run.try_lock() {
            Ok(turn) => {
                team().lead(parts, work);
                drop(turn);
                return;
            }
            Err(TryLockError::Poisoned(turn)) => {
                team().run.clear_poison();
                drop(turn);
            }
            Err(TryLockError::WouldBlock) => {}
        }
    }
    (0..parts).for_each(work);
}

/// Sends the members of the team to sleep until there is work again, without waiting for it a while: the
/// processors are for those who wait for what was computed.
pub fn rest() {
    let team = team();
    team.rest.store(number(team.gate.load(Ordering::Acquire)), Ordering::Release);
}

/// Threads that share work, the caller included: as many as rayon's global pool has.
pub fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(rayon::current_num_threads)
}

thread_local! {
    /// Set while this thread does a part of shared work.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// The members beside the caller, and the work that is shared out.
struct Team {
    /// Held by the caller whose work it is.
    run: Mutex<()>,
    /// Number of the work, whether it may be joined, and how many members have joined it. Members that
    /// come too late are not waited for: on a busy machine they may not run for a long while.
    gate: AtomicU64,
    /// Number of the work after which nobody looks for more.
    rest: AtomicU64,
    /// The work: valid while it may be joined and until all who joined have left.
    task: Task,
    parts: AtomicUsize,
    next: AtomicUsize,
    panicked: AtomicBool,
    members: OnceLock<Vec<Member>>,
}

/// The bit of [`Team::gate`] that lets members join; the bits below count them, those above number the
/// work.
const OPEN: u64 = 1 << 16;

fn number(gate: u64) -> u64 {
    gate / (2 * OPEN)
}

struct Member {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

/// A function of the leader's stack.
struct Task(UnsafeCell<Option<*const (dyn Fn(usize) + Sync)>>);

// SAFETY: the leader writes while nobody has joined; members read while they have.
unsafe impl Sync for Task {}
// SAFETY: the function is `Sync`.
unsafe impl Send for Task {}

fn team() -> &'static Team {
    static TEAM: Team = Team {
        run: Mutex::new(()),
        gate: AtomicU64::new(0),
        rest: AtomicU64::new(0),
        task: Task(UnsafeCell::new(None)),
        parts: AtomicUsize::new(0),
        next: AtomicUsize::new(0),
        panicked: AtomicBool::new(false),
        members: OnceLock::new(),
    };
    // A thread that cannot be had is done without.
    TEAM.members.get_or_init(|| (1..threads()).filter_map(|i| member(&TEAM, i).ok()).collect());
    &TEAM
}

fn member(team: &'static Team, index: usize) -> std::io::Result<Member> {
    let asleep = Arc::new(AtomicBool::new(false));
    let own = asleep.clone();
    let thread = std::thread::Builder::new().name(format!("kernels {index}"));
    let handle = thread.spawn(move || team.follow(&own))?;
    Ok(Member { thread: handle.thread().clone(), asleep })
}

impl Team {
    /// Shares out a piece of work and returns when all of it is done. `run` is held by the caller.
    fn lead(&self, parts: usize, work: &(dyn Fn(usize) + Sync)) {
        let members = self.members.get().map_or(&[][..], Vec::as_slice);
        // SAFETY: only the lifetime changes; the function is used by those who have joined, and they are
        // waited for before this call returns or unwinds.
        let task: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
        // SAFETY: the gate is closed and nobody is inside.
        unsafe { *self.task.0.get() = Some(task) };
        self.parts.store(parts, Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        let new = number(self.gate.load(Ordering::Relaxed)) + 1;
        self.gate.store((2 * new + 1) * OPEN, Ordering::Release);
        // The order of this and a member's falling asleep: one of the two sees the other.
        fence(Ordering::SeqCst);
        for member in members {
            if member.asleep.load(Ordering::Relaxed) {
                member.thread.unpark();
            }
        }
        // Closes the gate also when the leader's own part panics.
        let _wait = Wait(self);
        BUSY.set(true);
        let _free = Free;
        self.parts(work);
    }

    /// Does parts until none is left.
    fn parts(&self, work: &(dyn Fn(usize) + Sync)) {
        let parts = self.parts.load(Ordering::Relaxed);
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                return;
            }
            work(part);
        }
    }

    /// The life of a member.
    fn follow(&self, asleep: &AtomicBool) {
        BUSY.set(true);
        let mut seen = 0;
        loop {
            let mut spins = 0;
            let gate = loop {
                let gate = self.gate.load(Ordering::Acquire);
                if number(gate) != seen {
                    break gate;
                }
                if spins < SPINS && self.rest.load(Ordering::Relaxed) != seen {
                    spins += 1;
                    std::hint::spin_loop();
                    continue;
                }
                asleep.store(true, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if number(self.gate.load(Ordering::Acquire)) == seen {
                    std::thread::park();
                }
                asleep.store(false, Ordering::Relaxed);
            };
            if gate & OPEN == 0 {
                seen = number(gate);
                continue;
            }
            let (success, failure) = (Ordering::Acquire, Ordering::Relaxed);
            if self.gate.compare_exchange(gate, gate + 1, success, failure).is_err() {
                continue;
            }
            seen = number(gate);
            // SAFETY: the leader has set the task before it opened the gate, and waits for those inside.
            let task = unsafe { (*self.task.0.get()).map(|task| &*task) };
            if let Some(task) = task {
                let parts = std::panic::AssertUnwindSafe(|| self.parts(task));
                if std::panic::catch_unwind(parts).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.gate.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Closes the gate and waits for the members inside when dropped.
struct Wait<'a>(&'a Team);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut inside = self.0.gate.fetch_and(!OPEN, Ordering::AcqRel) & (OPEN - 1);
        let mut spins = 0_u32;
        while inside > 0 {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(SPINS) {
                // More threads than processors: let the member run.
                std::thread::yield_now();
            }
            std::hint::spin_loop();
            inside = self.0.gate.load(Ordering::Acquire) & (OPEN - 1);
        }
        if self.0.panicked.swap(false, Ordering::Relaxed) && !std::thread::panicking() {
            panic!("a part of shared work has panicked");
        }
    }
}

/// Marks the thread as free when dropped.
struct Free;

impl Drop for Free {
    fn drop(&mut self) {
        BUSY.set(false);
    }
}

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `work` with `len` f32 elements of unspecified content, kept by the thread between calls.
pub fn with_scratch<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    // Taken out of the cell, not borrowed: inside `work` another task of this kind may run on this
    // thread, which then gets a buffer of its own.
    let mut buffer = SCRATCH.take();
    if buffer.len() < len {
        buffer = vec![0.0; len];
    }
    let out = work(&mut buffer[..len]);
    SCRATCH.set(buffer);
    out
}

/// A slice that several threads write disjoint elements of.
pub(super) struct Shared<'a, T = f32> {
    start: *mut T,
    len: usize,
    slice: std::marker::PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<'_, T> {}

// SAFETY: access goes through `slice` and `set`, whose callers promise that it is disjoint.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: std::marker::PhantomData }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// # Safety
    /// No two live slices may overlap.
    pub(super) unsafe fn slice(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion; disjoint by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(range.start), range.end - range.start)
        }
    }

    /// Where element `at` is, for blocks that are no slice. Whoever writes there promises what callers of
    /// `slice` do.
    #[inline(always)]
    pub(super) fn at(&self, at: usize) -> *mut T {
        assert!(at < self.len);
        self.start.wrapping_add(at)
    }

    /// # Safety
    /// No other thread may access element `at`.
    #[inline(always)]
    pub(super) unsafe fn set(&self, at: usize, value: T) {
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
    fn work_inside_work_and_of_many_callers_is_done() {
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        share(3, &|a| {
                            share(2, &|b| {
                                sum.fetch_add(2 * a + b + 1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 500 * 21);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_team_at_work() {
        for at in 0..8 {
            let work = |part: usize| assert_ne!(part, at, "part");
            let outcome = std::panic::catch_unwind(|| share(8, &work));
            assert!(outcome.is_err());
            let done = AtomicUsize::new(0);
            share(8, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn who_rests_sleeps_before_long() {
        // Other tests give the team work: then it is tried again.
        let asleep = || {
            share(4, &|_| ());
            rest();
            for _ in 0..200 {
                let members = team().members.get().map_or(&[][..], Vec::as_slice);
                if members.iter().all(|member| member.asleep.load(Ordering::Relaxed)) {
                    return true;
                }
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
            false
        };
        assert!((0..100).any(|_| asleep()));
    }

    #[test]
    fn sleepers_wake_up() {
        for round in 0..40 {
            match round % 2 {
                0 => std::thread::sleep(std::time::Duration::from_millis(2)),
                _ => rest(),
            }
            let done = AtomicUsize::new(0);
            share(16, &|_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 16);
        }
    }

    #[test]
    fn rows_are_visited_in_pairs() {
        let (mut a, mut b) = (vec![0.0; 3 * 50], vec![0.0; 2 * 50]);
        for_row_pairs(&mut a, 3, &mut b, 2, 4, |i, a, b| {
            a.fill(i as f32);
            b.fill(-(i as f32));
        });
        assert!(a.iter().enumerate().all(|(i, v)| *v == (i / 3) as f32));
        assert!(b.iter().enumerate().all(|(i, v)| *v == -((i / 2) as f32)));
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
