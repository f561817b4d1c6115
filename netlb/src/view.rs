//! What the API answers and the CLI shows: one set of structs for the wire, for `-o json` and for the tables.
//!
//! Keys are part of `netlb/v1` and never change within it. Numbers are raw, times RFC 3339.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    dataplane::{BackendCounters, Desired, Flow, FlowService, NodeStatus, ServiceStats},
    desired::{Claim, Conflict, Done},
    model::{
        Affinity, Algorithm, Backend, Conditions, Definition, Family, Frontend, Mode, NodePort, Owner, Placement,
        Publish, SnatMode, TrafficPolicy,
    },
    spec::Hints,
};

pub const API_VERSION: &str = "netlb/v1";

/// The envelope lists come in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct List<T> {
    #[schema(example = "netlb/v1")]
    pub api_version: String,
    pub items: Vec<T>,
}

impl<T> List<T> {
    #[must_use]
    pub fn new(items: Vec<T>) -> Self {
        Self { api_version: API_VERSION.to_owned(), items }
    }
}

/// A service with its backends and counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView {
    pub name: String,
    #[schema(value_type = Vec<String>)]
    pub frontends: Vec<Frontend>,
    #[serde(default)]
    #[schema(value_type = Vec<String>, example = json!(["192.0.2.10:80/tcp"]))]
    pub external_ips: Vec<Frontend>,
    #[serde(default)]
    #[schema(value_type = Vec<String>, example = json!(["203.0.113.10:80/tcp"]))]
    pub load_balancer_ips: Vec<Frontend>,
    #[serde(default)]
    #[schema(value_type = Vec<String>, example = json!(["30080/tcp"]))]
    pub node_ports: Vec<NodePort>,
    #[serde(default)]
    #[schema(value_type = Vec<String>, example = json!(["8080:80/tcp"]))]
    pub publish: Vec<Publish>,
    /// The clients of `loadBalancerIps`; without any, all are
    #[serde(default)]
    #[schema(value_type = Vec<String>, example = json!(["198.51.100.0/24"]))]
    pub source_ranges: Vec<IpNet>,
    /// `ipv4` or `ipv6`, of a service that has only ports
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, example = "ipv6")]
    pub family: Option<Family>,
    #[schema(value_type = String)]
    pub algorithm: Algorithm,
    #[schema(value_type = String)]
    pub snat: SnatMode,
    /// `nat` or `dsr`
    #[serde(default)]
    #[schema(value_type = String, example = "nat")]
    pub mode: Mode,
    /// `none` or `client-ip:SECONDS`
    #[serde(default)]
    #[schema(value_type = String, example = "client-ip:10800")]
    pub affinity: Affinity,
    /// `cluster` or `local`
    #[serde(default)]
    #[schema(value_type = String, example = "cluster")]
    pub external_traffic_policy: TrafficPolicy,
    /// `cluster` or `local`
    #[serde(default)]
    #[schema(value_type = String, example = "cluster")]
    pub internal_traffic_policy: TrafficPolicy,
    /// `file` or `api`
    #[schema(value_type = String)]
    pub owner: Owner,
    pub backends: Vec<BackendView>,
    /// Flows since the service was added
    pub flows: u64,
    /// Flows that live now
    pub active_flows: u64,
    pub packets_in: u64,
    pub bytes_in: u64,
    pub packets_out: u64,
    pub bytes_out: u64,
    /// Why the data plane does not have it as it is here
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A backend of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackendView {
    #[schema(value_type = String)]
    pub address: SocketAddr,
    /// 0 for a backend that was removed and still has flows
    pub weight: u16,
    /// `active`, `draining`, or `removed` while it still has flows
    pub state: String,
    /// Whether it takes new flows, if it is `active` too
    #[serde(default = "yes")]
    pub ready: bool,
    /// Whether it keeps its datagrams
    #[serde(default = "yes")]
    pub serving: bool,
    #[serde(default)]
    pub terminating: bool,
    /// The node it is on
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Whose clients it is meant for; nothing, where it is meant for all
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hints: Option<Hints>,
    /// Flows since the backend was added
    pub flows: u64,
    /// Flows that live now
    pub active_flows: u64,
}

const fn yes() -> bool {
    true
}

impl BackendView {
    pub const REMOVED: &str = "removed";

    fn new(backend: &Backend, counters: BackendCounters) -> Self {
        let Placement { node, zone, hint_nodes: nodes, hint_zones: zones } =
            backend.placement.as_deref().cloned().unwrap_or_default();
        let hints = Hints { nodes, zones };
        let Conditions { ready, serving, terminating } = backend.conditions;
        Self {
            address: backend.address,
            weight: backend.weight.get(),
            state: backend.state.to_string(),
            ready,
            serving,
            terminating,
            node,
            zone,
            hints: (hints != Hints::default()).then_some(hints),
            flows: counters.flows,
            active_flows: counters.active,
        }
    }

    /// One of which there are only flows left.
    fn removed(address: SocketAddr, counters: BackendCounters) -> Self {
        let conditions = Conditions { ready: false, serving: false, terminating: true };
        let backend = Backend { conditions, ..Backend::new(address) };
        Self { weight: 0, state: Self::REMOVED.to_owned(), ..Self::new(&backend, counters) }
    }

    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.state == Self::REMOVED
    }

    /// Whether it takes new flows.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.state == "active" && self.ready
    }
}

impl ServiceView {
    #[must_use]
    pub fn new(desired: &Desired, stats: ServiceStats, problem: Option<String>) -> Self {
        let Desired { service, owner } = desired;
        let ServiceStats { service: counters, backends: backend_counters } = stats;
        let by_address: HashMap<SocketAddr, BackendCounters> = backend_counters.iter().copied().collect();
        let mut backends: Vec<_> = service
            .backends()
            .iter()
            .map(|backend| {
                let counters = by_address.get(&backend.address).copied().unwrap_or_default();
                BackendView::new(backend, counters)
            })
            .collect();
        let known: HashSet<_> = service.backends().iter().map(|backend| backend.address).collect();
        let removed =
            backend_counters.iter().filter(|(address, counters)| !known.contains(address) && counters.active > 0);
        backends.extend(removed.map(|(address, counters)| BackendView::removed(*address, *counters)));
        let Definition {
            name: _,
            frontends,
            external_ips,
            load_balancer_ips,
            node_ports,
            publish,
            source_ranges,
            family: _,
            backends: _,
            algorithm,
            snat,
            mode,
            affinity,
            external_traffic_policy,
            internal_traffic_policy,
        } = service.definition();
        Self {
            name: service.name().to_owned(),
            frontends: frontends.clone(),
            external_ips: external_ips.clone(),
            load_balancer_ips: load_balancer_ips.clone(),
            node_ports: node_ports.clone(),
            publish: publish.clone(),
            source_ranges: source_ranges.clone(),
            family: service.family(),
            algorithm: *algorithm,
            snat: *snat,
            mode: *mode,
            affinity: *affinity,
            external_traffic_policy: *external_traffic_policy,
            internal_traffic_policy: *internal_traffic_policy,
            owner: *owner,
            flows: counters.flows,
            active_flows: backends.iter().map(|backend| backend.active_flows).sum(),
            packets_in: counters.packets_in,
            bytes_in: counters.bytes_in,
            packets_out: counters.packets_out,
            bytes_out: counters.bytes_out,
            backends,
            problem,
        }
    }

    /// Backends that take new flows.
    #[must_use]
    pub fn active_backends(&self) -> usize {
        self.backends.iter().filter(|backend| backend.is_active()).count()
    }

    /// Backends that are configured, and not only finishing their flows.
    #[must_use]
    pub fn configured_backends(&self) -> usize {
        self.backends.iter().filter(|backend| !backend.is_removed()).count()
    }
}

/// A connection, seen from its client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FlowView {
    /// Nothing for one that is masqueraded, as with `frontend` and `backend`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    #[schema(value_type = String)]
    pub client: SocketAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub frontend: Option<Frontend>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub backend: Option<SocketAddr>,
    /// `tcp`, `udp`, or `icmp` for echo requests, whose identifier stands for a port
    #[serde(default)]
    pub protocol: String,
    /// The address of the node that it has as its source, where that is not the client
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub source: Option<SocketAddr>,
    /// Whether it is a pod's to the world, and no service's
    #[serde(default)]
    pub masqueraded: bool,
    /// `syn-sent`, `established`, `udp-both-ways`, …
    pub state: String,
    /// Seconds since a packet was last noted (to about four seconds)
    pub idle_seconds: u64,
}

impl From<Flow> for FlowView {
    fn from(Flow { service, client, protocol, source, state, idle_seconds }: Flow) -> Self {
        let masqueraded = service.is_none();
        let (service, frontend, backend) = match service {
            Some(FlowService { name, frontend, backend }) => (Some(name), Some(frontend), Some(backend)),
            None => (None, None, None),
        };
        Self { service, client, frontend, backend, protocol, source, masqueraded, state, idle_seconds }
    }
}

/// A number of flows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FlowCount {
    pub count: u64,
}

/// What a transaction did, or with `dryRun` would do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApplyResult {
    pub dry_run: bool,
    pub created: Vec<String>,
    pub updated: Vec<String>,
    pub unchanged: Vec<String>,
    pub removed: Vec<String>,
}

impl ApplyResult {
    #[must_use]
    pub fn new(Done { created, updated, unchanged, removed }: Done, dry_run: bool) -> Self {
        Self { dry_run, created, updated, unchanged, removed }
    }
}

/// The daemon and its data plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct StatusView {
    pub api_version: String,
    pub version: String,
    pub pid: u32,
    pub started: String,
    pub uptime_seconds: u64,
    pub services: u64,
    pub backends: u64,
    /// Seconds it took to load the data plane at start
    pub load_seconds: f64,
    /// Kernel memory of all maps
    pub kernel_bytes: u64,
    #[serde(default)]
    pub node: NodeView,
    /// `fast` or `stack`
    pub forwarding: String,
    /// The fill of the flow table; a connection takes two entries
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flow_table: Option<MapView>,
    pub maps: Vec<MapView>,
    pub interfaces: Vec<InterfaceView>,
    /// The socket hooks; nothing where no process's calls go through netlb
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<SocketsView>,
    pub counters: Vec<CounterView>,
    pub warnings: Vec<String>,
    /// The last time the configuration file was read
    pub reload: ReloadView,
    /// Services the data plane does not have as they are wanted
    pub out_of_sync: Vec<OutOfSync>,
    /// Claims of one source that another's service stands against
    pub conflicts: Vec<ConflictView>,
}

/// This node: what policies and hints know it by, and the addresses of it that netlb uses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeView {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Where node ports are served
    #[schema(value_type = Vec<String>, example = json!(["192.0.2.1", "2001:db8::1"]))]
    pub node_port_addresses: Vec<IpAddr>,
    /// Those that flows were given as their source
    #[schema(value_type = Vec<String>, example = json!(["192.0.2.1"]))]
    pub snat_addresses: Vec<IpAddr>,
}

impl From<NodeStatus> for NodeView {
    fn from(NodeStatus { name, zone, node_port_addresses, snat_addresses }: NodeStatus) -> Self {
        Self { name, zone, node_port_addresses, snat_addresses }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MapView {
    pub name: String,
    pub entries: u64,
    pub max_entries: u64,
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceView {
    pub name: String,
    pub index: u32,
    /// `pod`, `uplink` or `bridge`
    pub role: String,
    /// `tcx` or `clsact`, or empty where nothing is attached
    pub hook: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SocketsView {
    /// `node` or `all`
    pub scope: String,
    /// The cgroup the hooks are attached to
    pub cgroup: String,
    /// `connect4`, `sendmsg6`, …
    pub hooks: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CounterView {
    pub name: String,
    pub description: String,
    pub value: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReloadView {
    pub file: String,
    pub ok: bool,
    /// What was wrong with the file; the services before it stay
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    pub time: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutOfSync {
    pub service: String,
    pub problem: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConflictView {
    pub service: String,
    #[schema(value_type = String)]
    pub owner: Owner,
    /// The frontend that two services claim; without one, it is the name
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub frontend: Option<Frontend>,
    pub held_by: String,
    #[schema(value_type = String)]
    pub held_by_owner: Owner,
}

impl From<&Conflict> for ConflictView {
    fn from(conflict: &Conflict) -> Self {
        Self {
            service: conflict.service.clone(),
            owner: conflict.owner,
            frontend: match conflict.claim {
                Claim::Name => None,
                Claim::Frontend(frontend) => Some(frontend),
            },
            held_by: conflict.held_by.clone(),
            held_by_owner: conflict.held_by_owner,
        }
    }
}

/// An error, in the shape the API answers it and `-o json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ErrorView {
    pub error: ErrorBody,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    #[schema(example = "not_found")]
    pub code: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}
