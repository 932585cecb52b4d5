//! Files of recipes, comparisons and claims: the canonical JSON mapping of their messages, written as
//! TOML or JSON; unknown keys are refused.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{Error, Reason, Result};

/// Largest file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// Reads a message (a [`v1::Recipe`], for instance) from a `.toml` or `.json` file.
pub fn read<M: DeserializeOwned>(path: &Path) -> Result<M> {
    let shown = path.display();
    let toml = match path.extension().and_then(|e| e.to_str()) {
        Some("toml") => true,
        Some("json") => false,
        _ => {
            return Err(Error::new(
                Reason::UnsupportedFormat,
                format!("'{shown}' is neither .toml nor .json; rename it after its syntax"),
            ));
        }
    };
    let size =
        std::fs::metadata(path).map_err(|e| Error::from(e).within(&shown.to_string()))?.len();
    if size > MAX_BYTES {
        return Err(Error::new(
            Reason::TooLarge,
            format!("'{shown}' has {size} bytes, more than the {MAX_BYTES} that are read"),
        ));
    }
    let text = std::fs::read_to_string(path).map_err(|e| {
        Error::new(Reason::InvalidRecipe, format!("'{shown}' cannot be read as UTF-8 text: {e}"))
    })?;
    parse(&text, toml).map_err(|e| e.within(&shown.to_string()))
}

/// Parses a message; `toml` chooses the syntax.
pub fn parse<M: DeserializeOwned>(text: &str, toml: bool) -> Result<M> {
    let bad = |place: String| {
        Error::new(
            Reason::InvalidRecipe,
            format!("{}; 'planish methods show' lists a method's options", place.trim_end()),
        )
    };
    if toml {
        toml::from_str(text).map_err(|e| bad(e.to_string().to_lowercase()))
    } else {
        serde_json::from_str(text).map_err(|e| bad(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1;

    fn parse(text: &str, toml: bool) -> Result<v1::Recipe> {
        super::parse(text, toml)
    }

    const TOML: &str = r#"
display_name = "prune, then quantise"
seed = 7

[[steps]]
[steps.wanda.sparsity]
share = 0.5
scope = ["*.mlp.*"]
[steps.wanda.calibration]
sequences = 8
sampling = "CALIBRATION_SAMPLING_FIRST"

[[steps]]
gptq = { grid = { bits = 4, group_size = 64 } }

[evaluation]
dataset = "datasets/wiki"
context = 512
"#;

    #[test]
    fn toml_and_json_give_the_same_recipe() {
        let from_toml = parse(TOML, true).expect("toml");
        assert_eq!(from_toml.seed, 7);
        assert_eq!(from_toml.steps.len(), 2);
        let Some(v1::step::Method::Wanda(wanda)) = &from_toml.steps[0].method else {
            panic!("wanda");
        };
        let calibration = wanda.calibration.as_ref().expect("calibration");
        assert_eq!(calibration.sampling(), v1::CalibrationSampling::First);
        assert_eq!(calibration.sequences, Some(8));
        let json = serde_json::to_string(&from_toml).expect("json");
        assert_eq!(parse(&json, false).expect("round trip"), from_toml);
    }

    #[test]
    fn unknown_keys_and_wrong_types_name_their_place() {
        let error = parse("[[steps]]\n[steps.wanda.sparsity]\nshares = 0.5\n", true).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidRecipe);
        assert!(
            error.message().contains("shares") && error.message().contains("line 3"),
            "{error}"
        );
        let error = parse(r#"{"steps":[{"wando":{}}]}"#, false).unwrap_err();
        assert!(error.message().contains("wando"), "{error}");
        let error = parse("seed = -1", true).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidRecipe);
        let error =
            parse("[[steps]]\n[steps.wanda.calibration]\nsampling = \"LAST\"", true).unwrap_err();
        assert!(error.message().contains("last"), "{error}");
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(&format!("{{\"steps\":{deep}}}"), false).is_err());
        assert!(parse(&format!("steps = {deep}"), true).is_err());
    }
}
