//! Which adapters are in memory: loaded at their first request, dropped when others need the room.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::head::Head;
use crate::error::{Error, Reason, Result};
use crate::models::{decoder, encoder};

/// An adapter in memory; cheap to clone.
#[derive(Debug, Clone)]
pub enum Held {
    Decoder(Arc<decoder::plan::adapters::Fitted>),
    Encoder(Arc<Reading>),
}

/// An adapter of an encoder.
#[derive(Debug)]
pub struct Reading {
    /// None of a head alone.
    pub fitted: Option<Arc<encoder::plan::adapters::Fitted>>,
    pub head: Option<Arc<Head>>,
}

impl Held {
    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Decoder(fitted) => fitted.bytes(),
            Self::Encoder(reading) => {
                reading.fitted.as_ref().map_or(0, |fitted| fitted.bytes())
                    + reading.head.as_ref().map_or(0, |head| head.bytes())
            }
        }
    }

    /// Whether a request holds it: dropping it here would free nothing.
    fn busy(&self) -> bool {
        match self {
            Self::Decoder(fitted) => Arc::strong_count(fitted) > 1,
            Self::Encoder(reading) => {
                Arc::strong_count(reading) > 1
                    || reading.fitted.as_ref().is_some_and(|f| Arc::strong_count(f) > 1)
                    || reading.head.as_ref().is_some_and(|h| Arc::strong_count(h) > 1)
            }
        }
    }
}

/// The loaded adapters, by the digest of their content, with that of the version where they are made ready
/// for one (`digest@version`).
pub struct Adapters {
    max_bytes: u64,
    /// One load at a time, as for models.
    loading: tokio::sync::Mutex<()>,
    loaded: Mutex<BTreeMap<String, Loaded>>,
}

struct Loaded {
    adapter: Held,
    used: Instant,
}

/// What is loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    pub adapters: usize,
    pub resident_bytes: u64,
}

impl Adapters {
    /// Room for adapters of `max_bytes` together.
    pub fn new(max_bytes: u64) -> Self {
        Self { max_bytes, loading: tokio::sync::Mutex::default(), loaded: Mutex::default() }
    }

    /// The adapter under this key, read by `open` if it is not there; `bytes` is what it will take. Those that no request holds and that were not used for longest make room;
    /// LIMIT_REACHED when that does not suffice.
    pub async fn get<F>(&self, key: &str, bytes: u64, open: impl FnOnce() -> F) -> Result<Held>
    where
        F: Future<Output = Result<Held>>,
    {
        if let Some(adapter) = self.find(key) {
            return Ok(adapter);
        }
        let _turn = self.loading.lock().await;
        if let Some(adapter) = self.find(key) {
            return Ok(adapter);
        }
        // Before reading, so that there are never more in memory than fit.
        self.make_room(bytes)?;
        let adapter = open().await?;
        let loaded = Loaded { adapter: adapter.clone(), used: Instant::now() };
        self.lock().insert(key.to_owned(), loaded);
        Ok(adapter)
    }

    /// Drops the adapter with this digest, for whatever versions it was made ready; requests that hold it
    /// keep it. False if there is none.
    pub fn unload(&self, digest: &str) -> bool {
        let mut loaded = self.lock();
        let before = loaded.len();
        loaded.retain(|key, _| key.split('@').next() != Some(digest));
        loaded.len() < before
    }

    /// What is loaded now.
    pub fn stats(&self) -> Stats {
        let loaded = self.lock();
        Stats {
            adapters: loaded.len(),
            resident_bytes: loaded.values().map(|l| l.adapter.bytes()).sum(),
        }
    }

    fn find(&self, key: &str) -> Option<Held> {
        let mut loaded = self.lock();
        let found = loaded.get_mut(key)?;
        found.used = Instant::now();
        Some(found.adapter.clone())
    }

    fn make_room(&self, bytes: u64) -> Result<()> {
        let mut loaded = self.lock();
        loop {
            let taken: u64 = loaded.values().map(|l| l.adapter.bytes()).sum();
            if taken.saturating_add(bytes) <= self.max_bytes {
                return Ok(());
            }
            let idle = loaded.iter().filter(|(_, l)| !l.adapter.busy());
            let Some(digest) = idle.min_by_key(|(_, l)| l.used).map(|(d, _)| d.clone()) else {
                return Err(Error::new(
                    Reason::LimitReached,
                    format!(
                        "the adapter takes {bytes} bytes and adapters at work take {taken}, more than \
                         limits.adapters_bytes allows ({}); try again later or raise the limit",
                        self.max_bytes
                    ),
                ));
            };
            tracing::debug!(digest, "an adapter was unloaded to make room");
            loaded.remove(&digest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Loaded>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::plan::adapters::Fitted;
    use crate::models::decoder::{Config, random};
    use crate::nn::adapter::{Adapter, Factors};

    /// 4 * (80 + 32) elements, 896 bytes.
    fn fitted(digest: &str) -> Held {
        let config = Config::from_hugging_face(&random::tiny("llama")).unwrap();
        let factors =
            Factors::from_f32([80, 32], 4, &[1.0; 128], &[1.0; 320], 1.0).map(Arc::new).unwrap();
        let linears = [("model.layers.0.mlp.up_proj.weight".to_owned(), factors)].into();
        let fitted = Fitted::new(digest, &Adapter { linears }, &config).unwrap();
        Held::Decoder(Arc::new(fitted))
    }

    #[tokio::test]
    async fn the_one_not_used_for_longest_makes_room_unless_it_is_held() {
        let adapters = Adapters::new(2 * 896);
        let load =
            async |digest: &str| adapters.get(digest, 896, || async { Ok(fitted(digest)) }).await;
        let is_loaded = async |digest: &str| {
            let nothing = || async { Err(Error::internal("not loaded")) };
            adapters.get(digest, 0, nothing).await.is_ok()
        };
        drop(load("a").await.unwrap());
        drop(load("b").await.unwrap());
        drop(load("a").await.unwrap());
        drop(load("c").await.unwrap());
        assert!(is_loaded("a").await && is_loaded("c").await && !is_loaded("b").await);
        assert_eq!(adapters.stats(), Stats { adapters: 2, resident_bytes: 2 * 896 });

        let (held, other) = (load("a").await.unwrap(), load("c").await.unwrap());
        assert_eq!(load("d").await.unwrap_err().reason(), Reason::LimitReached);
        drop(other);
        load("d").await.unwrap();
        assert!(is_loaded("a").await && !is_loaded("c").await);

        // Unloaded while it is held: the holder keeps it, the next one reads it anew.
        assert!(adapters.unload("a") && !adapters.unload("a"));
        let of = |held: &Held| match held {
            Held::Decoder(fitted) => Arc::clone(fitted),
            Held::Encoder(_) => panic!("a decoder's"),
        };
        assert_eq!(of(&held).digest(), "a");
        assert!(!Arc::ptr_eq(&of(&held), &of(&load("a").await.unwrap())));
        // A digest stands for all versions that it was made ready for.
        drop(held);
        adapters.unload("a");
        drop(load("b@1").await.unwrap());
        drop(load("b@2").await.unwrap());
        assert!(adapters.unload("b") && !adapters.unload("b"));
        let wide = adapters.get("w", 3 * 896, || async { Ok(fitted("w")) }).await;
        assert_eq!(wide.unwrap_err().reason(), Reason::LimitReached);
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_not_kept() {
        let adapters = Adapters::new(1 << 20);
        let failed = adapters.get("a", 1, || async { Err(Error::internal("no")) }).await;
        assert!(failed.is_err());
        assert_eq!(adapters.stats(), Stats::default());
    }
}
