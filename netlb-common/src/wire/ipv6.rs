//! IPv6 and the extension headers that may stand before a transport header (RFC 8200 §4).

use core::mem::{offset_of, size_of};

use network_types::ip::Ipv6Hdr;

use super::{Fields, Ignore, PacketBytes, Part, tcp, udp};
use crate::{addr::Ipv6Be, opaque::any};

pub const LEN: usize = size_of::<Ipv6Hdr>();
pub const PAYLOAD_LEN: usize = offset_of!(Ipv6Hdr, payload_len);
pub const NEXT_HEADER: usize = offset_of!(Ipv6Hdr, next_hdr);
pub const HOP_LIMIT: usize = offset_of!(Ipv6Hdr, hop_limit);
pub const SOURCE: usize = offset_of!(Ipv6Hdr, src_addr);
pub const DESTINATION: usize = offset_of!(Ipv6Hdr, dst_addr);

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
pub(crate) const FRAGMENT_LEN: usize = 8;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// More than anybody sends; the verifier wants a bound.
const MAX_EXTENSIONS: usize = 6;
/// Where a transport header may stand: the same.
const MAX_OFFSET: usize = 4095;

/// A header that is there.
#[derive(Clone, Copy, Debug)]
pub struct Ipv6<W>(W);

impl<W: Fields> Ipv6<W> {
    #[inline(always)]
    pub fn at(packet: &(impl PacketBytes<Window = W> + ?Sized), offset: usize) -> Result<Self, Ignore> {
        let window = packet.window(offset, LEN)?;
        if window.byte(0) >> 4 == 6 { Ok(Self(window)) } else { Err(Ignore::Malformed) }
    }

    #[inline(always)]
    pub fn next_header(self) -> u8 {
        self.0.byte(NEXT_HEADER)
    }

    /// It stands across two bytes.
    #[inline(always)]
    pub fn traffic_class(self) -> u8 {
        self.0.byte(0) << 4 | self.0.byte(1) >> 4
    }

    /// What follows this header.
    #[inline(always)]
    pub fn payload_len(self) -> u16 {
        u16::from_be(self.0.half(PAYLOAD_LEN))
    }

    #[inline(always)]
    pub fn hop_limit(self) -> u8 {
        self.0.byte(HOP_LIMIT)
    }

    #[inline(always)]
    pub fn source(self) -> Ipv6Be {
        Ipv6Be([self.0.double(SOURCE), self.0.double(SOURCE + 8)])
    }

    #[inline(always)]
    pub fn destination(self) -> Ipv6Be {
        Ipv6Be([self.0.double(DESTINATION), self.0.double(DESTINATION + 8)])
    }
}

/// Whether a header of the kind is passed over on the way to the transport header.
#[inline(always)]
#[must_use]
pub const fn is_extension(header: u8) -> bool {
    header == HOP_BY_HOP
        || header == ROUTING
        || header == DESTINATION_OPTIONS
        || header == AUTHENTICATION
        || header == FRAGMENT
}

/// The offset, and whether more fragments follow (RFC 8200 §4.5).
const MORE_FRAGMENTS: u16 = 1_u16.to_be();
const OFFSET: u16 = 0xfff8_u16.to_be();

/// Which part of its datagram a fragment is by its header, and what all have in common.
#[inline(always)]
pub(crate) fn part(header: impl Fields) -> (Part, u32) {
    // With neither of both this is an atomic fragment (RFC 6946), a whole datagram.
    match header.half(2) & (MORE_FRAGMENTS | OFFSET) {
        0 => (Part::Whole, 0),
        MORE_FRAGMENTS => (Part::First, header.word(4)),
        _ => (Part::Later, header.word(4)),
    }
}

/// What stands past the extension headers.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// For a later fragment the header after the fragment header, which may be another extension.
    pub protocol: u8,
    /// Where it stands.
    pub offset: usize,
    pub part: Part,
    /// What the fragments of a datagram have in common.
    pub id: u32,
}

/// Passes over the extension headers.
#[inline(always)]
pub fn transport(packet: &(impl PacketBytes + ?Sized), first: u8, mut offset: usize) -> Result<Transport, Ignore> {
    let mut header = first;
    let (mut part, mut id) = (Part::Whole, 0);
    for _ in 0..=MAX_EXTENSIONS {
        if header == tcp::PROTOCOL || header == udp::PROTOCOL {
            return Ok(Transport { protocol: header, offset, part, id });
        }
        if !is_extension(header) {
            return Err(Ignore::NotTcpOrUdp);
        }
        if part == Part::Later {
            return Ok(Transport { protocol: header, offset, part, id });
        }
        let extension = packet.window(offset, 8)?;
        if header == FRAGMENT {
            match self::part(extension) {
                (Part::Whole, _) => {}
                found => (part, id) = found,
            }
            offset += FRAGMENT_LEN;
        } else if header == AUTHENTICATION {
            offset += (extension.byte(1) as usize + 2) * 4;
        } else {
            // Segments left: the destination is a waypoint, not the end.
            if header == ROUTING && extension.byte(3) != 0 {
                return Err(Ignore::NotTcpOrUdp);
            }
            offset += (extension.byte(1) as usize + 1) * 8;
        }
        header = extension.byte(0);
        // Else the verifier would follow each sum of lengths by itself.
        offset = any(offset as u64, header as u64) as usize;
        if offset > MAX_OFFSET {
            return Err(Ignore::NotTcpOrUdp);
        }
    }
    Err(Ignore::NotTcpOrUdp)
}
