//! netlb's programs with services, ready to be measured.

use anyhow::{Result, bail, ensure};
use netlb::config::Forwarding;
use netlb::datapath::kernel::testing::{Harness as Netlb, Program};
use netlb::dataplane::{Desired, FlowFilter};
use netlb::model::Owner;
use netlb_common::counters::Counter;
use netlb_common::maps::{Interface, role};
use netlb_integration::lab;

use super::cases::{Case, Size, Traffic, services_of};
use super::harness::{Harness, Kind, Target};

/// Loaded programs with maps of their own.
pub(crate) struct Bed {
    netlb: Netlb,
    pub(crate) size: Size,
    /// Whether the flow table is the kernel's LRU hash.
    is_lru: bool,
}

/// From XDP packets leave by both devices.
const SENDS: Interface = Interface { role: role::POD, flags: Interface::XDP, pad: 0, master: 0 };

impl Bed {
    pub(crate) fn new(size: Size) -> Result<Self> {
        Self::with(lab::load(Forwarding::Fast, &size.limits)?, size, false)
    }

    /// The same with the object whose flow table is the kernel's LRU hash.
    pub(crate) fn with_lru(object: &[u8], size: Size) -> Result<Self> {
        Self::with(lab::load_object(object, &size.limits)?, size, true)
    }

    fn with(mut netlb: Netlb, size: Size, is_lru: bool) -> Result<Self> {
        for index in [lab::CLIENTS, lab::BACKENDS] {
            netlb.set_interface(index, SENDS)?;
        }
        let services = services_of(size).into_iter();
        let report = netlb
            .programmer_mut()
            .apply(&Vec::from_iter(services.map(|service| Desired { service: service.into(), owner: Owner::File })));
        ensure!(report.failed.is_empty(), "{} services failed, the first: {:?}", report.failed.len(), report.failed[0]);
        Ok(Self { netlb, size, is_lru })
    }

    /// The programs under test. They share maps, and so flows.
    pub(crate) fn targets(&self) -> Result<Vec<Target>> {
        let xdp = |name| Target::new(name, Kind::Xdp, self.netlb.descriptor(Program::Xdp)?);
        if self.is_lru { Ok(vec![xdp("lru_variant")?]) } else { Ok(vec![xdp("netlb_xdp")?, self.tc()?]) }
    }

    fn tc(&self) -> Result<Target> {
        Target::new("netlb_tc", Kind::Tc, self.netlb.descriptor(Program::Ingress)?)
    }

    /// Makes the flows of a case, and no others.
    pub(crate) fn open(&mut self, case: &Case, harness: &mut Harness) -> Result<()> {
        self.flush()?;
        let flows = 1 << case.flows_log2;
        let openings = case.openings();
        let opener = self.tc()?;
        harness.aim(&opener)?;
        for packets in &openings {
            harness.plan(packets)?;
            harness.run(opener.kind, packets, flows)?;
        }
        let made = self.netlb.programmer().count_flows(&FlowFilter::default());
        let wanted = if openings.is_empty() { 0 } else { u64::from(flows) };
        ensure!(made == wanted || self.is_lru, "{}: {made} flows instead of {wanted}", case.name);
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.is_lru {
            return self.netlb.clear_lru();
        }
        self.netlb.programmer_mut().flush_flows(&FlowFilter::default());
        Ok(())
    }

    /// All counters, to be compared with later ones.
    pub(crate) fn counters(&self) -> Vec<u64> {
        Counter::ALL.iter().map(|counter| self.netlb.counter(*counter)).collect()
    }

    /// Whether what was counted since is what such packets lead to: otherwise something else was measured.
    pub(crate) fn check(&self, before: &[u64], traffic: Traffic, packets: u32) -> Result<()> {
        let mut sent = 0;
        for (counter, (before, now)) in Counter::ALL.iter().zip(before.iter().zip(self.counters())) {
            let count = now - before;
            match counter {
                Counter::ToPeer | Counter::ToInterface | Counter::ToStack | Counter::SentByXdp => sent += count,
                Counter::FlowsCreated if traffic == Traffic::New => {
                    ensure!(count == u64::from(packets), "{count} flows of {packets} packets");
                }
                _ if count > 0 => bail!("{} is {count} after {packets} packets", counter.name()),
                _ => {}
            }
        }
        let wanted = if traffic == Traffic::Foreign { 0 } else { u64::from(packets) };
        ensure!(sent == wanted, "{sent} packets translated, not {wanted}");
        Ok(())
    }
}
