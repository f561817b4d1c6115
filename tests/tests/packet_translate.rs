//! Packets of services are translated, and nothing else about them changes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlb::datapath::kernel::testing::Program;
use netlb::dataplane::{BackendCounters, ServiceCounters};
use netlb::model::{Algorithm, Backend, Frontend, Protocol, Service};
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_integration::frames::{ACK, SYN, SYN_ACK};
use netlb_integration::lab::{
    BACKENDS, BACKENDS_MAC, CASES, CLIENTS, CLIENTS_MAC, Case, Lab, Outcome, PASS, REDIRECT, mac,
};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

#[test]
fn requests_are_sent_to_the_backend() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let request = case.packet(case.client(40000), case.vip(80));
        let backend = case.backend(3);
        let sent = request.clone().to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
        assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: REDIRECT, frame: sent.clone() }, "{case}");
        assert_eq!(lab.counts(), [(Counter::ToInterface, 1), (Counter::FlowsCreated, 1)], "{case}");

        assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: REDIRECT, frame: sent }, "{case}: again");
        assert_eq!(lab.counts(), [(Counter::ToInterface, 1)], "{case}: again");
        let bytes_in = 2 * request.frame().len() as u64;
        let expected = ServiceCounters { flows: 1, packets_in: 2, bytes_in, ..ServiceCounters::default() };
        assert_eq!(lab.stats(&service).service, expected, "{case}");
        assert_eq!(lab.backend_stats(&service, backend), BackendCounters { flows: 1, active: 1 }, "{case}");
    }
    Ok(())
}

#[test]
fn requests_left_to_the_stack_differ_in_nothing_but_the_destination() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let request = case.packet(case.client(40000), case.vip(80)).payload([0xa5; 999]);
        let frame = request.clone().to(case.backend(3)).frame();
        assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: PASS, frame }, "{case}");
        assert_eq!(lab.counts(), [(Counter::ToStack, 1), (Counter::FlowsCreated, 1)], "{case}");
        assert_eq!(lab.stats(&service).service.bytes_in, request.frame().len() as u64, "{case}");
    }
    Ok(())
}

#[test]
fn odd_payloads_have_right_checksums() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        for len in [0, 1, 2, 3, 31, 255, 1201] {
            let payload = Vec::from_iter((0..len).map(|n| (n * 37 % 251) as u8));
            let request = case.packet(case.client(40000 + len), case.vip(80)).payload(payload);
            let out = lab.from_clients(request.frame());
            assert_eq!(out.frame, request.to(case.backend(3)).frame(), "{case}: {len} bytes");
        }
    }
    Ok(())
}

#[test]
fn a_port_that_stays_is_left_alone() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        lab.begin([case.service_at(8080, &[3])]);
        let request = case.packet(case.client(40000), case.vip(8080));
        assert_eq!(lab.from_clients(request.frame()).frame, request.to(case.backend(3)).frame(), "{case}");
    }
    Ok(())
}

#[test]
fn an_ipv4_datagram_without_a_checksum_stays_without() -> TestResult {
    let case = Case { family: Family::V4, protocol: Protocol::Udp };
    let mut lab = Lab::fast()?;
    lab.begin([case.service(&[3])]);
    let (client, backend) = (case.client(40000), case.backend(3));
    let request = case.packet(client, case.vip(80)).without_checksum();
    let out = lab.from_clients(request.frame());
    assert_eq!(out.frame, request.to(backend).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame());
    let reply = case.packet(backend, client).without_checksum();
    let out = lab.from_backends(reply.frame());
    assert_eq!(out.frame, reply.from(case.vip(80)).ttl(60).macs(mac(client.ip()), CLIENTS_MAC).frame());
    Ok(())
}

#[test]
fn a_datagram_whose_sum_comes_out_as_zero_says_ones() -> TestResult {
    let mut lab = Lab::stack()?;
    for family in Family::BOTH {
        let case = Case { family, protocol: Protocol::Udp };
        lab.begin([case.service(&[3])]);
        let check = if family == Family::V4 { 40..42 } else { 60..62 };
        let request = case.packet(case.client(40000), case.vip(80));
        let payloads = (0..=u16::MAX).map(u16::to_be_bytes);
        let translated = payloads.map(|bytes| request.clone().to(case.backend(3)).payload(bytes));
        let expected = translated.into_iter().find(|packet| packet.frame()[check.clone()] == [0xff, 0xff]);
        let expected = expected.expect("every sum there is");
        let request = request.payload(expected.payload.clone());
        assert_eq!(lab.from_clients(request.frame()).frame, expected.frame(), "{family}");
    }
    Ok(())
}

/// Where nothing of a checksum changes but the ports' part, it does not tell whether the rest is yet to be made.
#[test]
fn a_backend_whose_address_has_the_services_sum_gets_right_checksums() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        let vip = case.vip(80);
        let ip = match vip.ip() {
            IpAddr::V4(ip) => {
                let [a, b, c, d] = ip.octets();
                Ipv4Addr::new(a, d, c, b).into()
            }
            IpAddr::V6(ip) => {
                let [a, b, c, d, e, f, g, h] = ip.segments();
                Ipv6Addr::new(a, c, b, d, e, f, g, h).into()
            }
        };
        assert_ne!(ip, vip.ip());
        for backend in [SocketAddr::new(ip, 8080), SocketAddr::new(ip, 80)] {
            let frontend = Frontend { address: vip, protocol: case.protocol };
            let service = Service::new(None, vec![frontend], vec![Backend::new(backend)], Algorithm::Maglev)?;
            lab.begin([service]);
            let request = case.packet(case.client(40000), vip).payload([0x5a; 99]);
            let sent = request.clone().to(backend).frame();
            assert_eq!(lab.from_clients(request.frame()).frame, sent, "{case}, {backend}");
            assert_eq!(lab.run_summed(Program::Ingress, request.frame(), CLIENTS).frame, sent, "{case}, {backend}");
        }
    }
    Ok(())
}

/// A device that sums the whole packet says so to the kernel, and its sum has to be right after the translation as well.
#[test]
fn the_sum_of_a_device_stays_right() -> TestResult {
    for mut lab in [Lab::fast()?, Lab::stack()?] {
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
            let request = case.packet(client, vip);
            let out = lab.run_summed(Program::Ingress, request.frame(), BACKENDS);
            assert_eq!(netlb_integration::lab::destination(&out.frame), backend, "{case}");
            let reply = case.segment(backend, client, SYN_ACK);
            lab.run_summed(Program::Ingress, reply.frame(), BACKENDS);
            lab.run_summed(Program::Egress, reply.frame(), BACKENDS);
        }
    }
    Ok(())
}

#[test]
fn replies_are_translated_where_they_come_in() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        lab.backend_of(&case.packet(client, vip));
        let reply = case.segment(backend, client, SYN_ACK);
        let frame = reply.clone().from(vip).ttl(60).macs(mac(client.ip()), CLIENTS_MAC).frame();
        assert_eq!(lab.from_backends(reply.frame()), Outcome { verdict: REDIRECT, frame }, "{case}");
        let stats = lab.stats(&service).service;
        assert_eq!((stats.packets_out, stats.bytes_out), (1, reply.frame().len() as u64), "{case}");
    }
    Ok(())
}

#[test]
fn replies_the_stack_forwards_are_translated_on_their_way_out_and_only_there() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        lab.backend_of(&case.packet(client, vip));
        let reply = case.segment(backend, client, SYN_ACK);
        let untouched = Outcome { verdict: PASS, frame: reply.frame() };
        assert_eq!(lab.from_backends(reply.frame()), untouched, "{case}: at ingress");
        assert_eq!(lab.stats(&service).service.packets_out, 0, "{case}");
        let translated = Outcome { verdict: PASS, frame: reply.clone().from(vip).frame() };
        assert_eq!(lab.to_clients(reply.frame()), translated, "{case}: at egress");
        assert_eq!(lab.stats(&service).service.packets_out, 1, "{case}");
    }
    Ok(())
}

#[test]
fn requests_are_not_translated_on_their_way_out() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let request = case.packet(case.client(40000), case.vip(80));
        let untouched = Outcome { verdict: PASS, frame: request.frame() };
        assert_eq!(lab.to_clients(request.frame()), untouched, "{case}: of no flow");
        lab.backend_of(&request);
        assert_eq!(lab.to_clients(request.frame()), untouched, "{case}: of a flow");
    }
    Ok(())
}

/// The kernel looks after the hops of what it forwards itself; a reply on its way out may have few left.
#[test]
fn a_reply_on_its_way_out_needs_no_hops() -> TestResult {
    let mut lab = Lab::stack()?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        lab.backend_of(&case.packet(client, vip));
        let reply = case.segment(backend, client, SYN_ACK).ttl(1);
        let translated = Outcome { verdict: PASS, frame: reply.clone().from(vip).frame() };
        assert_eq!(lab.to_clients(reply.frame()), translated, "{case}");
    }
    Ok(())
}

#[test]
fn a_whole_connection_is_counted() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in Family::BOTH {
        let case = Case::tcp(family);
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let backend = lab.connect(case, client, vip);
        let len = |segment| case.segment(client, vip, segment).frame().len() as u64;
        let expected = ServiceCounters {
            flows: 1,
            packets_in: 2,
            bytes_in: len(SYN) + len(ACK),
            packets_out: 1,
            bytes_out: len(SYN_ACK),
        };
        assert_eq!(lab.stats(&service).service, expected, "{family}");
        assert_eq!(lab.backend_stats(&service, backend), BackendCounters { flows: 1, active: 1 }, "{family}");
        assert_eq!(lab.counts(), [(Counter::ToInterface, 3), (Counter::FlowsCreated, 1)], "{family}");
    }
    Ok(())
}

#[test]
fn a_pod_is_reached_past_its_hosts_side_of_the_veth() -> TestResult {
    let mut lab = Lab::fast()?;
    lab.harness
        .set_interface(BACKENDS, Interface { role: role::POD, flags: Interface::PEER, ..Interface::default() })?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let request = case.packet(case.client(40000), case.vip(80));
        // Handed over as it is: the hardware addresses are nobody's business any more.
        let frame = request.clone().to(case.backend(3)).ttl(60).frame();
        assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: REDIRECT, frame }, "{case}");
        assert_eq!(lab.counts(), [(Counter::ToPeer, 1), (Counter::FlowsCreated, 1)], "{case}");
    }
    Ok(())
}
