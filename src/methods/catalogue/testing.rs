//! A model and steps that every method can be checked with.

use serde_json::json;

use crate::models::{AnyInfo, Family, ModelInfo, TensorInfo, decoder};
use crate::nn::weight::Record;
use crate::proto::v1;

/// A decoder of 16 blocks in 16 bits, without its data.
pub fn reference() -> AnyInfo {
    let config = json!({
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8,
        "max_position_embeddings": 2048, "tie_word_embeddings": true,
    });
    let family = decoder::Config::from_hugging_face(&config).unwrap();
    let info = |(name, shape): (String, Vec<usize>)| {
        let bytes = 2 * shape.iter().product::<usize>() as u64;
        (name, TensorInfo { record: Record::Dense { shape: shape.clone() }, shape, bytes })
    };
    let tensors = family.tensors().into_iter().map(info).collect();
    ModelInfo { family: Family::Decoder(family), config, has_tokenizer: true, tensors }.into()
}

/// A step of the method with as few options as it takes.
pub fn step(name: &str) -> v1::Step {
    let options = match name {
        "train" | "gradual" => json!({ "training": { "dataset": "datasets/d", "steps": 10 } }),
        "mag_sp" | "wanda_sp" | "flap" | "cfsp" => json!({ "ratio": 0.25, "round_to": 128 }),
        "low_rank" => json!({ "drop": 300 }),
        _ => json!({}),
    };
    serde_json::from_value(json!({ name: options })).unwrap()
}
