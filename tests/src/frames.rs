//! Frames: built from what a test is about, with every length and checksum as a sender would make it.
//!
//! A test changes a [`Packet`] as the programs should have, and compares whole frames: what should stay is compared with the rest.

use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, TcpHeader, UdpHeader};

pub type Mac = [u8; 6];

pub const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// The number of IPv6's fragment header.
const FRAGMENT: u8 = 44;

/// A TCP or UDP packet in an Ethernet frame.
#[derive(Clone, Debug, PartialEq)]
pub struct Packet {
    pub to_mac: Mac,
    pub from_mac: Mac,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub ttl: u8,
    /// IPv4 only.
    pub dont_fragment: bool,
    /// Words of options, IPv4 only.
    pub options: Vec<u8>,
    /// Numbers and bytes of extension headers, whose first byte is filled in. IPv6 only.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub transport: Transport,
    pub payload: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Transport {
    Tcp(Segment),
    Udp {
        /// Without, the field is zero.
        has_checksum: bool,
    },
}

/// What a TCP segment does.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Segment {
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
}

pub const SYN: Segment = Segment { syn: true, ack: false, fin: false, rst: false };
pub const SYN_ACK: Segment = Segment { syn: true, ack: true, fin: false, rst: false };
pub const ACK: Segment = Segment { syn: false, ack: true, fin: false, rst: false };
pub const FIN: Segment = Segment { syn: false, ack: true, fin: true, rst: false };
pub const RST: Segment = Segment { syn: false, ack: false, fin: false, rst: true };

impl Packet {
    fn new(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Self {
        Self {
            to_mac: [2, 0, 0, 0, 0, 1],
            from_mac: [2, 0, 0, 0, 0, 2],
            source,
            destination,
            ttl: 61,
            dont_fragment: true,
            options: Vec::new(),
            extensions: Vec::new(),
            transport,
            payload: b"netlb".to_vec(),
        }
    }

    pub fn tcp(source: SocketAddr, destination: SocketAddr, segment: Segment) -> Self {
        Self::new(source, destination, Transport::Tcp(segment))
    }

    pub fn udp(source: SocketAddr, destination: SocketAddr) -> Self {
        Self::new(source, destination, Transport::Udp { has_checksum: true })
    }

    #[must_use]
    pub fn to(self, destination: SocketAddr) -> Self {
        Self { destination, ..self }
    }

    #[must_use]
    pub fn from(self, source: SocketAddr) -> Self {
        Self { source, ..self }
    }

    #[must_use]
    pub fn ttl(self, ttl: u8) -> Self {
        Self { ttl, ..self }
    }

    #[must_use]
    pub fn macs(self, to_mac: Mac, from_mac: Mac) -> Self {
        Self { to_mac, from_mac, ..self }
    }

    #[must_use]
    pub fn payload(self, payload: impl Into<Vec<u8>>) -> Self {
        Self { payload: payload.into(), ..self }
    }

    #[must_use]
    pub fn options(self, options: impl Into<Vec<u8>>) -> Self {
        Self { options: options.into(), ..self }
    }

    #[must_use]
    pub fn extension(mut self, number: u8, bytes: impl Into<Vec<u8>>) -> Self {
        self.extensions.push((number, bytes.into()));
        self
    }

    #[must_use]
    pub fn without_checksum(self) -> Self {
        Self { transport: Transport::Udp { has_checksum: false }, ..self }
    }

    #[must_use]
    pub fn may_fragment(self) -> Self {
        Self { dont_fragment: false, ..self }
    }

    /// With a payload that makes the datagram so long.
    #[must_use]
    pub fn sized(self, len: u16) -> Self {
        let overhead = self.clone().payload([]).frame().len() - ETHERNET;
        self.payload(vec![0x5a; usize::from(len) - overhead])
    }

    /// What a network device has of the packet.
    pub fn frame(&self) -> Vec<u8> {
        let (protocol, transport) = self.transport_bytes();
        let mut frame = Vec::from_iter(self.to_mac.into_iter().chain(self.from_mac));
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = Ipv4Header {
                    total_len: (Ipv4Header::MIN_LEN + self.options.len() + transport.len()) as u16,
                    identification: 0x1234,
                    dont_fragment: self.dont_fragment,
                    time_to_live: self.ttl,
                    protocol: IpNumber(protocol),
                    source: source.octets(),
                    destination: destination.octets(),
                    options: Ipv4Options::try_from(&*self.options).expect("words of options"),
                    ..Ipv4Header::default()
                };
                header.header_checksum = header.calc_header_checksum();
                frame.extend(IPV4.to_be_bytes());
                frame.extend(header.to_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let extensions: usize = self.extensions.iter().map(|(_, bytes)| bytes.len()).sum();
                let numbers = self.extensions.iter().map(|(number, _)| *number).chain([protocol]);
                let mut numbers = numbers.map(IpNumber);
                let header = Ipv6Header {
                    traffic_class: 0x28,
                    flow_label: 0x4_5678.try_into().expect("20 bits"),
                    payload_length: (extensions + transport.len()) as u16,
                    next_header: numbers.next().unwrap_or_default(),
                    hop_limit: self.ttl,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                frame.extend(IPV6.to_be_bytes());
                frame.extend(header.to_bytes());
                for ((_, bytes), next) in self.extensions.iter().zip(numbers) {
                    frame.push(next.0);
                    frame.extend(&bytes[1..]);
                }
            }
            (source, destination) => panic!("{source} and {destination} are of two families"),
        }
        frame.extend(transport);
        frame
    }

    /// The protocol's number, and its header and payload.
    fn transport_bytes(&self) -> (u8, Vec<u8>) {
        let (source_port, destination_port, payload) = (self.source.port(), self.destination.port(), &*self.payload);
        let (number, mut bytes) = match &self.transport {
            Transport::Tcp(Segment { syn, ack, fin, rst }) => {
                let mut header = TcpHeader::new(source_port, destination_port, 0x0102_0304, 8192);
                (header.syn, header.ack, header.fin, header.rst) = (*syn, *ack, *fin, *rst);
                header.psh = !payload.is_empty();
                header.acknowledgment_number = if *ack { 0x0506_0708 } else { 0 };
                // Maximum segment size and window scale, as clients send them.
                header.set_options_raw(&[2, 4, 5, 0xb4, 1, 3, 3, 7]).expect("two words");
                header.checksum = match (self.source.ip(), self.destination.ip()) {
                    (IpAddr::V4(source), IpAddr::V4(destination)) => {
                        header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), payload)
                    }
                    (IpAddr::V6(source), IpAddr::V6(destination)) => {
                        header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), payload)
                    }
                    (source, destination) => panic!("{source} and {destination} are of two families"),
                }
                .expect("a payload that fits a packet");
                (6, header.to_bytes().to_vec())
            }
            Transport::Udp { has_checksum } => {
                let length = (UdpHeader::LEN + payload.len()) as u16;
                let mut header = UdpHeader { source_port, destination_port, length, checksum: 0 };
                if *has_checksum {
                    header.checksum = match (self.source.ip(), self.destination.ip()) {
                        (IpAddr::V4(source), IpAddr::V4(destination)) => {
                            header.calc_checksum_ipv4_raw(source.octets(), destination.octets(), payload)
                        }
                        (IpAddr::V6(source), IpAddr::V6(destination)) => {
                            header.calc_checksum_ipv6_raw(source.octets(), destination.octets(), payload)
                        }
                        (source, destination) => panic!("{source} and {destination} are of two families"),
                    }
                    .expect("a payload that fits a packet");
                }
                (17, header.to_bytes().to_vec())
            }
        };
        bytes.extend(payload);
        (number, bytes)
    }
}

/// Overwrites bytes of a frame, and makes an IPv4 header's checksum right again.
pub fn patch(frame: &mut [u8], at: usize, bytes: &[u8]) {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    if frame[12..14] == IPV4.to_be_bytes() && at >= ETHERNET {
        let len = usize::from(frame[ETHERNET] & 0xf) * 4;
        if let Some(header) = frame.get_mut(ETHERNET..ETHERNET + len).filter(|header| header.len() >= 20) {
            header[10..12].fill(0);
            let sum = etherparse::checksum::Sum16BitWords::new().add_slice(header).ones_complement();
            header[10..12].copy_from_slice(&sum.to_ne_bytes());
        }
    }
}

/// A frame's datagram in fragments of at most so many bytes each (a multiple of eight), as a host sends them. Extension headers of the frame
/// are fragmented with the rest.
pub fn fragments(frame: &[u8], id: u32, size: usize) -> Vec<Vec<u8>> {
    let is_ipv4 = frame[12..14] == IPV4.to_be_bytes();
    let header = ETHERNET + if is_ipv4 { usize::from(frame[ETHERNET] & 0xf) * 4 } else { Ipv6Header::LEN };
    let (header, payload) = frame.split_at(header);
    let count = payload.len().div_ceil(size);
    let fragment = |(number, bytes): (usize, &[u8])| {
        let more = number + 1 < count;
        let offset = (number * size / 8) as u16;
        let mut fragment = header.to_vec();
        if is_ipv4 {
            fragment.extend(bytes);
            let len = (fragment.len() - ETHERNET) as u16;
            patch(&mut fragment, ETHERNET + 2, &len.to_be_bytes());
            patch(&mut fragment, ETHERNET + 4, &(id as u16).to_be_bytes());
            patch(&mut fragment, ETHERNET + 6, &(u16::from(more) << 13 | offset).to_be_bytes());
        } else {
            let next = std::mem::replace(&mut fragment[ETHERNET + 6], FRAGMENT);
            fragment.extend([next, 0]);
            fragment.extend((offset << 3 | u16::from(more)).to_be_bytes());
            fragment.extend(id.to_be_bytes());
            fragment.extend(bytes);
            let len = (fragment.len() - ETHERNET - Ipv6Header::LEN) as u16;
            fragment[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&len.to_be_bytes());
        }
        fragment
    };
    payload.chunks(size).enumerate().map(fragment).collect()
}

/// A frame's packet within one of the same family, as a balancing node sends it: with the packet's traffic class and flow label.
pub fn wrapped(frame: &[u8], source: IpAddr, destination: IpAddr) -> Vec<u8> {
    let (ethernet, packet) = frame.split_at(ETHERNET);
    let mut wrapped = ethernet.to_vec();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            wrapped.extend([0x45, packet[1]]);
            wrapped.extend((Ipv4Header::MIN_LEN as u16 + u16::from_be_bytes([packet[2], packet[3]])).to_be_bytes());
            wrapped.extend([0, 0, 0x40, 0, 64, 4, 0, 0]);
            wrapped.extend(source.octets().into_iter().chain(destination.octets()));
            patch(&mut wrapped, ETHERNET, &[0x45]);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            wrapped.extend(&packet[..4]);
            wrapped.extend((Ipv6Header::LEN as u16 + u16::from_be_bytes([packet[4], packet[5]])).to_be_bytes());
            wrapped.extend([41, 64]);
            wrapped.extend(source.octets().into_iter().chain(destination.octets()));
        }
        (source, destination) => panic!("{source} and {destination} are of two families"),
    }
    wrapped.extend(packet);
    wrapped
}

/// An ICMP error as a router makes it: type, code and the rest of its header, whose checksum is filled in, and what it quotes.
pub fn icmp_error(
    (to_mac, from_mac): (Mac, Mac),
    (from, to): (IpAddr, IpAddr),
    ttl: u8,
    head: [u8; 8],
    quote: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::from_iter(to_mac.into_iter().chain(from_mac));
    let mut message = Vec::from_iter(head.iter().chain(quote).copied());
    let len = message.len() as u16;
    let mut sum = etherparse::checksum::Sum16BitWords::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            frame.extend([8, 0, 0x45, 0xc0]);
            frame.extend((Ipv4Header::MIN_LEN as u16 + len).to_be_bytes());
            frame.extend([0x12, 0x34, 0, 0, ttl, 1, 0, 0]);
            frame.extend(from.octets().into_iter().chain(to.octets()));
            patch(&mut frame, ETHERNET, &[0x45]);
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(len.to_be_bytes());
            frame.extend([58, ttl]);
            frame.extend(from.octets().into_iter().chain(to.octets()));
            sum = sum.add_slice(&frame[ETHERNET + 8..]).add_2bytes(len.to_be_bytes()).add_2bytes([0, 58]);
        }
        (from, to) => panic!("{from} and {to} are of two families"),
    }
    let check = sum.add_slice(&message).ones_complement();
    message[2..4].copy_from_slice(&check.to_ne_bytes());
    frame.extend(message);
    frame
}

#[cfg(test)]
mod tests {
    use etherparse::SlicedPacket;

    use super::*;

    #[test]
    fn frames_are_what_they_say() {
        for (source, destination) in [("10.0.0.1:40000", "10.0.0.2:80"), ("[fd00::1]:40000", "[fd00::2]:80")] {
            let (source, destination): (SocketAddr, SocketAddr) =
                (source.parse().unwrap(), destination.parse().unwrap());
            let frame = Packet::tcp(source, destination, SYN).extension(60, [0; 8]).frame();
            let parsed = SlicedPacket::from_ethernet(&frame).unwrap();
            let Some(etherparse::TransportSlice::Tcp(tcp)) = parsed.transport else { panic!("{parsed:?}") };
            assert_eq!(
                (tcp.source_port(), tcp.destination_port(), tcp.syn(), tcp.payload()),
                (40000, 80, true, &b"netlb"[..])
            );
        }
    }

    #[test]
    fn a_patched_header_sums_up() {
        let packet = Packet::udp("10.0.0.1:1".parse().unwrap(), "10.0.0.2:2".parse().unwrap());
        let mut frame = packet.frame();
        patch(&mut frame, 22, &[9]);
        assert_eq!(frame, packet.ttl(9).frame());
    }
}
