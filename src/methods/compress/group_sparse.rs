//! Fine-grained group sparsity (SparseByteNN, arXiv 2310.19509; unit, score and rearrangement as in 1xN pruning,
//! Lin et al. 2021, arXiv 2105.14713).
//!
//! A weight `[outputs, inputs * taps]` is cut into groups of consecutive outputs; a unit is one input of a group
//! with all its taps. Its score is the sum of its absolute weights, with activations each times the root mean
//! square of its input; the `floor(sparsity * units)` lowest of a weight go ([`super::group_units`]). Before that
//! outputs are ordered by the sum of their absolute weights, so that groups are of like rows, and everything
//! that is indexed by the same channels follows ([`crate::models::axes`]). What is left is stored as row groups,
//! whose kernels work on the pattern; each tap of a convolution is a column of its own there.
//!
//! Blocks of GGUF files are decoded, and what is left of them has 16 bits unless `values` says otherwise; codes that
//! steps made are refused.
//!
//! Decided here: an axis is reordered where at least one weight that makes it is pruned, and stays where a tensor
//! that is not pruned would have to leave its layout for that; orders fall; the record lists what stayed and why.
//! Whole outputs as units are the yardstick of the papers. Gradual pruning gives a mask of the number of units
//! that [`crate::methods::training::masks`] rounds to. Training keeps the zeros of weights that an earlier step stored
//! sparse and this one leaves alone; gradual pruning refuses models with such weights.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};

use super::group_units::{Factors, Units};
use super::named_choice::choice;
use super::{check_finite, cost, seeded, store};
use crate::calibrate::{self, walk};
use crate::error::{Error, Reason, Result};
use crate::kernels::row_groups::MAX_INT8_COLS;
use crate::methods::training::masked_run::{self, Masks};
use crate::methods::{AnyOutcome, Card, Estimate, Learning, Method, Outcome, StepContext, scope};
use crate::models::axes::{self, Set, families};
use crate::models::vision::plan::Plan;
use crate::models::{AnyFamily, AnyInfo, AnyModel, Model, ModelInfo, TensorInfo};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, Record, RowGroupValues, ValueFormat, Weight};
use crate::progress::{Metrics, Progress};
use crate::proto::v1::{
    self, GroupSparseSchedule, GroupSparseScore, GroupSparseUnit, GroupSparseValues,
};
use crate::train::settings::Settings as TrainingSettings;

static CARD: Card = Card {
    name: "group_sparse",
    title: "Fine-grained group sparsity",
    verb: "compress",
    summary: "Removes inputs that groups of consecutive outputs share, after like outputs were brought \
              together; kernels work on the pattern.",
    paper: "SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on Fine-Grained Group \
            Sparsity, arXiv 2310.19509; 1xN Pattern for Pruning Convolutional Neural Networks, arXiv \
            2105.14713",
    needs_calibration: false,
    families: &["decoder", "vision"],
    followed_by: &[],
};

/// Share of the units that goes when nothing is said.
const SPARSITY: f64 = 0.5;
/// Outputs of a group when nothing is said.
const GROUP: u32 = 8;
const GROUPS: [u32; 5] = [2, 4, 8, 16, 32];
/// What is left alone when nothing is said.
const EXCLUDE: [&str; 5] =
    ["layers.0.conv.*", "*.depthwise.*", "classifier.*", "*embed*", "lm_head*"];
/// Products a second that images are guessed to run with.
const SPEED: f64 = 3e10;

/// Checked options.
struct Settings {
    sparsity: f64,
    group: usize,
    rearrange: bool,
    filters: bool,
    activations: bool,
    gradual: bool,
    exclude: Vec<String>,
    /// None: as the weight has them.
    values: Option<RowGroupValues>,
    calibration: calibrate::Options,
}

/// A weight that is pruned.
struct Target {
    name: String,
    units: Units,
    format: RowGroupValues,
    depthwise: bool,
}

impl Settings {
    fn read(given: &v1::GroupSparse) -> Result<Self> {
        let sparsity = given.sparsity.unwrap_or(SPARSITY);
        if !(0.0..1.0).contains(&sparsity) {
            let problem =
                format!("{sparsity} is outside [0, 1); {SPARSITY} removes half of the units");
            return Err(Error::option("sparsity", problem));
        }
        let group = given.group.unwrap_or(GROUP);
        if !GROUPS.contains(&group) {
            let problem = format!("{group} is none of 2, 4, 8, 16 and 32; {GROUP} is usual");
            return Err(Error::option("group", problem));
        }
        let unit = choice!(GroupSparseUnit, "unit", given.unit, Column)?;
        let score = choice!(GroupSparseScore, "score", given.score, L1)?;
        let schedule = choice!(GroupSparseSchedule, "schedule", given.schedule, OneShot)?;
        let values = match GroupSparseValues::try_from(given.values) {
            Ok(GroupSparseValues::Unspecified) => None,
            Ok(GroupSparseValues::F32) => Some(RowGroupValues::F32),
            Ok(GroupSparseValues::Bf16) => Some(RowGroupValues::BF16),
            Ok(GroupSparseValues::Int8) => Some(RowGroupValues::Int8),
            Err(_) => {
                let problem = format!("{} is no number of GroupSparseValues", given.values);
                return Err(Error::option("values", problem));
            }
        };
        let this = Self {
            sparsity,
            group: group as usize,
            rearrange: given.rearrange.unwrap_or(true),
            filters: unit == GroupSparseUnit::Filter,
            activations: score == GroupSparseScore::L1Activation,
            gradual: schedule == GroupSparseSchedule::Gradual,
            exclude: match given.exclude.is_empty() {
                true => EXCLUDE.map(str::to_owned).to_vec(),
                false => given.exclude.clone(),
            },
            values,
            calibration: calibrate::Options::read(given.calibration.as_ref())?,
        };
        let refuse = |problem: &str| Err(Error::option("schedule", problem));
        match (this.gradual, given.training.is_some()) {
            (true, false) => refuse("gradual pruning goes with a training; give `training`"),
            (true, _) if this.filters => refuse("gradual pruning is of columns; leave `unit` out"),
            (true, _) if this.activations => {
                refuse("gradual masks go by the weights alone; leave `score` out")
            }
            _ => Ok(this),
        }
    }

    /// The weights that are pruned, in the order of the network.
    fn targets(&self, model: &AnyInfo) -> Result<Vec<Target>> {
        let names = match &model.family {
            AnyFamily::Decoder(_) => scope::names(&model.walked()?.family, &[])?,
            AnyFamily::Vision(config) => {
                let matrices = config.tensors().into_iter().filter(|(_, shape)| shape.len() == 2);
                matrices.map(|(name, _)| name).collect()
            }
            family => {
                return Err(Error::new(
                    Reason::ModelUnsuitable,
                    format!(
                        "group_sparse is for decoders and image classifiers, not for the family {}",
                        family.name()
                    ),
                ));
            }
        };
        for pattern in self.exclude.iter().filter(|p| !EXCLUDE.contains(&p.as_str())) {
            if !model.tensors.keys().any(|name| scope::matches(pattern, name)) {
                let problem = format!(
                    "'{pattern:.100}' matches no tensor of the model; names look like '{}', and '*' stands \
                     for any characters",
                    names.first().map_or("", String::as_str)
                );
                return Err(Error::at(Reason::TensorNotFound, "exclude", problem));
            }
        }
        let kept = |name: &String| !self.exclude.iter().any(|p| scope::matches(p, name));
        let targets: Vec<Target> = names
            .into_iter()
            .filter(kept)
            .map(|name| self.target(name, model))
            .collect::<Result<_>>()?;
        if targets.is_empty() {
            return Err(Error::option("exclude", "leaves no weight to prune"));
        }
        if self.gradual {
            let masked = |name: &str| targets.iter().any(|target| target.name == name);
            masked_run::check_growing("schedule", masked, model)?;
        }
        Ok(targets)
    }

    fn target(&self, name: String, model: &AnyInfo) -> Result<Target> {
        let tensor = model.tensors.get(&name).ok_or_else(|| {
            Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
        })?;
        let &[rows, cols] = tensor.shape.as_slice() else {
            let problem = format!("'{name}' has shape {:?}, not that of a matrix", tensor.shape);
            return Err(Error::new(Reason::UnsupportedModel, problem));
        };
        refuse_quantised(tensor, &name)?;
        if self.group > rows {
            let problem = format!("{} is more than the {rows} outputs of '{name}'", self.group);
            return Err(Error::option("group", problem));
        }
        let vision = matches!(model.family, AnyFamily::Vision(_));
        let taps = if vision && name.ends_with(".conv.weight") { 9 } else { 1 };
        if self.gradual && (taps > 1 || !rows.is_multiple_of(self.group)) {
            let problem = format!(
                "'{name}' has {taps} taps and {rows} outputs; gradual pruning takes one tap and whole groups \
                 of {}: exclude it, or prune at once",
                self.group
            );
            return Err(Error::option("schedule", problem));
        }
        let format = self.values.unwrap_or_else(|| format(tensor));
        if format == RowGroupValues::Int8 && cols > MAX_INT8_COLS {
            let problem = format!("the {cols} inputs of '{name}' are too many for 8-bit values");
            return Err(Error::option("values", problem));
        }
        Ok(Target {
            units: Units { shape: [rows, cols], group: self.group, taps, filters: self.filters },
            format,
            depthwise: vision && name.ends_with(".depthwise.weight"),
            name,
        })
    }
}

/// There is no sum of rounded weights that a unit could be judged by, nor a kernel for groups of their codes. Blocks
/// of GGUF files are taken, since models are downloaded in them: they are decoded, and what stays has plain numbers.
fn refuse_quantised(tensor: &TensorInfo, name: &str) -> Result<()> {
    store::refuse_quantised(tensor, name, "prune")?;
    match tensor.record {
        Record::Dense { .. } | Record::Ggml { .. } => Ok(()),
        Record::Sparse { values, .. } if !matches!(values, ValueFormat::Grouped(_)) => Ok(()),
        Record::RowGroups { values: RowGroupValues::F32 | RowGroupValues::BF16, .. } => Ok(()),
        _ => Err(Error::new(
            Reason::ModelUnsuitable,
            format!(
                "an earlier step has quantised '{name}' or taken it apart, and groups of such values have no \
                 kernels; start from the version before, or exclude it"
            ),
        )),
    }
}

/// Numbers that a weight keeps when nothing is said: those it has, or 16 bits.
fn format(tensor: &TensorInfo) -> RowGroupValues {
    let elements: usize = tensor.shape.iter().product();
    match tensor.record {
        Record::Dense { .. } if tensor.bytes == 4 * elements as u64 => RowGroupValues::F32,
        Record::Sparse { values: ValueFormat::F32, .. } => RowGroupValues::F32,
        Record::RowGroups { values, .. } => values,
        _ => RowGroupValues::BF16,
    }
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// The model as training sees it: what is pruned are plain numbers.
fn plain(model: &AnyInfo, targets: &[Target]) -> AnyInfo {
    let mut plain = model.clone();
    for target in targets {
        let shape = target.units.shape.to_vec();
        let bytes = 4 * shape.iter().product::<usize>() as u64;
        let info = TensorInfo { record: Record::Dense { shape: shape.clone() }, shape, bytes };
        plain.tensors.insert(target.name.clone(), info);
    }
    plain
}

impl Method for v1::GroupSparse {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        self.sparsity.get_or_insert(SPARSITY);
        self.group.get_or_insert(GROUP);
        self.rearrange.get_or_insert(true);
        if self.unit == GroupSparseUnit::Unspecified as i32 {
            self.unit = GroupSparseUnit::Column.into();
        }
        if self.score == GroupSparseScore::Unspecified as i32 {
            self.score = GroupSparseScore::L1.into();
        }
        if self.schedule == GroupSparseSchedule::Unspecified as i32 {
            self.schedule = GroupSparseSchedule::OneShot.into();
        }
        if self.exclude.is_empty() {
            self.exclude = EXCLUDE.map(str::to_owned).to_vec();
        }
        if self.calibration.is_some() || self.score() == GroupSparseScore::L1Activation {
            calibrate::Options::resolve(&mut self.calibration);
        }
        if let Some(training) = &mut self.training {
            masked_run::resolve(training);
        }
    }

    fn datasets(&self) -> Vec<&str> {
        let training = self.training.iter().flat_map(|training| {
            let other = training.validation.as_ref().map_or("", |v| v.dataset.as_str());
            [training.dataset.as_str(), other]
        });
        let own = self.calibration.iter().map(|c| c.dataset.as_str());
        own.chain(training).filter(|name| !name.is_empty()).collect()
    }

    fn seeded(&self) -> bool {
        self.training.is_some()
            || (self.score() == GroupSparseScore::L1Activation && seeded(self.calibration.as_ref()))
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
        let settings = Settings::read(self)?;
        let targets = settings.targets(model)?;
        let vision = matches!(model.family, AnyFamily::Vision(_));
        if settings.activations && vision && settings.calibration.dataset.is_none() {
            let problem = "is missing; name a data set of images, as datasets/NAME";
            return Err(Error::option("calibration.dataset", problem));
        }
        if !vision && (settings.activations || self.calibration.is_some()) {
            settings.calibration.check(&model.walked()?)?;
        }
        let mut after = model.clone();
        for target in &targets {
            let info = target.units.stored(settings.sparsity, target.format);
            after.tensors.insert(target.name.clone(), info);
        }
        let mut estimate = match (vision, settings.activations) {
            (true, activations) => {
                let bytes = model.bytes();
                let elements: usize = model.tensors.values().map(|t| elements(&t.shape)).sum();
                let images = if activations { settings.calibration.sequences as f64 } else { 0.0 };
                Estimate {
                    weight_bytes: after.bytes(),
                    // The weights as they are, and thrice in f32: where they are judged, as they are multiplied
                    // and as they become.
                    memory_bytes: bytes + 12 * elements as u64,
                    seconds: 0.01 + bytes as f64 / 1e8 + images * bytes as f64 * 100.0 / SPEED,
                    calibration_tokens: 0,
                }
            }
            (false, false) => cost::alone(&model.walked()?, &after.walked()?),
            (false, true) => {
                cost::calibrated(&model.walked()?, &after.walked()?, &settings.calibration, false)
            }
        };
        if settings.rearrange || self.training.is_some() {
            // What is not dense becomes f32 before its turn comes.
            let other = targets.iter().filter(|target| {
                let tensor = model.tensors.get(&target.name);
                tensor.is_some_and(|tensor| !matches!(tensor.record, Record::Dense { .. }))
            });
            let decoded: usize = other.map(|target| elements(&target.units.shape)).sum();
            estimate.memory_bytes += 4 * decoded as u64;
        }
        if let Some(training) = &self.training {
            let plain = plain(model, &targets);
            let checked = masked_run::check(training, &plain)?;
            let further = masked_run::estimate(&checked, &plain, after.bytes());
            estimate.seconds += further.seconds;
            estimate.memory_bytes = estimate.memory_bytes.max(further.memory_bytes);
        }
        Ok((estimate, after))
    }

    fn apply_any(
        &self,
        cx: &mut StepContext<'_>,
        learning: &mut Learning<'_>,
        mut model: AnyModel,
    ) -> Result<AnyOutcome> {
        let info = model.info();
        let settings = Settings::read(self)?;
        let targets = settings.targets(&info)?;
        let mut account = Account::default();
        for target in &targets {
            cx.progress.check()?;
            check_finite(&target.name, &values(&model, &target.name)?)?;
        }
        if settings.rearrange {
            let part = cx.progress.part(0.0, 0.1);
            rearrange(&mut model, &targets, &part, &mut account)?;
        }
        let training = match &self.training {
            None => None,
            Some(training) => {
                let checked = masked_run::check(training, &plain(&info, &targets))?;
                Some((training.clone(), checked))
            }
        };
        let part = cx.progress.part(0.1, if training.is_some() { 0.2 } else { 1.0 });
        let mut step = Step { settings: &settings, targets: &targets, masks: None };
        if training.is_some() {
            step.masks = Some(Vec::new());
        }
        match settings.gradual {
            // Masks come with the training.
            true => step.densify(&mut model)?,
            false => step.prune((cx, &part, learning), &mut model, &mut account)?,
        }
        let masks = step.masks;
        if let Some((training, checked)) = training {
            let part = cx.progress.part(0.2, 1.0);
            let trained = fine_tune(
                (cx, &part, learning),
                model,
                (&training, &checked),
                (&settings, &targets, masks.unwrap_or_default()),
            )?;
            learning.training = Some(trained.1);
            account.warnings.extend(trained.2);
            model = trained.0;
        }
        if !settings.gradual {
            let kept = account.kept / account.all.max(f64::MIN_POSITIVE);
            cx.progress.measure(Metrics::from([("kept_weight_share".to_owned(), kept)]));
        }
        cx.progress.report(1.0, "all weights done")?;
        account.outcome(model, &targets, &settings)
    }
}

/// Values of a weight in f32.
fn values(model: &AnyModel, name: &str) -> Result<Vec<f32>> {
    let weight = model.weights().get(name);
    let weight = weight.ok_or_else(|| Error::internal(format!("'{name}' is missing")))?;
    Ok(weight.to_f32())
}

/// What was done, for the record.
#[derive(Default)]
struct Account {
    /// Sums of absolute weights of what stays and of all, after the rearrangement.
    kept: f64,
    all: f64,
    shares: BTreeMap<String, f64>,
    permuted: Vec<Value>,
    left: Vec<Value>,
    warnings: Vec<String>,
    calibration_tokens: u64,
}

impl Account {
    fn add(&mut self, name: &str, units: &Units, values: &[f32], mask: &[bool]) {
        let sum = |of: &mut dyn Iterator<Item = f32>| of.map(|v| f64::from(v.abs())).sum::<f64>();
        let all = sum(&mut values.iter().copied());
        let mut left = values.iter().zip(mask).filter(|(_, masked)| !**masked).map(|(v, _)| *v);
        let kept = sum(&mut left);
        self.shares.insert(name.to_owned(), kept / all.max(f64::MIN_POSITIVE));
        (self.kept, self.all) = (self.kept + kept, self.all + all);
        let empty = mask.chunks(units.shape[1]).filter(|row| row.iter().all(|m| *m)).count();
        if empty > 0 && !units.filters {
            self.warnings.push(format!("{empty} outputs of '{name}' keep no input"));
        }
    }

    fn outcome(
        self,
        model: AnyModel,
        targets: &[Target],
        settings: &Settings,
    ) -> Result<AnyOutcome> {
        let (mut tensors, mut zeros, mut elements) = (serde_json::Map::new(), 0, 0);
        for Target { name, units, .. } in targets {
            let weight = model.weights().get(name);
            let weight = weight.ok_or_else(|| Error::internal(format!("'{name}' is missing")))?;
            let own = (weight.zeros(), (units.shape[0] * units.shape[1]) as u64);
            let gone = units.dropped(settings.sparsity);
            let mut entry = json!({
                "zeros": own.0,
                "elements": own.1,
                "density": 1.0 - own.0 as f64 / own.1.max(1) as f64,
                "units": units.count(),
                "bytes": weight.bytes(),
            });
            if let Some(share) = self.shares.get(name) {
                entry["kept_units"] = json!(units.count() - gone);
                entry["kept_weight_share"] = json!(share);
            }
            tensors.insert(name.clone(), entry);
            (zeros, elements) = (zeros + own.0, elements + own.1);
        }
        let record = json!({
            "tensors": tensors,
            "total": { "zeros": zeros, "elements": elements },
            "permuted": self.permuted,
            "left_in_place": self.left,
            "calibration_tokens": self.calibration_tokens,
            "warnings": self.warnings,
        });
        Ok(Outcome {
            model,
            record,
            calibration_tokens: self.calibration_tokens,
            zero_share: zeros as f64 / elements.max(1) as f64,
            warnings: self.warnings,
        })
    }
}

/// Orders the channels that may be ordered.
fn rearrange(
    model: &mut AnyModel,
    targets: &[Target],
    progress: &Progress,
    account: &mut Account,
) -> Result<()> {
    let graph = match &*model {
        AnyModel::Decoder(model) => families::decoder(model.decoder()?)?,
        AnyModel::Vision(model) => families::vision(&model.family)?,
        _ => return Err(Error::internal("a family without tied axes")),
    };
    let pruned = |axis: &axes::Axis| targets.iter().any(|target| target.name == axis.tensor);
    let sets = graph.sets();
    let weights = model.weights_mut();
    let mut free: Vec<&Set> = Vec::new();
    for set in sets.iter().filter(|set| set.makers.iter().any(pruned)) {
        // What is not pruned keeps its layout, so it must be one whose rows and columns can move.
        let stuck = set.axes().find(|axis| {
            let weight = weights.get(&axis.tensor);
            !pruned(axis) && weight.is_some_and(|weight| !matches!(**weight, Weight::Dense(_)))
        });
        let why = set.fixed.clone().or_else(|| {
            stuck.map(|axis| format!("'{}' is not plain numbers and not pruned", axis.tensor))
        });
        let makers: Vec<&str> = set.makers.iter().map(|axis| axis.tensor.as_str()).collect();
        if let Some(why) = why {
            account.left.push(json!({ "outputs_of": makers, "why": why }));
            continue;
        }
        let first = set.makers.first().and_then(|axis| axis.starts.first());
        account.permuted.push(json!({
            "outputs_of": makers, "first": first, "channels": set.channels,
        }));
        free.push(set);
    }
    axes::reorder(&free, weights, |i| {
        progress.report(i as f64 / free.len() as f64, "ordering channels")
    })
}

/// Choosing what goes.
struct Step<'a> {
    settings: &'a Settings,
    targets: &'a [Target],
    /// Collected where a training follows, which wants plain numbers: true where an element goes.
    masks: Option<Vec<(String, usize, Vec<bool>)>>,
}

impl Step<'_> {
    /// Plain numbers in the place of what will be pruned.
    fn densify(&self, model: &mut AnyModel) -> Result<()> {
        for Target { name, units, .. } in self.targets {
            let dense = Dense::from_f32(units.shape.to_vec(), &values(model, name)?, Dtype::F32)?;
            model.weights_mut().insert(name.clone(), Arc::new(Weight::Dense(dense)));
        }
        Ok(())
    }

    /// A weight without the units that go.
    fn one(
        &mut self,
        target: &Target,
        mut values: Vec<f32>,
        factors: &Factors,
        account: &mut Account,
    ) -> Result<Weight> {
        let units = &target.units;
        let mask = units.mask(&units.scores(&values, factors), self.settings.sparsity);
        account.add(&target.name, units, &values, &mask);
        values.iter_mut().zip(&mask).filter(|(_, gone)| **gone).for_each(|(v, _)| *v = 0.0);
        let Some(masks) = &mut self.masks else { return units.store(&values, target.format) };
        masks.push((target.name.clone(), units.shape[1], mask));
        Ok(Weight::Dense(Dense::from_f32(units.shape.to_vec(), &values, Dtype::F32)?))
    }

    /// Prunes all targets.
    fn prune(
        &mut self,
        (cx, progress, learning): (&StepContext<'_>, &Progress, &Learning<'_>),
        model: &mut AnyModel,
        account: &mut Account,
    ) -> Result<()> {
        let factors = match (self.settings.activations, &mut *model) {
            (true, AnyModel::Decoder(model)) => {
                return self.walk((cx, progress), model, account);
            }
            (true, AnyModel::Vision(model)) => self.watch(learning, model, progress)?,
            _ => BTreeMap::new(),
        };
        for (i, target) in self.targets.iter().enumerate() {
            progress.report(i as f64 / self.targets.len() as f64, &target.name)?;
            let factors = factors.get(&target.name).unwrap_or(&Factors::None);
            let new = self.one(target, values(model, &target.name)?, factors, account)?;
            model.weights_mut().insert(target.name.clone(), Arc::new(new));
        }
        Ok(())
    }

    /// Prunes block by block; each sees what the pruned ones before it give.
    fn walk(
        &mut self,
        (cx, progress): (&StepContext<'_>, &Progress),
        model: &mut Model,
        account: &mut Account,
    ) -> Result<()> {
        let options = &self.settings.calibration;
        let sources = calibrate::Sources {
            model: &*model,
            texts: cx.texts,
            stream: &cx.random.child("calibration"),
            progress,
        };
        let windows = cx.calibrations.windows(options, cx.digest, &sources)?;
        account.warnings.extend(windows.warnings.iter().cloned());
        account.calibration_tokens = options.tokens();
        let names: BTreeSet<String> = self.targets.iter().map(|t| t.name.clone()).collect();
        let plan = walk::Plan { windows: &windows, names: &names, gram: false, progress };
        walk::walk_model(model, &plan, &mut |site| {
            let count = site.inputs.count().max(1) as f64;
            let root = |sum: &f64| (sum / count).sqrt() as f32;
            let factors = Factors::Inputs(site.inputs.squares().iter().map(root).collect());
            let pairs = site.names.iter().zip(&site.dense);
            pairs
                .map(|(name, values)| {
                    let target = self.targets.iter().find(|target| target.name == *name);
                    let target =
                        target.ok_or_else(|| Error::internal(format!("'{name}' is no target")))?;
                    self.one(target, values.clone(), &factors, account)
                })
                .collect()
        })
    }

    /// The sizes of the inputs of each weight on images.
    fn watch(
        &self,
        learning: &Learning<'_>,
        model: &crate::models::vision::Model,
        progress: &Progress,
    ) -> Result<BTreeMap<String, Factors>> {
        let options = &self.settings.calibration;
        let name = options.dataset.as_deref().unwrap_or_default();
        let images = learning.datasets.images(name)?;
        let config = &model.family;
        images.suits(config.sides, config.channels, config.classes)?;
        let count = images.len().min(options.sequences);
        let plan = Plan::new(model)?;
        let mut sums: BTreeMap<String, (Vec<f64>, u64)> = BTreeMap::new();
        for index in 0..count {
            progress.check()?;
            plan.watch(images.get(index), &mut |name, rows, channels| {
                let (sums, seen) =
                    sums.entry(name.to_owned()).or_insert_with(|| (vec![0.0; channels], 0));
                for row in rows.chunks_exact(channels) {
                    let squares = row.iter().map(|v| f64::from(*v) * f64::from(*v));
                    sums.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
                    *seen += 1;
                }
            })?;
        }
        let factors = self.targets.iter().filter_map(|target| {
            let (sums, seen) = sums.get(&target.name)?;
            let root = |sum: &f64| (sum / (*seen).max(1) as f64).sqrt() as f32;
            let roots = sums.iter().map(root).collect();
            let factors =
                if target.depthwise { Factors::Rows(roots) } else { Factors::Inputs(roots) };
            Some((target.name.clone(), factors))
        });
        Ok(factors.collect())
    }
}

/// Trains with what went at zero, and stores what is left.
fn fine_tune(
    (cx, progress, learning): (&StepContext<'_>, &Progress, &Learning<'_>),
    model: AnyModel,
    training: (&v1::Training, &TrainingSettings),
    (settings, targets, masks): (&Settings, &[Target], Vec<(String, usize, Vec<bool>)>),
) -> Result<(AnyModel, v1::TrainingReport, Vec<String>)> {
    let inner = StepContext {
        random: cx.random.child("training"),
        progress,
        texts: cx.texts,
        calibrations: cx.calibrations,
        digest: cx.digest,
        scratch: cx.scratch.clone(),
    };
    let masks = match settings.gradual {
        false => Masks::Fixed(masks),
        true => Masks::Growing {
            share: settings.sparsity,
            rows: settings.group,
            matrices: targets.iter().map(|t| (t.name.clone(), t.units.shape)).collect(),
        },
    };
    let trained = masked_run::train(&inner, learning, model, training, masks)?;
    let mut stored = Vec::with_capacity(targets.len());
    for Target { name, units, format, .. } in targets {
        let mut values = trained.values(name)?;
        if let Some(mask) = trained.mask(name) {
            values.iter_mut().zip(mask).filter(|(_, gone)| **gone).for_each(|(v, _)| *v = 0.0);
        }
        stored.push((name.clone(), Arc::new(units.store(&values, *format)?)));
    }
    let mut model = trained.model;
    model.weights_mut().extend(stored);
    Ok((model, trained.report, trained.warnings))
}

#[cfg(test)]
mod tests;
