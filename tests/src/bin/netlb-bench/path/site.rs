//! One peer's namespaces: a client, a node, backend pods.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use netlb_integration::cgroup::Cgroup;
use netlb_integration::netns::Namespace;
use netlb_integration::topology::{Family, Host, Layout, Plan, Pod, Testbed};

use super::services::BACKEND_PORT;

const BACKENDS: u32 = 4;

/// Where clients and backends are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Scene {
    /// Clients in a pod and outside, backends in pods of the node.
    Near,
    /// Clients outside, backends on another node: packets leave by the uplink that they came in by.
    Far,
}

/// The namespaces. No process runs in them but the peer's own, and those of a measurement while it goes on.
#[derive(Debug)]
pub(crate) struct Site {
    // Dropped in this order: pods before their testbed.
    backends: Vec<Pod>,
    client: Option<Pod>,
    scene: Scene,
    pub(crate) bed: Testbed,
    pub(crate) cgroup: Cgroup,
    pub(crate) core: usize,
    /// The object with a program that does nothing.
    pub(crate) harness: PathBuf,
}

impl Site {
    pub(crate) fn new(scene: Scene, core: usize, harness: &Path) -> Result<Self> {
        let layout = if scene == Scene::Near { Layout::Ptp } else { Layout::Routed };
        let bed = Plan::new(layout).with_outside_client().build()?;
        let client = if scene == Scene::Near { Some(bed.pod(Host::A, "client")?) } else { None };
        for client in client.iter().map(|pod| &pod.ns).chain([bed.outside()?]) {
            // Each connection and each flow takes a port; those of closed connections are used again after a second.
            client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
            client.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        }
        let mut backends = Vec::new();
        for number in 1..=BACKENDS {
            backends.push(bed.pod(bed.far_host(), &format!("backend-{number}"))?);
        }
        if scene == Scene::Far {
            wire_uplink(&bed, &backends)?;
        }
        Ok(Self { backends, client, scene, bed, cgroup: Cgroup::new("bench")?, core, harness: harness.to_owned() })
    }

    pub(crate) fn node(&self) -> &Namespace {
        &self.bed.node_a().ns
    }

    pub(crate) fn scene(&self) -> Scene {
        self.scene
    }

    /// The client in a pod, or the one outside, which is the only one where backends are far.
    pub(crate) fn client(&self, outside: bool) -> Result<&Namespace> {
        match &self.client {
            Some(pod) if !outside => Ok(&pod.ns),
            _ => self.bed.outside(),
        }
    }

    /// Where the servers listen, during a measurement.
    pub(crate) fn backends(&self, family: Family) -> Vec<SocketAddr> {
        self.backends.iter().map(|pod| SocketAddr::new(pod.ip(family), BACKEND_PORT)).collect()
    }

    /// Names of the backends' namespaces, with where they listen.
    pub(crate) fn servers(&self, family: Family) -> Vec<(String, SocketAddr)> {
        self.backends.iter().map(|pod| pod.ns.name().to_owned()).zip(self.backends(family)).collect()
    }
}

/// Makes the uplink alike for all peers, and like a wire: senders sum their packets themselves, and cards poll, as a veth does only if
/// asked to, or where an XDP program is. Without a load balancer packets take the same way, by the node.
fn wire_uplink(bed: &Testbed, backends: &[Pod]) -> Result<()> {
    let (node, outside) = (&bed.node_a().ns, bed.outside()?);
    for pod in backends {
        pod.offload(&["tx-checksum-ip-generic"], false)?;
    }
    for (ns, interface, feature, state) in [
        (outside, "eth0", "tx-checksum-ip-generic", "off"),
        (node, "up0", "gro", "on"),
        (bed.switch()?, "to-a", "gro", "on"),
    ] {
        ns.command("ethtool").args(["-K", interface, feature, state]).run()?.success()?;
    }
    // Nobody is to be told of the shorter way.
    for interface in ["all", "up0"] {
        node.sysctl(&format!("net/ipv4/conf/{interface}/send_redirects"), "0")?;
    }
    let (pods, node) = (Host::B.pod_address(Family::V4, 0), Host::A.underlay_address(Family::V4));
    outside.ip(&format!("route replace {pods}/24 via {node}\n"))
}
