//! Packets at TC: translated and redirected, or translated and left to the kernel's routing.

use netlb_common::{
    addr::{Ipv4Be, Ipv6Be},
    balance::{Scope, Verdict},
    conntrack::Direction,
    counters::Counter,
    hop::Way,
    maps::{forwarding, log_level},
    wire::ethernet,
};

use crate::{
    DROP, NEXT,
    forward::{self, Outcome, Route},
    frame::{Frame as _, Skb},
    icmp,
    maps::{self, Work},
    pipeline::{self, Packet},
    rewrite::{Exit, rewrite},
    subprograms::{self, Hook as _},
};

/// Datagrams up to this length fit every way (RFC 791: every host takes them), so that only longer ones are asked about.
const ALWAYS_FITS: u16 = 576;

/// What a packet is answered for, beside the results of programs: nobody serves it; beyond that, datagrams may be only so long; and it is an
/// echo request. There is not stack enough to answer from below [`dispatch`].
pub(crate) const REJECT: i32 = 1 << 16;
pub(crate) const ECHO: i32 = 1 << 17;

#[inline(always)]
pub(crate) fn ingress(frame: &Skb) -> i32 {
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
pub(crate) fn egress(frame: &Skb) -> i32 {
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
fn receive<A: Packet>(frame: &Skb) -> i32
where
    Skb: subprograms::Hook<A>,
{
    let scope = if maps::forwarding() == forwarding::FAST { Scope::Both } else { Scope::Forward };
    let result = match pipeline::decide::<A, _>(frame, scope, |_| true) {
        (Verdict::Translate, Some(work)) => frame.dispatch(work),
        (Verdict::Wrap, Some(work)) => {
            account(frame, work);
            frame.wrap(work)
        }
        (Verdict::Drop, _) => DROP,
        (Verdict::Reject, _) => REJECT,
        (Verdict::Echo, _) => ECHO,
        _ => icmp::pass::<A>(frame, scope),
    };
    if result < REJECT { result } else { A::answer(frame, result) }
}

/// What the node sends has been routed already: its source changes, and nothing else.
#[inline(always)]
fn transmit<A: Packet>(frame: &Skb) -> i32
where
    Skb: subprograms::Hook<A>,
{
    match pipeline::decide::<A, _>(frame, Scope::Replies, |_| true) {
        (Verdict::Translate, Some(work)) => {
            account(frame, work);
            A::restore(frame, work)
        }
        (Verdict::Drop, _) => DROP,
        _ => icmp::pass::<A>(frame, Scope::Replies),
    }
}

#[inline(always)]
pub(crate) fn account<A: Packet>(frame: &Skb, work: &Work<A>) {
    pipeline::account(frame, &work.translation);
    if maps::log_level() >= log_level::DEBUG && work.translation.is_new {
        subprograms::log_flow(frame, work.translation.service);
    }
}

/// Rewrites a packet that the kernel sends.
#[inline(always)]
pub(crate) fn restore<A: Packet>(frame: &Skb, work: &Work<A>) -> i32 {
    match rewrite(frame, &work.packet, &work.translation, &Exit { ttl: work.packet.ttl, hardware: None }) {
        Ok(()) => NEXT,
        Err(_) => forward::refused(),
    }
}

/// Rewrites a packet and sends it on.
#[inline(always)]
pub(crate) fn dispatch<A: Packet>(frame: &Skb, work: &Work<A>) -> i32 {
    let Work { packet, translation, lookup } = work;
    // The kernel forwards nothing that comes in with an address of its own. A reply from the world, which is no service's, does not.
    let is_fast = maps::forwarding() == forwarding::FAST || (translation.has_snat && translation.service != 0);
    let len = frame.datagram_len(packet);
    let mut way = if is_fast { maps::way(translation.hop) } else { Way::NONE };
    let mut outcome = Outcome::Resolved;
    if is_fast && way.interface == 0 {
        way = forward::follow(translation.apply(&packet.tuple).destination, frame.interface(), lookup);
    }
    if way.interface == 0 || len > way.mtu {
        let (tuple, input) = (translation.apply(&packet.tuple), frame.interface());
        let mut route = Route::STACK;
        if is_fast || len > ALWAYS_FITS {
            route = forward::route(frame, packet, &tuple, input);
        }
        (way, outcome) = (route.way(), route.outcome);
        if is_fast {
            forward::keep(&route, tuple.destination, input, lookup);
        }
    }
    match outcome {
        Outcome::Resolved | Outcome::Unresolved if is_fast => {
            let ttl = if way.has(Way::BRIDGED) { packet.ttl } else { packet.ttl - 1 };
            account(frame, work);
            let hardware = forward::is_addressed(&way, outcome).then_some(&way.addresses);
            match rewrite(frame, packet, translation, &Exit { ttl, hardware }) {
                Ok(()) => forward::redirect(frame, &way, outcome),
                Err(_) => forward::refused(),
            }
        }
        Outcome::TooBig if packet.dont_fragment => REJECT + way.mtu as i32,
        Outcome::Nowhere => {
            maps::count(Counter::NoRoute);
            DROP
        }
        // The kernel could cut it, and refuses what comes in with an address of its own.
        Outcome::TooBig if translation.has_snat && translation.direction == Direction::Forward => {
            maps::count(Counter::SnatTooBig);
            DROP
        }
        // So it does with the service's address, if that is the node's. What it cuts is translated as it leaves.
        Outcome::TooBig if is_fast && !translation.has_snat && translation.direction == Direction::Reply => NEXT,
        _ => {
            account(frame, work);
            match rewrite(frame, packet, translation, &Exit { ttl: packet.ttl, hardware: None }) {
                Ok(()) => forward::to_stack(),
                Err(_) => forward::refused(),
            }
        }
    }
}
