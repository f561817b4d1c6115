//! Echo requests of pods to the world, and the replies: masqueraded like other flows, by their identifier.

use aya_ebpf::bindings::{BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use netlb_common::{
    balance::{self, Known, Lookup, Scope, Tables as _, Translation, Verdict},
    checksum::Delta,
    conntrack::Direction,
    counters::Counter,
    flow::NETWORK,
    hop::Way,
    icmp::Header,
    maps::forwarding,
    ping,
    wire::{Part, icmp as message},
};

use crate::{
    DROP, NEXT,
    forward::{self, Outcome, Route},
    frame::{Frame as _, Refused, Skb},
    maps::{self, Kernel, Work},
    pipeline::Packet,
    subprograms::Join,
};

/// What becomes of an ICMP message, if it is of a flow that is masqueraded.
#[inline(always)]
pub(crate) fn pass<A: Packet>(frame: &Skb, scope: Scope) -> Option<i32>
where
    Skb: Join<A>,
{
    let work = maps::work::<A>()?;
    if !A::read_ping(frame, work, scope) {
        return None;
    }
    let verdict = match A::look_up_ping(work) {
        Known::Translate => Verdict::Translate,
        // There is not stack enough below the reading.
        Known::Tend => {
            // SAFETY: as below.
            A::tend(unsafe { &*maps::forget(work) });
            Verdict::Translate
        }
        // SAFETY: this CPU's, and it was filled in.
        Known::No if scope == Scope::Replies => frame.masquerade(unsafe { &mut *maps::forget(work) }),
        _ => Verdict::Pass,
    };
    match verdict {
        Verdict::Translate => Some(A::send_ping(frame, work)),
        Verdict::Drop => Some(DROP),
        _ => None,
    }
}

/// Reads a request that leaves or a reply that comes in. Says whether it may be one that is masqueraded.
#[inline(always)]
pub(crate) fn read<A: Packet>(frame: &Skb, work: &mut Work<A>, scope: Scope) -> bool
where
    Skb: Join<A>,
{
    let is_reply = scope != Scope::Replies;
    let Ok(packet) = ping::parse::<A>(frame, is_reply) else { return false };
    let candidate = balance::candidate(&Kernel, scope, packet.tuple.source, packet.tuple.destination);
    let Some(candidate) = candidate else { return false };
    if !candidate.is_masqueraded && !is_reply {
        return false;
    }
    work.packet = packet;
    // SAFETY: the same reference.
    let work = unsafe { &mut *maps::forget(work) };
    work.lookup =
        Lookup { fingerprint: Kernel.hash_key().fingerprint(&work.packet.tuple), now: maps::now(), candidate, scope };
    work.translation = Translation::none();
    work.packet.part == Part::Whole || frame.join(work) == Verdict::Translate
}

/// Looks up its flow. [`Known::Elsewhere`] if it is none that is masqueraded.
#[inline(always)]
pub(crate) fn look_up<A: Packet>(work: &mut Work<A>) -> Known {
    let is_reply = work.lookup.scope != Scope::Replies;
    match balance::known(Kernel, &work.packet, &work.lookup, |_| true, &mut work.translation) {
        // The kernel says "time exceeded".
        Known::Translate | Known::Tend if is_reply && work.packet.ttl <= 1 => {
            maps::count(Counter::TtlExpired);
            Known::Elsewhere
        }
        known => known,
    }
}

/// Rewrites it, and sends it on as its hook does with packets.
#[inline(always)]
pub(crate) fn send<A: Packet>(frame: &Skb, work: &Work<A>) -> i32 {
    let Work { packet, translation, .. } = work;
    let is_reply = translation.direction == Direction::Reply;
    let mut ttl = packet.ttl;
    let mut route = Route::STACK;
    if is_reply && maps::forwarding() == forwarding::FAST {
        let mut tuple = translation.apply(&packet.tuple);
        tuple.destination_port.0 = 0;
        let len = (frame.len() as usize - NETWORK) as u16;
        route = forward::route_datagram(frame, len, &tuple, frame.interface());
    }
    let way = route.way();
    let is_sent = matches!(route.outcome, Outcome::Resolved | Outcome::Unresolved);
    if is_sent && !way.has(Way::BRIDGED) {
        ttl -= 1;
    }
    if route.outcome == Outcome::Nowhere {
        maps::count(Counter::NoRoute);
        return DROP;
    }
    if rewrite(frame, work, ttl).is_err() {
        return forward::refused();
    }
    if is_sent {
        forward::send(frame, &way, route.outcome)
    } else if is_reply {
        forward::to_stack()
    } else {
        NEXT
    }
}

#[inline(always)]
fn rewrite<A: Packet>(frame: &Skb, Work { packet, translation, .. }: &Work<A>, ttl: u8) -> Result<(), Refused> {
    let old = Header {
        source: packet.tuple.source,
        destination: packet.tuple.destination,
        check: packet.ip_check,
        ttl: packet.ttl,
        protocol: packet.tuple.protocol,
    };
    let tuple = translation.apply(&packet.tuple);
    let new = old.with(tuple.source, tuple.destination, ttl);
    A::write(frame, NETWORK, &old, &new, BPF_F_RECOMPUTE_CSUM as u64)?;
    // What the first fragment has of the checksum covers this one as well.
    if packet.part == Part::Later {
        return Ok(());
    }
    let check = packet.transport + message::CHECK;
    if A::IS_V6 {
        frame.replace_checksum(check, 0, old.change_to(&new).word() as u64, BPF_F_PSEUDO_HDR as u64)?;
    }
    let (from, to) = match translation.direction {
        Direction::Forward => (packet.tuple.source_port, tuple.source_port),
        Direction::Reply => (packet.tuple.destination_port, tuple.destination_port),
    };
    if from != to {
        frame.replace_checksum(check, 0, Delta::half(from.0, to.0).word() as u64, 0)?;
        frame.store(packet.transport + ping::IDENTIFIER, &to, 0)?;
    }
    Ok(())
}
