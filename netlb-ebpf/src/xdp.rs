//! Packets at XDP: those that leave by a device again are translated in place and sent, before the kernel makes a buffer for them.
//!
//! Everything else goes up to TC untouched, which finds the flow where XDP has made it: packets for pods, packets too long for their way,
//! and packets whose checksum the sender left to a device.

use aya_ebpf::{bindings::xdp_action::XDP_TX, helpers::bpf_redirect};
use netlb_common::{
    addr::{Ipv4Be, Ipv6Be},
    balance::{Scope, Verdict},
    counters::Counter,
    hop::{BY_XDP, Way},
    wire::ethernet,
};

use crate::{
    forward::{self, Outcome},
    frame::{Frame, Xdp},
    maps::{self, Work},
    pipeline::{self, Packet},
    rewrite::rewrite_in_place,
    subprograms::Hook,
};

#[inline(always)]
pub(crate) fn receive(frame: &Xdp) -> i32 {
    match ethernet::ether_type(frame) {
        Ok(ethernet::IPV4) => balance::<Ipv4Be>(frame),
        Ok(ethernet::IPV6) => balance::<Ipv6Be>(frame),
        _ => Xdp::PASS,
    }
}

#[inline(always)]
fn balance<A: Packet>(frame: &Xdp) -> i32
where
    Xdp: Hook<A>,
{
    match pipeline::decide::<A, _>(frame, Scope::Both, |hop| hop & BY_XDP != 0) {
        (Verdict::Translate, Some(work)) => frame.dispatch(work),
        (Verdict::Wrap, Some(work)) => frame.wrap(work),
        (Verdict::Drop, _) => Xdp::DROP,
        _ => Xdp::PASS,
    }
}

/// Rewrites a packet and sends it on.
#[inline(always)]
pub(crate) fn dispatch<A: Packet>(frame: &Xdp, work: &Work<A>) -> i32 {
    let Work { packet, translation, lookup } = work;
    let mut way = maps::way(translation.hop);
    let input = frame.interface();
    if way.interface == 0 {
        let tuple = translation.apply(&packet.tuple);
        way = forward::follow(tuple.destination, input, lookup);
        if way.interface == 0 {
            let route = forward::route(frame, packet, &tuple, input);
            way = if route.outcome == Outcome::Resolved { route.way() } else { Way::NONE };
            forward::keep(&route, tuple.destination, input, lookup);
        }
    }
    if !way.has(Way::XDP) || frame.datagram_len(packet) > way.mtu {
        return Xdp::PASS;
    }
    if rewrite_in_place(frame, packet, translation, &way).is_err() {
        return Xdp::PASS;
    }
    pipeline::account(frame, translation);
    send(&way, input)
}

/// Sends a frame that came in by `input`.
#[inline(always)]
pub(crate) fn send(way: &Way, input: u32) -> i32 {
    maps::count(Counter::SentByXdp);
    if way.interface == input {
        return XDP_TX as i32;
    }
    // SAFETY: plain integers.
    unsafe { bpf_redirect(way.interface, 0) as i32 }
}
