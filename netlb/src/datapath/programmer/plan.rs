//! What a service comes to on this node, before any of it is written.

use netlb_common::maps::{Backend, Config};

use super::*;
use crate::{
    model::{self, Mode},
    resolve::{Kind, Node, Resolved, ResolvedFrontend, Rule, Set, Snat},
};

/// A service that is to be programmed.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) service: &'a Arc<Service>,
    /// Without the frontends that are held.
    pub(super) resolved: Resolved<'a>,
    /// Addresses of the node that another service names, which has them.
    pub(super) held: Vec<Held>,
}

/// A frontend that another service has.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Held {
    pub(super) frontend: Frontend,
    pub(super) by: String,
}

/// The backends of one set, with their ring.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) members: Members,
    pub(super) ring: Arc<[u16]>,
}

/// The pools of a service: one where it uses one set, or where both are the same.
#[derive(Debug)]
pub(super) struct Pools {
    pub(super) all: Vec<Pool>,
    /// Which of them is for the local set; the first is for the other.
    local: usize,
}

impl Pools {
    pub(super) const fn number(&self, set: Set) -> usize {
        match set {
            Set::Cluster => 0,
            Set::Local => self.local,
        }
    }
}

impl<'a> Plan<'a> {
    pub(super) fn new(service: &'a Arc<Service>, node: &Node) -> Self {
        Self { service, resolved: Resolved::new(service, node), held: Vec::new() }
    }

    /// Takes away the frontends that others hold.
    pub(super) fn yield_to(&mut self, holder: impl Fn(&EndpointKey) -> Option<String>) {
        let Self { service, resolved, held, .. } = self;
        resolved.frontends.retain(|ResolvedFrontend { frontend, kind, .. }| {
            if *kind != Kind::Node || names(service, frontend) {
                return true;
            }
            let Some(by) = holder(&frontend_key(frontend)) else { return true };
            held.push(Held { frontend: *frontend, by });
            false
        });
    }

    pub(super) fn uses(&self, set: Set) -> bool {
        let mut frontends = self.resolved.frontends.iter();
        frontends.any(|frontend| frontend.inside.set == set || frontend.outside.is_some_and(|rule| rule.set == set))
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = EndpointKey> {
        self.resolved.frontends.iter().map(|frontend| frontend_key(&frontend.frontend))
    }

    /// The protocols of its frontends.
    pub(super) fn protocols(&self) -> impl Iterator<Item = u8> {
        let has =
            |protocol: &Protocol| self.resolved.frontends.iter().any(|known| known.frontend.protocol == *protocol);
        [Protocol::Tcp, Protocol::Udp].into_iter().filter(has).map(Protocol::number)
    }

    /// The addresses that are services', each once.
    pub(super) fn addresses(&self) -> Vec<Addr> {
        let of_services = self.resolved.frontends.iter().filter(|frontend| frontend.kind != Kind::Node);
        let mut addresses: Vec<_> = of_services.map(|frontend| frontend_key(&frontend.frontend).addr).collect();
        addresses.sort_unstable_by_key(|addr| addr.0);
        addresses.dedup();
        addresses
    }

    /// The networks of clients of load-balancer addresses; none, if all are.
    pub(super) fn ranges(&self) -> Vec<Range> {
        let definition = self.service.definition();
        if definition.source_ranges.is_empty() {
            return Vec::new();
        }
        let mut ranges: Vec<_> = definition.source_ranges.iter().map(|net| Range::new(*net)).collect();
        if self.resolved.ranges_have_node {
            ranges.extend(definition.load_balancer_ips.iter().map(|frontend| Range::new(frontend.address.ip().into())));
        }
        ranges.sort_unstable();
        ranges.dedup();
        ranges
    }

    /// Ticks for which a client keeps its backend, or 0.
    pub(super) fn affinity(&self) -> u32 {
        let seconds = self.service.definition().affinity.seconds();
        seconds.map_or(0, |seconds| ticks_from_seconds(seconds.get().into()) as u32)
    }

    /// What a frontend's record says of flows under a rule.
    pub(super) fn config_flags(&self, frontend: &ResolvedFrontend, rule: Rule, key: &EndpointKey) -> u32 {
        let mut flags = match rule.snat {
            Snat::Auto => 0,
            Snat::Never => Config::SNAT_NEVER,
            Snat::Always { pods, outside } => if_so(pods, Config::SNAT_PODS) | if_so(outside, Config::SNAT_OUTSIDE),
        };
        flags |= if_so(key.scope == 0 && frontend.outside.is_some(), Config::OUTSIDE);
        if frontend.kind == Kind::LoadBalancer && !self.service.definition().source_ranges.is_empty() {
            flags |= Config::RANGES | if_so(self.resolved.ranges_have_node, Config::RANGES_HAVE_NODE);
        }
        flags |= if_so(frontend.kind == Kind::Node, Config::NODE);
        // The backend's node does not know this one's addresses for the service's.
        flags |= if_so(self.service.definition().mode == Mode::Dsr && frontend.kind != Kind::Node, Config::DSR);
        flags | if_so(self.resolved.drops(rule.set), Config::DROP) | if_so(rule.set == Set::Local, Config::LOCAL)
    }

    /// By backend of the service: see [`Backend::SERVING`] and those after it.
    pub(super) fn backend_flags(&self, node: &Node) -> Vec<u8> {
        let set = |set| if self.uses(set) { self.resolved.set(set) } else { &[] }.iter().peekable();
        let (mut cluster, mut local) = (set(Set::Cluster), set(Set::Local));
        let flags = self.service.backends().iter().map(|backend| {
            // Sets are in the order of the backends.
            let in_cluster = cluster.next_if(|next| std::ptr::eq(**next, backend)).is_some();
            let in_local = local.next_if(|next| std::ptr::eq(**next, backend)).is_some();
            let accepts = in_cluster || in_local;
            // Who is given flows though he is said not to serve has to keep them.
            let serves = backend.conditions.serving || accepts;
            (if accepts { Backend::ACCEPTING } else { 0 })
                | (if accepts && !in_cluster && self.uses(Set::Cluster) { Backend::ONLY_LOCAL } else { 0 })
                | (if serves { Backend::SERVING } else { 0 })
                | (if backend.is_on(&node.name) { Backend::LOCAL } else { 0 })
        });
        flags.collect()
    }

    fn members(&self, set: Set, node: &Node) -> Members {
        let draining = self.resolved.draining.iter().copied();
        let belongs = |backend: &&model::Backend| set == Set::Cluster || backend.is_on(&node.name);
        Members::new(self.resolved.set(set).iter().copied(), draining.filter(belongs))
    }
}

/// The members and the rings of each service.
pub(super) fn pools(plans: &[&Plan<'_>], node: &Node) -> Vec<Pools> {
    let mut members = Vec::with_capacity(plans.len());
    let mut counts = Vec::with_capacity(plans.len());
    for plan in plans {
        let before = members.len();
        let uses_local = plan.uses(Set::Local);
        if plan.uses(Set::Cluster) || !uses_local {
            members.push(plan.members(Set::Cluster, node));
        }
        if uses_local {
            let local = plan.members(Set::Local, node);
            if members.len() == before || members.last() != Some(&local) {
                members.push(local);
            }
        }
        counts.push(members.len() - before);
    }
    let algorithms = plans.iter().zip(&counts).flat_map(|(plan, count)| [plan.service.algorithm()].repeat(*count));
    let jobs: Vec<_> = members.iter().zip(algorithms).collect();
    let rings = maglev::rings(&jobs);
    let mut built = members.into_iter().zip(rings).map(|(members, ring)| Pool { members, ring });
    counts.into_iter().map(|count| Pools { all: built.by_ref().take(count).collect(), local: count - 1 }).collect()
}

/// Whether a service itself names a frontend, rather than a port of the node.
pub(super) fn names(service: &Service, frontend: &Frontend) -> bool {
    service.claims().any(|claim| claim == *frontend)
}

/// Whether the node's addresses are among a service's.
pub(super) fn is_on_node(service: &Service) -> bool {
    let definition = service.definition();
    !definition.node_ports.is_empty() || definition.publish.iter().any(|publish| publish.address.is_none())
}

const fn if_so(condition: bool, flag: u32) -> u32 {
    if condition { flag } else { 0 }
}

pub(super) const fn base(key: EndpointKey) -> EndpointKey {
    EndpointKey { scope: 0, ..key }
}

pub(super) const fn outside(key: EndpointKey) -> EndpointKey {
    EndpointKey { scope: EndpointKey::OUTSIDE, ..key }
}
