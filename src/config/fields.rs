//! Every key of the configuration: how its text is read and what it means.

/// How the text of a variable or a flag becomes a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    /// Text that is never shown.
    Secret,
    Number,
    /// `true` or `false`.
    Switch,
    /// Paths as in the `PATH` variable.
    Paths,
}

/// One key.
pub struct Field {
    pub key: &'static str,
    pub kind: Kind,
    pub about: &'static str,
}

const fn field(key: &'static str, kind: Kind, about: &'static str) -> Field {
    Field { key, kind, about }
}

/// All keys, section by section, in the order in which they are printed.
pub const FIELDS: &[Field] = &[
    field("server.listen", Kind::Text, "address to listen on; port 0 takes a free one"),
    field("server.token", Kind::Secret, "the token that clients must send"),
    field(
        "server.tokens_file",
        Kind::Text,
        "file with one token a line; `#` starts a comment line",
    ),
    field("server.insecure", Kind::Switch, "allow other machines in without TLS or credentials"),
    field("server.tls.cert", Kind::Text, "certificate chain of the server (PEM)"),
    field("server.tls.key", Kind::Text, "private key of the server (PEM)"),
    field("server.tls.client_ca", Kind::Text, "authority of client certificates (PEM): mutual TLS"),
    field("limits.message_bytes", Kind::Number, "bytes of one message, in and out"),
    field("limits.upload_bytes", Kind::Number, "bytes of one uploaded file"),
    field("limits.queued_jobs", Kind::Number, "jobs that wait"),
    field("limits.running_jobs", Kind::Number, "jobs that run at once"),
    field("limits.concurrent_requests", Kind::Number, "requests at once, all connections together"),
    field("limits.streams_per_connection", Kind::Number, "requests at once on one connection"),
    field("limits.generation_slots", Kind::Number, "generations that run at once on one model"),
    field("limits.generation_queue", Kind::Number, "generations that wait for a slot of one model"),
    field("limits.context", Kind::Number, "positions of one generation, prompt and answer"),
    field(
        "limits.kv_bytes",
        Kind::Number,
        "bytes of keys and values of one model: its generations and prompts kept for reuse",
    ),
    field("limits.kv_format", Kind::Text, "how keys and values are stored: f32, f16 or q8"),
    field(
        "limits.prefix_cache",
        Kind::Switch,
        "compute beginnings that prompts have in common once",
    ),
    field(
        "limits.models_bytes",
        Kind::Number,
        "bytes that loaded models may take; 0: half of the machine's memory",
    ),
    field(
        "limits.idle_unload_seconds",
        Kind::Number,
        "seconds without a request after which a model leaves memory; 0: never",
    ),
    field(
        "limits.adapters_bytes",
        Kind::Number,
        "bytes that loaded adapters may take; 0: an eighth of the machine's memory",
    ),
    field("data.folder", Kind::Text, "folder of the database and the objects"),
    field(
        "import.allow_paths",
        Kind::Paths,
        "folders that clients may import from; none when empty",
    ),
    field("compute.threads", Kind::Number, "threads for computing; 0: one for each core"),
    field("compute.encoders", Kind::Text, "numbers in which encoders compute: f32, bf16 or int8"),
    field("telemetry.filter", Kind::Text, "filter of the log: a level, or `target=level` pairs"),
    field("telemetry.format", Kind::Text, "form of log lines: text or json"),
    field("telemetry.metrics_listen", Kind::Text, "address of the Prometheus page"),
    field("telemetry.otlp_endpoint", Kind::Text, "collector of traces, OTLP over gRPC"),
    field("shutdown.deadline_seconds", Kind::Number, "seconds that requests and jobs get to end"),
];

/// The field called `key`.
pub fn find(key: &str) -> Option<&'static Field> {
    FIELDS.iter().find(|f| f.key == key)
}

/// The variable of a key: `PLANISH_SERVER__LISTEN`.
pub fn variable(key: &str) -> String {
    format!("PLANISH_{}", key.replace('.', "__").to_uppercase())
}
