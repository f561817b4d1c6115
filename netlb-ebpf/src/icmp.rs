//! ICMP errors about translated packets, made errors about the packets that were sent.
//!
//! All sums stay what they were but the pseudo header's and that of the hops left: the quoted header's checksum and the message's make up
//! for what changes. So only the IPv6 header is written with `BPF_F_RECOMPUTE_CSUM`; see [`rewrite`](crate::rewrite).

use aya_ebpf::bindings::{BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use netlb_common::{
    addr::{Ipv4Be, Ipv6Be},
    balance::Scope,
    counters::Counter,
    flow::NETWORK,
    hop::Way,
    icmp::{self, Error, Header, Meaning, Messages},
    maps::forwarding,
    wire::{Fields as _, PacketBytes as _, icmp as message, ipv4, ipv6},
};

use crate::{
    DROP, NEXT,
    forward::{self, Outcome, Route},
    frame::{Frame as _, Refused, Skb},
    maps::{self, Errand, Kernel},
    ping,
    pipeline::Packet,
    subprograms::Hook,
    tunnel,
};

/// A family whose errors can be rewritten.
pub(crate) trait Errors: Messages {
    /// Writes addresses and hops left into the IP header at an offset. What `old` says, it says.
    fn write(frame: &Skb, at: usize, old: &Header<Self>, new: &Header<Self>, flags: u64) -> Result<(), Refused>;
}

/// Lets a packet pass that is none of ours, unless it is an error about one that is.
#[inline(always)]
pub(crate) fn pass<A: Packet>(frame: &Skb, scope: Scope) -> i32
where
    Skb: Hook<A>,
{
    let Ok(header) = frame.window(NETWORK, A::HEADER_LEN) else { return NEXT };
    let protocol = header.byte(A::PROTOCOL_AT);
    if maps::has_masquerade()
        && (protocol == A::ICMP || protocol == A::PROTOCOL_OF_FRAGMENT)
        && let Some(result) = ping::pass::<A>(frame, scope)
    {
        return result;
    }
    if protocol != A::ICMP {
        if maps::unwraps() && protocol == A::INNER && scope != Scope::Replies {
            return tunnel::receive::<A>(frame, scope);
        }
        return NEXT;
    }
    match maps::errand::<A>() {
        Some(errand) if A::read_error(frame, errand, scope) && A::understand_error(errand, scope) => {
            // SAFETY: this CPU's, and it was filled in. There is not stack enough below the sending.
            match unsafe { (*maps::forget(errand)).meaning.is_wrapped } {
                true => A::wrap_error(frame, errand),
                false => A::send_error(frame, errand, scope),
            }
        }
        _ if scope != Scope::Replies && A::read_relayed(frame) => A::relay(frame),
        _ => NEXT,
    }
}

/// Reads an error. Says whether it may be about a translated packet.
#[inline(always)]
pub(crate) fn read<A: Packet>(frame: &Skb, errand: &mut Errand<A>, scope: Scope) -> bool {
    let Ok(error) = icmp::read::<A>(frame, maps::has_masquerade()) else { return false };
    errand.error = error;
    // SAFETY: the same reference.
    let errand = unsafe { &*maps::forget(errand) };
    icmp::is_candidate(&Kernel, &errand.error, scope)
}

/// Finds out what an error is to say. Says whether this hook translates it.
#[inline(always)]
pub(crate) fn understand<A: Packet>(errand: &mut Errand<A>, scope: Scope) -> bool {
    match icmp::translate(Kernel, &errand.error, scope, maps::now()) {
        Some(meaning) => {
            errand.meaning = meaning;
            true
        }
        None => false,
    }
}

/// Rewrites an error, and sends it on as its hook does with packets.
#[inline(always)]
pub(crate) fn send<A: Packet>(frame: &Skb, errand: &Errand<A>, scope: Scope) -> i32 {
    let Errand { error, meaning } = errand;
    let mut ttl = error.outer.ttl;
    let mut route = Route::STACK;
    if scope != Scope::Replies {
        if ttl <= 1 {
            maps::count(Counter::TtlExpired);
            return NEXT;
        }
        if maps::forwarding() == forwarding::FAST || meaning.has_snat {
            let mut tuple = error.tuple();
            (tuple.source, tuple.destination) = (meaning.source, meaning.destination);
            (tuple.source_port.0, tuple.destination_port.0, tuple.protocol) = (0, 0, A::ICMP);
            let len = (frame.len() as usize - NETWORK) as u16;
            route = forward::route_datagram(frame, len, &tuple, frame.interface());
        }
    }
    let way = route.way();
    // About an error that is too big nobody may say so: the kernel cuts it, or drops it.
    let is_sent = matches!(route.outcome, Outcome::Resolved | Outcome::Unresolved);
    if is_sent && !way.has(Way::BRIDGED) {
        ttl -= 1;
    }
    if route.outcome == Outcome::Nowhere {
        maps::count(Counter::NoRoute);
        return DROP;
    }
    if rewrite(frame, error, meaning, ttl).is_err() {
        return forward::refused();
    }
    maps::count(Counter::IcmpTranslated);
    if is_sent {
        forward::send(frame, &way, route.outcome)
    } else if scope == Scope::Replies {
        NEXT
    } else {
        forward::to_stack()
    }
}

#[inline(always)]
fn rewrite<A: Packet>(frame: &Skb, error: &Error<A>, meaning: &Meaning<A>, ttl: u8) -> Result<(), Refused> {
    let edit = error.edit(meaning, ttl);
    A::write(frame, NETWORK, &error.outer, &edit.outer, BPF_F_RECOMPUTE_CSUM as u64)?;
    A::write(frame, error.message + message::LEN, &error.quoted, &edit.quoted, 0)?;
    frame.store(error.ports_at(), &edit.ports, 0)?;
    if error.has_check {
        frame.store(error.check_at(), &edit.check, 0)?;
    }
    let check = error.message + message::CHECK;
    if A::IS_V6 {
        frame.replace_checksum(check, 0, edit.addresses.word() as u64, BPF_F_PSEUDO_HDR as u64)?;
    }
    frame.replace_checksum(check, 0, edit.message.word() as u64, 0)
}

impl Errors for Ipv4Be {
    #[inline(always)]
    fn write(frame: &Skb, at: usize, _: &Header<Self>, new: &Header<Self>, _: u64) -> Result<(), Refused> {
        /// From the time to live to the destination (RFC 791 §3.1).
        #[repr(C)]
        struct Part {
            ttl_and_protocol: [u8; 2],
            check: u16,
            source: Ipv4Be,
            destination: Ipv4Be,
        }
        const { assert!(ipv4::TTL + size_of::<Part>() == ipv4::LEN) };
        let Header { source, destination, check, ttl, protocol } = *new;
        frame.store(at + ipv4::TTL, &Part { ttl_and_protocol: [ttl, protocol], check, source, destination }, 0)
    }
}

impl Errors for Ipv6Be {
    #[inline(always)]
    fn write(frame: &Skb, at: usize, old: &Header<Self>, new: &Header<Self>, flags: u64) -> Result<(), Refused> {
        if new.ttl != old.ttl {
            frame.store(at + ipv6::HOP_LIMIT, &new.ttl, flags)?;
        }
        frame.store(at + ipv6::SOURCE, &[new.source.0, new.destination.0], flags)
    }
}
