//! For tests: counts the allocations of each thread, and keeps the size of its largest.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// Allocations and reallocations that this thread has made so far.
pub fn count() -> u64 {
    COUNT.get()
}

/// Bytes of the largest allocation that this thread makes during `work`.
pub fn largest(work: impl FnOnce()) -> usize {
    LARGEST.set(0);
    work();
    LARGEST.get()
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn one_more(size: usize) {
    // A thread that ends may still free and allocate.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        one_more(layout.size());
        // SAFETY: the caller keeps the contract of this function, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        one_more(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        one_more(size);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[test]
fn allocations_of_this_thread_are_counted() {
    let before = count();
    let mut list = std::hint::black_box(Vec::with_capacity(1));
    assert_eq!(count(), before + 1);
    list.push(1_u8);
    assert_eq!(count(), before + 1);
    list.reserve_exact(100);
    assert_eq!(count(), before + 2);
    std::thread::spawn(|| assert_eq!(std::hint::black_box(vec![1; 9]).len(), 9)).join().unwrap();
    let after = count();
    drop(list);
    assert_eq!(count(), after);
    let sizes =
        || drop((std::hint::black_box(vec![0_u8; 300]), std::hint::black_box(vec![0_u8; 7])));
    assert_eq!(largest(sizes), 300);
}
