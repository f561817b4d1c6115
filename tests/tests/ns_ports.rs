//! Ports of the node: node ports at the addresses that are for them, and published ones, from every place.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use netlb_integration::daemon::{Config, Forwarding, Service};
use netlb_integration::places::{Asker, Expected, From, LOCAL, Places};
use netlb_integration::servers::Protocol;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host};

const SERVED: Expected<'_> = Expected::By(&[LOCAL]);
/// By the node's kernel, or by the pod's own where the address is a loopback one.
const REFUSED: Expected<'_> = Expected::Refused;

const NODE_PORT: u16 = 30_080;
/// Published at all addresses of the node, at its address on the underlay, at another one, and at its loopback address.
const AT_ALL: u16 = 8080;
const AT_UNDERLAY: u16 = 8081;
const AT_OTHER: u16 = 8082;
const AT_LOOPBACK: u16 = 8083;

fn underlay(family: Family) -> IpAddr {
    Host::A.underlay_address(family)
}

/// An address of the node beside the one on its underlay.
fn other(family: Family) -> IpAddr {
    match family {
        Family::V4 => [198, 51, 100, 77].into(),
        Family::V6 => "2001:db8::77".parse().expect("an address"),
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

fn give_another_address(places: &Places) -> Result<()> {
    let bed = places.bed();
    let node = &bed.node_a().ns;
    // As many answers as there are questions.
    node.sysctl("net/ipv4/icmp_ratelimit", "0")?;
    node.sysctl("net/ipv6/icmp/ratelimit", "0")?;
    for (family, bits) in [(Family::V4, 32), (Family::V6, 128)] {
        node.ip(&format!("addr add {}/{bits} dev lo\n", other(family)))?;
        for ns in [bed.outside()?, &bed.node(Host::B)?.ns] {
            ns.ip(&format!("route add {}/{bits} via {}\n", other(family), underlay(family)))?;
        }
    }
    Ok(())
}

/// A service with a node port and one with published ports for each family, of both protocols.
fn services(places: &Places, config: Config) -> Config {
    let mut config = config;
    for family in Family::BOTH {
        let by_port = Service::without_frontend(&format!("port-{family}"), []);
        let mut published = Service::without_frontend(&format!("published-{family}"), []);
        for protocol in ["tcp", "udp"] {
            let at = |ip: IpAddr, port| format!("{}:7001/{protocol}", SocketAddr::new(ip, port));
            let any = if family == Family::V4 { IpAddr::from([0; 4]) } else { IpAddr::from([0_u16; 8]) };
            for (ip, port) in [
                (any, AT_ALL),
                (underlay(family), AT_UNDERLAY),
                (other(family), AT_OTHER),
                (loopback(family), AT_LOOPBACK),
            ] {
                published = published.publish(at(ip, port));
            }
        }
        let by_port = by_port.node_port(format!("{NODE_PORT}/tcp")).node_port(format!("{NODE_PORT}/udp"));
        for service in [by_port, published] {
            config = config.service(places.backends(family, &[LOCAL]).into_iter().fold(service, Service::backend));
        }
    }
    config
}

/// The addresses that have a port, out of the one on the underlay, the other one and the loopback one.
fn cases(at_underlay: bool, at_other: bool) -> [(u16, [bool; 3]); 5] {
    [
        (NODE_PORT, [at_underlay, at_other, true]),
        (AT_ALL, [true, true, true]),
        (AT_UNDERLAY, [true, false, false]),
        (AT_OTHER, [false, true, false]),
        (AT_LOOPBACK, [false, false, true]),
    ]
}

fn ports_are_where_they_should_be(asker: &mut Asker, cases: &[(u16, [bool; 3])]) -> Result<()> {
    for family in Family::BOTH {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for (port, served) in cases {
                for (ip, served) in [underlay(family), other(family), loopback(family)].into_iter().zip(*served) {
                    // Everybody else's loopback addresses are their own.
                    let served = served && (!ip.is_loopback() || asker.from == From::Node);
                    asker.expect(protocol, SocketAddr::new(ip, *port), if served { SERVED } else { REFUSED })?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn ports_of_the_node_are_served_at_their_addresses_and_no_others() -> TestResult {
    let mut places = Places::new()?;
    give_another_address(&places)?;
    let all = ("\"all\"", true, true);
    let list = ("[\"198.51.100.0/24\", \"2001:db8::/32\"]", false, true);
    for (forwarding, scope, (addresses, at_underlay, at_other)) in [
        (Forwarding::Fast, "node", ("\"primary\"", true, false)),
        (Forwarding::Stack, "all", all),
        (Forwarding::Fast, "all", list),
    ] {
        let config = places.config(forwarding, scope).node(&format!("node_port_addresses = {addresses}"));
        places.serve(&services(&places, config))?;
        places
            .everywhere(&From::ALL, |asker| ports_are_where_they_should_be(asker, &cases(at_underlay, at_other)))
            .with_context(|| format!("{addresses}, {forwarding}, sockets of {scope}"))?;
    }
    Ok(())
}
