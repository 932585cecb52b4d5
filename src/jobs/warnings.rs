//! What is known of a recipe before it runs and does not stop it, with what only the store can tell.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::proto::v1;
use crate::recipe::{self, rules};
use crate::store::models::VersionRow;
use crate::store::{Store, names};

/// Adapters of a model that are looked at.
const MOST: usize = 100;

/// The warnings of a recipe for a version: those that its plan found, and those about data sets and adapters.
/// Fields begin with `recipe.`, as in errors.
///
/// # Errors
/// Those of the store; what is not there is left to who needs it.
pub async fn of_recipe(
    store: &Store,
    recipe: &v1::Recipe,
    planned: Vec<v1::RecipeWarning>,
    base: &VersionRow,
) -> Result<Vec<v1::RecipeWarning>> {
    let mut warnings = planned;
    let mut kinds = BTreeMap::new();
    for name in recipe::datasets(recipe) {
        if let Ok(id) = names::dataset(&name)
            && let Ok(row) = store.dataset(id).await
        {
            kinds.insert(name, row.kind);
        }
    }
    warnings.extend(rules::of_data(recipe, &kinds));
    let adapters = store.adapters(Some(&base.model), None, MOST).await?;
    let adapters: Vec<String> = adapters.iter().map(|row| row.name()).collect();
    warnings.extend(rules::of_adapters(recipe, &adapters));
    for warning in &mut warnings {
        warning.field = format!("recipe.{}", warning.field);
    }
    Ok(warnings)
}
