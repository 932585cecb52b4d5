//! Recipes: ordered steps, their checking, their files, their running.

pub mod file;
pub mod run;

use crate::error::{Error, Reason, Result};
use crate::eval;
use crate::methods::{Estimate, registry};
use crate::models::ModelInfo;
use crate::proto::v1;

/// Steps a recipe may have at most.
const MAX_STEPS: usize = 64;

/// What a recipe would do and cost.
pub struct Plan {
    pub steps: Vec<Estimate>,
    pub total: Estimate,
}

/// Checks a recipe against a model: at least one and at most 64 steps, every option, every order.
/// Errors point at `recipe.steps[i].<method>.<option>`.
pub fn check(recipe: &v1::Recipe, model: &ModelInfo) -> Result<Plan> {
    if recipe.steps.is_empty() || recipe.steps.len() > MAX_STEPS {
        return Err(Error::at(
            Reason::InvalidRecipe,
            "recipe.steps",
            format!("{} steps; a recipe has 1 to {MAX_STEPS}", recipe.steps.len()),
        ));
    }
    let mut info = model.clone();
    let mut steps = Vec::with_capacity(recipe.steps.len());
    for (i, step) in recipe.steps.iter().enumerate() {
        let place = format!("recipe.steps[{i}]");
        let method = registry::method(step).map_err(|e| e.within(&place))?;
        let (estimate, after) = method
            .check(&info)
            .map_err(|e| e.within(&format!("{place}.{}", method.card().name)))?;
        steps.push(estimate);
        info = after;
    }
    if let Some(evaluation) = &recipe.evaluation {
        eval::check(evaluation, model).map_err(|e| e.within("recipe.evaluation"))?;
    }
    let total = Estimate {
        weight_bytes: info.bytes(),
        memory_bytes: steps.iter().map(|s| s.memory_bytes).max().unwrap_or_default(),
        seconds: steps.iter().map(|s| s.seconds).sum(),
        calibration_tokens: steps.iter().map(|s| s.calibration_tokens).sum(),
    };
    Ok(Plan { steps, total })
}

/// The same recipe with every default written out.
pub fn resolve(recipe: &v1::Recipe) -> v1::Recipe {
    let steps = recipe.steps.iter().map(registry::resolve).collect();
    v1::Recipe { steps, ..recipe.clone() }
}

/// Resource names of the data sets that a recipe reads, each once, sorted.
pub fn datasets(recipe: &v1::Recipe) -> Vec<String> {
    let of_steps = recipe.steps.iter().flat_map(step_datasets);
    let of_evaluation = recipe.evaluation.iter().map(|e| e.dataset.clone());
    let mut names: Vec<_> = of_steps.chain(of_evaluation).filter(|n| !n.is_empty()).collect();
    names.sort();
    names.dedup();
    names
}

/// Resource names of the data sets that a step reads.
pub fn step_datasets(step: &v1::Step) -> Vec<String> {
    let names = registry::method(step).map(|m| m.datasets()).unwrap_or_default();
    names.into_iter().filter(|n| !n.is_empty()).map(str::to_owned).collect()
}
