//! One peer's namespaces: a client pod, a node, backend pods, and a client outside.

use std::net::SocketAddr;

use anyhow::Result;
use netlb_integration::cgroup::Cgroup;
use netlb_integration::netns::Namespace;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed};

use super::services::BACKEND_PORT;

const BACKENDS: u32 = 4;

/// The namespaces. No process runs in them but the peer's own, and those of a measurement while it goes on.
#[derive(Debug)]
pub(crate) struct Site {
    // Dropped in this order: pods before their testbed.
    backends: Vec<Pod>,
    client: Pod,
    pub(crate) bed: Testbed,
    pub(crate) cgroup: Cgroup,
    pub(crate) core: usize,
}

impl Site {
    pub(crate) fn new(core: usize) -> Result<Self> {
        let bed = Plan::new(Layout::Ptp).with_outside_client().build()?;
        let client = bed.pod(Host::A, "client")?;
        for client in [&client.ns, bed.outside()?] {
            // Each connection and each flow takes a port; those of closed connections are used again after a second.
            client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
            client.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        }
        let mut backends = Vec::new();
        for number in 1..=BACKENDS {
            backends.push(bed.pod(Host::A, &format!("backend-{number}"))?);
        }
        Ok(Self { backends, client, bed, cgroup: Cgroup::new("bench")?, core })
    }

    pub(crate) fn node(&self) -> &Namespace {
        &self.bed.node_a().ns
    }

    pub(crate) fn client(&self) -> &Namespace {
        &self.client.ns
    }

    /// Where the servers listen, during a measurement.
    pub(crate) fn backends(&self) -> Vec<SocketAddr> {
        self.backends.iter().map(|pod| SocketAddr::new(pod.ip(Family::V4), BACKEND_PORT)).collect()
    }

    /// Names of the backends' namespaces, with where they listen.
    pub(crate) fn servers(&self) -> Vec<(String, SocketAddr)> {
        self.backends.iter().map(|pod| pod.ns.name().to_owned()).zip(self.backends()).collect()
    }
}
