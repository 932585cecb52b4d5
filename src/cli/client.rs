//! The connection to a server: address, TLS, token, deadline.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

use super::error::{CliError, Result};
use crate::proto::google::longrunning::operations_client::OperationsClient;
use crate::proto::v1::adapter_service_client::AdapterServiceClient;
use crate::proto::v1::claim_service_client::ClaimServiceClient;
use crate::proto::v1::dataset_service_client::DatasetServiceClient;
use crate::proto::v1::generation_service_client::GenerationServiceClient;
use crate::proto::v1::job_service_client::JobServiceClient;
use crate::proto::v1::method_service_client::MethodServiceClient;
use crate::proto::v1::model_service_client::ModelServiceClient;
use crate::proto::v1::prediction_service_client::PredictionServiceClient;
use crate::proto::v1::retrieval_service_client::RetrievalServiceClient;

/// Largest message we take; a version's description can be long, chunks are 4 MiB.
const MAX_MESSAGE: usize = 64 << 20;

/// Where the server is and how to talk to it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Connection")]
pub struct ConnectionOptions {
    /// Address of the server [default: http://127.0.0.1:50551]
    #[arg(long, global = true, value_name = "URL", env = "PLANISH_ENDPOINT")]
    pub endpoint: Option<String>,
    /// Bearer token (better in the environment or a file: others can see arguments)
    #[arg(long, global = true, env = "PLANISH_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// File that holds the bearer token
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "PLANISH_TOKEN_FILE",
        conflicts_with = "token"
    )]
    pub token_file: Option<PathBuf>,
    /// Certificate authority of an https server, PEM
    #[arg(long, global = true, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Client certificate for mutual TLS, PEM
    #[arg(long, global = true, value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Key of the client certificate, PEM
    #[arg(long, global = true, value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// Give up after this time, for instance 90s, 5m, 1h (started work goes on)
    #[arg(long, global = true, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}

impl ConnectionOptions {
    /// The address given, or that of a service on this machine with the usual settings.
    pub fn endpoint(&self) -> &str {
        self.endpoint.as_deref().unwrap_or("http://127.0.0.1:50551")
    }
}

/// Reads `90`, `90s`, `250ms`, `5m`, `1.5h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) =
        text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let scale = match unit {
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("use ms, s, m or h".to_owned()),
    };
    match number.parse::<f64>().map(|n| Duration::try_from_secs_f64(n * scale)) {
        Ok(Ok(duration)) if !duration.is_zero() && duration.as_secs() < 1 << 32 => Ok(duration),
        _ => Err("not a positive time".to_owned()),
    }
}

/// Adds the token and what is left of the deadline to every call.
#[derive(Clone)]
pub struct Headers {
    token: Option<MetadataValue<Ascii>>,
    deadline: Option<Instant>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        Ok(request)
    }
}

type Wire = InterceptedService<Channel, Headers>;

/// A connected server; cheap to clone.
#[derive(Clone)]
pub struct Client {
    wire: Wire,
}

macro_rules! services {
    ($($(#[$doc:meta])* $name:ident: $client:ident;)+) => {
        impl Client {
            $($(#[$doc])*
            pub fn $name(&self) -> $client<Wire> {
                $client::new(self.wire.clone()).max_decoding_message_size(MAX_MESSAGE)
            })+
        }
    };
}

services! {
    /// Models and their versions.
    models: ModelServiceClient;
    /// Adapters.
    adapters: AdapterServiceClient;
    /// Data sets.
    datasets: DatasetServiceClient;
    /// The catalogue of methods.
    methods: MethodServiceClient;
    /// Recipes, evaluations, progress.
    jobs: JobServiceClient;
    /// Claims.
    claims: ClaimServiceClient;
    /// Text.
    generation: GenerationServiceClient;
    /// Classes, numbers, tags.
    prediction: PredictionServiceClient;
    /// Vectors.
    retrieval: RetrievalServiceClient;
    /// Long work, by its standard service.
    operations: OperationsClient;
}

impl Client {
    /// Connects; fails at once when nobody answers.
    pub async fn connect(options: &ConnectionOptions) -> Result<Self> {
        let url = options.endpoint();
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|_| CliError::usage(format!("--endpoint {url}: not a URL")))?
            .user_agent(concat!("planish/", env!("CARGO_PKG_VERSION")))
            .map_err(|e| CliError::failure(format!("user agent: {e}")))?
            .connect_timeout(Duration::from_secs(10))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_while_idle(false);
        let endpoint = match url.split_once("://").map(|(scheme, _)| scheme) {
            Some("https") => {
                let tls = tls(options).await?;
                endpoint.tls_config(tls).map_err(|e| {
                    CliError::usage(format!("the TLS files cannot be used: {}", chain(&e)))
                })?
            }
            Some("http") => {
                if options.ca.is_some() || options.cert.is_some() {
                    return Err(CliError::usage(format!(
                        "--ca and --cert need an https endpoint, not {url}"
                    )));
                }
                endpoint
            }
            _ => {
                return Err(CliError::usage(format!(
                    "--endpoint {url}: write http://host:port or https://host:port"
                )));
            }
        };
        let token = token(options).await?;
        if token.is_some() && url.starts_with("http://") && !is_loopback(endpoint.uri().host()) {
            eprintln!("warning: the token travels unencrypted to {url}; use https");
        }
        let channel = endpoint.connect().await.map_err(|e| {
            CliError::unavailable(format!(
                "no server answers at {url} ({}); start one with `planish serve` or name \
                 another with --endpoint",
                chain(&e)
            ))
        })?;
        let deadline = options.timeout.map(|timeout| Instant::now() + timeout);
        Ok(Self { wire: InterceptedService::new(channel, Headers { token, deadline }) })
    }
}

async fn tls(options: &ConnectionOptions) -> Result<ClientTlsConfig> {
    let Some(ca) = &options.ca else {
        return Err(CliError::usage(
            "an https endpoint needs --ca FILE, the authority that signed its certificate \
             (for public servers, the bundle of the system)",
        ));
    };
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca).await?));
    if let (Some(cert), Some(key)) = (&options.cert, &options.key) {
        tls = tls.identity(Identity::from_pem(read(cert).await?, read(key).await?));
    }
    Ok(tls)
}

async fn token(options: &ConnectionOptions) -> Result<Option<MetadataValue<Ascii>>> {
    let text = match (&options.token, &options.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(file)) => String::from_utf8(read(file).await?)
            .map_err(|_| CliError::usage(format!("{} is not text", file.display())))?,
        (None, None) => return Ok(None),
    };
    // The error must not quote the token.
    let mut value = MetadataValue::try_from(format!("Bearer {}", text.trim()))
        .map_err(|_| CliError::usage("the token holds characters that cannot be sent"))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

async fn read(path: &std::path::Path) -> Result<Vec<u8>> {
    tokio::fs::read(path)
        .await
        .map_err(|e| CliError::file(&format!("reading {}", path.display()), &e))
}

fn is_loopback(host: Option<&str>) -> bool {
    let host = host.unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The innermost cause, where transport errors keep what really happened.
fn chain(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(parse_duration("90").unwrap(), Duration::from_secs(90));
        assert_eq!(parse_duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(parse_duration("1.5h").unwrap(), Duration::from_secs(5400));
        for bad in ["", "0", "-1s", "1d", "s", "1e300h", "nan"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn loopback_is_recognised() {
        for host in ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"] {
            assert!(is_loopback(Some(host)), "{host}");
        }
        for host in ["example.org", "10.0.0.1", "127.0.0.1.example.org"] {
            assert!(!is_loopback(Some(host)), "{host}");
        }
    }
}
