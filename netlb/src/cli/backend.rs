//! `netlb backend`.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use clap::{ArgGroup, Args, Subcommand};

use super::{
    output::Output,
    service::{OrNone, list},
    watch,
};
use crate::{
    client::{Client, ClientError, encode, service_path},
    config::{format_duration, parse_duration},
    desired::{BackendPatch, HintsPatch},
    exit::{ExitCode, Failure},
    model::{BackendState, FrontendError, Weight, WeightError, parse_endpoint},
    spec::{BackendAddress, BackendSpec, Hints},
    view::{BackendView, List},
};

#[derive(Debug, Subcommand)]
pub(super) enum Backend {
    /// Add a backend to a service
    Add(Add),
    /// Change a backend
    Set(Set),
    /// Give a backend no new flows; those it has go on
    Drain(Drain),
    /// Give a backend new flows again
    Ready(Which),
    /// Remove a backend; its flows go on until they end
    #[command(name = "rm", visible_aliases = ["del", "delete"])]
    Remove(Which),
    /// List a service's backends
    #[command(visible_alias = "ls")]
    List {
        /// Service: its name, any of its frontends, or a port of the node (0.0.0.0:30080/tcp)
        service: String,
    },
}

#[derive(Args, Debug)]
pub(super) struct Which {
    /// Service: its name, any of its frontends, or a port of the node (0.0.0.0:30080/tcp)
    service: String,
    /// Backend, as ADDRESS:PORT
    #[arg(value_parser = endpoint)]
    address: SocketAddr,
}

#[derive(Args, Debug)]
pub(super) struct Add {
    /// Service: its name, any of its frontends, or a port of the node (0.0.0.0:30080/tcp)
    service: String,
    /// Backend, as ADDRESS:PORT; of a service that publishes a port, ADDRESS is enough
    address: BackendAddress,
    /// Share of new flows, relative to the service's other backends: 1 to 1000
    #[arg(long, default_value = "1", value_parser = weight)]
    weight: Weight,
    /// Whether it takes new flows, as those say who watch it [default: true]
    #[arg(long, value_name = "BOOL")]
    ready: Option<bool>,
    /// Whether it answers [default: as --ready]
    #[arg(long, value_name = "BOOL")]
    serving: Option<bool>,
    /// Whether it is on its way out [default: false]
    #[arg(long, value_name = "BOOL")]
    terminating: Option<bool>,
    /// Name of the node it is on
    #[arg(long)]
    node: Option<String>,
    /// Name of the zone it is in
    #[arg(long)]
    zone: Option<String>,
    /// Node whose clients it is meant for; may be repeated
    #[arg(long = "hint-node", value_name = "NODE")]
    hint_nodes: Vec<String>,
    /// Zone whose clients it is meant for; may be repeated
    #[arg(long = "hint-zone", value_name = "ZONE")]
    hint_zones: Vec<String>,
}

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("change").multiple(true).required(true),
          after_help = "`none` takes a node or zone away, and as the only value of an option that may be repeated all of its list.")]
pub(super) struct Set {
    #[command(flatten)]
    which: Which,
    /// Share of new flows, relative to the service's other backends: 1 to 1000
    #[arg(long, value_parser = weight, group = "change")]
    weight: Option<Weight>,
    /// Whether it takes new flows, as those say who watch it; --serving follows, if the two were the same
    #[arg(long, value_name = "BOOL", group = "change")]
    ready: Option<bool>,
    /// Whether it answers
    #[arg(long, value_name = "BOOL", group = "change")]
    serving: Option<bool>,
    /// Whether it is on its way out
    #[arg(long, value_name = "BOOL", group = "change")]
    terminating: Option<bool>,
    /// Name of the node it is on
    #[arg(long, group = "change")]
    node: Option<OrNone<String>>,
    /// Name of the zone it is in
    #[arg(long, group = "change")]
    zone: Option<OrNone<String>>,
    /// The nodes whose clients it is meant for from now on; may be repeated
    #[arg(long = "hint-node", value_name = "NODE", group = "change")]
    hint_nodes: Option<Vec<OrNone<String>>>,
    /// The zones whose clients it is meant for from now on; may be repeated
    #[arg(long = "hint-zone", value_name = "ZONE", group = "change")]
    hint_zones: Option<Vec<OrNone<String>>>,
}

#[derive(Args, Debug)]
pub(super) struct Drain {
    #[command(flatten)]
    which: Which,
    /// Wait until its flows have ended, at most this long
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "60s",
          value_parser = parse_duration)]
    wait: Option<Duration>,
}

fn endpoint(text: &str) -> Result<SocketAddr, FrontendError> {
    parse_endpoint(text)
}

fn weight(text: &str) -> Result<Weight, Box<dyn std::error::Error + Send + Sync>> {
    Ok(Weight::new(text.parse()?).map_err(|error: WeightError| error)?)
}

impl Backend {
    pub(super) fn run(self, client: &Client, watch: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
        match self {
            Self::Add(add) => add.run(client, out),
            Self::Set(set) => set.run(client, out),
            Self::Drain(drain) => drain.run(client, out),
            Self::Ready(which) => {
                let backend = which.patch(client, state(BackendState::Active))?;
                out.done(&backend, || format!("{}: backend {} takes new flows", which.service, which.address))
            }
            Self::Remove(which) => {
                client.delete::<()>(&which.path())?;
                out.say(&format!("{}: backend {} removed", which.service, which.address))
            }
            Self::List { service } => {
                watch::show(watch, out, || client.get::<List<BackendView>>(&backends_path(&service)))
            }
        }
    }
}

fn backends_path(service: &str) -> String {
    format!("{}/backends", service_path(service))
}

impl Which {
    fn path(&self) -> String {
        format!("{}/{}", backends_path(&self.service), encode(&self.address.to_string()))
    }

    fn patch(&self, client: &Client, patch: BackendPatch) -> Result<BackendView, ClientError> {
        client.patch(&self.path(), &patch)
    }
}

/// The change to a state.
fn state(state: BackendState) -> BackendPatch {
    BackendPatch { state: Some(state), ..BackendPatch::default() }
}

impl Add {
    fn run(self, client: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self { service, address, weight, ready, serving, terminating, node, zone, hint_nodes, hint_zones } = self;
        let hints = Hints { nodes: hint_nodes, zones: hint_zones };
        let spec = BackendSpec { weight, ready, serving, terminating, node, zone, hints, ..BackendSpec::new(address) };
        let backend: BackendView = client.post(&backends_path(&service), &spec)?;
        out.done(&backend, || format!("{service}: backend {} added (weight {weight})", backend.address))
    }
}

impl Set {
    fn run(self, client: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self { which, weight, ready, serving, terminating, node, zone, hint_nodes, hint_zones } = self;
        let name = |given: Option<OrNone<String>>| given.map(OrNone::into_option);
        let hints = HintsPatch { nodes: list("--hint-node", hint_nodes)?, zones: list("--hint-zone", hint_zones)? };
        let patch = BackendPatch {
            weight,
            state: None,
            ready,
            serving,
            terminating,
            node: name(node),
            zone: name(zone),
            hints: (hints != HintsPatch::default()).then_some(hints),
        };
        let only_weight = BackendPatch { weight, ..BackendPatch::default() };
        let only_weight = weight.filter(|_| patch == only_weight);
        let backend = which.patch(client, patch)?;
        let Which { service, address } = which;
        out.done(&backend, || match only_weight {
            Some(weight) => format!("{service}: backend {address} has weight {weight}"),
            None => format!("{service}: backend {address} changed"),
        })
    }
}

impl Drain {
    /// How often the flows are counted.
    const INTERVAL: Duration = Duration::from_millis(250);

    fn run(self, client: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self { which, wait } = self;
        let mut backend = which.patch(client, state(BackendState::Draining))?;
        let Which { service, address } = &which;
        let Some(longest) = wait else {
            return out.done(&backend, || {
                format!("{service}: draining backend {address}: {} flows left", backend.active_flows)
            });
        };
        let start = Instant::now();
        let mut said = None;
        while backend.active_flows > 0 {
            if said != Some(backend.active_flows) {
                out.say(&format!("{service}: draining backend {address}: {} flows left", backend.active_flows))?;
                said = Some(backend.active_flows);
            }
            if start.elapsed() >= longest {
                let (left, longest) = (backend.active_flows, format_duration(longest));
                let message = format!("backend {address} still has {left} flows after {longest}");
                let hint = format!("it goes on draining; `netlb backend ready {service} {address}` takes that back");
                return Err(Failure::new(ExitCode::TimedOut, message).with_hint(hint).into());
            }
            std::thread::sleep(Self::INTERVAL.min(longest.saturating_sub(start.elapsed())));
            backend = client.get(&which.path())?;
        }
        let seconds = start.elapsed().as_secs();
        out.done(&backend, || format!("{service}: backend {address} drained after {seconds}s"))
    }
}
