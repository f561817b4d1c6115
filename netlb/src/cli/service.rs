//! `netlb svc`.

use std::str::FromStr;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use super::{output::Output, watch};
use crate::{
    client::{Client, service_path},
    desired::ServicePatch,
    exit::{ExitCode, Failure},
    model::{Affinity, Algorithm, Family, Frontend, Mode, Publish, SnatMode, TrafficPolicy},
    spec::{AddressSpec, BackendSpec, NodePortSpec, ServiceSpec, SourceRange},
    view::{List, ServiceView},
};

#[derive(Debug, Subcommand)]
pub(super) enum Service {
    /// Add a service
    Add(Add),
    /// List services
    #[command(visible_alias = "ls")]
    List,
    /// Show a service and its backends
    Show(Reference),
    /// Change parts of a service
    Set(Set),
    /// Remove a service
    #[command(name = "rm", visible_aliases = ["del", "delete"])]
    Remove(Reference),
}

#[derive(Args, Debug)]
pub(super) struct Reference {
    /// Service: its name, any of its frontends, or a port of the node (0.0.0.0:30080/tcp)
    service: String,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("way").multiple(true).required(true))]
pub(super) struct Add {
    /// Address the service is reached at, as ADDRESS:PORT/PROTOCOL (10.96.0.10:80/tcp, [fd00::10]:53/udp); not needed where there is
    /// another way to it
    #[arg(value_name = "VIP", group = "way")]
    vip: Option<Frontend>,
    /// Server behind it, as ADDRESS:PORT or ADDRESS:PORT=WEIGHT; may be repeated. With --publish, the port may be left out
    #[arg(short, long = "backend", value_name = "ADDRESS[=WEIGHT]")]
    backends: Vec<BackendSpec>,
    /// Name; without one the service is named after the first way it is reached by
    #[arg(short, long)]
    name: Option<String>,
    /// One more address the service is reached at; may be repeated
    #[arg(short, long = "frontend", value_name = "VIP", group = "way")]
    frontends: Vec<Frontend>,
    /// Address for clients outside the cluster: ADDRESS:PORT/PROTOCOL, or ADDRESS for every port of the VIPs; may be repeated
    #[arg(long = "external-ip", value_name = "ADDRESS", group = "way")]
    external_ips: Vec<AddressSpec>,
    /// Address that a load balancer gave to the service, written like --external-ip; may be repeated
    #[arg(long = "lb-ip", visible_alias = "load-balancer-ip", value_name = "ADDRESS", group = "way")]
    load_balancer_ips: Vec<AddressSpec>,
    /// Network of clients that may use the addresses of --lb-ip, or an address; may be repeated
    #[arg(long = "source-range", value_name = "NETWORK")]
    source_ranges: Vec<SourceRange>,
    /// Port on the node's addresses: PORT/PROTOCOL, or PORT for every protocol of the VIPs (tcp, if there are none); may be repeated
    #[arg(long = "node-port", value_name = "PORT[/PROTOCOL]", group = "way")]
    node_ports: Vec<NodePortSpec>,
    /// Port of the node that leads to the backends' port TARGET; may be repeated
    #[arg(short, long, value_name = "[ADDRESS:]PORT:TARGET[/PROTOCOL]", group = "way")]
    publish: Vec<Publish>,
    /// Family of a service that has only ports [default: that of the backends; ipv4, if there are none]
    #[arg(long, value_enum)]
    family: Option<FamilyArg>,
    /// How a backend is chosen for a new flow
    #[arg(short, long, value_enum, default_value_t)]
    algorithm: AlgorithmArg,
    /// Which new flows get an address of the node as their source
    #[arg(long, value_enum, default_value_t)]
    snat: SnatArg,
    /// How packets from outside get to backends that are not behind this node
    #[arg(long, value_enum, default_value_t)]
    mode: ModeArg,
    /// How long a client keeps its backend: none, client-ip (three hours) or client-ip:SECONDS
    #[arg(long, default_value_t)]
    affinity: Affinity,
    /// Which backends the clients of all addresses but the VIPs get
    #[arg(long, value_enum, ignore_case = true, default_value_t, value_name = "POLICY")]
    external_traffic_policy: PolicyArg,
    /// Which backends the clients of the VIPs get
    #[arg(long, value_enum, ignore_case = true, default_value_t, value_name = "POLICY")]
    internal_traffic_policy: PolicyArg,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("change").multiple(true).required(true),
          after_help = "An option that may be repeated replaces the whole list; `none` as its only value leaves the list empty.")]
pub(super) struct Set {
    #[command(flatten)]
    reference: Reference,
    /// New name
    #[arg(short, long, group = "change")]
    name: Option<String>,
    /// The frontends to have from now on; may be repeated
    #[arg(short, long = "frontend", value_name = "VIP", group = "change")]
    frontends: Option<Vec<OrNone<Frontend>>>,
    /// The backends to have from now on; may be repeated
    #[arg(short, long = "backend", value_name = "ADDRESS[=WEIGHT]", group = "change")]
    backends: Option<Vec<OrNone<BackendSpec>>>,
    /// The external addresses to have from now on; may be repeated
    #[arg(long = "external-ip", value_name = "ADDRESS", group = "change")]
    external_ips: Option<Vec<OrNone<AddressSpec>>>,
    /// The load balancers' addresses to have from now on; may be repeated
    #[arg(long = "lb-ip", visible_alias = "load-balancer-ip", value_name = "ADDRESS", group = "change")]
    load_balancer_ips: Option<Vec<OrNone<AddressSpec>>>,
    /// The networks of clients that may use the addresses of --lb-ip from now on; may be repeated
    #[arg(long = "source-range", value_name = "NETWORK", group = "change")]
    source_ranges: Option<Vec<OrNone<SourceRange>>>,
    /// The node ports to have from now on; may be repeated
    #[arg(long = "node-port", value_name = "PORT[/PROTOCOL]", group = "change")]
    node_ports: Option<Vec<OrNone<NodePortSpec>>>,
    /// The ports to publish from now on; may be repeated
    #[arg(short, long, value_name = "[ADDRESS:]PORT:TARGET[/PROTOCOL]", group = "change")]
    publish: Option<Vec<OrNone<Publish>>>,
    /// How a backend is chosen for a new flow
    #[arg(short, long, value_enum, group = "change")]
    algorithm: Option<AlgorithmArg>,
    /// Which new flows get an address of the node as their source
    #[arg(long, value_enum, group = "change")]
    snat: Option<SnatArg>,
    /// How packets from outside get to backends that are not behind this node
    #[arg(long, value_enum, group = "change")]
    mode: Option<ModeArg>,
    /// How long a client keeps its backend: none, client-ip (three hours) or client-ip:SECONDS
    #[arg(long, group = "change")]
    affinity: Option<Affinity>,
    /// Which backends the clients of all addresses but the VIPs get
    #[arg(long, value_enum, ignore_case = true, group = "change", value_name = "POLICY")]
    external_traffic_policy: Option<PolicyArg>,
    /// Which backends the clients of the VIPs get
    #[arg(long, value_enum, ignore_case = true, group = "change", value_name = "POLICY")]
    internal_traffic_policy: Option<PolicyArg>,
}

/// An entry of a list, or the word for a list without any.
#[derive(Clone, Debug)]
pub(super) enum OrNone<T> {
    None,
    Some(T),
}

impl<T: FromStr> FromStr for OrNone<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, T::Err> {
        if text == "none" { Ok(Self::None) } else { text.parse().map(Self::Some) }
    }
}

impl<T> OrNone<T> {
    pub(super) fn into_option(self) -> Option<T> {
        match self {
            Self::None => None,
            Self::Some(entry) => Some(entry),
        }
    }
}

/// The list, if one was given.
pub(super) fn list<T>(option: &str, given: Option<Vec<OrNone<T>>>) -> Result<Option<Vec<T>>, Failure> {
    let Some(given) = given else { return Ok(None) };
    let count = given.len();
    let entries: Vec<T> = given.into_iter().filter_map(OrNone::into_option).collect();
    if !entries.is_empty() && entries.len() < count {
        let message = format!("{option} is given `none` and something else");
        return Err(Failure::new(ExitCode::Usage, message).with_hint("`none` alone leaves the list empty"));
    }
    Ok(Some(entries))
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum AlgorithmArg {
    /// Consistent hashing: a change of the backends moves few flows
    #[default]
    Maglev,
    Random,
    RoundRobin,
    /// The same by the client's address alone
    SourceHash,
    /// Of two backends drawn at random, the one with fewer connections for its weight
    LeastConn,
}

impl From<AlgorithmArg> for Algorithm {
    fn from(algorithm: AlgorithmArg) -> Self {
        match algorithm {
            AlgorithmArg::Maglev => Self::Maglev,
            AlgorithmArg::Random => Self::Random,
            AlgorithmArg::RoundRobin => Self::RoundRobin,
            AlgorithmArg::SourceHash => Self::SourceHash,
            AlgorithmArg::LeastConn => Self::LeastConn,
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum FamilyArg {
    Ipv4,
    Ipv6,
}

impl From<FamilyArg> for Family {
    fn from(family: FamilyArg) -> Self {
        match family {
            FamilyArg::Ipv4 => Self::Ipv4,
            FamilyArg::Ipv6 => Self::Ipv6,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum SnatArg {
    /// Those whose replies would not come back through this node
    #[default]
    Auto,
    Always,
    /// None but those of a pod to itself: for backends whose replies come back through this node anyhow
    Never,
}

impl From<SnatArg> for SnatMode {
    fn from(snat: SnatArg) -> Self {
        match snat {
            SnatArg::Auto => Self::Auto,
            SnatArg::Always => Self::Always,
            SnatArg::Never => Self::Never,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum ModeArg {
    /// Translated; replies come back through this node
    #[default]
    Nat,
    /// Wrapped in a packet to the backend, whose node unwraps it and answers clients itself
    Dsr,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Nat => Self::Nat,
            ModeArg::Dsr => Self::Dsr,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum PolicyArg {
    /// Those of all nodes
    #[default]
    Cluster,
    /// Those on the node that the client's packets come to
    Local,
}

impl From<PolicyArg> for TrafficPolicy {
    fn from(policy: PolicyArg) -> Self {
        match policy {
            PolicyArg::Cluster => Self::Cluster,
            PolicyArg::Local => Self::Local,
        }
    }
}

impl Service {
    pub(super) fn run(self, client: &Client, watch: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
        match self {
            Self::Add(add) => add.run(client, out),
            Self::List => watch::show(watch, out, || client.get::<List<ServiceView>>("/v1/services")),
            Self::Show(Reference { service }) => {
                watch::show(watch, out, || client.get::<ServiceView>(&service_path(&service)))
            }
            Self::Set(set) => set.run(client, out),
            Self::Remove(Reference { service }) => {
                client.delete::<()>(&service_path(&service))?;
                out.say(&format!("service {service} removed"))
            }
        }
    }
}

impl Add {
    fn run(self, client: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self {
            vip,
            backends,
            name,
            frontends,
            external_ips,
            load_balancer_ips,
            source_ranges,
            node_ports,
            publish,
            family,
            algorithm,
            snat,
            mode,
            affinity,
            external_traffic_policy,
            internal_traffic_policy,
        } = self;
        let spec = ServiceSpec {
            name,
            frontends: vip.into_iter().chain(frontends).collect(),
            frontend: None,
            external_ips,
            load_balancer_ips,
            node_ports,
            node_port: None,
            publish,
            source_ranges,
            family: family.map(Family::from),
            backends,
            algorithm: algorithm.into(),
            snat: snat.into(),
            mode: mode.into(),
            affinity,
            external_traffic_policy: external_traffic_policy.into(),
            internal_traffic_policy: internal_traffic_policy.into(),
        };
        let service: ServiceView = client.post("/v1/services", &spec)?;
        out.done(&service, || {
            let count = service.backends.len();
            format!("service {} created ({count} backend{})", service.name, if count == 1 { "" } else { "s" })
        })
    }
}

impl Set {
    fn run(self, client: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self {
            reference: Reference { service },
            name,
            frontends,
            backends,
            external_ips,
            load_balancer_ips,
            source_ranges,
            node_ports,
            publish,
            algorithm,
            snat,
            mode,
            affinity,
            external_traffic_policy,
            internal_traffic_policy,
        } = self;
        let patch = ServicePatch {
            name,
            frontends: list("--frontend", frontends)?,
            external_ips: list("--external-ip", external_ips)?,
            load_balancer_ips: list("--lb-ip", load_balancer_ips)?,
            node_ports: list("--node-port", node_ports)?,
            publish: list("--publish", publish)?,
            source_ranges: list("--source-range", source_ranges)?,
            backends: list("--backend", backends)?,
            algorithm: algorithm.map(Algorithm::from),
            snat: snat.map(SnatMode::from),
            mode: mode.map(Mode::from),
            affinity,
            external_traffic_policy: external_traffic_policy.map(TrafficPolicy::from),
            internal_traffic_policy: internal_traffic_policy.map(TrafficPolicy::from),
        };
        let changed: ServiceView = client.patch(&service_path(&service), &patch)?;
        out.done(&changed, || format!("service {} changed", changed.name))
    }
}
