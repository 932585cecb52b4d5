//! DGQ (Zhang et al. 2023, "Dual grained quantization: efficient fine-grained quantization for LLM", arXiv
//! 2310.04836, sections 3.1 to 3.3): 4-bit weights in groups whose scales are whole multiples of their row's, so
//! that a row is one of an 8-bit matrix and products with 8-bit activations stay integers.
//!
//! Block by block: the largest channels of the inputs are brought down to a percentile, the weights that read
//! them up; scales of groups are searched by the error of the group's outputs, scales of rows by that of the
//! row's. Later blocks see what the blocks made so far give.
//!
//! Decided here: grids always span 0, so zero points fit into 4 bits (the published program's may not); rows
//! of the whole calibration text are searched on, its last sequence alone as a choice; the scale that the
//! largest weight asks for is among those tried. Of an encoder no input is smoothed: none comes from what takes
//! scales, but those made of values, which are means over tokens and have no outliers of their own. Keys and
//! values in 8 bits are the server's setting (`limits.kv_format`), not a part of the weights.

use std::collections::BTreeSet;
use std::sync::Arc;

use half::f16;
use serde_json::json;

use super::blockwise::{Block, Rows, Seen, walk_blocks};
use super::dgq_search::{self, Dual, Problem};
use super::folding::{self, Working};
use super::report::Report;
use super::{check_finite, cost, round_to_nearest, seeded, store, windows_of};
use crate::calibrate;
use crate::error::{Error, Result};
use crate::methods::{Card, Estimate, Method, Outcome, StepContext, scope};
use crate::models::{Family, Model, ModelInfo, TensorInfo};
use crate::nn::dtype::Dtype;
use crate::nn::weight::{Dense, DualGrained, Grouped, GroupedSpec, Record, Weight};
use crate::proto::v1::{self, DgqActivations, DgqForm, DgqRows, DgqSmoothing};

static CARD: Card = Card {
    name: "dgq",
    title: "Dual grained quantization",
    verb: "compress",
    summary: "Searches 4-bit groups inside 8-bit rows, after smoothing outliers of the activations, for \
              products in integers.",
    paper: "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM, arXiv 2310.04836",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

const GROUP: u32 = 128;
/// Most steps of a search.
const MOST_STEPS: u32 = 1000;

/// Checked options.
struct Read {
    group: usize,
    fixed: bool,
    smooth_top: Option<f64>,
    calibration: calibrate::Options,
    steps: [usize; 2],
    rows: Rows,
    scope: Vec<String>,
    form: DgqForm,
}

fn read(options: &v1::Dgq) -> Result<Read> {
    let mut options = options.clone();
    options.resolve();
    let unknown =
        |name: &str, number: i32| Error::option(name, format!("{number} stands for nothing here"));
    let activations = DgqActivations::try_from(options.activations)
        .map_err(|_| unknown("activations", options.activations))?;
    let smooth =
        DgqSmoothing::try_from(options.smooth).map_err(|_| unknown("smooth", options.smooth))?;
    let rows = DgqRows::try_from(options.search_rows)
        .map_err(|_| unknown("search_rows", options.search_rows))?;
    let form = DgqForm::try_from(options.form).map_err(|_| unknown("form", options.form))?;
    let steps = |name: &str, value: Option<u32>| match value.unwrap_or_default() {
        value if (1..=MOST_STEPS).contains(&value) => Ok(value as usize),
        value => Err(Error::option(name, format!("{value} is outside 1 to {MOST_STEPS}"))),
    };
    let smooth_top = options.smooth_top.unwrap_or_default();
    if !(0.0..=0.5).contains(&smooth_top) {
        return Err(Error::option("smooth_top", format!("{smooth_top} is outside 0 to 0.5")));
    }
    let fixed = activations == DgqActivations::Static;
    if fixed && form != DgqForm::DualGrained {
        let message = "numbers measured beforehand belong to the dual grained form; leave this out";
        return Err(Error::option("activations", message));
    }
    let group = options.group.unwrap_or_default() as usize;
    if group == 0 {
        return Err(Error::option("group", "a group has at least one input"));
    }
    let calibration = calibrate::Options::read(options.calibration.as_ref())?;
    if calibration.tokens() < group as u64 {
        let message =
            format!("{} tokens are fewer than the {group} of a group", calibration.tokens());
        return Err(Error::option("calibration.sequences", message));
    }
    Ok(Read {
        group,
        fixed,
        smooth_top: (smooth == DgqSmoothing::Percentile).then_some(smooth_top),
        calibration,
        steps: [steps("group_steps", options.group_steps)?, steps("row_steps", options.row_steps)?],
        rows: match rows {
            DgqRows::LastSequence => Rows::LastSequence,
            _ => Rows::All,
        },
        scope: options.scope,
        form,
    })
}

impl Read {
    /// The grid of the forms that are not dual grained.
    fn spec(&self, cols: usize) -> GroupedSpec {
        let group = if self.form == DgqForm::Rows { cols } else { self.group };
        GroupedSpec { bits: 4, group, symmetric: false }
    }

    fn info(&self, [rows, cols]: [usize; 2]) -> Result<TensorInfo> {
        let shape = [rows, cols];
        let (record, bytes) = match self.form {
            DgqForm::Grouped | DgqForm::Rows => {
                let spec = self.spec(cols);
                spec.check(cols)?;
                (Record::Grouped { shape, spec }, spec.bytes(rows, cols))
            }
            _ => {
                DualGrained::check_group(self.group, cols)?;
                let groups = rows * (cols / self.group);
                let bytes =
                    rows * cols / 2 + 2 * groups + 4 * rows + if self.fixed { 4 } else { 0 };
                let record = Record::DualGrained {
                    shape,
                    group: self.group,
                    static_activations: self.fixed,
                };
                (record, bytes as u64)
            }
        };
        Ok(TensorInfo { record, shape: shape.to_vec(), bytes })
    }
}

impl Method for v1::Dgq {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        self.group.get_or_insert(GROUP);
        if self.activations == DgqActivations::Unspecified as i32 {
            self.activations = DgqActivations::PerToken as i32;
        }
        if self.smooth == DgqSmoothing::Unspecified as i32 {
            self.smooth = DgqSmoothing::Percentile as i32;
        }
        self.smooth_top.get_or_insert(0.005);
        calibrate::Options::resolve(&mut self.calibration);
        self.group_steps.get_or_insert(20);
        self.row_steps.get_or_insert(80);
        if self.search_rows == DgqRows::Unspecified as i32 {
            self.search_rows = DgqRows::All as i32;
        }
        if self.scope.is_empty() {
            self.scope = vec!["*".into()];
        }
        if self.form == DgqForm::Unspecified as i32 {
            self.form = DgqForm::DualGrained as i32;
        }
    }

    fn datasets(&self) -> Vec<&str> {
        self.calibration.iter().map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        seeded(self.calibration.as_ref())
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let read = read(self)?;
        read.calibration.check(model)?;
        if read.fixed && matches!(model.family, Family::Encoder(_)) {
            let message = "encoders measure their inputs as they come, and would ignore numbers measured \
                           beforehand; take per token, or leave this out";
            return Err(Error::option("activations", message));
        }
        let mut after = model.clone();
        let mut flops = 0.0;
        for name in scope::names(&model.family, &read.scope)? {
            let (tensor, shape) = store::matrix(model, &name)?;
            store::refuse_quantised(tensor, &name, "quantise")?;
            let info = read.info(shape).map_err(|error| {
                Error::option("group", format!("{} ('{name}')", error.message()))
            })?;
            let elements = (shape[0] * shape[1]) as f64;
            flops +=
                2.0 * elements * (read.steps[0] * read.group + read.steps[1] * shape[1]) as f64;
            after.tensors.insert(name, info);
        }
        let mut estimate = cost::calibrated(model, &after, &read.calibration, true);
        if read.form == DgqForm::DualGrained {
            estimate.seconds += flops / 1e11;
        }
        Ok((estimate, after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, mut model: Model) -> Result<Outcome> {
        let read = read(self)?;
        let names: BTreeSet<String> =
            scope::names(&model.family, &read.scope)?.into_iter().collect();
        let mut report = Report::default();
        let windows = windows_of::calibration(cx, &model, &read.calibration, &mut report)?;
        let family = model.family.clone();
        if matches!(family, Family::Encoder(_)) && read.smooth_top.is_some_and(|top| top > 0.0) {
            report.warn(
                "of an encoder no input is smoothed, so `smooth` and `smooth_top` do nothing: what makes its \
                 inputs takes no scales"
                    .to_owned(),
            );
        }
        let (mut layers, mut ratios) = (serde_json::Map::new(), serde_json::Map::new());
        let mut layer = 0;
        let work = &mut |mut block: Block<'_>| {
            let sites = std::mem::take(&mut block.sites);
            let chosen =
                sites.iter().flat_map(|(group, _)| group).filter(|name| names.contains(*name));
            let mut working = Working::new(&block, chosen)?;
            for (name, values) in &working.values {
                check_finite(name, values)?;
            }
            for (at, ((group, seen), before)) in
                sites.iter().zip(folding::before(&family, layer)).enumerate()
            {
                let whole = group.iter().all(|name| names.contains(name));
                // Values are means over tokens: they have no outliers of their own.
                let values = at == folding::VALUES;
                let (Some(top), Some(before), true, false) =
                    (read.smooth_top, before, whole, values)
                else {
                    continue;
                };
                if !working.takes(&before) {
                    continue;
                }
                if let Some(by) = dgq_search::smoothing(&seen.tops, top) {
                    working.scale(&block, group, &before, &by)?;
                    let most = by.iter().fold(1.0_f32, |a, b| a.max(*b));
                    ratios.insert(group.first().cloned().unwrap_or_default(), json!(most));
                }
            }
            for (group, seen) in &sites {
                let chosen: Vec<&String> =
                    group.iter().filter(|name| names.contains(*name)).collect();
                let Some(first) = chosen.first() else { continue };
                let cols = seen.tops.len();
                let by = working.columns(first, cols);
                let gram = scaled_gram(seen, &by);
                let fixed = read.fixed.then(|| fixed_scale(seen, &by));
                for name in chosen {
                    cx.progress.check()?;
                    let made = quantised(&read, &working.values[name], &gram, cols, fixed, cx)?;
                    let stored = block.weights[name].clone();
                    let before = stored.to_f32();
                    let back = working.unscaled(name, made.to_f32(), cols);
                    layers.insert(name.clone(), json!(snr(&before, &back, seen)));
                    let back = Dense::from_f32(stored.shape().to_vec(), &back, Dtype::F32)?;
                    report.add(name, &before, &Weight::Dense(back), Some(&seen.gram));
                    block.weights.insert(name.clone(), Arc::new(made));
                }
            }
            working.store_vectors(&mut block)?;
            layer += 1;
            Ok(())
        };
        walk_blocks(cx, &mut model, &windows, read.rows, work)?;
        let mut outcome = report.outcome(model, read.calibration.tokens());
        outcome.record["output_snr_db"] = layers.into();
        outcome.record["smoothed_by_at_most"] = ratios.into();
        Ok(outcome)
    }
}

/// The Gram matrix of inputs that were divided by `by`.
fn scaled_gram(seen: &Seen, by: &[f32]) -> Vec<f32> {
    let cols = by.len();
    let mut gram = vec![0.0; cols * cols];
    for (i, row) in gram.chunks_exact_mut(cols).enumerate() {
        for (j, v) in row.iter_mut().enumerate() {
            *v = (seen.gram.at(i, j) / (f64::from(by[i]) * f64::from(by[j]))) as f32;
        }
    }
    gram
}

/// The step of activations that is fixed beforehand: of the channels' largest values in that sequence where
/// they are least, the largest. 1 for an input that is always zero.
fn fixed_scale(seen: &Seen, by: &[f32]) -> f32 {
    let tops = seen.least_tops.iter().zip(by).map(|(top, by)| top / by);
    let step = tops.fold(0.0_f32, f32::max) / 127.0;
    if step > 0.0 && step.is_finite() { step } else { 1.0 }
}

/// Signal over noise of a linear's outputs on the calibration text, in decibels; 200 without noise.
fn snr(before: &[f32], after: &[f32], seen: &Seen) -> f64 {
    let delta: Vec<f32> = before.iter().zip(after).map(|(a, b)| a - b).collect();
    let (signal, noise) = (seen.gram.energy(before), seen.gram.energy(&delta));
    if noise > 0.0 { (10.0 * (signal / noise).log10()).min(200.0) } else { 200.0 }
}

/// A scaled linear in the form that was asked for.
fn quantised(
    read: &Read,
    values: &[f32],
    gram: &[f32],
    cols: usize,
    fixed: Option<f32>,
    cx: &StepContext<'_>,
) -> Result<Weight> {
    let shape = [values.len() / cols, cols];
    let spec = read.spec(cols);
    if read.form == DgqForm::Rows {
        let codes = round_to_nearest::quantise(values, cols, spec);
        let packed = Grouped::pack(shape, spec, &codes.codes, &codes.scales, &codes.zeros)?;
        return Ok(Weight::Grouped(packed));
    }
    let problem = Problem { weights: values, gram, cols, group: read.group };
    if read.form == DgqForm::Grouped {
        let stored =
            |step: f32| f16::from_f32(step).clamp(f16::MIN_POSITIVE_SUBNORMAL, f16::MAX).to_f32();
        let grids = dgq_search::groups(&problem, read.steps[0], stored);
        let codes = dgq_search::codes(&problem, &grids);
        let packed = Grouped::pack(shape, spec, &codes.codes, &codes.scales, &codes.zeros)?;
        return Ok(Weight::Grouped(packed));
    }
    let grids = dgq_search::groups(&problem, read.steps[0], |step| step);
    let (Dual { codes, factors, zeros, scales }, _) =
        dgq_search::rows(&problem, &grids, read.steps[1], || cx.progress.check())?;
    let packed = DualGrained::pack(shape, read.group, &codes, &factors, &zeros, &scales)?;
    Ok(Weight::DualGrained(match fixed {
        Some(step) => packed.with_activations(step)?,
        None => packed,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::gram::Gram;
    use crate::methods::compress::folding::testing::{logits, tiny};
    use crate::methods::compress::testing;

    fn options(change: impl Fn(&mut v1::Dgq)) -> v1::Dgq {
        let mut options = v1::Dgq {
            group: Some(32),
            calibration: Some(v1::Calibration {
                sequences: Some(6),
                sequence_length: Some(24),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut options);
        options
    }

    fn apply(options: &v1::Dgq, model: &Model) -> Outcome {
        testing::apply(options, model).unwrap()
    }

    fn mean_snr(outcome: &Outcome) -> f64 {
        let all = outcome.record["output_snr_db"].as_object().unwrap();
        all.values().map(|v| v.as_f64().unwrap()).sum::<f64>() / all.len() as f64
    }

    #[test]
    fn every_form_stores_what_it_said_and_finer_forms_err_less() {
        for architecture in ["llama", "qwen2", "gemma3_text", "bert"] {
            let model = tiny(architecture);
            let want = logits(&model);
            let mut snr = Vec::new();
            for form in [DgqForm::DualGrained, DgqForm::Grouped, DgqForm::Rows] {
                let options = options(|o| o.form = form as i32);
                let made = apply(&options, &model);
                let (_, after) = options.check(&model.info()).unwrap();
                assert_eq!(made.model.bytes(), after.bytes());
                for (name, weight) in &made.model.weights {
                    assert_eq!(weight.record(), after.tensors[name].record, "{name}");
                }
                snr.push(mean_snr(&made));
                let got = logits(&made.model);
                let error = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).sum::<f32>();
                assert!(error / (want.len() as f32) < 0.6, "{architecture}: {error}");
            }
            assert!(snr[0] > 12.0 && snr[1] > snr[2], "{snr:?}");
        }
    }

    #[test]
    fn an_encoder_says_that_it_is_not_smoothed() {
        let warned = |architecture: &str, smooth: DgqSmoothing| {
            let made = apply(&options(|o| o.smooth = smooth as i32), &tiny(architecture));
            made.warnings.iter().any(|warning| warning.contains("smoothed"))
        };
        assert!(warned("bert", DgqSmoothing::Percentile));
        assert!(!warned("bert", DgqSmoothing::None));
        assert!(!warned("llama", DgqSmoothing::Percentile));
    }

    #[test]
    fn smoothing_is_undone_by_the_weights() {
        // Scales with the norms alone, and no rounding to speak of: what comes out must be what went in.
        let model = tiny("llama");
        let made = apply(&options(|o| o.smooth_top = Some(0.2)), &model);
        assert!(!made.record["smoothed_by_at_most"].as_object().unwrap().is_empty());
        let norm = "model.layers.0.input_layernorm.weight";
        let (before, after) = (model.weights[norm].to_f32(), made.model.weights[norm].to_f32());
        assert!(before.iter().zip(&after).all(|(b, a)| a.abs() <= b.abs() + 1e-6));
        assert_ne!(before, after);
        let plain = apply(&options(|o| o.smooth = DgqSmoothing::None as i32), &model);
        assert_eq!(plain.model.weights[norm].to_f32(), before);
        assert!(plain.record["smoothed_by_at_most"].as_object().unwrap().is_empty());
    }

    #[test]
    fn fixed_activations_are_kept_with_the_weights_and_used_where_integers_run() {
        use crate::models::decoder::plan::{Arithmetic, Cache, Chunk, Decoder};
        let model = tiny("llama");
        let fixed = apply(&options(|o| o.activations = DgqActivations::Static as i32), &model);
        let token = apply(&options(|_| ()), &model);
        let run = |model: &Model, by| -> Vec<f32> {
            let ids: Vec<u32> = (0..24).map(|i| (i * 29 + 7) % 96).collect();
            let mut decoder = Decoder::with(model, by).unwrap();
            let mut cache = Cache::new(decoder.config(), ids.len());
            let mut chunks = [Chunk { tokens: &ids, cache: &mut cache, logits: 0..ids.len() }];
            decoder.forward(&mut chunks).unwrap().to_vec()
        };
        let exact = run(&fixed.model, Arithmetic::Exact);
        assert_eq!(exact, run(&token.model, Arithmetic::Exact), "the weights are the same");
        let (a, b) =
            (run(&fixed.model, Arithmetic::Integer), run(&token.model, Arithmetic::Integer));
        assert_ne!(a, b);
        let distance = |x: &[f32]| x.iter().zip(&exact).map(|(a, b)| (a - b).abs()).sum::<f32>();
        let size = exact.iter().map(|v| v.abs()).sum::<f32>();
        assert!(distance(&b) < 0.05 * size && distance(&a) < 0.5 * size);
    }

    #[test]
    fn bad_options_are_refused_by_name() {
        let info = tiny("llama").info();
        let refused = |field: &str, change: &dyn Fn(&mut v1::Dgq)| {
            let error = options(change).check(&info).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
            error.message().to_owned()
        };
        let message = refused("group", &|o| o.group = Some(64));
        assert!(message.contains("these do: 32"), "{message}");
        refused("group", &|o| o.group = Some(0));
        refused("smooth_top", &|o| o.smooth_top = Some(0.6));
        refused("group_steps", &|o| o.group_steps = Some(0));
        refused("row_steps", &|o| o.row_steps = Some(1001));
        refused("activations", &|o| o.activations = 9);
        refused("activations", &|o| {
            o.activations = DgqActivations::Static as i32;
            o.form = DgqForm::Grouped as i32;
        });
        let fixed = options(|o| o.activations = DgqActivations::Static as i32);
        fixed.check(&info).unwrap();
        let error = fixed.check(&tiny("bert").info()).unwrap_err();
        assert_eq!(error.violations()[0].field, "activations", "{error}");
        refused("smooth", &|o| o.smooth = 9);
        refused("search_rows", &|o| o.search_rows = 9);
        refused("form", &|o| o.form = 9);
        refused("calibration.sequences", &|o| {
            let calibration = o.calibration.get_or_insert_default();
            (calibration.sequences, calibration.sequence_length) = (Some(1), Some(8));
        });
    }

    #[test]
    fn steps_errors_and_scaled_moments_by_hand() {
        let mut gram = Gram::new(2);
        gram.add(&[1.0, 3.0, 2.0, 1.0]);
        let mut seen = Seen {
            gram,
            count: 2,
            sizes: vec![3.0, 4.0],
            tops: vec![2.0, 3.0],
            least_tops: vec![2.0, 1.0],
        };
        // The quietest sequence decides, after what smoothing took off.
        assert_eq!(fixed_scale(&seen, &[1.0, 1.0]), 2.0 / 127.0);
        assert_eq!(fixed_scale(&seen, &[4.0, 1.0]), 1.0 / 127.0);
        // Inputs of moments [[5, 5], [5, 10]], the first divided by 2.
        assert_eq!(scaled_gram(&seen, &[2.0, 1.0]), [1.25, 2.5, 2.5, 10.0]);
        // [2, 1] gives 20 + 20 + 10; [1, 0] is lost, which gave 5.
        assert!((snr(&[2.0, 1.0], &[1.0, 1.0], &seen) - 10.0).abs() < 1e-9);
        assert_eq!(snr(&[2.0, 1.0], &[2.0, 1.0], &seen), 200.0);
        for quiet in [0.0, f32::INFINITY] {
            seen.least_tops = vec![quiet; 2];
            assert_eq!(fixed_scale(&seen, &[1.0, 1.0]), 1.0);
        }
    }

    #[test]
    fn rows_of_the_last_sequence_alone_are_another_search() {
        let model = tiny("llama");
        let made = |rows: DgqRows| {
            let options = options(|o| (o.search_rows, o.smooth_top) = (rows as i32, Some(0.2)));
            apply(&options, &model)
        };
        let (last, all) = (made(DgqRows::LastSequence), made(DgqRows::All));
        let name = "model.layers.0.self_attn.q_proj.weight";
        assert_ne!(last.model.weights[name].to_f32(), all.model.weights[name].to_f32());
        // What is smoothed does not hang on it.
        let norm = "model.layers.0.input_layernorm.weight";
        assert_ne!(all.model.weights[norm].to_f32(), model.weights[norm].to_f32());
        assert_eq!(last.model.weights[norm].to_f32(), all.model.weights[norm].to_f32());
    }
}
