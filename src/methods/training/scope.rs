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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::models::{AnyModel, decoder, random};
    use crate::seed::Stream;

    fn decoder(tied: bool) -> AnyInfo {
        let mut config = decoder::random::tiny("llama");
        config["tie_word_embeddings"] = json!(tied);
        AnyModel::from(decoder::random::model(config, 1).unwrap()).info()
    }

    fn made(config: serde_json::Value) -> AnyInfo {
        random::model(config, &Stream::root(1)).unwrap().info()
    }

    fn named(model: &AnyInfo, patterns: &[&str]) -> Result<Scope> {
        of(model, &patterns.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn tables_and_the_output_layer_are_pruned_only_where_they_are_named() {
        for tied in [false, true] {
            let model = decoder(tied);
            let usual = named(&model, &[]).unwrap();
            assert_eq!(usual.names.len(), 21);
            assert!(usual.names.iter().all(|name| name.contains("_proj.")), "{usual:?}");
            let table = named(&model, &["*embed_tokens*"]).unwrap();
            assert_eq!(table.names, ["model.embed_tokens.weight"]);
            // With one table for both there is no output layer of its own to name.
            match named(&model, &["lm_head*"]) {
                Ok(head) => assert!(!tied && head.names == ["lm_head.weight"]),
                Err(error) => {
                    assert!(tied);
                    assert_eq!(error.reason(), Reason::TensorNotFound);
                }
            }
        }
        let lstm = made(json!({ "model_type": "lstm", "vocab_size": 64, "hidden_size": 8 }));
        let usual = named(&lstm, &[]).unwrap().names;
        assert_eq!(usual, ["layers.0.input.weight", "layers.0.recurrent.weight"]);
        let all = named(&lstm, &["*"]).unwrap().names;
        assert!(["embedding.weight", "head.weight"].iter().all(|n| all.iter().any(|a| a == n)));
    }

    #[test]
    fn biases_and_norms_are_in_no_scope() {
        let net = made(json!({
            "model_type": "conv_net", "image_size": 8, "num_labels": 4, "channels": [4, 8],
        }));
        for model in [net, decoder(false)] {
            let Scope { names, skipped } = named(&model, &["*"]).unwrap();
            for name in names.iter().chain(&skipped) {
                assert_eq!(model.tensors[name].shape.len(), 2, "{name}");
                assert!(!name.contains("norm") && !name.ends_with(".bias"), "{name}");
            }
            let vectors = model.tensors.values().filter(|t| t.shape.len() == 1).count();
            assert!(vectors > 0 && names.len() + skipped.len() + vectors <= model.tensors.len());
            let error = named(&model, &["*norm*"]).unwrap_err();
            assert_eq!(error.violations()[0].field, "scope");
        }
    }
}
