//! The HTTP/JSON interface, version `v1`.
//!
//! Handlers only translate: from paths and bodies to a [`Change`](crate::desired::Change) or a question for the control loop, and from
//! its answer to a view or an error. A route is added together with its description, so that the OpenAPI document is complete.

use std::{future::Future, io, sync::LazyLock};

use axum::{
    Router,
    extract::{DefaultBodyLimit, State},
    http::{Method, StatusCode, Uri, header},
    response::IntoResponse,
};
use tokio::net::UnixListener;
use tower_http::trace::TraceLayer;
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};

pub use self::apply::ApplyRequest;
use self::error::ApiError;
use crate::{control::Control, view::ErrorView};

mod apply;
mod backends;
mod error;
mod extract;
mod flows;
mod services;
mod status;
#[cfg(test)]
mod tests;

/// The largest request body: some 100 000 backends in the long form.
pub const BODY_LIMIT: usize = 16 * 1024 * 1024;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "netlb",
        description = "Services, backends and flows of a netlb node",
        license(name = "Apache-2.0 OR MIT")
    ),
    components(schemas(ErrorView))
)]
struct Document;

/// Answers requests until `shutdown` is over; requests under way are finished.
pub async fn serve(
    listener: UnixListener,
    control: Control,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, router(control)).with_graceful_shutdown(shutdown).await
}

/// All routes.
pub fn router(control: Control) -> Router {
    let (router, _) = described().split_for_parts();
    router
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(TraceLayer::new_for_http())
        .with_state(control)
}

/// The OpenAPI document of all routes.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    described().split_for_parts().1
}

fn described() -> OpenApiRouter<Control> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(services::list, services::create))
        .routes(routes!(services::show, services::put, services::patch, services::remove))
        .routes(routes!(backends::list, backends::add))
        .routes(routes!(backends::show, backends::put, backends::patch, backends::remove))
        .routes(routes!(flows::list, flows::flush))
        .routes(routes!(flows::count))
        .routes(routes!(apply::apply))
        .routes(routes!(status::status))
        .routes(routes!(status::healthz))
        .routes(routes!(status::readyz))
        .routes(routes!(openapi))
}

/// This document
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "OpenAPI 3.1 document")))]
async fn openapi(State(_): State<Control>) -> impl IntoResponse {
    static TEXT: LazyLock<String> = LazyLock::new(|| document().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str())
}

async fn unknown_path(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is nothing at {}", uri.path()))
        .with_hint("GET /openapi.json describes every path")
}

async fn unknown_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{method} is not possible on {}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
