//! ICMP errors about packets that this node has wrapped.
//!
//! A router between the node and a backend tells the node, which has sent the outer packet. What it says is for the client, which has sent
//! the inner one: a packet that is too long is to be shorter by what is put around it, and whatever else keeps packets from the backend,
//! to the client is a host that cannot be reached (RFC 2003 §4, RFC 2473 §8).

use crate::{
    addr::{Ipv4Be, Ipv6Be, PortBe},
    balance::Tables,
    filter::{self, Kind},
    flow::{NETWORK, Tuple},
    icmp::Messages,
    table::Data,
    time::Ticks,
    tunnel::{Inner, Tunnel},
    wire::{Fields, Ignore, PacketBytes, icmp},
};

/// A family whose errors are relayed.
pub trait Relays: Messages + Tunnel {
    /// The shortest that every way takes: nothing shorter is asked for, and who says less has no number to say.
    const LEAST_MTU: u32;

    /// What an error says of the way.
    fn of_way(header: impl Fields) -> Takes;
}

/// How long a packet may be that a way takes, as one number: the verifier accepts no undefined values, which the parts of an enum would be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(transparent)]
pub struct Takes(pub u32);

impl Takes {
    /// None gets there.
    pub const NONE: Self = Self(0);
    /// Shorter ones, and nobody says how long.
    pub const SHORTER: Self = Self(u32::MAX);
    /// It is not about that.
    pub const UNSAID: Self = Self(u32::MAX - 1);

    #[inline(always)]
    const fn at_most<A: Relays>(mtu: u32) -> Self {
        if mtu < A::LEAST_MTU || mtu > u16::MAX as u32 { Self::SHORTER } else { Self(mtu) }
    }

    /// The same of what has one more header around it on this way.
    #[inline(always)]
    const fn within<A: Relays>(self) -> Self {
        match self {
            Self::NONE | Self::SHORTER | Self::UNSAID => self,
            Self(mtu) if mtu < A::LEAST_MTU + A::HEADER_LEN as u32 => Self(A::LEAST_MTU),
            Self(mtu) => Self(mtu - A::HEADER_LEN as u32),
        }
    }
}

impl Relays for Ipv4Be {
    /// RFC 791.
    const LEAST_MTU: u32 = 68;

    /// RFC 792, RFC 1191 §4.
    #[inline(always)]
    fn of_way(header: impl Fields) -> Takes {
        match (header.byte(0), header.byte(1)) {
            (3, 4) => Takes::at_most::<Self>(u16::from_be(header.half(6)) as u32),
            (3 | 11, _) => Takes::NONE,
            _ => Takes::UNSAID,
        }
    }
}

impl Relays for Ipv6Be {
    /// RFC 8200 §5.
    const LEAST_MTU: u32 = 1280;

    /// RFC 4443 §3.
    #[inline(always)]
    fn of_way(header: impl Fields) -> Takes {
        match header.byte(0) {
            2 => Takes::at_most::<Self>(u32::from_be(header.word(4))),
            1 | 3 | 4 => Takes::NONE,
            _ => Takes::UNSAID,
        }
    }
}

/// An error about a wrapped packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Told<A> {
    /// From where to where it was wrapped.
    pub around: [A; 2],
    /// What was in it.
    pub inner: Tuple<A>,
    /// How long that may be.
    pub takes: Takes,
}

/// Where an error quotes, behind headers without options: those who have any are left alone.
#[inline(always)]
#[must_use]
pub const fn quote_at<A: Tunnel>() -> usize {
    NETWORK + A::HEADER_LEN + icmp::LEN
}

/// Where that has the inner packet.
#[inline(always)]
#[must_use]
pub const fn inner_at<A: Tunnel>() -> usize {
    quote_at::<A>() + A::HEADER_LEN
}

/// The packet that begins at an offset, as if it were alone.
#[inline(always)]
const fn packet_at<P: ?Sized>(packet: &P, at: usize) -> Inner<'_, P> {
    Inner::behind(packet, at - NETWORK)
}

/// Reads what an error about a packet in a packet says of the way, and from where to where that went. Returns where the error ends.
#[inline(always)]
fn read_around<A: Relays>(packet: &(impl PacketBytes + ?Sized), told: &mut Told<A>) -> Result<usize, Ignore> {
    let (outer, message, end) = A::outer(packet)?;
    if message + icmp::LEN != quote_at::<A>() {
        return Err(Ignore::NotTcpOrUdp);
    }
    let takes = A::of_way(packet.window(quote_at::<A>() - icmp::LEN, icmp::LEN)?);
    let quote = packet_at(packet, quote_at::<A>());
    let protocol = packet.window(quote_at::<A>() + A::PROTOCOL_AT, 1)?.byte(0);
    let (source, destination) = A::addresses(&quote)?;
    // Errors go to who sent the packet; others are forged or lost.
    if takes == Takes::UNSAID || protocol != A::INNER || !A::is_plain(&quote) || outer.destination != source {
        return Err(Ignore::NotTcpOrUdp);
    }
    (told.around, told.takes) = ([source, destination], takes.within::<A>());
    Ok(end)
}

/// Reads what was in that packet.
#[inline(always)]
fn read_inner<A: Relays>(packet: &(impl PacketBytes + ?Sized), end: usize, told: &mut Told<A>) -> Result<(), Ignore> {
    let inner = packet_at(packet, inner_at::<A>());
    let (header, transport) = A::carried(&inner, NETWORK)?;
    // What a frame has beyond its packet is nobody's.
    if inner_at::<A>() - NETWORK + transport + icmp::QUOTED > end {
        return Err(Ignore::Truncated);
    }
    let ends = inner.window(transport, icmp::QUOTED)?;
    told.inner = Tuple {
        source: header.source,
        destination: header.destination,
        source_port: PortBe(ends.half(0)),
        destination_port: PortBe(ends.half(2)),
        protocol: header.protocol,
    };
    Ok(())
}

/// Reads an error about a packet that this node may have wrapped. Says whether it tells enough.
#[inline(always)]
pub fn read<A: Relays, T: Tables>(
    tables: &T,
    packet: &(impl PacketBytes + ?Sized),
    told: &mut Told<A>,
) -> Result<bool, Ignore> {
    let end = read_around(packet, told)?;
    let [source, destination] = told.around;
    // Whatever else of the node makes packets in packets is none of ours.
    if tables.source_index(source.to_map()) == 0
        || !tables.filter_has(filter::bit(destination, Kind::Backend, tables.filter_bits_log2()))
    {
        return Err(Ignore::NotTcpOrUdp);
    }
    Ok(told.takes != Takes::SHORTER && read_inner(packet, end, told).is_ok())
}

/// Whether an error is about a flow that is wrapped like that.
///
/// It is no packet of the flow: nothing is noted in the flow table.
#[inline(always)]
pub fn is_known<A: Relays, T: Tables>(tables: T, told: &Told<A>, now: Ticks) -> bool {
    let fingerprint = tables.hash_key().fingerprint(&told.inner);
    let data = tables.probe(fingerprint, now);
    if data == Data::NONE || !data.is_wrapped() {
        return false;
    }
    let source = tables.source(tables.snat(fingerprint, now).source());
    let (Some(backend), Some(source)) = (tables.backend(data.id()), source) else { return false };
    [A::from_map(source), A::from_map(backend.addr)] == told.around
}

#[cfg(test)]
mod tests;
