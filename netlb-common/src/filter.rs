//! The address filter: lets traffic that is none of ours leave after two look-ups in a bitmap.
//!
//! One bit per address and kind. A set bit means "perhaps": the flow table and the maps behind it decide. The control loop counts how
//! many addresses share a bit, and clears it with the last one.

use crate::addr::Address;

/// What an address is looked up as.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// The destination of a packet to a service.
    Frontend,
    /// The source of a reply.
    Backend,
}

/// Bits in one word of the bitmap.
pub const WORD_BITS: u32 = u64::BITS;

/// Spreads addresses (2^64 divided by the golden ratio, Knuth TAOCP vol. 3 §6.4). Nothing is gained by choosing addresses that collide:
/// they only take the longer way to "not ours".
const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// The bit of an address in a bitmap of `2^bits_log2` bits.
#[inline(always)]
#[must_use]
pub fn bit<A: Address>(addr: A, kind: Kind, bits_log2: u32) -> u32 {
    let words = addr.to_map().0;
    let salt = match kind {
        Kind::Frontend => 0,
        Kind::Backend => 0x5851_f42d_4c95_7f2d,
    };
    let hash = if A::IS_V6 { (words[0] ^ salt).wrapping_mul(MULTIPLIER) ^ words[1] } else { words[1] ^ salt };
    let hash = hash.wrapping_mul(MULTIPLIER);
    (hash >> (u64::BITS - bits_log2)) as u32
}

/// The size of the bitmap for this many addresses: at least eight bits each, within what caches hold.
#[must_use]
pub const fn bits_log2(addresses: u64) -> u32 {
    let wanted = (addresses * 8).next_power_of_two().ilog2();
    if wanted < 15 {
        15
    } else if wanted > 24 {
        24
    } else {
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Addr, Ipv4Be, Ipv6Be};

    #[test]
    fn neighbouring_addresses_spread_and_kinds_differ() {
        let mut bits = std::collections::HashSet::new();
        for last in 0..=255_u8 {
            let v4 = Ipv4Be::from_map(Addr::from_v4([10, 96, 0, last]));
            let v6 = Ipv6Be::from_map(Addr::from_bytes([0xfd, 0, 0, 0x10, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]));
            for kind in [Kind::Frontend, Kind::Backend] {
                bits.insert(bit(v4, kind, 20));
                bits.insert(bit(v6, kind, 20));
            }
        }
        assert!(bits.len() > 1000, "{} of 1024 bits differ", bits.len());
        assert!(bits.iter().all(|bit| *bit < 1 << 20));
    }

    #[test]
    fn sizes_stay_within_their_limits() {
        assert_eq!(bits_log2(1), 15);
        assert_eq!(bits_log2(147_456), 21);
        assert_eq!(bits_log2(1 << 40), 24);
    }
}
