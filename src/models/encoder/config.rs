//! The settings of an encoder, read from `config.json`, and the names of its tensors.

use serde_json::Value;

use crate::error::{Error, Reason, Result};
use crate::models::decoder::hugging_face::{Keys, MAX_PARAMETERS, refuse};

/// Nonlinearity of the feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x Phi(x)`, with the normal distribution function.
    Gelu,
    GeluTanh,
    Relu,
}

/// How the states of a text's tokens become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    Cls,
    /// The largest value of each channel.
    Max,
}

impl Pooling {
    /// The name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Cls => "cls",
            Self::Max => "max",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        [Self::Mean, Self::Cls, Self::Max].into_iter().find(|p| p.name() == name)
    }
}

/// Configuration of an encoder. `hidden` is the width of the states and of the embeddings.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `model_type` of the Hugging Face configuration: bert.
    pub architecture: String,
    pub vocab: usize,
    pub hidden: usize,
    /// Channels inside of the feed-forward network of a block; of the widest, where they differ.
    pub intermediate: usize,
    /// The same by block, where they differ; otherwise empty.
    pub widths: Vec<usize>,
    pub layers: usize,
    pub heads: usize,
    /// Rows of the position embeddings: the longest text in tokens.
    pub max_positions: usize,
    /// Rows of the token type embeddings; a single text is all of type 0.
    pub types: usize,
    pub norm_eps: f32,
    pub activation: Activation,
    /// What a request that names no pooling gets.
    pub pooling: Pooling,
    /// Whether embeddings have length 1 unless a request says otherwise.
    pub normalize: bool,
    /// Tokens of a text, special ones included; longer texts are cut. At most `max_positions`.
    pub max_tokens: usize,
    /// Texts are put into lower case before the tokenizer sees them.
    pub lowercase: bool,
}

/// The key of `config.json` that keeps what sentence-transformers writes into files of its own.
pub(super) const SENTENCE: &str = "sentence_transformers";

/// Whether a configuration belongs to this family.
pub fn is_encoder(config: &Value) -> bool {
    config.get("model_type").and_then(Value::as_str) == Some("bert")
}

impl Config {
    /// From `config.json`; every value is checked. What pooling is not said there is the mean without
    /// normalisation, as in sentence-transformers. Errors are `UNSUPPORTED_MODEL` and name the key.
    pub fn from_hugging_face(config: &Value) -> Result<Self> {
        if !is_encoder(config) {
            return Err(refuse("model_type", "is not bert, the encoder that is read"));
        }
        let keys = Keys { map: config };
        if keys.present("quantization_config") {
            return Err(refuse(
                "quantization_config",
                "checkpoints in another library's quantised form are not read; import the original \
                 weights",
            ));
        }
        if keys.text("position_embedding_type")?.is_some_and(|kind| kind != "absolute") {
            return Err(refuse("position_embedding_type", "only absolute is supported"));
        }
        for key in ["is_decoder", "add_cross_attention"] {
            if keys.flag(key, false)? {
                return Err(refuse(key, "only false is supported: the model must be an encoder"));
            }
        }
        let hidden = keys.size("hidden_size", Some(768), 1 << 17)?;
        let heads = keys.size("num_attention_heads", Some(12), 4096)?;
        if !hidden.is_multiple_of(heads) {
            return Err(refuse(
                "num_attention_heads",
                format!("{heads} does not divide hidden_size, {hidden}"),
            ));
        }
        let max_positions = keys.size("max_position_embeddings", Some(512), 1 << 16)?;
        let empty = Value::Null;
        let sentence = Keys { map: config.get(SENTENCE).unwrap_or(&empty) };
        let inside = |error: Error| error.within(SENTENCE);
        let pooling = match sentence.text("pooling").map_err(inside)? {
            None => Pooling::Mean,
            Some(name) => Pooling::parse(name).ok_or_else(|| {
                refuse("sentence_transformers.pooling", "is none of mean, cls, max")
            })?,
        };
        let max_tokens =
            sentence.size("max_seq_length", Some(max_positions), 1 << 24).map_err(inside)?;
        let layers = keys.size("num_hidden_layers", Some(12), 1024)?;
        let widths = keys.sizes("intermediate_size", layers, 1 << 20)?;
        let mut config = Self {
            architecture: "bert".to_owned(),
            vocab: keys.size("vocab_size", Some(30522), 1 << 24)?,
            hidden,
            intermediate: match &widths {
                Some(_) => 0,
                None => keys.size("intermediate_size", Some(3072), 1 << 20)?,
            },
            widths: Vec::new(),
            layers,
            heads,
            max_positions,
            types: keys.size("type_vocab_size", Some(2), 1 << 10)?,
            norm_eps: keys.number("layer_norm_eps", 1e-12, 1e-30..=0.1)? as f32,
            activation: match keys.text("hidden_act")? {
                None | Some("gelu" | "gelu_python") => Activation::Gelu,
                Some("gelu_new" | "gelu_pytorch_tanh") => Activation::GeluTanh,
                Some("relu") => Activation::Relu,
                Some(other) => {
                    let other: String = other.chars().take(40).collect();
                    return Err(refuse(
                        "hidden_act",
                        format!("'{other}' is not supported; use gelu, gelu_new or relu"),
                    ));
                }
            },
            pooling,
            normalize: sentence.flag("normalize", false).map_err(inside)?,
            max_tokens: max_tokens.min(max_positions),
            lowercase: sentence.flag("do_lower_case", false).map_err(inside)?,
        };
        if let Some(widths) = &widths {
            config.set_widths(widths);
        }
        let per_layer = 4 * hidden as u128 + 2 * config.intermediate as u128;
        let tables = (config.vocab + config.max_positions + config.types) as u128;
        let parameters = hidden as u128 * (per_layer * config.layers as u128 + tables);
        if parameters > MAX_PARAMETERS {
            return Err(Error::new(
                Reason::UnsupportedModel,
                format!("config.json describes {parameters} weights; at most 2^40 are supported"),
            ));
        }
        Ok(config)
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Channels inside of the feed-forward network of block `layer`.
    pub fn wide(&self, layer: usize) -> usize {
        self.widths.get(layer).copied().unwrap_or(self.intermediate)
    }

    /// Sets the channels inside of the feed-forward network of each block.
    pub fn set_widths(&mut self, widths: &[usize]) {
        self.intermediate = widths.iter().copied().max().unwrap_or(self.intermediate);
        self.widths = match widths.iter().all(|w| *w == self.intermediate) {
            true => Vec::new(),
            false => widths.to_vec(),
        };
    }

    /// Names of the linear weights of block `layer`, grouped by the input they share, in the order in
    /// which they run: query key value; output; up; down.
    pub fn linears(&self, layer: usize) -> Vec<Vec<String>> {
        [
            &["attention.self.query", "attention.self.key", "attention.self.value"][..],
            &["attention.output.dense"],
            &["intermediate.dense"],
            &["output.dense"],
        ]
        .iter()
        .map(|group| group.iter().map(|n| format!("encoder.layer.{layer}.{n}.weight")).collect())
        .collect()
    }

    /// Every tensor the model must have, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden;
        let mut all = Vec::new();
        let mut add = |name: String, shape: &[usize]| all.push((name, shape.to_vec()));
        for (name, rows) in [
            ("word_embeddings", self.vocab),
            ("position_embeddings", self.max_positions),
            ("token_type_embeddings", self.types),
        ] {
            add(format!("embeddings.{name}.weight"), &[rows, hidden]);
        }
        let norm = |add: &mut dyn FnMut(String, &[usize]), place: &str| {
            add(format!("{place}.LayerNorm.weight"), &[hidden]);
            add(format!("{place}.LayerNorm.bias"), &[hidden]);
        };
        norm(&mut add, "embeddings");
        for layer in 0..self.layers {
            let wide = self.wide(layer);
            let place = |name: &str| format!("encoder.layer.{layer}.{name}");
            for (name, rows, cols) in [
                ("attention.self.query", hidden, hidden),
                ("attention.self.key", hidden, hidden),
                ("attention.self.value", hidden, hidden),
                ("attention.output.dense", hidden, hidden),
                ("intermediate.dense", wide, hidden),
                ("output.dense", hidden, wide),
            ] {
                add(format!("{}.weight", place(name)), &[rows, cols]);
                add(format!("{}.bias", place(name)), &[rows]);
            }
            norm(&mut add, &place("attention.output"));
            norm(&mut add, &place("output"));
        }
        all
    }
}

/// The name of a tensor in our models; `None` for one that embeddings do not need: the pooler and the
/// heads of pre-training work on top of the states.
pub fn tensor_name(name: &str) -> Result<Option<String>> {
    let inner = name.strip_prefix("bert.").unwrap_or(name);
    let unused = inner == "embeddings.position_ids"
        || ["pooler.", "cls."].iter().any(|head| inner.starts_with(head));
    if unused {
        tracing::debug!(tensor = name, "left out: embeddings do not use it");
        return Ok(None);
    }
    // Checkpoints converted from TensorFlow.
    let renamed = match inner.rsplit_once(".LayerNorm.") {
        Some((place, "gamma")) => format!("{place}.LayerNorm.weight"),
        Some((place, "beta")) => format!("{place}.LayerNorm.bias"),
        _ => inner.to_owned(),
    };
    Ok(Some(renamed))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::random::tiny;
    use super::*;

    #[test]
    fn defaults_are_those_of_bert_and_of_sentence_transformers() {
        let config = Config::from_hugging_face(&json!({ "model_type": "bert" })).unwrap();
        assert_eq!(
            (config.vocab, config.hidden, config.layers, config.heads),
            (30522, 768, 12, 12)
        );
        assert_eq!((config.intermediate, config.max_positions, config.types), (3072, 512, 2));
        assert_eq!(config.activation, Activation::Gelu);
        assert_eq!((config.pooling, config.normalize), (Pooling::Mean, false));
        assert_eq!((config.max_tokens, config.norm_eps), (512, 1e-12));
        // The 12 layers and the tables of bert-base: 108,891,648 without the pooler.
        let elements: usize =
            config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(elements, 108_891_648);
    }

    #[test]
    fn lengths_stay_inside_the_position_table() {
        let mut json = tiny();
        json[SENTENCE] = json!({ "max_seq_length": 100_000, "pooling": "cls", "normalize": true });
        let config = Config::from_hugging_face(&json).unwrap();
        assert_eq!(config.max_tokens, config.max_positions);
        assert_eq!((config.pooling, config.normalize), (Pooling::Cls, true));
    }

    #[test]
    fn hostile_configurations_are_refused_by_key() {
        for (key, value) in [
            ("hidden_size", json!(0)),
            ("hidden_size", json!(-4)),
            ("hidden_size", json!(1e30)),
            ("hidden_size", json!(33)),
            ("hidden_size", json!("32")),
            ("num_attention_heads", json!(5)),
            ("num_hidden_layers", json!(1 << 30)),
            ("intermediate_size", json!(u64::MAX)),
            ("vocab_size", json!(1.5)),
            ("max_position_embeddings", json!(1 << 20)),
            ("type_vocab_size", json!(0)),
            ("layer_norm_eps", json!(0)),
            ("layer_norm_eps", json!("1e-12")),
            ("hidden_act", json!("swish")),
            ("hidden_act", json!(["gelu"])),
            ("position_embedding_type", json!("relative_key")),
            ("is_decoder", json!(true)),
            ("add_cross_attention", json!(1)),
            ("quantization_config", json!({})),
            ("model_type", json!("roberta")),
            (SENTENCE, json!({ "pooling": "lasttoken" })),
            (SENTENCE, json!({ "pooling": 3 })),
            (SENTENCE, json!({ "max_seq_length": 0 })),
            (SENTENCE, json!({ "normalize": "yes" })),
            (SENTENCE, json!({ "do_lower_case": 1 })),
        ] {
            let mut json = tiny();
            json[key] = value.clone();
            let error = Config::from_hugging_face(&json).unwrap_err();
            assert_eq!(error.reason(), Reason::UnsupportedModel, "{key} = {value}: {error}");
        }
        let huge = json!({
            "model_type": "bert", "hidden_size": 131_072, "intermediate_size": 1_048_576,
            "num_hidden_layers": 1024, "num_attention_heads": 4096,
        });
        assert!(Config::from_hugging_face(&huge).unwrap_err().message().contains("2^40"));
    }

    #[test]
    fn names_of_all_generations_of_checkpoints() {
        let name = |name: &str| tensor_name(name).unwrap();
        let query = "encoder.layer.0.attention.self.query.weight";
        assert_eq!(name(query).as_deref(), Some(query));
        assert_eq!(name(&format!("bert.{query}")).as_deref(), Some(query));
        let gamma = name("bert.encoder.layer.1.output.LayerNorm.gamma");
        assert_eq!(gamma.as_deref(), Some("encoder.layer.1.output.LayerNorm.weight"));
        let beta = name("embeddings.LayerNorm.beta");
        assert_eq!(beta.as_deref(), Some("embeddings.LayerNorm.bias"));
        for left in ["embeddings.position_ids", "bert.pooler.dense.weight", "cls.predictions.bias"]
        {
            assert_eq!(name(left), None, "{left}");
        }
        // What is not known stays, and is refused when the model is put together.
        assert_eq!(name("classifier.weight").as_deref(), Some("classifier.weight"));
    }
}
