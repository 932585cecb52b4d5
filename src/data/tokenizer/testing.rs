//! Small tokenizers for tests.

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

/// BERT's word pieces over a tiny vocabulary: `[PAD]` 0, `[UNK]` 1, `[CLS]` 2, `[SEP]` 3, `[MASK]` 4, then
/// the pieces below from 5 on.
pub fn word_pieces() -> Tokenizer {
    const PIECES: &[&str] = &[
        "a", "un", "##aff", "##able", "run", "##ning", "##s", "cafe", "!", ",", "中", "文", "2",
        "##4", "straße", "β",
    ];
    let names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let vocabulary: serde_json::Map<_, _> = names
        .iter()
        .chain(PIECES)
        .enumerate()
        .map(|(id, piece)| ((*piece).to_owned(), json!(id)))
        .collect();
    let special = |name: &str, id: u32| json!({ "id": name, "ids": [id], "tokens": [name] });
    let piece = |kind: &str, id: &str| json!({ kind: { "id": id, "type_id": 0 } });
    let added = names.iter().enumerate().map(|(id, name)| {
        json!({
            "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    let template =
        [piece("SpecialToken", "[CLS]"), piece("Sequence", "A"), piece("SpecialToken", "[SEP]")];
    let pair = [piece("Sequence", "A"), piece("Sequence", "B")];
    let json = json!({
        "version": "1.0",
        "truncation": {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        },
        "padding": {
            "strategy": { "Fixed": 16 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
        },
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true,
        },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": pair,
            "special_tokens": { "[CLS]": special("[CLS]", 2), "[SEP]": special("[SEP]", 3) },
        },
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 20, "vocab": vocabulary,
        },
    });
    Tokenizer::new(json.to_string()).unwrap()
}
