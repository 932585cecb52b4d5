//! A decoder's settings: GGUF metadata to `config.json`, and a configuration to GGUF metadata.

use serde_json::{Map, Value as Json, json};

use crate::error::{Error, Reason, Result};
use crate::formats::gguf::{Array, File, Metadata, Value, missing};
use crate::models::decoder::{Config, LayerKind, Rope, RopeScaling};

/// Every sixth layer of Gemma 3 is global; readers take that for granted.
const GEMMA_PATTERN: usize = 6;

/// Rotary base of Gemma 3's local layers.
const GEMMA_LOCAL_BASE: f32 = 10_000.0;

fn refuse(message: impl Into<String>) -> Error {
    Error::new(Reason::UnsupportedModel, message)
}

/// Metadata below the prefix of the file's architecture.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        self.metadata.unsigned(&self.key(key))
    }

    fn need(&self, key: &str) -> Result<u64> {
        self.size(key)?.ok_or_else(|| missing(&self.key(key)))
    }

    fn float(&self, key: &str) -> Result<Option<f32>> {
        self.metadata.float(&self.key(key))
    }
}

/// The `config.json` that describes the model of a GGUF file.
///
/// # Errors
/// `UNSUPPORTED_MODEL` for architectures and settings that are not supported, `MALFORMED_FILE` for
/// metadata that is missing or of the wrong type.
pub(in crate::models) fn to_config(file: &File) -> Result<Json> {
    let metadata = &file.metadata;
    check_kind(metadata)?;
    let architecture =
        metadata.text("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
    let keys = Keys { metadata, architecture };
    let has = |name: &str| file.tensors.contains_key(name);
    let (model_type, class) = match architecture {
        // Mistral's files call themselves llama; what tells them apart is the window.
        "llama" if keys.size("attention.sliding_window")?.is_some_and(|n| n > 0) => {
            ("mistral", "MistralForCausalLM")
        }
        "llama" => ("llama", "LlamaForCausalLM"),
        "qwen2" => ("qwen2", "Qwen2ForCausalLM"),
        "qwen3" => ("qwen3", "Qwen3ForCausalLM"),
        "gemma3" => ("gemma3_text", "Gemma3ForCausalLM"),
        other => {
            return Err(refuse(format!(
                "the GGUF architecture '{}' is not supported; use llama, qwen2, qwen3 or gemma3",
                other.chars().take(40).collect::<String>()
            )));
        }
    };
    let gemma = architecture == "gemma3";
    if keys.size("expert_count")?.is_some_and(|n| n > 0) {
        return Err(refuse("models with experts are not supported; use a dense model"));
    }

    let embedding =
        file.tensors.get("token_embd.weight").ok_or_else(|| absent("token_embd.weight"))?;
    let hidden = keys.need("embedding_length")?;
    let layers = keys.need("block_count")?;
    let heads = keys.need("attention.head_count")?;
    let head_dim = match keys.size("attention.key_length")? {
        Some(n) => n,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(missing(&keys.key("attention.key_length"))),
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(n) = keys.size(key)?.filter(|&n| n != head_dim) {
            return Err(refuse(format!(
                "{} is {n} but heads have {head_dim} channels; only equal sizes are supported",
                keys.key(key)
            )));
        }
    }
    let epsilon = "attention.layer_norm_rms_epsilon";
    let epsilon = keys.float(epsilon)?.ok_or_else(|| missing(&keys.key(epsilon)))?;
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);

    let mut config = Map::new();
    let mut set = |key: &str, value: Json| config.insert(key.to_owned(), value);
    set("architectures", json!([class]));
    set("model_type", json!(model_type));
    set("vocab_size", json!(embedding.shape[0]));
    set("hidden_size", json!(hidden));
    set("intermediate_size", widths(&keys)?);
    set("num_hidden_layers", json!(layers));
    set("num_attention_heads", json!(heads));
    set("num_key_value_heads", json!(keys.size("attention.head_count_kv")?.unwrap_or(heads)));
    set("head_dim", json!(head_dim));
    set("rms_norm_eps", number(epsilon));
    set("rope_theta", number(theta));
    set("max_position_embeddings", json!(keys.need("context_length")?));
    set("tie_word_embeddings", json!(!has("output.weight")));
    if matches!(architecture, "llama" | "qwen3" | "gemma3") {
        set("attention_bias", json!(has("blk.0.attn_q.bias")));
    }
    if gemma {
        set("hidden_activation", json!("gelu_pytorch_tanh"));
        // Readers derive the scale from the size of the model; only the largest is an exception.
        let scalar = if layers == 62 { hidden / heads.max(1) } else { head_dim };
        set("query_pre_attn_scalar", json!(scalar));
        let local = keys.float("rope.freq_base_swa")?.unwrap_or(GEMMA_LOCAL_BASE);
        set("rope_local_base_freq", number(local));
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(cap) = keys.float(key)? {
                set(key, number(cap));
            }
        }
    } else {
        set("hidden_act", json!("silu"));
    }
    if !gemma || has("blk.0.ffn_gate.bias") {
        set("mlp_bias", json!(has("blk.0.ffn_gate.bias")));
    }
    if let Some(window) = keys.size("attention.sliding_window")?.filter(|&n| n > 0) {
        set("sliding_window", json!(window));
        set("use_sliding_window", json!(true));
        set("layer_types", layer_types(&keys, layers, gemma)?);
    } else if gemma {
        // Without a window no layer is local, whatever the pattern.
        check_layers(layers)?;
        set("layer_types", (0..layers).map(|_| "full_attention").collect());
    }
    let mut scaling = rope_scaling(&keys)?;
    if let Some(factors) = file.tensors.get(super::ROPE_FACTORS) {
        let factors = factors.weight()?.to_f32();
        if let Some(llama3) = llama3_scaling(&factors, theta, head_dim)? {
            if scaling.is_some() {
                return Err(refuse("the file scales its rotary frequencies twice"));
            }
            scaling = Some(llama3);
        }
    }
    if let Some(scaling) = scaling {
        set("rope_scaling", scaling);
    }
    Ok(Json::Object(config))
}

/// Refuses files that hold something else than one whole model.
fn check_kind(metadata: &Metadata) -> Result<()> {
    if let Some(kind) = metadata.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(refuse(format!(
            "the GGUF file holds a '{}', not a model; name the model's file",
            kind.chars().take(40).collect::<String>()
        )));
    }
    if metadata.unsigned("split.count")?.is_some_and(|n| n > 1) {
        return Err(refuse(
            "the GGUF file is one of several that make a model; merge them with llama-gguf-split",
        ));
    }
    Ok(())
}

fn absent(name: &str) -> Error {
    Error::new(
        Reason::MalformedFile,
        format!("tensor '{name}' is missing from the GGUF file; convert the model again"),
    )
}

/// A float with the fewest digits that mean the same f32: 1e-6, not 9.99999997e-7.
fn number(value: f32) -> Json {
    json!(value.to_string().parse::<f64>().unwrap_or_else(|_| value.into()))
}

/// Keeps a lie about the number of layers from becoming a long list.
fn check_layers(layers: u64) -> Result<()> {
    if layers > 1 << 16 {
        return Err(refuse(format!("{layers} layers are not supported")));
    }
    Ok(())
}

/// The pattern is a flag for each layer (true is local), a period, or the architecture's own.
fn layer_types(keys: &Keys<'_>, layers: u64, gemma: bool) -> Result<Json> {
    check_layers(layers)?;
    let key = keys.key("attention.sliding_window_pattern");
    let local: Vec<bool> = match keys.metadata.get(&key) {
        Some(Value::Array(Array::Bool(flags))) => flags.clone(),
        _ => {
            let own = if gemma { GEMMA_PATTERN as u64 } else { 0 };
            let period = keys.metadata.unsigned(&key)?.unwrap_or(own);
            (1..=layers).map(|i| period == 0 || i % period != 0).collect()
        }
    };
    let name = |local| if local { "sliding_attention" } else { "full_attention" };
    Ok(local.into_iter().map(name).collect())
}

/// Channels of the feed-forward networks: one number, or one for each block.
fn widths(keys: &Keys<'_>) -> Result<Json> {
    const KEY: &str = "feed_forward_length";
    Ok(match keys.metadata.get(&keys.key(KEY)) {
        Some(Value::Array(Array::U32(widths))) => json!(widths),
        Some(Value::Array(Array::I32(widths))) => json!(widths),
        _ => json!(keys.need(KEY)?),
    })
}

fn rope_scaling(keys: &Keys<'_>) -> Result<Option<Json>> {
    let kind = keys.metadata.text(&keys.key("rope.scaling.type"))?;
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    Ok(match (kind, factor) {
        (None | Some("linear"), Some(factor)) if factor != 1.0 => {
            Some(json!({ "rope_type": "linear", "factor": number(factor) }))
        }
        (None | Some("none" | "linear"), _) => None,
        (Some("yarn"), Some(factor)) => {
            let mut scaling = Map::new();
            let mut set = |key: &str, value: Json| scaling.insert(key.to_owned(), value);
            set("rope_type", json!("yarn"));
            set("factor", number(factor));
            if let Some(n) = keys.size("rope.scaling.original_context_length")? {
                set("original_max_position_embeddings", json!(n));
            }
            for (key, ours) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(beta) = keys.float(&format!("rope.scaling.{key}"))? {
                    set(ours, number(beta));
                }
            }
            // There a factor on top of the usual one, here the whole factor.
            if let Some(attention) = keys.float("rope.scaling.attn_factor")?.filter(|&f| f != 1.0) {
                set("attention_factor", number(attention * yarn_attention(factor)));
            }
            Some(Json::Object(scaling))
        }
        (Some(kind), _) => {
            return Err(refuse(format!(
                "rotary scaling of type '{}' is not supported, or its factor is missing",
                kind.chars().take(40).collect::<String>()
            )));
        }
    })
}

fn yarn_attention(factor: f32) -> f32 {
    0.1 * factor.ln() + 1.0
}

/// Factors by which Llama 3's scaling stretches the wavelength of each pair of channels.
pub(in crate::models) fn rope_factors(rope: &Rope, head_dim: usize) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low, high, original } = rope.scaling else { return None };
    let (factor, low, high) = (f64::from(factor), f64::from(low), f64::from(high));
    let stretch = |pair: usize| {
        let exponent = 2.0 * pair as f64 / head_dim as f64;
        let wavelength = std::f64::consts::TAU * f64::from(rope.theta).powf(exponent);
        let turns = original as f64 / wavelength;
        if turns > high {
            1.0
        } else if turns < low {
            factor
        } else {
            let smooth = (turns - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Some((0..head_dim / 2).map(|pair| stretch(pair) as f32).collect())
}

/// The scaling whose factors these are. The factors alone do not give its settings back, but all
/// published models share all of them except the factor itself, which the slowest pair shows.
fn llama3_scaling(factors: &[f32], theta: f32, head_dim: u64) -> Result<Option<Json>> {
    if factors.iter().all(|f| *f == 1.0) {
        return Ok(None);
    }
    let (low, high, original) = (1.0, 4.0, 8192);
    let factor = factors.last().copied().unwrap_or(1.0);
    let scaling = RopeScaling::Llama3 { factor, low, high, original };
    let fits = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-3 * b.abs();
    let known = usize::try_from(head_dim)
        .ok()
        .filter(|n| n / 2 == factors.len())
        .and_then(|n| rope_factors(&Rope { theta, scaling }, n))
        .is_some_and(|expected| factors.iter().zip(&expected).all(fits));
    if !known {
        return Err(refuse(format!(
            "{} holds other factors than Llama 3's; only its rotary scaling is supported",
            super::ROPE_FACTORS
        )));
    }
    Ok(Some(json!({
        "rope_type": "llama3",
        "factor": number(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    })))
}

/// The metadata that describes a decoder, without tokenizer and file type.
///
/// # Errors
/// `UNSUPPORTED_MODEL` for settings that readers of GGUF files would not see.
pub(in crate::models) fn from_config(config: &Config) -> Result<Metadata> {
    let name = match config.architecture.as_str() {
        "llama" | "mistral" => "llama",
        "qwen2" => "qwen2",
        "qwen3" => "qwen3",
        "gemma3_text" => "gemma3",
        other => return Err(refuse(format!("'{other}' models have no GGUF form here"))),
    };
    check_derived(config, name == "gemma3")?;
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", Value::String(name.to_owned()));
    metadata.set("general.type", Value::String("model".to_owned()));
    let mut set = |key: &str, value: Value| metadata.set(format!("{name}.{key}"), value);
    // All sizes of a checked configuration are far below 2^32.
    let size = |n: usize| Value::U32(n as u32);
    set("block_count", size(config.layers.len()));
    set("embedding_length", size(config.hidden));
    set(
        "feed_forward_length",
        match config.widths.as_slice() {
            [] => size(config.intermediate),
            widths => Value::Array(Array::U32(widths.iter().map(|w| *w as u32).collect())),
        },
    );
    set("vocab_size", size(config.vocab));
    set("attention.head_count", size(config.heads));
    set("attention.head_count_kv", size(config.kv_heads));
    set("attention.key_length", size(config.head_dim));
    set("attention.value_length", size(config.head_dim));
    set("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps));
    set("rope.dimension_count", size(config.head_dim));
    set("rope.freq_base", Value::F32(config.rope.theta));
    let mut positions = config.max_positions;
    match config.rope.scaling {
        // Llama 3's travels as a tensor.
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            set("rope.scaling.type", Value::String("linear".to_owned()));
            set("rope.scaling.factor", Value::F32(factor));
        }
        // It does nothing within the trained length, and files cannot ask for it beyond.
        RopeScaling::Dynamic { original, .. } => positions = positions.min(original),
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor } => {
            set("rope.scaling.type", Value::String("yarn".to_owned()));
            set("rope.scaling.factor", Value::F32(factor));
            set("rope.scaling.original_context_length", size(original));
            set("rope.scaling.yarn_beta_fast", Value::F32(beta_fast));
            set("rope.scaling.yarn_beta_slow", Value::F32(beta_slow));
            if let Some(attention) = attention_factor {
                let extra = attention / yarn_attention(factor);
                set("rope.scaling.attn_factor", Value::F32(extra));
            }
        }
    }
    set("context_length", size(positions));
    if let Some(window) = config.window {
        set("attention.sliding_window", size(window));
        let local: Vec<bool> = config.layers.iter().map(|k| *k == LayerKind::Local).collect();
        let period = |i: usize| !(i + 1).is_multiple_of(GEMMA_PATTERN);
        if name != "gemma3" || local.iter().enumerate().any(|(i, l)| *l != period(i)) {
            set("attention.sliding_window_pattern", Value::Array(Array::Bool(local)));
        }
    }
    if let Some(local) = config.local_rope.as_ref().filter(|r| r.theta != GEMMA_LOCAL_BASE) {
        set("rope.freq_base_swa", Value::F32(local.theta));
    }
    Ok(metadata)
}

/// Refuses what readers derive differently and files cannot say.
fn check_derived(config: &Config, gemma: bool) -> Result<()> {
    let no_form = |what: &str| {
        Err(refuse(format!(
            "{what} has no form in GGUF files; export a Hugging Face folder instead"
        )))
    };
    let scalar = match gemma && config.layers.len() == 62 {
        true => config.hidden / config.heads,
        false => config.head_dim,
    };
    let scale = 1.0 / (scalar as f32).sqrt();
    if (config.attention_scale / scale - 1.0).abs() > 1e-5 {
        return no_form("this model's attention scale");
    }
    if config.attention_softcap.is_some() || config.final_softcap.is_some() {
        return no_form("soft-capping in this architecture");
    }
    if config.local_rope.as_ref().is_some_and(|r| r.scaling != RopeScaling::None) {
        return no_form("rotary scaling of local layers");
    }
    if !gemma && config.local_rope.as_ref().is_some_and(|r| *r != config.rope) {
        return no_form("another rotary base for local layers");
    }
    Ok(())
}
