use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::{
    addr::Addr,
    checksum::sum,
    wire::{icmp as message, ipv4},
};

/// A frame with an error, summed in full, and the length of what is quoted past the IP headers.
struct Frame<'a> {
    outer: (Addr, Addr),
    ttl: u8,
    tuple: (Addr, u16, Addr, u16),
    protocol: u8,
    /// Words of IPv4 options, or eight bytes each of IPv6 extension headers; of the packet that is quoted.
    options: usize,
    has_checksum: bool,
    payload: &'a [u8],
    quoted: usize,
}

fn bytes(addr: Addr) -> Vec<u8> {
    if addr.is_v4() { addr.to_bytes()[12..].to_vec() } else { addr.to_bytes().to_vec() }
}

fn ip(from: Addr, to: Addr, protocol: u8, options: usize, ttl: u8, payload: usize) -> Vec<u8> {
    let mut header;
    if from.is_v4() {
        let len = 20 + options * 4;
        header = vec![0x40 | (len / 4) as u8, 0];
        header.extend(((len + payload) as u16).to_be_bytes());
        header.extend([0x12, 0x34, 0x40, 0, ttl, protocol, 0, 0]);
        header.extend(bytes(from));
        header.extend(bytes(to));
        header.resize(len, 1);
        let check = !sum(&header, 0);
        header[10..12].copy_from_slice(&check.to_ne_bytes());
    } else {
        header = vec![0x60, 0, 0, 0];
        header.extend(((options * 8 + payload) as u16).to_be_bytes());
        header.extend([if options == 0 { protocol } else { 60 }, ttl]);
        header.extend(bytes(from));
        header.extend(bytes(to));
        for n in 1..=options {
            header.extend([if n == options { protocol } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
        }
    }
    header
}

/// A sum with the pseudo header of both families.
fn covered(from: Addr, to: Addr, protocol: u8, bytes_of: &[u8]) -> u16 {
    let mut all = bytes(from);
    all.extend(bytes(to));
    all.extend((bytes_of.len() as u32).to_be_bytes());
    all.extend([0, 0, 0, protocol]);
    all.extend(bytes_of);
    !sum(&all, 0)
}

impl Frame<'_> {
    fn transport(&self) -> Vec<u8> {
        let (source, source_port, destination, destination_port) = self.tuple;
        let mut transport = Vec::new();
        transport.extend(source_port.to_be_bytes());
        transport.extend(destination_port.to_be_bytes());
        let at = if self.protocol == 6 {
            transport.extend([1, 2, 3, 4, 5, 6, 7, 8, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0]);
            16
        } else {
            transport.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            transport.extend([0, 0]);
            6
        };
        transport.extend(self.payload);
        if self.has_checksum {
            let mut check = covered(source, destination, self.protocol, &transport);
            if check == 0 && self.protocol == 17 {
                check = 0xffff;
            }
            transport[at..at + 2].copy_from_slice(&check.to_ne_bytes());
        }
        transport
    }

    fn build(&self) -> Vec<u8> {
        let (source, _, destination, _) = self.tuple;
        let transport = self.transport();
        let mut icmp = vec![if source.is_v4() { 3 } else { 1 }, 1, 0, 0, 0, 0, 0, 0];
        icmp.extend(ip(source, destination, self.protocol, self.options, 9, transport.len()));
        icmp.extend(&transport[..self.quoted.min(transport.len())]);
        let (from, to) = self.outer;
        let number = if from.is_v4() { 1 } else { 58 };
        let check = if from.is_v4() { !sum(&icmp, 0) } else { covered(from, to, 58, &icmp) };
        icmp[2..4].copy_from_slice(&check.to_ne_bytes());
        let mut frame = vec![0; 12];
        frame.extend(if from.is_v4() { [8, 0] } else { [0x86, 0xdd] });
        frame.extend(ip(from, to, number, 0, self.ttl, icmp.len()));
        frame.extend(icmp);
        frame
    }
}

/// What the programs write.
fn apply<A: Messages>(frame: &mut [u8], error: &Error<A>, meaning: &Meaning<A>, ttl: u8) {
    let edit = error.edit(meaning, ttl);
    let mut put = |at: usize, bytes: &[u8]| frame[at..at + bytes.len()].copy_from_slice(bytes);
    for (at, header) in [(NETWORK, &edit.outer), (error.message + message::LEN, &edit.quoted)] {
        let addresses = [bytes(header.source.to_map()), bytes(header.destination.to_map())].concat();
        put(at + A::ADDRESSES, &addresses);
        if A::IS_V6 {
            put(at + ipv6::HOP_LIMIT, &[header.ttl]);
        } else {
            put(at + ipv4::TTL, &[header.ttl]);
            put(at + ipv4::CHECK, &header.check.to_ne_bytes());
        }
    }
    let [source, destination] = edit.ports.map(|port| port.0.to_ne_bytes());
    put(error.transport, &[source, destination].concat());
    if error.has_check {
        put(error.check_at(), &edit.check.to_ne_bytes());
    }
    let at = error.message + message::CHECK;
    let mut check = u16::from_ne_bytes([frame[at], frame[at + 1]]);
    if A::IS_V6 {
        check = checksum::update(check, edit.addresses);
    }
    check = checksum::update(check, edit.message);
    frame[at..at + 2].copy_from_slice(&check.to_ne_bytes());
}

/// 0 and 0xffff are the two forms of one sum.
fn is_alike(a: &[u8], b: &[u8]) -> bool {
    let is_zero = |bytes: &[u8]| bytes == [0, 0] || bytes == [0xff, 0xff];
    a.len() == b.len() && a.chunks(2).zip(b.chunks(2)).all(|(a, b)| a == b || (is_zero(a) && is_zero(b)))
}

fn addr(is_v6: bool, seed: [u8; 16]) -> Addr {
    let mut bytes = seed;
    bytes[0] |= 0x20;
    if is_v6 { Addr::from_bytes(bytes) } else { Addr::from_v4([bytes[0], bytes[1], bytes[2], bytes[3]]) }
}

fn check<A: Messages>(old: &Frame<'_>, new: &Frame<'_>) -> Result<(), TestCaseError> {
    let mut frame = old.build();
    let error = read::<A>(frame.as_slice(), false).unwrap();
    let (source, source_port, destination, destination_port) = new.tuple;
    let quoted = Tuple {
        source: A::from_map(source),
        destination: A::from_map(destination),
        source_port: PortBe::new(source_port),
        destination_port: PortBe::new(destination_port),
        protocol: new.protocol,
    };
    let (source, destination) = (A::from_map(new.outer.0), A::from_map(new.outer.1));
    apply(&mut frame, &error, &Meaning { source, destination, quoted, has_snat: false, is_wrapped: false }, new.ttl);
    let expected = new.build();
    prop_assert!(is_alike(&frame, &expected), "{frame:02x?}\n{expected:02x?}");
    if new.protocol == udp::PROTOCOL && error.has_check {
        let at = error.check_at();
        prop_assert_eq!(frame[at..at + 2] == [0, 0], !new.has_checksum);
    }
    Ok(())
}

proptest! {
    #[test]
    fn an_edited_error_is_what_its_sender_would_have_made(
        seeds: [[u8; 16]; 8],
        ports: [u16; 4],
        is_v6: bool,
        is_tcp: bool,
        has_checksum: bool,
        hops in 1_u8..255,
        options in 0_usize..6,
        payload in prop::collection::vec(any::<u8>(), 0..40),
        quoted in 8_usize..64,
    ) {
        let [a, b, c, d, e, f, g, h] = seeds.map(|seed| addr(is_v6, seed));
        let [p, q, r, s] = ports;
        let protocol = if is_tcp { 6 } else { 17 };
        // Half a checksum is none, and stays.
        let quoted = if is_tcp && quoted == 17 { 18 } else { quoted };
        let has_checksum = is_tcp || is_v6 || has_checksum;
        let old = Frame { outer: (a, b), ttl: hops, tuple: (c, p, d, q), protocol, options, has_checksum, payload: &payload, quoted };
        let new = Frame { outer: (e, f), ttl: hops - 1, tuple: (g, r, h, s), ..old };
        if is_v6 { check::<Ipv6Be>(&old, &new)?; } else { check::<Ipv4Be>(&old, &new)?; }
    }

    #[test]
    fn any_bytes_can_be_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read::<Ipv4Be>(bytes.as_slice(), false);
        let _ = read::<Ipv6Be>(bytes.as_slice(), false);
    }
}

fn example(is_v6: bool, protocol: u8, quoted: usize) -> Vec<u8> {
    let [a, b, c] = [1, 2, 3].map(|n| addr(is_v6, [n; 16]));
    let tuple = (b, 80, c, 40_000);
    Frame { outer: (a, b), ttl: 9, tuple, protocol, options: 0, has_checksum: true, payload: b"netlb", quoted }.build()
}

#[test]
fn eight_bytes_are_enough_and_fewer_are_not() {
    for protocol in [6, 17] {
        for quoted in 0..30 {
            let (v4, v6) = (example(false, protocol, quoted), example(true, protocol, quoted));
            let has_check = if protocol == 6 { quoted >= 18 } else { true };
            let v4 = read::<Ipv4Be>(v4.as_slice(), false).map(|error| error.has_check);
            let v6 = read::<Ipv6Be>(v6.as_slice(), false).map(|error| error.has_check);
            let expected = if quoted < 8 { Err(Ignore::Truncated) } else { Ok(has_check) };
            assert_eq!((v4, v6), (expected, expected), "{protocol}: {quoted} bytes");
        }
    }
}

#[test]
fn a_frame_cut_at_any_length_is_not_read() {
    for (is_v6, whole) in [(false, example(false, 6, 20)), (true, example(true, 6, 20))] {
        // The checksum is the last that is looked at.
        let needed = whole.len() - 2;
        for len in 14..=whole.len() {
            let frame = &whole[..len];
            let is_read =
                if is_v6 { read::<Ipv6Be>(frame, false).is_ok() } else { read::<Ipv4Be>(frame, false).is_ok() };
            assert_eq!(is_read, len >= needed, "{len} of {}", whole.len());
        }
    }
}

#[test]
fn bytes_past_the_packet_are_no_quotation() {
    for quoted in 0..8 {
        let mut frame = example(false, 6, quoted);
        frame.resize(200, 0);
        assert_eq!(read::<Ipv4Be>(frame.as_slice(), false), Err(Ignore::Truncated));
    }
    let mut frame = example(true, 6, 17);
    frame.resize(200, 0);
    assert_eq!(read::<Ipv6Be>(frame.as_slice(), false).map(|error| error.has_check), Ok(false));
}

#[test]
fn only_errors_are_read() {
    for kind in 0..=255_u8 {
        let (mut v4, mut v6) = (example(false, 6, 20), example(true, 6, 20));
        (v4[34], v6[54]) = (kind, kind);
        assert_eq!(read::<Ipv4Be>(v4.as_slice(), false).is_ok(), [3, 4, 11, 12].contains(&kind), "type {kind}");
        assert_eq!(read::<Ipv6Be>(v6.as_slice(), false).is_ok(), (1..=4).contains(&kind), "type {kind}");
    }
}

/// The identifier stands for the port of who asks, where there are flows of echoes.
#[test]
fn a_quoted_echo_is_read_as_a_packet_of_its_flow() {
    let (us, them) = (Addr::from_v4([10, 0, 0, 1]), Addr::from_v4([10, 0, 0, 2]));
    let of = |kind: u8, echo: u8| {
        let message = [echo, 0, 7, 7, 0x12, 0x34, 0, 9];
        let quoted = [ip(us, them, 1, 0, 64, message.len()), message.to_vec()].concat();
        let mut frame = vec![0; NETWORK];
        frame.extend(ip(them, us, 1, 0, 64, 8 + quoted.len()));
        frame.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend(quoted);
        frame
    };
    assert_eq!(read::<Ipv4Be>(of(11, 8).as_slice(), false), Err(Ignore::NotTcpOrUdp));
    let error = read::<Ipv4Be>(of(11, 8).as_slice(), true).unwrap();
    let tuple = error.tuple();
    assert_eq!((tuple.source_port.get(), tuple.destination_port.get(), tuple.protocol), (0x1234, 0, 1));
    assert_eq!((error.ports_at(), error.check_at()), (error.transport + 4, error.transport + 2));
    for echo in (0..=255).filter(|echo| *echo != 8) {
        assert_eq!(read::<Ipv4Be>(of(11, echo).as_slice(), true), Err(Ignore::NotTcpOrUdp), "{echo}");
    }
}
