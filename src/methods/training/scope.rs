//! Which weights are pruned.

use crate::error::{Error, Reason, Result};
use crate::methods::scope::{matches, names};
use crate::models::{AnyFamily, AnyInfo};

/// Matrices with fewer elements are left out.
pub const LEAST: usize = 16;

/// Weights in scope, in order, and those that are named but too small.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    pub names: Vec<String>,
    pub skipped: Vec<String>,
}

/// The matrices that `patterns` name; without any, what the family prunes: not embeddings, not the output
/// layer.
///
/// # Errors
/// `TENSOR_NOT_FOUND` for a pattern that matches nothing, `MODEL_UNSUITABLE` for models of two towers.
pub fn of(model: &AnyInfo, patterns: &[String]) -> Result<Scope> {
    if let AnyFamily::TwoTower(_) = &model.family {
        return Err(Error::new(
            Reason::ModelUnsuitable,
            "models of two towers are not pruned while they are trained; use ecoflap after training",
        ));
    }
    let matrices = model.tensors.iter().filter(|(_, tensor)| tensor.shape.len() == 2);
    let matrices: Vec<&String> = matrices.map(|(name, _)| name).collect();
    let mut chosen: Vec<String> = if patterns.is_empty() {
        match &model.family {
            AnyFamily::Decoder(_) => names(&model.walked()?.family, &[])?,
            AnyFamily::Vision(config) => config.prunable(),
            AnyFamily::Lstm(config) => config.prunable(),
            AnyFamily::Encoder(_) | AnyFamily::TwoTower(_) => {
                matrices.iter().map(|name| (*name).clone()).collect()
            }
        }
    } else {
        for pattern in patterns {
            if !matrices.iter().any(|name| matches(pattern, name)) {
                let example = matrices.first().map_or("", |name| name.as_str());
                let problem = format!(
                    "'{pattern:.100}' matches no matrix of the model; names look like '{example}', and '*' \
                     stands for any characters"
                );
                return Err(Error::at(Reason::TensorNotFound, "scope", problem));
            }
        }
        let named = matrices.into_iter().filter(|name| patterns.iter().any(|p| matches(p, name)));
        named.cloned().collect()
    };
    chosen.sort();
    let elements = |name: &String| -> usize {
        model.tensors.get(name).map_or(0, |tensor| tensor.shape.iter().product())
    };
    let (names, skipped) = chosen.into_iter().partition(|name| elements(name) >= LEAST);
    Ok(Scope { names, skipped })
}
