//! Services as users speak of them, checked on construction.
//!
//! Nothing here knows of files, sockets or maps. A value that exists is valid: a [`Service`] has at least one frontend, one address
//! family, no backend twice and none that is its own frontend.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// The transport protocols that services have.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// The number in the IP header (IANA protocol numbers).
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// An address at which a service is reached: `ADDR:PORT/PROTO`, with `[v6]:port/proto`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Frontend {
    pub address: SocketAddr,
    pub protocol: Protocol,
}

/// Why a text is not a frontend.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FrontendError {
    #[error("`{0}` has no protocol; write ADDRESS:PORT/tcp or ADDRESS:PORT/udp")]
    NoProtocol(String),
    #[error("`{protocol}` in `{text}` is not a protocol netlb balances; write tcp or udp")]
    Protocol { text: String, protocol: String },
    #[error("`{0}` is not ADDRESS:PORT; write 10.96.0.10:80 or [fd00::10]:80")]
    Address(String),
    #[error("`{0}` has port 0; a port is 1 to 65535")]
    PortZero(String),
    #[error("`{0}` is not an address a service or backend can have (unspecified, multicast or broadcast)")]
    NotUnicast(String),
}

/// Reads `ADDRESS:PORT` for a frontend or a backend.
pub fn parse_endpoint(text: &str) -> Result<SocketAddr, FrontendError> {
    let address: SocketAddr = text.parse().map_err(|_| FrontendError::Address(text.to_owned()))?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    if address.port() == 0 {
        return Err(FrontendError::PortZero(text.to_owned()));
    }
    let ip = address.ip();
    if ip.is_unspecified() || ip.is_multicast() || ip == IpAddr::from([255, 255, 255, 255]) {
        return Err(FrontendError::NotUnicast(text.to_owned()));
    }
    Ok(address)
}

impl FromStr for Frontend {
    type Err = FrontendError;

    fn from_str(text: &str) -> Result<Self, FrontendError> {
        let (address, protocol) = text.rsplit_once('/').ok_or_else(|| FrontendError::NoProtocol(text.to_owned()))?;
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(FrontendError::Protocol { text: text.to_owned(), protocol: protocol.to_owned() }),
        };
        Ok(Self { address: parse_endpoint(address)?, protocol })
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.protocol)
    }
}

impl Serialize for Frontend {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Frontend {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::text::deserialize_text(deserializer, "ADDRESS:PORT/PROTOCOL", str::parse)
    }
}

/// A backend's share of new flows, relative to the service's other backends: 1 to 1000.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Weight(NonZeroU16);

/// A number that is no weight.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("weight {0} is not 1 to {max}; to stop new flows to a backend, drain it", max = Weight::MAX)]
pub struct WeightError(pub u64);

impl Weight {
    pub const MAX: u16 = 1000;
    pub const ONE: Self = Self(NonZeroU16::MIN);

    pub fn new(weight: u64) -> Result<Self, WeightError> {
        u16::try_from(weight)
            .ok()
            .filter(|weight| *weight <= Self::MAX)
            .and_then(NonZeroU16::new)
            .map(Self)
            .ok_or(WeightError(weight))
    }

    #[must_use]
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl Default for Weight {
    fn default() -> Self {
        Self::ONE
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(u64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// Whether a backend takes new flows.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// Takes new flows.
    #[default]
    Active,
    /// Keeps its flows and gets no new ones.
    Draining,
}

impl fmt::Display for BackendState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Active => "active",
            Self::Draining => "draining",
        })
    }
}

/// A server behind a service.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Backend {
    pub address: SocketAddr,
    pub weight: Weight,
    pub state: BackendState,
}

/// How a backend is chosen for a new flow.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Consistent hashing of the flow's 5-tuple: every node chooses alike, and a change of the set moves few flows.
    #[default]
    Maglev,
    Random,
    RoundRobin,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Maglev => "maglev",
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
        })
    }
}

/// Which flows of a service get an address of the node as their source.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnatMode {
    /// Those whose replies would not come back through this node.
    #[default]
    Auto,
    Always,
    /// None but those of a pod to itself: replies come back through this node, as the operator knows.
    Never,
}

impl fmt::Display for SnatMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
}

/// The source that declared a service. Only its owner changes a service.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Owner {
    /// The configuration file.
    File,
    /// `netlb svc add`, `netlb apply` and the HTTP API.
    Api,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File => "file",
            Self::Api => "api",
        })
    }
}

/// A service: the frontends it is reached at and the backends its traffic goes to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Service {
    name: String,
    frontends: Vec<Frontend>,
    backends: Vec<Backend>,
    algorithm: Algorithm,
    snat: SnatMode,
}

/// Why a description is not a service.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ServiceError {
    #[error("service `{0}` has no frontend; give at least one as ADDRESS:PORT/PROTOCOL")]
    NoFrontend(String),
    #[error(
        "service name `{0}` is not 1 to 253 letters, digits, `-`, `_`, `.` or `/`, beginning with a letter or digit, and not a frontend"
    )]
    Name(String),
    #[error("service `{service}` names frontend {frontend} twice")]
    FrontendTwice { service: String, frontend: Frontend },
    #[error("service `{service}` names backend {backend} twice; give it once, with a weight")]
    BackendTwice { service: String, backend: SocketAddr },
    #[error("service `{service}` mixes address families: {first} and {second}; make one service per family")]
    MixedFamilies { service: String, first: String, second: String },
    #[error("service `{service}`: backend {backend} is its own frontend, traffic would loop")]
    BackendIsFrontend { service: String, backend: SocketAddr },
    #[error("service `{service}` has {count} backends, the most is {max}", max = Service::MAX_BACKENDS)]
    TooManyBackends { service: String, count: usize },
}

impl Service {
    /// Ring entries are 16-bit indexes, and the largest ring has 65521 slots: beyond this a backend's share could not be kept.
    pub const MAX_BACKENDS: usize = 8192;

    /// A service, checked. Without a name the first frontend is its name.
    pub fn new(
        name: Option<String>,
        frontends: Vec<Frontend>,
        backends: Vec<Backend>,
        algorithm: Algorithm,
    ) -> Result<Self, ServiceError> {
        let Some(first) = frontends.first() else {
            return Err(ServiceError::NoFrontend(name.unwrap_or_default()));
        };
        let service = match name {
            Some(name) if name_is_valid(&name) => name,
            // The name a service had when it came without one is read back from files and the API.
            Some(name) if name == first.to_string() => name,
            Some(name) => return Err(ServiceError::Name(name)),
            None => first.to_string(),
        };
        for (index, frontend) in frontends.iter().enumerate() {
            if frontends[..index].contains(frontend) {
                return Err(ServiceError::FrontendTwice { service, frontend: *frontend });
            }
            if frontend.address.is_ipv4() != first.address.is_ipv4() {
                let (first, second) = (first.to_string(), frontend.to_string());
                return Err(ServiceError::MixedFamilies { service, first, second });
            }
        }
        if backends.len() > Self::MAX_BACKENDS {
            return Err(ServiceError::TooManyBackends { service, count: backends.len() });
        }
        let mut seen = std::collections::HashSet::with_capacity(backends.len());
        for backend in &backends {
            if backend.address.is_ipv4() != first.address.is_ipv4() {
                let (first, second) = (first.to_string(), backend.address.to_string());
                return Err(ServiceError::MixedFamilies { service, first, second });
            }
            if frontends.iter().any(|frontend| frontend.address == backend.address) {
                return Err(ServiceError::BackendIsFrontend { service, backend: backend.address });
            }
            if !seen.insert(backend.address) {
                return Err(ServiceError::BackendTwice { service, backend: backend.address });
            }
        }
        Ok(Self { name: service, frontends, backends, algorithm, snat: SnatMode::Auto })
    }

    #[must_use]
    pub fn with_snat(self, snat: SnatMode) -> Self {
        Self { snat, ..self }
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn frontends(&self) -> &[Frontend] {
        &self.frontends
    }

    #[must_use]
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }

    #[must_use]
    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    #[must_use]
    pub const fn snat(&self) -> SnatMode {
        self.snat
    }
}

fn name_is_valid(name: &str) -> bool {
    (1..=253).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
        && name.parse::<Frontend>().is_err()
}
