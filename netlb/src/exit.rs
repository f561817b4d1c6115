//! Exit codes, each with its meaning.

use crate::{client::ClientError, config::ConfigError};

/// What a command's exit code says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum ExitCode {
    Ok = 0,
    /// The operation failed.
    Failed = 1,
    /// The command line is wrong. clap's own code.
    Usage = 2,
    /// The daemon cannot be reached.
    Unreachable = 3,
    NotFound = 4,
    /// It exists, or another source owns it.
    Conflict = 5,
    TimedOut = 6,
    /// The user may not do this.
    Permission = 7,
}

impl ExitCode {
    /// For `--help`.
    pub const HELP: &str = "\
Exit codes:
  0  done
  1  the operation failed
  2  the command line is wrong
  3  the daemon cannot be reached
  4  not found
  5  conflict: it exists already, or another source owns it
  6  timed out
  7  permission denied

Errors go to stderr as `error:` and `hint:` lines; with -o json as one object, {\"error\":{\"code\",\"message\",\"hint\"}}.";
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}

/// An error of the command line itself, with its exit code and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub exit: ExitCode,
    pub message: String,
    pub hint: Option<String>,
}

impl Failure {
    #[must_use]
    pub fn new(exit: ExitCode, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None }
    }

    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// How an error is told: its exit code, its code in JSON, and the hint.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) exit: ExitCode,
    pub(crate) code: String,
    pub(crate) hint: Option<String>,
}

impl Verdict {
    /// Looks through an error and its causes for what is known.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        for cause in error.chain() {
            if let Some(failure) = cause.downcast_ref::<Failure>() {
                return Self::new(failure.exit, failure.hint.clone());
            }
            if let Some(error) = cause.downcast_ref::<ClientError>() {
                return Self::of_client(error);
            }
            if let Some(error) = cause.downcast_ref::<crate::store::StoreError>() {
                return Self::new(ExitCode::Failed, error.hint());
            }
            if cause.downcast_ref::<ConfigError>().is_some() {
                return Self::new(ExitCode::Failed, Some("`netlb run --check --config FILE` checks a file".to_owned()));
            }
            if cause.downcast_ref::<std::io::Error>().is_some_and(is_permission) {
                return Self::new(ExitCode::Permission, None);
            }
        }
        Self::new(ExitCode::Failed, None)
    }

    fn new(exit: ExitCode, hint: Option<String>) -> Self {
        let code = match exit {
            ExitCode::Ok => "ok",
            ExitCode::Failed => "failed",
            ExitCode::Usage => "usage",
            ExitCode::Unreachable => "unreachable",
            ExitCode::NotFound => "not_found",
            ExitCode::Conflict => "conflict",
            ExitCode::TimedOut => "timed_out",
            ExitCode::Permission => "permission",
        };
        Self { exit, code: code.to_owned(), hint }
    }

    fn of_client(error: &ClientError) -> Self {
        match error {
            ClientError::Unreachable { error, .. } if is_permission(error) => {
                Self::new(ExitCode::Permission, Some("the socket is for root and its group; try sudo".to_owned()))
            }
            ClientError::Unreachable { .. } => Self::new(
                ExitCode::Unreachable,
                Some("is the daemon running? `systemctl status netlb`, or set --socket".to_owned()),
            ),
            ClientError::Refused { status, body } => {
                let exit = match status {
                    404 => ExitCode::NotFound,
                    409 => ExitCode::Conflict,
                    _ => ExitCode::Failed,
                };
                Self { exit, code: body.code.clone(), hint: body.hint.clone() }
            }
            ClientError::TimedOut { .. } => Self::new(ExitCode::TimedOut, None),
            ClientError::Connection(_) => Self::new(
                ExitCode::Unreachable,
                Some("did the daemon stop? whether the request was carried out is not known".to_owned()),
            ),
            ClientError::Unreadable(_) | ClientError::Request(_) => Self::new(ExitCode::Failed, None),
        }
    }
}

fn is_permission(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::PermissionDenied
}
