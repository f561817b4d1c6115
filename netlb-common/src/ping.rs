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

/// Reads an echo request or a reply to one, or a fragment of it. What a later fragment is of is not known; it has no identifier.
#[inline(always)]
pub fn parse<A: Messages>(packet: &(impl PacketBytes + ?Sized), is_reply: bool) -> Result<Parsed<A>, Ignore> {
    let (Header { source, destination, check: ip_check, ttl, protocol }, transport, part, id) = A::part(packet)?;
    let mut parsed = Parsed {
        tuple: Tuple { source, destination, source_port: PortBe(0), destination_port: PortBe(0), protocol },
        transport,
        transport_len: icmp::LEN,
        ttl,
        ip_check,
        check: 0,
        dont_fragment: true,
        segment: Segment::DATAGRAM,
        part,
        id,
    };
    if part != Part::Later {
        let header = packet.window(transport, icmp::LEN)?;
        if header.byte(0) != if is_reply { A::ECHO_REPLY } else { A::ECHO_REQUEST } {
            return Err(Ignore::NotTcpOrUdp);
        }
        parsed.check = header.half(icmp::CHECK);
        let identifier = PortBe(header.half(IDENTIFIER));
        if is_reply {
            parsed.tuple.destination_port = identifier;
        } else {
            parsed.tuple.source_port = identifier;
        }
    }
    Ok(parsed)
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
        assert_eq!(parse::<Ipv4Be>(&v4(8)[..40], false), Err(Ignore::Truncated));
    }

    #[test]
    fn fragments_are_told_by_their_header() {
        let id = u32::from_ne_bytes([0, 0, 0, 9]);
        for (bytes, part, port) in [([0x20, 0], Part::First, 0x1234), ([0, 1], Part::Later, 0)] {
            let mut frame = v4(8);
            frame[20..22].copy_from_slice(&bytes);
            frame[19] = 9;
            let parsed = parse::<Ipv4Be>(frame.as_slice(), false).unwrap();
            assert_eq!(
                (parsed.part, parsed.tuple.source_port.get(), parsed.id),
                (part, port, u16::from_ne_bytes([0, 9]) as u32)
            );
        }
        for (bytes, part, port) in [([0, 1], Part::First, 0x1234), ([0, 9], Part::Later, 0), ([0, 8], Part::Later, 0)] {
            let mut frame = v6(128);
            frame[20] = 44;
            frame.splice(54..54, [58, 0, bytes[0], bytes[1], 0, 0, 0, 9]);
            let parsed = parse::<Ipv6Be>(frame.as_slice(), false).unwrap();
            assert_eq!((parsed.part, parsed.tuple.source_port.get(), parsed.id), (part, port, id));
            assert_eq!((parsed.tuple.protocol, parsed.transport), (58, 62));
            frame[54] = 17;
            assert_eq!(parse::<Ipv6Be>(frame.as_slice(), false), Err(Ignore::NotTcpOrUdp), "UDP");
        }
        let mut atomic = v6(128);
        atomic[20] = 44;
        atomic.splice(54..54, [58, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(parse::<Ipv6Be>(atomic.as_slice(), false).map(|parsed| parsed.part), Ok(Part::Whole));
    }
}
