//! Direct server return: backends of other nodes see clients outside, and answer them straight.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netlb_integration::clients;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::exec::wait_until;
use netlb_integration::netns::Namespace;
use netlb_integration::raw;
use netlb_integration::run::Run;
use netlb_integration::servers;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const ACCEPT: &str = "\n[dsr]\naccept_from = [\"192.168.50.11/32\", \"fd00:192:168:50::/64\"]\n";
const WAIT: Duration = Duration::from_secs(5);

/// Netlb on both nodes, with the same services.
fn both(bed: &Testbed, forwarding: Forwarding, xdp: &'static str, services: &[Service]) -> Result<[Netlb; 2]> {
    let start = |host, xdp| {
        let node = bed.node(host)?;
        let config = Config::new(node, forwarding).xdp(xdp).extra(ACCEPT);
        Netlb::start(node, &services.iter().cloned().fold(config, Config::service))
    };
    Ok([start(Host::A, xdp)?, start(Host::B, "off")?])
}

fn front(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(vip(family, 10), port)
}

fn name(what: &str, family: Family) -> String {
    format!("{what}-{family}").to_lowercase()
}

/// What a node sent to the clients of a service.
fn replies(netlb: &Netlb, service: &str) -> Result<u64> {
    let items = netlb.items(["svc", "ls"])?;
    let item = items.iter().find(|item| item["name"] == service).with_context(|| format!("no {service}"))?;
    item["packetsOut"].as_u64().with_context(|| item.to_string())
}

#[test]
fn a_backend_of_another_node_sees_the_client_and_answers_it_straight() -> TestResult {
    for (forwarding, rp_filter, xdp) in [
        (Forwarding::Fast, 1, "off"),
        (Forwarding::Fast, 0, "generic"),
        (Forwarding::Stack, 0, "off"),
        (Forwarding::Stack, 1, "off"),
    ] {
        let bed = Plan::new(Layout::Routed).with_outside_client().rp_filter(rp_filter).build()?;
        let (near, far) = (bed.pod(Host::A, "near")?, bed.pod(Host::B, "far")?);
        let webs = [servers::nginx(&near, 8080)?, servers::nginx(&far, 8080)?];
        let outside = bed.outside()?;
        if xdp != "off" {
            outside.command("ethtool").args(["-K", "eth0", "tx-checksum-ip-generic", "off"]).run()?.success()?;
        }
        let echo = |family| SocketAddr::new(far.ip(family), 7);
        let services = Vec::from_iter(Family::BOTH.into_iter().flat_map(|family| {
            let web = format!("{}/tcp", front(family, 80));
            let udp = format!("{}/udp", front(family, 7));
            [
                Service::new(&name("web", family), web, webs.each_ref().map(|web| web.addr(family))).mode("dsr"),
                Service::new(&name("echo", family), udp, [echo(family)]).mode("dsr"),
            ]
        }));
        let netlbs = both(&bed, forwarding, xdp, &services)?;
        for family in Family::BOTH {
            let case = format!("{forwarding}, rp_filter {rp_filter}, xdp {xdp}, {family}");
            let client = outside.enter(|| local_address(front(family, 80)))??;
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..30 {
                let answer = clients::curl(outside, front(family, 80)).with_context(|| case.clone())?;
                assert_eq!(answer.client.ip(), client, "{case}: {answer:?}");
                seen.insert(answer.backend);
            }
            assert_eq!(seen.len(), 2, "{case}: both backends serve");

            let server = far.ns.enter(|| UdpSocket::bind(echo(family)))??;
            server.set_read_timeout(Some(WAIT))?;
            let socket = outside.enter(|| UdpSocket::bind(SocketAddr::new(client, 0)))??;
            socket.set_read_timeout(Some(WAIT))?;
            socket.connect(front(family, 7))?;
            for _ in 0..5 {
                socket.send(b"who")?;
                let mut bytes = [0; 16];
                let (len, from) = server.recv_from(&mut bytes).with_context(|| case.clone())?;
                assert_eq!(from, socket.local_addr()?, "{case}");
                server.send_to(&bytes[..len], from)?;
                assert_eq!(socket.recv(&mut bytes).with_context(|| case.clone())?, 3, "{case}");
            }
            let echo = name("echo", family);
            assert_eq!(replies(&netlbs[0], &echo)?, 0, "{case}: no answer passes by the balancing node");
            assert_eq!(replies(&netlbs[1], &echo)?, 5, "{case}");
        }
        let [wrapped, unwrapped] = [netlbs[0].counter("dsr_wrapped")?, netlbs[1].counter("dsr_unwrapped")?];
        assert!(unwrapped >= wrapped, "{forwarding}, {xdp}: {unwrapped} of {wrapped}");
        assert!(wrapped > 100, "{forwarding}, {xdp}: {wrapped}");
        assert_eq!(netlbs[0].counter("sent_by_xdp")? > 0, xdp != "off");
    }
    Ok(())
}

const UPLOAD: usize = 20 << 20;

fn sink(pod: &Pod, family: Family) -> SocketAddr {
    SocketAddr::new(pod.ip(family), 9000)
}

fn sinks(pod: &Pod) -> Vec<Service> {
    let service = |family| {
        let vip = format!("{}/tcp", front(family, 80));
        Service::new(&name("sink", family), vip, [sink(pod, family)]).mode("dsr")
    };
    Family::BOTH.map(service).to_vec()
}

/// Uploads from outside to the service of a pod, at once.
fn upload(bed: &Testbed, to: &Pod, family: Family) -> Result<()> {
    let listener = to.ns.enter(|| TcpListener::bind(sink(to, family)))??;
    let begin = Instant::now();
    let mut client = bed.outside()?.enter(|| TcpStream::connect_timeout(&front(family, 80), WAIT))??;
    client.set_write_timeout(Some(WAIT))?;
    client.set_read_timeout(Some(WAIT))?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(WAIT))?;
    let received = std::thread::scope(|scope| -> Result<usize> {
        let received = scope.spawn(move || -> std::io::Result<usize> {
            let (mut total, mut buffer) = (0, vec![0; 1 << 16]);
            loop {
                match server.read(&mut buffer)? {
                    0 => return Ok(total),
                    len => total += len,
                }
            }
        });
        client.write_all(&vec![b'u'; UPLOAD]).context("the upload stalled")?;
        client.shutdown(std::net::Shutdown::Write)?;
        Ok(received.join().expect("no panic")?)
    })?;
    assert_eq!(received, UPLOAD, "{family}");
    assert!(begin.elapsed() < WAIT, "{family}: {:?}", begin.elapsed());
    Ok(())
}

/// What a namespace has learned of how long packets may be.
fn learned(ns: &Namespace, to: &str) -> Result<String> {
    Ok(ns.command("ip").args(["route", "get", to]).run()?.success()?.stdout)
}

/// Large packets as the kernels hand them on, several segments in one, and segments as long as the way takes.
#[test]
fn a_large_upload_is_told_how_much_fits_and_arrives() -> TestResult {
    let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
    let far = bed.pod(Host::B, "far")?;
    let netlbs = both(&bed, Forwarding::Fast, "off", &sinks(&far))?;
    for family in Family::BOTH {
        upload(&bed, &far, family).with_context(|| format!("{family}: {}", netlbs[0].log()))?;
    }
    assert!(netlbs[0].counter("too_big")? >= 2);
    Ok(())
}

/// A router between the nodes, with a link that only it knows to be narrow: it tells the balancing node, which has sent the outer packet.
fn narrow(bed: &Testbed, mtu: u32) -> Result<Namespace> {
    let ns = Namespace::new(Run::current()?.next_number(), "narrow")?;
    ns.sysctl("net/ipv4/ip_forward", "1")?;
    ns.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    ns.sysctl("net/ipv4/conf/all/send_redirects", "0")?;
    ns.sysctl("net/ipv4/conf/default/send_redirects", "0")?;
    let [pods4, pods6] = Family::BOTH.map(|family| Host::B.pod_address(family, 0));
    let [far4, far6] = Family::BOTH.map(|family| Host::B.underlay_address(family));
    let switch = bed.switch()?;
    ns.ip(&format!(
        "link add eth0 mtu 1500 type veth peer name to-narrow mtu 1500\n\
         link set to-narrow netns {}\n\
         link set eth0 up\n\
         addr add 192.168.50.200/24 dev eth0\n\
         addr add fd00:192:168:50::200/64 dev eth0 nodad\n\
         route add {pods4}/24 via {far4} mtu lock {mtu}\n\
         route add {pods6}/64 via {far6} mtu lock {mtu}\n",
        switch.name()
    ))?;
    switch.ip("link set to-narrow master br0\nlink set to-narrow up\n")?;
    let near = &bed.node(Host::A)?.ns;
    near.ip(&format!(
        "route replace {pods4}/24 via 192.168.50.200\nroute replace {pods6}/64 via fd00:192:168:50::200\n"
    ))?;
    for router in ["192.168.50.200", "fd00:192:168:50::200"] {
        let router = router.parse()?;
        wait_until("the router to be there", 2 * WAIT, || Ok(near.enter(|| raw::ping(router, WAIT / 5))?.ok()))?;
    }
    Ok(ns)
}

#[test]
fn a_large_upload_over_a_narrow_link_between_the_nodes_arrives() -> TestResult {
    const MTU: u32 = 1400;
    for forwarding in Forwarding::BOTH {
        let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
        let far = bed.pod(Host::B, "far")?;
        let _router = narrow(&bed, MTU)?;
        let netlbs = both(&bed, forwarding, "off", &sinks(&far))?;
        for family in Family::BOTH {
            let case = format!("{forwarding}, {family}");
            upload(&bed, &far, family).with_context(|| case.clone())?;
            let inner = MTU - if family == Family::V4 { 20 } else { 40 };
            let route = learned(bed.outside()?, &vip(family, 10).to_string())?;
            assert!(route.contains(&format!("mtu {inner}")), "{case}: what the client learned: {route}");
        }
        assert!(netlbs[0].counter("icmp_translated")? >= 2, "{forwarding}");
        assert_eq!(netlbs[0].counter("dsr_error_lost")?, 0, "{forwarding}");
    }
    Ok(())
}

/// An overlay takes 50 bytes of every packet, and what is wrapped 20 or 40 more.
#[test]
fn large_transfers_through_vxlan_arrive_at_once() -> TestResult {
    let accept = "\n[dsr]\naccept_from = [\"10.244.1.0/32\", \"fd00:10:244:1::/128\"]\n";
    let bed = Plan::new(Layout::Vxlan).with_outside_client().build()?;
    let far = bed.pod(Host::B, "far")?;
    let nginx = servers::nginx(&far, 8080)?;
    let original = servers::nginx_file(&nginx, "data", 20)?;
    let copy = original.with_extension("copy");
    let web = |family| {
        let vip = format!("{}/tcp", front(family, 81));
        Service::new(&name("web", family), vip, [nginx.addr(family)]).mode("dsr")
    };
    for forwarding in Forwarding::BOTH {
        let start = |host| {
            let node = bed.node(host)?;
            let services = sinks(&far).into_iter().chain(Family::BOTH.map(web));
            Netlb::start(node, &services.fold(Config::new(node, forwarding).extra(accept), Config::service))
        };
        let [a, b] = [start(Host::A)?, start(Host::B)?];
        for family in Family::BOTH {
            let case = format!("{forwarding}, {family}");
            upload(&bed, &far, family).with_context(|| case.clone())?;
            let begin = Instant::now();
            clients::download(bed.outside()?, front(family, 81), "data", &copy).with_context(|| case.clone())?;
            assert!(begin.elapsed() < WAIT, "{case}: {:?}", begin.elapsed());
            assert_eq!(clients::sha256(&copy)?, clients::sha256(&original)?, "{case}");
        }
        assert!(a.counter("dsr_wrapped")? > 100 && b.counter("dsr_unwrapped")? > 100, "{forwarding}");
    }
    Ok(())
}

/// A client beyond a router whose last link takes less than all others: the router tells the service's address, that is, the balancing
/// node.
struct Beyond {
    ns: Namespace,
    mtu: u32,
}

impl Beyond {
    fn new(bed: &Testbed) -> Result<Self> {
        let mtu = 1350;
        let ns = Namespace::new(Run::current()?.next_number(), "beyond")?;
        let router = bed.outside()?;
        router.sysctl("net/ipv4/ip_forward", "1")?;
        router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        // Only the router knows: the client's own end takes 1500 bytes, and it says so when it connects.
        ns.ip(&format!(
            "link add eth0 type veth peer name beyond mtu 1500\n\
             link set beyond netns {}\n\
             link set eth0 up\n\
             addr add 172.31.0.2/24 dev eth0\n\
             addr add fd00:172::2/64 dev eth0 nodad\n",
            router.name()
        ))?;
        router.ip(&format!(
            "link set beyond up mtu {mtu}\n\
             addr add 172.31.0.1/24 dev beyond\n\
             addr add fd00:172::1/64 dev beyond nodad\n"
        ))?;
        ns.ip("route add default via 172.31.0.1\nroute add ::/0 via fd00:172::1\n")?;
        for host in [Host::A, Host::B] {
            bed.node(host)?.ns.ip("route add 172.31.0.0/24 via 192.168.50.100\n\
                                   route add fd00:172::/64 via fd00:192:168:50::64\n")?;
        }
        Ok(Self { ns, mtu })
    }
}

#[test]
fn a_large_download_through_a_narrow_link_arrives_at_once() -> TestResult {
    for forwarding in Forwarding::BOTH {
        let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
        let far = bed.pod(Host::B, "far")?;
        let nginx = servers::nginx(&far, 8080)?;
        let original = servers::nginx_file(&nginx, "data", 20)?;
        let copy = original.with_extension("copy");
        let services = Family::BOTH.map(|family| {
            let vip = format!("{}/tcp", front(family, 80));
            Service::new(&name("web", family), vip, [nginx.addr(family)]).mode("dsr")
        });
        let netlbs = both(&bed, forwarding, "off", &services)?;
        let client = Beyond::new(&bed)?;
        for family in Family::BOTH {
            let begin = Instant::now();
            let case = format!("{forwarding}, {family}");
            clients::download(&client.ns, front(family, 80), "data", &copy).with_context(|| case.clone())?;
            assert!(begin.elapsed() < WAIT, "{case}: {:?}", begin.elapsed());
            assert_eq!(clients::sha256(&copy)?, clients::sha256(&original)?, "{case}");
            let to = match family {
                Family::V4 => "172.31.0.2",
                Family::V6 => "fd00:172::2",
            };
            let route = learned(&far.ns, to)?;
            assert!(route.contains(&format!("mtu {}", client.mtu)), "{case}: what the backend learned: {route}");
        }
        for netlb in &netlbs {
            assert!(netlb.counter("icmp_translated")? >= 2, "{forwarding}");
        }
    }
    Ok(())
}

#[test]
fn a_change_of_the_backends_leaves_connections_where_they_are() -> TestResult {
    let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
    let (one, two) = (bed.pod(Host::B, "one")?, bed.pod(Host::B, "two")?);
    let backend = |pod: &Pod, family| SocketAddr::new(pod.ip(family), 9000);
    let netlbs = both(&bed, Forwarding::Fast, "off", &[])?;
    for family in Family::BOTH {
        let service = name("talk", family);
        let vip = format!("{}/tcp", front(family, 80));
        for netlb in &netlbs {
            let backend = backend(&one, family).to_string();
            netlb.must(["svc", "add", &vip, "--name", &service, "--mode", "dsr", "--backend", &backend])?;
        }
        let listener = one.ns.enter(|| TcpListener::bind(backend(&one, family)))??;
        let mut client = bed.outside()?.enter(|| TcpStream::connect_timeout(&front(family, 80), WAIT))??;
        let (mut server, from) = listener.accept()?;
        assert_eq!(from, client.local_addr()?, "{family}");
        client.set_read_timeout(Some(WAIT))?;
        server.set_read_timeout(Some(WAIT))?;
        let mut talk = |what: &str| -> Result<()> {
            let mut bytes = [0; 4];
            client.write_all(b"ping")?;
            server.read_exact(&mut bytes).with_context(|| format!("{family}, {what}"))?;
            server.write_all(b"pong")?;
            client.read_exact(&mut bytes).with_context(|| format!("{family}, {what}"))?;
            Ok(())
        };
        talk("before")?;
        for netlb in &netlbs {
            netlb.add_backend(&service, backend(&two, family))?;
        }
        talk("with one more")?;
        for netlb in &netlbs {
            netlb.remove_backend(&service, backend(&one, family))?;
        }
        talk("without its own")?;
        let other = two.ns.enter(|| TcpListener::bind(backend(&two, family)))??;
        let _new = bed.outside()?.enter(|| TcpStream::connect_timeout(&front(family, 80), WAIT))??;
        other.accept()?;
        talk("and beside a new one")?;
    }
    Ok(())
}

/// A node that accepts from nobody hands nothing to its pods: what is wrapped passes it as it came.
#[test]
fn a_node_that_does_not_accept_unwraps_nothing() -> TestResult {
    let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
    let far = bed.pod(Host::B, "far")?;
    let service = |family| {
        let backend = SocketAddr::new(far.ip(family), 7);
        Service::new(&name("echo", family), format!("{}/udp", front(family, 7)), [backend]).mode("dsr")
    };
    let config = |host| -> Result<Config> {
        let config = Config::new(bed.node(host)?, Forwarding::Fast);
        Ok(Family::BOTH.into_iter().map(service).fold(config, Config::service))
    };
    let a = Netlb::start(bed.node(Host::A)?, &config(Host::A)?)?;
    let b = Netlb::start(bed.node(Host::B)?, &config(Host::B)?)?;
    for family in Family::BOTH {
        let server = far.ns.enter(|| UdpSocket::bind(SocketAddr::new(far.ip(family), 7)))??;
        server.set_read_timeout(Some(Duration::from_millis(300)))?;
        let client = bed.outside()?.enter(|| local_address(front(family, 7)))??;
        let socket = bed.outside()?.enter(|| UdpSocket::bind(SocketAddr::new(client, 0)))??;
        socket.send_to(b"who", front(family, 7))?;
        let error = server.recv_from(&mut [0; 16]).expect_err("nothing comes");
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    }
    assert_eq!((a.counter("dsr_wrapped")?, b.counter("dsr_unwrapped")?), (2, 0));
    Ok(())
}

/// The address that the calling thread's namespace sends from.
fn local_address(to: SocketAddr) -> std::io::Result<IpAddr> {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().expect("an address");
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}
