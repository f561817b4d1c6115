//! Packets of netlb's own: each is made out of the frame that it answers, and goes back to where that came from.
//!
//! A packet that nobody serves is refused, so that its sender does not wait; one that is too long for its way is answered here, because
//! the kernel would quote it as it is after translation, which its sender never sent and would not recognise. Both speak in the name of
//! the destination. Answers are made of whatever anybody sends, hence the [limit](netlb_common::limit), and no answer goes to more than
//! one host.

use aya_ebpf::{bindings::BPF_F_RECOMPUTE_CSUM, helpers::bpf_redirect};
use netlb_common::{
    addr::{Ipv4Be, Ipv6Be},
    checksum,
    counters::Counter,
    flow::{Family, NETWORK, Parsed, Tuple},
    stray::Strays,
    wire::{Fields as _, PacketBytes as _, Part, ipv4, ipv6, tcp},
};

pub(crate) use self::{
    echo::Echo,
    icmp::{ICMP, Quoted, write as write_error},
};
use crate::{
    DROP, NEXT, forward,
    frame::{Frame as _, HardwareAddresses, Refused, Skb},
    maps,
};

mod echo;
mod icmp;
mod reset;

/// As routers start them.
pub(crate) const TTL: u8 = 64;

/// A family whose packets can be answered.
pub(crate) trait Answer: Family + Strays + Echo {
    type Header: Copy;
    /// Where the length stands in the header, and what it does not count of the packet.
    const LENGTH: (usize, usize);
    /// How much of a packet is quoted at most: past the longest headers, and so little that the message fits every way.
    const QUOTED: usize;
    /// Type and code of the messages that a port is unreachable, and that a packet is too big.
    const UNREACHABLE: [u8; 2];
    const TOO_BIG: [u8; 2];
    /// That a host cannot be reached.
    const HOST_UNREACHABLE: [u8; 2];

    /// The header of an answer, whose payload has a length.
    fn header(of: &Tuple<Self>, protocol: u8, len: u16) -> Self::Header;

    /// The sum of what ICMP's checksum covers beside the message.
    fn beside_icmp(of: &Tuple<Self>, len: u16) -> u64;

    /// Where messages have the MTU, which is 0 in others.
    fn mtu(mtu: u32) -> u32;
}

/// Answers a packet instead of sending it on: that nobody serves it, or that datagrams may be `mtu` long if that is not 0.
#[inline(always)]
pub(crate) fn answer<A: Answer>(frame: &Skb, packet: &Parsed<A>, mtu: u32) -> i32 {
    if mtu != 0 {
        maps::count(Counter::TooBig);
    }
    let Ok(addresses) = frame.hardware_addresses() else { return DROP };
    // Of a later fragment nobody can say what it is a part of.
    if mtu == 0 && packet.part == Part::Later {
        return DROP;
    }
    // A reset is not answered (RFC 9293 §3.10.7.1), nor is what was sent to many or by nobody (RFC 1122 §3.2.2).
    let is_reset = mtu == 0 && packet.segment.is_reset();
    let has_sender = packet.tuple.source.is_answerable() && packet.tuple.source != packet.tuple.destination;
    if is_reset || !has_sender || !addresses.are_hosts() {
        return DROP;
    }
    if !maps::may_answer() {
        maps::count(Counter::AnswersLimited);
        return DROP;
    }
    let result = if mtu != 0 {
        icmp::write(frame, Quoted::of(packet), A::TOO_BIG, A::mtu(mtu))
    } else if packet.tuple.protocol == tcp::PROTOCOL {
        reset::write(frame, packet)
    } else {
        icmp::write(frame, Quoted::of(packet), A::UNREACHABLE, 0)
    };
    if mtu == 0 {
        maps::count(Counter::Rejected);
    }
    send_back(frame, addresses, result)
}

/// Answers an echo request.
#[inline(always)]
pub(crate) fn echo<A: Answer>(frame: &Skb) -> i32 {
    let Ok(addresses) = frame.hardware_addresses() else { return NEXT };
    if !addresses.are_hosts() {
        return NEXT;
    }
    maps::count(Counter::EchoAnswered);
    send_back(frame, addresses, echo::write::<A>(frame))
}

/// Sends what was made of a frame to where it came from.
#[inline(always)]
fn send_back(frame: &Skb, addresses: HardwareAddresses, written: Result<(), Refused>) -> i32 {
    let HardwareAddresses { destination, source } = addresses;
    let turned = HardwareAddresses { destination: source, source: destination };
    if written.is_err() || frame.store(0, &turned, 0).is_err() {
        return forward::refused();
    }
    // SAFETY: plain integers.
    unsafe { bpf_redirect(frame.interface(), 0) as i32 }
}

/// The longest way to a transport header: the verifier forgets what parsing knew.
const MOST_HEADERS: usize = 512;

/// Leaves `len` bytes behind the Ethernet header, which are to be written.
///
/// The sender may have left the checksum to a device, which would sum up from where the transport header stood, and write into the answer.
/// Bytes that are taken away from the front, up to beyond that place, end this; first they are added at the end. Segments become one packet.
#[inline(always)]
fn clear(frame: &Skb, transport: usize, len: usize) -> Result<(), Refused> {
    if transport > MOST_HEADERS {
        return Err(Refused);
    }
    let cut = transport + 2;
    frame.truncate((NETWORK + len + cut) as u32)?;
    frame.make_room(-(cut as i32))
}

/// Writes an answer behind the Ethernet header. A device's sum of the packet stays right.
#[inline(always)]
fn write<T>(frame: &Skb, answer: &T) -> Result<(), Refused> {
    frame.store(NETWORK, answer, BPF_F_RECOMPUTE_CSUM as u64)
}

/// The length of the datagram that begins at an offset, as its header says it: frames may be padded. Longer ones than it can say have what
/// the frame has.
#[inline(always)]
fn datagram_len<A: Answer>(frame: &Skb, at: usize) -> Result<usize, Refused> {
    let (field, uncounted) = A::LENGTH;
    let header = frame.window(at, A::HEADER_LEN).map_err(|_| Refused)?;
    let of_frame = (frame.len() as usize).saturating_sub(at);
    Ok(match u16::from_be(header.half(field)) as usize {
        0 => of_frame,
        len if len + uncounted > of_frame => of_frame,
        len => len + uncounted,
    })
}

/// The sum of a pseudo header (RFC 9293 §3.1, RFC 8200 §8.1).
#[inline(always)]
fn pseudo<A: Family>(of: &Tuple<A>, protocol: u8, len: u16) -> u64 {
    of.source.sum() + of.destination.sum() + len.to_be() as u64 + (protocol as u16).to_be() as u64
}

/// IPv4 (RFC 791).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Header4 {
    pub(crate) version_and_len: u8,
    pub(crate) service: u8,
    pub(crate) total_len: u16,
    pub(crate) id: u16,
    pub(crate) fragment: u16,
    pub(crate) ttl: u8,
    pub(crate) protocol: u8,
    pub(crate) check: u16,
    pub(crate) source: Ipv4Be,
    pub(crate) destination: Ipv4Be,
}

impl Answer for Ipv4Be {
    type Header = Header4;
    const LENGTH: (usize, usize) = (ipv4::TOTAL_LEN, 0);
    const QUOTED: usize = 84;
    const UNREACHABLE: [u8; 2] = [3, 3];
    const TOO_BIG: [u8; 2] = [3, 4];
    const HOST_UNREACHABLE: [u8; 2] = [3, 1];

    #[inline(always)]
    fn header(of: &Tuple<Self>, protocol: u8, len: u16) -> Header4 {
        let mut header = Header4 {
            version_and_len: 0x45,
            service: 0,
            total_len: (ipv4::LEN as u16 + len).to_be(),
            id: 0,
            fragment: 0x4000_u16.to_be(),
            ttl: TTL,
            protocol,
            check: 0,
            source: of.destination,
            destination: of.source,
        };
        let pair = |a: u8, b: u8| u16::from_ne_bytes([a, b]) as u64;
        let sum = pair(0x45, 0)
            + header.total_len as u64
            + header.fragment as u64
            + pair(TTL, protocol)
            + header.source.0 as u64
            + header.destination.0 as u64;
        header.check = checksum::finish(sum);
        header
    }

    #[inline(always)]
    fn beside_icmp(_: &Tuple<Self>, _: u16) -> u64 {
        0
    }

    #[inline(always)]
    fn mtu(mtu: u32) -> u32 {
        // In the second half (RFC 1191 §4).
        (mtu & 0xffff).to_be()
    }
}

/// IPv6 (RFC 8200).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Header6 {
    pub(crate) version: u32,
    pub(crate) payload_len: u16,
    pub(crate) next_header: u8,
    pub(crate) hop_limit: u8,
    pub(crate) source: Ipv6Be,
    pub(crate) destination: Ipv6Be,
}

impl Answer for Ipv6Be {
    type Header = Header6;
    const LENGTH: (usize, usize) = (ipv6::PAYLOAD_LEN, ipv6::LEN);
    const QUOTED: usize = 256;
    const UNREACHABLE: [u8; 2] = [1, 4];
    const TOO_BIG: [u8; 2] = [2, 0];
    const HOST_UNREACHABLE: [u8; 2] = [1, 3];

    #[inline(always)]
    fn header(of: &Tuple<Self>, protocol: u8, len: u16) -> Header6 {
        Header6 {
            version: (6_u32 << 28).to_be(),
            payload_len: len.to_be(),
            next_header: protocol,
            hop_limit: TTL,
            source: of.destination,
            destination: of.source,
        }
    }

    #[inline(always)]
    fn beside_icmp(of: &Tuple<Self>, len: u16) -> u64 {
        pseudo(of, Self::ICMP, len)
    }

    #[inline(always)]
    fn mtu(mtu: u32) -> u32 {
        mtu.to_be()
    }
}

const _: () = assert!(size_of::<Header4>() == ipv4::LEN && size_of::<Header6>() == ipv6::LEN);
