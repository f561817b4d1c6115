//! Wrapping at XDP. What it cannot send goes up to TC as it came.

use netlb_common::{
    counters::Counter,
    flow::NETWORK,
    hop::Way,
    wire::{PacketBytes as _, ethernet},
};

use super::question;
use crate::{
    forward::{self, Outcome},
    frame::{Frame, Xdp},
    maps::{self, Work},
    pipeline::Packet,
    rewrite::is_partial,
    xdp::send,
};

/// Wraps a packet and sends it on.
#[inline(always)]
pub(crate) fn wrap<A: Packet>(frame: &Xdp, work: &Work<A>) -> i32 {
    let Work { packet, translation, lookup } = work;
    let (source, destination) = (translation.other, translation.address);
    let len = frame.datagram_len(packet).saturating_add(A::HEADER_LEN as u16);
    let input = frame.interface();
    let mut way = maps::way(translation.hop);
    if way.interface == 0 {
        way = forward::follow(destination, input, lookup);
    }
    if way.interface == 0 {
        let route = forward::route_datagram(frame, len, &question(source, destination), input);
        way = if route.outcome == Outcome::Resolved { route.way() } else { Way::NONE };
        forward::keep(&route, destination, input, lookup);
    }
    if !way.has(Way::XDP) || len > way.mtu {
        return Xdp::PASS;
    }
    let Ok(headers) = frame.window_mut(0, NETWORK + A::HEADER_LEN) else { return Xdp::PASS };
    if is_partial(headers, packet) {
        return Xdp::PASS;
    }
    let Ok(inner) = frame.window(NETWORK, A::HEADER_LEN) else { return Xdp::PASS };
    let (header, hop) = (A::around(inner, source, destination), A::one_hop_less(inner));
    let counted = frame.len();
    if frame.make_room(A::HEADER_LEN).is_err() {
        return Xdp::PASS;
    }
    let Ok(headers) = frame.window_mut(0, NETWORK + 2 * A::HEADER_LEN) else {
        maps::count(Counter::RewriteFailed);
        return Xdp::DROP;
    };
    let [a, b, c] = way.addresses;
    headers.set(0, a);
    headers.set(4, b);
    headers.set(8, c);
    headers.set(ethernet::ETHER_TYPE, A::ETHER_TYPE);
    headers.set(NETWORK, header);
    headers.set(NETWORK + A::HEADER_LEN + A::HOP, hop);
    maps::count_packets(translation.service, false, frame.packets(), counted as u64);
    maps::count(Counter::DsrWrapped);
    send(&way, input)
}
