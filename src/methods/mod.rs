//! Methods: the published systems that change a model.

pub mod adapt;
pub mod compress;
pub mod docs;
pub mod registry;
pub mod scope;

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use crate::calibrate;
use crate::error::Result;
use crate::models::{Model, ModelInfo};
use crate::progress::Progress;
use crate::seed::Stream;

/// Facts about a method.
#[derive(Debug)]
pub struct Card {
    /// Name in recipes; the field name in the `Step` oneof.
    pub name: &'static str,
    pub title: &'static str,
    pub verb: &'static str,
    pub summary: &'static str,
    /// The paper by name and number.
    pub paper: &'static str,
    pub needs_calibration: bool,
    pub families: &'static [&'static str],
    /// Methods that make sense after this one.
    pub followed_by: &'static [&'static str],
}

/// Expected cost of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    /// Bytes of weights afterwards.
    pub weight_bytes: u64,
    /// Largest resident memory.
    pub memory_bytes: u64,
    pub seconds: f64,
    /// Tokens that run through the model.
    pub calibration_tokens: u64,
}

/// What a method gets to work with.
pub struct StepContext<'a> {
    /// Seeded random numbers; name a stream for each purpose.
    pub random: Stream,
    /// Progress of this step (0 to 1), and the cancellation to poll in every loop.
    pub progress: &'a Progress,
    /// Text data sets by resource name, already read: documents joined.
    pub texts: &'a dyn Fn(&str) -> Result<Arc<String>>,
    /// Calibration windows that the steps of a job share.
    pub calibrations: &'a calibrate::Shared,
    /// Digest of the model that the step starts from.
    pub digest: &'a str,
    /// A folder for temporary files, removed after the step.
    pub scratch: PathBuf,
}

/// What a step made.
pub struct Outcome {
    pub model: Model,
    /// Replayable facts: exact counts, errors by layer, warnings. No times.
    pub record: Value,
    pub calibration_tokens: u64,
    pub zero_share: f64,
    pub warnings: Vec<String>,
}

/// A system that changes a model. The options message of the API is what implements it.
pub trait Method: Send + Sync {
    /// Facts about the method.
    fn card(&self) -> &'static Card;
    /// Writes every default out, so that the options say all that was done.
    fn resolve(&mut self);
    /// Resource names of the data sets that the step reads.
    fn datasets(&self) -> Vec<&str>;
    /// Whether the result depends on random numbers: without, all seeds give the same bytes.
    fn seeded(&self) -> bool;
    /// Refuses bad options early and says what the step costs. Also returns what the model will look
    /// like, so that the next step can be checked against it.
    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)>;
    /// Does the work. Polls `cx.progress` for cancellation; the same input and seed give the same bits.
    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome>;
}
