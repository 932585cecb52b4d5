//! Tuning a model: what `Adapt` and the arms of comparisons do.

mod data;
mod files;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

pub use self::data::{Data, task};
pub use self::files::{Written, read, read_own};
use super::work::Job;
use crate::calibrate;
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::formats::peft::Plain;
use crate::methods::adapt::learner::Learner;
use crate::methods::adapt::tuned::Tuned;
use crate::methods::adapt::{Needs, Setup, gradients, moments};
use crate::models::AnyModel;
use crate::nn::ops::Precision;
use crate::progress::Progress;
use crate::proto::v1;
use crate::recipe::adapt::Plan;
use crate::seed::Stream;
use crate::store::adapters::{AdapterRow, NewAdapter};
use crate::store::models::VersionRow;
use crate::train::attention::Watched;
use crate::train::head;
use crate::train::hooks::{Hooks, Plain as NoHooks};
use crate::train::network::Network;
use crate::train::parameters::{Gradients, Parameters};
use crate::train::run::{Needs as Memory, Run};
use crate::train::settings;

/// Elements of weight gradients that are held at once before training.
const GRADIENT_ELEMENTS: usize = 64 << 20;

/// What a training works on.
pub struct Work<'a> {
    pub job: &'a Job<'a>,
    pub plan: &'a Plan,
    pub model: &'a AnyModel,
    /// Digest of the model, and of its weights alone.
    pub digest: &'a str,
    pub weights_digest: &'a str,
    pub data: &'a Data,
    pub random: &'a Stream,
    /// Where checkpoints go.
    pub kept: &'a Path,
    pub progress: &'a Progress,
}

/// What training made.
pub struct Made {
    pub tuned: Tuned,
    pub head: Parameters,
    pub report: v1::TrainingReport,
    /// Trained numbers without those of the head, and the ranks that are left of each adapted linear.
    pub trained: u64,
    pub ranks: Vec<usize>,
    /// Seconds from the start of the method to the first update, and of this run of the training.
    pub start_seconds: f64,
    pub own_seconds: f64,
}

/// The row that an adapter becomes.
pub struct Keep<'a> {
    pub id: &'a str,
    pub display_name: &'a str,
    pub base: &'a VersionRow,
    pub seed: u64,
    pub request_id: &'a str,
}

impl Work<'_> {
    /// Starts the method and trains. Where the folder of checkpoints holds one of the same training, that
    /// goes on.
    pub fn train(&self) -> Result<Made> {
        let (plan, data) = (self.plan, self.data);
        let network = network(self.model, plan)?;
        let activations = |tokens: usize| plan.activations(tokens);
        let progress = self.progress.part(0.1, 0.98);
        let run = Run {
            settings: &plan.settings,
            training: &data.training,
            validation: &data.validation,
            padding: data.padding,
            masking: data.masking.clone(),
            random: self.random.clone(),
            folder: self.kept,
            progress: &progress,
            needs: Memory { weights: plan.held(self.model.bytes()), activations: &activations },
        };
        let updates = run.updates()?;
        let (rate, stream) = (plan.settings.head_rate, self.random.child("head"));
        let head = match data.outputs {
            None if data.masking.is_some() => head::hidden_tokens(plan.hidden, rate, &stream)?,
            None => Parameters::new(),
            Some(outputs) => head::head(outputs, plan.hidden, rate, &stream)?,
        };
        let method = plan.method()?;
        let start = Instant::now();
        let tuned = self.start(&network, &head, updates, &self.progress.part(0.02, 0.1))?;
        let start_seconds = start.elapsed().as_secs_f64();
        let (trained, linears) = (tuned.count(), tuned.modules.keys().cloned());
        let linears: Vec<String> = linears.collect();
        let mut parameters = tuned.parameters();
        parameters.extend(head.iter().map(|(name, p)| (name.clone(), p.clone())));
        let mut hooks: Box<dyn Hooks> = match method.hooks(&tuned, updates)? {
            Some(hooks) => hooks,
            None => Box::new(NoHooks),
        };
        let start = Instant::now();
        let mut learner = Learner::new(network.pass(&tuned), &tuned);
        let mut report = match network.attention() {
            None => run.train(&mut learner, &mut parameters, hooks.as_mut())?,
            Some(choosing) => {
                // What was seen before training is not of it.
                choosing.take();
                let attention = &plan.settings.attention;
                let mut watched = Watched::new(hooks, Arc::clone(choosing), attention);
                let mut report = run.train(&mut learner, &mut parameters, &mut watched)?;
                report.warnings.extend(watched.warnings());
                report
            }
        };
        drop(learner);
        report.warnings.extend(tuned.notes.iter().cloned());
        let tuned = method.finish(tuned)?;
        let rank = |name: &String| tuned.modules.get(name).map_or(0, |module| module.rank);
        Ok(Made {
            ranks: linears.iter().map(rank).collect(),
            tuned,
            head,
            trained,
            start_seconds,
            own_seconds: start.elapsed().as_secs_f64(),
            report,
        })
    }

    /// Writes the files of an adapter into `folder`. `model` is the base's name for people.
    pub fn write(&self, made: &Made, model: &str, folder: &Path) -> Result<Written> {
        files::write(made, self, model, folder)
    }

    /// Keeps what was written into `folder` as an adapter.
    pub fn keep(&self, keep: &Keep<'_>, written: Written, folder: &Path) -> Result<AdapterRow> {
        let job = self.job;
        let new = NewAdapter {
            id: keep.id,
            display_name: keep.display_name,
            base_model: &keep.base.model,
            base_version: &keep.base.name(),
            method: written.method,
            facts: written.facts,
            source: &job.operation.name(),
            request_id: keep.request_id,
            lineage: Some(self.lineage(keep.seed)?),
        };
        job.wait(job.store.create_adapter(&new, folder, &written.names))
    }

    fn lineage(&self, seed: u64) -> Result<v1::AdapterLineage> {
        let plan = self.plan;
        Ok(v1::AdapterLineage {
            base_digest: self.digest.to_owned(),
            adaptation: Some(plan.adaptation.clone()),
            training: Some(plan.training.clone()),
            seed,
            data_digests: self.job.data_digests(&plan.datasets()?)?,
            code_version: env!("CARGO_PKG_VERSION").to_owned(),
            threads: i32::try_from(rayon::current_num_threads()).unwrap_or(i32::MAX),
            labels: self.data.labels.clone(),
        })
    }

    /// What is trained as it stands before the first update.
    fn start(
        &self,
        network: &Network<'_>,
        head: &Parameters,
        updates: u64,
        progress: &Progress,
    ) -> Result<Tuned> {
        let (plan, method) = (self.plan, self.plan.method()?);
        let mut setup = Setup {
            weights: self.model.weights(),
            shapes: &plan.shapes,
            random: self.random.clone(),
            progress,
            first_rate: plan.settings.schedule(updates).rate(0),
            gradients: None,
            moments: None,
        };
        match method.needs()? {
            Needs::Nothing => method.start(&mut setup),
            Needs::Gradients { samples, batch } => {
                let sample = self.sample(samples);
                let mut take = |i: usize, tuned: &Tuned| -> Result<Gradients> {
                    let records: Vec<&Sequence> =
                        sample.iter().skip(i * batch).take(batch).collect();
                    let mut parameters = tuned.parameters();
                    parameters.extend(head.iter().map(|(name, p)| (name.clone(), p.clone())));
                    let pass = network.pass(tuned);
                    let (sums, mut found) = pass.loss_and_gradients(&records, &parameters)?;
                    // Of the mean, as an update has it.
                    for gradient in found.values_mut() {
                        *gradient = (&*gradient * (1.0 / sums.count.max(1) as f64))?;
                    }
                    Ok(found)
                };
                let mut collector = gradients::Collector {
                    weights: self.model.weights(),
                    passes: sample.len().div_ceil(batch.max(1)),
                    pass: &mut take,
                    elements: GRADIENT_ELEMENTS,
                    progress,
                };
                setup.gradients = Some(&mut collector);
                method.start(&mut setup)
            }
            Needs::Moments(moments::Settings { context, normalisation }) => {
                let AnyModel::Decoder(model) = self.model else {
                    return Err(Error::new(
                        Reason::ModelUnsuitable,
                        "second moments are collected of decoders; choose another method",
                    ));
                };
                let texts = |name: &str| self.job.text(name);
                let sources = calibrate::Sources {
                    model,
                    texts: &texts,
                    stream: &self.random.child("context"),
                    progress,
                };
                let shared = calibrate::Shared::default();
                let windows = shared.windows(&context, self.digest, &sources)?;
                let mut collector =
                    moments::Collector { model, windows: &windows, normalisation, progress };
                setup.moments = Some(&mut collector);
                method.start(&mut setup)
            }
        }
    }

    /// Records of the training data, drawn by chance, as long as a row may be.
    fn sample(&self, count: usize) -> Vec<Sequence> {
        let records = &self.data.training;
        let mut rng = self.random.child("sample").rng();
        let chosen = rand::seq::index::sample(&mut rng, records.len(), count.min(records.len()));
        let most = self.plan.settings.max_length;
        chosen.iter().map(|i| cut(&records[i], most)).collect()
    }
}

/// The beginning of a sequence.
fn cut(sequence: &Sequence, most: usize) -> Sequence {
    let mut sequence = sequence.clone();
    if let Target::Pair { .. } = sequence.target {
        // Both halves are as long as a row may be.
        return sequence;
    }
    sequence.tokens.truncate(most);
    match &mut sequence.target {
        Target::Next(counts) => counts.truncate(most),
        Target::Tags(tags) => tags.truncate(most),
        Target::Hidden(tokens) => tokens.truncate(most),
        Target::Class(_) | Target::Value(_) | Target::Labels(_) | Target::Pair { .. } => {}
    }
    sequence
}

/// The forward of a model as a plan trains it.
pub fn network<'a>(model: &'a AnyModel, plan: &Plan) -> Result<Network<'a>> {
    let precision = match plan.settings.precision {
        settings::Precision::F32 => Precision::F32,
        settings::Precision::Bf16 => Precision::Bf16,
    };
    let settings = &plan.settings;
    let choosing = settings.attention.choosing();
    let network = Network::choosing(model, precision, settings.checkpoint_activations, choosing)?;
    Ok(network.with_beta(settings.beta as f32))
}

/// The tensors of a head by their names in the task's model.
fn plain(head: &Parameters) -> Result<BTreeMap<String, Plain>> {
    let plain = |(name, parameter): (&String, &crate::train::parameters::Parameter)| {
        let values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
        Ok((name.clone(), Plain::new(parameter.var.dims(), values)))
    };
    head.iter().map(plain).collect()
}
