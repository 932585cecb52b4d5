//! Putting what was tuned into the weights of the base.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::find;
use super::tuned::Tuned;
use crate::error::{Error, Reason, Result};
use crate::methods::compress::round_to_nearest;
use crate::nn::weight::{Dense, DualGrained, Ggml, Grouped, Nf4, Weight};
use crate::progress::Progress;

/// What rounding to the layout of the base cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Drift {
    pub tensor: String,
    /// `|stored - wanted| / |wanted|`, Frobenius norms.
    pub of_weight: f64,
    /// `|stored - wanted| / |wanted - base|`: 1 means that rounding lost as much as tuning changed.
    pub of_change: f64,
}

/// Weights that changed, each in the layout of its base.
#[derive(Debug)]
pub struct Merged {
    pub weights: BTreeMap<String, Arc<Weight>>,
    /// Of weights that do not hold their elements as f32.
    pub drift: Vec<Drift>,
}

/// Merges all of `tuned` into `weights`, which stay as they are. Quantised weights are taken apart, changed
/// and rounded anew, where `requantise` allows that.
///
/// # Errors
/// NON_FINITE naming a weight that is not finite after; MODEL_UNSUITABLE for quantised weights without
/// leave, for sparse ones, whose gaps would be filled, and for those of low rank.
pub fn merge(
    tuned: &Tuned,
    weights: &BTreeMap<String, Arc<Weight>>,
    requantise: bool,
    progress: &Progress,
) -> Result<Merged> {
    merge_weighted(tuned, 1.0, weights, requantise, progress)
}

/// The same of a change that is multiplied by `by`: 0.5 goes half of the way, negative numbers take away.
///
/// # Errors
/// As [`merge`].
pub fn merge_weighted(
    tuned: &Tuned,
    by: f32,
    weights: &BTreeMap<String, Arc<Weight>>,
    requantise: bool,
    progress: &Progress,
) -> Result<Merged> {
    let mut merged = Merged { weights: BTreeMap::new(), drift: Vec::new() };
    let count = (tuned.modules.len() + tuned.whole.len()).max(1) as f64;
    let names = tuned.modules.keys().chain(tuned.whole.keys());
    for (i, name) in names.enumerate() {
        progress.report(i as f64 / count, name)?;
        let stored = find(weights, name)?;
        let mut values = match (tuned.modules.get(name), tuned.whole.get(name)) {
            (Some(module), _) => module.merged(stored)?,
            (None, Some(var)) => var.flatten_all()?.to_vec1::<f32>()?,
            (None, None) => continue,
        };
        if by != 1.0 {
            for (v, s) in values.iter_mut().zip(stored.to_f32()) {
                *v = (f64::from(s) + f64::from(by) * (f64::from(*v) - f64::from(s))) as f32;
            }
        }
        finite(name, &values)?;
        let new = laid_out(name, stored, &values, requantise)?;
        if !matches!(&new, Weight::Dense(dense) if dense.as_f32().is_some()) {
            let rounded = new.to_f32();
            finite(name, &rounded)?;
            merged.drift.push(drift(name, &stored.to_f32(), &values, &rounded));
        }
        merged.weights.insert(name.clone(), Arc::new(new));
    }
    Ok(merged)
}

fn finite(name: &str, values: &[f32]) -> Result<()> {
    if values.iter().all(|v| v.is_finite()) {
        return Ok(());
    }
    Err(Error::new(
        Reason::NonFinite,
        format!(
            "'{name}' would not be finite after merging; nothing was merged: the adapter is broken or its \
             weight too large, train it anew with a smaller learning rate or merge less of it"
        ),
    ))
}

/// Values in the layout of `like`.
fn laid_out(name: &str, like: &Weight, values: &[f32], requantise: bool) -> Result<Weight> {
    let shape = like.shape();
    let matrix = || [like.rows(), like.cols()];
    let refused = |why: &str| Err(Error::new(Reason::ModelUnsuitable, format!("'{name}' {why}")));
    if let Weight::Sparse(_) | Weight::RowGroups(_) = like {
        return refused(
            "is sparse, and merging would fill its gaps; keep the adapter beside the model, which serves \
             both",
        );
    }
    if let Weight::Factored(_) | Weight::Sum(_) = like {
        return refused(
            "is of low rank or has a correction of low rank, which have no room for the adapter; keep it \
             beside the model, which serves both",
        );
    }
    if !requantise && !matches!(like, Weight::Dense(_)) {
        return refused(
            "is quantised: merging rounds it again and loses a part of the adapter; allow requantising, \
             or keep the adapter beside the model, which serves both",
        );
    }
    Ok(match like {
        Weight::Dense(dense) => {
            Weight::Dense(Dense::from_f32(shape.to_vec(), values, dense.dtype())?)
        }
        Weight::Grouped(grouped) => {
            let spec = grouped.spec();
            let codes = round_to_nearest::quantise(values, like.cols(), spec);
            Weight::Grouped(Grouped::pack(
                matrix(),
                spec,
                &codes.codes,
                &codes.scales,
                &codes.zeros,
            )?)
        }
        Weight::DualGrained(dual) => {
            Weight::DualGrained(DualGrained::round(matrix(), dual.group(), values)?)
        }
        Weight::Ggml(ggml) => Weight::Ggml(Ggml::quantize(matrix(), ggml.kind(), values)?),
        Weight::Nf4(_) => Weight::Nf4(Nf4::round(matrix(), values)?),
        Weight::Sparse(_) | Weight::RowGroups(_) | Weight::Factored(_) | Weight::Sum(_) => {
            like.clone()
        }
    })
}

fn drift(name: &str, base: &[f32], wanted: &[f32], stored: &[f32]) -> Drift {
    let norm = |a: &[f32], b: Option<&[f32]>| -> f64 {
        let at = |i: usize| f64::from(a[i]) - b.map_or(0.0, |b| f64::from(b[i]));
        (0..a.len()).map(|i| at(i).powi(2)).sum::<f64>().sqrt()
    };
    let error = norm(stored, Some(wanted));
    let share = |of: f64| if of > 0.0 { error / of } else { 0.0 };
    Drift {
        tensor: name.to_owned(),
        of_weight: share(norm(wanted, None)),
        of_change: share(norm(wanted, Some(base))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Case, all_linear};
    use super::*;
    use crate::nn::dtype::Dtype;
    use crate::nn::weight::{Factored, GroupedSpec, Sparse, Sum, ValueFormat};
    use crate::proto::v1;

    fn lora(case: &Case) -> Tuned {
        let tuned = case.start(&v1::Lora { adapter: Some(all_linear(4)), ..Default::default() });
        case.disturb(&tuned, 0.05);
        tuned
    }

    #[test]
    fn dense_bases_take_the_addition_in_their_own_type() {
        let case = Case::decoder();
        let tuned = lora(&case);
        let merged = merge(&tuned, case.weights(), false, &Progress::silent()).unwrap();
        assert_eq!(merged.weights.len(), 21);
        assert!(merged.drift.is_empty());
        for (name, weight) in &merged.weights {
            let want = tuned.modules[name].merged(case.weights().get(name).unwrap()).unwrap();
            assert_eq!(weight.to_f32(), want);
        }
        let (name, stored) = case.some_linear();
        let half = Dense::from_f32(stored.shape().to_vec(), &stored.to_f32(), Dtype::BF16).unwrap();
        let mut weights = case.weights().clone();
        weights.insert(name.to_owned(), Arc::new(Weight::Dense(half)));
        let merged = merge(&tuned, &weights, false, &Progress::silent()).unwrap();
        assert_eq!(merged.drift.len(), 1);
        assert!(merged.drift[0].of_weight < 0.004, "{:?}", merged.drift);
    }

    #[test]
    fn weights_go_a_part_of_the_way_and_back() {
        let case = Case::decoder();
        let tuned = case.start(&v1::Dora { adapter: Some(all_linear(2)) });
        case.disturb(&tuned, 0.1);
        let all = merge(&tuned, case.weights(), false, &Progress::silent()).unwrap();
        for by in [0.5, -2.0, 0.0] {
            let part = merge_weighted(&tuned, by, case.weights(), false, &Progress::silent());
            for (name, weight) in &part.unwrap().weights {
                let (base, whole) = (case.weights()[name].to_f32(), all.weights[name].to_f32());
                for ((got, base), whole) in weight.to_f32().iter().zip(base).zip(whole) {
                    assert!((got - (base + by * (whole - base))).abs() < 1e-6, "{name}");
                }
            }
        }
        // What bf16 and f16 cannot hold is refused as well.
        let (name, stored) = case.some_linear();
        let half = Dense::from_f32(stored.shape().to_vec(), &stored.to_f32(), Dtype::F16).unwrap();
        let mut weights = case.weights().clone();
        weights.insert(name.to_owned(), Arc::new(Weight::Dense(half)));
        let error = merge_weighted(&tuned, 1e9, &weights, false, &Progress::silent()).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
    }

    #[test]
    fn quantised_bases_are_rounded_anew_only_with_leave() {
        let case = Case::quantised();
        let tuned = lora(&case);
        let error = merge(&tuned, case.weights(), false, &Progress::silent()).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let merged = merge(&tuned, case.weights(), true, &Progress::silent()).unwrap();
        assert_eq!(merged.drift.len(), 21);
        for drift in &merged.drift {
            let (before, after) = (&case.weights()[&drift.tensor], &merged.weights[&drift.tensor]);
            assert_eq!(before.record(), after.record());
            let want = tuned.modules[&drift.tensor].merged(before).unwrap();
            let wide: f64 = want.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let error: f64 = after
                .to_f32()
                .iter()
                .zip(&want)
                .map(|(a, b)| f64::from(a - b).powi(2))
                .sum::<f64>()
                .sqrt();
            assert!((error / wide - drift.of_weight).abs() < 1e-9);
            assert!(drift.of_weight > 0.0 && drift.of_weight < 0.1, "{drift:?}");
        }
    }

    #[test]
    fn normal_floats_are_rounded_anew_and_say_what_that_cost() {
        let case = Case::decoder();
        let mut weights = case.weights().clone();
        let method = v1::Qlora { adapter: Some(all_linear(4)), quantise_base: true };
        let shapes = super::super::shapes::Shapes::of(case.model()).unwrap();
        super::super::Adapt::prepare(&method, &mut weights, &shapes).unwrap();
        let case = Case::with(weights);
        let tuned = lora(&case);
        let error = merge(&tuned, case.weights(), false, &Progress::silent()).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable);
        let merged = merge(&tuned, case.weights(), true, &Progress::silent()).unwrap();
        assert_eq!(merged.drift.len(), 21);
        for drift in &merged.drift {
            let after = &merged.weights[&drift.tensor];
            assert_eq!(after.record(), case.weights()[&drift.tensor].record());
            assert!(drift.of_weight > 0.0 && drift.of_weight < 0.15, "{drift:?}");
        }
    }

    #[test]
    fn broken_adapters_change_nothing() {
        let case = Case::decoder();
        let tuned = lora(&case);
        let var = &tuned.modules.values().last().unwrap().trained()[0].1.clone();
        let nan = candle_core::Tensor::full(f32::NAN, var.shape(), &candle_core::Device::Cpu);
        var.set(&nan.unwrap()).unwrap();
        let error = merge(&tuned, case.weights(), false, &Progress::silent()).unwrap_err();
        assert_eq!(error.reason(), Reason::NonFinite);
    }

    /// Not even with leave to round anew: what is added would be rounded away, or would fill gaps.
    #[test]
    fn corrections_gaps_and_factors_take_no_adapter_in() {
        let case = Case::decoder();
        let tuned = lora(&case);
        let (name, stored) = case.some_linear();
        let (shape, values) = ([stored.rows(), stored.cols()], stored.to_f32());
        let (left, right) = (vec![0.5; 2 * shape[0]], vec![0.25; 2 * shape[1]]);
        let low = Factored::from_f32(shape, 2, &left, &right, Dtype::F16).unwrap();
        let spec = GroupedSpec { bits: 2, group: 16, symmetric: false };
        let codes = round_to_nearest::quantise(&values, shape[1], spec);
        let packed = Grouped::pack(shape, spec, &codes.codes, &codes.scales, &codes.zeros).unwrap();
        let corrected = Sum::new(Weight::Grouped(packed), low.clone()).unwrap();
        let half: Vec<f32> =
            values.iter().enumerate().map(|(i, v)| if i % 2 == 0 { *v } else { 0.0 }).collect();
        let gaps = Sparse::from_dense(shape, &half, ValueFormat::F32, None).unwrap();
        for base in [Weight::Sum(corrected), Weight::Factored(low), Weight::Sparse(gaps)] {
            let record = base.record();
            let mut weights = case.weights().clone();
            weights.insert(name.to_owned(), Arc::new(base));
            let error = merge(&tuned, &weights, true, &Progress::silent()).unwrap_err();
            assert_eq!(error.reason(), Reason::ModelUnsuitable, "{record:?}");
            assert!(
                error.message().contains(name) && error.message().contains("beside"),
                "{error}"
            );
        }
    }
}
