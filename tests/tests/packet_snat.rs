//! Clients get an address of the node as their source where a backend's replies would not come back otherwise.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use netlb::config::{Forwarding, Limits, Snat};
use netlb::datapath::kernel::testing::{Program, Site};
use netlb::model::{Protocol, SnatMode};
use netlb_common::conntrack::Direction;
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_integration::exec::Cmd;
use netlb_integration::frames::{ACK, SYN_ACK};
use netlb_integration::lab::{
    self, BACKENDS, BACKENDS_MAC, BACKENDS_MTU, CASES, CLIENTS, CLIENTS_MAC, Case, DROP, LIMITS, Lab, Outcome, PASS,
    REDIRECT, XDP_DROP, XDP_PASS, XDP_REDIRECT, destination, mac, source,
};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::Family;

const UPLINK: Interface = Interface { role: role::UPLINK, flags: 0, pad: 0, master: 0 };
/// The ports that clients get.
const PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;

/// A node with addresses on both ways, of which both are uplinks.
fn gateway(lab: &mut Lab) -> anyhow::Result<()> {
    lab::add_node_addresses()?;
    for index in [CLIENTS, BACKENDS] {
        lab.harness.set_interface(index, UPLINK)?;
    }
    Ok(())
}

/// The node's address towards the backends.
fn node(case: Case) -> IpAddr {
    case.host(2, 100)
}

#[test]
fn a_client_outside_reaches_a_backend_outside_and_gets_its_answers() -> TestResult {
    // The kernel would forward nothing that comes in with its own address, so this is never left to it.
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = Lab::new(forwarding, &LIMITS)?;
        gateway(&mut lab)?;
        for case in CASES {
            lab.begin([case.service(&[3])]);
            let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
            let request = case.packet(client, vip).payload([0xa5; 77]);
            let out = lab.from_clients(request.frame());
            let given = source(&out.frame);
            assert_eq!((given.ip(), destination(&out.frame)), (node(case), backend), "{case}");
            assert!(PORTS.contains(&given.port()), "{case}: {given}");
            let frame = request.clone().to(backend).from(given).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
            assert_eq!(out, Outcome { verdict: REDIRECT, frame }, "{case}");

            for segment in [SYN_ACK, ACK, ACK] {
                let reply = case.segment(backend, given, segment).macs(BACKENDS_MAC, mac(backend.ip())).payload([9; 5]);
                let expected = reply.clone().from(vip).to(client).ttl(60).macs(mac(client.ip()), CLIENTS_MAC).frame();
                let out = lab.from_backends(reply.frame());
                assert_eq!(out, Outcome { verdict: REDIRECT, frame: expected }, "{case}: reply");
            }
            let out = lab.from_clients(case.segment(client, vip, ACK).frame());
            assert_eq!((source(&out.frame), destination(&out.frame)), (given, backend), "{case}: the same");
            assert_eq!(lab.count(Counter::FlowsCreated), 1, "{case}");
            assert_eq!(lab.count_flows(), 1, "{case}");
        }
    }
    Ok(())
}

#[test]
fn xdp_does_the_same() -> TestResult {
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    for index in [CLIENTS, BACKENDS] {
        lab.harness.set_interface(index, Interface { flags: Interface::XDP, ..UPLINK })?;
    }
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        let request = case.packet(client, vip).payload([0xa5; 77]);
        let out = lab.xdp_from_clients(request.frame());
        let given = source(&out.frame);
        let sent = request.to(backend).from(given).ttl(60).macs(mac(backend.ip()), BACKENDS_MAC).frame();
        assert_eq!(out, Outcome { verdict: XDP_REDIRECT, frame: sent }, "{case}");
        assert_eq!(given.ip(), node(case), "{case}");
        let reply = case.segment(backend, given, SYN_ACK).macs(BACKENDS_MAC, mac(backend.ip()));
        for round in 0..3 {
            let sent = reply.clone().from(vip).to(client).ttl(60).macs(mac(client.ip()), CLIENTS_MAC).frame();
            let out = lab.run(Program::Xdp, reply.frame(), BACKENDS);
            assert_eq!(out, Outcome { verdict: XDP_REDIRECT, frame: sent }, "{case}, {round}");
        }
        assert_eq!(lab.counts(), [(Counter::FlowsCreated, 1), (Counter::SentByXdp, 4)], "{case}");
    }
    Ok(())
}

/// Where there is one way to each destination, new flows ask routing neither for it nor for the node's address there, also beyond a gateway.
#[test]
fn new_flows_follow_others_through_an_uplink() -> TestResult {
    const TWO_TICKS: Duration = Duration::from_millis(2200);
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    for flags in [0, Interface::DIRECT] {
        for index in [CLIENTS, BACKENDS] {
            lab.harness.set_interface(index, Interface { flags, ..UPLINK })?;
        }
        let is_led = flags != 0;
        for (case, is_beyond) in [(CASES[0], false), (CASES[2], false), (CASES[0], true), (CASES[2], true)] {
            // Another one each time: leads outlive a case.
            let (host, gateway) = (if is_beyond { 5 } else { 3 }, case.host(2, 6));
            let (backend, way) =
                (case.backend(host).ip(), if is_beyond { format!(" via {gateway}") } else { String::new() });
            let route = |line: String| Cmd::new("ip").arg("route").args(line.split(' ')).run()?.success();
            let send = |lab: &Lab, port| lab.from_clients(case.packet(case.client(port), case.vip(80)).frame());
            lab.begin([case.service(&[host])]);
            route(format!("add {backend}{way} dev backends"))?;
            let first = send(&lab, 40000);
            assert_eq!((first.verdict, source(&first.frame).ip()), (REDIRECT, node(case)), "{case}, {flags}");
            route(format!("del {backend}"))?;
            route(format!("add blackhole {backend}"))?;
            let second = send(&lab, 40001);
            if is_led {
                assert_eq!((second.verdict, source(&second.frame).ip()), (REDIRECT, node(case)), "{case}");
                assert_eq!(second.frame[..12], first.frame[..12], "{case}: the same way");
            } else {
                assert_eq!(second.verdict, DROP, "{case}");
            }
            if is_led && case == CASES[2] {
                thread::sleep(TWO_TICKS);
                assert_eq!(send(&lab, 40002).verdict, DROP, "{case}: after two ticks");
            }
            route(format!("del blackhole {backend}"))?;
        }
    }
    Ok(())
}

/// A client's port, again, to the only backend by another frontend: the backend could not tell the two.
#[test]
fn a_flow_that_looks_like_another_gets_the_nodes_address() -> TestResult {
    for forwarding in [Forwarding::Fast, Forwarding::Stack] {
        let mut lab = Lab::new(forwarding, &LIMITS)?;
        gateway(&mut lab)?;
        lab.harness.set_interface(BACKENDS, Interface { role: role::POD, ..UPLINK })?;
        for case in CASES {
            let services = [80, 81, 82].map(|port| case.service_at(port, &[3]));
            lab.begin(services);
            let (client, backend) = (case.client(40000), case.backend(3));
            let first = lab.from_clients(case.packet(client, case.vip(80)).frame());
            assert_eq!((source(&first.frame), destination(&first.frame)), (client, backend), "{case}");
            let mut sources = HashSet::from([client]);
            for vip in [81, 82].map(|port| case.vip(port)) {
                let out = lab.from_clients(case.packet(client, vip).frame());
                let given = source(&out.frame);
                assert_eq!((given.ip(), destination(&out.frame)), (node(case), backend), "{case}: {vip}");
                assert!(sources.insert(given), "{case}: {given}");
                let reply = lab.reply(case, given, backend, SYN_ACK);
                assert_eq!((source(&reply.frame), destination(&reply.frame)), (vip, client), "{case}");
                let next = lab.from_clients(case.segment(client, vip, ACK).frame());
                assert_eq!(source(&next.frame), given, "{case}: the same");
            }
            if forwarding == Forwarding::Fast {
                let reply = lab.reply(case, client, backend, SYN_ACK);
                assert_eq!((source(&reply.frame), destination(&reply.frame)), (case.vip(80), client), "{case}");
            }
            assert_eq!(lab.count(Counter::FlowsCreated), 3, "{case}");
            assert_eq!(lab.count_flows(), 3, "{case}");
        }
    }
    Ok(())
}

#[test]
fn clients_with_one_port_get_different_ones() -> TestResult {
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let mut given = HashSet::new();
        for host in 0..200 {
            let client = SocketAddr::new(neighbour(case, host), 62_000);
            let out = lab.from_clients(case.packet(client, case.vip(80)).frame());
            assert!(given.insert(source(&out.frame)), "{case}: {} is given twice", source(&out.frame));
        }
        assert!(given.iter().any(|source| source.port() == 62_000), "{case}: the first keeps its port");
    }
    Ok(())
}

/// Some host beyond the clients' network.
fn neighbour(case: Case, number: u8) -> IpAddr {
    match case.client(0).ip() {
        IpAddr::V4(_) => [198, 51, 100, number].into(),
        IpAddr::V6(ip) => {
            let mut segments = ip.segments();
            (segments[3], segments[7]) = (7, number.into());
            segments.into()
        }
    }
}

#[test]
fn a_pod_reaches_itself_through_its_service() -> TestResult {
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    lab.harness.set_interface(BACKENDS, Interface { role: role::POD, ..Interface::default() })?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let (backend, vip) = (case.backend(3), case.vip(80));
        let client = SocketAddr::new(backend.ip(), 40000);
        let out = lab.from_backends(case.packet(client, vip).frame());
        let given = source(&out.frame);
        assert_eq!((out.verdict, destination(&out.frame), given.ip()), (REDIRECT, backend, node(case)), "{case}");
        let out = lab.from_backends(case.segment(backend, given, SYN_ACK).frame());
        assert_eq!((out.verdict, source(&out.frame), destination(&out.frame)), (REDIRECT, vip, client), "{case}");
    }
    Ok(())
}

#[test]
fn either_half_of_a_flow_comes_back() -> TestResult {
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    for case in CASES {
        lab.begin([case.service(&[3, 4, 5])]);
        let (client, vip) = (case.client(40000), case.vip(80));
        let out = lab.from_clients(case.packet(client, vip).frame());
        let (given, backend) = (source(&out.frame), destination(&out.frame));
        lab.from_backends(case.segment(backend, given, SYN_ACK).frame());
        lab.from_clients(case.segment(client, vip, ACK).frame());

        // The client's next packet finds the port again.
        assert_eq!(lab.lose(Direction::Forward), 1);
        let out = lab.from_clients(case.segment(client, vip, ACK).frame());
        assert_eq!((source(&out.frame), destination(&out.frame)), (given, backend), "{case}: request");

        // A reply cannot tell whose it is. It must not reach the node, which would refuse it; the client's next packet brings the slot back.
        assert_eq!(lab.lose(Direction::Reply), 1);
        let reply = case.segment(backend, given, ACK).frame();
        assert_eq!(lab.from_backends(&reply).verdict, DROP, "{case}");
        assert_eq!(lab.count(Counter::SnatLost), 1, "{case}");
        lab.age(10);
        lab.from_clients(case.segment(client, vip, ACK).frame());
        let out = lab.from_backends(&reply);
        assert_eq!((source(&out.frame), destination(&out.frame)), (vip, client), "{case}: reply");
        lab.counts();
    }
    Ok(())
}

#[test]
fn a_client_that_is_to_keep_its_backend_gets_another_source_there() -> TestResult {
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    for index in [CLIENTS, BACKENDS] {
        lab.harness.set_interface(index, Interface { role: role::POD, ..Interface::default() })?;
    }
    for case in CASES {
        lab.begin([case.service(&[1, 2, 3, 4]), case.service_at(81, &[1, 2, 3, 4])]);
        lab.configure(case, case.vip(80), |config| config.affinity = 100);
        let keeps = lab.backend_of(&case.packet(case.client(39_999), case.vip(80)));
        for port in 40_000..40_010 {
            let client = case.client(port);
            let other = lab.backend_of(&case.packet(client, case.vip(81)));
            let out = lab.from_clients(case.packet(client, case.vip(80)).frame());
            assert_eq!(destination(&out.frame), keeps, "{case}, {port}");
            assert_eq!(source(&out.frame) == client, other != keeps, "{case}, {port}");
        }
        assert_eq!(lab.count(Counter::FlowConflict), 0, "{case}");
    }
    Ok(())
}

/// The node talks to backends past their services too, from ports that clients are given as well.
#[test]
fn a_reply_to_a_socket_of_the_node_is_its_own() -> TestResult {
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let backend = case.backend(3);
        lab.from_clients(case.packet(case.client(40000), case.vip(80)).frame());
        lab.counts();
        let socket = |port| SocketAddr::new(node(case), port);
        let (_datagrams, _streams);
        if case.protocol == Protocol::Udp {
            _datagrams = UdpSocket::bind(socket(62_000))?;
        } else {
            _streams = TcpListener::bind(socket(62_000))?;
        }
        let reply = case.segment(backend, socket(62_000), SYN_ACK).frame();
        assert_eq!(lab.from_backends(&reply), Outcome { verdict: PASS, frame: reply.clone() }, "{case}");
        assert_eq!(lab.xdp_from_backends(&reply), Outcome { verdict: XDP_PASS, frame: reply }, "{case}");
        assert_eq!(lab.counts(), [], "{case}");
        let lost = case.segment(backend, socket(62_001), SYN_ACK).frame();
        assert_eq!(
            (lab.from_backends(&lost).verdict, lab.xdp_from_backends(&lost).verdict),
            (DROP, XDP_DROP),
            "{case}"
        );
        assert_eq!(lab.counts(), [(Counter::SnatLost, 2)], "{case}");
    }
    Ok(())
}

/// Where a flow goes does not depend on how long its first packet is.
#[test]
fn a_flow_that_begins_with_a_packet_too_long_for_its_way_gets_the_nodes_address() -> TestResult {
    for mode in [SnatMode::Auto, SnatMode::Always] {
        for is_xdp in [false, true] {
            let mut lab = Lab::fast()?;
            gateway(&mut lab)?;
            for case in CASES {
                lab.begin([case.service(&[3]).with_snat(mode)]);
                let (client, vip) = (case.client(40000), case.vip(80));
                let what = format!("{case}, {mode:?}, XDP: {is_xdp}");
                let long = case.packet(client, vip).sized(BACKENDS_MTU + 1).frame();
                if is_xdp {
                    assert_eq!(lab.xdp_from_clients(&long).verdict, XDP_PASS, "{what}");
                }
                assert_eq!(lab.from_clients(&long).verdict, REDIRECT, "{what}");
                assert_eq!(lab.count(Counter::TooBig), 1, "{what}");
                let out = lab.from_clients(case.segment(client, vip, ACK).frame());
                assert_eq!((out.verdict, source(&out.frame).ip()), (REDIRECT, node(case)), "{what}");
                assert_eq!(lab.count(Counter::NeedsSnat), 0, "{what}");
                // Others would follow the way that is known now.
                lab.harness.programmer_mut().flush_flows(&Default::default());
            }
        }
    }
    Ok(())
}

/// The kernel would cut it, and refuses what comes in with an address of its own.
#[test]
fn a_long_packet_with_the_nodes_address_that_may_be_fragmented_is_dropped() -> TestResult {
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    for case in CASES.into_iter().filter(|case| case.family == Family::V4) {
        let service = case.service(&[3]);
        lab.begin([service.clone()]);
        let packet = case.packet(case.client(40000), case.vip(80)).may_fragment();
        assert_eq!(lab.from_clients(packet.clone().sized(1500).frame()).verdict, DROP, "{case}");
        assert_eq!(lab.count(Counter::SnatTooBig), 1, "{case}");
        assert_eq!(lab.stats(&service).service.packets_in, 0, "{case}");
        assert_eq!(lab.from_clients(packet.sized(BACKENDS_MTU).frame()).verdict, REDIRECT, "{case}");
        assert_eq!(lab.stats(&service).service.packets_in, 1, "{case}");
    }
    Ok(())
}

#[test]
fn with_nearly_every_port_taken_new_connections_find_one() -> TestResult {
    let mut lab = Lab::new(Forwarding::Fast, &Limits { flows: 65_536, ..LIMITS })?;
    gateway(&mut lab)?;
    let case = CASES[0];
    lab.begin([case.service(&[3])]);
    let ports = PORTS.count() as u32;
    let full = ports * 95 / 100;
    let mut refused = 0;
    for n in 0..ports * 2 {
        let [_, _, a, b] = n.to_be_bytes();
        let client = SocketAddr::new([198, 51, a, b].into(), 40_000);
        let out = lab.from_clients(case.packet(client, case.vip(80)).frame());
        // A refusal is a frame back to the client.
        if destination(&out.frame) == client && lab.count_flows() <= u64::from(full) {
            refused += 1;
        }
        if n % 64 == 0 && lab.count_flows() == u64::from(ports) {
            break;
        }
    }
    assert!(refused * 1000 <= full, "{refused} refused before 95 % of the ports were taken");
    let flows = lab.count_flows();
    assert!(flows * 1000 >= u64::from(ports) * 995, "{flows} of {ports} ports are in use in the end");
    assert!(lab.count(Counter::SnatExhausted) > 0);

    // With none left a client is told so, and with one given up the next client gets it.
    let ask = |client| lab.from_clients(case.packet(client, case.vip(80)).frame());
    let late = (0..1000).map(|port| SocketAddr::new([198, 52, 0, 1].into(), 10_000 + port)).find(|client| {
        let out = ask(*client);
        out.verdict == REDIRECT && destination(&out.frame) == *client
    });
    let late = late.expect("somebody finds no port");
    lab.age(70);
    assert_eq!(destination(&ask(late).frame), case.backend(3), "ports of connections that never were are free again");
    Ok(())
}

#[test]
fn ports_of_several_addresses_are_given_until_none_is_left() -> TestResult {
    let addresses: Vec<IpAddr> =
        [CASES[0], CASES[2]].iter().flat_map(|case| [7, 8, 9].map(|n| case.host(9, n))).collect();
    let snat = Snat { addresses: addresses.clone(), ports: (61_000, 61_009) };
    let mut lab = Lab::at(&Site { snat, ..Site::default() })?;
    gateway(&mut lab)?;
    for case in CASES {
        lab.begin([case.service(&[3])]);
        let mut given = HashSet::new();
        for port in 10_000..12_000 {
            let client = case.client(port);
            let out = lab.from_clients(case.packet(client, case.vip(80)).frame());
            if destination(&out.frame) != case.backend(3) {
                continue;
            }
            let source = source(&out.frame);
            assert!(addresses.contains(&source.ip()) && (61_000..=61_009).contains(&source.port()), "{case}: {source}");
            assert!(given.insert(source), "{case}: {source} is given twice");
            let reply = lab.reply(case, source, case.backend(3), SYN_ACK);
            assert_eq!(destination(&reply.frame), client, "{case}");
        }
        assert_eq!(given.len(), 30, "{case}");
        let first = given.iter().filter(|source| source.ip() == case.host(9, 7)).count();
        assert_eq!(first, 10, "{case}");
        assert_eq!(lab.count(Counter::SnatExhausted), 2000 - 30, "{case}");
    }
    Ok(())
}

#[test]
fn a_service_says_who_gets_another_source() -> TestResult {
    let mut lab = Lab::fast()?;
    gateway(&mut lab)?;
    for case in CASES {
        let (client, vip, backend) = (case.client(40000), case.vip(80), case.backend(3));
        let first = |lab: &Lab| {
            let out = lab.from_clients(case.packet(client, vip).frame());
            assert_eq!((out.verdict, destination(&out.frame)), (REDIRECT, backend), "{case}");
            source(&out.frame)
        };
        // The backend is outside, or in a pod of this node.
        for (outside, mode, is_given) in [
            (true, SnatMode::Auto, true),
            (true, SnatMode::Never, false),
            (true, SnatMode::Always, true),
            (false, SnatMode::Auto, false),
            (false, SnatMode::Never, false),
            (false, SnatMode::Always, true),
        ] {
            let role = if outside { role::UPLINK } else { role::POD };
            lab.harness.set_interface(BACKENDS, Interface { role, ..Interface::default() })?;
            lab.begin([case.service(&[3]).with_snat(mode)]);
            let seen = first(&lab);
            assert_eq!(seen != client, is_given, "{case}: {mode:?}, outside: {outside}: {seen}");
            let reply = lab.from_backends(case.segment(backend, seen, SYN_ACK).frame());
            assert_eq!((source(&reply.frame), destination(&reply.frame)), (vip, client), "{case}: {mode:?}");
        }
    }
    Ok(())
}
