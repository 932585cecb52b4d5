//! What a step did to each weight: exact zero counts, errors, warnings.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::hessian::Factor;
use crate::calibrate::gram::Gram;
use crate::calibrate::walk::{self, Site};
use crate::error::{Error, Result};
use crate::methods::Outcome;
use crate::models::Model;
use crate::nn::weight::Weight;

/// Collects rows as weights are changed.
#[derive(Debug, Default)]
pub struct Report {
    rows: BTreeMap<String, Row>,
    warnings: Vec<String>,
}

#[derive(Debug)]
struct Row {
    zeros: u64,
    elements: u64,
    empty_rows: u64,
    weight_error: f64,
    output_error: Option<f64>,
}

impl Report {
    pub fn warn(&mut self, warning: String) {
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// Compares a weight with its former values; with the Gram matrix of its inputs, its outputs too.
    pub fn add(&mut self, name: &str, before: &[f32], after: &Weight, gram: Option<&Gram>) {
        let values = after.to_f32();
        let delta: Vec<f32> = before.iter().zip(&values).map(|(b, a)| b - a).collect();
        let energy = |v: &[f32]| v.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
        let share = |part: f64, whole: f64| if whole > 0.0 { (part / whole).sqrt() } else { 0.0 };
        let empty =
            values.chunks(after.cols()).filter(|r| r.iter().all(|v| *v == 0.0)).count() as u64;
        let row = Row {
            zeros: values.iter().filter(|v| **v == 0.0).count() as u64,
            elements: values.len() as u64,
            empty_rows: empty,
            weight_error: share(energy(&delta), energy(before)),
            output_error: gram.map(|gram| share(gram.energy(&delta), gram.energy(before))),
        };
        if row.empty_rows > 0 {
            self.warn(format!("{empty} rows of '{name}' hold no weight any more"));
        }
        self.rows.insert(name.to_owned(), row);
    }

    /// The factor of a site's Hessian; its inputs must have been collected with Gram. Notes what
    /// makes it weak.
    pub fn factor(
        &mut self,
        site: &Site<'_>,
        sequences: usize,
        damp: f64,
        order: Option<&[usize]>,
    ) -> Result<Factor> {
        let name = site.names.first().copied().unwrap_or_default();
        let gram = site
            .inputs
            .gram()
            .ok_or_else(|| Error::internal(format!("no gram matrix for '{name}'")))?;
        let straight: Vec<usize>;
        let order = match order {
            Some(order) => order,
            None => {
                straight = (0..gram.cols()).collect();
                &straight
            }
        };
        if site.inputs.count() < gram.cols() as u64 {
            self.warn(format!(
                "{} calibration tokens are fewer than the {} inputs of '{name}': the Hessian rests on \
                 dampening; take more text",
                site.inputs.count(),
                gram.cols(),
            ));
        }
        let factor = Factor::new(gram, sequences, damp, order, name)?;
        if factor.damp > damp {
            self.warn(format!("dampening was raised to {} for '{name}'", factor.damp));
        }
        Ok(factor)
    }

    /// The outcome of a step.
    pub fn outcome(self, model: Model, calibration_tokens: u64) -> Outcome {
        let sum = |names: &mut dyn Iterator<Item = &Row>| {
            names.fold((0, 0), |(z, e), row| (z + row.zeros, e + row.elements))
        };
        let count = |(zeros, elements): (u64, u64)| json!({"zeros": zeros, "elements": elements});
        let walk = walk::of(&model.family);
        let mut blocks = serde_json::Map::new();
        for block in 0..walk.blocks() {
            let names = walk.linears(block);
            let found = sum(&mut names.iter().flatten().filter_map(|n| self.rows.get(n)));
            if found.1 > 0 {
                blocks.insert(block.to_string(), count(found));
            }
        }
        let total = sum(&mut self.rows.values());
        let tensors: serde_json::Map<String, Value> = self
            .rows
            .iter()
            .map(|(name, row)| {
                let mut entry = count((row.zeros, row.elements));
                entry["relative_weight_error"] = json!(row.weight_error);
                if let Some(error) = row.output_error {
                    entry["relative_output_error"] = json!(error);
                }
                (name.clone(), entry)
            })
            .collect();
        let record = json!({
            "tensors": tensors,
            "blocks": blocks,
            "total": count(total),
            "calibration_tokens": calibration_tokens,
            "warnings": self.warnings,
        });
        Outcome {
            model,
            record,
            calibration_tokens,
            zero_share: if total.1 > 0 { total.0 as f64 / total.1 as f64 } else { 0.0 },
            warnings: self.warnings,
        }
    }
}
