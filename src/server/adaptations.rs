//! Adaptations: what is checked before they wait for a runner.

use super::{State, blocking, check};
use crate::error::{Error, Reason, Result};
use crate::proto::v1;
use crate::recipe::{adapt::Plan, rules};
use crate::store::datasets::DatasetKind;
use crate::store::names;

/// Said of adapters of a base that was rounded.
const BESIDE: &str = "the base is quantised: let the adapter serve beside it, since merging would round the sum again";

/// Whether an adaptation makes factors that serve beside a base.
fn low_rank(adaptation: &v1::Adaptation) -> bool {
    use v1::adaptation::Method;
    !matches!(
        adaptation.method,
        None | Some(Method::Full(_) | Method::HeadOnly(_) | Method::Bitfit(_))
    )
}

/// The name of the version that a request means, and what would be done.
///
/// # Errors
/// Whatever is wrong with the request; RESOURCE_EXISTS for an adapter of the same id.
pub async fn check(state: &State, request: &v1::AdaptRequest) -> Result<(String, v1::AdaptPlan)> {
    let id = &request.adapter_id;
    names::check_id(id).map_err(|e| Error::at(e.reason(), "adapter_id", e.message()))?;
    check::display_name("display_name", &request.display_name)?;
    let row = state.store.version(&request.model).await?;
    let base = row.name();
    match state.store.adapter(id).await {
        Ok(_) => {
            return Err(Error::new(
                Reason::ResourceExists,
                format!("adapters/{id} exists; choose another id or delete it first"),
            ));
        }
        Err(error) if error.reason() != Reason::ResourceNotFound => return Err(error),
        Err(_) => {}
    }
    let (adaptation, training) = (request.adaptation.clone(), request.training.clone());
    let quantised = rules::quantised(&state.store.version_info(&row).await?);
    let plan = blocking(move || {
        Plan::new(adaptation.as_ref(), training.as_ref(), (row.family.as_str(), &row.config))
            .map(|plan| (plan, row.weight_bytes.unsigned_abs()))
    });
    let (plan, weights) = plan.await?;

    let training = &plan.training;
    if training.dataset.is_empty() {
        return Err(Error::field("training.dataset", "missing; name the data to learn from"));
    }
    let validation = training.validation.as_ref().map_or("", |v| v.dataset.as_str());
    let learnt =
        [("training.dataset", &*training.dataset), ("training.validation.dataset", validation)];
    for (field, name) in learnt.into_iter().filter(|(_, name)| !name.is_empty()) {
        let at = |e: Error| Error::at(e.reason(), field, e.message());
        let row = state.store.dataset(names::dataset(name).map_err(at)?).await.map_err(at)?;
        plan.suits(field, row.kind)?;
    }
    for name in plan.method()?.datasets() {
        let at = |e: Error| Error::at(e.reason(), "adaptation", e.message());
        let id = names::dataset(name).map_err(at)?;
        state.store.of_kind(id, DatasetKind::Text).await.map_err(at)?;
    }
    let mut message = plan.message(weights);
    if quantised && message.adaptation.as_ref().is_some_and(low_rank) {
        message.warnings.push(BESIDE.to_owned());
    }
    Ok((base, message))
}
