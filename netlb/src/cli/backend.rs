//! `netlb backend`.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand};

use super::{output::Output, watch};
use crate::{
    client::{Client, ClientError, encode, service_path},
    config::{format_duration, parse_duration},
    desired::BackendPatch,
    exit::{ExitCode, Failure},
    model::{BackendState, FrontendError, Weight, WeightError, parse_endpoint},
    spec::BackendSpec,
    view::{BackendView, List},
};

#[derive(Debug, Subcommand)]
pub(super) enum Backend {
    /// Add a backend to a service
    Add(Add),
    /// Change a backend's weight
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
        /// Service: its name or any of its frontends
        service: String,
    },
}

#[derive(Args, Debug)]
pub(super) struct Which {
    /// Service: its name or any of its frontends
    service: String,
    /// Backend, as ADDRESS:PORT
    #[arg(value_parser = endpoint)]
    address: SocketAddr,
}

#[derive(Args, Debug)]
pub(super) struct Add {
    #[command(flatten)]
    which: Which,
    /// Share of new flows, relative to the service's other backends: 1 to 1000
    #[arg(long, default_value = "1", value_parser = weight)]
    weight: Weight,
}

#[derive(Args, Debug)]
pub(super) struct Set {
    #[command(flatten)]
    which: Which,
    /// Share of new flows, relative to the service's other backends: 1 to 1000
    #[arg(long, value_parser = weight)]
    weight: Weight,
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
            Self::Add(Add { which: Which { service, address }, weight }) => {
                let spec = BackendSpec { address, weight, state: BackendState::Active };
                let backend: BackendView = client.post(&backends_path(&service), &spec)?;
                out.done(&backend, || format!("{service}: backend {address} added (weight {weight})"))
            }
            Self::Set(Set { which, weight }) => {
                let backend = which.patch(client, BackendPatch { weight: Some(weight), state: None })?;
                out.done(&backend, || format!("{}: backend {} has weight {weight}", which.service, which.address))
            }
            Self::Drain(drain) => drain.run(client, out),
            Self::Ready(which) => {
                let backend = which.patch(client, BackendPatch { weight: None, state: Some(BackendState::Active) })?;
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

impl Drain {
    /// How often the flows are counted.
    const INTERVAL: Duration = Duration::from_millis(250);

    fn run(self, client: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let Self { which, wait } = self;
        let mut backend = which.patch(client, BackendPatch { weight: None, state: Some(BackendState::Draining) })?;
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
