//! Fragments at TC: later ones get the ports of their datagram's first one, and wait for it where it is late.

use netlb_common::{
    balance::{self, Scope, Tables as _, Verdict},
    counters::Counter,
    flow::Fingerprint,
    fragment::{self, Claim, First, Region},
    time::Ticks,
    wire::{Part, udp},
};

use crate::{
    frame::Skb,
    maps::{self, Kernel, Work},
    pipeline::Packet,
    subprograms,
};

/// Attempts at a place that other CPUs want as well.
const CLAIMS: u32 = 4;

/// Has a fragment say what a whole packet says. [`Verdict::Translate`] if it does, and is to be looked up like one.
///
/// Otherwise the fragment was held or sent once more ([`Verdict::Drop`]), or nothing is known of it. Only what came in waits: what the kernel
/// sends is in order.
#[inline(always)]
pub(crate) fn join<A: Packet>(frame: &Skb, work: &mut Work<A>) -> Verdict {
    let Work { packet, lookup, .. } = work;
    let (datagram, now) = (fragment::datagram(&Kernel.hash_key(), packet), lookup.now);
    if packet.part == Part::First {
        maps::remember_fragment(datagram, First::new(&packet.tuple, now));
        let is_sent_again = lookup.scope != Scope::Replies && subprograms::release(frame, datagram, now);
        return if is_sent_again { Verdict::Drop } else { Verdict::Translate };
    }
    // Of UDP from a backend as well: that may be a reply. Whatever it is, its first fragment comes by here and releases it. Of ICMP only that
    // of an echo does.
    let protocol = packet.tuple.protocol;
    let may_be_ours = (lookup.candidate.to_frontend && protocol != A::ICMP)
        || (protocol == udp::PROTOCOL && balance::is_from_backend(&Kernel, packet.tuple.source));
    let mut first = maps::first_fragment(datagram, now);
    if first.is_none() && may_be_ours && lookup.scope != Scope::Replies {
        match subprograms::hold(frame, datagram, now) {
            Verdict::Translate => first = maps::first_fragment(datagram, now),
            Verdict::Pass => {}
            _ => return Verdict::Drop,
        }
    }
    let Some(first) = first else {
        maps::count(Counter::Fragment);
        return Verdict::Pass;
    };
    first.join(packet);
    lookup.fingerprint = Kernel.hash_key().fingerprint(&packet.tuple);
    Verdict::Translate
}

/// Holds a fragment until its datagram's first one comes. [`Verdict::Translate`] if that came meanwhile, and [`Verdict::Pass`] if there is no
/// room, or the frame is too long: it might be of no service.
#[inline(always)]
pub(crate) fn hold(frame: &Skb, datagram: Fingerprint, now: Ticks) -> Verdict {
    let Some(region) = maps::held_region(datagram) else { return Verdict::Pass };
    let mut claim = Claim::No;
    let mut place = 0;
    for _ in 0..CLAIMS {
        place = subprograms::free_place(datagram, place, now);
        claim = region.claim(place, datagram, now);
        if claim != Claim::No {
            break;
        }
    }
    match claim {
        Claim::No => return Verdict::Pass,
        Claim::Mine => {}
        Claim::Lost => maps::count(Counter::FragmentsLost),
    }
    let Some(held) = maps::held_frame(datagram, place) else { return Verdict::Pass };
    if frame.copy_to(held).is_err() {
        region.free(place);
        return Verdict::Pass;
    }
    region.fill(place, datagram, now);
    // Another CPU that has the first fragment may have looked for this one before it was there.
    if maps::first_fragment(datagram, now).is_some() && region.take(place, datagram, now) {
        region.free(place);
        return Verdict::Translate;
    }
    maps::count(Counter::FragmentsHeld);
    Verdict::Drop
}

/// Has all fragments come in once more that waited for this one, and before them this one itself. Says whether there were any: then the frame
/// is not what it was, and its copies go on.
#[inline(always)]
pub(crate) fn release(frame: &Skb, datagram: Fingerprint, now: Ticks) -> bool {
    let Some(region) = maps::held_region(datagram) else { return false };
    region.order();
    let mut is_sent = false;
    let mut place = 0;
    for _ in 0..Region::PLACES {
        place = subprograms::place_of(datagram, place);
        if !region.take(place, datagram, now) {
            if place >= Region::PLACES as usize {
                break;
            }
        } else {
            is_sent = subprograms::send_held(frame, datagram, place, is_sent);
            region.free(place);
        }
        place += 1;
    }
    is_sent
}

/// Sends the frame in a place, by way of the one that was waited for: itself first, unless it [is sent](release).
#[inline(always)]
pub(crate) fn send_held(frame: &Skb, datagram: Fingerprint, place: usize, is_sent: bool) -> bool {
    let Some(held) = maps::held_frame(datagram, place) else { return is_sent };
    // Without the first one nobody wants the others, and this one must stay as it is.
    let is_sent = is_sent || frame.receive_copy().is_ok();
    if !is_sent || frame.copy_from(held).and_then(|()| frame.receive_copy()).is_err() {
        maps::count(Counter::FragmentsLost);
    }
    is_sent
}
