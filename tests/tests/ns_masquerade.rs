//! Pods reach the world, which sees the node: it knows no way to pods.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::exec::wait_until;
use netlb_integration::netns::Namespace;
use netlb_integration::raw;
use netlb_integration::run::Run;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const WAIT: Duration = Duration::from_secs(5);
const MASQUERADE: &str = "\n[masquerade]\npod_cidrs = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]\n";

#[test]
fn the_world_sees_the_node_and_its_answers_reach_the_pod() -> TestResult {
    for (layout, forwarding, rp_filter) in [
        (Layout::Ptp, Forwarding::Fast, 1),
        (Layout::Ptp, Forwarding::Stack, 1),
        (Layout::Bridge, Forwarding::Fast, 0),
        (Layout::Bridge, Forwarding::Stack, 2),
    ] {
        let bed = Plan::new(layout).with_outside_client().rp_filter(rp_filter).build()?;
        let pod = bed.pod(Host::A, "client")?;
        let world = World::open(&bed)?;
        let mut config = Config::new(bed.node_a(), forwarding).extra(MASQUERADE);
        if layout == Layout::Bridge {
            config = config.bridge("br0");
        }
        for server in &world.servers {
            let address = server.tcp.local_addr()?;
            let frontend = format!("{}/tcp", SocketAddr::new(vip(server.family, 10), 80));
            let name = format!("world-{}", server.family).to_lowercase();
            config = config.service(Service::new(&name, frontend, [address]));
        }
        let netlb = Netlb::start(bed.node_a(), &config)?;
        for server in &world.servers {
            let Server { family, tcp, udp } = server;
            let what = format!("{layout:?}, {forwarding}, {family}; {}", netlb.log());
            let node = Host::A.underlay_address(*family);
            for round in 0..5 {
                let seen = talk(&pod, tcp.local_addr()?, tcp).with_context(|| what.clone())?;
                assert_eq!(seen.ip(), node, "TCP, {round}: {what}");
                let seen = exchange(&pod, udp.local_addr()?, udp).with_context(|| what.clone())?;
                assert_eq!(seen.ip(), node, "UDP, {round}: {what}");
            }
            let seen = talk(&pod, SocketAddr::new(vip(*family, 10), 80), tcp).with_context(|| what.clone())?;
            assert_eq!(seen.ip(), node, "by a service: {what}");
            let ip = tcp.local_addr()?.ip();
            pod.ns.enter(|| raw::ping(ip, WAIT))?.with_context(|| what.clone())?;
            // The node's own connections are what they were.
            let node = &bed.node_a().ns;
            let to = tcp.local_addr()?;
            node.enter(|| TcpStream::connect_timeout(&to, WAIT))?.with_context(|| format!("the node: {what}"))?;
            tcp.accept()?;
        }
        let status = netlb.must(["status"])?;
        assert!(status.contains("flows_masqueraded"), "{status}");
        let line = |family| Host::A.underlay_address(family).to_string();
        for what in ["node ports    ", "SNAT          "] {
            let line = format!("{what}{},{}\n", line(Family::V4), line(Family::V6));
            assert!(status.contains(&line), "{line}; {status}");
        }
        let flows = netlb.items(["flows", "list"])?;
        for (family, protocol) in
            Family::BOTH.into_iter().flat_map(|family| ["tcp", "udp", "icmp"].map(|it| (family, it)))
        {
            let (pod, node) = (pod.ip(family), Host::A.underlay_address(family));
            let ip = |end: &serde_json::Value| {
                end.as_str().and_then(|end| end.parse::<SocketAddr>().ok()).map(|end| end.ip())
            };
            let is_it = |flow: &&serde_json::Value| {
                flow["masqueraded"] == true && flow["protocol"] == protocol && ip(&flow["client"]) == Some(pod)
            };
            let flow = flows.iter().find(is_it).with_context(|| format!("{family}, {protocol}: {flows:?}"))?;
            assert_eq!((ip(&flow["source"]), &flow["service"]), (Some(node), &serde_json::Value::Null), "{flow}");
        }
    }
    Ok(())
}

/// A host beyond a router in the world, whose link to it takes less than all others.
fn beyond(bed: &Testbed, mtu: u32) -> Result<Namespace> {
    let ns = Namespace::new(Run::current()?.next_number(), "beyond")?;
    let router = bed.outside()?;
    router.sysctl("net/ipv4/ip_forward", "1")?;
    router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    ns.ip(&format!(
        "link add eth0 mtu {mtu} type veth peer name beyond mtu {mtu}\n\
         link set beyond netns {}\n\
         link set eth0 up\n\
         addr add 172.31.0.2/24 dev eth0\n\
         addr add fd00:172::2/64 dev eth0 nodad\n\
         route add default via 172.31.0.1\n\
         route add ::/0 via fd00:172::1\n",
        router.name()
    ))?;
    router.ip("link set beyond up\n\
         addr add 172.31.0.1/24 dev beyond\n\
         addr add fd00:172::1/64 dev beyond nodad\n")?;
    bed.node_a()
        .ns
        .ip("route add 172.31.0.0/24 via 192.168.50.100\nroute add fd00:172::/64 via fd00:192:168:50::64\n")?;
    Ok(ns)
}

/// What `traceroute -I` and `ping -M do` live by, and pings that are longer than packets.
#[test]
fn a_pods_pings_are_answered_by_routers_and_in_fragments() -> TestResult {
    const MTU: u32 = 1350;
    for (forwarding, rp_filter) in [(Forwarding::Fast, 1), (Forwarding::Stack, 1)] {
        let bed = Plan::new(Layout::Ptp).with_outside_client().rp_filter(rp_filter).build()?;
        let pod = bed.pod(Host::A, "client")?;
        let _world = World::open(&bed)?;
        let _beyond = beyond(&bed, MTU)?;
        let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), forwarding).extra(MASQUERADE))?;
        for to in ["172.31.0.2", "fd00:172::2"] {
            let to: IpAddr = to.parse()?;
            let what = format!("{forwarding}, {to}");
            wait_until("the host beyond to answer", 2 * WAIT, || Ok(pod.ns.enter(|| raw::ping(to, WAIT / 5))?.ok()))
                .with_context(|| what.clone())?;
            let echoes = pod.ns.enter(|| raw::Echoes::of(to))??;
            let router: IpAddr = if to.is_ipv4() { "192.168.50.100" } else { "fd00:192:168:50::64" }.parse()?;
            pod.ns.enter(|| raw::ping_with(router, 4000, WAIT))?.with_context(|| format!("in fragments, {what}"))?;
            // Of IPv6 the socket leaves the checksum to the kernel.
            let quotes = |heard: &[u8], sent: &[u8]| {
                let at = if to.is_ipv4() { 28 } else { 48 };
                heard.get(at..at + 2) == Some(&sent[..2]) && heard.get(at + 4..at + 8) == Some(&sent[4..8])
            };
            let (exceeded, too_big) = if to.is_ipv4() { ([11, 0], [3, 4]) } else { ([3, 0], [2, 0]) };
            echoes.limit(2, to.is_ipv6())?;
            let sent = echoes.send(to, 8, 56)?;
            let heard = echoes.hear(WAIT, |heard| heard[..2] == exceeded && quotes(heard, &sent));
            assert_eq!(heard.with_context(|| format!("the second hop, {what}"))?.0, router, "{what}");
            echoes.limit(64, to.is_ipv6())?;
            let sent = echoes.send(to, 9, 1400)?;
            let heard = echoes.hear(WAIT, |heard| heard[..2] == too_big && quotes(heard, &sent));
            let (from, heard) = heard.with_context(|| format!("the narrow link, {what}"))?;
            assert_eq!((from, u16::from_be_bytes([heard[6], heard[7]])), (router, MTU as u16), "{what}");
            pod.ns
                .enter(|| raw::ping_with(to, 4000, WAIT))?
                .with_context(|| format!("as long as it was told, {what}"))?;
        }
        assert!(netlb.counter("icmp_translated")? >= 4, "{forwarding}");
    }
    Ok(())
}

/// Servers out on the underlay, which have no way to pods.
struct World {
    servers: Vec<Server>,
}

struct Server {
    family: Family,
    tcp: TcpListener,
    udp: UdpSocket,
}

impl World {
    fn open(bed: &Testbed) -> Result<Self> {
        let outside = bed.outside()?;
        for network in ["10.244.0.0/16", "fd00:10:244::/48"] {
            outside.ip(&format!("route add unreachable {network} metric 1\n"))?;
        }
        let mut servers = Vec::new();
        for family in Family::BOTH {
            let node = SocketAddr::new(Host::A.underlay_address(family), 9);
            let (tcp, udp) = outside.enter(|| -> io::Result<_> {
                let any: SocketAddr = if node.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
                let probe = UdpSocket::bind(any)?;
                probe.connect(node)?;
                let here = SocketAddr::new(probe.local_addr()?.ip(), 0);
                Ok((TcpListener::bind(here)?, UdpSocket::bind(here)?))
            })??;
            udp.set_read_timeout(Some(WAIT))?;
            servers.push(Server { family, tcp, udp });
        }
        Ok(Self { servers })
    }
}

/// A connection of a pod, with some words each way. Says whom the server sees.
fn talk(pod: &Pod, to: SocketAddr, server: &TcpListener) -> Result<SocketAddr> {
    let mut client = pod.ns.enter(|| TcpStream::connect_timeout(&to, WAIT))?.context("failed to connect")?;
    let (mut accepted, peer) = server.accept()?;
    for stream in [&client, &accepted] {
        stream.set_read_timeout(Some(WAIT))?;
    }
    let mut heard = vec![0; 100_000];
    for said in [1, 2] {
        client.write_all(&vec![said; heard.len()])?;
        accepted.read_exact(&mut heard)?;
        ensure!(heard.iter().all(|byte| *byte == said), "the server heard something else");
        accepted.write_all(&heard)?;
        client.read_exact(&mut heard)?;
    }
    Ok(peer)
}

/// The same with datagrams.
fn exchange(pod: &Pod, to: SocketAddr, server: &UdpSocket) -> Result<SocketAddr> {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let client = pod.ns.enter(|| UdpSocket::bind(any))??;
    client.set_read_timeout(Some(WAIT))?;
    client.connect(to)?;
    let mut heard = [0; 16];
    let mut peer = None;
    for _ in 0..3 {
        client.send(b"hello")?;
        let (len, from) = server.recv_from(&mut heard).context("the server heard nothing")?;
        server.send_to(&heard[..len], from)?;
        let len = client.recv(&mut heard).context("no answer")?;
        ensure!(&heard[..len] == b"hello", "another answer");
        ensure!(peer.replace(from).is_none_or(|before| before == from), "another source");
    }
    peer.context("nobody spoke")
}
