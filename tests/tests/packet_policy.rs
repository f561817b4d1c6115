//! What a service says of who may have it: where a flow comes from, source ranges, session affinity, another source, networks of its own.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use netlb::datapath::kernel::testing::{Program, Site};
use netlb::model::{Algorithm, Protocol};
use netlb_common::conntrack::Direction;
use netlb_common::counters::Counter;
use netlb_common::maps::{Affinity, AffinityKey, Backend, Config, EndpointKey, Interface, address, role};
use netlb_common::network::{Network, Networks};
use netlb_common::time::Ticks;
use netlb_integration::exec::Cmd;
use netlb_integration::frames::{ACK, SYN};
use netlb_integration::lab::{
    BACKENDS, CASES, CLIENTS, Case, DROP, Lab, Outcome, PASS, REDIRECT, XDP_DROP, XDP_PASS, addr, destination, source,
};
use netlb_integration::testing::TestResult;

const UPLINK: Interface = Interface { role: role::UPLINK, flags: 0, pad: 0, master: 0 };
const POD: Interface = Interface { role: role::POD, ..UPLINK };

/// Addresses that begin like one, by the length of a prefix of its family.
fn network(ip: IpAddr, len: u32) -> Network {
    Network::new(addr(ip), if ip.is_ipv4() { 96 + len } else { len })
}

fn networks(of: &[Network]) -> Networks {
    let mut networks = Networks { len: of.len() as u64, ..Networks::NONE };
    networks.all[..of.len()].copy_from_slice(of);
    networks
}

/// The clients' network, and that of virtual addresses.
fn clients() -> Networks {
    networks(
        &[CASES[0], CASES[2]].map(|case| network(case.client(0).ip(), if case.vip(0).is_ipv4() { 24 } else { 64 })),
    )
}

fn virtual_addresses() -> Networks {
    networks(&[CASES[0], CASES[2]].map(|case| network(case.vip(0).ip(), if case.vip(0).is_ipv4() { 24 } else { 112 })))
}

/// A service whose flows from outside have the backends 3, and others 4.
fn two_sets(lab: &mut Lab, case: Case) {
    lab.begin([case.service(&[4]), case.service_at(81, &[3])]);
    let outside = lab.config(case, case.vip(81));
    let inside = lab.config(case, case.vip(80));
    lab.configure(case, case.vip(80), |config| config.flags |= Config::OUTSIDE | Config::SNAT_NEVER);
    let key = EndpointKey { scope: EndpointKey::OUTSIDE, ..inside.key };
    let config = Config { key, frontend: inside.frontend, flags: Config::SNAT_NEVER, ..outside };
    lab.harness.set_config(config).expect("room for a record");
}

#[test]
fn flows_from_outside_have_a_record_of_their_own() -> TestResult {
    for (pods, interface, is_outside) in [
        (Networks::NONE, POD, false),
        (Networks::NONE, Interface { role: role::BRIDGE, ..POD }, false),
        (Networks::NONE, UPLINK, true),
        // The address says so, whatever the interface.
        (clients(), UPLINK, false),
    ] {
        let mut lab = Lab::at(&Site { pods, ..Site::default() })?;
        lab.harness.set_interface(CLIENTS, interface)?;
        for case in CASES {
            two_sets(&mut lab, case);
            let backend = lab.backend_of(&case.packet(case.client(40000), case.vip(80)));
            assert_eq!(backend, case.backend(if is_outside { 3 } else { 4 }), "{case}: {interface:?}");
            assert_eq!(lab.backend_of(&case.segment(case.client(40000), case.vip(80), ACK)), backend, "{case}");
            let reply = lab.reply(case, case.client(40000), backend, ACK);
            assert_eq!(source(&reply.frame), case.vip(80), "{case}: {interface:?}");
        }
    }
    Ok(())
}

#[test]
fn without_that_record_a_flow_waits_for_it() -> TestResult {
    let mut lab = Lab::fast()?;
    lab.harness.set_interface(CLIENTS, UPLINK)?;
    for case in CASES {
        lab.begin([case.service(&[4])]);
        lab.configure(case, case.vip(80), |config| config.flags |= Config::OUTSIDE);
        let out = lab.from_clients(case.packet(case.client(40000), case.vip(80)).frame());
        assert_eq!((out.verdict, lab.counts()), (DROP, vec![(Counter::NoLocalBackend, 1)]), "{case}");
        lab.harness.set_interface(CLIENTS, POD)?;
        lab.backend_of(&case.packet(case.client(40000), case.vip(80)));
        lab.harness.set_interface(CLIENTS, UPLINK)?;
    }
    Ok(())
}

#[test]
fn a_policy_that_leaves_nobody_drops() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[])]);
        lab.configure(case, case.vip(80), |config| config.flags |= Config::DROP);
        for segment in [SYN, ACK] {
            let frame = case.segment(case.client(40000), case.vip(80), segment).frame();
            assert_eq!(lab.from_clients(&frame).verdict, DROP, "{case}");
            assert_eq!(lab.counts(), [(Counter::NoLocalBackend, 1)], "{case}");
        }
        let frame = case.packet(case.client(40000), case.vip(80)).frame();
        assert_eq!(lab.xdp_from_clients(&frame).verdict, XDP_DROP, "{case}");
        assert_eq!(lab.counts(), [(Counter::NoLocalBackend, 1)], "{case}");
    }
    Ok(())
}

#[test]
fn clients_outside_of_the_ranges_are_dropped() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[3]), case.service_at(81, &[4])]);
        lab.configure(case, case.vip(80), |config| config.flags |= Config::RANGES);
        let service = lab.config(case, case.vip(80)).service;
        let frame = case.packet(case.client(40000), case.vip(80)).frame();
        let try_it = |lab: &Lab| lab.from_clients(&frame).verdict;
        assert_eq!(try_it(&lab), DROP, "{case}");
        assert_eq!(lab.counts(), [(Counter::SourceRange, 1)], "{case}");
        assert_eq!(lab.xdp_from_clients(&frame).verdict, XDP_DROP, "{case}");
        // Hosts 0 to 7 of the clients' network, in both families.
        const BITS: u32 = 125;
        // Another service's ranges are another matter, and so is a neighbouring network.
        let client = addr(case.client(0).ip());
        lab.harness.add_range(service + 1, client, 96)?;
        lab.harness.add_range(service, addr(case.host(1, 8)), BITS)?;
        assert_eq!(try_it(&lab), DROP, "{case}");
        lab.backend_of(&case.packet(case.client(40001), case.vip(81)));
        lab.harness.add_range(service, client, BITS)?;
        assert_eq!(try_it(&lab), REDIRECT, "{case}");
        // What runs, runs on.
        lab.configure(case, case.vip(80), |config| config.service += 100);
        assert_eq!(lab.backend_of(&case.segment(case.client(40000), case.vip(80), ACK)), case.backend(3), "{case}");
        let new = case.packet(case.client(40001), case.vip(80)).frame();
        assert_eq!(lab.from_clients(new).verdict, DROP, "{case}");
    }
    Ok(())
}

#[test]
fn loopback_addresses_on_an_interface_are_left_alone() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        let loopback: IpAddr = if case.vip(0).is_ipv4() { [127, 0, 0, 1].into() } else { "::1".parse()? };
        lab.begin([case.service(&[3])]);
        lab.configure(case, case.vip(80), |config| config.key.addr = addr(loopback));
        let named = SocketAddr::new(loopback, 80);
        // Its bit of the filter is not set by this; the others' is.
        let frames = [
            case.packet(case.client(40000), named).frame(),
            case.packet(SocketAddr::new(loopback, 40000), case.vip(80)).frame(),
        ];
        for frame in frames {
            assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}");
        }
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

/// A node with addresses on both ways.
fn addressed() -> TestResult {
    for case in [CASES[0], CASES[2]] {
        for (network, device) in [(1, "clients"), (2, "backends")] {
            let address = case.host(network, 100);
            let line = match address {
                IpAddr::V4(_) => format!("address add {address}/24 dev {device}"),
                IpAddr::V6(_) => format!("address add {address}/64 dev {device} nodad"),
            };
            Cmd::new("ip").args(line.split(' ')).run()?.success()?;
        }
    }
    Ok(())
}

#[test]
fn another_source_is_given_by_where_a_flow_comes_from() -> TestResult {
    let mut lab = Lab::fast()?;
    addressed()?;
    for case in CASES {
        for (flags, from_pods, from_outside) in [
            (0, false, false),
            (Config::SNAT_PODS, true, false),
            (Config::SNAT_OUTSIDE, false, true),
            (Config::SNAT_PODS | Config::SNAT_OUTSIDE, true, true),
            (Config::SNAT_NEVER | Config::SNAT_OUTSIDE, false, true),
        ] {
            for (interface, is_given) in [(POD, from_pods), (UPLINK, from_outside)] {
                lab.harness.set_interface(CLIENTS, interface)?;
                lab.begin([case.service(&[3])]);
                lab.configure(case, case.vip(80), |config| config.flags = flags);
                let out = lab.from_clients(case.packet(case.client(40000), case.vip(80)).frame());
                assert_eq!((out.verdict, destination(&out.frame)), (REDIRECT, case.backend(3)), "{case}: {flags}");
                let is_clients = source(&out.frame) == case.client(40000);
                assert_eq!(is_clients, !is_given, "{case}: {flags}, {interface:?}");
            }
        }
    }
    Ok(())
}

/// The kernel would drop a packet that comes in with an address of its own, and the replies are translated at egress.
#[test]
fn a_backend_that_is_this_node_sees_the_client() -> TestResult {
    let mut lab = Lab::fast()?;
    addressed()?;
    for case in CASES {
        lab.harness.set_interface(CLIENTS, UPLINK)?;
        lab.begin([case.service(&[100])]);
        lab.configure(case, case.vip(80), |config| config.flags = Config::SNAT_PODS | Config::SNAT_OUTSIDE);
        let request = case.packet(case.client(40000), case.vip(80));
        let frame = request.clone().to(case.backend(100)).frame();
        assert_eq!(lab.from_clients(request.frame()), Outcome { verdict: PASS, frame }, "{case}");
        assert_eq!(lab.counts(), [(Counter::ToStack, 1), (Counter::FlowsCreated, 1)], "{case}");
        let reply = case.segment(case.backend(100), case.client(40000), ACK);
        let out = lab.to_clients(reply.frame());
        assert_eq!((out.verdict, source(&out.frame)), (PASS, case.vip(80)), "{case}");
    }
    Ok(())
}

#[test]
fn a_client_keeps_its_backend_whatever_its_ports_and_frontends() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        for algorithm in Algorithm::ALL {
            let hosts = [1, 2, 3, 4, 5];
            lab.begin([case.weighted(&hosts.map(|host| (host, 1)), algorithm)]);
            lab.configure(case, case.vip(80), |config| config.affinity = 100);
            // Another frontend of the same service.
            let first = lab.config(case, case.vip(80));
            let client = |host, port| SocketAddr::new(case.host(1, host), port);
            let mut seen = BTreeSet::new();
            for host in 1..=20 {
                let backend = lab.backend_of(&case.packet(client(host, 40000), case.vip(80)));
                for port in 40001..40006 {
                    let again = lab.backend_of(&case.packet(client(host, port), case.vip(80)));
                    assert_eq!(again, backend, "{case}: {algorithm:?}");
                }
                seen.insert(backend);
            }
            assert!(seen.len() > 2, "{case}: {algorithm:?}: {seen:?}");
            let kept = lab.harness.affinities()?;
            let kept = Vec::from_iter(kept.iter().filter(|(key, _)| key.service == first.service));
            assert_eq!(kept.len(), 20, "{case}");
            for (key, affinity) in kept {
                let backend = lab.harness.backend(affinity.backend());
                assert_eq!((backend.service, key.protocol), (first.service, case.protocol.number().into()), "{case}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_remembered_backend_goes_before_the_ring_while_it_is_of_use() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        let all = Backend::SERVING | Backend::ACCEPTING;
        lab.begin([case.service(&[1, 2, 3])]);
        lab.configure(case, case.vip(80), |config| config.affinity = 100);
        let service = lab.config(case, case.vip(80)).service;
        let key = AffinityKey::new(addr(case.client(0).ip()), service, case.protocol.number());
        let mut port = 40000;
        let mut next = |lab: &Lab| {
            port += 1;
            lab.backend_of(&case.packet(case.client(port), case.vip(80)))
        };
        let kept = |lab: &Lab| {
            lab.harness.affinities().unwrap().into_iter().find(|(at, _)| *at == key).map(|(_, value)| value)
        };
        let of_ring = next(&lab);
        let id = |lab: &Lab, host: u8| {
            (1..256).find(|id| {
                let backend = lab.harness.backend(*id);
                backend.addr == addr(case.backend(host).ip()) && backend.service == service
            })
        };
        let other = [1, 2, 3].into_iter().find(|host| case.backend(*host) != of_ring).unwrap();
        let other_id = id(&lab, other).unwrap();
        let now = Ticks(kept(&lab).unwrap().0 as u32);

        lab.harness.set_affinity(key, Affinity::new(other_id, Ticks(now.0 - 90)))?;
        assert_eq!(next(&lab), case.backend(other), "{case}: remembered");
        let renewed = kept(&lab).unwrap();
        assert!(renewed.age(now) < 90 && renewed.backend() == other_id, "{case}: made young");
        lab.harness.set_affinity(key, Affinity::new(other_id, Ticks(now.0 - 110)))?;
        assert_eq!(next(&lab), of_ring, "{case}: too old");
        lab.harness.set_affinity(key, Affinity::new(other_id, now))?;
        lab.harness.set_backend_flags(addr(case.backend(other).ip()), Backend::SERVING);
        assert_eq!(next(&lab), of_ring, "{case}: drains");
        assert_ne!(kept(&lab).unwrap().backend(), other_id, "{case}: forgotten");
        lab.harness.set_backend_flags(addr(case.backend(other).ip()), all);

        lab.configure(case, case.vip(80), |config| config.flags |= Config::LOCAL);
        lab.harness.set_affinity(key, Affinity::new(other_id, now))?;
        assert_eq!(next(&lab), of_ring, "{case}: not local");
        lab.harness.set_backend_flags(addr(case.backend(other).ip()), all | Backend::LOCAL);
        lab.harness.set_affinity(key, Affinity::new(other_id, now))?;
        assert_eq!(next(&lab), case.backend(other), "{case}: local");
        lab.harness.set_backend_flags(addr(case.backend(other).ip()), all);

        // Another service's id says nothing.
        lab.configure(case, case.vip(80), |config| config.flags &= !Config::LOCAL);
        lab.harness.set_affinity(key, Affinity::new(255, now))?;
        assert_eq!(next(&lab), of_ring, "{case}: no such backend");
        assert_eq!(lab.count(Counter::AffinityFull), 0, "{case}");
    }
    Ok(())
}

#[test]
fn a_conflict_at_the_remembered_backend_goes_on_to_the_ring() -> TestResult {
    let mut lab = Lab::fast()?;
    for case in CASES {
        lab.begin([case.service(&[1, 2]), case.service_at(81, &[1])]);
        lab.configure(case, case.vip(80), |config| config.affinity = 100);
        let config = lab.config(case, case.vip(80));
        let backend = (1..256).find(|id| {
            let backend = lab.harness.backend(*id);
            backend.addr == addr(case.backend(1).ip()) && backend.service == config.service
        });
        let client = case.client(40000);
        lab.backend_of(&case.packet(client, case.vip(81)));
        lab.backend_of(&case.packet(case.client(40001), case.vip(80)));
        let (key, affinity) =
            lab.harness.affinities()?.into_iter().find(|(key, _)| key.service == config.service).unwrap();
        let now = Ticks(affinity.0 as u32);
        lab.harness.set_affinity(key, Affinity::new(backend.unwrap(), now))?;
        assert_eq!(lab.backend_of(&case.packet(client, case.vip(80))), case.backend(2), "{case}");
    }
    Ok(())
}

#[test]
fn with_affinity_either_half_of_a_flow_comes_back() -> TestResult {
    let mut lab = Lab::fast()?;
    for family in netlb_integration::topology::Family::BOTH {
        let case = Case::tcp(family);
        lab.begin([case.service(&[1, 2, 3, 4, 5, 6, 7, 8])]);
        lab.configure(case, case.vip(80), |config| config.affinity = 100);
        let client = case.client(40000);
        let backend = lab.connect(case, client, case.vip(80));
        // The client has another one by now.
        let (key, _) = lab.harness.affinities()?.remove(0);
        lab.harness.set_affinity(key, Affinity::new(200, Ticks(0)))?;
        assert_eq!(lab.lose(Direction::Forward), 1);
        assert_eq!(lab.backend_of(&case.segment(client, case.vip(80), ACK)), backend, "{case}");
        assert_eq!(lab.count(Counter::FlowsRepaired), 1, "{case}");
        lab.counts();
    }
    Ok(())
}

#[test]
fn in_a_network_of_the_services_what_is_no_service_is_nobody() -> TestResult {
    let mut lab = Lab::at(&Site { owned: virtual_addresses(), ..Site::default() })?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let of = |last: u8| {
            let ip = netlb_integration::topology::vip(case.family, last);
            SocketAddr::new(ip, 80)
        };
        let (unknown, node) = (of(77), of(78));
        lab.harness.set_address(addr(case.vip(80).ip()), address::SERVICE)?;
        lab.harness.set_address(addr(node.ip()), address::NODE)?;
        lab.backend_of(&case.packet(case.client(40000), case.vip(80)));
        lab.counts();

        let frame = case.packet(case.client(40000), unknown).frame();
        assert_eq!(lab.from_clients(&frame).verdict, DROP, "{case}: unknown");
        assert_eq!(lab.counts(), [(Counter::OwnedUnknown, 1)], "{case}");
        assert_eq!(lab.xdp_from_clients(&frame).verdict, XDP_DROP, "{case}: unknown");
        lab.counts();
        // From a backend as well.
        let frame = case.packet(case.backend(3), unknown).frame();
        assert_eq!(lab.from_backends(&frame).verdict, DROP, "{case}: a backend to unknown");
        lab.counts();

        let frame = case.packet(case.client(40000), case.vip(81)).frame();
        assert_eq!(lab.xdp_from_clients(&frame).verdict, XDP_PASS, "{case}: unknown port");
        assert_eq!(lab.counts(), [], "{case}: the hook that answers counts");
        assert_eq!(lab.from_clients(&frame).verdict, REDIRECT, "{case}: unknown port");
        assert_eq!(lab.counts(), [(Counter::UnknownPort, 1), (Counter::Rejected, 1)], "{case}");

        for (what, to) in [("node", node), ("elsewhere", SocketAddr::new(case.host(2, 3), 81))] {
            let frame = case.packet(case.client(40000), to).frame();
            assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}: {what}");
        }
        // What the node sends is its own affair.
        let frame = case.packet(case.client(40000), unknown).frame();
        assert_eq!(lab.run(Program::Egress, &frame, BACKENDS), Outcome { verdict: PASS, frame }, "{case}: egress");
        assert_eq!(lab.counts(), [], "{case}");
    }
    Ok(())
}

#[test]
fn other_protocols_to_nobody_are_dropped_and_signals_pass() -> TestResult {
    let mut lab = Lab::at(&Site { owned: virtual_addresses(), ..Site::default() })?;
    for case in CASES.into_iter().filter(|case| case.protocol == Protocol::Udp) {
        lab.begin([]);
        let unknown = netlb_integration::topology::vip(case.family, 77);
        let is_v4 = unknown.is_ipv4();
        let frame = |protocol: u8, kind: u8| {
            let mut frame = case.packet(case.client(40000), SocketAddr::new(unknown, 80)).frame();
            frame[if is_v4 { 34 } else { 54 }] = kind;
            netlb_integration::frames::patch(&mut frame, if is_v4 { 23 } else { 20 }, &[protocol]);
            frame
        };
        let (icmp, request, reply) = if is_v4 { (1, 8, 0) } else { (58, 128, 129) };
        for (protocol, kind) in [(132, 0), (47, 0), (icmp, request), (icmp, reply)] {
            assert_eq!(lab.from_clients(frame(protocol, kind)).verdict, DROP, "{case}: {protocol}, {kind}");
            assert_eq!(lab.counts(), [(Counter::OwnedUnknown, 1)], "{case}");
        }
        let errors: &[u8] = if is_v4 { &[3, 11] } else { &[1, 2, 3, 135, 136] };
        for kind in errors {
            let frame = frame(icmp, *kind);
            assert_eq!(lab.from_clients(&frame), Outcome { verdict: PASS, frame }, "{case}: {kind}");
        }
    }
    Ok(())
}
