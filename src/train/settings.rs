//! Options of a run: the message of the API, its defaults and its limits.

use super::optimizer::{AdamW, Rule, Sgd};
use super::schedule::{Schedule, Shape};
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::proto::v1::{self, training};

/// Updates of a run, at most.
const MAX_STEPS: u64 = 100_000_000;
const MAX_BATCH: u32 = 4096;
/// Tokens of a row, at most.
pub const MAX_LENGTH: u32 = 1 << 17;
const MAX_EPOCHS: f64 = 10_000.0;

/// What is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    CausalLm,
    MaskedLm,
    Classification,
    Regression,
    Tagging,
}

impl Objective {
    /// What a record asks for.
    pub fn of(target: &Target) -> Self {
        match target {
            Target::Next(_) => Self::CausalLm,
            Target::Class(_) => Self::Classification,
            Target::Value(_) => Self::Regression,
            Target::Tags(_) => Self::Tagging,
        }
    }

    /// Whether right and wrong answers can be counted against chance.
    pub fn classifies(self) -> bool {
        matches!(self, Self::Classification | Self::Tagging)
    }

    fn name(self) -> &'static str {
        match self {
            Self::CausalLm => "causal language modelling",
            Self::MaskedLm => "masked language modelling",
            Self::Classification => "classification",
            Self::Regression => "regression",
            Self::Tagging => "tagging",
        }
    }
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Duration {
    Epochs(f64),
    Steps(u64),
}

/// How long the learning rate rises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    Share(f64),
    Steps(u64),
}

/// Arithmetic of the frozen parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
}

/// Checked options of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What the records ask for when absent.
    pub objective: Option<Objective>,
    pub duration: Duration,
    pub batch_size: usize,
    pub accumulation: usize,
    pub max_length: usize,
    pub packing: bool,
    pub group_by_length: bool,
    pub learning_rate: f64,
    pub shape: Shape,
    pub warmup: Warmup,
    pub final_share: f64,
    pub rule: Rule,
    pub eight_bit: bool,
    pub weight_decay: f64,
    /// Largest norm of all gradients.
    pub clip_norm: Option<f64>,
    pub ema_decay: Option<f64>,
    pub precision: Precision,
    pub checkpoint_activations: bool,
    pub mask_share: f64,
    /// Share of the training data that validates.
    pub validation_share: f64,
    /// Updates between validations; an epoch when absent.
    pub validate_every: Option<u64>,
    pub patience: Option<u32>,
    pub min_delta: f64,
    pub keep_last: bool,
    /// Updates between checkpoints; by time when absent.
    pub checkpoint_every: Option<u64>,
    pub memory_bytes: Option<u64>,
    /// Multiplies the learning rate of a new head.
    pub head_rate: f64,
}

/// Writes every default out. `learning_rate` is the method's.
pub fn resolve(training: &mut v1::Training, learning_rate: f64) {
    use v1::{LearningRateSchedule, TrainingPrecision};
    if training.steps.is_none() {
        training.epochs.get_or_insert(1.0);
    }
    training.batch_size.get_or_insert(8);
    training.accumulation.get_or_insert(1);
    training.max_length.get_or_insert(512);
    training.learning_rate.get_or_insert(learning_rate);
    // Numbers that stand for nothing are left for the check.
    if training.schedule == LearningRateSchedule::Unspecified as i32 {
        training.schedule = LearningRateSchedule::Linear.into();
    }
    if training.warmup_steps.is_none() {
        let one_cycle = training.schedule() == LearningRateSchedule::OneCycle;
        training.warmup_share.get_or_insert(if one_cycle { 0.3 } else { 0.03 });
    }
    training.final_share.get_or_insert(0.0);
    let adamw = AdamW::default();
    match training.optimizer.get_or_insert(training::Optimizer::Adamw(v1::AdamW::default())) {
        training::Optimizer::Adamw(options) => {
            options.beta1.get_or_insert(adamw.beta1);
            options.beta2.get_or_insert(adamw.beta2);
            options.epsilon.get_or_insert(adamw.epsilon);
        }
        training::Optimizer::Sgd(options) => {
            options.momentum.get_or_insert(0.0);
        }
    }
    training.weight_decay.get_or_insert(0.0);
    training.clip_norm.get_or_insert(1.0);
    training.head_rate.get_or_insert(1.0);
    if training.precision == TrainingPrecision::Unspecified as i32 {
        training.precision = TrainingPrecision::F32.into();
    }
    let validation = training.validation.get_or_insert_default();
    if validation.dataset.is_empty() {
        validation.share.get_or_insert(0.0);
    }
    if validation.patience.is_some() {
        validation.min_delta.get_or_insert(0.0);
    }
    if training.objective() == v1::TrainingObjective::MaskedLm {
        training.mask_share.get_or_insert(0.15);
    }
}

impl Settings {
    /// Checks the options; defaults that are not written out are as [`resolve`] would write them.
    ///
    /// # Errors
    /// `INVALID_OPTION` that names the option as a path inside the message.
    pub fn read(training: &v1::Training, learning_rate: f64) -> Result<Self> {
        let mut training = training.clone();
        if training.epochs.is_some() && training.steps.is_some() {
            return Err(Error::option("steps", "not together with epochs; give one of them"));
        }
        if training.warmup_share.is_some() && training.warmup_steps.is_some() {
            let problem = "not together with warmup_share; give one of them";
            return Err(Error::option("warmup_steps", problem));
        }
        resolve(&mut training, learning_rate);
        let given = &training;
        let validation = given.validation.clone().unwrap_or_default();
        if !validation.dataset.is_empty() && validation.share.is_some_and(|share| share != 0.0) {
            let problem = "not together with a data set to measure on; leave one of them out";
            return Err(Error::option("validation.share", problem));
        }
        let objective = objective(given)?;
        if given.packing && !matches!(objective, None | Some(Objective::CausalLm)) {
            let problem = "rows are packed for causal language modelling only; leave it out";
            return Err(Error::option("packing", problem));
        }
        let (rule, eight_bit) = rule(given)?;
        let clip = at_least_zero("clip_norm", given.clip_norm)?;
        Ok(Self {
            objective,
            duration: duration(given)?,
            batch_size: whole("batch_size", given.batch_size, 1, MAX_BATCH)? as usize,
            accumulation: whole("accumulation", given.accumulation, 1, MAX_BATCH)? as usize,
            max_length: whole("max_length", given.max_length, 2, MAX_LENGTH)? as usize,
            packing: given.packing,
            group_by_length: given.group_by_length,
            learning_rate: positive("learning_rate", given.learning_rate)?,
            shape: shape(given)?,
            warmup: warmup(given)?,
            final_share: within("final_share", given.final_share, 0.0, 1.0)?,
            rule,
            eight_bit,
            weight_decay: at_least_zero("weight_decay", given.weight_decay)?,
            clip_norm: (clip > 0.0).then_some(clip),
            ema_decay: given.ema_decay.map(|d| share("ema_decay", Some(d))).transpose()?,
            precision: precision(given)?,
            checkpoint_activations: given.checkpoint_activations,
            mask_share: match given.mask_share {
                None => 0.15,
                Some(s) if s > 0.0 && s < 1.0 => s,
                Some(s) => {
                    return Err(Error::option("mask_share", format!("{s} is outside (0, 1)")));
                }
            },
            validation_share: share("validation.share", validation.share)?,
            validate_every: at_least_one("validation.every_steps", validation.every_steps)?,
            patience: match validation.patience {
                Some(0) => {
                    return Err(Error::option(
                        "validation.patience",
                        "0 is no patience; 1 or more",
                    ));
                }
                patience => patience,
            },
            min_delta: at_least_zero("validation.min_delta", validation.min_delta)?,
            keep_last: validation.keep_last,
            checkpoint_every: at_least_one("checkpoint_every", given.checkpoint_every)?,
            memory_bytes: given.memory_bytes,
            head_rate: positive("head_rate", given.head_rate)?,
        })
    }

    /// The objective for these records, which must all ask for the same.
    pub fn objective(&self, sequences: &[Sequence]) -> Result<Objective> {
        let mut objective = self.objective;
        for sequence in sequences {
            let asked = Objective::of(&sequence.target);
            let wanted = *objective.get_or_insert(asked);
            // Texts can be learnt either way.
            let fits =
                wanted == asked || (wanted == Objective::MaskedLm && asked == Objective::CausalLm);
            if !fits {
                let (line, asked, wanted) = (sequence.line, asked.name(), wanted.name());
                return Err(Error::new(
                    Reason::DatasetUnsuitable,
                    format!(
                        "line {line}: the record is for {asked}, not for {wanted}; choose the objective \
                         that the data set is for"
                    ),
                ));
            }
        }
        let objective = objective.ok_or_else(|| {
            Error::new(Reason::DatasetUnsuitable, "the data set has no record to learn from")
        })?;
        if self.packing && objective != Objective::CausalLm {
            let problem = "rows are packed for causal language modelling only; leave it out";
            return Err(Error::option("packing", problem));
        }
        Ok(objective)
    }

    /// Updates of the run, where an epoch has `updates`.
    pub fn steps(&self, updates: usize) -> Result<u64> {
        let steps = match self.duration {
            Duration::Steps(steps) => steps,
            // Both are limited, so this is a number.
            Duration::Epochs(epochs) => (epochs * updates as f64).ceil().max(1.0) as u64,
        };
        if steps > MAX_STEPS {
            let problem = format!("{steps} updates are more than {MAX_STEPS}");
            return Err(Error::option("epochs", problem));
        }
        Ok(steps)
    }

    /// The learning rates of a run of `total` updates.
    pub fn schedule(&self, total: u64) -> Schedule {
        let warmup = match self.warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Share(share) => (share * total as f64).round() as u64,
        };
        Schedule {
            shape: self.shape,
            peak: self.learning_rate,
            floor: self.final_share,
            warmup: warmup.min(total),
            total,
        }
    }
}

fn objective(given: &v1::Training) -> Result<Option<Objective>> {
    use v1::TrainingObjective as Given;
    Ok(match Given::try_from(given.objective) {
        Ok(Given::Unspecified) => None,
        Ok(Given::CausalLm) => Some(Objective::CausalLm),
        Ok(Given::MaskedLm) => Some(Objective::MaskedLm),
        Ok(Given::Classification) => Some(Objective::Classification),
        Ok(Given::Regression) => Some(Objective::Regression),
        Ok(Given::Tagging) => Some(Objective::Tagging),
        Err(_) => return Err(unknown("objective", given.objective)),
    })
}

fn shape(given: &v1::Training) -> Result<Shape> {
    use v1::LearningRateSchedule as Given;
    Ok(match Given::try_from(given.schedule) {
        Ok(Given::Unspecified | Given::Linear) => Shape::Linear,
        Ok(Given::Cosine) => Shape::Cosine,
        Ok(Given::Constant) => Shape::Constant,
        Ok(Given::OneCycle) => Shape::OneCycle,
        Err(_) => return Err(unknown("schedule", given.schedule)),
    })
}

fn precision(given: &v1::Training) -> Result<Precision> {
    use v1::TrainingPrecision as Given;
    Ok(match Given::try_from(given.precision) {
        Ok(Given::Unspecified | Given::F32) => Precision::F32,
        Ok(Given::Bf16) => Precision::Bf16,
        Err(_) => return Err(unknown("precision", given.precision)),
    })
}

fn duration(given: &v1::Training) -> Result<Duration> {
    match given.steps {
        Some(0) => Err(Error::option("steps", "0 updates learn nothing; give 1 or more")),
        Some(steps) if u64::from(steps) > MAX_STEPS => {
            Err(Error::option("steps", format!("{steps} is more than {MAX_STEPS}")))
        }
        Some(steps) => Ok(Duration::Steps(steps.into())),
        None => match given.epochs {
            Some(epochs) if epochs > 0.0 && epochs <= MAX_EPOCHS => Ok(Duration::Epochs(epochs)),
            epochs => {
                let epochs = epochs.unwrap_or_default();
                Err(Error::option("epochs", format!("{epochs} is outside (0, {MAX_EPOCHS}]")))
            }
        },
    }
}

fn warmup(given: &v1::Training) -> Result<Warmup> {
    match given.warmup_steps {
        Some(steps) => Ok(Warmup::Steps(steps.into())),
        None => Ok(Warmup::Share(within("warmup_share", given.warmup_share, 0.0, 1.0)?)),
    }
}

fn rule(given: &v1::Training) -> Result<(Rule, bool)> {
    match &given.optimizer {
        Some(training::Optimizer::Sgd(sgd)) => {
            let momentum = share("sgd.momentum", sgd.momentum)?;
            if sgd.nesterov && momentum == 0.0 {
                return Err(Error::option("sgd.nesterov", "needs a momentum greater than 0"));
            }
            Ok((Rule::Sgd(Sgd { momentum, nesterov: sgd.nesterov }), sgd.eight_bit))
        }
        Some(training::Optimizer::Adamw(adamw)) => {
            let rule = AdamW {
                beta1: share("adamw.beta1", adamw.beta1)?,
                beta2: share("adamw.beta2", adamw.beta2)?,
                epsilon: positive("adamw.epsilon", adamw.epsilon)?,
            };
            Ok((Rule::AdamW(rule), adamw.eight_bit))
        }
        None => Ok((Rule::AdamW(AdamW::default()), false)),
    }
}

fn unknown(field: &str, number: i32) -> Error {
    Error::option(field, format!("{number} is not a value of this server"))
}

fn whole(field: &str, value: Option<u32>, least: u32, most: u32) -> Result<u32> {
    let value = value.unwrap_or_default();
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(Error::option(field, format!("{value} is outside {least} to {most}")))
}

fn at_least_one(field: &str, value: Option<u32>) -> Result<Option<u64>> {
    match value {
        Some(0) => Err(Error::option(field, "0 is too few; leave it out or give 1 or more")),
        value => Ok(value.map(u64::from)),
    }
}

fn positive(field: &str, value: Option<f64>) -> Result<f64> {
    let value = value.unwrap_or_default();
    // Smaller numbers are zero in f32.
    if value.is_finite() && value >= f64::from(f32::MIN_POSITIVE) && value <= 1e6 {
        return Ok(value);
    }
    Err(Error::option(field, format!("{value} is not greater than 0 and at most 1e6")))
}

fn at_least_zero(field: &str, value: Option<f64>) -> Result<f64> {
    within(field, value, 0.0, 1e6)
}

fn within(field: &str, value: Option<f64>, least: f64, most: f64) -> Result<f64> {
    let value = value.unwrap_or_default();
    if value >= least && value <= most {
        return Ok(value);
    }
    Err(Error::option(field, format!("{value} is outside [{least}, {most}]")))
}

/// A share below 1.
fn share(field: &str, value: Option<f64>) -> Result<f64> {
    let value = value.unwrap_or_default();
    if (0.0..1.0).contains(&value) {
        return Ok(value);
    }
    Err(Error::option(field, format!("{value} is outside [0, 1)")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(change: impl Fn(&mut v1::Training)) -> String {
        let mut training = v1::Training::default();
        change(&mut training);
        match Settings::read(&training, 1e-4) {
            Ok(_) => String::new(),
            Err(error) => error.violations()[0].field.clone(),
        }
    }

    #[test]
    fn defaults_are_what_the_api_says() {
        let mut training = v1::Training::default();
        let plain = Settings::read(&training, 1e-4).unwrap();
        resolve(&mut training, 1e-4);
        assert_eq!(Settings::read(&training, 9.0).unwrap(), plain);
        assert_eq!((plain.batch_size, plain.accumulation, plain.max_length), (8, 1, 512));
        assert_eq!((plain.duration, plain.warmup), (Duration::Epochs(1.0), Warmup::Share(0.03)));
        assert_eq!((plain.learning_rate, plain.clip_norm), (1e-4, Some(1.0)));
        assert_eq!(plain.rule, Rule::AdamW(AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }));
        let mut again = training.clone();
        resolve(&mut again, 5.0);
        assert_eq!(again, training);
    }

    #[test]
    fn bad_options_are_named() {
        assert_eq!(field(|_| ()), "");
        assert_eq!(field(|t| t.clip_norm = Some(0.0)), "");
        assert_eq!(field(|t| t.learning_rate = Some(0.0)), "learning_rate");
        assert_eq!(field(|t| t.learning_rate = Some(f64::NAN)), "learning_rate");
        assert_eq!(field(|t| t.epochs = Some(0.0)), "epochs");
        assert_eq!(field(|t| t.epochs = Some(f64::INFINITY)), "epochs");
        assert_eq!(field(|t| t.steps = Some(0)), "steps");
        assert_eq!(field(|t| (t.steps, t.epochs) = (Some(1), Some(1.0))), "steps");
        assert_eq!(field(|t| t.batch_size = Some(0)), "batch_size");
        assert_eq!(field(|t| t.accumulation = Some(5000)), "accumulation");
        assert_eq!(field(|t| t.max_length = Some(1)), "max_length");
        assert_eq!(field(|t| t.schedule = 77), "schedule");
        assert_eq!(field(|t| t.precision = 77), "precision");
        assert_eq!(field(|t| t.objective = 77), "objective");
        assert_eq!(field(|t| t.warmup_share = Some(1.5)), "warmup_share");
        assert_eq!(
            field(|t| (t.warmup_share, t.warmup_steps) = (Some(0.1), Some(3))),
            "warmup_steps"
        );
        assert_eq!(field(|t| t.ema_decay = Some(1.0)), "ema_decay");
        assert_eq!(field(|t| t.mask_share = Some(0.0)), "mask_share");
        assert_eq!(field(|t| t.checkpoint_every = Some(0)), "checkpoint_every");
        let packed = |t: &mut v1::Training| {
            t.packing = true;
            t.objective = v1::TrainingObjective::Tagging.into();
        };
        assert_eq!(field(packed), "packing");
        let adamw = |t: &mut v1::Training| {
            let options = v1::AdamW { beta2: Some(1.0), ..Default::default() };
            t.optimizer = Some(training::Optimizer::Adamw(options));
        };
        assert_eq!(field(adamw), "adamw.beta2");
        let sgd = |t: &mut v1::Training| {
            let options = v1::Sgd { nesterov: true, ..Default::default() };
            t.optimizer = Some(training::Optimizer::Sgd(options));
        };
        assert_eq!(field(sgd), "sgd.nesterov");
        let validation = |v: v1::TrainingValidation| {
            field(move |t: &mut v1::Training| t.validation = Some(v.clone()))
        };
        let both = v1::TrainingValidation {
            dataset: "datasets/d".into(),
            share: Some(0.1),
            ..Default::default()
        };
        assert_eq!(validation(both), "validation.share");
        let none = v1::TrainingValidation { patience: Some(0), ..Default::default() };
        assert_eq!(validation(none), "validation.patience");
    }

    #[test]
    fn objectives_follow_the_records() {
        let record = |target| Sequence { tokens: vec![1, 2], target, line: 7 };
        let texts = [record(Target::Next(vec![false, true]))];
        let mixed = [record(Target::Class(0)), record(Target::Value(0.5))];
        let any = Settings::read(&v1::Training::default(), 1.0).unwrap();
        assert_eq!(any.objective(&texts).unwrap(), Objective::CausalLm);
        assert_eq!(any.objective(&mixed[..1]).unwrap(), Objective::Classification);
        let error = any.objective(&mixed).unwrap_err();
        assert!(error.message().starts_with("line 7: the record is for regression"), "{error}");
        assert!(any.objective(&[]).is_err());
        let masked = Settings { objective: Some(Objective::MaskedLm), ..any.clone() };
        assert_eq!(masked.objective(&texts).unwrap(), Objective::MaskedLm);
        assert!(masked.objective(&mixed).is_err());
        assert!(Settings { packing: true, ..any }.objective(&mixed[..1]).is_err());
    }

    #[test]
    fn lengths_are_in_updates() {
        let settings = |change: &dyn Fn(&mut v1::Training)| {
            let mut training = v1::Training::default();
            change(&mut training);
            Settings::read(&training, 1.0).unwrap()
        };
        let half = settings(&|t| t.epochs = Some(2.5));
        assert_eq!(half.steps(5).unwrap(), 13);
        assert_eq!(settings(&|t| t.steps = Some(3)).steps(5).unwrap(), 3);
        assert_eq!(settings(&|t| t.epochs = Some(1e-9)).steps(5).unwrap(), 1);
        assert!(settings(&|t| t.epochs = Some(1e4)).steps(1 << 20).is_err());
        assert_eq!(half.schedule(100).warmup, 3);
        assert_eq!(settings(&|t| t.warmup_steps = Some(500)).schedule(100).warmup, 100);
    }
}
