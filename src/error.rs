//! The one error type of the crate.
//!
//! An [`Error`] is a stable [`Reason`], a lower-case message that says what is wrong, where, and what
//! to do about it, and, where a single input field is to blame, [`Violation`]s. The server turns it
//! into a gRPC status with `ErrorInfo` and `BadRequest` details; every reason has a page in
//! `docs/errors/`.

use std::fmt;
use std::time::Duration;

/// Result of every fallible operation of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The canonical status classes that a reason belongs to (the gRPC codes, without depending on gRPC).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    Aborted,
    ResourceExhausted,
    DataLoss,
    Cancelled,
    DeadlineExceeded,
    Unavailable,
    Unauthenticated,
    PermissionDenied,
    Unimplemented,
    Internal,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $class:ident;)+) => {
        /// Why a request or a job failed. The names are part of the API and never change meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $variant,)+ }

        impl Reason {
            /// Every reason, in the order of declaration.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)+];

            /// The stable name that travels in `ErrorInfo.reason`.
            pub fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)+ }
            }

            /// The status class of the reason.
            pub fn class(self) -> Class {
                match self { $(Reason::$variant => Class::$class,)+ }
            }
        }
    };
}

reasons! {
    /// A field of a request holds a value outside its domain.
    InvalidField = "INVALID_FIELD", InvalidArgument;
    /// An option of a recipe step is outside its domain or does not fit the model.
    InvalidOption = "INVALID_OPTION", InvalidArgument;
    /// A recipe is malformed or its steps cannot follow each other.
    InvalidRecipe = "INVALID_RECIPE", InvalidArgument;
    /// A resource name does not have the form its collection asks for.
    InvalidName = "INVALID_NAME", InvalidArgument;
    /// A page token was not made by this server for this request.
    InvalidPageToken = "INVALID_PAGE_TOKEN", InvalidArgument;
    /// A configuration file, variable or flag holds a bad value.
    InvalidConfig = "INVALID_CONFIG", InvalidArgument;
    /// A file is truncated, lies about its sizes, or breaks the rules of its format.
    MalformedFile = "MALFORMED_FILE", InvalidArgument;
    /// A file is well formed but of a kind, type or version that is not read here.
    UnsupportedFormat = "UNSUPPORTED_FORMAT", InvalidArgument;
    /// The model's architecture or one of its settings is not supported.
    UnsupportedModel = "UNSUPPORTED_MODEL", InvalidArgument;
    /// Uploaded bytes do not have the digest or the size that the client declared.
    DigestMismatch = "DIGEST_MISMATCH", InvalidArgument;
    /// No resource has this name.
    ResourceNotFound = "RESOURCE_NOT_FOUND", NotFound;
    /// No tensor of the model matches a name or pattern.
    TensorNotFound = "TENSOR_NOT_FOUND", NotFound;
    /// A resource with this name exists.
    ResourceExists = "RESOURCE_EXISTS", AlreadyExists;
    /// The same request id was used for a different request.
    RequestIdReused = "REQUEST_ID_REUSED", AlreadyExists;
    /// The resource changed since the client read it.
    EtagMismatch = "ETAG_MISMATCH", Aborted;
    /// The resource is used by another resource or a running job.
    ResourceInUse = "RESOURCE_IN_USE", FailedPrecondition;
    /// The data set is too small or of the wrong kind for the request.
    DatasetUnsuitable = "DATASET_UNSUITABLE", FailedPrecondition;
    /// The source of an import cannot be reached or lacks the file.
    SourceUnavailable = "SOURCE_UNAVAILABLE", FailedPrecondition;
    /// The model lacks what the request needs (tokenizer, chat template, ...).
    ModelUnsuitable = "MODEL_UNSUITABLE", FailedPrecondition;
    /// Changed code makes other numbers than those that were written.
    ResultDiffers = "RESULT_DIFFERS", FailedPrecondition;
    /// A queue, a slot table or a size limit of the server is full.
    LimitReached = "LIMIT_REACHED", ResourceExhausted;
    /// The request or upload is larger than the server takes.
    TooLarge = "TOO_LARGE", ResourceExhausted;
    /// A computation met values that are not finite.
    NonFinite = "NON_FINITE", DataLoss;
    /// A stored object is missing or does not match its digest.
    StoreCorrupt = "STORE_CORRUPT", DataLoss;
    /// The client or an operator cancelled the work.
    Cancelled = "CANCELLED", Cancelled;
    /// The deadline of the request passed.
    DeadlineExceeded = "DEADLINE_EXCEEDED", DeadlineExceeded;
    /// The server is starting, stopping, or a part of it is not ready.
    NotReady = "NOT_READY", Unavailable;
    /// The request carries no valid credentials.
    Unauthenticated = "UNAUTHENTICATED", Unauthenticated;
    /// The credentials do not allow the request.
    PermissionDenied = "PERMISSION_DENIED", PermissionDenied;
    /// The method exists in the API but not for this kind of resource.
    Unsupported = "UNSUPPORTED", Unimplemented;
    /// A numeric step failed although its input was valid (a factorisation, for example).
    NumericFailure = "NUMERIC_FAILURE", Internal;
    /// Reading or writing failed in the operating system, the database or the object store.
    Io = "IO", Internal;
    /// A defect of the program.
    Internal = "INTERNAL", Internal;
}

/// One bad field of a request: its path (`recipe.steps[0].wanda.sparsity`) and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub field: String,
    pub description: String,
}

/// What went wrong, where, and what to do.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    reason: Reason,
    message: String,
    violations: Vec<Violation>,
    retry_after: Option<Duration>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `reason`; the message is lower-case and names the remedy.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            reason,
            message: message.into(),
            violations: Vec::new(),
            retry_after: None,
            source: None,
        }))
    }

    /// A bad request field: `field` is the path inside the request.
    pub fn field(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::at(Reason::InvalidField, field, description)
    }

    /// A bad option of a method: `field` is the option's name.
    pub fn option(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::at(Reason::InvalidOption, field, description)
    }

    /// An error of `reason` with one violation.
    pub fn at(reason: Reason, field: impl Into<String>, description: impl Into<String>) -> Self {
        let (field, description) = (field.into(), description.into());
        let mut error = Self::new(reason, format!("{field}: {description}"));
        error.0.violations.push(Violation { field, description });
        error
    }

    /// A defect of the program: something its own invariants exclude.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Reason::Internal, message)
    }

    /// The job or request was cancelled.
    pub fn cancelled() -> Self {
        Self::new(Reason::Cancelled, "cancelled; nothing was written")
    }

    /// No resource called `name`; `remedy` says how to list those that exist.
    pub fn not_found(name: &str, remedy: &str) -> Self {
        Self::new(Reason::ResourceNotFound, format!("{name} does not exist; {remedy}"))
    }

    /// Keeps the cause, which is logged and not sent to clients.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Says when the same request may succeed.
    #[must_use]
    pub fn with_retry_after(mut self, time: Duration) -> Self {
        self.0.retry_after = Some(time);
        self
    }

    /// Puts `prefix: ` before the message, and `prefix.` before the paths of the violations.
    #[must_use]
    pub fn within(mut self, prefix: &str) -> Self {
        self.0.message = format!("{prefix}: {}", self.0.message);
        for violation in &mut self.0.violations {
            violation.field = format!("{prefix}.{}", violation.field);
        }
        self
    }

    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// When the same request may succeed, if that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    pub fn violations(&self) -> &[Violation] {
        &self.0.violations
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as &(dyn std::error::Error + 'static))
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        let reason = match error.kind() {
            std::io::ErrorKind::NotFound => Reason::SourceUnavailable,
            _ => Reason::Io,
        };
        Self::new(
            reason,
            format!("reading or writing failed: {error}; check the path and the disk"),
        )
        .with_source(error)
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::internal(format!("tensor operation failed: {error}")).with_source(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_reaches_message_and_violations() {
        let error = Error::option("sparsity", "1.5 is outside [0, 1)").within("steps[0].wanda");
        assert_eq!(error.message(), "steps[0].wanda: sparsity: 1.5 is outside [0, 1)");
        assert_eq!(error.violations()[0].field, "steps[0].wanda.sparsity");
        assert_eq!(error.reason().class(), Class::InvalidArgument);
    }

    #[test]
    fn reason_names_are_unique() {
        let mut names: Vec<_> = Reason::ALL.iter().map(|r| r.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Reason::ALL.len());
    }
}
