//! Keeps what is attached in step with the interfaces there are.

use std::collections::BTreeMap;

use netlb_common::maps::Interface;

use super::{
    Attached, Hooks, Status,
    facts::{Address, Facts},
    link::{Kind, Link, Role, Routing, announcement, problem, role},
};
use crate::{
    config::{Glob, Node},
    dataplane::InterfaceStatus,
};

pub(super) struct Follower {
    node: Node,
    hooks: Box<dyn Hooks>,
    /// All interfaces, by index.
    links: BTreeMap<u32, Link>,
    addresses: Vec<Address>,
    /// Whether routing asks for nothing but where a packet goes and where it came in.
    routing: Routing,
    /// Those that match.
    matching: BTreeMap<u32, Matching>,
}

/// An interface that matches a pattern.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Matching {
    role: Role,
    announced: Interface,
    outcome: Outcome,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Outcome {
    Attached(Attached),
    /// Tried again after a while.
    Failed(String),
    /// Not even tried.
    Refused(&'static str),
}

/// Whether to look at what is in order as well.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Effort {
    IfChanged,
    Verify,
}

impl Follower {
    pub(super) fn new(node: Node, hooks: Box<dyn Hooks>) -> Self {
        Self {
            node,
            hooks,
            links: BTreeMap::new(),
            addresses: Vec::new(),
            routing: Routing::default(),
            matching: BTreeMap::new(),
        }
    }

    /// Goes by a new list of all interfaces. Programs that something took off an interface are put back, and what an earlier daemon left
    /// on interfaces that no longer match is removed.
    pub(super) fn replace(&mut self, links: Vec<Link>) {
        self.links = links.into_iter().map(|link| (link.index, link)).collect();
        for index in self.links.keys().copied().collect::<Vec<_>>() {
            self.settle(index, Effort::Verify);
        }
        let mut stale = self.hooks.known();
        stale.extend(self.matching.keys());
        for index in stale {
            if !self.links.contains_key(&index) || !self.matching.contains_key(&index) {
                self.take_off(index);
            }
        }
    }

    /// Goes by a new list of all addresses.
    pub(super) fn set_addresses(&mut self, addresses: Vec<Address>) {
        self.addresses = addresses;
    }

    /// What routing goes by may have changed.
    pub(super) fn set_routing(&mut self, routing: Routing) {
        if self.routing == routing {
            return;
        }
        self.routing = routing;
        for index in self.matching.keys().copied().collect::<Vec<_>>() {
            self.settle(index, Effort::IfChanged);
        }
    }

    pub(super) fn facts(&self) -> Facts {
        Facts::new(&self.node, &self.links, &self.addresses)
    }

    /// An interface is there, or has changed.
    pub(super) fn change(&mut self, link: Link) {
        let index = link.index;
        let old = self.links.insert(index, link);
        let link = &self.links[&index];
        if old.as_ref() == Some(link) {
            return;
        }
        let is_or_was_bridge = link.kind == Kind::Bridge || old.is_some_and(|old| old.kind == Kind::Bridge);
        self.settle(index, Effort::IfChanged);
        if is_or_was_bridge {
            self.settle_ports(index);
        }
    }

    /// An interface is gone.
    pub(super) fn remove(&mut self, index: u32) {
        let Some(link) = self.links.remove(&index) else { return };
        if self.matching.contains_key(&index) {
            tracing::debug!(interface = link.name, "interface gone");
            self.take_off(index);
        }
        if link.kind == Kind::Bridge {
            self.settle_ports(index);
        }
    }

    /// Tries again what failed.
    pub(super) fn retry(&mut self) {
        let failed: Vec<_> = self
            .matching
            .iter()
            .filter_map(|(index, matching)| matches!(matching.outcome, Outcome::Failed(_)).then_some(*index))
            .collect();
        for index in failed {
            self.settle(index, Effort::IfChanged);
        }
    }

    /// The pairs whose other end this was, or was said to be: it may have gone to another network namespace, of which the kernel tells the
    /// end that stays nothing.
    pub(super) fn peers_of_gone(&self, index: u32) -> Vec<u32> {
        self.pairs().filter(|link| !link.peer_is_elsewhere && link.peer == Some(index)).map(|link| link.index).collect()
    }

    /// The other end of a pair that has come here.
    pub(super) fn peers_of_changed(&self, link: &Link) -> Vec<u32> {
        let is_here = link.kind == Kind::Pair && !link.peer_is_elsewhere;
        self.pairs()
            .filter(|other| is_here && link.peer == Some(other.index) && other.peer_is_elsewhere)
            .map(|other| other.index)
            .collect()
    }

    fn pairs(&self) -> impl Iterator<Item = &Link> {
        self.links.values().filter(|link| link.kind == Kind::Pair)
    }

    fn settle_ports(&mut self, bridge: u32) {
        let is_port = |link: &&Link| link.master == Some(bridge);
        for port in self.links.values().filter(is_port).map(|port| port.index).collect::<Vec<_>>() {
            self.settle(port, Effort::IfChanged);
        }
    }

    /// Brings one interface in step.
    fn settle(&mut self, index: u32, effort: Effort) {
        let Some(link) = self.links.get(&index) else { return };
        let master = link.master.and_then(|master| self.links.get(&master));
        let Some(role) = role(&self.node, link, master) else {
            if self.matching.contains_key(&index) {
                tracing::info!(interface = link.name, "interface no longer matches, detached");
                self.take_off(index);
            }
            return;
        };
        let announced = announcement(link, master, role, self.routing);
        let before = self.matching.get(&index);
        let is_same = before
            .is_some_and(|before| before.announced == announced && matches!(before.outcome, Outcome::Attached(_)));
        let name = link.name.clone();
        let outcome = if let Some(problem) = problem(link, role) {
            if before.is_some_and(|before| !matches!(before.outcome, Outcome::Refused(_))) {
                self.take_off(index);
            }
            Outcome::Refused(problem)
        } else if is_same && effort == Effort::IfChanged {
            return;
        } else {
            self.put_on(index, announced)
        };
        let before = self.matching.insert(index, Matching { role, announced, outcome: outcome.clone() });
        if before.is_none_or(|before| before.outcome != outcome || before.role != role) {
            let role = role.name();
            match outcome {
                Outcome::Attached(Attached { hook, problem }) => {
                    tracing::info!(interface = name, index, role, hook, "attached");
                    if let Some(problem) = problem {
                        tracing::warn!(interface = name, index, role, "attached in part: {problem}");
                    }
                }
                Outcome::Failed(problem) => tracing::warn!(interface = name, index, role, "not attached: {problem}"),
                Outcome::Refused(problem) => tracing::warn!(interface = name, index, role, "not attached: {problem}"),
            }
        }
    }

    /// The programs find what an interface is before they run on it.
    fn put_on(&mut self, index: u32, interface: Interface) -> Outcome {
        match self.hooks.announce(index, interface).and_then(|()| self.hooks.attach(index)) {
            Ok(attached) => Outcome::Attached(attached),
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }

    /// Routes or neighbours have changed.
    pub(super) fn forget_ways(&mut self) {
        self.hooks.forget_ways();
    }

    fn take_off(&mut self, index: u32) {
        self.matching.remove(&index);
        let detached = self.hooks.detach(index);
        if let Err(error) = detached.and_then(|()| self.hooks.withdraw(index)) {
            tracing::warn!("cannot detach from interface {index}: {error}");
        }
    }

    pub(super) fn status(&self) -> Status {
        let status = |(index, matching): (&u32, &Matching)| InterfaceStatus {
            name: self.links.get(index).map(|link| link.name.clone()).unwrap_or_default(),
            index: *index,
            role: matching.role.name().to_owned(),
            hook: match &matching.outcome {
                Outcome::Attached(attached) => attached.hook.to_owned(),
                _ => String::new(),
            },
            problem: match &matching.outcome {
                Outcome::Attached(attached) => attached.problem.clone(),
                Outcome::Failed(problem) => Some(problem.clone()),
                Outcome::Refused(problem) => Some((*problem).to_owned()),
            },
        };
        Status {
            interfaces: self.matching.iter().map(status).collect(),
            warnings: self.unmatched(),
            facts: self.facts(),
        }
    }

    /// Patterns that nothing matches: perhaps misspelled, perhaps early.
    fn unmatched(&self) -> Vec<String> {
        let Node { pod_interfaces, uplinks, bridges, .. } = &self.node;
        let of = |option: &'static str, globs: &[Glob]| {
            let is_unmatched = |glob: &&Glob| !self.links.values().any(|link| glob.matches(&link.name));
            let warning = |glob: &Glob| format!("no interface matches \"{glob}\" of node.{option}");
            globs.iter().filter(is_unmatched).map(warning).collect::<Vec<_>>()
        };
        [of("uplinks", uplinks), of("pod_interfaces", pod_interfaces), of("bridges", bridges)].concat()
    }
}

#[cfg(test)]
mod tests;
