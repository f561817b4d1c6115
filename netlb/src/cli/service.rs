//! `netlb svc`.

use clap::{Args, Subcommand, ValueEnum};

use super::{output::Output, watch};
use crate::{
    client::{Client, service_path},
    desired::ServicePatch,
    model::{Algorithm, Frontend, SnatMode},
    spec::{BackendSpec, ServiceSpec},
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
    /// Service: its name or any of its frontends
    service: String,
}

#[derive(Args, Debug)]
pub(super) struct Add {
    /// Address the service is reached at, as ADDRESS:PORT/PROTOCOL (10.96.0.10:80/tcp, [fd00::10]:53/udp)
    #[arg(value_name = "VIP")]
    vip: Frontend,
    /// Server behind it, as ADDRESS:PORT or ADDRESS:PORT=WEIGHT; may be repeated
    #[arg(short, long = "backend", value_name = "ADDRESS[=WEIGHT]")]
    backends: Vec<BackendSpec>,
    /// Name; without one the service is named after its first frontend
    #[arg(short, long)]
    name: Option<String>,
    /// One more address the service is reached at; may be repeated
    #[arg(short, long = "frontend", value_name = "VIP")]
    frontends: Vec<Frontend>,
    /// How a backend is chosen for a new flow
    #[arg(short, long, value_enum, default_value_t)]
    algorithm: AlgorithmArg,
    /// Which new flows get an address of the node as their source
    #[arg(long, value_enum, default_value_t)]
    snat: SnatArg,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("change").multiple(true).required(true))]
pub(super) struct Set {
    #[command(flatten)]
    reference: Reference,
    /// New name
    #[arg(short, long, group = "change")]
    name: Option<String>,
    /// The frontends to have from now on; may be repeated
    #[arg(short, long = "frontend", value_name = "VIP", group = "change")]
    frontends: Option<Vec<Frontend>>,
    /// The backends to have from now on; may be repeated
    #[arg(short, long = "backend", value_name = "ADDRESS[=WEIGHT]", group = "change")]
    backends: Option<Vec<BackendSpec>>,
    /// How a backend is chosen for a new flow
    #[arg(short, long, value_enum, group = "change")]
    algorithm: Option<AlgorithmArg>,
    /// Which new flows get an address of the node as their source
    #[arg(long, value_enum, group = "change")]
    snat: Option<SnatArg>,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum AlgorithmArg {
    /// Consistent hashing: a change of the backends moves few flows
    #[default]
    Maglev,
    Random,
    RoundRobin,
}

impl From<AlgorithmArg> for Algorithm {
    fn from(algorithm: AlgorithmArg) -> Self {
        match algorithm {
            AlgorithmArg::Maglev => Self::Maglev,
            AlgorithmArg::Random => Self::Random,
            AlgorithmArg::RoundRobin => Self::RoundRobin,
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
        let Self { vip, backends, name, mut frontends, algorithm, snat } = self;
        frontends.insert(0, vip);
        let spec =
            ServiceSpec { name, frontends, frontend: None, backends, algorithm: algorithm.into(), snat: snat.into() };
        let service: ServiceView = client.post("/v1/services", &spec)?;
        out.done(&service, || {
            let count = service.backends.len();
            format!("service {} created ({count} backend{})", service.name, if count == 1 { "" } else { "s" })
        })
    }
}

impl Set {
    fn run(self, client: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self { reference: Reference { service }, name, frontends, backends, algorithm, snat } = self;
        let patch = ServicePatch {
            name,
            frontends,
            backends,
            algorithm: algorithm.map(Algorithm::from),
            snat: snat.map(SnatMode::from),
        };
        let changed: ServiceView = client.patch(&service_path(&service), &patch)?;
        out.done(&changed, || format!("service {} changed", changed.name))
    }
}
