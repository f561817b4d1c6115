//! Where translated packets go: past uplinks, and answered where they are too long for the way.

use std::thread;
use std::time::Duration;

use etherparse::checksum::Sum16BitWords;
use etherparse::err::packet::SliceError;
use etherparse::{Icmpv4Type, Icmpv6Type, NetSlice, SlicedPacket, TransportSlice, icmpv4};
use netlb::config::Snat;
use netlb::datapath::kernel::testing::{Program, Site};
use netlb::model::Protocol;
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_common::network::Networks;
use netlb_integration::exec::Cmd;
use netlb_integration::frames::{ACK, ETHERNET, Packet, SYN_ACK};
use netlb_integration::lab::{
    BACKENDS, BACKENDS_MAC, BACKENDS_MTU, CASES, CLIENTS, Case, DROP, Lab, Outcome, PASS, REDIRECT, mac, source,
};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

const POD: Interface = Interface { role: role::POD, flags: 0, pad: 0, master: 0 };
const UPLINK: Interface = Interface { role: role::UPLINK, ..POD };

#[test]
fn from_an_uplink_to_a_backend_behind_an_uplink_passes_untouched() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        lab.harness.set_interface(CLIENTS, UPLINK)?;
        lab.harness.set_interface(BACKENDS, UPLINK)?;
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let frame = case.packet(case.client(40000), case.vip(80)).frame();
            assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}");
            assert_eq!(lab.counts(), [(Counter::NeedsSnat, 1)], "{case}");
            assert_eq!(lab.count_flows(), 0, "{case}");
        }
    }
    Ok(())
}

#[test]
fn between_an_uplink_and_a_pod_packets_are_translated() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for (clients, backends) in [(UPLINK, POD), (POD, UPLINK)] {
            lab.harness.set_interface(CLIENTS, clients)?;
            lab.harness.set_interface(BACKENDS, backends)?;
            for case in CASES {
                lab.begin([case.service(&[3])]);
                let (client, backend) = (case.client(40000), case.backend(3));
                assert_eq!(lab.backend_of(&case.packet(client, case.vip(80))), backend, "{case}");
                let reply = case.segment(backend, client, SYN_ACK).frame();
                let at_ingress = lab.from_backends(&reply);
                let out = if at_ingress.verdict == REDIRECT { at_ingress } else { lab.to_clients(&reply) };
                assert_eq!(source(&out.frame), case.vip(80), "{case}");
                assert_eq!(lab.count(Counter::NeedsSnat), 0, "{case}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_packet_as_long_as_the_way_takes_is_sent_on() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let request = case.packet(case.client(40000), case.vip(80)).sized(BACKENDS_MTU);
        let backend = case.backend(3);
        let frame = request.clone().to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
        assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: REDIRECT, frame }, "{case}");
        assert_eq!(lab.counts(), [(Counter::ToInterface, 1), (Counter::FlowsCreated, 1)], "{case}");
    }
    Ok(())
}

#[test]
fn a_packet_too_long_for_the_way_is_answered() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            for len in [BACKENDS_MTU + 1, 1499, 1500] {
                lab.begin([case.service(&[3])]);
                let request = case.packet(case.client(40000), case.vip(80)).sized(len);
                let out = lab.from_clients(request.frame());
                assert_eq!(out.verdict, REDIRECT, "{case}: {len} bytes");
                assert_too_big(&out.frame, &request, BACKENDS_MTU, &format!("{case}: {len} bytes"));
                assert_eq!(lab.count(Counter::TooBig), 1, "{case}: {len} bytes");
                assert_eq!(lab.count(Counter::ToInterface) + lab.count(Counter::ToStack), 0, "{case}: {len} bytes");
            }
        }
    }
    Ok(())
}

/// With headers longer than usual, the quotation still has the transport's ports.
#[test]
fn a_packet_with_long_headers_is_answered() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let request = case.packet(case.client(40000), case.vip(80));
        let request = match case.family {
            Family::V4 => request.options([1; 40]),
            Family::V6 => request.extension(60, [0, 5, 1, 44].into_iter().chain([0; 44]).collect::<Vec<u8>>()),
        };
        let request = request.payload([0x5a; 1390]);
        let out = lab.from_clients(request.frame());
        assert_eq!(out.verdict, REDIRECT, "{case}");
        assert_too_big(&out.frame, &request, BACKENDS_MTU, &format!("{case}"));
    }
    Ok(())
}

#[test]
fn a_reply_too_long_for_the_way_is_answered() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (client, backend) = (case.client(40000), case.backend(3));
        lab.backend_of(&case.packet(client, case.vip(80)));
        lab.counts();
        let reply = case.segment(backend, client, ACK).sized(1600);
        let out = lab.from_backends(reply.frame());
        assert_eq!(out.verdict, REDIRECT, "{case}");
        // The backend is told of the packet that it sent.
        assert_too_big(&out.frame, &reply, 1500, &format!("{case}"));
        assert_eq!(lab.counts(), [(Counter::TooBig, 1)], "{case}");
    }
    Ok(())
}

#[test]
fn a_long_packet_that_may_be_fragmented_is_the_stacks() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let case = Case { family: Family::V4, protocol };
            lab.begin([case.service(&[3])]);
            let request = case.packet(case.client(40000), case.vip(80)).may_fragment().sized(1500);
            let frame = request.clone().to(case.backend(3)).frame();
            assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: PASS, frame }, "{case}");
            assert_eq!(lab.counts(), [(Counter::ToStack, 1), (Counter::FlowsCreated, 1)], "{case}");
        }
    }
    Ok(())
}

/// The kernel takes nothing that comes in with an address of its own, which the service's may be. So it forwards the backend's, and what
/// leaves is translated.
#[test]
fn a_long_reply_that_may_be_fragmented_is_translated_as_it_leaves() -> TestResult {
    let mut lab = Lab::fast()?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let case = Case { family: Family::V4, protocol };
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let backend = lab.connect(case, client, vip);
        let before = lab.stats(&service).service.packets_out;
        let reply = case.segment(backend, client, ACK).may_fragment();
        let long = reply.clone().sized(1501).frame();
        assert_eq!(lab.from_backends(&long), Outcome { verdict: PASS, frame: long.clone() }, "{case}");
        assert_eq!(lab.stats(&service).service.packets_out, before, "{case}: not counted twice");
        // As the kernel cuts it.
        let out = lab.to_clients(reply.sized(1496).frame());
        assert_eq!((out.verdict, source(&out.frame)), (PASS, vip), "{case}");
        assert_eq!(lab.stats(&service).service.packets_out, before + 1, "{case}");
    }
    Ok(())
}

/// What counts are the packets on the wire: a device cuts this one into segments that fit.
#[test]
fn a_packet_that_stands_for_segments_is_sent_on_whole() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        lab.connect(case, client, vip);
        let before = lab.stats(&service).service;
        let request = case.segment(client, vip, ACK).payload([0x5a; 2600]);
        let out = lab.run_segments(Program::Ingress, request.frame(), CLIENTS, (2, 1300));
        let frame = request.clone().to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
        assert_eq!(out, Outcome { verdict: REDIRECT, frame }, "{family}");
        assert_eq!(lab.stats(&service).service.packets_in, before.packets_in + 2, "{family}");

        let long = lab.run_segments(Program::Ingress, request.frame(), CLIENTS, (2, 1390));
        assert_eq!(lab.count(Counter::TooBig), 1, "{family}: segments that do not fit");
        assert_eq!(long.verdict, REDIRECT, "{family}");
        assert_too_big(&long.frame, &request, BACKENDS_MTU, &format!("{family}: segments"));
    }
    Ok(())
}

#[test]
fn a_packet_to_nowhere_is_dropped() -> TestResult {
    let mut lab = Lab::fast()?;
    Cmd::new("ip")
        .args(["-batch", "-"])
        .input("route replace blackhole 10.244.2.0/24\nroute replace blackhole fd00:10:244:2::/64 metric 1\n")
        .run()?
        .success()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let out = lab.from_clients(case.packet(case.client(40000), case.vip(80)).frame());
        assert_eq!(out.verdict, DROP, "{case}");
        assert_eq!(lab.count(Counter::NoRoute), 1, "{case}");
    }
    Ok(())
}

/// Where routing goes by destinations, flows to one address follow each other for two ticks. Without routes, who asks is dropped.
#[test]
fn new_flows_go_where_others_went() -> TestResult {
    const DIRECT: Interface = Interface { flags: Interface::DIRECT, ..POD };
    const TWO_TICKS: Duration = Duration::from_millis(2200);
    let mut lab = Lab::fast()?;
    let send = |lab: &Lab, case: Case, port: u16, service: u16| {
        lab.from_clients(case.packet(case.client(port), case.vip(service)).frame()).verdict
    };
    for (is_direct, backends) in [(false, POD), (true, DIRECT)] {
        lab.harness.set_interface(BACKENDS, backends)?;
        for case in CASES {
            lab.begin([case.service(&[3]), case.service_at(81, &[4])]);
            Cmd::new("ip")
                .args(["-batch", "-"])
                .input("route replace 10.244.2.0/24 dev backends\nroute del blackhole fd00:10:244:2::/64 metric 1\n")
                .run()?;
            assert_eq!(send(&lab, case, 40000, 80), REDIRECT, "{case}");
            Cmd::new("ip")
                .args(["-batch", "-"])
                .input("route replace blackhole 10.244.2.0/24\nroute add blackhole fd00:10:244:2::/64 metric 1\n")
                .run()?
                .success()?;
            let expected = if is_direct { REDIRECT } else { DROP };
            assert_eq!(send(&lab, case, 40001, 80), expected, "{case}: another flow");
            assert_eq!(send(&lab, case, 40001, 81), DROP, "{case}: to another backend");
        }
        if is_direct {
            // Where the last case went.
            let case = CASES[CASES.len() - 1];
            thread::sleep(TWO_TICKS);
            assert_eq!(send(&lab, case, 40002, 80), DROP, "{case}: after two ticks");
        }
    }
    Ok(())
}

/// To what is behind a gateway there may be several ways: every flow asks.
#[test]
fn new_flows_to_behind_a_gateway_ask_for_themselves() -> TestResult {
    let mut lab = Lab::fast()?;
    lab.harness.set_interface(BACKENDS, Interface { flags: Interface::DIRECT, ..POD })?;
    for case in [CASES[0], CASES[2]] {
        let (backend, gateway) = (case.backend(3).ip(), case.backend(4).ip());
        let route = |line: String| Cmd::new("ip").args(["route", "replace"]).args(line.split(' ')).run()?.success();
        let send = |lab: &Lab, port| lab.from_clients(case.packet(case.client(port), case.vip(80)).frame()).verdict;
        lab.begin([case.service(&[3])]);
        route(format!("{backend} via {gateway} dev backends"))?;
        assert_eq!(send(&lab, 40000), REDIRECT, "{case}");
        Cmd::new("ip").args(["route", "del", &backend.to_string()]).run()?.success()?;
        route(format!("blackhole {backend}"))?;
        assert_eq!(send(&lab, 40001), DROP, "{case}");
    }
    Ok(())
}

#[test]
fn a_backend_whose_hardware_address_is_unknown_is_left_to_the_neighbour_table() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        // The lab knows thirty hosts.
        lab.begin([case.service(&[77])]);
        let request = case.packet(case.client(40000), case.vip(80));
        let frame = request.clone().to(case.backend(77)).ttl(60).frame();
        assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: REDIRECT, frame }, "{case}");
        assert_eq!(lab.count(Counter::ToInterface), 1, "{case}");
    }
    Ok(())
}

/// Between two ports of a bridge nobody counts hops.
#[test]
fn within_a_bridge_hops_stay() -> TestResult {
    const BRIDGE: u32 = 30;
    let mut lab = Lab::fast()?;
    Cmd::new("ip")
        .args(["-batch", "-"])
        .input(format!(
            "link add br0 index {BRIDGE} address 02:00:00:00:03:00 mtu 1400 type bridge\n\
             link set br0 up\n\
             link set clients master br0\n\
             link set backends master br0\n\
             route replace 10.244.2.0/24 dev br0\n\
             route del fd00:10:244:2::/64 dev backends\n\
             route add fd00:10:244:2::/64 dev br0\n\
             neigh add 10.244.2.3 lladdr 02:00:04:00:02:03 dev br0 nud permanent\n\
             neigh add fd00:10:244:2::3 lladdr 02:00:06:00:02:03 dev br0 nud permanent\n"
        ))
        .run()?
        .success()?;
    lab.harness.set_interface(CLIENTS, Interface { master: BRIDGE, ..POD })?;
    lab.harness.set_interface(BRIDGE, Interface { role: role::BRIDGE, ..POD })?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let request = case.packet(case.client(40000), case.vip(80));
        let backend = case.backend(3);
        let frame = request.clone().to(backend).macs(mac(backend.ip()), [2, 0, 0, 0, 3, 0]).frame();
        assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: REDIRECT, frame }, "{case}");
    }
    Ok(())
}

#[test]
fn the_verifier_has_an_easy_time() -> TestResult {
    // The kernel allows a million.
    const BUDGET: u32 = 400_000;
    // What is not configured is not verified.
    let some = Networks { len: 1, ..Networks::NONE };
    let snat = Snat { addresses: vec![[192, 0, 2, 1].into(), [0xfd, 0, 0, 0, 0, 0, 0, 1].into()], ..Snat::default() };
    let everything = Site { owned: some, pods: some, masquerade: (some, some), dsr_from: some, echo: true, snat };
    for site in [Site::default(), everything] {
        let lab = Lab::at(&site)?;
        for program in [Program::Ingress, Program::Egress, Program::Xdp] {
            let count = lab.harness.info(program)?.verified_instruction_count().unwrap_or_default();
            assert!((1..=BUDGET).contains(&count), "{program:?}, {site:?}: {count} instructions, of {BUDGET}");
        }
    }
    Ok(())
}

/// A frame is the message that tells the sender of a packet how long its packets may be, from where it sent it to.
#[track_caller]
fn assert_too_big(frame: &[u8], packet: &Packet, mtu: u16, what: &str) {
    let parsed = SlicedPacket::from_ethernet(frame).unwrap_or_else(|error: SliceError| panic!("{what}: {error}"));
    assert_eq!(frame[..6], packet.from_mac, "{what}");
    assert_eq!(frame[6..12], packet.to_mac, "{what}");
    let quoted = match (parsed.net, parsed.transport) {
        (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Icmpv4(message))) => {
            let header = ip.header();
            assert_eq!(header.to_header().calc_header_checksum(), header.header_checksum(), "{what}: header checksum");
            assert_eq!(usize::from(header.total_len()), frame.len() - ETHERNET, "{what}: length");
            assert_eq!(
                (header.ttl(), header.dont_fragment(), header.is_fragmenting_payload()),
                (64, true, false),
                "{what}"
            );
            assert_eq!(std::net::IpAddr::from(header.source()), packet.destination.ip(), "{what}: source");
            assert_eq!(std::net::IpAddr::from(header.destination()), packet.source.ip(), "{what}: destination");
            let needed = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu };
            assert_eq!(message.icmp_type(), Icmpv4Type::DestinationUnreachable(needed), "{what}");
            assert_eq!(Sum16BitWords::new().add_slice(message.slice()).ones_complement(), 0, "{what}: checksum");
            message.payload().to_vec()
        }
        (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(message))) => {
            let header = ip.header();
            assert_eq!(usize::from(header.payload_length()) + 40, frame.len() - ETHERNET, "{what}: length");
            assert!(frame.len() - ETHERNET <= 1280, "{what}: at most the least MTU");
            assert_eq!(header.hop_limit(), 64, "{what}");
            assert_eq!(std::net::IpAddr::from(header.source()), packet.destination.ip(), "{what}: source");
            assert_eq!(std::net::IpAddr::from(header.destination()), packet.source.ip(), "{what}: destination");
            assert_eq!(message.icmp_type(), Icmpv6Type::PacketTooBig { mtu: mtu.into() }, "{what}");
            assert!(message.is_checksum_valid(header.source(), header.destination()), "{what}: checksum");
            message.payload().to_vec()
        }
        other => panic!("{what}: {other:?}"),
    };
    let original = packet.frame();
    assert!(quoted.len() >= 84, "{what}: {} bytes quoted", quoted.len());
    assert_eq!(quoted, original[ETHERNET..ETHERNET + quoted.len()], "{what}: what is quoted");
}
