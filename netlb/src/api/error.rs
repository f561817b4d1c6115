//! Errors as the API answers them.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};

use crate::{
    control::ControlError,
    dataplane::ApplyError,
    desired::ChangeError,
    spec::SpecError,
    view::{ErrorBody, ErrorView},
};

/// A status with the body that explains it.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    hint: Option<String>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), hint: None }
    }

    pub(super) fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// What was sent cannot be read.
    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", message)
    }

    /// What was sent can be read and makes no sense.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", message)
    }
}

impl From<SpecError> for ApiError {
    fn from(error: SpecError) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<ChangeError> for ApiError {
    fn from(error: ChangeError) -> Self {
        let (status, code) = match error {
            ChangeError::NotFound { .. } | ChangeError::BackendNotFound { .. } => (StatusCode::NOT_FOUND, "not_found"),
            ChangeError::NameTaken { .. } | ChangeError::FrontendTaken { .. } | ChangeError::BackendTaken { .. } => {
                (StatusCode::CONFLICT, "conflict")
            }
            ChangeError::Owned { .. } => (StatusCode::CONFLICT, "owned"),
            ChangeError::NameFollows { .. } | ChangeError::Mismatch { .. } | ChangeError::Invalid(_) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "invalid")
            }
        };
        Self { status, code, message: error.to_string(), hint: error.hint() }
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        let code = match &error {
            ControlError::Change(change) => return change.clone().into(),
            ControlError::Apply { source: held @ ApplyError::Held { .. }, .. } => {
                return Self::new(StatusCode::CONFLICT, "conflict", format!("{error}: {held}"));
            }
            ControlError::Apply { source: ApplyError::MapFull { .. }, .. } => "map_full",
            ControlError::Apply { source: ApplyError::Kernel(_), .. } => "not_programmed",
            ControlError::Store(_) => "not_stored",
            ControlError::Stopping => "stopping",
        };
        let mut message = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self { status, code, message, hint } = self;
        (status, Json(ErrorView { error: ErrorBody { code: code.to_owned(), message, hint } })).into_response()
    }
}
