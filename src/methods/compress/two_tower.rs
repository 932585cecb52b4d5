//! ECoFLaP on models of two towers, what it was made for: groups are blocks of each tower (or their weights), the loss
//! is the contrastive one of images and captions, and the weights of both towers are pruned block by block by what
//! enters them.
//!
//! Decided here: while weights of one tower are moved, the vectors of the other stay, so a probe runs the rest of
//! one tower only. Zeros are counted exactly, by group and in all, so that arms with other shares keep equally many
//! weights: rows of a matrix differ by at most one zero. Equal shares do not depend on the sizes of the groups, which
//! differ between towers.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde_json::json;

use super::ecoflap::Settings;
use super::keep_budget::keep;
use super::mask::{Mask, mark_smallest};
use super::two_tower_scores::{Data, draw, elements, score};
use super::{check_finite, store};
use crate::calibrate::inputs::Inputs as Seen;
use crate::error::{Error, Reason, Result};
use crate::methods::scope::matches;
use crate::methods::{AnyOutcome, Estimate, Learning, Outcome, StepContext};
use crate::models::two_tower::plan::{Block, Ends, Inputs, Weights};
use crate::models::two_tower::prompts::{Prompts, Texts};
use crate::models::two_tower::{Config, Model, Side};
use crate::models::{AnyInfo, AnyModel};
use crate::nn::weight::Weight;
use crate::proto::v1::{EcoflapGroup, EcoflapScore, LocalPruner};

/// Images or captions that run through a block at once where nothing is scored.
const CHUNK: usize = 64;
/// Products a second that a plan is made with.
const FLOPS: f64 = 6e10;

/// What gets a share of its own.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Group {
    pub name: String,
    pub side: Side,
    pub block: usize,
    pub names: Vec<String>,
}

/// The weights in scope by group, tower by tower and block by block.
fn groups(config: &Config, settings: &Settings) -> Result<Vec<Group>> {
    let of = |side: Side, block: usize| config.linears(side, block).concat();
    let blocks = || {
        let both = Side::BOTH.into_iter();
        both.flat_map(|side| (0..config.tower(side).layers).map(move |block| (side, block)))
    };
    let all: Vec<String> = blocks().flat_map(|(side, block)| of(side, block)).collect();
    for pattern in &settings.scope {
        if !all.iter().any(|name| matches(pattern, name)) {
            let problem = format!(
                "'{pattern:.100}' matches no linear weight inside the blocks; names look like '{}', and '*' \
                 stands for any characters",
                all.first().map_or("", String::as_str)
            );
            return Err(Error::at(Reason::TensorNotFound, "scope", problem));
        }
    }
    let scoped = |name: &String| {
        settings.scope.is_empty() || settings.scope.iter().any(|pattern| matches(pattern, name))
    };
    let mut groups = Vec::new();
    for (side, block) in blocks() {
        let names: Vec<String> = of(side, block).into_iter().filter(scoped).collect();
        if settings.group == EcoflapGroup::Layer {
            groups.extend(names.into_iter().map(|name| Group {
                name: name.clone(),
                side,
                block,
                names: vec![name],
            }));
        } else if !names.is_empty() {
            groups.push(Group {
                name: format!("{} block {block}", side.name()),
                side,
                block,
                names,
            });
        }
    }
    Ok(groups)
}

/// Refuses early and says what the step costs, and what the model will be.
pub(super) fn check(
    settings: &Settings,
    model: &AnyInfo,
    config: &Config,
) -> Result<(Estimate, AnyInfo)> {
    if settings.calibration.dataset.is_none() {
        let problem = "is missing; name a data set of images with `labels` and `templates`";
        return Err(Error::option("calibration.dataset", problem));
    }
    if !model.has_tokenizer {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            "the model has no tokenizer, so it cannot read captions; create it anew",
        ));
    }
    if settings.batch < 2 && settings.score != EcoflapScore::Uniform {
        let problem = "a pair has nothing to be told from; take 2 or more";
        return Err(Error::option("batch", problem));
    }
    if !matches!(settings.local, LocalPruner::Wanda | LocalPruner::Magnitude) {
        let problem =
            "models of two towers are pruned by LOCAL_PRUNER_WANDA or LOCAL_PRUNER_MAGNITUDE";
        return Err(Error::at(Reason::ModelUnsuitable, "local", problem));
    }
    let mut after = model.clone();
    let (mut all, mut most) = (0, 0);
    for name in groups(config, settings)?.iter().flat_map(|group| &group.names) {
        let tensor = model.tensors.get(name).ok_or_else(|| {
            Error::new(Reason::TensorNotFound, format!("tensor '{name}' is missing from the model"))
        })?;
        let &[rows, cols] = tensor.shape.as_slice() else {
            let problem = format!("'{name}' has shape {:?}, not that of a matrix", tensor.shape);
            return Err(Error::new(Reason::UnsupportedModel, problem));
        };
        store::refuse_quantised(tensor, name, "prune")?;
        let zeros = (settings.max_share * (rows * cols) as f64).floor() as usize;
        if zeros + rows > rows * cols {
            let problem = format!(
                "{zeros} zeros in '{name}' ({rows} x {cols}) would leave rows without a weight; lower it"
            );
            return Err(Error::option("max_share", problem));
        }
        let zeros = (settings.share * (rows * cols) as f64).floor() as usize;
        let zeros = zeros.max(store::known_zeros(tensor));
        let new = store::pruned_info([rows, cols], zeros, settings.sparsity.values, None);
        after.tensors.insert(name.clone(), new);
        (all, most) = (all + rows * cols, most.max(rows * cols));
    }
    let pass = |pairs: usize| -> f64 {
        let both = config.image.positions * config.image.products()
            + config.text.positions * config.text.products();
        pairs as f64 * both as f64
    };
    let pairs = settings.calibration.sequences;
    let mut seconds = all as f64 / 2e7 + 4.0 * pass(pairs) / FLOPS;
    if settings.score != EcoflapScore::Uniform {
        let blocks = (config.image.layers + config.text.layers) as f64;
        let probes = if settings.separate { 6.0 } else { 1.0 } * blocks * settings.noises as f64;
        // Two sides, half of the blocks on average.
        seconds += pass(settings.data.sequences) * probes / FLOPS;
    }
    let positions = (config.image.positions + config.text.positions) as u64;
    let scored = match settings.score {
        EcoflapScore::Uniform => 0,
        _ => settings.data.sequences,
    };
    let floats = config.image.positions * (config.image.hidden + config.patch_pixels())
        + config.text.positions * config.text.hidden;
    let estimate = Estimate {
        weight_bytes: after.bytes(),
        memory_bytes: 2 * model.bytes()
            + after.bytes()
            + 24 * most as u64
            + (4 * pairs * floats) as u64,
        seconds,
        calibration_tokens: (pairs + scored) as u64 * positions,
    };
    Ok((estimate, after))
}

/// `total` in whole parts in the proportions of `sizes`, those with the largest rests rounded up.
fn apportion(total: u64, sizes: &[u64]) -> Vec<u64> {
    let all: u64 = sizes.iter().sum::<u64>().max(1);
    let exact = |size: &u64| u128::from(total) * u128::from(*size);
    let whole = |size: &u64| (exact(size) / u128::from(all)) as u64;
    let mut parts: Vec<u64> = sizes.iter().map(whole).collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(exact(&sizes[*i]) % u128::from(all)));
    let left = total.saturating_sub(parts.iter().sum());
    order.into_iter().take(left as usize).for_each(|i| parts[i] += 1);
    parts
}

/// How many weights each group keeps. Scores that are all the same give each group the share of all, whatever its
/// size; with `per_tower` the total of each tower is what it would be by itself.
fn kept(groups: &[Group], counts: &[u64], scores: &[f64], settings: &Settings) -> Vec<u64> {
    let share = settings.share;
    let of = |members: &[usize], kept: &mut [u64]| {
        let pick = |from: &[u64]| members.iter().map(|i| from[*i]).collect::<Vec<_>>();
        let counts = pick(counts);
        let scores: Vec<f64> = members.iter().map(|i| scores[*i]).collect();
        let plain = settings.score == EcoflapScore::Uniform || scores.iter().all(|s| *s == 0.0);
        let new = if plain {
            let all: u64 = counts.iter().sum();
            apportion(((1.0 - share) * all as f64 + 1e-6).floor() as u64, &counts)
        } else {
            keep(&counts, &scores, share, settings.max_share)
        };
        members.iter().zip(new).for_each(|(i, keep)| kept[*i] = keep);
    };
    let mut kept = vec![0; groups.len()];
    if settings.per_tower {
        for side in Side::BOTH {
            let members: Vec<usize> =
                (0..groups.len()).filter(|i| groups[*i].side == side).collect();
            of(&members, &mut kept);
        }
    } else {
        of(&(0..groups.len()).collect::<Vec<_>>(), &mut kept);
    }
    kept
}

/// The mask of Wanda with exactly `zeros` in all: as many in each row, or one more, evenly spread.
fn wanda_mask(values: &[f32], norms: &[f32], zeros: usize) -> Mask {
    let cols = norms.len();
    let rows = values.len() / cols;
    let mut mask = Mask::new(rows, cols);
    let until = |row: usize| row * zeros / rows;
    let lines = values.chunks_exact(cols).zip(mask.pruned_mut().chunks_exact_mut(cols));
    for (row, (line, pruned)) in lines.enumerate() {
        let scores = line.iter().zip(norms).map(|(w, n)| w.abs() * n);
        mark_smallest(scores, until(row + 1) - until(row), pruned);
    }
    mask
}

/// The weights of a block, group by group of those that share an input.
fn prune_block(
    model: &mut Model,
    linears: [Vec<String>; 4],
    seen: &[Option<Seen>; 4],
    zeros: &BTreeMap<String, u64>,
    settings: &Settings,
) -> Result<()> {
    for (names, seen) in linears.into_iter().zip(seen) {
        for name in names {
            let Some(zeros) = zeros.get(&name) else { continue };
            let weight = model.weight(&name)?;
            let (mut values, shape) = (weight.to_f32(), [weight.rows(), weight.cols()]);
            check_finite(&name, &values)?;
            let mask = match seen {
                Some(seen) if !seen.finite() => {
                    return Err(Error::new(
                        Reason::NonFinite,
                        format!(
                            "what enters '{name}' is not finite; the model is broken: evaluate the version \
                             this step starts from"
                        ),
                    ));
                }
                Some(seen) => wanda_mask(&values, &seen.norms(), *zeros as usize),
                None => Mask::smallest(&values, shape[1], *zeros as usize, f32::abs),
            };
            mask.apply(&mut values);
            let new = store::pruned(&name, shape, &values, settings.sparsity.values, None)?;
            model.weights.insert(name, Arc::new(new));
        }
    }
    Ok(())
}

/// Prunes both towers block by block; each block sees what the pruned ones before it give. Gives the rows that ran.
fn prune(
    cx: &StepContext<'_>,
    (model, data): (&mut Model, &Data<'_>),
    drawn: &[(usize, usize)],
    zeros: &BTreeMap<String, u64>,
    settings: &Settings,
) -> Result<u64> {
    let config = data.config;
    let blocks: usize = Side::BOTH.iter().map(|side| config.tower(*side).layers).sum();
    let (mut done, mut rows) = (0, 0);
    for side in Side::BOTH {
        let mut parts: Vec<(Vec<f32>, Arc<[Range<usize>]>)> = Vec::new();
        if settings.local == LocalPruner::Wanda {
            let ends = Ends::new(config, &model.weights, side)?;
            for chunk in drawn.chunks(CHUNK) {
                parts.push(match side {
                    Side::Image => ends.start(&Inputs::Patches(&data.patches(chunk)))?,
                    Side::Text => {
                        let all = data.prompts.all();
                        let texts = Texts::of(chunk.iter().map(|(_, caption)| &all[*caption][..]));
                        ends.start(&Inputs::Texts(&texts))?
                    }
                });
            }
            let width = config.tower(side).hidden;
            rows += parts.iter().map(|(states, _)| (states.len() / width) as u64).sum::<u64>();
        }
        for block in 0..config.tower(side).layers {
            let message =
                format!("{} block {} of {}", side.name(), block + 1, config.tower(side).layers);
            cx.progress.report(f64::from(done) / blocks as f64, &message)?;
            let linears = config.linears(side, block);
            let mut seen: [Option<Seen>; 4] = [None, None, None, None];
            if !parts.is_empty() {
                let watched = Block::new(config, &model.weights, side, block)?;
                for (states, ranges) in &parts {
                    cx.progress.check()?;
                    let mut tap = |group: usize, rows: &[f32]| {
                        let cols = linears[group]
                            .first()
                            .and_then(|name| model.weights.get(name))
                            .map_or(1, |weight| weight.cols());
                        seen[group].get_or_insert_with(|| Seen::new(cols, false)).add(rows);
                    };
                    watched.forward(&mut states.clone(), ranges, &mut Some(&mut tap));
                }
            }
            prune_block(model, linears, &seen, zeros, settings)?;
            let changed = Block::new(config, &model.weights, side, block)?;
            for (states, ranges) in &mut parts {
                cx.progress.check()?;
                changed.forward(states, ranges, &mut None);
            }
            done += 1;
        }
    }
    cx.progress.report(1.0, "all blocks done")?;
    Ok(rows)
}

/// What became of each weight, and of all.
fn counted(
    model: &Model,
    before: &Weights,
    names: impl Iterator<Item = String>,
) -> Result<(serde_json::Value, [u64; 2], Vec<String>)> {
    let (mut tensors, mut total, mut warnings) = (serde_json::Map::new(), [0, 0], Vec::new());
    for name in names {
        let weight: &Weight = model.weight(&name)?;
        let values = weight.to_f32();
        let zeros = values.iter().filter(|v| **v == 0.0).count() as u64;
        let empty = values.chunks(weight.cols()).filter(|r| r.iter().all(|v| *v == 0.0)).count();
        if empty > 0 {
            warnings.push(format!("{empty} rows of '{name}' hold no weight any more"));
        }
        let old = before.get(&name).map(|weight| weight.to_f32()).unwrap_or_default();
        let energy =
            |v: &mut dyn Iterator<Item = f32>| v.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let whole = energy(&mut old.iter().copied()).max(f64::MIN_POSITIVE);
        let lost = energy(&mut old.iter().zip(&values).map(|(a, b)| a - b));
        let elements = values.len() as u64;
        total = [total[0] + zeros, total[1] + elements];
        let entry = json!({
            "zeros": zeros, "elements": elements, "relative_weight_error": (lost / whole).sqrt(),
        });
        tensors.insert(name, entry);
    }
    Ok((serde_json::Value::Object(tensors), total, warnings))
}

/// Scores, shares out, prunes.
pub(super) fn apply(
    settings: &Settings,
    compare: bool,
    cx: &StepContext<'_>,
    learning: &Learning<'_>,
    mut model: Model,
) -> Result<AnyOutcome> {
    let config = model.family.clone();
    let at = |e: Error| Error::at(e.reason(), "calibration.dataset", e.message());
    let name = settings.calibration.dataset.as_deref().unwrap_or_default();
    let images = learning.datasets.images(name).map_err(at)?;
    let prompts = Prompts::of(&model, &images).map_err(at)?;
    let data = Data { config: &config, images: &images, prompts: &prompts };
    let groups = groups(&config, settings)?;
    let counts: Vec<u64> =
        groups.iter().map(|group| elements(&model, &group.names)).collect::<Result<_>>()?;
    let (scoring, pruning) = (cx.progress.part(0.0, 0.6), cx.progress.part(0.6, 1.0));
    let context = |progress| StepContext {
        random: cx.random.clone(),
        progress,
        texts: cx.texts,
        calibrations: cx.calibrations,
        digest: cx.digest,
        scratch: cx.scratch.clone(),
    };
    let found = score(&context(&scoring), (&model, &data), &groups, settings, compare)?;
    let kept = kept(&groups, &counts, &found.scores, settings);
    let (mut zeros, mut rows) = (BTreeMap::new(), Vec::with_capacity(groups.len()));
    for ((group, n), (score, keep)) in
        groups.iter().zip(&counts).zip(found.scores.iter().zip(&kept))
    {
        let sizes = group.names.iter().map(|name| elements(&model, std::slice::from_ref(name)));
        let parts = apportion(n - keep, &sizes.collect::<Result<Vec<_>>>()?);
        zeros.extend(group.names.iter().cloned().zip(parts));
        let share = 1.0 - *keep as f64 / (*n).max(1) as f64;
        rows.push(json!({
            "group": group.name, "score": score, "share": share, "kept": keep, "elements": n,
        }));
    }
    let asked = settings.calibration.sequences;
    let stream = cx.random.child("calibration");
    let drawn = draw((&images, &prompts), asked, settings.calibration.sampling, &stream);
    let mut warnings = found.warnings.clone();
    if drawn.len() < asked && settings.local == LocalPruner::Wanda {
        warnings
            .push(format!("{name} has {} images, fewer than the {asked} asked for", drawn.len()));
    }
    let before = model.weights.clone();
    let ran = prune(&context(&pruning), (&mut model, &data), &drawn, &zeros, settings)?;
    let (tensors, total, more) = counted(&model, &before, zeros.into_keys())?;
    warnings.extend(more);
    cx.progress.measure(found.metrics());
    Ok(Outcome {
        record: json!({
            "tensors": tensors,
            "total": { "zeros": total[0], "elements": total[1] },
            "calibration_tokens": ran,
            "warnings": warnings,
            "ecoflap": { "groups": rows, "rank_correlation": found.correlation },
        }),
        model: AnyModel::from(model),
        calibration_tokens: ran,
        zero_share: total[0] as f64 / total[1].max(1) as f64,
        warnings,
    })
}

#[cfg(test)]
mod tests;
