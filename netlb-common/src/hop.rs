//! Ways out that the programs remember, so that routing is asked once for many packets.
//!
//! A flow's slot holds the index of its way for a unit of its time at most; then routing is asked again, which keeps the way. So a way
//! that nobody kept for [`KEPT`] ticks is held by no flow, and another may take its place. User space [forgets](forget) all of them when
//! routes or neighbours change.

use crate::{atomic::Word, time::Ticks};

/// Elements of `HOPS`. Index 0 is none.
pub const COUNT: u32 = 1 << 14;
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
    /// See [`Way::PEER`], [`Way::BRIDGED`] and [`Way::XDP`].
    pub flags: u8,
    /// Hardware addresses, as they stand in a frame: destination and source.
    pub addresses: [u32; 3],
}

impl Way {
    /// To the other end of the interface, which is in a pod.
    pub const PEER: u8 = 1;
    /// Within one bridge, where nothing is forwarded.
    pub const BRIDGED: u8 = 2;
    /// XDP can send there.
    pub const XDP: u8 = 4;

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

/// The index at which a way is remembered from now on, or 0 if there is no room.
#[inline(always)]
pub fn keep<'a>(hops: impl Fn(u32) -> Option<&'a Hop>, way: &Way, now: Ticks) -> u16 {
    let words = way.words();
    let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
    for word in words {
        hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 32;
    }
    let tag = hash >> 32 | 1;
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
            return index as u16;
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
        return index as u16;
    }
    0
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

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
}
