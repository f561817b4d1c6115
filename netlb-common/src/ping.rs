//! Echo requests and their replies, as flows: what is a port elsewhere is the identifier here, at the end that asks.

use crate::{
    addr::PortBe,
    conntrack::Segment,
    flow::{Parsed, Tuple},
    icmp::{Header, Messages},
    wire::{Fields as _, Ignore, PacketBytes, Part, icmp},
};

/// Where the identifier stands in a message (RFC 792, RFC 4443 §4.1).
pub const IDENTIFIER: usize = 4;

/// Reads an echo request, or a reply to one. It must be whole.
#[inline(always)]
pub fn parse<A: Messages>(packet: &(impl PacketBytes + ?Sized), is_reply: bool) -> Result<Parsed<A>, Ignore> {
    let (Header { source, destination, check: ip_check, ttl, protocol }, transport, _) = A::outer(packet)?;
    let header = packet.window(transport, icmp::LEN)?;
    if header.byte(0) != if is_reply { A::ECHO_REPLY } else { A::ECHO_REQUEST } {
        return Err(Ignore::NotTcpOrUdp);
    }
    let (identifier, none) = (PortBe(header.half(IDENTIFIER)), PortBe(0));
    let (source_port, destination_port) = if is_reply { (none, identifier) } else { (identifier, none) };
    Ok(Parsed {
        tuple: Tuple { source, destination, source_port, destination_port, protocol },
        transport,
        transport_len: icmp::LEN,
        ttl,
        ip_check,
        check: header.half(icmp::CHECK),
        dont_fragment: true,
        segment: Segment::DATAGRAM,
        part: Part::Whole,
        id: 0,
    })
}

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use super::*;
    use crate::addr::{Ipv4Be, Ipv6Be};

    fn v4(kind: u8) -> Vec<u8> {
        let mut frame = vec![0; 34];
        (frame[14], frame[17], frame[22], frame[23]) = (0x45, 28, 64, 1);
        frame.extend([kind, 0, 1, 2, 0x12, 0x34, 0, 1]);
        frame
    }

    fn v6(kind: u8) -> Vec<u8> {
        let mut frame = vec![0; 54];
        (frame[14], frame[19], frame[20], frame[21]) = (0x60, 8, 58, 64);
        frame.extend([kind, 0, 1, 2, 0x12, 0x34, 0, 1]);
        frame
    }

    #[test]
    fn the_identifier_is_the_port_of_who_asks() {
        let request = parse::<Ipv4Be>(v4(8).as_slice(), false).unwrap();
        assert_eq!((request.tuple.source_port.get(), request.tuple.destination_port.get()), (0x1234, 0));
        let reply = parse::<Ipv4Be>(v4(0).as_slice(), true).unwrap();
        assert_eq!(reply.tuple, request.tuple.reversed());
        let request = parse::<Ipv6Be>(v6(128).as_slice(), false).unwrap();
        let reply = parse::<Ipv6Be>(v6(129).as_slice(), true).unwrap();
        assert_eq!((reply.tuple, request.tuple.protocol), (request.tuple.reversed(), 58));
    }

    #[test]
    fn nothing_else_is_taken_for_one() {
        for kind in (0..=255).filter(|kind| *kind != 8) {
            assert_eq!(parse::<Ipv4Be>(v4(kind).as_slice(), false), Err(Ignore::NotTcpOrUdp), "{kind}");
        }
        for kind in (0..=255).filter(|kind| *kind != 129) {
            assert_eq!(parse::<Ipv6Be>(v6(kind).as_slice(), true), Err(Ignore::NotTcpOrUdp), "{kind}");
        }
        let mut fragment = v4(8);
        fragment[20] = 0x20;
        assert_eq!(parse::<Ipv4Be>(fragment.as_slice(), false), Err(Ignore::NotTcpOrUdp));
        assert_eq!(parse::<Ipv4Be>(&v4(8)[..40], false), Err(Ignore::Truncated));
    }
}
