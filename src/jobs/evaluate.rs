//! Measuring: models as they are, and with what was tuned.

use std::time::Instant;

use prost::Message;

use super::work::Job;
use super::{norms, tuning};
use crate::error::{Error, Reason, Result};
use crate::eval::{self, task};
use crate::methods::Datasets;
use crate::methods::adapt::tuned::Tuned;
use crate::models::{AnyModel, Model, not_for_text};
use crate::nn::ops::Precision;
use crate::progress::Progress;
use crate::proto::v1;
use crate::store::adapters::AdapterRow;
use crate::store::models::VersionRow;
use crate::store::names;
use crate::train::head::HEAD_WEIGHT;
use crate::train::network::Network;
use crate::train::parameters::Parameters;

/// Tokens of a record of a task where nobody says.
const MAX_LENGTH: usize = 512;

/// Gives an encoded `EvaluationReport`.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::EvaluateRequest = job.request()?;
    let options = request.evaluation.unwrap_or_default();
    let row = job.wait(job.store.version(&request.model))?;
    let base = match request.base.as_str() {
        "" => None,
        name => Some(job.wait(job.store.version(name))?),
    };
    if request.adapter.is_empty() {
        return Ok(job
            .measure_version(&row, base.as_ref(), &options, &job.progress)?
            .encode_to_vec());
    }
    let start = Instant::now();
    let adapter = job.wait(job.store.adapter(names::adapter(&request.adapter)?))?;
    let (measurements, norms) = with_adapter(job, &row, base.as_ref(), &adapter, &options)?;
    let report = v1::EvaluationReport {
        version: row.name(),
        digest: row.digest.clone(),
        measurements,
        seconds: start.elapsed().as_secs_f64(),
        adapter: adapter.name(),
        adapter_digest: adapter.digest,
        norms,
    };
    Ok(report.encode_to_vec())
}

/// Refuses an adapter that was made for another version.
pub fn fits(adapter: &AdapterRow, version: &VersionRow) -> Result<()> {
    let made_for = adapter.lineage.as_ref().map(|lineage| lineage.base_digest.as_str());
    if adapter.base_version == version.name() || made_for == Some(version.digest.as_str()) {
        return Ok(());
    }
    let (name, base, version) = (adapter.name(), &adapter.base_version, version.name());
    Err(Error::at(
        Reason::ModelUnsuitable,
        "adapter",
        format!("{name} was made for {base}, not for {version}; name that version"),
    ))
}

fn with_adapter(
    job: &Job<'_>,
    row: &VersionRow,
    base: Option<&VersionRow>,
    adapter: &AdapterRow,
    options: &v1::Evaluation,
) -> Result<(Vec<v1::Measurement>, Option<v1::NormReport>)> {
    fits(adapter, row)?;
    job.progress.report(0.0, "reading the adapter")?;
    let model = job.open(row)?;
    let (tuned, head) = tuning::read(job, adapter, (row, &model))?;
    let base = base.map(|base| job.open(base)?.decoder()).transpose()?;
    let lineage = adapter.lineage.clone().unwrap_or_default();
    let adapted = Adapted {
        model: &model,
        tuned: &tuned,
        head: &head,
        labels: &lineage.labels,
        max_length: lineage.training.and_then(|t| t.max_length).map(|length| length as usize),
        disk_bytes: row.total_bytes.unsigned_abs(),
    };
    let (first, second) = halves(options, &job.progress);
    let base = base.as_ref().map(eval::Base::Model);
    let measurements = job.measure_adapted(&adapted, base, options, &first)?;
    Ok((measurements, job.norms(row, &model, options, &second)?))
}

/// Shares of the measurements and of the sizes of queries and keys, equal ones where there is both: how they
/// compare is not known beforehand.
fn halves(options: &v1::Evaluation, progress: &Progress) -> (Progress, Progress) {
    match options.norm_bounds {
        Some(_) => (progress.part(0.0, 0.5), progress.part(0.5, 1.0)),
        None => (progress.clone(), progress.clone()),
    }
}

/// A model to measure, see [`eval::Subject`].
pub struct Measured<'a> {
    pub model: &'a Model,
    pub states: Option<&'a eval::States>,
    pub base: Option<eval::Base<'a>>,
    pub disk_bytes: u64,
}

/// A model with what was tuned.
pub struct Adapted<'a> {
    pub model: &'a AnyModel,
    pub tuned: &'a Tuned,
    /// Empty where the model has a head of its own.
    pub head: &'a Parameters,
    /// Names of the classes by their index; empty where they are not known.
    pub labels: &'a [String],
    /// Tokens of a record, where the evaluation does not say.
    pub max_length: Option<usize>,
    pub disk_bytes: u64,
}

impl Job<'_> {
    /// Measures a model with the data sets that the options name.
    pub fn measure(
        &self,
        subject: &Measured<'_>,
        options: &v1::Evaluation,
        progress: &Progress,
    ) -> Result<Vec<v1::Measurement>> {
        let subject = (subject, None);
        let Some(asked) = &options.task else { return self.decoder(subject, options, progress) };
        let mut found = self.decoder(subject, options, &progress.part(0.0, 0.5))?;
        let (subject, _) = subject;
        let adapted = Adapted {
            model: &subject.model.into(),
            tuned: &Tuned::default(),
            head: &Parameters::new(),
            labels: &[],
            max_length: None,
            disk_bytes: subject.disk_bytes,
        };
        found.extend(self.task(&adapted, asked, &progress.part(0.5, 1.0))?);
        Ok(found)
    }

    /// Measures a model that is neither a decoder nor an encoder.
    pub fn measure_net(
        &self,
        model: &AnyModel,
        disk_bytes: u64,
        options: &v1::Evaluation,
        progress: &Progress,
    ) -> Result<Vec<v1::Measurement>> {
        let text = match options.dataset.as_str() {
            "" => None,
            name => Some(self.text(name)?),
        };
        let images = options.images.as_ref().map(|images| self.images(&images.dataset));
        let subject = eval::nets::Subject {
            model,
            text: text.as_ref().map(|text| text.as_str()),
            images: images.transpose()?,
            disk_bytes,
        };
        eval::nets::evaluate(&subject, options, progress)
    }

    /// All but the task. The second model is the one whose sizes are told, where it is another.
    fn decoder(
        &self,
        (subject, stored): (&Measured<'_>, Option<&Model>),
        options: &v1::Evaluation,
        progress: &Progress,
    ) -> Result<Vec<v1::Measurement>> {
        eval::nets::no_images(options)?;
        let text = match options.dataset.as_str() {
            "" => None,
            name => Some(self.text(name)?),
        };
        let choices = options.choice.as_ref().map(|choice| self.items(&choice.dataset));
        let choices = choices.transpose()?;
        let further = options.texts.iter().map(|text| self.text(&text.dataset));
        let further = further.collect::<Result<Vec<_>>>()?;
        let subject = eval::Subject {
            model: subject.model,
            further: &further,
            states: subject.states,
            base: subject.base,
            text: text.as_ref().map(|text| text.as_str()),
            choices: choices.as_deref(),
            disk_bytes: subject.disk_bytes,
            stored,
        };
        eval::evaluate(&subject, options, progress)
    }

    /// Measures a model with what was tuned: sizes of the model alone, texts and choices with what was tuned
    /// put into f32 weights, the task through the forward that was trained. Speeds and counts are the model's
    /// own.
    pub fn measure_adapted(
        &self,
        adapted: &Adapted<'_>,
        base: Option<eval::Base<'_>>,
        options: &v1::Evaluation,
        progress: &Progress,
    ) -> Result<Vec<v1::Measurement>> {
        let disk_bytes = adapted.disk_bytes;
        let (first, second) = (progress.part(0.0, 0.5), progress.part(0.5, 1.0));
        let mut found = match adapted.model {
            AnyModel::Encoder(model) => {
                eval::check_encoder(options).map_err(|e| e.within("evaluation"))?;
                eval::encoder_sizes(model, disk_bytes)
            }
            AnyModel::Decoder(model) => {
                let reads = !options.dataset.is_empty() || options.choice.is_some();
                let mut whole = model.clone();
                if reads {
                    whole.weights.extend(adapted.tuned.dense(&model.weights, &first)?);
                }
                let subject = Measured { model: &whole, states: None, base, disk_bytes };
                let own = v1::Evaluation {
                    speed: false,
                    counts: false,
                    kernels: false,
                    ..options.clone()
                };
                let mut found = self.decoder((&subject, Some(model)), &own, &first)?;
                if options.speed || options.counts || options.kernels {
                    let of_model = v1::Evaluation {
                        dataset: String::new(),
                        texts: Vec::new(),
                        compare_with_base: false,
                        choice: None,
                        ..options.clone()
                    };
                    let subject = Measured { model, states: None, base: None, disk_bytes };
                    let more = self.decoder((&subject, None), &of_model, &first)?;
                    let known = |m: &v1::Measurement| found.iter().any(|f| f.metric == m.metric);
                    let more: Vec<_> = more.into_iter().filter(|m| !known(m)).collect();
                    found.extend(more);
                }
                found
            }
            model => return Err(not_for_text(model.family())),
        };
        if let Some(asked) = &options.task {
            found.extend(self.task(adapted, asked, &second)?);
        }
        Ok(found)
    }

    /// Measures a task.
    fn task(
        &self,
        adapted: &Adapted<'_>,
        asked: &v1::TaskEvaluation,
        progress: &Progress,
    ) -> Result<Vec<v1::Measurement>> {
        let model = adapted.model;
        if matches!(model, AnyModel::Encoder(_)) && !adapted.head.contains_key(HEAD_WEIGHT) {
            return Err(Error::at(
                Reason::ModelUnsuitable,
                "evaluation.task",
                "the encoder has no head for a task; name an adapter that was trained with one",
            ));
        }
        let seen = match model {
            AnyModel::Encoder(model) => model.family.max_tokens,
            AnyModel::Decoder(model) => model.decoder()?.max_positions,
            model => return Err(not_for_text(model.family())),
        };
        let length = asked.max_length.map(|length| length as usize).or(adapted.max_length);
        let length = length.unwrap_or(MAX_LENGTH).min(seen);
        let records = tuning::task(self, model, asked, (adapted.labels, length), progress)?;
        let network = Network::new(model, Precision::F32, false)?;
        let subject =
            task::Subject { network: &network, tuning: adapted.tuned, head: adapted.head };
        task::measure(&subject, &records, &asked.dataset, progress)
    }

    /// Sizes of queries and keys, where asked for.
    fn norms(
        &self,
        row: &VersionRow,
        model: &AnyModel,
        options: &v1::Evaluation,
        progress: &Progress,
    ) -> Result<Option<v1::NormReport>> {
        match (&options.norm_bounds, model) {
            (None, _) => Ok(None),
            (Some(bounds), AnyModel::Decoder(model)) => {
                norms::measure(self, row, model, bounds, progress).map(Some)
            }
            (Some(_), _) => Err(Error::at(
                Reason::ModelUnsuitable,
                "evaluation.norm_bounds",
                "is measured of decoders; leave it out",
            )),
        }
    }

    /// Measures a stored version.
    pub fn measure_version(
        &self,
        row: &VersionRow,
        base: Option<&VersionRow>,
        options: &v1::Evaluation,
        progress: &Progress,
    ) -> Result<v1::EvaluationReport> {
        let start = Instant::now();
        let model = self.open(row)?;
        let base = base.map(|base| self.open(base)?.decoder()).transpose()?;
        let base = base.as_ref().map(eval::Base::Model);
        let disk_bytes = row.total_bytes.unsigned_abs();
        let (first, second) = halves(options, progress);
        let measurements = match &model {
            AnyModel::Decoder(model) => {
                let subject = Measured { model, states: None, base, disk_bytes };
                self.measure(&subject, options, &first)?
            }
            AnyModel::Encoder(_) => {
                let adapted = Adapted {
                    model: &model,
                    tuned: &Tuned::default(),
                    head: &Parameters::new(),
                    labels: &[],
                    max_length: None,
                    disk_bytes,
                };
                self.measure_adapted(&adapted, base, options, &first)?
            }
            other => self.measure_net(other, disk_bytes, options, progress)?,
        };
        Ok(v1::EvaluationReport {
            version: row.name(),
            digest: row.digest.clone(),
            measurements,
            norms: self.norms(row, &model, options, &second)?,
            seconds: start.elapsed().as_secs_f64(),
            ..Default::default()
        })
    }
}
