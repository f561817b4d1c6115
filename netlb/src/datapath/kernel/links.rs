//! The programs on interfaces.

use std::{collections::BTreeSet, fs, io, os::fd::AsFd as _, path::Path};

use anyhow::{Context as _, bail};
use aya::Ebpf;
use netlb_common::{
    hop::{self, Hop},
    maps::{Interface, role},
};

use super::{
    clsact::Clsact,
    directory::Interfaces,
    load::{Memory, Program, program_name},
    mapping::Mapping,
    maps::mapped,
    pins::{Pins, ignore_missing},
    sockets,
    syscall::{self, Direction, Order, XdpMode},
};
use crate::{
    config::{Attach, Forwarding, Node, TcxOrder, Xdp},
    interfaces::{Attached, Hooks},
};

/// Attaches the programs.
pub(super) struct Attacher {
    pins: Pins,
    interfaces: Interfaces,
    hops: Mapping<Hop>,
    ingress: Program,
    egress: Program,
    way: Way,
    /// The program for uplinks, if they get one.
    xdp: Option<(Program, XdpMode)>,
    /// A link takes the kernel an RCU grace period, so that the second is some milliseconds behind the first, and a new pod's packets may
    /// come in between.
    sequence: [Direction; 2],
}

/// The kernel interface programs are attached through.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Tcx(Order),
    Clsact,
}

impl Attacher {
    pub(super) fn new(ebpf: &Ebpf, memory: &Memory, pins: Pins, node: &Node) -> anyhow::Result<Self> {
        let order = match node.tcx_order {
            TcxOrder::First => Order::First,
            TcxOrder::Last => Order::Last,
        };
        let way = match (node.attach, syscall::has_tcx()) {
            (Attach::Auto | Attach::Tcx, true) => Way::Tcx(order),
            (Attach::Auto, false) | (Attach::Clsact, _) => Way::Clsact,
            (Attach::Tcx, false) => {
                bail!("this kernel has no TCX (since Linux 6.6); set node.attach to \"auto\" or \"clsact\"");
            }
        };
        pins.create().context("cannot make directories for links")?;
        Ok(Self {
            pins,
            interfaces: Interfaces::new(memory)?,
            hops: mapped(memory, "HOPS", hop::COUNT)?,
            ingress: Program::new(ebpf, Direction::Ingress)?,
            egress: Program::new(ebpf, Direction::Egress)?,
            way,
            xdp: match node.xdp {
                Xdp::Off => None,
                Xdp::Native => Some((Program::new_xdp(ebpf)?, XdpMode::Native)),
                Xdp::Generic => Some((Program::new_xdp(ebpf)?, XdpMode::Generic)),
            },
            sequence: match node.forwarding {
                // All that most pods need.
                Forwarding::Fast => [Direction::Ingress, Direction::Egress],
                // A request that goes out must find its reply translated.
                Forwarding::Stack => [Direction::Egress, Direction::Ingress],
            },
        })
    }

    const fn program(&self, direction: Direction) -> &Program {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    /// Makes sure that a link with our program is on the interface, and says whether it is a new one.
    fn link(&self, index: u32, direction: Direction, order: Order) -> io::Result<bool> {
        let path = self.pins.link(index, direction, order);
        let program = self.program(direction);
        match syscall::open_pin(&path) {
            Ok(link) => {
                let info = syscall::link_info(link.as_fd())?;
                // The pin of an interface that is gone, or that moved to another network namespace, outlives it.
                if info.index == index && syscall::tcx_links(index, direction)?.contains(&info.id) {
                    if info.program != program.id {
                        syscall::update_link(link.as_fd(), program.fd.as_fd())?;
                    }
                    return Ok(false);
                }
                fs::remove_file(&path)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let link = syscall::create_tcx_link(program.fd.as_fd(), index, direction, order)
            .map_err(|error| io::Error::new(error.kind(), format!("TCX {}: {error}", direction.name())))?;
        syscall::pin(link.as_fd(), &path)?;
        Ok(true)
    }

    fn link_both(&self, index: u32, order: Order) -> io::Result<()> {
        let [first, second] = self.sequence;
        let is_new = self.link(index, first, order)?;
        self.link(index, second, order).map(drop).inspect_err(|_| {
            // Half of us is worse than none.
            if is_new && let Err(error) = unpin(&self.pins.link(index, first, order)) {
                tracing::warn!("cannot detach from {} of interface {index}: {error}", first.name());
            }
        })?;
        // Of a netlb that was to have another place. It goes last, so that no packet goes without a program: what one of ours has
        // translated is no other one's.
        for direction in self.sequence {
            for other in Order::BOTH.into_iter().filter(|other| *other != order) {
                unpin(&self.pins.link(index, direction, other))?;
            }
        }
        Ok(())
    }

    /// Makes sure that uplinks have the XDP program, if they are to have one, and others not. Says whether it is there.
    fn link_xdp(&mut self, index: u32) -> io::Result<bool> {
        let role = self.interfaces.get(index).map(|interface| interface.role);
        let wanted = self.xdp.as_ref().filter(|_| role == Some(role::UPLINK));
        // First, because the kernel refuses two modes at once. TC has the packets meanwhile.
        for other in XdpMode::BOTH.into_iter().filter(|other| wanted.is_none_or(|(_, mode)| mode != other)) {
            unpin(&self.pins.xdp_link(index, other))?;
        }
        let Some((program, mode)) = wanted else { return Ok(false) };
        let path = self.pins.xdp_link(index, *mode);
        match syscall::open_pin(&path) {
            Ok(link) => {
                let info = syscall::link_info(link.as_fd())?;
                if info.index == index {
                    if info.program != program.id {
                        syscall::update_link(link.as_fd(), program.fd.as_fd())?;
                    }
                    return Ok(true);
                }
                fs::remove_file(&path)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let link = syscall::create_xdp_link(program.fd.as_fd(), index, *mode)?;
        syscall::pin(link.as_fd(), &path)?;
        Ok(true)
    }

    /// Tells the programs whether XDP can send out of an interface.
    fn announce_xdp(&mut self, index: u32, has_xdp: bool) -> io::Result<()> {
        let Some(mut interface) = self.interfaces.get(index) else { return Err(io::ErrorKind::NotFound.into()) };
        if (interface.flags & Interface::XDP != 0) != has_xdp {
            interface.flags ^= Interface::XDP;
            self.interfaces.set(index, interface)?;
        }
        Ok(())
    }

    fn filter(&self, index: u32) -> io::Result<()> {
        let mut clsact = Clsact::new()?;
        clsact.add_qdisc(index)?;
        for direction in self.sequence {
            clsact.set_filter(index, direction, program_name(direction), self.program(direction).fd.as_fd())?;
        }
        Ok(())
    }

    fn filter_both(&self, index: u32) -> io::Result<()> {
        let is_new = !self.pins.has_filters(index);
        // Before there is anything to be forgotten.
        self.pins.note_filters(index)?;
        self.filter(index).inspect_err(|_| {
            // As with links.
            if is_new && let Err(error) = remove_filters(&self.pins, index) {
                tracing::warn!("cannot detach from interface {index}: {error}");
            }
        })
    }
}

impl Hooks for Attacher {
    fn known(&self) -> BTreeSet<u32> {
        let mut known = BTreeSet::new();
        for found in [self.pins.linked(), self.pins.filtered()] {
            match found {
                Ok(indexes) => known.extend(indexes),
                Err(error) => tracing::warn!("cannot look for links of a netlb before this one: {error}"),
            }
        }
        known.extend(self.interfaces.indexes());
        known
    }

    fn announce(&mut self, index: u32, mut interface: Interface) -> io::Result<()> {
        if let Some(before) = self.interfaces.get(index) {
            interface.flags |= before.flags & Interface::XDP;
        }
        self.interfaces.set(index, interface)
    }

    fn withdraw(&mut self, index: u32) -> io::Result<()> {
        self.interfaces.remove(index);
        Ok(())
    }

    fn attach(&mut self, index: u32) -> io::Result<Attached> {
        match self.way {
            Way::Tcx(order) => {
                self.link_both(index, order)?;
                remove_filters(&self.pins, index)?;
            }
            Way::Clsact => {
                self.filter_both(index)?;
                for direction in Direction::BOTH {
                    unlink(&self.pins, index, direction)?;
                }
            }
        }
        // What XDP does not do, TC does.
        let (has_xdp, problem) = match self.link_xdp(index) {
            Ok(has_xdp) => (has_xdp, None),
            Err(error) => (false, Some(format!("XDP: {error}; its packets are treated at TC"))),
        };
        self.announce_xdp(index, has_xdp)?;
        let hook = match (self.way, has_xdp) {
            (Way::Tcx(_), false) => "tcx",
            (Way::Tcx(_), true) => "xdp, tcx",
            (Way::Clsact, false) => "clsact",
            (Way::Clsact, true) => "xdp, clsact",
        };
        Ok(Attached { hook, problem })
    }

    fn detach(&mut self, index: u32) -> io::Result<()> {
        detach(&self.pins, index)
    }

    fn forget_ways(&mut self) {
        (0..hop::COUNT).for_each(|index| self.hops.at(index).forget());
    }
}

/// Takes everything off an interface, which may be gone. Requests first.
fn detach(pins: &Pins, index: u32) -> io::Result<()> {
    for mode in XdpMode::BOTH {
        unpin(&pins.xdp_link(index, mode))?;
    }
    for direction in Direction::BOTH {
        unlink(pins, index, direction)?;
    }
    remove_filters(pins, index)
}

fn unlink(pins: &Pins, index: u32, direction: Direction) -> io::Result<()> {
    Order::BOTH.into_iter().try_for_each(|order| unpin(&pins.link(index, direction, order)))
}

/// Ends a pinned link, if there is one.
pub(super) fn unpin(path: &Path) -> io::Result<()> {
    match syscall::open_pin(path) {
        // A link ends with its last reference, but some time after it, and somebody else may hold one. With its interface it is gone
        // already, which is an error that says nothing.
        Ok(link) => drop(syscall::detach_link(link.as_fd())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    ignore_missing(fs::remove_file(path))
}

fn remove_filters(pins: &Pins, index: u32) -> io::Result<()> {
    if !pins.has_filters(index) {
        return Ok(());
    }
    let mut clsact = Clsact::new()?;
    for direction in Direction::BOTH {
        clsact.remove_filter(index, direction, program_name(direction))?;
    }
    pins.forget_filters(index)
}

/// Takes netlb off all interfaces and off the cgroup, with no daemon running. Filters are found in the network namespace they were made in only.
pub(crate) fn detach_all(bpffs: &Path) -> anyhow::Result<()> {
    let pins = Pins::new(bpffs);
    for index in [pins.linked()?, pins.filtered()?].concat() {
        detach(&pins, index).with_context(|| format!("cannot detach from interface {index}"))?;
    }
    sockets::detach(&pins).context("cannot detach from the cgroup")?;
    Ok(())
}
