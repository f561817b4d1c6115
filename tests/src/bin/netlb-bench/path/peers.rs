//! The load balancers, and how each is set up on a site's node.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::programs::{Xdp, XdpMode};
use netlb_integration::daemon::{self, Config, Forwarding, Netlb};
use netlb_integration::exec::Process;
use netlb_integration::topology::Family;

use super::iptables::Variant;
use super::services::{Service, measured};
use super::site::{Scene, Site};
use super::workload::Traffic;
use super::{haproxy, iptables, nftables};

pub(crate) const NETLB_FAST: &str = "netlb fast";
pub(crate) const NETLB_XDP: &str = "netlb XDP";
pub(crate) const NETLB_SOCKET: &str = "netlb socket";
/// What all others are compared with.
pub(crate) const DIRECT: &str = "direct";
const LOAD_LIMIT: Duration = Duration::from_secs(150);

/// A load balancer to be measured. Another one is another line in [`PEERS`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) name: &'static str,
    /// Whether it takes part in a quick run.
    pub(crate) quick: bool,
    scenes: &'static [Scene],
    udp: bool,
    reach: Reach,
    set_up: fn(&Site, &[Service]) -> Result<Balancer>,
}

/// What clients connect to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Reach {
    /// The backends themselves.
    Backends,
    Service,
}

/// The first is [`DIRECT`].
pub(crate) const PEERS: &[Peer] = &[
    Peer::new(DIRECT, Reach::Backends, |_, _| Ok(Balancer::None)).everywhere().quick(),
    Peer::new("direct again", Reach::Backends, |_, _| Ok(Balancer::None)).everywhere().quick(),
    Peer::new("direct + conntrack", Reach::Backends, |site, _| {
        nftables::load(site.node(), nftables::CONNECTION_TRACKING, LOAD_LIMIT)?;
        Ok(Balancer::None)
    }),
    Peer::new("iptables-legacy", Reach::Service, |site, services| kube_iptables(Variant::Legacy, site, services)),
    Peer::new("iptables-nft", Reach::Service, |site, services| kube_iptables(Variant::Nft, site, services))
        .everywhere()
        .quick(),
    Peer::new("nftables", Reach::Service, |site, services| {
        nftables::load(site.node(), &nftables::rules(services), LOAD_LIMIT)?;
        Ok(Balancer::None)
    })
    .everywhere()
    .quick(),
    Peer::new("haproxy", Reach::Service, |site, services| {
        let process = haproxy::start(site.node(), services, site.core, LOAD_LIMIT)?;
        site.cgroup.add(process.id())?;
        Ok(Balancer::Proxy { _process: process })
    })
    .tcp_only(),
    Peer::new(NETLB_FAST, Reach::Service, |site, services| netlb(Forwarding::Fast, site, services))
        .everywhere()
        .quick(),
    Peer::new("netlb stack", Reach::Service, |site, services| netlb(Forwarding::Stack, site, services)),
    Peer::new(NETLB_SOCKET, Reach::Service, netlb_socket).quick(),
    // What those pay who do not use the service.
    Peer::new("netlb, but direct", Reach::Backends, |site, services| {
        Ok(match netlb(Forwarding::Fast, site, services)? {
            Balancer::Netlb(netlb) => Balancer::NetlbUnused(netlb),
            other => other,
        })
    }),
    Peer::new(NETLB_XDP, Reach::Service, netlb_xdp).far_only().quick(),
];

impl Peer {
    const fn new(name: &'static str, reach: Reach, set_up: fn(&Site, &[Service]) -> Result<Balancer>) -> Self {
        Self { name, quick: false, scenes: &[Scene::Near], udp: true, reach, set_up }
    }

    const fn everywhere(self) -> Self {
        Self { scenes: &[Scene::Near, Scene::Far], ..self }
    }

    const fn far_only(self) -> Self {
        Self { scenes: &[Scene::Far], ..self }
    }

    const fn quick(self) -> Self {
        Self { quick: true, ..self }
    }

    const fn tcp_only(self) -> Self {
        Self { udp: false, ..self }
    }

    pub(crate) fn set_up(&self, site: &Site, services: &[Service]) -> Result<Balancer> {
        (self.set_up)(site, services).with_context(|| format!("failed to set up {}", self.name))
    }

    pub(crate) fn carries(&self, traffic: Traffic) -> bool {
        self.udp || traffic.is_tcp()
    }

    /// Whether it is measured there.
    pub(crate) fn is_in(&self, scene: Scene) -> bool {
        self.scenes.contains(&scene)
    }

    pub(crate) fn is_netlb(&self) -> bool {
        self.name.starts_with("netlb")
    }

    pub(crate) fn targets(&self, site: &Site, family: Family) -> Vec<SocketAddr> {
        match self.reach {
            Reach::Backends => site.backends(family),
            Reach::Service => vec![measured(family)],
        }
    }
}

/// What is to be kept as long as a peer is measured.
#[derive(Debug)]
pub(crate) enum Balancer {
    /// Nothing, or rules that go with the node.
    None,
    Proxy {
        _process: Process,
    },
    Netlb(Box<Netlb>),
    /// At the client's socket: packets are between client and backend.
    NetlbSocket(Box<Netlb>),
    /// It sees the packets, which are not for it.
    NetlbUnused(Box<Netlb>),
    /// At XDP of the uplink.
    NetlbXdp {
        netlb: Box<Netlb>,
        /// On the cable's other end.
        _pass: Ebpf,
    },
}

impl Balancer {
    /// Checks that it was this balancer that carried `operations`, each of which is a packet at least.
    pub(crate) fn check(&self, operations: u64) -> Result<()> {
        let counted = |netlb: &Netlb, what: &str| {
            let services = netlb.items(["svc", "list"])?;
            let measured =
                services.iter().filter(|one| one["name"].as_str().is_some_and(|name| name.starts_with("measured")));
            anyhow::Ok(measured.filter_map(|service| service[what].as_u64()).sum::<u64>())
        };
        match self {
            Self::None | Self::Proxy { .. } => {}
            Self::Netlb(netlb) => {
                let packets = counted(netlb, "packetsIn")?;
                ensure!(packets >= operations, "netlb counts {packets} packets after {operations} operations");
            }
            Self::NetlbSocket(netlb) => {
                let (sockets, packets) = (counted(netlb, "flows")?, counted(netlb, "packetsIn")?);
                ensure!(sockets > 0 && packets == 0, "netlb counts {sockets} sockets and {packets} packets");
            }
            Self::NetlbUnused(netlb) => {
                let packets = counted(netlb, "packetsIn")?;
                ensure!(packets == 0, "netlb counts {packets} packets that were not for it");
            }
            Self::NetlbXdp { netlb, .. } => {
                let packets = netlb.counter("sent_by_xdp")?;
                ensure!(packets >= operations, "XDP sent {packets} packets in {operations} operations");
            }
        }
        Ok(())
    }
}

/// A configuration file's services.
pub(crate) fn netlb_config(mut config: Config, services: &[Service]) -> Config {
    for Service { name, frontend, protocol, backends } in services {
        let frontend = format!("{frontend}/{}", protocol.name());
        config = config.service(daemon::Service::new(name, frontend, backends.iter().copied()));
    }
    config
}

fn netlb(forwarding: Forwarding, site: &Site, services: &[Service]) -> Result<Balancer> {
    let netlb = Netlb::start(site.bed.node_a(), &netlb_config(base(forwarding, site), services))?;
    Ok(Balancer::Netlb(Box::new(netlb)))
}

/// A configuration without services.
fn base(forwarding: Forwarding, site: &Site) -> Config {
    let config = Config::new(site.bed.node_a(), forwarding);
    match site.scene() {
        Scene::Near => config,
        // One client begins as many flows within minutes as hundreds do elsewhere.
        Scene::Far => config.extra("\n[snat]\nports = \"20000-65535\"\n"),
    }
}

fn netlb_xdp(site: &Site, services: &[Service]) -> Result<Balancer> {
    let config = base(Forwarding::Fast, site).xdp("native");
    let netlb = Netlb::start(site.bed.node_a(), &netlb_config(config, services))?;
    let pass = site.bed.switch()?.enter(|| receive_from_xdp(&site.harness, "to-a"))??;
    Ok(Balancer::NetlbXdp { netlb: Box::new(netlb), _pass: pass })
}

/// Has an end of a veth take what the other end sends by XDP, which needs an XDP program there, though one that does nothing.
fn receive_from_xdp(harness: &Path, interface: &str) -> Result<Ebpf> {
    let mut ebpf = Ebpf::load(&fs::read(harness)?)?;
    let pass: &mut Xdp = ebpf.program_mut("xdp_pass").context("there is no program xdp_pass")?.try_into()?;
    pass.load()?;
    pass.attach(interface, XdpMode::Driver).with_context(|| format!("failed to attach XDP to {interface}"))?;
    Ok(ebpf)
}

fn netlb_socket(site: &Site, services: &[Service]) -> Result<Balancer> {
    let node = site.bed.node_a();
    let socket = format!("\n[socket]\nscope = \"all\"\ncgroup = {:?}\n", site.cgroup.path());
    let netlb = Netlb::start(node, &netlb_config(Config::new(node, Forwarding::Fast).extra(&socket), services))?;
    Ok(Balancer::NetlbSocket(Box::new(netlb)))
}

fn kube_iptables(variant: Variant, site: &Site, services: &[Service]) -> Result<Balancer> {
    for family in Family::BOTH {
        let services = Vec::from_iter(services.iter().filter(|service| service.family() == family));
        if !services.is_empty() {
            iptables::load(variant, site.node(), family, &iptables::rules(services), LOAD_LIMIT)?;
        }
    }
    Ok(Balancer::None)
}
