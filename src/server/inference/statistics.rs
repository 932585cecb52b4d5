//! Counts and times of inferences, by version.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::proto::inference::{InferStatistics, ModelStatistics, StatisticDuration};
use crate::store::models::VersionRow;

/// Versions that are counted; beyond it the one that was idle for longest is forgotten.
const MAX_VERSIONS: usize = 10_000;

/// The account of all versions since the server started.
#[derive(Default)]
pub struct Statistics(Mutex<BTreeMap<(String, i64), Entry>>);

#[derive(Default)]
struct Entry {
    /// Of the version: a model's name may be used again for another.
    digest: String,
    last: u64,
    success: Sum,
    fail: Sum,
    queue: Sum,
    input: Sum,
    infer: Sum,
    output: Sum,
}

#[derive(Clone, Copy, Default)]
struct Sum {
    count: u64,
    time: Duration,
}

impl Sum {
    fn add(&mut self, time: Duration) {
        self.count += 1;
        self.time = self.time.saturating_add(time);
    }

    fn message(self) -> Option<StatisticDuration> {
        let ns = u64::try_from(self.time.as_nanos()).unwrap_or(u64::MAX);
        Some(StatisticDuration { count: self.count, ns })
    }
}

impl Statistics {
    /// Opens the account of a request on `row` that arrived at `arrived`.
    pub fn begin(self: &Arc<Self>, row: &VersionRow, arrived: Instant) -> Run {
        Run {
            statistics: Arc::clone(self),
            key: (row.model.clone(), row.version),
            digest: row.digest.clone(),
            arrived,
            input: Duration::ZERO,
            success: None,
        }
    }

    /// What is known of a version; none if it was never asked.
    pub fn get(&self, model: &str, version: i64, digest: &str) -> Option<ModelStatistics> {
        let entries = self.lock();
        let entry = entries.get(&(model.to_owned(), version)).filter(|e| e.digest == digest)?;
        Some(ModelStatistics {
            last_inference: entry.last,
            inference_count: entry.success.count,
            execution_count: entry.success.count,
            inference_stats: Some(InferStatistics {
                success: entry.success.message(),
                fail: entry.fail.message(),
                queue: entry.queue.message(),
                compute_input: entry.input.message(),
                compute_infer: entry.infer.message(),
                compute_output: entry.output.message(),
            }),
            ..Default::default()
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(String, i64), Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request under way. Dropped without success it counts as failed.
pub struct Run {
    statistics: Arc<Statistics>,
    key: (String, i64),
    digest: String,
    arrived: Instant,
    input: Duration,
    /// Seconds of waiting for a slot and of running.
    success: Option<(f64, f64)>,
}

impl Run {
    /// Says that the inputs are read and the model is in memory.
    pub fn ready(&mut self) {
        self.input = self.arrived.elapsed();
    }

    /// Ends the account of a request that was answered.
    pub fn succeed(mut self, queue_seconds: f64, infer_seconds: f64) {
        self.success = Some((queue_seconds, infer_seconds));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let total = self.arrived.elapsed();
        let mut entries = self.statistics.lock();
        if !entries.contains_key(&self.key) && entries.len() >= MAX_VERSIONS {
            let oldest = entries.iter().min_by_key(|(_, e)| e.last).map(|(key, _)| key.clone());
            oldest.map(|key| entries.remove(&key));
        }
        let entry = entries.entry(self.key.clone()).or_default();
        if entry.digest != self.digest {
            *entry = Entry { digest: self.digest.clone(), ..Entry::default() };
        }
        let began = SystemTime::now().checked_sub(total).unwrap_or(UNIX_EPOCH);
        let since = began.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        entry.last = entry.last.max(u64::try_from(since).unwrap_or(u64::MAX));
        let Some((queue, infer)) = self.success else {
            entry.fail.add(total);
            return;
        };
        let seconds = |s: f64| Duration::try_from_secs_f64(s).unwrap_or_default();
        let (queue, infer) = (seconds(queue), seconds(infer));
        entry.success.add(total);
        entry.queue.add(queue);
        entry.input.add(self.input);
        entry.infer.add(infer);
        entry.output.add(total.saturating_sub(self.input + queue + infer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_their_end() {
        let statistics = Arc::new(Statistics::default());
        let row = |digest: &str| VersionRow {
            model: "m".into(),
            version: 3,
            digest: digest.into(),
            family: String::new(),
            architecture: String::new(),
            config: serde_json::Value::Null,
            parameters: 0,
            weight_bytes: 0,
            total_bytes: 0,
            layout_bytes: BTreeMap::new(),
            files: Vec::new(),
            lineage: serde_json::Value::Null,
            created_ms: 0,
        };
        assert!(statistics.get("m", 3, "a").is_none());
        let arrived = Instant::now();
        let mut run = statistics.begin(&row("a"), arrived);
        run.ready();
        run.succeed(0.25, 0.5);
        drop(statistics.begin(&row("a"), arrived));
        let counted = statistics.get("m", 3, "a").unwrap();
        assert_eq!((counted.inference_count, counted.execution_count), (1, 1));
        assert!(counted.last_inference > 0);
        let stats = counted.inference_stats.unwrap();
        assert_eq!(stats.queue.unwrap(), StatisticDuration { count: 1, ns: 250_000_000 });
        assert_eq!(stats.compute_infer.unwrap(), StatisticDuration { count: 1, ns: 500_000_000 });
        assert_eq!((stats.success.unwrap().count, stats.fail.unwrap().count), (1, 1));

        // Another version under a name that was used before starts anew.
        assert!(statistics.get("m", 3, "b").is_none());
        drop(statistics.begin(&row("b"), arrived));
        let counted = statistics.get("m", 3, "b").unwrap();
        assert_eq!(counted.inference_count, 0);
        assert_eq!(counted.inference_stats.unwrap().fail.unwrap().count, 1);
        assert!(statistics.get("m", 3, "a").is_none());
    }
}
