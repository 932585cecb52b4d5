//! AWQ (Lin et al. 2023, "AWQ: activation-aware weight quantization for LLM compression and acceleration",
//! arXiv 2306.00978, equations 2 to 5): input channels that see large activations are multiplied by
//! `s = a^p` before their weights are rounded, so that they are rounded more finely, and what makes the input
//! is divided. `a` is the mean size of each channel; the power `p` is searched for the input that some linears
//! share, by the error of their outputs on calibration text.
//!
//! Decided here: the error is that of the linears' own outputs, through Gram matrices, not of the block's; no
//! weights are clipped. Scales are divided by the root of the product of the largest and the smallest, as in
//! the published program. Channels of heads that share their values share their scales (the program leaves
//! such projections alone). Where the linear before is out of scope, or one that shares the input, the input
//! is not scaled. Of an encoder only the inputs that are made of values are ([`folding`] says why): the rest is
//! rounding to the nearest.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::json;

use super::blockwise::{Block, Rows, walk_blocks};
use super::folding::{self, Working};
use super::grid::Grid;
use super::mask::Mask;
use super::report::Report;
use super::{check_finite, cost, quantise_each, round_to_nearest, seeded, windows_of};
use crate::calibrate::gram::Gram;
use crate::calibrate::{self, walk};
use crate::error::{Error, Result};
use crate::methods::{Card, Estimate, Method, Outcome, StepContext};
use crate::models::{Family, Model, ModelInfo, TensorInfo};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, GroupedSpec, Record, Weight};
use crate::proto::v1;

static CARD: Card = Card {
    name: "awq",
    title: "AWQ",
    verb: "compress",
    summary: "Scales channels by their activations before rounding to a grouped grid, and takes the scales \
              into what stands before.",
    paper: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv 2306.00978",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// Channels below this size count as this large.
const LEAST: f64 = 1e-4;
const STEPS: u32 = 20;

fn steps(value: Option<u32>) -> Result<u32> {
    let value = value.unwrap_or(STEPS);
    if (1..=1000).contains(&value) {
        return Ok(value);
    }
    Err(Error::option("search_steps", format!("{value} is outside 1 to 1000; {STEPS} is usual")))
}

/// `sizes^power`, centred: the largest times the smallest is 1.
pub fn scales(sizes: &[f64], power: f64) -> Vec<f32> {
    let raised: Vec<f64> = sizes.iter().map(|a| a.max(LEAST).powf(power)).collect();
    let (low, high) =
        raised.iter().fold((f64::INFINITY, 0.0_f64), |(lo, hi), v| (lo.min(*v), hi.max(*v)));
    let centre = (low * high).sqrt();
    raised.iter().map(|v| (v / centre) as f32).collect()
}

/// What rounding makes of `[rows, cols]` weights whose columns are scaled, with the scales divided out.
pub fn rounded(weights: &[f32], scales: &[f32], spec: GroupedSpec) -> Vec<f32> {
    let cols = scales.len();
    let mut scaled = weights.to_vec();
    for row in scaled.chunks_exact_mut(cols) {
        row.iter_mut().zip(scales).for_each(|(v, s)| *v *= s);
    }
    let mut values = round_to_nearest::quantise(&scaled, cols, spec).values(spec);
    for row in values.chunks_exact_mut(cols) {
        row.iter_mut().zip(scales).for_each(|(v, s)| *v /= s);
    }
    values
}

/// The best power of `steps` between 0 and 1, its scales, and the squared error of the outputs of all
/// `weights` with it and without scales.
pub fn search(
    weights: &[&[f32]],
    gram: &Gram,
    sizes: &[f64],
    spec: GroupedSpec,
    steps: u32,
    mut check: impl FnMut() -> Result<()>,
) -> Result<(f64, Vec<f32>, [f64; 2])> {
    let mut best: Option<(f64, Vec<f32>, f64)> = None;
    let mut plain = 0.0;
    for step in 0..steps {
        check()?;
        let power = f64::from(step) / f64::from(steps);
        let scales = scales(sizes, power);
        let mut error = 0.0;
        for values in weights {
            let made = rounded(values, &scales, spec);
            let delta: Vec<f32> = values.iter().zip(&made).map(|(a, b)| a - b).collect();
            error += gram.energy(&delta);
        }
        if step == 0 {
            plain = error;
        }
        if best.as_ref().is_none_or(|(_, _, least)| error < *least) {
            best = Some((power, scales, error));
        }
    }
    let (power, scales, error) = best.ok_or_else(|| Error::internal("a search without steps"))?;
    Ok((power, scales, [error, plain]))
}

impl Method for v1::Awq {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        Grid::resolve(&mut self.grid);
        calibrate::Options::resolve(&mut self.calibration);
        self.search_steps.get_or_insert(STEPS);
    }

    fn datasets(&self) -> Vec<&str> {
        self.calibration.iter().map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        seeded(self.calibration.as_ref())
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let grid = Grid::read(self.grid.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        calibration.check(model)?;
        steps(self.search_steps)?;
        let mut after = grid.check(model)?;
        for vector in divided(&after) {
            if let Some(tensor) = after.tensors.get_mut(&vector) {
                let elements: usize = tensor.shape.iter().product();
                let record = Record::Dense { shape: tensor.shape.clone() };
                let bytes = (elements * size_of::<f32>()) as u64;
                *tensor = TensorInfo { record, shape: tensor.shape.clone(), bytes };
            }
        }
        Ok((cost::calibrated(model, &after, &calibration, true), after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, mut model: Model) -> Result<Outcome> {
        let grid = Grid::read(self.grid.as_ref())?;
        let calibration = calibrate::Options::read(self.calibration.as_ref())?;
        let steps = steps(self.search_steps)?;
        let names = grid.names(&model.family)?;
        let mut report = Report::default();
        let windows = windows_of::calibration(cx, &model, &calibration, &mut report)?;
        let family = model.family.clone();
        if let Family::Encoder(_) = &family {
            report.warn(
                "of an encoder only the inputs of the attention's outputs are scaled: nothing before the \
                 others takes scales"
                    .to_owned(),
            );
        }
        let mut powers = serde_json::Map::new();
        let mut layer = 0;
        let work = &mut |mut block: Block<'_>| {
            let sites = std::mem::take(&mut block.sites);
            let mut working = start(&block, &sites, &names)?;
            for ((group, seen), before) in sites.iter().zip(folding::before(&family, layer)) {
                let Some(before) = before else { continue };
                if !group.iter().all(|name| names.contains(name)) || !working.takes(&before) {
                    continue;
                }
                let weights: Vec<&[f32]> =
                    group.iter().map(|name| working.values[name].as_slice()).collect();
                let sizes = before.tied(seen.mean_sizes());
                let check = || cx.progress.check();
                let found = search(&weights, &seen.gram, &sizes, grid.spec, steps, check)?;
                let (power, scales, [error, plain]) = found;
                if power > 0.0 {
                    working.scale(&block, group, &before, &scales)?;
                }
                let first = group.first().cloned().unwrap_or_default();
                let share = if plain > 0.0 { error / plain } else { 1.0 };
                powers.insert(first, json!({ "power": power, "squared_error_share": share }));
            }
            store(&mut block, &sites, &working, &names, grid.spec, &mut report)?;
            working.store_vectors(&mut block)?;
            layer += 1;
            Ok(())
        };
        walk_blocks(cx, &mut model, &windows, Rows::All, work)?;
        let mut outcome = report.outcome(model, calibration.tokens());
        outcome.record["inputs"] = powers.into();
        Ok(outcome)
    }
}

/// Norms and biases that may be divided.
fn divided(model: &ModelInfo) -> Vec<String> {
    let blocks = 0..walk::of(&model.family).blocks();
    blocks
        .flat_map(|layer| folding::before(&model.family, layer))
        .flatten()
        .map(|before| match before {
            folding::Before::Norm { name, .. } => name,
            folding::Before::Linear { name, .. } => name.replace(".weight", ".bias"),
        })
        .collect()
}

/// The linears in scope as f32, checked.
fn start(
    block: &Block<'_>,
    sites: &[(Vec<String>, super::blockwise::Seen)],
    names: &BTreeSet<String>,
) -> Result<Working> {
    let chosen = sites.iter().flat_map(|(group, _)| group).filter(|name| names.contains(*name));
    let working = Working::new(block, chosen)?;
    for (name, values) in &working.values {
        check_finite(name, values)?;
    }
    Ok(working)
}

/// Rounds the scaled linears and puts them into their places.
fn store(
    block: &mut Block<'_>,
    sites: &[(Vec<String>, super::blockwise::Seen)],
    working: &Working,
    names: &BTreeSet<String>,
    spec: GroupedSpec,
    report: &mut Report,
) -> Result<()> {
    for (group, seen) in sites {
        for name in group.iter().filter(|name| names.contains(*name)) {
            let stored = block.weights[name].clone();
            let (shape, cols) = (stored.shape().to_vec(), stored.cols());
            let values = &working.values[name];
            let mask = Mask::zeros_of(values, cols);
            let codes = round_to_nearest::quantise(values, cols, spec);
            let new = quantise_each(&stored, cols, spec, &codes, &mask)?;
            let back = working.unscaled(name, new.to_f32(), cols);
            let back = Weight::Dense(Dense::from_f32(shape, &back, Dtype::F32)?);
            report.add(name, &stored.to_f32(), &back, Some(&seen.gram));
            block.weights.insert(name.clone(), Arc::new(new));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::compress::folding::testing::{logits, tiny};
    use crate::methods::compress::testing::{self, correlated, weights};
    use crate::models::decoder::random;

    const COLS: usize = 64;
    const SPEC: GroupedSpec = GroupedSpec { bits: 3, group: 16, symmetric: false };

    #[test]
    fn scales_are_centred_powers_of_the_sizes() {
        assert_eq!(scales(&[4.0, 1.0], 0.5), [2.0_f32.sqrt(), 0.5_f32.sqrt()]);
        assert_eq!(scales(&[4.0, 1.0, 0.0], 0.0), [1.0; 3]);
        assert!(scales(&[0.0, 1e9], 1.0).iter().all(|s| s.is_finite() && *s > 0.0));
    }

    #[test]
    fn never_errs_more_than_rounding_and_less_where_channels_differ() {
        let mut better = 0;
        for seed in 0..5 {
            let gram = correlated(COLS, seed);
            let w = weights(32, COLS, 50 + seed);
            let sizes: Vec<f64> = (0..COLS).map(|j| gram.at(j, j).sqrt()).collect();
            let (power, scales, [error, plain]) =
                search(&[&w], &gram, &sizes, SPEC, 20, || Ok(())).unwrap();
            assert!(error <= plain, "{error} over {plain}");
            better += u32::from(error < 0.9 * plain && power > 0.0);
            assert_eq!(scales.len(), COLS);
        }
        assert!(better >= 4, "{better} of 5");
        // Channels of one size: there is nothing to scale.
        let mut gram = Gram::new(COLS);
        (0..COLS).for_each(|j| {
            let mut row = [0.0; COLS];
            row[j] = 1.0;
            gram.add(&row);
        });
        let w = weights(8, COLS, 9);
        let (power, scales, [error, plain]) =
            search(&[&w], &gram, &[1.0; COLS], SPEC, 20, || Ok(())).unwrap();
        assert_eq!((power, error), (0.0, plain));
        assert_eq!(
            rounded(&w, &scales, SPEC),
            round_to_nearest::quantise(&w, COLS, SPEC).values(SPEC)
        );
    }

    fn apply(options: &v1::Awq, model: &Model) -> Outcome {
        testing::apply(options, model).unwrap()
    }

    fn options(bits: u32, scope: &[&str]) -> v1::Awq {
        let scope = scope.iter().map(|s| (*s).to_owned()).collect();
        v1::Awq {
            grid: Some(v1::Grid {
                bits: Some(bits),
                group_size: Some(16),
                scope,
                ..Default::default()
            }),
            calibration: Some(v1::Calibration {
                sequences: Some(6),
                sequence_length: Some(24),
                ..Default::default()
            }),
            search_steps: None,
        }
    }

    #[test]
    fn a_fine_grid_leaves_the_model_as_it_was() {
        for architecture in ["llama", "qwen2", "gemma3_text", "bert"] {
            let model = tiny(architecture);
            let want = logits(&model);
            let made = apply(&options(8, &[]), &model);
            for (got, want) in logits(&made.model).iter().zip(&want) {
                assert!((got - want).abs() < 0.1, "{architecture}: {got} is not {want}");
            }
            let inputs = made.record["inputs"].as_object().unwrap();
            let each = if architecture == "bert" { 1 } else { 4 };
            assert_eq!(inputs.len(), each * walk::of(&model.family).blocks());
            assert_eq!(made.warnings.iter().any(|w| w.contains("encoder")), each == 1);
            let shares = inputs.values().map(|v| v["squared_error_share"].as_f64().unwrap());
            assert!(shares.into_iter().all(|share| share <= 1.0));
        }
    }

    #[test]
    fn what_is_out_of_scope_is_not_scaled() {
        let model = random::model(random::tiny("llama"), 5).unwrap();
        // Not all readers of the norm, and not the linear before.
        let made = apply(&options(4, &["*.q_proj.*", "*.down_proj.*"]), &model).model;
        for (name, weight) in &made.weights {
            let changed = name.contains("q_proj") || name.contains("down_proj");
            assert_eq!(weight.to_f32() != model.weights[name].to_f32(), changed, "{name}");
        }
        let plain = round_to_nearest::quantise(
            &model.weights["model.layers.0.mlp.down_proj.weight"].to_f32(),
            80,
            GroupedSpec { bits: 4, group: 16, symmetric: false },
        );
        let spec = GroupedSpec { bits: 4, group: 16, symmetric: false };
        assert_eq!(
            made.weights["model.layers.0.mlp.down_proj.weight"].to_f32(),
            plain.values(spec)
        );
    }

    #[test]
    fn bad_steps_are_refused() {
        let model = random::model(random::tiny("llama"), 5).unwrap();
        for bad in [0, 1001] {
            let method = v1::Awq { search_steps: Some(bad), ..options(4, &[]) };
            let error = method.check(&model.info()).unwrap_err();
            assert_eq!(error.violations()[0].field, "search_steps");
        }
    }
}
