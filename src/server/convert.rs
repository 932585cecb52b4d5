//! Rows of the store as messages of the API.

use prost::{Message, Name};

use super::{datasets, status};
use crate::error::Error;
use crate::proto::google::longrunning::{Operation, operation};
use crate::proto::v1;
use crate::store::datasets::DatasetRow;
use crate::store::models::ModelRow;
use crate::store::operations::{self, State};

pub fn timestamp(ms: i64) -> pbjson_types::Timestamp {
    pbjson_types::Timestamp {
        seconds: ms.div_euclid(1000),
        // Below a second by construction.
        nanos: i32::try_from(ms.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

pub fn model(row: ModelRow) -> v1::Model {
    v1::Model {
        name: format!("models/{}", row.id),
        display_name: row.display_name,
        labels: row.labels.into_iter().collect(),
        create_time: Some(timestamp(row.created_ms)),
        update_time: Some(timestamp(row.updated_ms)),
        etag: row.etag,
        latest_version: row
            .latest
            .map(|v| format!("models/{}/versions/{v}", row.id))
            .unwrap_or_default(),
        version_count: i32::try_from(row.versions).unwrap_or(i32::MAX),
    }
}

pub fn dataset(row: DatasetRow) -> v1::Dataset {
    v1::Dataset {
        name: format!("datasets/{}", row.id),
        display_name: row.display_name,
        kind: datasets::kind(row.kind).into(),
        digest: row.object.digest,
        size_bytes: signed(row.object.size),
        record_count: row.records,
        create_time: Some(timestamp(row.created_ms)),
        etag: row.etag,
        source: row.source,
        label_count: i32::try_from(row.layout.labels.len()).unwrap_or(i32::MAX),
        layout: Some(datasets::layout(row.layout)),
        skipped_count: row.skipped,
    }
}

pub fn operation(row: operations::Operation) -> Operation {
    let metadata = v1::OperationMetadata {
        kind: row.kind.name().to_owned(),
        state: match row.state {
            State::Queued => v1::OperationState::Queued,
            State::Running => v1::OperationState::Running,
            State::Succeeded => v1::OperationState::Succeeded,
            State::Failed => v1::OperationState::Failed,
            State::Cancelled => v1::OperationState::Cancelled,
        }
        .into(),
        target: row.target,
        progress: row.progress,
        message: row.message,
        create_time: Some(timestamp(row.created_ms)),
        start_time: row.started_ms.map(timestamp),
        end_time: row.ended_ms.map(timestamp),
        attempt: row.attempt,
        versions: row.versions,
        sequence: row.sequence,
        metrics: row.metrics,
    };
    let result = match row.state {
        State::Queued | State::Running => None,
        State::Succeeded => {
            let type_url = row.kind.response_type().to_owned();
            let value = row.response.unwrap_or_default().into();
            Some(operation::Result::Response(pbjson_types::Any { type_url, value }))
        }
        State::Failed | State::Cancelled => {
            let error = row.error.unwrap_or_else(|| {
                let cancelled = Error::cancelled();
                operations::StoredError {
                    reason: cancelled.reason().name().to_owned(),
                    message: cancelled.message().to_owned(),
                    violations: Vec::new(),
                }
            });
            Some(operation::Result::Error(status::of_operation(&error)))
        }
    };
    Operation {
        name: format!("operations/{}", row.id),
        metadata: Some(any(&metadata)),
        done: result.is_some(),
        result,
    }
}

/// An operation that was never queued: the answer to `validate_only`.
pub fn validated<M: Message + Name>(kind: &str, target: String, response: &M) -> Operation {
    let metadata = v1::OperationMetadata {
        kind: kind.to_owned(),
        state: v1::OperationState::Succeeded.into(),
        target,
        progress: 1.0,
        message: "checked only".to_owned(),
        ..Default::default()
    };
    Operation {
        name: String::new(),
        metadata: Some(any(&metadata)),
        done: true,
        result: Some(operation::Result::Response(any(response))),
    }
}

pub fn event(row: operations::EventRow) -> v1::OperationEvent {
    v1::OperationEvent {
        sequence: row.sequence,
        time: Some(timestamp(row.time_ms)),
        progress: row.progress,
        message: row.message,
        metrics: row.metrics,
    }
}

pub fn any<M: Message + Name>(message: &M) -> pbjson_types::Any {
    pbjson_types::Any { type_url: M::type_url(), value: message.encode_to_vec().into() }
}

/// A size in the signed form of the API.
pub fn signed(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_keep_positive_nanos() {
        let t = timestamp(-1);
        assert_eq!((t.seconds, t.nanos), (-1, 999_000_000));
        let t = timestamp(1500);
        assert_eq!((t.seconds, t.nanos), (1, 500_000_000));
    }
}
