//! Rules of services that meet each other: what is said of backends, source ranges, affinity, clients that are their own backend, ports
//! that look alike, networks of services. Many services at once, asked from every place by both protocols and families.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netlb_integration::daemon::{Backend, Config, Forwarding, Service};
use netlb_integration::exec::{Process, sibling_program};
use netlb_integration::places::{Asker, ECHO, Expected, From, LOCAL, Outcome, Places, REMOTE, Seen, outside_address};
use netlb_integration::raw;
use netlb_integration::servers::Protocol;
use netlb_integration::testing::TestResult;
use netlb_integration::topology::{Family, Host, vip};

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
const NOBODY: &[&str] = &[];
const BOTH: &[&str] = &[LOCAL, REMOTE];
const PORT: u16 = 80;
const PATIENCE: Duration = Duration::from_secs(1);

/// The addresses of a service by its number, and its node port.
#[derive(Clone, Copy, Debug)]
struct Ways {
    number: u8,
    family: Family,
}

impl Ways {
    fn cluster_ip(self) -> SocketAddr {
        SocketAddr::new(vip(self.family, self.number), PORT)
    }

    fn external_ip(self) -> SocketAddr {
        SocketAddr::new(vip(self.family, 64 + self.number), PORT)
    }

    fn lb_ip(self) -> SocketAddr {
        SocketAddr::new(vip(self.family, 128 + self.number), PORT)
    }

    fn node_port(self) -> SocketAddr {
        SocketAddr::new(Host::A.underlay_address(self.family), 30_000 + u16::from(self.number))
    }

    fn external(self) -> [SocketAddr; 3] {
        [self.external_ip(), self.lb_ip(), self.node_port()]
    }

    fn all(self) -> [SocketAddr; 4] {
        [self.cluster_ip(), self.external_ip(), self.lb_ip(), self.node_port()]
    }

    /// A service of both protocols that is reached in every way.
    fn service(self) -> Service {
        Service::without_frontend(&self.name(), [])
            .frontend(format!("{}/tcp", self.cluster_ip()))
            .frontend(format!("{}/udp", self.cluster_ip()))
            .external_ip(self.external_ip().ip())
            .lb_ip(self.lb_ip().ip())
            .node_port(self.node_port().port())
    }

    fn name(self) -> String {
        format!("s{}-{}", self.number, self.family).to_lowercase()
    }
}

/// Services with these numbers, one by family.
fn numbered(number: u8) -> [Ways; 2] {
    Family::BOTH.map(|family| Ways { number, family })
}

fn with(service: Service, backends: impl IntoIterator<Item = Backend>) -> Service {
    backends.into_iter().fold(service, Service::backend)
}

/// For each family and protocol.
fn in_every_form(mut case: impl FnMut(Family, Protocol) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        for protocol in PROTOCOLS {
            case(family, protocol).with_context(|| format!("{family}, {}", protocol.name()))?;
        }
    }
    Ok(())
}

/// What is said of a backend; nothing, where the service does not have it.
type Said = Option<fn(Backend) -> Backend>;

const READY: Said = Some(|backend| backend);
const UNREADY: Said = Some(|backend| backend.ready(false).serving(true));
const LEAVING: Said = Some(|backend| backend.ready(false).serving(true).terminating(true));
const GONE: Said = Some(|backend| backend.ready(false).serving(false).terminating(true));
const DRAINING: Said = Some(Backend::draining);
const FOR_HERE: Said = Some(|backend| backend.hint_nodes(&["a"]));
const FOR_THERE: Said = Some(|backend| backend.hint_nodes(&["b"]));
const FOR_NEAR: Said = Some(|backend| backend.hint_zones(&["near"]));
const FOR_FAR: Said = Some(|backend| backend.hint_zones(&["far"]));
/// By its node it is for others, by its zone for us.
const FOR_THERE_AND_NEAR: Said = Some(|backend| backend.hint_nodes(&["b"]).hint_zones(&["near"]));

/// What is said of the backend on the node and of the one elsewhere, and which of them are in the sets of policies `cluster` and `local`.
const STATES: [(Said, Said, &[&str], &[&str]); 17] = [
    (READY, READY, BOTH, &[LOCAL]),
    (None, READY, &[REMOTE], NOBODY),
    (READY, None, &[LOCAL], &[LOCAL]),
    (None, None, NOBODY, NOBODY),
    // Each set falls back on its own.
    (LEAVING, READY, &[REMOTE], &[LOCAL]),
    (READY, LEAVING, &[LOCAL], &[LOCAL]),
    (LEAVING, LEAVING, BOTH, &[LOCAL]),
    (GONE, LEAVING, &[REMOTE], NOBODY),
    (LEAVING, UNREADY, &[LOCAL], &[LOCAL]),
    // Not ready is not on the way out.
    (UNREADY, READY, &[REMOTE], NOBODY),
    (UNREADY, UNREADY, NOBODY, NOBODY),
    (GONE, GONE, NOBODY, NOBODY),
    (DRAINING, READY, &[REMOTE], NOBODY),
    // Hints are for the set of the whole cluster, where all that are ready have some and one is for us.
    (FOR_THERE, FOR_HERE, &[REMOTE], &[LOCAL]),
    (FOR_FAR, FOR_NEAR, &[REMOTE], &[LOCAL]),
    (FOR_THERE, READY, BOTH, &[LOCAL]),
    (FOR_THERE_AND_NEAR, FOR_FAR, &[LOCAL], &[LOCAL]),
];

/// Services from these numbers on are of [`STATES`], with both policies `local`, and with both `cluster`.
const LOCALS: u8 = 1;
const CLUSTERS: u8 = 21;

fn services_of_states(places: &Places) -> Result<Vec<Service>> {
    let mut services = Vec::new();
    for (number, (local, remote, ..)) in (0..).zip(STATES) {
        for (first, policy) in [(LOCALS, "local"), (CLUSTERS, "cluster")] {
            for ways in numbered(first + number) {
                let mut service = ways.service().internal_traffic_policy(policy).external_traffic_policy(policy);
                for (said, name) in [(local, LOCAL), (remote, REMOTE)] {
                    let backends = places.backends(ways.family, &[name]);
                    service = with(service, said.into_iter().flat_map(|said| backends.clone().into_iter().map(said)));
                }
                services.push(service);
            }
        }
    }
    Ok(services)
}

fn what_is_said_of_backends_decides_who_answers(asker: &mut Asker) -> Result<()> {
    for (number, (_, _, cluster, local)) in (0..).zip(STATES) {
        // Where one set is empty, whoever is given it gets nothing; where all are, everybody is told.
        let of = |set: &'static [&str]| match set {
            [] if cluster.is_empty() && local.is_empty() => Expected::Refused,
            [] => Expected::Nothing,
            _ => Expected::By(set),
        };
        let external = of(if asker.from.is_elsewhere() { local } else { cluster });
        for protocol in PROTOCOLS {
            for (locals, clusters) in numbered(LOCALS + number).into_iter().zip(numbered(CLUSTERS + number)) {
                let mut cases = vec![(locals.cluster_ip(), of(local)), (clusters.cluster_ip(), of(cluster))];
                cases.extend([(locals.node_port(), external), (clusters.node_port(), of(cluster))]);
                if external != Expected::Nothing {
                    cases.extend([(locals.external_ip(), external), (locals.lb_ip(), external)]);
                }
                for (to, expected) in cases {
                    asker.expect(protocol, to, expected).with_context(|| format!("state {number}"))?;
                }
            }
        }
    }
    Ok(())
}

/// A client that is the only backend is shown an address of the node, by whichever way it asks, and whatever the policy.
fn a_backend_reaches_itself(asker: &mut Asker) -> Result<()> {
    for number in [LOCALS + 2, CLUSTERS + 2] {
        for ways in numbered(number) {
            for (to, protocol) in ways.all().into_iter().flat_map(|to| PROTOCOLS.map(|protocol| (to, protocol))) {
                let outcome = asker.ask(protocol, to)?;
                ensure!(outcome == Outcome::By(LOCAL.to_owned(), Seen::Node), "{to}/{}: {outcome:?}", protocol.name());
            }
        }
    }
    Ok(())
}

/// Services from this number on have [`ranges`].
const RANGES: u8 = 41;

/// Networks of clients, and who is in them.
fn ranges(family: Family) -> [(Vec<String>, &'static [From]); 6] {
    let pods = |host: Host| match family {
        Family::V4 => format!("{}/24", host.pod_address(family, 0)),
        Family::V6 => format!("{}/64", host.pod_address(family, 0)),
    };
    let node = Host::A.underlay_address(family).to_string();
    let everybody = if family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
    [
        (vec![outside_address(family).to_string()], &[From::Outside]),
        (vec![pods(Host::A)], &[From::Pod]),
        (vec![pods(Host::B)], &[From::OtherPod]),
        (vec![node.clone()], &[From::Node]),
        (vec![node, pods(Host::B)], &[From::Node, From::OtherPod]),
        (vec![everybody.to_owned()], &From::ALL),
    ]
}

fn services_with_ranges(places: &Places) -> Vec<Service> {
    let mut services = Vec::new();
    for family in Family::BOTH {
        for (number, (ranges, _)) in (RANGES..).zip(ranges(family)) {
            // The policies change nothing about it.
            let policy = if number % 2 == 0 { "local" } else { "cluster" };
            let service = with(Ways { number, family }.service(), places.backends(family, &[LOCAL]));
            let service = service.external_traffic_policy(policy).internal_traffic_policy(policy);
            services.push(ranges.into_iter().fold(service, Service::source_range));
        }
    }
    services
}

fn ranges_are_of_load_balancers_addresses(asker: &mut Asker) -> Result<()> {
    in_every_form(|family, protocol| {
        for (number, (_, let_in)) in (RANGES..).zip(ranges(family)) {
            let ways = Ways { number, family };
            let served = Expected::By(&[LOCAL]);
            let by_lb = if let_in.contains(&asker.from) { served } else { Expected::Nothing };
            for (to, expected) in [(ways.lb_ip(), by_lb), (ways.cluster_ip(), served), (ways.external_ip(), served)] {
                asker.expect(protocol, to, expected).with_context(|| format!("range {number}"))?;
            }
            asker.expect(protocol, ways.node_port(), served)?;
        }
        Ok(())
    })
}

/// Services whose clients keep their backends.
const AFFINE: u8 = 51;
/// One of them has a backend on the node that is there for the policy `local` alone.
const AFFINE_BY_SETS: u8 = 52;

fn services_with_affinity(places: &Places) -> Vec<Service> {
    let mut services = Vec::new();
    for family in Family::BOTH {
        let service = |number| Ways { number, family }.service().affinity("client-ip:3600");
        services.push(with(service(AFFINE), places.backends(family, BOTH)));
        let local = places.backends(family, &[LOCAL]).into_iter().flat_map(|backend| LEAVING.map(|said| said(backend)));
        let by_sets = with(service(AFFINE_BY_SETS), local.chain(places.backends(family, &[REMOTE])));
        services.push(by_sets.external_traffic_policy("local"));
    }
    services
}

/// By all ways to a service, but by each protocol for itself.
fn a_client_keeps_its_backend_by_every_way(asker: &mut Asker) -> Result<()> {
    in_every_form(|family, protocol| {
        let mut names = BTreeSet::new();
        for to in (Ways { number: AFFINE, family }).all() {
            names.extend(asker.ask_all(protocol, to, &[])?.into_iter().map(|(name, _)| name));
        }
        ensure!(names.len() == 1, "{:?}: {names:?}", asker.from);
        Ok(())
    })
}

/// What is remembered of one way is of no use by another one whose set does not have it.
fn a_remembered_backend_is_of_the_set(asker: &mut Asker) -> Result<()> {
    in_every_form(|family, protocol| {
        let ways = Ways { number: AFFINE_BY_SETS, family };
        let external: &[&str] = if asker.from.is_elsewhere() { &[LOCAL] } else { &[REMOTE] };
        for _ in 0..2 {
            for to in ways.external() {
                asker.expect(protocol, to, Expected::By(external))?;
            }
            asker.expect(protocol, ways.cluster_ip(), Expected::By(&[REMOTE]))?;
        }
        Ok(())
    })
}

/// A node port that is another service's port of a cluster address; and one port that is of TCP's service and of UDP's.
const ALIKE: u8 = 54;

fn services_that_look_alike(places: &Places) -> Vec<Service> {
    let mut services = Vec::new();
    for family in Family::BOTH {
        let ways = Ways { number: ALIKE, family };
        let (at, port) = (ways.cluster_ip().ip(), ways.node_port().port());
        for (protocol, name) in [("tcp", LOCAL), ("udp", REMOTE)] {
            let other = if name == LOCAL { REMOTE } else { LOCAL };
            let service = |kind: &str| Service::without_frontend(&format!("{kind}-{protocol}-{family}"), []);
            let of_node = service("node").node_port(format!("{port}/{protocol}"));
            let of_cluster = service("cluster").frontend(format!("{}/{protocol}", SocketAddr::new(at, port)));
            services.push(with(of_node, places.backends(family, &[name])));
            services.push(with(of_cluster, places.backends(family, &[other])));
        }
    }
    services
}

fn ports_that_look_alike_are_different_ones(asker: &mut Asker) -> Result<()> {
    in_every_form(|family, protocol| {
        let ways = Ways { number: ALIKE, family };
        let at_cluster = SocketAddr::new(ways.cluster_ip().ip(), ways.node_port().port());
        let (of_node, of_cluster) =
            if protocol == Protocol::Tcp { (&[LOCAL], &[REMOTE]) } else { (&[REMOTE], &[LOCAL]) };
        asker.expect(protocol, ways.node_port(), Expected::By(of_node))?;
        asker.expect(protocol, at_cluster, Expected::By(of_cluster))
    })
}

/// Services of processes of the nodes themselves, by the node.
const HOSTS: [(u8, Host, &str); 2] = [(56, Host::A, "host-a"), (57, Host::B, "host-b")];

/// Echo servers at the nodes' own addresses.
fn host_servers(places: &Places) -> Result<Vec<Process>> {
    let mut servers = Vec::new();
    for (_, host, name) in HOSTS {
        for protocol in PROTOCOLS.map(Protocol::name) {
            let command = places.bed().node(host)?.ns.command(sibling_program("netlb-echo")?);
            let command = command.args([protocol, &ECHO.to_string(), "--name", name]);
            let at = Family::BOTH.map(|family| host.underlay_address(family).to_string());
            servers.push(at.into_iter().fold(command, |command, at| command.args(["--listen", &at])).spawn()?);
        }
    }
    Ok(servers)
}

fn services_of_hosts() -> Vec<Service> {
    let mut services = Vec::new();
    for (number, host, name) in HOSTS {
        for ways in numbered(number) {
            let backend = Backend::new(SocketAddr::new(host.underlay_address(ways.family), ECHO));
            services.push(ways.service().backend(backend.node(&name["host-".len()..])));
        }
    }
    services
}

fn processes_of_nodes_are_backends_too(asker: &mut Asker) -> Result<()> {
    in_every_form(|family, protocol| {
        for (number, _, name) in HOSTS {
            for to in (Ways { number, family }).all() {
                asker.expect(protocol, to, Expected::By(&[name]))?;
            }
        }
        Ok(())
    })
}

/// A service one of whose addresses the node holds.
const HELD: u8 = 58;

fn services_at_addresses_of_the_node(places: &Places) -> Result<Vec<Service>> {
    let mut services = Vec::new();
    for (ways, bits) in numbered(HELD).into_iter().zip([32, 128]) {
        places.bed().node_a().ns.ip(&format!("addr add {}/{bits} dev lo\n", ways.lb_ip().ip()))?;
        services.push(with(ways.service(), places.backends(ways.family, &[LOCAL])));
    }
    Ok(services)
}

/// It is served there, and what is no service's is the node's.
fn an_address_is_the_services_and_the_nodes(asker: &mut Asker) -> Result<()> {
    in_every_form(|family, protocol| {
        let at = (Ways { number: HELD, family }).lb_ip();
        asker.expect(protocol, at, Expected::By(&[LOCAL]))?;
        asker.expect(protocol, SocketAddr::new(at.ip(), PORT + 1), Expected::Refused)
    })
}

const OWNED: &str = "owned_cidrs = [\"10.96.0.0/16\", \"fd00:10:96::/112\"]";
/// An address that no service has, and one that the node has, in the networks of services.
const NOBODYS: u8 = 250;
const NODES: u8 = 251;

/// A port that no service has is refused at each address of a service, and an address that nobody has is silent. The node's is its own.
fn what_no_service_has_is_nobodys(asker: &mut Asker) -> Result<()> {
    in_every_form(|family, protocol| {
        let ways = Ways { number: LOCALS, family };
        for at in [ways.cluster_ip(), ways.external_ip(), ways.lb_ip()] {
            asker.expect(protocol, SocketAddr::new(at.ip(), PORT + 1), Expected::Refused)?;
        }
        asker.expect(protocol, SocketAddr::new(vip(family, NOBODYS), PORT), Expected::Nothing)?;
        // By its kernel.
        asker.expect(protocol, SocketAddr::new(vip(family, NODES), PORT), Expected::Refused)?;
        asker.expect(protocol, SocketAddr::new(Host::A.underlay_address(family), PORT), Expected::Refused)
    })
}

/// Whoever asks for an echo from a service's address gets one, whatever kind of address it is.
fn services_answer_echo_requests(places: &Places) -> Result<()> {
    for ways in numbered(LOCALS) {
        for (from, to) in [From::Pod, From::OtherPod, From::Outside]
            .into_iter()
            .flat_map(|from| [ways.cluster_ip(), ways.external_ip(), ways.lb_ip()].map(|to| (from, to)))
        {
            let pinged = places.namespace(from)?.enter(|| raw::ping(to.ip(), PATIENCE))?;
            pinged.with_context(|| format!("from {from:?} to {}", to.ip()))?;
        }
    }
    Ok(())
}

fn all_services(places: &Places, config: Config) -> Result<Config> {
    let services = [
        services_of_states(places)?,
        services_with_ranges(places),
        services_with_affinity(places),
        services_that_look_alike(places),
        services_of_hosts(),
        services_at_addresses_of_the_node(places)?,
    ];
    Ok(services.into_iter().flatten().fold(config, Config::service))
}

#[test]
fn the_rules_hold_beside_each_other() -> TestResult {
    let mut places = Places::new()?;
    for (family, bits) in [(Family::V4, 32), (Family::V6, 128)] {
        places.bed().node_a().ns.ip(&format!("addr add {}/{bits} dev lo\n", vip(family, NODES)))?;
    }
    places.complete_checksums()?;
    let _servers = host_servers(&places)?;
    let config = all_services(&places, places.config(Forwarding::Fast, "node").xdp("generic").node(OWNED))?;
    places.serve(&config)?;
    places.everywhere(&From::ALL, |asker| {
        what_is_said_of_backends_decides_who_answers(asker)?;
        ranges_are_of_load_balancers_addresses(asker)?;
        a_client_keeps_its_backend_by_every_way(asker)?;
        a_remembered_backend_is_of_the_set(asker)?;
        ports_that_look_alike_are_different_ones(asker)?;
        processes_of_nodes_are_backends_too(asker)?;
        an_address_is_the_services_and_the_nodes(asker)?;
        what_no_service_has_is_nobodys(asker)
    })?;
    services_answer_echo_requests(&places)?;
    a_backend_reaches_itself(places.asker(From::Backend)?)?;
    Ok(())
}
