//! Making models with random weights.

use prost::Message as _;
use tonic::Response;

use super::jobs::{check_datasets, submit};
use super::{State, check, convert};
use crate::error::{Error, Reason, Result};
use crate::jobs::create;
use crate::proto::google::longrunning::Operation;
use crate::proto::v1;
use crate::store::names;
use crate::store::operations::Kind;

/// Checks a request and puts it into the queue.
pub async fn create(state: &State, request: v1::CreateModelRequest) -> Result<Response<Operation>> {
    let fingerprint = request.encode_to_vec();
    check::request_id(&request.request_id)?;
    if let Some(known) = state.repeated(Kind::Create, &request.request_id, &fingerprint).await? {
        return Ok(known);
    }
    names::check_id(&request.model_id)
        .map_err(|e| Error::at(e.reason(), "model_id", e.message()))?;
    check::display_name("display_name", &request.display_name)?;
    create::config(&request)?;
    if let Some(tokenizer) = &request.tokenizer {
        if tokenizer.dataset.is_empty() {
            return Err(Error::field("tokenizer.dataset", "is missing; name a text data set"));
        }
        check_datasets(state, tokenizer).await.map_err(|e| e.within("tokenizer"))?;
    }
    let target = format!("models/{}", request.model_id);
    match state.store.model(&request.model_id).await {
        Ok(_) => {
            return Err(Error::new(
                Reason::ResourceExists,
                format!("{target} exists; choose another id or delete it first"),
            ));
        }
        Err(error) if error.reason() == Reason::ResourceNotFound => {}
        Err(error) => return Err(error),
    }
    if request.validate_only {
        let version = v1::ModelVersion::default();
        return Ok(Response::new(convert::validated("create", target, &version)));
    }
    let id = request.request_id.clone();
    submit(state, Kind::Create, target, &request, &id, fingerprint).await
}
