//! Recipe files: the canonical JSON mapping of `Recipe`, written as TOML or JSON; unknown keys are
//! refused.

use std::path::Path;

use crate::error::Result;
use crate::proto::v1;

/// Reads a recipe from a `.toml` or `.json` file.
pub fn read(_path: &Path) -> Result<v1::Recipe> {
    todo!()
}

/// Parses a recipe; `toml` chooses the syntax.
pub fn parse(_text: &str, _toml: bool) -> Result<v1::Recipe> {
    todo!()
}
