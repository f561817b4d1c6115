//! Ports of the node: node ports at the addresses that are for them, and published ones, from every place.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use netlb_integration::cgroup::Cgroup;
use netlb_integration::daemon::{Backend, Config, Forwarding, Netlb, Service};
use netlb_integration::places::{Asker, ECHO, Expected, From, LOCAL, Outcome, Places, Seen, outside_address};
use netlb_integration::servers::{self, Protocol};
use netlb_integration::sockets::Client;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod};

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

/// On a socket that is connected and on one that is not, and IPv4 on a socket of IPv6 as well: it shows the address that was named.
fn processes_name_it_in_every_form(client: &mut Client, family: Family, ip: IpAddr) -> Result<()> {
    let mapped = match ip {
        IpAddr::V4(ip) => Some(IpAddr::from(ip.to_ipv6_mapped())),
        IpAddr::V6(_) => None,
    };
    for (ip, family) in [(Some(ip), family), (mapped, Family::V6)] {
        let Some(to) = ip.map(|ip| SocketAddr::new(ip, AT_ALL)) else { continue };
        client.open(family)?;
        let (from, answer) = client.ask(to, "who").with_context(|| to.to_string())?;
        assert_eq!((from, &*answer.name), (to, LOCAL));
        client.connect(Protocol::Tcp, to)??;
        assert_eq!(client.peer()?, to);
        assert_eq!(client.ask_peer("who")?.1.name, LOCAL);
    }
    Ok(())
}

/// Containers of a bridge, as Docker has them: one of them serves a published port, which is at the bridge's own address as well; and a
/// service has an address of the node as an external one.
#[test]
fn published_ports_lead_to_containers_of_a_bridge() -> TestResult {
    let bed = Plan::new(Layout::Bridge).with_outside_client().build()?;
    let (server, neighbour) = (bed.pod(Host::A, LOCAL)?, bed.pod(Host::A, "neighbour")?);
    let cgroup = Cgroup::new("ports")?;
    let _servers = [servers::echo(&server, Protocol::Tcp, ECHO)?, servers::echo(&server, Protocol::Udp, ECHO)?];
    let gateway = |family| Host::A.pod_address(family, 1);
    let node = Family::BOTH.map(|family| [gateway(family), underlay(family)]).concat();
    let ips = |pod: &Pod| Vec::from(Family::BOTH.map(|family| pod.ip(family)));
    let clients = [
        (From::Pod, Client::start(&neighbour.ns, None)?, ips(&neighbour)),
        (From::Backend, Client::start(&server.ns, None)?, ips(&server)),
        (From::Outside, Client::start(bed.outside()?, None)?, Vec::from(Family::BOTH.map(outside_address))),
        (From::Node, Client::start(&bed.node_a().ns, Some(&cgroup))?, vec![]),
    ];
    let mut askers = clients.map(|(from, client, own)| Asker::new(from, client, own, node.clone()));
    for forwarding in Forwarding::BOTH {
        let mut config = Config::new(bed.node_a(), forwarding).bridge("br0");
        config = config.extra(&format!("\n[socket]\nscope = \"node\"\ncgroup = {:?}\n", cgroup.path()));
        for family in Family::BOTH {
            let mut published = Service::without_frontend(&format!("published-{family}"), []);
            let mut external = Service::without_frontend(&format!("external-{family}"), []);
            for protocol in ["tcp", "udp"] {
                published = published.publish(format!("{AT_ALL}:{ECHO}/{protocol}"));
                external =
                    external.external_ip(format!("{}/{protocol}", SocketAddr::new(underlay(family), AT_UNDERLAY)));
            }
            for service in [published, external] {
                config = config.service(service.backend(Backend::new(SocketAddr::new(server.ip(family), ECHO))));
            }
        }
        let _netlb = Netlb::start(bed.node_a(), &config)?;
        for (family, number) in Family::BOTH.into_iter().flat_map(|family| (0..4).map(move |number| (family, number))) {
            let asker = &mut askers[number];
            let mut at = vec![(underlay(family), AT_ALL), (gateway(family), AT_ALL), (underlay(family), AT_UNDERLAY)];
            if asker.from == From::Node {
                at.push((loopback(family), AT_ALL));
            }
            let sees = if matches!(asker.from, From::Node | From::Backend) { Seen::Node } else { Seen::Client };
            if asker.from == From::Node {
                processes_name_it_in_every_form(asker.client(), family, loopback(family))?;
            }
            for ((ip, port), protocol) in at.into_iter().flat_map(|at| [(at, Protocol::Tcp), (at, Protocol::Udp)]) {
                let to = SocketAddr::new(ip, port);
                let outcome = asker.ask(protocol, to)?;
                let what = format!("{forwarding}, {}, from {:?} to {to}", protocol.name(), asker.from);
                assert_eq!(outcome, Outcome::By(LOCAL.to_owned(), sees), "{what}");
            }
        }
    }
    Ok(())
}
