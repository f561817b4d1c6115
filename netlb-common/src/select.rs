//! Choosing a ring's slot for a new flow.

use crate::{
    addr::{Address, Ipv4Be, PortBe},
    flow::{HashKey, Tuple},
};

/// The key of the selection hash: public and the same on every node, so that all of them send a flow to the same backend, also when it
/// moves from one to the other. Digits of the square roots of 2, 3, 5 and 7.
const PUBLIC: HashKey =
    HashKey::new([0x6a09_e667_f3bc_c908, 0xbb67_ae85_84ca_a73b, 0x3c6e_f372_fe94_f82b, 0xa54f_f53a_5f1d_36f1]);

/// The selection hash of a flow.
#[inline(always)]
#[must_use]
pub fn hash<A: Address>(tuple: &Tuple<A>) -> u32 {
    (PUBLIC.hash(tuple) >> 32) as u32
}

/// The selection hash of a client that keeps its backend or goes by its address: of that alone, so that all frontends of a service agree.
#[inline(always)]
#[must_use]
pub fn client_hash<A: Address>(client: A) -> u32 {
    hash(&Tuple {
        source: client,
        destination: client,
        source_port: PortBe(0),
        destination_port: PortBe(0),
        protocol: 0,
    })
}

/// The same for the node itself, whose sockets have no address yet when a backend is chosen: by its secret key, so that not all nodes choose
/// the same one.
#[inline(always)]
#[must_use]
pub fn own_hash(key: HashKey) -> u32 {
    let none = Ipv4Be(0);
    let ports = (PortBe(0), PortBe(0));
    let tuple = Tuple { source: none, destination: none, source_port: ports.0, destination_port: ports.1, protocol: 0 };
    (key.hash(&tuple) >> 32) as u32
}

/// How much a backend has to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Load {
    flows: u32,
    weight: u32,
}

impl Load {
    /// Of a backend that was given `created` flows so far. `base` says how many of them ended, as [`Backend::base`] does.
    ///
    /// [`Backend::base`]: crate::maps::Backend::base
    #[inline(always)]
    #[must_use]
    pub const fn new(created: u64, base: u64, weight: u32) -> Self {
        let flows = created.wrapping_add(base);
        // The two are not written at the same moment, so that fewer than none are possible.
        let flows = if flows > u64::MAX / 2 {
            0
        } else if flows > u32::MAX as u64 {
            u32::MAX
        } else {
            flows as u32
        };
        Self { flows, weight: if weight == 0 { 1 } else { weight } }
    }

    /// Whether there are more flows for each unit of weight.
    #[inline(always)]
    #[must_use]
    pub const fn is_more_than(self, other: Self) -> bool {
        self.flows as u64 * other.weight as u64 > other.flows as u64 * self.weight as u64
    }
}

/// The slot for a hash in a ring of `len` slots: by multiplication, which costs less than a division and is as even.
#[inline(always)]
#[must_use]
pub const fn slot(hash: u32, len: u32) -> u32 {
    ((hash as u64 * len as u64) >> 32) as u32
}

/// The slot for the n-th flow of a round.
#[inline(always)]
#[must_use]
pub const fn turn(n: u64, len: u32) -> u32 {
    if len == 0 { 0 } else { (n as u32) % len }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_within_the_ring_and_even() {
        let mut counts = [0_u32; 251];
        for port in 0..50_000 {
            let tuple = Tuple {
                source: Ipv4Be(u32::from_ne_bytes([10, 244, 1, 2])),
                destination: Ipv4Be(u32::from_ne_bytes([10, 96, 0, 10])),
                source_port: PortBe::new(port),
                destination_port: PortBe::new(80),
                protocol: 6,
            };
            counts[slot(hash(&tuple), 251) as usize] += 1;
        }
        // 199 each; a binomial spread of 14.
        assert!(counts.iter().all(|count| (120..280).contains(count)), "{counts:?}");
    }

    #[test]
    fn loads_are_compared_by_weight() {
        let load = |flows, weight| Load::new(flows, 0, weight);
        assert!(load(2, 1).is_more_than(load(1, 1)) && !load(1, 1).is_more_than(load(1, 1)));
        assert!(!load(6, 3).is_more_than(load(2, 1)) && load(7, 3).is_more_than(load(2, 1)));
        assert!(load(u64::from(u32::MAX), 1).is_more_than(load(u64::from(u32::MAX), u32::MAX)));
        assert_eq!(Load::new(10, 7_u64.wrapping_neg(), 1), load(3, 1));
        assert_eq!(Load::new(10, 11_u64.wrapping_neg(), 1), load(0, 1), "fewer than none");
        assert_eq!(load(0, 0), load(0, 1), "a record without a weight");
    }

    #[test]
    fn turns_go_round() {
        let turns: std::vec::Vec<_> = (0..7).map(|n| turn(n, 3)).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(turn(5, 0), 0);
    }
}
