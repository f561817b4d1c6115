//! Sockets of processes: a service's address is exchanged for a backend's when a process names it, so that no packet is ever translated.
//!
//! The choice is made once, by the same rings as for packets. What was chosen is remembered by the socket's cookie, from both ends: the
//! backend for a frontend, so that the datagrams of an unconnected socket stay together; and the frontend for a backend, so that the
//! process is shown the address it named. Entries may be forgotten: then the choice is made again, or a process sees the backend.

use crate::{
    addr::{Addr, PortBe},
    balance::{self, OFFERS, Tables, Unclaimed},
    counters::Counter,
    maps::{
        Affinity, AffinityKey, Backend, Config, Counterpart, EndpointKey, NodePortKey, SocketKey, algorithm, family,
    },
    select,
    time::Ticks,
    wire::udp,
};

/// What is known of sockets.
pub trait Sockets {
    fn get(&self, key: &SocketKey) -> Option<Counterpart>;
    fn set(&self, key: &SocketKey, value: &Counterpart);
    fn forget(&self, key: &SocketKey);
    /// Counts a choice.
    fn count(&self, service: u32, backend: u32);
    /// Counts something else.
    fn count_event(&self, counter: Counter);
}

/// What becomes of an address that a process named.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// None of ours.
    Untouched,
    /// A backend's is put in its place.
    Exchanged,
    /// It is a service's of which no backend takes any, or that has no such port.
    Nobody,
    /// The service does not let this node in, or has no backend for it that its policy allows; or nobody has the address.
    Forbidden,
}

/// Who calls, and when.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Of the socket.
    pub cookie: u64,
    /// Whether the socket is of the node's own network namespace.
    pub is_node: bool,
    pub now: Ticks,
}

/// What the policy of a service says to a call, if it says anything.
#[inline(always)]
fn policy(config: &Config, caller: &Caller) -> Option<Outcome> {
    // Which address the packets of a pod's socket will have is not known here, and another cannot be given to them: the packets' path does.
    if !caller.is_node && (config.flags & (Config::RANGES | Config::SNAT_PODS) != 0 || balance::goes_by_client(config))
    {
        return Some(Outcome::Untouched);
    }
    // A pod's loopback addresses are its own.
    if !caller.is_node && config.key.addr.is_loopback() {
        return Some(Outcome::Untouched);
    }
    if config.flags & Config::RANGES != 0 && config.flags & Config::RANGES_HAVE_NODE == 0 {
        return Some(Outcome::Forbidden);
    }
    if config.ring_len == 0 && config.flags & Config::DROP != 0 {
        return Some(Outcome::Forbidden);
    }
    None
}

/// What becomes of an address that no service has. In the networks that are services' or nobody's the node's processes are told by their
/// calls what others are told by their packets: what the node sends is looked at nowhere else.
#[inline(always)]
fn unclaimed<T: Tables>(tables: T, caller: &Caller, named: &EndpointKey) -> Outcome {
    if !caller.is_node {
        return Outcome::Untouched;
    }
    match balance::unclaimed(&tables, named.addr) {
        Unclaimed::Elsewhere => Outcome::Untouched,
        Unclaimed::Service => Outcome::Nobody,
        Unclaimed::Nobody => Outcome::Forbidden,
    }
}

/// A process connects a socket. `backend` is filled in for [`Outcome::Exchanged`].
#[inline(always)]
pub fn connect<T: Tables>(
    tables: T,
    sockets: &impl Sockets,
    caller: &Caller,
    named: &EndpointKey,
    backend: &mut Counterpart,
) -> Outcome {
    match balance::in_force(&tables, named) {
        Some((_, config)) => match policy(config, caller) {
            Some(outcome) => outcome,
            None => choose(tables, sockets, caller, named, config, backend),
        },
        None => {
            // If the socket had this backend from a service before, it is the backend itself that is meant now.
            sockets.forget(&SocketKey::new(caller.cookie, named.addr, named.port, SocketKey::BACKEND));
            unclaimed(tables, caller, named)
        }
    }
}

/// A process sends a datagram to an address. `backend` is filled in for [`Outcome::Exchanged`].
#[inline(always)]
pub fn send<T: Tables>(
    tables: T,
    sockets: &impl Sockets,
    caller: &Caller,
    named: &EndpointKey,
    backend: &mut Counterpart,
) -> Outcome {
    let Some((_, config)) = balance::in_force(&tables, named) else { return unclaimed(tables, caller, named) };
    let refusal = policy(config, caller);
    if let Some(Outcome::Untouched) = refusal {
        return Outcome::Untouched;
    }
    // Whom it is talking to already it keeps, whatever is refused to others since.
    let frontend_end = SocketKey::new(caller.cookie, named.addr, named.port, SocketKey::FRONTEND);
    if let Some(known) = sockets.get(&frontend_end)
        && tables.backend(known.backend).is_some_and(|backend| still_serves(backend, &known, config, named))
    {
        *backend = known;
        let backend_end = SocketKey::new(caller.cookie, known.addr, known.port, SocketKey::BACKEND);
        // The two may have been used unlike, and one forgotten.
        if sockets.get(&backend_end).is_none() {
            sockets.set(&backend_end, &shown(named, known.backend));
        }
        return Outcome::Exchanged;
    }
    match refusal {
        Some(outcome) => outcome,
        None => choose(tables, sockets, caller, named, config, backend),
    }
}

/// Whether a backend is the one that was chosen, and has its flows still. A socket holds no id of a backend, so that it may be another's.
#[inline(always)]
fn still_serves(backend: &Backend, known: &Counterpart, config: &Config, named: &EndpointKey) -> bool {
    backend.flags & Backend::SERVING != 0
        && backend.service == config.service
        && backend.addr == known.addr
        && backend.port == known.port
        && backend.protocol == named.protocol
}

/// What a process is shown in a backend's place.
#[inline(always)]
const fn shown(named: &EndpointKey, backend: u32) -> Counterpart {
    Counterpart { addr: named.addr, port: named.port, pad: 0, backend }
}

/// Chooses a backend. With Maglev it is any of the ring: the source port of a socket is not known yet, often not even its address, and
/// what Maglev's hash is for, that all nodes send a flow to the same backend, does not matter to a socket, which stays on its node.
#[inline(always)]
fn choose<T: Tables>(
    tables: T,
    sockets: &impl Sockets,
    caller: &Caller,
    named: &EndpointKey,
    config: &Config,
    backend: &mut Counterpart,
) -> Outcome {
    if config.ring_len == 0 {
        return Outcome::Nobody;
    }
    // 0 is no backend. Of a service whose clients keep theirs, the node is one client.
    let mut chosen =
        if config.affinity == 0 { 0 } else { balance::remembered(tables, config, Addr::default(), caller.now) };
    // By chance where it is not remembered: a hash of the same address would have all nodes choose the same.
    let hash =
        if config.algorithm == algorithm::SOURCE_HASH { select::own_hash(tables.hash_key()) } else { tables.random() };
    let Some(first) = balance::first_member(tables, config, hash) else { return Outcome::Nobody };
    for n in 0..OFFERS {
        if chosen != 0 {
            break;
        }
        let Some(id) = balance::member_id(tables, config, first + n) else { break };
        if tables.backend(id).is_some_and(|backend| backend.flags & Backend::ACCEPTING != 0) {
            chosen = id;
        }
    }
    if chosen == 0 {
        return Outcome::Nobody;
    }
    let Some(record) = tables.backend(chosen) else { return Outcome::Nobody };
    *backend = Counterpart { addr: record.addr, port: record.port, pad: 0, backend: chosen };
    if config.affinity != 0 {
        let key = AffinityKey::new(Addr::default(), config.service, config.key.protocol);
        if !tables.set_affinity(&key, Affinity::new(chosen, caller.now)) {
            sockets.count_event(Counter::AffinityFull);
        }
    }
    // A stream is connected once and for all.
    if named.protocol == udp::PROTOCOL {
        sockets.set(&SocketKey::new(caller.cookie, named.addr, named.port, SocketKey::FRONTEND), backend);
    }
    sockets.set(&SocketKey::new(caller.cookie, backend.addr, backend.port, SocketKey::BACKEND), &shown(named, chosen));
    sockets.count(config.service, chosen);
    Outcome::Exchanged
}

/// Whom a process is shown in the place of this peer of its socket; nobody where the peer is what the process named itself.
#[inline(always)]
pub fn peer(sockets: &impl Sockets, cookie: u64, addr: Addr, port: PortBe) -> Option<Counterpart> {
    sockets.get(&SocketKey::new(cookie, addr, port, SocketKey::BACKEND))
}

/// Whether a process of the node may bind a socket there: not where a node port is served, at that address or, for a wildcard, at any of
/// its family. `families` says of which families a port is served at addresses of the node.
///
/// A program is not told whether an IPv6 socket takes IPv4 as well, so that `::` counts as both.
#[inline(always)]
pub fn may_bind<T: Tables>(tables: T, named: &EndpointKey, families: impl FnOnce(&NodePortKey) -> u32) -> bool {
    const ANY_V4: Addr = Addr::from_v4([0; 4]);
    const ANY: Addr = Addr([0; 2]);
    let served = families(&NodePortKey::new(named.port, named.protocol));
    if served == 0 {
        return true;
    }
    if named.addr == ANY {
        return false;
    }
    if named.addr == ANY_V4 {
        return served & family::V4 == 0;
    }
    balance::in_force(&tables, named).is_none_or(|(_, config)| config.flags & Config::NODE == 0)
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, collections::HashMap, vec, vec::Vec};

    use super::*;
    use crate::{flow::HashKey, maps::address, testing::Maps};

    const COOKIE: u64 = 7;
    const UDP: u8 = udp::PROTOCOL;
    const TCP: u8 = 6;

    /// The maps of one service with three backends, numbers 1 to 3; and what is known of sockets.
    struct Node {
        maps: Maps,
        sockets: RefCell<HashMap<SocketKey, Counterpart>>,
        counted: RefCell<Vec<u32>>,
        caller: Caller,
        events: RefCell<Vec<Counter>>,
    }

    fn addr(last: u8) -> Addr {
        Addr::from_v4([10, 244, 1, last])
    }

    fn service(protocol: u8) -> EndpointKey {
        EndpointKey::new(Addr::from_v4([10, 96, 0, 10]), PortBe::new(53), protocol)
    }

    impl Node {
        fn new(protocol: u8) -> Self {
            let flags = Backend::SERVING | Backend::ACCEPTING;
            let backend = |n| Backend {
                addr: addr(n),
                port: PortBe::new(5353),
                protocol,
                flags,
                service: 4,
                ..Backend::default()
            };
            let config = Config {
                key: service(protocol),
                generation: 9,
                service: 4,
                ring_len: 3,
                members_len: 3,
                ..Config::default()
            };
            Self {
                maps: Maps::of(vec![config], (0..4).map(backend).collect()),
                sockets: RefCell::default(),
                counted: RefCell::default(),
                caller: Caller { cookie: COOKIE, is_node: true, now: Ticks(1000) },
                events: RefCell::default(),
            }
        }

        fn connect(&self, named: &EndpointKey) -> (Outcome, u32) {
            let mut backend = Counterpart::default();
            (connect(&self.maps, self, &self.caller, named, &mut backend), backend.backend)
        }

        fn send(&self) -> (Outcome, u32) {
            let mut backend = Counterpart::default();
            (send(&self.maps, self, &self.caller, &self.maps.configs[0].key, &mut backend), backend.backend)
        }

        fn peer(&self, backend: u8) -> Option<Addr> {
            peer(self, COOKIE, addr(backend), PortBe::new(5353)).map(|shown| shown.addr)
        }
    }

    impl Sockets for Node {
        fn get(&self, key: &SocketKey) -> Option<Counterpart> {
            self.sockets.borrow().get(key).copied()
        }

        fn set(&self, key: &SocketKey, value: &Counterpart) {
            self.sockets.borrow_mut().insert(*key, *value);
        }

        fn forget(&self, key: &SocketKey) {
            self.sockets.borrow_mut().remove(key);
        }

        fn count(&self, _: u32, backend: u32) {
            self.counted.borrow_mut().push(backend);
        }

        fn count_event(&self, counter: Counter) {
            self.events.borrow_mut().push(counter);
        }
    }

    #[test]
    fn node_ports_are_not_bound() {
        let mut node = Node::new(TCP);
        node.maps.configs[0].flags = Config::NODE;
        let named = service(TCP);
        let may = |node: &Node, addr, port, served| {
            let key = EndpointKey::new(addr, PortBe::new(port), TCP);
            let families = |key: &NodePortKey| if *key == NodePortKey::new(named.port, TCP) { served } else { 0 };
            may_bind(&node.maps, &key, families)
        };
        let (any_v4, any) = (Addr::from_v4([0; 4]), Addr::default());
        let any_v6_of = |served| may(&node, any, 53, served);
        assert!(!any_v6_of(family::V4) && !any_v6_of(family::V6) && any_v6_of(0));
        assert!(!may(&node, any_v4, 53, family::V4) && may(&node, any_v4, 53, family::V6));
        assert!(may(&node, any_v4, 54, family::V4), "another port");
        assert!(!may(&node, named.addr, 53, family::V4));
        assert!(may(&node, addr(9), 53, family::V4), "an address it is not served at");
        node.maps.configs[0].flags = 0;
        assert!(may(&node, named.addr, 53, family::V4), "served, but not as an address of the node");
    }

    #[test]
    fn a_record_that_was_reused_is_not_in_force() {
        let mut node = Node::new(TCP);
        assert!(balance::in_force(&&node.maps, &service(TCP)).is_some());
        node.maps.configs[0].generation += 1;
        assert!(balance::in_force(&&node.maps, &service(TCP)).is_none(), "another generation");
        node.maps.configs[0].generation -= 1;
        node.maps.configs[0].key.port = PortBe::new(54);
        assert!(balance::in_force(&&node.maps, &service(TCP)).is_none(), "another key");
        assert_eq!(node.connect(&service(TCP)), (Outcome::Untouched, 0));
    }

    #[test]
    fn the_first_member_is_by_hash_by_chance_or_in_turns() {
        let mut node = Node::new(TCP);
        node.maps.random = u32::MAX;
        let mut first = |algorithm| {
            node.maps.configs[0].algorithm = algorithm;
            balance::first_member(&node.maps, &node.maps.configs[0], u32::MAX / 2)
        };
        assert_eq!(first(algorithm::MAGLEV), Some(1));
        assert_eq!(first(algorithm::RANDOM), Some(2));
        assert_eq!([(); 4].map(|()| first(algorithm::ROUND_ROBIN)), [Some(0), Some(1), Some(2), Some(0)]);
        node.maps.configs[0].ring_len = 0;
        assert_eq!(balance::first_member(&node.maps, &node.maps.configs[0], 0), None);
    }

    #[test]
    fn of_two_members_the_less_busy_one_is_first() {
        let mut node = Node::new(TCP);
        node.maps.configs[0].algorithm = algorithm::LEAST_CONN;
        node.maps.alternates = true;
        // Members 0 and 2 are drawn, which are backends 1 and 3.
        let first = |node: &Node| {
            node.maps.turn.set(0);
            balance::first_member(&node.maps, &node.maps.configs[0], 0)
        };
        assert_eq!(first(&node), Some(0), "as busy");
        node.maps.given = vec![0, 5, 0, 4];
        assert_eq!(first(&node), Some(2));
        node.maps.backends[1].weight = 2;
        assert_eq!(first(&node), Some(0), "it is to have twice as many");
        node.maps.backends[3].base = 2_u64.wrapping_neg();
        assert_eq!(first(&node), Some(2), "some of its flows ended");
        node.maps.configs[0].affinity = 100;
        assert_eq!(first(&node), Some(0), "clients that keep their backends go by their address");
        node.maps.configs[0].affinity = 0;
        node.maps.turn.set(0);
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 3));
    }

    #[test]
    fn by_source_hash_the_node_is_one_client() {
        let mut node = Node::new(TCP);
        node.maps.configs[0].algorithm = algorithm::SOURCE_HASH;
        let (_, chosen) = node.connect(&service(TCP));
        for random in [1 << 30, u32::MAX] {
            node.maps.random = random;
            assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, chosen));
        }
        let keys = (0..50).map(|n| {
            node.maps.key = HashKey::new([1, 2, 3, 4].map(|m: u64| (4 * n + m).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            node.connect(&service(TCP)).1
        });
        assert_eq!(keys.collect::<std::collections::HashSet<_>>().len(), 3, "not every node takes the same");
        node.caller.is_node = false;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Untouched, 0), "the packets say which client it is");
    }

    #[test]
    fn a_connected_socket_has_a_backend_and_shows_the_service() {
        for protocol in [TCP, UDP] {
            let node = Node::new(protocol);
            assert_eq!(node.connect(&service(protocol)), (Outcome::Exchanged, 1));
            assert_eq!((node.peer(1), node.peer(2)), (Some(service(protocol).addr), None));
            assert_eq!(*node.counted.borrow(), [1]);
            // Only datagrams name the service again.
            assert_eq!(node.sockets.borrow().len(), if protocol == UDP { 2 } else { 1 });
        }
    }

    #[test]
    fn a_backend_that_drains_is_passed_over_and_where_all_do_the_call_is_refused() {
        let mut node = Node::new(TCP);
        node.maps.backends[1].flags = Backend::SERVING;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 2));
        for backend in &mut node.maps.backends {
            backend.flags = Backend::SERVING;
        }
        assert_eq!(node.connect(&service(TCP)), (Outcome::Nobody, 0));
        node.maps.configs[0].ring_len = 0;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Nobody, 0));
    }

    #[test]
    fn datagrams_keep_their_backend_while_it_serves() {
        let mut node = Node::new(UDP);
        assert_eq!(node.send(), (Outcome::Exchanged, 1));
        node.maps.random = u32::MAX;
        node.maps.backends[1].flags = Backend::SERVING;
        assert_eq!(node.send(), (Outcome::Exchanged, 1), "it drains");
        node.maps.backends[1].flags = 0;
        assert_eq!(node.send(), (Outcome::Exchanged, 3), "it serves no more");
        assert_eq!(*node.counted.borrow(), [1, 3]);
        // A late answer of the one before.
        assert_eq!((node.peer(1), node.peer(3)), (Some(service(UDP).addr), Some(service(UDP).addr)));
    }

    #[test]
    fn datagrams_keep_their_backend_when_a_policy_refuses_new_ones() {
        let mut node = Node::new(UDP);
        assert_eq!(node.send(), (Outcome::Exchanged, 1));
        node.maps.configs[0].ring_len = 0;
        node.maps.configs[0].flags = Config::DROP;
        assert_eq!(node.send(), (Outcome::Exchanged, 1), "its backend serves still");
        node.maps.configs[0].flags = Config::RANGES;
        assert_eq!(node.send(), (Outcome::Exchanged, 1), "the node is let in no more");
        node.caller.cookie += 1;
        assert_eq!(node.send(), (Outcome::Forbidden, 0), "another socket");
        node.caller.cookie -= 1;
        node.maps.backends[1].flags = 0;
        assert_eq!(node.send(), (Outcome::Forbidden, 0), "its backend serves no more");
    }

    #[test]
    fn datagrams_leave_a_number_that_became_another_backends() {
        let mut node = Node::new(UDP);
        assert_eq!(node.send(), (Outcome::Exchanged, 1));
        node.maps.random = u32::MAX;
        node.maps.backends[1].addr = addr(99);
        assert_eq!(node.send(), (Outcome::Exchanged, 3), "another address");
        node.maps.backends[3].service = 5;
        node.maps.random = 0;
        assert_eq!(node.send(), (Outcome::Exchanged, 1), "another service");
    }

    #[test]
    fn what_was_forgotten_of_one_end_is_noted_again() {
        let node = Node::new(UDP);
        node.send();
        node.sockets.borrow_mut().retain(|key, _| key.end == SocketKey::FRONTEND);
        assert_eq!(node.send(), (Outcome::Exchanged, 1));
        assert_eq!(node.peer(1), Some(service(UDP).addr));
    }

    #[test]
    fn a_socket_that_names_the_backend_itself_is_shown_the_backend() {
        let node = Node::new(UDP);
        node.connect(&service(UDP));
        let backend = EndpointKey::new(addr(1), PortBe::new(5353), UDP);
        assert_eq!(node.connect(&backend), (Outcome::Untouched, 0));
        assert_eq!(node.peer(1), None);
    }

    #[test]
    fn a_node_outside_of_the_ranges_is_refused_and_pods_are_left_to_their_packets() {
        let mut node = Node::new(UDP);
        node.maps.configs[0].flags = Config::RANGES;
        assert_eq!(node.connect(&service(UDP)), (Outcome::Forbidden, 0));
        assert_eq!(node.send(), (Outcome::Forbidden, 0));
        node.maps.configs[0].flags |= Config::RANGES_HAVE_NODE;
        assert_eq!(node.connect(&service(UDP)), (Outcome::Exchanged, 1));
        node.caller.is_node = false;
        assert_eq!(node.connect(&service(UDP)), (Outcome::Untouched, 0));
        assert_eq!(node.send(), (Outcome::Untouched, 0));
        node.maps.configs[0].flags = 0;
        assert_eq!(node.connect(&service(UDP)), (Outcome::Exchanged, 1));
        node.maps.configs[0].affinity = 100;
        assert_eq!(node.connect(&service(UDP)), (Outcome::Untouched, 0));
    }

    #[test]
    fn a_source_that_pods_are_to_have_and_their_loopback_addresses_are_left_to_them() {
        let mut node = Node::new(TCP);
        node.maps.configs[0].flags = Config::SNAT_PODS;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 1));
        node.caller.is_node = false;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Untouched, 0));
        node.maps.configs[0].flags = Config::SNAT_OUTSIDE;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 1));
        for loopback in [Addr::from_v4([127, 0, 0, 1]), Addr::from_bytes(std::net::Ipv6Addr::LOCALHOST.octets())] {
            let config = Config { key: EndpointKey { addr: loopback, ..service(TCP) }, ..node.maps.configs[0] };
            node.maps = Maps::of(vec![config], node.maps.backends.clone());
            assert_eq!(node.connect(&config.key), (Outcome::Untouched, 0));
            node.caller.is_node = true;
            assert_eq!(node.connect(&config.key), (Outcome::Exchanged, 1));
            node.caller.is_node = false;
        }
    }

    #[test]
    fn in_networks_of_the_services_the_node_is_told_of_what_nobody_has() {
        let mut node = Node::new(UDP);
        node.maps.owned = vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96];
        node.maps.addresses = HashMap::from([
            (service(UDP).addr, address::SERVICE),
            (Addr::from_v4([10, 96, 0, 200]), address::NODE | address::SERVICE),
        ]);
        let of = |node: &Node, octets, port| {
            let named = EndpointKey::new(Addr::from_v4(octets), PortBe::new(port), UDP);
            let mut backend = Counterpart::default();
            let sent = send(&node.maps, node, &node.caller, &named, &mut backend);
            assert_eq!(node.connect(&named).0, sent, "{octets:?}");
            sent
        };
        assert_eq!(of(&node, [10, 96, 0, 10], 53), Outcome::Exchanged);
        assert_eq!(of(&node, [10, 96, 0, 10], 54), Outcome::Nobody);
        assert_eq!(of(&node, [10, 96, 0, 99], 53), Outcome::Forbidden);
        assert_eq!(of(&node, [10, 96, 0, 200], 53), Outcome::Untouched, "the node's own");
        assert_eq!(of(&node, [10, 97, 0, 10], 53), Outcome::Untouched, "another network");
        node.caller.is_node = false;
        assert_eq!(of(&node, [10, 96, 0, 99], 53), Outcome::Untouched, "a pod's packets are told");
    }

    #[test]
    fn what_policy_leaves_without_backends_is_forbidden() {
        let mut node = Node::new(TCP);
        (node.maps.configs[0].ring_len, node.maps.configs[0].flags) = (0, Config::DROP);
        assert_eq!(node.connect(&service(TCP)), (Outcome::Forbidden, 0));
    }

    #[test]
    fn the_node_keeps_its_backend() {
        let mut node = Node::new(TCP);
        node.maps.configs[0].affinity = 100;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 1));
        node.maps.random = u32::MAX;
        node.caller.now = Ticks(1100);
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 1));
        node.caller.now = Ticks(1200);
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 1), "the last one made it young again");
        node.caller.now = Ticks(1301);
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 3));
        node.maps.backends[3].flags = Backend::SERVING;
        node.maps.random = 0;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 1));
        assert!(node.events.borrow().is_empty());
        node.maps.has_room = false;
        assert_eq!(node.connect(&service(TCP)), (Outcome::Exchanged, 1));
        assert_eq!(*node.events.borrow(), [Counter::AffinityFull]);
    }
}
