//! Networks that the programs know as constants.

use crate::addr::Addr;

/// The addresses that begin alike.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Network {
    pub addr: Addr,
    pub mask: Addr,
}

impl Network {
    /// The addresses that have the first `bits` bits of this one, counted in the form that maps hold.
    #[must_use]
    pub const fn new(addr: Addr, bits: u32) -> Self {
        const fn half(bits: u32) -> u64 {
            match bits {
                0 => 0,
                64.. => u64::MAX,
                _ => (!(u64::MAX >> bits)).to_be(),
            }
        }
        let mask = Addr([half(bits), half(bits.saturating_sub(64))]);
        Self { addr: Addr([addr.0[0] & mask.0[0], addr.0[1] & mask.0[1]]), mask }
    }

    #[inline(always)]
    #[must_use]
    pub const fn has(&self, addr: Addr) -> bool {
        let ([a, b], [m, n]) = (addr.0, self.mask.0);
        let [c, d] = self.addr.0;
        ((a & m) ^ c) | ((b & n) ^ d) == 0
    }
}

/// A few networks.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct Networks {
    pub len: u64,
    pub all: [Network; Self::MAX],
}

impl Networks {
    pub const MAX: usize = 8;
    pub const NONE: Self = Self { len: 0, all: [Network { addr: Addr([0; 2]), mask: Addr([0; 2]) }; Self::MAX] };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_has_what_begins_with_its_bits() {
        let v4 = |a, b, c, d| Addr::from_v4([a, b, c, d]);
        let network = Network::new(v4(10, 96, 7, 1), 96 + 12);
        assert!(network.has(v4(10, 96, 0, 1)) && network.has(v4(10, 111, 255, 255)));
        assert!(!network.has(v4(10, 112, 0, 0)) && !network.has(v4(11, 96, 0, 1)));
        let all = Network::new(v4(1, 2, 3, 4), 96);
        assert!(all.has(v4(255, 0, 0, 1)) && !all.has(Addr::from_bytes([0xfd; 16])));
        let mut bytes = [0xfd; 16];
        let one = Network::new(Addr::from_bytes(bytes), 128);
        assert!(one.has(Addr::from_bytes(bytes)));
        let wide = Network::new(Addr::from_bytes(bytes), 70);
        bytes[15] = 0;
        assert!(!one.has(Addr::from_bytes(bytes)) && wide.has(Addr::from_bytes(bytes)));
        bytes[8] = 0;
        assert!(!wide.has(Addr::from_bytes(bytes)));
        assert!(Network::new(Addr::default(), 0).has(Addr::from_bytes(bytes)));
    }
}
