//! Masks against brute force, and answers of small random models against the forms they were asked for.

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::Rng as _;
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;

use super::*;
use crate::data::tokenizer::testing;
use crate::models::decoder::plan::CacheFormat;
use crate::models::decoder::plan::adapters::Mix;
use crate::models::decoder::random;
use crate::seed::Stream;
use crate::serve::engine::{Engine, Event, Finish, Limits, Request};
use crate::serve::sample::Sampling;

const TOKENIZERS: [fn() -> Tokenizer; 2] = [testing::words, testing::pieces];

fn vocabulary(tokenizer: &Tokenizer) -> Vocabulary {
    Vocabulary::new(tokenizer, tokenizer.vocab_size()).unwrap()
}

fn regex(pattern: &str) -> Form {
    Form::Regex(pattern.to_owned())
}

fn schema(schema: &Value) -> Form {
    Form::JsonSchema(schema.to_string())
}

fn ids(constraint: &mut Constraint) -> BTreeSet<u32> {
    let mut ids = BTreeSet::new();
    constraint.allowed().unwrap().iter_set_entries(|id| _ = ids.insert(id as u32));
    ids
}

fn engine(tokenizer: Tokenizer, limits: Limits) -> Engine {
    let mut config = random::tiny("llama");
    // More logits than tokens: the rest has no text and must never come.
    config["vocab_size"] = json!(tokenizer.vocab_size() + 7);
    config["max_position_embeddings"] = json!(4096);
    let mut model = random::model(config, 5).unwrap();
    model.tokenizer = Some(Arc::new(tokenizer));
    Engine::start(model, limits).unwrap()
}

const LIMITS: Limits = Limits {
    slots: 8,
    queue: 500,
    context: 4096,
    kv_bytes: 1 << 26,
    kv_format: CacheFormat::F32,
    prefix_cache: true,
};

fn request(engine: &Engine, form: &Form, seed: u64, max_tokens: usize) -> Request {
    Request {
        prompt: vec![3, 4, 5],
        max_tokens,
        sampling: Sampling { temperature: 1.0, seed, ..Sampling::GREEDY },
        end: engine.model().tokenizer.as_ref().unwrap().eos.clone(),
        stop: Vec::new(),
        logprobs: true,
        top_logprobs: 0,
        constraint: Some(engine.vocabulary().unwrap().compile(form).unwrap()),
        client: 0,
        adapters: Mix::default(),
        deadline: None,
    }
}

struct Answer {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    finish: Finish,
}

async fn answer(mut events: mpsc::Receiver<Result<Event>>) -> Result<Answer> {
    let (mut all, mut ids, mut logprobs) = (String::new(), Vec::new(), Vec::new());
    while let Some(event) = events.recv().await {
        match event? {
            Event::Tokens { tokens, text } => {
                all.push_str(&text);
                ids.extend(tokens.iter().map(|t| t.id));
                logprobs.extend(tokens.iter().filter_map(|t| t.logprob));
            }
            Event::Done { finish, text, .. } => {
                all.push_str(&text);
                return Ok(Answer { text: all, ids, logprobs, finish });
            }
        }
    }
    panic!("the answer has no end");
}

/// The tokens with which some of `all` goes on after `begun`, and the end if `begun` is one of them.
fn by_hand(tokenizer: &Tokenizer, all: &[&str], begun: &[u8]) -> BTreeSet<u32> {
    (0..tokenizer.vocab_size() as u32)
        .filter(|id| {
            if tokenizer.eos.contains(id) {
                return all.iter().any(|text| text.as_bytes() == begun);
            }
            let bytes = [begun, tokenizer.token_bytes(*id)].concat();
            !tokenizer.is_special(*id)
                && bytes.len() > begun.len()
                && all.iter().any(|text| text.as_bytes().starts_with(&bytes))
        })
        .collect()
}

#[test]
fn masks_are_those_of_brute_force() {
    let all = ["ab", "abä", "äöüä", "ä\u{1F600}\"", " a 12", "true", "tr", "{\"ab\": 1}\n"];
    let pattern = all.map(|text| text.replace('{', "\\{").replace('}', "\\}")).join("|");
    let lark = all.map(|text| format!("\"{}\"", text.replace('"', "\\\"").replace('\n', "\\n")));
    let forms = [regex(&pattern), Form::Grammar(format!("start: {}", lark.join(" | ")))];
    for tokenizer in TOKENIZERS.map(|make| make()) {
        let vocabulary = vocabulary(&tokenizer);
        for form in &forms {
            let mut ended = BTreeSet::new();
            for seed in 0..60 {
                let mut rng = Stream::root(seed).child("walk").rng();
                let mut constraint = vocabulary.compile(form).unwrap();
                let mut text = Vec::new();
                loop {
                    let allowed = ids(&mut constraint);
                    assert_eq!(allowed, by_hand(&tokenizer, &all, &text), "{text:?}");
                    let id = *allowed.iter().nth(rng.random_range(0..allowed.len())).unwrap();
                    if tokenizer.eos.contains(&id) {
                        break;
                    }
                    text.extend_from_slice(tokenizer.token_bytes(id));
                    let last = constraint.advance(id).unwrap();
                    let goes_on = all.iter().filter(|t| t.as_bytes().starts_with(&text)).count();
                    let whole = all.iter().any(|t| t.as_bytes() == text);
                    assert_eq!(last, whole && goes_on == 1, "{text:?}");
                    if last {
                        break;
                    }
                }
                ended.insert(String::from_utf8(text).unwrap());
            }
            assert!(ended.len() > 5, "{ended:?}");
        }
    }
}

/// A random schema whose answers are finite.
fn random_schema(rng: &mut ChaCha8Rng, depth: usize) -> Value {
    match rng.random_range(0..if depth == 0 { 5 } else { 7 }) {
        0 => {
            let min = rng.random_range(0..3);
            json!({"type": "string", "minLength": min, "maxLength": min + rng.random_range(0..6)})
        }
        1 => {
            let min: i64 = rng.random_range(-200..200);
            json!({"type": "integer", "minimum": min, "maximum": min + rng.random_range(0..1000)})
        }
        2 => {
            let min = f64::from(rng.random_range(-80..80)) / 4.0;
            json!({"type": "number", "minimum": min, "exclusiveMaximum": min + 2.5})
        }
        3 => json!({"type": "boolean"}),
        4 => json!({"enum": ["red", "gr\u{fc}n", 7, null, "\u{1F600}\"\\"]}),
        5 => {
            let min = rng.random_range(0..2);
            json!({
                "type": "array", "items": random_schema(rng, depth - 1),
                "minItems": min, "maxItems": min + rng.random_range(0..3),
            })
        }
        _ => {
            let names = ["a", "b\u{e4}", "c d", "\u{1F600}"];
            let names = &names[..rng.random_range(1..=names.len())];
            let properties: serde_json::Map<_, _> = names
                .iter()
                .map(|name| ((*name).to_owned(), random_schema(rng, depth - 1)))
                .collect();
            let required: Vec<_> = names.iter().filter(|_| rng.random_bool(0.5)).collect();
            json!({
                "type": "object", "properties": properties, "required": required,
                "additionalProperties": false,
            })
        }
    }
}

/// What of the keywords above `value` breaks.
fn broken(schema: &Value, value: &Value) -> Option<String> {
    let bad = |what: &str| Some(format!("{value} is not {what} of {schema}"));
    if let Some(choices) = schema["enum"].as_array() {
        return if choices.contains(value) { None } else { bad("one") };
    }
    let size = |name: &str| schema[name].as_u64().map(|n| n as usize);
    match schema["type"].as_str().unwrap() {
        "boolean" if value.is_boolean() => None,
        "string" => match value.as_str().map(|text| text.chars().count()) {
            Some(n) if Some(n) >= size("minLength") && Some(n) <= size("maxLength") => None,
            _ => bad("a string"),
        },
        "integer" => match value.as_f64().filter(|n| n.fract() == 0.0) {
            // Also -0, which parses as a float.
            n @ Some(_) if schema["minimum"].as_f64() <= n && n <= schema["maximum"].as_f64() => {
                None
            }
            _ => bad("an integer"),
        },
        "number" => match value.as_f64() {
            n @ Some(_)
                if schema["minimum"].as_f64() <= n && n < schema["exclusiveMaximum"].as_f64() =>
            {
                None
            }
            _ => bad("a number"),
        },
        "array" => match value.as_array() {
            Some(items)
                if Some(items.len()) >= size("minItems")
                    && Some(items.len()) <= size("maxItems") =>
            {
                items.iter().find_map(|item| broken(&schema["items"], item))
            }
            _ => bad("an array"),
        },
        "object" => {
            let Some(fields) = value.as_object() else { return bad("an object") };
            let required = schema["required"].as_array().unwrap();
            if required.iter().any(|name| !fields.contains_key(name.as_str().unwrap())) {
                return bad("complete");
            }
            fields.iter().find_map(|(name, value)| match schema["properties"].get(name) {
                Some(schema) => broken(schema, value),
                None => bad("without others"),
            })
        }
        _ => bad("a value"),
    }
}

#[test]
fn the_validator_of_these_tests_finds_what_is_wrong() {
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["a"],
        "properties": {
            "a": {"type": "string", "minLength": 1, "maxLength": 2},
            "b": {"type": "array", "minItems": 1, "maxItems": 1,
                "items": {"type": "integer", "minimum": -1, "maximum": 3}},
        },
    });
    let good = json!({"a": "\u{1F600}\u{e4}", "b": [-1]});
    assert_eq!(broken(&schema, &good), None);
    for bad in [
        json!({}),
        json!({"a": ""}),
        json!({"a": "abc"}),
        json!({"a": "x", "b": []}),
        json!(1),
        json!({"a": "x", "b": [4]}),
        json!({"a": "x", "b": [1.5]}),
        json!({"a": "x", "c": 1}),
    ] {
        assert!(broken(&schema, &bad).is_some(), "{bad}");
    }
}

#[tokio::test]
async fn json_of_random_schemas_is_valid() {
    for (which, make) in TOKENIZERS.into_iter().enumerate() {
        let engine = engine(make(), LIMITS);
        let mut asked = Vec::new();
        for seed in 0..60 {
            let schema = random_schema(&mut Stream::root(seed).child("schema").rng(), 3);
            let form = super::tests::schema(&schema);
            for draw in 0..2 {
                let request = request(&engine, &form, 2 * seed + draw, 800);
                asked.push((schema.clone(), engine.generate(request).unwrap()));
            }
        }
        let (all, mut whole) = (asked.len(), 0);
        for (schema, events) in asked {
            let answer = answer(events).await.unwrap();
            if answer.finish == Finish::Length {
                continue;
            }
            assert_eq!(answer.finish, Finish::Eos);
            let value = serde_json::from_str(&answer.text)
                .unwrap_or_else(|e| panic!("{e}: {:?} of {schema}", answer.text));
            assert_eq!(broken(&schema, &value), None, "{:?}", answer.text);
            whole += 1;
        }
        assert!(whole * 10 > all * 9, "tokenizer {which}: only {whole} of {all} ended");
    }
}

#[tokio::test]
async fn patterns_and_grammars_hold_the_whole_answer() {
    let coloured = |text: &str| {
        let count = text.chars().count();
        (2..=5).contains(&count)
            && text.chars().all(|c| "\u{e4}\u{f6}\u{1F600}\u{4e2d}".contains(c))
    };
    let date = |text: &str| {
        let bytes = text.as_bytes();
        bytes.len() == 7
            && bytes[4] == b'-'
            && [0, 1, 2, 3, 5, 6].iter().all(|at| bytes[*at].is_ascii_digit())
    };
    // What is left after digits with signs between them, any of them a sum in parentheses.
    fn sum(text: &[u8]) -> Option<&[u8]> {
        let mut rest = match text.first()? {
            b'(' => sum(&text[1..])?.strip_prefix(b")")?,
            b'1'..=b'9' => &text[1..],
            _ => return None,
        };
        while let Some((b'+' | b'-', after)) = rest.split_first() {
            rest = match after.first()? {
                b'(' => sum(&after[1..])?.strip_prefix(b")")?,
                b'1'..=b'9' => &after[1..],
                _ => return None,
            };
        }
        Some(rest)
    }
    let summed = |text: &str| sum(text.as_bytes()).is_some_and(<[u8]>::is_empty);
    assert!(summed("1+(2-3)-4") && !summed("1+") && !summed("(1") && !summed("1)"));
    let grammar =
        "start: part (SIGN part)*\npart: \"(\" start \")\" | DIGIT\nSIGN: /[+-]/\nDIGIT: /[1-9]/";

    let cases: [(Form, &dyn Fn(&str) -> bool); 4] = [
        (regex("[\u{e4}\u{f6}\u{1F600}\u{4e2d}]{2,5}"), &coloured),
        (regex(r"\d{4}-[0-9]{2}"), &|text| text.chars().count() == 7),
        (regex(r"^[0-9]{4}-[0-9]{2}$"), &date),
        (Form::Grammar(grammar.to_owned()), &summed),
    ];
    for make in TOKENIZERS {
        let engine = engine(make(), LIMITS);
        for (form, holds) in &cases {
            let mut texts = BTreeSet::new();
            for seed in 0..20 {
                let answer = engine.generate(request(&engine, form, seed, 300)).unwrap();
                let answer = super::tests::answer(answer).await.unwrap();
                if answer.finish == Finish::Eos {
                    assert!(holds(&answer.text), "{form:?} {:?}", answer.text);
                    texts.insert(answer.text);
                }
            }
            assert!(texts.len() > 5, "{form:?} {texts:?}");
        }
    }
}

#[tokio::test]
async fn an_answer_keeps_its_first_space_its_stops_its_length_and_the_models_logprobs() {
    for make in TOKENIZERS {
        let engine = engine(make(), LIMITS);
        let greedy = |form: &Form, max_tokens| Request {
            sampling: Sampling::GREEDY,
            ..request(&engine, form, 0, max_tokens)
        };
        let spaced = answer(engine.generate(greedy(&regex("  a b"), 50)).unwrap()).await.unwrap();
        assert_eq!((spaced.text.as_str(), spaced.finish), ("  a b", Finish::Eos));

        let stopped = Request { stop: vec!["3".into()], ..greedy(&regex("x=12345"), 50) };
        let stopped = answer(engine.generate(stopped).unwrap()).await.unwrap();
        assert_eq!((stopped.text.as_str(), stopped.finish), ("x=12", Finish::Stop));

        let cut = answer(engine.generate(greedy(&regex("[ab]{40}"), 6)).unwrap()).await.unwrap();
        assert_eq!((cut.ids.len(), cut.finish), (6, Finish::Length));
        let all = [vec![3, 4, 5], cut.ids].concat();
        let scores = engine.score(all, Mix::default(), 0, None).await.unwrap();
        for (score, logprob) in scores[2..].iter().zip(cut.logprobs) {
            assert!((score - logprob).abs() < 1e-4, "{score} {logprob}");
        }
    }
}

#[tokio::test]
async fn a_form_that_becomes_too_complex_ends_its_request_only() {
    let engine = engine(testing::words(), LIMITS);
    // Thousands of rules could begin after the third letter.
    let form = Form::Grammar(format!(
        "start: \"kkk\" b\nb: {}\na: \"x\" | \"y\" a \"z\"",
        "a? ".repeat(2000)
    ));
    let failed = answer(engine.generate(request(&engine, &form, 1, 50)).unwrap()).await;
    let error = failed.err().unwrap();
    assert_eq!(error.reason(), Reason::TooLarge, "{error}");
    assert!(error.message().contains("too complex") && !error.message().contains('<'), "{error}");
    let good =
        answer(engine.generate(request(&engine, &regex("ab"), 1, 50)).unwrap()).await.unwrap();
    assert_eq!(good.text, "ab");
    assert!(engine.healthy());
}

#[test]
fn bad_forms_are_refused_and_say_why() {
    let tokenizer = testing::words();
    let vocabulary = vocabulary(&tokenizer);
    let grammar = |text: &str| Form::Grammar(text.to_owned());
    let text = |text: &str| Form::JsonSchema(text.to_owned());
    let long = "x".repeat(70_000);
    for (form, says) in [
        (text(""), "empty"),
        (text("{"), "not JSON"),
        (text("[1]"), "JSON object"),
        (text("false"), "JSON object"),
        (text(r#"{"type": "strin"}"#), "strin"),
        (text(r#"{"type": 3}"#), "type must be"),
        (text(r#"{"not": {"type": "string"}}"#), "not"),
        (text(r##"{"$ref": "#/$defs/none"}"##), "none"),
        (text(r##"{"$ref": "#"}"##), ""),
        (text(r#"{"type": "integer", "minimum": 3, "maximum": 2}"#), "nsatisfiable"),
        (text(&format!("{}{}", "[".repeat(9000), "]".repeat(9000))), "not JSON"),
        (schema(&json!({"type": "string", "pattern": "a?".repeat(2100)})), "patterns"),
        (schema(&json!({"patternProperties": {"a".repeat(4097): {}}})), "patterns"),
        (schema(&json!({"description": long})), "at most 65536"),
        (regex(""), "empty"),
        (regex("(a"), "unclosed group"),
        (regex("a(?=b)"), "look-around"),
        (regex("[a&&b]"), "no answer"),
        (regex(&"a".repeat(4097)), "at most 4096"),
        (grammar("start: missing"), "missing"),
        (grammar("rule: \"x\""), "start"),
        (grammar("start: \"x"), ""),
        (grammar("start: <nothing>"), "nothing"),
        (grammar(&"a".repeat(16_385)), "at most 16384"),
    ] {
        let error = vocabulary.compile(&form).unwrap_err();
        let violation = &error.violations()[0];
        assert_eq!(
            (error.reason(), violation.field.as_str()),
            (Reason::InvalidField, form.field())
        );
        assert!(violation.description.contains(says), "{form:?}: {violation:?}");
        assert!(violation.description.len() < 1300 && !violation.description.contains('\n'));
    }
}

#[test]
fn hostile_forms_end() {
    let vocabulary = vocabulary(&testing::words());
    let chain = |last: &str, rule: &dyn Fn(usize) -> String| {
        let rules: String = (0..900).map(rule).collect();
        Form::Grammar(format!("start: R0\n{rules}R900: {last}\n"))
    };
    let nested = |open: &str, close: &str, times: usize| {
        Form::Grammar(format!("start: {}\"a\"{}", open.repeat(times), close.repeat(times)))
    };
    let refs = json!({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [
        {"$ref": "#/$defs/a"}, {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}}]}}});
    let choices: Vec<_> = (0..12)
        .map(|i| json!({"anyOf": [{"properties": {format!("a{i}"): {}}}, {"required": ["x"]}]}))
        .collect();
    for form in [
        chain("\"a\"", &|i| format!("R{i}: R{} \"b\"\n", i + 1)),
        chain("\"a\"?", &|i| format!("R{i}: R{n} R{n}\n", n = i + 1)),
        chain("\"a\"", &|i| format!("R{i}: \"b\" R{}?\n", i + 1)),
        nested("(", ")", 8000),
        nested("~", "", 16_000),
        nested("[", "]", 8000),
        Form::Grammar("start: start start | \"a\" | ".to_owned()),
        Form::Grammar("start: (\"a\" | b){1,1000000000}\nb: \"c\" b | \"d\"".to_owned()),
        Form::Grammar("start: A\nA: /(.*a.{20})/ & /(.*b.{23})/ & ~/(.*c.{27})/".to_owned()),
        regex(&"a?".repeat(2048)),
        regex(&format!("{}a{}", "(".repeat(200), ")*".repeat(200))),
        regex("((a{1,1000}){1,1000}b?){1,1000}"),
        regex(r"(.*a.{200}|.*b.{199})+"),
        regex(r"(\p{L}\w{3,50}\W+){10,2000}"),
        schema(&refs),
        schema(&json!({"allOf": choices})),
        schema(&json!({"type": "array", "minItems": 1_000_000_000})),
        schema(&json!({"type": "string", "minLength": 1_000_000, "maxLength": 2_000_000_000})),
        schema(&json!({"type": "object", "minProperties": 1_000_000_000})),
        schema(&json!({"type": "integer", "multipleOf": 1_000_003, "maximum": 1e12})),
    ] {
        // Refused, or it runs until it is refused; never a panic and never without an end.
        let Ok(mut constraint) = vocabulary.compile(&form) else { continue };
        let mut rng = Stream::root(1).child("hostile").rng();
        for _ in 0..60 {
            let Ok(allowed) = constraint.allowed() else { break };
            let mut ids = Vec::new();
            allowed.iter_set_entries(|id| ids.push(id as u32));
            let id = ids[rng.random_range(0..ids.len())];
            if id == 256 || constraint.advance(id).unwrap_or(true) {
                break;
            }
        }
    }
}

#[test]
fn an_end_inside_a_grammar_does_not_end_the_answer() {
    let vocabulary = vocabulary(&testing::words());
    let grammar =
        |rest: &str| Form::Grammar(format!("start: text {rest}\ntext[stop=\"\"]: /[ab]+/"));
    let mut last = vocabulary.compile(&grammar("")).unwrap();
    let letter = ids(&mut last).first().copied().unwrap();
    last.advance(letter).unwrap();
    assert!(ids(&mut last).contains(&256));
    let mut inside = vocabulary.compile(&grammar("\"12\"")).unwrap();
    inside.advance(letter).unwrap();
    assert!(!ids(&mut inside).contains(&256));
}

#[test]
fn a_copy_goes_its_own_way() {
    let vocabulary = vocabulary(&testing::words());
    let mut one = vocabulary.compile(&regex("a[0-9]b")).unwrap();
    let a = ids(&mut one).first().copied().unwrap();
    assert!(!one.advance(a).unwrap());
    let mut two = one.clone();
    let digits = ids(&mut one);
    assert_eq!(digits.len(), 10);
    one.advance(*digits.first().unwrap()).unwrap();
    assert_eq!(ids(&mut two), digits);
}

#[test]
fn special_tokens_are_no_text_but_grammars_may_name_them() {
    let tokenizer = testing::bytes();
    assert!(tokenizer.is_special(256) && tokenizer.eos.is_empty());
    let vocabulary = vocabulary(&tokenizer);
    let spelled = ids(&mut vocabulary.compile(&regex("<s>")).unwrap());
    assert_eq!(spelled.len(), 1, "only the letter <: {spelled:?}");
    assert!(!spelled.contains(&256));
    let mut named = vocabulary.compile(&Form::Grammar("start: <s> \"x\"".to_owned())).unwrap();
    assert_eq!(ids(&mut named), BTreeSet::from([256]));
    assert!(!named.advance(256).unwrap());
    // Without end tokens an answer ends where nothing can follow.
    let x = ids(&mut named).first().copied().unwrap();
    assert!(named.advance(x).unwrap());
}
