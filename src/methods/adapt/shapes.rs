//! What of a model an adapter can sit on: known from its configuration, before any weight is read.

use std::collections::BTreeMap;

use crate::error::{Error, Reason, Result};
use crate::models::{AnyModel, decoder, encoder, not_for_text};

/// Names and shapes of a model's tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Shapes {
    pub family: &'static str,
    /// Linear weights inside the blocks and their `[out, in]`, in running order.
    pub linears: Vec<(String, [usize; 2])>,
    /// All tensors.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// Names of the modules that are adapted when nothing is said.
    pub usual: &'static [&'static str],
}

impl Shapes {
    pub fn decoder(config: &decoder::Config) -> Self {
        let names = (0..config.layers.len()).flat_map(|layer| config.linears(layer).concat());
        Self::new("decoder", config.tensors(), names, &["q_proj", "v_proj"])
    }

    pub fn encoder(config: &encoder::Config) -> Self {
        const LINEARS: [&str; 6] = [
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ];
        let names = (0..config.layers).flat_map(|layer| {
            LINEARS.map(|linear| format!("encoder.layer.{layer}.{linear}.weight"))
        });
        Self::new(encoder::FAMILY, config.tensors(), names, &["query", "value"])
    }

    pub fn of(model: &AnyModel) -> Result<Self> {
        Ok(match model {
            AnyModel::Decoder(model) => Self::decoder(model.decoder()?),
            AnyModel::Encoder(model) => Self::encoder(&model.family),
            model => return Err(not_for_text(model.family())),
        })
    }

    fn new(
        family: &'static str,
        tensors: Vec<(String, Vec<usize>)>,
        linears: impl Iterator<Item = String>,
        usual: &'static [&'static str],
    ) -> Self {
        let tensors: BTreeMap<_, _> = tensors.into_iter().collect();
        let matrix = |name: String| match tensors.get(&name).map(Vec::as_slice) {
            Some(&[rows, cols]) => Some((name, [rows, cols])),
            _ => None,
        };
        Self { family, linears: linears.filter_map(matrix).collect(), tensors, usual }
    }

    /// Shape of a linear weight.
    pub fn linear(&self, name: &str) -> Result<[usize; 2]> {
        match self.tensors.get(name).map(Vec::as_slice) {
            Some(&[rows, cols]) => Ok([rows, cols]),
            _ => Err(Error::new(
                Reason::TensorNotFound,
                format!("the model has no matrix called '{name}'"),
            )),
        }
    }

    /// Elements of a tensor.
    pub fn elements(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |shape| shape.iter().product::<usize>() as u64)
    }

    /// Names of the modules that hold tensors, in order.
    pub fn modules(&self) -> Vec<&str> {
        let mut modules: Vec<&str> = self.tensors.keys().map(|name| module(name)).collect();
        modules.dedup();
        modules
    }

    /// Tensors of the modules that a name of PEFT's `modules_to_save` stands for: those whose path holds
    /// the name as whole parts.
    pub fn saved(&self, name: &str) -> Vec<&str> {
        let wanted: Vec<&str> = name.split('.').collect();
        let holds = |tensor: &&str| {
            let parts: Vec<&str> = module(tensor).split('.').collect();
            parts.windows(wanted.len()).any(|window| window == wanted)
        };
        self.tensors.keys().map(String::as_str).filter(holds).collect()
    }

    /// Names of the biases that belong to linears (all, or those of `of` alone), in order.
    pub fn biases(&self, of: Option<&[String]>) -> Vec<String> {
        let linears = self.linears.iter().map(|(name, _)| name);
        let chosen = linears.filter(|name| of.is_none_or(|of| of.contains(name)));
        let names = chosen.map(|name| format!("{}.bias", module(name)));
        names.filter(|name| self.tensors.contains_key(name)).collect()
    }

    /// Names of all biases, those of norms too, in order.
    pub fn all_biases(&self) -> Vec<String> {
        self.tensors.keys().filter(|name| name.ends_with(".bias")).cloned().collect()
    }
}

/// `model.norm` of `model.norm.weight`.
pub fn module(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

#[cfg(test)]
pub mod testing {
    //! Shapes of the models that the adapters' papers are compared on here.

    use serde_json::json;

    use super::*;

    pub fn smollm2() -> Shapes {
        let config = json!({
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        });
        Shapes::decoder(&decoder::Config::from_hugging_face(&config).unwrap())
    }

    pub fn minilm() -> Shapes {
        let config = json!({
            "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536,
            "num_hidden_layers": 6, "num_attention_heads": 12, "max_position_embeddings": 512,
        });
        Shapes::encoder(&encoder::Config::from_hugging_face(&config).unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_sides_are_those_of_the_cards() {
        let sides = |shapes: &Shapes| {
            shapes.linears.iter().map(|(_, [rows, cols])| rows + cols).sum::<usize>()
        };
        assert_eq!(sides(&testing::smollm2()), 30 * 10_176);
        assert_eq!(sides(&testing::minilm()), 6 * 6_912);
        assert!(testing::smollm2().all_biases().is_empty());
        // Six linears and two norms a layer, and the norm of the embeddings.
        assert_eq!(testing::minilm().all_biases().len(), 6 * 8 + 1);
        assert_eq!(testing::minilm().biases(None).len(), 36);
    }

    #[test]
    fn modules_to_save_are_found_by_whole_parts_of_their_path() {
        let shapes = testing::minilm();
        assert_eq!(
            shapes.saved("embeddings.LayerNorm"),
            ["embeddings.LayerNorm.bias", "embeddings.LayerNorm.weight"]
        );
        assert_eq!(shapes.saved("query").len(), 12);
        assert!(shapes.saved("uery").is_empty());
    }
}
