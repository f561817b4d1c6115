//! Flows: the 5-tuple of a frame, and its keyed fingerprint.

use crate::{
    addr::{Addr, Address, Ipv4Be, Ipv6Be, PortBe},
    conntrack::Segment,
    directory,
    maps::EndpointKey,
    wire::{
        Fields, Ignore, PacketBytes, Part, ethernet,
        ipv4::{self, Ipv4},
        ipv6::{self, Ipv6},
        tcp, udp,
    },
};

/// One direction of a flow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Tuple<A> {
    pub source: A,
    pub destination: A,
    pub source_port: PortBe,
    pub destination_port: PortBe,
    /// IANA protocol number.
    pub protocol: u8,
}

impl<A: Copy> Tuple<A> {
    /// From the destination to the source.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            source_port: self.destination_port,
            destination: self.source,
            destination_port: self.source_port,
            protocol: self.protocol,
        }
    }
}

/// A TCP or UDP packet, read once: everything the data path needs of it, so that no pointer into the packet outlives a helper call.
///
/// A later fragment has no transport header. Its ports are zero until it is [joined](crate::fragment::First::join) to the first one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Parsed<A> {
    pub tuple: Tuple<A>,
    /// Where the transport header stands, in bytes from the frame's start; 0 where there is none.
    pub transport: usize,
    /// The transport header's length, options included.
    pub transport_len: usize,
    pub ttl: u8,
    /// The IPv4 header checksum; zero for IPv6.
    pub ip_check: u16,
    /// The transport checksum.
    pub check: u16,
    /// Whether the sender forbade fragmentation. IPv6 routers never fragment.
    pub dont_fragment: bool,
    pub segment: Segment,
    pub part: Part,
    /// What the fragments of a datagram have in common.
    pub id: u32,
}

impl<A> Parsed<A> {
    /// Whether this has the transport header.
    #[inline(always)]
    #[must_use]
    pub const fn has_transport(&self) -> bool {
        self.transport != 0
    }
}

/// Where the IP header stands: frames are untagged Ethernet, others pass.
pub const NETWORK: usize = ethernet::LEN;

/// An address family as packets carry it.
pub trait Family: Address {
    /// Where the address pair begins in the IP header.
    const ADDRESSES: usize;
    const HEADER_LEN: usize;

    /// Reads source and destination of the packet whose Ethernet type is this family's: all that most packets are looked at for.
    fn addresses(packet: &(impl PacketBytes + ?Sized)) -> Result<(Self, Self), Ignore>;

    /// Reads the packet whose Ethernet type is this family's.
    fn parse(packet: &(impl PacketBytes + ?Sized)) -> Result<Parsed<Self>, Ignore>;
}

impl Family for Ipv4Be {
    const ADDRESSES: usize = ipv4::SOURCE;
    const HEADER_LEN: usize = ipv4::LEN;

    #[inline(always)]
    fn addresses(packet: &(impl PacketBytes + ?Sized)) -> Result<(Self, Self), Ignore> {
        let ip = Ipv4::at(packet, NETWORK)?;
        Ok((ip.source(), ip.destination()))
    }

    #[inline(always)]
    fn parse(packet: &(impl PacketBytes + ?Sized)) -> Result<Parsed<Self>, Ignore> {
        let ip = Ipv4::at(packet, NETWORK)?;
        let transport = NETWORK + ip.header_len()?;
        let protocol = ip.protocol();
        if protocol != tcp::PROTOCOL && protocol != udp::PROTOCOL {
            return Err(Ignore::NotTcpOrUdp);
        }
        let part = ip.part();
        let ends = Ends::parse(packet, protocol, transport, part)?;
        Ok(Parsed {
            tuple: ends.tuple(ip.source(), ip.destination(), protocol),
            transport: ends.at,
            transport_len: ends.len,
            ttl: ip.ttl(),
            ip_check: ip.check(),
            check: ends.check,
            dont_fragment: ip.dont_fragment(),
            segment: ends.segment,
            part,
            id: ip.id() as u32,
        })
    }
}

impl Family for Ipv6Be {
    const ADDRESSES: usize = ipv6::SOURCE;
    const HEADER_LEN: usize = ipv6::LEN;

    #[inline(always)]
    fn addresses(packet: &(impl PacketBytes + ?Sized)) -> Result<(Self, Self), Ignore> {
        let ip = Ipv6::at(packet, NETWORK)?;
        Ok((ip.source(), ip.destination()))
    }

    #[inline(always)]
    fn parse(packet: &(impl PacketBytes + ?Sized)) -> Result<Parsed<Self>, Ignore> {
        let ip = Ipv6::at(packet, NETWORK)?;
        let (source, destination, ttl) = (ip.source(), ip.destination(), ip.hop_limit());
        let ipv6::Transport { protocol, offset, part, id } =
            ipv6::transport(packet, ip.next_header(), NETWORK + ipv6::LEN)?;
        let ends = Ends::parse(packet, protocol, offset, part)?;
        Ok(Parsed {
            tuple: ends.tuple(source, destination, protocol),
            transport: ends.at,
            transport_len: ends.len,
            ttl,
            ip_check: 0,
            check: ends.check,
            dont_fragment: true,
            segment: ends.segment,
            part,
            id,
        })
    }
}

/// Whether a transport header follows an IP header without options, and all of both can be read: so it is with nearly all packets.
#[inline(always)]
pub fn has_plain_headers(packet: &(impl PacketBytes + ?Sized)) -> bool {
    let Ok(header) = packet.window(0, NETWORK + ipv4::LEN) else { return false };
    let (protocol, transport) = match header.half(ethernet::ETHER_TYPE) {
        ethernet::IPV4 if header.byte(NETWORK) == ipv4::PLAIN => (header.byte(NETWORK + ipv4::PROTOCOL), ipv4::LEN),
        ethernet::IPV6 => (header.byte(NETWORK + ipv6::NEXT_HEADER), ipv6::LEN),
        _ => return false,
    };
    let transport_len = match protocol {
        tcp::PROTOCOL => tcp::LEN,
        udp::PROTOCOL => udp::LEN,
        _ => return false,
    };
    packet.window(NETWORK + transport, transport_len).is_ok()
}

/// What the transport header says.
struct Ends {
    ports: (PortBe, PortBe),
    at: usize,
    len: usize,
    check: u16,
    segment: Segment,
}

impl Ends {
    #[inline(always)]
    fn parse(packet: &(impl PacketBytes + ?Sized), protocol: u8, offset: usize, part: Part) -> Result<Self, Ignore> {
        if part == Part::Later {
            let segment = Segment::of_protocol(protocol);
            return Ok(Self { ports: (PortBe(0), PortBe(0)), at: 0, len: 0, check: 0, segment });
        }
        if protocol == tcp::PROTOCOL {
            let header = packet.window(offset, tcp::LEN)?;
            Ok(Self {
                ports: (PortBe(header.half(0)), PortBe(header.half(2))),
                at: offset,
                len: (header.byte(tcp::DATA_OFFSET) >> 4) as usize * 4,
                check: header.half(tcp::CHECK),
                segment: Segment::from_control(header.byte(tcp::CONTROL)),
            })
        } else {
            let header = packet.window(offset, udp::LEN)?;
            Ok(Self {
                ports: (PortBe(header.half(0)), PortBe(header.half(2))),
                at: offset,
                len: udp::LEN,
                check: header.half(udp::CHECK),
                segment: Segment::DATAGRAM,
            })
        }
    }

    #[inline(always)]
    const fn tuple<A: Address>(&self, source: A, destination: A, protocol: u8) -> Tuple<A> {
        Tuple { source, destination, source_port: self.ports.0, destination_port: self.ports.1, protocol }
    }
}

/// The key of the fingerprints: random, drawn when the maps are made, kept with them.
///
/// The multipliers are odd and secret like the seeds: with public ones, differences that cancel could be chosen without knowing the
/// seeds, and with them the flows of one bucket.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[repr(C)]
pub struct HashKey {
    pub seeds: [u64; 2],
    pub multipliers: [u64; 2],
}

impl HashKey {
    /// No key yet.
    pub const ZERO: Self = Self { seeds: [0; 2], multipliers: [0; 2] };

    #[must_use]
    pub const fn new(random: [u64; 4]) -> Self {
        Self { seeds: [random[0], random[1]], multipliers: [random[2] | 1, random[3] | 1] }
    }

    /// A 64-bit hash of a 5-tuple: three 64-bit multiplications for IPv4, of which two go on at the same time, six for IPv6, and none of 128
    /// bits, which BPF lacks.
    #[inline(always)]
    #[must_use]
    pub fn hash<A: Address>(&self, tuple: &Tuple<A>) -> u64 {
        let ends = (tuple.source_port.0 as u64) << 32 | (tuple.destination_port.0 as u64) << 16 | tuple.protocol as u64;
        let ends = (ends ^ self.seeds[1]).wrapping_mul(self.multipliers[1]);
        let (mut hash, mut is_first) = (self.seeds[0], true);
        tuple.source.absorb_pair(tuple.destination, |word| {
            if !is_first {
                hash ^= hash >> 32;
            }
            hash = (hash ^ word).wrapping_mul(self.multipliers[0]);
            is_first = false;
        });
        hash = hash.wrapping_add(ends);
        hash ^= hash >> 32;
        hash = hash.wrapping_mul(self.multipliers[0]);
        hash ^ hash >> 32
    }

    /// The key of an entry of `SERVICES`.
    #[inline(always)]
    #[must_use]
    pub fn endpoint(&self, key: &EndpointKey) -> u64 {
        let EndpointKey { addr: Addr([a, b]), port, protocol, scope, .. } = *key;
        let end = (port.0 as u64) << 16 | (protocol as u64) << 8 | scope as u64;
        directory::key(self.mix(self.seeds[1] ^ a ^ end << 32, b))
    }

    /// A hash of two words, of which the first has a seed in it.
    #[inline(always)]
    pub(crate) const fn mix(&self, seeded: u64, word: u64) -> u64 {
        let mut hash = seeded.wrapping_mul(self.multipliers[0]);
        hash ^= hash >> 32;
        hash = (hash ^ word).wrapping_mul(self.multipliers[1]);
        hash ^= hash >> 29;
        hash = hash.wrapping_mul(self.multipliers[0]);
        hash ^ hash >> 32
    }

    /// The fingerprint of a flow's direction. IPv4 and IPv6 share the table: their inputs differ in length, hence in rounds.
    #[inline(always)]
    #[must_use]
    pub fn fingerprint<A: Address>(&self, tuple: &Tuple<A>) -> Fingerprint {
        match self.hash(tuple) {
            0 => Fingerprint(1),
            hash => Fingerprint(hash),
        }
    }
}

/// A flow's direction in 64 bits. Never 0, which marks a slot that was never used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Fingerprint(pub u64);

#[cfg(test)]
mod tests {
    use std::{vec, vec::Vec};

    use super::*;

    fn ipv4_frame() -> Vec<u8> {
        let mut frame = vec![0; 54];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14] = 0x45;
        frame[16..18].copy_from_slice(&40_u16.to_be_bytes());
        frame[22] = 64;
        frame[23] = 6;
        frame[26..30].copy_from_slice(&[10, 244, 1, 2]);
        frame[30..34].copy_from_slice(&[10, 96, 0, 10]);
        frame[34..36].copy_from_slice(&40000_u16.to_be_bytes());
        frame[36..38].copy_from_slice(&80_u16.to_be_bytes());
        frame[46] = 0x50;
        frame[47] = 0x02;
        frame
    }

    fn ipv6_frame(extensions: &[&[u8]], first: u8) -> Vec<u8> {
        let mut frame = vec![0; 14];
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame.extend([0x60, 0, 0, 0, 0, 0, first, 63]);
        frame.extend([0xfd; 16]);
        frame.extend([0xfe; 16]);
        for extension in extensions {
            frame.extend(*extension);
        }
        frame.extend([0x9c, 0x40, 0, 80, 0, 8, 0, 0]);
        frame
    }

    #[test]
    fn an_ipv4_segment_gives_its_tuple() {
        let parsed = Ipv4Be::parse(ipv4_frame().as_slice()).unwrap();
        assert_eq!(parsed.tuple.source.0.to_ne_bytes(), [10, 244, 1, 2]);
        assert_eq!(parsed.tuple.destination.0.to_ne_bytes(), [10, 96, 0, 10]);
        assert_eq!((parsed.tuple.source_port.get(), parsed.tuple.destination_port.get()), (40000, 80));
        assert!(parsed.segment.is_syn());
        assert_eq!(parsed.transport, 34);
    }

    #[test]
    fn plain_headers_are_told_from_all_others() {
        let ipv4 = ipv4_frame();
        assert!(has_plain_headers(ipv4.as_slice()));
        assert!(!has_plain_headers(&ipv4[..53]), "a cut one");
        let with = |at: usize, byte| {
            let mut frame = ipv4.clone();
            frame[at] = byte;
            frame
        };
        assert!(!has_plain_headers(with(14, 0x46).as_slice()), "options");
        assert!(!has_plain_headers(with(23, 1).as_slice()), "ICMP");
        assert!(!has_plain_headers(with(13, 0x06).as_slice()), "ARP");
        assert!(has_plain_headers(&with(23, 17)[..42]) && !has_plain_headers(&with(23, 17)[..41]));
        assert!(!has_plain_headers(&ipv4[..20]) && !has_plain_headers(&ipv4[..0]));

        let ipv6 = ipv6_frame(&[], 17);
        assert!(has_plain_headers(ipv6.as_slice()) && !has_plain_headers(&ipv6[..ipv6.len() - 1]));
        assert!(!has_plain_headers(ipv6_frame(&[], 6).as_slice()), "no more than eight bytes of TCP");
        assert!(!has_plain_headers(ipv6_frame(&[&[17, 0, 0, 0, 0, 0, 0, 0]], 0).as_slice()), "hop-by-hop options");
    }

    #[test]
    fn ipv4_options_move_the_transport_header() {
        let mut frame = ipv4_frame();
        frame[14] = 0x47;
        frame.splice(34..34, [1; 8]);
        let parsed = Ipv4Be::parse(frame.as_slice()).unwrap();
        assert_eq!((parsed.transport, parsed.tuple.destination_port.get()), (42, 80));
    }

    #[test]
    fn a_header_length_below_five_words_is_malformed() {
        let mut frame = ipv4_frame();
        frame[14] = 0x44;
        assert_eq!(Ipv4Be::parse(frame.as_slice()), Err(Ignore::Malformed));
    }

    #[test]
    fn a_frame_cut_at_any_length_is_truncated() {
        let frame = ipv4_frame();
        for len in 14..frame.len() {
            assert_eq!(Ipv4Be::parse(&frame[..len]), Err(Ignore::Truncated), "cut at {len}");
        }
        let frame = ipv6_frame(&[&[17, 0, 0, 0, 0, 0, 0, 0]], 0);
        for len in 14..frame.len() {
            assert_eq!(Ipv6Be::parse(&frame[..len]), Err(Ignore::Truncated), "cut at {len}");
        }
    }

    #[test]
    fn fragments_say_which_part_of_which_datagram_they_are() {
        for (flags, part) in [
            (0x0000_u16, Part::Whole),
            (0x4000, Part::Whole),
            (0x2000, Part::First),
            (0x6000, Part::First),
            (0x0001, Part::Later),
            (0x2010, Part::Later),
        ] {
            let mut frame = ipv4_frame();
            frame[18..20].copy_from_slice(&[0xab, 0xcd]);
            frame[20..22].copy_from_slice(&flags.to_be_bytes());
            let parsed = Ipv4Be::parse(frame.as_slice()).unwrap();
            assert_eq!((parsed.part, parsed.id), (part, u32::from(u16::from_ne_bytes([0xab, 0xcd]))), "{flags:04x}");
            let port = if part == Part::Later { 0 } else { 80 };
            assert_eq!((parsed.tuple.destination_port.get(), parsed.has_transport()), (port, port != 0), "{flags:04x}");
            assert!(part != Part::Later || parsed.segment.is_plain(), "a later fragment begins no connection");
        }
        for (low, part) in [(0, Part::Whole), (6, Part::Whole), (1, Part::First), (8, Part::Later), (9, Part::Later)] {
            let fragment = [17, 0, 0, low, 1, 2, 3, 4];
            let parsed = Ipv6Be::parse(ipv6_frame(&[&fragment], 44).as_slice()).unwrap();
            let id = if part == Part::Whole { 0 } else { u32::from_ne_bytes([1, 2, 3, 4]) };
            assert_eq!((parsed.part, parsed.id, parsed.has_transport()), (part, id, part != Part::Later), "{low}");
        }
    }

    #[test]
    fn a_later_fragment_needs_no_more_bytes_than_its_headers() {
        let mut frame = ipv4_frame();
        frame[20..22].copy_from_slice(&1_u16.to_be_bytes());
        assert!(Ipv4Be::parse(&frame[..34]).is_ok());
        let frame = ipv6_frame(&[&[17, 0, 0, 8, 0, 0, 0, 1]], 44);
        assert!(Ipv6Be::parse(&frame[..62]).is_ok());
        assert_eq!(Ipv6Be::parse(&frame[..61]), Err(Ignore::Truncated));
    }

    /// Whether it belongs to a TCP or UDP packet, only the first fragment tells.
    #[test]
    fn a_later_ipv6_fragment_may_begin_with_another_extension() {
        let parse = |next: u8| Ipv6Be::parse(ipv6_frame(&[&[next, 0, 0, 8, 0, 0, 0, 1]], 44).as_slice());
        assert_eq!(parse(60).unwrap().part, Part::Later);
        assert_eq!(parse(58), Err(Ignore::NotTcpOrUdp));
    }

    #[test]
    fn ipv6_extension_headers_are_passed_over() {
        let hop = [60, 0, 0, 0, 0, 0, 0, 0];
        let options = [44, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let atomic = [51, 0, 0, 0, 0, 0, 0, 1];
        let authentication = [43, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let routing = [17, 0, 0, 0, 0, 0, 0, 0];
        let frame = ipv6_frame(&[&hop, &options, &atomic, &authentication, &routing], 0);
        let parsed = Ipv6Be::parse(frame.as_slice()).unwrap();
        assert_eq!(parsed.tuple.destination_port.get(), 80);
        assert_eq!(parsed.transport, 54 + 8 + 16 + 8 + 12 + 8);
    }

    #[test]
    fn a_packet_still_under_way_by_a_routing_header_is_left_alone() {
        let routing = [17, 0, 0, 1, 0, 0, 0, 0];
        assert_eq!(Ipv6Be::parse(ipv6_frame(&[&routing], 43).as_slice()), Err(Ignore::NotTcpOrUdp));
    }

    #[test]
    fn too_many_extension_headers_are_left_alone() {
        let options: [&[u8]; 8] = [&[60, 0, 0, 0, 0, 0, 0, 0]; 8];
        assert_eq!(Ipv6Be::parse(ipv6_frame(&options, 60).as_slice()), Err(Ignore::NotTcpOrUdp));
    }

    #[test]
    fn every_part_of_a_tuple_changes_the_fingerprint() {
        let key = HashKey::new([1, 2, 3, 4]);
        let base = Ipv4Be::parse(ipv4_frame().as_slice()).unwrap().tuple;
        let mut seen = std::collections::HashSet::new();
        for bit in 0..32 {
            seen.insert(key.hash(&Tuple { source: Ipv4Be(base.source.0 ^ 1 << bit), ..base }));
            seen.insert(key.hash(&Tuple { destination: Ipv4Be(base.destination.0 ^ 1 << bit), ..base }));
        }
        for bit in 0..16 {
            seen.insert(key.hash(&Tuple { source_port: PortBe(base.source_port.0 ^ 1 << bit), ..base }));
            seen.insert(key.hash(&Tuple { destination_port: PortBe(base.destination_port.0 ^ 1 << bit), ..base }));
        }
        seen.insert(key.hash(&Tuple { protocol: 17, ..base }));
        seen.insert(key.hash(&base));
        assert_eq!(seen.len(), 32 * 2 + 16 * 2 + 2);
    }
}
