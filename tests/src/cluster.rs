//! A testbed with netlb on node A and one kind of service on it: what most tests need.

use std::net::SocketAddr;

use anyhow::Result;

use crate::daemon::{Config, Forwarding, Netlb};
use crate::servers::{Protocol, Server};
use crate::topology::{Family, Host, Plan, Pod, Testbed, vip};

/// A client pod, backend pods with a server each, and a service for each family in front of them. The services are added through the
/// command line, so they can be changed there; tests with a configuration file of their own start [`Netlb`] themselves.
///
/// On two hosts the first backend is on the client's host and the others are on the other one.
#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order: the daemon before its node, servers before their pods.
    pub netlb: Netlb,
    pub servers: Vec<Server>,
    pub backends: Vec<Pod>,
    pub client: Pod,
    pub bed: Testbed,
    port: u16,
}

impl Cluster {
    /// Builds the testbed, starts `backends` servers and netlb, and adds services for `port` of the virtual addresses.
    pub fn start(
        plan: Plan,
        forwarding: Forwarding,
        (port, protocol): (u16, Protocol),
        backends: u32,
        serve: impl Fn(&Pod) -> Result<Server>,
    ) -> Result<Self> {
        let bed = plan.build()?;
        let client = bed.pod(Host::A, "client")?;
        let mut pods = Vec::new();
        let mut servers = Vec::new();
        for number in 1..=backends {
            let host = if number == 1 { Host::A } else { bed.far_host() };
            let pod = bed.pod(host, &format!("backend-{number}"))?;
            servers.push(serve(&pod)?);
            pods.push(pod);
        }
        let netlb = Netlb::start(bed.node_a(), &Config::new(bed.node_a(), forwarding))?;
        for family in Family::BOTH {
            let frontend = format!("{}/{}", SocketAddr::new(vip(family, 10), port), protocol.name());
            netlb.add_service(service(family), &frontend, servers.iter().map(|server| server.addr(family)))?;
        }
        Ok(Self { netlb, servers, backends: pods, client, bed, port })
    }

    /// Where clients find the service.
    pub fn vip(&self, family: Family) -> SocketAddr {
        SocketAddr::new(vip(family, 10), self.port)
    }

    /// Adds a pod with a server that is no service's backend yet.
    pub fn spare(&mut self, serve: impl Fn(&Pod) -> Result<Server>) -> Result<()> {
        let pod = self.bed.pod(self.bed.far_host(), &format!("backend-{}", self.backends.len() + 1))?;
        self.servers.push(serve(&pod)?);
        self.backends.push(pod);
        Ok(())
    }
}

/// The name of the service of a family.
pub fn service(family: Family) -> &'static str {
    match family {
        Family::V4 => "service-v4",
        Family::V6 => "service-v6",
    }
}
