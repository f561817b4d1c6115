//! netlb's programs with services, ready to be measured.

use anyhow::{Result, bail, ensure};
use netlb::config::{Forwarding, Timeouts};
use netlb::datapath::kernel::testing::{Harness as Netlb, Program, Site};
use netlb::dataplane::Desired;
use netlb::model::Owner;
use netlb::resolve::Node;
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_common::network::{Network, Networks};
use netlb_integration::lab;

use super::cases::{Case, Hook, NODE, Scene, Size, Traffic, services_of};
use super::harness::{Harness, Target};

/// Of so many flows that are made at most one is made again.
const MADE_AGAIN: u64 = 100_000;

/// Loaded programs with maps of their own.
pub(crate) struct Bed {
    netlb: Netlb,
    scene: Scene,
    size: Size,
    /// Whether the flow table is the kernel's LRU hash.
    is_lru: bool,
}

impl Scene {
    /// Roles of the interfaces of clients and backends. From XDP packets leave by both.
    fn interfaces(self) -> [(u32, Interface); 2] {
        let role = |role| {
            // As they are announced where routing has no rules, and one way to each destination.
            Interface { role, flags: Interface::XDP | Interface::DIRECT, pad: 0, master: 0 }
        };
        let clients = if self == Self::Pods { role::POD } else { role::UPLINK };
        let backends = if matches!(self, Self::Uplink | Self::Wrapped) { role::UPLINK } else { role::POD };
        [(lab::CLIENTS, role(clients)), (lab::BACKENDS, role(backends))]
    }

    /// What the programs know as constants.
    fn site(self) -> Site {
        if self != Self::Masquerade {
            return Site::default();
        }
        let mut pods = Networks { len: 1, ..Networks::NONE };
        pods.all[0] = Network::new(lab::addr(lab::CASES[0].host(2, 0)), 96 + 24);
        Site { pods, masquerade: (pods, Networks::NONE), ..Site::default() }
    }
}

impl Bed {
    pub(crate) fn new(scene: Scene, size: Size) -> Result<Self> {
        let netlb = Netlb::at(&scene.site(), &size.limits, &Timeouts::default(), Forwarding::Fast)?;
        Self::with(netlb, scene, size, false)
    }

    /// Pods, with the object whose flow table is the kernel's LRU hash.
    pub(crate) fn with_lru(object: &[u8], size: Size) -> Result<Self> {
        Self::with(lab::load_object(object, &size.limits)?, Scene::Pods, size, true)
    }

    fn with(mut netlb: Netlb, scene: Scene, size: Size, is_lru: bool) -> Result<Self> {
        for (index, interface) in scene.interfaces() {
            netlb.set_interface(index, interface)?;
        }
        netlb.programmer_mut().set_node(Node { addresses: vec![NODE], ..Node::default() });
        let services = services_of(scene, size).into_iter();
        let report = netlb
            .programmer_mut()
            .apply(&Vec::from_iter(services.map(|service| Desired { service: service.into(), owner: Owner::File })));
        ensure!(report.failed.is_empty(), "{} services failed, the first: {:?}", report.failed.len(), report.failed[0]);
        Ok(Self { netlb, scene, size, is_lru })
    }

    pub(crate) fn is_for(&self, case: &Case) -> bool {
        (self.scene, self.size) == (case.scene, case.size)
    }

    /// The programs under test in a case. They share maps, and so flows.
    pub(crate) fn targets(&self, case: &Case) -> Result<Vec<Target>> {
        let hooks = if self.is_lru { &[Hook::Xdp] } else { case.hooks() };
        hooks.iter().map(|hook| self.target(*hook)).collect()
    }

    fn target(&self, hook: Hook) -> Result<Target> {
        let (name, program) = match hook {
            Hook::Xdp if self.is_lru => ("lru_variant", Program::Xdp),
            Hook::Xdp => ("netlb_xdp", Program::Xdp),
            Hook::Ingress => ("netlb_tc", Program::Ingress),
            Hook::Egress => ("netlb_egress", Program::Egress),
        };
        Target::new(name, hook, self.netlb.descriptor(program)?)
    }

    /// Makes the flows of a case, and no others.
    pub(crate) fn open(&mut self, case: &Case, harness: &mut Harness) -> Result<()> {
        self.flush()?;
        let flows = 1 << case.flows_log2;
        let before = self.made();
        for (hook, packets) in case.openings() {
            let opener = self.target(hook)?;
            harness.aim(&opener)?;
            harness.plan(&packets)?;
            harness.run(opener.kind(), &packets, flows)?;
        }
        let made = self.made() - before;
        let wanted = if case.openings().is_empty() { 0 } else { u64::from(flows) };
        // With so many that have only begun, some lose their slots to others, and are made again as they go on.
        let is_right = (wanted..=wanted + wanted / MADE_AGAIN).contains(&made);
        ensure!(is_right || self.is_lru, "{}: {made} flows instead of {wanted}", case.name);
        Ok(())
    }

    /// Flows that were ever made.
    fn made(&self) -> u64 {
        self.netlb.counter(Counter::FlowsCreated) + self.netlb.counter(Counter::FlowsMasqueraded)
    }

    /// Forgets all flows, at once and as if they had never been.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.is_lru {
            return self.netlb.clear_lru();
        }
        let table = self.netlb.flow_table();
        for bucket in (0..=table.mask()).filter_map(|index| table.bucket(index)) {
            for slot in bucket.slots.iter().filter(|slot| slot.data.load() != 0) {
                slot.data.swap(0);
                slot.fingerprint.store(0);
            }
        }
        Ok(())
    }

    /// All counters, to be compared with later ones.
    pub(crate) fn counters(&self) -> Vec<u64> {
        Counter::ALL.iter().map(|counter| self.netlb.counter(*counter)).collect()
    }

    /// Whether what was counted since is what such packets lead to: otherwise something else was measured.
    pub(crate) fn check(&self, before: &[u64], case: &Case, hook: Hook, packets: u32) -> Result<()> {
        let (mut sent, mut made) = (0, 0);
        for (counter, (before, now)) in Counter::ALL.iter().zip(before.iter().zip(self.counters())) {
            let count = now - before;
            match counter {
                Counter::ToPeer | Counter::ToInterface | Counter::ToStack | Counter::SentByXdp => sent += count,
                Counter::FlowsCreated | Counter::FlowsMasqueraded => made += count,
                Counter::DsrWrapped if self.scene == Scene::Wrapped => {}
                _ if count > 0 => bail!("{} is {count} after {packets} packets", counter.name()),
                _ => {}
            }
        }
        // What leaves by egress is sent by the kernel.
        let is_sent = !case.traffic.is_foreign() && hook != Hook::Egress;
        let of_packets = |is_so| if is_so { u64::from(packets) } else { 0 };
        ensure!(made == of_packets(case.traffic == Traffic::New), "{made} flows of {packets} packets");
        ensure!(sent == of_packets(is_sent), "{sent} of {packets} packets sent");
        Ok(())
    }
}
