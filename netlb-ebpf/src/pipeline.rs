//! What every hook does with a packet: parse, address filter, balance. What becomes of a translated one is the hook's.

use netlb_common::{
    addr::{Ipv4Be, Ipv6Be},
    balance::{self, Known, Lookup, Scope, Selection, Tables as _, Translation, Verdict},
    conntrack::Direction,
    counters::Counter,
    flow::{Parsed, Tuple},
    maps::role,
    snat::Snat,
    wire::{Ignore, Part},
};

use crate::{
    forward::{self, Outcome, Routable},
    frame::Frame,
    icmp::Errors,
    maps::{self, Kernel, Work},
    rewrite::{Rewrite, RewriteInPlace},
    subprograms::{Hook, Parts},
    too_big::Answer,
};

/// A family with all that packets need.
pub(crate) trait Packet: Rewrite + RewriteInPlace + Routable + Answer + Errors + Parts {}

impl Packet for Ipv4Be {}
impl Packet for Ipv6Be {}

/// What was read, or why not, in a counter.
#[inline(always)]
fn read<T>(result: Result<T, Ignore>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(why) => {
            match why {
                Ignore::Truncated | Ignore::Malformed => maps::count(Counter::Malformed),
                Ignore::NotIp | Ignore::NotTcpOrUdp => {}
            }
            None
        }
    }
}

/// What becomes of a packet. `can_leave_by` says whether the hook can send by a way with this index.
#[inline(always)]
pub(crate) fn decide<'a, A: Packet, F: Hook<A>>(
    frame: &F,
    scope: Scope,
    can_leave_by: impl Fn(u16) -> bool,
) -> (Verdict, Option<&'a mut Work<A>>) {
    const PASS: Verdict = Verdict::Pass;
    let Some((source, destination)) = read(A::addresses(frame)) else { return (PASS, None) };
    let Some(candidate) = balance::candidate(&Kernel, source, destination) else { return (PASS, None) };
    let Some(place) = maps::work::<A>() else { return (PASS, None) };
    let Some(packet) = read(A::parse(frame)) else { return (PASS, None) };
    // SAFETY: this CPU's; a field is written before it is read.
    let work = unsafe {
        (&raw mut (*place).packet).write(packet);
        &mut *maps::forget(place)
    };
    // The kernel says "time exceeded", of the packet as its sender knows it.
    if work.packet.ttl <= 1 && scope != Scope::Replies {
        maps::count(Counter::TtlExpired);
        return (PASS, None);
    }
    work.lookup =
        Lookup { fingerprint: Kernel.hash_key().fingerprint(&work.packet.tuple), now: maps::now(), candidate, scope };
    work.translation = Translation::none();
    if work.packet.part != Part::Whole {
        match frame.join(work) {
            Verdict::Translate => {}
            verdict => return (verdict, None),
        }
    }
    // SAFETY: the same reference.
    let work = unsafe { &mut *maps::forget(work) };
    let verdict = match balance::known(Kernel, &work.packet, &work.lookup, can_leave_by, &mut work.translation) {
        Known::Translate => Verdict::Translate,
        Known::Tend => {
            A::tend(work);
            Verdict::Translate
        }
        Known::No if scope == Scope::Replies => A::lost_reply(work),
        Known::Elsewhere => Verdict::Pass,
        Known::No => match A::select(work) {
            Selection::NONE => A::lost_reply(work),
            selection => frame.place(work, selection),
        },
    };
    (verdict, Some(work))
}

/// Makes the flow of a packet to a service.
#[inline(always)]
pub(crate) fn place<A: Packet, F: Hook<A>>(frame: &F, work: &mut Work<A>, selection: Selection) -> Verdict {
    let Work { packet, translation, lookup } = work;
    balance::place(Kernel, packet, lookup, selection, frame, translation)
}

/// Counts a translated packet.
#[inline(always)]
pub(crate) fn account<A: Packet>(frame: &impl Frame, translation: &Translation<A>) {
    let is_reply = translation.direction == Direction::Reply;
    maps::count_packets(translation.service, is_reply, frame.packets(), frame.len() as u64);
}

/// Whether the replies of a backend to this packet come back through this node. They do but for a packet from outside whose backend is
/// outside as well.
#[inline(always)]
pub(crate) fn returns_here<A: Packet>(frame: &impl Frame, packet: &Parsed<A>, backend: A) -> bool {
    let index = frame.interface();
    if maps::interface(index).is_none_or(|interface| interface.role != role::UPLINK) {
        return true;
    }
    let tuple = Tuple { destination: backend, ..packet.tuple };
    let route = forward::route(frame, packet, &tuple, index);
    !matches!(route.outcome, Outcome::Resolved | Outcome::Unresolved)
        || maps::interface(route.interface).is_none_or(|interface| interface.role != role::UPLINK)
}

/// The index of the address of the node that a flow to a backend gets as its source; 0 if there is none.
#[inline(always)]
pub(crate) fn address<A: Packet>(frame: &impl Frame, packet: &Parsed<A>, backend: u32) -> u32 {
    let Some(backend) = Kernel.backend(backend) else { return 0 };
    let mut tuple = packet.tuple;
    (tuple.destination, tuple.destination_port) = (A::from_map(backend.addr), backend.port);
    match forward::preferred_source(frame, &tuple) {
        Some(source) if source.is_routable() => maps::keep_source(source.to_map()),
        _ => 0,
    }
}

/// One attempt at a port of that address. `number` has the address's index in its upper half, and counts attempts in its lower one.
#[inline(always)]
pub(crate) fn attempt<A: Packet>(
    frame: &impl Frame,
    packet: &Parsed<A>,
    lookup: &Lookup,
    backend: u32,
    number: u32,
) -> Snat {
    let Some(backend) = Kernel.backend(backend) else { return Snat::NONE };
    let number = (number >> 16, number & 0xffff);
    balance::attempt(Kernel, packet, lookup, backend, number, |reply| forward::has_socket(frame, reply))
}
