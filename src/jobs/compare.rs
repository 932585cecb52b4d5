//! Running a comparison: the base once, then the tree of steps, measuring where an arm ends.
//!
//! At no time are more than two models open: the one a step starts from and the one it makes. A finished
//! run is kept at once, so a killed comparison goes on after its last one, and a cancelled one keeps
//! what it has.

mod tune;

use std::collections::BTreeMap;
use std::time::Instant;

use prost::Message;

use super::damaged;
use super::evaluate::{Adapted, Measured};
use super::memory::Peak;
use super::recipe::{Step, signed, take_step};
use super::work::Job;
use crate::calibrate;
use crate::error::{Error, Reason, Result};
use crate::eval::metrics::{MAKE_SECONDS, PEAK_MEMORY_BYTES};
use crate::eval::{self, States};
use crate::methods::adapt::tuned::Tuned;
use crate::models::AnyModel;
use crate::progress::Progress;
use crate::proto::v1::{self, KeepVersions};
use crate::recipe::claim;
use crate::recipe::compare::plan::{Plan, Run};
use crate::recipe::compare::report::{self, Facts};
use crate::recipe::compare::{self, BASE};
use crate::store::models::{Draft, VersionRow};
use crate::store::operations::{Kind, Operation};
use crate::store::{Store, names};
use crate::train::parameters::Parameters;

/// Names of kept results: the base's run, the runs of arms (by their number in the plan), the facts.
const SAVED_BASE: &str = "base";
const SAVED_RUN: &str = "run ";
const SAVED_FACTS: &str = "facts";

/// Gives an encoded `ComparisonReport`.
pub fn run(job: &Job<'_>) -> Result<Vec<u8>> {
    let request: v1::CompareRequest = job.request()?;
    Ok(compare(job, &request.comparison.unwrap_or_default())?.encode_to_vec())
}

/// Runs a comparison whose names are exact and whose defaults are written out.
pub fn compare(job: &Job<'_>, comparison: &v1::Comparison) -> Result<v1::ComparisonReport> {
    let base = job.wait(job.store.version(&comparison.model))?;
    let plan = Plan::new(comparison);
    let earlier = job.saved::<v1::ComparisonReport>(SAVED_FACTS)?.unwrap_or_default();
    let data = compare::datasets(comparison);
    let digests = job.data_digests(&data)?;
    let shared = v1::SharedWork {
        steps_shared: i32::try_from(plan.shared).unwrap_or(i32::MAX),
        ..earlier.shared.unwrap_or_default()
    };
    let facts = Facts {
        base: base.name(),
        base_digest: base.digest.clone(),
        data_digests: data.into_iter().zip(digests).collect(),
        shared,
        seconds: earlier.seconds,
        peak_memory_bytes: earlier.peak_memory_bytes,
    };
    let mut work = Work {
        job,
        comparison,
        plan: &plan,
        base: &base,
        calibrations: calibrate::Shared::default(),
        states: None,
        parts: (1 + plan.nodes.len() + plan.runs.len()) as f64,
        done: 0,
        peak: Peak::start(job.handle),
        start: Instant::now(),
        since: facts.clone(),
        facts,
    };
    work.all()?;
    let report = assemble(comparison, job.wait(job.store.saved_results(&job.operation.id))?)?;
    if comparison.keep() == KeepVersions::Front {
        return work.keep_front(report);
    }
    Ok(report)
}

/// The report of an operation that is a comparison or a claim, as far as it has come.
pub async fn report(store: &Store, operation: &Operation) -> Result<v1::ComparisonReport> {
    let request = operation.request.as_slice();
    let comparison = match (operation.kind, &operation.response) {
        (Kind::Compare, Some(response)) => {
            return v1::ComparisonReport::decode(response.as_slice()).map_err(damaged);
        }
        (Kind::Claim, Some(response)) => {
            let result = v1::ClaimResult::decode(response.as_slice()).map_err(damaged)?;
            return Ok(result.report.unwrap_or_default());
        }
        (Kind::Compare, None) => {
            v1::CompareRequest::decode(request).map_err(damaged)?.comparison.unwrap_or_default()
        }
        (Kind::Claim, None) => of_claim(&v1::RunClaimRequest::decode(request).map_err(damaged)?)?,
        _ => {
            return Err(Error::new(
                Reason::InvalidName,
                format!(
                    "{} is no comparison but the operation of a {}; name one made by Compare or RunClaim",
                    operation.name(),
                    operation.kind.name()
                ),
            ));
        }
    };
    let saved = store.saved_results(&operation.id).await?;
    if saved.is_empty() && !operation.state.done() {
        // It may have ended since its row was read; its response holds everything then.
        let now = store.operation(&operation.id).await?;
        if now.response.is_some() {
            return Box::pin(report(store, &now)).await;
        }
    }
    // Intervals take a while where there are many samples.
    let assembled = tokio::task::spawn_blocking(move || assemble(&comparison, saved)).await;
    assembled.map_err(|e| Error::internal("the report was not put together").with_source(e))?
}

/// The comparison that a claim's request runs, every default written out.
pub fn of_claim(request: &v1::RunClaimRequest) -> Result<v1::Comparison> {
    let given = request.claim.clone().unwrap_or_default();
    let mut comparison = match &request.confirm {
        Some(result) => claim::confirm::part(&given, result)?,
        None => claim::form(&given, request.short)?,
    };
    comparison.model.clone_from(&request.model);
    Ok(compare::resolve(&comparison))
}

/// A report from what an operation kept.
fn assemble(
    comparison: &v1::Comparison,
    saved: BTreeMap<String, Vec<u8>>,
) -> Result<v1::ComparisonReport> {
    let run = |bytes: &Vec<u8>| v1::ArmRun::decode(bytes.as_slice()).map_err(damaged);
    let base = saved.get(SAVED_BASE).map(run).transpose()?;
    let runs = saved.iter().filter(|(name, _)| name.starts_with(SAVED_RUN));
    let runs = runs.map(|(_, bytes)| run(bytes)).collect::<Result<Vec<_>>>()?;
    let facts = match saved.get(SAVED_FACTS) {
        Some(bytes) => v1::ComparisonReport::decode(bytes.as_slice()).map_err(damaged)?,
        None => v1::ComparisonReport::default(),
    };
    let facts = Facts {
        base: if facts.base.is_empty() { comparison.model.clone() } else { facts.base },
        base_digest: facts.base_digest,
        data_digests: facts.data_digests,
        shared: facts.shared.unwrap_or_default(),
        seconds: facts.seconds,
        peak_memory_bytes: facts.peak_memory_bytes,
    };
    Ok(report::report(comparison, &facts, base, runs))
}

struct Work<'a> {
    job: &'a Job<'a>,
    comparison: &'a v1::Comparison,
    plan: &'a Plan,
    base: &'a VersionRow,
    calibrations: calibrate::Shared,
    /// What a pass of the base left, with the evaluation it was made for.
    states: Option<(v1::Evaluation, States)>,
    /// Pieces of work in all, and those behind us.
    parts: f64,
    done: usize,
    peak: Peak,
    start: Instant,
    /// The facts when this run of the operation began, and as they are now.
    since: Facts,
    facts: Facts,
}

/// A model that was made (or is the base), and how to get it back.
struct Made {
    place: Place,
    digest: String,
    /// What each step on the way here did.
    steps: Vec<v1::StepReport>,
}

enum Place {
    Stored(Box<VersionRow>),
    Draft(Draft),
}

impl Made {
    fn weights_digest(&self) -> String {
        match &self.place {
            Place::Stored(row) => row.weights_digest(),
            Place::Draft(draft) => draft.weights_digest(),
        }
    }

    fn stored(row: VersionRow, steps: Vec<v1::StepReport>) -> Self {
        Self { digest: row.digest.clone(), place: Place::Stored(Box::new(row)), steps }
    }

    /// Resource name; empty for what is not stored.
    fn name(&self) -> String {
        match &self.place {
            Place::Stored(row) => row.name(),
            Place::Draft(_) => String::new(),
        }
    }

    fn disk_bytes(&self) -> u64 {
        match &self.place {
            Place::Stored(row) => row.total_bytes.unsigned_abs(),
            Place::Draft(draft) => draft.total_bytes(),
        }
    }

    fn open(&self, job: &Job<'_>) -> Result<AnyModel> {
        match &self.place {
            Place::Stored(row) => job.open(row),
            Place::Draft(draft) => draft.open(),
        }
    }
}

impl Work<'_> {
    fn all(&mut self) -> Result<()> {
        let base = Made::stored(self.base.clone(), Vec::new());
        self.measure_base(&base)?;
        for (index, run) in self.plan.runs.iter().enumerate() {
            if run.node.is_some() {
                continue;
            }
            if self.finished(index)? {
                self.done += 1;
                continue;
            }
            let arm = &self.comparison.arms[run.arm];
            if arm.version.is_empty() {
                self.measure_run(index, run, &base)?;
            } else {
                let row = self.job.wait(self.job.store.version(&arm.version))?;
                self.measure_run(index, run, &Made::stored(row, Vec::new()))?;
            }
        }
        for root in &self.plan.roots {
            self.visit(*root, &base)?;
        }
        self.note()
    }

    fn finished(&self, run: usize) -> Result<bool> {
        Ok(self.job.saved::<v1::ArmRun>(&saved_run(run))?.is_some())
    }

    /// The part of the progress that the next piece of work fills.
    fn part(&mut self) -> Progress {
        let from = self.done as f64;
        self.done += 1;
        self.job.progress.part(from / self.parts, (from + 1.0) / self.parts)
    }

    fn measure_base(&mut self, base: &Made) -> Result<()> {
        let progress = self.part();
        if self.job.saved::<v1::ArmRun>(SAVED_BASE)?.is_some() {
            return Ok(());
        }
        progress.report(0.0, "measuring the base")?;
        let start = Instant::now();
        let asked = self.comparison.evaluation.clone().unwrap_or_default();
        let model = base.open(self.job)?;
        if asked.compare_with_base {
            self.pass_base(&asked, &progress.part(0.0, 0.5))?;
        } else if !asked.dataset.is_empty() {
            self.facts.shared.base_passes += 1;
        }
        // The base agrees with itself.
        let options = v1::Evaluation { compare_with_base: false, ..asked };
        let states = self.states.as_ref().map(|(_, states)| states);
        let of = (states, None, base.disk_bytes());
        let measurements = self.measure(&model, of, &options, &progress.part(0.5, 1.0))?;
        let run = v1::ArmRun {
            arm: BASE.to_owned(),
            digest: base.digest.clone(),
            version: base.name(),
            measurements,
            seconds: start.elapsed().as_secs_f64(),
            ..Default::default()
        };
        self.job.save(SAVED_BASE, &run)?;
        self.note()
    }

    /// Measures a model of which nothing was tuned: with what a pass of it left, a base, and the bytes of its
    /// files. An encoder has no head for a task then, so that is left out.
    fn measure(
        &self,
        model: &AnyModel,
        (states, base, disk_bytes): (Option<&States>, Option<eval::Base<'_>>, u64),
        options: &v1::Evaluation,
        progress: &Progress,
    ) -> Result<Vec<v1::Measurement>> {
        match model {
            AnyModel::Decoder(model) => {
                let subject = Measured { model, states, base, disk_bytes };
                self.job.measure(&subject, options, progress)
            }
            AnyModel::Encoder(_) => {
                let adapted = Adapted {
                    model,
                    tuned: &Tuned::default(),
                    head: &Parameters::new(),
                    labels: &[],
                    max_length: None,
                    disk_bytes,
                };
                let options = v1::Evaluation { task: None, ..options.clone() };
                self.job.measure_adapted(&adapted, base, &options, progress)
            }
            other => self.job.measure_net(other, disk_bytes, options, progress),
        }
    }

    /// Runs the text of an evaluation through the base, unless that was done.
    fn pass_base(&mut self, options: &v1::Evaluation, progress: &Progress) -> Result<()> {
        let key = v1::Evaluation {
            dataset: options.dataset.clone(),
            context: options.context,
            stride: options.stride,
            max_tokens: options.max_tokens,
            ..Default::default()
        };
        if self.states.as_ref().is_some_and(|(known, _)| *known == key) {
            return Ok(());
        }
        self.states = None;
        let text = self.job.text(&options.dataset)?;
        let model = self.job.open(self.base)?.decoder()?;
        let states = eval::states(&model, options, &text, self.job.scratch, progress)?;
        self.states = Some((key, states));
        self.facts.shared.base_passes += 1;
        Ok(())
    }

    /// Takes the step of a node and measures and descends from there, if anything below is unfinished.
    fn visit(&mut self, node: usize, parent: &Made) -> Result<()> {
        if !self.unfinished(node)? {
            self.done += self.pieces(node);
            return Ok(());
        }
        let made = self.make(node, parent)?;
        let plan = self.plan;
        for index in &plan.nodes[node].runs {
            if self.finished(*index)? {
                self.done += 1;
            } else {
                self.measure_run(*index, &plan.runs[*index], &made)?;
            }
        }
        for child in &plan.nodes[node].children {
            self.visit(*child, &made)?;
        }
        Ok(())
    }

    fn unfinished(&self, node: usize) -> Result<bool> {
        let node = &self.plan.nodes[node];
        for run in &node.runs {
            if !self.finished(*run)? {
                return Ok(true);
            }
        }
        for child in &node.children {
            if self.unfinished(*child)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Pieces of work from a node on.
    fn pieces(&self, node: usize) -> usize {
        let node = &self.plan.nodes[node];
        1 + node.runs.len() + node.children.iter().map(|c| self.pieces(*c)).sum::<usize>()
    }

    fn make(&mut self, index: usize, parent: &Made) -> Result<Made> {
        let (job, node) = (self.job, &self.plan.nodes[index]);
        let progress = self.part().about(&self.arms_below(index));
        let stored = self.comparison.keep() != KeepVersions::None;
        let key = format!("node {index}");
        let place = i32::try_from(index).map_err(|_| Error::internal("2^31 steps"))?;
        let mut steps = parent.steps.clone();
        if stored
            && let Some(row) = job.wait(job.store.step_version(&job.operation.name(), place))?
        {
            // The report is saved before the version is written: where there is a version, there is one.
            let report: v1::StepReport = job.saved(&key)?.unwrap_or_default();
            steps.push(v1::StepReport { version: row.name(), ..report });
            return Ok(Made::stored(row, steps));
        }
        progress.report(0.0, step_name(&node.step))?;
        let step = Step { step: &node.step, index: node.index, seed: node.seed, place: &key };
        let model = parent.open(job)?;
        let taken = take_step(job, &step, (model, &parent.digest), &self.calibrations, &progress)
            .map_err(|e| e.within(&format!("comparison: {}", self.arms_below(index))))?;
        self.facts.shared.steps_taken += 1;
        progress.report(1.0, "writing")?;
        let mut report = taken.report;
        let lineage = v1::Lineage {
            parent: parent.name(),
            operation: if stored { job.operation.name() } else { String::new() },
            ..taken.lineage
        };
        let made = if stored {
            job.save(&key, &report)?;
            let (model, scratch) = (names::version(&self.base.name())?.0.to_owned(), job.scratch);
            let written =
                job.store.write_version(&model, "", taken.model, (&lineage, place), scratch);
            let row = job.wait(written)?;
            report.version = row.name();
            steps.push(report);
            Made::stored(row, steps)
        } else {
            let draft = job.wait(job.store.draft(taken.model, &lineage, job.scratch))?;
            steps.push(report);
            Made { digest: draft.digest(), place: Place::Draft(draft), steps }
        };
        self.note()?;
        Ok(made)
    }

    /// The arms that a node is for: `arm wanda-50`, `arms a, b and 3 more`.
    fn arms_below(&self, node: usize) -> String {
        fn collect(plan: &Plan, node: usize, arms: &mut Vec<usize>) {
            arms.extend(plan.nodes[node].runs.iter().map(|run| plan.runs[*run].arm));
            for child in &plan.nodes[node].children {
                collect(plan, *child, arms);
            }
        }
        let mut arms = Vec::new();
        collect(self.plan, node, &mut arms);
        arms.sort_unstable();
        arms.dedup();
        let name = |arm: &usize| self.comparison.arms[*arm].name.as_str();
        let seed = self.plan.nodes[node].seed;
        match arms.as_slice() {
            [arm] => format!("arm {}, seed {seed}", name(arm)),
            [a, b] => format!("arms {} and {}, seed {seed}", name(a), name(b)),
            [a, b, rest @ ..] => {
                format!("arms {}, {} and {} more, seed {seed}", name(a), name(b), rest.len())
            }
            [] => format!("step {node}"),
        }
    }

    fn measure_run(&mut self, index: usize, run: &Run, made: &Made) -> Result<()> {
        let arm = &self.comparison.arms[run.arm];
        let seed = run.seed.map(|seed| format!(", seed {seed}")).unwrap_or_default();
        let doing = if arm.tuning.is_some() { "tuning" } else { "measuring" };
        let progress = self.part().about(&format!("{doing} arm {}{seed}", arm.name));
        progress.report(0.0, "")?;
        let start = Instant::now();
        let empty = v1::Evaluation::default();
        let options = compare::evaluation_of(self.comparison, arm).unwrap_or(&empty);
        if options.compare_with_base {
            let passes = self.facts.shared.base_passes;
            self.pass_base(options, &progress.part(0.0, 0.1))?;
            if self.facts.shared.base_passes == passes {
                self.facts.shared.base_passes_shared += 1;
            }
        }
        let model = made.open(self.job)?;
        let states = self.states.as_ref().map(|(_, states)| states);
        let base = states.map(eval::Base::States);
        let mut finished = v1::ArmRun {
            arm: arm.name.clone(),
            seed: run.seed,
            digest: made.digest.clone(),
            version: made.name(),
            steps: made.steps.clone(),
            ..Default::default()
        };
        match &arm.tuning {
            Some(tuning) => {
                let progress = progress.part(0.1, 1.0);
                self.tune(&mut finished, (index, tuning), (made, &model), base, &progress)?;
            }
            None => {
                let (of, progress) = ((None, base, made.disk_bytes()), progress.part(0.1, 1.0));
                finished.measurements = self.measure(&model, of, options, &progress)?;
            }
        }
        finished.measurements.extend(making(&made.steps));
        let own = made.steps.last().map_or(0.0, |step| step.seconds);
        finished.seconds = own + start.elapsed().as_secs_f64();
        self.job.save(&saved_run(index), &finished)?;
        self.note()
    }

    /// Keeps the facts as they are now.
    fn note(&mut self) -> Result<()> {
        let (made, reused) = self.calibrations.counts();
        let plus = |before: i32, more: u64| before.saturating_add(i32::try_from(more).unwrap_or(0));
        let (since, facts) = (&self.since, &mut self.facts);
        facts.shared.calibrations_made = plus(since.shared.calibrations_made, made);
        facts.shared.calibrations_shared = plus(since.shared.calibrations_shared, reused);
        facts.seconds = since.seconds + self.start.elapsed().as_secs_f64();
        facts.peak_memory_bytes = since.peak_memory_bytes.max(signed(self.peak.bytes()));
        let message = v1::ComparisonReport {
            base: facts.base.clone(),
            base_digest: facts.base_digest.clone(),
            data_digests: facts.data_digests.clone(),
            shared: Some(facts.shared),
            seconds: facts.seconds,
            peak_memory_bytes: facts.peak_memory_bytes,
            ..Default::default()
        };
        self.job.save(SAVED_FACTS, &message)
    }

    /// Deletes the versions of arms that others beat, and those that only led to them.
    fn keep_front(&self, mut report: v1::ComparisonReport) -> Result<v1::ComparisonReport> {
        let made = self.job.wait(self.job.store.operation(&self.job.operation.id))?.versions;
        let kept: Vec<&String> = report
            .arms
            .iter()
            .filter(|arm| arm.on_front)
            .flat_map(|arm| &arm.runs)
            .flat_map(|run| run.steps.iter().map(|step| &step.version).chain([&run.version]))
            .collect();
        let maker = self.job.operation.name();
        // What was made from others goes before them.
        for version in made.iter().rev().filter(|version| !kept.contains(version)) {
            match self.job.wait(self.job.store.drop_version(version, &maker)) {
                Ok(()) => {}
                // Somebody uses it by now; it stays.
                Err(error) if error.reason() == Reason::ResourceInUse => {}
                Err(error) => return Err(error),
            }
        }
        // What is left decides: an earlier run of the operation may have deleted some.
        let left = self.job.wait(self.job.store.operation(&self.job.operation.id))?.versions;
        let runs = report.arms.iter_mut().flat_map(|arm| &mut arm.runs);
        for run in runs.filter(|run| !run.steps.is_empty()) {
            let names = run.steps.iter_mut().map(|step| &mut step.version);
            names.chain([&mut run.version]).filter(|n| !left.contains(n)).for_each(String::clear);
        }
        Ok(report)
    }
}

fn saved_run(index: usize) -> String {
    format!("{SAVED_RUN}{index}")
}

fn step_name(step: &v1::Step) -> &'static str {
    crate::methods::registry::method(step).map_or("no method", |method| method.card().name)
}

/// What making a model took, all its steps together.
fn making(steps: &[v1::StepReport]) -> Vec<v1::Measurement> {
    if steps.is_empty() {
        return Vec::new();
    }
    let threads = rayon::current_num_threads();
    let seconds = steps.iter().map(|step| step.seconds).sum();
    let peak = steps.iter().map(|step| step.peak_memory_bytes).max().unwrap_or_default();
    let mut all = vec![
        MAKE_SECONDS.measured(seconds, format!("all steps, {threads} threads")),
        PEAK_MEMORY_BYTES
            .measured(peak as f64, format!("the whole process, all steps, {threads} threads")),
    ];
    // Of several steps that measure the same, the last one's.
    for metric in eval::metrics::ALL {
        let found = steps.iter().rev().find_map(|step| step.measures.get(metric.name));
        all.extend(found.map(|value| metric.measured(*value, "by the step that made it")));
    }
    all
}

#[cfg(test)]
mod tests;
