//! Memory of activations and gradients: taken from a pool and returned to it, because fresh pages cost
//! as much as writing them.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::kernels::training::halves;

/// Where buffers come from. Clones share the memory.
#[derive(Clone, Default)]
pub struct Pool(Arc<Mutex<Free>>);

#[derive(Default)]
struct Free {
    /// By their length.
    buffers: BTreeMap<usize, Vec<Vec<f32>>>,
    /// Elements that are in use, the most that ever were, and those that wait.
    live: usize,
    most: usize,
    waiting: usize,
}

impl Free {
    /// Lets go of the largest buffer that waits; whether there was one.
    fn drop_largest(&mut self) -> bool {
        let Some(mut entry) = self.buffers.last_entry() else { return false };
        let size = *entry.key();
        entry.get_mut().pop();
        if entry.get().is_empty() {
            entry.remove();
        }
        self.waiting -= size;
        true
    }
}

impl Pool {
    /// `len` elements of unspecified content.
    pub fn take(&self, len: usize) -> Buffer {
        let mut free = self.lock();
        // The smallest that is large enough, unless it is far too large.
        let fitting = free.buffers.range(len..=len.saturating_mul(2)).next().map(|(size, _)| *size);
        let data = match fitting {
            Some(size) => {
                free.waiting -= size;
                let of_size = free.buffers.get_mut(&size);
                let taken = of_size.and_then(|list| list.pop().map(|data| (data, list.is_empty())));
                if let Some((_, true)) = taken {
                    free.buffers.remove(&size);
                }
                taken.map_or_else(|| vec![0.0; len], |(data, _)| data)
            }
            None => vec![0.0; len],
        };
        free.live += data.len();
        free.most = free.most.max(free.live);
        while free.live + free.waiting > free.most && free.drop_largest() {}
        drop(free);
        Buffer { data, len, pool: self.clone() }
    }

    /// `len` zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// `x` rounded to bf16, in half of its memory.
    pub fn halves(&self, x: &[f32]) -> Halves {
        let mut words = self.take(halves::words(x.len()));
        halves::narrow(x, &mut words);
        Halves { words, len: x.len() }
    }

    /// Bytes in use.
    pub fn live_bytes(&self) -> u64 {
        bytes(self.lock().live)
    }

    /// The most bytes that were in use at once; what the pool holds never exceeds that.
    pub fn peak_bytes(&self) -> u64 {
        bytes(self.lock().most)
    }

    fn give_back(&self, data: Vec<f32>) {
        let size = data.len();
        let mut free = self.lock();
        free.live -= size;
        if size > 0 && free.live + free.waiting + size <= free.most {
            free.waiting += size;
            free.buffers.entry(size).or_default().push(data);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bytes(elements: usize) -> u64 {
    elements as u64 * size_of::<f32>() as u64
}

/// Elements that return to their pool when dropped.
pub struct Buffer {
    data: Vec<f32>,
    len: usize,
    pool: Pool,
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.data));
    }
}

/// Numbers rounded to bf16, in half of their memory.
pub struct Halves {
    words: Buffer,
    len: usize,
}

impl Halves {
    /// The numbers in f32.
    pub fn widened(&self) -> Buffer {
        let mut out = self.words.pool.take(self.len);
        halves::widen(&self.words, &mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_and_never_exceeds_the_peak() {
        let pool = Pool::default();
        let (a, b) = (pool.zeros(100), pool.zeros(50));
        assert_eq!((pool.live_bytes(), pool.peak_bytes()), (600, 600));
        let place = a.as_ptr();
        drop(a);
        assert_eq!(pool.live_bytes(), 200);
        // A smaller one takes the same memory, one too small does not.
        let c = pool.take(60);
        assert_eq!((c.as_ptr(), c.len()), (place, 60));
        drop(c);
        let d = pool.take(10);
        assert_ne!(d.as_ptr(), place);
        // 50 and 10 are in use; with 100 that wait it would have been more than ever was in use.
        assert_eq!((pool.live_bytes(), pool.lock().waiting), (240, 0));
        drop((b, d));
        assert_eq!((pool.live_bytes(), pool.lock().waiting), (0, 60));
        assert_eq!(pool.peak_bytes(), 600);
    }

    #[test]
    fn halves_take_half_the_memory() {
        let pool = Pool::default();
        let halves = pool.halves(&[1.0, -2.5, 1.0 + 1.0 / 512.0]);
        assert_eq!(pool.live_bytes(), 8);
        assert_eq!(halves.widened()[..], [1.0, -2.5, 1.0]);
    }
}
