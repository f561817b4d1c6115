//! Fragments of datagrams (RFC 791, RFC 8200 §4.5).
//!
//! Only the first fragment of a datagram has the ports. They are remembered by the datagram's [fingerprint](datagram), and the later ones
//! are [joined](First::join) to it: from there on they are looked up like any packet of their flow. A later fragment that comes before the
//! first one is held until that comes, in one of a fixed number of places.

use crate::{
    addr::PortBe,
    atomic::Word,
    conntrack::Segment,
    flow::{Family, Fingerprint, HashKey, Parsed, Tuple},
    opaque::rolled,
    time::Ticks,
};

/// Datagrams whose first fragment is remembered.
pub const DATAGRAMS: u32 = 4096;
/// For how long: as long as hosts put datagrams together (30 s).
const REMEMBERED: u32 = 28;
/// Ticks after which a place whose datagram's first fragment has not come is free.
const HELD: u32 = 2;
/// Another CPU's clock may be ahead by so much.
const AHEAD: u32 = 2;

/// The name of a packet's datagram: what all its fragments have in common (RFC 8200: of IPv6, the protocol is no part of it).
#[inline(always)]
#[must_use]
pub fn datagram<A: Family>(key: &HashKey, packet: &Parsed<A>) -> Fingerprint {
    let protocol = if A::IS_V6 { 0 } else { packet.tuple.protocol };
    let (low, high) = (packet.id as u16, (packet.id >> 16) as u16);
    key.fingerprint(&Tuple { source_port: PortBe(low), destination_port: PortBe(high), protocol, ..packet.tuple })
}

/// What the first fragment of a datagram says, and when it came: the value of `FRAGMENTS`.
///
/// ```text
/// from bit 0:   time 24 | protocol 8 | source port 16 | destination port 16
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct First(pub u64);

impl First {
    const TIME_BITS: u32 = 24;

    #[inline(always)]
    #[must_use]
    pub const fn new<A>(tuple: &Tuple<A>, now: Ticks) -> Self {
        let time = (now.0 & ((1 << Self::TIME_BITS) - 1)) as u64;
        let ports = (tuple.source_port.0 as u64) << 32 | (tuple.destination_port.0 as u64) << 48;
        Self(time | (tuple.protocol as u64) << Self::TIME_BITS | ports)
    }

    /// Whether it counts still.
    #[inline(always)]
    #[must_use]
    pub const fn is_fresh(self, now: Ticks) -> bool {
        let age = now.0.wrapping_add(AHEAD).wrapping_sub(self.0 as u32) & ((1 << Self::TIME_BITS) - 1);
        age <= REMEMBERED + AHEAD
    }

    /// Gives a later fragment what it lacks.
    #[inline(always)]
    pub fn join<A>(self, packet: &mut Parsed<A>) {
        let tuple = &mut packet.tuple;
        tuple.protocol = (self.0 >> Self::TIME_BITS) as u8;
        tuple.source_port = PortBe((self.0 >> 32) as u16);
        tuple.destination_port = PortBe((self.0 >> 48) as u16);
        packet.segment = Segment::of_protocol(tuple.protocol);
    }
}

/// Bytes of a frame that can be held: jumbo frames are of 9000 bytes and the Ethernet header.
pub const FRAME: usize = 9208;

/// Element of `HELD_FRAMES`: a frame, as long as its place in `HELD` says so.
#[derive(Debug)]
#[repr(C, align(8))]
pub struct HeldFrame {
    pub len: u32,
    pub pad: u32,
    pub bytes: [u8; FRAME],
}

/// Element of `HELD`: the places that some datagrams share. A datagram of 64 KiB has 46 fragments at 1500 bytes.
#[derive(Debug)]
#[repr(C)]
pub struct Region {
    places: [Word; Region::PLACES as usize],
}

const _: () = assert!(size_of::<HeldFrame>() == 9216 && size_of::<Region>() == 384);

/// A place: free if it is 0 or too old.
///
/// ```text
/// from bit 0:   time 14 | state 2 | the upper 48 bits of the datagram's fingerprint
/// ```
#[derive(Clone, Copy, Eq, PartialEq)]
struct Place(u64);

impl Place {
    const TIME: u64 = 0x3fff;
    const STATE: u64 = 0xc000;
    const DATAGRAM: u64 = !0xffff;
    /// A frame is in it.
    const FULL: u64 = 0x4000;
    /// Somebody puts a frame in it, or takes it out.
    const BUSY: u64 = 0x8000;

    #[inline(always)]
    const fn new(datagram: Fingerprint, state: u64, now: Ticks) -> Self {
        Self(datagram.0 & Self::DATAGRAM | state | now.0 as u64 & Self::TIME)
    }

    #[inline(always)]
    const fn is_full(self) -> bool {
        self.0 & Self::STATE == Self::FULL
    }

    #[inline(always)]
    const fn is_free(self, now: Ticks) -> bool {
        let age = (now.0.wrapping_add(AHEAD) as u64).wrapping_sub(self.0) & Self::TIME;
        self.0 == 0 || age > (HELD + AHEAD) as u64
    }

    #[inline(always)]
    const fn is_of(self, datagram: Fingerprint) -> bool {
        self.0 & Self::DATAGRAM == datagram.0 & Self::DATAGRAM
    }
}

/// What came of claiming a place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Claim {
    /// Somebody else was faster.
    No,
    Mine,
    /// The same, and what was in it is lost: it waited for too long.
    Lost,
}

impl Region {
    pub const COUNT: u32 = 4;
    pub const PLACES: u32 = 48;

    /// The index of a datagram's region.
    #[inline(always)]
    #[must_use]
    pub const fn of(datagram: Fingerprint) -> u32 {
        datagram.0 as u32 % Self::COUNT
    }

    /// The first place that is free, from one on; [`PLACES`](Self::PLACES) if none is.
    #[inline(always)]
    pub fn free_place(&self, from: usize, now: Ticks) -> usize {
        self.find(from, |place| place.is_free(now))
    }

    /// The first place with a frame of a datagram, from one on.
    #[inline(always)]
    pub fn place_of(&self, from: usize, datagram: Fingerprint) -> usize {
        self.find(from, |place| place.is_of(datagram) && place.is_full())
    }

    #[inline(always)]
    fn find(&self, from: usize, is_it: impl Fn(Place) -> bool) -> usize {
        let mut next = from;
        while let Some(word) = self.places.get(next) {
            if is_it(Place(word.load())) {
                return next;
            }
            next = rolled(next + 1);
        }
        Self::PLACES as usize
    }

    /// Claims a free place for a frame of a datagram, which is to be filled or freed.
    #[inline(always)]
    pub fn claim(&self, at: usize, datagram: Fingerprint, now: Ticks) -> Claim {
        let Some(word) = self.places.get(at) else { return Claim::No };
        let place = Place(word.load());
        if !place.is_free(now) || !word.replace(place.0, Place::new(datagram, Place::BUSY, now).0) {
            Claim::No
        } else if place.is_full() {
            Claim::Lost
        } else {
            Claim::Mine
        }
    }

    /// Says that the frame is in the place that was claimed.
    #[inline(always)]
    pub fn fill(&self, at: usize, datagram: Fingerprint, now: Ticks) {
        if let Some(word) = self.places.get(at) {
            // It fails if so much time has passed that somebody else claimed it.
            word.replace(Place::new(datagram, Place::BUSY, now).0, Place::new(datagram, Place::FULL, now).0);
        }
    }

    /// Takes out the frame in a place, if it is of this datagram. Of all who try, one does. The place is to be freed after that.
    #[inline(always)]
    pub fn take(&self, at: usize, datagram: Fingerprint, now: Ticks) -> bool {
        let Some(word) = self.places.get(at) else { return false };
        let place = Place(word.load());
        place.is_of(datagram)
            && place.is_full()
            && !place.is_free(now)
            && word.replace(place.0, Place::new(datagram, Place::BUSY, now).0)
    }

    #[inline(always)]
    pub fn free(&self, at: usize) {
        if let Some(word) = self.places.get(at) {
            word.store(0);
        }
    }

    /// Orders what this CPU wrote before what it reads in places from here on: either the one who holds a frame sees the first fragment's
    /// ports, or the one who has the first fragment sees the frame.
    #[inline(always)]
    pub fn order(&self) {
        self.places[0].add(0);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::{
        addr::{Ipv4Be, Ipv6Be},
        wire::{Part, tcp, udp},
    };

    const NOW: Ticks = Ticks(1_000_000);

    fn region() -> Region {
        Region { places: [const { Word::new(0) }; Region::PLACES as usize] }
    }

    fn fragment<A>(source: A, destination: A, id: u32) -> Parsed<A> {
        let tuple =
            Tuple { source, destination, source_port: PortBe(0), destination_port: PortBe(0), protocol: udp::PROTOCOL };
        Parsed {
            tuple,
            transport: 0,
            transport_len: 0,
            ttl: 64,
            ip_check: 0,
            check: 0,
            dont_fragment: false,
            segment: Segment::DATAGRAM,
            part: Part::Later,
            id,
        }
    }

    #[test]
    fn a_datagram_is_known_by_what_the_standards_say() {
        let key = HashKey::new([1, 2, 3, 4]);
        let packet = fragment(Ipv4Be(1), Ipv4Be(2), 3);
        let base = datagram(&key, &packet);
        let of_tcp = Parsed { tuple: Tuple { protocol: tcp::PROTOCOL, ..packet.tuple }, ..packet };
        let mut seen = HashSet::from([base.0, datagram(&key, &of_tcp).0]);
        for bit in 0..32 {
            seen.insert(datagram(&key, &fragment(Ipv4Be(1 ^ 1 << bit), Ipv4Be(2), 3)).0);
            seen.insert(datagram(&key, &fragment(Ipv4Be(1), Ipv4Be(2 ^ 1 << bit), 3)).0);
            seen.insert(datagram(&key, &fragment(Ipv4Be(1), Ipv4Be(2), 3 ^ 1 << bit)).0);
        }
        assert_eq!(seen.len(), 2 + 3 * 32);
        let ports = Tuple { source_port: PortBe(7), destination_port: PortBe(8), ..packet.tuple };
        assert_eq!(datagram(&key, &Parsed { tuple: ports, ..packet }), base, "whatever the ports are");
        let packet = fragment(Ipv6Be([1, 1]), Ipv6Be([2, 2]), 3);
        let of_options = Parsed { tuple: Tuple { protocol: 60, ..packet.tuple }, ..packet };
        assert_eq!(datagram(&key, &of_options), datagram(&key, &packet), "IPv6: whatever header follows");
    }

    #[test]
    fn a_later_fragment_gets_what_the_first_one_said() {
        let mut packet = fragment(Ipv6Be([1, 1]), Ipv6Be([2, 2]), 3);
        packet.tuple.protocol = 60;
        let tuple = Tuple {
            source_port: PortBe::new(40000),
            destination_port: PortBe::new(53),
            protocol: tcp::PROTOCOL,
            ..packet.tuple
        };
        First::new(&tuple, NOW).join(&mut packet);
        assert_eq!(packet.tuple, tuple);
        assert!(packet.segment.is_plain() && !packet.segment.is_datagram());
    }

    #[test]
    fn what_a_first_fragment_said_counts_for_thirty_seconds() {
        let packet = fragment(Ipv4Be(1), Ipv4Be(2), 3);
        for begin in [0, 1_000_000, (1 << 24) - 3, u32::MAX - 3] {
            let first = First::new(&packet.tuple, Ticks(begin));
            let after = |ticks| first.is_fresh(Ticks(begin.wrapping_add(ticks)));
            assert!(after(u32::MAX), "another CPU's clock is ahead, from {begin}");
            assert!(after(0) && after(REMEMBERED) && !after(REMEMBERED + 1) && !after(1 << 23), "from {begin}");
        }
    }

    #[test]
    fn places_are_bounded_and_free_again_after_a_while() {
        let region = region();
        let hold = |datagram, now| {
            let at = region.free_place(0, now);
            let claim = region.claim(at, Fingerprint(datagram), now);
            region.fill(at, Fingerprint(datagram), now);
            (at, claim)
        };
        for place in 0..Region::PLACES as usize {
            assert_eq!(hold((place as u64) << 16, NOW), (place, Claim::Mine));
        }
        let none = (Region::PLACES as usize, Claim::No);
        assert_eq!(hold(1 << 40, Ticks(NOW.0 + HELD)), none);
        assert_eq!(hold(1 << 40, Ticks(NOW.0 - 1)), none, "by a clock that is behind");
        assert_eq!(hold(1 << 40, Ticks(NOW.0 + HELD + 1)), (0, Claim::Lost), "what was in it waited for too long");
    }

    #[test]
    fn a_frame_is_taken_once_and_by_its_datagram() {
        let region = region();
        let (mine, other) = (Fingerprint(5 << 16), Fingerprint(6 << 16));
        let at = region.free_place(7, NOW);
        assert_eq!(region.claim(at, mine, NOW), Claim::Mine);
        assert_eq!(region.claim(at, other, NOW), Claim::No);
        assert!(!region.take(at, mine, NOW), "it is not in yet");
        region.fill(at, mine, NOW);
        assert_eq!(region.place_of(0, mine), at);
        assert_eq!(region.place_of(0, other), Region::PLACES as usize);
        assert!(!region.take(at, other, NOW));
        assert!(!region.take(at, mine, Ticks(NOW.0 + HELD + 1)), "too late");
        assert!(region.take(at, mine, NOW));
        assert!(!region.take(at, mine, NOW), "somebody has it");
        region.free(at);
        assert_eq!(region.claim(at, other, NOW), Claim::Mine);
    }

    /// One CPU holds a fragment and then looks for the first one; another remembers the first one and then looks for what is held.
    #[test]
    fn a_fragment_is_seen_by_one_of_two_that_race() {
        let datagram = Fingerprint(5 << 16);
        for _ in 0..if cfg!(miri) { 20 } else { 5000 } {
            let (region, remembered) = (region(), Word::new(0));
            let (by_holder, by_first) = std::thread::scope(|scope| {
                let holder = scope.spawn(|| {
                    let at = region.free_place(0, NOW);
                    assert_eq!(region.claim(at, datagram, NOW), Claim::Mine);
                    region.fill(at, datagram, NOW);
                    remembered.load() != 0 && region.take(at, datagram, NOW)
                });
                remembered.store(1);
                region.order();
                let found = region.take(region.place_of(0, datagram), datagram, NOW);
                (holder.join().unwrap(), found)
            });
            assert!(by_holder != by_first, "by both or by none: {by_holder}");
        }
    }
}
