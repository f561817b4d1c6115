//! Where services are reached.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use crate::text::serde_by_text;

serde_by_text! {
    Frontend: "ADDRESS:PORT/PROTOCOL",
    NodePort: "PORT/PROTOCOL",
    Publish: "[ADDRESS:]PORT:TARGET[/PROTOCOL]",
}

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
    #[error("`{text}` has port {port}; a port is 1 to 65535")]
    PortRange { text: String, port: String },
    #[error("`{0}` is not PORT or PORT/PROTOCOL; a port is 1 to 65535")]
    Port(String),
    #[error("`{0}` is not an address a service or backend can have (unspecified, multicast or broadcast)")]
    NotUnicast(String),
}

/// Reads `ADDRESS:PORT` for a frontend or a backend.
pub fn parse_endpoint(text: &str) -> Result<SocketAddr, FrontendError> {
    let out_of_range = |port: &str| FrontendError::PortRange { text: text.to_owned(), port: port.to_owned() };
    let address: SocketAddr = text.parse().map_err(|_| match text.rsplit_once(':') {
        // All but the size of the number is right.
        Some((address, port))
            if port.parse::<u64>().is_ok() && format!("{address}:1").parse::<SocketAddr>().is_ok() =>
        {
            out_of_range(port)
        }
        _ => FrontendError::Address(text.to_owned()),
    })?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    if address.port() == 0 {
        return Err(out_of_range("0"));
    }
    check_unicast(address.ip(), text)?;
    Ok(address)
}

/// Reads `ADDRESS`, with or without the brackets that IPv6 has before a port; nothing, if the text is something else.
pub fn parse_address(text: &str) -> Option<Result<IpAddr, FrontendError>> {
    let address = text.strip_prefix('[').and_then(|address| address.strip_suffix(']')).unwrap_or(text);
    let address = address.parse::<IpAddr>().ok()?.to_canonical();
    Some(check_unicast(address, text).map(|()| address))
}

fn check_unicast(address: IpAddr, text: &str) -> Result<(), FrontendError> {
    if address.is_unspecified() || address.is_multicast() || address == IpAddr::from([255, 255, 255, 255]) {
        return Err(FrontendError::NotUnicast(text.to_owned()));
    }
    Ok(())
}

/// The protocol that a part of a text names.
pub(crate) fn protocol_of(text: &str, protocol: &str) -> Result<Protocol, FrontendError> {
    match protocol.to_ascii_lowercase().as_str() {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err(FrontendError::Protocol { text: text.to_owned(), protocol: protocol.to_owned() }),
    }
}

impl FromStr for Frontend {
    type Err = FrontendError;

    fn from_str(text: &str) -> Result<Self, FrontendError> {
        let (address, protocol) = text.rsplit_once('/').ok_or_else(|| FrontendError::NoProtocol(text.to_owned()))?;
        Ok(Self { address: parse_endpoint(address)?, protocol: protocol_of(text, protocol)? })
    }
}

/// Reads what a service may be known by: a frontend, or with the unspecified address a port on the node's addresses.
#[must_use]
pub fn parse_claim(text: &str) -> Option<Frontend> {
    let (address, protocol) = text.rsplit_once('/')?;
    let address: SocketAddr = address.parse().ok()?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    Some(Frontend { address, protocol: protocol_of(text, protocol).ok()? })
}

/// What a service may be known by, in words: a frontend, or a port of the node.
#[must_use]
pub fn describe_claim(claim: &Frontend) -> String {
    let Frontend { address, protocol } = claim;
    if !address.ip().is_unspecified() {
        return format!("frontend {claim}");
    }
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    format!("port {}/{protocol} on the node's {family} addresses", address.port())
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.protocol)
    }
}

/// A port at which a service is reached on addresses of the node: `PORT/PROTOCOL`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NodePort {
    pub port: NonZeroU16,
    pub protocol: Protocol,
}

impl fmt::Display for NodePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol)
    }
}

/// Reads `PORT` or `PORT/PROTOCOL`.
pub fn parse_port(text: &str) -> Result<(NonZeroU16, Option<Protocol>), FrontendError> {
    let (port, protocol) = match text.rsplit_once('/') {
        None => (text, None),
        Some((port, protocol)) => (port, Some(protocol_of(text, protocol)?)),
    };
    Ok((port.parse().map_err(|_| FrontendError::Port(text.to_owned()))?, protocol))
}

impl FromStr for NodePort {
    type Err = FrontendError;

    /// Without a protocol it is TCP's.
    fn from_str(text: &str) -> Result<Self, FrontendError> {
        let (port, protocol) = parse_port(text)?;
        Ok(Self { port, protocol: protocol.unwrap_or(Protocol::Tcp) })
    }
}

/// A port of the node that leads to a port of a backend, as Docker publishes those of containers: `[ADDRESS:]PORT:TARGET[/PROTOCOL]`.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Publish {
    /// The address of the node, or all that it has.
    pub address: Option<IpAddr>,
    pub port: NodePort,
    /// The port that the backends have.
    pub target: NonZeroU16,
}

/// Why a text is not a published port.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PublishError {
    #[error(
        "`{0}` is not [ADDRESS:]PORT:TARGET[/PROTOCOL]; write 8080:80, 192.0.2.1:8080:80/udp or [2001:db8::1]:8080:80"
    )]
    Shape(String),
    #[error("`{port}` in `{text}` is not a port; a port is 1 to 65535")]
    Port { text: String, port: String },
    #[error("`{address}` in `{text}` is not an address; write 8080:80, 192.0.2.1:8080:80 or [2001:db8::1]:8080:80")]
    Address { text: String, address: String },
    #[error(transparent)]
    Frontend(#[from] FrontendError),
}

impl FromStr for Publish {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Self, PublishError> {
        let shape = || PublishError::Shape(text.to_owned());
        let (ports, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, protocol)) => (ports, protocol_of(text, protocol)?),
        };
        let (rest, target) = ports.rsplit_once(':').ok_or_else(shape)?;
        let port =
            |port: &str| port.parse().map_err(|_| PublishError::Port { text: text.to_owned(), port: port.to_owned() });
        let target = port(target)?;
        let (address, port) = match rest.rsplit_once(':') {
            None => (None, port(rest)?),
            Some((address, number)) => {
                let address =
                    address.strip_prefix('[').and_then(|address| address.strip_suffix(']')).unwrap_or(address);
                let is_not = |_| PublishError::Address { text: text.to_owned(), address: address.to_owned() };
                let address = address.parse::<IpAddr>().map_err(is_not)?.to_canonical();
                // As with Docker, the unspecified address means all.
                let address = (!address.is_unspecified()).then_some(address);
                address.map_or(Ok(()), |address| check_unicast(address, text))?;
                (address, port(number)?)
            }
        };
        Ok(Self { address, port: NodePort { port, protocol }, target })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, port: NodePort { port, protocol }, target } = self;
        match address {
            None => {}
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
        }
        write!(f, "{port}:{target}/{protocol}")
    }
}
