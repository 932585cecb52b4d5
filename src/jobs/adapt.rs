//! Training an adapter: read the data, start the method, train, write the files, keep them.

mod data;
mod files;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use prost::Message;

use self::data::Data;
use super::memory::Peak;
use super::recipe::signed;
use super::work::Job;
use crate::calibrate;
use crate::data::sequence::{Sequence, Target};
use crate::error::{Error, Reason, Result};
use crate::formats::peft::Plain;
use crate::methods::adapt::learner::Learner;
use crate::methods::adapt::tuned::Tuned;
use crate::methods::adapt::{Needs, Setup, gradients, moments};
use crate::models::{AnyModel, decoder, encoder, not_for_text};
use crate::nn::ops::Precision;
use crate::progress::Progress;
use crate::proto::v1;
use crate::recipe::adapt::{NOT_SERVED, Plan};
use crate::seed::Stream;
use crate::store::adapters::NewAdapter;
use crate::store::models::VersionRow;
use crate::train::head;
use crate::train::hooks::{Hooks, Plain as NoHooks};
use crate::train::parameters::{Gradients, Parameters};
use crate::train::pass::{self, Pass};
use crate::train::run::{Needs as Memory, Run};
use crate::train::settings;

/// Elements of weight gradients that are held at once before training.
const GRADIENT_ELEMENTS: usize = 64 << 20;

/// Gives an encoded `AdaptReport`. A run that was cut off goes on from its last checkpoint.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::AdaptRequest = job.request()?;
    if let Some(report) = finished(job, &request.adapter_id)? {
        return Ok(report.encode_to_vec());
    }
    let (start, peak) = (Instant::now(), Peak::start(job.handle));
    let base = job.wait(job.store.version(&request.model))?;
    let plan = Plan::new(
        request.adaptation.as_ref(),
        request.training.as_ref(),
        (base.family.as_str(), &base.config),
    )?;
    job.progress.report(0.0, "reading the data")?;
    let model = job.wait(job.store.open_any_version(&base))?;
    let random = Stream::root(request.seed).child("adapt");
    let data = Data::read(job, &model, &plan, &random)?;
    let work = Work { job, base: &base, plan: &plan, model: &model, data: &data, random: &random };
    let made = work.train()?;

    job.progress.report(0.98, "writing the adapter")?;
    let written = files::write(&made, &work, job.scratch)?;
    let mut warnings = plan.cost.warnings.clone();
    warnings.extend(data.warnings.iter().cloned());
    if written.method != v1::AdapterMethod::Lora && !warnings.iter().any(|w| w == NOT_SERVED) {
        warnings.push(NOT_SERVED.to_owned());
    }
    let mut report = v1::AdaptReport {
        base_version: base.name(),
        trained_parameters: made.report.trained_parameters,
        frozen_parameters: signed(plan.cost.frozen),
        data: Some(data.training_facts.clone()),
        validation: data.validation_facts.clone(),
        training: Some(made.report),
        warnings,
        // Training knows the time of runs before this one; the rest is done anew by each.
        seconds: (start.elapsed().as_secs_f64() - made.own_seconds).max(0.0) + made.seconds,
        peak_memory_bytes: signed(peak.bytes()),
        ..Default::default()
    };
    // Kept before the row: where there is an adapter, there is a report.
    job.save("report", &report)?;
    let operation = job.operation.name();
    let new = NewAdapter {
        id: &request.adapter_id,
        display_name: &request.display_name,
        base_model: &base.model,
        base_version: &base.name(),
        method: written.method,
        facts: written.facts,
        source: &operation,
        // The same work again finds the row it made.
        request_id: &operation,
        lineage: Some(lineage(&work, request.seed)?),
    };
    let row = job.wait(job.store.create_adapter(&new, job.scratch, &written.names))?;
    identify(&mut report, &row);
    Ok(report.encode_to_vec())
}

/// The report of an earlier run of the operation that was cut off after its adapter was kept.
fn finished(job: &Job<'_>, id: &str) -> Result<Option<v1::AdaptReport>> {
    let row = match job.wait(job.store.adapter(id)) {
        Ok(row) if row.source == job.operation.name() => row,
        Ok(_) => {
            return Err(Error::new(
                Reason::ResourceExists,
                format!("adapters/{id} exists; choose another id or delete it first"),
            ));
        }
        Err(error) if error.reason() == Reason::ResourceNotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(mut report) = job.saved::<v1::AdaptReport>("report")? else { return Ok(None) };
    identify(&mut report, &row);
    Ok(Some(report))
}

fn identify(report: &mut v1::AdaptReport, row: &crate::store::adapters::AdapterRow) {
    report.adapter = row.name();
    report.digest.clone_from(&row.digest);
    report.total_bytes = signed(row.total_bytes());
}

fn lineage(work: &Work<'_>, seed: u64) -> Result<v1::AdapterLineage> {
    let plan = work.plan;
    Ok(v1::AdapterLineage {
        base_digest: work.base.digest.clone(),
        adaptation: Some(plan.adaptation.clone()),
        training: Some(plan.training.clone()),
        seed,
        data_digests: work.job.data_digests(&plan.datasets()?)?,
        code_version: env!("CARGO_PKG_VERSION").to_owned(),
        threads: i32::try_from(rayon::current_num_threads()).unwrap_or(i32::MAX),
        labels: work.data.labels.clone(),
    })
}

/// What training works on.
struct Work<'a> {
    job: &'a Job<'a>,
    base: &'a VersionRow,
    plan: &'a Plan,
    model: &'a AnyModel,
    data: &'a Data,
    random: &'a Stream,
}

/// What training made.
struct Made {
    tuned: Tuned,
    /// Tensors of the head, by their names in the task's model.
    head: BTreeMap<String, Plain>,
    report: v1::TrainingReport,
    /// Seconds of training, of all runs and of this one.
    seconds: f64,
    own_seconds: f64,
}

impl Work<'_> {
    fn train(&self) -> Result<Made> {
        let (plan, data) = (self.plan, self.data);
        let network = Network::new(self.model, plan)?;
        let activations = |tokens: usize| plan.activations(tokens);
        let progress = self.job.progress.part(0.1, 0.98);
        let run = Run {
            settings: &plan.settings,
            training: &data.training,
            validation: &data.validation,
            padding: data.padding,
            masking: None,
            random: self.random.clone(),
            folder: &self.job.kept,
            progress: &progress,
            needs: Memory { weights: plan.held(self.model.bytes()), activations: &activations },
        };
        let updates = run.updates()?;
        let head = match data.outputs {
            None => Parameters::new(),
            Some(outputs) => head::head(outputs, plan.hidden, 1.0, &self.random.child("head"))?,
        };
        let method = plan.method()?;
        let tuned = self.start(&network, &head, updates, &self.job.progress.part(0.02, 0.1))?;
        let mut parameters = tuned.parameters();
        parameters.extend(head.iter().map(|(name, p)| (name.clone(), p.clone())));
        let mut hooks: Box<dyn Hooks> = match method.hooks(&tuned, updates)? {
            Some(hooks) => hooks,
            None => Box::new(NoHooks),
        };
        let start = Instant::now();
        let mut learner = Learner::new(network.pass(&tuned), &tuned);
        let report = run.train(&mut learner, &mut parameters, hooks.as_mut())?;
        drop(learner);
        let tuned = method.finish(tuned)?;
        let mut heads = BTreeMap::new();
        for (name, parameter) in head {
            let values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
            heads.insert(name, Plain::new(parameter.var.dims(), values));
        }
        Ok(Made {
            tuned,
            head: heads,
            seconds: report.seconds,
            own_seconds: start.elapsed().as_secs_f64(),
            report,
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
                let windows = shared.windows(&context, &self.base.digest, &sources)?;
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
    sequence.tokens.truncate(most);
    match &mut sequence.target {
        Target::Next(counts) => counts.truncate(most),
        Target::Tags(tags) => tags.truncate(most),
        Target::Class(_) | Target::Value(_) => {}
    }
    sequence
}

/// The differentiable forward of a model, ready to be tuned in any way.
struct Network<'a> {
    graph: Graph<'a>,
    options: pass::Options,
}

enum Graph<'a> {
    Decoder(Arc<decoder::graph::Graph<'a>>),
    Encoder(Arc<encoder::graph::Graph<'a>>),
}

impl<'m> Network<'m> {
    fn new(model: &'m AnyModel, plan: &Plan) -> Result<Self> {
        let precision = match plan.settings.precision {
            settings::Precision::F32 => Precision::F32,
            settings::Precision::Bf16 => Precision::Bf16,
        };
        let mut options = pass::Options {
            checkpoint_activations: plan.settings.checkpoint_activations,
            ..Default::default()
        };
        let graph = match model {
            AnyModel::Decoder(model) => {
                Graph::Decoder(Arc::new(decoder::graph::Graph::new(model, precision)?))
            }
            AnyModel::Encoder(model) => {
                options.pooling = model.family.pooling;
                Graph::Encoder(Arc::new(encoder::graph::Graph::new(model, precision)?))
            }
            AnyModel::Vision(_) | AnyModel::Lstm(_) => return Err(not_for_text(model.family())),
        };
        Ok(Self { graph, options })
    }

    fn pass<'a>(&'a self, tuned: &'a Tuned) -> Pass<'a>
    where
        'm: 'a,
    {
        match &self.graph {
            Graph::Decoder(graph) => Pass::decoder(graph.clone(), tuned, self.options),
            Graph::Encoder(graph) => Pass::encoder(graph.clone(), tuned, self.options),
        }
    }
}
