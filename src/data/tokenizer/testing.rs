//! A small tokenizer for tests.

use serde_json::json;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::Tokenizer;

/// One token a byte, and 256 as the start token.
pub fn bytes() -> Tokenizer {
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    let vocabulary: serde_json::Map<_, _> =
        letters.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true,
    });
    let json = json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 256, "content": "<s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "pre_tokenizer": level,
        "decoder": level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
    });
    let mut tokenizer = Tokenizer::new(json.to_string()).unwrap();
    (tokenizer.bos, tokenizer.add_bos) = (Some(256), true);
    tokenizer
}
