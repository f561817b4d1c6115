//! Packets in packets: IPv4 in IPv4 (RFC 2003) and IPv6 in IPv6 (RFC 2473), as balancing nodes send them to backends that answer clients
//! themselves.

use crate::{
    addr::{Ipv4Be, Ipv6Be},
    flow::{Family, NETWORK},
    wire::{
        Ignore, PacketBytes, Part,
        ipv4::{self, Ipv4},
        ipv6::Ipv6,
    },
};

/// The bits of a traffic class for congestion (RFC 3168 §5).
const ECN: u8 = 3;
const NOT_CAPABLE: u8 = 0;
const CAPABLE_1: u8 = 1;
const CAPABLE_0: u8 = 2;
const CONGESTION: u8 = 3;

/// A family whose packets are wrapped in packets of the same.
pub trait Tunnel: Family {
    /// The number of the protocol "a packet of this family".
    const INNER: u8;

    /// The traffic class of the packet that begins at an offset.
    fn traffic_class(packet: &(impl PacketBytes + ?Sized), at: usize) -> Result<u8, Ignore>;

    /// Whether the outer header is the shortest there is, of a packet that is no fragment.
    fn is_plain(packet: &(impl PacketBytes + ?Sized)) -> bool;
}

impl Tunnel for Ipv4Be {
    const INNER: u8 = 4;

    #[inline(always)]
    fn traffic_class(packet: &(impl PacketBytes + ?Sized), at: usize) -> Result<u8, Ignore> {
        let ip = Ipv4::at(packet, at)?;
        ip.header_len()?;
        Ok(ip.traffic_class())
    }

    #[inline(always)]
    fn is_plain(packet: &(impl PacketBytes + ?Sized)) -> bool {
        Ipv4::at(packet, NETWORK).is_ok_and(|ip| ip.header_len() == Ok(ipv4::LEN) && ip.part() == Part::Whole)
    }
}

impl Tunnel for Ipv6Be {
    const INNER: u8 = 41;

    #[inline(always)]
    fn traffic_class(packet: &(impl PacketBytes + ?Sized), at: usize) -> Result<u8, Ignore> {
        Ok(Ipv6::at(packet, at)?.traffic_class())
    }

    #[inline(always)]
    fn is_plain(_: &(impl PacketBytes + ?Sized)) -> bool {
        true
    }
}

/// The packet within a packet: offsets are those it will have without the header around it.
#[derive(Clone, Copy, Debug)]
pub struct Inner<'a, P: ?Sized> {
    packet: &'a P,
    skipped: usize,
}

impl<'a, P: ?Sized> Inner<'a, P> {
    #[inline(always)]
    #[must_use]
    pub const fn of<A: Family>(packet: &'a P) -> Self {
        Self::behind(packet, A::HEADER_LEN)
    }

    /// The packet behind this many bytes.
    #[inline(always)]
    #[must_use]
    pub const fn behind(packet: &'a P, skipped: usize) -> Self {
        Self { packet, skipped }
    }
}

impl<P: PacketBytes + ?Sized> PacketBytes for Inner<'_, P> {
    type Window = P::Window;

    #[inline(always)]
    fn window(&self, offset: usize, len: usize) -> Result<P::Window, Ignore> {
        self.packet.window(self.skipped + offset, len)
    }
}

/// The traffic class that a packet has when it is unwrapped, by RFC 6040 §4.2; none if it is to be dropped.
#[inline(always)]
#[must_use]
pub const fn unwrapped_class(outer: u8, inner: u8) -> Option<u8> {
    match (outer & ECN, inner & ECN) {
        (CONGESTION, NOT_CAPABLE) => None,
        (CONGESTION, _) => Some(inner | CONGESTION),
        (CAPABLE_1, CAPABLE_0) => Some(inner & !ECN | CAPABLE_1),
        _ => Some(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Fields as _;

    #[test]
    fn congestion_is_told_to_who_wants_to_hear_of_it() {
        for dscp in [0, 0xb8] {
            let class = |outer: u8, inner: u8| unwrapped_class(0x20 | outer, dscp | inner);
            // RFC 6040, figure 4: columns are the outer field.
            for (inner, expected) in [
                (NOT_CAPABLE, [Some(0), Some(0), Some(0), None]),
                (CAPABLE_0, [Some(2), Some(1), Some(2), Some(3)]),
                (CAPABLE_1, [Some(1), Some(1), Some(1), Some(3)]),
                (CONGESTION, [Some(3), Some(3), Some(3), Some(3)]),
            ] {
                for (outer, expected) in (0..).zip(expected) {
                    assert_eq!(class(outer, inner), expected.map(|ecn| dscp | ecn), "{inner} in {outer}");
                }
            }
        }
    }

    #[test]
    fn the_outer_header_has_no_options_and_is_of_no_fragment() {
        let mut frame = [0; 34];
        (frame[14], frame[15]) = (0x45, 0xb9);
        assert_eq!(Ipv4Be::traffic_class(&frame[..], NETWORK), Ok(0xb9));
        assert!(Ipv4Be::is_plain(&frame[..]) && !Ipv4Be::is_plain(&frame[..33]));
        frame[14] = 0x46;
        assert!(!Ipv4Be::is_plain(&frame[..]));
        (frame[14], frame[20]) = (0x45, 0x20);
        assert!(!Ipv4Be::is_plain(&frame[..]));
        frame[14] = 0x65;
        assert_eq!(Ipv4Be::traffic_class(&frame[..], NETWORK), Err(Ignore::Malformed));
        let mut frame = [0; 54];
        (frame[14], frame[15]) = (0x6b, 0x9f);
        assert_eq!(Ipv6Be::traffic_class(&frame[..], NETWORK), Ok(0xb9));
    }

    #[test]
    fn the_inner_packet_is_read_as_if_it_were_alone() {
        let bytes: std::vec::Vec<u8> = (0..100).collect();
        let inner = Inner::of::<Ipv4Be>(bytes.as_slice());
        assert_eq!(inner.window(NETWORK, 4).map(|window| window.byte(0)), Ok(34));
        assert!(inner.window(100 - 20, 1).is_err());
    }
}
