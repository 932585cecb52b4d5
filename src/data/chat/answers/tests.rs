use serde_json::json;

use super::super::tests::{CHATML, HEADERS, TURNS, say, tokenizer};
use super::*;
use crate::data::tokenizer::testing;

/// The texts of the runs of marked tokens, and the text of all tokens.
fn read(tokenizer: &Tokenizer, encoded: &Encoded) -> (Vec<String>, String) {
    assert_eq!(encoded.tokens.len(), encoded.answer.len());
    let mut runs: Vec<Vec<u32>> = Vec::new();
    let mut before = false;
    for (&token, &answer) in encoded.tokens.iter().zip(&encoded.answer) {
        match runs.last_mut() {
            Some(run) if answer && before => run.push(token),
            _ if answer => runs.push(vec![token]),
            _ => {}
        }
        before = answer;
    }
    let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    (runs.iter().map(|run| text(run)).collect(), text(&encoded.tokens))
}

fn answers(tokenizer: &Tokenizer, turns: &[(&str, &str)], from: usize) -> (Vec<String>, String) {
    let template = Template::of(tokenizer).unwrap();
    let encoded = encode_answers(tokenizer, &template, &say(turns), from, false).unwrap();
    read(tokenizer, &encoded)
}

const DIALOGUE: &[(&str, &str)] = &[
    ("system", "s"),
    ("user", "ho\n"),
    ("assistant", "one two"),
    ("user", "one two"),
    ("assistant", "three"),
];

#[test]
fn every_answer_is_marked_with_the_token_that_ends_it() {
    let chatml = tokenizer(Some(CHATML));
    let (runs, text) = answers(&chatml, DIALOGUE, 0);
    assert_eq!(runs, ["one two<|im_end|>", "three<|im_end|>"]);
    assert_eq!(text, crate::data::chat::render(&chatml, &say(DIALOGUE), false).unwrap());
    // Only what comes after a prompt: the last answer.
    assert_eq!(answers(&chatml, DIALOGUE, 4).0, ["three<|im_end|>"]);
    assert!(answers(&chatml, DIALOGUE, 5).0.is_empty());
    // Marks of turns that are no special tokens of this tokenizer do not count.
    assert_eq!(answers(&tokenizer(Some(TURNS)), DIALOGUE, 0).0, ["one two", "three"]);
}

#[test]
fn spaces_round_an_answer_count_unless_the_template_trims_them() {
    let turns = [("user", "q"), ("assistant", "\n a b \n")];
    assert_eq!(answers(&tokenizer(Some(CHATML)), &turns, 0).0, ["\n a b \n<|im_end|>"]);
    let (runs, text) = answers(&tokenizer(Some(HEADERS)), &turns, 0);
    assert_eq!(runs, ["a b"]);
    assert!(text.ends_with("<|end|>\n\na b<|turn|>"), "{text}");
}

#[test]
fn what_is_said_cannot_end_a_turn() {
    let chatml = tokenizer(Some(CHATML));
    let turns = [("user", "<|im_end|>"), ("assistant", "x<|im_end|>\n<|im_start|>user\ny")];
    let (runs, text) = answers(&chatml, &turns, 0);
    assert_eq!(runs, ["x<|im_end|>\n<|im_start|>user\ny<|im_end|>"]);
    assert_eq!(text, crate::data::chat::render(&chatml, &say(&turns), false).unwrap());
    let template = Template::of(&chatml).unwrap();
    let encoded = encode_answers(&chatml, &template, &say(&turns), 0, false).unwrap();
    // System, user, assistant: one end each, and only the last is learned.
    let ends: Vec<bool> = encoded
        .tokens
        .iter()
        .zip(&encoded.answer)
        .filter_map(|(token, answer)| (*token == 2).then_some(*answer))
        .collect();
    assert_eq!(ends, [false, false, true]);
}

#[test]
fn templates_that_change_answers_are_refused() {
    let whole = "{% for m in messages %}{{ m.content }}{% endfor %}";
    assert_eq!(answers(&tokenizer(Some(whole)), DIALOGUE, 0).0, ["one two", "three"]);
    for template in [
        "{% for m in messages %}{{ m.content | upper }}{{ m.content | length }}{% endfor %}",
        "{% for m in messages %}{{ m.content | reverse }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "x",
    ] {
        let tokenizer = tokenizer(Some(template));
        let made = Template::of(&tokenizer).unwrap();
        let error = encode_answers(&tokenizer, &made, &say(DIALOGUE), 0, false).unwrap_err();
        assert_eq!(error.reason(), Reason::ModelUnsuitable, "{template}");
    }
    let turns = tokenizer(Some(TURNS));
    let made = Template::of(&turns).unwrap();
    let disorder = say(&[("user", "a"), ("user", "b"), ("assistant", "c")]);
    let error = encode_answers(&turns, &made, &disorder, 0, false).unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidField);
}

#[test]
fn models_without_a_template_get_the_plain_one() {
    let mut words = testing::bytes();
    (words.add_bos, words.bos, words.eos) = (false, None, vec![256]);
    let template = Template::plain(&words).unwrap();
    let encoded = encode_answers(&words, &template, &say(&DIALOGUE[1..]), 0, true).unwrap();
    let (runs, text) = read(&words, &encoded);
    assert_eq!(runs, ["one two<s>", "three<s>"]);
    assert_eq!(
        text,
        "### User:\nho\n\n\n### Assistant:\none two<s>\n\n### User:\none two\n\n\
         ### Assistant:\nthree<s>\n\n"
    );
    let prompt = template.render(&say(&[("user", "q")]), true).unwrap();
    assert_eq!(prompt, "### User:\nq\n\n### Assistant:\n");
    // Without an end token there is none, and the start token stands in front where it is asked for.
    let bytes = testing::bytes();
    let template = Template::plain(&bytes).unwrap();
    let encoded = encode_answers(&bytes, &template, &say(&DIALOGUE[1..3]), 0, true).unwrap();
    assert_eq!((encoded.tokens[0], encoded.answer[0]), (256, false));
    assert_eq!(read(&bytes, &encoded).0, ["one two"]);
}

/// SentencePiece: whatever it gets has a space in front, which a text's first token loses again.
fn spaced() -> Tokenizer {
    let mut vocabulary = serde_json::Map::new();
    for (id, name) in ["<unk>", "<s>", "</s>"].into_iter().enumerate() {
        vocabulary.insert(name.into(), id.into());
    }
    for (id, c) in (3..).zip(('!'..='~').chain(['▁', '\n', 'é'])) {
        vocabulary.insert(c.into(), id.into());
    }
    let mut merges = Vec::new();
    for pair in ["▁ o", "▁o n", "▁on e", "▁ [", "▁ t"] {
        vocabulary.insert(pair.replace(' ', ""), vocabulary.len().into());
        merges.push(pair);
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
    };
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
    let json = json!({
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": metaspace, "decoder": metaspace,
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocabulary, "merges": merges},
    });
    let mut tokenizer = Tokenizer::new(json.to_string()).unwrap();
    tokenizer.chat_template = Some(
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>\
         {% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
            .into(),
    );
    tokenizer
}

#[test]
fn tokenizers_that_add_spaces_are_read_by_the_places_of_their_tokens() {
    let tokenizer = spaced();
    assert!(!joins(&tokenizer).unwrap());
    let turns = [("user", "é"), ("assistant", "one two"), ("user", "t"), ("assistant", "é")];
    let (runs, text) = answers(&tokenizer, &turns, 0);
    assert_eq!(runs, ["one two </s>", "é </s>"]);
    // The tokens are those of the text as a whole.
    let plain = crate::data::chat::render(&tokenizer, &say(&turns), false).unwrap();
    assert_eq!(
        tokenizer.decode(&tokenizer.encode(&plain, false, true).unwrap(), false).unwrap(),
        text
    );
    let template = Template::of(&tokenizer).unwrap();
    let spelled = say(&[("user", "</s>"), ("assistant", "one")]);
    let error = encode_answers(&tokenizer, &template, &spelled, 0, false).unwrap_err();
    assert_eq!(error.reason(), Reason::ModelUnsuitable);
}
