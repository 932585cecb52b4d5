//! Progress and cancellation of long work, shared between the thread at work and those who watch.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Where progress goes; called often, so it must be cheap.
pub type Sink = dyn Fn(f64, &str) + Send + Sync;

/// Numbers by name.
pub type Metrics = BTreeMap<String, f64>;

/// Where numbers that are measured on the way go; called often, too.
pub type MetricSink = dyn Fn(&Metrics) + Send + Sync;

/// Progress of a piece of work, 0 to 1, mapped into its place in the whole.
#[derive(Clone)]
pub struct Progress {
    sink: Arc<Sink>,
    metrics: Option<Arc<MetricSink>>,
    cancelled: Arc<AtomicBool>,
    from: f64,
    to: f64,
    /// What all messages are about; empty for none.
    about: Arc<str>,
}

impl Progress {
    /// Progress of a whole job.
    pub fn new(sink: Arc<Sink>, cancelled: Arc<AtomicBool>) -> Self {
        Self { sink, metrics: None, cancelled, from: 0.0, to: 1.0, about: Arc::default() }
    }

    /// The same progress whose measured numbers go to `metrics`.
    #[must_use]
    pub fn with_metrics(self, metrics: Arc<MetricSink>) -> Self {
        Self { metrics: Some(metrics), ..self }
    }

    /// The same progress whose measured numbers go to `metrics` as well.
    #[must_use]
    pub fn and_metrics(&self, metrics: Arc<MetricSink>) -> Self {
        let both: Arc<MetricSink> = match self.metrics.clone() {
            None => metrics,
            Some(first) => Arc::new(move |found| {
                first(found);
                metrics(found);
            }),
        };
        Self { metrics: Some(both), ..self.clone() }
    }

    /// Progress that nobody watches and nobody cancels.
    pub fn silent() -> Self {
        Self::new(Arc::new(|_, _| {}), Arc::new(AtomicBool::new(false)))
    }

    /// The part of this progress between `from` and `to`.
    #[must_use]
    pub fn part(&self, from: f64, to: f64) -> Self {
        let span = self.to - self.from;
        Self {
            sink: self.sink.clone(),
            metrics: self.metrics.clone(),
            cancelled: self.cancelled.clone(),
            from: self.from + span * from,
            to: self.from + span * to,
            about: self.about.clone(),
        }
    }

    /// The same progress with `about: ` before its messages.
    #[must_use]
    pub fn about(&self, about: &str) -> Self {
        Self { about: about.into(), ..self.clone() }
    }

    /// Reports `done` (0 to 1) and what goes on; an error when the work was cancelled.
    pub fn report(&self, done: f64, message: &str) -> Result<()> {
        self.check()?;
        let done = self.from + (self.to - self.from) * done.clamp(0.0, 1.0);
        match (&*self.about, message) {
            ("", message) => (self.sink)(done, message),
            (about, "") => (self.sink)(done, about),
            (about, message) => (self.sink)(done, &format!("{about}: {message}")),
        }
        Ok(())
    }

    /// Shows numbers that the work measures, such as a loss, in place of those shown before; what is not
    /// finite is left out. They go with the next message and stay until others come.
    pub fn measure(&self, mut metrics: Metrics) {
        if let Some(sink) = &self.metrics {
            metrics.retain(|_, value| value.is_finite());
            sink(&metrics);
        }
    }

    /// An error when the work was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::cancelled()) } else { Ok(()) }
    }

    /// Whether the work was cancelled.
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
