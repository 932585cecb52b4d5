//! Gauges of the server's state, set now and then.

use super::State;

/// Unfinished operations that are counted at most; beyond it the gauge stands still.
const MAX_COUNTED: usize = 10_000;

/// Sets the gauges.
pub async fn gauges(state: &State) {
    use crate::store::operations::State as S;
    let stats = state.residency.stats();
    metrics::gauge!("planish_models_loaded").set(stats.models as f64);
    metrics::gauge!("planish_models_resident_bytes").set(stats.resident_bytes as f64);
    metrics::gauge!("planish_generations_running").set(stats.running as f64);
    metrics::gauge!("planish_generations_waiting").set(stats.waiting as f64);
    let adapters = state.adapters.stats();
    metrics::gauge!("planish_adapters_loaded").set(adapters.adapters as f64);
    metrics::gauge!("planish_adapters_resident_bytes").set(adapters.resident_bytes as f64);
    // An ill store is reported elsewhere.
    if let Ok(rows) = state.store.operations(None, MAX_COUNTED, Some(false)).await {
        for (name, kind) in [("queued", S::Queued), ("running", S::Running)] {
            let count = rows.iter().filter(|row| row.state == kind).count();
            metrics::gauge!("planish_operations", "state" => name).set(count as f64);
        }
    }
}
