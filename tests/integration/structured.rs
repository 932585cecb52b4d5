//! Answers held to a form: asked for over the wire and by the command line's own request.

use futures::StreamExt as _;
use planish::proto::v1;
use planish::proto::v1::generate_request::{Constraint, Prompt};
use serde_json::{Value, json};
use tonic::Code;

use crate::harness::{Service, assert_error};
use crate::support;

fn request(constraint: Constraint, seed: u64) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: "models/tiny".into(),
        prompt: Some(Prompt::Text("answer: ".into())),
        max_tokens: 400,
        sampling: Some(v1::SamplingOptions { seed: Some(seed), ..Default::default() }),
        constraint: Some(constraint),
        ..Default::default()
    }
}

/// The whole text and why it ended.
async fn ask(service: &Service, request: v1::GenerateRequest) -> (String, v1::FinishReason) {
    let stream = service.generation().generate(request).await.unwrap().into_inner();
    let parts: Vec<_> = stream.map(Result::unwrap).collect().await;
    let text = parts.iter().map(|p| p.text.as_str()).collect();
    (text, parts.last().unwrap().finish_reason())
}

async fn with_model() -> Service {
    let service = Service::start().await;
    let files = tempfile::tempdir().unwrap();
    service.import("tiny", &support::tiny_model(files.path(), 1, 32)).await;
    service
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_have_the_form_that_was_asked_for() {
    let service = with_model().await;
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["gull", "M\u{f6}we"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": false,
    });
    let mut whole = 0;
    for seed in 0..6 {
        let form = Constraint::JsonSchema(schema.to_string());
        let (text, finish) = ask(&service, request(form, seed)).await;
        if finish != v1::FinishReason::Eos {
            continue;
        }
        whole += 1;
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value.as_object().unwrap().len(), 3, "{text}");
        assert!((1..=8).contains(&value["name"].as_str().unwrap().chars().count()), "{text}");
        assert!((0..=120).contains(&value["age"].as_i64().unwrap()), "{text}");
        assert!(["gull", "M\u{f6}we"].contains(&value["kind"].as_str().unwrap()), "{text}");
    }
    assert!(whole >= 4, "only {whole} of 6 answers ended");

    let (text, finish) =
        ask(&service, request(Constraint::Regex("[a-c]{3}-(x|y)".into()), 1)).await;
    assert_eq!(
        (finish, text.len(), text.as_bytes()[3]),
        (v1::FinishReason::Eos, 5, b'-'),
        "{text}"
    );
    let grammar = Constraint::Grammar("start: \"<\" start \">\" | \"o\"".into());
    let (text, finish) = ask(&service, request(grammar, 1)).await;
    let depth = text.bytes().filter(|b| *b == b'<').count();
    let expected = format!("{}o{}", "<".repeat(depth), ">".repeat(depth));
    assert_eq!((finish, text), (v1::FinishReason::Eos, expected));
    service.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_forms_are_refused_before_anything_is_generated() {
    let service = with_model().await;
    let mut client = service.generation();
    for (form, field) in [
        (Constraint::JsonSchema("{".into()), "json_schema"),
        (Constraint::JsonSchema(r#"{"type": "objec"}"#.into()), "json_schema"),
        (Constraint::JsonSchema(String::new()), "json_schema"),
        (Constraint::Regex("(".into()), "regex"),
        (Constraint::Regex("a".repeat(5000)), "regex"),
        (Constraint::Grammar("start: nothing".into()), "grammar"),
    ] {
        let bad = client.generate(request(form, 1)).await;
        assert_error(bad, Code::InvalidArgument, "INVALID_FIELD", field);
    }
    let endless =
        v1::GenerateRequest { ignore_eos: true, ..request(Constraint::Regex("a".into()), 1) };
    let bad = client.generate(endless).await;
    assert_error(bad, Code::InvalidArgument, "INVALID_FIELD", "ignore_eos");
    // What was refused has left nothing behind.
    let (text, _) = ask(&service, request(Constraint::Regex("a".into()), 1)).await;
    assert_eq!(text, "a");
    service.running.stop().await.unwrap();
}
