//! Services as files and API clients write them, and the way from there to the checked [`model`](crate::model).
//!
//! One grammar serves `netlb.toml`, `netlb apply` and the HTTP API, so that an entry can be copied from one to the other. What is not said
//! has its default, and what has its default is not written where a reader of the first version would not know the key.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    str::FromStr,
    sync::Arc,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use utoipa::ToSchema;

use crate::{
    model::{
        Affinity, Algorithm, Backend, BackendState, Conditions, Definition, Family, Frontend, FrontendError, Mode,
        NodePort, Placement, Protocol, Publish, Service, ServiceError, SnatMode, TrafficPolicy, Weight, WeightError,
        parse_address, parse_endpoint, parse_port,
    },
    text::serde_by_text,
};

serde_by_text! {
    AddressSpec: "ADDRESS or ADDRESS:PORT/PROTOCOL",
    SourceRange: "NETWORK/LENGTH or ADDRESS",
    BackendAddress: "ADDRESS:PORT",
}

/// A service as it is written down.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Name; without one the service is named after the first way it is reached by
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
    /// Addresses for clients outside the cluster, as ADDRESS:PORT/PROTOCOL, or as ADDRESS for every port of `frontends`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>, example = json!(["192.0.2.10"]))]
    pub external_ips: Vec<AddressSpec>,
    /// Addresses that a load balancer gave to the service, written like `external_ips`; also `lb_ips`
    #[serde(default, skip_serializing_if = "Vec::is_empty", alias = "lb_ips")]
    #[schema(value_type = Vec<String>, example = json!(["203.0.113.10:80/tcp"]))]
    pub load_balancer_ips: Vec<AddressSpec>,
    /// Ports on the node's addresses, as PORT/PROTOCOL, or as PORT for every protocol of `frontends` (tcp, if there are none)
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(example = json!(["30080/tcp", 30081]))]
    pub node_ports: Vec<NodePortSpec>,
    /// Short for `node_ports` with one entry
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_port: Option<NodePortSpec>,
    /// Ports of the node that lead to a port of the backends, as [ADDRESS:]PORT:TARGET[/PROTOCOL]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>, example = json!(["8080:80", "192.0.2.1:53:53/udp"]))]
    pub publish: Vec<Publish>,
    /// The clients of `load_balancer_ips`, as NETWORK/LENGTH or ADDRESS; without any, all are
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>, example = json!(["198.51.100.0/24"]))]
    pub source_ranges: Vec<SourceRange>,
    /// `ipv4` or `ipv6`: for a service that has only ports. Without it, the family of the backends; `ipv4`, if there are none
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "ipv6")]
    pub family: Option<Family>,
    /// Servers behind the service: `"ADDRESS:PORT"`, `"ADDRESS:PORT=WEIGHT"` or an object; with `publish`, the port may be left out
    #[serde(default)]
    #[schema(value_type = Vec<BackendEntry>)]
    pub backends: Vec<BackendSpec>,
    /// How a backend is chosen for a new flow: `maglev`, `random`, `round-robin`, `source-hash` or `least-conn`
    #[serde(default)]
    #[schema(value_type = String, example = "maglev")]
    pub algorithm: Algorithm,
    /// Which new flows get an address of the node as their source: `auto`, those whose replies would not come back through it; `always`
    /// or `never`
    #[serde(default)]
    #[schema(value_type = String, example = "auto")]
    pub snat: SnatMode,
    /// How packets from outside get to backends that are not behind this node: `nat`, translated; `dsr`, wrapped in a packet to the backend,
    /// whose node unwraps it (see `[dsr]`) and answers clients itself
    #[serde(default, skip_serializing_if = "is_default")]
    #[schema(value_type = String, default = "nat", example = "dsr")]
    pub mode: Mode,
    /// How long a client keeps its backend: `none`, `client-ip` (three hours) or `client-ip:SECONDS`
    #[serde(default, skip_serializing_if = "is_default")]
    #[schema(value_type = String, default = "none", example = "client-ip:600")]
    pub affinity: Affinity,
    /// Which backends clients of all ways but `frontends` get: `cluster`, all; `local`, those on the node that their packets come to
    #[serde(default, skip_serializing_if = "is_default")]
    #[schema(value_type = String, default = "cluster")]
    pub external_traffic_policy: TrafficPolicy,
    /// Which backends clients of `frontends` get: `cluster` or `local`
    #[serde(default, skip_serializing_if = "is_default")]
    #[schema(value_type = String, default = "cluster")]
    pub internal_traffic_policy: TrafficPolicy,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Why what is written is not a service.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SpecError {
    #[error(transparent)]
    Service(#[from] ServiceError),
    #[error(
        "service `{service}` has no frontend whose port address {address} could have; write {0}:PORT/PROTOCOL",
        bracketed(address)
    )]
    AddressWithoutPort { service: String, address: IpAddr },
    #[error(
        "service `{service}` publishes no port that backend {backend} could have; write {0}:PORT",
        bracketed(backend)
    )]
    BackendWithoutPort { service: String, backend: IpAddr },
}

/// An address as it is written before a port.
fn bracketed(address: &IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

impl ServiceSpec {
    /// The service it describes, checked.
    pub fn into_service(self) -> Result<Service, SpecError> {
        let Self {
            name,
            mut frontends,
            frontend,
            external_ips,
            load_balancer_ips,
            mut node_ports,
            node_port,
            publish,
            source_ranges,
            family,
            backends,
            algorithm,
            snat,
            mode,
            affinity,
            external_traffic_policy,
            internal_traffic_policy,
        } = self;
        if let Some(frontend) = frontend {
            frontends.insert(0, frontend);
        }
        if let Some(port) = node_port {
            node_ports.insert(0, port);
        }
        let mut definition = Definition {
            name,
            frontends,
            publish,
            family,
            algorithm,
            snat,
            mode,
            affinity,
            external_traffic_policy,
            internal_traffic_policy,
            source_ranges: source_ranges.into_iter().map(|SourceRange(range)| range).collect(),
            ..Definition::default()
        };
        definition.external_ips = addresses(external_ips, &definition)?;
        definition.load_balancer_ips = addresses(load_balancer_ips, &definition)?;
        definition.node_ports = ports(&node_ports, &definition);
        definition.backends = servers(backends, &definition)?;
        Ok(Service::define(definition)?)
    }
}

/// The addresses, those without a port with every port of the frontends that the service has by now.
pub(crate) fn addresses(specs: Vec<AddressSpec>, definition: &Definition) -> Result<Vec<Frontend>, SpecError> {
    let mut all = Vec::with_capacity(specs.len());
    for spec in specs {
        let address = match spec {
            AddressSpec::Frontend(frontend) => {
                all.push(frontend);
                continue;
            }
            AddressSpec::Address(address) => address,
        };
        if definition.frontends.is_empty() {
            return Err(SpecError::AddressWithoutPort { service: label(definition), address });
        }
        // Frontends may be at several addresses.
        let mut ports: Vec<(u16, Protocol)> = Vec::new();
        for Frontend { address, protocol } in &definition.frontends {
            if !ports.contains(&(address.port(), *protocol)) {
                ports.push((address.port(), *protocol));
            }
        }
        let frontend = |(port, protocol)| Frontend { address: SocketAddr::new(address, port), protocol };
        all.extend(ports.into_iter().map(frontend));
    }
    Ok(all)
}

/// The node ports, those without a protocol with every protocol of the frontends that the service has by now.
pub(crate) fn ports(specs: &[NodePortSpec], definition: &Definition) -> Vec<NodePort> {
    let mut protocols: Vec<_> = definition.frontends.iter().map(|frontend| frontend.protocol).collect();
    protocols.sort_unstable();
    protocols.dedup();
    if protocols.is_empty() {
        protocols.push(Protocol::Tcp);
    }
    let ports = |NodePortSpec { port, protocol }: &NodePortSpec| -> Vec<NodePort> {
        let protocols = protocol.as_ref().map_or(&*protocols, std::slice::from_ref);
        protocols.iter().map(|protocol| NodePort { port: *port, protocol: *protocol }).collect()
    };
    specs.iter().flat_map(ports).collect()
}

/// The backends, those without a port with the target of what the service publishes by now.
pub(crate) fn servers(specs: Vec<BackendSpec>, definition: &Definition) -> Result<Vec<Backend>, SpecError> {
    let target = definition.publish.first().map(|publish| publish.target);
    let server = |spec: BackendSpec| {
        spec.into_backend(target)
            .map_err(|backend| SpecError::BackendWithoutPort { service: label(definition), backend })
    };
    specs.into_iter().map(server).collect()
}

/// What to call a service that is not complete yet.
fn label(definition: &Definition) -> String {
    let first = || definition.frontends.first().map(ToString::to_string);
    definition.name.clone().or_else(first).unwrap_or_default()
}

impl From<&Service> for ServiceSpec {
    fn from(service: &Service) -> Self {
        let Definition {
            name: _,
            frontends,
            external_ips,
            load_balancer_ips,
            node_ports,
            publish,
            source_ranges,
            family: _,
            backends,
            algorithm,
            snat,
            mode,
            affinity,
            external_traffic_policy,
            internal_traffic_policy,
        } = service.definition();
        let addresses = |frontends: &[Frontend]| frontends.iter().copied().map(AddressSpec::Frontend).collect();
        Self {
            name: Some(service.name().to_owned()),
            frontends: frontends.clone(),
            frontend: None,
            external_ips: addresses(external_ips),
            load_balancer_ips: addresses(load_balancer_ips),
            node_ports: node_ports.iter().copied().map(NodePortSpec::from).collect(),
            node_port: None,
            publish: publish.clone(),
            source_ranges: source_ranges.iter().copied().map(SourceRange).collect(),
            family: service.family(),
            backends: backends.iter().cloned().map(BackendSpec::from).collect(),
            algorithm: *algorithm,
            snat: *snat,
            mode: *mode,
            affinity: *affinity,
            external_traffic_policy: *external_traffic_policy,
            internal_traffic_policy: *internal_traffic_policy,
        }
    }
}

/// An address at which a service is reached: `ADDRESS:PORT/PROTOCOL`, or `ADDRESS` with the ports of its frontends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AddressSpec {
    Address(IpAddr),
    Frontend(Frontend),
}

/// Why a text is not such an address.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AddressError {
    #[error("`{0}` is not ADDRESS or ADDRESS:PORT/PROTOCOL; write 192.0.2.10 or 192.0.2.10:80/tcp")]
    Shape(String),
    #[error(transparent)]
    Frontend(#[from] FrontendError),
}

impl FromStr for AddressSpec {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(address) = parse_address(text) {
            return Ok(Self::Address(address?));
        }
        if !text.contains('/') && text.parse::<SocketAddr>().is_err() {
            return Err(AddressError::Shape(text.to_owned()));
        }
        Ok(Self::Frontend(text.parse()?))
    }
}

impl fmt::Display for AddressSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Frontend(frontend) => frontend.fmt(f),
        }
    }
}

/// A port of the node: a number or `"PORT/PROTOCOL"`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NodePortSpec {
    pub port: NonZeroU16,
    pub protocol: Option<Protocol>,
}

impl utoipa::PartialSchema for NodePortSpec {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};

        let number = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1)).maximum(Some(65535));
        let text = ObjectBuilder::new().schema_type(Type::String);
        OneOfBuilder::new().description(Some("A number or PORT/PROTOCOL")).item(number).item(text).into()
    }
}

impl ToSchema for NodePortSpec {}

impl From<NodePort> for NodePortSpec {
    fn from(NodePort { port, protocol }: NodePort) -> Self {
        Self { port, protocol: Some(protocol) }
    }
}

impl FromStr for NodePortSpec {
    type Err = FrontendError;

    fn from_str(text: &str) -> Result<Self, FrontendError> {
        let (port, protocol) = parse_port(text)?;
        Ok(Self { port, protocol })
    }
}

impl Serialize for NodePortSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.protocol {
            None => self.port.serialize(serializer),
            Some(protocol) => NodePort { port: self.port, protocol }.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for NodePortSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrNumber;

        impl de::Visitor<'_> for TextOrNumber {
            type Value = NodePortSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port: a number or \"PORT/PROTOCOL\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<NodePortSpec, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<NodePortSpec, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<NodePortSpec, E> {
                self.visit_str(&number.to_string())
            }
        }

        deserializer.deserialize_any(TextOrNumber)
    }
}

/// A network of clients: `NETWORK/LENGTH`, or `ADDRESS` for one alone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SourceRange(pub IpNet);

impl fmt::Display for SourceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a text is not a network.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SourceRangeError {
    #[error("`{0}` is not a network; write 198.51.100.0/24, 2001:db8::/32 or an address")]
    Shape(String),
    // Not masked in silence: what was meant may be one address, and this is who may come in.
    #[error("`{range}` is an address within a network; write {0} for the network, or {1} for the address alone", range.trunc(), range.addr())]
    HostBits { range: IpNet },
}

impl FromStr for SourceRange {
    type Err = SourceRangeError;

    fn from_str(text: &str) -> Result<Self, SourceRangeError> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self(address.to_canonical().into()));
        }
        let range: IpNet = text.parse().map_err(|_| SourceRangeError::Shape(text.to_owned()))?;
        if range != range.trunc() {
            return Err(SourceRangeError::HostBits { range });
        }
        Ok(Self(range))
    }
}

/// A backend as it is written down: `"10.244.1.2:8080"`, `"10.244.1.2:8080=2"` or a table with `address` and more.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, ToSchema)]
pub struct BackendSpec {
    /// ADDRESS:PORT; of a service that publishes a port, ADDRESS is enough
    #[schema(value_type = String, example = "10.244.1.2:8080")]
    pub address: BackendAddress,
    /// Share of new flows, relative to the service's other backends: 1 to 1000
    #[schema(value_type = u16, required = false, default = 1, minimum = 1, maximum = 1000)]
    pub weight: Weight,
    /// `active` or `draining`
    #[schema(value_type = String, required = false, default = "active")]
    pub state: BackendState,
    /// Whether it takes new flows, as those say who watch it
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(default = true)]
    pub ready: Option<bool>,
    /// Whether it answers; if that is not said, as it is ready
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serving: Option<bool>,
    /// Whether it is on its way out
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(default = false)]
    pub terminating: Option<bool>,
    /// Name of the node it is on
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Whose clients it is meant for
    #[serde(skip_serializing_if = "is_default")]
    #[schema(required = false)]
    pub hints: Hints,
}

/// What a backend may be written as, for the description of the API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum BackendEntry {
    /// ADDRESS:PORT or ADDRESS:PORT=WEIGHT
    Text(String),
    Table(BackendSpec),
}

/// Names of nodes and zones whose clients a backend is meant for.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Hints {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<String>,
}

/// Where a backend is, with or without its port.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackendAddress {
    Endpoint(SocketAddr),
    Address(IpAddr),
}

impl FromStr for BackendAddress {
    type Err = FrontendError;

    fn from_str(text: &str) -> Result<Self, FrontendError> {
        match parse_address(text) {
            Some(address) => Ok(Self::Address(address?)),
            None => Ok(Self::Endpoint(parse_endpoint(text)?)),
        }
    }
}

impl fmt::Display for BackendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoint(address) => address.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl BackendSpec {
    /// One of which nothing is said but where it is.
    #[must_use]
    pub fn new(address: BackendAddress) -> Self {
        Self {
            address,
            weight: Weight::ONE,
            state: BackendState::Active,
            ready: None,
            serving: None,
            terminating: None,
            node: None,
            zone: None,
            hints: Hints::default(),
        }
    }

    /// The backend, with this port if it has none of its own. If there is no port, its address.
    pub fn into_backend(self, port: Option<NonZeroU16>) -> Result<Backend, IpAddr> {
        let Self { address, weight, state, ready, serving, terminating, node, zone, hints } = self;
        let address = match address {
            BackendAddress::Endpoint(address) => address,
            BackendAddress::Address(address) => SocketAddr::new(address, port.ok_or(address)?.get()),
        };
        let Hints { nodes: hint_nodes, zones: hint_zones } = hints;
        let placement = Placement { node, zone, hint_nodes, hint_zones };
        let conditions = Conditions::new(ready, serving, terminating);
        Ok(Backend { address, weight, state, conditions, placement: placed(placement) })
    }
}

/// A placement, unless it says nothing.
pub(crate) fn placed(placement: Placement) -> Option<Arc<Placement>> {
    (placement != Placement::default()).then(|| Arc::new(placement))
}

impl From<Backend> for BackendSpec {
    fn from(backend: Backend) -> Self {
        let Backend { address, weight, state, conditions: Conditions { ready, serving, terminating }, placement } =
            backend;
        let Placement { node, zone, hint_nodes, hint_zones } = placement.map(Arc::unwrap_or_clone).unwrap_or_default();
        Self {
            address: BackendAddress::Endpoint(address),
            weight,
            state,
            ready: (!ready).then_some(ready),
            serving: (serving != ready).then_some(serving),
            terminating: terminating.then_some(terminating),
            node,
            zone,
            hints: Hints { nodes: hint_nodes, zones: hint_zones },
        }
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
        Ok(Self { weight, ..Self::new(address.parse()?) })
    }
}

impl<'de> Deserialize<'de> for BackendSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // By hand and not `#[serde(untagged)]`, which forgets where the error is and what was expected.
        struct TextOrTable;

        impl<'de> de::Visitor<'de> for TextOrTable {
            type Value = BackendSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a backend: \"ADDRESS:PORT\", \"ADDRESS:PORT=WEIGHT\" or { address, weight, state, … }")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<BackendSpec, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<BackendSpec, A::Error> {
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Table {
                    address: BackendAddress,
                    #[serde(default)]
                    weight: Weight,
                    #[serde(default)]
                    state: BackendState,
                    ready: Option<bool>,
                    serving: Option<bool>,
                    terminating: Option<bool>,
                    node: Option<String>,
                    zone: Option<String>,
                    #[serde(default)]
                    hints: Hints,
                }
                let Table { address, weight, state, ready, serving, terminating, node, zone, hints } =
                    Table::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(BackendSpec { address, weight, state, ready, serving, terminating, node, zone, hints })
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

    fn service(json: &str) -> Result<Service, String> {
        let spec: ServiceSpec = serde_json::from_str(json).map_err(|error| error.to_string())?;
        spec.into_service().map_err(|error| error.to_string())
    }

    fn texts<T: ToString>(list: &[T]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_address_alone_has_every_port_of_the_frontends() {
        let service = service(
            r#"{"frontends":["10.96.0.1:53/tcp","10.96.0.1:53/udp","10.96.0.2:53/udp","10.96.0.1:80/tcp"],
                "external_ips":["192.0.2.1","192.0.2.2:8080/tcp"],"lb_ips":["203.0.113.1"]}"#,
        )
        .unwrap();
        let Definition { external_ips, load_balancer_ips, .. } = service.definition();
        let ports = ["53/tcp", "53/udp", "80/tcp"];
        assert_eq!(texts(load_balancer_ips), ports.map(|port| format!("203.0.113.1:{port}")));
        assert_eq!(texts(&external_ips[..3]), ports.map(|port| format!("192.0.2.1:{port}")));
        assert_eq!(texts(&external_ips[3..]), ["192.0.2.2:8080/tcp"]);
    }

    #[test]
    fn an_address_alone_needs_frontends() {
        assert_eq!(
            service(r#"{"name":"web","node_port":30080,"external_ips":["2001:db8::1"]}"#).unwrap_err(),
            "service `web` has no frontend whose port address 2001:db8::1 could have; write [2001:db8::1]:PORT/PROTOCOL"
        );
        for (text, problem) in [
            ("192.0.2.1:80", "has no protocol"),
            ("192.0.2", "is not ADDRESS or ADDRESS:PORT/PROTOCOL"),
            ("0.0.0.0", "is not an address a service"),
            ("224.0.0.1:80/tcp", "is not an address a service"),
        ] {
            let error = text.parse::<AddressSpec>().unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_node_port_alone_has_every_protocol_of_the_frontends() {
        let ports = |json: &str| texts(&service(json).unwrap().definition().node_ports);
        let dns = r#"{"frontends":["10.96.0.1:53/udp","10.96.0.1:53/tcp"],"node_port":30053}"#;
        assert_eq!(ports(dns), ["30053/tcp", "30053/udp"]);
        assert_eq!(ports(&dns.replace("30053", "\"30053/udp\"")), ["30053/udp"]);
        assert_eq!(ports(r#"{"node_ports":[30080,"30081","30082/UDP"]}"#), ["30080/tcp", "30081/tcp", "30082/udp"]);
        for port in ["0", "65536", "-1", "\"x/tcp\"", "\"1-2\""] {
            let error = service(&format!(r#"{{"node_port":{port}}}"#)).unwrap_err();
            assert!(error.contains("is not PORT or PORT/PROTOCOL; a port is 1 to 65535"), "{error}");
        }
        let error = service(r#"{"node_port":"53/sctp"}"#).unwrap_err();
        assert!(error.contains("`sctp` in `53/sctp` is not a protocol netlb balances"), "{error}");
        assert!(
            service(r#"{"node_port":[1]}"#).unwrap_err().contains("expected a port: a number or \"PORT/PROTOCOL\"")
        );
    }

    #[test]
    fn backends_of_a_published_port_may_leave_theirs_out() {
        let published = r#"{"name":"web","publish":["8080:80"],"backends":["10.0.0.1","10.0.0.2=3",{"address":"10.0.0.3"},"10.0.0.4:80"]}"#;
        let backends = service(published).unwrap().backends().to_vec();
        let addresses: Vec<_> = backends.iter().map(|backend| backend.address.to_string()).collect();
        assert_eq!(addresses, ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"]);
        assert_eq!(backends[1].weight.get(), 3);
        assert_eq!(
            service(r#"{"name":"web","frontend":"[fd00::10]:80/tcp","backends":["fd00::1"]}"#).unwrap_err(),
            "service `web` publishes no port that backend fd00::1 could have; write [fd00::1]:PORT"
        );
        assert!(
            service(&published.replace("10.0.0.4:80", "10.0.0.4:81")).unwrap_err().contains("but backend 10.0.0.4:81")
        );
    }

    /// What is wrong with a text, in words.
    fn wrong<T: FromStr<Err: ToString>>(text: &str) -> String {
        text.parse::<T>().map(drop).unwrap_err().to_string()
    }

    #[test]
    fn each_part_says_what_is_wrong_with_it() {
        let frontend = wrong::<Frontend>;
        assert_eq!(
            frontend("10.96.0.10:80"),
            "`10.96.0.10:80` has no protocol; write ADDRESS:PORT/tcp or ADDRESS:PORT/udp"
        );
        assert_eq!(
            frontend("10.96.0.10/tcp"),
            "`10.96.0.10` is not ADDRESS:PORT; write 10.96.0.10:80 or [fd00::10]:80"
        );
        assert_eq!(
            frontend("fd00::10:80/tcp"),
            "`fd00::10:80` is not ADDRESS:PORT; write 10.96.0.10:80 or [fd00::10]:80"
        );
        assert_eq!(frontend("web:80/tcp"), "`web:80` is not ADDRESS:PORT; write 10.96.0.10:80 or [fd00::10]:80");
        assert_eq!(frontend("10.96.0.10:0/tcp"), "`10.96.0.10:0` has port 0; a port is 1 to 65535");
        assert_eq!(frontend("[fd00::10]:70000/udp"), "`[fd00::10]:70000` has port 70000; a port is 1 to 65535");
        assert_eq!(
            frontend("10.96.0.10:80/sctp"),
            "`sctp` in `10.96.0.10:80/sctp` is not a protocol netlb balances; write tcp or udp"
        );
        assert_eq!(
            frontend("0.0.0.0:80/tcp"),
            "`0.0.0.0:80` is not an address a service or backend can have (unspecified, multicast or broadcast)"
        );
        let publish = wrong::<Publish>;
        let shape =
            "is not [ADDRESS:]PORT:TARGET[/PROTOCOL]; write 8080:80, 192.0.2.1:8080:80/udp or [2001:db8::1]:8080:80";
        assert_eq!(publish("8080"), format!("`8080` {shape}"));
        assert_eq!(publish("0:80"), "`0` in `0:80` is not a port; a port is 1 to 65535");
        assert_eq!(publish("8080:70000/udp"), "`70000` in `8080:70000/udp` is not a port; a port is 1 to 65535");
        assert_eq!(publish("192.0.2.1::80"), "`` in `192.0.2.1::80` is not a port; a port is 1 to 65535");
        assert_eq!(
            publish("web:8080:80"),
            "`web` in `web:8080:80` is not an address; write 8080:80, 192.0.2.1:8080:80 or [2001:db8::1]:8080:80"
        );
        assert!(publish("224.0.0.1:1:2").contains("is not an address a service or backend can have"));
        assert!(publish("8080:80/icmp").contains("`icmp` in `8080:80/icmp` is not a protocol"));
        let affinity = wrong::<Affinity>;
        for text in ["cookie", "client-ip:", "client-ip:0", "client-ip:86401", "client-ip:60s", "ClientIP"] {
            let expected =
                format!("affinity `{text}` is not none, client-ip or client-ip:SECONDS with 1 to 86400 seconds");
            assert_eq!(affinity(text), expected);
        }
        assert_eq!(wrong::<TrafficPolicy>("near"), "`near` is not a traffic policy; write cluster or local");
        assert_eq!(
            wrong::<SourceRange>("10.0.0.0/33"),
            "`10.0.0.0/33` is not a network; write 198.51.100.0/24, 2001:db8::/32 or an address"
        );
        assert_eq!(wrong::<BackendSpec>("10.0.0.1:70000"), "`10.0.0.1:70000` has port 70000; a port is 1 to 65535");
    }

    #[test]
    fn a_source_range_is_a_network_or_an_address() {
        let range =
            |text: &str| text.parse().map(|SourceRange(range)| range.to_string()).map_err(|error| error.to_string());
        assert_eq!(range("198.51.100.0/24").unwrap(), "198.51.100.0/24");
        assert_eq!(range("198.51.100.7").unwrap(), "198.51.100.7/32");
        assert_eq!(range("2001:db8::7").unwrap(), "2001:db8::7/128");
        assert_eq!(range("0.0.0.0/0").unwrap(), "0.0.0.0/0");
        assert_eq!(
            range("198.51.100.7/24").unwrap_err(),
            "`198.51.100.7/24` is an address within a network; write 198.51.100.0/24 for the network, or 198.51.100.7 for the address alone"
        );
        assert!(range("198.51.100.0/33").unwrap_err().contains("is not a network"));
        let error =
            service(r#"{"name":"web","frontend":"10.96.0.1:80/tcp","source_ranges":["10.0.0.0/8"]}"#).unwrap_err();
        assert!(error.contains("service `web` has source ranges and no load-balancer address"), "{error}");
    }

    #[test]
    fn policies_and_affinity_are_read_and_refused_by_name() {
        let base = r#"{"frontend":"10.96.0.1:80/tcp","external_traffic_policy":"Local","affinity":"client-ip:60"}"#;
        let service_ = service(base).unwrap();
        assert_eq!(service_.definition().external_traffic_policy, TrafficPolicy::Local);
        assert_eq!(service_.definition().internal_traffic_policy, TrafficPolicy::Cluster);
        assert_eq!(service_.definition().affinity.to_string(), "client-ip:60");
        assert!(
            service(&base.replace("Local", "near"))
                .unwrap_err()
                .contains("`near` is not a traffic policy; write cluster or local")
        );
        assert!(service(&base.replace(":60", ":0")).unwrap_err().contains("with 1 to 86400 seconds"));
    }

    #[test]
    fn what_is_not_said_of_a_backend_is_as_with_kubernetes() {
        let conditions =
            |json: &str| serde_json::from_str::<BackendSpec>(json).unwrap().into_backend(None).unwrap().conditions;
        assert_eq!(conditions(r#""10.0.0.1:80""#), Conditions { ready: true, serving: true, terminating: false });
        let down = conditions(r#"{"address":"10.0.0.1:80","ready":false}"#);
        assert_eq!(down, Conditions { ready: false, serving: false, terminating: false });
        let leaving = conditions(r#"{"address":"10.0.0.1:80","ready":false,"serving":true,"terminating":true}"#);
        assert_eq!(leaving, Conditions { ready: false, serving: true, terminating: true });
    }

    #[test]
    fn what_has_its_default_is_written_as_before_there_was_a_choice() {
        let service = service(r#"{"name":"web","frontend":"10.96.0.10:80/tcp","backends":["10.0.0.1:80=3"]}"#).unwrap();
        assert_eq!(
            serde_json::to_string(&ServiceSpec::from(&service)).unwrap(),
            r#"{"name":"web","frontends":["10.96.0.10:80/tcp"],"backends":[{"address":"10.0.0.1:80","weight":3,"state":"active"}],"algorithm":"maglev","snat":"auto"}"#
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
