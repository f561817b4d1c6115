//! Who serves a new flow.

use std::{
    collections::{HashMap, HashSet},
    vec,
};

use super::*;
use crate::{
    addr::{Address as _, Ipv4Be},
    conntrack::Segment,
    maps::algorithm,
    testing::{Maps as Node, Memory},
    wire::Part,
};

const NOW: Ticks = Ticks(5000);
const ALL: u8 = Backend::SERVING | Backend::ACCEPTING;

fn v4(a: u8, b: u8, c: u8, d: u8) -> Ipv4Be {
    Ipv4Be(u32::from_ne_bytes([a, b, c, d]))
}

/// A service with three backends, numbers 1 to 3, and another record of it for flows from outside, whose only member is backend 3.
fn node() -> Node {
    let key = EndpointKey::new(v4(10, 96, 0, 10).to_map(), PortBe::new(80), 6);
    let config =
        Config { key, generation: 9, service: 4, frontend: 1, ring_len: 3, members_len: 3, ..Config::default() };
    let outside = Config {
        key: EndpointKey { scope: EndpointKey::OUTSIDE, ..key },
        generation: 10,
        ring: 2,
        ring_len: 1,
        ..config
    };
    let backend = |n| Backend {
        addr: v4(10, 244, 1, n).to_map(),
        port: PortBe::new(8080),
        protocol: 6,
        flags: ALL,
        service: 4,
        ..Backend::default()
    };
    let (service, shared) = (v4(10, 96, 0, 10).to_map(), v4(10, 96, 0, 11).to_map());
    Node {
        addresses: HashMap::from([(service, address::SERVICE), (shared, address::SERVICE | address::NODE)]),
        owned: v4(10, 96, 0, 0).to_map().to_bytes()[..15].to_vec(),
        masqueraded: Some((v4(10, 244, 1, 9).to_map(), v4(198, 51, 100, 1).to_map())),
        sources: vec![v4(192, 0, 2, 100).to_map()],
        ..Node::of(vec![config, outside], (0..4).map(backend).collect())
    }
}

impl Node {
    fn packet(port: u16, segment: u8) -> Parsed<Ipv4Be> {
        Parsed {
            tuple: Tuple {
                source: v4(10, 244, 1, 200),
                destination: v4(10, 96, 0, 10),
                source_port: PortBe::new(port),
                destination_port: PortBe::new(80),
                protocol: 6,
            },
            transport: 34,
            transport_len: 20,
            ttl: 64,
            ip_check: 0,
            check: 0,
            dont_fragment: true,
            segment: Segment::from_control(segment),
            part: Part::Whole,
            id: 0,
        }
    }

    fn lookup(&self, packet: &Parsed<Ipv4Be>) -> Lookup {
        Lookup {
            fingerprint: self.hash_key().fingerprint(&packet.tuple),
            now: NOW,
            candidate: Candidate { to_frontend: true, is_masqueraded: false },
            scope: Scope::Both,
        }
    }

    fn select(&self, packet: &Parsed<Ipv4Be>, is_outside: bool) -> Selection {
        select(self, packet, &self.lookup(packet), || is_outside)
    }

    /// What becomes of a packet, and the backend it goes to.
    fn place(&self, packet: &Parsed<Ipv4Be>) -> (Verdict, Addr) {
        let mut translation = Translation::none();
        let (lookup, selection) = (self.lookup(packet), self.select(packet, false));
        let verdict = place(self, packet, &lookup, selection, &Direct, &mut translation);
        if verdict == Verdict::Translate && selection.is_affine() {
            remember(self, packet, &lookup, translation.service);
        }
        (verdict, translation.address.to_map())
    }
}

/// Nobody gets another source.
struct Direct;

impl Reach<Ipv4Be> for Direct {
    fn source(&self, _: &Parsed<Ipv4Be>, _: &Lookup, _: u32, _: u32) -> Snat {
        Snat::NONE
    }
}

const TCP: u8 = 6;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

#[test]
fn a_selection_holds_the_largest_numbers() {
    let most = Selection::new((1 << 22) - 1, (1 << 17) - 1);
    assert_eq!((most.config(), most.member(), most.backend()), ((1 << 22) - 1, (1 << 17) - 1, 0));
    for special in [Selection::NONE, Selection::NOBODY, Selection::UNWANTED] {
        assert_ne!(most.with_conflict(), special);
    }
    let selection = Selection::new(7, 3);
    assert_eq!((selection.next().config(), selection.next().member()), (7, 4));
    assert!(selection.with_conflict().next().has_conflict());
}

#[test]
fn flows_from_outside_have_their_own_record_or_none() {
    let mut node = node();
    let packet = Node::packet(40000, SYN);
    assert_eq!(node.select(&packet, true).config(), 0, "nobody says that there is another one");
    node.configs[0].flags = Config::OUTSIDE;
    assert_eq!((node.select(&packet, false).config(), node.select(&packet, true).config()), (0, 1));
    node.configs[1].key.port = PortBe::new(81);
    assert_eq!(node.select(&packet, true), Selection::UNWANTED);
    assert_eq!(*node.counted.borrow(), [Counter::NoLocalBackend]);
}

#[test]
fn ranges_are_a_services_own() {
    let mut node = node();
    let packet = Node::packet(40000, SYN);
    let client = packet.tuple.source.to_map();
    node.configs[0].flags = Config::RANGES;
    node.ranges.push((5, client));
    assert_eq!(node.select(&packet, false), Selection::UNWANTED);
    assert_eq!(*node.counted.borrow(), [Counter::SourceRange]);
    node.ranges.push((4, client));
    assert_eq!(node.select(&packet, false).config(), 0);
}

#[test]
fn without_members_flows_are_rejected_or_dropped() {
    let mut node = node();
    node.configs[0].ring_len = 0;
    node.configs[0].members_len = 0;
    for segment in [SYN, ACK] {
        assert_eq!(node.select(&Node::packet(40000, segment), false), Selection::NOBODY);
    }
    node.configs[0].flags = Config::DROP;
    assert_eq!(node.select(&Node::packet(40000, SYN), false), Selection::UNWANTED);
    assert_eq!(*node.counted.borrow(), [Counter::NoLocalBackend]);
}

#[test]
fn a_flow_of_a_backend_that_drains_is_found_again_though_the_ring_is_empty() {
    let mut node = node();
    let (_, backend) = node.place(&Node::packet(40000, SYN));
    node.flows.lose(node.lookup(&Node::packet(40000, SYN)).fingerprint);
    node.configs[0].ring_len = 0;
    assert_eq!(node.place(&Node::packet(40000, ACK)), (Verdict::Translate, backend));
    assert_eq!(node.select(&Node::packet(40001, ACK), false), Selection::NOBODY);
}

#[test]
fn where_all_drain_flows_are_rejected_and_a_conflict_drops_them() {
    let mut node = node();
    for backend in &mut node.backends {
        backend.flags = Backend::SERVING;
    }
    assert_eq!(node.place(&Node::packet(40000, SYN)).0, Verdict::Reject);
    for backend in &mut node.backends {
        backend.flags = ALL;
    }
    assert_eq!(node.place(&Node::packet(40000, SYN)).0, Verdict::Translate);
    assert_eq!(*node.counted.borrow(), [Counter::FlowsCreated]);
}

#[test]
fn a_client_keeps_its_backend_until_that_is_of_no_use() {
    let mut node = node();
    node.configs[0].affinity = 100;
    let key = AffinityKey::new(Node::packet(0, SYN).tuple.source.to_map(), 4, TCP);
    let mut port = 40000;
    let mut next = |node: &Node| {
        port += 1;
        node.place(&Node::packet(port, SYN)).1
    };
    let of_ring = next(&node);
    assert_eq!([(); 5].map(|()| next(&node)), [of_ring; 5], "the hash has no ports");
    let ring_id = node.affinity.borrow()[&key].backend();
    let other = ring_id % 3 + 1;
    let other_addr = node.backends[other as usize].addr;
    let set = |node: &Node, id, time| node.affinity.borrow_mut().insert(key, Affinity::new(id, Ticks(time)));
    for algorithm in [algorithm::MAGLEV, algorithm::RANDOM, algorithm::ROUND_ROBIN, algorithm::LEAST_CONN] {
        node.configs[0].algorithm = algorithm;
        set(&node, other, NOW.0 - 100);
        assert_eq!(next(&node), other_addr);
        assert_eq!(node.affinity.borrow()[&key], Affinity::new(other, NOW), "made young");
        set(&node, other, NOW.0 - 101);
        assert_eq!(next(&node), of_ring, "too old");
    }
    set(&node, other, NOW.0);
    node.backends[other as usize].flags = Backend::SERVING;
    assert_eq!(next(&node), of_ring, "drains");
    node.backends[other as usize].flags = ALL;
    node.backends[other as usize].service = 5;
    set(&node, other, NOW.0);
    assert_eq!(next(&node), of_ring, "another service's");
    node.backends[other as usize].service = 4;
    node.configs[0].flags = Config::LOCAL;
    set(&node, other, NOW.0);
    assert_eq!(next(&node), of_ring, "not on this node");
    node.backends[other as usize].flags |= Backend::LOCAL;
    set(&node, other, NOW.0);
    assert_eq!(next(&node), other_addr, "on this node");
    node.configs[0].flags = 0;
    node.backends[other as usize].flags |= Backend::ONLY_LOCAL;
    set(&node, other, NOW.0);
    assert_eq!(next(&node), of_ring, "only in the set of another way");
    node.configs[0].flags = Config::LOCAL;
    set(&node, other, NOW.0);
    assert_eq!(next(&node), other_addr, "by that way");
    set(&node, 77, NOW.0);
    assert_eq!(next(&node), of_ring, "nobody's id");
    node.affinity.borrow_mut().clear();
    node.affinity.borrow_mut().insert(AffinityKey::new(key.client, 4, 17), Affinity::new(other, NOW));
    assert_eq!(next(&node), of_ring, "by another protocol");
}

/// A client that uses its port again where its first flow still has it.
#[test]
fn another_source_is_better_than_another_backend_for_clients_that_keep_theirs() {
    let mut node = node();
    node.configs[1] =
        Config { key: EndpointKey { port: PortBe::new(81), ..node.configs[0].key }, frontend: 2, ..node.configs[0] };
    node.services.insert(node.configs[1].key, ConfigRef::new(1, node.configs[1].generation));
    let second = |port| {
        let mut packet = Node::packet(port, SYN);
        packet.tuple.destination_port = PortBe::new(81);
        packet
    };
    for (affinity, algorithm, expected) in [
        (0, algorithm::MAGLEV, Verdict::Translate),
        (100, algorithm::MAGLEV, Verdict::Conflict),
        (0, algorithm::SOURCE_HASH, Verdict::Conflict),
    ] {
        for config in &mut node.configs {
            (config.affinity, config.algorithm) = (affinity, algorithm);
        }
        for port in 40_000..40_020 {
            assert_eq!(node.place(&Node::packet(port, SYN)).0, Verdict::Translate);
            let remembered = node.affinity.borrow().clone();
            assert_eq!(node.place(&second(port)).0, expected, "{affinity}, {algorithm}, {port}");
            assert_eq!(*node.affinity.borrow(), remembered);
        }
        node.flows = Memory::new(64);
    }
}

#[test]
fn a_backend_that_serves_only_those_sent_to_this_node_gets_no_others() {
    let mut node = node();
    for backend in &mut node.backends[2..] {
        backend.flags |= Backend::ONLY_LOCAL;
    }
    for port in 40_000..40_020 {
        assert_eq!(node.place(&Node::packet(port, SYN)), (Verdict::Translate, node.backends[1].addr), "{port}");
    }
    node.configs[0].flags = Config::LOCAL;
    let backends: HashSet<_> = (40_020..40_060).map(|port| node.place(&Node::packet(port, SYN)).1).collect();
    assert_eq!(backends.len(), 3);
}

#[test]
fn an_unusable_backend_is_forgotten_and_no_room_is_no_harm() {
    let mut node = node();
    node.configs[0].affinity = 100;
    let packet = Node::packet(40000, SYN);
    let key = AffinityKey::new(packet.tuple.source.to_map(), 4, TCP);
    node.affinity.borrow_mut().insert(key, Affinity::new(2, Ticks(NOW.0 - 500)));
    node.select(&packet, false);
    assert!(node.affinity.borrow().is_empty());
    node.has_room = false;
    assert_eq!(node.place(&packet).0, Verdict::Translate);
    assert_eq!(*node.counted.borrow(), [Counter::FlowsCreated, Counter::AffinityFull]);
}

#[test]
fn loopback_addresses_are_no_services() {
    let node = node();
    let mut packet = Node::packet(40000, SYN);
    packet.tuple.source = v4(127, 0, 0, 1);
    assert_eq!(node.select(&packet, false), Selection::NONE);
}

#[test]
fn another_source_is_wanted_by_origin() {
    let (packet, node) = (Node::packet(40000, SYN), node());
    let needs = |flags, is_outside, returns| needs_snat(&packet, &node.backends[1], flags, is_outside, |_| returns);
    assert!(!needs(0, false, true) && needs(0, true, false));
    assert!(!needs(Config::SNAT_NEVER, true, false));
    assert!(needs(Config::SNAT_PODS, false, true) && !needs(Config::SNAT_PODS, true, true));
    assert!(needs(Config::SNAT_OUTSIDE, true, true) && !needs(Config::SNAT_OUTSIDE, false, true));
    assert!(needs(Config::SNAT_OUTSIDE | Config::SNAT_NEVER, true, true));
    let itself = Backend { addr: packet.tuple.source.to_map(), ..node.backends[1] };
    assert!(needs_snat(&packet, &itself, Config::SNAT_NEVER, false, |_| true));
}

#[test]
fn addresses_of_owned_networks_are_services_the_nodes_or_nobodys() {
    let node = node();
    let of = |a, b, c, d| unclaimed(&&node, v4(a, b, c, d).to_map());
    assert_eq!(of(10, 96, 0, 10), Unclaimed::Service);
    assert_eq!(of(10, 96, 0, 11), Unclaimed::Elsewhere);
    assert_eq!(of(10, 96, 0, 12), Unclaimed::Nobody);
    assert_eq!(of(10, 97, 0, 12), Unclaimed::Elsewhere);
    let candidate = |a, b, c, d| candidate(&&node, Scope::Both, v4(192, 0, 2, 1), v4(a, b, c, d));
    assert_eq!(candidate(10, 96, 0, 12), Some(Candidate { to_frontend: false, is_masqueraded: false }));
    assert_eq!(candidate(10, 97, 0, 12), None);
}

/// The node's address and one of its ports.
struct Given;

impl Reach<Ipv4Be> for Given {
    fn source(&self, _: &Parsed<Ipv4Be>, _: &Lookup, backend: u32, _: u32) -> Snat {
        assert_eq!(backend, 0);
        Snat::new(1, PortBe::new(61_000))
    }
}

#[test]
fn a_masqueraded_flow_is_translated_where_it_leaves_and_where_replies_come_in() {
    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;
    const RST: u8 = 0x04;
    let node = node();
    let packet = |segment| {
        let mut packet = Node::packet(40_000, segment);
        (packet.tuple.source, packet.tuple.destination) = (v4(10, 244, 1, 9), v4(198, 51, 100, 1));
        packet
    };
    let sent = Tuple { source: v4(192, 0, 2, 100), source_port: PortBe::new(61_000), ..packet(SYN).tuple };
    let reply = |segment| Parsed { tuple: sent.reversed(), ..packet(segment) };
    let known = |packet: &Parsed<Ipv4Be>, scope| {
        let mut translation = Translation::none();
        let lookup = Lookup { scope, ..node.lookup(packet) };
        let known = known(&node, packet, &lookup, |_| true, &mut translation);
        if known == Known::Tend {
            tend(&node, packet, &lookup, &translation);
        }
        (known, translation.apply(&packet.tuple))
    };
    let begin = |packet: &Parsed<Ipv4Be>| {
        let mut translation = Translation::none();
        let verdict = masquerade(&node, packet, &node.lookup(packet), &Given, &mut translation);
        (verdict, translation.apply(&packet.tuple))
    };

    assert_eq!(begin(&packet(ACK)).0, Verdict::Pass, "it may answer what came from outside");
    assert_eq!(known(&packet(SYN), Scope::Replies).0, Known::No);
    assert_eq!(begin(&packet(SYN)), (Verdict::Translate, sent));
    for scope in [Scope::Both, Scope::Forward] {
        assert_eq!(known(&packet(ACK), scope).0, Known::Elsewhere, "{scope:?}");
        assert_eq!(known(&reply(ACK), scope).1, packet(ACK).tuple.reversed(), "{scope:?}");
    }
    assert_eq!(known(&packet(ACK), Scope::Replies).1, sent);
    assert_eq!(known(&reply(ACK), Scope::Replies).0, Known::Elsewhere);

    // It is over, and the pod begins anew.
    known(&reply(RST), Scope::Both);
    assert_eq!(known(&packet(SYN), Scope::Replies).0, Known::No);
    assert_eq!(known(&reply(ACK), Scope::Both).0, Known::No, "neither half is left");
    assert_eq!(begin(&packet(SYN)), (Verdict::Translate, sent));

    // A packet of a service's flow, which was to keep its source.
    let mut other = packet(SYN);
    other.tuple.source_port = PortBe::new(40_001);
    let fingerprint = (&node).hash_key().fingerprint(&other.tuple.reversed());
    let flow = Flow {
        twin: fingerprint,
        client: other.tuple.source.to_map(),
        client_port: other.tuple.source_port,
        protocol: 6,
        snat: Snat::NONE,
        frontend: 1,
        backend: 1,
    };
    let data = Data::new(Direction::Reply, State::SYN_SENT, 1);
    assert!((&node).insert(New { fingerprint, data, flow, now: NOW, defers: false }).is_new());
    assert_eq!(begin(&other).0, Verdict::Pass);
}

#[test]
fn what_leaves_for_the_world_is_a_candidate_there_only() {
    let node = node();
    let of = |scope, a, b, c, d| candidate(&&node, scope, v4(10, 244, 1, 9), v4(a, b, c, d));
    assert!(of(Scope::Replies, 198, 51, 100, 1).is_some_and(|candidate| candidate.is_masqueraded));
    assert_eq!(of(Scope::Both, 198, 51, 100, 1), None);
    assert_eq!(of(Scope::Replies, 198, 51, 100, 2), None);
}

/// Every backend is at another node, for which packets are wrapped.
struct Wrapped;

impl Reach<Ipv4Be> for Wrapped {
    fn source(&self, _: &Parsed<Ipv4Be>, _: &Lookup, _: u32, _: u32) -> Snat {
        Snat::outer(1)
    }
}

#[test]
fn a_wrapped_flow_has_one_slot_and_goes_by_its_client() {
    const RST: u8 = 0x04;
    const FIN: u8 = 0x11;
    let node = node();
    let mut translation = Translation::none();
    let begin = |packet: &Parsed<Ipv4Be>, translation: &mut _| {
        place(&node, packet, &node.lookup(packet), node.select(packet, false), &Wrapped, translation)
    };
    let packet = |segment| Node::packet(40_000, segment);
    assert_eq!(begin(&packet(SYN), &mut translation), Verdict::Wrap);
    assert!(translation.is_new && translation.has_snat);
    assert_eq!((translation.other, translation.other_port), (v4(192, 0, 2, 100), PortBe(0)));
    assert_eq!(node.flows.live(NOW), 1, "replies do not pass by");
    let chosen = translation.address;
    for (segment, state) in [
        (SYN, State::SYN_SENT),
        (ACK, State::ESTABLISHED),
        (FIN, State::FIN_FORWARD),
        (ACK, State::FIN_FORWARD),
        (SYN, State::SYN_SENT),
        (RST, State::RESET_FORWARD),
    ] {
        let (packet, mut translation) = (packet(segment), Translation::none());
        let lookup = node.lookup(&packet);
        assert_eq!(known(&node, &packet, &lookup, |_| true, &mut translation), Known::Wrap);
        assert_eq!((translation.address, translation.other), (chosen, v4(192, 0, 2, 100)));
        assert_eq!((&node).probe(lookup.fingerprint, NOW).state(), state);
        let replies = Lookup { scope: Scope::Replies, ..lookup };
        assert_eq!(known(&node, &packet, &replies, |_| true, &mut translation), Known::Elsewhere);
    }
    // It is over, and the client begins anew.
    let lookup = node.lookup(&packet(SYN));
    assert_eq!(known(&node, &packet(SYN), &lookup, |_| true, &mut translation), Known::No);
    assert_eq!((begin(&packet(SYN), &mut translation), node.flows.live(NOW)), (Verdict::Wrap, 1));
    let again = begin(&packet(SYN), &mut translation);
    assert_eq!(
        (again, translation.is_new, translation.address),
        (Verdict::Wrap, false, chosen),
        "another CPU was faster"
    );
}

#[test]
fn a_packet_is_its_backends_whom_another_node_has_chosen() {
    let node = node();
    let packet = Node::packet(40_000, SYN);
    let lookup = node.lookup(&packet);
    let of = |packet: &Parsed<Ipv4Be>, n| {
        backend_at(&node, packet, |config, member| member_at(&node, config, member, v4(10, 244, 1, n).to_map()))
    };
    let at = |n| of(&packet, n);
    let mut translation = Translation::none();
    for n in [1, 2, 3, 1] {
        let address = v4(10, 244, 1, n);
        let known = |translation: &mut _| known(&node, &packet, &lookup, |_| true, translation);
        let said = known(&mut translation);
        assert!(!belongs(said, &translation, address.to_map()), "{n}: nobody's or another's");
        assert_eq!(adopt(&node, &packet, &lookup, at(n), &mut translation), Verdict::Translate);
        assert_eq!((translation.address, translation.has_snat), (address, false));
        let said = known(&mut translation);
        assert!(belongs(said, &translation, address.to_map()));
        assert_eq!(node.flows.live(NOW), 2, "{n}: and of no other flow is anything left");
    }
    assert_eq!(at(9), At::NOBODY);
    let mut elsewhere = packet;
    elsewhere.tuple.destination_port = PortBe::new(81);
    assert_eq!(of(&elsewhere, 1), At::NO_SERVICE);
}
