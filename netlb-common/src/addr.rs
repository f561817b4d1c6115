//! Addresses and ports in network order, as types.
//!
//! A value holds the packet's bytes as they are, so that the data path copies and compares and never converts. [`Address`] is what
//! lets one source serve both families.

use core::fmt::Debug;

/// A port in network order.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(transparent)]
pub struct PortBe(pub u16);

impl PortBe {
    #[must_use]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be())
    }

    #[must_use]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

/// An IPv4 address in network order.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(transparent)]
pub struct Ipv4Be(pub u32);

/// An IPv6 address in network order.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(transparent)]
pub struct Ipv6Be(pub [u64; 2]);

/// An address of either family as maps hold it: IPv6, or IPv4 mapped into it (RFC 4291 §2.5.5.2).
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[repr(transparent)]
pub struct Addr(pub [u64; 2]);

/// The second half of `::ffff:0.0.0.0`, as loaded from its bytes.
const MAPPED: u64 = u64::from_ne_bytes([0, 0, 0xff, 0xff, 0, 0, 0, 0]);
/// Where the IPv4 address lies in that half.
const MAPPED_SHIFT: u32 = if cfg!(target_endian = "little") { 32 } else { 0 };

impl Addr {
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Self([u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes([i, j, k, l, m, n, o, p])])
    }

    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        let [a, b, c, d, e, f, g, h] = self.0[0].to_ne_bytes();
        let [i, j, k, l, m, n, o, p] = self.0[1].to_ne_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    #[must_use]
    pub const fn from_v4(octets: [u8; 4]) -> Self {
        Self([0, MAPPED | (u32::from_ne_bytes(octets) as u64) << MAPPED_SHIFT])
    }

    #[must_use]
    pub const fn is_v4(self) -> bool {
        self.0[0] == 0 && self.0[1] & !(0xffff_ffff << MAPPED_SHIFT) == MAPPED
    }

    /// Whether it is a host's own, whatever host it is.
    #[must_use]
    pub fn is_loopback(self) -> bool {
        if self.is_v4() {
            Address::is_loopback(Ipv4Be::from_map(self))
        } else {
            Address::is_loopback(Ipv6Be::from_map(self))
        }
    }
}

/// One address family: what the pipeline is generic over.
pub trait Address: Copy + Eq + Debug {
    const IS_V6: bool;
    /// Bytes of an address.
    const LEN: usize;

    /// The form maps hold.
    fn to_map(self) -> Addr;
    /// Back from the form maps hold. The record is known to be of this family.
    fn from_map(addr: Addr) -> Self;
    /// Feeds a pair of addresses to a hash, a 64-bit word at a time.
    fn absorb_pair(self, other: Self, absorb: impl FnMut(u64));
    /// The sum of its 32-bit words, for checksum arithmetic: at most 4 words, so it cannot overflow.
    fn sum(self) -> u64;
    /// The sum of the complements of its 32-bit words.
    fn complement_sum(self) -> u64;
    /// Whether hosts beyond the link can answer to it: it is no loopback or link-local address, nor none at all.
    fn is_routable(self) -> bool;
    /// Whether it stands for the host itself.
    fn is_loopback(self) -> bool;
    /// Whether it is one host's, to which an answer can go: no group's, nobody's, not everybody's, and no loopback address.
    fn is_answerable(self) -> bool;
}

impl Address for Ipv4Be {
    const IS_V6: bool = false;
    const LEN: usize = 4;

    #[inline(always)]
    fn to_map(self) -> Addr {
        Addr([0, MAPPED | (self.0 as u64) << MAPPED_SHIFT])
    }

    #[inline(always)]
    fn from_map(addr: Addr) -> Self {
        Self((addr.0[1] >> MAPPED_SHIFT) as u32)
    }

    #[inline(always)]
    fn absorb_pair(self, other: Self, mut absorb: impl FnMut(u64)) {
        absorb((self.0 as u64) << 32 | other.0 as u64);
    }

    #[inline(always)]
    fn sum(self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    fn complement_sum(self) -> u64 {
        !self.0 as u64
    }

    #[inline(always)]
    fn is_routable(self) -> bool {
        let [a, b, ..] = self.0.to_ne_bytes();
        a != 0 && a != 127 && !(a == 169 && b == 254)
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.0.to_ne_bytes()[0] == 127
    }

    #[inline(always)]
    fn is_answerable(self) -> bool {
        let [a, ..] = self.0.to_ne_bytes();
        a != 0 && a != 127 && a < 224
    }
}

/// The sum of a word's 32-bit halves.
#[inline(always)]
fn halves(word: u64) -> u64 {
    (word & 0xffff_ffff) + (word >> 32)
}

impl Address for Ipv6Be {
    const IS_V6: bool = true;
    const LEN: usize = 16;

    #[inline(always)]
    fn to_map(self) -> Addr {
        Addr(self.0)
    }

    #[inline(always)]
    fn from_map(addr: Addr) -> Self {
        Self(addr.0)
    }

    #[inline(always)]
    fn absorb_pair(self, other: Self, mut absorb: impl FnMut(u64)) {
        absorb(self.0[0]);
        absorb(self.0[1]);
        absorb(other.0[0]);
        absorb(other.0[1]);
    }

    #[inline(always)]
    fn sum(self) -> u64 {
        halves(self.0[0]) + halves(self.0[1])
    }

    #[inline(always)]
    fn complement_sum(self) -> u64 {
        halves(!self.0[0]) + halves(!self.0[1])
    }

    #[inline(always)]
    fn is_routable(self) -> bool {
        // ::/64 has the unspecified and the loopback address, and mapped ones.
        let [a, b, ..] = self.0[0].to_ne_bytes();
        self.0[0] != 0 && !(a == 0xfe && b & 0xc0 == 0x80)
    }

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.0 == [0, 1_u64.to_be()]
    }

    #[inline(always)]
    fn is_answerable(self) -> bool {
        self.0[0] != 0 && self.0[0].to_ne_bytes()[0] != 0xff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_held_as_its_mapped_form() {
        let addr = Addr::from_v4([10, 96, 0, 10]);
        assert_eq!(addr.to_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 96, 0, 10]);
        assert!(addr.is_v4());
        assert_eq!(Ipv4Be::from_map(addr).to_map(), addr);
        assert_eq!(Ipv4Be::from_map(addr).0.to_ne_bytes(), [10, 96, 0, 10]);
    }

    #[test]
    fn what_nobody_beyond_the_link_answers_to_is_not_routable() {
        let v4 = |octets| Ipv4Be::from_map(Addr::from_v4(octets)).is_routable();
        assert!(v4([10, 0, 0, 1]) && v4([192, 0, 2, 1]) && v4([169, 253, 0, 1]));
        assert!(!v4([0, 0, 0, 0]) && !v4([127, 0, 0, 1]) && !v4([169, 254, 1, 1]));
        let v6 = |first: [u8; 2], last| {
            let mut bytes = [0; 16];
            (bytes[0], bytes[1], bytes[15]) = (first[0], first[1], last);
            Ipv6Be::from_map(Addr::from_bytes(bytes)).is_routable()
        };
        assert!(v6([0xfd, 0], 1) && v6([0x20, 0x01], 1));
        assert!(!v6([0, 0], 0) && !v6([0, 0], 1) && !v6([0xfe, 0x80], 1) && !v6([0xfe, 0xbf], 1));
    }

    #[test]
    fn an_ipv6_address_is_held_as_it_is() {
        let bytes = [0xfd, 0, 0, 0x10, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10];
        let addr = Addr::from_bytes(bytes);
        assert!(!addr.is_v4());
        assert_eq!(addr.to_bytes(), bytes);
        assert_eq!(Ipv6Be::from_map(addr).to_map(), addr);
    }
}
