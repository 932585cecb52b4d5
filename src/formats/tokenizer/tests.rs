use super::*;
use crate::formats::gguf::{Array, Value};

fn texts(values: &[&str]) -> Value {
    Value::Array(Array::String(values.iter().map(|v| (*v).into()).collect()))
}

/// Letters and digits as single tokens, `ab`, `abc`, a space, an end mark, an added word, a filler.
fn byte_level(pre: &str) -> Metadata {
    let mut m = Metadata::default();
    m.set("tokenizer.ggml.model", Value::String("gpt2".into()));
    m.set("tokenizer.ggml.pre", Value::String(pre.into()));
    let tokens =
        ["<|im_end|>", "a", "b", "c", "1", "2", "Ġ", "ab", "abc", "12", "<w>", "[PAD]", "[PAD]"];
    m.set("tokenizer.ggml.tokens", texts(&tokens));
    let types = vec![3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 5, 5];
    m.set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    m.set("tokenizer.ggml.merges", texts(&["a b", "ab c", "1 2"]));
    m.set("tokenizer.ggml.bos_token_id", Value::U32(0));
    m.set("tokenizer.chat_template", Value::String("{{ messages }}".into()));
    m
}

/// `<unk>`, `</s>`, the bytes, then words with scores; the higher the score, the earlier the join.
fn sentencepiece(words: &[(&str, f32)], prefix: bool) -> Metadata {
    let mut tokens = vec!["<unk>".to_owned(), "</s>".to_owned()];
    let (mut types, mut scores) = (vec![2, 3], vec![0.0, 0.0]);
    for byte in 0..=255 {
        tokens.push(format!("<0x{byte:02X}>"));
        types.push(6);
        scores.push(0.0);
    }
    for (word, score) in words {
        tokens.push((*word).into());
        types.push(1);
        scores.push(*score);
    }
    let mut m = Metadata::default();
    m.set("tokenizer.ggml.model", Value::String("llama".into()));
    m.set("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)));
    m.set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    m.set("tokenizer.ggml.scores", Value::Array(Array::F32(scores)));
    m.set("tokenizer.ggml.eos_token_id", Value::U32(1));
    m.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    m.set("tokenizer.ggml.add_space_prefix", Value::Bool(prefix));
    m
}

fn load(metadata: &Metadata) -> Tokenizer {
    from_gguf(metadata).unwrap().unwrap()
}

fn again(tokenizer: &Tokenizer) -> Metadata {
    let mut m = Metadata::default();
    for (key, value) in to_gguf(tokenizer, tokenizer.vocab_size()).unwrap() {
        m.set(key, value);
    }
    m
}

#[test]
fn byte_level_follows_its_pre_tokenizer() {
    let ids = |pre: &str, text: &str| load(&byte_level(pre)).encode(text, false, false).unwrap();
    assert_eq!(ids("gpt-2", "abc 12"), [8, 6, 9]);
    // Digits stand alone.
    assert_eq!(ids("smollm", "abc 12"), [8, 6, 4, 5]);
    assert_eq!(ids("qwen2", "abc12"), [8, 4, 5]);
    assert_eq!(ids("llama-bpe", "abc12"), [8, 9]);
    assert_eq!(ids("default", "ab<w>c"), [7, 10, 3]);
}

#[test]
fn special_tokens_and_template_are_taken_over() {
    let t = load(&byte_level("gpt-2"));
    assert_eq!((t.bos, &t.eos[..], t.add_bos), (Some(0), &[0][..], false), "the turn mark ends");
    assert_eq!(t.chat_template.as_deref(), Some("{{ messages }}"));
    assert_eq!(t.encode("<|im_end|>", false, true).unwrap(), [0]);
    assert_eq!(t.vocab_size(), 11, "fillers at the end have no token");
    assert!(load(&byte_level("llama-bpe")).add_bos);
    let mut m = byte_level("llama-bpe");
    m.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    assert!(!load(&m).add_bos);
}

#[test]
fn scores_decide_what_joins_first() {
    // "abc": either ab + c or a + bc.
    let letters = [("▁", -9.0), ("a", -9.1), ("b", -9.2), ("c", -9.3)];
    let ids = |ab: f32, bc: f32, text: &str| {
        let words = [&letters[..], &[("ab", ab), ("bc", bc)]].concat();
        load(&sentencepiece(&words, false)).encode(text, false, false).unwrap()
    };
    assert_eq!(ids(-1.0, -2.0, "abc"), [262, 261]);
    assert_eq!(ids(-2.0, -1.0, "abc"), [259, 263]);
    assert_eq!(ids(-1.0, -1.0, "abc"), [262, 261], "among equals the lower id");
    assert_eq!(ids(-1.0, -2.0, "a b"), [259, 258, 260]);
    assert_eq!(ids(-1.0, -2.0, "\u{E9}"), [2 + 0xC3, 2 + 0xA9], "bytes of what has no token");
}

#[test]
fn no_way_leads_to_special_tokens() {
    // "</s>" could be joined from words; only the mark itself may give its id.
    let t = load(&sentencepiece(
        &[("</", -1.0), ("s>", -2.0), ("<", -3.0), ("/", -3.1), ("s", -3.2), (">", -3.3)],
        false,
    ));
    assert_eq!(t.encode("</s>", false, false).unwrap(), [258, 259]);
    assert_eq!(t.encode("</s>", false, true).unwrap(), [1]);
}

#[test]
fn a_space_goes_in_front_only_where_the_file_says_so() {
    let words = [("▁", -1.0), ("a", -2.0), ("▁a", -0.5)];
    for (prefix, ids) in [(true, vec![260]), (false, vec![259])] {
        let t = load(&sentencepiece(&words, prefix));
        assert_eq!(t.encode("a", false, false).unwrap(), ids);
        assert_eq!(t.decode(&ids, false).unwrap(), "a");
    }
}

#[test]
fn round_trips_keep_everything() {
    let words = [("▁", -4.0), ("a", -5.0), ("▁a", -0.5), ("aa", -0.7), ("▁aa", -3.0)];
    for metadata in [
        byte_level("gpt-2"),
        byte_level("starcoder"),
        byte_level("qwen2"),
        byte_level("default"),
        sentencepiece(&words, true),
        sentencepiece(&words, false),
    ] {
        let t = load(&metadata);
        let out = again(&t);
        assert!(out.get("tokenizer.ggml.pre").is_some());
        if let Some(pre) = metadata.get("tokenizer.ggml.pre") {
            assert_eq!(out.get("tokenizer.ggml.pre"), Some(pre), "the name stays");
        }
        let t2 = load(&out);
        assert_eq!(t2.json, t.json);
        assert_eq!(t2.tokenizer_config()["add_bos_token"], t.tokenizer_config()["add_bos_token"]);
        assert_eq!((t2.bos, &t2.eos, t2.pad), (t.bos, &t.eos, t.pad));
    }
}

#[test]
fn the_kind_is_found_without_the_name() {
    let t = load(&byte_level("starcoder"));
    let bare = Tokenizer::new(t.json.clone()).unwrap();
    let out = again(&bare);
    assert_eq!(out.text("tokenizer.ggml.pre").unwrap(), Some("smollm"));
    let mut json: Json = serde_json::from_str(&t.json).unwrap();
    json["pre_tokenizer"] = json!({"type": "Whitespace"});
    let odd = Tokenizer::new(json.to_string()).unwrap();
    let error = to_gguf(&odd, 100).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
    assert_eq!(to_gguf(&t, 3).unwrap_err().reason(), Reason::ModelUnsuitable);
    let padded = to_gguf(&t, 20).unwrap();
    let Some((_, Value::Array(Array::String(tokens)))) =
        padded.iter().find(|(key, _)| key == "tokenizer.ggml.tokens")
    else {
        panic!("no tokens");
    };
    assert_eq!((tokens.len(), tokens[19].as_str()), (20, "[PAD19]"));
}

#[test]
fn bad_metadata_is_refused() {
    let with = |key: &str, value: Value| {
        let mut m = byte_level("gpt-2");
        m.set(format!("tokenizer.ggml.{key}"), value);
        from_gguf(&m).map(|_| ()).unwrap_err().reason()
    };
    assert_eq!(with("model", Value::String("t5".into())), Reason::UnsupportedFormat);
    assert_eq!(with("pre", Value::String("nobody".into())), Reason::UnsupportedFormat);
    for (key, value) in [
        ("token_type", Value::Array(Array::I32(vec![1]))),
        ("token_type", Value::Array(Array::I32(vec![7; 13]))),
        ("merges", texts(&["ab"])),
        ("merges", texts(&["a z"])),
        ("merges", texts(&["c c"])),
        ("merges", Value::U32(1)),
        ("tokens", texts(&[])),
        ("bos_token_id", Value::U32(13)),
        ("eos_token_id", Value::I32(-1)),
    ] {
        assert_eq!(with(key, value.clone()), Reason::MalformedFile, "{key}: {value:?}");
    }
    let mut m = sentencepiece(&[("a", -1.0)], true);
    m.set("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0])));
    assert_eq!(from_gguf(&m).map(|_| ()).unwrap_err().reason(), Reason::MalformedFile);
    m.set("tokenizer.ggml.model", Value::String("none".into()));
    assert!(from_gguf(&m).unwrap().is_none());
    assert!(from_gguf(&Metadata::default()).unwrap().is_none());
}

#[test]
fn scores_that_are_no_numbers_do_no_harm() {
    let t = load(&sentencepiece(&[("a", f32::NAN), ("aa", f32::NAN), ("b", f32::INFINITY)], false));
    assert_eq!(t.encode("aab", false, false).unwrap(), [259, 260]);
}
