//! What the command says and returns when something goes wrong.

use std::fmt;
use std::process::ExitCode;

use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::error::{Class, Error, Reason};
use crate::proto::google::rpc;

/// Result of a verb.
pub type Result<T, E = CliError> = std::result::Result<T, E>;

/// Exit codes, after `sysexits.h` where it has one. Part of the command's interface.
pub mod exit {
    /// The work failed.
    pub const FAILURE: u8 = 1;
    /// The command line or the configuration is wrong.
    pub const USAGE: u8 = 64;
    /// An argument or the content of a file is not accepted.
    pub const DATA: u8 = 65;
    /// A file or a resource does not exist.
    pub const NOT_FOUND: u8 = 66;
    /// The server cannot be reached or is not ready.
    pub const UNAVAILABLE: u8 = 69;
    /// A defect of the program.
    pub const INTERNAL: u8 = 70;
    /// A limit or a deadline; the same command may work later.
    pub const TEMPORARY: u8 = 75;
    /// Missing or insufficient credentials.
    pub const AUTH: u8 = 77;
    /// Interrupted by the user.
    pub const INTERRUPTED: u8 = 130;
}

/// A failed verb: what to print, and the exit code.
#[derive(Debug)]
pub struct CliError {
    exit: u8,
    code: Code,
    message: String,
    /// Stable reason, as in `docs/errors/`.
    reason: Option<String>,
    /// Field and what is wrong with it.
    violations: Vec<(String, String)>,
    /// Ends the command without a word: the reader of our output has gone.
    quiet: bool,
}

impl CliError {
    fn new(exit: u8, code: Code, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { exit, code, message, reason: None, violations: Vec::new(), quiet: false }
    }

    /// The command line is wrong in a way the parser cannot see.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(exit::USAGE, Code::InvalidArgument, message)
    }

    /// A local file could not be read or written; `what` is lower-case: `reading a.toml`.
    pub fn file(what: &str, error: &std::io::Error) -> Self {
        let (exit, code) = match error.kind() {
            std::io::ErrorKind::NotFound => (exit::NOT_FOUND, Code::NotFound),
            _ => (exit::FAILURE, Code::Unknown),
        };
        Self::new(exit, code, format!("{what} failed: {error}"))
    }

    /// The work itself failed although every call succeeded.
    pub fn failure(message: impl Into<String>) -> Self {
        Self::new(exit::FAILURE, Code::Unknown, message)
    }

    /// The server cannot be reached.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(exit::UNAVAILABLE, Code::Unavailable, message)
    }

    /// `--timeout` passed.
    pub fn deadline() -> Self {
        let message = "the time given by --timeout is over; work that was started goes on";
        Self::new(exit::TEMPORARY, Code::DeadlineExceeded, message)
    }

    /// The user pressed Ctrl-C.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self::new(exit::INTERRUPTED, Code::Cancelled, message)
    }

    /// Nobody reads our output any more (`planish models list | head -1`): not an error.
    fn closed_pipe() -> Self {
        Self { quiet: true, ..Self::new(0, Code::Ok, "") }
    }

    /// The gRPC code, for callers that treat some failures differently.
    pub fn code(&self) -> Code {
        self.code
    }

    /// An error that an operation ended with.
    pub fn from_operation(status: &rpc::Status) -> Self {
        use prost::Message as _;
        Status::with_details(
            Code::from_i32(status.code),
            status.message.clone(),
            status.encode_to_vec().into(),
        )
        .into()
    }

    /// Prints the error on standard error and gives the exit code.
    pub fn report(&self, as_json: bool) -> ExitCode {
        if !self.quiet {
            if as_json {
                eprintln!("{}", json!({ "error": self.to_json() }));
            } else {
                eprintln!("{self}");
            }
        }
        ExitCode::from(self.exit)
    }

    fn to_json(&self) -> Value {
        let violations: Vec<_> = self
            .violations
            .iter()
            .map(|(field, description)| json!({ "field": field, "description": description }))
            .collect();
        json!({
            "code": code_name(self.code),
            "exit_code": self.exit,
            "message": self.message,
            "reason": self.reason,
            "violations": violations,
        })
    }
}

/// The name of a code as gRPC spells it: `NOT_FOUND`.
pub(super) fn code_name(code: Code) -> String {
    let mut name = String::new();
    for (i, c) in format!("{code:?}").chars().enumerate() {
        if i > 0 && c.is_uppercase() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        // A single violation is usually the message said again.
        for (field, description) in &self.violations {
            if !(self.message.contains(field.as_str()) && self.message.contains(description)) {
                write!(f, "\n  {field}: {description}")?;
            }
        }
        if let Some(reason) = &self.reason {
            write!(f, "\n  reason {reason}, explained in docs/errors/{reason}.md")?;
        }
        Ok(())
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let reason = details.error_info().map(|info| info.reason.clone());
        let violations = details
            .bad_request()
            .map(|bad| bad.field_violations.iter())
            .into_iter()
            .flatten()
            .map(|v| (v.field.clone(), v.description.clone()))
            .collect();
        let code = status.code();
        let exit = match code {
            // The server's own configuration never reaches a client, but an operation may carry it.
            _ if reason.as_deref() == Some(Reason::InvalidConfig.name()) => exit::USAGE,
            Code::InvalidArgument | Code::OutOfRange => exit::DATA,
            Code::NotFound => exit::NOT_FOUND,
            Code::Unavailable => exit::UNAVAILABLE,
            Code::Internal => exit::INTERNAL,
            Code::ResourceExhausted | Code::DeadlineExceeded => exit::TEMPORARY,
            Code::Unauthenticated | Code::PermissionDenied => exit::AUTH,
            _ => exit::FAILURE,
        };
        let message = match status.message() {
            "" => code.description().to_lowercase(),
            message => message.to_owned(),
        };
        Self { exit, code, message, reason, violations, quiet: false }
    }
}

impl From<Error> for CliError {
    fn from(error: Error) -> Self {
        let (exit, code) = match error.reason().class() {
            _ if error.reason() == Reason::InvalidConfig => (exit::USAGE, Code::InvalidArgument),
            Class::InvalidArgument => (exit::DATA, Code::InvalidArgument),
            Class::NotFound => (exit::NOT_FOUND, Code::NotFound),
            Class::Unavailable => (exit::UNAVAILABLE, Code::Unavailable),
            Class::Internal => (exit::INTERNAL, Code::Internal),
            Class::ResourceExhausted => (exit::TEMPORARY, Code::ResourceExhausted),
            Class::DeadlineExceeded => (exit::TEMPORARY, Code::DeadlineExceeded),
            Class::Unauthenticated => (exit::AUTH, Code::Unauthenticated),
            Class::PermissionDenied => (exit::AUTH, Code::PermissionDenied),
            _ => (exit::FAILURE, Code::FailedPrecondition),
        };
        let violations =
            error.violations().iter().map(|v| (v.field.clone(), v.description.clone())).collect();
        Self {
            exit,
            code,
            message: error.message().to_owned(),
            reason: Some(error.reason().name().to_owned()),
            violations,
            quiet: false,
        }
    }
}

/// Writing to standard output failed.
impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::closed_pipe(),
            _ => Self::file("writing the output", &error),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn details_of_a_status_are_shown() {
        let mut details = ErrorDetails::new();
        details.set_error_info("INVALID_OPTION", "planish", std::collections::HashMap::new());
        details.add_bad_request_violation("recipe.steps[0].wanda.share", "too big");
        let status =
            Status::with_error_details(Code::InvalidArgument, "the recipe cannot run", details);
        let error = CliError::from(status);
        assert_eq!(error.exit, exit::DATA);
        let text = error.to_string();
        assert!(
            text.starts_with("error: the recipe cannot run\n  recipe.steps[0].wanda.share: too")
        );
        assert!(text.ends_with("docs/errors/INVALID_OPTION.md"));
        assert_eq!(error.to_json()["violations"][0]["description"], "too big");
        assert_eq!(error.to_json()["code"], "INVALID_ARGUMENT");
    }

    #[test]
    fn an_operation_keeps_its_reason() {
        let mut details = ErrorDetails::new();
        details.set_error_info("NON_FINITE", "planish", std::collections::HashMap::new());
        let status = Status::with_error_details(Code::DataLoss, "layer 3 overflowed", details);
        let wire = <rpc::Status as prost::Message>::decode(status.details()).unwrap();
        let error = CliError::from_operation(&wire);
        assert_eq!(error.reason.as_deref(), Some("NON_FINITE"));
        assert_eq!(error.message, "layer 3 overflowed");
        assert_eq!(error.exit, exit::FAILURE);
    }

    #[test]
    fn a_bad_configuration_is_a_usage_error() {
        let error = CliError::from(Error::new(Reason::InvalidConfig, "listen: not an address"));
        assert_eq!(error.exit, exit::USAGE);
    }
}
