//! Choosing a ring's slot for a new flow.

use crate::{
    addr::{Address, PortBe},
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

/// The selection hash of a client that keeps its backend: of its address alone, so that all frontends of a service agree.
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
    use crate::addr::Ipv4Be;

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
    fn turns_go_round() {
        let turns: std::vec::Vec<_> = (0..7).map(|n| turn(n, 3)).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(turn(5, 0), 0);
    }
}
