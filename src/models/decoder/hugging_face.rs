//! Reading `config.json`: which keys each architecture has, their defaults, and what they may hold.

use serde_json::Value;

use super::config::{Activation, Config, LayerKind, Rope, RopeScaling};
use crate::error::{Error, Reason, Result};

/// More weights than any machine this runs on could hold; keeps all later size arithmetic far from
/// overflow.
pub(in crate::models) const MAX_PARAMETERS: u128 = 1 << 40;

impl Config {
    /// From `config.json`; every value is checked, unknown architectures are refused. Errors are
    /// `UNSUPPORTED_MODEL` and name the key.
    pub fn from_hugging_face(config: &Value) -> Result<Self> {
        let outer = Keys { map: config };
        if !config.is_object() {
            return Err(Error::new(
                Reason::UnsupportedModel,
                "config.json does not hold a JSON object; export the model again",
            ));
        }
        let mut architecture = outer.text("model_type")?.unwrap_or_default();
        let mut keys = outer;
        if architecture == "gemma3" {
            // The multimodal wrapper; its language model is an ordinary text model.
            keys = Keys { map: &config["text_config"] };
            architecture = "gemma3_text";
            if !keys.map.is_object() {
                return Err(refuse("text_config", "is missing; a gemma3 configuration needs it"));
            }
        }
        let defaults = match architecture {
            "llama" => Defaults { max_positions: 2048, ..Defaults::COMMON },
            "mistral" => Defaults { max_positions: 131_072, ..Defaults::COMMON },
            "qwen2" => Defaults { qkv_bias: true, ..Defaults::COMMON },
            "qwen3" => Defaults { head_dim: Some(128), ..Defaults::COMMON },
            "gemma3_text" => Defaults {
                head_dim: Some(256),
                theta: 1e6,
                max_positions: 131_072,
                activation: ("hidden_activation", Activation::GeluTanh),
                tied: true,
                ..Defaults::COMMON
            },
            other => {
                return Err(refuse(
                    "model_type",
                    format!(
                        "'{other}' is not supported; use llama, mistral, qwen2, qwen3, gemma3_text or \
                         bert"
                    ),
                ));
            }
        };
        let gemma = architecture == "gemma3_text";
        if keys.present("quantization_config") || outer.present("quantization_config") {
            return Err(refuse(
                "quantization_config",
                "checkpoints in another library's quantised form are not read; import the original \
                 weights",
            ));
        }

        let hidden = keys.size("hidden_size", None, 1 << 17)?;
        let layers = keys.size("num_hidden_layers", None, 1024)?;
        let heads = keys.size("num_attention_heads", None, 4096)?;
        let kv_heads = keys.size("num_key_value_heads", Some(heads), 4096)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(refuse(
                "num_key_value_heads",
                format!("{kv_heads} does not divide num_attention_heads, {heads}"),
            ));
        }
        let head_dim = match (keys.present("head_dim"), defaults.head_dim) {
            (false, None) if !hidden.is_multiple_of(heads) => {
                return Err(refuse(
                    "num_attention_heads",
                    format!(
                        "{heads} does not divide hidden_size, {hidden}, and head_dim is missing"
                    ),
                ));
            }
            (_, default) => keys.size("head_dim", default.or(Some(hidden / heads)), 1024)?,
        };
        if !head_dim.is_multiple_of(2) {
            return Err(refuse(
                "head_dim",
                format!("{head_dim} is odd; rotary embeddings turn pairs of channels"),
            ));
        }
        if keys.number("partial_rotary_factor", 1.0, 0.0..=1.0)? != 1.0 {
            return Err(refuse("partial_rotary_factor", "only 1 is supported"));
        }
        if keys.flag("use_bidirectional_attention", false)? {
            return Err(refuse("use_bidirectional_attention", "only false is supported"));
        }

        let position_key =
            keys.size("max_position_embeddings", Some(defaults.max_positions), 1 << 24)?;
        let (rope, local_rope) = ropes(&keys, &defaults, gemma, position_key)?;
        let max_positions = match rope.scaling {
            RopeScaling::Dynamic { factor, original }
            | RopeScaling::Yarn { factor, original, .. } => {
                let stretched = (original as f64 * f64::from(factor)) as usize;
                position_key.max(stretched).min(1 << 24)
            }
            _ => position_key,
        };
        let (kinds, window) = layer_kinds(&keys, architecture, layers)?;
        let attention_bias = match architecture {
            "llama" | "qwen3" | "gemma3_text" => keys.flag("attention_bias", false)?,
            _ => false,
        };
        let scale = match gemma {
            true => keys.number("query_pre_attn_scalar", 256.0, 1e-6..=1e9)?,
            false => head_dim as f64,
        };

        let widths = keys.sizes("intermediate_size", layers, 1 << 20)?;
        let mut config = Self {
            architecture: architecture.to_owned(),
            vocab: keys.size("vocab_size", None, 1 << 24)?,
            hidden,
            intermediate: match &widths {
                Some(_) => 0,
                None => keys.size("intermediate_size", None, 1 << 20)?,
            },
            widths: Vec::new(),
            layers: kinds,
            heads,
            kv_heads,
            head_dim,
            norm_eps: keys.number("rms_norm_eps", 1e-6, 1e-30..=0.1)? as f32,
            norm_offset: gemma,
            post_norms: gemma,
            activation: activation(&keys, defaults.activation)?,
            qkv_bias: defaults.qkv_bias || attention_bias,
            output_bias: attention_bias,
            // Hugging Face knows it of llama; channels that were removed may leave biases in any.
            mlp_bias: keys.flag("mlp_bias", false)?,
            qk_norm: matches!(architecture, "qwen3" | "gemma3_text"),
            // Hugging Face rounds this factor to the type of the embedding; activations here are f32.
            embedding_scale: if gemma { (hidden as f64).sqrt() as f32 } else { 1.0 },
            attention_scale: (1.0 / scale.sqrt()) as f32,
            rope,
            local_rope,
            window,
            attention_softcap: keys.softcap("attn_logit_softcapping", gemma)?,
            final_softcap: keys.softcap("final_logit_softcapping", gemma)?,
            tied: match keys.present("tie_word_embeddings") {
                true => keys.flag("tie_word_embeddings", defaults.tied)?,
                false => outer.flag("tie_word_embeddings", defaults.tied)?,
            },
            max_positions,
        };
        if let Some(widths) = &widths {
            config.set_widths(widths);
        }
        let per_layer = 2 * (config.query_channels() as u128 + config.key_channels() as u128)
            + 3 * config.intermediate as u128;
        let parameters = hidden as u128 * (per_layer * layers as u128 + 2 * config.vocab as u128);
        if parameters > MAX_PARAMETERS {
            return Err(Error::new(
                Reason::UnsupportedModel,
                format!("config.json describes {parameters} weights; at most 2^40 are supported"),
            ));
        }
        Ok(config)
    }
}

/// What an architecture takes when a key is absent.
struct Defaults {
    head_dim: Option<usize>,
    theta: f64,
    max_positions: usize,
    activation: (&'static str, Activation),
    qkv_bias: bool,
    tied: bool,
}

impl Defaults {
    const COMMON: Self = Self {
        head_dim: None,
        theta: 1e4,
        max_positions: 32_768,
        activation: ("hidden_act", Activation::Silu),
        qkv_bias: false,
        tied: false,
    };
}

pub(in crate::models) fn refuse(key: &str, description: impl Into<String>) -> Error {
    Error::at(Reason::UnsupportedModel, format!("config.{key}"), description)
}

/// Checked look-ups in a JSON object. A key that holds null counts as absent.
#[derive(Clone, Copy)]
pub(in crate::models) struct Keys<'a> {
    pub map: &'a Value,
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub fn present(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key).map(|v| v.as_str().ok_or_else(|| refuse(key, "is not a string"))).transpose()
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| refuse(key, "is not true or false")),
        }
    }

    /// A whole number in `1..=most`; without a default the key must be there.
    pub fn size(&self, key: &str, default: Option<usize>, most: usize) -> Result<usize> {
        let Some(value) = self.get(key) else {
            return match default {
                Some(value) if value <= most => Ok(value),
                Some(value) => Err(refuse(key, format!("would be {value}; at most {most}"))),
                None => Err(refuse(key, "is missing")),
            };
        };
        let whole = value
            .as_u64()
            .or_else(|| value.as_f64().filter(|v| v.fract() == 0.0 && *v >= 0.0).map(|v| v as u64));
        match whole {
            Some(n) if n >= 1 && n <= most as u64 => Ok(n as usize),
            _ => Err(refuse(key, format!("{} is not a whole number in 1..={most}", brief(value)))),
        }
    }

    /// A list of `count` whole numbers in `1..=most`; `None` where the key holds something else.
    pub fn sizes(&self, key: &str, count: usize, most: usize) -> Result<Option<Vec<usize>>> {
        let Some(list) = self.get(key).and_then(Value::as_array) else { return Ok(None) };
        if list.len() != count {
            return Err(refuse(key, format!("has {} entries for {count} layers", list.len())));
        }
        let whole = |value: &Value| match value.as_u64() {
            Some(n) if n >= 1 && n <= most as u64 => Ok(n as usize),
            _ => Err(refuse(key, format!("{} is not a whole number in 1..={most}", brief(value)))),
        };
        list.iter().map(whole).collect::<Result<_>>().map(Some)
    }

    pub fn number(
        &self,
        key: &str,
        default: f64,
        range: std::ops::RangeInclusive<f64>,
    ) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => match v.as_f64() {
                Some(n) if range.contains(&n) => Ok(n),
                _ => Err(refuse(
                    key,
                    format!("{} is not in [{}, {}]", brief(v), range.start(), range.end()),
                )),
            },
        }
    }

    fn softcap(&self, key: &str, known: bool) -> Result<Option<f32>> {
        match known && self.present(key) {
            true => Ok(Some(self.number(key, 0.0, 1e-3..=1e6)? as f32)),
            false => Ok(None),
        }
    }
}

/// A value for a message; hostile files must not make messages long.
fn brief(value: &Value) -> String {
    match value {
        Value::Number(n) => n.to_string(),
        Value::Bool(b) => b.to_string(),
        Value::String(s) => format!("'{}'", s.chars().take(40).collect::<String>()),
        Value::Null => "null".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

fn activation(keys: &Keys<'_>, (key, default): (&str, Activation)) -> Result<Activation> {
    match keys.text(key)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
        Some(other) => Err(refuse(
            key,
            format!(
                "'{}' is not supported; use silu or gelu_pytorch_tanh",
                other.chars().take(40).collect::<String>()
            ),
        )),
    }
}

/// Which layers are local, and how far those see.
fn layer_kinds(
    keys: &Keys<'_>,
    architecture: &str,
    layers: usize,
) -> Result<(Vec<LayerKind>, Option<usize>)> {
    let global = vec![LayerKind::Global; layers];
    let windowed = match architecture {
        "llama" => false,
        "qwen2" | "qwen3" => keys.flag("use_sliding_window", false)?,
        _ => true,
    };
    let window = match (windowed, architecture) {
        (false, _) => None,
        (true, "mistral") if !keys.present("sliding_window") => None,
        (true, _) => Some(keys.size("sliding_window", Some(4096), 1 << 24)?),
    };
    let listed = keys.get("layer_types").filter(|_| architecture != "llama");
    let kinds = if let Some(listed) = listed {
        let listed = listed.as_array().ok_or_else(|| refuse("layer_types", "is not a list"))?;
        if listed.len() != layers {
            return Err(refuse(
                "layer_types",
                format!("has {} entries for {layers} layers", listed.len()),
            ));
        }
        listed
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(LayerKind::Global),
                Some("sliding_attention") if window.is_some() => Ok(LayerKind::Local),
                Some("sliding_attention") => {
                    Err(refuse("sliding_window", "is missing, but layer_types has local layers"))
                }
                _ => Err(refuse(
                    "layer_types",
                    format!("{} is neither full_attention nor sliding_attention", brief(kind)),
                )),
            })
            .collect::<Result<Vec<_>>>()?
    } else if window.is_none() {
        global
    } else {
        // The first global layer of each pattern, or the first local one, by architecture.
        let local: Box<dyn Fn(usize) -> bool> = match architecture {
            "gemma3_text" => {
                let pattern = keys.size("sliding_window_pattern", Some(6), 1 << 20)?;
                Box::new(move |i| !(i + 1).is_multiple_of(pattern))
            }
            "qwen2" | "qwen3" => {
                // 0 is meant here: every layer slides.
                let first = match keys.get("max_window_layers").and_then(Value::as_u64) {
                    Some(0) => 0,
                    _ => keys.size("max_window_layers", Some(28), 1 << 20)?,
                };
                Box::new(move |i| i >= first)
            }
            _ => Box::new(|_| true),
        };
        (0..layers).map(|i| if local(i) { LayerKind::Local } else { LayerKind::Global }).collect()
    };
    // A window that no layer uses is no setting of the model.
    let window = window.filter(|_| kinds.contains(&LayerKind::Local));
    Ok((kinds, window))
}

/// Rotary settings of global and local layers, from the keys of either generation of configurations:
/// `rope_theta` + `rope_scaling` (+ `rope_local_base_freq`), or `rope_parameters`, flat or by kind of
/// layer.
fn ropes(
    keys: &Keys<'_>,
    defaults: &Defaults,
    gemma: bool,
    positions: usize,
) -> Result<(Rope, Option<Rope>)> {
    const THETA: std::ops::RangeInclusive<f64> = 1.0001..=1e12;
    let theta = keys.number("rope_theta", defaults.theta, THETA)?;
    let local_theta = keys.number("rope_local_base_freq", 1e4, THETA)?;
    let read = |key: &str, value: &Value, theta: f64| -> Result<Rope> {
        if !value.is_object() {
            return Err(refuse(key, format!("{} is not an object", brief(value))));
        }
        rope(&Keys { map: value }, theta, positions).map_err(|error| error.within(key))
    };
    let plain = |theta: f64| Rope { theta: theta as f32, scaling: RopeScaling::None };
    let by_kind = keys.get("rope_parameters");
    let global = match by_kind {
        Some(p) if p.get("full_attention").is_some() => {
            read("rope_parameters.full_attention", &p["full_attention"], theta)?
        }
        Some(p) => read("rope_parameters", p, theta)?,
        None => match keys.get("rope_scaling") {
            Some(s) => read("rope_scaling", s, theta)?,
            None => plain(theta),
        },
    };
    let local = match by_kind.and_then(|p| p.get("sliding_attention")) {
        Some(p) => Some(read("rope_parameters.sliding_attention", p, local_theta)?),
        None => gemma.then(|| plain(local_theta)),
    };
    Ok((global, local))
}

fn rope(keys: &Keys<'_>, theta: f64, positions: usize) -> Result<Rope> {
    let theta = keys.number("rope_theta", theta, 1.0001..=1e12)?;
    if keys.number("partial_rotary_factor", 1.0, 0.0..=1.0)? != 1.0 {
        return Err(refuse("partial_rotary_factor", "only 1 is supported"));
    }
    let kind = match keys.text("rope_type")? {
        Some(kind) => kind,
        None => keys.text("type")?.unwrap_or("default"),
    };
    let factor = || match keys.present("factor") {
        true => Ok(keys.number("factor", 1.0, 1.0..=1024.0)? as f32),
        false => Err(refuse("factor", "is missing")),
    };
    let original = || keys.size("original_max_position_embeddings", Some(positions), 1 << 24);
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic { factor: factor()?, original: original()? },
        "llama3" => {
            let low = keys.number("low_freq_factor", 1.0, 1e-3..=1e4)? as f32;
            let high = keys.number("high_freq_factor", 4.0, 1e-3..=1e4)? as f32;
            if low >= high {
                return Err(refuse(
                    "high_freq_factor",
                    format!("{high} is not above low_freq_factor, {low}"),
                ));
            }
            RopeScaling::Llama3 { factor: factor()?, low, high, original: original()? }
        }
        "yarn" => {
            if !keys.flag("truncate", true)? {
                return Err(refuse("truncate", "only true is supported"));
            }
            let factor = factor()?;
            let beta_fast = keys.number("beta_fast", 32.0, 1e-3..=1e6)? as f32;
            let beta_slow = keys.number("beta_slow", 1.0, 1e-3..=1e6)? as f32;
            if beta_slow > beta_fast {
                return Err(refuse(
                    "beta_slow",
                    format!("{beta_slow} is above beta_fast, {beta_fast}"),
                ));
            }
            let mscale = |m: f64| 0.1 * m * f64::from(factor).ln() + 1.0;
            let attention_factor = if keys.present("attention_factor") {
                Some(keys.number("attention_factor", 1.0, 1e-3..=1e3)? as f32)
            } else if keys.present("mscale") && keys.present("mscale_all_dim") {
                let top = keys.number("mscale", 1.0, 0.0..=1e3)?;
                let bottom = keys.number("mscale_all_dim", 1.0, 0.0..=1e3)?;
                // Zero switches either off in the configurations that carry them.
                (top > 0.0 && bottom > 0.0).then(|| (mscale(top) / mscale(bottom)) as f32)
            } else {
                None
            };
            RopeScaling::Yarn {
                factor,
                original: original()?,
                beta_fast,
                beta_slow,
                attention_factor,
            }
        }
        other => {
            return Err(refuse(
                "rope_type",
                format!(
                    "'{}' is not supported; use default, linear, dynamic, llama3 or yarn",
                    other.chars().take(40).collect::<String>()
                ),
            ));
        }
    };
    Ok(Rope { theta: theta as f32, scaling })
}
