//! "Packet too big" (RFC 8201) and "fragmentation needed" (RFC 1191), from netlb itself.
//!
//! The kernel would quote the packet as it is after translation, which its sender never sent and would not recognise. So the frame itself
//! is made into the message, before anything is rewritten: cut off after what is quoted, moved to make room for the new headers, and sent
//! back to where it came from, in the name of the destination.

use aya_ebpf::helpers::{bpf_csum_diff, bpf_redirect};
use netlb_common::{
    addr::{Ipv4Be, Ipv6Be},
    checksum,
    counters::Counter,
    flow::{NETWORK, Parsed},
    wire::PacketBytes as _,
};

use crate::{
    forward,
    frame::{Frame as _, HardwareAddresses, Refused, Skb},
    maps,
};

/// A family whose errors can be written.
pub(crate) trait Answer: Sized {
    /// The headers of the message, before what it quotes.
    type Message;
    /// How much of the packet is quoted: past the longest headers, and never more than the packets this is about have.
    const QUOTED: usize;

    /// `quoted` is the sum of what is quoted.
    fn message(packet: &Parsed<Self>, mtu: u32, quoted: u32) -> Self::Message;
}

/// Answers a packet that is too long for its way, instead of sending it on.
#[inline(always)]
pub(crate) fn answer<A: Answer>(frame: &Skb, packet: &Parsed<A>, mtu: u32) -> i32 {
    maps::count(Counter::TooBig);
    match turn_round(frame, packet, mtu) {
        // SAFETY: plain integers.
        Ok(()) => unsafe { bpf_redirect(frame.interface(), 0) as i32 },
        Err(_) => forward::refused(),
    }
}

#[inline(always)]
fn turn_round<A: Answer>(frame: &Skb, packet: &Parsed<A>, mtu: u32) -> Result<(), Refused> {
    let HardwareAddresses { destination, source } = frame.hardware_addresses()?;
    frame.truncate((NETWORK + A::QUOTED) as u32)?;
    frame.make_room(size_of::<A::Message>() as i32)?;
    let start = NETWORK + size_of::<A::Message>();
    frame.pull((start + A::QUOTED) as u32);
    let quoted = frame.window(start, A::QUOTED).map_err(|_| Refused)?;
    // SAFETY: the window is as long as the sum.
    let sum =
        unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, quoted.as_ptr().cast_mut().cast(), A::QUOTED as u32, 0) };
    frame.store(NETWORK, &A::message(packet, mtu, sum as u32), 0)?;
    frame.store(0, &HardwareAddresses { destination: source, source: destination }, 0)
}

/// As routers start them.
const TTL: u8 = 64;

/// IPv4 (RFC 791) and "destination unreachable, fragmentation needed" (RFC 1191 §4).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Message4 {
    version_and_len: u8,
    service: u8,
    total_len: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    header_check: u16,
    source: Ipv4Be,
    destination: Ipv4Be,
    kind: u8,
    code: u8,
    check: u16,
    unused: u16,
    mtu: u16,
}

impl Answer for Ipv4Be {
    type Message = Message4;
    /// The longest IP header and then some of the transport header.
    const QUOTED: usize = 84;

    #[inline(always)]
    fn message(packet: &Parsed<Self>, mtu: u32, quoted: u32) -> Message4 {
        const KIND: u8 = 3;
        const CODE: u8 = 4;
        const ICMP: u8 = 1;
        let len = (size_of::<Message4>() + Self::QUOTED) as u16;
        let mut message = Message4 {
            version_and_len: 0x45,
            service: 0,
            total_len: len.to_be(),
            id: 0,
            fragment: 0x4000_u16.to_be(),
            ttl: TTL,
            protocol: ICMP,
            header_check: 0,
            source: packet.tuple.destination,
            destination: packet.tuple.source,
            kind: KIND,
            code: CODE,
            check: 0,
            unused: 0,
            mtu: (mtu as u16).to_be(),
        };
        let pair = |a: u8, b: u8| u16::from_ne_bytes([a, b]) as u64;
        let header = pair(0x45, 0)
            + message.total_len as u64
            + message.fragment as u64
            + pair(TTL, ICMP)
            + message.source.0 as u64
            + message.destination.0 as u64;
        message.header_check = checksum::finish(header);
        message.check = checksum::finish(pair(KIND, CODE) + message.mtu as u64 + quoted as u64);
        message
    }
}

/// IPv6 (RFC 8200) and "packet too big" (RFC 4443 §3.2).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Message6 {
    version: u32,
    payload_len: u16,
    next_header: u8,
    hop_limit: u8,
    source: Ipv6Be,
    destination: Ipv6Be,
    kind: u8,
    code: u8,
    check: u16,
    mtu: u32,
}

impl Answer for Ipv6Be {
    type Message = Message6;
    /// With extension headers; the whole message stays far below the least MTU.
    const QUOTED: usize = 256;

    #[inline(always)]
    fn message(packet: &Parsed<Self>, mtu: u32, quoted: u32) -> Message6 {
        use netlb_common::addr::Address as _;
        const KIND: u8 = 2;
        const ICMP: u8 = 58;
        const HEADER: usize = 8;
        let payload_len = ((HEADER + Self::QUOTED) as u16).to_be();
        let mut message = Message6 {
            version: (6_u32 << 28).to_be(),
            payload_len,
            next_header: ICMP,
            hop_limit: TTL,
            source: packet.tuple.destination,
            destination: packet.tuple.source,
            kind: KIND,
            code: 0,
            check: 0,
            mtu: mtu.to_be(),
        };
        // The pseudo header (RFC 8200 §8.1), the message and what it quotes.
        let sum = message.source.sum()
            + message.destination.sum()
            + payload_len as u64
            + (ICMP as u16).to_be() as u64
            + u16::from_ne_bytes([KIND, 0]) as u64
            + message.mtu as u64
            + quoted as u64;
        message.check = checksum::finish(sum);
        message
    }
}

const _: () = assert!(size_of::<Message4>() == 28 && size_of::<Message6>() == 48);
