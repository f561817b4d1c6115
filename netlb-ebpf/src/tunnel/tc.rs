//! Wrapping at TC.

use netlb_common::{counters::Counter, hop::Way};

use super::{put, question};
use crate::{
    DROP,
    forward::{self, Outcome},
    frame::{Frame as _, Skb},
    maps::{self, Work},
    pipeline::Packet,
    tc::REJECT,
};

/// Wraps a packet and sends it on. Segments are as long as they were: the client is told how long they may be.
#[inline(always)]
pub(crate) fn wrap<A: Packet>(frame: &Skb, work: &Work<A>) -> i32 {
    let Work { packet, translation, lookup } = work;
    let (source, destination) = (translation.other, translation.address);
    let len = frame.datagram_len(packet).saturating_add(A::HEADER_LEN as u16);
    // The kernel forwards nothing that comes in with an address of its own.
    let mut way = maps::way(translation.hop);
    let mut outcome = Outcome::Resolved;
    let input = frame.interface();
    if way.interface == 0 {
        way = forward::follow(destination, input, lookup);
    }
    if way.interface == 0 || len > way.mtu {
        let route = forward::route_datagram(frame, len, &question(source, destination), input);
        (way, outcome) = (route.way(), route.outcome);
        forward::keep(&route, destination, input, lookup);
    }
    match outcome {
        Outcome::TooBig if packet.dont_fragment => return REJECT + most::<A>(&way),
        Outcome::TooBig => {
            maps::count(Counter::DsrTooBig);
            return DROP;
        }
        Outcome::Nowhere => {
            maps::count(Counter::NoRoute);
            return DROP;
        }
        _ => {}
    }
    if put(frame, source, destination).is_err() {
        return forward::refused();
    }
    match outcome {
        Outcome::Stack => forward::to_stack(),
        outcome => forward::send(frame, &way, outcome),
    }
}

/// How long a packet may be for its way.
#[inline(always)]
const fn most<A: Packet>(way: &Way) -> i32 {
    way.mtu as i32 - A::HEADER_LEN as i32
}
