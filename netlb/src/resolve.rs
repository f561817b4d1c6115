//! What a service is on this node: the addresses it is served at, and which backends take the flows of which clients.
//!
//! Pure. The rules are those of Kubernetes' Services; where its modes differ, of its nftables mode.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::model::{Backend, BackendState, Frontend, NodePort, Publish, Service, SnatMode, TrafficPolicy};

/// What is known of this node.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Node {
    pub name: String,
    pub zone: Option<String>,
    /// The addresses that node ports are served at.
    pub node_port_addresses: Vec<IpAddr>,
    /// All addresses that other hosts reach the node by: what is published is served at them.
    pub addresses: Vec<IpAddr>,
    /// Whether the node's own processes are served at their calls, and so at loopback addresses.
    pub serves_sockets: bool,
}

/// A service on this node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Resolved<'a> {
    pub frontends: Vec<ResolvedFrontend>,
    /// Those of the whole cluster that take new flows, and of this node: what policies choose from.
    pub cluster: Vec<&'a Backend>,
    pub local: Vec<&'a Backend>,
    /// Keep the flows they have and get no new ones, but for those that are the last resort of a set.
    pub draining: Vec<&'a Backend>,
    /// Whether any backend of the service keeps its datagrams. Where none does, they are left where they are.
    pub has_serving: bool,
    /// Whether the node itself is a client that the source ranges let in.
    pub ranges_have_node: bool,
}

/// Whose backends take flows.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Set {
    Cluster,
    Local,
}

/// An address that a service is served at.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ResolvedFrontend {
    pub frontend: Frontend,
    pub kind: Kind,
    /// For clients on this node.
    pub inside: Rule,
    /// For others, where that differs.
    pub outside: Option<Rule>,
}

/// What kind of address it is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Kind {
    Cluster,
    External,
    LoadBalancer,
    /// An address of the node, with a node port or a published one.
    Node,
}

/// How new flows are treated.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Rule {
    pub set: Set,
    pub snat: Snat,
}

/// Which of them get an address of the node as their source.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Snat {
    /// Those whose replies would not come back here.
    Auto,
    Never,
    /// Those of pods, of others, or of both, whatever their way back.
    Always {
        pods: bool,
        outside: bool,
    },
}

impl<'a> Resolved<'a> {
    #[must_use]
    pub fn new(service: &'a Service, node: &Node) -> Self {
        let backends = service.backends();
        let is_local = |backend: &&Backend| backend.is_on(&node.name);
        Self {
            frontends: frontends(service, node),
            cluster: or_last_resort(for_this_node(backends, node), || backends.iter()),
            local: or_last_resort(
                backends.iter().filter(|backend| backend.is_ready()).filter(is_local).collect(),
                || backends.iter().filter(is_local),
            ),
            draining: backends.iter().filter(|backend| keeps_flows_only(backend)).collect(),
            has_serving: backends.iter().any(|backend| backend.conditions.serving),
            ranges_have_node: {
                let ranges = &service.definition().source_ranges;
                ranges.iter().any(|range| node.addresses.iter().any(|address| range.contains(address)))
            },
        }
    }

    #[must_use]
    pub fn set(&self, set: Set) -> &[&'a Backend] {
        match set {
            Set::Cluster => &self.cluster,
            Set::Local => &self.local,
        }
    }

    /// Whether a packet that finds a set empty is dropped: there are backends, but none its client may have. Else it is rejected.
    #[must_use]
    pub fn drops(&self, set: Set) -> bool {
        self.set(set).is_empty() && !(self.cluster.is_empty() && self.local.is_empty())
    }
}

const fn keeps_flows_only(backend: &Backend) -> bool {
    matches!(backend.state, BackendState::Draining) || (!backend.is_ready() && backend.conditions.serving)
}

/// The ready backends that are meant for clients of this node: hints count if every backend has them and one names us.
fn for_this_node<'a>(backends: &'a [Backend], node: &Node) -> Vec<&'a Backend> {
    let ready = || backends.iter().filter(|backend| backend.is_ready());
    let by_hint = |hints: fn(&Backend) -> &[String], name: &str| {
        let is_meant = |backend: &&Backend| hints(backend).iter().any(|hint| hint == name);
        let counts = ready().all(|backend| !hints(backend).is_empty()) && ready().any(|backend| is_meant(&backend));
        counts.then(|| ready().filter(is_meant).collect())
    };
    by_hint(hint_nodes, &node.name)
        .or_else(|| by_hint(hint_zones, node.zone.as_deref()?))
        .unwrap_or_else(|| ready().collect())
}

fn hint_nodes(backend: &Backend) -> &[String] {
    backend.placement.as_ref().map_or(&[], |placement| &placement.hint_nodes)
}

fn hint_zones(backend: &Backend) -> &[String] {
    backend.placement.as_ref().map_or(&[], |placement| &placement.hint_zones)
}

/// These, or where there are none, those that are on their way out and answer still.
fn or_last_resort<'a, I: Iterator<Item = &'a Backend>>(
    ready: Vec<&'a Backend>,
    all: impl FnOnce() -> I,
) -> Vec<&'a Backend> {
    if ready.is_empty() { all().filter(|backend| backend.is_last_resort()).collect() } else { ready }
}

/// Where a service is reached on a node.
#[must_use]
pub fn frontends(service: &Service, node: &Node) -> Vec<ResolvedFrontend> {
    let definition = service.definition();
    let internal = rules(Kind::Cluster, service);
    let external = rules(Kind::External, service);
    let listed = [
        (&definition.frontends, Kind::Cluster, internal),
        (&definition.external_ips, Kind::External, external),
        (&definition.load_balancer_ips, Kind::LoadBalancer, external),
    ];
    let mut all = Vec::with_capacity(definition.frontends.len());
    for (frontends, kind, (inside, outside)) in listed {
        all.extend(frontends.iter().map(|frontend| ResolvedFrontend { frontend: *frontend, kind, inside, outside }));
    }
    let mut on_node = |NodePort { port, protocol }, address: IpAddr| {
        let frontend = Frontend { address: SocketAddr::new(address, port.get()), protocol };
        let (inside, outside) = external;
        if !all.iter().any(|known: &ResolvedFrontend| known.frontend == frontend) {
            all.push(ResolvedFrontend { frontend, kind: Kind::Node, inside, outside });
        }
    };
    let is_ours = |address: &&IpAddr| address.is_ipv6() == service.is_v6();
    let loopback = if service.is_v6() { IpAddr::from(Ipv6Addr::LOCALHOST) } else { Ipv4Addr::LOCALHOST.into() };
    for port in &definition.node_ports {
        let addresses = node.node_port_addresses.iter().filter(is_ours).copied();
        addresses.chain(node.serves_sockets.then_some(loopback)).for_each(|address| on_node(*port, address));
    }
    for Publish { address, port, .. } in &definition.publish {
        match address {
            Some(address) => on_node(*port, *address),
            None => {
                let addresses = node.addresses.iter().filter(is_ours).copied();
                addresses.chain(node.serves_sockets.then_some(loopback)).for_each(|address| on_node(*port, address));
            }
        }
    }
    all
}

/// The rules for clients on this node, and for others where they differ.
fn rules(kind: Kind, service: &Service) -> (Rule, Option<Rule>) {
    let definition = service.definition();
    let snat = |pods| match definition.snat {
        SnatMode::Auto => Snat::Auto,
        SnatMode::Never => Snat::Never,
        SnatMode::Always => Snat::Always { pods, outside: true },
    };
    match (kind, definition.internal_traffic_policy, definition.external_traffic_policy) {
        (Kind::Cluster, TrafficPolicy::Cluster, _) => (Rule { set: Set::Cluster, snat: snat(false) }, None),
        (Kind::Cluster, TrafficPolicy::Local, _) => (Rule { set: Set::Local, snat: snat(false) }, None),
        (_, _, TrafficPolicy::Cluster) => (Rule { set: Set::Cluster, snat: snat(true) }, None),
        // Clients on this node reach all backends with their own address. Those outside came to this node for a backend that sees theirs.
        (_, _, TrafficPolicy::Local) => {
            let inside = if definition.snat == SnatMode::Never { Snat::Never } else { Snat::Auto };
            (Rule { set: Set::Cluster, snat: inside }, Some(Rule { set: Set::Local, snat: Snat::Never }))
        }
    }
}

#[cfg(test)]
mod tests;
