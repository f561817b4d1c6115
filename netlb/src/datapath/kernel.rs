//! The data plane in the kernel: the one module that touches aya.
//!
//! Everything the programs need outlives the daemon by its pins. A daemon that starts loads its own programs into the maps it finds, if
//! they are of its layout and sizes, and into new ones otherwise; it programs all services; and only then do its programs take the place
//! of those before them, interface by interface, with no packet in between that finds none.

use std::{
    collections::HashMap,
    fmt, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use netlb_common::snat;

use self::{
    counts::Counts,
    links::Attacher,
    load::{Loaded, Memory, Options, Unfinished, Verification, Verified},
    pins::Pins,
    sockets::Sockets,
};
use super::{Programmer, reserved::Reserved};
use crate::{
    config::{Config, Forwarding, Node, NodePortAddresses, SocketScope, Xdp},
    dataplane::{
        ApplyReport, Dataplane, DataplaneStatus, Desired, Flow, FlowFilter, MapStatus, NodeStatus, ServiceStats,
        Touched,
    },
    interfaces::{Interfaces, facts::Facts},
    resolve,
};

pub use self::maps::KernelMaps;

mod clock;
mod clsact;
mod counts;
mod directory;
mod layout;
mod links;
mod load;
mod logs;
mod mapping;
mod maps;
mod pins;
mod sockets;
mod syscall;
#[doc(hidden)]
pub mod testing;

pub(crate) use self::links::detach_all;

/// How often the list of reserved ports is looked at.
const RESERVE_AGAIN: Duration = Duration::from_secs(60);

/// The data plane, loaded.
pub struct Datapath {
    programmer: Programmer<KernelMaps>,
    site: Site,
    interfaces: Interfaces,
    sockets: Sockets,
    reserved: Reserved,
    /// What [`Programmer::node_port_changes`] was when the ports were reserved, and when that was.
    reserved_at: Option<(u64, Instant)>,
    counts: Counts,
    memory: Memory,
    forwarding: Forwarding,
    /// Until the first apply has filled the maps.
    start: Option<Start>,
    load_time: Duration,
    /// What went wrong at start and did not end it.
    warnings: Vec<String>,
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath").field("forwarding", &self.forwarding).finish_non_exhaustive()
    }
}

/// What the configuration says of the node.
struct Site {
    name: String,
    zone: Option<String>,
    node_port_addresses: NodePortAddresses,
    /// Those that clients are to get.
    sources: Vec<IpAddr>,
    serves_sockets: bool,
}

impl Site {
    fn new(config: &Config) -> Self {
        let Node { name, zone, node_port_addresses, .. } = &config.node;
        Self {
            name: name.clone().unwrap_or_else(host_name),
            zone: zone.clone(),
            node_port_addresses: node_port_addresses.clone(),
            sources: config.snat.addresses.clone(),
            serves_sockets: config.socket.scope != SocketScope::Off,
        }
    }

    fn node(&self, facts: &Facts) -> resolve::Node {
        let Facts { addresses, primary } = facts;
        resolve::Node {
            name: self.name.clone(),
            zone: self.zone.clone(),
            node_port_addresses: self.node_port_addresses.of(addresses, primary),
            addresses: addresses.clone(),
            serves_sockets: self.serves_sockets,
        }
    }
}

/// Pins of a start that failed would hold on to a lot of memory until the next one.
fn abandon(pins: &Pins) {
    if let Err(error) = pins.abandon_maps() {
        tracing::warn!("cannot remove the new maps: {error}");
    }
}

/// A warning for each source whose replies would not come back.
fn foreign_sources(sources: &[IpAddr], addresses: &[IpAddr]) -> impl Iterator<Item = String> {
    let foreign = sources.iter().filter(|source| !addresses.contains(source));
    foreign.map(|source| {
        format!(
            "`[snat] addresses`: {source} is not an address of this node; replies to clients that get it go elsewhere"
        )
    })
}

/// A warning where an address may soon find no room among those that flows were given, of which none is ever given up.
fn sources_warning(kept: usize) -> Option<String> {
    let room = snat::ADDRESSES - 1;
    // An address may stand in a few places only, and they are taken before all others are.
    (kept >= room as usize * 3 / 4).then(|| {
        format!(
            "map SNAT_ADDRESSES has {kept} of {room} addresses, and none goes before the maps are made anew: what needs another one may be \
             passed untouched; run `netlb cleanup` when netlb is stopped, and start it again"
        )
    })
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_else(|error| {
        tracing::warn!("cannot read the host's name, by which backends on this node are known: {error}");
        String::new()
    });
    name.trim().to_owned()
}

/// What is left to do after the first apply.
struct Start {
    began: Instant,
    pins: Pins,
    node: Node,
    cgroup: Option<PathBuf>,
    programs: Programs,
    /// For maps that are new.
    unfinished: Option<Unfinished>,
}

/// The programs, or what is to become of them.
enum Programs {
    Coming(Verification),
    Verified(Box<Verified>),
}

impl Datapath {
    /// Loads the programs and finds the interfaces. Packets do not go through them before [`begin`](Dataplane::begin).
    pub fn open(config: &Config, bpffs: &Path, state_dir: &Path) -> anyhow::Result<Self> {
        let pins = Pins::new(bpffs);
        Self::open_in(&pins, config, state_dir).inspect_err(|_| abandon(&pins))
    }

    fn open_in(pins: &Pins, config: &Config, state_dir: &Path) -> anyhow::Result<Self> {
        let began = Instant::now();
        let options = Options {
            object: load::OBJECT,
            limits: &config.limits,
            timeouts: &config.timeouts,
            snat: &config.snat,
            forwarding: config.node.forwarding,
            log: config.log.dataplane,
            owned: layout::networks(config.node.owned_cidrs.networks()),
            pods: layout::networks(config.node.pod_cidrs.networks()),
            masquerade: (
                layout::networks(config.masquerade.pod_cidrs.networks()),
                layout::networks(config.masquerade.exclude.networks()),
            ),
            dsr_from: layout::networks(config.dsr.accept_from.networks()),
            echo: config.node.echo,
            xdp: config.node.xdp != Xdp::Off,
            sockets: config.socket.scope,
        };
        let Loaded { maps, unfinished, memory, verification } = load::load(&options, pins)?;
        // Maps in use are not touched for programs that the kernel may refuse.
        let programs = match unfinished {
            Some(_) => Programs::Coming(verification),
            None => Programs::Verified(Box::new(verification.wait()?)),
        };
        let mut programmer =
            Programmer::new(maps, options.masquerade.0.len > 0).context("cannot read the pinned maps")?;
        let counts = Counts::new(&memory)?;
        let interfaces = Interfaces::open(&config.node)?;
        let site = Site::new(config);
        programmer.set_node(site.node(&interfaces.status().facts));
        let (node, cgroup) = (config.node.clone(), config.socket.cgroup.clone());
        Ok(Self {
            programmer,
            site,
            interfaces,
            sockets: Sockets::new(pins.clone(), config.socket.scope),
            reserved: Reserved::open(state_dir),
            reserved_at: None,
            counts,
            memory,
            forwarding: config.node.forwarding,
            start: Some(Start { began, pins: pins.clone(), node, cgroup, programs, unfinished }),
            load_time: Duration::ZERO,
            warnings: Vec::new(),
        })
    }

    /// The maps are filled: lets the next start adopt them, and packets go through the programs.
    fn finish_start(&mut self, start: Start) -> anyhow::Result<()> {
        let Start { began, pins, node, cgroup, programs, unfinished } = start;
        let Verified { ebpf, sockets } = match programs {
            Programs::Coming(verification) => verification.wait()?,
            Programs::Verified(verified) => *verified,
        };
        let attacher = Attacher::new(&ebpf, &self.memory, pins.clone(), &node)?;
        self.sockets.prepare(sockets, &self.memory, cgroup.as_deref());
        let is_new = unfinished.is_some();
        let committed = unfinished.map_or(Ok(()), |unfinished| unfinished.finish().and_then(|()| pins.commit_maps()));
        if let Err(error) = committed {
            self.warn(format!("the maps will not outlive this netlb: cannot put them in place: {error}"));
        }
        self.interfaces.attach(Box::new(attacher));
        self.sockets.attach();
        if is_new && let Err(error) = pins.forget_previous_maps() {
            self.warn(format!("cannot remove the maps that were replaced: {error}"));
        }
        self.load_time = began.elapsed();
        Ok(())
    }

    /// What is to be done after services have changed.
    fn follow(&mut self, report: ApplyReport) -> ApplyReport {
        if report.changed > 0 {
            self.sockets.check_connected();
        }
        self.reserve_ports();
        report
    }

    /// Keeps the kernel from giving node ports away, once in a while also where it was told before: others write that list, too.
    fn reserve_ports(&mut self) {
        let changes = self.programmer.node_port_changes();
        if self.reserved_at.is_none_or(|(known, at)| known != changes || at.elapsed() >= RESERVE_AGAIN) {
            self.reserved.set(&self.programmer.node_ports());
            self.reserved_at = Some((changes, Instant::now()));
        }
    }

    fn warn(&mut self, warning: String) {
        tracing::warn!("{warning}");
        self.warnings.push(warning);
    }

    fn maps(&self, memory: &HashMap<&str, u64>) -> Vec<MapStatus> {
        let bytes = |name: &str| memory.get(name).copied().unwrap_or(0);
        let status = |(name, entries, max_entries): (&'static str, u64, u64)| MapStatus {
            name: name.to_owned(),
            entries,
            max_entries,
            bytes: match name {
                // All of its maps, by which it is counted as one.
                "flows" => bytes("FLOWS") + bytes("FLOW_RECORDS") + bytes("FLOW_OVERFLOWS"),
                name => bytes(name),
            },
        };
        self.programmer.map_usage().into_iter().map(status).collect()
    }
}

impl Dataplane for Datapath {
    fn apply(&mut self, desired: &[Desired]) -> ApplyReport {
        let report = self.programmer.apply(desired);
        if self.start.is_some() {
            return report;
        }
        self.follow(report)
    }

    fn begin(&mut self) -> anyhow::Result<()> {
        let Some(start) = self.start.take() else { return Ok(()) };
        let pins = start.pins.clone();
        self.finish_start(start).inspect_err(|_| abandon(&pins))?;
        self.reserve_ports();
        Ok(())
    }

    fn apply_touched(&mut self, touched: &[Touched]) -> ApplyReport {
        let report = self.programmer.apply_touched(touched);
        self.follow(report)
    }

    fn stats(&self, services: &[&str]) -> Vec<ServiceStats> {
        self.programmer.stats(services)
    }

    fn recent_stats(&mut self, services: &[&str]) -> Vec<ServiceStats> {
        self.programmer.recent_stats(services)
    }

    fn flows(&self, filter: &FlowFilter, limit: usize) -> Vec<Flow> {
        self.programmer.flows(filter, limit)
    }

    fn count_flows(&self, filter: &FlowFilter) -> u64 {
        self.programmer.count_flows(filter)
    }

    fn flush_flows(&mut self, filter: &FlowFilter) -> u64 {
        self.programmer.flush_flows(filter)
    }

    fn status(&self) -> DataplaneStatus {
        let interfaces = self.interfaces.status();
        let memory = self.memory.by_map();
        let mut warnings = self.warnings.clone();
        warnings.extend(interfaces.warnings);
        warnings.extend(self.sockets.warnings());
        warnings.extend(self.reserved.problem().cloned());
        warnings.extend(foreign_sources(&self.site.sources, &interfaces.facts.addresses));
        let snat_addresses = self.programmer.sources();
        warnings.extend(sources_warning(snat_addresses.len()));
        if interfaces.interfaces.iter().any(|interface| !interface.hook.is_empty()) {
            warnings.extend(forwarding_warning("net.ipv4.ip_forward", "IPv4"));
            if self.programmer.serves_ipv6() {
                warnings.extend(forwarding_warning("net.ipv6.conf.all.forwarding", "IPv6"));
            }
        }
        let resolve::Node { name, zone, node_port_addresses, .. } = self.site.node(&interfaces.facts);
        DataplaneStatus {
            node: NodeStatus { name, zone, node_port_addresses, snat_addresses },
            forwarding: match self.forwarding {
                Forwarding::Fast => "fast",
                Forwarding::Stack => "stack",
            }
            .to_owned(),
            interfaces: interfaces.interfaces,
            sockets: self.sockets.status(),
            maps: self.maps(&memory),
            counters: self.counts.all(),
            warnings,
            load_seconds: self.load_time.as_secs_f64(),
            kernel_bytes: memory.values().sum(),
        }
    }

    fn tick(&mut self) -> ApplyReport {
        self.programmer.tick();
        let report = self.programmer.set_node(self.site.node(&self.interfaces.status().facts));
        self.follow(report)
    }
}

/// A warning where the kernel does not forward: without that it neither finds ways between interfaces nor routes packets.
fn forwarding_warning(sysctl: &str, family: &str) -> Option<String> {
    // Of the network namespace of the thread that reads it.
    let value = fs::read_to_string(format!("/proc/sys/{}", sysctl.replace('.', "/"))).ok()?;
    (value.trim() == "0").then(|| {
        format!("{sysctl} is 0: {family} packets reach backends on the same bridge only; run `sysctl -w {sysctl}=1`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_that_are_not_the_nodes_are_named() {
        let [own, other]: [IpAddr; 2] = [[192, 0, 2, 1].into(), [192, 0, 2, 2].into()];
        let warnings = Vec::from_iter(foreign_sources(&[own, other], &[own]));
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("192.0.2.2 is not an address of this node"), "{warnings:?}");
        assert_eq!(foreign_sources(&[], &[own]).count(), 0);
    }

    #[test]
    fn room_for_sources_that_comes_to_its_end_is_a_warning() {
        assert_eq!([0, 1, 190].map(sources_warning), [None, None, None]);
        for kept in [191, 255] {
            let warning = sources_warning(kept).unwrap();
            assert!(warning.contains(&format!("{kept} of 255")), "{warning}");
        }
    }
}
