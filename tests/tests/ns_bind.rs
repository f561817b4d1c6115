//! Node ports are left alone by the node's own sockets: nobody binds them, and the kernel does not give them away.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use netlb_integration::cgroup::Cgroup;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::exec::Output;
use netlb_integration::netns::Namespace;
use netlb_integration::servers::Protocol;
use netlb_integration::sockets::{Client, Errno};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const PORT: u16 = 30_080;
const FREE: u16 = 30_081;
/// Published for TCP at all addresses, and for UDP at the one on the underlay.
const PUBLISHED: u16 = 30_082;
const AT_UNDERLAY: u16 = 30_083;

/// A node with a pod and two services with a node port, one by family.
struct Bed {
    // Dropped in this order: what is attached to the cgroup before the cgroup, the daemon before its node.
    netlb: Netlb,
    cgroup: Cgroup,
    pod: Pod,
    bed: Testbed,
}

impl Bed {
    fn start(scope: &str) -> Result<Self> {
        let bed = Plan::new(Layout::Ptp).with_outside_client().build()?;
        let pod = bed.pod(Host::A, "backend")?;
        let cgroup = Cgroup::new("bind")?;
        bed.node_a().ns.sysctl("net/ipv4/ip_local_reserved_ports", "9000,30090-30092")?;
        let mut config = Config::new(bed.node_a(), Forwarding::Fast).node("node_port_addresses = \"all\"");
        for family in Family::BOTH {
            let frontend = SocketAddr::new(vip(family, 10), 80);
            let backend = SocketAddr::new(Host::A.pod_address(family, 2), 8080);
            config = config.service(
                Service::new(&format!("web-{family}"), format!("{frontend}/tcp"), [backend])
                    .node_port(format!("{PORT}/tcp"))
                    .node_port(format!("{PORT}/udp"))
                    .publish(format!("{PUBLISHED}:8080"))
                    .publish(format!("{}:8080/udp", SocketAddr::new(Host::A.underlay_address(family), AT_UNDERLAY))),
            );
        }
        config = config.extra(&format!("\n[socket]\nscope = \"{scope}\"\ncgroup = {:?}\n", cgroup.path()));
        let netlb = Netlb::start(bed.node_a(), &config)?;
        Ok(Self { netlb, cgroup, pod, bed })
    }

    fn node(&self) -> &Namespace {
        &self.bed.node_a().ns
    }

    fn client(&self, ns: &Namespace) -> Result<Client> {
        Client::start(ns, Some(&self.cgroup))
    }

    fn reserved(&self) -> Result<String> {
        let shown = self.node().command("cat").arg("/proc/sys/net/ipv4/ip_local_reserved_ports").run()?;
        Ok(shown.success()?.stdout.trim().to_owned())
    }
}

/// Ways to name the node.
fn places() -> Result<Vec<IpAddr>> {
    let mut places = Vec::from(Family::BOTH.map(|family| Host::A.underlay_address(family)));
    for ip in ["0.0.0.0", "::", "::ffff:0.0.0.0", "127.0.0.1", "::1", "::ffff:127.0.0.1"] {
        places.push(ip.parse()?);
    }
    Ok(places)
}

const BOTH: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

#[test]
fn a_node_port_in_use_is_not_bound() -> TestResult {
    let in_use = || Err(Errno("EADDRINUSE".to_owned()));
    for scope in ["node", "all"] {
        let bed = Bed::start(scope)?;
        let (mut node, mut pod) = (bed.client(bed.node())?, bed.client(&bed.pod.ns)?);
        for protocol in BOTH {
            for ip in places()? {
                let at = |port| SocketAddr::new(ip, port);
                let what = || format!("{scope}, {}, {ip}", protocol.name());
                assert_eq!(node.bind(protocol, at(PORT))?, in_use(), "{}", what());
                assert_eq!(node.bind(protocol, at(FREE))?, Ok(()), "{}", what());
                let published = if protocol == Protocol::Tcp { in_use() } else { Ok(()) };
                assert_eq!(node.bind(protocol, at(PUBLISHED))?, published, "{}", what());
                let is_there = protocol == Protocol::Udp && !ip.to_canonical().is_loopback();
                let at_underlay = if is_there { in_use() } else { Ok(()) };
                assert_eq!(node.bind(protocol, at(AT_UNDERLAY))?, at_underlay, "{}", what());
            }
            // An address that the port is not served at.
            assert_eq!(node.bind(protocol, SocketAddr::new("127.0.0.2".parse()?, PORT))?, Ok(()));
            for any in ["0.0.0.0", "::"] {
                assert_eq!(pod.bind(protocol, SocketAddr::new(any.parse()?, PORT))?, Ok(()), "{scope}, pod, {any}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_port_is_free_when_its_service_is_gone() -> TestResult {
    let bed = Bed::start("node")?;
    let mut node = bed.client(bed.node())?;
    let any = SocketAddr::new("0.0.0.0".parse()?, FREE);
    let backend = format!("{}:8080", Host::A.pod_address(Family::V4, 2));
    assert_eq!(node.bind(Protocol::Tcp, any)?, Ok(()));
    bed.netlb.must(["svc", "add", "-n", "late", "--node-port", &format!("{FREE}/tcp"), "-b", &backend])?;
    assert_eq!(node.bind(Protocol::Tcp, any)?, Err(Errno("EADDRINUSE".to_owned())));
    assert_eq!(node.bind(Protocol::Udp, any)?, Ok(()), "another protocol");
    assert_eq!(node.bind(Protocol::Tcp, SocketAddr::new("::1".parse()?, FREE))?, Ok(()), "the other family");
    assert_eq!(bed.reserved()?, "9000,30080-30083,30090-30092");
    bed.netlb.must(["svc", "rm", "late"])?;
    assert_eq!(node.bind(Protocol::Tcp, any)?, Ok(()));
    assert_eq!(bed.reserved()?, "9000,30080,30082-30083,30090-30092");
    Ok(())
}

#[test]
fn node_ports_are_reserved_until_cleanup() -> TestResult {
    let bed = Bed::start("off")?;
    let reserved = "9000,30080,30082-30083,30090-30092";
    assert_eq!(bed.reserved()?, reserved);
    bed.netlb.kill()?;
    assert_eq!(bed.reserved()?, reserved, "traffic goes on, and so does this");
    bed.netlb.restart(bed.bed.node_a())?;
    assert_eq!(bed.reserved()?, reserved);
    bed.netlb.kill()?;
    let said = bed.netlb.cleanup().and_then(Output::success)?.stdout;
    assert!(said.contains("ended the reservation of port 30080,30082-30083\n"), "{said}");
    assert_eq!(bed.reserved()?, "9000,30090-30092");
    Ok(())
}
