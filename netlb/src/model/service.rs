//! Services, checked.

use std::{
    collections::HashSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU16,
};

use ipnet::IpNet;

use super::{
    Affinity, Algorithm, Backend, Family, Frontend, Mode, NodePort, Publish, SnatMode, TrafficPolicy, parse_claim,
};

/// What a service consists of: the ways it is reached by, the backends its traffic goes to, and how.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Definition {
    /// Without one, the service is named after the first way it is reached by.
    pub name: Option<String>,
    /// Cluster addresses: for clients of the cluster.
    pub frontends: Vec<Frontend>,
    pub external_ips: Vec<Frontend>,
    pub load_balancer_ips: Vec<Frontend>,
    /// Ports on the addresses of the node that are for node ports.
    pub node_ports: Vec<NodePort>,
    /// Ports on all addresses of the node, or on one.
    pub publish: Vec<Publish>,
    /// Clients of the load-balancer addresses; all, if there are none.
    pub source_ranges: Vec<IpNet>,
    /// Known from the first address on, and kept without any: the ports of a service go by it, whatever becomes of its backends.
    pub family: Option<Family>,
    pub backends: Vec<Backend>,
    pub algorithm: Algorithm,
    pub snat: SnatMode,
    pub mode: Mode,
    pub affinity: Affinity,
    /// Of all ways but the cluster addresses.
    pub external_traffic_policy: TrafficPolicy,
    /// Of cluster addresses.
    pub internal_traffic_policy: TrafficPolicy,
}

/// A service: a [`Definition`] that makes sense, with a name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    name: String,
    definition: Definition,
}

/// Something that one service has at most: an address, port and protocol; with the unspecified address, a port on the node's own.
pub type Claim = Frontend;

/// Why a description is not a service.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ServiceError {
    #[error("service `{0}` has no frontend; give one as ADDRESS:PORT/PROTOCOL, or a node port, or a port to publish")]
    NoFrontend(String),
    #[error(
        "service name `{0}` is not 1 to 253 letters, digits, `-`, `_`, `.` or `/`, beginning with a letter or digit, and not a frontend"
    )]
    Name(String),
    #[error("service `{service}` names frontend {frontend} twice")]
    FrontendTwice { service: String, frontend: Claim },
    #[error("service `{service}` names backend {backend} twice; give it once, with a weight")]
    BackendTwice { service: String, backend: SocketAddr },
    #[error("service `{service}` mixes address families: {first} and {second}; make one service per family")]
    MixedFamilies { service: String, first: String, second: String },
    #[error("service `{service}` has family {family}, and {address} is of the other one; make one service per family")]
    OtherFamily { service: String, family: Family, address: String },
    #[error("service `{service}`: backend {backend} is its own frontend, traffic would loop")]
    BackendIsFrontend { service: String, backend: SocketAddr },
    #[error("service `{service}` has {count} backends, the most is {max}", max = Service::MAX_BACKENDS)]
    TooManyBackends { service: String, count: usize },
    #[error(
        "service `{service}` publishes port {target} of its backends, but backend {backend} has another; make one service per port"
    )]
    PublishTarget { service: String, target: NonZeroU16, backend: SocketAddr },
    #[error("service `{service}` publishes {first} and {second}, two ports of its backends; make one service per port")]
    PublishTargets { service: String, first: Publish, second: Publish },
    #[error("service `{0}` has source ranges and no load-balancer address, which are the only ones they are for")]
    RangesForNothing(String),
    #[error(
        "service `{service}` has mode dsr, where backends see clients' addresses, and snat {snat}; leave one of them out"
    )]
    DsrWithSnat { service: String, snat: SnatMode },
}

impl Service {
    /// Ring entries are 16-bit indexes, and the largest ring has 65521 slots: beyond this a backend's share could not be kept.
    pub const MAX_BACKENDS: usize = 8192;

    /// A service on cluster addresses, checked.
    pub fn new(
        name: Option<String>,
        frontends: Vec<Frontend>,
        backends: Vec<Backend>,
        algorithm: Algorithm,
    ) -> Result<Self, ServiceError> {
        Self::define(Definition { name, frontends, backends, algorithm, ..Definition::default() })
    }

    /// A service, checked.
    pub fn define(mut definition: Definition) -> Result<Self, ServiceError> {
        definition.family = definition.family.or_else(|| definition.first_family());
        let claims: Vec<_> = claims(&definition).collect();
        let name = definition.name.clone();
        let Some(first) = claims.first() else {
            return Err(ServiceError::NoFrontend(name.unwrap_or_default()));
        };
        let service = match name {
            Some(name) if name_is_valid(&name) => name,
            // The name a service had when it came without one is read back from files and the API.
            Some(name) if name == first.to_string() => name,
            Some(name) => return Err(ServiceError::Name(name)),
            None => first.to_string(),
        };
        check_family(&service, &definition)?;
        for (index, claim) in claims.iter().enumerate() {
            if claims[..index].contains(claim) {
                return Err(ServiceError::FrontendTwice { service, frontend: *claim });
            }
        }
        check_backends(&service, &definition, &claims)?;
        check_publish(&service, &definition)?;
        if !definition.source_ranges.is_empty() && definition.load_balancer_ips.is_empty() {
            return Err(ServiceError::RangesForNothing(service));
        }
        if definition.mode == Mode::Dsr && definition.snat != SnatMode::Auto {
            return Err(ServiceError::DsrWithSnat { service, snat: definition.snat });
        }
        Ok(Self { definition: Definition { name: Some(service.clone()), ..definition }, name: service })
    }

    /// The same with something changed. A service that was named after the first way it is reached by is so again.
    pub fn redefine(&self, change: impl FnOnce(&mut Definition)) -> Result<Self, ServiceError> {
        let mut definition = self.definition.clone();
        if self.is_unnamed() {
            definition.name = None;
        }
        change(&mut definition);
        Self::define(definition)
    }

    #[must_use]
    pub fn with_snat(mut self, snat: SnatMode) -> Self {
        self.definition.snat = snat;
        self
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it was given no name.
    #[must_use]
    pub fn is_unnamed(&self) -> bool {
        self.claims().next().is_some_and(|claim| claim.to_string() == self.name)
    }

    #[must_use]
    pub const fn definition(&self) -> &Definition {
        &self.definition
    }

    /// The cluster addresses.
    #[must_use]
    pub fn frontends(&self) -> &[Frontend] {
        &self.definition.frontends
    }

    /// Everything that no other service may have.
    pub fn claims(&self) -> impl Iterator<Item = Claim> {
        claims(&self.definition)
    }

    /// Claims to ports on one address of the node, each with the claim to the port on all of them.
    pub fn published_on_one_address(&self) -> impl Iterator<Item = (Claim, Claim)> {
        let is_v6 = self.is_v6();
        let published = self.definition.publish.iter().filter(|publish| publish.address.is_some());
        published
            .map(move |publish| (on_node(publish.port, publish.address, is_v6), on_node(publish.port, None, is_v6)))
    }

    /// What is left of it without some claims; nothing, if none is left.
    #[must_use]
    pub fn without(&self, mut is_lost: impl FnMut(&Claim) -> bool) -> Option<Self> {
        let is_v6 = is_v6(&self.definition);
        let left = self.redefine(|definition| {
            definition.frontends.retain(|frontend| !is_lost(frontend));
            definition.external_ips.retain(|frontend| !is_lost(frontend));
            definition.load_balancer_ips.retain(|frontend| !is_lost(frontend));
            definition.node_ports.retain(|port| !is_lost(&on_node(*port, None, is_v6)));
            definition.publish.retain(|publish| !is_lost(&on_node(publish.port, publish.address, is_v6)));
            if definition.load_balancer_ips.is_empty() {
                definition.source_ranges.clear();
            }
        });
        left.ok()
    }

    #[must_use]
    pub fn backends(&self) -> &[Backend] {
        &self.definition.backends
    }

    #[must_use]
    pub const fn algorithm(&self) -> Algorithm {
        self.definition.algorithm
    }

    #[must_use]
    pub const fn snat(&self) -> SnatMode {
        self.definition.snat
    }

    /// Whether its addresses are IPv6.
    #[must_use]
    pub fn is_v6(&self) -> bool {
        is_v6(&self.definition)
    }

    /// Its family, unless one of its own addresses says it.
    #[must_use]
    pub fn family(&self) -> Option<Family> {
        let Definition { frontends, external_ips, load_balancer_ips, publish, .. } = &self.definition;
        let mut frontends = frontends.iter().chain(external_ips).chain(load_balancer_ips);
        let has_address = frontends.next().is_some() || publish.iter().any(|publish| publish.address.is_some());
        self.definition.family.filter(|_| !has_address)
    }
}

impl Definition {
    /// The family of the first address there is.
    #[must_use]
    pub fn first_family(&self) -> Option<Family> {
        addresses(self).next().map(|(ip, _)| Family::of(ip))
    }
}

/// A service of ports alone, of which nothing else is known, has IPv4.
fn is_v6(definition: &Definition) -> bool {
    definition.family == Some(Family::Ipv6)
}

/// Every address in a definition, with what names it.
fn addresses(definition: &Definition) -> impl Iterator<Item = (IpAddr, &dyn fmt::Display)> {
    fn named<T: fmt::Display>(address: IpAddr, name: &T) -> (IpAddr, &dyn fmt::Display) {
        (address, name)
    }
    let Definition { frontends, external_ips, load_balancer_ips, publish, backends, source_ranges, .. } = definition;
    let frontends = frontends.iter().chain(external_ips).chain(load_balancer_ips);
    frontends
        .map(|frontend| named(frontend.address.ip(), frontend))
        .chain(publish.iter().filter_map(|publish| Some(named(publish.address?, publish))))
        .chain(backends.iter().map(|backend| named(backend.address.ip(), &backend.address)))
        .chain(source_ranges.iter().map(|range| named(range.addr(), range)))
}

fn claims(definition: &Definition) -> impl Iterator<Item = Claim> {
    let Definition { frontends, external_ips, load_balancer_ips, node_ports, publish, .. } = definition;
    let is_v6 = is_v6(definition);
    let frontends = frontends.iter().chain(external_ips).chain(load_balancer_ips).copied();
    let node_ports = node_ports.iter().map(move |port| on_node(*port, None, is_v6));
    frontends.chain(node_ports).chain(publish.iter().map(move |publish| on_node(publish.port, publish.address, is_v6)))
}

fn on_node(NodePort { port, protocol }: NodePort, address: Option<IpAddr>, is_v6: bool) -> Claim {
    let any = if is_v6 { IpAddr::from(Ipv6Addr::UNSPECIFIED) } else { Ipv4Addr::UNSPECIFIED.into() };
    Claim { address: SocketAddr::new(address.unwrap_or(any), port.get()), protocol }
}

fn check_family(service: &str, definition: &Definition) -> Result<(), ServiceError> {
    let mut addresses = addresses(definition);
    let Some((ip, first)) = addresses.next() else { return Ok(()) };
    if let Some(family) = definition.family.filter(|family| *family != Family::of(ip)) {
        return Err(ServiceError::OtherFamily { service: service.to_owned(), family, address: first.to_string() });
    }
    let Some((_, second)) = addresses.find(|(other, _)| other.is_ipv4() != ip.is_ipv4()) else { return Ok(()) };
    let (service, first, second) = (service.to_owned(), first.to_string(), second.to_string());
    Err(ServiceError::MixedFamilies { service, first, second })
}

fn check_backends(service: &str, definition: &Definition, claims: &[Claim]) -> Result<(), ServiceError> {
    let backends = &definition.backends;
    let service = || service.to_owned();
    if backends.len() > Service::MAX_BACKENDS {
        return Err(ServiceError::TooManyBackends { service: service(), count: backends.len() });
    }
    let mut seen = HashSet::with_capacity(backends.len());
    for backend in backends.iter().map(|backend| backend.address) {
        if claims.iter().any(|claim| claim.address == backend) {
            return Err(ServiceError::BackendIsFrontend { service: service(), backend });
        }
        if !seen.insert(backend) {
            return Err(ServiceError::BackendTwice { service: service(), backend });
        }
    }
    Ok(())
}

fn check_publish(service: &str, definition: &Definition) -> Result<(), ServiceError> {
    let Some(first) = definition.publish.first().copied() else { return Ok(()) };
    let service = || service.to_owned();
    let target = first.target;
    if let Some(second) = definition.publish.iter().copied().find(|publish| publish.target != target) {
        return Err(ServiceError::PublishTargets { service: service(), first, second });
    }
    let mut backends = definition.backends.iter().map(|backend| backend.address);
    match backends.find(|backend| backend.port() != target.get()) {
        Some(backend) => Err(ServiceError::PublishTarget { service: service(), target, backend }),
        None => Ok(()),
    }
}

fn name_is_valid(name: &str) -> bool {
    (1..=253).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
        && parse_claim(name).is_none()
}
