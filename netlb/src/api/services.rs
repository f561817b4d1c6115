//! `/v1/services`.

use axum::{Json, extract::State, http::StatusCode};

use super::{
    error::ApiError,
    extract::{Body, ServiceRef},
};
use crate::{
    control::Control,
    desired::{Change, ServicePatch},
    spec::ServiceSpec,
    view::{ErrorView, List, ServiceView},
};

/// List services
#[utoipa::path(get, path = "/v1/services", tag = "services", responses(
    (status = 200, description = "All services, by name", body = List<ServiceView>),
))]
pub(super) async fn list(State(control): State<Control>) -> Result<Json<List<ServiceView>>, ApiError> {
    Ok(Json(List::new(control.services().await?)))
}

/// Create a service
#[utoipa::path(post, path = "/v1/services", tag = "services", request_body = ServiceSpec, responses(
    (status = 201, description = "Programmed and on disk", body = ServiceView),
    (status = 400, description = "Not JSON", body = ErrorView),
    (status = 409, description = "The name or a frontend is taken", body = ErrorView),
    (status = 413, description = "Body too large", body = ErrorView),
    (status = 422, description = "Not a service", body = ErrorView),
    (status = 503, description = "Could not be programmed or stored", body = ErrorView),
))]
pub(super) async fn create(
    State(control): State<Control>,
    Body(spec): Body<ServiceSpec>,
) -> Result<(StatusCode, Json<ServiceView>), ApiError> {
    let service = spec.into_service()?;
    let name = service.name().to_owned();
    control.change(Change::Create(service)).await?;
    Ok((StatusCode::CREATED, Json(control.changed_service(&name).await?)))
}

/// Show a service
#[utoipa::path(get, path = "/v1/services/{service}", tag = "services",
    params(("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded")),
    responses(
        (status = 200, description = "The service", body = ServiceView),
        (status = 404, description = "No such service", body = ErrorView),
    ))]
pub(super) async fn show(
    State(control): State<Control>,
    ServiceRef(reference): ServiceRef,
) -> Result<Json<ServiceView>, ApiError> {
    Ok(Json(control.service(&reference).await?))
}

/// Create a service or replace all of it
#[utoipa::path(put, path = "/v1/services/{service}", tag = "services", request_body = ServiceSpec,
    params(("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded")),
    responses(
        (status = 200, description = "Replaced", body = ServiceView),
        (status = 201, description = "Created", body = ServiceView),
        (status = 400, description = "Not JSON", body = ErrorView),
        (status = 409, description = "The name or a frontend is taken, or another source owns the service", body = ErrorView),
        (status = 413, description = "Body too large", body = ErrorView),
        (status = 422, description = "Not a service", body = ErrorView),
        (status = 503, description = "Could not be programmed or stored", body = ErrorView),
    ))]
pub(super) async fn put(
    State(control): State<Control>,
    ServiceRef(reference): ServiceRef,
    Body(spec): Body<ServiceSpec>,
) -> Result<(StatusCode, Json<ServiceView>), ApiError> {
    let done = control.change(Change::Put { reference: reference.clone(), spec }).await?;
    // A rename is one service removed and one created.
    let is_new = !done.created.is_empty() && done.removed.is_empty();
    let name = done.created.into_iter().chain(done.updated).chain(done.unchanged).next().unwrap_or(reference);
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(control.changed_service(&name).await?)))
}

/// Change parts of a service
#[utoipa::path(patch, path = "/v1/services/{service}", tag = "services", request_body = ServicePatch,
    params(("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded")),
    responses(
        (status = 200, description = "Changed", body = ServiceView),
        (status = 400, description = "Not JSON", body = ErrorView),
        (status = 404, description = "No such service", body = ErrorView),
        (status = 409, description = "The name or a frontend is taken, or another source owns the service", body = ErrorView),
        (status = 413, description = "Body too large", body = ErrorView),
        (status = 422, description = "Not a service", body = ErrorView),
        (status = 503, description = "Could not be programmed or stored", body = ErrorView),
    ))]
pub(super) async fn patch(
    State(control): State<Control>,
    ServiceRef(reference): ServiceRef,
    Body(patch): Body<ServicePatch>,
) -> Result<Json<ServiceView>, ApiError> {
    let done = control.change(Change::Patch { reference: reference.clone(), patch }).await?;
    let name = done.created.into_iter().chain(done.updated).chain(done.unchanged).next().unwrap_or(reference);
    Ok(Json(control.changed_service(&name).await?))
}

/// Remove a service
#[utoipa::path(delete, path = "/v1/services/{service}", tag = "services",
    params(("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded")),
    responses(
        (status = 204, description = "Removed"),
        (status = 404, description = "No such service", body = ErrorView),
        (status = 409, description = "Another source owns the service", body = ErrorView),
        (status = 503, description = "Could not be stored", body = ErrorView),
    ))]
pub(super) async fn remove(
    State(control): State<Control>,
    ServiceRef(reference): ServiceRef,
) -> Result<StatusCode, ApiError> {
    control.change(Change::Remove { reference }).await?;
    Ok(StatusCode::NO_CONTENT)
}
