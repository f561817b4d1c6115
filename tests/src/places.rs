//! Two nodes with a backend each, netlb on the first one, and a client in every place that traffic comes from.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::cgroup::Cgroup;
use crate::daemon::{Backend, Config, Forwarding, Netlb};
use crate::netns::Namespace;
use crate::servers::{self, Answer, Protocol, Server};
use crate::sockets::{Client, Errno};
use crate::topology::{Family, Host, Layout, Plan, Pod, Testbed};

/// The backends, by the node that they are on.
pub const LOCAL: &str = "local";
pub const REMOTE: &str = "remote";
/// The port of the backends, for both protocols.
pub const ECHO: u16 = 7001;
/// Enough for both backends to answer, but for once in a million times.
const MOST: usize = 40;
/// What comes at all comes within this time.
const SILENCE: Duration = Duration::from_millis(250);
const PATIENCE: Duration = Duration::from_secs(1);
/// Source ports of datagrams: each is used once, below those that the kernel gives. A flow of another way to the same backend would have
/// the port.
const FIRST_PORT: u16 = 10_000;

/// Where a client is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum From {
    /// A pod of the node.
    Pod,
    /// A process of the node.
    Node,
    /// A pod of the other node.
    OtherPod,
    /// A host that is not of the cluster.
    Outside,
    /// The pod of the backend on the node.
    Backend,
}

impl From {
    /// But for the backend, which is a pod as well.
    pub const ALL: [Self; 4] = [Self::Pod, Self::Node, Self::OtherPod, Self::Outside];

    pub fn is_elsewhere(self) -> bool {
        matches!(self, Self::OtherPod | Self::Outside)
    }
}

/// Whom a backend sees.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Seen {
    Client,
    Node,
    Another(IpAddr),
}

/// What became of a question.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// This backend answered.
    By(String, Seen),
    Refused,
    Silence,
    /// The call was not allowed.
    Forbidden,
    Failed(Errno),
}

/// What is to become of questions.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Expected<'a> {
    /// These backends answer, each some of them.
    By(&'a [&'a str]),
    Refused,
    /// Nothing comes; a process of the node is not allowed to call.
    Nothing,
}

#[derive(Debug)]
pub struct Places {
    // Dropped in this order: the daemon before the cgroup and its node, servers and clients before their pods.
    netlb: Option<Netlb>,
    askers: Vec<Asker>,
    servers: Vec<(&'static str, Server)>,
    _also: Vec<Server>,
    pods: Vec<Pod>,
    cgroup: Cgroup,
    bed: Testbed,
    others: AtomicU16,
}

/// A client in a place.
#[derive(Debug)]
pub struct Asker {
    pub from: From,
    client: Client,
    port: u16,
    /// Its own addresses, and those of the node.
    own: Vec<IpAddr>,
    node: Vec<IpAddr>,
}

impl Places {
    pub fn new() -> Result<Self> {
        let bed = Plan::new(Layout::Routed).with_outside_client().build()?;
        let other = &bed.node(Host::B)?.ns;
        for (family, net) in [(Family::V4, "10.96.0.0/16"), (Family::V6, "fd00:10:96::/112")] {
            other.ip(&format!("route add {net} via {}\n", Host::A.underlay_address(family)))?;
        }
        let cgroup = Cgroup::new("places")?;
        let (local, remote) = (bed.pod(Host::A, LOCAL)?, bed.pod(Host::B, REMOTE)?);
        let (mut servers, mut also) = (Vec::new(), Vec::new());
        for (name, pod) in [(LOCAL, &local), (REMOTE, &remote)] {
            servers.push((name, servers::echo(pod, Protocol::Tcp, ECHO)?));
            also.push(servers::echo(pod, Protocol::Udp, ECHO)?);
        }
        let (here, there) = (bed.pod(Host::A, "client")?, bed.pod(Host::B, "client-b")?);
        let of = |pod: &Pod| Vec::from(Family::BOTH.map(|family| pod.ip(family)));
        let places = [
            // Processes of pods are in the cgroup as well, as it is where it is the whole machine's.
            (From::Pod, Client::start(&here.ns, Some(&cgroup))?, of(&here)),
            (From::Node, Client::start(&bed.node_a().ns, Some(&cgroup))?, vec![]),
            (From::OtherPod, Client::start(&there.ns, None)?, of(&there)),
            (From::Outside, Client::start(bed.outside()?, None)?, Vec::from(Family::BOTH.map(outside_address))),
            (From::Backend, Client::start(&local.ns, Some(&cgroup))?, of(&local)),
        ];
        let node = Family::BOTH.map(|family| [Host::A.pod_address(family, 1), Host::A.underlay_address(family)]);
        let askers = places.map(|(from, client, own)| Asker::new(from, client, own, node.concat()));
        Ok(Self {
            netlb: None,
            askers: askers.into(),
            servers,
            _also: also,
            pods: vec![here, there, local, remote],
            cgroup,
            bed,
            others: AtomicU16::new(0),
        })
    }

    pub fn bed(&self) -> &Testbed {
        &self.bed
    }

    /// The configuration of the node `a` in the zone `near`, without services. `scope` is that of `[socket]`.
    pub fn config(&self, forwarding: Forwarding, scope: &str) -> Config {
        let config = Config::new(self.bed.node_a(), forwarding).node("name = \"a\"\nzone = \"near\"");
        config.extra(&format!("\n[socket]\nscope = {scope:?}\ncgroup = {:?}\n", self.cgroup.path()))
    }

    /// Has whoever sends to the node by the underlay complete its checksums, as hosts on a wire do: only such packets are XDP's.
    pub fn complete_checksums(&self) -> Result<()> {
        let off = ["-K", "eth0", "tx-checksum-ip-generic", "off"];
        for ns in [self.bed.outside()?, &self.pods[1].ns, &self.pods[3].ns] {
            ns.command("ethtool").args(off).run()?.success()?;
        }
        Ok(())
    }

    /// Starts netlb, in the place of the one before.
    pub fn serve(&mut self, config: &Config) -> Result<()> {
        self.netlb = None;
        self.netlb = Some(Netlb::start(self.bed.node_a(), config)?);
        Ok(())
    }

    pub fn netlb(&self) -> Result<&Netlb> {
        self.netlb.as_ref().context("nothing is served")
    }

    /// The address of a backend.
    pub fn address(&self, family: Family, name: &str) -> Result<SocketAddr> {
        let server = self.servers.iter().find(|(known, _)| *known == name);
        Ok(server.with_context(|| format!("there is no backend {name}"))?.1.addr(family))
    }

    /// Backends on the nodes `a` and `b`, by their names.
    pub fn backends(&self, family: Family, names: &[&str]) -> Vec<Backend> {
        let wanted = self.servers.iter().filter(|(name, _)| names.contains(name));
        wanted.map(|(name, server)| Backend::new(server.addr(family)).node(node_of(name))).collect()
    }

    pub fn asker(&mut self, from: From) -> Result<&mut Asker> {
        self.askers.iter_mut().find(|asker| asker.from == from).context("no such client")
    }

    pub fn namespace(&self, from: From) -> Result<&Namespace> {
        Ok(match from {
            From::Pod => &self.pods[0].ns,
            From::OtherPod => &self.pods[1].ns,
            From::Backend => &self.pods[2].ns,
            From::Node => &self.bed.node_a().ns,
            From::Outside => self.bed.outside()?,
        })
    }

    /// One more client in the place of a pod, or outside, with sockets of its own.
    pub fn another(&self, from: From) -> Result<Asker> {
        let like = self.askers.iter().find(|asker| asker.from == from).context("no such client")?;
        let ns = self.namespace(from)?;
        let cgroup = (from == From::Node).then_some(&self.cgroup);
        let number = self.others.fetch_add(1, Ordering::Relaxed);
        let port = FIRST_PORT + 10_000 + 200 * number;
        Ok(Asker { from, client: Client::start(ns, cgroup)?, port, own: like.own.clone(), node: like.node.clone() })
    }

    /// Asks from places at the same time.
    pub fn everywhere(&mut self, places: &[From], ask: impl Fn(&mut Asker) -> Result<()> + Sync) -> Result<()> {
        thread::scope(|scope| {
            let askers = self.askers.iter_mut().filter(|asker| places.contains(&asker.from));
            let threads: Vec<_> = askers.map(|asker| scope.spawn(|| ask(asker))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("see above"))))
        })
    }
}

/// The node that a backend is on.
pub fn node_of(backend: &str) -> &'static str {
    if backend == LOCAL { "a" } else { "b" }
}

/// Of the client outside, beside the nodes on their underlay.
pub fn outside_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => "192.168.50.100".parse().expect("an address"),
        Family::V6 => "fd00:192:168:50::64".parse().expect("an address"),
    }
}

impl Asker {
    /// A client with these addresses, and those of its node.
    pub fn new(from: From, client: Client, own: Vec<IpAddr>, node: Vec<IpAddr>) -> Self {
        Self { from, client, port: FIRST_PORT, own, node }
    }

    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// One question on a connection of its own.
    pub fn ask(&mut self, protocol: Protocol, to: SocketAddr) -> Result<Outcome> {
        match self.begin(protocol, to)? {
            Ok(()) => self.go_on(),
            Err(error) => Ok(self.failed(error)),
        }
    }

    /// Connects a socket, in the place of the one before.
    pub fn begin(&mut self, protocol: Protocol, to: SocketAddr) -> Result<Result<(), Errno>> {
        if protocol == Protocol::Udp {
            self.port += 1;
            self.client.open_at(if to.is_ipv4() { Family::V4 } else { Family::V6 }, self.port)?;
        }
        self.client.connect(protocol, to)
    }

    /// Asks by the socket that is connected.
    pub fn go_on(&mut self) -> Result<Outcome> {
        if let Err(error) = self.client.send("who")? {
            return Ok(self.failed(error));
        }
        Ok(match self.client.receive()? {
            Ok((_, Answer { name, client, .. })) => Outcome::By(name, self.seen(client.ip())),
            Err(error) => self.failed(error),
        })
    }

    fn seen(&self, client: IpAddr) -> Seen {
        if self.own.contains(&client) {
            Seen::Client
        } else if self.node.contains(&client) {
            Seen::Node
        } else {
            Seen::Another(client)
        }
    }

    fn failed(&self, error: Errno) -> Outcome {
        match &*error.0 {
            "ECONNREFUSED" => Outcome::Refused,
            "TimedOut" | "EAGAIN" => Outcome::Silence,
            "EPERM" => Outcome::Forbidden,
            _ => Outcome::Failed(error),
        }
    }

    /// Asks until all these backends have answered, and says who did and whom they saw.
    pub fn ask_all(&mut self, protocol: Protocol, to: SocketAddr, backends: &[&str]) -> Result<Vec<(String, Seen)>> {
        let mut answers: Vec<(String, Seen)> = Vec::new();
        let has = |answers: &[(String, Seen)], name: &str| answers.iter().any(|(known, _)| known == name);
        let fewest = 4;
        while answers.len() < fewest || (answers.len() < MOST && !backends.iter().all(|name| has(&answers, name))) {
            match self.ask(protocol, to)? {
                Outcome::By(name, seen) => answers.push((name, seen)),
                outcome => return Err(anyhow!("{outcome:?} after {} answers", answers.len())),
            }
        }
        Ok(answers)
    }

    /// Asks, and compares what becomes of it.
    pub fn expect(&mut self, protocol: Protocol, to: SocketAddr, expected: Expected<'_>) -> Result<()> {
        let what = || format!("from {:?} to {to}/{}, where {expected:?} is expected", self.from, protocol.name());
        let what = what();
        let expected = match expected {
            Expected::By(backends) => {
                let answers = self.ask_all(protocol, to, backends).context(what.clone())?;
                let who: BTreeSet<_> = answers.iter().map(|(name, _)| &**name).collect();
                anyhow::ensure!(who == backends.iter().copied().collect(), "{what}: {who:?} answer");
                return Ok(());
            }
            Expected::Refused => Outcome::Refused,
            Expected::Nothing if self.from == From::Node => Outcome::Forbidden,
            Expected::Nothing => Outcome::Silence,
        };
        let is_silence = expected == Outcome::Silence;
        if is_silence {
            self.client.be_patient(SILENCE)?;
        }
        let outcome = self.ask(protocol, to)?;
        if is_silence {
            self.client.be_patient(PATIENCE)?;
        }
        anyhow::ensure!(outcome == expected, "{what}: {outcome:?}");
        Ok(())
    }
}
