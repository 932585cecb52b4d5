//! The Open Inference Protocol, version 2: tensors in, tensors out, and the repository of models.
//!
//! Text goes the way of `GenerationService`, so both give the same answer to the same request; token ids go
//! to the engine for their logits.

mod convert;
mod repository;
mod statistics;
mod tensor;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};
use tonic_types::StatusExt as _;

use self::convert::{Ask, LOGITS_OUTPUT, Spec, TEXT_OUTPUT};
use self::statistics::{Run, Statistics};
use super::State;
use super::caller::{self, Caller};
use super::download::Messages;
use super::gate::Phase;
use super::generation::Generation;
use crate::error::{Error, Reason, Result};
use crate::proto::inference::grpc_inference_service_server::GrpcInferenceService;
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::model_infer_response::InferOutputTensor;
use crate::proto::inference::model_metadata_response::TensorMetadata;
use crate::proto::inference::{self as pb, ModelInferRequest, ModelInferResponse};
use crate::proto::v1;
use crate::proto::v1::generation_service_server::GenerationService as _;
use crate::store::models::VersionRow;
use crate::store::names;

/// Requests of one stream that are at work at once; the client's next ones wait.
const STREAM_REQUESTS: usize = 16;

/// Longest id of a request; it comes back with every piece of the answer.
const MAX_ID: usize = 128;

/// What an answer takes beside its tensor.
const FRAME: u64 = 4 << 10;

/// Extensions of the protocol, by the names of the specification.
const EXTENSIONS: &[&str] =
    &["model_repository", "model_configuration", "statistics", "parameters"];

/// Parameter of the responses of a stream: true in the last one of a request.
const FINAL: &str = "triton_final_response";

#[derive(Clone)]
pub struct Inference {
    state: Arc<State>,
    statistics: Arc<Statistics>,
}

impl Inference {
    pub fn new(state: Arc<State>) -> Self {
        Self { state, statistics: Arc::default() }
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(
        &self,
        _: Request<pb::ServerLiveRequest>,
    ) -> Result<Response<pb::ServerLiveResponse>, Status> {
        Ok(Response::new(pb::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: Request<pb::ServerReadyRequest>,
    ) -> Result<Response<pb::ServerReadyResponse>, Status> {
        let serving = *self.state.phase.borrow() == Phase::Serving;
        let ready = serving && self.state.well.load(Ordering::Relaxed);
        Ok(Response::new(pb::ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<pb::ModelReadyRequest>,
    ) -> Result<Response<pb::ModelReadyResponse>, Status> {
        let request = request.into_inner();
        let name = resource(&request.name, &request.version, "version")?;
        let ready = match self.state.store.version(&name).await {
            Ok(row) => {
                let loaded = self.state.residency.loaded();
                loaded.iter().any(|l| l.key == row.digest && l.healthy)
            }
            // Who polls for a model that is on its way gets an answer.
            Err(error) if error.reason() == Reason::ResourceNotFound => false,
            Err(error) => return Err(error.into()),
        };
        Ok(Response::new(pb::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<pb::ServerMetadataRequest>,
    ) -> Result<Response<pb::ServerMetadataResponse>, Status> {
        Ok(Response::new(pb::ServerMetadataResponse {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: EXTENSIONS.iter().map(|e| (*e).to_owned()).collect(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<pb::ModelMetadataRequest>,
    ) -> Result<Response<pb::ModelMetadataResponse>, Status> {
        let request = request.into_inner();
        let name = resource(&request.name, &request.version, "version")?;
        let row = self.state.store.version(&name).await?;
        let (inputs, outputs) = self.specs(&row).await?;
        let versions = self.state.store.version_index(Some(&row.model)).await?;
        let tensor = |spec: Spec| TensorMetadata {
            name: spec.name.to_owned(),
            datatype: spec.datatype.name().to_owned(),
            shape: spec.shape,
        };
        Ok(Response::new(pb::ModelMetadataResponse {
            platform: format!("planish_{}", row.family),
            versions: versions.into_iter().map(|v| v.version.to_string()).collect(),
            inputs: inputs.into_iter().map(tensor).collect(),
            outputs: outputs.into_iter().map(tensor).collect(),
            name: row.model,
        }))
    }

    async fn model_infer(
        &self,
        request: Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let caller = caller::of(&request);
        let mut pieces = pin!(self.clone().pieces(request.into_inner(), caller, false));
        match pieces.next().await {
            Some(answer) => answer.map(Response::new),
            None => Err(Error::internal("an inference without an answer").into()),
        }
    }

    type ModelStreamInferStream = Messages<pb::ModelStreamInferResponse>;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let (service, caller) = (self.clone(), caller::of(&request));
        // A client may leave its side open for ever: a server that stops reads no further request and
        // lets those under way end.
        let mut phase = self.state.phase.clone();
        let stopping = async move { drop(phase.wait_for(|p| *p >= Phase::Draining).await) };
        let answers = request.into_inner().take_until(stopping).map(move |request| {
            let service = service.clone();
            match request {
                Ok(request) => service.answer(request, caller).boxed(),
                Err(status) => futures::stream::iter([Err(status)]).boxed(),
            }
        });
        Ok(Response::new(answers.flatten_unordered(STREAM_REQUESTS).boxed()))
    }

    async fn model_config(
        &self,
        request: Request<pb::ModelConfigRequest>,
    ) -> Result<Response<pb::ModelConfigResponse>, Status> {
        let request = request.into_inner();
        let name = resource(&request.name, &request.version, "version")?;
        let row = self.state.store.version(&name).await?;
        let (inputs, outputs) = self.specs(&row).await?;
        let config = pb::ModelConfig {
            version_policy: Some(pb::ModelVersionPolicy {
                policy_choice: Some(pb::model_version_policy::PolicyChoice::All(
                    pb::model_version_policy::All {},
                )),
            }),
            input: inputs
                .into_iter()
                .map(|spec| pb::ModelInput {
                    name: spec.name.to_owned(),
                    data_type: convert::data_type(spec.datatype).into(),
                    dims: spec.shape,
                    optional: spec.optional,
                })
                .collect(),
            output: outputs
                .into_iter()
                .map(|spec| pb::ModelOutput {
                    name: spec.name.to_owned(),
                    data_type: convert::data_type(spec.datatype).into(),
                    dims: spec.shape,
                })
                .collect(),
            instance_group: vec![pb::ModelInstanceGroup {
                name: row.model.clone(),
                count: 1,
                kind: pb::model_instance_group::Kind::Cpu.into(),
            }],
            parameters: [
                ("version", row.version.to_string()),
                ("family", row.family.clone()),
                ("architecture", row.architecture.clone()),
                ("digest", row.digest.clone()),
                ("weight_bytes", row.weight_bytes.to_string()),
                ("parameter_count", row.parameters.to_string()),
            ]
            .into_iter()
            .map(|(key, string_value)| (key.to_owned(), pb::ModelParameter { string_value }))
            .collect(),
            backend: env!("CARGO_PKG_NAME").to_owned(),
            model_transaction_policy: Some(pb::ModelTransactionPolicy { decoupled: true }),
            name: row.model,
            ..Default::default()
        };
        Ok(Response::new(pb::ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        request: Request<pb::ModelStatisticsRequest>,
    ) -> Result<Response<pb::ModelStatisticsResponse>, Status> {
        let model_stats = self.statistics_of(request.into_inner()).await?;
        Ok(Response::new(pb::ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<pb::RepositoryIndexRequest>,
    ) -> Result<Response<pb::RepositoryIndexResponse>, Status> {
        let models = self.index(request.into_inner()).await?;
        Ok(Response::new(pb::RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(
        &self,
        request: Request<pb::RepositoryModelLoadRequest>,
    ) -> Result<Response<pb::RepositoryModelLoadResponse>, Status> {
        self.load(request.into_inner()).await?;
        Ok(Response::new(pb::RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<pb::RepositoryModelUnloadRequest>,
    ) -> Result<Response<pb::RepositoryModelUnloadResponse>, Status> {
        self.unload(request.into_inner()).await?;
        Ok(Response::new(pb::RepositoryModelUnloadResponse {}))
    }
}

impl Inference {
    /// The tensors of a version.
    async fn specs(&self, row: &VersionRow) -> Result<(Vec<Spec>, Vec<Spec>)> {
        served(row)?;
        let text = self.state.tokenizer(row).await?.is_some();
        let vocab = row.config.get("vocab_size").and_then(serde_json::Value::as_i64).unwrap_or(-1);
        Ok((convert::inputs(text), convert::outputs(text, vocab)))
    }

    /// One request of a stream. What goes wrong is a message of the stream, not its end.
    fn answer(
        self,
        request: ModelInferRequest,
        caller: Caller,
    ) -> impl Stream<Item = Result<pb::ModelStreamInferResponse, Status>> + Send {
        let id = Some(&request.id).filter(|id| id.len() <= MAX_ID).cloned().unwrap_or_default();
        self.pieces(request, caller, true).map(move |piece| {
            Ok(match piece {
                Ok(response) => pb::ModelStreamInferResponse {
                    error_message: String::new(),
                    infer_response: Some(response),
                },
                Err(status) => failed(&status, id.clone()),
            })
        })
    }

    /// The responses to a request: one, or with `streamed` one for each piece of text.
    fn pieces(
        self,
        request: ModelInferRequest,
        caller: Caller,
        streamed: bool,
    ) -> impl Stream<Item = Result<ModelInferResponse, Status>> + Send {
        async_stream::try_stream! {
            let mut begun = self.begin(request, caller).await?;
            match begun.work {
                Work::Logits { rows, vocab, raw, seconds: (queue, infer) } => {
                    let shape = vec![1, rows, vocab];
                    let mut response = begun.head.response(LOGITS_OUTPUT, "FP32", shape, raw);
                    if streamed {
                        set(&mut response, FINAL, ParameterChoice::BoolParam(true));
                    }
                    begun.run.succeed(queue, infer);
                    yield response;
                }
                Work::Text(ref mut parts) => {
                    let mut text = String::new();
                    let last = loop {
                        let part = parts.next().await.unwrap_or_else(|| {
                            Err(Error::new(Reason::NotReady, "the answer broke off; ask again").into())
                        })?;
                        text.push_str(&part.text);
                        if part.finish_reason() != v1::FinishReason::Unspecified {
                            break part;
                        }
                        // Tokens that end within a character complete no text.
                        if streamed && !text.is_empty() {
                            let mut response = begun.head.text(&std::mem::take(&mut text))?;
                            set(&mut response, FINAL, ParameterChoice::BoolParam(false));
                            yield response;
                        }
                    };
                    let mut response = begun.head.text(&text)?;
                    describe(&mut response, &last);
                    if streamed {
                        set(&mut response, FINAL, ParameterChoice::BoolParam(true));
                    }
                    let timings = last.timings.unwrap_or_default();
                    let infer = timings.prefill_seconds + timings.decode_seconds;
                    begun.run.succeed(timings.queue_seconds, infer);
                    yield response;
                }
            }
        }
    }

    /// Checks a request and brings it to where the model works on it.
    async fn begin(&self, request: ModelInferRequest, caller: Caller) -> Result<Begun, Status> {
        let arrived = Instant::now();
        if request.id.len() > MAX_ID {
            let problem = format!("longer than {MAX_ID} bytes; a UUID is a good choice");
            return Err(Error::field("id", problem).into());
        }
        let name = resource(&request.model_name, &request.model_version, "model_version")?;
        let row = self.state.store.version(&name).await?;
        let mut run = self.statistics.begin(&row, arrived);
        served(&row)?;
        let head = Head {
            model_name: row.model.clone(),
            model_version: row.version.to_string(),
            id: request.id.clone(),
        };
        let limits = &self.state.config.limits;
        let work = match convert::ask(request, limits.context)? {
            Ask::Text(mut request) => {
                request.model = row.name();
                let generation = Generation(self.state.clone());
                let mut request = Request::new(*request);
                request.extensions_mut().insert(caller);
                let parts = generation.generate(request).await?.into_inner();
                run.ready();
                Work::Text(parts)
            }
            Ask::Logits { tokens, last_only } => {
                let engine = self.state.engine(&row).await?;
                let vocab = engine.model().decoder()?.vocab;
                let rows = if last_only { 1 } else { tokens.len() };
                check_size(rows, vocab, limits.message_bytes)?;
                run.ready();
                let asked = Instant::now();
                let scores =
                    engine.logits(tokens, last_only, caller.client, caller.deadline).await?;
                let infer = asked.elapsed().as_secs_f64() - scores.queue_seconds;
                let raw = super::blocking(move || Ok(tensor::floats(&scores.values))).await?;
                Work::Logits {
                    rows: dimension(rows),
                    vocab: dimension(vocab),
                    raw,
                    seconds: (scores.queue_seconds, infer.max(0.0)),
                }
            }
        };
        Ok(Begun { head, run, work })
    }
}

/// A request whose answer is on its way.
struct Begun {
    head: Head,
    run: Run,
    work: Work,
}

enum Work {
    Text(Messages<v1::GenerateResponse>),
    /// With the seconds of waiting and of running.
    Logits {
        rows: i64,
        vocab: i64,
        raw: Bytes,
        seconds: (f64, f64),
    },
}

/// What all responses to a request have in common.
struct Head {
    model_name: String,
    model_version: String,
    id: String,
}

impl Head {
    fn response(
        &self,
        name: &str,
        datatype: &str,
        shape: Vec<i64>,
        raw: Bytes,
    ) -> ModelInferResponse {
        ModelInferResponse {
            model_name: self.model_name.clone(),
            model_version: self.model_version.clone(),
            id: self.id.clone(),
            outputs: vec![InferOutputTensor {
                name: name.to_owned(),
                datatype: datatype.to_owned(),
                shape,
                ..Default::default()
            }],
            raw_output_contents: vec![raw],
            ..Default::default()
        }
    }

    fn text(&self, text: &str) -> Result<ModelInferResponse> {
        Ok(self.response(TEXT_OUTPUT, "BYTES", vec![1], tensor::string(text)?))
    }
}

fn set(response: &mut ModelInferResponse, key: &str, value: ParameterChoice) {
    let value = pb::InferParameter { parameter_choice: Some(value) };
    response.parameters.insert(key.to_owned(), value);
}

/// The facts of a finished answer, as parameters.
fn describe(response: &mut ModelInferResponse, last: &v1::GenerateResponse) {
    let reason = last.finish_reason().as_str_name();
    let reason = reason.strip_prefix("FINISH_REASON_").unwrap_or(reason).to_lowercase();
    let usage = last.usage.unwrap_or_default();
    set(response, "finish_reason", ParameterChoice::StringParam(reason));
    set(response, "prompt_tokens", ParameterChoice::Int64Param(usage.prompt_tokens.into()));
    set(response, "generated_tokens", ParameterChoice::Int64Param(usage.generated_tokens.into()));
    set(response, "seed", ParameterChoice::Uint64Param(last.seed));
}

/// The message of a stream for a request that failed.
fn failed(status: &Status, id: String) -> pb::ModelStreamInferResponse {
    let mut response = ModelInferResponse { id, ..Default::default() };
    if let Some(info) = status.get_error_details().error_info() {
        set(&mut response, "reason", ParameterChoice::StringParam(info.reason.clone()));
    }
    set(&mut response, FINAL, ParameterChoice::BoolParam(true));
    let error_message = match status.message() {
        // An empty message would say that nothing went wrong.
        "" => status.code().to_string(),
        message => message.to_owned(),
    };
    pb::ModelStreamInferResponse { error_message, infer_response: Some(response) }
}

/// The resource name of `m`, `models/m` or `models/m/versions/3`, with the version in a field of its own or
/// not. `field` is that field.
fn resource(name: &str, version: &str, field: &str) -> Result<String> {
    let full = if name.starts_with("models/") { name.to_owned() } else { format!("models/{name}") };
    let (model, number) = names::version(&full)?;
    if version.is_empty() {
        return Ok(full);
    }
    let exact = format!("models/{model}/versions/{version}");
    let (_, asked) = names::exact_version(&exact).map_err(|_| {
        Error::field(field, "not the number of a version; leave it out for the newest")
    })?;
    match number {
        Some(number) if number != asked => Err(Error::field(
            field,
            format!("the name says version {number}; give the version once"),
        )),
        _ => Ok(exact),
    }
}

/// Refuses versions whose family takes no tensors here.
fn served(row: &VersionRow) -> Result<()> {
    if row.family == "decoder" {
        return Ok(());
    }
    Err(Error::new(
        Reason::Unsupported,
        format!(
            "{} is of the family {}, of which this protocol serves none; use the family's own service",
            row.name(),
            row.family
        ),
    ))
}

/// Refuses logits that would not fit a message.
fn check_size(rows: usize, vocab: usize, message_bytes: u64) -> Result<()> {
    let bytes = (rows as u64).saturating_mul(vocab as u64).saturating_mul(4);
    if bytes <= message_bytes.saturating_sub(FRAME) {
        return Ok(());
    }
    Err(Error::at(
        Reason::TooLarge,
        "input_ids",
        format!(
            "logits [1, {rows}, {vocab}] take {bytes} bytes, more than limits.message_bytes \
             ({message_bytes}) allows; send fewer tokens or the parameter last_only"
        ),
    ))
}

fn dimension(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
