//! Packets of netlb's own: resets, "port unreachable" and replies to echo requests, made out of what they answer.

use std::net::{IpAddr, SocketAddr};

use etherparse::checksum::Sum16BitWords;
use etherparse::{Icmpv4Type, Icmpv6Type, NetSlice, SlicedPacket, TcpHeaderSlice, TransportSlice, icmpv4, icmpv6};
use netlb::datapath::kernel::testing::{Program, Site};
use netlb::model::Protocol;
use netlb_common::counters::Counter;
use netlb_common::limit;
use netlb_common::maps::address;
use netlb_common::network::{Network, Networks};
use netlb_integration::frames::{ACK, ETHERNET, FIN, Packet, RST, SYN, SYN_ACK, Segment, patch};
use netlb_integration::lab::{CASES, CLIENTS, Case, DROP, Lab, Outcome, PASS, REDIRECT, XDP_PASS, addr};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

/// What packets of tests have: see [`Packet`].
const SEQUENCE: u32 = 0x0102_0304;
const ACKNOWLEDGEMENT: u32 = 0x0506_0708;

/// Both ways a packet comes in from a device: with a sum of its own, and without.
fn arrivals(lab: &Lab, frame: &[u8]) -> [Outcome; 2] {
    [lab.from_clients(frame), lab.run_summed(Program::Ingress, frame, CLIENTS)]
}

/// Whether a frame goes back to where a packet came from, and what is in it.
#[track_caller]
fn turned<'a>(out: &'a Outcome, packet: &Packet, what: &str) -> SlicedPacket<'a> {
    assert_eq!(out.verdict, REDIRECT, "{what}");
    assert_eq!(out.frame[..6], packet.from_mac, "{what}");
    assert_eq!(out.frame[6..12], packet.to_mac, "{what}");
    let parsed = SlicedPacket::from_ethernet(&out.frame).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (source, destination): (IpAddr, IpAddr) = match &parsed.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            assert_eq!(header.to_header().calc_header_checksum(), header.header_checksum(), "{what}: header checksum");
            assert_eq!(usize::from(header.total_len()), out.frame.len() - ETHERNET, "{what}: length");
            assert_eq!((header.ttl(), header.is_fragmenting_payload()), (64, false), "{what}");
            (header.source_addr().into(), header.destination_addr().into())
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            assert_eq!(usize::from(header.payload_length()) + 40, out.frame.len() - ETHERNET, "{what}: length");
            assert_eq!(header.hop_limit(), 64, "{what}");
            (header.source_addr().into(), header.destination_addr().into())
        }
        other => panic!("{what}: {other:?}"),
    };
    assert_eq!((source, destination), (packet.destination.ip(), packet.source.ip()), "{what}");
    parsed
}

#[track_caller]
fn tcp<'a>(parsed: &SlicedPacket<'a>, what: &str) -> TcpHeaderSlice<'a> {
    let Some(TransportSlice::Tcp(tcp)) = &parsed.transport else { panic!("{what}: {:?}", parsed.transport) };
    let header = tcp.to_header();
    let sum = match &parsed.net {
        Some(NetSlice::Ipv4(ip)) => header.calc_checksum_ipv4_raw(ip.header().source(), ip.header().destination(), &[]),
        Some(NetSlice::Ipv6(ip)) => header.calc_checksum_ipv6_raw(ip.header().source(), ip.header().destination(), &[]),
        other => panic!("{what}: {other:?}"),
    };
    assert_eq!(sum.expect("no payload"), header.checksum, "{what}: checksum");
    assert!(tcp.payload().is_empty(), "{what}");
    TcpHeaderSlice::from_slice(tcp.header_slice()).expect("a header")
}

#[test]
fn a_segment_that_nobody_serves_is_reset() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service(&[])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let none = Segment::default();
        for (segment, bytes, answer) in [
            (SYN, 0, (0, SEQUENCE + 1, true)),
            (SYN, 5, (0, SEQUENCE + 6, true)),
            (ACK, 5, (ACKNOWLEDGEMENT, 0, false)),
            (SYN_ACK, 0, (ACKNOWLEDGEMENT, 0, false)),
            (FIN, 3, (ACKNOWLEDGEMENT, 0, false)),
            (Segment { fin: true, ..none }, 1400, (0, SEQUENCE + 1401, true)),
            (none, 7, (0, SEQUENCE + 7, true)),
        ] {
            let plain = case.segment(client, vip, segment).payload(vec![0x5a; bytes]);
            let more = match family {
                Family::V4 => plain.clone().options([1; 8]),
                Family::V6 => plain.clone().extension(60, [0, 0, 1, 4, 0, 0, 0, 0]),
            };
            for (packet, kind) in [(plain, "plain"), (more, "options")] {
                let what = format!("{case}: {segment:?}, {bytes} bytes, {kind}");
                lab.counts();
                let out = lab.from_clients(packet.frame());
                let parsed = turned(&out, &packet, &what);
                let tcp = tcp(&parsed, &what);
                let seen = (tcp.sequence_number(), tcp.acknowledgment_number(), tcp.ack());
                assert_eq!(seen, answer, "{what}");
                assert_eq!((tcp.source_port(), tcp.destination_port()), (80, 40000), "{what}");
                assert!(tcp.rst() && !tcp.syn() && !tcp.fin() && !tcp.psh(), "{what}");
                assert_eq!((tcp.window_size(), tcp.data_offset()), (0, 5), "{what}");
                assert_eq!(lab.counts(), [(Counter::NoBackend, 1), (Counter::Rejected, 1)], "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn padding_is_not_acknowledged() -> TestResult {
    let mut lab = Lab::fast()?;
    let case = Case::tcp(Family::V4);
    lab.begin([case.service(&[])]);
    let packet = case.segment(case.client(40000), case.vip(80), SYN).payload([]);
    let mut frame = packet.frame();
    frame.resize(80, 0);
    let out = lab.from_clients(&frame);
    let parsed = turned(&out, &packet, "padded");
    assert_eq!(tcp(&parsed, "padded").acknowledgment_number(), SEQUENCE + 1);
    Ok(())
}

#[test]
fn what_stands_for_many_segments_is_answered_by_one() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service(&[])]);
        let packet = case.segment(case.client(40000), case.vip(80), ACK).payload([0x5a; 2600]);
        let out = lab.run_segments(Program::Ingress, packet.frame(), CLIENTS, (2, 1300));
        let what = format!("{family}");
        assert_eq!(tcp(&turned(&out, &packet, &what), &what).sequence_number(), ACKNOWLEDGEMENT, "{what}");
    }
    Ok(())
}

#[test]
fn a_datagram_that_nobody_serves_has_its_sender_told() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case { family, protocol: Protocol::Udp };
        lab.begin([case.service(&[])]);
        for len in [0, 1, 2, 3, 47, 48, 55, 56, 57, 200, 208, 209, 1400] {
            let plain = case.packet(case.client(40000), case.vip(80)).payload(vec![0xa5; len]);
            let more = match family {
                Family::V4 => plain.clone().options([1; 8]),
                Family::V6 => plain.clone().extension(60, [0, 0, 1, 4, 0, 0, 0, 0]),
            };
            for (packet, kind) in
                [(plain.clone(), "plain"), (more, "options"), (plain.without_checksum(), "no checksum")]
            {
                let what = format!("{case}: {len} bytes, {kind}");
                lab.counts();
                let out = lab.from_clients(packet.frame());
                assert_unreachable(&turned(&out, &packet, &what), &packet, &what);
                assert_eq!(lab.counts(), [(Counter::NoBackend, 1), (Counter::Rejected, 1)], "{what}");
            }
        }
    }
    Ok(())
}

#[track_caller]
fn assert_unreachable(parsed: &SlicedPacket<'_>, packet: &Packet, what: &str) {
    let (quoted, most) = match (&parsed.net, &parsed.transport) {
        (Some(NetSlice::Ipv4(_)), Some(TransportSlice::Icmpv4(message))) => {
            let kind = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
            assert_eq!(message.icmp_type(), kind, "{what}");
            assert_eq!(message.slice()[4..8], [0; 4], "{what}: unused");
            assert_eq!(Sum16BitWords::new().add_slice(message.slice()).ones_complement(), 0, "{what}: checksum");
            (message.payload(), 84)
        }
        (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(message))) => {
            let kind = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
            assert_eq!(message.icmp_type(), kind, "{what}");
            assert!(message.is_checksum_valid(ip.header().source(), ip.header().destination()), "{what}: checksum");
            (message.payload(), 256)
        }
        other => panic!("{what}: {other:?}"),
    };
    let original = packet.frame();
    let original = &original[ETHERNET..];
    assert_eq!(quoted, &original[..original.len().min(most)], "{what}: quoted");
}

#[test]
fn odd_packets_are_not_answered() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[])]);
        let vip = case.vip(80);
        let packet = case.packet(case.client(40000), vip);
        let is_v4 = vip.is_ipv4();
        let nobodies: &[&str] = if is_v4 { &["0.0.0.0", "224.0.0.1", "255.255.255.255"] } else { &["::", "ff02::1"] };
        let from = |ip: IpAddr| packet.clone().from(SocketAddr::new(ip, 40000)).frame();
        let mut frames = vec![
            packet.clone().macs([0xff; 6], packet.from_mac).frame(),
            packet.clone().macs([0x01, 0, 0x5e, 0, 0, 1], packet.from_mac).frame(),
            packet.clone().macs(packet.to_mac, [0xff; 6]).frame(),
            from(vip.ip()),
        ];
        for nobody in nobodies {
            frames.push(from(nobody.parse()?));
        }
        if case.protocol == Protocol::Tcp {
            frames.push(case.segment(case.client(40000), vip, RST).frame());
            frames.push(case.segment(case.client(40000), vip, Segment { ack: true, ..RST }).frame());
        }
        for frame in frames {
            assert_eq!(lab.from_clients(&frame).verdict, DROP, "{case}: {frame:02x?}");
            assert_eq!(lab.counts(), [(Counter::NoBackend, 1)], "{case}: {frame:02x?}");
        }
    }
    Ok(())
}

#[test]
fn xdp_leaves_answers_to_tc_and_what_leaves_the_node_is_not_answered() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[])]);
        let frame = case.packet(case.client(40000), case.vip(80)).frame();
        assert_eq!(lab.xdp_from_clients(&frame), Outcome { verdict: XDP_PASS, frame: frame.clone() }, "{case}");
        assert_eq!(lab.to_clients(&frame), Outcome { verdict: PASS, frame }, "{case}");
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

#[test]
fn there_are_no_more_answers_than_a_cpu_may_give() -> TestResult {
    let mut lab = Lab::fast()?;
    let case = CASES[1];
    lab.begin([case.service(&[])]);
    let frame = case.packet(case.client(40000), case.vip(80)).frame();
    let cpus = std::thread::available_parallelism()?.get() as u64;
    let most = limit::ANSWERS * cpus;
    let begin = std::time::Instant::now();
    let sent = most * 3;
    for _ in 0..sent {
        lab.from_clients(&frame);
    }
    let seconds = begin.elapsed().as_secs() + 1;
    let (rejected, limited) = (lab.count(Counter::Rejected), lab.count(Counter::AnswersLimited));
    assert_eq!(rejected + limited, sent);
    assert!(limited > 0 && rejected >= limit::ANSWERS, "{rejected} rejected, {limited} were too many");
    assert!(rejected <= most * (1 + seconds), "{rejected} in {seconds} s");
    Ok(())
}

/// An echo request.
fn echo(case: Case, to: IpAddr) -> (Packet, Vec<u8>) {
    let packet = case.packet(case.client(40000), SocketAddr::new(to, 80)).payload([0x42; 56]);
    let mut frame = packet.frame();
    let (protocol, at, number, request) = if to.is_ipv4() { (23, 34, 1, 8) } else { (20, 54, 58, 128) };
    patch(&mut frame, protocol, &[number]);
    frame[at..at + 8].copy_from_slice(&[request, 0, 0, 0, 0x12, 0x34, 0, 7]);
    let mut sum = Sum16BitWords::new();
    if to.is_ipv6() {
        sum = sum.add_slice(&frame[22..54]).add_4bytes([0, 0, 0, (frame.len() - at) as u8]).add_2bytes([0, number]);
    }
    let check = sum.add_slice(&frame[at..]).ones_complement().to_ne_bytes();
    frame[at + 2..at + 4].copy_from_slice(&check);
    (packet, frame)
}

fn owned() -> Networks {
    let mut networks = Networks { len: 2, ..Networks::NONE };
    networks.all[0] = Network::new(addr(CASES[0].vip(0).ip()), 96 + 24);
    networks.all[1] = Network::new(addr(CASES[2].vip(0).ip()), 64);
    networks
}

#[test]
fn an_echo_request_to_a_service_is_answered() -> TestResult {
    let mut lab = Lab::at(&Site { owned: owned(), ..Site::default() })?;
    for case in [CASES[1], CASES[3]] {
        let vip = case.vip(80).ip();
        lab.harness.set_address(addr(vip), address::SERVICE)?;
        let (packet, frame) = echo(case, vip);
        for out in arrivals(&lab, &frame) {
            let what = format!("{case}");
            let parsed = turned(&out, &packet, &what);
            match (&parsed.net, &parsed.transport) {
                (Some(NetSlice::Ipv4(_)), Some(TransportSlice::Icmpv4(message))) => {
                    assert_eq!(message.type_u8(), 0);
                    assert_eq!(
                        Sum16BitWords::new().add_slice(message.slice()).ones_complement(),
                        0,
                        "{case}: checksum"
                    );
                    assert_eq!(message.slice()[4..], frame[38..]);
                }
                (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Icmpv6(message))) => {
                    assert_eq!(message.type_u8(), 129);
                    let header = ip.header();
                    assert!(message.is_checksum_valid(header.source(), header.destination()), "{case}: checksum");
                    assert_eq!(message.slice()[4..], frame[58..]);
                }
                other => panic!("{case}: {other:?}"),
            }
        }
        assert_eq!(lab.counts(), [(Counter::EchoAnswered, 2)], "{case}");
        assert_eq!(lab.xdp_from_clients(&frame).verdict, XDP_PASS, "{case}");
        // The node answers for itself; and parts of a request are nobody's.
        lab.harness.set_address(addr(vip), address::SERVICE | address::NODE)?;
        assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame: frame.clone() }, "{case}: the node's");
        lab.harness.set_address(addr(vip), address::SERVICE)?;
        if vip.is_ipv4() {
            let mut part = frame.clone();
            patch(&mut part, 20, &[0x20, 0]);
            assert_eq!(lab.from_clients(&part), Outcome { verdict: PASS, frame: part.clone() }, "a fragment");
        }
        let mut to_many = frame.clone();
        to_many[..6].fill(0xff);
        assert_eq!(lab.from_clients(&to_many), Outcome { verdict: PASS, frame: to_many.clone() }, "{case}: to many");
        lab.counts();
    }
    Ok(())
}

#[test]
fn echo_requests_are_left_alone_where_that_is_off_or_the_network_another() -> TestResult {
    for site in [Site { owned: owned(), echo: false, ..Site::default() }, Site::default()] {
        let mut lab = Lab::at(&site)?;
        for case in [CASES[1], CASES[3]] {
            let vip = case.vip(80).ip();
            lab.harness.set_address(addr(vip), address::SERVICE)?;
            lab.begin([case.service(&[3])]);
            let (_, frame) = echo(case, vip);
            assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame: frame.clone() }, "{case}: {site:?}");
            assert_eq!(lab.counts(), [], "{case}");
        }
    }
    Ok(())
}
