//! Operations: `google.longrunning` and the watching of progress.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};

use super::State;
use super::convert;
use super::download::Messages;
use super::paging::Page;
use crate::error::{Error, Reason, Result};
use crate::proto::google::longrunning as lro;
use crate::proto::google::longrunning::operations_server::Operations as Service;
use crate::proto::v1;
use crate::store::names;
use crate::store::operations::Operation;

pub struct Operations(pub Arc<State>);

#[tonic::async_trait]
impl Service for Operations {
    async fn list_operations(
        &self,
        request: Request<lro::ListOperationsRequest>,
    ) -> Result<Response<lro::ListOperationsResponse>, Status> {
        let request = request.into_inner();
        if !matches!(request.name.as_str(), "" | "operations") {
            let problem = "not a collection of operations; leave it empty or write `operations`";
            return Err(Error::field("name", problem).into());
        }
        let filter: String = request.filter.split_whitespace().collect();
        let done = match filter.as_str() {
            "" => None,
            "done=true" => Some(true),
            "done=false" => Some(false),
            _ => {
                let problem = "unknown filter; write `done=true`, `done=false` or nothing";
                return Err(Error::field("filter", problem).into());
            }
        };
        let scope = ["operations", filter.as_str()];
        let page = Page::parse(request.page_size, &request.page_token, &scope)?;
        let before = page.after.as_deref().and_then(|after| after.split_once(' '));
        let before = before.and_then(|(ms, id)| Some((ms.parse().ok()?, id)));
        let mut rows = self.0.store.operations(before, page.size + 1, done).await?;
        let next_page_token =
            page.cut(&mut rows, &scope, |row| format!("{} {}", row.created_ms, row.id));
        Ok(Response::new(lro::ListOperationsResponse {
            operations: rows.into_iter().map(convert::operation).collect(),
            next_page_token,
            unreachable: Vec::new(),
        }))
    }

    async fn get_operation(
        &self,
        request: Request<lro::GetOperationRequest>,
    ) -> Result<Response<lro::Operation>, Status> {
        let request = request.into_inner();
        let row = self.0.store.operation(names::operation(&request.name)?).await?;
        Ok(Response::new(convert::operation(row)))
    }

    async fn delete_operation(
        &self,
        request: Request<lro::DeleteOperationRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let request = request.into_inner();
        self.0.store.delete_operation(names::operation(&request.name)?).await?;
        Ok(Response::new(pbjson_types::Empty {}))
    }

    async fn cancel_operation(
        &self,
        request: Request<lro::CancelOperationRequest>,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        let request = request.into_inner();
        self.0.jobs.cancel(names::operation(&request.name)?).await?;
        Ok(Response::new(pbjson_types::Empty {}))
    }

    async fn wait_operation(
        &self,
        request: Request<lro::WaitOperationRequest>,
    ) -> Result<Response<lro::Operation>, Status> {
        let request = request.into_inner();
        let id = names::operation(&request.name)?;
        let timeout = match request.timeout {
            None => None,
            Some(t) => Some(duration(&t).ok_or_else(|| {
                Error::field("timeout", "not a positive duration; leave it out to wait to the end")
            })?),
        };
        let mut changes = self.0.jobs.watch(id);
        let wait = async {
            loop {
                changes.borrow_and_update();
                let row = self.0.store.operation(id).await?;
                if over(&row) || changes.changed().await.is_err() {
                    return Ok(row);
                }
            }
        };
        let row: Result<Operation> = match timeout {
            None => wait.await,
            Some(timeout) => match tokio::time::timeout(timeout, wait).await {
                Ok(row) => row,
                Err(_) => self.0.store.operation(id).await,
            },
        };
        Ok(Response::new(convert::operation(row?)))
    }
}

fn duration(duration: &pbjson_types::Duration) -> Option<Duration> {
    let seconds = u64::try_from(duration.seconds).ok()?;
    let nanos = u32::try_from(duration.nanos).ok().filter(|n| *n < 1_000_000_000)?;
    Some(Duration::new(seconds, nanos))
}

fn over(row: &Operation) -> bool {
    use crate::store::operations::State::{Queued, Running};
    !matches!(row.state, Queued | Running)
}

/// The stream of `WatchOperation`: what happened after `after`, then what happens, until the end. Only
/// the last message holds the operation done, so a client may stop at the first that does.
pub async fn watch(
    state: Arc<State>,
    request: v1::WatchOperationRequest,
) -> Result<Messages<v1::WatchOperationResponse>> {
    let id = names::operation(&request.name)?.to_owned();
    if request.after_sequence < 0 {
        return Err(Error::field("after_sequence", "negative; 0 gives all events"));
    }
    // An unknown operation is an error of the call, not of its stream.
    state.store.operation(&id).await?;
    let mut changes = state.jobs.watch(&id);
    let mut after = request.after_sequence;
    Ok(Box::pin(async_stream::try_stream! {
        let mut first = true;
        loop {
            changes.borrow_and_update();
            // The row first: if it is over, the events read after it are all there will ever be.
            let row = state.store.operation(&id).await?;
            let over = over(&row);
            let events = state.store.events(&id, after).await?;
            let last = convert::operation(row);
            let open = lro::Operation { done: false, result: None, ..last.clone() };
            let count = events.len();
            for (index, event) in events.into_iter().enumerate() {
                after = after.max(event.sequence);
                let operation = if index + 1 == count { &last } else { &open };
                yield v1::WatchOperationResponse {
                    operation: Some(operation.clone()),
                    event: Some(convert::event(event)),
                };
            }
            if count == 0 && (first || over) {
                yield v1::WatchOperationResponse { operation: Some(last), event: None };
            }
            first = false;
            if over {
                break;
            }
            if changes.changed().await.is_err() {
                Err(Error::new(Reason::NotReady, "the server is stopping; watch again later"))?;
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_checked() {
        let d = |seconds, nanos| duration(&pbjson_types::Duration { seconds, nanos });
        assert_eq!(d(1, 500_000_000), Some(Duration::from_millis(1500)));
        assert_eq!(d(-1, 0), None);
        assert_eq!(d(0, -1), None);
        assert_eq!(d(0, 1_000_000_000), None);
    }
}
