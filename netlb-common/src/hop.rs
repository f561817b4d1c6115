//! Ways out that the programs remember, so that routing is asked once for many packets.
//!
//! A flow's slot holds the index of its way for a unit of its time at most, and as long again where its state changes; then routing is asked again, which keeps the way. So a way
//! that nobody kept for [`KEPT`] ticks is held by no flow, and another may take its place. User space [forgets](forget) all of them when
//! routes or neighbours change.
//!
//! Of addresses that routing finds by destination alone, [leads](Lead) tell the way for flows that have none: those that begin, and those
//! whose way is to be found out again.

use crate::{
    addr::{Addr, Address},
    atomic::Word,
    flow::HashKey,
    maps::Interface,
    time::Ticks,
};

/// Elements of `HOPS`. Index 0 is none.
pub const COUNT: u32 = 1 << 14;
/// Beside the index of a way: XDP can send there. So it need not look.
pub const BY_XDP: u16 = COUNT as u16;
/// Ticks after which a way is out of use: longer than every unit of a flow's time.
const KEPT: u32 = 64;
/// Elements that a way may stand in.
const CHOICES: u32 = 4;

/// Element of `HOPS`.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct Hop {
    /// When it was last kept, and above that a part of its hash. That part is 0 while it is written.
    owner: Word,
    /// The interface, and above it the MTU and the flags. 0 if it is forgotten.
    out: Word,
    addresses: [Word; 2],
}

const _: () = assert!(size_of::<Hop>() == 32);

/// Where packets go, and what is written into them for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Way {
    pub interface: u32,
    /// The longest datagram it takes.
    pub mtu: u16,
    /// See [`Way::PEER`] and those that follow.
    pub flags: u8,
    /// Hardware addresses, as they stand in a frame: destination and source.
    pub addresses: [u32; 3],
}

impl Way {
    /// To the other end of the interface, which is in a pod.
    pub const PEER: u8 = Interface::PEER;
    /// XDP can send there.
    pub const XDP: u8 = Interface::XDP;
    /// Whatever comes in where this was found out goes this way to the same address.
    pub const DIRECT: u8 = Interface::DIRECT;
    /// Within one bridge, where nothing is forwarded.
    pub const BRIDGED: u8 = 1 << 7;

    /// No way.
    pub const NONE: Self = Self { interface: 0, mtu: 0, flags: 0, addresses: [0; 3] };

    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    #[inline(always)]
    const fn words(&self) -> [u64; 3] {
        let [a, b, c] = self.addresses;
        let out = self.interface as u64 | (self.mtu as u64) << 32 | (self.flags as u64) << 48;
        [out, a as u64 | (b as u64) << 32, c as u64]
    }
}

impl Hop {
    /// The way, unless it is forgotten.
    #[inline(always)]
    pub fn way(&self) -> Option<Way> {
        let out = self.out.load();
        if out == 0 {
            return None;
        }
        let (ab, c) = (self.addresses[0].load(), self.addresses[1].load());
        Some(Way {
            interface: out as u32,
            mtu: (out >> 32) as u16,
            flags: (out >> 48) as u8,
            addresses: [ab as u32, (ab >> 32) as u32, c as u32],
        })
    }

    /// Has every flow that goes this way ask again.
    pub fn forget(&self) {
        self.out.store(0);
    }
}

/// The index at which a way is remembered from now on, with [`BY_XDP`] where that is so; or 0 if there is no room.
#[inline(always)]
pub fn keep<'a>(hops: impl Fn(u32) -> Option<&'a Hop>, way: &Way, now: Ticks) -> u16 {
    let words = way.words();
    let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
    for word in words {
        hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 32;
    }
    let tag = hash >> 32 | 1;
    let by_xdp = if way.has(Way::XDP) { BY_XDP } else { 0 };
    let owned = tag << 32 | now.0 as u64;
    for choice in 0..CHOICES {
        let index = (hash as u32).wrapping_add(choice) % COUNT;
        let Some(hop) = hops(index) else { return 0 };
        let owner = hop.owner.load();
        if owner >> 32 == tag && hop.addresses[0].load() == words[1] && hop.addresses[1].load() == words[2] {
            if owner != owned {
                hop.owner.replace(owner, owned);
            }
            if hop.out.load() != words[0] {
                hop.out.store(words[0]);
            }
            return index as u16 | by_xdp;
        }
        let idle = now.0.wrapping_sub(owner as u32);
        let is_free = owner == 0 || (idle > KEPT && idle <= u32::MAX / 2);
        if index == 0 || !is_free || !hop.owner.replace(owner, now.0 as u64) {
            continue;
        }
        hop.addresses[0].store(words[1]);
        hop.addresses[1].store(words[2]);
        hop.out.swap(words[0]);
        hop.owner.replace(now.0 as u64, owned);
        return index as u16 | by_xdp;
    }
    0
}

/// Elements of `LEADS`.
pub const LEADS: u32 = 1 << 12;

/// Element of `LEADS`: by which way packets for an address left that came in by an interface, a moment ago, and which address of the node
/// routing prefers there.
///
/// ```text
/// each, from bit 0:   time 12 | index in HOPS with its flag, or in SNAT_ADDRESSES 15 | the upper 37 bits of the hash of both
/// ```
#[derive(Debug)]
#[repr(C)]
pub struct Lead {
    way: Word,
    source: Word,
}

const _: () = assert!(2 * COUNT == 1 << Lead::INDEX_BITS && LEADS == 1 << Lead::TIME_BITS);

impl Lead {
    const TIME_BITS: u32 = 12;
    const INDEX_BITS: u32 = 15;
    const TAG_SHIFT: u32 = Self::TIME_BITS + Self::INDEX_BITS;
    const TIME: u32 = (1 << Self::TIME_BITS) - 1;
    /// Ticks after which routing is asked again.
    const FRESH: u32 = 1;

    /// A keyed hash: nobody can choose addresses that are taken for others. The element is at its lower bits.
    #[inline(always)]
    #[must_use]
    pub fn hash<A: Address>(key: &HashKey, address: A, interface: u32) -> u64 {
        let Addr([a, b]) = address.to_map();
        key.mix(key.seeds[0] ^ a ^ interface as u64, b)
    }

    #[inline(always)]
    #[must_use]
    pub const fn index(hash: u64) -> u32 {
        hash as u32 % LEADS
    }

    /// The index of the way with its flag, or 0.
    #[inline(always)]
    pub fn hop(&self, hash: u64, now: Ticks) -> u16 {
        Self::index_of(&self.way, hash, now) as u16
    }

    #[inline(always)]
    pub fn set_hop(&self, hash: u64, hop: u16, now: Ticks) {
        Self::set(&self.way, hash, hop.into(), now);
    }

    /// The index of the address that the node would send from, or 0.
    #[inline(always)]
    pub fn source(&self, hash: u64, now: Ticks) -> u32 {
        Self::index_of(&self.source, hash, now)
    }

    #[inline(always)]
    pub fn set_source(&self, hash: u64, source: u32, now: Ticks) {
        Self::set(&self.source, hash, source, now);
    }

    #[inline(always)]
    fn index_of(word: &Word, hash: u64, now: Ticks) -> u32 {
        let word = word.load();
        let age = now.0.wrapping_sub(word as u32) & Self::TIME;
        if (word ^ hash) >> Self::TAG_SHIFT == 0 && age <= Self::FRESH {
            (word >> Self::TIME_BITS) as u32 & ((1 << Self::INDEX_BITS) - 1)
        } else {
            0
        }
    }

    #[inline(always)]
    fn set(word: &Word, hash: u64, index: u32, now: Ticks) {
        let tag = hash >> Self::TAG_SHIFT << Self::TAG_SHIFT;
        word.store(tag | (index as u64) << Self::TIME_BITS | (now.0 & Self::TIME) as u64);
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::addr::Ipv4Be;

    fn hops() -> Vec<Hop> {
        let word = || Word::new(0);
        (0..COUNT).map(|_| Hop { owner: word(), out: word(), addresses: [word(), word()] }).collect()
    }

    fn way(number: u32) -> Way {
        Way { interface: 1 + number % 7, mtu: 1500, flags: Way::PEER, addresses: [number, 0x0200_0000, 0xffff_ffff] }
    }

    #[test]
    fn a_way_is_kept_in_one_place() {
        let hops = hops();
        let keep = |way: &Way, now| keep(|index| hops.get(index as usize), way, Ticks(now));
        let indexes: Vec<_> = (0..1000).map(|number| keep(&way(number), 5)).collect();
        for (number, index) in (0..).zip(&indexes) {
            assert_ne!(*index, 0);
            assert_eq!(hops[usize::from(*index)].way(), Some(way(number)));
            assert_eq!(keep(&way(number), 50), *index);
        }
    }

    #[test]
    fn a_way_that_somebody_keeps_is_not_written_over() {
        let hops = hops();
        let keep = |way: &Way, now| keep(|index| hops.get(index as usize), way, Ticks(now));
        let first = keep(&way(0), 5);
        let full = (1..200_000).filter(|number| keep(&way(*number), 60) == 0).count();
        assert!(full > 100_000, "{full} found no room");
        assert_eq!(hops[usize::from(first)].way(), Some(way(0)));
        assert_eq!(keep(&way(0), 69), first);
        let placed = (200_000..210_000).filter(|number| keep(&way(*number), 60 + KEPT + 1) != 0).count();
        assert!(placed > 9000, "{placed} ways of 10000 took the place of what nobody kept");
        assert_eq!(hops[usize::from(first)].way(), Some(way(0)), "which was kept until a moment ago");
    }

    #[test]
    fn a_forgotten_way_comes_back_where_it_was() {
        let hops = hops();
        let keep = |way: &Way, now| keep(|index| hops.get(index as usize), way, Ticks(now));
        let index = keep(&way(3), 5);
        hops.iter().for_each(Hop::forget);
        assert_eq!(hops[usize::from(index)].way(), None);
        assert_eq!(keep(&way(3), 6), index);
        assert_eq!(hops[usize::from(index)].way(), Some(way(3)));
    }

    #[test]
    fn a_lead_is_for_one_address_and_interface_and_a_moment() {
        let key = HashKey::new([1, 2, 0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9]);
        let hash = |last, interface| Lead::hash(&key, Ipv4Be(u32::from_ne_bytes([10, 244, 1, last])), interface);
        let lead = Lead { way: Word::new(0), source: Word::new(0) };
        assert_eq!(lead.hop(hash(1, 7), Ticks(100)), 0);
        let last = BY_XDP | 16_383;
        lead.set_hop(hash(1, 7), last, Ticks(4095));
        assert_eq!(lead.hop(hash(1, 7), Ticks(4095)), last);
        assert_eq!(lead.hop(hash(1, 7), Ticks(4096)), last, "a tick later");
        assert_eq!(lead.hop(hash(1, 7), Ticks(4097)), 0, "two ticks later");
        assert_eq!(lead.hop(hash(1, 7), Ticks(4094)), 0, "by a clock that is behind");
        for other in [hash(2, 7), hash(1, 8)] {
            assert_eq!(lead.hop(other, Ticks(4095)), 0);
        }
        assert_eq!(lead.source(hash(1, 7), Ticks(4095)), 0, "which is told by itself");
        lead.set_source(hash(2, 7), 255, Ticks(4096));
        assert_eq!((lead.source(hash(2, 7), Ticks(4097)), lead.source(hash(1, 7), Ticks(4097))), (255, 0));
    }
}
