//! `/v1/flows`.

#![expect(unused_qualifications, reason = "written by the utoipa::path macro")]

use axum::{Json, extract::State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{error::ApiError, extract::Parameters};
use crate::{
    control::Control,
    view::{ErrorView, FlowCount, FlowView, List},
};

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Which {
    /// Name or any frontend of a service; all without it
    service: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct WhichAndHowMany {
    /// Name or any frontend of a service; all without it
    service: Option<String>,
    /// The most flows to list
    #[serde(default = "default_limit")]
    #[param(default = 1000)]
    limit: usize,
}

fn default_limit() -> usize {
    1000
}

/// List flows
#[utoipa::path(get, path = "/v1/flows", tag = "flows", params(WhichAndHowMany), responses(
    (status = 200, description = "Flows, in no order", body = List<FlowView>),
    (status = 404, description = "No such service", body = ErrorView),
))]
pub(super) async fn list(
    State(control): State<Control>,
    Parameters(WhichAndHowMany { service, limit }): Parameters<WhichAndHowMany>,
) -> Result<Json<List<FlowView>>, ApiError> {
    Ok(Json(List::new(control.flows(service, limit).await?)))
}

/// Count flows
#[utoipa::path(get, path = "/v1/flows/count", tag = "flows", params(Which), responses(
    (status = 200, description = "How many flows live", body = FlowCount),
    (status = 404, description = "No such service", body = ErrorView),
))]
pub(super) async fn count(
    State(control): State<Control>,
    Parameters(Which { service }): Parameters<Which>,
) -> Result<Json<FlowCount>, ApiError> {
    Ok(Json(FlowCount { count: control.count_flows(service).await? }))
}

/// Forget flows: the next packet of each is balanced anew
#[utoipa::path(delete, path = "/v1/flows", tag = "flows", params(Which), responses(
    (status = 200, description = "How many flows were removed", body = FlowCount),
    (status = 404, description = "No such service", body = ErrorView),
))]
pub(super) async fn flush(
    State(control): State<Control>,
    Parameters(Which { service }): Parameters<Which>,
) -> Result<Json<FlowCount>, ApiError> {
    Ok(Json(FlowCount { count: control.flush_flows(service).await? }))
}
