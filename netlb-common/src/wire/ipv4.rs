//! IPv4 (RFC 791).

use core::mem::{offset_of, size_of};

use network_types::ip::Ipv4Hdr;

use super::{Fields, Ignore, PacketBytes, Part};
use crate::addr::Ipv4Be;

/// Without options.
pub const LEN: usize = size_of::<Ipv4Hdr>();
/// The first byte of a header without options: version and length in words.
pub const PLAIN: u8 = 0x45;
pub const TRAFFIC_CLASS: usize = offset_of!(Ipv4Hdr, tos);
pub const TOTAL_LEN: usize = offset_of!(Ipv4Hdr, tot_len);
pub const PROTOCOL: usize = offset_of!(Ipv4Hdr, proto);
pub const ID: usize = offset_of!(Ipv4Hdr, id);
pub const TTL: usize = offset_of!(Ipv4Hdr, ttl);
pub const CHECK: usize = offset_of!(Ipv4Hdr, check);
pub const SOURCE: usize = offset_of!(Ipv4Hdr, src_addr);
pub const DESTINATION: usize = offset_of!(Ipv4Hdr, dst_addr);

const DONT_FRAGMENT: u16 = 0x4000_u16.to_be();
const MORE_FRAGMENTS: u16 = 0x2000_u16.to_be();
const OFFSET: u16 = 0x1fff_u16.to_be();

/// A header that is there in its fixed part.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4<W>(W);

impl<W: Fields> Ipv4<W> {
    #[inline(always)]
    pub fn at(packet: &(impl PacketBytes<Window = W> + ?Sized), offset: usize) -> Result<Self, Ignore> {
        packet.window(offset, LEN).map(Self)
    }

    /// The header's real length, options included.
    #[inline(always)]
    pub fn header_len(self) -> Result<usize, Ignore> {
        let version_and_len = self.0.byte(0);
        let len = (version_and_len & 0xf) as usize * 4;
        if version_and_len >> 4 != 4 || len < LEN { Err(Ignore::Malformed) } else { Ok(len) }
    }

    #[inline(always)]
    pub fn part(self) -> Part {
        match self.0.half(offset_of!(Ipv4Hdr, frags)) & (MORE_FRAGMENTS | OFFSET) {
            0 => Part::Whole,
            MORE_FRAGMENTS => Part::First,
            _ => Part::Later,
        }
    }

    /// What the fragments of a datagram have in common.
    #[inline(always)]
    pub fn id(self) -> u16 {
        self.0.half(ID)
    }

    /// The packet's length, this header included.
    #[inline(always)]
    pub fn total_len(self) -> u16 {
        u16::from_be(self.0.half(TOTAL_LEN))
    }

    #[inline(always)]
    pub fn dont_fragment(self) -> bool {
        self.0.half(offset_of!(Ipv4Hdr, frags)) & DONT_FRAGMENT != 0
    }

    #[inline(always)]
    pub fn traffic_class(self) -> u8 {
        self.0.byte(TRAFFIC_CLASS)
    }

    #[inline(always)]
    pub fn ttl(self) -> u8 {
        self.0.byte(TTL)
    }

    #[inline(always)]
    pub fn protocol(self) -> u8 {
        self.0.byte(PROTOCOL)
    }

    #[inline(always)]
    pub fn check(self) -> u16 {
        self.0.half(CHECK)
    }

    #[inline(always)]
    pub fn source(self) -> Ipv4Be {
        Ipv4Be(self.0.word(SOURCE))
    }

    #[inline(always)]
    pub fn destination(self) -> Ipv4Be {
        Ipv4Be(self.0.word(DESTINATION))
    }
}
