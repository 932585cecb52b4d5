//! Health by the real state of the parts, for each service by name and for the whole (`""`).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::State;
use super::gate::Phase;

/// Time between looks at the parts.
const PERIOD: Duration = Duration::from_secs(3);

/// A store that does not answer within this time counts as ill.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a service needs to be of use.
const SERVICES: &[(&str, &[Part])] = {
    use crate::proto::google::longrunning::operations_server;
    use crate::proto::inference::grpc_inference_service_server;
    use crate::proto::v1::{
        adapter_service_server, dataset_service_server, generation_service_server,
        job_service_server, method_service_server, model_service_server, prediction_service_server,
        retrieval_service_server,
    };
    &[
        ("", &[Part::Store, Part::Engines]),
        (model_service_server::SERVICE_NAME, &[Part::Store]),
        (adapter_service_server::SERVICE_NAME, &[Part::Store]),
        (dataset_service_server::SERVICE_NAME, &[Part::Store]),
        (job_service_server::SERVICE_NAME, &[Part::Store]),
        (operations_server::SERVICE_NAME, &[Part::Store]),
        (generation_service_server::SERVICE_NAME, &[Part::Store, Part::Engines]),
        (grpc_inference_service_server::SERVICE_NAME, &[Part::Store, Part::Engines]),
        (prediction_service_server::SERVICE_NAME, &[Part::Store, Part::Engines]),
        (retrieval_service_server::SERVICE_NAME, &[Part::Store, Part::Engines]),
        (method_service_server::SERVICE_NAME, &[]),
    ]
};

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Store,
    Engines,
}

/// Looks once and reports. Called before the server listens, so that its first answer is true.
pub async fn report(state: &State, reporter: &HealthReporter) {
    let store = match tokio::time::timeout(PATIENCE, state.store.ping()).await {
        Ok(Ok(())) => true,
        Ok(Err(error)) => {
            tracing::error!("the store is ill: {error}");
            false
        }
        Err(_) => {
            tracing::error!("the store does not answer");
            false
        }
    };
    let engines = state.residency.healthy();
    let serving = *state.phase.borrow() == Phase::Serving;
    for (service, needs) in SERVICES {
        let well = serving
            && needs.iter().all(|part| match part {
                Part::Store => store,
                Part::Engines => engines,
            });
        if service.is_empty() {
            state.well.store(well, Ordering::Relaxed);
        }
        let status = if well { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status(service, status).await;
        let label = if service.is_empty() { "all" } else { service };
        metrics::gauge!("planish_healthy", "service" => label).set(f64::from(u8::from(well)));
    }
}

/// Reports every few seconds, at once when a model fails, and for the last time when the server begins
/// to stop.
pub async fn watch(state: Arc<State>, reporter: HealthReporter, mut phase: watch::Receiver<Phase>) {
    loop {
        report(&state, &reporter).await;
        super::observe::gauges(&state).await;
        if *phase.borrow_and_update() != Phase::Serving {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            () = state.unwell.notified() => {}
            _ = phase.changed() => {}
        }
    }
}
