//! The way of a packet through a hook: parse, address filter, balance, route, rewrite, send.

use netlb_common::{
    addr::{Ipv4Be, Ipv6Be, PortBe},
    balance::{self, Known, Lookup, Scope, Selection, Tables as _, Translation, Verdict},
    conntrack::Direction,
    counters::Counter,
    flow::Parsed,
    maps::{forwarding, log_level, role},
    wire::{Ignore, ethernet},
};

use crate::{
    DROP, NEXT,
    forward::{self, Routable, Route, Way},
    frame::Frame,
    maps::{self, Kernel, Work},
    rewrite::{Rewrite, rewrite},
    subprograms::{self, Parts},
    too_big::{self, Answer},
};

/// Datagrams up to this length fit every way (RFC 791: every host takes them), so that only longer ones are asked about.
const ALWAYS_FITS: u16 = 576;

/// A family with all that packets need.
pub(crate) trait Packet: Rewrite + Routable + Answer + Parts {}

impl Packet for Ipv4Be {}
impl Packet for Ipv6Be {}

#[inline(always)]
pub(crate) fn ingress(frame: &Frame) -> i32 {
    if frame.is_tagged() {
        return NEXT;
    }
    frame.pull_headers();
    match ethernet::ether_type(frame) {
        Ok(ethernet::IPV4) => receive::<Ipv4Be>(frame),
        Ok(ethernet::IPV6) => receive::<Ipv6Be>(frame),
        _ => NEXT,
    }
}

#[inline(always)]
pub(crate) fn egress(frame: &Frame) -> i32 {
    if frame.is_tagged() {
        return NEXT;
    }
    frame.pull_headers();
    match ethernet::ether_type(frame) {
        Ok(ethernet::IPV4) => transmit::<Ipv4Be>(frame),
        Ok(ethernet::IPV6) => transmit::<Ipv6Be>(frame),
        _ => NEXT,
    }
}

#[inline(always)]
fn parse<A: Packet>(frame: &Frame) -> Option<Parsed<A>> {
    match A::parse(frame) {
        Ok(packet) => Some(packet),
        Err(why) => {
            match why {
                Ignore::Fragment => maps::count(Counter::Fragment),
                Ignore::Truncated | Ignore::Malformed => maps::count(Counter::Malformed),
                Ignore::NotIp | Ignore::NotTcpOrUdp => {}
            }
            None
        }
    }
}

#[inline(always)]
fn receive<A: Packet>(frame: &Frame) -> i32 {
    let scope = if maps::forwarding() == forwarding::FAST { Scope::Both } else { Scope::Forward };
    match decide::<A>(frame, scope) {
        (Verdict::Translate, Some(work)) => A::dispatch(frame, work),
        (Verdict::Drop, _) => DROP,
        _ => NEXT,
    }
}

/// What the node sends has been routed already: its source changes, and nothing else.
#[inline(always)]
fn transmit<A: Packet>(frame: &Frame) -> i32 {
    match decide::<A>(frame, Scope::Replies) {
        (Verdict::Translate, Some(work)) => A::restore(frame, work),
        (Verdict::Drop, _) => DROP,
        _ => NEXT,
    }
}

/// What becomes of a packet.
#[inline(always)]
fn decide<'a, A: Packet>(frame: &Frame, scope: Scope) -> (Verdict, Option<&'a mut Work<A>>) {
    const PASS: Verdict = Verdict::Pass;
    let Some(place) = maps::work::<A>() else { return (PASS, None) };
    let Some(packet) = parse::<A>(frame) else { return (PASS, None) };
    // SAFETY: this CPU's; a field is written before it is read.
    let work = unsafe {
        (&raw mut (*place).packet).write(packet);
        &mut *maps::forget(place)
    };
    let Some(candidate) = balance::candidate(&Kernel, &work.packet.tuple) else { return (PASS, None) };
    // The kernel says "time exceeded", of the packet as its sender knows it.
    if work.packet.ttl <= 1 && scope != Scope::Replies {
        maps::count(Counter::TtlExpired);
        return (PASS, None);
    }
    work.lookup =
        Lookup { fingerprint: Kernel.hash_key().fingerprint(&work.packet.tuple), now: maps::now(), candidate, scope };
    work.translation = Translation::none();
    // SAFETY: the same reference.
    let work = unsafe { &mut *maps::forget(work) };
    let verdict = match balance::known(Kernel, &work.packet, &work.lookup, &mut work.translation) {
        Known::Translate => Verdict::Translate,
        Known::Tend => {
            A::tend(work);
            Verdict::Translate
        }
        Known::No if scope == Scope::Replies => A::lost_reply(work),
        Known::Elsewhere => Verdict::Pass,
        Known::No => match A::select(work) {
            Selection::NONE => A::lost_reply(work),
            selection => A::place(frame, work, selection),
        },
    };
    if verdict == Verdict::Translate {
        account(frame, &work.translation);
    }
    (verdict, Some(work))
}

/// Makes the flow of a packet to a service.
#[inline(always)]
pub(crate) fn place<A: Packet>(frame: &Frame, work: &mut Work<A>, selection: Selection) -> Verdict {
    let Work { packet, translation, lookup } = work;
    let admits = |backend: A| A::returns_here(frame, packet, backend);
    balance::place(Kernel, packet, lookup, selection, admits, translation)
}

#[inline(always)]
fn account<A: Packet>(frame: &Frame, translation: &Translation<A>) {
    let is_reply = translation.direction == Direction::Reply;
    maps::count_packets(translation.service, is_reply, frame.packets(), frame.len() as u64);
    if maps::log_level() >= log_level::DEBUG && translation.is_new {
        subprograms::log_flow(frame, translation.service);
    }
}

/// Whether the replies of a backend to this packet come back through this node. They do but for a packet from outside whose backend is
/// outside as well.
#[inline(always)]
pub(crate) fn returns_here<A: Packet>(frame: &Frame, packet: &Parsed<A>, backend: A) -> bool {
    let index = frame.interface();
    if maps::interface(index).is_none_or(|interface| interface.role != role::UPLINK) {
        return true;
    }
    let tuple = &packet.tuple;
    let client = (tuple.source, tuple.source_port);
    let route = forward::route(frame, packet, client, (backend, tuple.destination_port), index);
    !matches!(route.way, Way::Resolved | Way::Unresolved)
        || maps::interface(route.interface).is_none_or(|interface| interface.role != role::UPLINK)
}

/// Rewrites a packet that the kernel sends.
#[inline(always)]
pub(crate) fn restore<A: Packet>(frame: &Frame, work: &Work<A>) -> i32 {
    match rewrite(frame, &work.packet, &work.translation, work.packet.ttl) {
        Ok(()) => NEXT,
        Err(_) => forward::refused(),
    }
}

/// Rewrites a packet and sends it on.
#[inline(always)]
pub(crate) fn dispatch<A: Packet>(frame: &Frame, work: &Work<A>) -> i32 {
    let Work { packet, translation, .. } = work;
    let is_fast = maps::forwarding() == forwarding::FAST;
    let mut route = Route::STACK;
    let mut input = frame.interface();
    let mut is_port = false;
    if is_fast || forward::datagram_len(frame, packet) > ALWAYS_FITS {
        if let Some(interface) = maps::interface(input)
            && interface.master != 0
        {
            (input, is_port) = (interface.master, true);
        }
        let (source, destination) = ends(packet, translation);
        route = forward::route(frame, packet, source, destination, input);
    }
    match route.way {
        Way::Resolved | Way::Unresolved if is_fast => {
            // Within one bridge it is not forwarded.
            let ttl = if is_port && route.interface == input { packet.ttl } else { packet.ttl - 1 };
            match rewrite(frame, packet, translation, ttl) {
                Ok(()) => forward::send(frame, &route),
                Err(_) => forward::refused(),
            }
        }
        Way::TooBig if packet.dont_fragment => too_big::answer(frame, packet, route.mtu),
        Way::Nowhere => {
            maps::count(Counter::NoRoute);
            DROP
        }
        _ => match rewrite(frame, packet, translation, packet.ttl) {
            Ok(()) => forward::to_stack(),
            Err(_) => forward::refused(),
        },
    }
}

/// Source and destination after the translation.
#[inline(always)]
fn ends<A: Packet>(packet: &Parsed<A>, translation: &Translation<A>) -> ((A, PortBe), (A, PortBe)) {
    let tuple = &packet.tuple;
    let new = (translation.address, translation.port);
    match translation.direction {
        Direction::Forward => ((tuple.source, tuple.source_port), new),
        Direction::Reply => (new, (tuple.destination, tuple.destination_port)),
    }
}
