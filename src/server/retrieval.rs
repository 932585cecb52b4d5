//! Vectors of texts.

use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _, stream};
use tonic::{Request, Response, Status, Streaming};

use super::State;
use super::adapters::loaded;
use super::download::Messages;
use crate::error::{Error, Reason, Result};
use crate::models::encoder;
use crate::models::encoder::plan::adapters::Mix;
use crate::models::encoder::plan::check_tokens;
use crate::proto::v1;
use crate::proto::v1::retrieval_service_server::RetrievalService;
use crate::serve::embed::{self, Embedder, Encoded};

const MAX_TEXTS: usize = 2048;
const MAX_TEXT_BYTES: usize = 1 << 20;

/// Messages of a stream that are worked on at once: the model is busy while answers are taken.
const AHEAD: usize = 4;

/// A client that sends nothing for this long is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Room in an answer beside the values.
const SLACK: u64 = 64;

pub struct Retrieval(pub Arc<State>);

#[tonic::async_trait]
impl RetrievalService for Retrieval {
    type EmbedStreamStream = Messages<v1::EmbedStreamResponse>;

    async fn embed(
        &self,
        request: Request<v1::EmbedRequest>,
    ) -> Result<Response<v1::EmbedResponse>, Status> {
        let request = request.into_inner();
        let options = Options::of(request.options)?;
        let texts = Texts { texts: request.texts, tokens: request.tokens };
        texts.check()?;
        let session = Session::open(&self.0, &request.model, options, &request.adapters).await?;
        let embeddings = session.embed(texts).await?;
        Ok(Response::new(v1::EmbedResponse { embeddings, model: session.name }))
    }

    async fn embed_stream(
        &self,
        request: Request<Streaming<v1::EmbedStreamRequest>>,
    ) -> Result<Response<Self::EmbedStreamStream>, Status> {
        let mut messages = Box::pin(patient(request.into_inner()));
        let Some(mut first) = messages.next().await.transpose()? else {
            return Err(Error::field("model", "missing; the first message must name it").into());
        };
        let options = Options::of(first.options.take())?;
        let model = std::mem::take(&mut first.model);
        let adapters = std::mem::take(&mut first.adapters);
        let session = Arc::new(Session::open(&self.0, &model, options, &adapters).await?);
        let messages = stream::once(async { Ok(first) }).chain(messages).enumerate();
        let answers = messages.map(move |(index, message)| {
            let session = session.clone();
            async move { session.answer(index, message?).await }
        });
        Ok(Response::new(Box::pin(answers.buffered(AHEAD))))
    }
}

/// The messages, or an error where none comes for too long.
fn patient<M: Send + 'static>(
    messages: Streaming<M>,
) -> impl Stream<Item = Result<M, Status>> + Send {
    stream::unfold(messages, |mut messages| async {
        let message = match tokio::time::timeout(PATIENCE, messages.next()).await {
            Ok(message) => message?,
            Err(_) => Err(Error::new(
                Reason::DeadlineExceeded,
                "no message came for 60 seconds; end the call when all texts are sent",
            )
            .into()),
        };
        Some((message, messages))
    })
}

/// What a client asks of its vectors, checked.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Options {
    pooling: Option<encoder::Pooling>,
    normalize: Option<bool>,
    dimensions: u32,
    truncate: bool,
}

impl Options {
    fn of(options: Option<v1::EmbedOptions>) -> Result<Self> {
        let options = options.unwrap_or_default();
        let pooling = v1::Pooling::try_from(options.pooling).map_err(|_| {
            Error::field("options.pooling", format!("{} is no pooling", options.pooling))
        })?;
        Ok(Self {
            pooling: match pooling {
                v1::Pooling::Unspecified => None,
                v1::Pooling::Mean => Some(encoder::Pooling::Mean),
                v1::Pooling::Cls => Some(encoder::Pooling::Cls),
                v1::Pooling::Max => Some(encoder::Pooling::Max),
            },
            normalize: options.normalize,
            dimensions: options.dimensions,
            truncate: options.truncate.unwrap_or(true),
        })
    }
}

/// What a message brings.
struct Texts {
    texts: Vec<String>,
    tokens: Vec<v1::TokenIds>,
}

impl Texts {
    fn check(&self) -> Result<()> {
        if !self.texts.is_empty() && !self.tokens.is_empty() {
            return Err(Error::field("tokens", "sent beside texts; send one or the other"));
        }
        for (field, count) in [("texts", self.texts.len()), ("tokens", self.tokens.len())] {
            if count > MAX_TEXTS {
                let problem = format!(
                    "{count} are more than the {MAX_TEXTS} of one message; send several, by \
                     EmbedStream for instance"
                );
                return Err(Error::at(Reason::TooLarge, field, problem));
            }
        }
        match self.texts.iter().position(|text| text.len() > MAX_TEXT_BYTES) {
            None => Ok(()),
            Some(index) => Err(Error::at(
                Reason::TooLarge,
                format!("texts[{index}]"),
                format!(
                    "more than {MAX_TEXT_BYTES} bytes; split it, the model reads its start only"
                ),
            )),
        }
    }
}

/// A call at work on a model.
struct Session {
    embedder: Embedder,
    options: Options,
    adapters: Mix,
    /// Resource name of the version.
    name: String,
    /// Bytes of an answer.
    message_bytes: u64,
}

impl Session {
    async fn open(
        state: &State,
        model: &str,
        options: Options,
        adapters: &[v1::AdapterUse],
    ) -> Result<Self> {
        let row = state.store.version(model).await?;
        let embedder = state.embedder(&row).await?;
        let (adapters, _) = loaded::resolve_encoder(state, &row, adapters).await?;
        let width = embedder.model().family.hidden;
        if usize::try_from(options.dimensions).unwrap_or(usize::MAX) > width {
            return Err(Error::field(
                "options.dimensions",
                format!("the vectors of this model have {width} values"),
            ));
        }
        let message_bytes = state.config.limits.message_bytes;
        Ok(Self { embedder, options, adapters, name: row.name(), message_bytes })
    }

    async fn answer(
        &self,
        index: usize,
        message: v1::EmbedStreamRequest,
    ) -> Result<v1::EmbedStreamResponse, Status> {
        if !message.model.is_empty() {
            return Err(Error::field("model", "set twice; only the first message names it").into());
        }
        if message.options.is_some() {
            return Err(
                Error::field("options", "set twice; only the first message has them").into()
            );
        }
        if !message.adapters.is_empty() {
            let problem = "set twice; only the first message has them";
            return Err(Error::field("adapters", problem).into());
        }
        let texts = Texts { texts: message.texts, tokens: message.tokens };
        texts.check()?;
        let embeddings = self.embed(texts).await?;
        let model = if index == 0 { self.name.clone() } else { String::new() };
        Ok(v1::EmbedStreamResponse { embeddings, model })
    }

    async fn embed(&self, texts: Texts) -> Result<Vec<v1::Embedding>> {
        let width = match self.options.dimensions {
            0 => self.embedder.model().family.hidden as u64,
            dimensions => u64::from(dimensions),
        };
        let count = (texts.texts.len() + texts.tokens.len()) as u64;
        if count.saturating_mul(4 * width + SLACK) > self.message_bytes {
            return Err(Error::at(
                Reason::TooLarge,
                if texts.tokens.is_empty() { "texts" } else { "tokens" },
                format!(
                    "{count} vectors of {width} values do not fit into an answer \
                     (limits.message_bytes); send fewer at once, by EmbedStream for instance"
                ),
            ));
        }
        let (embedder, truncate) = (self.embedder.clone(), self.options.truncate);
        let encoded = super::blocking(move || encode(&embedder, texts, truncate)).await?;
        let marks: Vec<bool> = encoded.iter().map(|e| e.truncated).collect();
        let inputs: Vec<Vec<u32>> = encoded.into_iter().map(|e| e.ids).collect();
        let counts: Vec<u32> =
            inputs.iter().map(|ids| u32::try_from(ids.len()).unwrap_or(u32::MAX)).collect();
        metrics::counter!("planish_embedded_tokens_total")
            .increment(counts.iter().copied().map(u64::from).sum());
        let vectors = self.embedder.embed(embed::Request {
            inputs,
            pooling: self.options.pooling,
            normalize: self.options.normalize,
            dimensions: usize::try_from(self.options.dimensions).unwrap_or(usize::MAX),
            adapters: self.adapters.clone(),
            head: None,
        });
        let parts = vectors.await?.into_iter().zip(counts).zip(marks);
        Ok(parts
            .map(|((values, token_count), truncated)| v1::Embedding {
                values,
                token_count,
                truncated,
            })
            .collect())
    }
}

/// The tokens of every text, or the tokens that came, cut to what the model takes.
fn encode(embedder: &Embedder, texts: Texts, truncate: bool) -> Result<Vec<Encoded>> {
    let config = &embedder.model().family;
    let given = texts.tokens.into_iter().enumerate().map(|(i, tokens)| {
        let mut ids = tokens.ids;
        let truncated = ids.len() > config.max_tokens;
        if truncated && !truncate {
            return Err(Error::field(
                format!("tokens[{i}]"),
                format!(
                    "{} tokens are more than the {} that the model takes; shorten the text or let it \
                     be truncated",
                    ids.len(),
                    config.max_tokens
                ),
            ));
        }
        ids.truncate(config.max_tokens);
        check_tokens(config, &ids).map_err(|e| e.within(&format!("tokens[{i}]")))?;
        Ok(Encoded { ids, truncated })
    });
    let read = texts.texts.iter().enumerate().map(|(i, text)| {
        let encoded = embedder.encode(text, truncate);
        let encoded = encoded.and_then(|e| check_tokens(config, &e.ids).map(|()| e));
        encoded.map_err(|e| match (e.reason(), e.violations()) {
            (Reason::InvalidField, [violation]) => {
                Error::field(format!("texts[{i}]"), violation.description.clone())
            }
            _ => e,
        })
    });
    given.chain(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_checked_and_default_to_the_model() {
        let none = Options::of(None).unwrap();
        let expected = Options { pooling: None, normalize: None, dimensions: 0, truncate: true };
        assert_eq!(none, expected);
        let bad = v1::EmbedOptions { pooling: 9, ..Default::default() };
        let error = Options::of(Some(bad)).unwrap_err();
        assert_eq!(error.violations()[0].field, "options.pooling");
    }

    #[test]
    fn messages_are_bounded() {
        let texts = |texts: Vec<String>, tokens: usize| Texts {
            texts,
            tokens: vec![v1::TokenIds::default(); tokens],
        };
        let field = |t: Texts| t.check().unwrap_err().violations()[0].field.clone();
        assert!(texts(vec![String::new(); MAX_TEXTS], 0).check().is_ok());
        assert!(texts(Vec::new(), MAX_TEXTS).check().is_ok());
        assert_eq!(field(texts(vec![String::new(); MAX_TEXTS + 1], 0)), "texts");
        assert_eq!(field(texts(Vec::new(), MAX_TEXTS + 1)), "tokens");
        assert_eq!(field(texts(vec![String::new()], 1)), "tokens");
        let long = "a".repeat(MAX_TEXT_BYTES + 1);
        assert_eq!(field(texts(vec![String::new(), long], 0)), "texts[1]");
    }
}
