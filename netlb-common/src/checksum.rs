//! The Internet checksum: full sums (RFC 1071) and incremental updates (RFC 1624).
//!
//! One's complement sums do not depend on byte order (RFC 1071 §2(B)), so words are summed as they are loaded from the packet and the
//! result is stored as it is.

use crate::addr::Address;

/// The change that a rewrite makes to a one's complement sum: a sum of words of 16 and 32 bits, some thousands of them at most, which is
/// folded when it is used.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Delta(u64);

impl Delta {
    /// From one address to another.
    #[inline(always)]
    #[must_use]
    pub fn address<A: Address>(old: A, new: A) -> Self {
        Self(old.complement_sum() + new.sum())
    }

    /// From one 16-bit word to another.
    #[inline(always)]
    #[must_use]
    pub const fn half(old: u16, new: u16) -> Self {
        Self(!old as u64 + new as u64)
    }

    /// One hop less: of the hops left, which are the first byte of their word.
    pub const HOP: Self = Self(!u16::from_ne_bytes([1, 0]) as u64);

    #[inline(always)]
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Whether no sum shows it: 0 and 0xffff are the same to all of them.
    #[inline(always)]
    #[must_use]
    pub const fn is_nothing(self) -> bool {
        matches!(fold(self.0), 0 | 0xffff)
    }

    /// As the kernel has it (`__wsum`).
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }
}

/// Folds a sum of at most 2^16 32-bit words into 16 bits, with end-around carry.
#[inline(always)]
const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    // Now at most 33 bits, 18, and 17; the last time, a carry leaves no other.
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

/// The checksum field for a sum of words.
#[inline(always)]
#[must_use]
pub const fn finish(sum: u64) -> u16 {
    !fold(sum)
}

/// A checksum field after a change of what it covers (RFC 1624 eqn. 3: HC' = ~(~HC + ~m + m')).
#[inline(always)]
#[must_use]
pub const fn update(check: u16, delta: Delta) -> u16 {
    !fold(!check as u64 + delta.0)
}

/// A UDP checksum field after a change. Zero means "none" on IPv4 and stays; a sum that comes out as zero is sent as ones (RFC 768).
#[inline(always)]
#[must_use]
pub const fn update_udp(check: u16, delta: Delta) -> u16 {
    if check == 0 { 0 } else { update_to_udp(check, delta) }
}

/// The same of a field that may be zero by now, after another change.
#[inline(always)]
#[must_use]
pub const fn update_to_udp(check: u16, delta: Delta) -> u16 {
    match update(check, delta) {
        0 => 0xffff,
        updated => updated,
    }
}

/// Whether a checksum field changed as one does that a device has yet to complete (`CHECKSUM_PARTIAL`): such a one has the sum so far,
/// while all others have its complement, and change the other way. Of a change that is [nothing](Delta::is_nothing) it cannot be told.
#[inline(always)]
#[must_use]
pub const fn changed_as_partial(before: u16, after: u16, delta: Delta) -> bool {
    after == fold(before as u64 + delta.0)
}

/// The folded, uncomplemented sum of some bytes, added to `start`. For tests and for messages netlb writes itself.
#[must_use]
pub fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start as u64;
    let mut chunks = bytes.chunks_exact(2);
    for chunk in &mut chunks {
        sum += u16::from_ne_bytes([chunk[0], chunk[1]]) as u64;
    }
    if let [last] = chunks.remainder() {
        sum += u16::from_ne_bytes([*last, 0]) as u64;
    }
    fold(sum)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addr::{Ipv4Be, Ipv6Be};

    proptest! {
        #[test]
        fn updating_for_an_ipv4_address_equals_summing_again(mut bytes in prop::collection::vec(any::<u8>(), 24..64), new: [u8; 4], at in 0_usize..10) {
            let at = at * 2;
            let before = !sum(&bytes, 0);
            let old: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
            bytes[at..at + 4].copy_from_slice(&new);
            let delta = Delta::address(Ipv4Be(u32::from_ne_bytes(old)), Ipv4Be(u32::from_ne_bytes(new)));
            prop_assert!(same(update(before, delta), !sum(&bytes, 0)));
        }

        #[test]
        fn updating_for_an_ipv6_address_and_a_port_equals_summing_again(mut bytes in prop::collection::vec(any::<u8>(), 40..64), new: [u8; 16], port: [u8; 2]) {
            let before = !sum(&bytes, 0);
            let words = |b: &[u8]| crate::addr::Addr::from_bytes(b.try_into().unwrap()).0;
            let old = Ipv6Be(words(&bytes[..16]));
            let old_port = u16::from_ne_bytes([bytes[20], bytes[21]]);
            bytes[..16].copy_from_slice(&new);
            bytes[20..22].copy_from_slice(&port);
            let delta = Delta::address(old, Ipv6Be(words(&new))).plus(Delta::half(old_port, u16::from_ne_bytes(port)));
            prop_assert!(same(update(before, delta), !sum(&bytes, 0)));
        }

        #[test]
        fn a_udp_checksum_never_becomes_zero(check: u16, delta: u32) {
            prop_assert_eq!(update_udp(check, Delta(delta.into())) == 0, check == 0);
        }

        #[test]
        fn folding_is_taking_the_rest(sum in 0_u64..1 << 48) {
            prop_assert_eq!(fold(sum) % 0xffff, (sum % 0xffff) as u16);
            prop_assert_eq!(fold(sum) == 0, sum == 0);
            prop_assert_eq!(u64::from(Delta(sum).word()) % 0xffff, sum % 0xffff);
        }

        #[test]
        fn of_a_field_that_changed_it_is_told_what_it_is(before: u16, change: u32) {
            let delta = Delta(change.into());
            prop_assume!(!delta.is_nothing());
            prop_assert!(changed_as_partial(before, fold(u64::from(before) + u64::from(change)), delta));
            prop_assert!(!changed_as_partial(before, update(before, delta), delta));
            prop_assert!(!changed_as_partial(before, update_to_udp(before, delta), delta));
        }

        #[test]
        fn a_change_is_nothing_where_no_sum_shows_it(check: u16, change in prop_oneof![any::<u32>(), (0..=0x1_0001_u32).prop_map(|n| n.wrapping_mul(0xffff))]) {
            let delta = Delta(change.into());
            prop_assert_eq!(delta.is_nothing(), same(update(check, delta), check));
        }

        #[test]
        fn a_hop_less_is_a_change_of_the_first_byte(hops in 1_u8.., protocol: u8, check: u16) {
            let half = |hops| u16::from_ne_bytes([hops, protocol]);
            prop_assert!(same(update(check, Delta::HOP), update(check, Delta::half(half(hops), half(hops - 1)))));
        }
    }

    /// 0 and 0xffff are the two forms of one sum.
    fn same(a: u16, b: u16) -> bool {
        a == b || (a == 0 && b == 0xffff) || (a == 0xffff && b == 0)
    }

    #[test]
    fn the_example_of_rfc_1624_gives_its_result() {
        // RFC 1624 §4: HC = 0xDD2F, m = 0x5555, m' = 0x3285 → HC' = 0x0000.
        assert_eq!(update(0xdd2f, Delta::half(0x5555, 0x3285)), 0);
    }
}
