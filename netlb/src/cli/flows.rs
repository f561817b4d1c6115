//! `netlb flows`.

use clap::{Args, Subcommand};

use super::{output::Output, watch};
use crate::{
    client::{Client, encode},
    view::{FlowCount, FlowView, List},
};

#[derive(Debug, Subcommand)]
pub(super) enum Flows {
    /// List flows
    #[command(visible_alias = "ls")]
    List(ListFlows),
    /// Count flows
    Count(Which),
    /// Forget flows: the next packet of each is balanced anew
    Flush(Which),
}

#[derive(Args, Debug)]
pub(super) struct Which {
    /// Only those of this service: its name or any of its frontends
    #[arg(short, long)]
    service: Option<String>,
}

#[derive(Args, Debug)]
pub(super) struct ListFlows {
    #[command(flatten)]
    which: Which,
    /// The most flows to list
    #[arg(short, long, default_value_t = 1000)]
    limit: usize,
}

impl Flows {
    pub(super) fn run(self, client: &Client, watch: bool, out: &mut Output<'_>) -> anyhow::Result<()> {
        match self {
            Self::List(ListFlows { which, limit }) => {
                let path = format!("/v1/flows?limit={limit}{}", which.query('&'));
                watch::show(watch, out, || client.get::<List<FlowView>>(&path))
            }
            Self::Count(which) => {
                let path = format!("/v1/flows/count{}", which.query('?'));
                watch::show(watch, out, || client.get::<FlowCount>(&path))
            }
            Self::Flush(which) => {
                let flushed: FlowCount = client.delete(&format!("/v1/flows{}", which.query('?')))?;
                out.done(&flushed, || format!("{} flows removed", flushed.count))
            }
        }
    }
}

impl Which {
    fn query(&self, separator: char) -> String {
        let service = self.service.as_deref().map(encode);
        service.map_or_else(String::new, |service| format!("{separator}service={service}"))
    }
}
