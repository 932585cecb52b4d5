//! How the process keeps memory that was freed.

/// Bytes from which a block of memory is given back to the system as soon as it is freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: libc::c_int = 1 << 20;

/// Makes the allocator give large blocks back when they are freed. By default glibc raises that size to
/// 32 MiB at the first large block that is freed, and then keeps holes of the size of weights. Does
/// nothing where the allocator is another one.
pub fn give_back_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: both calls only set numbers of the allocator, and may come at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
    }
}
