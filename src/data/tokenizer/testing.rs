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

/// Byte-level, as [`bytes`] but with `</s>` 256 as the end token and, from 257 on, words of several
/// bytes: some begin or end inside a character.
pub fn words() -> Tokenizer {
    let mut letters: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    let spell = |bytes: &[u8]| -> String {
        bytes.iter().map(|byte| super::pieces::byte_chars()[usize::from(*byte)]).collect()
    };
    let mut vocabulary: serde_json::Map<_, _> =
        letters.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let words: [&[u8]; 12] = [
        b"{\"",
        b"\":",
        b", \"",
        b"tr",
        b"true",
        b" \xC3",
        b"\xA4\xC3",
        b"\xF0\x9F",
        b"\x98\x80\"",
        b"12",
        b"ab",
        b"}\n",
    ];
    for (id, word) in (257..).zip(words) {
        vocabulary.insert(spell(word), json!(id));
    }
    let json = json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 256, "content": "</s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true,
        },
        "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
    });
    let mut tokenizer = Tokenizer::new(json.to_string()).unwrap();
    tokenizer.eos = vec![256];
    tokenizer
}

/// SentencePiece: `<unk>` 0, `</s>` 1 (the end token), all bytes as `<0x00>` to `<0xFF>` from 2 on,
/// words from 258 on; a text loses the space in its front.
pub fn pieces() -> Tokenizer {
    let mut vocabulary = serde_json::Map::new();
    vocabulary.insert("<unk>".into(), json!(0));
    vocabulary.insert("</s>".into(), json!(1));
    for byte in 0..256 {
        vocabulary.insert(format!("<0x{byte:02X}>"), json!(byte + 2));
    }
    for (id, word) in (258..).zip(["▁", "a", "b", "▁a", "ab", "ä", "{\"", "\":", "▁\"", "12", "}"])
    {
        vocabulary.insert(word.into(), json!(id));
    }
    let special = |id: u32, content: &str| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let json = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "</s>")],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocabulary,
            "merges": [],
        },
    });
    let mut tokenizer = Tokenizer::new(json.to_string()).unwrap();
    tokenizer.eos = vec![1];
    tokenizer
}
