//! How long other load balancers take to load services from nothing.

use std::time::{Duration, Instant};

use anyhow::Result;
use netlb_integration::netns::Namespace;
use netlb_integration::topology::{Family, Layout, Plan};

use super::BACKENDS;
use crate::notes::note;
use crate::path::iptables::Variant;
use crate::path::services::{Service, others};
use crate::path::workload::core;
use crate::path::{haproxy, iptables, nftables};

/// A load balancer, and how it loads services within a time, which does not count the making of its configuration's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) name: &'static str,
    load: fn(&Namespace, &[Service], Duration) -> Result<Duration>,
}

pub(super) const PEERS: &[Peer] = &[
    Peer {
        name: "iptables-legacy",
        load: |node, services, limit| kube_iptables(Variant::Legacy, node, services, limit),
    },
    Peer { name: "iptables-nft", load: |node, services, limit| kube_iptables(Variant::Nft, node, services, limit) },
    Peer {
        name: "nftables",
        load: |node, services, limit| {
            let rules = nftables::rules(services);
            timed(|| nftables::load(node, &rules, limit))
        },
    },
    Peer {
        name: "haproxy",
        load: |node, services, limit| {
            let core = core()?;
            timed(|| haproxy::start(node, services, core, limit).map(drop))
        },
    },
];

/// Nothing where it failed or took longer than it may, with a note that says so.
pub(super) fn seconds(peer: &Peer, services: u32, limit: Duration) -> Result<Option<f64>> {
    let bed = Plan::new(Layout::Ptp).build()?;
    let services = others(services, BACKENDS);
    let begin = Instant::now();
    match (peer.load)(&bed.node_a().ns, &services, limit) {
        Ok(time) => Ok(Some(time.as_secs_f64())),
        Err(error) => {
            let Peer { name, .. } = peer;
            let count = services.len();
            if begin.elapsed() >= limit {
                note(format_args!(
                    "control: {name} was ended after {limit:?}, with {count} services still to be loaded"
                ));
            } else {
                note(format_args!("control: {name} does not load {count} services: {error:#}"));
            }
            Ok(None)
        }
    }
}

fn kube_iptables(variant: Variant, node: &Namespace, services: &[Service], limit: Duration) -> Result<Duration> {
    let rules = iptables::rules(services);
    timed(|| iptables::load(variant, node, Family::V4, &rules, limit))
}

fn timed(load: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let begin = Instant::now();
    load()?;
    Ok(begin.elapsed())
}
