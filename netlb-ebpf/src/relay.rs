//! ICMP errors about packets that this node has wrapped, told to who sent what is in them.

use netlb_common::{
    addr::PortBe,
    counters::Counter,
    flow::{NETWORK, Tuple},
    relay::{self, Takes},
};

use crate::{
    DROP, NEXT,
    answer::{self, Quoted},
    forward::{self, Outcome},
    frame::{Frame as _, Skb},
    maps::{self, Kernel},
    pipeline::Packet,
};

/// Reads an error. Says whether it is one about a packet of a flow that this node wraps.
#[inline(always)]
pub(crate) fn read<A: Packet>(frame: &Skb) -> bool {
    let Some(place) = maps::told::<A>() else { return false };
    // SAFETY: this CPU's; a field is written before it is read.
    let Ok(tells) = relay::read(&Kernel, frame, unsafe { &mut *place }) else { return false };
    // SAFETY: the same place, filled in.
    let is_known = tells && relay::is_known(Kernel, unsafe { &*maps::forget(place) }, maps::now());
    if !is_known {
        maps::count(Counter::DsrErrorLost);
    }
    is_known
}

/// Makes it an error about the inner packet, in the name of the service, and sends it to the client.
#[inline(always)]
pub(crate) fn send<A: Packet>(frame: &Skb) -> i32 {
    let Some(told) = maps::told::<A>() else { return NEXT };
    // SAFETY: this CPU's, and it was filled in.
    let told = unsafe { &*told };
    let (client, service) = (told.inner.source, told.inner.destination);
    let none = PortBe(0);
    let tuple =
        Tuple { source: service, destination: client, source_port: none, destination_port: none, protocol: A::ICMP };
    let longest = (A::HEADER_LEN + answer::ICMP + A::QUOTED) as u16;
    let route = forward::route_datagram(frame, longest, &tuple, frame.interface());
    if route.outcome == Outcome::Nowhere {
        maps::count(Counter::NoRoute);
        return DROP;
    }
    let (kind, rest) = match told.takes {
        Takes::NONE => (A::HOST_UNREACHABLE, 0),
        Takes(mtu) => (A::TOO_BIG, A::mtu(mtu)),
    };
    let about = Quoted { tuple: &told.inner, at: relay::inner_at::<A>(), transport: NETWORK + A::HEADER_LEN };
    if answer::write_error(frame, about, kind, rest).is_err() {
        return forward::refused();
    }
    maps::count(Counter::IcmpTranslated);
    match route.outcome {
        Outcome::Stack | Outcome::TooBig => forward::to_stack(),
        outcome => forward::send(frame, &route.way(), outcome),
    }
}
