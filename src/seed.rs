//! Named random streams: adding a step does not shift another's numbers.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// A place in the tree of random streams below a seed.
#[derive(Debug, Clone)]
pub struct Stream {
    path: String,
}

impl Stream {
    /// The root of `seed`.
    pub fn root(seed: u64) -> Self {
        Self { path: seed.to_string() }
    }

    /// The stream called `name` below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { path: format!("{}/{name}", self.path) }
    }

    /// Seed and names, from the root.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The generator of this stream; the same path gives the same numbers on every machine.
    pub fn rng(&self) -> ChaCha8Rng {
        ChaCha8Rng::from_seed(Sha256::digest(self.path.as_bytes()).into())
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn streams_are_stable_and_apart() {
        let a: u64 = Stream::root(7).child("step 2/init").rng().random();
        let b: u64 = Stream::root(7).child("step 2/init").rng().random();
        let c: u64 = Stream::root(7).child("step 3/init").rng().random();
        assert_eq!(a, b);
        assert_ne!(a, c);
    }
}
