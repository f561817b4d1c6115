//! Packets in packets. A balancing node wraps what comes from outside for a backend of another node, which unwraps it, and whose replies go
//! to the client straight from there.
//!
//! What is wrapped is the packet as it came, but for the hop that this node is (RFC 2003 §3.1). The outer header has its traffic class,
//! and for IPv6 its flow label. It forbids fragmentation: nobody would put the pieces together before they are unwrapped.

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM},
    helpers::bpf_redirect,
};
use netlb_common::{
    addr::{Addr, Ipv4Be, Ipv6Be, PortBe},
    balance::{self, At, Known, Lookup, Scope, Tables as _, Translation, Verdict},
    checksum::{self, Delta},
    counters::Counter,
    flow::{NETWORK, Tuple},
    maps::{address, role},
    tunnel::{Inner, Tunnel, unwrapped_class},
    wire::{Fields, Ignore, PacketBytes as _, Part, ethernet, ipv4, ipv6},
};

use crate::{
    DROP, NEXT,
    answer::{Answer, Header4, Header6, TTL},
    forward::{self, Outcome},
    frame::{Frame as _, Linear, Refused, Skb},
    maps::{self, Errand, Kernel, Work},
    pipeline::Packet,
    subprograms::{self, Hook},
};

pub(crate) mod tc;
pub(crate) mod xdp;

/// A family whose packets are wrapped.
pub(crate) trait Wrapping: Tunnel + Answer {
    /// As it stands in a frame.
    const ETHER_TYPE: u16;
    /// The bytes of a header from this one on have the hops left.
    const HOP: usize;
    /// Them, and what changes with them.
    type Hop: Copy;

    /// The header around a packet.
    fn around(packet: Linear, source: Self, destination: Self) -> Self::Header;

    /// The bytes at [`HOP`](Self::HOP) with one hop less.
    fn one_hop_less(packet: Linear) -> Self::Hop;

    /// Gives the packet another traffic class. Returns the header's checksum after that.
    fn set_traffic_class(frame: &Skb, class: u8) -> Result<u16, Refused>;
}

/// Half-words that stand next to each other.
#[inline(always)]
const fn pair(a: u8, b: u8) -> u16 {
    u16::from_ne_bytes([a, b])
}

impl Wrapping for Ipv4Be {
    const ETHER_TYPE: u16 = ethernet::IPV4;
    const HOP: usize = ipv4::TTL;
    /// With the protocol and the checksum.
    type Hop = [u16; 2];

    #[inline(always)]
    fn around(packet: Linear, source: Self, destination: Self) -> Header4 {
        // What is longer than the field can say is cut into segments, each with a length of its own, or has no length.
        let len = u16::from_be(packet.half(ipv4::TOTAL_LEN)) as u32;
        let len = if len == 0 || len + ipv4::LEN as u32 > u16::MAX as u32 { 0 } else { len as u16 + ipv4::LEN as u16 };
        let class = packet.byte(ipv4::TRAFFIC_CLASS);
        let mut header = Header4 {
            version_and_len: 0x45,
            service: class,
            total_len: len.to_be(),
            id: 0,
            fragment: 0x4000_u16.to_be(),
            ttl: TTL,
            protocol: Self::INNER,
            check: 0,
            source,
            destination,
        };
        let sum = pair(0x45, class) as u64
            + header.total_len as u64
            + header.fragment as u64
            + pair(TTL, Self::INNER) as u64
            + source.0 as u64
            + destination.0 as u64;
        header.check = checksum::finish(sum);
        header
    }

    #[inline(always)]
    fn one_hop_less(packet: Linear) -> [u16; 2] {
        let (ttl, protocol) = (packet.byte(ipv4::TTL), packet.byte(ipv4::PROTOCOL));
        let hops = pair(ttl.wrapping_sub(1), protocol);
        [hops, checksum::update(packet.half(ipv4::CHECK), Delta::HOP)]
    }

    #[inline(always)]
    fn set_traffic_class(frame: &Skb, class: u8) -> Result<u16, Refused> {
        let header = frame.window(NETWORK, ipv4::LEN).map_err(|_| Refused)?;
        let first = header.byte(0);
        let change = Delta::half(pair(first, header.byte(ipv4::TRAFFIC_CLASS)), pair(first, class));
        let check = checksum::update(header.half(ipv4::CHECK), change);
        frame.store(NETWORK + ipv4::TRAFFIC_CLASS, &class, 0)?;
        frame.store(NETWORK + ipv4::CHECK, &check, 0)?;
        Ok(check)
    }
}

impl Wrapping for Ipv6Be {
    const ETHER_TYPE: u16 = ethernet::IPV6;
    const HOP: usize = ipv6::HOP_LIMIT;
    type Hop = u8;

    #[inline(always)]
    fn around(packet: Linear, source: Self, destination: Self) -> Header6 {
        let len = u16::from_be(packet.half(ipv6::PAYLOAD_LEN)) as u32;
        let len = if len == 0 || len + ipv6::LEN as u32 > u16::MAX as u32 { 0 } else { len as u16 + ipv6::LEN as u16 };
        Header6 {
            // With traffic class and flow label.
            version: packet.word(0),
            payload_len: len.to_be(),
            next_header: Self::INNER,
            hop_limit: TTL,
            source,
            destination,
        }
    }

    #[inline(always)]
    fn one_hop_less(packet: Linear) -> u8 {
        packet.byte(ipv6::HOP_LIMIT).wrapping_sub(1)
    }

    #[inline(always)]
    fn set_traffic_class(frame: &Skb, class: u8) -> Result<u16, Refused> {
        let header = frame.window(NETWORK, ipv6::LEN).map_err(|_| Refused)?;
        let bytes = [header.byte(0) & 0xf0 | class >> 4, header.byte(1) & 0xf | class << 4];
        frame.store(NETWORK, &bytes, BPF_F_RECOMPUTE_CSUM as u64)?;
        Ok(0)
    }
}

/// The ends of the packet around a packet: what routing is asked about.
#[inline(always)]
fn question<A: Wrapping>(source: A, destination: A) -> Tuple<A> {
    let port = PortBe(0);
    Tuple { source, destination, source_port: port, destination_port: port, protocol: A::INNER }
}

/// Wraps the packet that a frame has.
#[inline(always)]
fn put<A: Wrapping>(frame: &Skb, source: A, destination: A) -> Result<(), Refused> {
    let packet = frame.window(NETWORK, A::HEADER_LEN).map_err(|_| Refused)?;
    let header = A::around(packet, source, destination);
    let hop = A::one_hop_less(packet);
    let recompute = BPF_F_RECOMPUTE_CSUM as u64;
    frame.store(NETWORK + A::HOP, &hop, recompute)?;
    frame.add_header(A::HEADER_LEN, A::IS_V6)?;
    frame.store(NETWORK, &header, recompute)?;
    maps::count(Counter::DsrWrapped);
    Ok(())
}

/// Sends an ICMP error about a flow's packets to where those go: wrapped to the backend, which sent what it quotes.
#[inline(always)]
pub(crate) fn wrap_error<A: Packet>(frame: &Skb, errand: &Errand<A>) -> i32 {
    // The kernel says "time exceeded".
    if errand.error.outer.ttl <= 1 {
        maps::count(Counter::TtlExpired);
        return NEXT;
    }
    let (source, destination) = (errand.meaning.source, errand.meaning.destination);
    let len = (frame.len() as usize - NETWORK + A::HEADER_LEN) as u16;
    let route = forward::route_datagram(frame, len, &question(source, destination), frame.interface());
    match route.outcome {
        Outcome::Nowhere => {
            maps::count(Counter::NoRoute);
            return DROP;
        }
        // About an error nobody may say so.
        Outcome::TooBig => {
            maps::count(Counter::DsrTooBig);
            return DROP;
        }
        _ => {}
    }
    if put(frame, source, destination).is_err() {
        return forward::refused();
    }
    maps::count(Counter::IcmpTranslated);
    match route.outcome {
        Outcome::Stack => forward::to_stack(),
        outcome => forward::send(frame, &route.way(), outcome),
    }
}

/// Takes a packet out of the one that another node put around it, if it is for a backend behind this node or for the node itself, and sends
/// it on. Everything else passes as it came. The result may say that it is too long, as that of [`dispatch`](crate::tc::dispatch) does.
///
/// Part of the program itself: there is not stack enough below one more subprogram.
#[inline(always)]
pub(crate) fn receive<A: Packet>(frame: &Skb, scope: Scope) -> i32
where
    Skb: Hook<A>,
{
    let found = A::read_wrapped(frame, scope);
    let Some(place) = maps::work::<A>() else { return NEXT };
    // SAFETY: this CPU's, and filled in wherever it is read.
    let work = unsafe { &mut *maps::forget(place) };
    match found {
        Wrapped::PASS => return NEXT,
        Wrapped::DROP => return DROP,
        Wrapped::KNOWN | Wrapped::LOCAL | Wrapped::PIECE => {}
        Wrapped::CHANGED => A::tend(work),
        Wrapped(at) => {
            if A::adopt(work, At(at)) != Verdict::Translate {
                return DROP;
            }
        }
    }
    match A::unwrap(frame, found) {
        UNWRAPPED => frame.dispatch(work),
        result => result,
    }
}

/// What is in a wrapped packet, as one word: what a subprogram returns. Beside these it is an [`At`]: the first packet of a flow, and its
/// backend.
#[derive(Clone, Copy, Eq, PartialEq)]
#[repr(transparent)]
pub(crate) struct Wrapped(pub(crate) u64);

impl Wrapped {
    /// Nothing for this node.
    pub(crate) const PASS: Self = Self(u64::MAX - 1);
    /// Counted already.
    pub(crate) const DROP: Self = Self(u64::MAX - 2);
    /// A packet of a flow, as [`Known::Translate`] and [`Known::Tend`].
    const KNOWN: Self = Self(u64::MAX - 3);
    const CHANGED: Self = Self(u64::MAX - 4);
    /// For the node itself.
    const LOCAL: Self = Self(u64::MAX - 5);
    /// A fragment, or ICMP: what it belongs to is found out when it comes in by itself.
    const PIECE: Self = Self(u64::MAX - 6);
}

/// What becomes of a packet that was [unwrapped](unwrap), beside the results of programs: it is sent on.
const UNWRAPPED: i32 = 1 << 18;

/// Finds out what is in a wrapped packet.
#[inline(always)]
pub(crate) fn read<A: Packet>(frame: &Skb, scope: Scope) -> Wrapped {
    if maps::interface(frame.interface()).is_none_or(|interface| interface.role != role::UPLINK) {
        return Wrapped::PASS;
    }
    let Ok((source, to)) = A::addresses(frame) else { return Wrapped::PASS };
    if !subprograms::unwraps_from(source.to_map()) || !A::is_plain(frame) {
        return Wrapped::PASS;
    }
    let inner = Inner::of::<A>(frame);
    let Ok((source, destination)) = A::addresses(&inner) else { return Wrapped::PASS };
    let Some(place) = maps::work::<A>() else { return Wrapped::PASS };
    let packet = match A::parse(&inner) {
        Ok(packet) if packet.part != Part::Later => packet,
        Ok(_) | Err(Ignore::NotTcpOrUdp) => {
            let is_ours = Kernel.address(destination.to_map()) & (address::SERVICE | address::NODE) != 0;
            return if is_ours && !A::leads_on(frame) { Wrapped::PIECE } else { Wrapped::PASS };
        }
        Err(_) => {
            maps::count(Counter::Malformed);
            return Wrapped::PASS;
        }
    };
    let Some(candidate) = balance::candidate(&Kernel, scope, source, destination) else {
        return local::<A>(frame, destination.to_map());
    };
    // SAFETY: this CPU's; a field is written before it is read.
    let work = unsafe {
        (&raw mut (*place).packet).write(packet);
        &mut *maps::forget(place)
    };
    work.lookup =
        Lookup { fingerprint: Kernel.hash_key().fingerprint(&work.packet.tuple), now: maps::now(), candidate, scope };
    work.translation = Translation::none();
    // SAFETY: the same reference.
    let work = unsafe { &mut *maps::forget(work) };
    match A::claim(work, to.to_map()) {
        Known::Translate => return Wrapped::KNOWN,
        Known::Tend => return Wrapped::CHANGED,
        _ => {}
    }
    match A::backend_at(work, to.to_map()) {
        At::NO_SERVICE => local::<A>(frame, work.packet.tuple.destination.to_map()),
        // On its way to another node.
        _ if A::leads_on(frame) => Wrapped::PASS,
        At::NOBODY => {
            maps::count(Counter::DsrNoBackend);
            Wrapped::DROP
        }
        At(at) => Wrapped(at),
    }
}

/// What a packet in a wrapped one says of itself: whether it belongs to a flow to the address that it was wrapped for.
#[inline(always)]
pub(crate) fn claim<A: Packet>(work: &mut Work<A>, to: Addr) -> Known {
    let known = balance::known(Kernel, &work.packet, &work.lookup, |_| true, &mut work.translation);
    if balance::belongs(known, &work.translation, to) { known } else { Known::No }
}

/// Whether a wrapped packet is for another node: it would leave by an uplink again.
#[inline(always)]
pub(crate) fn leads_on<A: Packet>(frame: &Skb) -> bool {
    let Ok((source, destination)) = A::addresses(frame) else { return true };
    let route = forward::route_datagram(frame, 0, &question(source, destination), frame.interface());
    matches!(route.outcome, Outcome::Resolved | Outcome::Unresolved | Outcome::TooBig)
        && maps::interface(route.interface).is_some_and(|interface| interface.role == role::UPLINK)
}

/// What becomes of a packet of no service: the node has it, if it is for it.
#[inline(always)]
fn local<A: Packet>(frame: &Skb, destination: Addr) -> Wrapped {
    if Kernel.address(destination) & address::NODE != 0 && !A::leads_on(frame) { Wrapped::LOCAL } else { Wrapped::PASS }
}

/// Takes the outer header away. [`UNWRAPPED`] if the packet under way is to be sent on.
#[inline(always)]
pub(crate) fn unwrap<A: Packet>(frame: &Skb, found: Wrapped) -> i32 {
    let classes = (A::traffic_class(frame, NETWORK), A::traffic_class(frame, NETWORK + A::HEADER_LEN));
    let (Ok(outer), Ok(inner)) = classes else { return NEXT };
    let Some(class) = unwrapped_class(outer, inner) else {
        maps::count(Counter::DsrCongested);
        return DROP;
    };
    if frame.remove_header(A::HEADER_LEN).is_err() {
        return forward::refused();
    }
    let Some(work) = maps::work::<A>() else { return DROP };
    maps::count(Counter::DsrUnwrapped);
    if class != inner {
        let Ok(check) = A::set_traffic_class(frame, class) else { return forward::refused() };
        // SAFETY: this CPU's.
        unsafe { (*work).packet.ip_check = check };
    }
    if found == Wrapped::LOCAL {
        return NEXT;
    }
    // SAFETY: the same; it was filled in for what is no piece.
    let is_sent = found != Wrapped::PIECE && unsafe { (*work).packet.part == Part::Whole && (*work).packet.ttl > 1 };
    if is_sent {
        return UNWRAPPED;
    }
    // It comes in by itself: later fragments ask for their first one where fragments are joined, and that no hop is left the kernel says.
    // SAFETY: plain integers.
    unsafe { bpf_redirect(frame.interface(), BPF_F_INGRESS as u64) as i32 }
}
