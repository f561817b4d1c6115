//! XDP sends what leaves by a device again, as TC would have, and leaves everything else as it came.

use netlb::model::Protocol;
use netlb_common::conntrack::Direction;
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_integration::frames::{ACK, ETHERNET, Packet, SYN_ACK};
use netlb_integration::lab::{
    BACKENDS, BACKENDS_MAC, BACKENDS_MTU, CASES, CLIENTS, CLIENTS_MAC, Case, Lab, Outcome, REDIRECT, XDP_PASS,
    XDP_REDIRECT, XDP_TX, mac,
};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

const SENDS: Interface = Interface { role: role::POD, flags: Interface::XDP, pad: 0, master: 0 };

/// XDP can send out of both interfaces.
fn lab() -> anyhow::Result<Lab> {
    let mut lab = Lab::fast()?;
    for index in [CLIENTS, BACKENDS] {
        lab.harness.set_interface(index, SENDS)?;
    }
    Ok(lab)
}

#[test]
fn packets_are_translated_and_sent_both_ways() -> TestResult {
    let mut lab = lab()?;
    for case in CASES {
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        let request = case.packet(client, vip).payload([0x5a; 33]);
        let sent = request.clone().to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
        assert_eq!(lab.xdp_from_clients(request.frame()), Outcome { verdict: XDP_REDIRECT, frame: sent }, "{case}");
        assert_eq!(lab.counts(), [(Counter::FlowsCreated, 1), (Counter::SentByXdp, 1)], "{case}");

        let reply = case.segment(backend, client, SYN_ACK);
        let sent = reply.clone().from(vip).ttl(60).macs(mac(client.ip()), CLIENTS_MAC).frame();
        for round in 0..3 {
            let out = lab.xdp_from_backends(reply.frame());
            assert_eq!(out, Outcome { verdict: XDP_REDIRECT, frame: sent.clone() }, "{case}, reply {round}");
        }
        let request = case.segment(client, vip, ACK).payload([1; 7]);
        let sent = request.clone().to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
        for round in 0..3 {
            let out = lab.xdp_from_clients(request.frame());
            assert_eq!(out, Outcome { verdict: XDP_REDIRECT, frame: sent.clone() }, "{case}, request {round}");
        }
        assert_eq!(lab.counts(), [(Counter::SentByXdp, 6)], "{case}");
        let stats = lab.stats(&service).service;
        assert_eq!((stats.flows, stats.packets_in, stats.packets_out), (1, 4, 3), "{case}");
    }
    Ok(())
}

#[test]
fn what_leaves_as_it_came_is_turned_round() -> TestResult {
    let mut lab = lab()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let request = case.packet(case.client(40000), case.vip(80));
        let out = lab.xdp_from_backends(request.frame());
        assert_eq!(out.verdict, XDP_TX, "{case}");
    }
    Ok(())
}

#[test]
fn flows_to_pods_are_left_to_tc_which_finds_them() -> TestResult {
    let mut lab = lab()?;
    lab.harness
        .set_interface(BACKENDS, Interface { role: role::POD, flags: Interface::PEER, ..Interface::default() })?;
    for case in CASES {
        let service = case.service(&[3, 4, 5, 6]);
        lab.begin([service.clone()]);
        for port in 40000..40020 {
            let request = case.packet(case.client(port), case.vip(80)).frame();
            for round in 0..3 {
                let out = lab.xdp_from_clients(&request);
                assert_eq!(out, Outcome { verdict: XDP_PASS, frame: request.clone() }, "{case}: {port}, {round}");
                assert_eq!(lab.from_clients(&request).verdict, REDIRECT, "{case}: {port}, {round}");
            }
        }
        assert_eq!(lab.counts(), [(Counter::ToPeer, 60), (Counter::FlowsCreated, 20)], "{case}");
        assert_eq!(lab.stats(&service).service.packets_in, 60, "{case}: nothing is counted twice");
    }
    Ok(())
}

#[test]
fn a_checksum_that_is_left_to_a_device_is_left_to_tc() -> TestResult {
    let mut lab = lab()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let request = case.packet(case.client(40000), case.vip(80));
        let whole = request.frame();
        let partial = with_partial_checksum(case, &request);
        for _ in 0..3 {
            let out = lab.xdp_from_clients(&partial);
            assert_eq!(out, Outcome { verdict: XDP_PASS, frame: partial.clone() }, "{case}");
            assert_eq!(lab.xdp_from_clients(&whole).verdict, XDP_REDIRECT, "{case}");
        }
    }
    Ok(())
}

/// The frame as a sender leaves it to its device: with the sum of the pseudo header for a checksum.
fn with_partial_checksum(case: Case, packet: &Packet) -> Vec<u8> {
    let mut frame = packet.frame();
    let (header, addresses) = match case.family {
        Family::V4 => (20, 12..20),
        Family::V6 => (40, 8..40),
    };
    let transport = ETHERNET + header;
    let (protocol, at) = match case.protocol {
        Protocol::Tcp => (6, transport + 16),
        Protocol::Udp => (17, transport + 6),
    };
    let words = frame[ETHERNET + addresses.start..ETHERNET + addresses.end].chunks(2);
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    sum += protocol + (frame.len() - transport) as u32;
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    frame[at..at + 2].copy_from_slice(&(sum as u16).to_be_bytes());
    frame
}

#[test]
fn no_checksum_stays_no_checksum() -> TestResult {
    let mut lab = lab()?;
    let case = CASES[1];
    lab.begin([case.service(&[3])]);
    let mut frame = case.packet(case.client(40000), case.vip(80)).frame();
    frame[40..42].copy_from_slice(&[0, 0]);
    let out = lab.xdp_from_clients(&frame);
    assert_eq!((out.verdict, &out.frame[40..42]), (XDP_REDIRECT, &[0, 0][..]));
    Ok(())
}

#[test]
fn what_is_too_long_for_its_way_is_left_to_tc() -> TestResult {
    let mut lab = lab()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let request = case.packet(case.client(40000), case.vip(80));
        assert_eq!(lab.xdp_from_clients(request.frame()).verdict, XDP_REDIRECT, "{case}");
        let fits = request.clone().sized(BACKENDS_MTU).frame();
        assert_eq!(lab.xdp_from_clients(fits).verdict, XDP_REDIRECT, "{case}");
        let long = request.sized(BACKENDS_MTU + 1).frame();
        let out = lab.xdp_from_clients(&long);
        assert!(out == Outcome { verdict: XDP_PASS, frame: long }, "{case}: verdict {}", out.verdict);
    }
    Ok(())
}

#[test]
fn what_is_for_no_service_passes_as_it_is() -> TestResult {
    let mut lab = lab()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let packets = [
            case.packet(case.client(40000), case.vip(81)),
            case.packet(case.client(40000), case.backend(3)),
            case.packet(case.backend(3), case.client(40000)),
            case.packet(case.client(40000), case.vip(80)).ttl(1),
        ];
        for packet in packets {
            let frame = packet.frame();
            assert_eq!(lab.xdp_from_clients(&frame), Outcome { verdict: XDP_PASS, frame }, "{case}: {packet:?}");
        }
        let frame = case.packet(case.client(40000), case.vip(80)).payload([]).frame();
        let options = if case.protocol == Protocol::Tcp { 12 } else { 0 };
        for len in 14..frame.len() - options {
            let cut = &frame[..len];
            assert_eq!(lab.xdp_from_clients(cut), Outcome { verdict: XDP_PASS, frame: cut.to_vec() }, "{case}: {len}");
        }
        assert_eq!(lab.count_flows(), 0, "{case}");
    }
    Ok(())
}

#[test]
fn lost_halves_of_a_flow_come_back() -> TestResult {
    let mut lab = lab()?;
    for case in CASES {
        lab.begin([case.service(&[3, 4, 5])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let backend = lab.connect(case, client, vip);
        for direction in [Direction::Forward, Direction::Reply] {
            assert_eq!(lab.lose(direction), 1, "{case}");
            assert_eq!(
                lab.xdp_from_backends(case.segment(backend, client, ACK).frame()).verdict,
                XDP_REDIRECT,
                "{case}"
            );
            let out = lab.xdp_from_clients(case.segment(client, vip, ACK).frame());
            assert_eq!(netlb_integration::lab::destination(&out.frame), backend, "{case}");
        }
    }
    Ok(())
}
