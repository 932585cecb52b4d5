//! Logs, traces and metrics.

use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, fmt};

use crate::config::{LogFormat, Telemetry};
use crate::error::{Error, Reason, Result};

/// Seconds, from a cached answer to a long stream.
const LATENCIES: &[f64] = &[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0];

/// Longest wait for the collector at the end.
const FLUSH: Duration = Duration::from_secs(3);

/// Keeps the exporters alive; [`Guard::shutdown`] sends what is left.
pub struct Guard {
    traces: Option<SdkTracerProvider>,
}

/// Sets up logging to stderr, the Prometheus page and the trace exporter, once per process. Must be
/// called within the async runtime. Errors are INVALID_CONFIG.
pub fn init(config: &Telemetry) -> Result<Guard> {
    let bad = |key: &str, problem: String| Error::at(Reason::InvalidConfig, key, problem);
    let filter: EnvFilter = config
        .filter
        .parse()
        .map_err(|e| bad("telemetry.filter", format!("not a log filter ({e})")))?;
    let traces = match &config.otlp_endpoint {
        Some(endpoint) => Some(exporter(endpoint).map_err(|e| {
            bad("telemetry.otlp_endpoint", format!("'{endpoint}' cannot be used: {e}"))
        })?),
        None => None,
    };
    let spans =
        traces.as_ref().map(|p| tracing_opentelemetry::layer().with_tracer(p.tracer("planish")));
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match config.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(spans)
        .try_init()
        .map_err(|e| Error::internal("telemetry is set up already").with_source(e))?;
    if let Some(address) = config.metrics_listen {
        PrometheusBuilder::new()
            .with_http_listener(address)
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), LATENCIES)
            .and_then(PrometheusBuilder::install)
            .map_err(|e| {
                bad(
                    "telemetry.metrics_listen",
                    format!("{address} cannot be used: {e}; choose a free address"),
                )
            })?;
        describe();
    }
    Ok(Guard { traces })
}

fn exporter(endpoint: &str) -> Result<SdkTracerProvider, opentelemetry_otlp::ExporterBuildError> {
    let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build()?;
    let resource = Resource::builder().with_service_name("planish").build();
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
}

fn describe() {
    use metrics::{describe_counter as counter, describe_gauge as gauge, describe_histogram};
    counter!("planish_requests_total", "Requests that ended, by method and code.");
    describe_histogram!("planish_request_seconds", "Time from request to last byte, by method.");
    gauge!("planish_requests_in_flight", "Requests under way.");
    counter!("planish_prompt_tokens_total", "Tokens of prompts.");
    counter!(
        "planish_cached_prompt_tokens_total",
        "Tokens of prompts that were not computed again."
    );
    counter!("planish_generated_tokens_total", "Tokens generated.");
    gauge!("planish_generations_running", "Generations in a slot, all models.");
    gauge!("planish_generations_waiting", "Generations waiting for a slot, all models.");
    gauge!("planish_models_loaded", "Models in memory.");
    gauge!("planish_models_resident_bytes", "Bytes of the models in memory.");
    gauge!("planish_operations", "Unfinished operations, by state.");
    gauge!("planish_healthy", "1 while a service is healthy, by service.");
}

impl Guard {
    /// Sends what is left; takes at most a few seconds.
    pub fn shutdown(self) {
        if let Some(traces) = self.traces
            && let Err(error) = traces.shutdown_with_timeout(FLUSH)
        {
            tracing::warn!("the last traces were not sent: {error}");
        }
    }
}
