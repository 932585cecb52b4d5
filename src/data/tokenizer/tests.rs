use std::collections::HashMap;

use serde_json::{Value, json};

use super::pieces::byte_chars;
use super::*;

fn added(id: u32, content: &str, special: bool) -> Value {
    json!({"id": id, "content": content, "special": special, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false})
}

/// Byte-level BPE: `<s>` 0, `</s>` 1, the added word `[x]` 2, then a token a byte from 3 on, then
/// merges that make "he" (259), "llo" (261) and the first three bytes of an emoji (263).
fn byte_level() -> Tokenizer {
    let chars = byte_chars();
    let mut vocab = HashMap::new();
    for (id, token) in ["<s>", "</s>", "[x]"].into_iter().enumerate() {
        vocab.insert(token.to_owned(), id);
    }
    for (byte, c) in chars.iter().enumerate() {
        vocab.insert(c.to_string(), byte + 3);
    }
    let emoji: Vec<_> = "\u{1F600}".bytes().map(|b| chars[usize::from(b)].to_string()).collect();
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    let merges = [
        pair("h", "e"),
        pair("l", "l"),
        pair("ll", "o"),
        pair(&emoji[0], &emoji[1]),
        pair(&emoji[..2].concat(), &emoji[2]),
    ];
    for (id, (a, b)) in (259..).zip(&merges) {
        vocab.insert(format!("{a}{b}"), id);
    }
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true});
    let json = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [added(0, "<s>", true), added(1, "</s>", true), added(2, "[x]", false)],
        "pre_tokenizer": level, "decoder": level,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": 0.5, "vocab": vocab, "merges": merges},
    });
    Tokenizer::from_files(Files {
        tokenizer: json.to_string(),
        tokenizer_config: Some(
            r#"{"bos_token":{"content":"<s>"},"eos_token":"</s>","clean":7,
                "chat_template":[{"name":"tools","template":"T"},{"name":"default","template":"D"}]}"#,
        ),
        generation_config: Some(r#"{"eos_token_id":[2,1,999],"top_k":3}"#),
        config: Some(&json!({"pad_token_id": 1, "eos_token_id": 0})),
        chat_template: None,
    })
    .unwrap()
}

/// SentencePiece BPE with a space in front: `<unk>` 0, `</s>` 1, bytes 2 to 257, `▁` 258, a 259, b
/// 260, `▁a` 261.
fn sentencepiece() -> Tokenizer {
    let mut vocab = HashMap::from([("<unk>".to_owned(), 0), ("</s>".to_owned(), 1)]);
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), byte + 2);
    }
    for (id, token) in (258..).zip(["▁", "a", "b", "▁a"]) {
        vocab.insert(token.to_owned(), id);
    }
    let json = json!({
        "added_tokens": [added(0, "<unk>", true), added(1, "</s>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
            "vocab": vocab, "merges": [["▁", "a"]]},
    });
    Tokenizer::new(json.to_string()).unwrap()
}

/// A vocabulary that has its end mark as a word.
fn unigram() -> Tokenizer {
    let json = json!({
        "added_tokens": [added(0, "<unk>", true), added(1, "</s>", true)],
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab":
            [["<unk>", 0.0], ["</s>", -0.5], ["<", -3.0], ["/", -3.0], ["s", -3.0], [">", -3.0]]},
    });
    Tokenizer::new(json.to_string()).unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = TextStream::new(tokenizer);
    let mut pieces: Vec<_> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    pieces
}

#[test]
fn byte_level_ids() {
    let t = byte_level();
    let letter = |c: char| c as u32 + 3;
    let hello = [259, 261];
    assert_eq!(t.encode("hello", false, false).unwrap(), hello);
    // Words that come again, and a limit in the file that must not cut them.
    let twice = t.encode("hello hello", false, false).unwrap();
    assert_eq!(twice, [259, 261, letter(' '), 259, 261]);
    assert_eq!(t.encode("hello", true, false).unwrap(), [0, 259, 261]);
    assert_eq!(t.encode("", true, false).unwrap(), [0]);
    assert_eq!(t.encode("<s>x", true, true).unwrap(), [0, letter('x')]);
    assert_eq!(t.vocab_size(), 264);
    assert_eq!(
        (t.token_text(261), t.token_text(263), t.token_text(999)),
        ("llo".into(), "\u{FFFD}".into(), String::new())
    );
}

#[test]
fn special_tokens_are_recognised_only_when_asked_for() {
    let t = byte_level();
    let ids: Vec<u32> = "</s>".bytes().map(|b| u32::from(b) + 3).collect();
    assert_eq!(t.encode("</s>", false, true).unwrap(), [1]);
    assert_eq!(t.encode("</s>", false, false).unwrap(), ids);
    // Added words that are not special are words.
    assert_eq!(t.encode("[x]", false, false).unwrap(), [2]);
    let u = unigram();
    assert_eq!(u.encode("s</s>", false, true).unwrap(), [4, 1]);
    assert_eq!(u.encode("s</s>", false, false).unwrap(), [4, 2, 3, 4, 5]);
    assert_eq!(u.encode("s?", false, false).unwrap(), [4, 0], "the unknown token stays");
}

#[test]
fn files_fill_the_fields_and_come_back() {
    let t = byte_level();
    assert_eq!((t.bos, t.pad, t.add_bos), (Some(0), Some(1), true));
    assert_eq!(t.eos, [2, 1, 0]);
    assert_eq!(t.chat_template.as_deref(), Some("D"));
    assert_eq!(t.special_text("bos_token").as_deref(), Some("<s>"));
    assert_eq!(t.special_text("pad_token").as_deref(), Some("</s>"));
    let (config, generation) = (t.tokenizer_config(), t.generation_config());
    assert_eq!((&config["clean"], &generation["top_k"]), (&json!(7), &json!(3)));
    let again = Tokenizer::from_files(Files {
        tokenizer: t.json.clone(),
        tokenizer_config: Some(&config.to_string()),
        generation_config: Some(&generation.to_string()),
        ..Files::default()
    })
    .unwrap();
    assert_eq!((again.bos, again.pad, again.add_bos), (t.bos, t.pad, t.add_bos));
    assert_eq!((&again.eos, &again.chat_template), (&t.eos, &t.chat_template));
    assert_eq!((again.tokenizer_config(), again.generation_config()), (config, generation));
}

#[test]
fn changed_fields_reach_the_files() {
    let mut t = byte_level();
    (t.bos, t.eos, t.pad, t.add_bos, t.chat_template) = (None, vec![2], None, false, None);
    let (config, generation) = (t.tokenizer_config(), t.generation_config());
    assert_eq!(config["bos_token"], Value::Null);
    assert_eq!((&config["eos_token"], &config["add_bos_token"]), (&json!("[x]"), &json!(false)));
    assert!(config.get("chat_template").is_none());
    assert_eq!(generation, json!({"eos_token_id": 2, "top_k": 3}));
}

#[test]
fn streams_never_cut_a_character() {
    let t = byte_level();
    let text = "he said \u{1F600}, caf\u{E9}";
    let ids = t.encode(text, false, false).unwrap();
    assert!(ids.contains(&263), "the emoji is cut by the vocabulary");
    let pieces = stream(&t, &ids);
    assert!(pieces.iter().all(|p| !p.contains('\u{FFFD}')));
    assert_eq!(pieces.concat(), text);
    assert_eq!(stream(&t, &[263]), ["", "\u{FFFD}"]);
}

#[test]
fn sentencepiece_spaces_and_bytes() {
    let t = sentencepiece();
    let snowman: Vec<u32> = "\u{2603}".bytes().map(|b| u32::from(b) + 2).collect();
    let ids = t.encode("a b\u{2603}", false, false).unwrap();
    assert_eq!(ids, [&[261, 258, 260][..], &snowman].concat());
    assert_eq!(t.decode(&ids, true).unwrap(), "a b\u{2603}");
    assert_eq!(stream(&t, &ids), ["a", " ", "b", "", "", "\u{2603}", ""]);
    // One space goes from the front, even when it comes as a token of its own.
    assert_eq!(stream(&t, &[258, 261]), ["", " a", ""]);
    // What makes no sense before and after a character does not swallow it.
    let broken = [snowman[0], snowman[0], snowman[1], snowman[2], 259];
    assert_eq!(stream(&t, &broken).concat(), "\u{FFFD}\u{2603}a");
}

#[test]
fn every_stream_is_the_decoded_whole() {
    // All ids in a scattered order, with ids that do not exist.
    for t in [byte_level(), sentencepiece(), unigram()] {
        let n = t.vocab_size() as u32 + 3;
        let mut x = 1u32;
        for length in [1, 2, 3, 50, 500] {
            let ids: Vec<u32> = (0..length)
                .map(|_| {
                    x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (x >> 16) % n
                })
                .collect();
            assert_eq!(stream(&t, &ids).concat(), t.decode(&ids, true).unwrap());
        }
    }
}

#[test]
fn decoding_agrees_with_the_crate_on_sound_text() {
    for t in [byte_level(), sentencepiece()] {
        for text in ["hello  world", " a ab\n", "\u{E9}\u{2603}\u{1F600}", "a</s>b", "[x]"] {
            let ids = t.encode(text, false, true).unwrap();
            assert_eq!(t.decode(&ids, false).unwrap(), t.inner.decode(&ids, false).unwrap());
            assert_eq!(t.decode(&ids, true).unwrap(), t.inner.decode(&ids, true).unwrap());
        }
    }
}

#[test]
fn decoders_without_pieces_are_refused() {
    for decoder in [
        json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": true}),
        json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
        json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}]}),
    ] {
        let json = json!({"decoder": decoder, "model": {"vocab": {"a": 0}, "merges": []}});
        let error = Tokenizer::new(json.to_string()).unwrap_err();
        assert_eq!(error.reason(), Reason::UnsupportedFormat, "{decoder}");
    }
    let far = json!({"model": {"vocab": {"a": u32::MAX}, "merges": []}});
    assert_eq!(Tokenizer::new(far.to_string()).unwrap_err().reason(), Reason::MalformedFile);
}

#[test]
fn pieces_of_a_long_text_have_the_tokens_of_the_whole() {
    let byte_level = byte_level();
    let metaspace = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always",
        "split": true});
    let vocab = json!({"\u{2581}": 0, "a": 1, "\u{2581}a": 2, "\n": 3, "?": 4});
    let spaced = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": metaspace,
        "decoder": metaspace, "model": {"type": "BPE", "vocab": vocab, "merges": [["\u{2581}", "a"]],
        "unk_token": "?"}});
    let spaced = Tokenizer::new(spaced.to_string()).unwrap();
    let lines =
        ["hello = title = \n", " \n", "\n", "\n\n  hello\u{1F600} \n", "hello\n", "x\t\n y"];
    let mut text = String::new();
    for i in 0..400 {
        text += lines[i * 7 % 11 % lines.len()];
        let whole = byte_level.tokenize_whole(&text, false).unwrap();
        for piece in [16, 64, 301] {
            assert_eq!(byte_level.tokenize_in_pieces(&text, false, piece).unwrap(), whole);
        }
    }
    assert!(byte_level.cut(&text, false, 301).unwrap().is_some(), "it is really cut");
    // A start of a text that gets a space in front is no place to cut.
    let text = "a a\n".repeat(100);
    assert_eq!(spaced.cut(&text, false, 64).unwrap(), None);
    let whole = spaced.tokenize_whole(&text, false).unwrap();
    assert_eq!(spaced.tokenize_in_pieces(&text, false, 64).unwrap(), whole);
    // No lines, no cuts.
    let line = "hello ".repeat(100);
    assert_eq!(byte_level.cut(&line, false, 64).unwrap(), None);
}

#[test]
fn word_pieces_of_known_texts() {
    let tokenizer = testing::word_pieces();
    let ids = |text: &str| tokenizer.encode(text, true, true).unwrap();
    for (text, want) in [
        ("unaffable", &[6, 7, 8][..]),
        ("Running runs!", &[9, 10, 9, 11, 13]),
        // Accents go with the capitals, in either spelling of them.
        ("Café,CAFE\u{301}", &[12, 14, 12]),
        // Ideographs are words by themselves; a no-break space is a space, a zero byte is nothing.
        ("a中文a", &[5, 15, 16, 5]),
        ("a\u{a0}a\u{0}", &[5, 5]),
        ("24", &[17, 18]),
        ("Straße Β", &[19, 20]),
        // No pieces: one unknown token a word, however much of it was known.
        ("unknown aa", &[1, 1]),
        ("runrunrunrunrunrunrun", &[1]),
        ("a [SEP] a", &[5, 3, 5]),
        ("", &[]),
    ] {
        assert_eq!(ids(text), want, "{text:?}");
    }
    // Spelled out where text may not hold special tokens: two brackets and a word, all unknown.
    assert_eq!(tokenizer.encode("[SEP]", true, false).unwrap(), [1, 1, 1]);
    assert_eq!(tokenizer.around().unwrap(), (vec![2], vec![3]));
    assert_eq!(tokenizer.decode(&[2, 6, 7, 8, 13, 3], true).unwrap(), "unaffable!");
}

#[test]
fn templates_that_do_more_than_surround_a_text_are_refused() {
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut json: Value = serde_json::from_str(&testing::word_pieces().json).unwrap();
        change(&mut json["post_processor"]);
        Tokenizer::new(json.to_string()).unwrap().around()
    };
    assert_eq!(changed(&|post| *post = Value::Null).unwrap(), (vec![], vec![]));
    let bert = json!({ "type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2] });
    assert_eq!(changed(&|post| *post = bert.clone()).unwrap(), (vec![2], vec![3]));
    // A template of a hundred tokens, and one without the text.
    for times in [100, 1] {
        let token = json!({ "SpecialToken": { "id": "[CLS]", "type_id": 0 } });
        let mut template = vec![token; times];
        if times > 1 {
            template.push(json!({ "Sequence": { "id": "A", "type_id": 0 } }));
        }
        let error = changed(&|post| post["single"] = json!(template)).unwrap_err();
        assert_eq!(error.reason(), Reason::MalformedFile);
    }
}
