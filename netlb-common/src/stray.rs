//! Packets of other protocols than TCP and UDP, where their destination is of the networks that are services' or nobody's.

use crate::{
    addr::{Ipv4Be, Ipv6Be},
    flow::{Family, NETWORK},
    wire::{
        Fields as _, Ignore, PacketBytes, Part,
        ipv4::{self, Ipv4},
        ipv6::{self, Ipv6},
    },
};

/// What such a packet is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stray {
    /// What a host asks another to find out whether it is there. Whole, and without options.
    EchoRequest,
    /// What keeps networks going, such as ICMP errors and neighbour discovery; and what would have to be looked into further.
    Signal,
    Other,
}

/// A family whose packets are told apart.
pub trait Strays: Family {
    /// ICMP's number.
    const ICMP: u8;
    const ECHO_REQUEST: u8;
    const ECHO_REPLY: u8;

    fn stray(packet: &(impl PacketBytes + ?Sized)) -> Result<Stray, Ignore>;

    /// What an ICMP message behind the shortest IP header is.
    #[inline(always)]
    fn message(packet: &(impl PacketBytes + ?Sized)) -> Result<Stray, Ignore> {
        let kind = packet.window(NETWORK + Self::HEADER_LEN, 8)?.byte(0);
        Ok(if kind == Self::ECHO_REQUEST {
            Stray::EchoRequest
        } else if kind == Self::ECHO_REPLY {
            Stray::Other
        } else {
            Stray::Signal
        })
    }
}

impl Strays for Ipv4Be {
    const ICMP: u8 = 1;
    const ECHO_REQUEST: u8 = 8;
    const ECHO_REPLY: u8 = 0;

    #[inline(always)]
    fn stray(packet: &(impl PacketBytes + ?Sized)) -> Result<Stray, Ignore> {
        let ip = Ipv4::at(packet, NETWORK)?;
        if ip.protocol() != Self::ICMP {
            return Ok(Stray::Other);
        }
        if ip.part() != Part::Whole || ip.header_len()? != ipv4::LEN {
            return Ok(Stray::Signal);
        }
        Self::message(packet)
    }
}

impl Strays for Ipv6Be {
    const ICMP: u8 = 58;
    const ECHO_REQUEST: u8 = 128;
    const ECHO_REPLY: u8 = 129;

    #[inline(always)]
    fn stray(packet: &(impl PacketBytes + ?Sized)) -> Result<Stray, Ignore> {
        let header = Ipv6::at(packet, NETWORK)?.next_header();
        if header == Self::ICMP {
            return Self::message(packet);
        }
        // Multicast listeners' reports stand behind a hop-by-hop header.
        Ok(if ipv6::is_extension(header) { Stray::Signal } else { Stray::Other })
    }
}

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use super::*;

    fn v4(protocol: u8, rest: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 34];
        (frame[14], frame[23]) = (0x45, protocol);
        frame.extend(rest);
        frame
    }

    fn v6(header: u8, rest: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 54];
        (frame[14], frame[20]) = (0x60, header);
        frame.extend(rest);
        frame
    }

    #[test]
    fn echoes_are_told_from_what_keeps_networks_going() {
        let of = |kind: u8| [kind, 0, 0, 0, 0, 0, 0, 0];
        for (kind, stray) in [(8, Stray::EchoRequest), (0, Stray::Other), (3, Stray::Signal), (11, Stray::Signal)] {
            assert_eq!(Ipv4Be::stray(v4(1, &of(kind)).as_slice()), Ok(stray), "{kind}");
        }
        for kind in 0..=255 {
            let stray = match kind {
                128 => Stray::EchoRequest,
                129 => Stray::Other,
                _ => Stray::Signal,
            };
            assert_eq!(Ipv6Be::stray(v6(58, &of(kind)).as_slice()), Ok(stray), "{kind}");
        }
        assert_eq!(Ipv6Be::stray(v6(0, &[]).as_slice()), Ok(Stray::Signal));
        assert_eq!(Ipv6Be::stray(v6(132, &[]).as_slice()), Ok(Stray::Other));
        assert_eq!(Ipv4Be::stray(v4(132, &[]).as_slice()), Ok(Stray::Other));
        let mut fragment = v4(1, &of(8));
        fragment[20] = 0x20;
        assert_eq!(Ipv4Be::stray(fragment.as_slice()), Ok(Stray::Signal));
        let mut options = v4(1, &of(8));
        options[14] = 0x46;
        assert_eq!(Ipv4Be::stray(options.as_slice()), Ok(Stray::Signal));
        assert_eq!(Ipv4Be::stray(&v4(1, &of(8))[..40]), Err(Ignore::Truncated));
    }
}
