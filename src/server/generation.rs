//! Text from language models.

use std::sync::Arc;

use futures::Stream;
use rand::Rng as _;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use super::State;
use super::caller::{self, Caller};
use super::download::Messages;
use crate::data::chat;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Reason, Result};
use crate::proto::v1;
use crate::proto::v1::generation_service_server::GenerationService;
use crate::proto::v1::{generate_request, score_request, tokenize_request};
use crate::serve::constraint::Form;
use crate::serve::engine::{self, Event, Finish};
use crate::serve::sample::Sampling;

const DEFAULT_TOKENS: u32 = 128;
const MAX_TOP_LOGPROBS: u32 = 20;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_MESSAGES: usize = 4096;
const ROLES: &[&str] = &["system", "user", "assistant"];

pub struct Generation(pub Arc<State>);

#[tonic::async_trait]
impl GenerationService for Generation {
    type GenerateStream = Messages<v1::GenerateResponse>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let caller = caller::of(&request);
        let request = request.into_inner();
        let seed = request.sampling.and_then(|s| s.seed).unwrap_or_else(|| rand::rng().random());
        let sampling = sampling(&request.sampling.unwrap_or_default(), seed)?;
        check(&request)?;
        let form = request.constraint.map(form);
        let prompt = match request.prompt {
            None => return Err(Error::field("prompt", "missing; give text, chat or tokens").into()),
            Some(generate_request::Prompt::Text(text)) => Input::Text { text, start: true },
            Some(generate_request::Prompt::Chat(chat)) => Input::Chat(conversation(chat)?),
            Some(generate_request::Prompt::Tokens(tokens)) => Input::Tokens(tokens.ids),
        };
        let row = self.0.store.version(&request.model).await?;
        let adapters = super::adapters::loaded::resolve(&self.0, &row, &request.adapters).await?;
        let engine = self.0.engine(&row).await?;
        let tokenizer = engine.model().tokenizer.clone();
        if !request.stop.is_empty() && tokenizer.is_none() {
            return Err(no_tokenizer().into());
        }
        let end = if request.ignore_eos {
            Vec::new()
        } else {
            end_tokens(&engine.model().config, tokenizer.as_deref())
        };
        let (prompt, constraint) = match (prompt, form) {
            // Nothing to work out, so no other thread is woken for it.
            (Input::Tokens(ids), None) => (ids, None),
            (prompt, form) => {
                let compiler = engine.clone();
                super::blocking(move || {
                    let constraint =
                        form.map(|form| compiler.vocabulary()?.compile(&form)).transpose()?;
                    Ok((prompt.tokens(tokenizer.as_deref())?, constraint))
                })
                .await?
            }
        };
        let prompt_tokens = prompt.len() as u64;
        let mut events = engine.generate(engine::Request {
            prompt,
            max_tokens: as_size(if request.max_tokens == 0 {
                DEFAULT_TOKENS
            } else {
                request.max_tokens
            }),
            sampling,
            end,
            stop: request.stop,
            logprobs: request.logprobs,
            top_logprobs: as_size(request.top_logprobs),
            constraint,
            client: caller.client,
            adapters,
            deadline: caller.deadline,
        })?;
        metrics::counter!("planish_prompt_tokens_total").increment(prompt_tokens);
        // The headers of the answer go with its first message: alone they would wake the client while the engine
        // computes, on the same processors. What fails before that is a plain status.
        let first = received(events.recv().await)?;
        Ok(Response::new(Box::pin(answer(first, events, row.name(), seed))))
    }

    async fn score(
        &self,
        request: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        let caller = caller::of(&request);
        let request = request.into_inner();
        let input = match request.input {
            None => return Err(Error::field("input", "missing; give text or tokens").into()),
            Some(score_request::Input::Text(text)) => Input::Text { text, start: true },
            Some(score_request::Input::Tokens(tokens)) => Input::Tokens(tokens.ids),
        };
        let row = self.0.store.version(&request.model).await?;
        let adapters = super::adapters::loaded::resolve(&self.0, &row, &request.adapters).await?;
        let engine = self.0.engine(&row).await?;
        let tokenizer = engine.model().tokenizer.clone();
        let for_tokens = tokenizer.clone();
        let ids = super::blocking(move || input.tokens(for_tokens.as_deref())).await?;
        if ids.is_empty() {
            return Err(Error::field("input", "no tokens; give at least one").into());
        }
        let Caller { client, deadline } = caller;
        let scores = engine.score(ids.clone(), adapters, client, deadline).await?;
        let total: f64 = scores.iter().copied().map(f64::from).sum();
        // The first token has no score of its own.
        let logprobs = std::iter::once(None).chain(scores.iter().copied().map(Some));
        let tokens = ids.iter().zip(logprobs).map(|(id, logprob)| v1::Token {
            id: *id,
            text: token_text(tokenizer.as_deref(), *id),
            logprob,
            alternatives: Vec::new(),
        });
        Ok(Response::new(v1::ScoreResponse {
            tokens: tokens.collect(),
            total_logprob: total,
            perplexity: (-total / scores.len().max(1) as f64).exp(),
        }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let start = request.add_special_tokens;
        let input = match request.input {
            None => return Err(Error::field("input", "missing; give text, tokens or chat").into()),
            Some(tokenize_request::Input::Text(text)) => Input::Text { text, start },
            Some(tokenize_request::Input::Tokens(tokens)) => Input::Tokens(tokens.ids),
            Some(tokenize_request::Input::Chat(chat)) => Input::Chat(conversation(chat)?),
        };
        let row = self.0.store.version(&request.model).await?;
        let tokenizer = self.0.tokenizer(&row).await?.ok_or_else(no_tokenizer)?;
        let response = super::blocking(move || {
            let ids = input.tokens(Some(&tokenizer))?;
            if let Some(id) = ids.iter().find(|id| as_size(**id) >= tokenizer.vocab_size()) {
                return Err(Error::field(
                    "tokens",
                    format!("{id} is outside the vocabulary of {} ids", tokenizer.vocab_size()),
                ));
            }
            let text = tokenizer.decode(&ids, false)?;
            let tokens = ids.into_iter().map(|id| v1::Token {
                id,
                text: tokenizer.token_text(id),
                ..Default::default()
            });
            Ok(v1::TokenizeResponse { tokens: tokens.collect(), text })
        });
        Ok(Response::new(response.await?))
    }
}

/// What a client gives in place of tokens.
enum Input {
    Text { text: String, start: bool },
    Chat(Vec<chat::Message>),
    Tokens(Vec<u32>),
}

impl Input {
    /// The tokens; long texts take a while, so this is for a blocking thread. Special tokens that the
    /// text spells out are recognised: who gives raw text may lay out turns by hand.
    fn tokens(self, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>> {
        match self {
            Self::Tokens(ids) => Ok(ids),
            Self::Text { text, start } => {
                tokenizer.ok_or_else(no_tokenizer)?.encode(&text, start, true)
            }
            Self::Chat(messages) => {
                chat::encode(tokenizer.ok_or_else(no_tokenizer)?, &messages, true)
            }
        }
    }
}

fn no_tokenizer() -> Error {
    Error::new(
        Reason::ModelUnsuitable,
        "the model has no tokenizer; send token ids and no stop strings, or import it with one",
    )
}

fn form(constraint: generate_request::Constraint) -> Form {
    match constraint {
        generate_request::Constraint::JsonSchema(text) => Form::JsonSchema(text),
        generate_request::Constraint::Regex(text) => Form::Regex(text),
        generate_request::Constraint::Grammar(text) => Form::Grammar(text),
    }
}

fn conversation(chat: v1::Chat) -> Result<Vec<chat::Message>> {
    if chat.messages.is_empty() || chat.messages.len() > MAX_MESSAGES {
        return Err(Error::field(
            "chat.messages",
            format!("1 to {MAX_MESSAGES} messages are taken"),
        ));
    }
    let messages = chat.messages.into_iter().enumerate().map(|(index, message)| {
        if !ROLES.contains(&message.role.as_str()) {
            return Err(Error::field(
                format!("chat.messages[{index}].role"),
                format!("none of {}", ROLES.join(", ")),
            ));
        }
        Ok(chat::Message { role: message.role, content: message.content })
    });
    messages.collect()
}

fn check(request: &v1::GenerateRequest) -> Result<()> {
    if request.stop.len() > MAX_STOPS {
        return Err(Error::field("stop", format!("more than {MAX_STOPS} strings")));
    }
    for (index, stop) in request.stop.iter().enumerate() {
        if stop.is_empty() || stop.len() > MAX_STOP_BYTES {
            let problem = format!("1 to {MAX_STOP_BYTES} bytes are taken");
            return Err(Error::field(format!("stop[{index}]"), problem));
        }
    }
    if request.top_logprobs > MAX_TOP_LOGPROBS {
        return Err(Error::field("top_logprobs", format!("more than {MAX_TOP_LOGPROBS}")));
    }
    if request.top_logprobs > 0 && !request.logprobs {
        return Err(Error::field("top_logprobs", "needs logprobs; set both"));
    }
    if request.ignore_eos && request.constraint.is_some() {
        let problem = "an answer under json_schema, regex or grammar ends where its form does";
        return Err(Error::field("ignore_eos", problem));
    }
    Ok(())
}

fn sampling(options: &v1::SamplingOptions, seed: u64) -> Result<Sampling> {
    let bad = |name: &str, value: f32, domain: &str| {
        Err(Error::field(format!("sampling.{name}"), format!("{value} is outside {domain}")))
    };
    let temperature = options.temperature.unwrap_or(1.0);
    // `contains` is false for what is not a number.
    if !(0.0..=100.0).contains(&temperature) {
        return bad("temperature", temperature, "0 to 100");
    }
    let top_p = options.top_p.unwrap_or(1.0);
    if !(top_p > 0.0 && top_p <= 1.0) {
        return bad("top_p", top_p, "(0, 1]");
    }
    if !(0.0..=1.0).contains(&options.min_p) {
        return bad("min_p", options.min_p, "[0, 1]");
    }
    let repetition_penalty = options.repetition_penalty.unwrap_or(1.0);
    if !(0.01..=100.0).contains(&repetition_penalty) {
        return bad("repetition_penalty", repetition_penalty, "0.01 to 100");
    }
    for (name, value) in [
        ("presence_penalty", options.presence_penalty),
        ("frequency_penalty", options.frequency_penalty),
    ] {
        if !(-100.0..=100.0).contains(&value) {
            return bad(name, value, "-100 to 100");
        }
    }
    Ok(Sampling {
        temperature,
        top_k: as_size(options.top_k),
        top_p,
        min_p: options.min_p,
        repetition_penalty,
        presence_penalty: options.presence_penalty,
        frequency_penalty: options.frequency_penalty,
        seed,
    })
}

/// The tokens that end an answer: the tokenizer's, or the configuration's for a model without one.
fn end_tokens(config: &serde_json::Value, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    if let Some(tokenizer) = tokenizer {
        return tokenizer.eos.clone();
    }
    let id = |v: &serde_json::Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(serde_json::Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

/// An engine that is gone sends no end.
fn received(event: Option<Result<Event>>) -> Result<Event> {
    event.unwrap_or_else(|| Err(Error::new(Reason::NotReady, "the model was unloaded; ask again")))
}

/// The engine's events as messages, `first` before all. Dropping the stream drops the receiver, which frees the slot.
fn answer(
    first: Event,
    mut events: mpsc::Receiver<Result<Event>>,
    model: String,
    seed: u64,
) -> impl Stream<Item = Result<v1::GenerateResponse, Status>> + Send {
    async_stream::try_stream! {
        // Only the first message names the model.
        let (mut model, mut first) = (model, Some(first));
        loop {
            let event = match first.take() {
                Some(event) => event,
                None => received(events.recv().await)?,
            };
            let model = std::mem::take(&mut model);
            match event {
                Event::Tokens { tokens, text } => {
                    metrics::counter!("planish_generated_tokens_total")
                        .increment(tokens.len() as u64);
                    let tokens = tokens.into_iter().map(token).collect();
                    yield v1::GenerateResponse { text, tokens, model, ..Default::default() };
                }
                Event::Done {
                    finish,
                    prompt_tokens,
                    cached_prompt_tokens,
                    generated_tokens,
                    queue_seconds,
                    prefill_seconds,
                    decode_seconds,
                    text,
                } => {
                    metrics::counter!("planish_cached_prompt_tokens_total")
                        .increment(cached_prompt_tokens as u64);
                    let reason = match finish {
                        Finish::Eos => v1::FinishReason::Eos,
                        Finish::Stop => v1::FinishReason::Stop,
                        Finish::Length => v1::FinishReason::Length,
                    };
                    yield v1::GenerateResponse {
                        text,
                        tokens: Vec::new(),
                        finish_reason: reason.into(),
                        usage: Some(v1::Usage {
                            prompt_tokens: count(prompt_tokens),
                            generated_tokens: count(generated_tokens),
                            cached_prompt_tokens: count(cached_prompt_tokens),
                        }),
                        timings: Some(v1::Timings { queue_seconds, prefill_seconds, decode_seconds }),
                        seed,
                        model,
                    };
                    break;
                }
            }
        }
    }
}

fn token(token: engine::Token) -> v1::Token {
    let alternative = |(id, text, logprob)| v1::TokenAlternative { id, text, logprob };
    v1::Token {
        id: token.id,
        text: token.text,
        logprob: token.logprob,
        alternatives: token.alternatives.into_iter().map(alternative).collect(),
    }
}

fn token_text(tokenizer: Option<&Tokenizer>, id: u32) -> String {
    tokenizer.map(|t| t.token_text(id)).unwrap_or_default()
}

fn as_size(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    #[test]
    fn sampling_has_defaults_and_bounds() {
        let defaults = sampling(&v1::SamplingOptions::default(), 7).unwrap();
        assert_eq!(
            (defaults.temperature, defaults.top_p, defaults.repetition_penalty, defaults.seed),
            (1.0, 1.0, 1.0, 7)
        );
        let options = v1::SamplingOptions::default;
        for (field, bad) in [
            ("temperature", v1::SamplingOptions { temperature: Some(-0.1), ..options() }),
            ("temperature", v1::SamplingOptions { temperature: Some(f32::NAN), ..options() }),
            ("top_p", v1::SamplingOptions { top_p: Some(0.0), ..options() }),
            ("top_p", v1::SamplingOptions { top_p: Some(1.1), ..options() }),
            ("min_p", v1::SamplingOptions { min_p: 2.0, ..options() }),
            (
                "repetition_penalty",
                v1::SamplingOptions { repetition_penalty: Some(0.0), ..options() },
            ),
            (
                "presence_penalty",
                v1::SamplingOptions { presence_penalty: f32::INFINITY, ..options() },
            ),
            ("frequency_penalty", v1::SamplingOptions { frequency_penalty: f32::NAN, ..options() }),
        ] {
            let error = sampling(&bad, 0).unwrap_err();
            assert_eq!(error.violations()[0].field, format!("sampling.{field}"));
        }
    }

    #[test]
    fn stops_and_logprobs_are_bounded() {
        let field = |request: v1::GenerateRequest| {
            check(&request).unwrap_err().violations()[0].field.clone()
        };
        let empty = v1::GenerateRequest::default;
        assert_eq!(field(v1::GenerateRequest { stop: vec!["x".into(); 17], ..empty() }), "stop");
        let stop = vec!["x".into(), String::new()];
        assert_eq!(field(v1::GenerateRequest { stop, ..empty() }), "stop[1]");
        let request = v1::GenerateRequest { top_logprobs: 21, logprobs: true, ..empty() };
        assert_eq!(field(request), "top_logprobs");
        assert_eq!(field(v1::GenerateRequest { top_logprobs: 1, ..empty() }), "top_logprobs");
    }

    #[test]
    fn end_tokens_of_the_configuration() {
        let end = |json| end_tokens(&json, None);
        assert_eq!(end(serde_json::json!({"eos_token_id": 2})), [2]);
        assert_eq!(end(serde_json::json!({"eos_token_id": [2, 5, -1]})), [2, 5]);
        assert!(end(serde_json::json!({"eos_token_id": null})).is_empty());
        assert!(end(serde_json::json!({})).is_empty());
    }

    #[tokio::test]
    async fn only_the_first_part_names_the_model() {
        let (sender, events) = mpsc::channel(4);
        let tokens = || Event::Tokens { tokens: Vec::new(), text: "a".into() };
        sender.send(Ok(tokens())).await.unwrap();
        drop(sender);
        let parts: Vec<_> = answer(tokens(), events, "m".into(), 1).collect().await;
        assert_eq!(parts[0].as_ref().unwrap().model, "m");
        assert_eq!(parts[1].as_ref().unwrap().model, "");
        assert_eq!(parts[2].as_ref().unwrap_err().code(), tonic::Code::Unavailable);
        assert_eq!(parts.len(), 3);
    }
}
