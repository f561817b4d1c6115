//! Services as files and API clients write them, and the way from there to the checked [`model`](crate::model).
//!
//! One grammar serves `netlb.toml`, `netlb apply` and the HTTP API, so that an entry can be copied from one to the other.

use std::{fmt, net::SocketAddr, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;

use crate::{
    model::{
        Algorithm, Backend, BackendState, Definition, Frontend, FrontendError, Service, ServiceError, SnatMode, Weight,
        WeightError, parse_endpoint,
    },
    text::deserialize_text,
};

/// A service as it is written down.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Name; without one the service is named after its first frontend
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "web")]
    pub name: Option<String>,
    /// Addresses the service is reached at, as ADDRESS:PORT/PROTOCOL
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>, example = json!(["10.96.0.10:80/tcp"]))]
    pub frontends: Vec<Frontend>,
    /// Short for `frontends` with one entry
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub frontend: Option<Frontend>,
    /// Servers behind the service: `"ADDRESS:PORT"`, `"ADDRESS:PORT=WEIGHT"` or an object
    #[serde(default)]
    pub backends: Vec<BackendSpec>,
    /// How a backend is chosen for a new flow: `maglev`, `random` or `round-robin`
    #[serde(default)]
    #[schema(value_type = String, example = "maglev")]
    pub algorithm: Algorithm,
    /// Which new flows get an address of the node as their source: `auto`, those whose replies would not come back through it; `always`
    /// or `never`
    #[serde(default)]
    #[schema(value_type = String, example = "auto")]
    pub snat: SnatMode,
}

impl ServiceSpec {
    /// The service it describes, checked.
    pub fn into_service(self) -> Result<Service, ServiceError> {
        let Self { name, mut frontends, frontend, backends, algorithm, snat } = self;
        if let Some(frontend) = frontend {
            frontends.insert(0, frontend);
        }
        let backends = backends.into_iter().map(Backend::from).collect();
        Service::define(Definition { name, frontends, backends, algorithm, snat, ..Definition::default() })
    }
}

impl From<&Service> for ServiceSpec {
    fn from(service: &Service) -> Self {
        Self {
            name: Some(service.name().to_owned()),
            frontends: service.frontends().to_vec(),
            frontend: None,
            backends: service.backends().iter().cloned().map(BackendSpec::from).collect(),
            algorithm: service.algorithm(),
            snat: service.snat(),
        }
    }
}

/// A backend as it is written down: `"10.244.1.2:8080"`, `"10.244.1.2:8080=2"` or a table with `address`, `weight` and `state`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize, ToSchema)]
pub struct BackendSpec {
    /// ADDRESS:PORT
    #[schema(value_type = String, example = "10.244.1.2:8080")]
    pub address: SocketAddr,
    /// Share of new flows, relative to the service's other backends: 1 to 1000
    #[schema(value_type = u16, default = 1, minimum = 1, maximum = 1000)]
    pub weight: Weight,
    /// `active` or `draining`
    #[schema(value_type = String, default = "active")]
    pub state: BackendState,
}

impl From<BackendSpec> for Backend {
    fn from(BackendSpec { address, weight, state }: BackendSpec) -> Self {
        Self { weight, state, ..Self::new(address) }
    }
}

impl From<Backend> for BackendSpec {
    fn from(Backend { address, weight, state, .. }: Backend) -> Self {
        Self { address, weight, state }
    }
}

/// Why a text is not a backend.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BackendError {
    #[error(transparent)]
    Address(#[from] FrontendError),
    #[error("`{0}` has no whole number after `=`; write ADDRESS:PORT=WEIGHT")]
    WeightNumber(String),
    #[error(transparent)]
    Weight(#[from] WeightError),
}

impl FromStr for BackendSpec {
    type Err = BackendError;

    fn from_str(text: &str) -> Result<Self, BackendError> {
        let (address, weight) = match text.split_once('=') {
            Some((address, weight)) => {
                let weight = weight.parse().map_err(|_| BackendError::WeightNumber(text.to_owned()))?;
                (address, Weight::new(weight)?)
            }
            None => (text, Weight::ONE),
        };
        Ok(Self { address: parse_endpoint(address)?, weight, state: BackendState::Active })
    }
}

/// Reads `ADDRESS:PORT` where serde would also take port 0.
pub fn deserialize_endpoint<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    deserialize_text(deserializer, "ADDRESS:PORT", parse_endpoint)
}

impl<'de> Deserialize<'de> for BackendSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // By hand and not `#[serde(untagged)]`, which forgets where the error is and what was expected.
        struct TextOrTable;

        impl<'de> de::Visitor<'de> for TextOrTable {
            type Value = BackendSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a backend: \"ADDRESS:PORT\", \"ADDRESS:PORT=WEIGHT\" or { address, weight, state }")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<BackendSpec, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<BackendSpec, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Table {
                    #[serde(deserialize_with = "deserialize_endpoint")]
                    address: SocketAddr,
                    #[serde(default)]
                    weight: Weight,
                    #[serde(default)]
                    state: BackendState,
                }
                let Table { address, weight, state } = Table::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(BackendSpec { address, weight, state })
            }
        }

        deserializer.deserialize_any(TextOrTable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(text: &str) -> Result<BackendSpec, String> {
        text.parse().map_err(|error: BackendError| error.to_string())
    }

    #[test]
    fn a_backend_is_an_address_with_or_without_a_weight() {
        assert_eq!(backend("10.0.0.1:80").unwrap().weight.get(), 1);
        assert_eq!(backend("[fd00::1]:80=7").unwrap().weight.get(), 7);
    }

    #[test]
    fn weights_outside_1_to_1000_are_refused_with_the_range() {
        assert_eq!(
            backend("10.0.0.1:80=0").unwrap_err(),
            "weight 0 is not 1 to 1000; to stop new flows to a backend, drain it"
        );
        assert!(backend("10.0.0.1:80=1001").unwrap_err().starts_with("weight 1001 is not 1 to 1000"));
        assert!(backend("10.0.0.1:80=-1").unwrap_err().contains("no whole number after `=`"));
    }

    #[test]
    fn port_0_is_refused_in_text_and_table() {
        assert!(backend("10.0.0.1:0").unwrap_err().contains("port 0"));
        let table = serde_json::from_str::<BackendSpec>(r#"{"address":"10.0.0.1:0"}"#).unwrap_err();
        assert!(table.to_string().contains("port 0"), "{table}");
    }

    #[test]
    fn a_backend_table_refuses_unknown_keys() {
        let error = serde_json::from_str::<BackendSpec>(r#"{"address":"10.0.0.1:80","wieght":2}"#).unwrap_err();
        assert!(
            error.to_string().starts_with("unknown field `wieght`, expected one of `address`, `weight`, `state`"),
            "{error}"
        );
    }

    #[test]
    fn a_service_survives_being_written_and_read() {
        let spec: ServiceSpec = serde_json::from_str(
            r#"{"frontend":"10.96.0.10:80/tcp","backends":["10.0.0.1:80=3",{"address":"10.0.0.2:80","state":"draining"}]}"#,
        )
        .unwrap();
        let service = spec.into_service().unwrap();
        let json = serde_json::to_string(&ServiceSpec::from(&service)).unwrap();
        assert_eq!(serde_json::from_str::<ServiceSpec>(&json).unwrap().into_service().unwrap(), service);
    }
}
