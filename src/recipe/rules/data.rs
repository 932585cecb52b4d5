//! Rules about what lies beside a recipe: its data sets, and adapters of the model.

use std::collections::BTreeMap;

use crate::data::records::Kind;
use crate::methods::catalogue::{self, Change, Family};
use crate::methods::registry;
use crate::proto::v1;

/// Adapters that a warning names.
const NAMED: usize = 3;

/// Warnings about the data of a recipe's steps; `kinds` has the kind of each data set. Steps change a model for
/// all that it is asked; records of one task, or the text it is measured on, say little of the rest.
pub fn of_data(recipe: &v1::Recipe, kinds: &BTreeMap<String, Kind>) -> Vec<v1::RecipeWarning> {
    let evaluation = recipe.evaluation.clone().unwrap_or_default();
    let further = evaluation.texts.iter().map(|text| text.dataset.as_str());
    let texts: Vec<&str> = further.chain([evaluation.dataset.as_str()]).collect();
    let measured = |name: &str| !name.is_empty() && texts.contains(&name);
    let mut warnings = Vec::new();
    for (i, step) in recipe.steps.iter().enumerate() {
        let Ok(method) = registry::method(step) else { continue };
        let card = method.card();
        let field = format!("steps[{i}].{}", card.name);
        let read = method.datasets();
        let tasks = |kind: Kind| !matches!(kind, Kind::Text | Kind::Images);
        if let Some((name, kind)) =
            read.iter().find_map(|n| Some((*n, *kinds.get(*n).filter(|kind| tasks(**kind))?)))
        {
            warnings.push(v1::RecipeWarning {
                rule: "one_task".to_owned(),
                field: field.clone(),
                message: format!(
                    "'{name}' holds {}, the records of one task: what it does not show may get worse unseen; \
                     measure more than the task, or take general text",
                    kind.name()
                ),
            });
        }
        if let Some(measured) = read.iter().find(|name| measured(name)) {
            warnings.push(v1::RecipeWarning {
                rule: "measured_on".to_owned(),
                field,
                message: format!(
                    "'{measured}' is what the result is measured on too, which flatters it; measure on a text \
                     that no step has seen"
                ),
            });
        }
    }
    warnings
}

/// A warning where steps change a model that these adapters were trained for.
pub fn of_adapters(recipe: &v1::Recipe, adapters: &[String]) -> Option<v1::RecipeWarning> {
    let first = adapters.first()?;
    recipe.steps.iter().enumerate().find_map(|(i, step)| {
        let card = registry::method(step).ok()?.card();
        let entry = catalogue::entry(card.verb, card.name)?;
        let narrow = entry.changes.contains(&Change::Shapes);
        let anew = entry.name == "initialise";
        if !narrow && !anew && entry.family != Family::Quantisation {
            return None;
        }
        let more = adapters.len().saturating_sub(NAMED);
        let mut named = adapters[..adapters.len().min(NAMED)].join(", ");
        if more > 0 {
            named += &format!(" and {more} more");
        }
        let message = if anew {
            format!(
                "{named} learnt beside weights that are gone: all weights are drawn anew; train the adapter on \
                 the result"
            )
        } else if narrow {
            format!(
                "{named} will not fit what this step makes narrower; merge {first} before, or train it anew \
                 on the result"
            )
        } else {
            format!(
                "{named} learnt beside the weights before rounding; merge before this step, measure again \
                 with the result, or train anew beside it (qlora)"
            )
        };
        let field = format!("steps[{i}].{}", card.name);
        Some(v1::RecipeWarning { rule: "adapters".to_owned(), field, message })
    })
}
