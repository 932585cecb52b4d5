//! ECoFLaP (Sung et al. 2023, "ECoFLaP: efficient coarse-to-fine layer-wise pruning for vision-language
//! models", arXiv 2310.02998).
//!
//! Coarse: each block gets a share of zeros from how much the loss depends on it, measured without gradients
//! ([`zeroth`]), with a cap for every block and an exact total ([`keep_budget`]). Fine: a local pruner takes
//! that share of each weight of the block, block by block.
//!
//! Decided here: the weights of a block are moved together, one direction for all of them, unless
//! `separate_noise` asks for the published one direction a weight (groups of single weights need that);
//! states that enter a block are kept, so a probe runs the blocks from there on only. Decoders are scored by
//! the next token. Encoders are two towers that share their weights: the first half of a window has to find
//! its second half among those of its batch. Models of two towers are in [`two_tower`]. The published code trims an
//! overshoot by adding; here it is taken off.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::dsnot::{self, Account};
use super::keep_budget::{keep, rank_correlation};
use super::named_choice::choice;
use super::sparsity::{Amount, Sparsity};
use super::zeroth::{self, Probing};
use super::{
    alone, calibrated, cost, magnitude, options, prune_each, seeded, sparsegpt, store, two_tower,
    wanda,
};
use crate::calibrate::{self, walk};
use crate::error::{Error, Reason, Result};
use crate::methods::{AnyOutcome, Card, Estimate, Learning, Method, Outcome, StepContext, scope};
use crate::models::{AnyFamily, AnyInfo, AnyModel, Family, Model, ModelInfo};
use crate::progress::Metrics;
use crate::proto::v1::{
    self, EcoflapAggregate, EcoflapGroup, EcoflapScore, LocalPruner, ValueType,
};

static CARD: Card = Card {
    name: "ecoflap",
    title: "ECoFLaP",
    verb: "compress",
    summary: "Gives each block a share of zeros by how much the loss depends on it, without gradients; \
              a local pruner does the rest.",
    paper: "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models, arXiv \
            2310.02998",
    needs_calibration: true,
    families: &["decoder", "encoder", "two_tower"],
    followed_by: &["gptq", "round_to_nearest"],
};

const SHARE: f64 = 0.5;
/// What the cap of a group is above the share of all.
const ROOM: f64 = 0.1;
/// The largest cap that is set without being asked for.
const MOST: f64 = 0.999;
const EPS: f64 = 1e-3;
const N_DATA: u32 = 16;
const DATA_LENGTH: u32 = 128;
const BATCH: u32 = 4;
/// Products a second that a plan is made with.
const FLOPS: f64 = 6e10;

/// Checked options.
pub(super) struct Settings {
    pub share: f64,
    pub max_share: f64,
    pub group: EcoflapGroup,
    pub score: EcoflapScore,
    pub aggregate: EcoflapAggregate,
    pub eps: f64,
    pub batch: usize,
    pub noises: usize,
    pub separate: bool,
    pub local: LocalPruner,
    /// The sequences that score.
    pub data: calibrate::Options,
    pub calibration: calibrate::Options,
    /// What the pruned weights become; its share is that of all.
    pub sparsity: Sparsity,
    pub scope: Vec<String>,
    /// Whether the total of each tower is fixed.
    pub per_tower: bool,
}

impl Settings {
    fn read(options: &v1::Ecoflap) -> Result<Self> {
        let share = options.share.unwrap_or(SHARE);
        if !(share > 0.0 && share < 1.0) {
            let problem = format!("{share} is outside (0, 1); {SHARE} prunes half of the weights");
            return Err(Error::option("share", problem));
        }
        let max_share = options.max_share.unwrap_or((share + ROOM).min(MOST.max(share)));
        if !(max_share >= share && max_share < 1.0) {
            let problem = format!("{max_share} is outside [share, 1), and share is {share}");
            return Err(Error::option("max_share", problem));
        }
        let eps = options.eps.unwrap_or(EPS);
        if !(eps > 0.0 && eps <= 1.0) {
            return Err(Error::option("eps", format!("{eps} is outside (0, 1]; {EPS} is usual")));
        }
        let whole = |name: &str, value: Option<u32>, usual: u32, low: u32, high: u32| {
            let value = value.unwrap_or(usual);
            match (low..=high).contains(&value) {
                true => Ok(value as usize),
                false => {
                    let problem = format!("{value} is outside {low} to {high}; {usual} is usual");
                    Err(Error::option(name, problem))
                }
            }
        };
        let group = choice!(EcoflapGroup, "group", options.group, Block)?;
        let calibration = calibrate::Options::read(options.calibration.as_ref())?;
        let data = calibrate::Options {
            sequences: whole("n_data", options.n_data, N_DATA, 1, 4096)?,
            length: whole("data_length", options.data_length, DATA_LENGTH, 8, 8192)?,
            ..calibration.clone()
        };
        let score = choice!(EcoflapScore, "score", options.score, Zeroth)?;
        let separate = options.separate_noise || group == EcoflapGroup::Layer;
        if options.compare_scores && score == EcoflapScore::Uniform {
            let problem = "there are no scores to compare when all are the same; leave it out";
            return Err(Error::option("compare_scores", problem));
        }
        if ValueType::try_from(options.values).is_err() {
            let problem = format!("{} is no number of ValueType", options.values);
            return Err(Error::option("values", problem));
        }
        let sparsity = v1::Sparsity {
            share: Some(share),
            values: options.values,
            scope: options.scope.clone(),
            ..Default::default()
        };
        Ok(Self {
            share,
            max_share,
            group,
            score,
            aggregate: choice!(EcoflapAggregate, "aggregate", options.aggregate, Sum)?,
            eps,
            batch: whole("batch", options.batch, BATCH, 1, 256)?,
            noises: whole("n_noise", options.n_noise, 1, 1, 256)?,
            separate,
            local: choice!(LocalPruner, "local", options.local, Wanda)?,
            data,
            calibration,
            sparsity: Sparsity::read(Some(&sparsity))?,
            scope: options.scope.clone(),
            per_tower: options.per_tower,
        })
    }

    fn gradients(&self, options: &v1::Ecoflap) -> bool {
        options.compare_scores || matches!(self.score, EcoflapScore::First | EcoflapScore::Fisher)
    }

    /// Zeros of a `[rows, cols]` matrix whose share is that of all.
    fn zeros(&self, rows: usize, cols: usize) -> usize {
        let amount = Amount::Share(self.share);
        match self.local {
            LocalPruner::Magnitude => amount.of(rows * cols),
            LocalPruner::Sparsegpt => sparsegpt::zeros(rows, cols, amount, options::BLOCK as usize),
            _ => rows * amount.of(cols),
        }
    }
}

/// The weights in scope by group, with a name for each group.
fn groups(family: &Family, settings: &Settings) -> Result<Vec<(String, usize, Vec<String>)>> {
    let names: BTreeSet<String> = scope::names(family, &settings.scope)?.into_iter().collect();
    let walk = walk::of(family);
    let mut groups = Vec::new();
    for block in 0..walk.blocks() {
        let own: Vec<String> =
            walk.linears(block).concat().into_iter().filter(|n| names.contains(n)).collect();
        match settings.group {
            _ if own.is_empty() => {}
            EcoflapGroup::Layer => {
                groups.extend(own.into_iter().map(|name| (name.clone(), block, vec![name])));
            }
            _ => groups.push((format!("block {block}"), block, own)),
        }
    }
    Ok(groups)
}

/// What scoring gave each group.
#[derive(Default)]
pub(super) struct Found {
    pub scores: Vec<f64>,
    pub memory: u64,
    /// Memory of differences over that of gradients, and the correlation of their ranks, where both were made.
    pub memory_share: Option<f64>,
    pub correlation: Option<f64>,
    pub warnings: Vec<String>,
}

impl Found {
    /// What is measured of scoring.
    pub fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::from([("scoring_memory_bytes".to_owned(), self.memory as f64)]);
        for (name, value) in [
            ("score_rank_correlation", self.correlation),
            ("scoring_memory_share", self.memory_share),
        ] {
            metrics.extend(value.map(|value| (name.to_owned(), value)));
        }
        metrics
    }
}

/// Scores the groups.
fn score(
    cx: &StepContext<'_>,
    model: &Model,
    groups: &[(String, usize, Vec<String>)],
    settings: &Settings,
    compare: bool,
) -> Result<Found> {
    if settings.score == EcoflapScore::Uniform {
        return Ok(Found { scores: vec![1.0; groups.len()], ..Found::default() });
    }
    let sources = calibrate::Sources {
        model,
        texts: cx.texts,
        stream: &cx.random.child("scores"),
        progress: cx.progress,
    };
    let windows = cx.calibrations.windows(&settings.data, cx.digest, &sources)?;
    let mut found = Found { warnings: windows.warnings.clone(), ..Found::default() };
    let by_gradients = |squared: bool, found: &mut Found| -> Result<Vec<f64>> {
        let names: Vec<&String> = groups.iter().flat_map(|(_, _, names)| names).collect();
        let how = (settings.batch, squared);
        let (scores, memory) = zeroth::first(model, &names, &windows, how, cx.progress)?;
        found.memory = memory;
        let sum = |names: &Vec<String>| names.iter().filter_map(|n| scores.get(n)).sum::<f64>();
        Ok(groups.iter().map(|(_, _, names)| sum(names)).collect())
    };
    let by_differences = |found: &mut Found| -> Result<Vec<f64>> {
        let blocks = walk::of(&model.family).blocks();
        let mut probes = vec![Vec::new(); blocks];
        for (_, block, names) in groups {
            match settings.separate {
                true => probes[*block].extend(names.iter().map(|name| vec![name.clone()])),
                false => probes[*block].push(names.clone()),
            }
        }
        let stream = cx.random.child("noise");
        let how = Probing {
            model,
            probes: &probes,
            windows: &windows,
            batch: settings.batch,
            noises: settings.noises,
            eps: settings.eps,
            stream: &stream,
            progress: cx.progress,
        };
        let scores = zeroth::zeroth(&how)?;
        found.memory = scores.memory;
        found.warnings.extend(scores.warnings);
        // Probes are in the order of the groups, one for each or one for each weight.
        let mut values = scores.values.into_iter();
        let own = |names: &Vec<String>| if settings.separate { names.len() } else { 1 };
        Ok(groups.iter().map(|(_, _, names)| values.by_ref().take(own(names)).sum()).collect())
    };
    let differences = settings.score == EcoflapScore::Zeroth;
    // Differences first: what they leave to the allocator can only make the other's memory look smaller.
    let by_loss = match differences || compare {
        true => Some(by_differences(&mut found)?),
        false => None,
    };
    let memory = found.memory;
    let by_slope = match !differences || compare {
        true => Some(by_gradients(settings.score == EcoflapScore::Fisher, &mut found)?),
        false => None,
    };
    if let (Some(by_loss), Some(by_slope)) = (&by_loss, &by_slope) {
        found.correlation = Some(rank_correlation(by_loss, by_slope));
        found.memory_share = (found.memory > 0).then(|| memory as f64 / found.memory as f64);
    }
    if differences {
        found.memory = memory;
    }
    let mut scores = if differences { by_loss } else { by_slope }.unwrap_or_default();
    if settings.aggregate == EcoflapAggregate::Average {
        for (score, (_, _, names)) in scores.iter_mut().zip(groups) {
            *score /= elements(model, names)?.max(1) as f64;
        }
    }
    if scores.iter().all(|s| *s == 0.0) {
        let warning = "no group has a score: all get the same share".to_owned();
        found.warnings.push(warning);
    }
    found.scores = scores;
    Ok(found)
}

fn elements(model: &Model, names: &[String]) -> Result<u64> {
    names
        .iter()
        .map(|name| Ok((model.weight(name)?.rows() * model.weight(name)?.cols()) as u64))
        .sum()
}

/// Prunes each weight by its own share.
fn prune(
    cx: &StepContext<'_>,
    model: Model,
    shares: &BTreeMap<String, f64>,
    settings: &Settings,
) -> Result<Outcome> {
    let names: BTreeSet<String> = shares.keys().cloned().collect();
    let amount = |name: &str| Amount::Share(shares.get(name).copied().unwrap_or(settings.share));
    let sparsity = &settings.sparsity;
    if settings.local == LocalPruner::Magnitude {
        return alone(cx, model, &names, &|name, values, cols| {
            let mask = magnitude::mask(values, cols, amount(name));
            prune_each(name, values, cols, &mask, sparsity)
        });
    }
    let calibration = &settings.calibration;
    let gram = settings.local == LocalPruner::Sparsegpt;
    let exchange = dsnot::Settings::read(&v1::Dsnot::default(), Amount::Share(settings.share))?;
    let mut account = Account::default();
    let mut outcome = calibrated(cx, model, &names, calibration, gram, &mut |site, report| {
        let cols = site.inputs.cols();
        let amounts: Vec<Amount> = site.names.iter().map(|name| amount(name)).collect();
        match settings.local {
            LocalPruner::Sparsegpt => {
                let factor = report.factor(site, calibration.sequences, options::DAMP, None)?;
                let named = site.names.iter().zip(&site.dense).zip(&amounts);
                named
                    .map(|((name, weights), amount)| {
                        let mut new = weights.clone();
                        let block = options::BLOCK as usize;
                        let mask = sparsegpt::prune(&mut new, &factor, *amount, block);
                        prune_each(name, &new, cols, &mask, sparsity)
                    })
                    .collect()
            }
            LocalPruner::Dsnot => {
                let (done, constant) =
                    dsnot::masks(site, &exchange, true, &amounts, calibration.sequences)?;
                account.constant(constant);
                let named = site.names.iter().zip(&site.dense).zip(done);
                named
                    .map(|((name, weights), done)| {
                        account.add(name, &done);
                        prune_each(name, weights, cols, &done.mask, sparsity)
                    })
                    .collect()
            }
            _ => {
                let norms = site.inputs.norms();
                let named = site.names.iter().zip(&site.dense).zip(&amounts);
                named
                    .map(|((name, weights), amount)| {
                        let mask = wanda::mask(weights, &norms, *amount);
                        prune_each(name, weights, cols, &mask, sparsity)
                    })
                    .collect()
            }
        }
    })?;
    if settings.local == LocalPruner::Dsnot {
        account.put(&mut outcome);
    }
    Ok(outcome)
}

impl Method for v1::Ecoflap {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        let share = *self.share.get_or_insert(SHARE);
        self.max_share.get_or_insert((share + ROOM).min(MOST.max(share)));
        if self.group == EcoflapGroup::Unspecified as i32 {
            self.group = EcoflapGroup::Block.into();
        }
        if self.score == EcoflapScore::Unspecified as i32 {
            self.score = EcoflapScore::Zeroth.into();
        }
        if self.aggregate == EcoflapAggregate::Unspecified as i32 {
            self.aggregate = EcoflapAggregate::Sum.into();
        }
        self.eps.get_or_insert(EPS);
        self.n_data.get_or_insert(N_DATA);
        self.data_length.get_or_insert(DATA_LENGTH);
        self.batch.get_or_insert(BATCH);
        self.n_noise.get_or_insert(1);
        if self.local == LocalPruner::Unspecified as i32 {
            self.local = LocalPruner::Wanda.into();
        }
        calibrate::Options::resolve(&mut self.calibration);
        if self.scope.is_empty() {
            self.scope = vec!["*".into()];
        }
        if self.values == ValueType::Unspecified as i32 {
            self.values = ValueType::F16.into();
        }
    }

    fn datasets(&self) -> Vec<&str> {
        self.calibration.iter().map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        // Directions are drawn; without them only the text may be.
        let reads = EcoflapScore::try_from(self.score) != Ok(EcoflapScore::Uniform)
            || LocalPruner::try_from(self.local) != Ok(LocalPruner::Magnitude);
        let draws = matches!(
            EcoflapScore::try_from(self.score),
            Ok(EcoflapScore::Zeroth | EcoflapScore::Unspecified)
        );
        draws || (reads && seeded(self.calibration.as_ref()))
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let settings = Settings::read(self)?;
        if settings.per_tower {
            let problem = "the model has one tower; leave it out";
            return Err(Error::at(Reason::ModelUnsuitable, "per_tower", problem));
        }
        settings.calibration.check(model)?;
        let longest = walk::of(&model.family).max_length();
        if settings.data.length > longest {
            let problem =
                format!("{} is more than the model's {longest} positions", settings.data.length);
            return Err(Error::option("data_length", problem));
        }
        if let Family::Encoder(_) = &model.family {
            if settings.gradients(self) {
                let field = if self.compare_scores { "compare_scores" } else { "score" };
                return Err(Error::at(
                    Reason::ModelUnsuitable,
                    field,
                    "the loss of encoders has no gradients here; use the zeroth-order score",
                ));
            }
            if !settings.data.length.is_multiple_of(2) || settings.batch < 2 {
                let (field, problem) = match settings.batch {
                    0 | 1 => ("batch", "a half has nothing to be told from; take 2 or more"),
                    _ => {
                        ("data_length", "windows of an encoder are cut in halves; take an even one")
                    }
                };
                return Err(Error::option(field, problem));
            }
        }
        let mut after = model.clone();
        let mut work = 0.0;
        let groups = groups(&model.family, &settings)?;
        for name in groups.iter().flat_map(|(_, _, names)| names) {
            let (tensor, [rows, cols]) = store::matrix(model, name)?;
            store::refuse_quantised(tensor, name, "prune")?;
            let most = (settings.max_share * (rows * cols) as f64).floor() as usize;
            if most + rows > rows * cols {
                let problem = format!(
                    "{most} zeros in '{name}' ({rows} x {cols}) would leave rows without a weight; lower it"
                );
                return Err(Error::option("max_share", problem));
            }
            let zeros = settings.zeros(rows, cols).max(store::known_zeros(tensor));
            let new = store::pruned_info([rows, cols], zeros, settings.sparsity.values, None);
            after.tensors.insert(name.clone(), new);
            work += (rows * cols) as f64;
        }
        let gram = settings.local == LocalPruner::Sparsegpt;
        let mut estimate = cost::calibrated(model, &after, &settings.calibration, gram);
        let (tokens, all) = (settings.data.tokens(), work);
        let blocks = walk::of(&model.family).blocks() as f64;
        if settings.score == EcoflapScore::Zeroth || self.compare_scores {
            // Two sides, half of the blocks on average, one probe a block or one a weight.
            let probes = if settings.separate { 7.0 } else { 1.0 };
            let runs = probes * blocks * settings.noises as f64;
            estimate.seconds += runs * tokens as f64 * all * 2.0 / FLOPS;
        }
        if settings.gradients(self) {
            estimate.memory_bytes += 8 * all as u64;
            estimate.seconds += 6.0 * tokens as f64 * all / FLOPS;
        }
        if settings.score != EcoflapScore::Uniform {
            estimate.calibration_tokens += tokens;
        }
        Ok((estimate, after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, model: Model) -> Result<Outcome> {
        let settings = Settings::read(self)?;
        let groups = groups(&model.family, &settings)?;
        let counts: Vec<u64> =
            groups.iter().map(|(_, _, n)| elements(&model, n)).collect::<Result<_>>()?;
        let part = |from: f64, to: f64| cx.progress.part(from, to);
        let (scoring, pruning) = (part(0.0, 0.6), part(0.6, 1.0));
        let context = |progress| StepContext {
            random: cx.random.clone(),
            progress,
            texts: cx.texts,
            calibrations: cx.calibrations,
            digest: cx.digest,
            scratch: cx.scratch.clone(),
        };
        let found = score(&context(&scoring), &model, &groups, &settings, self.compare_scores)?;
        let kept = keep(&counts, &found.scores, settings.share, settings.max_share);
        let mut shares = BTreeMap::new();
        let mut rows = Vec::with_capacity(groups.len());
        for (((name, _, names), n), (score, keep)) in
            groups.iter().zip(&counts).zip(found.scores.iter().zip(&kept))
        {
            let share = 1.0 - *keep as f64 / (*n).max(1) as f64;
            shares.extend(names.iter().map(|name| (name.clone(), share)));
            rows.push(json!({
                "group": name, "score": score, "share": share, "kept": keep, "elements": n,
            }));
        }
        let mut outcome = prune(&context(&pruning), model, &shares, &settings)?;
        outcome.record["ecoflap"] =
            json!({ "groups": rows, "rank_correlation": found.correlation });
        cx.progress.measure(found.metrics());
        outcome.warnings.extend(found.warnings);
        if settings.score != EcoflapScore::Uniform {
            outcome.calibration_tokens += settings.data.tokens();
        }
        Ok(outcome)
    }

    fn check_any(&self, model: &AnyInfo) -> Result<(Estimate, AnyInfo)> {
        if let AnyFamily::TwoTower(config) = &model.family {
            return two_tower::check(&Settings::read(self)?, model, config);
        }
        let (estimate, after) = self.check(&model.walked()?)?;
        Ok((estimate, after.into()))
    }

    fn apply_any(
        &self,
        cx: &mut StepContext<'_>,
        learning: &mut Learning<'_>,
        model: AnyModel,
    ) -> Result<AnyOutcome> {
        if let AnyModel::TwoTower(model) = model {
            let settings = Settings::read(self)?;
            return two_tower::apply(&settings, self.compare_scores, cx, learning, model);
        }
        Ok(self.apply(cx, model.walked()?)?.any())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_options_are_named() {
        let field = |options: v1::Ecoflap| -> String {
            let error = Settings::read(&options).err().expect("refused");
            assert_eq!(error.reason(), Reason::InvalidOption);
            error.violations()[0].field.clone()
        };
        let plain = v1::Ecoflap::default;
        for bad in [0.0, 1.0, -0.1, f64::NAN] {
            assert_eq!(field(v1::Ecoflap { share: Some(bad), ..plain() }), "share");
        }
        for bad in [0.4, 1.0, f64::NAN] {
            assert_eq!(field(v1::Ecoflap { max_share: Some(bad), ..plain() }), "max_share");
        }
        for bad in [0.0, -1e-3, f64::NAN, 2.0] {
            assert_eq!(field(v1::Ecoflap { eps: Some(bad), ..plain() }), "eps");
        }
        assert_eq!(field(v1::Ecoflap { n_data: Some(0), ..plain() }), "n_data");
        assert_eq!(field(v1::Ecoflap { data_length: Some(7), ..plain() }), "data_length");
        assert_eq!(field(v1::Ecoflap { batch: Some(0), ..plain() }), "batch");
        assert_eq!(field(v1::Ecoflap { n_noise: Some(0), ..plain() }), "n_noise");
        assert_eq!(field(v1::Ecoflap { group: 9, ..plain() }), "group");
        assert_eq!(field(v1::Ecoflap { score: 9, ..plain() }), "score");
        assert_eq!(field(v1::Ecoflap { aggregate: 9, ..plain() }), "aggregate");
        assert_eq!(field(v1::Ecoflap { local: 9, ..plain() }), "local");
        assert_eq!(field(v1::Ecoflap { values: 9, ..plain() }), "values");
        let uniform = EcoflapScore::Uniform.into();
        let compare = v1::Ecoflap { score: uniform, compare_scores: true, ..plain() };
        assert_eq!(field(compare), "compare_scores");
        let settings = Settings::read(&v1::Ecoflap { share: Some(0.95), ..plain() }).expect("fine");
        assert!(settings.max_share > 0.95 && settings.max_share < 1.0);
    }

    #[test]
    fn without_scores_all_blocks_get_the_same_share_and_it_is_said() {
        use crate::models::decoder::random;
        let model = random::model(random::tiny("llama"), 5).expect("a model");
        let calibration =
            v1::Calibration { sequences: Some(4), sequence_length: Some(16), ..Default::default() };
        // Steps that no weight feels.
        let options = v1::Ecoflap {
            eps: Some(1e-30),
            n_data: Some(4),
            data_length: Some(16),
            batch: Some(2),
            calibration: Some(calibration),
            ..Default::default()
        };
        let made = super::super::testing::apply(&options, &model).expect("prunes");
        assert!(made.warnings.iter().any(|w| w.contains("no group has a score")));
        let groups = made.record["ecoflap"]["groups"].as_array().expect("groups");
        assert_eq!(groups.len(), 3);
        for group in groups {
            assert_eq!((group["score"].as_f64(), group["share"].as_f64()), (Some(0.0), Some(0.5)));
            assert_eq!(group["kept"].as_u64(), Some(6912));
        }
    }
}
