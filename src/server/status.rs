//! Errors on the wire: [`Error`] to gRPC status with details.

use std::error::Error as _;
use std::fmt::Write as _;
use std::time::Duration;

use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::error::{Class, Error, Reason};
use crate::proto::google::rpc;
use crate::store::operations::StoredError;

/// The `domain` of every `ErrorInfo`.
pub const DOMAIN: &str = "planish";

// Details travel in a header, and clients refuse long ones (often beyond 8 KiB, base64 included).
const MAX_MESSAGE: usize = 1024;
const MAX_VIOLATIONS: usize = 8;
const MAX_VIOLATION: usize = 256;

/// When a client should try again after a refusal that time cures, if the refusal does not know better.
const RETRY: Duration = Duration::from_secs(1);

fn code(class: Class) -> Code {
    match class {
        Class::InvalidArgument => Code::InvalidArgument,
        Class::NotFound => Code::NotFound,
        Class::AlreadyExists => Code::AlreadyExists,
        Class::FailedPrecondition => Code::FailedPrecondition,
        Class::Aborted => Code::Aborted,
        Class::ResourceExhausted => Code::ResourceExhausted,
        Class::DataLoss => Code::DataLoss,
        Class::Cancelled => Code::Cancelled,
        Class::DeadlineExceeded => Code::DeadlineExceeded,
        Class::Unavailable => Code::Unavailable,
        Class::Unauthenticated => Code::Unauthenticated,
        Class::PermissionDenied => Code::PermissionDenied,
        Class::Unimplemented => Code::Unimplemented,
        Class::Internal => Code::Internal,
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let reason = error.reason();
        let id = matches!(reason.class(), Class::Internal | Class::DataLoss).then(|| log(&error));
        let violations =
            error.violations().iter().map(|v| (v.field.as_str(), v.description.as_str()));
        build(reason, error.message(), violations, id.as_deref(), error.retry_after())
    }
}

/// Writes an error that is ours to mend into the log, with its causes, under an id that the client
/// gets too.
fn log(error: &Error) -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let mut causes = String::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(causes, ": {error}");
        cause = error.source();
    }
    tracing::error!(error_id = %id, reason = error.reason().name(), "{error}{causes}");
    id
}

fn build<'a>(
    reason: Reason,
    message: &str,
    violations: impl Iterator<Item = (&'a str, &'a str)>,
    error_id: Option<&str>,
    retry_after: Option<Duration>,
) -> Status {
    let mut metadata = std::collections::HashMap::new();
    if let Some(id) = error_id {
        metadata.insert("error_id".to_owned(), id.to_owned());
    }
    let mut details = ErrorDetails::with_error_info(reason.name(), DOMAIN, metadata);
    let violations: Vec<_> = violations
        .take(MAX_VIOLATIONS)
        .map(|(field, text)| {
            FieldViolation::new(cut(field, MAX_VIOLATION), cut(text, MAX_VIOLATION))
        })
        .collect();
    if !violations.is_empty() {
        details.set_bad_request(violations);
    }
    if matches!(reason, Reason::LimitReached | Reason::NotReady) {
        details.set_retry_info(Some(retry_after.unwrap_or(RETRY)));
    }
    let message = match (reason, error_id) {
        // A defect's message speaks of our insides; the log has it.
        (Reason::Internal, Some(id)) => {
            format!("a defect of the server; its log tells more under error_id {id}")
        }
        (Reason::Internal, None) => "a defect of the server; its log tells more".to_owned(),
        _ => cut(message, MAX_MESSAGE).to_owned(),
    };
    Status::with_error_details(code(reason.class()), message, details)
}

/// The longest prefix of `text` of at most `max` bytes.
fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// The outcome of an operation that failed, as `google.rpc.Status`.
pub fn of_operation(error: &StoredError) -> rpc::Status {
    let reason =
        Reason::ALL.iter().find(|r| r.name() == error.reason).copied().unwrap_or(Reason::Internal);
    let violations = error.violations.iter().map(|(f, d)| (f.as_str(), d.as_str()));
    let status = build(reason, &error.message, violations, None, None);
    // The details header of a status is this very message, encoded.
    rpc::Status::decode(status.details()).unwrap_or_else(|_| rpc::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: Vec::new(),
    })
}

/// Gives a status that the gRPC library made by itself (no details) a reason.
pub fn explain(status: Status) -> Status {
    if !status.details().is_empty() || status.code() == Code::Ok {
        return status;
    }
    let message = status.message();
    let reason = match status.code() {
        Code::ResourceExhausted => Reason::TooLarge,
        Code::OutOfRange if message.contains("too large") => Reason::TooLarge,
        Code::Unimplemented => Reason::Unsupported,
        Code::NotFound => Reason::ResourceNotFound,
        Code::Cancelled => Reason::Cancelled,
        Code::DeadlineExceeded => Reason::DeadlineExceeded,
        Code::Unavailable => Reason::NotReady,
        // Bytes that are no such message, a missing message, an unknown compression.
        Code::Internal | Code::InvalidArgument | Code::OutOfRange => Reason::InvalidField,
        _ => Reason::Internal,
    };
    let message = match reason {
        Reason::Unsupported if message.is_empty() => "the service has no such method",
        _ => message,
    };
    build(reason, message, std::iter::empty(), None, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_carry_reason_violations_and_retry() {
        let status = Status::from(Error::field("page_size", "-1 is negative").within("request"));
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("INVALID_FIELD", "planish"));
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "request.page_size");
        assert!(details.retry_info().is_none());

        let status = Status::from(Error::new(Reason::LimitReached, "full"));
        assert_eq!(status.code(), Code::ResourceExhausted);
        let delay = |status: &Status| status.get_error_details().retry_info().unwrap().retry_delay;
        assert_eq!(delay(&status), Some(RETRY));
        let hint = Duration::from_millis(2500);
        let error = Error::new(Reason::LimitReached, "full").with_retry_after(hint);
        assert_eq!(delay(&Status::from(error)), Some(hint));
    }

    #[test]
    fn insides_stay_inside() {
        let secret = std::io::Error::other("/home/someone/secret");
        let error = Error::internal("row 7 of table x").with_source(secret);
        let status = Status::from(error);
        assert!(!format!("{status:?}").contains("secret") && !status.message().contains("row 7"));
        let details = status.get_error_details();
        let id = &details.error_info().unwrap().metadata["error_id"];
        assert!(status.message().contains(id.as_str()));
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let status = Status::from(Error::field("f".repeat(9000), "ü".repeat(9000)));
        assert!(status.message().len() <= MAX_MESSAGE);
        assert!(status.details().len() < 4096);
    }

    #[test]
    fn operations_keep_their_reason() {
        let stored = StoredError {
            reason: "INVALID_OPTION".into(),
            message: "m".into(),
            violations: vec![("a".into(), "b".into())],
        };
        let status = of_operation(&stored);
        assert_eq!(status.code, Code::InvalidArgument as i32);
        assert_eq!(status.message, "m");
        assert_eq!(status.details.len(), 2);
    }

    #[test]
    fn every_reason_has_a_page_and_every_page_a_reason() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/errors");
        let index = std::fs::read_to_string(folder.join("README.md")).unwrap();
        for reason in Reason::ALL {
            let name = reason.name();
            let page = std::fs::read_to_string(folder.join(format!("{name}.md"))).unwrap();
            assert!(page.starts_with(&format!("# {name}\n")), "{name}");
            let code = super::super::gate::name(code(reason.class()));
            assert!(page.contains(&format!("gRPC code: `{code}`")), "{name} is not {code}");
            assert!(page.contains("## Typical causes") && page.contains("## What to do"), "{name}");
            assert!(index.contains(&format!("| [{name}]({name}.md) | `{code}` |")), "{name}");
        }
        // One page each and the index: no page without a reason.
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), Reason::ALL.len() + 1);
    }

    #[test]
    fn statuses_of_the_library_get_a_reason() {
        let status = explain(Status::unimplemented(""));
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "UNSUPPORTED");
        assert!(!status.message().is_empty());
        let status = explain(Status::out_of_range("Error, decoded message length too large"));
        assert_eq!(status.code(), Code::ResourceExhausted);
    }
}
