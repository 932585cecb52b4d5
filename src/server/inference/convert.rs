//! What the tensors and parameters of a request ask of a decoder, and what a decoder takes and gives.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::tensor::{self, Datatype, Values};
use crate::error::{Error, Result};
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::model_infer_request::InferRequestedOutputTensor;
use crate::proto::inference::{DataType, ModelInferRequest};
use crate::proto::v1;

pub const TEXT_INPUT: &str = "text_input";
pub const TOKEN_INPUT: &str = "input_ids";
pub const TEXT_OUTPUT: &str = "text_output";
pub const LOGITS_OUTPUT: &str = "logits";

/// Asks for the logits after the last token alone.
const LAST_ONLY: &str = "last_only";

/// Official clients send it on streams; an answer ends with a marked response either way.
const EMPTY_FINAL_RESPONSE: &str = "triton_enable_empty_final_response";

/// Stop strings of a request.
const MAX_STOPS: usize = 16;

const INTEGER: &[Datatype] =
    &[Datatype::Int32, Datatype::Int64, Datatype::Uint32, Datatype::Uint64];
const FLOAT: &[Datatype] = &[Datatype::Fp32, Datatype::Fp64];
const BOOL: &[Datatype] = &[Datatype::Bool];
const STRING: &[Datatype] = &[Datatype::Bytes];

/// Options of a request, each taken as an input tensor or as a parameter: name, types, most elements.
const OPTIONS: &[(&str, &[Datatype], usize)] = &[
    ("max_tokens", INTEGER, 1),
    ("temperature", FLOAT, 1),
    ("top_k", INTEGER, 1),
    ("top_p", FLOAT, 1),
    ("min_p", FLOAT, 1),
    ("repetition_penalty", FLOAT, 1),
    ("presence_penalty", FLOAT, 1),
    ("frequency_penalty", FLOAT, 1),
    ("seed", INTEGER, 1),
    ("stop", STRING, MAX_STOPS),
    ("ignore_eos", BOOL, 1),
    (LAST_ONLY, BOOL, 1),
];

/// What a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    /// A text; the request has no model yet.
    Text(Box<v1::GenerateRequest>),
    Logits {
        tokens: Vec<u32>,
        last_only: bool,
    },
}

/// Takes a request apart. `context` is the most tokens it may have.
pub fn ask(request: ModelInferRequest, context: usize) -> Result<Ask> {
    let raw = request.raw_input_contents;
    if !raw.is_empty() && raw.len() != request.inputs.len() {
        let problem = format!(
            "{} entries for {} inputs; send the bytes of every input or of none",
            raw.len(),
            request.inputs.len()
        );
        return Err(Error::field("raw_input_contents", problem));
    }
    let mut raw = raw.into_iter();
    // Where each value came from, and the value.
    let mut given: BTreeMap<&str, (String, Values)> = BTreeMap::new();
    for (at, input) in request.inputs.into_iter().enumerate() {
        let raw = raw.next();
        let field = format!("inputs[{at}]");
        let (name, accepted, most) = known_input(&input.name, context).ok_or_else(|| {
            let names: Vec<_> = OPTIONS.iter().map(|(name, ..)| *name).collect();
            let problem = format!(
                "the model has no input '{}'; it takes {TEXT_INPUT} or {TOKEN_INPUT}, and {}",
                shown(&input.name),
                names.join(", ")
            );
            Error::field(format!("{field}.name"), problem)
        })?;
        if given.contains_key(name) {
            return Err(Error::field(format!("{field}.name"), format!("'{name}' comes twice")));
        }
        if let Some(parameter) = input.parameters.keys().next() {
            return Err(no_parameter(&format!("{field}.parameters"), name, parameter));
        }
        if name == TOKEN_INPUT && !matches!(input.shape[..], [_] | [1, _]) {
            let problem = format!("'{name}' has the shape [n] or [1, n]; send one sequence");
            return Err(Error::field(format!("{field}.shape"), problem));
        }
        given.insert(name, (field, tensor::read(at, input, raw, accepted, most)?));
    }
    for (key, parameter) in request.parameters {
        let field = format!("parameters.{}", shown(&key));
        let value = match parameter.parameter_choice {
            Some(ParameterChoice::BoolParam(value)) => Values::Bools(vec![value]),
            Some(ParameterChoice::Int64Param(value)) => Values::Integers(vec![value.into()]),
            Some(ParameterChoice::Uint64Param(value)) => Values::Integers(vec![value.into()]),
            Some(ParameterChoice::DoubleParam(value)) => Values::Floats(vec![value]),
            Some(ParameterChoice::StringParam(value)) => Values::Strings(vec![value.into()]),
            None => return Err(Error::field(field, "has no value")),
        };
        if key == EMPTY_FINAL_RESPONSE {
            continue;
        }
        let Some((name, accepted, _)) = OPTIONS.iter().find(|(name, ..)| *name == key) else {
            let names: Vec<_> = OPTIONS.iter().map(|(name, ..)| *name).collect();
            let problem = format!("unknown; the parameters are {}", names.join(", "));
            return Err(Error::field(field, problem));
        };
        // Programs write whole numbers where fractions are meant.
        let value = match value {
            Values::Integers(values) if *accepted == FLOAT => {
                Values::Floats(values.into_iter().map(|v| v as f64).collect())
            }
            value => value,
        };
        if given.contains_key(name) {
            return Err(Error::field(field, "is an input of this request too; send it once"));
        }
        given.insert(name, (field, value));
    }

    let tokens = given.remove(TOKEN_INPUT);
    let text = given.remove(TEXT_INPUT);
    match (text, tokens) {
        (Some((field, text)), None) => {
            check_outputs(&request.outputs, TEXT_OUTPUT)?;
            let text = one_string(&field, text)?;
            generate(text, given).map(|request| Ask::Text(Box::new(request)))
        }
        (None, Some((field, tokens))) => {
            check_outputs(&request.outputs, LOGITS_OUTPUT)?;
            let tokens = token_ids(&field, tokens)?;
            let last_only = match given.remove(LAST_ONLY) {
                Some((field, value)) => one_bool(&field, value)?,
                None => false,
            };
            match given.into_iter().next() {
                Some((name, (field, _))) => Err(Error::field(
                    field,
                    format!("'{name}' is for answers to {TEXT_INPUT}; leave it out"),
                )),
                None => Ok(Ask::Logits { tokens, last_only }),
            }
        }
        (Some(_), Some(_)) => {
            Err(Error::field("inputs", format!("{TEXT_INPUT} and {TOKEN_INPUT}; send one of them")))
        }
        (None, None) => {
            Err(Error::field("inputs", format!("neither {TEXT_INPUT} nor {TOKEN_INPUT}")))
        }
    }
}

/// Name, types and most elements of an input.
fn known_input(name: &str, context: usize) -> Option<(&'static str, &'static [Datatype], usize)> {
    match name {
        TEXT_INPUT => Some((TEXT_INPUT, STRING, 1)),
        TOKEN_INPUT => Some((TOKEN_INPUT, &[Datatype::Int64, Datatype::Int32], context)),
        _ => OPTIONS.iter().find(|(known, ..)| *known == name).copied(),
    }
}

fn check_outputs(outputs: &[InferRequestedOutputTensor], name: &str) -> Result<()> {
    for (at, output) in outputs.iter().enumerate() {
        let field = format!("outputs[{at}]");
        if output.name != name {
            let problem = format!(
                "'{}' is no output of this request; {TEXT_INPUT} gives {TEXT_OUTPUT}, {TOKEN_INPUT} \
                 gives {LOGITS_OUTPUT}",
                shown(&output.name)
            );
            return Err(Error::field(format!("{field}.name"), problem));
        }
        if at > 0 {
            return Err(Error::field(format!("{field}.name"), format!("'{name}' comes twice")));
        }
        if let Some(parameter) = output.parameters.keys().next() {
            return Err(no_parameter(&format!("{field}.parameters"), name, parameter));
        }
    }
    Ok(())
}

/// Shared memory and classification come as parameters of tensors.
fn no_parameter(field: &str, tensor: &str, parameter: &str) -> Error {
    let problem =
        format!("'{}' of '{tensor}' is not offered; send and take plain tensors", shown(parameter));
    Error::field(field, problem)
}

fn generate(text: String, given: BTreeMap<&str, (String, Values)>) -> Result<v1::GenerateRequest> {
    let mut request = v1::GenerateRequest {
        prompt: Some(v1::generate_request::Prompt::Text(text)),
        ..Default::default()
    };
    let mut sampling = v1::SamplingOptions::default();
    for (name, (field, value)) in given {
        let field = field.as_str();
        match name {
            "max_tokens" => request.max_tokens = integer(field, value)?,
            "temperature" => sampling.temperature = Some(float(field, value)?),
            "top_k" => sampling.top_k = integer(field, value)?,
            "top_p" => sampling.top_p = Some(float(field, value)?),
            "min_p" => sampling.min_p = float(field, value)?,
            "repetition_penalty" => sampling.repetition_penalty = Some(float(field, value)?),
            "presence_penalty" => sampling.presence_penalty = float(field, value)?,
            "frequency_penalty" => sampling.frequency_penalty = float(field, value)?,
            "seed" => sampling.seed = Some(integer(field, value)?),
            "stop" => request.stop = strings(field, value)?,
            "ignore_eos" => request.ignore_eos = one_bool(field, value)?,
            _ => {
                let problem = format!("'{name}' is for {TOKEN_INPUT}; leave it out");
                return Err(Error::field(field, problem));
            }
        }
    }
    request.sampling = Some(sampling);
    Ok(request)
}

fn one<T>(field: &str, values: Vec<T>) -> Result<T> {
    let count = values.len();
    let mut values = values.into_iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Ok(value),
        _ => Err(Error::field(field, format!("{count} elements; send one"))),
    }
}

fn wrong(field: &str, kind: &str) -> Error {
    Error::field(field, format!("is no {kind}; send one"))
}

fn one_bool(field: &str, value: Values) -> Result<bool> {
    match value {
        Values::Bools(values) => one(field, values),
        _ => Err(wrong(field, "boolean")),
    }
}

fn integer<T: TryFrom<i128>>(field: &str, value: Values) -> Result<T> {
    let Values::Integers(values) = value else { return Err(wrong(field, "whole number")) };
    let value = one(field, values)?;
    let bits = 8 * size_of::<T>();
    T::try_from(value).map_err(|_| {
        Error::field(field, format!("{value} does not fit {bits} bits without a sign"))
    })
}

fn float(field: &str, value: Values) -> Result<f32> {
    match value {
        Values::Floats(values) => Ok(one(field, values)? as f32),
        _ => Err(wrong(field, "number")),
    }
}

fn strings(field: &str, value: Values) -> Result<Vec<String>> {
    let Values::Strings(values) = value else { return Err(wrong(field, "text")) };
    values.into_iter().map(|bytes| utf8(field, bytes)).collect()
}

fn one_string(field: &str, value: Values) -> Result<String> {
    one(field, strings(field, value)?)
}

fn utf8(field: &str, bytes: Bytes) -> Result<String> {
    String::from_utf8(bytes.into())
        .map_err(|_| Error::field(field, "is not UTF-8; encode the text as UTF-8"))
}

fn token_ids(field: &str, value: Values) -> Result<Vec<u32>> {
    let Values::Integers(values) = value else { return Err(wrong(field, "token id")) };
    let ids = values.into_iter().enumerate().map(|(at, id)| {
        u32::try_from(id)
            .map_err(|_| Error::field(field, format!("{id} at place {at} is no token id")))
    });
    ids.collect()
}

/// A piece of hostile text short enough for a message.
fn shown(text: &str) -> String {
    text.chars().take(64).collect::<String>().escape_debug().to_string()
}

/// A tensor as metadata and configuration describe it.
pub struct Spec {
    pub name: &'static str,
    pub datatype: Datatype,
    pub shape: Vec<i64>,
    pub optional: bool,
}

/// Inputs of a decoder. Without a tokenizer (`text` false) it takes token ids only.
pub fn inputs(text: bool) -> Vec<Spec> {
    let spec = |name, datatype, shape, optional| Spec { name, datatype, shape, optional };
    let mut specs = vec![spec(TOKEN_INPUT, Datatype::Int64, vec![1, -1], text)];
    if text {
        specs.insert(0, spec(TEXT_INPUT, Datatype::Bytes, vec![1], true));
    }
    let of_text = |name: &str| name != LAST_ONLY;
    for &(name, accepted, most) in OPTIONS.iter().filter(|(name, ..)| text || !of_text(name)) {
        let datatype = match accepted {
            [] => continue,
            // The type that programs have at hand; the others are taken too.
            [first, ..] => *first,
        };
        specs.push(spec(name, datatype, vec![if most == 1 { 1 } else { -1 }], true));
    }
    specs
}

/// Outputs of a decoder with a vocabulary of `vocab` tokens (-1: not known).
pub fn outputs(text: bool, vocab: i64) -> Vec<Spec> {
    let spec = |name, datatype, shape| Spec { name, datatype, shape, optional: false };
    let mut specs = vec![spec(LOGITS_OUTPUT, Datatype::Fp32, vec![1, -1, vocab])];
    if text {
        specs.insert(0, spec(TEXT_OUTPUT, Datatype::Bytes, vec![1]));
    }
    specs
}

/// The type as configurations spell it.
pub fn data_type(datatype: Datatype) -> DataType {
    match datatype {
        Datatype::Bool => DataType::TypeBool,
        Datatype::Int32 => DataType::TypeInt32,
        Datatype::Int64 => DataType::TypeInt64,
        Datatype::Uint32 => DataType::TypeUint32,
        Datatype::Uint64 => DataType::TypeUint64,
        Datatype::Fp32 => DataType::TypeFp32,
        Datatype::Fp64 => DataType::TypeFp64,
        Datatype::Bytes => DataType::TypeString,
    }
}
