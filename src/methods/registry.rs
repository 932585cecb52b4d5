//! All methods, one row each.

use super::{Card, Method};
use crate::error::Result;
use crate::proto::v1;

/// The method of a step; an empty step is an invalid recipe.
pub fn method(_step: &v1::Step) -> Result<&dyn Method> {
    todo!()
}

/// The cards of all methods, by name.
pub fn cards() -> Vec<&'static Card> {
    todo!()
}
