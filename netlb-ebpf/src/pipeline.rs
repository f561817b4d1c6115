//! What every hook does with a packet: parse, address filter, balance. What becomes of a translated one is the hook's.

use netlb_common::{
    addr::{Address, Ipv4Be, Ipv6Be},
    balance::{self, Known, Lookup, Reach, Scope, Selection, Tables as _, Translation, Unclaimed, Verdict},
    conntrack::Direction,
    counters::Counter,
    flow::{Parsed, Tuple},
    maps::{Backend, Config, address, role},
    relay::Relays,
    snat::{self, Snat},
    stray::{Stray, Strays},
    time::Ticks,
    wire::{Ignore, Part},
};

use crate::{
    answer::Answer,
    forward::{self, NoSource, Routable},
    frame::{Frame, Skb},
    icmp::Errors,
    maps::{self, Kernel, Work},
    rewrite::{Rewrite, RewriteInPlace},
    subprograms::{self, Hook, Parts},
    tunnel::Wrapping,
};

/// A family with all that packets need.
pub(crate) trait Packet:
    Rewrite + RewriteInPlace + Routable + Answer + Errors + Strays + Wrapping + Relays + Parts
{
}

impl Packet for Ipv4Be {}
impl Packet for Ipv6Be {}

/// Counts why a packet was not read.
#[inline(always)]
fn note(why: Ignore) {
    match why {
        Ignore::Truncated | Ignore::Malformed => maps::count(Counter::Malformed),
        Ignore::NotIp | Ignore::NotTcpOrUdp => {}
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
    let (source, destination) = match A::addresses(frame) {
        Ok(addresses) => addresses,
        Err(why) => {
            note(why);
            return (PASS, None);
        }
    };
    let Some(candidate) = balance::candidate(&Kernel, scope, source, destination) else { return (PASS, None) };
    let Some(place) = maps::work::<A>() else { return (PASS, None) };
    let packet = match A::parse(frame) {
        Ok(packet) => packet,
        Err(Ignore::NotTcpOrUdp) if scope != Scope::Replies && maps::has_owned() => return (frame.stray(), None),
        Err(why) => {
            note(why);
            return (PASS, None);
        }
    };
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
    // Kept here as well: what is looked up need not be read again.
    let mut lookup =
        Lookup { fingerprint: Kernel.hash_key().fingerprint(&work.packet.tuple), now: maps::now(), candidate, scope };
    work.lookup = lookup;
    work.translation = Translation::none();
    if work.packet.part != Part::Whole {
        match frame.join(work) {
            Verdict::Translate => lookup.fingerprint = work.lookup.fingerprint,
            verdict => return (verdict, None),
        }
    }
    // SAFETY: the same reference.
    let work = unsafe { &mut *maps::forget(work) };
    let verdict = match balance::known(Kernel, &work.packet, &lookup, can_leave_by, &mut work.translation) {
        Known::Translate => Verdict::Translate,
        Known::Tend => {
            A::tend(work);
            Verdict::Translate
        }
        Known::Wrap => Verdict::Wrap,
        Known::No if scope == Scope::Replies => match lost_reply(frame, work) {
            Verdict::Pass if maps::has_masquerade() && work.lookup.candidate.is_masqueraded => frame.masquerade(work),
            verdict => verdict,
        },
        Known::Elsewhere => Verdict::Pass,
        Known::No => match A::select(work, frame.interface()) {
            Selection::NONE => match lost_reply(frame, work) {
                Verdict::Pass if maps::has_owned() => match A::unclaimed(work) {
                    Verdict::Reject => reject::<F>(Counter::UnknownPort),
                    verdict => verdict,
                },
                verdict => verdict,
            },
            Selection::NOBODY => reject::<F>(Counter::NoBackend),
            Selection::UNWANTED => Verdict::Drop,
            selection => match begin(frame, work, selection) {
                verdict @ (Verdict::Translate | Verdict::Wrap) if selection.is_affine() => {
                    A::remember(work);
                    verdict
                }
                Verdict::Reject => reject::<F>(Counter::NoBackend),
                Verdict::Exhausted => reject::<F>(Counter::SnatExhausted),
                verdict => verdict,
            },
        },
    };
    (verdict, Some(work))
}

/// What becomes of a packet that is no flow's: it may be a reply whose slot was lost.
#[inline(always)]
fn lost_reply<A: Packet, F: Hook<A>>(frame: &F, work: &mut Work<A>) -> Verdict {
    match A::lost_reply(work) {
        Verdict::Lost => frame.lost(work),
        verdict => verdict,
    }
}

/// What becomes of a reply of which nobody knows any more whose it is.
#[inline(always)]
pub(crate) fn lost<A: Packet>(frame: &impl Frame, packet: &Parsed<A>) -> Verdict {
    if forward::has_socket(frame, &packet.tuple) {
        return Verdict::Pass;
    }
    maps::count(Counter::SnatLost);
    Verdict::Drop
}

/// Makes the flow of a packet to a service: with another source if it cannot be told from one that there is.
#[inline(always)]
fn begin<A, F: Hook<A>>(frame: &F, work: &mut Work<A>, selection: Selection) -> Verdict {
    let mut verdict = frame.place(work, selection);
    if verdict == Verdict::Conflict {
        verdict = frame.place(work, selection.with_another_source());
    }
    if verdict == Verdict::Conflict {
        maps::count(Counter::FlowConflict);
        verdict = Verdict::Drop;
    }
    verdict
}

/// Counted by the hook that answers.
#[inline(always)]
fn reject<F: Frame>(why: Counter) -> Verdict {
    if F::ANSWERS {
        maps::count(why);
    }
    Verdict::Reject
}

/// What becomes of a packet that is no flow's and to no frontend.
#[inline(always)]
pub(crate) fn unclaimed<A: Packet>(packet: &Parsed<A>) -> Verdict {
    match balance::unclaimed(&Kernel, packet.tuple.destination.to_map()) {
        Unclaimed::Elsewhere => Verdict::Pass,
        Unclaimed::Service => Verdict::Reject,
        Unclaimed::Nobody => {
            maps::count(Counter::OwnedUnknown);
            Verdict::Drop
        }
    }
}

/// The same of one that is neither TCP nor UDP.
#[inline(always)]
pub(crate) fn stray<A: Packet>(frame: &impl Frame) -> Verdict {
    let Ok((source, destination)) = A::addresses(frame) else { return Verdict::Pass };
    let unclaimed = balance::unclaimed(&Kernel, destination.to_map());
    if unclaimed == Unclaimed::Elsewhere {
        return Verdict::Pass;
    }
    match A::stray(frame) {
        Err(_) | Ok(Stray::Signal) => Verdict::Pass,
        Ok(_) if unclaimed == Unclaimed::Nobody => {
            maps::count(Counter::OwnedUnknown);
            Verdict::Drop
        }
        Ok(Stray::EchoRequest) if maps::answers_echo() && source.is_answerable() => Verdict::Echo,
        Ok(_) => Verdict::Pass,
    }
}

/// Whether packets with a source that come in on an interface are from outside: neither of a pod of this node nor of the node itself.
#[inline(always)]
pub(crate) fn is_from_outside(interface: u32, source: impl Address) -> bool {
    let role = maps::interface(interface).map_or(0, |interface| interface.role);
    role != role::POD && role != role::BRIDGE && !(maps::has_pods() && subprograms::is_pod(source.to_map()))
}

/// Makes the flow of a packet to a service.
#[inline(always)]
pub(crate) fn place<A: Packet, F: Hook<A>>(frame: &F, work: &mut Work<A>, selection: Selection) -> Verdict {
    let Work { packet, translation, lookup } = work;
    balance::place(Kernel, packet, lookup, selection, frame, translation)
}

/// Makes the flow of a packet of no service that leaves with an address of the node as its source.
#[inline(always)]
pub(crate) fn masquerade<A: Packet>(frame: &Skb, work: &mut Work<A>) -> Verdict
where
    Skb: Reach<A>,
{
    // There it would be what the network knows it by.
    if maps::interface(frame.interface()).is_none_or(|interface| interface.role != role::UPLINK) {
        return Verdict::Pass;
    }
    let Work { packet, translation, lookup } = work;
    balance::masquerade(Kernel, packet, lookup, frame, translation)
}

/// Counts a translated packet.
#[inline(always)]
pub(crate) fn account<A: Packet>(frame: &impl Frame, translation: &Translation<A>) {
    let is_reply = translation.direction == Direction::Reply;
    maps::count_packets(translation.service, is_reply, frame.packets(), frame.len() as u64);
}

/// Whether a packet's flow must have an address of the node as its source at a backend, or is to be wrapped for it, as [`NEEDS_SNAT`] and
/// [`NEEDS_WRAP`] say it; else 0.
#[inline(always)]
pub(crate) fn needs_snat<A: Packet>(
    frame: &impl Frame,
    packet: &Parsed<A>,
    now: Ticks,
    backend: &Backend,
    flags: u32,
) -> u32 {
    let interface = frame.interface();
    let is_outside = is_from_outside(interface, packet.tuple.source);
    let needs = balance::needs_snat(packet, backend, flags, is_outside, |backend| {
        // Replies come back through this node but for a packet from outside whose backend is outside as well, or one that the world is not to
        // see the source of.
        if !is_outside && !Kernel.is_masqueraded(packet.tuple.source.to_map(), backend.to_map()) {
            return true;
        }
        let tuple = Tuple { destination: backend, ..packet.tuple };
        let out = forward::way_out(frame, &tuple, interface, now);
        maps::interface(out).is_none_or(|interface| interface.role != role::UPLINK)
    });
    // With a source that is wanted in any case, there was a conflict: nothing that is wrapped has one.
    let is_wrapped = flags & (Config::DSR | Config::SNAT_OUTSIDE) == Config::DSR
        && is_outside
        && A::from_map(backend.addr) != packet.tuple.source;
    match needs {
        false => 0,
        true if is_wrapped => NEEDS_WRAP,
        true => NEEDS_SNAT,
    }
}

pub(crate) const NEEDS_SNAT: u32 = 1;
pub(crate) const NEEDS_WRAP: u32 = 2;

/// What [`address`] says of a backend that is this very node: it would take a packet with an address of its own for forged, and its replies
/// pass egress anyhow.
pub(crate) const IS_NODE: u32 = u32::MAX;

/// The index of the `n`-th address of the node that a flow to a backend, or to the world, may get as its source; 0 if there is none.
#[inline(always)]
pub(crate) fn address<A: Packet>(frame: &impl Frame, packet: &Parsed<A>, now: Ticks, backend: u32, n: u32) -> u32 {
    let mut tuple = packet.tuple;
    let is_sent = backend == 0;
    if !is_sent {
        let Some(backend) = Kernel.backend(backend) else { return 0 };
        (tuple.destination, tuple.destination_port) = (A::from_map(backend.addr), backend.port);
    }
    if maps::pool_len::<A>() != 0 {
        if Kernel.address(tuple.destination.to_map()) & address::NODE != 0 {
            return IS_NODE;
        }
        let hash = snat::hash(tuple.source, tuple.source_port) >> 32;
        return maps::pooled::<A>(hash as u32, n).map_or(0, maps::keep_source);
    }
    if n > 0 {
        return 0;
    }
    let input = frame.interface();
    if !is_sent {
        let known = maps::lead_source(tuple.destination, input, now);
        if known != 0 {
            return known;
        }
    }
    match forward::preferred_source(frame, &tuple, is_sent) {
        Ok((source, is_direct)) if source.is_routable() => {
            let index = maps::keep_source(source.to_map());
            if is_direct && !is_sent {
                maps::set_lead_source(tuple.destination, input, index, now);
            }
            index
        }
        Err(NoSource::Local) => IS_NODE,
        _ if Kernel.address(tuple.destination.to_map()) & address::NODE != 0 => IS_NODE,
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
    let number = (number >> 16, number & 0xffff);
    balance::attempt(Kernel, packet, lookup, backend, number, |reply| forward::has_socket(frame, reply))
}
