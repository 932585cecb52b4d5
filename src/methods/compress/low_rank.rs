//! Truncated decompositions: each weight loses its smallest components, and becomes a product of two narrow
//! matrices where that is smaller.
//!
//! What "smallest" means is the choice of a matrix `M` that stands for the inputs: the singular values of
//! `W M` order the components, and `W = U S (V^T M^-1)` is cut. With the second moments of the inputs this
//! is the compression of CorDA (Yang et al. 2024, arXiv 2406.05223, section 3.2); with the diagonal of the
//! inputs' mean sizes to the power 0.5 it is ASVD (Yuan et al. 2023, arXiv 2312.05821); with nothing, plain
//! singular values.
//!
//! Decided here: all inputs are those of the model as it was, not of the blocks already cut, as in CorDA;
//! weights with fewer components than the largest lose the same share of them, rounded down.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use faer::Mat;
use rayon::prelude::*;
use serde_json::json;

use super::blockwise::{Rows, walk_blocks};
use super::report::Report;
use super::{check_finite, cost, options, seeded, store, windows_of};
use crate::calibrate;
use crate::error::{Error, Reason, Result};
use crate::methods::adapt::corda::{Orientation, truncated};
use crate::methods::adapt::moments::{Collector, SecondMoments as _};
use crate::methods::{Card, Estimate, Method, Outcome, StepContext, scope};
use crate::models::{Model, ModelInfo, TensorInfo};
use crate::nn::dtype::Dtype;
use crate::nn::linalg::{self, Svd};
use crate::nn::weight::{Dense, Factored, Record, Weight};
use crate::proto::v1::{self, CordaNormalisation, LowRankOrientation, ValueType};

static CARD: Card = Card {
    name: "low_rank",
    title: "Truncated decompositions",
    verb: "compress",
    summary: "Drops the smallest components of each weight, ordered by the inputs of a text, and keeps two \
              narrow factors where those are smaller.",
    paper: "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware \
            Parameter-Efficient Fine-tuning, arXiv 2406.05223; ASVD: Activation-aware Singular Value \
            Decomposition for Compressing Large Language Models, arXiv 2312.05821",
    needs_calibration: true,
    families: &["decoder", "encoder"],
    followed_by: &[],
};

/// Added to each element of ASVD's diagonal, so that it has an inverse.
const LEAST: f64 = 1e-6;
/// Products a second of a decomposition in f64 on one core, for estimates.
const FLOPS: f64 = 2e9;

/// Checked options.
struct Read {
    oriented: LowRankOrientation,
    drop: usize,
    power: f64,
    damp: f64,
    normalisation: CordaNormalisation,
    /// None where nothing orients.
    calibration: Option<calibrate::Options>,
    scope: Vec<String>,
    dtype: Dtype,
}

fn read(options: &v1::LowRank) -> Result<Read> {
    let mut options = options.clone();
    options.resolve();
    let unknown =
        |name: &str, number: i32| Error::option(name, format!("{number} stands for nothing here"));
    let oriented = LowRankOrientation::try_from(options.oriented)
        .map_err(|_| unknown("oriented", options.oriented))?;
    let normalisation = CordaNormalisation::try_from(options.normalisation)
        .map_err(|_| unknown("normalisation", options.normalisation))?;
    let dtype = match ValueType::try_from(options.values) {
        Ok(ValueType::F32) => Dtype::F32,
        Ok(ValueType::Bf16) => Dtype::BF16,
        Ok(ValueType::Unspecified | ValueType::F16) => Dtype::F16,
        Err(_) => return Err(unknown("values", options.values)),
    };
    if options.drop == 0 {
        return Err(Error::option("drop", "say how many components go, 1 or more"));
    }
    let power = options.power.unwrap_or(1.0);
    match oriented {
        LowRankOrientation::Activations if !(power > 0.0 && power <= 2.0) => {
            return Err(Error::option("power", format!("{power} is outside (0, 2]; 0.5 is usual")));
        }
        LowRankOrientation::SecondMoments if power != 1.0 && power != 0.5 => {
            return Err(Error::option("power", format!("{power} is neither 1 nor 0.5")));
        }
        _ => {}
    }
    let calibration = match oriented {
        LowRankOrientation::None => None,
        _ => Some(calibrate::Options::read(options.calibration.as_ref())?),
    };
    Ok(Read {
        oriented,
        drop: options.drop as usize,
        power,
        damp: options::damp(options.damp)?,
        normalisation,
        calibration,
        scope: options.scope,
        dtype,
    })
}

/// Components that a weight keeps, where one with `most` components loses `drop`.
fn kept([rows, cols]: [usize; 2], drop: usize, most: usize) -> usize {
    let components = rows.min(cols);
    components - components * drop / most
}

/// Whether two factors are smaller than the matrix.
fn factors([rows, cols]: [usize; 2], kept: usize) -> bool {
    kept * (rows + cols) < rows * cols
}

fn info(shape: [usize; 2], kept: usize, dtype: Dtype) -> TensorInfo {
    let [rows, cols] = shape;
    let (record, elements) = match factors(shape, kept) {
        true => (Record::Factored { shape, rank: kept }, kept * (rows + cols)),
        false => (Record::Dense { shape: shape.to_vec() }, rows * cols),
    };
    TensorInfo { record, shape: shape.to_vec(), bytes: (elements * dtype.size()) as u64 }
}

/// A decomposition without its smallest components, as it is stored. The singular values are shared
/// between the factors, so that neither leaves the range of its number format.
fn stored(svd: &Svd, shape: [usize; 2], kept: usize, dtype: Dtype) -> Result<Weight> {
    if !factors(shape, kept) {
        let values = linalg::to_rows(truncated(svd, svd.s.len() - kept).as_ref());
        return Ok(Weight::Dense(Dense::from_f32(shape.to_vec(), &values, dtype)?));
    }
    let root = |j: usize| svd.s[j].sqrt();
    let left = Mat::from_fn(shape[0], kept, |i, j| svd.u[(i, j)] * root(j));
    let right = Mat::from_fn(kept, shape[1], |j, i| svd.v[(i, j)] * root(j));
    let [left, right] = [left, right].map(|m| linalg::to_rows(m.as_ref()));
    Ok(Weight::Factored(Factored::from_f32(shape, kept, &left, &right, dtype)?))
}

impl Method for v1::LowRank {
    fn card(&self) -> &'static Card {
        &CARD
    }

    fn resolve(&mut self) {
        if self.oriented == LowRankOrientation::Unspecified as i32 {
            self.oriented = LowRankOrientation::SecondMoments as i32;
        }
        if self.scope.is_empty() {
            self.scope = vec!["*".into()];
        }
        if self.values == ValueType::Unspecified as i32 {
            self.values = ValueType::F16 as i32;
        }
        if self.oriented == LowRankOrientation::None as i32 {
            return;
        }
        calibrate::Options::resolve(&mut self.calibration);
        if self.oriented == LowRankOrientation::Activations as i32 {
            self.power.get_or_insert(0.5);
        } else {
            self.power.get_or_insert(1.0);
            self.damp.get_or_insert(options::DAMP);
            if self.normalisation == CordaNormalisation::Unspecified as i32 {
                self.normalisation = CordaNormalisation::SampleMax as i32;
            }
        }
    }

    fn datasets(&self) -> Vec<&str> {
        let oriented = self.oriented != LowRankOrientation::None as i32;
        self.calibration.iter().filter(|_| oriented).map(|c| c.dataset.as_str()).collect()
    }

    fn seeded(&self) -> bool {
        self.oriented != LowRankOrientation::None as i32 && seeded(self.calibration.as_ref())
    }

    fn check(&self, model: &ModelInfo) -> Result<(Estimate, ModelInfo)> {
        let read = read(self)?;
        if let Some(calibration) = &read.calibration {
            calibration.check(model)?;
        }
        let names = scope::names(&model.family, &read.scope)?;
        let mut shapes = BTreeMap::new();
        for name in &names {
            let (tensor, shape) = store::matrix(model, name)?;
            store::refuse_quantised(tensor, name, "decompose")?;
            shapes.insert(name, shape);
        }
        let most = shapes.values().map(|[r, c]| (*r).min(*c)).max().unwrap_or(1);
        if read.drop >= most {
            let message = format!("{} leaves nothing of weights with {most} components", read.drop);
            return Err(Error::option("drop", message));
        }
        let mut after = model.clone();
        let mut flops = 0.0;
        for (name, shape) in shapes {
            let kept = kept(shape, read.drop, most);
            if kept == 0 {
                let message = format!("{} leaves nothing of '{name}'", read.drop);
                return Err(Error::option("drop", message));
            }
            let [long, short] = [shape[0].max(shape[1]) as f64, shape[0].min(shape[1]) as f64];
            flops += 20.0 * long * short * short;
            after.tensors.insert(name.clone(), info(shape, kept, read.dtype));
        }
        let seconds = flops / FLOPS / rayon::current_num_threads() as f64;
        let mut estimate = match &read.calibration {
            Some(calibration) => cost::calibrated(model, &after, calibration, true),
            None => cost::alone(model, &after),
        };
        estimate.seconds += seconds;
        Ok((estimate, after))
    }

    fn apply(&self, cx: &mut StepContext<'_>, mut model: Model) -> Result<Outcome> {
        let read = read(self)?;
        let names: BTreeSet<String> =
            scope::names(&model.family, &read.scope)?.into_iter().collect();
        let mut report = Report::default();
        let mut shapes = BTreeMap::new();
        for name in &names {
            let weight = model.weight(name)?;
            shapes.insert(name.clone(), [weight.rows(), weight.cols()]);
        }
        let most = shapes.values().map(|[r, c]| (*r).min(*c)).max().unwrap_or(1);
        let cut = Cut { read: &read, model: &model, shapes: &shapes, most };
        let mut made: BTreeMap<String, (Weight, f64)> = BTreeMap::new();
        let mut damps = serde_json::Map::new();
        let mut tokens = 0;
        let windows = match &read.calibration {
            None => None,
            Some(calibration) => {
                let windows = windows_of::calibration(cx, &model, calibration, &mut report)?;
                tokens = calibration.tokens();
                Some(windows)
            }
        };
        match (read.oriented, &windows) {
            (LowRankOrientation::None, _) | (_, None) => {
                let all: Vec<String> = names.iter().cloned().collect();
                let some = 2 * rayon::current_num_threads();
                for (i, group) in all.chunks(some).enumerate() {
                    let done = (i * some) as f64 / all.len() as f64;
                    cx.progress.report(done, group.first().map_or("", String::as_str))?;
                    made.extend(cut.group(group, None)?);
                }
            }
            (LowRankOrientation::Activations, Some(windows)) => {
                // The model stays as it is while the text runs.
                let mut copy = model.clone();
                walk_blocks(cx, &mut copy, windows, Rows::All, &mut |block| {
                    for (group, seen) in &block.sites {
                        cx.progress.check()?;
                        let group: Vec<String> =
                            group.iter().filter(|name| names.contains(*name)).cloned().collect();
                        let diagonal: Vec<f64> =
                            seen.mean_sizes().iter().map(|a| a.powf(read.power) + LEAST).collect();
                        made.extend(cut.group(&group, Some(&Orientation::diagonal(&diagonal)))?);
                    }
                    Ok(())
                })?;
            }
            (_, Some(windows)) => {
                let mut collector = Collector {
                    model: &model,
                    windows,
                    normalisation: read.normalisation,
                    progress: cx.progress,
                };
                collector.each(&names, &mut |group, moments| {
                    cx.progress.check()?;
                    let first = group.first().map_or("", String::as_str);
                    let orientation = Orientation::new(moments, read.damp, read.power, first)?;
                    damps.insert(first.to_owned(), json!(orientation.damp));
                    made.extend(cut.group(group, Some(&orientation))?);
                    Ok(())
                })?;
            }
        }
        let (mut kept, mut changed) = (serde_json::Map::new(), Vec::new());
        for (name, (new, share)) in made {
            cx.progress.check()?;
            report.add(&name, &model.weight(&name)?.to_f32(), &new, None);
            let layout = if matches!(new, Weight::Factored(_)) { "factors" } else { "matrix" };
            let count = cut.kept(&name);
            kept.insert(name.clone(), json!({ "kept": count, "energy": share, "stored": layout }));
            changed.push((name, Arc::new(new)));
        }
        model.weights.extend(changed);
        cx.progress.report(1.0, "all weights done")?;
        let mut outcome = report.outcome(model, tokens);
        outcome.record["components"] = kept.into();
        if !damps.is_empty() {
            outcome.record["damp"] = damps.into();
        }
        Ok(outcome)
    }
}

/// What the weights of a model are cut to.
struct Cut<'a> {
    read: &'a Read,
    model: &'a Model,
    shapes: &'a BTreeMap<String, [usize; 2]>,
    most: usize,
}

impl Cut<'_> {
    fn kept(&self, name: &str) -> usize {
        self.shapes.get(name).map_or(0, |shape| kept(*shape, self.read.drop, self.most))
    }

    /// The cut weights of some linears with one orientation, and the share of the squares of their singular
    /// values that is kept.
    fn group(
        &self,
        names: &[String],
        orientation: Option<&Orientation>,
    ) -> Result<Vec<(String, (Weight, f64))>> {
        let one = |name: &String| {
            let weight = self.model.weight(name)?;
            let shape = [weight.rows(), weight.cols()];
            let values = weight.to_f32();
            check_finite(name, &values)?;
            let w = linalg::from_rows(&values, shape[0], shape[1]);
            let svd = match orientation {
                Some(orientation) => orientation.decompose(&w, name)?,
                None => linalg::svd(w.as_ref(), name)?,
            };
            let kept = self.kept(name);
            let square = |s: &[f64]| s.iter().map(|s| s * s).sum::<f64>();
            let whole = square(&svd.s);
            let share = if whole > 0.0 { square(&svd.s[..kept]) / whole } else { 1.0 };
            let new = stored(&svd, shape, kept, self.read.dtype).map_err(|error| {
                match error.reason() {
                    Reason::Internal => error,
                    _ => Error::option("values", format!("{} ('{name}')", error.message())),
                }
            })?;
            Ok((name.clone(), (new, share)))
        };
        names.par_iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::compress::folding::testing::{logits, tiny};
    use crate::methods::compress::testing::{self, correlated, weights};
    use crate::models::decoder::random;

    #[test]
    fn the_largest_components_stay_and_factors_are_kept_where_they_are_smaller() {
        // Singular values 4, 2, 1 on the axes.
        let w = Mat::from_fn(3, 4, |i, j| if i == j { [4.0, 2.0, 1.0][i] } else { 0.0 });
        let svd = linalg::svd(w.as_ref(), "w").unwrap();
        for (kept, factored) in [(1, true), (2, false), (3, false)] {
            let got = stored(&svd, [3, 4], kept, Dtype::F32).unwrap();
            assert_eq!(matches!(got, Weight::Factored(_)), factored);
            assert_eq!(info([3, 4], kept, Dtype::F32).bytes, got.bytes());
            assert_eq!(info([3, 4], kept, Dtype::F32).record, got.record());
            let values = got.to_f32();
            for (i, v) in values.iter().enumerate() {
                let want = if i % 5 == 0 && i / 5 < kept { [4.0, 2.0, 1.0][i / 5] } else { 0.0 };
                assert!((v - want).abs() < 1e-6, "{kept}: {values:?}");
            }
        }
        assert_eq!((kept([576, 576], 128, 576), kept([192, 576], 128, 576)), (448, 150));
    }

    #[test]
    fn the_inputs_decide_what_is_small() {
        for seed in 0..5 {
            let gram = correlated(48, seed);
            let values = weights(32, 48, 90 + seed);
            let w = linalg::from_rows(&values, 32, 48);
            let c = Mat::from_fn(48, 48, |i, j| gram.at(i, j));
            let root = Orientation::new(&c, 1e-6, 0.5, "w").unwrap();
            let error = |svd: &Svd| {
                let cut = linalg::to_rows(truncated(svd, 16).as_ref());
                let delta: Vec<f32> = values.iter().zip(&cut).map(|(a, b)| a - b).collect();
                gram.energy(&delta)
            };
            let plain = error(&linalg::svd(w.as_ref(), "w").unwrap());
            let sizes: Vec<f64> = (0..48).map(|j| gram.at(j, j).sqrt().sqrt() + LEAST).collect();
            let scaled = error(&Orientation::diagonal(&sizes).decompose(&w, "w").unwrap());
            let best = error(&root.decompose(&w, "w").unwrap());
            // The root of the second moments is the best there is.
            assert!(best <= 1.001 * scaled && best < plain, "{best} {scaled} {plain}");
        }
    }

    fn options(oriented: LowRankOrientation, drop: u32) -> v1::LowRank {
        v1::LowRank {
            oriented: oriented as i32,
            drop,
            calibration: Some(v1::Calibration {
                sequences: Some(8),
                sequence_length: Some(32),
                ..Default::default()
            }),
            values: ValueType::F32 as i32,
            ..Default::default()
        }
    }

    fn apply(options: &v1::LowRank, model: &Model) -> Outcome {
        testing::apply(options, model).unwrap()
    }

    #[test]
    fn every_orientation_cuts_every_weight_alike() {
        let model = random::model(random::tiny("llama"), 5).unwrap();
        for oriented in [
            LowRankOrientation::SecondMoments,
            LowRankOrientation::Activations,
            LowRankOrientation::None,
        ] {
            // All weights have 32 components.
            let made = apply(&options(oriented, 12), &model);
            let (_, after) = options(oriented, 12).check(&model.info()).unwrap();
            assert_eq!(made.model.bytes(), after.bytes());
            for (name, weight) in &made.model.weights {
                assert_eq!(weight.record(), after.tensors[name].record, "{name}");
                let factored =
                    name.contains("_proj") && !name.contains("k_proj") && !name.contains("v_proj");
                assert_eq!(matches!(**weight, Weight::Factored(_)), factored, "{name}");
                if name.contains("_proj") {
                    let energy = made.record["components"][name]["energy"].as_f64().unwrap();
                    assert!(energy > 0.4 && energy < 1.0, "{name} {energy}");
                    let values = linalg::from_rows(&weight.to_f32(), weight.rows(), weight.cols());
                    let s = linalg::svd(values.as_ref(), name).unwrap().s;
                    assert!(s[19] > 1e-3 && s[20] < 1e-4, "{name} {s:?}");
                }
            }
            // Nothing but the smallest component: nearly the same model.
            let near = apply(&options(oriented, 1), &model);
            let error = &near.record["tensors"]["model.layers.0.mlp.up_proj.weight"];
            assert!(error["relative_weight_error"].as_f64().unwrap() < 0.2);
        }
    }

    #[test]
    fn the_fewer_components_go_the_nearer_the_answers_stay() {
        for architecture in ["gemma3_text", "bert"] {
            let model = tiny(architecture);
            let want = logits(&model);
            for oriented in [LowRankOrientation::SecondMoments, LowRankOrientation::Activations] {
                let off = |drop: u32| -> f32 {
                    let got = logits(&apply(&options(oriented, drop), &model).model);
                    got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum()
                };
                let (few, many) = (off(1), off(24));
                assert!(few > 0.0 && few < 0.3 * many, "{architecture}: {few} {many}");
            }
        }
    }

    #[test]
    fn bad_options_are_refused_by_name() {
        let info = random::model(random::tiny("llama"), 5).unwrap().info();
        let refused = |field: &str, change: &dyn Fn(&mut v1::LowRank)| {
            let mut method = options(LowRankOrientation::SecondMoments, 4);
            change(&mut method);
            let error = method.check(&info).unwrap_err();
            assert_eq!(error.violations()[0].field, field, "{error}");
        };
        refused("drop", &|o| o.drop = 0);
        refused("drop", &|o| o.drop = 32);
        refused("power", &|o| o.power = Some(0.7));
        refused("power", &|o| {
            o.oriented = LowRankOrientation::Activations as i32;
            o.power = Some(0.0);
        });
        refused("damp", &|o| o.damp = Some(0.0));
        refused("oriented", &|o| o.oriented = 9);
        refused("normalisation", &|o| o.normalisation = 9);
        refused("values", &|o| o.values = 9);
        refused("calibration.sequences", &|o| {
            o.calibration.get_or_insert_default().sequences = Some(0);
        });
    }
}
