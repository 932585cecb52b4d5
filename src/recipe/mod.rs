//! Recipes: ordered steps, their checking, their files, their running.

pub mod adapt;
pub mod card;
pub mod claim;
pub mod compare;
pub mod curve;
pub mod file;
pub mod rules;
pub mod run;

use std::collections::BTreeSet;

use crate::error::{Error, Reason, Result};
use crate::eval;
use crate::methods::{Estimate, registry};
use crate::models::AnyInfo;
use crate::proto::v1;

/// Steps a recipe may have at most.
const MAX_STEPS: usize = 64;

/// What a recipe would do and cost.
pub struct Plan {
    pub steps: Vec<Estimate>,
    pub total: Estimate,
    /// What is worth knowing and no reason to refuse; fields as in errors.
    pub warnings: Vec<v1::RecipeWarning>,
}

/// Checks a recipe against a model: at least one and at most 64 steps, every option, every order
/// (by the [rules]).
/// Errors point at `steps[i].<method>.<option>`.
pub fn check(recipe: &v1::Recipe, model: &AnyInfo) -> Result<Plan> {
    let plan = check_steps(&recipe.steps, model)?;
    if let Some(evaluation) = &recipe.evaluation {
        eval::check_any(evaluation, model).map_err(|e| e.within("evaluation"))?;
    }
    Ok(plan)
}

/// Checks steps that are taken one after the other, as [`check`] does.
pub fn check_steps(given: &[v1::Step], model: &AnyInfo) -> Result<Plan> {
    if given.is_empty() || given.len() > MAX_STEPS {
        return Err(Error::at(
            Reason::InvalidRecipe,
            "steps",
            format!("{} steps; a recipe has 1 to {MAX_STEPS}", given.len()),
        ));
    }
    let mut info = model.clone();
    let mut steps = Vec::with_capacity(given.len());
    let mut rules = rules::Rules::default();
    for (i, step) in given.iter().enumerate() {
        let place = format!("steps[{i}]");
        let method = registry::method(step).map_err(|e| e.within(&place))?;
        let (estimate, after) = method
            .check_any(&info)
            .map_err(|e| e.within(&format!("{place}.{}", method.card().name)))?;
        rules.step(&place, step, &info, &after)?;
        steps.push(estimate);
        info = after;
    }
    let total = Estimate {
        weight_bytes: info.bytes(),
        memory_bytes: steps.iter().map(|s| s.memory_bytes).max().unwrap_or_default(),
        seconds: steps.iter().map(|s| s.seconds).sum(),
        calibration_tokens: steps.iter().map(|s| s.calibration_tokens).sum(),
    };
    Ok(Plan { steps, total, warnings: rules.warnings })
}

/// The same recipe with every default written out.
pub fn resolve(recipe: &v1::Recipe) -> v1::Recipe {
    let steps = recipe.steps.iter().map(registry::resolve).collect();
    v1::Recipe { steps, ..recipe.clone() }
}

/// Resource names of the data sets that a recipe reads, each once, sorted.
pub fn datasets(recipe: &v1::Recipe) -> Vec<String> {
    let of_steps = recipe.steps.iter().flat_map(step_datasets);
    unique(of_steps.chain(recipe.evaluation.iter().flat_map(evaluation_datasets)))
}

/// Resource names of the data sets that an evaluation reads.
pub fn evaluation_datasets(evaluation: &v1::Evaluation) -> Vec<String> {
    let choices = evaluation.choice.iter().map(|choice| choice.dataset.clone());
    let images = evaluation.images.iter().map(|images| images.dataset.clone());
    let tasks = evaluation.task.iter().map(|task| task.dataset.clone());
    let norms = evaluation.norm_bounds.iter().map(|norms| norms.dataset.clone());
    let texts = evaluation.texts.iter().map(|text| text.dataset.clone());
    let text = [evaluation.dataset.clone()];
    choices.chain(images).chain(tasks).chain(norms).chain(text).chain(texts).collect()
}

fn unique(names: impl Iterator<Item = String>) -> Vec<String> {
    let names: BTreeSet<String> = names.filter(|name| !name.is_empty()).collect();
    names.into_iter().collect()
}

/// Resource names of the data sets that a step reads.
pub fn step_datasets(step: &v1::Step) -> Vec<String> {
    let names = registry::method(step).map(|m| m.datasets()).unwrap_or_default();
    names.into_iter().filter(|n| !n.is_empty()).map(str::to_owned).collect()
}
