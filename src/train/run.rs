//! The loop: batches, gradients, updates, validations, checkpoints, to the end.
//!
//! One update: the sums and gradients of its batches are added up and divided by all that was counted (so
//! several batches are one large one), the method's penalty is added, the norm is limited, the optimiser
//! changes the parameters, the average follows. Everything random comes from streams that are named after
//! the update; so a run that goes on from a checkpoint gives the bits that it would have given.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::batch::Masking;
use super::checkpoint::{Best, Folder, Standing};
use super::ema::Ema;
use super::gradients;
use super::history::{Validation, signed};
use super::hooks::{Hooks, Place, Updated};
use super::loss::{LossAndGradients, LossSums};
use super::memory::{self, Estimate};
use super::optimizer::Optimizer;
use super::order::{self, Order};
use super::parameters::{Gradients, Parameters};
use super::schedule::Schedule;
use super::settings::{Objective, Precision, Settings};
use super::tensors;
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::progress::{Metrics, Progress};
use crate::proto::v1;
use crate::seed::Stream;

/// Time between checkpoints where the options do not say.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(120);

/// What a run works on.
pub struct Run<'a> {
    pub settings: &'a Settings,
    pub training: &'a [Sequence],
    /// Empty: nothing is validated, and the last update is kept.
    pub validation: &'a [Sequence],
    /// The token of padding.
    pub padding: u32,
    /// How tokens are hidden, where the objective is masked language modelling.
    pub masking: Option<Masking>,
    /// Stream of the run.
    pub random: Stream,
    /// Checkpoints; a folder of the run's own that outlives it when it is to go on.
    pub folder: &'a Path,
    pub progress: &'a Progress,
    pub needs: Needs<'a>,
}

/// What the model holds in memory beside what is trained, in bytes.
#[derive(Clone, Copy)]
pub struct Needs<'a> {
    /// Weights, which are in memory already.
    pub weights: u64,
    /// What the backward pass of a batch of so many tokens finds, see [`memory::Transformer`].
    pub activations: &'a dyn Fn(usize) -> u64,
}

impl Run<'_> {
    /// Trains `parameters` in place. They end as those of the best validation, or of the last update; with
    /// an average, as that of it. Where the folder holds a checkpoint of this run, that is taken up.
    ///
    /// # Errors
    /// `NON_FINITE` with the update, the tensor and a remedy; the last checkpoint stays, see
    /// [`Run::last_good`]. `CANCELLED`.
    /// `DATASET_UNSUITABLE`, `INVALID_OPTION` for data that the options do not suit. `LIMIT_REACHED` when the
    /// run would need more memory than it may, before anything is done.
    pub fn train(
        &self,
        model: &mut dyn LossAndGradients,
        parameters: &mut Parameters,
        hooks: &mut dyn Hooks,
    ) -> Result<v1::TrainingReport> {
        self.progress.check()?;
        let objective = self.settings.objective(self.training)?;
        if !self.validation.is_empty() {
            let same = Settings { objective: Some(objective), ..self.settings.clone() };
            same.objective(self.validation).map_err(|e| e.within("validation"))?;
        }
        let masked = objective == Objective::MaskedLm;
        if masked && self.masking.is_none() {
            return Err(Error::new(
                Reason::ModelUnsuitable,
                "the model has no mask token; choose another objective or an encoder",
            ));
        }
        let options =
            order::Options { masking: self.masking.clone().filter(|_| masked), ..self.options() };
        let random = self.random.child("training");
        let training = Order::shuffled(self.training, &options, random.child("data"))?;
        let validation = match self.validation {
            [] => None,
            records => Some(Order::fixed(records, &options, random.child("validation"))?),
        };
        let estimate = self.estimate_of(&training, parameters);
        let budget = self.settings.memory_bytes;
        let budget = budget.or_else(|| Some(memory::free()?.saturating_add(self.needs.weights)));
        if let Some(budget) = budget {
            estimate.check(budget, self.settings)?;
        }
        let total = self.settings.steps(training.updates())?;
        let ema = self.settings.ema_decay.map(|decay| Ema::new(decay, parameters)).transpose()?;
        let settings = self.settings;
        let mut state = Loop {
            run: self,
            total,
            schedule: settings.schedule(total),
            validate_every: settings.validate_every.unwrap_or(training.updates() as u64),
            training,
            validation,
            optimizer: Optimizer::new(settings.rule, settings.weight_decay, settings.eight_bit),
            ema,
            folder: Folder::new(self.folder)?,
            standing: Standing::new(self.fingerprint(parameters)),
            saved: None,
            rate: Rate::default(),
            times: Times::default(),
            last_sums: LossSums::default(),
            last_norm: 0.0,
        };
        state.resume(parameters, hooks)?;
        state.go(model, parameters, hooks)?;
        let mut report = state.finish(parameters)?;
        report.estimated_memory_bytes = signed(estimate.total());
        Ok(report)
    }

    /// Puts the weights of the last checkpoint into `parameters` (without the average) and gives its update:
    /// what is left of a run that failed. `None` when there is none.
    pub fn last_good(&self, parameters: &Parameters) -> Result<Option<u64>> {
        let settings = self.settings;
        let mut optimizer =
            Optimizer::new(settings.rule, settings.weight_decay, settings.eight_bit);
        let found = Folder::new(self.folder)?.load(
            &self.fingerprint(parameters),
            parameters,
            None,
            &mut optimizer,
        )?;
        Ok(found.map(|(standing, _)| standing.step))
    }

    /// Updates that the run makes unless it ends early.
    pub fn updates(&self) -> Result<u64> {
        let options = self.options();
        let random = self.random.child("training/data");
        self.settings.steps(Order::shuffled(self.training, &options, random)?.updates())
    }

    /// What training `parameters` comes to hold in memory.
    pub fn estimate(&self, parameters: &Parameters) -> Result<Estimate> {
        let options = self.options();
        let random = self.random.child("training/data");
        Ok(self.estimate_of(&Order::shuffled(self.training, &options, random)?, parameters))
    }

    fn estimate_of(&self, order: &Order<'_>, parameters: &Parameters) -> Estimate {
        let tokens = order.rows().min(self.settings.batch_size) * order.width();
        let activations = (self.needs.activations)(tokens);
        Estimate::new(self.settings, parameters, self.needs.weights, activations)
    }

    fn options(&self) -> order::Options {
        order::Options {
            batch_size: self.settings.batch_size,
            accumulation: self.settings.accumulation,
            max_length: self.settings.max_length,
            packing: self.settings.packing,
            group_by_length: self.settings.group_by_length,
            padding: self.padding,
            masking: None,
        }
    }

    /// What the result follows from.
    fn fingerprint(&self, parameters: &Parameters) -> String {
        let mut hash = Sha256::new();
        // How long checkpoints and memory last does not change any number.
        let settings =
            Settings { checkpoint_every: None, memory_bytes: None, ..self.settings.clone() };
        hash.update(format!("{settings:?}\n{}\n{:?}\n", self.random.path(), self.masking));
        hash.update(self.padding.to_le_bytes());
        for records in [self.training, self.validation] {
            hash.update((records.len() as u64).to_le_bytes());
            records.iter().for_each(|record| digest(&mut hash, record));
        }
        for (name, parameter) in parameters {
            let (shape, rate, decay) = (parameter.var.dims(), parameter.rate, parameter.decay);
            hash.update(format!("{name} {shape:?} {rate} {decay}\n"));
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

fn digest(hash: &mut Sha256, record: &Sequence) {
    hash.update((record.tokens.len() as u64).to_le_bytes());
    record.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    match &record.target {
        Target::Next(counts) => counts.iter().for_each(|count| hash.update([u8::from(*count)])),
        Target::Class(class) => hash.update(class.to_le_bytes()),
        Target::Value(value) => hash.update(value.to_le_bytes()),
        Target::Tags(tags) => {
            tags.iter().for_each(|tag| hash.update(tag.unwrap_or(u32::MAX).to_le_bytes()));
        }
    }
}

/// A run under way.
struct Loop<'a, 'b> {
    run: &'a Run<'b>,
    training: Order<'a>,
    validation: Option<Order<'a>>,
    total: u64,
    schedule: Schedule,
    validate_every: u64,
    optimizer: Optimizer,
    ema: Option<Ema>,
    folder: Folder,
    standing: Standing,
    /// When the last checkpoint was written, by this process.
    saved: Option<(u64, Instant)>,
    rate: Rate,
    times: Times,
    last_sums: LossSums,
    last_norm: f64,
}

impl Loop<'_, '_> {
    /// Takes the last checkpoint up, if there is one.
    fn resume(&mut self, parameters: &mut Parameters, hooks: &mut dyn Hooks) -> Result<()> {
        let (fingerprint, ema) = (self.standing.fingerprint.clone(), self.ema.as_mut());
        let found = self.folder.load(&fingerprint, parameters, ema, &mut self.optimizer)?;
        if let Some((standing, saved)) = found {
            tracing::info!(step = standing.step, "training goes on from its checkpoint");
            self.standing = standing;
            hooks.restore(saved, parameters, &mut self.optimizer)?;
        }
        self.saved = Some((self.standing.step, Instant::now()));
        Ok(())
    }

    fn go(
        &mut self,
        model: &mut dyn LossAndGradients,
        parameters: &mut Parameters,
        hooks: &mut dyn Hooks,
    ) -> Result<()> {
        if self.standing.step == 0 && self.validation.is_some() {
            let start = Instant::now();
            self.run.progress.report(0.0, "measuring before training")?;
            let sums = self.measure(model, parameters)?;
            self.validated(sums)?;
            self.standing.seconds += start.elapsed().as_secs_f64();
        }
        while self.standing.step < self.total && !self.standing.stopped {
            let start = Instant::now();
            self.report(hooks)?;
            let tokens = self.update(model, parameters, hooks)?;
            let seconds = start.elapsed().as_secs_f64();
            self.standing.tokens += tokens;
            self.standing.training_seconds += seconds;
            self.rate.add(tokens, seconds);
            self.times.add(seconds);
            let last = self.standing.step == self.total;
            let due = last || self.standing.step.is_multiple_of(self.validate_every);
            if self.validation.is_some() && due {
                self.validate(model, parameters)?;
            }
            self.standing.seconds += start.elapsed().as_secs_f64();
            if last || self.standing.stopped || self.checkpoint_due() {
                self.checkpoint(parameters, hooks)?;
            }
        }
        self.report(hooks)?;
        // What comes after this is not training.
        self.run.progress.measure(Metrics::new());
        Ok(())
    }

    /// One update; gives the tokens that it took.
    fn update(
        &mut self,
        model: &mut dyn LossAndGradients,
        parameters: &mut Parameters,
        hooks: &mut dyn Hooks,
    ) -> Result<u64> {
        let update = self.standing.step;
        let place = Place { step: update + 1, total: self.total, rate: self.schedule.rate(update) };
        let (mut sums, mut tokens, mut sum) = (LossSums::default(), 0, Gradients::new());
        for micro in 0..self.training.batches_of(update) {
            self.run.progress.check()?;
            let batch = self.training.batch(update, micro)?;
            tokens += batch.used() as u64;
            let (part, found) = model.loss_and_gradients(&batch, parameters)?;
            if !part.loss.is_finite() {
                if hooks.skip(place) {
                    self.standing.step += 1;
                    return Ok(tokens);
                }
                return Err(self.diverged(place, &loss_name(parameters)?));
            }
            self.standing.resident = self.standing.resident.max(memory::resident());
            sums.add(part);
            gradients::add(&mut sum, found)?;
        }
        gradients::check(&sum, parameters)?;
        gradients::scale(&mut sum, 1.0 / sums.count.max(1) as f64)?;
        if let Some((loss, found)) = hooks.penalty(place, parameters)? {
            if !loss.is_finite() {
                return Err(self.diverged(place, "the penalty"));
            }
            gradients::check(&found, parameters)?;
            gradients::add(&mut sum, found)?;
        }
        hooks.after_backward(place, parameters, &mut sum)?;
        let norm = match gradients::norm(&sum)? {
            Ok(norm) => norm,
            Err(_) if hooks.skip(place) => {
                self.standing.step += 1;
                return Ok(tokens);
            }
            Err(name) => return Err(self.diverged(place, &format!("the gradient of '{name}'"))),
        };
        if let Some(most) = self.run.settings.clip_norm {
            gradients::clip(&mut sum, norm, most)?;
        }
        self.optimizer.update(parameters, &sum, place.rate)?;
        let optimizer = &mut self.optimizer;
        hooks.after_step(Updated { place, parameters, gradients: &sum, optimizer })?;
        if let Some(ema) = &mut self.ema {
            ema.update(parameters)?;
        }
        self.standing.step += 1;
        self.standing.history.add(place.step, sums, (place.rate, norm), hooks.metrics());
        (self.last_sums, self.last_norm) = (sums, norm);
        Ok(tokens)
    }

    /// Measures, keeps what is the best, and sees whether it is time to stop.
    fn validate(
        &mut self,
        model: &mut dyn LossAndGradients,
        parameters: &Parameters,
    ) -> Result<()> {
        if let Some(ema) = &mut self.ema {
            ema.swap(parameters)?;
        }
        let result = self.measure(model, parameters).and_then(|sums| {
            let loss = self.validated(sums)?;
            let least = self.standing.best.map(|best| best.loss - self.run.settings.min_delta);
            if least.is_none_or(|least| loss < least) {
                let step = self.standing.step;
                if !self.run.settings.keep_last {
                    self.folder.save_best(step, parameters)?;
                }
                self.standing.best = Some(Best { step, loss });
                self.standing.waited = 0;
            } else {
                self.standing.waited += 1;
                let patience = self.run.settings.patience;
                self.standing.stopped = patience.is_some_and(|most| self.standing.waited >= most);
            }
            Ok(())
        });
        // Back even after an error: who called may look at the parameters.
        if let Some(ema) = &mut self.ema {
            ema.swap(parameters)?;
        }
        result
    }

    /// The sums of the validation data.
    fn measure(
        &mut self,
        model: &mut dyn LossAndGradients,
        parameters: &Parameters,
    ) -> Result<LossSums> {
        let mut sums = LossSums::default();
        let Some(order) = &mut self.validation else { return Ok(sums) };
        for update in 0..order.updates() as u64 {
            for micro in 0..order.batches_of(update) {
                self.run.progress.check()?;
                sums.add(model.loss(&order.batch(update, micro)?, parameters)?);
            }
        }
        Ok(sums)
    }

    /// Writes a measurement into the history; gives the loss.
    fn validated(&mut self, sums: LossSums) -> Result<f64> {
        let (step, loss) = (self.standing.step, sums.mean());
        if !loss.is_finite() {
            let place = Place { step, total: self.total, rate: self.schedule.rate(step) };
            return Err(self.diverged(place, "the loss on validation data"));
        }
        let objective = self.run.settings.objective(self.run.validation)?;
        let accuracy = objective.classifies().then(|| sums.accuracy());
        self.standing.history.validated(Validation { step, loss, accuracy });
        Ok(loss)
    }

    fn checkpoint_due(&self) -> bool {
        let Some((step, time)) = self.saved else { return true };
        match self.run.settings.checkpoint_every {
            Some(every) => self.standing.step - step >= every,
            None => time.elapsed() >= CHECKPOINT_INTERVAL,
        }
    }

    fn checkpoint(&mut self, parameters: &Parameters, hooks: &mut dyn Hooks) -> Result<()> {
        // Only what can be gone on from is kept.
        for (name, parameter) in parameters {
            if !tensors::finite(&parameter.var)? {
                let step = self.standing.step;
                let rate = self.schedule.rate(step.saturating_sub(1));
                let place = Place { step, total: self.total, rate };
                return Err(self.diverged(place, &format!("'{name}'")));
            }
        }
        // The best of a run that keeps its last has no file.
        let (ema, hooks) = (self.ema.as_ref(), hooks.save()?);
        self.folder.save(&mut self.standing, parameters, ema, &self.optimizer, &hooks)?;
        self.saved = Some((self.standing.step, Instant::now()));
        Ok(())
    }

    /// Says where the run stands, and hears whether it is to stop.
    fn report(&self, hooks: &dyn Hooks) -> Result<()> {
        let step = self.standing.step;
        let epoch = step as f64 / self.training.updates() as f64;
        let message = format!("training: update {step} of {}, epoch {epoch:.2}", self.total);
        let mut metrics = hooks.metrics();
        let mut show = |name: &str, value: f64| metrics.insert(name.to_owned(), value);
        show("step", step as f64);
        show("steps", self.total as f64);
        show("epoch", epoch);
        if step > 0 {
            show("learning_rate", self.schedule.rate(step - 1));
        }
        if self.last_sums.count > 0 {
            show("loss", self.last_sums.mean());
            show("gradient_norm", self.last_norm);
        }
        if let Some(rate) = self.rate.tokens_per_second {
            show("tokens_per_second", rate);
        }
        if let Some(validation) = self.standing.history.validations.last() {
            show("validation_step", validation.step as f64);
            show("validation_loss", validation.loss);
            if let Some(accuracy) = validation.accuracy {
                show("validation_accuracy", accuracy);
            }
        }
        let resident = memory::resident();
        if resident > 0 {
            show("resident_bytes", resident as f64);
        }
        self.run.progress.measure(metrics);
        self.run.progress.report(step as f64 / self.total as f64, &message)
    }

    /// Leaves the parameters as the run was asked for, and says how it went.
    fn finish(mut self, parameters: &Parameters) -> Result<v1::TrainingReport> {
        let (standing, settings) = (&self.standing, self.run.settings);
        let mut kept = standing.step;
        match standing.best {
            Some(best) if !settings.keep_last => {
                self.folder.load_best(best.step, parameters)?;
                kept = best.step;
            }
            _ => {
                if let Some(ema) = &mut self.ema {
                    ema.swap(parameters)?;
                }
            }
        }
        let mut warnings = Vec::new();
        let before = standing.history.validations.first().filter(|first| first.step == 0);
        if let Some((best, before)) = standing.best.zip(before)
            && best.loss >= before.loss
        {
            warnings.push(format!(
                "the validation loss never fell below that of the model before training, {:.4}: lower \
                 learning_rate, or check that both data sets are alike",
                before.loss
            ));
        }
        let tokens = standing.tokens as f64;
        Ok(v1::TrainingReport {
            steps: signed(standing.step),
            planned_steps: signed(self.total),
            epochs: standing.step as f64 / self.training.updates() as f64,
            end: match standing.stopped {
                true => v1::TrainingEnd::StoppedEarly,
                false => v1::TrainingEnd::Completed,
            }
            .into(),
            trained_parameters: parameters
                .values()
                .map(|parameter| signed(parameter.var.elem_count() as u64))
                .sum(),
            tokens: signed(standing.tokens),
            tokens_per_second: match standing.training_seconds {
                seconds if seconds > 0.0 => tokens / seconds,
                _ => 0.0,
            },
            seconds: standing.seconds,
            points: standing.history.points_message(),
            validations: standing.history.validations_message(),
            kept_step: signed(kept),
            estimated_memory_bytes: 0, // the caller knows
            resident_memory_bytes: signed(standing.resident),
            warnings,
            step_seconds: self.times.median(),
        })
    }

    /// The end of a run whose numbers are no numbers any more.
    fn diverged(&self, place: Place, what: &str) -> Error {
        let settings = self.run.settings;
        let mut remedies = vec![format!("lower learning_rate ({:e} here)", place.rate)];
        remedies.push("lengthen the warm-up".to_owned());
        match settings.clip_norm {
            None => remedies.push("set clip_norm".to_owned()),
            Some(norm) => remedies.push(format!("lower clip_norm ({norm} here)")),
        }
        if settings.precision == Precision::Bf16 {
            remedies.push("train with precision f32".to_owned());
        }
        let kept = match self.saved {
            Some((step, _)) if step > 0 => format!("the last good checkpoint is of update {step}"),
            _ => "there is no checkpoint yet".to_owned(),
        };
        Error::new(
            Reason::NonFinite,
            format!(
                "update {} of {}: {what} is not finite; {}; {kept}",
                place.step,
                place.total,
                remedies.join(", or ")
            ),
        )
    }
}

/// What to blame for a loss that is not finite: a trained tensor that is not, or the loss itself.
fn loss_name(parameters: &Parameters) -> Result<String> {
    for (name, parameter) in parameters {
        if !tensors::finite(&parameter.var)? {
            return Ok(format!("'{name}'"));
        }
    }
    Ok("the loss".to_owned())
}

/// Tokens a second of the last updates.
#[derive(Default)]
struct Rate {
    tokens_per_second: Option<f64>,
}

impl Rate {
    fn add(&mut self, tokens: u64, seconds: f64) {
        if seconds > 0.0 {
            let now = tokens as f64 / seconds;
            let before = self.tokens_per_second.unwrap_or(now);
            self.tokens_per_second = Some(0.8 * before + 0.2 * now);
        }
    }
}

/// Updates whose times are remembered, at most.
const TIMES: usize = 4096;

/// How long the last updates took.
#[derive(Default)]
struct Times(VecDeque<f64>);

impl Times {
    fn add(&mut self, seconds: f64) {
        if self.0.len() == TIMES {
            self.0.pop_front();
        }
        self.0.push_back(seconds);
    }

    /// The middle one, the upper of two; 0 of none.
    fn median(&self) -> f64 {
        let mut sorted: Vec<f64> = self.0.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
