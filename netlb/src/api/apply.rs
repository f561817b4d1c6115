//! `/v1/apply`: many services in one transaction.

#![expect(unused_qualifications, reason = "written by the utoipa::path macro")]

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    error::ApiError,
    extract::{Body, Parameters},
};
use crate::{
    control::Control,
    desired::Change,
    model::Service,
    spec::ServiceSpec,
    view::{ApplyResult, ErrorView},
};

/// Services to create or replace.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ApplyRequest {
    pub services: Vec<ServiceSpec>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[into_params(parameter_in = Query)]
#[derive(Default)]
pub(super) struct How {
    /// Only say what would change
    dry_run: bool,
    /// Remove the API's services that are not in the list; those of the configuration file stay
    prune: bool,
}

/// Create or replace many services, all or none
#[utoipa::path(post, path = "/v1/apply", tag = "services", params(How), request_body = ApplyRequest, responses(
    (status = 200, description = "What was done", body = ApplyResult),
    (status = 400, description = "Not JSON", body = ErrorView),
    (status = 409, description = "A name or frontend is taken; nothing was changed", body = ErrorView),
    (status = 413, description = "Body too large", body = ErrorView),
    (status = 422, description = "Not a service; nothing was changed", body = ErrorView),
    (status = 503, description = "Could not be programmed or stored; nothing was changed", body = ErrorView),
))]
pub(super) async fn apply(
    State(control): State<Control>,
    Parameters(How { dry_run, prune }): Parameters<How>,
    Body(ApplyRequest { services }): Body<ApplyRequest>,
) -> Result<Json<ApplyResult>, ApiError> {
    let check = |(at, spec): (usize, ServiceSpec)| {
        spec.into_service().map_err(|error| ApiError::invalid(format!("services[{at}]: {error}")))
    };
    let services: Vec<Service> = services.into_iter().enumerate().map(check).collect::<Result<_, _>>()?;
    let change = Change::Apply { services, prune };
    let done = if dry_run { control.dry_run(change).await? } else { control.change(change).await? };
    Ok(Json(ApplyResult::new(done, dry_run)))
}
