//! Headers of all kinds: what is translated past them, and what is left alone.

use netlb::datapath::kernel::testing::Program;
use netlb::model::Protocol;
use netlb_common::counters::Counter;
use netlb_integration::frames::{ACK, ETHERNET, Packet, patch};
use netlb_integration::lab::{BACKENDS_MAC, CASES, CLIENTS, Case, Lab, Outcome, PASS, REDIRECT, XDP_PASS, mac};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;
use nix::errno::Errno;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// An options header (RFC 8200 §4.3) of eight bytes: padding.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
/// One of 24 bytes.
const LONG_PADDING: [u8; 24] = [0, 2, 1, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A fragment header of a datagram that is whole (RFC 6946).
const ATOMIC: [u8; 8] = [0, 0, 0, 0, 0xde, 0xad, 0xbe, 0xef];
/// A routing header whose packet has arrived.
const ARRIVED: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 0];
/// An authentication header (RFC 4302 §2) of 24 bytes: its length counts words, less two.
const SIGNED: [u8; 24] = [0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5];

#[test]
fn ipv4_options_are_passed_over() -> TestResult {
    let mut lab = Lab::fast()?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let case = Case { family: Family::V4, protocol };
        for words in 1..=10 {
            lab.begin([case.service(&[3])]);
            // No-operation options, and an end.
            let mut options = vec![1; words * 4];
            options[words * 4 - 1] = 0;
            let request = case.packet(case.client(40000), case.vip(80)).options(options);
            translated(&lab, case, &request, &format!("{words} words of options"));
        }
    }
    Ok(())
}

/// Numbers and bytes of extension headers.
type Chain<'a> = &'a [(u8, &'a [u8])];

#[test]
fn ipv6_extension_headers_are_passed_over() -> TestResult {
    let chains: [(&str, Chain<'_>); 8] = [
        ("hop-by-hop options", &[(HOP_BY_HOP, &PADDING)]),
        ("destination options", &[(DESTINATION_OPTIONS, &PADDING)]),
        ("long options", &[(DESTINATION_OPTIONS, &LONG_PADDING)]),
        ("an atomic fragment", &[(FRAGMENT, &ATOMIC)]),
        ("a routing header at its end", &[(ROUTING, &ARRIVED)]),
        ("an authentication header", &[(AUTHENTICATION, &SIGNED)]),
        ("three headers", &[(HOP_BY_HOP, &LONG_PADDING), (DESTINATION_OPTIONS, &PADDING), (FRAGMENT, &ATOMIC)]),
        (
            "six headers",
            &[
                (HOP_BY_HOP, &PADDING),
                (DESTINATION_OPTIONS, &PADDING),
                (ROUTING, &ARRIVED),
                (FRAGMENT, &ATOMIC),
                (AUTHENTICATION, &SIGNED),
                (DESTINATION_OPTIONS, &PADDING),
            ],
        ),
    ];
    let mut lab = Lab::fast()?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let case = Case { family: Family::V6, protocol };
        for (what, chain) in chains {
            lab.begin([case.service(&[3])]);
            let request = case.packet(case.client(40000), case.vip(80));
            let request = chain.iter().fold(request, |packet, (number, bytes)| packet.extension(*number, *bytes));
            translated(&lab, case, &request, what);
        }
    }
    Ok(())
}

#[track_caller]
fn translated(lab: &Lab, case: Case, request: &Packet, what: &str) {
    let backend = case.backend(3);
    let frame = request.clone().to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
    let out = lab.from_clients(request.frame());
    assert_eq!(out, Outcome { verdict: REDIRECT, frame }, "{case}: {what}");
}

#[test]
fn what_is_no_packet_of_a_service_passes_bit_for_bit() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let other = match case.protocol {
            Protocol::Tcp => Packet::udp(client, vip),
            Protocol::Udp => Packet::tcp(client, vip, ACK),
        };
        for (what, packet) in [
            ("to another port", case.packet(client, case.vip(81))),
            ("to another address", case.packet(client, case.backend(9))),
            ("of another protocol on the same port", other),
            ("from a backend's port, of no flow", case.segment(case.backend(3), client, ACK)),
            ("to the backend itself", case.packet(client, case.backend(3))),
        ] {
            untouched(&lab, &packet.frame(), &format!("{case}: {what}"));
            assert_eq!(lab.counts(), [], "{case}: {what}");
        }
    }
    Ok(())
}

#[test]
fn other_protocols_pass_bit_for_bit() -> TestResult {
    const ICMP: u8 = 1;
    const IGMP: u8 = 2;
    const IN_IP: u8 = 41;
    const GRE: u8 = 47;
    const ESP: u8 = 50;
    const ICMPV6: u8 = 58;
    const SCTP: u8 = 132;
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let frame = case.packet(case.client(40000), case.vip(80)).frame();
        for number in [ICMP, IGMP, IN_IP, GRE, ESP, ICMPV6, SCTP, 59, 253, 255] {
            let mut frame = frame.clone();
            let at = if case.family == Family::V4 { ETHERNET + 9 } else { ETHERNET + 6 };
            patch(&mut frame, at, &[number]);
            untouched(&lab, &frame, &format!("{case}: protocol {number}"));
        }
        // ARP, link layer discovery, 802.3 length, and protocols of VLAN and MPLS with the packet's own bytes behind.
        for ether_type in [0x0806_u16, 0x88cc, 60, 0x8100, 0x88a8, 0x8847] {
            let mut frame = frame.clone();
            frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
            untouched(&lab, &frame, &format!("{case}: type {ether_type:04x}"));
        }
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

#[test]
fn frames_with_a_vlan_tag_pass_bit_for_bit() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let mut frame = case.packet(case.client(40000), case.vip(80)).frame();
        frame.splice(12..12, [0x81, 0, 0, 42]);
        untouched(&lab, &frame, &format!("{case}"));
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

#[test]
fn a_frame_cut_at_any_length_passes_and_is_malformed() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let packet = case.packet(case.client(40000), case.vip(80));
        let packet = match case.family {
            Family::V4 => packet.options([1, 1, 1, 0]),
            Family::V6 => packet.extension(DESTINATION_OPTIONS, PADDING).extension(FRAGMENT, ATOMIC),
        };
        let frame = packet.frame();
        let transport = ETHERNET + if case.family == Family::V4 { 24 } else { 56 };
        let needed = transport + if case.protocol == Protocol::Tcp { 20 } else { 8 };
        for len in ETHERNET + 1..needed {
            let what = format!("{case}: {len} bytes of {}", frame.len());
            let out = match lab.harness.test_run(Program::Ingress, &frame[..len], CLIENTS) {
                Ok((verdict, frame)) => Outcome { verdict, frame },
                // Kernels may refuse to run anything on a frame without a whole IP header.
                Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) && len < transport => continue,
                Err(error) => panic!("{what}: {error}"),
            };
            assert_eq!(out, Outcome { verdict: PASS, frame: frame[..len].to_vec() }, "{what}");
            assert_eq!(lab.counts(), [(Counter::Malformed, 1)], "{what}");
        }
        assert_eq!(lab.from_clients(&frame[..needed]).verdict, REDIRECT, "{case}: with whole headers");
    }
    Ok(())
}

#[test]
fn impossible_headers_pass_bit_for_bit() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let frame = case.packet(case.client(40000), case.vip(80)).frame();
        // Versions, and lengths of the IPv4 header below the least.
        let firsts: &[u8] = match case.family {
            Family::V4 => &[0x40, 0x41, 0x44, 0x55, 0x65, 0x05, 0xf5],
            Family::V6 => &[0x40, 0x45, 0x50, 0x70, 0x00, 0xf0],
        };
        for first in firsts {
            let mut frame = frame.clone();
            frame[ETHERNET] = *first;
            untouched(&lab, &frame, &format!("{case}: first byte {first:02x}"));
            assert_eq!(lab.counts(), [(Counter::Malformed, 1)], "{case}: first byte {first:02x}");
        }
    }
    Ok(())
}

#[test]
fn a_header_longer_than_the_frame_passes() -> TestResult {
    let mut lab = Lab::fast()?;
    let case = Case { family: Family::V4, protocol: Protocol::Udp };
    lab.begin([case.service(&[3])]);
    let mut frame = case.packet(case.client(40000), case.vip(80)).payload([]).frame();
    patch(&mut frame, ETHERNET, &[0x4f]);
    untouched(&lab, &frame, "IPv4: 60 bytes of header");
    assert_eq!(lab.counts(), [(Counter::Malformed, 1)]);

    let case = Case { family: Family::V6, protocol: Protocol::Udp };
    lab.begin([case.service(&[3])]);
    let mut extension = PADDING;
    extension[1] = 255;
    let frame = case.packet(case.client(40000), case.vip(80)).extension(DESTINATION_OPTIONS, extension).frame();
    untouched(&lab, &frame, "IPv6: 2048 bytes of options");
    assert_eq!(lab.counts(), [(Counter::Malformed, 1)]);
    Ok(())
}

#[test]
fn ipv6_headers_that_hide_the_ports_pass() -> TestResult {
    let mut lab = Lab::fast()?;
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let case = Case { family: Family::V6, protocol };
        lab.begin([case.service(&[3])]);
        let packet = case.packet(case.client(40000), case.vip(80));
        let waypoint = packet.clone().extension(ROUTING, [0, 0, 0, 1, 0, 0, 0, 0]);
        untouched(&lab, &waypoint.frame(), &format!("{case}: still under way by a routing header"));
        let many = (0..9).fold(packet.clone(), |packet, _| packet.extension(DESTINATION_OPTIONS, PADDING));
        untouched(&lab, &many.frame(), &format!("{case}: nine headers"));
        let mut unknown = packet.extension(DESTINATION_OPTIONS, PADDING).frame();
        unknown[ETHERNET + 40] = 135;
        untouched(&lab, &unknown, &format!("{case}: a mobility header"));
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

#[test]
fn a_packet_without_hops_left_is_the_kernels() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            for ttl in [0, 1] {
                let packet = case.packet(case.client(40000), case.vip(80)).ttl(ttl);
                untouched(&lab, &packet.frame(), &format!("{case}: {ttl} hops"));
                assert_eq!(lab.counts(), [(Counter::TtlExpired, 1)], "{case}: {ttl} hops");
            }
            assert_eq!(lab.count_flows(), 0, "{case}");
            lab.backend_of(&case.packet(case.client(40000), case.vip(80)).ttl(2));
        }
    }
    Ok(())
}

/// A frame shorter than Ethernet's least is filled up with bytes that belong to no packet.
#[test]
fn padding_behind_a_packet_stays() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let packet = case.packet(case.client(40000), case.vip(80)).payload([]);
        let (mut frame, mut expected) = (packet.frame(), packet.to(case.backend(3)).frame());
        frame.extend([0xee; 9]);
        expected.extend([0xee; 9]);
        assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame: expected }, "{case}");
    }
    Ok(())
}

/// All programs leave a frame alone. What is counted then is what the one at ingress counted.
#[track_caller]
fn untouched(lab: &Lab, frame: &[u8], what: &str) {
    let expected = Outcome { verdict: PASS, frame: frame.to_vec() };
    assert_eq!(lab.to_clients(frame), expected, "{what}, at egress");
    let passed = Outcome { verdict: XDP_PASS, frame: frame.to_vec() };
    assert_eq!(lab.xdp_from_clients(frame), passed, "{what}, at XDP");
    lab.counts();
    assert_eq!(lab.from_clients(frame), expected, "{what}, at ingress");
}
