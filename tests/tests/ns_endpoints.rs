//! What is known of backends changes while clients run: conditions, and hints by node and by zone. It decides about new connections alone.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use netlb_integration::daemon::{Backend, Config, Forwarding, Netlb, Service};
use netlb_integration::exec::wait_until;
use netlb_integration::load::{KeptConnection, Load};
use netlb_integration::servers::{self, Protocol, Server};
use netlb_integration::sockets::Client;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed, vip};

const WEB: u16 = 80;
const ECHO: u16 = 7000;
const BACKENDS: usize = 3;
const SOON: Duration = Duration::from_secs(10);

/// How a change is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    CommandLine,
    File,
}

/// What is said of a backend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Said {
    ready: bool,
    serving: bool,
    terminating: bool,
    node: Option<&'static str>,
    zone: Option<&'static str>,
}

const READY: Said = Said { ready: true, serving: true, terminating: false, node: None, zone: None };
const NOT_READY: Said = Said { ready: false, ..READY };
const LEAVING: Said = Said { terminating: true, ..NOT_READY };
const GONE: Said = Said { serving: false, ..LEAVING };

const fn for_node(name: &'static str) -> Said {
    Said { node: Some(name), ..READY }
}

const fn for_zone(name: &'static str) -> Said {
    Said { zone: Some(name), ..READY }
}

/// What is said of the backends, one after the other, and who of them gets new connections then. The node is `here`, in the zone `near`.
const STEPS: [([Said; BACKENDS], &[usize]); 10] = [
    ([READY, READY, READY], &[0, 1, 2]),
    ([for_node("here"), for_node("there"), for_node("there")], &[0]),
    ([for_node("there"), for_node("here"), for_node("there")], &[1]),
    // Hints go only if every backend has some.
    ([for_node("there"), for_node("here"), READY], &[0, 1, 2]),
    ([for_zone("near"), for_zone("near"), for_zone("far")], &[0, 1]),
    // Nor if none is for this node's clients.
    ([for_zone("far"), for_zone("far"), for_zone("far")], &[0, 1, 2]),
    ([Said { zone: Some("near"), ..NOT_READY }, for_zone("near"), for_zone("far")], &[1]),
    ([NOT_READY, NOT_READY, READY], &[2]),
    // With none that is ready, those that finish.
    ([LEAVING, NOT_READY, GONE], &[0]),
    ([READY, NOT_READY, READY], &[0, 2]),
];

impl Said {
    fn of(self, backend: SocketAddr) -> Backend {
        let Self { ready, serving, terminating, node, zone } = self;
        let backend = Backend::new(backend).ready(ready).serving(serving).terminating(terminating);
        let backend = if let Some(node) = node { backend.hint_nodes(&[node]) } else { backend };
        if let Some(zone) = zone { backend.hint_zones(&[zone]) } else { backend }
    }

    fn options(self) -> Vec<String> {
        let Self { ready, serving, terminating, node, zone } = self;
        let conditions = [("ready", ready), ("serving", serving), ("terminating", terminating)];
        let hints = [("hint-node", node.unwrap_or("none")), ("hint-zone", zone.unwrap_or("none"))];
        let conditions = conditions.map(|(name, is)| format!("--{name}={is}"));
        conditions.into_iter().chain(hints.map(|(name, value)| format!("--{name}={value}"))).collect()
    }
}

/// A node with three backends and a client.
struct Bed {
    // Dropped in this order: the daemon before its node, servers before their pods.
    netlb: Netlb,
    web: Vec<Server>,
    echo: Vec<Server>,
    client: Pod,
    pods: Vec<Pod>,
    bed: Testbed,
    way: Way,
}

impl Bed {
    fn start(way: Way) -> Result<Self> {
        let bed = Plan::new(Layout::Ptp).build()?;
        let client = bed.pod(Host::A, "client")?;
        let pods: Vec<_> =
            (1..=BACKENDS).map(|number| bed.pod(Host::A, &format!("backend-{number}"))).collect::<Result<_>>()?;
        let web: Vec<_> = pods.iter().map(|pod| servers::nginx(pod, 8080)).collect::<Result<_>>()?;
        let echo = pods.iter().map(|pod| servers::echo(pod, Protocol::Udp, ECHO)).collect::<Result<Vec<_>>>()?;
        let netlb = Netlb::start(bed.node_a(), &Self::empty(&bed))?;
        let bed = Self { netlb, web, echo, client, pods, bed, way };
        if way == Way::CommandLine {
            for (name, at, servers, family) in bed.services() {
                bed.netlb.add_service(&name, &at, servers.iter().map(|server| server.addr(family)))?;
            }
        }
        Ok(bed)
    }

    fn empty(bed: &Testbed) -> Config {
        Config::new(bed.node_a(), Forwarding::Fast).node("name = \"here\"\nzone = \"near\"")
    }

    /// Names, frontends and servers.
    fn services(&self) -> Vec<(String, String, &[Server], Family)> {
        let of = |family| {
            [
                (format!("web-{family}"), format!("{}/tcp", at(family, WEB)), self.web.as_slice(), family),
                (format!("echo-{family}"), format!("{}/udp", at(family, ECHO)), self.echo.as_slice(), family),
            ]
        };
        Family::BOTH.into_iter().flat_map(of).collect()
    }

    /// Says this of the backends of all services, and returns when it is in force.
    fn say(&self, said: &[Said; BACKENDS]) -> Result<()> {
        let services = self.services();
        match self.way {
            Way::CommandLine => {
                for (name, _, servers, family) in services {
                    for (said, server) in said.iter().zip(servers) {
                        let backend = server.addr(family).to_string();
                        let options = said.options();
                        let command = ["backend", "set", &name, &backend].into_iter();
                        self.netlb.must(command.chain(options.iter().map(String::as_str)))?;
                    }
                }
                Ok(())
            }
            Way::File => {
                let mut config = Self::empty(&self.bed);
                for (name, frontend, servers, family) in services {
                    let mut service = Service::without_frontend(&name, []).frontend(frontend);
                    for (said, server) in said.iter().zip(servers) {
                        service = service.backend(said.of(server.addr(family)));
                    }
                    config = config.service(service);
                }
                // As editors do it, so that nobody reads half a file.
                let new = self.netlb.config().with_extension("new");
                fs::write(&new, config.to_toml())?;
                fs::rename(&new, self.netlb.config())?;
                wait_until("the file to be read", SOON, || Ok(self.is_known(said)?.then_some(())))
            }
        }
    }

    /// Whether the daemon has programmed this.
    fn is_known(&self, said: &[Said; BACKENDS]) -> Result<bool> {
        for (name, _, servers, family) in self.services() {
            let listed = self.netlb.cli(["backend", "list", &name, "-o", "json"])?;
            let items: serde_json::Value = serde_json::from_str(&listed.stdout).unwrap_or_default();
            for (said, server) in said.iter().zip(servers) {
                let address = server.addr(family).to_string();
                let item = items["items"].as_array().and_then(|all| all.iter().find(|item| item["address"] == address));
                let Some(item) = item else { return Ok(false) };
                let hint = |of: &str| item["hints"][of][0].as_str().map(str::to_owned);
                let conditions = ["ready", "serving", "terminating"].map(|condition| item[condition] == true);
                let is = conditions == [said.ready, said.serving, said.terminating]
                    && hint("nodes").as_deref() == said.node
                    && hint("zones").as_deref() == said.zone;
                if !is {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

fn at(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(vip(family, 10), port)
}

#[test]
fn new_connections_follow_what_is_said_and_established_ones_stay() -> TestResult {
    for way in [Way::CommandLine, Way::File] {
        let bed = Bed::start(way)?;
        bed.say(&STEPS[0].0)?;
        let mut lanes = Vec::new();
        for family in Family::BOTH {
            let mut kept: Vec<Option<KeptConnection>> = (0..BACKENDS).map(|_| None).collect();
            wait_until("a connection to each backend", SOON, || {
                let mut connection = bed.client.ns.enter(|| KeptConnection::open(at(family, WEB)))??;
                let backend = connection.get()?.backend;
                let place = bed.web.iter().position(|server| server.addr(family) == backend);
                kept[place.context("an unknown backend")?].get_or_insert(connection);
                Ok(kept.iter().all(Option::is_some).then_some(()))
            })?;
            lanes.push((family, kept, Load::start(&bed.client.ns, at(family, WEB), 2, 200)));
        }
        for (number, (said, expected)) in STEPS.iter().enumerate() {
            bed.say(said)?;
            for (family, kept, load) in &mut lanes {
                let what = format!("{way:?}, {family}, step {number}");
                load.next_phase();
                let expected: BTreeSet<_> = expected.iter().map(|index| bed.web[*index].addr(*family)).collect();
                wait_until(&format!("new connections to {expected:?}; {what}"), SOON, || {
                    let tallies = load.tallies();
                    let now = tallies.last().context("no phase")?;
                    let seen: BTreeSet<_> = now.by_backend.keys().copied().collect();
                    Ok((seen.is_superset(&expected) && now.requests > 30).then_some(()))
                })?;
                let now = load.tallies().pop().context("no phase")?;
                let seen: BTreeSet<_> = now.by_backend.keys().copied().collect();
                assert_eq!(seen, expected, "{what}: who gets new connections: {now:?}");
                for (server, connection) in bed.web.iter().zip(kept.iter_mut().flatten()) {
                    let answer = connection.get().with_context(|| format!("an established connection; {what}"))?;
                    assert_eq!(answer.backend, server.addr(*family), "an established connection; {what}");
                }
            }
        }
        for (family, _, load) in lanes {
            let total = load.total();
            assert_eq!(total.failed, 0, "{way:?}, {family}: {:?}", total.failures);
        }
    }
    Ok(())
}

/// Datagrams of one socket stay with a backend through everything but the end of its serving.
#[test]
fn datagrams_move_when_their_backend_no_longer_serves_and_not_before() -> TestResult {
    for way in [Way::CommandLine, Way::File] {
        let bed = Bed::start(way)?;
        for family in Family::BOTH {
            let what = format!("{way:?}, {family}");
            bed.say(&[for_node("here"), for_node("there"), for_node("there")])?;
            let mut client = Client::start(&bed.client.ns, None)?;
            client.open(family)?;
            let mut ask = || -> Result<String> { Ok(client.ask(at(family, ECHO), "who")?.1.name) };
            let name = |index: usize| bed.pods[index].name();
            assert_eq!(ask()?, name(0), "{what}");
            for said in [
                [for_node("there"), for_node("here"), for_node("there")],
                [NOT_READY, READY, NOT_READY],
                [LEAVING, READY, NOT_READY],
            ] {
                bed.say(&said)?;
                assert_eq!(ask()?, name(0), "{what}: it serves; {said:?}");
            }
            bed.say(&[GONE, READY, NOT_READY])?;
            for _ in 0..10 {
                assert_eq!(ask()?, name(1), "{what}: it serves no more");
            }
            bed.say(&[READY, READY, READY])?;
            assert_eq!(ask()?, name(1), "{what}: a flow does not go back");
            bed.netlb.must(["flows", "flush"])?;
        }
    }
    Ok(())
}
