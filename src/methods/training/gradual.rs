//! Gradual magnitude pruning (Zhu and Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning
//! for model compression", arXiv 1710.01878).
//!
//! The share of zeros follows equation 1 ([`super::schedule`]); at each update of the masks the smallest absolute
//! weights of a tensor go, in an exact number ([`super::masks`]). Decided here: masks are made after the update
//! whose number the schedule names (0 is before the first), and once more at the end of the schedule, so that
//! the share is met when the last interval is shorter; the weights of the last update are kept and no average
//! of weights, in which masked ones would not be zero.

use std::collections::BTreeSet;

use serde_json::json;

use super::masks::{Pattern, Pool};
use super::pruner::{Pruner, Rule};
use super::run::{self, Ended};
use super::schedule::Schedule;
use super::scope::{self, Scope};
use crate::error::{Error, Result};
use crate::methods::{AnyOutcome, Card, Estimate, Learning, Method, Outcome, StepContext};
use crate::models::footprint::footprint;
use crate::models::{AnyInfo, AnyModel, Model, ModelInfo, TensorInfo};
use crate::nn::weight::{Record, Sparse};
use crate::proto::v1::{self, PruningGranularity, PruningPool};
use crate::train::settings::Settings;

static CARD: Card = Card {
    name: "gradual",
    title: "Gradual magnitude pruning",
    verb: "train",
    summary: "Trains a model while more and more of its smallest weights become zero and stay so.",
    paper: "To prune, or not to prune: exploring the efficacy of pruning for model compression, arXiv 1710.01878",
    needs_calibration: false,
    families: &["decoder", "vision", "lstm"],
    followed_by: &["train"],
};

/// Share of zeros where the options do not say.
const SHARE: f64 = 0.9;

/// Checked options.
struct Options {
    settings: Settings,
    pattern: Pattern,
    pool: Pool,
    global: bool,
    last: f64,
    scope: Scope,
}

impl Options {
    fn read(given: &v1::Gradual, model: &AnyInfo) -> Result<Self> {
        let settings = run::check(given.training.as_ref(), model)?;
        let refuse = |field: &str, why: &str| Error::option(format!("training.{field}"), why);
        if settings.ema_decay.is_some() {
            let why = "an average holds pruned weights that are not zero; leave it out";
            return Err(refuse("ema_decay", why));
        }
        if settings.patience.is_some() {
            let why = "an early end would leave the share of zeros unmet; leave it out";
            return Err(refuse("validation.patience", why));
        }
        let pattern = Pattern::parse(&given.pattern)?;
        let last = match pattern {
            Pattern::Groups { n, m } => {
                let share = n as f64 / m as f64;
                if given.final_sparsity.is_some_and(|given| (given - share).abs() > 1e-9) {
                    let problem = "the pattern already says the share; leave one of the two out";
                    return Err(Error::option("final_sparsity", problem));
                }
                share
            }
            _ => given.final_sparsity.unwrap_or(SHARE),
        };
        Schedule::check(given, last)?;
        let pool = match PruningPool::try_from(given.pool) {
            Ok(PruningPool::Unspecified | PruningPool::Average) => Pool::Average,
            Ok(PruningPool::Max) => Pool::Max,
            Err(_) => return Err(unknown("pool", given.pool)),
        };
        let global = match PruningGranularity::try_from(given.granularity) {
            Ok(PruningGranularity::Unspecified | PruningGranularity::Tensor) => false,
            Ok(PruningGranularity::Global) => true,
            Err(_) => return Err(unknown("granularity", given.granularity)),
        };
        if global && matches!(pattern, Pattern::Groups { .. }) {
            let problem = "n:m holds in every group; leave it out";
            return Err(Error::option("granularity", problem));
        }
        let scope = scope::of(model, &given.scope)?;
        for name in &scope.names {
            if let Some(TensorInfo { shape, .. }) = model.tensors.get(name) {
                pattern.check(name, matrix(shape))?;
            }
        }
        if scope.names.is_empty() {
            let problem =
                format!("no matrix with {} elements or more is left to prune", scope::LEAST);
            return Err(Error::option("scope", problem));
        }
        Ok(Self { settings, pattern, pool, global, last, scope })
    }

    fn hint(&self, name: &str) -> Option<(u8, u8)> {
        match self.pattern {
            Pattern::Groups { n, m } if self.scope.names.iter().any(|own| own == name) => {
                Some((n as u8, m as u8))
            }
            _ => None,
        }
    }

    /// Elements of a matrix that are masked at the end.
    fn masked(&self, elements: usize) -> usize {
        match self.pattern {
            Pattern::Groups { n, m } => elements / m * n,
            pattern => Pattern::masked(elements / pattern.unit(), self.last) * pattern.unit(),
        }
    }
}

fn unknown(field: &str, number: i32) -> Error {
    Error::option(field, format!("{number} is not a value of this server"))
}

fn matrix(shape: &[usize]) -> [usize; 2] {
    match *shape {
        [rows, cols] => [rows, cols],
        _ => [0, 0],
    }
}

impl Method for v1::Gradual {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        run::resolve(&mut self.training);
        if let Some(training) = &mut self.training {
            // The best weights on the way are those that were pruned least.
            training.validation.get_or_insert_default().keep_last = true;
        }
        if self.pattern.is_empty() {
            self.pattern = "unstructured".into();
        }
        if !matches!(Pattern::parse(&self.pattern), Ok(Pattern::Groups { .. })) {
            self.final_sparsity.get_or_insert(SHARE);
        }
        self.initial_sparsity.get_or_insert(0.0);
        self.power.get_or_insert(3.0);
        self.regrow.get_or_insert(true);
        if self.pool == PruningPool::Unspecified as i32 {
            self.pool = PruningPool::Average.into();
        }
        if self.granularity == PruningGranularity::Unspecified as i32 {
            self.granularity = PruningGranularity::Tensor.into();
        }
    }

    fn datasets(&self) -> Vec<&str> {
        run::datasets(self.training.as_ref())
    }

    fn seeded(&self) -> bool {
        true
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let (estimate, after) = self.check_any(&AnyInfo::from(model.clone()))?;
        Ok((estimate, after.walked()?))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let mut learning = Learning::none(cx);
        self.apply_any(cx, &mut learning, model.into())?.walked()
    }

    fn check_any(&self, model: &AnyInfo) -> Result<(Estimate, AnyInfo)> {
        let options = Options::read(self, model)?;
        let mut after = model.clone();
        // With one comparison for all tensors it is not known which of them lose how much.
        for name in options.scope.names.iter().filter(|_| !options.global) {
            let Some(tensor) = after.tensors.get_mut(name) else { continue };
            let shape = matrix(&tensor.shape);
            let elements = shape[0] * shape[1];
            let (dtype, values) = run::formats(&tensor.record, tensor.bytes);
            let kept = elements - options.masked(elements);
            let (pattern, bytes) = Sparse::expected(shape, kept, values, options.hint(name));
            if bytes < (elements * dtype.size()) as u64 {
                (tensor.bytes, tensor.record) = (bytes, Record::Sparse { shape, pattern, values });
            }
        }
        Ok((run::estimate(&options.settings, model, after.bytes()), after))
    }

    fn apply_any(
        &self,
        cx: &mut StepContext<'_>,
        learning: &mut Learning<'_>,
        model: AnyModel,
    ) -> Result<AnyOutcome> {
        let info = model.info();
        let options = Options::read(self, &info)?;
        let training = self.training.clone().unwrap_or_default();
        let settings = Settings { keep_last: true, ..options.settings.clone() };
        let shapes: Vec<(String, [usize; 2])> = options
            .scope
            .names
            .iter()
            .filter_map(|name| Some((name.clone(), matrix(&info.tensors.get(name)?.shape))))
            .collect();
        let mut ended =
            run::train((&*cx, &*learning), &model, (&training, &settings), |total, losses| {
                let rule = Rule {
                    schedule: Schedule::read(self, options.last, total)?,
                    pattern: options.pattern,
                    pool: options.pool,
                    global: options.global,
                    regrow: self.regrow.unwrap_or(true),
                };
                Ok(Some(Pruner::new(rule, shapes, losses)))
            })?;
        let model = run::stored(model, &ended, |name| options.hint(name))?;
        let names: BTreeSet<String> = options.scope.names.iter().cloned().collect();
        let (tensors, zeros, elements) = run::record(&model, &names);
        let pruning = report(self, &options, &ended, &model)?;
        let mut warnings = std::mem::take(&mut ended.warnings);
        if !options.scope.skipped.is_empty() {
            warnings.push(format!(
                "too small to prune and left as they are: {}",
                options.scope.skipped.join(", ")
            ));
        }
        let updates: Vec<_> = pruning
            .updates
            .iter()
            .map(|u| json!({ "step": u.step, "sparsity": u.sparsity, "loss": u.loss }))
            .collect();
        learning.training = Some(std::mem::take(&mut ended.report));
        let record = json!({
            "tensors": tensors,
            "total": { "zeros": zeros, "elements": elements },
            "masks": updates,
            "nonzero_parameters": pruning.nonzero_parameters,
            "skipped": options.scope.skipped,
            "warnings": warnings,
        });
        learning.pruning = Some(pruning);
        Ok(Outcome {
            record,
            model,
            calibration_tokens: 0,
            zero_share: zeros as f64 / elements.max(1) as f64,
            warnings,
        })
    }
}

/// What was pruned, and what is left.
fn report(
    given: &v1::Gradual,
    options: &Options,
    ended: &Ended,
    model: &AnyModel,
) -> Result<v1::PruningReport> {
    let pruner = ended.pruner.as_ref().ok_or_else(|| Error::internal("pruning without masks"))?;
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let (elements, total) = (pruner.elements(), ended.report.planned_steps.unsigned_abs());
    let schedule = Schedule::read(given, options.last, total)?;
    let updates = pruner.history().iter().map(|update| v1::MaskUpdate {
        step: signed(update.step),
        target: schedule.target(update.step),
        sparsity: update.masked as f64 / elements.max(1) as f64,
        loss: f64::from(update.loss),
    });
    let found = footprint(model.weights());
    Ok(v1::PruningReport {
        updates: updates.collect(),
        elements: signed(elements),
        kept: signed(elements - pruner.masked()),
        nonzero_parameters: signed(found.nonzero),
        bitmap_bytes: signed(found.bitmap),
        csr_bytes: signed(found.rows),
        dense_bytes: signed(found.dense),
        skipped: options.scope.skipped.clone(),
    })
}
