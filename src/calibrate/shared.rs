//! Calibration text that several steps share: recipes that are compared calibrate on the same windows,
//! which are cut (or sampled) once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::windows::{self, Options, Sources, Windows};
use crate::error::Result;

/// The windows of the steps of one job, by what they depend on.
#[derive(Default)]
pub struct Shared {
    windows: Mutex<HashMap<Key, Arc<Windows>>>,
    /// Tokens of whole data sets.
    tokens: Mutex<HashMap<String, Arc<Vec<u32>>>>,
    made: AtomicU64,
    reused: AtomicU64,
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    options: Options,
    stream: String,
    /// Digest of the model where it writes the text itself; empty where a data set gives it, which
    /// all models of a job (they descend from one base) cut into the same tokens.
    model: String,
}

impl Shared {
    /// The windows, made now or before. `digest` names the model's content.
    pub fn windows(
        &self,
        options: &Options,
        digest: &str,
        from: &Sources<'_>,
    ) -> Result<Arc<Windows>> {
        let model = if options.dataset.is_none() { digest } else { "" };
        let key = Key {
            options: options.clone(),
            stream: from.stream.path().to_owned(),
            model: model.to_owned(),
        };
        let (windows, made) = get(&self.windows, key, || {
            windows::windows(options, from, &|dataset, tokenizer, text| {
                let encode = || tokenizer.encode(text, false, false);
                get(&self.tokens, dataset.to_owned(), encode).map(|(tokens, _)| tokens)
            })
        })?;
        let count = if made { &self.made } else { &self.reused };
        count.fetch_add(1, Ordering::Relaxed);
        Ok(windows)
    }

    /// How many were made, and how often one that was there did.
    pub fn counts(&self) -> (u64, u64) {
        (self.made.load(Ordering::Relaxed), self.reused.load(Ordering::Relaxed))
    }
}

/// What lies under `key`, or what `make` makes; and whether it was made.
fn get<K: Eq + Hash, V>(
    map: &Mutex<HashMap<K, Arc<V>>>,
    key: K,
    make: impl FnOnce() -> Result<V>,
) -> Result<(Arc<V>, bool)> {
    let lock = || map.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(value) = lock().get(&key) {
        return Ok((value.clone(), false));
    }
    // Not under the lock: this may take minutes. A job's steps run one after the other.
    let value = Arc::new(make()?);
    lock().insert(key, value.clone());
    Ok((value, true))
}
