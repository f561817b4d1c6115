//! `/v1/status`, `/healthz`, `/readyz`.

use axum::{Json, extract::State, http::StatusCode};

use super::error::ApiError;
use crate::{
    control::Control,
    view::{ErrorView, StatusView},
};

/// The daemon and its data plane
#[utoipa::path(get, path = "/v1/status", tag = "status", responses(
    (status = 200, description = "Status", body = StatusView),
))]
pub(super) async fn status(State(control): State<Control>) -> Result<Json<StatusView>, ApiError> {
    Ok(Json(control.status().await?))
}

/// Whether the process lives
#[utoipa::path(get, path = "/healthz", tag = "status", responses((status = 200, description = "It lives")))]
pub(super) async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether every source was read and programmed
#[utoipa::path(get, path = "/readyz", tag = "status", responses(
    (status = 200, description = "Ready"),
    (status = 503, description = "Not yet", body = ErrorView),
))]
pub(super) async fn readyz(State(control): State<Control>) -> Result<&'static str, ApiError> {
    if control.is_ready() {
        return Ok("ok\n");
    }
    Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", "the services are not programmed yet"))
}
