//! What pods send to the world leaves with an address of the node as its source, and the replies find back.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use etherparse::checksum::Sum16BitWords;
use netlb::config::Forwarding;
use netlb::datapath::kernel::testing::{Program, Site};
use netlb::model::{Algorithm, Backend, Frontend, Service, SnatMode};
use netlb::resolve::Node;
use netlb_common::conntrack::Direction;
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_common::network::{Network, Networks};
use netlb_integration::exec::Cmd;
use netlb_integration::frames::{ACK, ETHERNET, FIN, Packet, RST, SYN_ACK, fragments, icmp_error, patch};
use netlb_integration::lab::{
    BACKENDS, BACKENDS_MAC, CASES, CLIENTS, CLIENTS_MAC, Case, DROP, Lab, Outcome, PASS, REDIRECT, addr, destination,
    mac, source,
};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

const UPLINK: Interface = Interface { role: role::UPLINK, flags: 0, pad: 0, master: 0 };
const PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;

fn networks(all: impl IntoIterator<Item = (IpAddr, u32)>) -> Networks {
    let mut networks = Networks::NONE;
    for (slot, (ip, bits)) in networks.all.iter_mut().zip(all) {
        *slot = Network::new(addr(ip), if ip.is_ipv4() { 96 + bits } else { bits });
        networks.len += 1;
    }
    networks
}

/// The network of the backends is the pods', that of the clients the world; host 20 there is told who they are.
fn node_with(forwarding: Forwarding) -> anyhow::Result<Lab> {
    let [v4, v6] = [CASES[0], CASES[2]];
    let masquerade = networks([(v4.host(2, 0), 24), (v6.host(2, 0), 64)]);
    let except = networks([(v4.host(1, 20), 32), (v6.host(1, 20), 128)]);
    let site = Site { masquerade: (masquerade, except), ..Site::default() };
    let mut lab = Lab::at_with(&site, forwarding)?;
    let mut addresses = Vec::new();
    for case in [v4, v6] {
        let address = node(case);
        let (len, tail): (_, &[&str]) = if address.is_ipv4() { (24, &[]) } else { (64, &["nodad"]) };
        let words = ["address", "add", &format!("{address}/{len}"), "dev", "clients"].map(str::to_owned);
        Cmd::new("ip").args(words).args(tail).run()?.success()?;
        addresses.push(address);
    }
    lab.harness.set_interface(CLIENTS, UPLINK)?;
    lab.harness.programmer_mut().set_node(Node { addresses, ..Node::default() });
    Ok(lab)
}

/// The node's address towards the world.
fn node(case: Case) -> IpAddr {
    case.host(1, 100)
}

fn world(case: Case) -> SocketAddr {
    case.client(443)
}

fn pod(case: Case, port: u16) -> SocketAddr {
    SocketAddr::new(case.host(2, 3), port)
}

/// What the kernel sends to the world for a pod.
fn sent(case: Case, from: SocketAddr, to: SocketAddr) -> Packet {
    case.packet(from, to).macs(mac(to.ip()), CLIENTS_MAC)
}

#[test]
fn the_world_sees_the_node_and_its_replies_reach_the_pod() -> TestResult {
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = node_with(forwarding)?;
        for case in CASES {
            let what = format!("{case}, {forwarding:?}");
            lab.begin([]);
            let (pod, world) = (pod(case, 40000), world(case));
            let packet = sent(case, pod, world).payload([0xa5; 77]);
            let out = lab.to_clients(packet.frame());
            let given = source(&out.frame);
            assert_eq!(given.ip(), node(case), "{what}");
            assert!(PORTS.contains(&given.port()), "{what}: {given}");
            assert_eq!(out, Outcome { verdict: PASS, frame: packet.from(given).frame() }, "{what}");
            for segment in [SYN_ACK, ACK, ACK] {
                let reply = case.segment(world, given, segment).payload([9; 5]);
                let mut expected = reply.clone().to(pod);
                let mut verdict = PASS;
                if forwarding == Forwarding::Fast {
                    verdict = REDIRECT;
                    expected = expected.ttl(60).macs(mac(pod.ip()), BACKENDS_MAC);
                }
                let out = lab.from_clients(reply.frame());
                assert_eq!(out, Outcome { verdict, frame: expected.frame() }, "{what}: reply");
                // Where the kernel is left the reply, it leaves by the pod's interface as it is.
                let packet = case.segment(world, pod, segment);
                let out = lab.run(Program::Egress, packet.frame(), BACKENDS);
                assert_eq!(out, Outcome { verdict: PASS, frame: packet.frame() }, "{what}: to the pod");
                let packet = case.segment(pod, world, ACK).frame();
                assert_eq!(lab.from_backends(&packet), Outcome { verdict: PASS, frame: packet }, "{what}: ingress");
                let packet = case.segment(pod, world, ACK);
                let out = lab.to_clients(packet.frame());
                assert_eq!(out, Outcome { verdict: PASS, frame: packet.from(given).frame() }, "{what}: established");
            }
            let by = if forwarding == Forwarding::Fast { Counter::ToInterface } else { Counter::ToStack };
            assert_eq!(lab.counts(), [(by, 3), (Counter::FlowsMasqueraded, 1)], "{what}");
            let flows = lab.flows();
            assert_eq!(lab.count_flows(), flows.len() as u64, "{what}");
            let flow = flows.into_iter().find(|flow| flow.source == Some(given)).ok_or("it is not listed")?;
            assert_eq!((flow.client, flow.protocol), (pod, case.protocol.to_string()), "{what}");
            assert_eq!(flow.service, None, "{what}: it is no service's");
        }
    }
    Ok(())
}

#[test]
fn what_is_not_masqueraded_passes() -> TestResult {
    let mut lab = node_with(Forwarding::Fast)?;
    for case in CASES {
        lab.begin([]);
        let (pod, world) = (pod(case, 40000), world(case));
        let others = [
            ("an excluded destination", pod, SocketAddr::new(case.host(1, 20), 443)),
            ("another pod", pod, SocketAddr::new(case.host(2, 4), 443)),
            ("another source", SocketAddr::new(case.host(7, 3), 40000), world),
            ("the node", SocketAddr::new(node(case), 40000), world),
        ];
        for (what, from, to) in others {
            let frame = case.packet(from, to).frame();
            assert_eq!(lab.to_clients(&frame), Outcome { verdict: PASS, frame }, "{case}: {what}");
        }
        let frame = case.packet(pod, world).frame();
        let out = lab.run(Program::Egress, &frame, BACKENDS);
        assert_eq!(out, Outcome { verdict: PASS, frame }, "{case}: not an uplink");
        // The answer to a connection that came from outside.
        for segment in [SYN_ACK, ACK, FIN, RST] {
            if case == Case::tcp(case.family) {
                let frame = case.segment(pod, world, segment).frame();
                assert_eq!(lab.to_clients(&frame), Outcome { verdict: PASS, frame }, "{case}: {segment:?}");
            }
        }
        // To the node itself.
        let frame = case.packet(world, SocketAddr::new(node(case), 22)).frame();
        assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}: to the node");
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

#[test]
fn a_port_that_a_socket_of_the_node_has_is_not_given() -> TestResult {
    let mut lab = node_with(Forwarding::Fast)?;
    for case in [CASES[1], CASES[3]] {
        lab.begin([]);
        let given = |lab: &Lab, port| source(&lab.to_clients(sent(case, pod(case, port), world(case)).frame()).frame);
        let socket = UdpSocket::bind(SocketAddr::new(node(case), 62_000))?;
        assert_ne!(given(&lab, 62_000).port(), 62_000, "{case}");
        assert_eq!(given(&lab, 62_001), SocketAddr::new(node(case), 62_001), "{case}: it keeps its own");
        drop(socket);
        // Another pod with the same port gets another.
        let other = SocketAddr::new(case.host(2, 4), 62_001);
        let out = lab.to_clients(sent(case, other, world(case)).frame());
        assert_ne!(source(&out.frame).port(), 62_001, "{case}");
    }
    Ok(())
}

#[test]
fn with_every_port_taken_new_flows_are_dropped_and_the_others_go_on() -> TestResult {
    let mut lab = node_with(Forwarding::Fast)?;
    let case = CASES[0];
    lab.begin([]);
    let world = world(case);
    let mut first = None;
    let mut given = std::collections::HashSet::new();
    for n in 0..30_000_u32 {
        let [_, _, a, b] = n.to_be_bytes();
        let pod = SocketAddr::new([10, 244, 2, b].into(), 40_000 + u16::from(a));
        let out = lab.to_clients(sent(case, pod, world).frame());
        if out.verdict == DROP {
            continue;
        }
        let source = source(&out.frame);
        assert!(given.insert(source), "{source} is given twice");
        first.get_or_insert((pod, source));
        if given.len() == PORTS.count() {
            break;
        }
    }
    assert!(given.len() * 1000 >= PORTS.count() * 995, "{} ports are in use in the end", given.len());
    assert!(lab.count(Counter::SnatExhausted) > 0);
    assert_eq!(lab.count(Counter::FlowsMasqueraded), given.len() as u64);
    let (pod, source_of_first) = first.expect("a flow");
    let out = lab.to_clients(sent(case, pod, world).frame());
    assert_eq!(source(&out.frame), source_of_first);
    Ok(())
}

#[test]
fn either_half_of_a_flow_comes_back() -> TestResult {
    let mut lab = node_with(Forwarding::Fast)?;
    for case in CASES {
        lab.begin([]);
        let (pod, world) = (pod(case, 40000), world(case));
        let given = source(&lab.to_clients(sent(case, pod, world).frame()).frame);
        lab.from_clients(case.segment(world, given, SYN_ACK).frame());
        lab.to_clients(case.segment(pod, world, ACK).frame());
        for direction in [Direction::Reply, Direction::Forward] {
            assert_eq!(lab.lose(direction), 1, "{case}");
            lab.age(10);
            match direction {
                Direction::Reply => lab.to_clients(case.segment(pod, world, ACK).frame()),
                Direction::Forward => lab.from_clients(case.segment(world, given, ACK).frame()),
            };
            let out = lab.from_clients(case.segment(world, given, ACK).frame());
            assert_eq!(destination(&out.frame), pod, "{case}: {direction:?}");
            let out = lab.to_clients(case.segment(pod, world, ACK).frame());
            assert_eq!(source(&out.frame), given, "{case}: {direction:?}");
        }
    }
    Ok(())
}

/// A service of which the one backend is out in the world.
fn service(case: Case, mode: SnatMode) -> Service {
    let frontend = Frontend { address: case.vip(80), protocol: case.protocol };
    let backends = vec![Backend::new(world(case))];
    let service = Service::new(Some("world".to_owned()), vec![frontend], backends, Algorithm::Maglev);
    service.expect("a service").with_snat(mode)
}

#[test]
fn a_pod_reaches_a_service_whose_backend_is_in_the_world() -> TestResult {
    let mut lab = node_with(Forwarding::Fast)?;
    for case in CASES {
        lab.begin([service(case, SnatMode::Auto)]);
        let (pod, vip, world) = (pod(case, 40000), case.vip(80), world(case));
        let out = lab.from_backends(case.packet(pod, vip).frame());
        let given = source(&out.frame);
        assert_eq!((out.verdict, given.ip(), destination(&out.frame)), (REDIRECT, node(case), world), "{case}");
        // What is sent there passes egress as it is.
        assert_eq!(lab.to_clients(&out.frame), Outcome { verdict: PASS, frame: out.frame.clone() }, "{case}");
        let reply = lab.from_clients(case.segment(world, given, SYN_ACK).frame());
        assert_eq!((reply.verdict, source(&reply.frame), destination(&reply.frame)), (REDIRECT, vip, pod), "{case}");
        // The same port of the pod, straight to the backend.
        let straight = source(&lab.to_clients(sent(case, pod, world).frame()).frame);
        assert!(straight.ip() == node(case) && straight != given, "{case}: {straight}, {given}");
        let reply = lab.from_clients(case.segment(world, straight, SYN_ACK).frame());
        assert_eq!((source(&reply.frame), destination(&reply.frame)), (world, pod), "{case}");

        lab.begin([service(case, SnatMode::Never)]);
        let out = lab.from_backends(case.packet(pod, vip).frame());
        assert_eq!((source(&out.frame), destination(&out.frame)), (pod, world), "{case}: never");
        assert_eq!(lab.to_clients(&out.frame), Outcome { verdict: PASS, frame: out.frame.clone() }, "{case}: never");
    }
    Ok(())
}

/// An echo request, or the reply to one.
fn echo(case: Case, from: IpAddr, to: IpAddr, (is_reply, id): (bool, u16)) -> (Packet, Vec<u8>) {
    let packet = case.packet(SocketAddr::new(from, 1), SocketAddr::new(to, 1));
    let frame = echo_frame(&packet, (is_reply, id));
    (packet, frame)
}

fn echo_frame(packet: &Packet, (is_reply, id): (bool, u16)) -> Vec<u8> {
    let mut frame = packet.clone().payload([0x42; 56]).frame();
    let (protocol, at, number, kind) =
        if packet.source.is_ipv4() { (ETHERNET + 9, 34, 1, [8, 0]) } else { (ETHERNET + 6, 54, 58, [128, 129]) };
    patch(&mut frame, protocol, &[number]);
    let [a, b] = id.to_be_bytes();
    frame[at..at + 8].copy_from_slice(&[kind[usize::from(is_reply)], 0, 0, 0, a, b, 0, 7]);
    let mut sum = Sum16BitWords::new();
    if packet.source.is_ipv6() {
        sum = sum.add_slice(&frame[22..54]).add_4bytes([0, 0, 0, (frame.len() - at) as u8]).add_2bytes([0, number]);
    }
    let check = sum.add_slice(&frame[at..]).ones_complement().to_ne_bytes();
    frame[at + 2..at + 4].copy_from_slice(&check);
    frame
}

#[test]
fn a_pod_pings_the_world() -> TestResult {
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = node_with(forwarding)?;
        for case in [CASES[1], CASES[3]] {
            let what = format!("{case}, {forwarding:?}");
            lab.begin([]);
            let (pod, world) = (pod(case, 0).ip(), world(case).ip());
            for round in 0..3 {
                let (packet, request) = echo(case, pod, world, (false, 0x1234));
                let out = lab.to_clients(&request);
                let at = if world.is_ipv4() { 38 } else { 58 };
                let id = u16::from_be_bytes([out.frame[at], out.frame[at + 1]]);
                assert!(PORTS.contains(&id), "{what}: {id}");
                let expected = echo_frame(&packet.from(SocketAddr::new(node(case), 1)), (false, id));
                assert_eq!(out, Outcome { verdict: PASS, frame: expected }, "{what}: {round}");

                let (packet, reply) = echo(case, world, node(case), (true, id));
                let mut expected = packet.to(SocketAddr::new(pod, 1));
                let mut verdict = PASS;
                if forwarding == Forwarding::Fast {
                    verdict = REDIRECT;
                    expected = expected.ttl(60).macs(mac(pod), BACKENDS_MAC);
                }
                let expected = Outcome { verdict, frame: echo_frame(&expected, (true, 0x1234)) };
                assert_eq!(lab.from_clients(&reply), expected, "{what}: {round}");
                assert_eq!(lab.run_summed(Program::Ingress, &reply, CLIENTS).verdict, verdict, "{what}: summed");
            }
            assert_eq!(lab.count(Counter::FlowsMasqueraded), 1, "{what}");
            for (frame, what) in [
                (echo(case, world, node(case), (true, 77)).1, "a reply to the node"),
                (echo(case, world, node(case), (false, 77)).1, "a request to the node"),
            ] {
                assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}: {what}");
            }
            for (frame, what) in [
                (echo(case, pod, world, (true, 77)).1, "a pod's answer"),
                (echo(case, pod, case.host(1, 20), (false, 77)).1, "an excluded destination"),
            ] {
                assert_eq!(lab.to_clients(&frame), Outcome { verdict: PASS, frame }, "{case}: {what}");
            }
        }
    }
    Ok(())
}

/// Who traces a way with echo requests, or looks for how long they may be, is told by routers.
#[test]
fn an_error_about_a_ping_reaches_the_pod() -> TestResult {
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = node_with(forwarding)?;
        for case in [CASES[1], CASES[3]] {
            lab.begin([]);
            let (pod, world) = (pod(case, 0).ip(), world(case).ip());
            let (_, request) = echo(case, pod, world, (false, 0x1234));
            let seen = lab.to_clients(&request).frame;
            let (at, heads) = match case.family {
                Family::V4 => (38, [[11, 0, 0, 0, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0, 5, 20]]),
                Family::V6 => (58, [[3, 0, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 5, 20]]),
            };
            lab.counts();
            let router = case.host(1, 29);
            for head in heads {
                for quoted in [at - ETHERNET + 4, at - ETHERNET + 5, 500] {
                    let quote = |frame: &[u8]| frame[ETHERNET..frame.len().min(ETHERNET + quoted)].to_vec();
                    let what = format!("{case}, {forwarding:?}, {head:?}, {quoted}");
                    let error = icmp_error((CLIENTS_MAC, mac(router)), (router, node(case)), 61, head, &quote(&seen));
                    let expected = icmp_error((mac(pod), BACKENDS_MAC), (router, pod), 60, head, &quote(&request));
                    let expected = Outcome { verdict: REDIRECT, frame: expected };
                    assert_eq!(lab.from_clients(&error), expected, "{what}");
                    assert_eq!(lab.run_summed(Program::Ingress, &error, CLIENTS).verdict, REDIRECT, "{what}");

                    assert_eq!(lab.count(Counter::IcmpTranslated), 2, "{what}");
                    lab.counts();
                }
            }
            let mut own = echo(case, node(case), world, (false, 77)).1;
            for kind in 0..=255_u8 {
                own[at - 4] = kind;
                let error =
                    icmp_error((CLIENTS_MAC, mac(router)), (router, node(case)), 61, heads[0], &own[ETHERNET..]);
                assert_eq!(lab.from_clients(&error), Outcome { verdict: PASS, frame: error }, "{case}: the node's own");
            }
        }
    }
    Ok(())
}

#[test]
fn a_ping_in_fragments_gets_there_and_back() -> TestResult {
    const SIZE: usize = 24;
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = node_with(forwarding)?;
        for case in [CASES[1], CASES[3]] {
            lab.begin([]);
            let what = format!("{case}, {forwarding:?}");
            let (pod, world) = (pod(case, 0).ip(), world(case).ip());
            for round in 1..4 {
                let (packet, request) = echo(case, pod, world, (false, 0x1234));
                let sent = fragments(&request, round, SIZE);
                // Of a datagram whose first fragment was not seen nothing is known.
                let out = lab.to_clients(&sent[1]);
                assert_eq!(out, Outcome { verdict: PASS, frame: sent[1].clone() }, "{what}");
                let outs = Vec::from_iter(sent.iter().map(|frame| lab.to_clients(frame)));
                let at = if world.is_ipv4() { 38 } else { 66 };
                let id = u16::from_be_bytes([outs[0].frame[at], outs[0].frame[at + 1]]);
                assert!(PORTS.contains(&id), "{what}: {id}");
                let expected = echo_frame(&packet.from(SocketAddr::new(node(case), 1)), (false, id));
                let expected = fragments(&expected, round, SIZE).into_iter();
                let expected = Vec::from_iter(expected.map(|frame| Outcome { verdict: PASS, frame }));
                assert_eq!(outs, expected, "{what}: {round}");
                let head = if world.is_ipv4() { [3, 4, 0, 0, 0, 0, 5, 20] } else { [2, 0, 0, 0, 0, 0, 5, 20] };
                let router = case.host(1, 29);
                let error = |macs, to, about: &[u8], ttl| icmp_error(macs, (router, to), ttl, head, &about[ETHERNET..]);
                let expected = error((mac(pod), BACKENDS_MAC), pod, &sent[0], 60);
                let told = error((CLIENTS_MAC, mac(router)), node(case), &outs[0].frame, 61);
                assert_eq!(lab.from_clients(told), Outcome { verdict: REDIRECT, frame: expected }, "{what}: too big");

                let (packet, reply) = echo(case, world, node(case), (true, id));
                let mut expected = packet.to(SocketAddr::new(pod, 1));
                let mut verdict = PASS;
                if forwarding == Forwarding::Fast {
                    verdict = REDIRECT;
                    expected = expected.ttl(60).macs(mac(pod), BACKENDS_MAC);
                }
                let expected = fragments(&echo_frame(&expected, (true, 0x1234)), round, SIZE);
                let replies = fragments(&reply, round, SIZE);
                let out = lab.from_clients(&replies[1]);
                assert_eq!(out, Outcome { verdict: PASS, frame: replies[1].clone() }, "{what}");
                for (reply, frame) in replies.iter().zip(expected) {
                    assert_eq!(lab.from_clients(reply), Outcome { verdict, frame }, "{what}: {round}");
                    assert_eq!(lab.run_summed(Program::Ingress, reply, CLIENTS).verdict, verdict, "{what}: summed");
                }
            }
            assert_eq!(lab.count(Counter::FlowsMasqueraded), 1, "{what}");
            // What the world asks the node, and what it answers the node.
            for kind in [(false, 77), (true, 77)] {
                for frame in fragments(&echo(case, world, node(case), kind).1, 99, SIZE) {
                    assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{what}: {kind:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_sum_by_the_device_stays_right() -> TestResult {
    let mut lab = node_with(Forwarding::Fast)?;
    for case in CASES {
        lab.begin([]);
        let (pod, world) = (pod(case, 40000), world(case));
        let given = source(&lab.to_clients(sent(case, pod, world).frame()).frame);
        let reply = case.segment(world, given, SYN_ACK).frame();
        assert_eq!(lab.run_summed(Program::Ingress, reply, CLIENTS).verdict, REDIRECT, "{case}");
    }
    Ok(())
}
