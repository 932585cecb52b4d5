//! What requests ask for, and what is refused.

use super::*;
use crate::proto::inference::InferTensorContents;
use crate::proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};

fn strings(name: &str, texts: &[&str]) -> InferInputTensor {
    let bytes_contents = texts.iter().map(|t| Bytes::copy_from_slice(t.as_bytes())).collect();
    InferInputTensor {
        name: name.into(),
        datatype: "BYTES".into(),
        shape: vec![texts.len() as i64],
        contents: Some(InferTensorContents { bytes_contents, ..Default::default() }),
        ..Default::default()
    }
}

fn ids(values: &[i64]) -> InferInputTensor {
    InferInputTensor {
        name: "input_ids".into(),
        datatype: "INT64".into(),
        shape: vec![1, values.len() as i64],
        contents: Some(InferTensorContents {
            int64_contents: values.to_vec(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn request(inputs: Vec<InferInputTensor>) -> ModelInferRequest {
    ModelInferRequest { inputs, ..Default::default() }
}

fn with(mut request: ModelInferRequest, key: &str, choice: ParameterChoice) -> ModelInferRequest {
    let value = pb::InferParameter { parameter_choice: Some(choice) };
    request.parameters.insert(key.into(), value);
    request
}

/// The field that a refused request blames, and the message.
fn refused(request: ModelInferRequest) -> (String, String) {
    let error = convert::ask(request, 8).unwrap_err();
    (error.violations()[0].field.clone(), error.message().to_owned())
}

#[test]
fn options_come_as_inputs_and_as_parameters() {
    let mut asked = request(vec![strings("text_input", &["hi"]), strings("stop", &["a", "b"])]);
    asked.inputs.push(InferInputTensor {
        name: "max_tokens".into(),
        datatype: "INT32".into(),
        shape: vec![1, 1],
        contents: Some(InferTensorContents { int_contents: vec![7], ..Default::default() }),
        ..Default::default()
    });
    let asked = with(asked, "temperature", ParameterChoice::Int64Param(2));
    let asked = with(asked, "top_p", ParameterChoice::DoubleParam(0.5));
    let asked = with(asked, "seed", ParameterChoice::Uint64Param(u64::MAX));
    let asked = with(asked, "ignore_eos", ParameterChoice::BoolParam(true));
    let asked = with(asked, "triton_enable_empty_final_response", ParameterChoice::BoolParam(true));
    let Ask::Text(got) = convert::ask(asked, 8).unwrap() else { panic!("no text") };
    let expected = v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Text("hi".into())),
        max_tokens: 7,
        sampling: Some(v1::SamplingOptions {
            temperature: Some(2.0),
            top_p: Some(0.5),
            seed: Some(u64::MAX),
            ..Default::default()
        }),
        stop: vec!["a".into(), "b".into()],
        ignore_eos: true,
        ..Default::default()
    };
    assert_eq!(*got, expected);

    let asked = with(request(vec![ids(&[5, 6])]), "last_only", ParameterChoice::BoolParam(true));
    let expected = Ask::Logits { tokens: vec![5, 6], last_only: true };
    assert_eq!(convert::ask(asked, 8).unwrap(), expected);
}

#[test]
fn inputs_that_do_not_fit_are_refused_by_name() {
    let text = || strings("text_input", &["hi"]);
    let (field, message) = refused(request(vec![text(), strings("prompt", &["x"])]));
    assert_eq!(field, "inputs[1].name");
    assert!(message.contains("no input 'prompt'") && message.contains("text_input"), "{message}");
    let cases = [
        (request(vec![]), "inputs"),
        (request(vec![text(), ids(&[1])]), "inputs"),
        (request(vec![text(), text()]), "inputs[1].name"),
        (request(vec![strings("text_input", &["a", "b"])]), "inputs[0].shape"),
        (request(vec![strings("text_input", &[])]), "inputs[0]"),
        (request(vec![ids(&[1; 9])]), "inputs[0].shape"),
        (request(vec![ids(&[-1])]), "inputs[0]"),
        (request(vec![ids(&[1 << 32])]), "inputs[0]"),
        (request(vec![InferInputTensor { shape: vec![2, 1], ..ids(&[1, 1]) }]), "inputs[0].shape"),
        (request(vec![strings("max_tokens", &["9"])]), "inputs[0].datatype"),
        (request(vec![strings("stop", &["x"]), ids(&[1])]), "inputs[0]"),
    ];
    for (at, (request, expected)) in cases.into_iter().enumerate() {
        let (field, message) = refused(request);
        assert_eq!(field, expected, "case {at}: {message}");
    }
    let latin = InferInputTensor {
        contents: Some(InferTensorContents {
            bytes_contents: vec![Bytes::from_static(&[0xe9])],
            ..Default::default()
        }),
        ..text()
    };
    let (field, message) = refused(request(vec![latin]));
    assert!(field == "inputs[0]" && message.contains("UTF-8"), "{message}");
    let mut shared = text();
    shared.parameters.insert("shared_memory_region".into(), pb::InferParameter::default());
    let (field, message) = refused(request(vec![shared]));
    assert_eq!(field, "inputs[0].parameters");
    assert!(message.contains("shared_memory_region"), "{message}");
    let raw = ModelInferRequest {
        raw_input_contents: vec![Bytes::new(), Bytes::new()],
        ..request(vec![text()])
    };
    assert_eq!(refused(raw).0, "raw_input_contents");
}

#[test]
fn parameters_and_outputs_that_do_not_fit_are_refused_by_name() {
    use ParameterChoice as P;
    let text = || request(vec![strings("text_input", &["hi"])]);
    for (key, choice) in [
        ("sequence_id", P::Int64Param(1)),
        ("max_tokens", P::Int64Param(-1)),
        ("max_tokens", P::Int64Param(1 << 32)),
        ("max_tokens", P::DoubleParam(1.0)),
        ("temperature", P::StringParam("warm".into())),
        ("seed", P::Int64Param(-1)),
        ("stop", P::BoolParam(true)),
        ("last_only", P::BoolParam(true)),
    ] {
        let (field, message) = refused(with(text(), key, choice));
        assert_eq!(field, format!("parameters.{key}"), "{message}");
    }
    let twice = request(vec![strings("text_input", &["hi"]), strings("stop", &["x"])]);
    let (field, _) = refused(with(twice, "stop", P::StringParam("y".into())));
    assert_eq!(field, "parameters.stop");
    let mut empty = text();
    empty.parameters.insert("seed".into(), pb::InferParameter::default());
    assert_eq!(refused(empty).0, "parameters.seed");

    let output =
        |name: &str| InferRequestedOutputTensor { name: name.into(), ..Default::default() };
    let asks = |outputs| ModelInferRequest { outputs, ..text() };
    assert!(convert::ask(asks(vec![output("text_output")]), 8).is_ok());
    let (field, message) = refused(asks(vec![output("embedding")]));
    assert_eq!(field, "outputs[0].name");
    assert!(message.contains("'embedding'") && message.contains("text_output"), "{message}");
    assert_eq!(refused(asks(vec![output("logits")])).0, "outputs[0].name");
    let twice = vec![output("text_output"), output("text_output")];
    assert_eq!(refused(asks(twice)).0, "outputs[1].name");
    let mut classes = output("text_output");
    classes.parameters.insert("classification".into(), pb::InferParameter::default());
    assert_eq!(refused(asks(vec![classes])).0, "outputs[0].parameters");
}

#[test]
fn names_have_three_forms() {
    let name = |name, version| resource(name, version, "version").unwrap();
    assert_eq!(name("m", ""), "models/m");
    assert_eq!(name("models/m", ""), "models/m");
    assert_eq!(name("m", "3"), "models/m/versions/3");
    assert_eq!(name("models/m/versions/3", ""), "models/m/versions/3");
    assert_eq!(name("models/m/versions/3", "3"), "models/m/versions/3");
    for (name, version) in
        [("models/m/versions/3", "4"), ("m", "0"), ("m", "latest"), ("m", "1/versions/1")]
    {
        let error = resource(name, version, "version").unwrap_err();
        assert_eq!(error.violations()[0].field, "version", "{name} {version}");
    }
    for bad in ["", "M", "models/", "m/1", "../m", "datasets/m"] {
        assert_eq!(
            resource(bad, "", "version").unwrap_err().reason(),
            Reason::InvalidName,
            "{bad}"
        );
    }
}

#[test]
fn logits_must_fit_a_message() {
    // 3 * 1000 * 4 bytes beside the frame.
    assert!(check_size(3, 1000, 12_000 + FRAME).is_ok());
    let error = check_size(3, 1000, 11_999 + FRAME).unwrap_err();
    assert_eq!(
        (error.reason(), error.violations()[0].field.as_str()),
        (Reason::TooLarge, "input_ids")
    );
    assert!(error.message().contains("12000 bytes") && error.message().contains("last_only"));
    // What overflows is too large, whatever the limit.
    assert!(check_size(usize::MAX, usize::MAX, u64::MAX).is_err());
    assert!(check_size(1, 1, 0).is_err());
}

#[test]
fn failures_on_a_stream_say_why() {
    let status = Status::from(Error::field("inputs", "nothing"));
    let message = failed(&status, "7".into());
    assert!(message.error_message.contains("nothing"));
    let response = message.infer_response.unwrap();
    assert_eq!(response.id, "7");
    let choice = |key: &str| response.parameters[key].parameter_choice.clone().unwrap();
    assert_eq!(choice("reason"), ParameterChoice::StringParam("INVALID_FIELD".into()));
    assert_eq!(choice(FINAL), ParameterChoice::BoolParam(true));
    assert!(!failed(&Status::unknown(""), String::new()).error_message.is_empty());
}
