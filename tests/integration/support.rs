//! What the journeys share: a small model with a tokenizer, and a real server in this process.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use planish::config::Config;
use planish::data::tokenizer::Tokenizer;
use planish::models::{Model, decoder::random, export};
use planish::nn::dtype::Dtype;
use planish::server::{Running, Server};
use serde_json::json;

/// A byte-level tokenizer without merges: one token a byte, and `<|end|>`.
pub fn byte_tokenizer() -> Tokenizer {
    // The byte-level alphabet: printable bytes stand for themselves, the others for letters from U+0100.
    let printable =
        |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut shifted = 0;
    let mut vocabulary = serde_json::Map::new();
    for byte in 0..256_u32 {
        let symbol = if printable(byte) {
            char::from_u32(byte)
        } else {
            shifted += 1;
            char::from_u32(255 + shifted)
        };
        vocabulary.insert(symbol.unwrap().to_string(), json!(byte));
    }
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 256, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true },
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
    });
    let mut tokenizer = Tokenizer::new(tokenizer.to_string()).unwrap();
    tokenizer.eos = vec![256];
    tokenizer.chat_template = Some(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
         {% if add_generation_prompt %}[assistant] {% endif %}"
            .to_owned(),
    );
    tokenizer
}

/// A small random Llama with the byte tokenizer.
pub fn tiny(layers: usize, hidden: usize) -> Model {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": 257, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": true,
        "eos_token_id": 256,
    });
    let mut model = random::model(config, 11).unwrap();
    model.tokenizer = Some(Arc::new(byte_tokenizer()));
    model
}

/// Writes a small random Llama with the byte tokenizer as a Hugging Face folder.
pub fn tiny_model(folder: &Path, layers: usize, hidden: usize) -> PathBuf {
    let model = tiny(layers, hidden);
    let folder = folder.join("tiny");
    std::fs::create_dir_all(&folder).unwrap();
    export::hugging_face(&model, &folder, Dtype::F32).unwrap();
    folder
}

/// A server in this process on a free port of the loopback, with its folder below `folder`.
pub async fn serve(folder: &Path) -> Running {
    let mut config = Config::default();
    config.server.listen = "127.0.0.1:0".parse().unwrap();
    config.data.folder = folder.join("data");
    Server::start(config).await.unwrap()
}
