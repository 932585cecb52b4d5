//! The wire: one file per service; decode, check, convert, call, convert.
//!
//! A request passes the `gate` (credentials, limits, deadline, account), reaches its service, and
//! leaves as a message or as a status made by `status`.

mod adaptations;
mod adapters;
mod auth;
mod caller;
mod check;
mod claims;
mod comparisons;
mod convert;
mod creation;
mod datasets;
mod download;
mod exports;
mod gate;
mod generation;
mod health;
mod idle;
mod inference;
mod jobs;
mod methods;
mod models;
mod observe;
mod operations;
mod paging;
mod prediction;
mod reflection;
mod retrieval;
mod state;
mod status;
mod tls;
mod trainings;
mod upload;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;

use crate::config::Config;
use crate::error::{Error, Reason, Result};
use crate::proto::DESCRIPTORS;
use crate::proto::google::longrunning::operations_server::OperationsServer;
use crate::proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use crate::proto::v1::adapter_service_server::AdapterServiceServer;
use crate::proto::v1::claim_service_server::ClaimServiceServer;
use crate::proto::v1::dataset_service_server::DatasetServiceServer;
use crate::proto::v1::generation_service_server::GenerationServiceServer;
use crate::proto::v1::job_service_server::JobServiceServer;
use crate::proto::v1::method_service_server::MethodServiceServer;
use crate::proto::v1::model_service_server::ModelServiceServer;
use crate::proto::v1::prediction_service_server::PredictionServiceServer;
use crate::proto::v1::retrieval_service_server::RetrievalServiceServer;
use crate::serve::engine::Engine;
use gate::{Gate, Phase};
use state::{State, blocking};

/// Pings find out that a client is gone although its network never said so.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_PATIENCE: Duration = Duration::from_secs(20);

/// Bytes of headers: more than tokens and traces need, less than an attack wants.
const MAX_HEADERS: u32 = 32 << 10;

/// Time that connections get to say goodbye after the last request ended.
const GOODBYE: Duration = Duration::from_secs(1);

/// The service; see [`Server::start`].
pub struct Server;

impl Server {
    /// Opens the store, starts the runner and listens. The address is bound (port 0 resolved) and health
    /// tells the truth when this returns. Telemetry is set up by the caller ([`crate::telemetry::init`]).
    ///
    /// # Errors
    /// INVALID_CONFIG for what the configuration gets wrong (addresses in use, certificates and token
    /// files that cannot be read), and what the store finds.
    pub async fn start(config: Config) -> Result<Running> {
        config.validate()?;
        let tokens = auth::Tokens::load(&config.server)?;
        let tls = tls::load(&config.server.tls)?;
        let incoming = TcpIncoming::bind(config.server.listen).map_err(|e| {
            let problem = format!("{} cannot be used: {e}; choose another", config.server.listen);
            Error::at(Reason::InvalidConfig, "server.listen", problem)
        })?;
        let address = incoming.local_addr()?;

        let (phase, phases) = watch::channel(Phase::Serving);
        let limits = config.limits.clone();
        let deadline = Duration::from_secs(config.shutdown.deadline_seconds);
        let state = Arc::new(State::open(config, phases.clone()).await?);

        let (reporter, health_service) = tonic_health::server::health_reporter();
        health::report(&state, &reporter).await;
        tokio::spawn(health::watch(state.clone(), reporter, phases.clone()));
        tokio::spawn(idle::watch(state.clone(), phases.clone()));

        let descriptors = reflection::descriptors();
        let gate = Gate::new(&descriptors, tokens, limits.concurrent_requests, phases.clone())?;
        let max = usize::try_from(limits.message_bytes).unwrap_or(usize::MAX);
        macro_rules! service {
            ($server:ident, $service:expr) => {
                $server::new($service)
                    .max_decoding_message_size(max)
                    .max_encoding_message_size(max)
                    .accept_compressed(tonic::codec::CompressionEncoding::Gzip)
                    .send_compressed(tonic::codec::CompressionEncoding::Gzip)
            };
        }
        let (v1, v1alpha) = reflection::services()?;
        let routes = Routes::new(health_service)
            .add_service(v1)
            .add_service(v1alpha)
            .add_service(service!(ModelServiceServer, models::Models(state.clone())))
            .add_service(service!(AdapterServiceServer, adapters::Adapters(state.clone())))
            .add_service(service!(DatasetServiceServer, datasets::Datasets(state.clone())))
            .add_service(service!(MethodServiceServer, methods::Methods))
            .add_service(service!(JobServiceServer, jobs::Jobs(state.clone())))
            .add_service(service!(ClaimServiceServer, claims::Claims(state.clone())))
            .add_service(service!(OperationsServer, operations::Operations(state.clone())))
            .add_service(service!(GenerationServiceServer, generation::Generation(state.clone())))
            .add_service(service!(
                GrpcInferenceServiceServer,
                inference::Inference::new(state.clone())
            ))
            .add_service(service!(PredictionServiceServer, prediction::Prediction(state.clone())))
            .add_service(service!(RetrievalServiceServer, retrieval::Retrieval(state.clone())));
        let mut server = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE_PATIENCE))
            .http2_max_header_list_size(Some(MAX_HEADERS))
            .max_concurrent_streams(Some(limits.streams_per_connection));
        if let Some(tls) = tls {
            server = server.tls_config(tls).map_err(|e| tls::bad("server.tls.cert", &e))?;
        }
        let mut draining = phases;
        let signal = async move {
            // An error means that the handle is gone: that ends the server too.
            let _ = draining.wait_for(|p| *p >= Phase::Draining).await;
        };
        let incoming = incoming.with_nodelay(Some(true));
        let serving = tokio::spawn(server.layer(gate).serve_with_incoming_shutdown(
            routes.prepare(),
            incoming,
            signal,
        ));
        tracing::info!(%address, "listening");
        Ok(Running { address, phase, state, deadline, serving: Some(serving) })
    }
}

/// A server at work. Dropping it stops it without grace.
pub struct Running {
    address: SocketAddr,
    phase: watch::Sender<Phase>,
    state: Arc<State>,
    deadline: Duration,
    /// Absent once it was waited for.
    serving: Option<JoinHandle<Result<(), tonic::transport::Error>>>,
}

impl Running {
    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The engine that answers for a model by its resource name, loaded if it is not yet: what the
    /// generation service calls once a request is decoded.
    ///
    /// # Errors
    /// NOT_FOUND for a name without a model, MODEL_UNSUITABLE for an encoder, and what loading finds.
    pub async fn engine(&self, model: &str) -> Result<Engine> {
        self.state.engine(&self.state.store.version(model).await?).await
    }

    /// Returns when the server ends by itself, which it does only on failure. Cancel-safe.
    pub async fn wait(&mut self) -> Result<()> {
        let Some(serving) = &mut self.serving else { return Ok(()) };
        let ended = serving.await;
        self.serving = None;
        served(ended)
    }

    /// Stops: no new requests, streams without an end are over, the other requests get until the
    /// configured deadline. Jobs stop at the same time; what is interrupted resumes at the next start.
    pub async fn stop(mut self) -> Result<()> {
        tracing::info!("stopping");
        self.phase.send_replace(Phase::Draining);
        let serving = self.serving.take();
        let requests = async {
            let Some(mut serving) = serving else { return Ok(()) };
            if let Ok(ended) = tokio::time::timeout(self.deadline, &mut serving).await {
                return served(ended);
            }
            tracing::warn!("the deadline passed; requests under way are cut off");
            self.phase.send_replace(Phase::Closing);
            match tokio::time::timeout(GOODBYE, &mut serving).await {
                Ok(ended) => served(ended),
                // A client that keeps its connection open without a request cannot hold us.
                Err(_) => {
                    serving.abort();
                    Ok(())
                }
            }
        };
        let (ended, ()) = tokio::join!(requests, self.state.jobs.stop(self.deadline));
        tracing::info!("stopped");
        ended
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.phase.send_replace(Phase::Closing);
        if let Some(serving) = &self.serving {
            serving.abort();
        }
    }
}

fn served(
    ended: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>,
) -> Result<()> {
    match ended {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            Err(Error::new(Reason::Io, "the listener failed; see the log").with_source(error))
        }
        Err(error) => Err(Error::internal("the server task failed").with_source(error)),
    }
}
