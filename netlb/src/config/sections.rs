//! The sections of `netlb.toml` but for the services, with their defaults and ranges.

use std::{fmt, net::IpAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use netlb_common::snat::Pool;
use serde::{Deserialize, Deserializer, de};

use super::{Cidrs, NodePortAddresses, duration::format_duration, glob::Glob, parse_duration};
use crate::text::deserialize_text;

/// `[node]`: which interfaces carry service traffic, and how packets leave.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// As backends' places name it; the host's name if there is none.
    pub name: Option<String>,
    pub zone: Option<String>,
    pub node_port_addresses: NodePortAddresses,
    /// The addresses of this node's pods, whatever interface their packets come in on.
    pub pod_cidrs: Cidrs,
    /// Addresses that are services' or nobody's.
    pub owned_cidrs: Cidrs,
    /// Whether services' addresses among those answer echo requests.
    pub echo: bool,
    /// Host side interfaces of pods.
    pub pod_interfaces: Vec<Glob>,
    pub uplinks: Vec<Glob>,
    /// Bridges whose ports are pod interfaces.
    pub bridges: Vec<Glob>,
    pub forwarding: Forwarding,
    pub tcx_order: TcxOrder,
    pub attach: Attach,
    pub xdp: Xdp,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            name: None,
            zone: None,
            node_port_addresses: NodePortAddresses::Primary,
            pod_cidrs: Cidrs::default(),
            owned_cidrs: Cidrs::default(),
            echo: true,
            pod_interfaces: Vec::new(),
            uplinks: Vec::new(),
            bridges: Vec::new(),
            forwarding: Forwarding::default(),
            tcx_order: TcxOrder::default(),
            attach: Attach::default(),
            xdp: Xdp::default(),
        }
    }
}

/// How a translated packet leaves.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Forwarding {
    /// Straight to the interface of its next hop.
    #[default]
    Fast,
    /// Through the kernel's routing.
    Stack,
}

/// Our place among other programs of an interface's TCX chain.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TcxOrder {
    #[default]
    First,
    Last,
}

/// The kernel interface programs are attached through.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attach {
    /// TCX where the kernel has it (since 6.6), else clsact.
    #[default]
    Auto,
    Tcx,
    Clsact,
}

/// Whether uplinks get the XDP program as well.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Xdp {
    #[default]
    Off,
    /// In the device's driver.
    Native,
    /// In the kernel, for any device: slower than without.
    Generic,
}

/// `[socket]`: which processes' sockets are served.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Socket {
    pub scope: SocketScope,
    /// The cgroup whose processes, and those of the cgroups below it, are served; the root of the first cgroup v2 that is mounted if
    /// there is none.
    pub cgroup: Option<PathBuf>,
}

/// The network namespaces whose processes are served.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketScope {
    #[default]
    Off,
    /// The daemon's own. Every container's processes are in a cgroup below the root as well.
    Node,
    All,
}

impl SocketScope {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Node => "node",
            Self::All => "all",
        }
    }
}

/// `[api]`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Api {
    pub socket: PathBuf,
}

impl Api {
    pub const DEFAULT_SOCKET: &str = "/run/netlb/netlb.sock";
}

impl Default for Api {
    fn default() -> Self {
        Self { socket: PathBuf::from(Self::DEFAULT_SOCKET) }
    }
}

/// `[limits]`: sizes of the kernel's tables, fixed while the daemon runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Frontends.
    #[serde(deserialize_with = "services")]
    pub services: u32,
    #[serde(deserialize_with = "backends")]
    pub backends: u32,
    /// Connections at 60 % occupancy of the flow table.
    #[serde(deserialize_with = "flows")]
    pub flows: u32,
    #[serde(deserialize_with = "ring_slots")]
    pub ring_slots: u32,
    /// Connected sockets, and twice the services of datagram sockets, that are remembered.
    #[serde(deserialize_with = "sockets")]
    pub sockets: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { services: 16_384, backends: 131_072, flows: 300_000, ring_slots: 11_673_600, sockets: 65_536 }
    }
}

/// Reads a size and refuses what no machine wants: a typo of some zeros would otherwise ask the kernel for gigabytes.
fn size<'de, D: Deserializer<'de>>(deserializer: D, most: u32) -> Result<u32, D::Error> {
    let size = u64::deserialize(deserializer)?;
    u32::try_from(size)
        .ok()
        .and_then(NonZeroU32::new)
        .map(NonZeroU32::get)
        .filter(|size| *size <= most)
        .ok_or_else(|| de::Error::custom(format_args!("{size} is not 1 to {most}")))
}

fn services<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    size(deserializer, 1 << 20)
}

/// Backend ids have 21 bits in a flow's data word, and 0 is none.
fn backends<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    size(deserializer, (1 << 21) - 1)
}

fn flows<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    size(deserializer, 1 << 26)
}

fn ring_slots<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    size(deserializer, 1 << 30)
}

fn sockets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    size(deserializer, 1 << 24)
}

/// `[timeouts]`: how long a flow without packets is kept, by its state.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    #[serde(deserialize_with = "timeout")]
    pub tcp_syn: Duration,
    #[serde(deserialize_with = "established_timeout")]
    pub tcp_established: Duration,
    #[serde(deserialize_with = "timeout")]
    pub tcp_closing: Duration,
    #[serde(deserialize_with = "timeout")]
    pub tcp_half_closed: Duration,
    #[serde(deserialize_with = "timeout")]
    pub udp_one_way: Duration,
    #[serde(deserialize_with = "timeout")]
    pub udp_both_ways: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_syn: Duration::from_secs(60),
            tcp_established: Duration::from_secs(2 * 3600 + 13 * 60),
            tcp_closing: Duration::from_secs(10),
            tcp_half_closed: Duration::from_secs(300),
            udp_one_way: Duration::from_secs(60),
            udp_both_ways: Duration::from_secs(180),
        }
    }
}

fn timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    timeout_up_to(deserializer, Duration::from_secs(3600))
}

fn established_timeout<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    timeout_up_to(deserializer, Duration::from_secs(4 * 3600 + 30 * 60))
}

/// Flow times are kept in whole seconds with few bits, so a timeout has an upper end and no fraction.
fn timeout_up_to<'de, D: Deserializer<'de>>(deserializer: D, most: Duration) -> Result<Duration, D::Error> {
    deserialize_text(deserializer, "a duration such as \"60s\" or \"2h13m\"", |text| {
        let timeout = parse_duration(text).map_err(|error| error.to_string())?;
        if timeout.subsec_nanos() != 0 {
            return Err(format!("timeout {text} is not in whole seconds"));
        }
        if timeout.is_zero() || timeout > most {
            return Err(format!("timeout {text} is not 1s to {}", format_duration(most)));
        }
        Ok(timeout)
    })
}

/// `[snat]`: the source that clients get where a backend's replies would not come back through this node.
#[derive(Clone, Debug, Eq, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Snat {
    /// Addresses of the node; those that routing prefers for families without any.
    #[serde(deserialize_with = "sources")]
    pub addresses: Vec<IpAddr>,
    /// The first and the last port.
    #[serde(deserialize_with = "ports")]
    pub ports: (u16, u16),
}

impl Default for Snat {
    /// Above those that Linux gives its own sockets.
    fn default() -> Self {
        Self { addresses: Vec::new(), ports: (61_000, 65_535) }
    }
}

fn sources<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpAddr>, D::Error> {
    let addresses = Vec::<IpAddr>::deserialize(deserializer)?;
    for (n, address) in addresses.iter().enumerate() {
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return Err(de::Error::custom(format_args!("{address} cannot be the source of what leaves the node")));
        }
        if addresses[..n].contains(address) {
            return Err(de::Error::custom(format_args!("{address} is named twice")));
        }
        if addresses[..n].iter().filter(|other| other.is_ipv4() == address.is_ipv4()).count() == Pool::MAX {
            return Err(de::Error::custom(format_args!("more than {} addresses of one family", Pool::MAX)));
        }
    }
    Ok(addresses)
}

fn ports<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(u16, u16), D::Error> {
    deserialize_text(deserializer, "a range of ports such as \"61000-65535\"", |text| {
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port >= 1024);
        text.split_once('-')
            .and_then(|(first, last)| Some((port(first)?, port(last)?)))
            .filter(|(first, last)| first <= last)
            .ok_or_else(|| format!("\"{text}\" is not a range of ports from 1024 to 65535"))
    })
}

/// `[masquerade]`: whose packets leave by uplinks with an address of the node as their source.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Masquerade {
    /// Addresses of pods. What goes from one to another keeps its source.
    pub pod_cidrs: Cidrs,
    /// Further destinations that see the pods' own addresses.
    pub exclude: Cidrs,
}

/// `[dsr]`: whose wrapped packets are unwrapped.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dsr {
    /// Addresses of balancing nodes.
    pub accept_from: Cidrs,
}

/// `[log]`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    pub level: LogLevel,
    pub format: LogFormat,
    /// Lines from the packet path; each level costs the packets that reach it.
    pub dataplane: LogLevel,
}

impl Default for Log {
    fn default() -> Self {
        Self { level: LogLevel::Info, format: LogFormat::Text, dataplane: LogLevel::Off }
    }
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        })
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}
