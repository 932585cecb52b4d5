//! What the services share.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Notify, Semaphore, watch};
use tonic::Response;

use super::convert;
use super::gate::Phase;
use crate::config::{Config, EncoderPrecision, KvFormat};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::jobs::{self, Jobs};
use crate::machine;
use crate::models::decoder::plan::CacheFormat;
use crate::models::encoder::plan::Precision;
use crate::models::{
    encoder, lstm, not_a_decoder, not_an_encoder, not_for_text, two_tower, vision,
};
use crate::proto::google::longrunning::Operation;
use crate::serve::adapters::Adapters;
use crate::serve::embed::Embedder;
use crate::serve::engine::{Engine, Limits};
use crate::serve::residency::Residency;
use crate::serve::serving::Serving;
use crate::store::Store;
use crate::store::models::VersionRow;
use crate::store::operations::Kind;

/// Conversions for exports at one time.
const EXPORTS: usize = 2;

/// Tokenizers kept for `Tokenize` on models that are not loaded.
const TOKENIZERS: usize = 8;

/// The parts of the server.
pub struct State {
    pub config: Config,
    pub store: Arc<Store>,
    pub jobs: Jobs,
    pub residency: Residency,
    pub adapters: Adapters,
    pub phase: watch::Receiver<Phase>,
    /// Wakes the health watcher when a part has just failed.
    pub unwell: Notify,
    /// What health last said of the whole server.
    pub well: AtomicBool,
    pub exports: Arc<Semaphore>,
    /// Folder for temporary files, on the disk of the store.
    pub scratch: PathBuf,
    /// By digest, most recently used last.
    tokenizers: Mutex<Vec<(String, Option<Arc<Tokenizer>>)>>,
}

impl State {
    /// Opens the store and starts the runner.
    pub async fn open(config: Config, phase: watch::Receiver<Phase>) -> Result<Self> {
        let threads = config.compute.threads;
        if threads > 0
            && rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().is_err()
            && rayon::current_num_threads() != threads
        {
            tracing::warn!(
                "the process computes with {} threads already; compute.threads is ignored",
                rayon::current_num_threads()
            );
        }
        let store = Arc::new(Store::open(&config.data.folder).await?);
        let scratch = config.data.folder.join("scratch");
        // The store's lock is ours, so what lies here belongs to a process that is dead.
        let fresh = scratch.clone();
        blocking(move || {
            if fresh.exists() {
                std::fs::remove_dir_all(&fresh)?;
            }
            Ok(std::fs::create_dir_all(&fresh)?)
        })
        .await?;
        let limits = &config.limits;
        let options = jobs::Options {
            runners: limits.running_jobs,
            max_queued: limits.queued_jobs,
            scratch: scratch.clone(),
        };
        let jobs = Jobs::start(store.clone(), options).await?;
        let engine_limits = Limits {
            slots: limits.generation_slots,
            queue: limits.generation_queue,
            context: limits.context,
            kv_bytes: limits.kv_bytes,
            kv_format: match limits.kv_format {
                KvFormat::F32 => CacheFormat::F32,
                KvFormat::F16 => CacheFormat::F16,
                KvFormat::Q8 => CacheFormat::Q8,
            },
            prefix_cache: limits.prefix_cache,
        };
        let max_bytes = match limits.models_bytes {
            0 => machine::memory_bytes().map_or(u64::MAX, |bytes| bytes / 2),
            bytes => bytes,
        };
        let adapters_bytes = match limits.adapters_bytes {
            0 => machine::memory_bytes().map_or(u64::MAX, |bytes| bytes / 8),
            bytes => bytes,
        };
        let precision = match config.compute.encoders {
            EncoderPrecision::F32 => Precision::F32,
            EncoderPrecision::Bf16 => Precision::Bf16,
            EncoderPrecision::Int8 => Precision::Int8,
        };
        Ok(Self {
            store,
            jobs,
            adapters: Adapters::new(adapters_bytes),
            residency: Residency::new(engine_limits, precision, max_bytes),
            phase,
            unwell: Notify::new(),
            well: AtomicBool::new(false),
            exports: Arc::new(Semaphore::new(EXPORTS)),
            scratch,
            tokenizers: Mutex::default(),
            config,
        })
    }

    /// The engine of a version that generates, loaded if it is not yet.
    pub async fn engine(&self, row: &VersionRow) -> Result<Engine> {
        // Known from the row, so that nothing is loaded to be refused.
        if row.family == encoder::FAMILY {
            return Err(not_a_decoder(&row.architecture));
        }
        if matches!(row.family.as_str(), vision::FAMILY | lstm::FAMILY | two_tower::FAMILY) {
            return Err(not_for_text(&row.family));
        }
        self.serving(row).await?.decoder()
    }

    /// The engine of a version that embeds, loaded if it is not yet.
    pub async fn embedder(&self, row: &VersionRow) -> Result<Embedder> {
        if matches!(row.family.as_str(), vision::FAMILY | lstm::FAMILY | two_tower::FAMILY) {
            return Err(not_for_text(&row.family));
        }
        if row.family != encoder::FAMILY {
            return Err(not_an_encoder(&row.architecture));
        }
        self.serving(row).await?.encoder()
    }

    /// What serves a version, loaded if it is not yet. Engines go by digest: equal versions share one,
    /// and a name that is used again does not find the model that had it before.
    pub async fn serving(&self, row: &VersionRow) -> Result<Serving> {
        let engine = self.residency.engine(&row.digest, || self.store.open_any_version(row)).await;
        engine.inspect_err(|error| {
            if error.reason() != Reason::LimitReached {
                tracing::warn!(model = row.name(), "loading failed: {error}");
                self.unwell.notify_one();
            }
        })
    }

    /// Loads a version and keeps it in memory until it is unloaded.
    pub async fn load(&self, row: &VersionRow) -> Result<Serving> {
        let engine = self.serving(row).await?;
        if self.residency.pin(&row.digest) {
            return Ok(engine);
        }
        Err(Error::new(
            Reason::LimitReached,
            format!("{} was dropped again at once for the sake of others; try again", row.name()),
        ))
    }

    /// The operation that a request id stands for already. Asked before anything is resolved: what the
    /// request names may be gone by now, and its answer must still be the same.
    pub async fn repeated(
        &self,
        kind: Kind,
        request_id: &str,
        fingerprint: &[u8],
    ) -> Result<Option<Response<Operation>>> {
        if request_id.is_empty() {
            return Ok(None);
        }
        let row = self.store.operation_by_request(kind, request_id, fingerprint).await?;
        Ok(row.map(|row| Response::new(convert::operation(row))))
    }

    /// The tokenizer of a version, without loading its weights; `None` if it has none.
    pub async fn tokenizer(&self, row: &VersionRow) -> Result<Option<Arc<Tokenizer>>> {
        let find = || {
            let mut kept = self.tokenizers.lock().unwrap_or_else(PoisonError::into_inner);
            let at = kept.iter().position(|(digest, _)| *digest == row.digest)?;
            let entry = kept.remove(at);
            let tokenizer = entry.1.clone();
            kept.push(entry);
            Some(tokenizer)
        };
        if let Some(tokenizer) = find() {
            return Ok(tokenizer);
        }
        let tokenizer = self.store.open_any_version(row).await?.tokenizer().cloned();
        let mut kept = self.tokenizers.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(digest, _)| *digest != row.digest);
        kept.push((row.digest.clone(), tokenizer.clone()));
        if kept.len() > TOKENIZERS {
            kept.remove(0);
        }
        Ok(tokenizer)
    }
}

/// Runs work that computes or reads files off the threads that answer requests.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal("a task of the server failed").with_source(error)),
    }
}
