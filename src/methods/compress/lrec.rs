//! LREC, the error correction of INT2.1 (Chai et al. 2023, "INT2.1: towards fine-tunable quantized large
//! language models with error correction through low-rank adaptation", arXiv 2306.08162): weights are
//! quantised, then a low-rank correction beside each is trained so that the model answers as the unquantised
//! one does, `kl KL(teacher || student) + ce CE(text)`. What comes out is the sum of both, kept apart: rounded
//! into the grid the correction would be lost.
//!
//! Decided here: both losses are means over tokens (the published program divides the divergence by the
//! number of sequences and multiplies the other by 200: at its length that is 1 to 0.098); the learning rate
//! falls linearly after a short warm-up; factors are kept as f16 with the scale inside the left one. Weight
//! decay is a part of the gradient that Adam sees, as published. An update whose loss or gradient is not
//! finite is left out; ten in a row end the step.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;

use super::grid::Grid;
use super::report::Report;
use super::{options, store, windows_of};
use crate::calibrate;
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::methods::adapt::learner::Learner;
use crate::methods::adapt::lora;
use crate::methods::adapt::options::Site;
use crate::methods::adapt::tuned::Tuned;
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::decoder::graph::Graph;
use crate::models::{Model, ModelInfo, TensorInfo, decoder};
use crate::nn::dtype::Dtype;
use crate::nn::ops::{Precision, Weights};
use crate::nn::tuning::{Frozen, Tuning};
use crate::nn::weight::{Factored, Record, Sum, Weight};
use crate::progress::Progress;
use crate::proto::v1::{self, LoraStart, LrecQuantiser, LrecTeacher, TrainingPrecision};
use crate::train::distillation::{Distillation, Known, Online, Parts, Teacher};
use crate::train::hooks::{Hooks, Place, Updated};
use crate::train::memory::Transformer;
use crate::train::parameters::{Gradients, Parameters};
use crate::train::pass::{self, Pass};
use crate::train::run::{Needs, Run};
use crate::train::settings::Settings;

static CARD: Card = Card {
    name: "lrec",
    title: "LREC",
    verb: "compress",
    summary: "Quantises weights and trains a low-rank correction of each against the unquantised model.",
    paper: "INT2.1: Towards Fine-Tunable Quantized Large Language Models with Error Correction through \
            Low-Rank Adaptation, arXiv 2306.08162",
    needs_calibration: true,
    families: &["decoder"],
    followed_by: &[],
};

const RATE: f64 = 1e-3;
/// Updates in a row that may be left out.
const MOST_SKIPPED: u32 = 10;
/// Bytes of an element of a factor.
const FACTOR: Dtype = Dtype::F16;
/// Elements of logits that are there at once, of student and teacher.
const LOGITS: usize = 2 * (16 << 20);
/// Products a second of an estimate, as the other methods have it.
const FLOPS: f64 = 6e10;

/// Checked options.
struct Read {
    grid: Grid,
    quantiser: LrecQuantiser,
    rank: usize,
    alpha: f64,
    weights: Weights,
    teacher: LrecTeacher,
    top_k: usize,
    text: calibrate::Options,
    validation_share: f64,
    training: v1::Training,
    settings: Settings,
    decay: f64,
}

fn read(options: &v1::Lrec) -> Result<Read> {
    let mut options = options.clone();
    options.resolve();
    let choice = |name: &str, known: bool, number: i32| match known {
        true => Ok(()),
        false => Err(Error::option(name, format!("{number} stands for nothing here"))),
    };
    let quantiser = LrecQuantiser::try_from(options.quantiser);
    choice("quantiser", quantiser.is_ok(), options.quantiser)?;
    let teacher = LrecTeacher::try_from(options.teacher);
    choice("teacher", teacher.is_ok(), options.teacher)?;
    let precision = TrainingPrecision::try_from(options.precision);
    choice("precision", precision.is_ok(), options.precision)?;
    let grid = Grid::read(options.grid.as_ref())?;
    if quantiser == Ok(LrecQuantiser::Gptq) {
        calibrate::Options::read(options.calibration.as_ref())?;
        options::damp(options.damp)?;
    }
    let within = |name: &str, value: Option<u32>, most: u32| match value.unwrap_or_default() {
        value if (1..=most).contains(&value) => Ok(value as usize),
        value => Err(Error::option(name, format!("{value} is outside 1 to {most}"))),
    };
    let number = |name: &str, value: Option<f64>, zero: bool| {
        let value = value.unwrap_or_default();
        match value.is_finite() && (value > 0.0 || zero && value == 0.0) {
            true => Ok(value),
            false => Err(Error::option(
                name,
                format!("{value} is not a number {}", if zero { "from 0 on" } else { "above 0" }),
            )),
        }
    };
    let rank = within("rank", options.rank, 1 << 14)?;
    let alpha = number("alpha", options.alpha, false)?;
    let weights =
        Weights { kl: number("kl", options.kl, true)?, ce: number("ce", options.ce, true)? };
    if weights.kl == 0.0 && weights.ce == 0.0 {
        return Err(Error::option("kl", "0 together with ce 0 leaves nothing to learn"));
    }
    let top_k = within("top_k", options.top_k, 1 << 16)?;
    let text = calibrate::Options::read(options.text.as_ref())
        .map_err(|error| renamed(error, "calibration.", "text."))?;
    if text.sequences < 2 {
        return Err(Error::option("text.sequences", "1 leaves none to measure on; take 2 or more"));
    }
    let validation_share = options.validation_share.unwrap_or_default();
    if !(validation_share > 0.0 && validation_share <= 0.5) {
        let message = format!("{validation_share} is outside (0, 0.5]");
        return Err(Error::option("validation_share", message));
    }
    let decay = number("weight_decay", options.weight_decay, true)?;
    let training = v1::Training {
        epochs: options.epochs,
        batch_size: options.batch_size,
        max_length: u32::try_from(text.length).ok(),
        learning_rate: options.learning_rate,
        precision: options.precision,
        checkpoint_activations: options.checkpoint_activations,
        validation: Some(v1::TrainingValidation {
            every_steps: options.validate_every,
            ..Default::default()
        }),
        ..Default::default()
    };
    let settings = Settings::read(&training, RATE)
        .map_err(|error| renamed(error, "validation.every_steps", "validate_every"))?;
    Ok(Read {
        grid,
        quantiser: quantiser.unwrap_or_default(),
        rank,
        alpha,
        weights,
        teacher: teacher.unwrap_or_default(),
        top_k,
        text,
        validation_share,
        training,
        settings,
        decay,
    })
}

/// The same error with another beginning of the option's name.
fn renamed(error: Error, from: &str, to: &str) -> Error {
    match error.violations().first() {
        Some(violation) => {
            Error::option(violation.field.replacen(from, to, 1), violation.description.clone())
        }
        None => error,
    }
}

/// What a tensor becomes.
fn corrected_info(base: &TensorInfo, [rows, cols]: [usize; 2], rank: usize) -> TensorInfo {
    TensorInfo {
        record: Record::Sum { base: Box::new(base.record.clone()), rank },
        shape: vec![rows, cols],
        bytes: base.bytes + (rank * (rows + cols) * FACTOR.size()) as u64,
    }
}

impl Method for v1::Lrec {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Grid::resolve(&mut self.grid);
        if self.quantiser == LrecQuantiser::Unspecified as i32 {
            self.quantiser = LrecQuantiser::Gptq as i32;
        }
        if self.quantiser == LrecQuantiser::Gptq as i32 {
            calibrate::Options::resolve(&mut self.calibration);
            self.damp.get_or_insert(options::DAMP);
        }
        let rank = *self.rank.get_or_insert(8);
        self.alpha.get_or_insert(4.0 * f64::from(rank));
        self.kl.get_or_insert(1.0);
        self.ce.get_or_insert(0.1);
        if self.teacher == LrecTeacher::Unspecified as i32 {
            self.teacher = LrecTeacher::Online as i32;
        }
        self.top_k.get_or_insert(64);
        let text = self.text.get_or_insert_default();
        text.sequences.get_or_insert(512);
        text.sequence_length.get_or_insert(128);
        calibrate::Options::resolve(&mut self.text);
        self.validation_share.get_or_insert(0.0625);
        self.validate_every.get_or_insert(50);
        self.epochs.get_or_insert(1.0);
        self.batch_size.get_or_insert(4);
        self.learning_rate.get_or_insert(RATE);
        self.weight_decay.get_or_insert(1e-5);
        if self.precision == TrainingPrecision::Unspecified as i32 {
            self.precision = TrainingPrecision::F32 as i32;
        }
    }

    fn datasets(&self) -> Vec<&str> {
        let gptq = self.quantiser != LrecQuantiser::RoundToNearest as i32;
        let calibration = self.calibration.iter().filter(|_| gptq);
        calibration.chain(&self.text).map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        true
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let read = read(self)?;
        let config = model_config(model)?;
        let quantiser = self.first_step();
        let (first, mut after) = quantiser.check(model)?;
        read.text.check(model).map_err(|error| renamed(error, "calibration.", "text."))?;
        for name in read.grid.names(&model.family)? {
            let (_, shape) = store::matrix(model, &name)?;
            let most = shape[0].min(shape[1]);
            if read.rank > most {
                let message = format!("{} is more than '{name}' has components, {most}", read.rank);
                return Err(Error::option("rank", message));
            }
            let info = corrected_info(&after.tensors[&name], shape, read.rank);
            after.tensors.insert(name, info);
        }
        let tokens = read.text.tokens();
        if read.teacher == LrecTeacher::TopK {
            let bytes = Known::bytes(tokens, read.top_k);
            if bytes > 8 << 30 {
                let message =
                    format!("the answers would take {bytes} bytes; lower it, or the text");
                return Err(Error::option("top_k", message));
            }
        }
        let epochs = self.epochs.unwrap_or(1.0);
        let elements: usize =
            model.tensors.values().map(|t| t.shape.iter().product::<usize>()).sum();
        // Forward, backward and the teacher's forward.
        let flops = 8.0 * elements as f64 * tokens as f64 * epochs;
        let seen = read.settings.batch_size * read.text.length;
        let held = activations(config, &read.settings, elements as u64, seen);
        let estimate = Estimate {
            weight_bytes: after.bytes(),
            memory_bytes: first.memory_bytes + held,
            seconds: first.seconds + flops / FLOPS,
            calibration_tokens: first.calibration_tokens + tokens,
        };
        Ok((estimate, after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let read = read(self)?;
        let names = read.grid.names(&model.family)?;
        let part = |from, to| cx.progress.part(from, to);

        let quantising = part(0.0, 0.2);
        // The same random numbers as the quantiser alone: the same codes.
        let mut own = StepContext {
            random: cx.random.clone(),
            progress: &quantising,
            texts: cx.texts,
            calibrations: cx.calibrations,
            digest: cx.digest,
            scratch: cx.scratch.clone(),
        };
        let quantised = self.first_step().apply(&mut own, model.clone())?;
        let reading = part(0.2, 0.25);
        let mut report = Report::default();
        let windows = windows_of::named(cx, &model, &read.text, ("text", &reading), &mut report)?;
        let mut sequences: Vec<Sequence> =
            windows.tokens.chunks_exact(windows.length).map(sequence).collect();
        let held_out = (sequences.len() as f64 * read.validation_share).round() as usize;
        let held_out = held_out.clamp(1, sequences.len().saturating_sub(1).max(1));
        let validation = sequences.split_off(sequences.len().saturating_sub(held_out));
        if sequences.is_empty() {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                "the text gives a single sequence; use a longer one, or shorter sequences",
            ));
        }
        let student = Student {
            read: &read,
            teacher: &model,
            quantised: &quantised.model,
            training: &sequences,
            validation: &validation,
        };
        let learnt = student.learn(cx, &names, &part(0.25, 1.0))?;

        let mut made = quantised.model;
        quantised.warnings.iter().for_each(|w| report.warn(w.clone()));
        if let Some(warning) = &learnt.warning {
            report.warn(warning.clone());
        }
        let (mut plain_bytes, mut bytes, mut elements) = (0, 0, 0);
        for name in &names {
            cx.progress.check()?;
            let base = made.weight(name)?;
            let sum = corrected(base, name, &learnt.tuned)?;
            let before = model.weight(name)?.to_f32();
            report.add(name, &before, &sum, None);
            plain_bytes += base.bytes();
            bytes += sum.bytes();
            elements += before.len() as u64;
            made.weights.insert(name.clone(), Arc::new(sum));
        }
        let bits = |bytes: u64| 8.0 * bytes as f64 / elements.max(1) as f64;
        let tokens = quantised.calibration_tokens + read.text.tokens();
        let mut outcome = report.outcome(made, tokens);
        outcome.record["bits_per_weight"] =
            json!({ "quantised": bits(plain_bytes), "corrected": bits(bytes) });
        outcome.record["quantiser"] = json!(read.quantiser.as_str_name());
        outcome.record["validation"] = learnt.record;
        Ok(outcome)
    }
}

impl v1::Lrec {
    /// The step that quantises.
    fn first_step(&self) -> Box<dyn Method> {
        match self.quantiser {
            q if q == LrecQuantiser::RoundToNearest as i32 => {
                Box::new(v1::RoundToNearest { grid: self.grid.clone() })
            }
            _ => Box::new(v1::Gptq {
                grid: self.grid.clone(),
                calibration: self.calibration.clone(),
                damp: self.damp,
                ..Default::default()
            }),
        }
    }
}

/// A window as training takes it: every token but the first counts.
fn sequence(tokens: &[u32]) -> Sequence {
    Sequence {
        tokens: tokens.to_vec(),
        target: Target::Next((0..tokens.len()).map(|i| i > 0).collect()),
        line: 0,
    }
}

fn model_config(model: &ModelInfo) -> Result<&decoder::Config> {
    match &model.family {
        crate::models::Family::Decoder(config) => Ok(config),
        crate::models::Family::Encoder(config) => Err(Error::at(
            Reason::ModelUnsuitable,
            "teacher",
            format!(
                "an encoder ({}) gives no probabilities of tokens that a correction could learn from; use \
                 gptq, or round_to_nearest",
                config.architecture
            ),
        )),
    }
}

/// What the passes of so many tokens hold, with what is packed of `elements` weights.
fn activations(config: &decoder::Config, settings: &Settings, elements: u64, tokens: usize) -> u64 {
    use crate::train::settings::Precision;
    let network = Transformer {
        layers: config.layers.len(),
        hidden: config.hidden,
        query: config.query_channels(),
        key_value: config.key_channels(),
        inner: config.intermediate,
        gates: 2,
        head: config.vocab.saturating_mul(512).min(LOGITS),
    };
    let packed = match settings.precision {
        Precision::F32 => 0,
        // Of the student two bytes for each direction, of the teacher for one.
        Precision::Bf16 => elements.saturating_mul(6),
    };
    let kept = network.activation_bytes(tokens, settings.checkpoint_activations);
    kept.saturating_add(packed)
}

/// The sum of a quantised weight and what was learnt of it.
fn corrected(base: &Arc<Weight>, name: &str, tuned: &Tuned) -> Result<Weight> {
    let module = tuned
        .modules
        .get(name)
        .ok_or_else(|| Error::internal(format!("no correction of '{name}' was trained")))?;
    let low_rank = module.low_rank()?;
    let scale = low_rank.scale as f32;
    let left: Vec<f32> = low_rank.b.iter().map(|v| v * scale).collect();
    let factors = Factored::from_f32(low_rank.shape, low_rank.rank, &left, &low_rank.a, FACTOR)
        .map_err(|error| {
            Error::new(error.reason(), format!("the correction of '{name}': {}", error.message()))
        })?;
    Ok(Weight::Sum(Sum::new((**base).clone(), factors)?))
}

/// What training works on.
struct Student<'a> {
    read: &'a Read,
    teacher: &'a Model,
    quantised: &'a Model,
    training: &'a [Sequence],
    validation: &'a [Sequence],
}

/// What was learnt, and what is to be kept of how.
struct Learnt {
    tuned: Tuned,
    record: serde_json::Value,
    warning: Option<String>,
}

impl Student<'_> {
    fn learn(
        &self,
        cx: &StepContext<'_>,
        names: &BTreeSet<String>,
        progress: &Progress,
    ) -> Result<Learnt> {
        let (read, settings) = (self.read, &self.read.settings);
        let precision = match settings.precision {
            crate::train::settings::Precision::F32 => Precision::F32,
            crate::train::settings::Precision::Bf16 => Precision::Bf16,
        };
        let student = Arc::new(Graph::new(self.quantised, precision)?);
        let teacher = Arc::new(Graph::new(self.teacher, precision)?);
        let tuned = self.start(cx, names)?;

        progress.report(0.0, "measuring before the correction")?;
        let options = pass::Options {
            checkpoint_activations: settings.checkpoint_activations,
            ..Default::default()
        };
        let measure = |graph: &Arc<Graph<'_>>, tuning: &dyn Tuning| {
            let taught =
                Distillation::new(Teacher::Online(Online::new(teacher.clone())), read.weights);
            let pass = Pass::decoder(graph.clone(), tuning, options).distilled(&taught);
            for some in self.validation.chunks(settings.batch_size) {
                progress.check()?;
                pass.loss(&some.iter().collect::<Vec<_>>(), &Parameters::new())?;
            }
            Ok::<Parts, Error>(taught.take())
        };
        let (whole, before) = (measure(&teacher, &Frozen)?, measure(&student, &Frozen)?);

        let online = || Online::new(teacher.clone());
        let known = match (read.weights.kl > 0.0, read.teacher) {
            (true, LrecTeacher::TopK) => {
                let all: Vec<Sequence> =
                    self.training.iter().chain(self.validation).cloned().collect();
                Some(Known::new(&online(), &all, read.top_k, &progress.part(0.02, 0.25))?)
            }
            _ => None,
        };
        let taught = match &known {
            Some(known) => Teacher::Known(known),
            None if read.weights.kl > 0.0 => Teacher::Online(online()),
            None => Teacher::None,
        };
        let taught = Distillation::new(taught, read.weights);
        let mut learner = Learner::new(
            Pass::decoder(student.clone(), &tuned, options).distilled(&taught),
            &tuned,
        );
        let config = student.config();
        let held = self.teacher.bytes() + self.quantised.bytes();
        let elements = self.teacher.parameters();
        let needs = |tokens: usize| activations(config, settings, elements, tokens);
        let folder = cx.scratch.join("lrec");
        let training = progress.part(0.25, 0.97);
        let run = Run {
            settings,
            training: self.training,
            validation: self.validation,
            padding: 0,
            masking: None,
            random: cx.random.child("correction"),
            folder: &folder,
            progress: &training,
            needs: Needs { weights: held, activations: &needs },
        };
        let mut hooks = Decay { by: read.decay, in_a_row: 0, skipped: 0 };
        let report = run.train(&mut learner, &mut tuned.parameters(), &mut hooks)?;
        drop(learner);

        progress.report(0.98, "measuring the correction")?;
        let after = measure(&student, &tuned)?;
        let warning = (hooks.skipped > 0).then(|| {
            format!("{} updates were left out: their numbers were not finite", hooks.skipped)
        });
        let worse = report.warnings.first().cloned();
        let point = |parts: Parts| {
            let [kl, ce] = parts.means();
            json!({ "perplexity": ce.exp(), "kl": kl })
        };
        let record = json!({
            "tokens": whole.count,
            "teacher": { "perplexity": whole.means()[1].exp() },
            "quantised": point(before),
            "corrected": point(after),
            // Of the objective; the numbers above are exact.
            "training_divergence": match (&known, read.weights.kl > 0.0) {
                (Some(_), _) => format!("of the {} likeliest tokens and the rest together", read.top_k),
                (None, true) => "exact".to_owned(),
                (None, false) => "none".to_owned(),
            },
            "updates": report.steps,
            "kept_update": report.kept_step,
            "skipped_updates": hooks.skipped,
            "trained_parameters": report.trained_parameters,
            "learning_rate": read.training.learning_rate,
        });
        Ok(Learnt { tuned, record, warning: warning.or(worse) })
    }

    /// Corrections that add nothing yet.
    fn start(&self, cx: &StepContext<'_>, names: &BTreeSet<String>) -> Result<Tuned> {
        let random = cx.random.child("correction");
        let mut tuned = Tuned::new(0.0, random.path());
        for name in names {
            let weight = self.quantised.weight(name)?;
            let site = Site {
                linear: name.clone(),
                shape: [weight.rows(), weight.cols()],
                rank: self.read.rank,
                alpha: self.read.alpha,
                rslora: false,
            };
            let module = lora::fresh(&site, LoraStart::Uniform, &random.child("init").child(name))?;
            tuned.modules.insert(name.clone(), module);
        }
        Ok(tuned)
    }
}

/// L2 in the gradient, and patience with updates that are not finite.
struct Decay {
    by: f64,
    in_a_row: u32,
    skipped: u32,
}

impl Hooks for Decay {
    fn after_backward(
        &mut self,
        _: Place,
        parameters: &Parameters,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.by > 0.0 {
            for (name, gradient) in gradients {
                if let Some(parameter) = parameters.get(name) {
                    *gradient = (&*gradient + (parameter.var.as_tensor() * self.by)?)?;
                }
            }
        }
        Ok(())
    }

    fn skip(&mut self, _: Place) -> bool {
        self.in_a_row += 1;
        let goes_on = self.in_a_row < MOST_SKIPPED;
        self.skipped += u32::from(goes_on);
        goes_on
    }

    fn after_step(&mut self, _: Updated<'_>) -> Result<()> {
        self.in_a_row = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
