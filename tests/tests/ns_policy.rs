//! Which backends answer whom, and whom they see: every way to a service, from every place, by one table.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use netlb_integration::cgroup::Cgroup;
use netlb_integration::daemon::{Backend, Config, Forwarding, Netlb, Service};
use netlb_integration::servers::{self, Answer, Protocol, Server};
use netlb_integration::sockets::{Client, Errno};
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

/// A way to a service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    ClusterIp,
    ExternalIp,
    LoadBalancerIp,
    NodePort,
}

const EXTERNAL: [Way; 3] = [Way::ExternalIp, Way::LoadBalancerIp, Way::NodePort];

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Policy {
    Cluster,
    Local,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "cluster",
            Self::Local => "local",
        })
    }
}

/// Where a client is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum From {
    /// A pod of the node.
    Pod,
    /// A process of the node.
    Node,
    /// A pod of the other node.
    OtherPod,
    /// A host that is not of the cluster.
    Outside,
}

impl From {
    const ALL: [Self; 4] = [Self::Pod, Self::Node, Self::OtherPod, Self::Outside];
}

/// The backends that a client gets: those of both nodes, or of the one its packets come to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Set {
    All,
    Local,
}

/// Whom a backend sees.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Seen {
    Client,
    Node,
}

/// What a kind of way and its policy mean for clients here, processes of the node and clients elsewhere, as kube-proxy has it.
struct Row {
    ways: &'static [Way],
    policy: Policy,
    pod: (Set, Seen),
    node: (Set, Seen),
    elsewhere: (Set, Seen),
}

const TABLE: [Row; 4] = [
    Row {
        ways: &[Way::ClusterIp],
        policy: Policy::Cluster,
        pod: (Set::All, Seen::Client),
        node: (Set::All, Seen::Node),
        elsewhere: (Set::All, Seen::Node),
    },
    Row {
        ways: &[Way::ClusterIp],
        policy: Policy::Local,
        pod: (Set::Local, Seen::Client),
        node: (Set::Local, Seen::Node),
        elsewhere: (Set::Local, Seen::Node),
    },
    Row {
        ways: &EXTERNAL,
        policy: Policy::Cluster,
        pod: (Set::All, Seen::Node),
        node: (Set::All, Seen::Node),
        elsewhere: (Set::All, Seen::Node),
    },
    Row {
        ways: &EXTERNAL,
        policy: Policy::Local,
        pod: (Set::All, Seen::Client),
        node: (Set::All, Seen::Node),
        elsewhere: (Set::Local, Seen::Client),
    },
];

impl Row {
    fn of(&self, from: From) -> (Set, Seen) {
        match from {
            From::Pod => self.pod,
            From::Node => self.node,
            From::OtherPod | From::Outside => self.elsewhere,
        }
    }
}

/// With `snat = "auto"` clients keep their address wherever replies come back through the node: at its own pods, and from them.
fn keeps_its_address(from: From, backend: &str) -> bool {
    match from {
        From::Pod => true,
        From::Node => false,
        From::OtherPod | From::Outside => backend == LOCAL,
    }
}

const LOCAL: &str = "local";
const REMOTE: &str = "remote";
/// Enough for both backends to answer, but for once in a million times.
const MOST: usize = 40;
const ECHO: u16 = 7001;

/// Two nodes with a backend each, netlb on the first, and clients everywhere.
struct Bed {
    // Dropped in this order: the daemon before the cgroup and its node, servers and clients before their pods.
    netlb: Option<Netlb>,
    clients: Vec<(From, Client)>,
    servers: Vec<(&'static str, Server)>,
    pods: Vec<Pod>,
    cgroup: Cgroup,
    bed: Testbed,
}

impl Bed {
    fn start(protocol: Protocol) -> Result<Self> {
        let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
        let other = &bed.node(Host::B)?.ns;
        for (family, net) in [(Family::V4, "10.96.0.0/16"), (Family::V6, "fd00:10:96::/112")] {
            other.ip(&format!("route add {net} via {}\n", Host::A.underlay_address(family)))?;
        }
        let cgroup = Cgroup::new("policy")?;
        let local = bed.pod(Host::A, LOCAL)?;
        let remote = bed.pod(Host::B, REMOTE)?;
        let mut servers = Vec::new();
        for (name, pod) in [(LOCAL, &local), (REMOTE, &remote)] {
            servers.push((name, servers::echo(pod, protocol, ECHO)?));
        }
        let (here, there) = (bed.pod(Host::A, "client")?, bed.pod(Host::B, "client-b")?);
        let clients = vec![
            (From::Pod, Client::start(&here.ns, None)?),
            (From::Node, Client::start(&bed.node_a().ns, Some(&cgroup))?),
            (From::OtherPod, Client::start(&there.ns, None)?),
            (From::Outside, Client::start(bed.outside()?, None)?),
        ];
        Ok(Self { netlb: None, clients, servers, pods: vec![here, there, local, remote], cgroup, bed })
    }

    fn config(&self, forwarding: Forwarding) -> Config {
        let config = Config::new(self.bed.node_a(), forwarding).node("name = \"a\"");
        config.extra(&format!("\n[socket]\nscope = \"node\"\ncgroup = {:?}\n", self.cgroup.path()))
    }

    /// Starts netlb, in the place of the one before.
    fn serve(&mut self, config: &Config) -> Result<()> {
        self.netlb = None;
        self.netlb = Some(Netlb::start(self.bed.node_a(), config)?);
        Ok(())
    }

    /// The backends of a service with this name on the first node, and on the second.
    fn backends(&self, family: Family, names: &[&str]) -> Vec<Backend> {
        let wanted = self.servers.iter().filter(|(name, _)| names.contains(name));
        let node = |name: &str| if name == LOCAL { "a" } else { "b" };
        wanted.map(|(name, server)| Backend::new(server.addr(family)).node(node(name))).collect()
    }

    /// One question on a connection of its own.
    fn ask(&mut self, from: From, protocol: Protocol, to: SocketAddr) -> Result<Result<Answer, Errno>> {
        let (_, client) = self.clients.iter_mut().find(|(place, _)| *place == from).context("no such client")?;
        client.connect_and_ask(protocol, to)
    }

    /// Asks until all these backends have answered, and says who did and whom they saw.
    fn ask_all(&mut self, from: From, protocol: Protocol, to: SocketAddr, backends: &[&str]) -> Result<Vec<Answer>> {
        let mut answers: Vec<Answer> = Vec::new();
        let has = |answers: &[Answer], name: &str| answers.iter().any(|answer| answer.name == name);
        while answers.len() < 6 || (answers.len() < MOST && !backends.iter().all(|name| has(&answers, name))) {
            let answer = self.ask(from, protocol, to)?;
            answers.push(answer.with_context(|| format!("after {} answers; {}", answers.len(), self.counted()))?);
        }
        Ok(answers)
    }

    /// Ends all flows of datagrams; connections have ended.
    fn forget_flows(&self, protocol: Protocol) -> Result<()> {
        if let (Some(netlb), Protocol::Udp) = (&self.netlb, protocol) {
            netlb.must(["flows", "flush"])?;
        }
        Ok(())
    }

    /// What netlb counted, to tell where a packet went.
    fn counted(&self) -> String {
        let counted = self.netlb.as_ref().and_then(|netlb| netlb.must(["status", "-o", "json"]).ok());
        counted.unwrap_or_default()
    }

    /// Whether an address is the client's own.
    fn is_client(&self, from: From, family: Family, answer: &Answer) -> Result<bool> {
        let own = match from {
            From::Pod => self.pods[0].ip(family),
            From::OtherPod => self.pods[1].ip(family),
            From::Outside => outside_address(family),
            From::Node => return Ok(false),
        };
        Ok(answer.client.ip() == own)
    }

    /// Whether it is one of the node's.
    fn is_node(&self, family: Family, answer: &Answer) -> bool {
        let gateway = Host::A.pod_address(family, 1);
        [gateway, Host::A.underlay_address(family)].contains(&answer.client.ip())
    }
}

fn outside_address(family: Family) -> std::net::IpAddr {
    // Beside the nodes on their underlay.
    match family {
        Family::V4 => "192.168.50.100".parse().expect("an address"),
        Family::V6 => "fd00:192:168:50::64".parse().expect("an address"),
    }
}

/// The addresses and the node port of a family's service with a policy.
fn address(way: Way, policy: Policy, family: Family) -> SocketAddr {
    let number = match policy {
        Policy::Cluster => 1,
        Policy::Local => 2,
    };
    match way {
        Way::ClusterIp => SocketAddr::new(vip(family, 10 + number), 80),
        Way::ExternalIp => SocketAddr::new(vip(family, 20 + number), 80),
        Way::LoadBalancerIp => SocketAddr::new(vip(family, 30 + number), 80),
        Way::NodePort => SocketAddr::new(Host::A.underlay_address(family), 30000 + u16::from(number)),
    }
}

fn service(bed: &Bed, policy: Policy, protocol: Protocol, family: Family, snat: &str, backends: &[&str]) -> Service {
    let at = |way| address(way, policy, family);
    let frontend = format!("{}/{}", at(Way::ClusterIp), protocol.name());
    let service = Service::without_frontend(&format!("{policy}-{family}"), []).frontend(frontend);
    let service = service
        .external_ip(at(Way::ExternalIp).ip())
        .lb_ip(at(Way::LoadBalancerIp).ip())
        .node_port(at(Way::NodePort).port())
        .internal_traffic_policy(&policy.to_string())
        .external_traffic_policy(&policy.to_string())
        .snat(snat);
    bed.backends(family, backends).into_iter().fold(service, Service::backend)
}

/// Each line is a test.
macro_rules! every_row_holds {
    ($($name:ident: $protocol:ident, $forwarding:ident;)+) => {
        $(#[test]
        fn $name() -> TestResult {
            every_row_of_the_table_holds(Protocol::$protocol, Forwarding::$forwarding)
        })+
    };
}

every_row_holds! {
    policies_hold_for_tcp_fast: Tcp, Fast;
    policies_hold_for_tcp_by_the_stack: Tcp, Stack;
    policies_hold_for_udp_fast: Udp, Fast;
    policies_hold_for_udp_by_the_stack: Udp, Stack;
}

fn every_row_of_the_table_holds(protocol: Protocol, forwarding: Forwarding) -> TestResult {
    let mut bed = Bed::start(protocol)?;
    for snat in ["always", "auto"] {
        let mut config = bed.config(forwarding);
        for family in Family::BOTH {
            for policy in [Policy::Cluster, Policy::Local] {
                config = config.service(service(&bed, policy, protocol, family, snat, &[LOCAL, REMOTE]));
            }
        }
        bed.serve(&config)?;
        let cells = TABLE.iter().flat_map(|row| row.ways.iter().map(move |way| (row, *way)));
        for (row, way, from) in cells.flat_map(|(row, way)| From::ALL.map(|from| (row, way, from))) {
            for family in Family::BOTH {
                let case = format!("{way:?}, {}, from {from:?}, {family}, snat {snat}", row.policy);
                let (set, seen) = row.of(from);
                let backends: &[&str] = if set == Set::All { &[LOCAL, REMOTE] } else { &[LOCAL] };
                let to = address(way, row.policy, family);
                // A client's port that comes again by another way to the only backend would get the node's address.
                bed.forget_flows(protocol)?;
                let answers = bed.ask_all(from, protocol, to, backends).context(case.clone())?;
                let who: BTreeSet<_> = answers.iter().map(|answer| &*answer.name).collect();
                assert_eq!(Vec::from_iter(who), backends, "{case}: who answers");
                for answer in &answers {
                    let keeps = seen == Seen::Client || (snat == "auto" && keeps_its_address(from, &answer.name));
                    let is_as_it_should = match keeps {
                        true => bed.is_client(from, family, answer)?,
                        false => bed.is_node(family, answer),
                    };
                    assert!(is_as_it_should, "{case}: {} sees {}", answer.name, answer.client.ip());
                }
            }
        }
    }
    Ok(())
}

/// With backends on the other node alone: those whom a policy gives the node's own get nothing, not even an answer.
#[test]
fn clients_of_an_empty_local_set_are_dropped_and_without_any_backend_rejected() -> TestResult {
    let mut bed = Bed::start(Protocol::Tcp)?;
    let mut config = bed.config(Forwarding::Fast);
    for family in Family::BOTH {
        config = config.service(service(&bed, Policy::Local, Protocol::Tcp, family, "auto", &[REMOTE]));
        config = config.service(service(&bed, Policy::Cluster, Protocol::Tcp, family, "auto", &[]));
    }
    bed.serve(&config)?;
    let timed_out = |outcome: &Result<Answer, Errno>| matches!(outcome, Err(Errno(error)) if error == "TimedOut");
    for family in Family::BOTH {
        for (way, from) in
            [(Way::ClusterIp, From::Pod), (Way::ClusterIp, From::Outside), (Way::NodePort, From::Outside)]
        {
            let outcome = bed.ask(from, Protocol::Tcp, address(way, Policy::Local, family))?;
            assert!(timed_out(&outcome), "{way:?}, from {from:?}, {family}: {outcome:?}");
        }
        for way in EXTERNAL {
            for from in [From::Pod, From::Node] {
                let outcome = bed.ask(from, Protocol::Tcp, address(way, Policy::Local, family))?;
                assert_eq!(
                    outcome.map(|answer| answer.name),
                    Ok(REMOTE.to_owned()),
                    "{way:?}, from {from:?}, {family}"
                );
            }
        }
        for (way, from) in [Way::ClusterIp, Way::NodePort].into_iter().flat_map(|way| From::ALL.map(|from| (way, from)))
        {
            let outcome = bed.ask(from, Protocol::Tcp, address(way, Policy::Cluster, family))?;
            assert_eq!(outcome, Err(Errno("ECONNREFUSED".to_owned())), "{way:?}, from {from:?}, {family}");
        }
    }
    Ok(())
}

#[test]
fn a_load_balancer_address_is_for_its_source_ranges() -> TestResult {
    let mut bed = Bed::start(Protocol::Tcp)?;
    let mut config = bed.config(Forwarding::Fast);
    for family in Family::BOTH {
        let service = service(&bed, Policy::Cluster, Protocol::Tcp, family, "auto", &[LOCAL, REMOTE]);
        // The outside client, and nobody else.
        config = config.service(service.source_range(outside_address(family)));
    }
    bed.serve(&config)?;
    for family in Family::BOTH {
        for from in From::ALL {
            let outcome = bed.ask(from, Protocol::Tcp, address(Way::LoadBalancerIp, Policy::Cluster, family))?;
            assert_eq!(outcome.is_ok(), from == From::Outside, "from {from:?}, {family}: {outcome:?}");
            for way in [Way::ClusterIp, Way::ExternalIp, Way::NodePort] {
                let outcome = bed.ask(from, Protocol::Tcp, address(way, Policy::Cluster, family))?;
                assert!(outcome.is_ok(), "{way:?} has no ranges, from {from:?}, {family}: {outcome:?}");
            }
        }
    }
    Ok(())
}

/// Affinity is of the client's address, whatever port it comes from and whichever way it takes; and it can be switched off and on.
#[test]
fn clients_keep_their_backend_where_they_are_to() -> TestResult {
    let mut bed = Bed::start(Protocol::Tcp)?;
    let mut config = bed.config(Forwarding::Fast);
    for family in Family::BOTH {
        let service = service(&bed, Policy::Cluster, Protocol::Tcp, family, "auto", &[LOCAL, REMOTE]);
        config = config.service(service.affinity("client-ip:3600"));
    }
    bed.serve(&config)?;
    for (family, from) in Family::BOTH.into_iter().flat_map(|family| From::ALL.map(|from| (family, from))) {
        let mut names = BTreeSet::new();
        for way in [Way::ClusterIp, Way::ExternalIp, Way::LoadBalancerIp, Way::NodePort] {
            for _ in 0..6 {
                let answer = bed.ask(from, Protocol::Tcp, address(way, Policy::Cluster, family))??;
                names.insert(answer.name);
            }
        }
        assert_eq!(names.len(), 1, "from {from:?}, {family}: {names:?}");
    }
    Ok(())
}

/// A node port is a port of the node at its loopback addresses too, for the node alone.
#[test]
fn a_node_port_is_reached_at_localhost() -> TestResult {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut bed = Bed::start(protocol)?;
        let mut config = bed.config(Forwarding::Fast);
        for family in Family::BOTH {
            config = config.service(service(&bed, Policy::Local, protocol, family, "auto", &[LOCAL, REMOTE]));
        }
        bed.serve(&config)?;
        for localhost in ["127.0.0.1", "::1"] {
            let to = SocketAddr::new(localhost.parse()?, 30002);
            let answers = bed.ask_all(From::Node, protocol, to, &[LOCAL, REMOTE]).context(to)?;
            let who: BTreeSet<_> = answers.iter().map(|answer| &*answer.name).collect();
            assert_eq!(Vec::from_iter(who), [LOCAL, REMOTE], "{to}, {}", protocol.name());
        }
    }
    Ok(())
}
