//! Which models are in memory: loaded at their first request or when told to, dropped when others need the
//! room, when nobody used them for long, or when told to. What was loaded by hand stays until it is dropped
//! by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::engine::Limits;
use super::serving::Serving;
use crate::error::{Error, Reason, Result};
use crate::models::AnyModel;
use crate::models::encoder::plan::Precision;

/// The loaded models, by a key that stands for their content.
pub struct Residency {
    limits: Limits,
    precision: Precision,
    max_bytes: u64,
    /// One load at a time: two at once would each count on the room that the other takes.
    loading: tokio::sync::Mutex<()>,
    loaded: Mutex<BTreeMap<String, Resident>>,
    /// Keys of models that only `unload` drops. Locked after `loaded`.
    pinned: Mutex<BTreeSet<String>>,
}

struct Resident {
    engine: Serving,
    used: Instant,
}

/// A model in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    pub key: String,
    pub resident_bytes: u64,
    /// Only `unload` drops it.
    pub pinned: bool,
    /// False once its engine has failed.
    pub healthy: bool,
    pub running: usize,
    pub waiting: usize,
    /// Time since a request used it last, zero while one does.
    pub idle: Duration,
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
    /// Room for models of `max_bytes` together; each gets an engine with `limits`, encoders one that
    /// computes in `precision`.
    pub fn new(limits: Limits, precision: Precision, max_bytes: u64) -> Self {
        Self {
            limits,
            precision,
            max_bytes,
            loading: tokio::sync::Mutex::default(),
            loaded: Mutex::default(),
            pinned: Mutex::default(),
        }
    }

    /// The engine under `key`, made of what `open` gives if there is none. Idle models that were not
    /// used for longest make room; LIMIT_REACHED when that does not suffice.
    pub async fn engine<F>(&self, key: &str, open: impl FnOnce() -> F) -> Result<Serving>
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
        let (limits, precision) = (self.limits, self.precision);
        let engine = tokio::task::spawn_blocking(move || Serving::start(model, limits, precision))
            .await
            .map_err(|e| Error::internal("loading a model failed").with_source(e))??;
        let resident = Resident { engine: engine.clone(), used: Instant::now() };
        self.lock().insert(key.to_owned(), resident);
        Ok(engine)
    }

    /// Keeps the model under `key` until it is unloaded; false if it is not loaded (any more).
    pub fn pin(&self, key: &str) -> bool {
        let loaded = self.lock();
        loaded.contains_key(key) && {
            self.pins().insert(key.to_owned());
            true
        }
    }

    /// Drops the engine under `key` once its running requests have ended; false if there is none.
    pub fn unload(&self, key: &str) -> bool {
        let mut loaded = self.lock();
        self.pins().remove(key);
        loaded.remove(key).is_some()
    }

    /// Drops the models that no request used for `idle`, except pinned ones; returns their keys. Called
    /// now and then: a model counts as used while the call finds it at work.
    pub fn unload_idle(&self, idle: Duration) -> Vec<String> {
        let mut loaded = self.lock();
        let pinned = self.pins();
        let mut dropped = Vec::new();
        loaded.retain(|key, resident| {
            let busy = resident.engine.load() != (0, 0);
            if busy {
                resident.used = Instant::now();
            }
            let keep = busy || pinned.contains(key) || resident.used.elapsed() < idle;
            if !keep {
                dropped.push(key.clone());
            }
            keep
        });
        dropped
    }

    /// The models in memory.
    pub fn loaded(&self) -> Vec<Loaded> {
        let loaded = self.lock();
        let pinned = self.pins();
        let entries = loaded.iter().map(|(key, resident)| {
            let (running, waiting) = resident.engine.load();
            let busy = running + waiting > 0;
            Loaded {
                key: key.clone(),
                resident_bytes: resident.engine.resident_bytes(),
                pinned: pinned.contains(key),
                healthy: resident.engine.healthy(),
                running,
                waiting,
                idle: if busy { Duration::ZERO } else { resident.used.elapsed() },
            }
        });
        entries.collect()
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

    fn find(&self, key: &str) -> Option<Serving> {
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
            let pinned = self.pins();
            let idle = loaded
                .iter()
                .filter(|(key, r)| r.engine.load() == (0, 0) && !pinned.contains(*key));
            let Some(key) = idle.min_by_key(|(_, r)| r.used).map(|(key, _)| key.clone()) else {
                return Err(Error::new(
                    Reason::LimitReached,
                    format!(
                        "the model takes {bytes} bytes and models at work or loaded by hand take \
                         {taken}, more than limits.models_bytes allows ({}); try again later, unload a \
                         model or raise the limit",
                        self.max_bytes
                    ),
                ));
            };
            tracing::info!(key, "unloaded to make room");
            loaded.remove(&key);
        }
    }

    fn pins(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.pinned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Resident>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::plan::CacheFormat;
    use crate::models::decoder::plan::adapters::Mix;
    use crate::models::decoder::random;
    use crate::serve::engine::{Engine, Event, Request};
    use crate::serve::sample::Sampling;

    const LIMITS: Limits = Limits {
        slots: 2,
        queue: 2,
        context: 200,
        kv_bytes: 1 << 26,
        kv_format: CacheFormat::F32,
        prefix_cache: true,
    };

    async fn engine(residency: &Residency, key: &str) -> Result<Engine> {
        let open = || async { random::model(random::tiny("llama"), 3).map(AnyModel::Decoder) };
        residency.engine(key, open).await?.decoder()
    }

    fn keys(residency: &Residency) -> Vec<String> {
        residency.loaded().into_iter().map(|l| l.key).collect()
    }

    #[tokio::test]
    async fn what_is_used_or_pinned_is_not_idle() {
        let residency = Residency::new(LIMITS, Precision::F32, u64::MAX);
        for key in ["busy", "idle", "pinned"] {
            engine(&residency, key).await.unwrap();
        }
        assert!(residency.pin("pinned") && !residency.pin("absent"));
        let request = Request {
            prompt: vec![1],
            max_tokens: 190,
            sampling: Sampling::GREEDY,
            end: Vec::new(),
            stop: Vec::new(),
            logprobs: false,
            top_logprobs: 0,
            constraint: None,
            client: 0,
            adapters: Mix::default(),
            deadline: None,
        };
        // Nobody reads beyond the first event, so the request stays at work: the channel is shorter.
        let mut events = engine(&residency, "busy").await.unwrap().generate(request).unwrap();
        events.recv().await.unwrap().unwrap();
        assert!(residency.unload_idle(Duration::from_secs(3600)).is_empty());
        assert_eq!(residency.unload_idle(Duration::ZERO), ["idle"]);
        let left = residency.loaded();
        assert_eq!(left.iter().map(|l| l.pinned).collect::<Vec<_>>(), [false, true]);
        assert_eq!((left[0].running, left[0].idle), (1, Duration::ZERO));
        // By hand it goes at once, and the request ends well.
        assert!(residency.unload("busy"));
        let mut last = None;
        while let Some(event) = events.recv().await {
            last = Some(event.unwrap());
        }
        assert!(matches!(last, Some(Event::Done { generated_tokens: 190, .. })));
        assert!(residency.unload("pinned") && !residency.unload("pinned"));
        assert!(!keys(&residency).contains(&"pinned".to_owned()));
        // The pin went with it.
        engine(&residency, "pinned").await.unwrap();
        assert!(residency.loaded().iter().all(|l| !l.pinned));
    }

    #[tokio::test]
    async fn pinned_models_do_not_make_room() {
        let bytes = random::model(random::tiny("llama"), 3).unwrap().bytes();
        let residency = Residency::new(LIMITS, Precision::F32, bytes);
        engine(&residency, "a").await.unwrap();
        engine(&residency, "b").await.unwrap();
        assert_eq!(keys(&residency), ["b"]);
        residency.pin("b");
        let refused = engine(&residency, "a").await.err().unwrap();
        assert_eq!(refused.reason(), Reason::LimitReached);
        assert_eq!(keys(&residency), ["b"]);
        residency.unload("b");
        engine(&residency, "a").await.unwrap();
        assert_eq!(keys(&residency), ["a"]);
    }
}
