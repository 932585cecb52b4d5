//! Which models are in memory: loaded at their first request, dropped when others need the room.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::engine::Limits;
use super::loaded::Loaded;
use crate::error::{Error, Reason, Result};
use crate::models::AnyModel;

/// The loaded models, by a key that stands for their content.
pub struct Residency {
    limits: Limits,
    max_bytes: u64,
    /// One load at a time: two at once would each count on the room that the other takes.
    loading: tokio::sync::Mutex<()>,
    loaded: Mutex<BTreeMap<String, Resident>>,
}

struct Resident {
    engine: Loaded,
    used: Instant,
}

/// What is loaded and at work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    pub models: usize,
    pub resident_bytes: u64,
    /// Requests in a slot, and requests that wait, over all models.
    pub running: usize,
    pub waiting: usize,
}

impl Residency {
    /// Room for models of `max_bytes` together; each gets an engine with `limits`.
    pub fn new(limits: Limits, max_bytes: u64) -> Self {
        Self { limits, max_bytes, loading: tokio::sync::Mutex::default(), loaded: Mutex::default() }
    }

    /// The engine under `key`, made of what `open` gives if there is none. Idle models that were not
    /// used for longest make room; LIMIT_REACHED when that does not suffice.
    pub async fn engine<F>(&self, key: &str, open: impl FnOnce() -> F) -> Result<Loaded>
    where
        F: Future<Output = Result<AnyModel>>,
    {
        if let Some(engine) = self.find(key) {
            return Ok(engine);
        }
        let _turn = self.loading.lock().await;
        if let Some(engine) = self.find(key) {
            return Ok(engine);
        }
        let model = open().await?;
        self.make_room(model.bytes())?;
        let limits = self.limits;
        let engine = tokio::task::spawn_blocking(move || Loaded::start(model, limits))
            .await
            .map_err(|e| Error::internal("loading a model failed").with_source(e))??;
        let resident = Resident { engine: engine.clone(), used: Instant::now() };
        self.lock().insert(key.to_owned(), resident);
        Ok(engine)
    }

    /// Drops the engine under `key` once its running requests have ended; false if there is none.
    pub fn unload(&self, key: &str) -> bool {
        self.lock().remove(key).is_some()
    }

    /// False while an engine that has failed was not replaced or unloaded.
    pub fn healthy(&self) -> bool {
        self.lock().values().all(|r| r.engine.healthy())
    }

    /// What is loaded and at work now.
    pub fn stats(&self) -> Stats {
        self.lock().values().fold(Stats::default(), |sum, resident| {
            let (running, waiting) = resident.engine.load();
            Stats {
                models: sum.models + 1,
                resident_bytes: sum.resident_bytes + resident.engine.resident_bytes(),
                running: sum.running + running,
                waiting: sum.waiting + waiting,
            }
        })
    }

    fn find(&self, key: &str) -> Option<Loaded> {
        let mut loaded = self.lock();
        let resident = loaded.get_mut(key)?;
        if !resident.engine.healthy() {
            loaded.remove(key);
            return None;
        }
        resident.used = Instant::now();
        Some(resident.engine.clone())
    }

    fn make_room(&self, bytes: u64) -> Result<()> {
        let mut loaded = self.lock();
        loop {
            let taken: u64 = loaded.values().map(|r| r.engine.resident_bytes()).sum();
            if taken.saturating_add(bytes) <= self.max_bytes {
                return Ok(());
            }
            let idle = loaded.iter().filter(|(_, r)| r.engine.load() == (0, 0));
            let Some(key) = idle.min_by_key(|(_, r)| r.used).map(|(key, _)| key.clone()) else {
                return Err(Error::new(
                    Reason::LimitReached,
                    format!(
                        "the model takes {bytes} bytes and models at work take {taken}, more than \
                         limits.models_bytes allows ({}); try again later or raise the limit",
                        self.max_bytes
                    ),
                ));
            };
            tracing::info!(key, "unloaded to make room");
            loaded.remove(&key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Resident>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
