//! Recipes: ordered steps, their checking, their files.

pub mod file;
pub mod seed;

use crate::error::Result;
use crate::methods::Estimate;
use crate::models::ModelInfo;
use crate::proto::v1;

/// What a recipe would do and cost.
pub struct Plan {
    pub steps: Vec<Estimate>,
    pub total: Estimate,
}

/// Checks a recipe against a model: at least one and at most 64 steps, every option, every order.
/// Errors point at `recipe.steps[i].<method>.<option>`.
pub fn check(_recipe: &v1::Recipe, _model: &ModelInfo) -> Result<Plan> {
    todo!()
}
