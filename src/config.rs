//! Configuration: defaults, then a file, then `PLANISH_*` variables, then flags.
//!
//! [`load`] puts the layers together and remembers where every value came from; [`Config::validate`]
//! checks what types cannot say. Every key is described once, in `fields.rs`.

mod fields;
mod load;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Reason, Result};

pub use load::{Flag, Loaded, load};

/// Everything that can be set. Each section is a table of the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub server: Server,
    pub limits: Limits,
    pub data: Data,
    pub import: Import,
    pub compute: Compute,
    pub telemetry: Telemetry,
    pub shutdown: Shutdown,
}

/// Where and to whom the service listens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    pub tls: Tls,
    /// The one token clients must send.
    pub token: Option<Secret>,
    /// A file of tokens, one a line; empty lines and lines that start with `#` are skipped.
    pub tokens_file: Option<PathBuf>,
    /// Allows a listener beyond loopback without TLS or without credentials.
    pub insecure: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 50551)),
            tls: Tls::default(),
            token: None,
            tokens_file: None,
            insecure: false,
        }
    }
}

/// Certificates, PEM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// Certificate chain of the server.
    pub cert: Option<PathBuf>,
    /// Private key of the server.
    pub key: Option<PathBuf>,
    /// Authority whose certificates clients must show (mutual TLS).
    pub client_ca: Option<PathBuf>,
}

/// How much of everything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of one message, in and out.
    #[serde(deserialize_with = "bytes")]
    pub message_bytes: u64,
    /// Bytes of one uploaded file.
    #[serde(deserialize_with = "bytes")]
    pub upload_bytes: u64,
    /// Jobs that wait.
    pub queued_jobs: usize,
    /// Jobs that run at once.
    pub running_jobs: usize,
    /// Requests under way at once, over all connections.
    pub concurrent_requests: usize,
    /// Requests under way at once on one connection.
    pub streams_per_connection: u32,
    /// Generations that run at once on one model.
    pub generation_slots: usize,
    /// Generations that wait for a slot of one model.
    pub generation_queue: usize,
    /// Positions of one generation, prompt and answer.
    pub context: usize,
    /// Bytes of keys and values of one model: of its generations and of prompts kept for reuse.
    #[serde(deserialize_with = "bytes")]
    pub kv_bytes: u64,
    /// How keys and values are stored.
    pub kv_format: KvFormat,
    /// Whether beginnings that prompts have in common are computed once.
    pub prefix_cache: bool,
    /// Bytes that loaded models may take; 0: half of the machine's memory.
    #[serde(deserialize_with = "bytes")]
    pub models_bytes: u64,
    /// Seconds without a request after which a model leaves memory; 0: never.
    pub idle_unload_seconds: u64,
    /// Bytes that loaded adapters may take; 0: an eighth of the machine's memory.
    #[serde(deserialize_with = "bytes")]
    pub adapters_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: 16 << 20,
            upload_bytes: 64 << 30,
            queued_jobs: 64,
            running_jobs: 1,
            concurrent_requests: 256,
            streams_per_connection: 128,
            generation_slots: 8,
            generation_queue: 64,
            context: 4096,
            kv_bytes: 1 << 30,
            kv_format: KvFormat::default(),
            prefix_cache: true,
            models_bytes: 0,
            idle_unload_seconds: 0,
            adapters_bytes: 0,
        }
    }
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    F32,
    #[default]
    F16,
    /// 8 bits and a scale for each position and head.
    Q8,
}

/// What is kept on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Folder of the database and the objects.
    pub folder: PathBuf,
}

impl Default for Data {
    fn default() -> Self {
        let absolute =
            |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let base = absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local").join("share")));
        // Without a home the folder stays empty, which `validate` refuses with a hint.
        Self { folder: base.map(|base| base.join("planish")).unwrap_or_default() }
    }
}

/// What may be imported.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Import {
    /// Folders on this machine that clients may import from; none when empty.
    pub allow_paths: Vec<PathBuf>,
}

/// How the processors are used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Compute {
    /// Threads for computing; 0: one for each core.
    pub threads: usize,
    /// Numbers in which encoders compute.
    pub encoders: EncoderPrecision,
}

/// Numbers in which encoders compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderPrecision {
    /// Activations stay f32.
    #[default]
    F32,
    /// Weights and activations are rounded to bf16.
    Bf16,
    /// Weights and activations are rounded to 8 bits.
    Int8,
}

/// How logs are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Logs, metrics, traces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// Filter of the log: `info`, or directives such as `warn,planish=debug`.
    pub filter: String,
    /// Form of log lines.
    pub format: LogFormat,
    /// Address of the Prometheus page; none when absent.
    pub metrics_listen: Option<SocketAddr>,
    /// Collector that traces are sent to (OTLP over gRPC, `http://host:4317`); none when absent.
    pub otlp_endpoint: Option<String>,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: LogFormat::Text,
            metrics_listen: None,
            otlp_endpoint: None,
        }
    }
}

/// How the service ends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shutdown {
    /// Seconds that requests and jobs get to end.
    pub deadline_seconds: u64,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { deadline_seconds: 30 }
    }
}

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself; must not reach logs or messages.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

/// A number of bytes: a plain number, or one with a unit (`512MiB`, `4GB`).
fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Bytes {
        Number(u64),
        Text(String),
    }
    let problem = "not a number of bytes such as 1048576, '512MiB' or '4GB'";
    match Bytes::deserialize(deserializer) {
        Ok(Bytes::Number(number)) => Ok(number),
        Ok(Bytes::Text(text)) => parse_bytes(&text)
            .ok_or_else(|| serde::de::Error::custom(format!("'{text}' is {problem}"))),
        Err(_) => Err(serde::de::Error::custom(problem)),
    }
}

fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit: u64 = match text[digits..].trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        "ti" | "tib" => 1 << 40,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(unit)
}

/// Shortest token that is taken: 16 characters of even a poor alphabet cannot be tried out.
const SHORTEST_TOKEN: usize = 16;

/// Whether `token` can be used, and if not, why.
pub(crate) fn check_token(token: &str) -> Result<(), &'static str> {
    if token.len() < SHORTEST_TOKEN {
        Err("a token needs 16 characters or more; make one with `openssl rand -hex 32`")
    } else if !token.bytes().all(|b| b.is_ascii_graphic()) {
        Err("a token is printable ascii without blanks; make one with `openssl rand -hex 32`")
    } else {
        Ok(())
    }
}

impl Config {
    /// Checks what the types leave open. The violation's field is the key, `server.listen` for instance.
    pub fn validate(&self) -> Result<()> {
        self.validate_server()?;
        self.validate_limits()?;
        if self.data.folder.as_os_str().is_empty() {
            return Err(bad("data.folder", "no home folder was found; name a folder"));
        }
        if let Some(path) = self.import.allow_paths.iter().find(|p| !p.is_absolute()) {
            return Err(bad(
                "import.allow_paths",
                format!("'{}' is not absolute; write the whole path", path.display()),
            ));
        }
        within("compute.threads", self.compute.threads as u64, 0, 1024)?;
        within("shutdown.deadline_seconds", self.shutdown.deadline_seconds, 0, 86_400)?;
        let telemetry = &self.telemetry;
        if let Err(error) = telemetry.filter.parse::<tracing_subscriber::EnvFilter>() {
            return Err(bad(
                "telemetry.filter",
                format!("not a log filter ({error}); write a level or `target=level` pairs"),
            ));
        }
        if let Some(endpoint) = &telemetry.otlp_endpoint
            && !endpoint.starts_with("http://")
        {
            return Err(bad("telemetry.otlp_endpoint", "must start with http://"));
        }
        Ok(())
    }

    fn validate_server(&self) -> Result<()> {
        let server = &self.server;
        let tls = &server.tls;
        match (&tls.cert, &tls.key) {
            (Some(_), None) => {
                return Err(bad("server.tls.key", "missing; the certificate needs it"));
            }
            (None, Some(_)) => return Err(bad("server.tls.cert", "missing; the key needs it")),
            (None, None) if tls.client_ca.is_some() => {
                return Err(bad("server.tls.cert", "missing; mutual TLS needs it"));
            }
            _ => {}
        }
        if let Some(token) = &server.token {
            check_token(token.reveal()).map_err(|problem| bad("server.token", problem))?;
        }
        let encrypted = tls.cert.is_some();
        let credentials =
            server.token.is_some() || server.tokens_file.is_some() || tls.client_ca.is_some();
        let guarded = encrypted && credentials;
        if !(server.listen.ip().is_loopback() || server.insecure || guarded) {
            return Err(bad(
                "server.listen",
                format!(
                    "{} can be reached from other machines, which needs server.tls and a token (or \
                     server.tls.client_ca); set them, listen on 127.0.0.1, or set server.insecure",
                    server.listen
                ),
            ));
        }
        Ok(())
    }

    fn validate_limits(&self) -> Result<()> {
        let l = &self.limits;
        within("limits.message_bytes", l.message_bytes, 64 << 10, 1 << 30)?;
        within("limits.upload_bytes", l.upload_bytes, 1, 1 << 50)?;
        within("limits.queued_jobs", l.queued_jobs as u64, 1, 1_000_000)?;
        within("limits.running_jobs", l.running_jobs as u64, 1, 2)?;
        within("limits.concurrent_requests", l.concurrent_requests as u64, 1, 1_000_000)?;
        within("limits.streams_per_connection", l.streams_per_connection.into(), 1, 1_000_000)?;
        within("limits.generation_slots", l.generation_slots as u64, 1, 1024)?;
        within("limits.generation_queue", l.generation_queue as u64, 0, 1_000_000)?;
        within("limits.context", l.context as u64, 16, 1 << 24)?;
        within("limits.kv_bytes", l.kv_bytes, 1 << 20, 1 << 50)?;
        within("limits.models_bytes", l.models_bytes, 0, 1 << 50)?;
        within("limits.idle_unload_seconds", l.idle_unload_seconds, 0, 366 * 86_400)?;
        within("limits.adapters_bytes", l.adapters_bytes, 0, 1 << 50)
    }
}

fn bad(key: &str, problem: impl Into<String>) -> Error {
    Error::at(Reason::InvalidConfig, key, problem)
}

fn within(key: &str, value: u64, low: u64, high: u64) -> Result<()> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(bad(key, format!("{value} is outside {low} to {high}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> Config {
        Config { data: Data { folder: "/data".into() }, ..Config::default() }
    }

    #[test]
    fn bytes_take_units() {
        assert_eq!(parse_bytes("4096"), Some(4096));
        assert_eq!(parse_bytes("4 GiB"), Some(4 << 30));
        assert_eq!(parse_bytes("2MB"), Some(2_000_000));
        for bad in ["", "GiB", "-1", "1.5GiB", "4 parsecs", "99999999999999999999", "99999999TiB"] {
            assert_eq!(parse_bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_listener_beyond_loopback_needs_encryption_and_credentials() {
        let mut config = valid();
        config.validate().unwrap();
        config.server.listen = "0.0.0.0:1".parse().unwrap();
        assert_eq!(config.validate().unwrap_err().violations()[0].field, "server.listen");
        config.server.token = Some(Secret::new("0123456789abcdef"));
        assert!(config.validate().is_err(), "a token without TLS travels in the clear");
        config.server.tls.cert = Some("cert.pem".into());
        assert_eq!(config.validate().unwrap_err().violations()[0].field, "server.tls.key");
        config.server.tls.key = Some("key.pem".into());
        config.validate().unwrap();
        config.server.token = None;
        assert!(config.validate().is_err());
        config.server.tls.client_ca = Some("ca.pem".into());
        config.validate().unwrap();
        config.server =
            Server { listen: config.server.listen, insecure: true, ..Server::default() };
        config.validate().unwrap();
    }

    #[test]
    fn secrets_are_not_printed() {
        let mut config = valid();
        config.server.token = Some(Secret::new("hunter2hunter2hunter2"));
        assert!(!format!("{config:?}").contains("hunter2"));
        assert!(!serde_json::to_string(&config).unwrap().contains("hunter2"));
        config.server.token = Some(Secret::new("hunter2"));
        assert!(!config.validate().unwrap_err().message().contains("hunter2"));
    }
}
