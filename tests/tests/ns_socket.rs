//! Processes of the node reach services by their sockets: the address is exchanged when they name it, and they are shown the one they named.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netlb_integration::cgroup::Cgroup;
use netlb_integration::daemon::{Config, Forwarding, Netlb, Service};
use netlb_integration::exec::{Cmd, wait_until};
use netlb_integration::netns::Namespace;
use netlb_integration::servers::{self, Answer, Protocol, Server};
use netlb_integration::sockets::Client;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const WEB: u16 = 80;
const STREAMS: u16 = 7000;
const DATAGRAMS: u16 = 7100;
const DNS: u16 = 53;
const NOBODY: u16 = 7200;
/// The port of echo servers, for both protocols.
const ECHO: u16 = 7001;
const SECOND: Duration = Duration::from_secs(1);

/// How a process names an address.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Form {
    V4,
    V6,
    /// IPv4 on an IPv6 socket: `::ffff:10.96.0.10`.
    Mapped,
}

impl Form {
    const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// The family of what is on the wire.
    fn family(self) -> Family {
        if self == Self::V6 { Family::V6 } else { Family::V4 }
    }

    /// The family of the socket.
    fn socket(self) -> Family {
        if self == Self::V4 { Family::V4 } else { Family::V6 }
    }

    fn of(self, address: SocketAddr) -> SocketAddr {
        match (self, address.ip()) {
            (Self::Mapped, IpAddr::V4(ip)) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
            _ => address,
        }
    }

    fn vip(self, port: u16) -> SocketAddr {
        self.of(SocketAddr::new(vip(self.family(), 10), port))
    }
}

/// A node with two backend pods, netlb, and a cgroup for processes of the node.
#[derive(Debug)]
struct Bed {
    // Dropped in this order: what is attached to the cgroup before the cgroup, the daemon before its node.
    netlb: Netlb,
    cgroup: Cgroup,
    servers: Vec<Server>,
    pods: Vec<Pod>,
    bed: Testbed,
}

impl Bed {
    fn start(scope: &str, serve: impl Fn(&Pod) -> Result<Server>, ports: &[(u16, Protocol)]) -> Result<Self> {
        let bed = Plan::new(Layout::Ptp).build()?;
        let pods: Vec<_> =
            ["backend-1", "backend-2"].iter().map(|name| bed.pod(Host::A, name)).collect::<Result<_>>()?;
        let servers: Vec<_> = pods.iter().map(serve).collect::<Result<_>>()?;
        let cgroup = Cgroup::new("sockets")?;
        let mut config = Config::new(bed.node_a(), Forwarding::Fast);
        for family in Family::BOTH {
            let frontend = |port| SocketAddr::new(vip(family, 10), port);
            for (port, protocol) in ports {
                let name = format!("{}-{port}-{family}", protocol.name());
                let backends = servers.iter().map(|server| server.addr(family));
                config =
                    config.service(Service::new(&name, format!("{}/{}", frontend(*port), protocol.name()), backends));
            }
            for protocol in [Protocol::Tcp, Protocol::Udp].map(Protocol::name) {
                let frontend = format!("{}/{protocol}", frontend(NOBODY));
                config = config.service(Service::new(&format!("nobody-{protocol}-{family}"), frontend, []));
            }
        }
        config = config.extra(&format!("\n[socket]\nscope = \"{scope}\"\ncgroup = {:?}\n", cgroup.path()));
        let netlb = Netlb::start(bed.node_a(), &config)?;
        Ok(Self { netlb, cgroup, servers, pods, bed })
    }

    /// With services of echo servers: [`STREAMS`] or [`DATAGRAMS`].
    fn with_echo(scope: &str, protocol: Protocol) -> Result<Self> {
        let port = if protocol == Protocol::Tcp { STREAMS } else { DATAGRAMS };
        Self::start(scope, |pod| servers::echo(pod, protocol, ECHO), &[(port, protocol)])
    }

    fn node(&self) -> &Namespace {
        &self.bed.node_a().ns
    }

    /// A command of the node, in the cgroup.
    fn command(&self, program: &str) -> Cmd {
        self.node().command(program).cgroup(&self.cgroup)
    }

    fn client(&self) -> Result<Client> {
        Client::start(self.node(), Some(&self.cgroup))
    }

    /// A client with a datagram socket.
    fn datagrams(&self, form: Form) -> Result<Client> {
        let mut client = self.client()?;
        client.open(form.socket())?;
        Ok(client)
    }

    fn names(&self) -> BTreeSet<String> {
        self.pods.iter().map(|pod| pod.name().to_owned()).collect()
    }

    fn server(&self, name: &str) -> Result<&Server> {
        let index = self.pods.iter().position(|pod| pod.name() == name).context("no such pod")?;
        Ok(&self.servers[index])
    }

    /// Programs of the links to the cgroup, by hook.
    fn attached(&self) -> Result<Vec<(String, u64)>> {
        let output = Cmd::new("bpftool").args(["--json", "cgroup", "show"]).arg(self.cgroup.path()).run()?.success()?;
        let shown: serde_json::Value = serde_json::from_str(&output.stdout).unwrap_or_default();
        let mut attached: Vec<_> = shown
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|program| Some((program["name"].as_str()?.to_owned(), program["id"].as_u64()?)))
            .collect();
        attached.sort();
        Ok(attached)
    }
}

#[test]
fn curl_reaches_a_service_however_it_names_the_address() -> TestResult {
    let bed = Bed::start("node", |pod| servers::nginx(pod, 8080), &[(WEB, Protocol::Tcp)])?;
    for form in Form::ALL {
        let mut names = BTreeSet::new();
        for _ in 0..30 {
            let curl = ["--silent", "--show-error", "--fail", "--max-time", "5", "--write-out", "%{remote_ip}\n"];
            let output = bed.command("curl").args(curl).arg(format!("http://{}/", form.vip(WEB))).run()?.success()?;
            let (answer, shown) = output.stdout.trim().split_once('\n').context(output.stdout.clone())?;
            names.insert(Answer::parse(answer)?.name);
            assert_eq!(shown.parse::<IpAddr>()?, form.vip(WEB).ip(), "{form:?}: what curl says it is connected to");
        }
        assert_eq!(names, bed.names(), "{form:?}: both answer in 30 requests");
    }

    let outside = bed.node().command("curl").args(["--silent", "--max-time", "5"]);
    let outside = outside.arg(format!("http://{}/", Form::V4.vip(WEB))).run()?;
    assert!(!outside.status.success(), "a process outside of the cgroup is left alone: {outside}");

    let counted = bed.netlb.must(["status"])?;
    assert!(counted.contains("sockets_balanced"), "{counted}");
    let backend = bed.servers[0].addr(Family::V4);
    let mut client = bed.client()?;
    client.connect(Protocol::Tcp, backend)??;
    assert_eq!(client.peer()?, backend, "another address is left as it is");
    Ok(())
}

#[test]
fn streams_show_the_address_that_was_named() -> TestResult {
    let bed = Bed::with_echo("node", Protocol::Tcp)?;
    for form in Form::ALL {
        let mut client = bed.client()?;
        client.connect(Protocol::Tcp, form.vip(STREAMS))??;
        assert_eq!(client.peer()?, form.vip(STREAMS), "{form:?}");
    }
    Ok(())
}

#[test]
fn datagrams_come_from_the_address_that_was_named() -> TestResult {
    let bed = Bed::with_echo("node", Protocol::Udp)?;
    for form in Form::ALL {
        let service = form.vip(DATAGRAMS);
        let mut names = BTreeSet::new();
        for connected in [false, true].repeat(12) {
            let mut client = bed.datagrams(form)?;
            if connected {
                client.connect(Protocol::Udp, service)??;
                assert_eq!(client.peer()?, service, "{form:?}");
            }
            let mut of_this = BTreeSet::new();
            for n in 0..3 {
                let what = n.to_string();
                let (from, answer) = if connected { client.ask_peer(&what)? } else { client.ask(service, &what)? };
                assert_eq!(from, service, "{form:?}, connected: {connected}: the sender");
                of_this.insert(answer.name);
            }
            assert_eq!(of_this.len(), 1, "{form:?}: a socket stays with its backend");
            names.extend(of_this);
        }
        assert_eq!(names, bed.names(), "{form:?}: both answer to 24 sockets");

        // A connected socket that names the address again, and one that talks to others too.
        let mut client = bed.datagrams(form)?;
        client.connect(Protocol::Udp, service)??;
        let (_, first) = client.ask_peer("first")?;
        let (from, second) = client.ask(service, "second")?;
        assert_eq!((from, second.name), (service, first.name), "{form:?}");
        let backend = form.of(bed.servers[0].addr(form.family()));
        let mut client = bed.datagrams(form)?;
        assert_eq!(client.ask(backend, "direct")?.0, backend, "{form:?}: another address is left as it is");
    }
    Ok(())
}

#[test]
fn dns_is_answered_over_udp() -> TestResult {
    let bed = Bed::start("node", |pod| servers::dns(pod, DNS), &[(DNS, Protocol::Udp)])?;
    for form in Form::ALL {
        let mut names = BTreeSet::new();
        for _ in 0..20 {
            let server = format!("@{}", form.vip(DNS).ip());
            let query = ["+short", "+timeout=3", "+retry=0", "TXT", "who.svc.test"];
            let output = bed.command("kdig").arg(server).args(query).run()?.success()?;
            names.insert(output.stdout.trim().trim_matches('"').to_owned());
        }
        assert_eq!(names, bed.names(), "{form:?}: both answer in 20 questions");
    }
    Ok(())
}

#[test]
fn a_service_without_backends_refuses_at_once() -> TestResult {
    let bed = Bed::with_echo("node", Protocol::Udp)?;
    for form in Form::ALL {
        let start = Instant::now();
        let mut client = bed.datagrams(form)?;
        let refused = [
            client.connect(Protocol::Udp, form.vip(NOBODY))?,
            client.send_to(form.vip(NOBODY), "datagram")?,
            client.connect(Protocol::Tcp, form.vip(NOBODY))?,
        ];
        for refused in refused {
            assert_eq!(refused.unwrap_err().0, "ECONNREFUSED", "{form:?}");
        }
        assert!(start.elapsed() < SECOND, "{form:?}: {:?}", start.elapsed());
    }
    Ok(())
}

#[test]
fn other_network_namespaces_are_served_with_scope_all_only() -> TestResult {
    for (scope, served) in [("node", false), ("all", true)] {
        let bed = Bed::with_echo(scope, Protocol::Udp)?;
        let pod = bed.bed.pod(Host::A, "client")?;
        for form in Form::ALL {
            let mut client = Client::start(&pod.ns, Some(&bed.cgroup))?;
            client.open(form.socket())?;
            client.connect(Protocol::Udp, form.vip(DATAGRAMS))??;
            // By packets or by its socket, the service answers.
            assert_eq!(client.ask_peer("who")?.0, form.vip(DATAGRAMS), "{scope}, {form:?}");
            let (peers, port) = (connected_ports(&pod.ns)?, if served { ECHO } else { DATAGRAMS });
            assert_eq!(peers, [port], "{scope}, {form:?}: the port that the kernel has");
        }
    }
    Ok(())
}

/// Remote ports of the connected datagram sockets of a namespace, as the kernel has them.
fn connected_ports(ns: &Namespace) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for table in ["udp", "udp6"] {
        let text = ns.enter(|| fs::read_to_string(format!("/proc/thread-self/net/{table}")))??;
        let remotes = text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(2)?.rsplit_once(':'));
        ports.extend(remotes.filter_map(|(_, port)| u16::from_str_radix(port, 16).ok()).filter(|port| *port != 0));
    }
    Ok(ports)
}

#[test]
fn sockets_live_through_restarts_and_programs_are_swapped_without_a_gap() -> TestResult {
    let bed = Bed::start(
        "node",
        |pod| servers::echo(pod, Protocol::Tcp, ECHO),
        &[(STREAMS, Protocol::Tcp), (DATAGRAMS, Protocol::Udp)],
    )?;
    let _datagram_servers: Vec<_> =
        bed.pods.iter().map(|pod| servers::echo(pod, Protocol::Udp, ECHO)).collect::<Result<_>>()?;
    let service = Form::V4.vip(DATAGRAMS);
    let mut connected = bed.datagrams(Form::V4)?;
    connected.connect(Protocol::Udp, service)??;
    let mut unconnected = bed.datagrams(Form::V4)?;
    let before = (connected.ask_peer("1")?.1.name, unconnected.ask(service, "1")?.1.name);
    let attached = bed.attached()?;
    assert_eq!(attached.len(), 10, "{attached:?}");

    let mut load = bed.client()?;
    let load = thread::spawn(move || load.connect_for(6 * SECOND, Form::V6.vip(STREAMS)));
    bed.netlb.stop()?;
    assert_eq!(bed.attached()?, attached, "without the daemon");
    let without = (connected.ask_peer("2")?, unconnected.ask(service, "2")?);
    assert_eq!((&without.0.1.name, &without.1.1.name), (&before.0, &before.1));
    for kill in [false, true] {
        bed.netlb.restart(bed.bed.node_a())?;
        let (hooks, programs): (Vec<_>, BTreeSet<_>) = bed.attached()?.into_iter().unzip();
        assert_eq!(hooks, attached.iter().map(|(hook, _)| hook.clone()).collect::<Vec<_>>());
        assert!(attached.iter().all(|(_, id)| !programs.contains(id)), "the programs are new: {programs:?}");
        let after = (connected.ask_peer("3")?, unconnected.ask(service, "3")?);
        assert_eq!((after.0.0, after.1.0), (service, service));
        assert_eq!((&after.0.1.name, &after.1.1.name), (&before.0, &before.1), "sockets keep their backends");
        if !kill {
            bed.netlb.kill()?;
        }
    }
    let (connects, failed) = load.join().map_err(|_| "the load panicked")??;
    assert!(connects > 100 && failed == 0, "{failed} of {connects} connections failed");

    let config = fs::read_to_string(bed.netlb.config())?;
    for (scope, attached) in [("off", 0), ("all", 10)] {
        bed.netlb.stop()?;
        fs::write(bed.netlb.config(), config.replace("\"node\"", &format!("{scope:?}")))?;
        bed.netlb.restart(bed.bed.node_a())?;
        assert_eq!(bed.attached()?.len(), attached, "with scope {scope}");
    }

    bed.netlb.stop()?;
    bed.netlb.cleanup()?.success()?;
    assert_eq!(bed.attached()?, [], "after `netlb cleanup`");
    let alone = bed.client()?.connect(Protocol::Tcp, Form::V4.vip(STREAMS))?;
    assert_eq!(alone.unwrap_err().0, "ENETUNREACH", "after `netlb cleanup`");
    Ok(())
}

#[test]
fn a_socket_leaves_a_removed_datagram_backend() -> TestResult {
    for scope in ["node", "all"] {
        let bed = Bed::with_echo(scope, Protocol::Udp)?;
        for form in Form::ALL {
            // Not one of the file's, which the command line does not change.
            let (name, service) = ("changing", form.vip(DATAGRAMS + 1));
            let frontend = format!("{}/udp", SocketAddr::new(vip(form.family(), 10), DATAGRAMS + 1));
            let backends = bed.servers.iter().map(|server| server.addr(form.family()));
            bed.netlb.add_service(name, &frontend, backends)?;
            let mut unconnected = bed.datagrams(form)?;
            let (_, first) = unconnected.ask(service, "1")?;
            let left = bed.server(&first.name)?.addr(form.family());

            // Of connected sockets, one that has the same backend from the service, and one that named it.
            let mut connected = bed.datagrams(form)?;
            wait_until("a socket with the same backend", 5 * SECOND, || {
                connected.open(form.socket())?;
                connected.connect(Protocol::Udp, service)??;
                Ok((connected.ask_peer("1")?.1.name == first.name).then_some(()))
            })?;
            let mut direct = bed.datagrams(form)?;
            direct.connect(Protocol::Udp, form.of(left))??;
            direct.ask_peer("1")?;

            bed.netlb.remove_backend(name, left)?;
            let (from, second) = unconnected.ask(service, "2")?;
            assert_eq!(from, service, "{scope}, {form:?}");
            assert_ne!(second.name, first.name, "{scope}, {form:?}: the next datagram goes to the other");

            // Perhaps while it waits.
            assert_eq!(connected.receive()?.unwrap_err().0, "ECONNABORTED", "{scope}, {form:?}");
            assert_eq!(connected.send("2")?.unwrap_err().0, "EDESTADDRREQ", "{scope}, {form:?}");
            connected.connect(Protocol::Udp, service)??;
            assert_eq!(connected.ask_peer("3")?.1.name, second.name, "{scope}, {form:?}: connected again");
            assert_eq!(direct.ask_peer("2")?.1.name, first.name, "{scope}, {form:?}: by itself it stays there");

            // Nothing is cut where there is nowhere to go.
            let last = bed.server(&second.name)?.addr(form.family());
            bed.netlb.remove_backend(name, last)?;
            thread::sleep(SECOND / 2);
            assert_eq!(connected.ask_peer("4")?.1.name, second.name, "{scope}, {form:?}: no backend is left");
            bed.netlb.must(["svc", "rm", name])?;
        }
    }
    Ok(())
}

#[test]
fn no_datagram_is_lost_when_a_server_is_replaced() -> TestResult {
    let mut bed = Bed::with_echo("node", Protocol::Udp)?;
    for form in [Form::V4, Form::V6] {
        let (name, service) = ("changing", form.vip(DATAGRAMS + 1));
        let (before, after) = (bed.servers[0].addr(form.family()), bed.servers[1].addr(form.family()));
        bed.netlb.add_service(name, &format!("{service}/udp"), [before])?;
        let mut client = bed.datagrams(form)?;
        assert_eq!(client.ask(service, "1")?.1.name, "backend-1");
        bed.netlb.add_backend(name, after)?;
        assert_eq!(client.ask(service, "2")?.1.name, "backend-1", "it serves still");
        bed.netlb.remove_backend(name, before)?;
        for n in 0..20 {
            assert_eq!(client.ask(service, &n.to_string())?.1.name, "backend-2", "{form:?}, question {n}");
        }
        bed.netlb.must(["svc", "rm", name])?;
    }
    // A crash: questions are lost until the backend is taken out, and not one after that.
    let service = Form::V4.vip(DATAGRAMS + 1);
    let backends: Vec<_> = bed.servers.iter().map(|server| server.addr(Family::V4)).collect();
    bed.netlb.add_service("changing", &format!("{service}/udp"), [backends[0]])?;
    let mut client = bed.datagrams(Form::V4)?;
    client.ask(service, "1")?;
    bed.servers[0].kill()?;
    client.send_to(service, "2")??;
    bed.netlb.add_backend("changing", backends[1])?;
    bed.netlb.remove_backend("changing", backends[0])?;
    assert_eq!(client.ask(service, "2")?.1.name, "backend-2", "the same question again");
    Ok(())
}

#[test]
fn status_shows_the_hooks_or_says_what_is_wrong() -> TestResult {
    let bed = Bed::with_echo("node", Protocol::Udp)?;
    let status = bed.netlb.must(["status"])?;
    let line = format!("node, {} (", bed.cgroup.path().display());
    assert!(status.contains(&line) && status.contains("connect4 connect6 sendmsg4 sendmsg6"), "{status}");

    let plain = Plan::new(Layout::Ptp).build()?;
    let config =
        Config::new(plain.node_a(), Forwarding::Fast).extra("\n[socket]\nscope = \"all\"\ncgroup = \"/proc\"\n");
    let netlb = Netlb::start(plain.node_a(), &config)?;
    let status = netlb.must(["status"])?;
    let warning = "the node's own processes do not reach services: /proc is not a cgroup of version 2";
    assert!(status.contains(warning), "{status}");
    Ok(())
}
