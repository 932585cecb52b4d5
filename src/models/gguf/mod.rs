//! How GGUF files write a decoder: names, order of rows, settings. Import and export share this, so
//! that what one does the other undoes.

mod settings;

use super::decoder::Config;
use crate::error::{Error, Result};

pub(super) use settings::{from_config, rope_factors, to_config};

/// Tensor that holds the factors of Llama 3's rotary scaling.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Parts of a block: Hugging Face name, GGUF name.
const BLOCK: [(&str, &str); 12] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// The GGUF name of a tensor of a decoder.
pub(super) fn tensor_name(config: &Config, name: &str) -> Result<String> {
    let unknown = || Error::internal(format!("tensor '{name}' has no name in GGUF files"));
    Ok(match name {
        "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
        "model.norm.weight" => "output_norm.weight".to_owned(),
        "lm_head.weight" => "output.weight".to_owned(),
        _ => {
            let (layer, rest) = name
                .strip_prefix("model.layers.")
                .and_then(|rest| rest.split_once('.'))
                .ok_or_else(unknown)?;
            let (module, kind) = rest.rsplit_once('.').ok_or_else(unknown)?;
            let module = match module {
                // The same Hugging Face name stands for the norm before the feed-forward network or,
                // where blocks have four norms, for the one after attention.
                "post_attention_layernorm" if config.post_norms => "post_attention_norm",
                "post_attention_layernorm" => "ffn_norm",
                _ => BLOCK.iter().find(|(hf, _)| *hf == module).ok_or_else(unknown)?.1,
            };
            format!("blk.{layer}.{module}.{kind}")
        }
    })
}

/// The row order of a tensor in GGUF files, where it differs: row `r` there is row `order[r]` here.
/// Files of the `llama` architecture have the two halves of each rotated head interleaved.
pub(super) fn row_order(config: &Config, name: &str) -> Option<Vec<usize>> {
    let heads = match name.rsplit('.').nth(1)? {
        _ if !interleaved(config) => return None,
        "q_proj" => config.heads,
        "k_proj" => config.kv_heads,
        _ => return None,
    };
    let half = config.head_dim / 2;
    let head = |h| (0..half).flat_map(move |i| [2 * half * h + i, 2 * half * h + half + i]);
    Some((0..heads).flat_map(head).collect())
}

/// The order that undoes `order`.
pub(super) fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    for (to, &from) in order.iter().enumerate() {
        inverse[from] = to;
    }
    inverse
}

/// Whether the architecture's files interleave the rows of rotated heads.
fn interleaved(config: &Config) -> bool {
    matches!(config.architecture.as_str(), "llama" | "mistral")
}

/// Whether a tensor is a norm that GGUF files hold with 1 added.
pub(super) fn shifted_norm(config: &Config, name: &str) -> bool {
    config.norm_offset && name.ends_with("norm.weight")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::decoder::random::tiny;

    fn config(architecture: &str) -> Config {
        Config::from_hugging_face(&tiny(architecture)).unwrap()
    }

    #[test]
    fn every_tensor_has_a_name_of_its_own() {
        for architecture in ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"] {
            let config = config(architecture);
            let mut names: Vec<_> = config
                .tensors()
                .iter()
                .map(|(name, _)| tensor_name(&config, name).unwrap())
                .collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{architecture}");
        }
        let gemma = config("gemma3_text");
        let name = "model.layers.2.post_attention_layernorm.weight";
        assert_eq!(tensor_name(&gemma, name).unwrap(), "blk.2.post_attention_norm.weight");
        assert_eq!(tensor_name(&config("llama"), name).unwrap(), "blk.2.ffn_norm.weight");
        assert!(tensor_name(&gemma, "model.layers.0.mlp.experts.weight").is_err());
    }

    #[test]
    fn halves_of_rotated_heads_interleave() {
        let mut llama = config("llama");
        (llama.heads, llama.kv_heads, llama.head_dim) = (2, 1, 4);
        let order = row_order(&llama, "model.layers.0.self_attn.q_proj.weight").unwrap();
        assert_eq!(order, [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(
            row_order(&llama, "model.layers.0.self_attn.k_proj.bias").unwrap(),
            [0, 2, 1, 3]
        );
        assert_eq!(row_order(&llama, "model.layers.0.self_attn.v_proj.weight"), None);
        assert_eq!(row_order(&config("qwen2"), "model.layers.0.self_attn.q_proj.weight"), None);
        llama.head_dim = 6;
        let order = row_order(&llama, "model.layers.0.self_attn.k_proj.weight").unwrap();
        assert_eq!(order, [0, 3, 1, 4, 2, 5]);
        assert_eq!(inverse(&order), [0, 2, 4, 1, 3, 5]);
    }
}
