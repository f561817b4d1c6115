//! `/v1/services/{service}/backends`.

use std::net::SocketAddr;

use axum::{Json, extract::State, http::StatusCode};

use super::{
    error::ApiError,
    extract::{BackendRef, Body, ServiceRef},
};
use crate::{
    control::Control,
    desired::{BackendPatch, Change, ChangeError},
    model::Backend,
    spec::{BackendAddress, BackendEntry, BackendSpec, SpecError},
    view::{BackendView, ErrorView, List, ServiceView},
};

/// List a service's backends
#[utoipa::path(get, path = "/v1/services/{service}/backends", tag = "backends",
    params(("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded")),
    responses(
        (status = 200, description = "Backends, those included that were removed and still have flows", body = List<BackendView>),
        (status = 404, description = "No such service", body = ErrorView),
    ))]
pub(super) async fn list(
    State(control): State<Control>,
    ServiceRef(reference): ServiceRef,
) -> Result<Json<List<BackendView>>, ApiError> {
    Ok(Json(List::new(control.service(&reference).await?.backends)))
}

/// Add a backend
#[utoipa::path(post, path = "/v1/services/{service}/backends", tag = "backends", request_body = BackendEntry,
    params(("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded")),
    responses(
        (status = 201, description = "Programmed and on disk", body = BackendView),
        (status = 400, description = "Not JSON", body = ErrorView),
        (status = 404, description = "No such service", body = ErrorView),
        (status = 409, description = "The service has this backend, or another source owns the service", body = ErrorView),
        (status = 422, description = "Not a backend of this service", body = ErrorView),
        (status = 503, description = "Could not be programmed or stored", body = ErrorView),
    ))]
pub(super) async fn add(
    State(control): State<Control>,
    ServiceRef(reference): ServiceRef,
    Body(spec): Body<BackendSpec>,
) -> Result<(StatusCode, Json<BackendView>), ApiError> {
    // Only a spec without a port has to know the service.
    let port = match spec.address {
        BackendAddress::Endpoint(_) => None,
        BackendAddress::Address(_) => control.service(&reference).await?.publish.first().map(|publish| publish.target),
    };
    let backend = spec
        .into_backend(port)
        .map_err(|backend| SpecError::BackendWithoutPort { service: reference.clone(), backend })?;
    let address = backend.address;
    control.change(Change::AddBackend { reference: reference.clone(), backend }).await?;
    let view = find(control.changed_service(&reference).await?, address)?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// Show a backend
#[utoipa::path(get, path = "/v1/services/{service}/backends/{backend}", tag = "backends",
    params(
        ("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded"),
        ("backend" = String, Path, description = "ADDRESS:PORT, URL-encoded"),
    ),
    responses(
        (status = 200, description = "The backend", body = BackendView),
        (status = 404, description = "No such service or backend", body = ErrorView),
    ))]
pub(super) async fn show(
    State(control): State<Control>,
    BackendRef { reference, address }: BackendRef,
) -> Result<Json<BackendView>, ApiError> {
    Ok(Json(find(control.service(&reference).await?, address)?))
}

/// Add a backend or replace all that is said of it
#[utoipa::path(put, path = "/v1/services/{service}/backends/{backend}", tag = "backends", request_body = BackendPatch,
    params(
        ("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded"),
        ("backend" = String, Path, description = "ADDRESS:PORT, URL-encoded"),
    ),
    responses(
        (status = 200, description = "The backend; what was not given has its default", body = BackendView),
        (status = 400, description = "Not JSON", body = ErrorView),
        (status = 404, description = "No such service", body = ErrorView),
        (status = 409, description = "Another source owns the service", body = ErrorView),
        (status = 422, description = "Not a backend of this service", body = ErrorView),
        (status = 503, description = "Could not be programmed or stored", body = ErrorView),
    ))]
pub(super) async fn put(
    State(control): State<Control>,
    BackendRef { reference, address }: BackendRef,
    Body(said): Body<BackendPatch>,
) -> Result<Json<BackendView>, ApiError> {
    let mut backend = Backend::new(address);
    said.apply(&mut backend);
    control.change(Change::PutBackend { reference: reference.clone(), backend }).await?;
    Ok(Json(find(control.changed_service(&reference).await?, address)?))
}

/// Change parts of a backend
#[utoipa::path(patch, path = "/v1/services/{service}/backends/{backend}", tag = "backends", request_body = BackendPatch,
    params(
        ("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded"),
        ("backend" = String, Path, description = "ADDRESS:PORT, URL-encoded"),
    ),
    responses(
        (status = 200, description = "Changed", body = BackendView),
        (status = 400, description = "Not JSON", body = ErrorView),
        (status = 404, description = "No such service or backend", body = ErrorView),
        (status = 409, description = "Another source owns the service", body = ErrorView),
        (status = 422, description = "Not a part of a backend", body = ErrorView),
        (status = 503, description = "Could not be programmed or stored", body = ErrorView),
    ))]
pub(super) async fn patch(
    State(control): State<Control>,
    BackendRef { reference, address }: BackendRef,
    Body(patch): Body<BackendPatch>,
) -> Result<Json<BackendView>, ApiError> {
    control.change(Change::PatchBackend { reference: reference.clone(), address, patch }).await?;
    Ok(Json(find(control.changed_service(&reference).await?, address)?))
}

/// Remove a backend
#[utoipa::path(delete, path = "/v1/services/{service}/backends/{backend}", tag = "backends",
    params(
        ("service" = String, Path, description = "Name, any frontend, or a port of the node (0.0.0.0:30080/tcp), URL-encoded"),
        ("backend" = String, Path, description = "ADDRESS:PORT, URL-encoded"),
    ),
    responses(
        (status = 204, description = "Removed; its flows go on until they end"),
        (status = 404, description = "No such service or backend", body = ErrorView),
        (status = 409, description = "Another source owns the service", body = ErrorView),
        (status = 503, description = "Could not be programmed or stored", body = ErrorView),
    ))]
pub(super) async fn remove(
    State(control): State<Control>,
    BackendRef { reference, address }: BackendRef,
) -> Result<StatusCode, ApiError> {
    control.change(Change::RemoveBackend { reference, address }).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn find(service: ServiceView, address: SocketAddr) -> Result<BackendView, ApiError> {
    let found = service.backends.into_iter().find(|backend| backend.address == address);
    Ok(found.ok_or(ChangeError::BackendNotFound { service: service.name, address, nearest: None })?)
}
