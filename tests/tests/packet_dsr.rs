//! Services with direct server return: packets from outside are wrapped for backends of other nodes, and unwrapped there.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use netlb::config::Forwarding;
use netlb::datapath::kernel::testing::{Program, Site};
use netlb::model::{Mode, Protocol, Service};
use netlb::resolve::Node;
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_common::network::{Network, Networks};
use netlb_integration::frames::{ACK, ETHERNET, FIN, Packet, RST, SYN, SYN_ACK, fragments, icmp_error, patch, wrapped};
use netlb_integration::lab::{
    self, BACKENDS, BACKENDS_MAC, BACKENDS_MTU, CASES, CLIENTS, CLIENTS_MAC, Case, DROP, Lab, Outcome, PASS, REDIRECT,
    XDP_PASS, XDP_REDIRECT, addr, destination, mac, source,
};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

const UPLINK: Interface = Interface { role: role::UPLINK, flags: 0, pad: 0, master: 0 };
const POD: Interface = Interface { role: role::POD, flags: 0, pad: 0, master: 0 };

fn dsr(case: Case, backends: &[u8]) -> Service {
    case.service(backends).redefine(|service| service.mode = Mode::Dsr).expect("a service")
}

/// A node with addresses on both ways, of which both are uplinks.
fn balancer(mut lab: Lab) -> anyhow::Result<Lab> {
    lab::add_node_addresses()?;
    for index in [CLIENTS, BACKENDS] {
        lab.harness.set_interface(index, Interface { flags: Interface::XDP, ..UPLINK })?;
    }
    Ok(lab)
}

/// The balancing node's address towards the backends.
fn node(case: Case) -> IpAddr {
    case.host(2, 100)
}

/// What the balancing node makes of a packet to a backend.
fn sent(case: Case, packet: &Packet, backend: SocketAddr) -> Vec<u8> {
    let inner = packet.clone().ttl(packet.ttl - 1).macs(mac(backend.ip()), BACKENDS_MAC).frame();
    wrapped(&inner, node(case), backend.ip())
}

fn overhead(family: Family) -> u16 {
    if family == Family::V4 { 20 } else { 40 }
}

#[test]
fn packets_from_outside_are_wrapped_for_a_backend_of_another_node() -> TestResult {
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = balancer(Lab::at_with(&Site::default(), forwarding)?)?;
        for case in CASES {
            let service = dsr(case, &[3]);
            lab.begin([service.clone()]);
            let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
            for (round, segment) in [SYN, SYN, ACK, ACK, FIN, ACK].into_iter().enumerate() {
                let packet = case.segment(client, vip, segment).payload([0xa5; 77]);
                let expected = Outcome { verdict: REDIRECT, frame: sent(case, &packet, backend) };
                assert_eq!(lab.from_clients(packet.frame()), expected, "{case}, {round}");
                let state = match (case.protocol, round) {
                    (Protocol::Tcp, 0 | 1) => "syn-sent",
                    (Protocol::Tcp, 2 | 3) => "established",
                    (Protocol::Tcp, _) => "fin-forward",
                    (Protocol::Udp, 0) => "udp-one-way",
                    (Protocol::Udp, _) => "udp-both-ways",
                };
                assert_eq!(lab.states(), (vec![state], vec![]), "{case}, {round}");
            }
            let summed = case.segment(client, vip, ACK).payload([7; 33]);
            let expected = Outcome { verdict: REDIRECT, frame: sent(case, &summed, backend) };
            assert_eq!(lab.run_summed(Program::Ingress, summed.frame(), CLIENTS), expected, "{case}, summed");
            let counted = [(Counter::ToInterface, 7), (Counter::FlowsCreated, 1), (Counter::DsrWrapped, 7)];
            assert_eq!(lab.counts(), counted, "{case}");
            let stats = lab.stats(&service).service;
            assert_eq!((stats.flows, stats.packets_in, stats.packets_out), (1, 7, 0), "{case}");
            assert_eq!(lab.backend_stats(&service, backend).flows, 1, "{case}");
        }
    }
    Ok(())
}

#[test]
fn a_flow_that_begins_with_a_packet_too_long_for_its_way_is_wrapped() -> TestResult {
    let mut lab = balancer(Lab::fast()?)?;
    for case in CASES {
        lab.begin([dsr(case, &[3])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        lab.from_clients(case.packet(client, vip).sized(BACKENDS_MTU + 1).frame());
        assert_eq!(lab.count(Counter::TooBig), 1, "{case}");
        let packet = case.segment(client, vip, ACK);
        let expected = Outcome { verdict: REDIRECT, frame: sent(case, &packet, backend) };
        assert_eq!(lab.from_clients(packet.frame()), expected, "{case}");
    }
    Ok(())
}

#[test]
fn xdp_wraps_them_too() -> TestResult {
    let mut lab = balancer(Lab::fast()?)?;
    for case in CASES {
        let service = dsr(case, &[3]);
        lab.begin([service.clone()]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        let mut bytes = 0;
        for segment in [SYN, ACK, ACK] {
            let packet = case.segment(client, vip, segment).payload([0xa5; 77]);
            bytes += packet.frame().len() as u64;
            let expected = Outcome { verdict: XDP_REDIRECT, frame: sent(case, &packet, backend) };
            assert_eq!(lab.xdp_from_clients(packet.frame()), expected, "{case}");
        }
        let counted = [(Counter::FlowsCreated, 1), (Counter::SentByXdp, 3), (Counter::DsrWrapped, 3)];
        assert_eq!(lab.counts(), counted, "{case}");
        let stats = lab.stats(&service).service;
        assert_eq!((stats.packets_in, stats.bytes_in), (3, bytes), "{case}: as they came");
        let long = case.segment(client, vip, ACK).sized(BACKENDS_MTU - overhead(case.family) + 1).frame();
        assert_eq!(lab.xdp_from_clients(&long), Outcome { verdict: XDP_PASS, frame: long }, "{case}: for TC");
    }
    Ok(())
}

#[test]
fn the_traffic_class_is_the_outer_headers_too() -> TestResult {
    let mut lab = balancer(Lab::fast()?)?;
    let case = CASES[0];
    lab.begin([dsr(case, &[3])]);
    let packet = case.packet(case.client(40000), case.vip(80));
    for class in [0xb8, 1, 2, 3] {
        let (mut frame, mut expected) = (packet.frame(), sent(case, &packet, case.backend(3)));
        patch(&mut frame, ETHERNET + 1, &[class]);
        let mut inner = packet.clone().ttl(packet.ttl - 1).frame();
        patch(&mut inner, ETHERNET + 1, &[class]);
        expected.truncate(ETHERNET + 20);
        patch(&mut expected, ETHERNET + 1, &[class]);
        expected.extend(&inner[ETHERNET..]);
        assert_eq!(lab.from_clients(&frame), Outcome { verdict: REDIRECT, frame: expected.clone() }, "{class}");
        assert_eq!(lab.xdp_from_clients(&frame), Outcome { verdict: XDP_REDIRECT, frame: expected }, "{class}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_with_one_more_header_is_answered_or_dropped() -> TestResult {
    let mut lab = balancer(Lab::fast()?)?;
    for case in CASES {
        lab.begin([dsr(case, &[3])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        let most = BACKENDS_MTU - overhead(case.family);
        for _ in 0..2 {
            let fits = case.packet(client, vip).sized(most);
            let expected = sent(case, &fits, backend);
            assert_eq!(lab.from_clients(fits.frame()), Outcome { verdict: REDIRECT, frame: expected }, "{case}");
            let long = case.segment(client, vip, ACK).sized(most + 1);
            let out = lab.from_clients(long.frame());
            assert_eq!((out.verdict, &out.frame[..6]), (REDIRECT, &long.from_mac[..]), "{case}: sent back");
            let mtu = match case.family {
                Family::V4 => {
                    assert_eq!(out.frame[34..36], [3, 4], "{case}");
                    u16::from_be_bytes([out.frame[40], out.frame[41]])
                }
                Family::V6 => {
                    assert_eq!(out.frame[54..56], [2, 0], "{case}");
                    u16::from_be_bytes([out.frame[60], out.frame[61]])
                }
            };
            assert_eq!(mtu, most, "{case}");
            assert_eq!(lab.count(Counter::TooBig), 1, "{case}");
            if case.family == Family::V4 {
                let out = lab.from_clients(case.packet(client, vip).sized(most + 1).may_fragment().frame());
                assert_eq!(out.verdict, DROP, "{case}");
                assert_eq!(lab.count(Counter::DsrTooBig), 1, "{case}");
            }
            lab.counts();
        }
    }
    Ok(())
}

/// Pods have their replies translated, wherever the backend is; and clients outside do for backends of the node.
#[test]
fn everything_else_of_such_a_service_is_translated() -> TestResult {
    let mut lab = balancer(Lab::fast()?)?;
    for (clients, backends) in [(POD, UPLINK), (UPLINK, POD), (POD, POD)] {
        lab.harness.set_interface(CLIENTS, clients)?;
        lab.harness.set_interface(BACKENDS, backends)?;
        for case in CASES {
            lab.begin([dsr(case, &[3])]);
            let backend = lab.connect(case, case.client(40000), case.vip(80));
            assert_eq!(backend, case.backend(3), "{case}");
            assert_eq!(lab.count(Counter::DsrWrapped), 0, "{case}");
        }
    }
    Ok(())
}

#[test]
fn a_flow_stays_at_its_backend_and_a_new_one_does_not_go_where_no_backend_is() -> TestResult {
    let mut lab = balancer(Lab::fast()?)?;
    for case in CASES {
        let outer = |out: &Outcome| {
            assert_eq!(out.verdict, REDIRECT, "{case}");
            destination(&out.frame).ip()
        };
        lab.begin([dsr(case, &[3])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        for segment in [SYN, ACK] {
            let out = lab.from_clients(case.segment(client, vip, segment).frame());
            assert_eq!(outer(&out), case.backend(3).ip(), "{case}");
        }
        lab.serve([dsr(case, &[3, 4, 5, 6, 7, 8, 9, 10])]);
        let out = lab.from_clients(case.segment(client, vip, ACK).frame());
        assert_eq!(outer(&out), case.backend(3).ip(), "{case}");
        lab.serve([dsr(case, &[4])]);
        let kept = if case.protocol == Protocol::Tcp { 3 } else { 4 };
        for _ in 0..2 {
            let out = lab.from_clients(case.segment(client, vip, ACK).frame());
            assert_eq!(outer(&out), case.backend(kept).ip(), "{case}: datagrams leave who serves no more");
        }
        let out = lab.from_clients(case.packet(case.client(40001), vip).frame());
        assert_eq!(outer(&out), case.backend(4).ip(), "{case}");
        if case.protocol == Protocol::Tcp {
            lab.from_clients(case.segment(client, vip, RST).frame());
            let out = lab.from_clients(case.packet(client, vip).frame());
            assert_eq!(outer(&out), case.backend(4).ip(), "{case}: a new connection");
        }
    }
    Ok(())
}

/// An ICMP error about a packet, as a router says it.
fn error(case: Case, about: &Packet) -> Vec<u8> {
    let router = case.host(1, 29);
    let quoted = about.frame();
    let quoted = &quoted[ETHERNET..(ETHERNET + 68).min(quoted.len())];
    icmp_error((CLIENTS_MAC, mac(router)), (router, about.source.ip()), 61, too_big(case.family), quoted)
}

fn too_big(family: Family) -> [u8; 8] {
    if family == Family::V4 { [3, 4, 0, 0, 0, 0, 5, 20] } else { [2, 0, 0, 0, 0, 0, 5, 84] }
}

/// With one hop less, and the hardware addresses of a way.
fn forwarded(case: Case, frame: &[u8], to: IpAddr) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&mac(to));
    frame[6..12].copy_from_slice(&BACKENDS_MAC);
    let hops = ETHERNET + if case.family == Family::V4 { 8 } else { 7 };
    let left = frame[hops] - 1;
    patch(&mut frame, hops, &[left]);
    frame
}

#[test]
fn an_error_about_what_a_backend_sent_is_wrapped_for_it() -> TestResult {
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = balancer(Lab::at_with(&Site::default(), forwarding)?)?;
        for case in CASES {
            lab.begin([dsr(case, &[3])]);
            let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
            lab.from_clients(case.packet(client, vip).frame());
            lab.counts();
            let states = lab.states();
            let told = error(case, &case.segment(vip, client, ACK));
            let expected = wrapped(&forwarded(case, &told, backend.ip()), node(case), backend.ip());
            assert_eq!(lab.from_clients(&told), Outcome { verdict: REDIRECT, frame: expected }, "{case}");
            let counted = [(Counter::ToInterface, 1), (Counter::IcmpTranslated, 1), (Counter::DsrWrapped, 1)];
            assert_eq!(lab.counts(), counted, "{case}");
            assert_eq!(lab.states(), states, "{case}: it is no packet of the flow");
            let other = error(case, &case.segment(vip, case.client(40001), ACK));
            assert_eq!(lab.from_clients(&other), Outcome { verdict: PASS, frame: other }, "{case}: of no flow");
        }
    }
    Ok(())
}

/// What a router between the nodes says of a packet that the balancing node wrapped.
fn told(case: Case, head: [u8; 8], about: &[u8], quoted: usize) -> Vec<u8> {
    let router = case.host(2, 29);
    let quote = &about[ETHERNET..about.len().min(ETHERNET + quoted)];
    icmp_error((BACKENDS_MAC, mac(router)), (router, node(case)), 61, head, quote)
}

/// What the client is told instead: by the service, of what it sent.
fn relayed(case: Case, head: [u8; 8], inner: &[u8]) -> Vec<u8> {
    let (client, vip) = (case.client(40000).ip(), case.vip(80).ip());
    let quote = &inner[..inner.len().min(if case.family == Family::V4 { 84 } else { 256 })];
    let mut frame = icmp_error((mac(client), CLIENTS_MAC), (vip, client), 64, head, quote);
    if case.family == Family::V4 {
        patch(&mut frame, ETHERNET + 1, &[0]);
        patch(&mut frame, ETHERNET + 4, &[0, 0, 0x40, 0]);
    }
    frame
}

/// Types and codes, with what is in the rest of the header, and the same as the client is told.
fn relays(family: Family) -> Vec<([u8; 8], [u8; 8])> {
    match family {
        Family::V4 => {
            let unreachable = [3, 1, 0, 0, 0, 0, 0, 0];
            let mut all = vec![(too_big(family), [3, 4, 0, 0, 0, 0, 5, 0])];
            all.extend(
                [(3, 0), (3, 1), (3, 2), (3, 13), (11, 0)].map(|(a, b)| ([a, b, 0, 0, 0, 0, 0, 0], unreachable)),
            );
            all
        }
        Family::V6 => {
            let unreachable = [1, 3, 0, 0, 0, 0, 0, 0];
            // Nobody is asked for less than 1280 bytes.
            let mut all = vec![
                (too_big(family), [2, 0, 0, 0, 0, 0, 5, 44]),
                ([2, 0, 0, 0, 0, 0, 5, 20], [2, 0, 0, 0, 0, 0, 5, 0]),
            ];
            all.extend([(1, 0), (1, 3), (3, 0), (4, 1)].map(|(a, b)| ([a, b, 0, 0, 0, 0, 0, 0], unreachable)));
            all
        }
    }
}

#[test]
fn an_error_about_a_wrapped_packet_is_one_about_the_clients() -> TestResult {
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = balancer(Lab::at_with(&Site::default(), forwarding)?)?;
        for case in CASES {
            lab.begin([dsr(case, &[3])]);
            let (client, vip) = (case.client(40000), case.vip(80));
            let out = lab.from_clients(case.packet(client, vip).frame());
            assert_eq!(out.verdict, REDIRECT, "{case}");
            let headers = 2 * usize::from(overhead(case.family));
            let long = case.segment(client, vip, ACK).payload([0xa5; 1200]);
            let sent = lab.from_clients(long.frame()).frame;
            let short = lab.from_clients(case.segment(client, vip, ACK).payload([1; 7]).frame()).frame;
            lab.counts();
            for (said, heard) in relays(case.family) {
                for (about, quoted) in
                    [(&sent, 528), (&sent, headers + 8), (&sent, headers + 9), (&sent, 1232), (&short, 528)]
                {
                    let what = format!("{case}: {said:?}, {quoted} bytes");
                    let error = told(case, said, about, quoted);
                    let end = about.len().min(ETHERNET + quoted);
                    let inner = &about[ETHERNET + usize::from(overhead(case.family))..end];
                    let expected = Outcome { verdict: REDIRECT, frame: relayed(case, heard, inner) };
                    assert_eq!(lab.from_backends(&error), expected, "{what}");
                    let counted = [(Counter::ToInterface, 1), (Counter::IcmpTranslated, 1)];
                    assert_eq!(lab.counts(), counted, "{what}");
                }
            }
        }
    }
    Ok(())
}

/// Each of these is wrong in one thing alone.
#[test]
fn an_error_about_a_wrapped_packet_that_says_too_little_or_is_about_none_passes() -> TestResult {
    let mut lab = balancer(Lab::fast()?)?;
    for case in CASES {
        lab.begin([dsr(case, &[3])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        let out = lab.from_clients(case.packet(client, vip).frame());
        assert_eq!(out.verdict, REDIRECT, "{case}");
        let about = case.segment(client, vip, ACK).payload([0xa5; 77]);
        let sent = lab.from_clients(about.frame()).frame;
        lab.counts();
        let (said, headers) = (too_big(case.family), 2 * usize::from(overhead(case.family)));
        let of = |packet: Packet, from: IpAddr, to: IpAddr| told(case, said, &wrapped(&packet.frame(), from, to), 528);
        let mut lost = vec![
            ("of no flow", of(about.clone().from(case.client(40001)), node(case), backend.ip())),
            ("to another port", of(about.clone().to(case.vip(81)), node(case), backend.ip())),
            ("no packet inside", told(case, said, &sent, headers / 2)),
            ("no ports inside", told(case, said, &sent, headers + 7)),
        ];
        let mut vague = said;
        vague[4..].fill(0);
        lost.push(("how long it may be", told(case, vague, &sent, 528)));
        for (what, frame) in lost {
            assert_eq!(lab.from_backends(&frame), Outcome { verdict: PASS, frame: frame.clone() }, "{case}: {what}");
            assert_eq!(lab.counts(), [(Counter::DsrErrorLost, 1)], "{case}: {what}");
        }
        // Known at an address where backends are, and wrapped for another one.
        lab.serve([dsr(case, &[3, 4])]);
        let elsewhere = of(about.clone(), node(case), case.backend(4).ip());
        let out = lab.from_backends(&elsewhere);
        assert_eq!(out, Outcome { verdict: PASS, frame: elsewhere }, "{case}: to another backend");
        assert_eq!(lab.counts(), [(Counter::DsrErrorLost, 1)], "{case}");
        let other = [
            ("by somebody else", of(about.clone(), case.host(2, 17), backend.ip())),
            ("to no backend", of(about.clone(), node(case), case.host(2, 18))),
            ("about a packet that was not wrapped", told(case, said, &about.clone().frame(), 528)),
        ];
        for (what, frame) in other {
            assert_eq!(lab.from_backends(&frame), Outcome { verdict: PASS, frame: frame.clone() }, "{case}: {what}");
            assert_eq!(lab.counts(), [], "{case}: {what}");
        }
        let error = told(case, said, &sent, 528);
        assert_eq!(lab.to_clients(&error), Outcome { verdict: PASS, frame: error.clone() }, "{case}: on its way out");
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

/// The receiving node: clients and other nodes beyond the one interface, pods behind the other.
fn receiver(forwarding: Forwarding) -> anyhow::Result<Lab> {
    let network = |case: Case, bits| Network::new(addr(case.host(1, 0)), bits);
    let mut dsr_from = Networks { len: 2, ..Networks::NONE };
    (dsr_from.all[0], dsr_from.all[1]) = (network(CASES[0], 96 + 28), network(CASES[2], 124));
    let mut lab = Lab::at_with(&Site { dsr_from, ..Site::default() }, forwarding)?;
    lab.harness.set_interface(CLIENTS, UPLINK)?;
    Ok(lab)
}

/// A balancing node that is accepted, and one that is not.
fn other_node(case: Case) -> IpAddr {
    case.host(1, 12)
}

fn stranger(case: Case) -> IpAddr {
    case.host(1, 17)
}

/// A packet as the balancing node sends it here, for a backend.
fn handed(case: Case, packet: &Packet, backend: SocketAddr) -> Vec<u8> {
    wrapped(&packet.clone().macs(CLIENTS_MAC, mac(other_node(case))).frame(), other_node(case), backend.ip())
}

#[test]
fn a_wrapped_packet_gets_to_the_backend_it_was_wrapped_for_and_the_reply_to_the_client() -> TestResult {
    let mut lab = receiver(Forwarding::Fast)?;
    for case in CASES {
        let service = dsr(case, &[3, 4, 5, 6, 7, 8]);
        lab.begin([service.clone()]);
        let vip = case.vip(80);
        // A client beyond all networks: replies go by the way to the other node all the same.
        for (port, host) in (40000..).zip([3, 4, 5, 6, 7, 8, 3, 4]) {
            let (client, backend) = (case.client(port), case.backend(host));
            lab.counts();
            for segment in [SYN, ACK, ACK] {
                let packet = case.segment(client, vip, segment).payload([0xa5; 77]);
                let expected = packet.clone().to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
                let frame = handed(case, &packet, backend);
                let expected = Outcome { verdict: REDIRECT, frame: expected };
                assert_eq!(lab.from_clients(&frame), expected, "{case}, {port}");
                assert_eq!(lab.run_summed(Program::Ingress, &frame, CLIENTS), expected, "{case}, {port}: summed");
                assert_eq!(lab.xdp_from_clients(&frame), Outcome { verdict: XDP_PASS, frame }, "{case}, {port}");

                let reply = case.segment(backend, client, SYN_ACK);
                let expected = reply.clone().from(vip).ttl(60).macs(mac(client.ip()), CLIENTS_MAC).frame();
                let out = lab.from_backends(reply.frame());
                assert_eq!(out, Outcome { verdict: REDIRECT, frame: expected }, "{case}, {port}: reply");
            }
            let counted = [(Counter::ToInterface, 9), (Counter::FlowsCreated, 1), (Counter::DsrUnwrapped, 6)];
            assert_eq!(lab.counts(), counted, "{case}, {port}");
        }
        let stats = lab.stats(&service).service;
        assert_eq!((stats.flows, stats.packets_in, stats.packets_out), (8, 48, 24), "{case}");
    }
    Ok(())
}

#[test]
fn with_forwarding_by_the_stack_too() -> TestResult {
    let mut lab = receiver(Forwarding::Stack)?;
    for case in CASES {
        lab.begin([dsr(case, &[3, 4])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(4));
        for _ in 0..2 {
            let packet = case.packet(client, vip).macs(CLIENTS_MAC, mac(other_node(case)));
            let expected = packet.clone().to(backend).frame();
            let out = lab.from_clients(handed(case, &packet, backend));
            assert_eq!(out, Outcome { verdict: PASS, frame: expected }, "{case}");
        }
        let reply = case.segment(backend, client, SYN_ACK);
        let expected = reply.clone().from(vip).frame();
        assert_eq!(lab.to_clients(reply.frame()), Outcome { verdict: PASS, frame: expected }, "{case}");
    }
    Ok(())
}

/// Whoever balances knows best: a flow that is sent to another backend is that one's.
#[test]
fn a_flow_that_is_handed_to_another_backend_is_its() -> TestResult {
    let mut lab = receiver(Forwarding::Fast)?;
    for case in CASES {
        lab.begin([dsr(case, &[3, 4])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        for host in [3, 4, 4, 3] {
            let backend = case.backend(host);
            let out = lab.from_clients(handed(case, &case.packet(client, vip), backend));
            assert_eq!((out.verdict, destination(&out.frame)), (REDIRECT, backend), "{case}");
            assert_eq!(source(&out.frame), client, "{case}");
            assert_eq!(lab.count_flows(), 1, "{case}");
        }
    }
    Ok(())
}

#[test]
fn congestion_met_on_the_way_is_told() -> TestResult {
    let mut lab = receiver(Forwarding::Fast)?;
    let case = CASES[0];
    lab.begin([dsr(case, &[3])]);
    let packet = case.packet(case.client(40000), case.vip(80));
    for (outer, inner, expected) in
        [(0, 0, Some(0)), (2, 2, Some(2)), (3, 2, Some(3)), (3, 1, Some(3)), (1, 2, Some(1)), (3, 0, None)]
    {
        let mut frame = packet.clone().macs(CLIENTS_MAC, mac(other_node(case))).frame();
        patch(&mut frame, ETHERNET + 1, &[0xb8 | inner]);
        let mut frame = wrapped(&frame, other_node(case), case.backend(3).ip());
        patch(&mut frame, ETHERNET + 1, &[0xb8 | outer]);
        lab.counts();
        for run in [lab.from_clients(&frame), lab.run_summed(Program::Ingress, &frame, CLIENTS)] {
            let Some(expected) = expected else {
                assert_eq!(run.verdict, DROP);
                continue;
            };
            let backend = case.backend(3);
            let mut frame = packet.clone().to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
            patch(&mut frame, ETHERNET + 1, &[0xb8 | expected]);
            assert_eq!(run, Outcome { verdict: REDIRECT, frame }, "{inner} in {outer}");
        }
        assert_eq!(lab.count(Counter::DsrCongested), if expected.is_none() { 2 } else { 0 });
    }
    // Of IPv6, across two bytes.
    let case = CASES[2];
    lab.begin([dsr(case, &[3])]);
    let backend = case.backend(3);
    let packet = case.packet(case.client(40000), case.vip(80));
    let mut frame = packet.clone().macs(CLIENTS_MAC, mac(other_node(case))).frame();
    frame[ETHERNET + 1] |= 0x20;
    let mut frame = wrapped(&frame, other_node(case), backend.ip());
    frame[ETHERNET + 1] |= 0x30;
    let mut expected = packet.to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
    expected[ETHERNET + 1] |= 0x30;
    let expected = Outcome { verdict: REDIRECT, frame: expected };
    assert_eq!(lab.from_clients(&frame), expected);
    assert_eq!(lab.run_summed(Program::Ingress, &frame, CLIENTS), expected);
    Ok(())
}

#[test]
fn what_is_not_to_be_unwrapped_passes_bit_for_bit() -> TestResult {
    let mut lab = receiver(Forwarding::Fast)?;
    // The node's own address; the classic way has a service's there.
    for case in CASES {
        lab.harness.programmer_mut().set_node(Node { addresses: vec![case.host(9, 9)], ..Node::default() });
        lab.begin([dsr(case, &[3])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        let packet = case.packet(client, vip);
        let accepted = handed(case, &packet, backend);
        let of_stranger = wrapped(&packet.frame(), stranger(case), backend.ip());
        let of_nobody = handed(case, &case.packet(client, case.vip(81)), backend);
        let leads_on = handed(case, &packet, SocketAddr::new(case.host(1, 20), 8080));
        let loopback = |port| {
            SocketAddr::new(
                if case.family == Family::V4 { [127, 0, 0, 1].into() } else { Ipv6Addr::LOCALHOST.into() },
                port,
            )
        };
        let of_loopback = handed(case, &case.packet(loopback(40000), vip), backend);
        let mut passing = vec![
            ("a stranger's", of_stranger),
            ("no service's", of_nobody),
            ("another node's", leads_on),
            ("from a loopback address", of_loopback),
        ];
        for len in ETHERNET + usize::from(overhead(case.family))..accepted.len() - packet.payload.len() - 12 {
            passing.push(("cut off", accepted[..len].to_vec()));
        }
        if case.family == Family::V4 {
            let mut fragment = accepted.clone();
            patch(&mut fragment, ETHERNET + 6, &[0x20, 0]);
            passing.push(("a fragment", fragment));
        }
        for (what, frame) in passing {
            let out = lab.from_clients(&frame);
            assert_eq!(out, Outcome { verdict: PASS, frame }, "{case}: {what}");
        }
        let out = lab.from_backends(&accepted);
        assert_eq!(out, Outcome { verdict: PASS, frame: accepted.clone() }, "{case}: from a pod");
        let out = lab.to_clients(&accepted);
        assert_eq!(out, Outcome { verdict: PASS, frame: accepted }, "{case}: on its way out");
        assert_eq!((lab.count_flows(), lab.count(Counter::DsrUnwrapped)), (0, 0), "{case}");

        let unknown = handed(case, &packet, case.backend(4));
        assert_eq!(lab.from_clients(unknown).verdict, DROP, "{case}: no backend of the service");
        assert_eq!(lab.count(Counter::DsrNoBackend), 1, "{case}");

        let own = case.packet(client, SocketAddr::new(case.host(9, 9), 80));
        let expected = own.clone().macs(CLIENTS_MAC, mac(other_node(case))).frame();
        let out = lab.from_clients(handed(case, &own, backend));
        assert_eq!(out, Outcome { verdict: PASS, frame: expected }, "{case}: for the node itself");
    }
    Ok(())
}

#[test]
fn without_networks_nothing_is_unwrapped() -> TestResult {
    let mut lab = Lab::fast()?;
    lab.harness.set_interface(CLIENTS, UPLINK)?;
    for case in CASES {
        lab.begin([dsr(case, &[3])]);
        let frame = handed(case, &case.packet(case.client(40000), case.vip(80)), case.backend(3));
        assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}");
    }
    Ok(())
}

/// They come in once more, without the header, and are then what any fragment or error is.
#[test]
fn fragments_and_errors_are_unwrapped_and_come_in_by_themselves() -> TestResult {
    let mut lab = receiver(Forwarding::Fast)?;
    for case in CASES {
        lab.begin([dsr(case, &[3, 4, 5])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(4));
        let to_node = |packet: Packet| packet.macs(CLIENTS_MAC, mac(other_node(case)));
        let whole = to_node(case.packet(client, vip).payload([0x5a; 900]).may_fragment()).frame();
        for fragment in fragments(&whole, 77, 512) {
            let frame = wrapped(&fragment, other_node(case), backend.ip());
            let out = lab.from_clients(frame);
            assert_eq!(out, Outcome { verdict: REDIRECT, frame: fragment.clone() }, "{case}");
            let out = lab.from_clients(&fragment);
            assert_eq!(out.verdict, REDIRECT, "{case}");
            assert_eq!(destination(&out.frame).ip(), backend.ip(), "{case}: to the backend it was wrapped for");
        }
        let told = error(case, &case.segment(vip, client, ACK));
        let out = lab.from_clients(wrapped(&told, other_node(case), backend.ip()));
        assert_eq!(out, Outcome { verdict: REDIRECT, frame: told.clone() }, "{case}");
        let out = lab.from_clients(told);
        assert_eq!((out.verdict, destination(&out.frame).ip()), (REDIRECT, backend.ip()), "{case}");
        assert_eq!(lab.count(Counter::IcmpTranslated), 1, "{case}");
    }
    Ok(())
}
