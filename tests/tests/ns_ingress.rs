//! An ingress behind an address of a load balancer and behind node ports: what its access log says of its clients.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use netlb_integration::clients;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::exec::wait_until;
use netlb_integration::netns::Namespace;
use netlb_integration::servers::{self, Server};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const HOSTS: [(Host, &str); 2] = [(Host::A, "a"), (Host::B, "b")];
const NODE_PORT: u16 = 30080;
const REQUESTS: usize = 20;
const SOON: Duration = Duration::from_secs(10);

/// Two nodes with netlb, with an ingress on each, and one web server, which the ingresses reach by its service.
struct Cluster {
    // Dropped in this order: the daemons before their nodes, servers before their pods.
    netlb: Vec<Netlb>,
    ingresses: Vec<Server>,
    _web: Server,
    _pods: Vec<Pod>,
    bed: Testbed,
}

impl Cluster {
    fn start(family: Family, forwarding: Forwarding, policy: &str, snat: &str) -> Result<Self> {
        let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
        let pod = bed.pod(Host::B, "web")?;
        let web = servers::nginx(&pod, 8080)?;
        let mut pods = vec![pod];
        let mut ingresses = Vec::new();
        for (host, name) in HOSTS {
            let pod = bed.pod(host, &format!("ingress-{name}"))?;
            ingresses.push(servers::ingress(&pod, 80, web_at(family))?);
            pods.push(pod);
        }
        let mut service = Service::without_frontend("ingress", [])
            .lb_ip(format!("{}/tcp", at(family)))
            .node_port(format!("{NODE_PORT}/tcp"))
            .external_traffic_policy(policy)
            .snat(snat);
        for (ingress, (_, name)) in ingresses.iter().zip(HOSTS) {
            service = service.backend_on(ingress.addr(family), name);
        }
        let netlb = HOSTS.map(|(host, name)| {
            let node = bed.node(host)?;
            let config = Config::new(node, forwarding).node(&format!("name = {name:?}"));
            let web = Service::new("web", format!("{}/tcp", web_at(family)), [web.addr(family)]);
            Netlb::start(node, &config.service(service.clone()).service(web))
        });
        Ok(Self { netlb: netlb.into_iter().collect::<Result<_>>()?, ingresses, _web: web, _pods: pods, bed })
    }

    /// Sends requests from a namespace, and gives the clients that each ingress noted.
    fn ask(&self, from: &Namespace, to: SocketAddr) -> Result<[Vec<IpAddr>; 2]> {
        let logs = || -> Result<Vec<Vec<IpAddr>>> { self.ingresses.iter().map(servers::clients_of).collect() };
        let before = logs()?;
        for number in 0..REQUESTS {
            let answer = clients::curl(from, to);
            let answer = answer.with_context(|| format!("request {number}; {}", self.netlb[0].log()))?;
            assert_eq!(answer.name, "web", "what the ingress hands on to");
        }
        // nginx notes a request when it has been answered.
        let noted = wait_until("the ingresses to note every request", SOON, || {
            let new: Vec<_> = logs()?.iter().zip(&before).map(|(now, before)| now[before.len()..].to_vec()).collect();
            Ok((new.iter().map(Vec::len).sum::<usize>() == REQUESTS).then_some(new))
        })?;
        noted.try_into().ok().context("two ingresses")
    }
}

/// The address of the load balancer, which brings its traffic to node A.
fn at(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 20), 80)
}

fn web_at(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, 10), 80)
}

fn node_port(family: Family, host: Host) -> SocketAddr {
    SocketAddr::new(host.underlay_address(family), NODE_PORT)
}

/// The address that a namespace has towards another one.
fn address_of(ns: &Namespace, to: SocketAddr) -> Result<IpAddr> {
    let address = ns.enter(|| -> io::Result<_> {
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        Ok(socket.local_addr()?.ip())
    })??;
    Ok(address)
}

#[test]
fn the_access_log_has_the_clients_own_address_with_the_local_policy() -> TestResult {
    for (family, forwarding) in Family::BOTH.into_iter().flat_map(|family| Forwarding::BOTH.map(|way| (family, way))) {
        let cluster = Cluster::start(family, forwarding, "local", "auto")?;
        let outside = cluster.bed.outside()?;
        // The ways in, and the ingress of the node that they lead to.
        let ways = [(at(family), 0), (node_port(family, Host::A), 0), (node_port(family, Host::B), 1)];
        for (to, here) in ways {
            let what = format!("{family}, {forwarding}, {to}");
            let client = address_of(outside, to)?;
            let noted = cluster.ask(outside, to).with_context(|| what.clone())?;
            assert_eq!(noted[here], [client; REQUESTS], "{what}: the node's own ingress saw the client");
            assert!(noted[1 - here].is_empty(), "{what}: the other node's is left alone: {noted:?}");
        }
        // A pod of the node is no stranger: it has both, and both see it.
        let pod = cluster.bed.pod(Host::A, "client")?;
        let noted = cluster.ask(&pod.ns, node_port(family, Host::A)).context("from a pod")?;
        let seen: BTreeSet<_> = noted.iter().flatten().copied().collect();
        assert_eq!(Vec::from_iter(seen), [pod.ip(family)], "{family}, {forwarding}: from a pod");
        assert!(noted.iter().all(|noted| !noted.is_empty()), "{family}, {forwarding}: {noted:?}");
    }
    Ok(())
}

/// What the policy is for: without it, and with the sources that kube-proxy gives, the log has the node.
#[test]
fn the_access_log_has_the_node_with_the_cluster_policy() -> TestResult {
    for family in Family::BOTH {
        let cluster = Cluster::start(family, Forwarding::Fast, "cluster", "always")?;
        for to in [at(family), node_port(family, Host::A)] {
            let noted = cluster.ask(cluster.bed.outside()?, to).with_context(|| format!("{family}, {to}"))?;
            let nodes = [Host::A.underlay_address(family), Host::A.pod_address(family, 1)];
            let strangers: Vec<_> = noted.iter().flatten().filter(|ip| !nodes.contains(ip)).collect();
            assert!(strangers.is_empty(), "{family}, {to}: {strangers:?}");
            assert!(noted.iter().all(|noted| !noted.is_empty()), "{family}, {to}: both nodes' are asked: {noted:?}");
        }
    }
    Ok(())
}
