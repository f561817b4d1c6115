//! Resets of connections that nobody serves (RFC 9293 §3.10.7.1).

use netlb_common::{
    addr::PortBe,
    checksum,
    flow::{NETWORK, Parsed},
    wire::{Fields as _, PacketBytes as _, tcp},
};

use super::{Answer, Header4, Header6, MOST_HEADERS, clear, datagram_len, pseudo, write as write_answer};
use crate::frame::{Refused, Skb};

/// Packed, because words of 64 bits in a header would have it end with four bytes that are no part of the packet.
#[derive(Clone, Copy)]
#[repr(C, packed(4))]
struct Reset<H> {
    header: H,
    tcp: Tcp,
}

/// A header without options (RFC 9293 §3.1).
#[derive(Clone, Copy)]
#[repr(C)]
struct Tcp {
    ports: [PortBe; 2],
    sequence: [u16; 2],
    acknowledgement: [u16; 2],
    data_offset: u8,
    control: u8,
    window: u16,
    check: u16,
    urgent: u16,
}

const _: () = {
    assert!(size_of::<Tcp>() == tcp::LEN);
    assert!(size_of::<Reset<Header4>>() == 40 && size_of::<Reset<Header6>>() == 60);
};

#[inline(always)]
pub(super) fn write<A: Answer>(frame: &Skb, packet: &Parsed<A>) -> Result<(), Refused> {
    let at = packet.transport;
    if at > MOST_HEADERS {
        return Err(Refused);
    }
    let header = frame.window(at, tcp::LEN).map_err(|_| Refused)?;
    let word = |at: usize| u32::from_be(header.word(at));
    let control = header.byte(tcp::CONTROL);
    let (sequence, acknowledgement, bits) = if control & tcp::ACK != 0 {
        (word(tcp::ACKNOWLEDGEMENT), 0, tcp::RST)
    } else {
        let headers = at - NETWORK + packet.transport_len;
        let len = datagram_len::<A>(frame, NETWORK)?.saturating_sub(headers) as u32;
        let flags = (control & tcp::SYN != 0) as u32 + (control & tcp::FIN != 0) as u32;
        (0, word(tcp::SEQUENCE).wrapping_add(len).wrapping_add(flags), tcp::RST | tcp::ACK)
    };
    let halves = |word: u32| [((word >> 16) as u16).to_be(), (word as u16).to_be()];
    let mut tcp = Tcp {
        ports: [packet.tuple.destination_port, packet.tuple.source_port],
        sequence: halves(sequence),
        acknowledgement: halves(acknowledgement),
        data_offset: (tcp::LEN as u8 / 4) << 4,
        control: bits,
        window: 0,
        check: 0,
        urgent: 0,
    };
    let len = tcp::LEN as u16;
    let sum = pseudo(&packet.tuple, tcp::PROTOCOL, len)
        + tcp.ports[0].0 as u64
        + tcp.ports[1].0 as u64
        + tcp.sequence[0] as u64
        + tcp.sequence[1] as u64
        + tcp.acknowledgement[0] as u64
        + tcp.acknowledgement[1] as u64
        + u16::from_ne_bytes([tcp.data_offset, bits]) as u64;
    tcp.check = checksum::finish(sum);

    clear(frame, at, size_of::<Reset<A::Header>>())?;
    write_answer(frame, &Reset { header: A::header(&packet.tuple, tcp::PROTOCOL, len), tcp })
}
