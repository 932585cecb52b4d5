//! Drops models that nobody uses.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::State;
use super::gate::Phase;

/// Looks at the models are at least and at most so far apart.
const PERIODS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(15));

/// Drops, now and then, the models that were idle for `limits.idle_unload_seconds`, until the server stops.
/// Ends at once where that is 0.
pub async fn watch(state: Arc<State>, mut phase: watch::Receiver<Phase>) {
    let idle = Duration::from_secs(state.config.limits.idle_unload_seconds);
    if idle.is_zero() {
        return;
    }
    let period = (idle / 8).clamp(PERIODS.0, PERIODS.1);
    while *phase.borrow_and_update() == Phase::Serving {
        tokio::select! {
            () = tokio::time::sleep(period) => {}
            changed = phase.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
        for key in state.residency.unload_idle(idle) {
            tracing::info!(key, "unloaded a model that was idle");
        }
    }
}
