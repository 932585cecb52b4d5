//! `adapter_config.json`: what decides kind, rank and scale, and what must be off.

use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::CONFIG;
use crate::error::{Error, Reason, Result};
use crate::formats::{malformed, quoted};

/// Most entries of a pattern.
const MAX_PATTERN: usize = 1 << 14;
/// Most entries that are more than names, and the bytes that one of them may be compiled to.
const MAX_EXPRESSIONS: usize = 256;
const EXPRESSION_BYTES: usize = 1 << 20;

/// What an adapter is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To serve: all of it must be additions of low rank.
    Serve,
    /// To tune further, merge or write: whatever is known here.
    Keep,
}

/// Which factors there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `A`, `B`, and what stands beside them (LoRA, DoRA, LoRA-XS).
    Lora,
    /// `A`, `E`, `B` (AdaLoRA).
    AdaLora,
}

/// Settings that are part of the result; all others describe training or are refused.
#[derive(Debug)]
pub struct Settings {
    pub kind: Kind,
    pub dora: bool,
    rank: u64,
    alpha: f64,
    /// Divide by the root of the rank, not by the rank.
    pub rslora: bool,
    ranks: Vec<(Key, u64)>,
    alphas: Vec<(Key, f64)>,
}

/// A key of a pattern: PEFT looks for `(.*\.)?key$` from the start of a module's name.
#[derive(Debug)]
enum Key {
    /// The end of the name at a dot.
    Name(String),
    Expression(Box<Regex>),
}

#[derive(Deserialize)]
struct File {
    peft_type: Option<String>,
    r: Option<u64>,
    init_r: Option<u64>,
    lora_alpha: Option<f64>,
    #[serde(default)]
    use_rslora: Option<bool>,
    #[serde(default)]
    rank_pattern: Pattern<Ranks>,
    #[serde(default)]
    alpha_pattern: Pattern<f64>,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    init_lora_weights: Value,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// A value of the rank pattern: a rank, or (AdaLoRA) which ranks of those at the start are left.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ranks {
    Count(u64),
    Left(Vec<bool>),
}

/// Settings that must be absent, null, false or empty where an adapter is to be served, and why.
const NOT_SERVED: &[(&str, &str)] = &[
    ("use_dora", "DoRA scales the rows of the merged weight, which is no low-rank addition"),
    ("lora_bias", "biases of factors are not served"),
    ("modules_to_save", "modules that were trained as a whole are no low-rank addition"),
];

/// Settings that must be absent, null, false or empty, and why.
const OFF: &[(&str, &str)] = &[
    ("use_qalora", "QA-LoRA pools its inputs, which is not done here"),
    ("use_bdlora", "block-diagonal factors are not served"),
    ("use_arrow", "Arrow routes between adapters for each token, which is not done here"),
    ("arrow_config", "Arrow routes between adapters for each token, which is not done here"),
    ("alora_invocation_tokens", "aLoRA begins in the middle of a sequence, which is not done here"),
    ("trainable_token_indices", "changed embeddings are not served"),
    ("layer_replication", "a model with repeated layers is not the base any more"),
    ("target_parameters", "factors of bare parameters (experts) are not served"),
    ("fan_in_fan_out", "the linears of these models are not stored transposed"),
    ("kasa_config", "KaSA takes components away from the base"),
    ("megatron_config", "the linears of Megatron are sliced in another way"),
    ("monteclora_config", "factors that are drawn at random are not served"),
];

/// Initialisations that change the base, so that the factors fit no model that others have.
const MUTATING: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

impl Settings {
    pub fn parse(json: &[u8], for_what: Use) -> Result<Self> {
        let file: File = serde_json::from_slice(json)
            .map_err(|e| malformed(format!("{CONFIG} cannot be read: {e}")))?;
        let kind = match file.peft_type.as_deref() {
            Some("LORA") => Kind::Lora,
            Some("ADALORA") => Kind::AdaLora,
            Some(other) => {
                return Err(unsupported(
                    "peft_type",
                    format!("is {}, but only LORA and ADALORA are read", quoted(other)),
                ));
            }
            None => return Err(malformed(format!("{CONFIG} has no peft_type"))),
        };
        let serving = if for_what == Use::Serve { NOT_SERVED } else { &[] };
        for (key, reason) in OFF.iter().chain(serving) {
            if file.rest.get(*key).is_some_and(is_on) {
                return Err(unsupported(key, format!("is set: {reason}")));
            }
        }
        if let Some(bias) = file.bias.as_deref().filter(|b| *b != "none" && for_what == Use::Serve)
        {
            return Err(unsupported(
                "bias",
                format!("is {}, but only none is served", quoted(bias)),
            ));
        }
        if let Value::String(start) = &file.init_lora_weights {
            let start = start.to_ascii_lowercase();
            if MUTATING.iter().any(|m| start.starts_with(m)) {
                return Err(unsupported(
                    "init_lora_weights",
                    format!(
                        "is {}, which changes the base: save the adapter again with \
                         path_initial_model_for_weight_conversion",
                        quoted(&start)
                    ),
                ));
            }
        }
        let rank = match kind {
            Kind::Lora => file.r.unwrap_or(8),
            Kind::AdaLora => file.init_r.unwrap_or(12),
        };
        let alpha = file.lora_alpha.unwrap_or(8.0);
        if !alpha.is_finite() {
            return Err(malformed(format!("lora_alpha of {CONFIG} is not finite")));
        }
        Ok(Self {
            kind,
            dora: file.rest.get("use_dora").is_some_and(is_on),
            rank,
            alpha,
            rslora: file.use_rslora.unwrap_or(false),
            ranks: ranks(kind, file.rank_pattern)?,
            alphas: keys("alpha_pattern", file.alpha_pattern)?,
        })
    }

    /// The rank that a module's factors are to have.
    pub fn rank(&self, module: &str) -> u64 {
        find(&self.ranks, module).unwrap_or(self.rank)
    }

    /// What the product of a module's factors is multiplied by. AdaLoRA divides by the rank at the start.
    pub fn scale(&self, module: &str, rank: usize) -> Result<f64> {
        let alpha = find(&self.alphas, module).unwrap_or(self.alpha);
        let rank = rank as f64;
        let scale = match self.kind {
            Kind::AdaLora => {
                let first = self.rank as f64;
                (if alpha > 0.0 { alpha } else { first }) / (first + 1e-5)
            }
            Kind::Lora if self.rslora => alpha / rank.sqrt(),
            Kind::Lora => alpha / rank,
        };
        if (scale as f32).is_finite() {
            return Ok(scale);
        }
        Err(malformed(format!("the scale of module {} is not finite", quoted(module))))
    }
}

/// Ranks by key; AdaLoRA's keys are those of the modules' `lora_E`.
fn ranks(kind: Kind, pattern: Pattern<Ranks>) -> Result<Vec<(Key, u64)>> {
    let counts = pattern.0.into_iter().map(|(key, ranks)| match (kind, ranks) {
        (Kind::Lora, Ranks::Count(rank)) => Ok((key, rank)),
        (Kind::AdaLora, Ranks::Left(left)) => {
            let key = key.strip_suffix(".lora_E").unwrap_or(&key).to_owned();
            Ok((key, left.iter().filter(|left| **left).count() as u64))
        }
        _ => Err(malformed(format!("rank_pattern of {CONFIG} is that of another peft_type"))),
    });
    keys("rank_pattern", Pattern(counts.collect::<Result<_>>()?))
}

/// The first key that matches wins, as in PEFT.
fn find<T: Copy>(pattern: &[(Key, T)], module: &str) -> Option<T> {
    let matches = |key: &Key| match key {
        Key::Name(name) => {
            let rest = module.strip_suffix(name.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        }
        Key::Expression(expression) => expression.is_match(module),
    };
    pattern.iter().find(|(key, _)| matches(key)).map(|(_, value)| *value)
}

fn keys<T>(field: &str, pattern: Pattern<T>) -> Result<Vec<(Key, T)>> {
    let mut expressions = 0;
    let mut read = |(text, value): (String, T)| {
        // A dot of a name, which as an expression stands for any character, is meant as a dot.
        let plain = !text.is_empty()
            && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
        if plain {
            return Ok((Key::Name(text), value));
        }
        expressions += 1;
        if expressions > MAX_EXPRESSIONS {
            return Err(malformed(format!(
                "{field} of {CONFIG} has more than {MAX_EXPRESSIONS} regular expressions"
            )));
        }
        let compiled = RegexBuilder::new(&format!("^(?:.*\\.)?(?:{text})$"))
            .size_limit(EXPRESSION_BYTES)
            .dfa_size_limit(EXPRESSION_BYTES)
            .build();
        match compiled {
            Ok(expression) => Ok((Key::Expression(Box::new(expression)), value)),
            Err(_) => Err(unsupported(
                field,
                format!(
                    "has the key {}, which is no regular expression of linear time",
                    quoted(&text)
                ),
            )),
        }
    };
    pattern.0.into_iter().map(&mut read).collect()
}

/// False for what stands for a setting that is not used.
fn is_on(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    }
}

fn unsupported(key: &str, problem: impl std::fmt::Display) -> Error {
    Error::new(
        Reason::UnsupportedFormat,
        format!(
            "{key} of {CONFIG} {problem}; merge this adapter into its base and import that instead, \
             or train it anew without"
        ),
    )
}

/// A map in the order of the file, which decides between two keys that match.
struct Pattern<T>(Vec<(String, T)>);

impl<T> Default for Pattern<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pattern<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ordered<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Ordered<T> {
            type Value = Pattern<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of numbers by module")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Pattern::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    if entries.len() == MAX_PATTERN {
                        return Err(serde::de::Error::custom("a pattern has too many entries"));
                    }
                    entries.push(entry);
                }
                Ok(Pattern(entries))
            }
        }
        deserializer.deserialize_any(Ordered(std::marker::PhantomData))
    }
}
