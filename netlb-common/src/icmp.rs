//! ICMP errors that quote a translated packet, and what makes them errors about the packet that was sent.
//!
//! An error goes to the sender of the packet that it quotes. Turned round, the quoted tuple is that of the other direction, whose slot says
//! what the packet was before its translation:
//!
//! | quoted | slot | goes to | then quotes |
//! |---|---|---|---|
//! | a request: client, or the node in its place, to backend | reply | client | client to frontend |
//! | a reply: frontend to client | forward | backend | backend to client, or to the node in its place |
//!
//! The error's own source stays where it is a router's: whoever traces a path wants it. An end of the flow that says something itself is
//! called what the receiver knows it by.
//!
//! A quoted echo request is a packet of a flow as well, if it was masqueraded: see [`ping`](crate::ping).

use crate::{
    addr::{Address, Ipv4Be, Ipv6Be, PortBe},
    balance::{Scope, Tables, Translation},
    checksum::{self, Delta},
    conntrack::Direction,
    filter::{self, Kind},
    flow::{NETWORK, Tuple},
    ping,
    stray::Strays,
    time::Ticks,
    wire::{
        Fields as _, Ignore, PacketBytes, Part,
        icmp::{self, v4, v6},
        ipv4::Ipv4,
        ipv6::{self, Ipv6, Transport},
        tcp, udp,
    },
};

/// What an IP header says that a translation changes or needs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Header<A> {
    pub source: A,
    pub destination: A,
    /// IPv4 only; zero for IPv6.
    pub check: u16,
    pub ttl: u8,
    pub protocol: u8,
}

impl<A: Address> Header<A> {
    /// The same with other addresses and hops left.
    #[inline(always)]
    #[must_use]
    pub fn with(&self, source: A, destination: A, ttl: u8) -> Self {
        let mut new = Self { source, destination, ttl, ..*self };
        if !A::IS_V6 {
            let hops =
                Delta::half(u16::from_ne_bytes([self.ttl, self.protocol]), u16::from_ne_bytes([ttl, self.protocol]));
            new.check = checksum::update(self.check, self.change_to(&new).plus(hops));
        }
        new
    }

    /// The change of the sum of both addresses.
    #[inline(always)]
    #[must_use]
    pub fn change_to(&self, new: &Self) -> Delta {
        Delta::address(self.source, new.source).plus(Delta::address(self.destination, new.destination))
    }
}

/// An ICMP error, read once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Error<A> {
    pub outer: Header<A>,
    pub quoted: Header<A>,
    /// Where the ICMP header stands, in bytes from the frame's start.
    pub message: usize,
    /// Where the quoted transport header stands.
    pub transport: usize,
    /// The quoted ports; of an echo the identifier, and its number.
    pub ports: [PortBe; 2],
    /// The quoted transport checksum, if the quotation goes that far.
    pub check: u16,
    pub has_check: bool,
}

/// A family whose errors can be read.
pub trait Messages: Strays {
    /// Where the protocol's number stands in an IP header without extensions.
    const PROTOCOL_AT: usize;

    /// Whether messages of a type quote a packet.
    fn is_error(kind: u8) -> bool;

    /// What stands there of a fragment.
    const PROTOCOL_OF_FRAGMENT: u8;

    /// The header of a packet of ICMP or a fragment of one, where the message begins, which part it is, and what all parts have in common.
    fn part(packet: &(impl PacketBytes + ?Sized)) -> Result<(Header<Self>, usize, Part, u32), Ignore>;

    /// The header of the packet, where the message begins, and where it ends.
    fn outer(packet: &(impl PacketBytes + ?Sized)) -> Result<(Header<Self>, usize, usize), Ignore>;

    /// The header of a packet of TCP or UDP behind at most the header of its first fragment, and where its transport header begins.
    fn carried(packet: &(impl PacketBytes + ?Sized), at: usize) -> Result<(Header<Self>, usize), Ignore>;

    /// The header of a quoted packet, and where its transport header begins. Of ICMP only if that is wanted.
    fn quoted(
        packet: &(impl PacketBytes + ?Sized),
        at: usize,
        wants_icmp: bool,
    ) -> Result<(Header<Self>, usize), Ignore>;
}

impl Messages for Ipv4Be {
    const PROTOCOL_AT: usize = crate::wire::ipv4::PROTOCOL;
    const PROTOCOL_OF_FRAGMENT: u8 = v4::PROTOCOL;

    #[inline(always)]
    fn part(packet: &(impl PacketBytes + ?Sized)) -> Result<(Header<Self>, usize, Part, u32), Ignore> {
        let ip = Ipv4::at(packet, NETWORK)?;
        let message = NETWORK + ip.header_len()?;
        if ip.protocol() != v4::PROTOCOL {
            return Err(Ignore::NotTcpOrUdp);
        }
        Ok((header(ip), message, ip.part(), ip.id() as u32))
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        v4::is_error(kind)
    }

    #[inline(always)]
    fn outer(packet: &(impl PacketBytes + ?Sized)) -> Result<(Header<Self>, usize, usize), Ignore> {
        let ip = Ipv4::at(packet, NETWORK)?;
        let message = NETWORK + ip.header_len()?;
        // Neither a part of an error nor one that is yet to be put together can be summed.
        if ip.protocol() != v4::PROTOCOL || ip.part() != Part::Whole {
            return Err(Ignore::NotTcpOrUdp);
        }
        Ok((header(ip), message, NETWORK + ip.total_len() as usize))
    }

    #[inline(always)]
    fn carried(packet: &(impl PacketBytes + ?Sized), at: usize) -> Result<(Header<Self>, usize), Ignore> {
        Self::quoted(packet, at, false)
    }

    #[inline(always)]
    fn quoted(
        packet: &(impl PacketBytes + ?Sized),
        at: usize,
        wants_icmp: bool,
    ) -> Result<(Header<Self>, usize), Ignore> {
        let ip = Ipv4::at(packet, at)?;
        let transport = at + ip.header_len()?;
        // A first fragment has the ports, a later one does not.
        let is_wanted = is_balanced(ip.protocol()) || wants_icmp && ip.protocol() == v4::PROTOCOL;
        if !is_wanted || ip.part() == Part::Later {
            return Err(Ignore::NotTcpOrUdp);
        }
        Ok((header(ip), transport))
    }
}

#[inline(always)]
fn header(ip: Ipv4<impl crate::wire::Fields>) -> Header<Ipv4Be> {
    Header {
        source: ip.source(),
        destination: ip.destination(),
        check: ip.check(),
        ttl: ip.ttl(),
        protocol: ip.protocol(),
    }
}

impl Messages for Ipv6Be {
    const PROTOCOL_AT: usize = ipv6::NEXT_HEADER;
    const PROTOCOL_OF_FRAGMENT: u8 = ipv6::FRAGMENT;

    #[inline(always)]
    fn part(packet: &(impl PacketBytes + ?Sized)) -> Result<(Header<Self>, usize, Part, u32), Ignore> {
        let ip = Ipv6::at(packet, NETWORK)?;
        let (source, destination, ttl) = (ip.source(), ip.destination(), ip.hop_limit());
        let (protocol, message, part, id) = behind_fragment(packet, ip.next_header(), NETWORK + ipv6::LEN)?;
        if protocol != v6::PROTOCOL {
            return Err(Ignore::NotTcpOrUdp);
        }
        Ok((Header { source, destination, check: 0, ttl, protocol }, message, part, id))
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        v6::is_error(kind)
    }

    #[inline(always)]
    fn outer(packet: &(impl PacketBytes + ?Sized)) -> Result<(Header<Self>, usize, usize), Ignore> {
        let ip = Ipv6::at(packet, NETWORK)?;
        if ip.next_header() != v6::PROTOCOL {
            return Err(Ignore::NotTcpOrUdp);
        }
        let (source, destination, ttl) = (ip.source(), ip.destination(), ip.hop_limit());
        let message = NETWORK + ipv6::LEN;
        Ok((
            Header { source, destination, check: 0, ttl, protocol: v6::PROTOCOL },
            message,
            message + ip.payload_len() as usize,
        ))
    }

    #[inline(always)]
    fn carried(packet: &(impl PacketBytes + ?Sized), at: usize) -> Result<(Header<Self>, usize), Ignore> {
        let ip = Ipv6::at(packet, at)?;
        let (source, destination, ttl) = (ip.source(), ip.destination(), ip.hop_limit());
        let (protocol, offset, part, _) = behind_fragment(packet, ip.next_header(), at + ipv6::LEN)?;
        if !is_balanced(protocol) || part == Part::Later {
            return Err(Ignore::NotTcpOrUdp);
        }
        Ok((Header { source, destination, check: 0, ttl, protocol }, offset))
    }

    #[inline(always)]
    fn quoted(
        packet: &(impl PacketBytes + ?Sized),
        at: usize,
        wants_icmp: bool,
    ) -> Result<(Header<Self>, usize), Ignore> {
        let ip = Ipv6::at(packet, at)?;
        let (source, destination, ttl) = (ip.source(), ip.destination(), ip.hop_limit());
        if wants_icmp {
            let (protocol, offset, part, _) = behind_fragment(packet, ip.next_header(), at + ipv6::LEN)?;
            if protocol == v6::PROTOCOL && part != Part::Later {
                return Ok((Header { source, destination, check: 0, ttl, protocol }, offset));
            }
        }
        let Transport { protocol, offset, part, .. } = ipv6::transport(packet, ip.next_header(), at + ipv6::LEN)?;
        // A first fragment has the ports, a later one does not.
        if part == Part::Later {
            return Err(Ignore::NotTcpOrUdp);
        }
        Ok((Header { source, destination, check: 0, ttl, protocol }, offset))
    }
}

/// What stands behind the fragment header, if one stands at an offset: the protocol, where, which part it is, and what all have in common.
#[inline(always)]
fn behind_fragment(
    packet: &(impl PacketBytes + ?Sized),
    next_header: u8,
    at: usize,
) -> Result<(u8, usize, Part, u32), Ignore> {
    if next_header != ipv6::FRAGMENT {
        return Ok((next_header, at, Part::Whole, 0));
    }
    let fragment = packet.window(at, ipv6::FRAGMENT_LEN)?;
    let (part, id) = ipv6::part(fragment);
    Ok((fragment.byte(0), at + ipv6::FRAGMENT_LEN, part, id))
}

#[inline(always)]
const fn is_balanced(protocol: u8) -> bool {
    protocol == tcp::PROTOCOL || protocol == udp::PROTOCOL
}

/// Reads the error in a frame. `has_echoes` says whether there are flows of them.
#[inline(always)]
pub fn read<A: Messages>(packet: &(impl PacketBytes + ?Sized), has_echoes: bool) -> Result<Error<A>, Ignore> {
    let (outer, message, end) = A::outer(packet)?;
    if !A::is_error(packet.window(message, icmp::LEN)?.byte(0)) {
        return Err(Ignore::NotTcpOrUdp);
    }
    let (quoted, transport) = A::quoted(packet, message + icmp::LEN, has_echoes)?;
    // What a frame has beyond its packet is nobody's.
    if transport + icmp::QUOTED > end {
        return Err(Ignore::Truncated);
    }
    let kind = packet.window(transport, icmp::QUOTED)?.byte(0);
    let is_echo = has_echoes && quoted.protocol == A::ICMP;
    if is_echo && kind != A::ECHO_REQUEST {
        return Err(Ignore::NotTcpOrUdp);
    }
    let ends = packet.window(transport + if is_echo { ping::IDENTIFIER } else { 0 }, 4)?;
    let at = check_of::<A>(quoted.protocol);
    let has_check = transport + at + 2 <= end;
    Ok(Error {
        outer,
        quoted,
        message,
        transport,
        ports: [PortBe(ends.half(0)), PortBe(ends.half(2))],
        check: if has_check { packet.window(transport + at, 2)?.half(0) } else { 0 },
        has_check,
    })
}

/// Where a transport header has its checksum.
#[inline(always)]
const fn check_of<A: Messages>(protocol: u8) -> usize {
    if protocol == tcp::PROTOCOL {
        tcp::CHECK
    } else if protocol == A::ICMP {
        icmp::CHECK
    } else {
        udp::CHECK
    }
}

/// What an error shall say: its ends, and the packet that its receiver sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Meaning<A> {
    pub source: A,
    pub destination: A,
    pub quoted: Tuple<A>,
    /// Whether the flow has an address of the node as its source: the kernel would forward nothing that comes in with it or goes to it.
    pub has_snat: bool,
    /// Whether it goes on as it is, wrapped from `source` to `destination`, as the packets of its flow do.
    pub is_wrapped: bool,
}

/// What is written into an error's packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Edit<A> {
    pub outer: Header<A>,
    pub quoted: Header<A>,
    pub ports: [PortBe; 2],
    /// The quoted transport checksum, if the quotation goes that far.
    pub check: u16,
    /// The change of the sum of the outer addresses, which ICMPv6 covers and ICMP does not.
    pub addresses: Delta,
    /// The change of the sum of what is quoted.
    pub message: Delta,
}

impl<A: Messages> Error<A> {
    #[inline(always)]
    const fn is_echo(&self) -> bool {
        self.quoted.protocol == A::ICMP
    }

    /// The quoted packet's tuple.
    #[inline(always)]
    #[must_use]
    pub const fn tuple(&self) -> Tuple<A> {
        let [source_port, destination_port] = match self.ports {
            [identifier, _] if self.is_echo() => [identifier, PortBe(0)],
            ports => ports,
        };
        let Header { source, destination, protocol, .. } = self.quoted;
        Tuple { source, destination, source_port, destination_port, protocol }
    }

    /// Where the quoted transport checksum stands.
    #[inline(always)]
    #[must_use]
    pub const fn check_at(&self) -> usize {
        self.transport + check_of::<A>(self.quoted.protocol)
    }

    /// Where the quoted ports stand, or what is in their place.
    #[inline(always)]
    #[must_use]
    pub const fn ports_at(&self) -> usize {
        self.transport + if self.is_echo() { ping::IDENTIFIER } else { 0 }
    }

    /// What is to be written; `ttl` is what the error's own header shall say.
    #[inline(always)]
    #[must_use]
    pub fn edit(&self, meaning: &Meaning<A>, ttl: u8) -> Edit<A> {
        let Meaning { source, destination, quoted: Tuple { source_port, destination_port, .. }, .. } = *meaning;
        let outer = self.outer.with(source, destination, ttl);
        let quoted = self.quoted.with(meaning.quoted.source, meaning.quoted.destination, self.quoted.ttl);
        let new = match self.ports {
            [_, number] if self.is_echo() => [source_port, number],
            _ => [source_port, destination_port],
        };
        let ports = Delta::half(self.ports[0].0, new[0].0).plus(Delta::half(self.ports[1].0, new[1].0));
        let addresses = self.quoted.change_to(&quoted);
        // ICMP knows no pseudo header, ICMPv6 does.
        let covered = if self.is_echo() && !A::IS_V6 { ports } else { addresses.plus(ports) };
        let check = if !self.has_check {
            self.check
        } else if self.quoted.protocol == udp::PROTOCOL {
            checksum::update_udp(self.check, covered)
        } else {
            checksum::update(self.check, covered)
        };
        let checks = Delta::half(self.check, check).plus(Delta::half(self.quoted.check, quoted.check));
        Edit {
            outer,
            quoted,
            ports: new,
            check,
            addresses: self.outer.change_to(&outer),
            message: addresses.plus(ports).plus(checks),
        }
    }
}

/// Whether an error may be about a packet that was translated. Most that are not end here.
#[inline(always)]
pub fn is_candidate<A: Messages>(tables: &impl Tables, error: &Error<A>, scope: Scope) -> bool {
    let bits = tables.filter_bits_log2();
    let (source, destination) = (error.quoted.source, error.quoted.destination);
    tables.filter_has(filter::bit(error.quoted.destination, Kind::Backend, bits))
        || tables.filter_has(filter::bit(error.quoted.source, Kind::Frontend, bits))
        || (scope == Scope::Replies && tables.is_masqueraded(destination.to_map(), source.to_map()))
}

/// What an error about a translated packet shall say. None if it is about no such packet, or if another hook translates it.
///
/// It is no packet of the flow: nothing is noted in the flow table.
#[inline(always)]
pub fn translate<A: Messages, T: Tables>(tables: T, error: &Error<A>, scope: Scope, now: Ticks) -> Option<Meaning<A>> {
    let Error { outer, quoted, .. } = error;
    // Errors go to who sent the packet; others are forged or lost.
    if outer.destination != quoted.source {
        return None;
    }
    let other = error.tuple().reversed();
    let fingerprint = tables.hash_key().fingerprint(&other);
    let found = tables.find(fingerprint, now)?;
    let direction = found.data.direction();
    let has_snat = found.data.has_snat();
    if !scope.translates(found.data) {
        return None;
    }
    let mut translation = match direction {
        _ if found.data.is_masqueraded() => Translation::masqueraded(direction, &other),
        Direction::Forward => Translation::to_backend(tables.backend(found.data.id())?, false),
        Direction::Reply => Translation::to_frontend(tables.frontend(found.data.id())?),
    };
    if has_snat && !translation.read_other(tables, fingerprint, found) {
        return None;
    }
    if found.data.is_wrapped() {
        let (source, destination) = (translation.other, translation.address);
        return Some(Meaning { source, destination, quoted: error.tuple(), has_snat, is_wrapped: true });
    }
    let sent = translation.apply(&other).reversed();
    let source = if outer.source == quoted.destination { sent.destination } else { outer.source };
    Some(Meaning { source, destination: sent.source, quoted: sent, has_snat, is_wrapped: false })
}

#[cfg(test)]
mod tests;
