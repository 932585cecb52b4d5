//! Rules for recipes: which steps make no sense behind which, and what is worth a warning.
//!
//! Methods check their own options; what only two steps together show is decided here, from the catalogue and
//! from how tensors are stored before and after a step. A rule refuses, or it warns; warnings go with the plan
//! and with the report. The order that they hold recipes to is structure, healing, quantisation, correction.

mod data;

use std::collections::BTreeSet;

use serde_json::Value;

pub use data::{of_adapters, of_data};

use crate::error::{Error, Reason, Result};
use crate::eval::format;
use crate::methods::catalogue::{self, Entry, Family as Kind};
use crate::methods::{Card, registry, scope};
use crate::models::{AnyInfo, TensorInfo};
use crate::nn::weight::Record;
use crate::proto::v1::{self, step::Method};

/// Below this share of zeros where they like, decoding is no faster without a kernel for it.
const MUCH: f64 = 0.7;

/// A step that was checked, as the steps behind it see it.
pub(super) struct Taken {
    place: String,
    entry: Option<&'static Entry>,
    /// Names of the tensors that it changes.
    touched: BTreeSet<String>,
}

/// What the steps of a recipe have shown so far.
#[derive(Default)]
pub(super) struct Rules {
    taken: Vec<Taken>,
    pub(super) warnings: Vec<v1::RecipeWarning>,
}

impl Rules {
    /// Holds the next step, at `place`, against the rules; `before` and `after` are the model around it.
    ///
    /// # Errors
    /// INVALID_RECIPE at `place` for steps that undo others, or that are undone by them.
    pub(super) fn step(
        &mut self,
        place: &str,
        step: &v1::Step,
        before: &AnyInfo,
        after: &AnyInfo,
    ) -> Result<()> {
        let card = registry::method(step)?.card();
        let entry = catalogue::entry(card.verb, card.name);
        let place = format!("{place}.{}", card.name);
        let step = registry::resolve(step);
        let touched = touched(card, &step, before, after);
        let refuse = |problem: String| Err(Error::at(Reason::InvalidRecipe, &*place, problem));

        for earlier in &self.taken {
            let both = entry.zip(earlier.entry);
            let Some(conflict) = both.and_then(|(entry, other)| entry.conflict(other)) else {
                continue;
            };
            // Low rank leaves matrices dense whose factors would be larger; those are as free as before.
            let of_factors = conflict.after == Kind::LowRank.word() && card.name != "initialise";
            let bound = |name: &&String| {
                !of_factors || before.tensors.get(*name).is_some_and(|t| factored(&t.record))
            };
            if let Some(name) = touched.intersection(&earlier.touched).find(bound) {
                return refuse(format!(
                    "{} has changed '{name}' before; {}",
                    earlier.place, conflict.why
                ));
            }
        }
        for name in &touched {
            let Some(tensor) = before.tensors.get(name) else { continue };
            if card.name != "initialise" && in_normal_floats(&tensor.record) {
                return refuse(format!(
                    "'{name}' is in 4-bit normal floats, and what was rounded is not changed again; start from \
                     the version before, or leave this weight out of the scope"
                ));
            }
            let pruned = matches!(tensor.record, Record::Sparse { .. } | Record::RowGroups { .. });
            if card.name == "dsnot" && pruned {
                return refuse(format!(
                    "'{name}' is pruned, and the values that would be exchanged are lost; start from the \
                     version before the pruning and name how it begins with `initial`"
                ));
            }
        }
        if let Some(entry) = entry {
            self.warn(&place, &step, entry, &touched, (before, after));
        }
        self.taken.push(Taken { place, entry, touched });
        Ok(())
    }

    fn warn(
        &mut self,
        place: &str,
        step: &v1::Step,
        entry: &Entry,
        touched: &BTreeSet<String>,
        (before, after): (&AnyInfo, &AnyInfo),
    ) {
        let mut found = Vec::new();
        if let Some((field, share)) = unstructured(step)
            && let Some(message) = no_latency(share, entry, crate::kernels::sparse::moves_bitmaps())
        {
            found.push(("no_latency", format!("{place}.{field}"), message));
        }
        let tensors = || touched.iter().filter_map(|n| Some((n, before.tensors.get(n)?)));
        if entry.family == Kind::Quantisation
            && let Some((name, kind)) = tensors().find_map(|(name, tensor)| match tensor.record {
                Record::Ggml { r#type, .. } => Some((name, r#type)),
                _ => None,
            })
        {
            let message = format!(
                "'{name}' comes in {kind:?} blocks, so it is rounded a second time; import the model in 16 bits \
                 for the quality that the method is known for"
            );
            found.push(("requantised", place.to_owned(), message));
        }
        let narrow = entry.changes.contains(&catalogue::Change::Shapes);
        if narrow
            && entry.family == Kind::Pruning
            && let Some((name, _)) = tensors().find(|(_, t)| sparse(t))
        {
            let message = format!(
                "zeros of '{name}' were chosen among channels that this step removes; remove channels first, \
                 then prune what is left"
            );
            found.push(("undone", place.to_owned(), message));
        }
        if entry.verb == "compress"
            && !narrow
            && let Some((name, what)) = tensors().find_map(|(name, tensor)| {
                let new = after.tensors.get(name).filter(|_| sparse(tensor))?;
                Some((name, filled(&new.record)?))
            })
        {
            let message = format!(
                "'{name}' is pruned, and this step makes it {what}, whose values are no zeros any more; leave it \
                 out of the scope, or leave the pruning out"
            );
            found.push(("undone", place.to_owned(), message));
        }
        let same = |(name, tensor): (&String, &TensorInfo)| {
            let new = after.tensors.get(name);
            new.is_some_and(|new| new.record == tensor.record && new.bytes == tensor.bytes)
        };
        if entry.family == Kind::Pruning
            && entry.verb == "compress"
            && !touched.is_empty()
            && tensors().all(|(name, tensor)| sparse(tensor) && same((name, tensor)))
        {
            let message = "finds nothing more to prune: all weights in scope have as many zeros already; leave it \
                 out, or raise its share";
            found.push(("undone", place.to_owned(), message.to_owned()));
        }
        if entry.verb == "train" && entry.name != "initialise" {
            let dense = |name: &&String| {
                let tensor = before.tensors.get(*name);
                tensor.is_some_and(|t| matches!(t.record, Record::Dense { .. }))
            };
            let pruned = self.taken.iter().filter(|t| t.prunes());
            let filled = pruned.filter_map(|t| Some((t, t.touched.iter().find(dense)?)));
            found.extend(filled.map(|(t, name)| {
                let message = format!(
                    "zeros that {} makes are too few in '{name}' to be stored as such, so training fills them; \
                     raise its share, or prune after training",
                    t.place
                );
                ("undone", place.to_owned(), message)
            }));
        }
        if entry.verb == "compress" && after.bytes() > before.bytes() {
            let message = format!(
                "the weights grow from {} to {}: what they come in takes fewer bits than what this step \
                 stores",
                format::size(i64::try_from(before.bytes()).unwrap_or(i64::MAX)),
                format::size(i64::try_from(after.bytes()).unwrap_or(i64::MAX)),
            );
            found.push(("grows", place.to_owned(), message));
        }
        let warning = |(rule, field, message): (&str, String, String)| v1::RecipeWarning {
            rule: rule.to_owned(),
            field,
            message,
        };
        self.warnings.extend(found.into_iter().map(warning));
    }
}

impl Taken {
    /// Whether it makes zeros in the weights of its scope.
    fn prunes(&self) -> bool {
        self.entry.is_some_and(|entry| {
            entry.family == Kind::Pruning
                && entry.verb == "compress"
                && !entry.changes.contains(&catalogue::Change::Shapes)
        })
    }
}

/// Whether some tensor holds weights in fewer than 16 bits.
pub fn quantised(model: &AnyInfo) -> bool {
    model.tensors.values().any(|tensor| tensor.record.few_bits())
}

fn in_normal_floats(record: &Record) -> bool {
    match record {
        Record::Nf4 { .. } => true,
        Record::Sum { base, .. } => in_normal_floats(base),
        _ => false,
    }
}

fn factored(record: &Record) -> bool {
    match record {
        Record::Factored { .. } => true,
        Record::Sum { base, .. } => factored(base),
        _ => false,
    }
}

fn sparse(tensor: &TensorInfo) -> bool {
    matches!(tensor.record, Record::Sparse { .. })
}

/// What a pruned matrix became, where that has values in the place of its zeros.
fn filled(record: &Record) -> Option<&'static str> {
    match record {
        Record::Factored { .. } => Some("a product of two matrices"),
        Record::Sum { .. } => Some("a sum with a dense correction"),
        Record::Dense { .. } => Some("dense"),
        _ => None,
    }
}

/// What is worth knowing of so many zeros wherever they fall; `kernel` says whether this machine has the one
/// that the catalogue names.
fn no_latency(share: f64, entry: &Entry, kernel: bool) -> Option<String> {
    let helped = kernel && !entry.kernel.is_empty();
    (share > 0.0 && share < MUCH && !helped).then(|| {
        format!(
            "{:.0} % of zeros wherever they fall make nothing faster here: this machine has no kernel for them; \
             remove channels, or prune {:.0} % or more",
            100.0 * share,
            100.0 * MUCH
        )
    })
}

/// The share of zeros that a step makes wherever they fall, and the option that says so.
fn unstructured(step: &v1::Step) -> Option<(&'static str, f64)> {
    let of = |sparsity: &Option<v1::Sparsity>| {
        let sparsity = sparsity.as_ref()?;
        let free = sparsity.pattern == "unstructured";
        free.then_some(("sparsity.share", sparsity.share?))
    };
    match step.method.as_ref()? {
        Method::Magnitude(options) => of(&options.sparsity),
        Method::RandomPruning(options) => of(&options.sparsity),
        Method::Wanda(options) => of(&options.sparsity),
        Method::Sparsegpt(options) => of(&options.sparsity),
        Method::Dsnot(options) => of(&options.sparsity),
        Method::Ecoflap(options) => Some(("share", options.share?)),
        Method::Gradual(options) if options.pattern == "unstructured" => {
            Some(("final_sparsity", options.final_sparsity?))
        }
        _ => None,
    }
}

/// Names of the tensors that a resolved step changes: those that look different afterwards, and those that its
/// patterns name.
fn touched(card: &Card, step: &v1::Step, before: &AnyInfo, after: &AnyInfo) -> BTreeSet<String> {
    if card.verb == "train" {
        return before.tensors.keys().cloned().collect();
    }
    let other = |(name, tensor): &(&String, &TensorInfo)| {
        after.tensors.get(*name).is_none_or(|new| {
            new.record != tensor.record || new.bytes != tensor.bytes || new.shape != tensor.shape
        })
    };
    let mut names: BTreeSet<String> =
        before.tensors.iter().filter(other).map(|(name, _)| name.clone()).collect();
    let json = serde_json::to_value(step).unwrap_or_default();
    let options = &json[card.name];
    let patterns = [&options["scope"], &options["sparsity"]["scope"], &options["grid"]["scope"]];
    if let Some(patterns) = patterns.into_iter().find_map(Value::as_array)
        && let Ok(model) = before.walked()
    {
        let patterns: Vec<String> =
            patterns.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        // What cannot be found was refused by the method.
        names.extend(scope::names(&model.family, &patterns).unwrap_or_default());
    }
    names
}

#[cfg(test)]
mod tests;
