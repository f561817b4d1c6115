//! What the control loop asks of the data plane, as a trait, so that the API, the CLI and their tests run without a kernel.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::model::{Frontend, Owner, Service};

/// A service that is wanted, and the source that wants it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Desired {
    pub service: Arc<Service>,
    pub owner: Owner,
}

/// What is wanted of one name now: a service, or none.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Touched {
    pub name: String,
    pub wanted: Option<Desired>,
}

/// What became of one [`Dataplane::apply`] or [`Dataplane::apply_touched`]. Services that failed keep what they had before.
#[derive(Clone, Debug, Default)]
pub struct ApplyReport {
    /// Service name and what went wrong with it.
    pub failed: Vec<(String, ApplyError)>,
    /// Services added, changed or removed.
    pub changed: usize,
    pub took: Duration,
}

/// Why a service could not be programmed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ApplyError {
    #[error("map {map} is full ({size} entries); raise `{option}` in the configuration file and restart netlb")]
    MapFull { map: &'static str, size: u64, option: &'static str },
    /// The service is served without it.
    #[error("{frontend} is not served: it belongs to service {holder}, which names that address")]
    Held { frontend: Frontend, holder: String },
    #[error("{0}")]
    Kernel(String),
}

impl ApplyError {
    /// Whether the service is as it is wanted to be, but for what another one has.
    #[must_use]
    pub const fn is_partial(&self) -> bool {
        matches!(self, Self::Held { .. })
    }
}

/// Packets and bytes, client to backend (`in`) and back (`out`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct ServiceCounters {
    pub flows: u64,
    pub packets_in: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub bytes_out: u64,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct BackendCounters {
    /// Flows sent to the backend since it was added.
    pub flows: u64,
    /// Flows that live now.
    pub active: u64,
}

/// The counters of one service and of its backends, those that still drain after their removal included.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ServiceStats {
    pub service: ServiceCounters,
    pub backends: Vec<(SocketAddr, BackendCounters)>,
}

/// One connection, seen from its client.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// Nothing for one that is masqueraded, which is no service's.
    pub service: Option<FlowService>,
    pub client: SocketAddr,
    /// `tcp`, `udp`, or `icmp` for echo requests, whose identifier stands for a port.
    pub protocol: String,
    /// The address of the node that it has as its source, where that is not the client.
    pub source: Option<SocketAddr>,
    /// `syn-sent`, `established`, `udp-both-ways`, …
    pub state: String,
    /// Seconds since a packet was last noted (to about four seconds).
    pub idle_seconds: u64,
}

impl Flow {
    #[must_use]
    pub fn service_name(&self) -> Option<&str> {
        self.service.as_ref().map(|service| service.name.as_str())
    }
}

/// Between which ends of a service a flow is.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct FlowService {
    pub name: String,
    pub frontend: Frontend,
    pub backend: SocketAddr,
}

/// Which flows a listing or a flush means.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct FlowFilter {
    /// Service name.
    pub service: Option<String>,
}

/// A counter of the data plane: verdict reasons and events.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct Counter {
    pub name: String,
    pub description: String,
    pub value: u64,
}

#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct MapStatus {
    pub name: String,
    pub entries: u64,
    pub max_entries: u64,
    pub bytes: u64,
}

#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub name: String,
    pub index: u32,
    /// `pod`, `uplink` or `bridge`.
    pub role: String,
    /// `tcx` or `clsact`, or empty where nothing is attached.
    pub hook: String,
    /// Why nothing is attached, where that is so.
    pub problem: Option<String>,
}

/// The socket hooks.
#[derive(Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub struct SocketsStatus {
    /// `node` or `all`.
    pub scope: String,
    /// The cgroup they are attached to.
    pub cgroup: String,
    /// `connect4`, `sendmsg6`, …
    pub hooks: Vec<String>,
}

/// The node, as the data plane knows it.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub name: String,
    pub zone: Option<String>,
    /// Where node ports are served.
    pub node_port_addresses: Vec<IpAddr>,
    /// Those that flows were given as their source.
    pub snat_addresses: Vec<IpAddr>,
}

/// What the data plane says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataplaneStatus {
    pub node: NodeStatus,
    pub forwarding: String,
    pub interfaces: Vec<InterfaceStatus>,
    /// None where no process's calls go through netlb.
    pub sockets: Option<SocketsStatus>,
    pub maps: Vec<MapStatus>,
    pub counters: Vec<Counter>,
    /// Things an operator should look at: globs that match nothing, `ip_forward = 0`, …
    pub warnings: Vec<String>,
    /// Seconds it took to load everything from nothing at start.
    pub load_seconds: f64,
    /// Bytes of kernel memory in all maps.
    pub kernel_bytes: u64,
}

/// The data plane as the control loop sees it. Calls block; the daemon runs them off its event loop.
pub trait Dataplane: Send {
    /// Makes the data plane serve exactly these services. Idempotent; a failure stays with its service.
    fn apply(&mut self, desired: &[Desired]) -> ApplyReport;
    /// To be called once, after the first apply: from here on packets see what is served. An error ends the start.
    fn begin(&mut self) -> anyhow::Result<()> {
        Ok(())
    }
    /// As [`apply`](Self::apply) for some services: all others stay as they are, and cost nothing.
    fn apply_touched(&mut self, touched: &[Touched]) -> ApplyReport;
    /// The counters of the services with these names, in their order; unknown names give zeroes.
    fn stats(&self, services: &[&str]) -> Vec<ServiceStats>;
    /// The same for the answer to a change: flows may be counted as they were a second ago.
    fn recent_stats(&mut self, services: &[&str]) -> Vec<ServiceStats> {
        self.stats(services)
    }
    fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<Flow>;
    fn count_flows(&self, filter: &FlowFilter) -> u64;
    /// Removes flows and says how many they were.
    fn flush_flows(&mut self, filter: &FlowFilter) -> u64;
    fn status(&self) -> DataplaneStatus;
    /// Called about once a second: expired flows, drained backends. Services that are others now, because the node's addresses changed,
    /// are programmed again.
    fn tick(&mut self) -> ApplyReport;
}
