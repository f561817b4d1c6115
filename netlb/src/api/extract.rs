//! Paths, queries and bodies of requests, with errors in the API's own shape.

use std::net::SocketAddr;

use axum::{
    RequestPartsExt as _,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{StatusCode, header, request::Parts},
};
use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::{BODY_LIMIT, error::ApiError};
use crate::model::parse_endpoint;

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let content_type =
            request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        if !content_type.split(';').next().is_some_and(|media| media.trim().eq_ignore_ascii_case("application/json")) {
            let message = format!("content type is `{content_type}`, expected `application/json`");
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                let message = format!("the request body is larger than {} MiB", BODY_LIMIT / 1024 / 1024);
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message).with_hint("send it in parts")
            } else {
                ApiError::malformed(rejection.body_text())
            }
        })?;
        serde_json::from_slice(&bytes).map(Self).map_err(|error| match error.classify() {
            // Good JSON, but not what is wanted: an unknown key, a weight of 0, …
            serde_json::error::Category::Data => ApiError::invalid(error.to_string()),
            _ => ApiError::malformed(format!("the request body is not JSON: {error}")),
        })
    }
}

/// The parameters behind `?`.
pub(super) struct Parameters<T>(pub(super) T);

impl<T: DeserializeOwned + 'static, S: Send + Sync> FromRequestParts<S> for Parameters<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Query(parameters) =
            parts.extract::<Query<T>>().await.map_err(|rejection| ApiError::malformed(rejection.body_text()))?;
        Ok(Self(parameters))
    }
}

/// The service in the path: its name or a frontend.
pub(super) struct ServiceRef(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for ServiceRef {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Path(reference) =
            parts.extract::<Path<String>>().await.map_err(|rejection| ApiError::malformed(rejection.body_text()))?;
        Ok(Self(reference))
    }
}

/// The service and the backend in the path.
pub(super) struct BackendRef {
    pub(super) reference: String,
    pub(super) address: SocketAddr,
}

impl<S: Send + Sync> FromRequestParts<S> for BackendRef {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Path((reference, address)) = parts
            .extract::<Path<(String, String)>>()
            .await
            .map_err(|rejection| ApiError::malformed(rejection.body_text()))?;
        let address = parse_endpoint(&address).map_err(|error| ApiError::malformed(error.to_string()))?;
        Ok(Self { reference, address })
    }
}
