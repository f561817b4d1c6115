//! Source addresses of the node, for flows whose replies must come back to it.
//!
//! A flow's claim on its port is its reply slot in the flow table: the tuple from the backend to the node's address and port. There is no
//! other table of ports.

use core::num::NonZeroU32;

use crate::{
    addr::{Addr, Address, PortBe},
    atomic::Word,
};

/// Elements of `SNAT_ADDRESSES`. Index 0 is none.
pub const ADDRESSES: u32 = 256;
/// Elements that an address may stand in.
const CHOICES: u32 = 16;

/// Element of `SNAT_ADDRESSES`: an address of the node that flows were given. Never changed: flows hold its index.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct Source {
    state: Word,
    addr: [Word; 2],
    pad: Word,
}

const _: () = assert!(size_of::<Source>() == 32);

impl Source {
    const CLAIMED: u64 = 1;
    const READY: u64 = 2;

    /// The address, if there is one.
    #[inline(always)]
    pub fn addr(&self) -> Option<Addr> {
        if self.state.load() != Self::READY {
            return None;
        }
        Some(Addr([self.addr[0].load(), self.addr[1].load()]))
    }
}

/// The index of an address, or 0 if there is no room for it.
#[inline(always)]
pub fn keep<'a>(sources: impl Fn(u32) -> Option<&'a Source>, addr: Addr) -> u32 {
    each(addr, |index| {
        let source = sources(index)?;
        if source.state.load() == 0 && source.state.replace(0, Source::CLAIMED) {
            source.addr[0].store(addr.0[0]);
            source.addr[1].store(addr.0[1]);
            source.state.swap(Source::READY);
        }
        source.addr()
    })
}

/// The index of an address that was kept, or 0.
#[inline(always)]
pub fn find<'a>(sources: impl Fn(u32) -> Option<&'a Source>, addr: Addr) -> u32 {
    each(addr, |index| sources(index)?.addr())
}

/// The first place of an address at which `at` finds it.
#[inline(always)]
fn each(addr: Addr, at: impl Fn(u32) -> Option<Addr>) -> u32 {
    let hash = (addr.0[0] ^ addr.0[1].rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    for choice in 0..CHOICES {
        let index = (hash as u32).wrapping_add(choice) % ADDRESSES;
        if index != 0 && at(index) == Some(addr) {
            return index;
        }
    }
    0
}

/// The source a flow has at its backend: an address's index and a port, as one word.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(transparent)]
pub struct Snat(pub u32);

impl Snat {
    /// The client.
    pub const NONE: Self = Self(0);
    /// The flow needs one, and the node has no address to give.
    pub const NO_ADDRESS: Self = Self(u32::MAX);
    /// The flow needs one, and every port tried is taken.
    pub const NO_PORT: Self = Self(u32::MAX - 1);

    #[inline(always)]
    #[must_use]
    pub const fn new(source: u32, port: PortBe) -> Self {
        Self(source << 16 | port.0 as u32)
    }

    /// Not a source, but the address that packets are wrapped with.
    #[inline(always)]
    #[must_use]
    pub const fn outer(source: u32) -> Self {
        Self::new(source, PortBe(0))
    }

    /// Whether it is one: sources have a port.
    #[inline(always)]
    #[must_use]
    pub const fn is_outer(self) -> bool {
        self.0 != 0 && self.port().0 == 0
    }

    #[inline(always)]
    #[must_use]
    pub const fn source(self) -> u32 {
        self.0 >> 16
    }

    #[inline(always)]
    #[must_use]
    pub const fn port(self) -> PortBe {
        PortBe(self.0 as u16)
    }
}

/// The node's addresses of one family that flows are given; those that routing prefers if there are none.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Pool {
    pub len: u64,
    pub all: [Addr; Self::MAX],
}

impl Pool {
    pub const MAX: usize = 8;
    pub const NONE: Self = Self { len: 0, all: [Addr([0; 2]); Self::MAX] };
}

/// The ports that flows are given.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Ports {
    pub first: u16,
    /// How many, less one.
    pub more: u16,
}

/// Ports tried for a flow, of all addresses together, before it is refused: with 95 % of them taken, one of a thousand flows finds none.
pub const TRIES: u32 = 320;

impl Ports {
    /// The port to try `n`-th for a flow: the client's own first, then all of them, in steps that differ from flow to flow. None where
    /// a step leads out of the range.
    #[inline(always)]
    #[must_use]
    pub const fn candidate(self, own: PortBe, hash: u64, n: u32) -> Option<PortBe> {
        let own = own.get().wrapping_sub(self.first);
        let at = if n == 0 {
            own as u32
        } else {
            // Odd steps come round to every number below a power of two.
            let step = (hash >> 32) as u32 | 1;
            self.scatter((hash as u32).wrapping_add(step.wrapping_mul(n)))
        };
        if at > self.more as u32 { None } else { Some(PortBe::new(self.first + at as u16)) }
    }

    /// Another number below the power of two, for each a different one: small steps would stay beyond the range for long.
    #[inline(always)]
    const fn scatter(self, number: u32) -> u32 {
        let mask = self.mask();
        let half = mask.count_ones() / 2 + 1;
        let mut number = number & mask;
        number ^= number >> half;
        number = number.wrapping_mul(0x9e37_79b1) & mask;
        number ^ number >> half
    }

    #[inline(always)]
    const fn mask(self) -> u32 {
        match NonZeroU32::new(self.more as u32) {
            Some(more) => u32::MAX >> more.leading_zeros(),
            None => 0,
        }
    }

    /// Whether a port is one of them.
    #[inline(always)]
    #[must_use]
    pub const fn has(self, port: PortBe) -> bool {
        port.get().wrapping_sub(self.first) <= self.more
    }
}

/// What the start and the steps of a flow's search are drawn from.
#[inline(always)]
#[must_use]
pub fn hash<A: Address>(client: A, port: PortBe) -> u64 {
    let mut hash = port.0 as u64 ^ 0x6a09_e667_f3bc_c908;
    client.absorb_pair(client, |word| {
        hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 32;
    });
    hash
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, vec::Vec};

    use super::*;
    use crate::addr::Ipv4Be;

    #[test]
    fn every_port_is_tried_once() {
        for (first, last) in [(61000, 65535), (1024, 65535), (40000, 40000), (30000, 30006), (32768, 60999)] {
            let ports = Ports { first, more: last - first };
            for client in 0..20 {
                let hash = hash(Ipv4Be(client), PortBe::new(77));
                let tried: Vec<_> =
                    (1..=ports.mask() + 1).filter_map(|n| ports.candidate(PortBe::new(77), hash, n)).collect();
                let distinct: HashSet<_> = tried.iter().map(|port| port.get()).collect();
                assert_eq!(tried.len(), usize::from(last - first) + 1);
                assert_eq!(distinct.len(), tried.len());
                assert!(tried.iter().all(|port| ports.has(*port)));
            }
        }
    }

    #[test]
    fn a_client_keeps_its_port_if_it_can() {
        let ports = Ports { first: 1024, more: 1000 };
        assert_eq!(ports.candidate(PortBe::new(2024), 5, 0), Some(PortBe::new(2024)));
        assert_eq!(ports.candidate(PortBe::new(2025), 5, 0), None);
        assert_eq!(ports.candidate(PortBe::new(80), 5, 0), None);
    }

    #[test]
    fn no_flow_tries_numbers_beyond_the_range_alone() {
        for ports in
            [Ports { first: 61000, more: 4535 }, Ports { first: 1024, more: 16_384 }, Ports { first: 40_000, more: 9 }]
        {
            let worst = (0..200_000_u32).map(|client| {
                let hash =
                    hash(Ipv4Be(client.wrapping_mul(0x9e37_79b9)), PortBe::new(40_000 + (client & 0xfff) as u16));
                (1..TRIES).filter(|n| ports.candidate(PortBe::new(77), hash, *n).is_some()).count()
            });
            assert!(worst.min() > Some(TRIES as usize / 4), "{ports:?}");
        }
    }

    #[test]
    fn nearly_every_flow_finds_one_of_the_last_ports() {
        let ports = Ports { first: 61000, more: 4535 };
        let mut taken = HashSet::new();
        let mut find = |client: u32, most: usize| {
            let hash = hash(Ipv4Be(client.wrapping_mul(0x9e37_79b9)), PortBe::new(40000));
            let free = (0..TRIES)
                .filter_map(|n| ports.candidate(PortBe::new(40000), hash, n))
                .find(|port| !taken.contains(&port.get()));
            if let Some(port) = free
                && taken.len() < most
            {
                taken.insert(port.get());
            }
            free.is_some()
        };
        let most = 4536 * 95 / 100;
        assert!((0..most as u32 * 2).filter(|client| !find(*client, most)).count() < 20);
        let failed = (0..100_000).filter(|client| !find(1_000_000 + client, most)).count();
        assert!(failed <= 100, "{failed} of 100000 found no port with 95 % of them taken");
    }

    #[test]
    fn an_address_is_kept_in_one_place() {
        let word = || Word::new(0);
        let sources: Vec<_> =
            (0..ADDRESSES).map(|_| Source { state: word(), addr: [word(), word()], pad: word() }).collect();
        let addrs: Vec<_> = (0..100).map(|n| Addr::from_v4([192, 0, 2, n])).collect();
        let at = |index: u32| sources.get(index as usize);
        assert_eq!(find(at, addrs[0]), 0);
        let indexes: Vec<_> = addrs.iter().map(|addr| keep(at, *addr)).collect();
        for (addr, index) in addrs.iter().zip(&indexes) {
            assert_ne!(*index, 0);
            assert_eq!((keep(at, *addr), find(at, *addr)), (*index, *index));
            assert_eq!(sources[*index as usize].addr(), Some(*addr));
        }
    }
}
