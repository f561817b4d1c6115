//! Putting a translation into a packet, checksums included.
//!
//! At TC the kernel's helpers are used for what offloads depend on: they know whether a checksum is complete, partial or still to be made.
//! Each call takes as long as all that was computed for it, so there are as few as can be: one tells the transport checksum of the new
//! addresses, and from what it made of it is seen which kind it is; the other one writes all the rest.
//!
//! - IPv4: the header checksum is recomputed here and written with the address in one go, so that the header still sums to zero and the
//!   device's sum over the packet (CHECKSUM_COMPLETE) stays right.
//! - IPv6 has no header checksum: its bytes are written with `BPF_F_RECOMPUTE_CSUM`, which carries the change into that sum; the pseudo
//!   header's change of the transport checksum then takes it out again.

use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use netlb_common::{
    addr::{Address, Ipv4Be, Ipv6Be, PortBe},
    balance::Translation,
    checksum::{self, Delta},
    conntrack::Direction,
    flow::{Family, NETWORK, Parsed, Tuple},
    hop::Way,
    wire::{Fields as _, PacketBytes as _, ethernet, ipv4, ipv6, tcp, udp},
};

use crate::frame::{Linear, Refused, Skb, Writable, Xdp};

/// A family whose packets can be rewritten.
pub(crate) trait Rewrite: Family {
    /// What is written of a packet up to the end of an IP header without options.
    type Head;
    /// Where that begins in a frame.
    const FIRST: usize;
    /// Bytes before it that are not written.
    const PAD: usize;
    /// Whether hardware addresses are a part of it.
    const HAS_HARDWARE: bool;
    /// How it is written.
    const FLAGS: u64;

    /// As it shall be: both addresses and the hops left. `delta` is the addresses' change, `old` has the frame.
    fn head(old: Linear, packet: &Parsed<Self>, new: &Tuple<Self>, exit: &Exit<'_>, delta: Delta) -> Self::Head;
}

/// How a packet leaves.
pub(crate) struct Exit<'a> {
    /// What its header shall say.
    pub(crate) ttl: u8,
    /// Hardware addresses, if it shall have others than it has.
    pub(crate) hardware: Option<&'a [u32; 3]>,
}

/// What is written by one call: headers up to the transport checksum.
#[repr(C)]
struct Headers<H, T> {
    head: H,
    ports: [PortBe; 2],
    /// What stands between ports and checksum.
    between: T,
    check: u16,
}

impl<H, T> Headers<H, T> {
    /// Where what is written ends: the compiler may add something.
    const END: usize = core::mem::offset_of!(Self, check) + size_of::<u16>();
}

/// Where that begins, after the ports.
const BETWEEN: usize = 4;

const _: () = assert!(core::mem::offset_of!(Headers<(), [u32; 3]>, check) == tcp::CHECK);
const _: () = assert!(core::mem::offset_of!(Headers<(), u16>, check) == udp::CHECK);

/// What a translation makes of a packet.
struct Change<A> {
    new: Tuple<A>,
    /// Of the sums of addresses and of ports.
    addresses: Delta,
    ports: Delta,
}

impl<A: Family> Change<A> {
    #[inline(always)]
    fn new(packet: &Parsed<A>, translation: &Translation<A>) -> Self {
        let old = &packet.tuple;
        let new = translation.apply(old);
        let (old_address, old_port) = match translation.direction {
            Direction::Forward => (old.destination, old.destination_port),
            Direction::Reply => (old.source, old.source_port),
        };
        let mut addresses = Delta::address(old_address, translation.address);
        let mut ports = Delta::half(old_port.0, translation.port.0);
        if translation.has_snat {
            let (old_address, old_port) = match translation.direction {
                Direction::Forward => (old.source, old.source_port),
                Direction::Reply => (old.destination, old.destination_port),
            };
            addresses = addresses.plus(Delta::address(old_address, translation.other));
            ports = ports.plus(Delta::half(old_port.0, translation.other_port.0));
        }
        Self { new, addresses, ports }
    }
}

/// Rewrites a packet.
#[inline(always)]
pub(crate) fn rewrite<A: Rewrite>(
    frame: &Skb,
    packet: &Parsed<A>,
    translation: &Translation<A>,
    exit: &Exit<'_>,
) -> Result<(), Refused> {
    let change = Change::new(packet, translation);
    let transport = NETWORK + A::HEADER_LEN;
    // Of a change that no sum shows, nothing is seen.
    let written = if packet.transport != transport || change.addresses.is_nothing() {
        rewrite_in_pieces(frame, packet, &change, exit)
    } else if packet.tuple.protocol == tcp::PROTOCOL {
        let check = checksum_of(frame, packet, &change, tcp::CHECK)?;
        let old = frame.window(0, transport + tcp::CHECK).map_err(|_| Refused)?;
        let between = [0, 4, 8].map(|at| old.word(transport + BETWEEN + at));
        write(frame, old, packet, &change, exit, (between, check))
    } else {
        // There may be none.
        let check = if packet.check == 0 { 0 } else { checksum_of(frame, packet, &change, udp::CHECK)? };
        let old = frame.window(0, transport + udp::CHECK).map_err(|_| Refused)?;
        let between = old.half(transport + BETWEEN);
        write(frame, old, packet, &change, exit, (between, check))
    };
    match exit.hardware {
        Some(addresses) if !A::HAS_HARDWARE => written.and_then(|()| frame.store(0, addresses, 0)),
        _ => written,
    }
}

/// Tells a packet's checksum, so far from the transport header, of the new addresses. Returns what it is to be with the new ports as well.
#[inline(always)]
fn checksum_of<A: Rewrite>(frame: &Skb, packet: &Parsed<A>, change: &Change<A>, at: usize) -> Result<u16, Refused> {
    let at = NETWORK + A::HEADER_LEN + at;
    frame.replace_checksum(at, 0, change.addresses.word() as u64, BPF_F_PSEUDO_HDR as u64)?;
    let check = frame.window(at, size_of::<u16>()).map_err(|_| Refused)?.half(0);
    // The ports are in the sum that a device has yet to make.
    if checksum::changed_as_partial(packet.check, check, change.addresses) {
        return Ok(check);
    }
    let is_tcp = packet.tuple.protocol == tcp::PROTOCOL;
    Ok(if is_tcp { checksum::update(check, change.ports) } else { checksum::update_to_udp(check, change.ports) })
}

/// Writes the headers of a packet without options, whose frame is `old`.
#[inline(always)]
fn write<A: Rewrite, T>(
    frame: &Skb,
    old: Linear,
    packet: &Parsed<A>,
    Change { new, addresses, .. }: &Change<A>,
    exit: &Exit<'_>,
    (between, check): (T, u16),
) -> Result<(), Refused> {
    let head = A::head(old, packet, new, exit, *addresses);
    let headers = Headers { head, ports: ends(new), between, check };
    frame.store_part(A::FIRST, &headers, A::PAD..Headers::<A::Head, T>::END, A::FLAGS)
}

/// Rewrites a packet with options, or a later fragment, which has no transport header.
#[inline(always)]
fn rewrite_in_pieces<A: Rewrite>(
    frame: &Skb,
    packet: &Parsed<A>,
    Change { new, addresses, ports }: &Change<A>,
    exit: &Exit<'_>,
) -> Result<(), Refused> {
    let old = frame.window(0, NETWORK + A::HEADER_LEN).map_err(|_| Refused)?;
    let head = A::head(old, packet, new, exit, *addresses);
    frame.store_part(A::FIRST, &head, A::PAD..size_of::<A::Head>(), A::FLAGS)?;
    // What the first fragment has of the checksum covers a later one as well.
    if !packet.has_transport() {
        return Ok(());
    }
    let (check, mangled) = if packet.tuple.protocol == tcp::PROTOCOL {
        (packet.transport + tcp::CHECK, 0)
    } else {
        (packet.transport + udp::CHECK, BPF_F_MARK_MANGLED_0 as u64)
    };
    // From 0 to the difference: the helper takes any change of a 32-bit sum.
    frame.replace_checksum(check, 0, addresses.word() as u64, BPF_F_PSEUDO_HDR as u64 | mangled)?;
    let (old, new) = (ends(&packet.tuple), ends(new));
    if old != new {
        frame.replace_checksum(check, 0, ports.word() as u64, mangled)?;
        frame.store::<[PortBe; 2]>(packet.transport, &new, 0)?;
    }
    Ok(())
}

#[inline(always)]
const fn ends<A>(tuple: &Tuple<A>) -> [PortBe; 2] {
    [tuple.source_port, tuple.destination_port]
}

/// An Ethernet header, and one of IPv4 (RFC 791 §3.1).
#[repr(C)]
pub(crate) struct HeadV4 {
    /// So that the rest is aligned.
    pad: u16,
    hardware: [u16; 6],
    ether_type: u16,
    version_to_len: u32,
    id_to_offset: u32,
    ttl_and_protocol: [u8; 2],
    check: u16,
    source: Ipv4Be,
    destination: Ipv4Be,
}

const _: () = assert!(size_of::<HeadV4>() == Ipv4Be::PAD + NETWORK + ipv4::LEN);

impl Rewrite for Ipv4Be {
    type Head = HeadV4;
    const FIRST: usize = 0;
    const PAD: usize = 2;
    const HAS_HARDWARE: bool = true;
    const FLAGS: u64 = 0;

    #[inline(always)]
    fn head(old: Linear, packet: &Parsed<Self>, new: &Tuple<Self>, exit: &Exit<'_>, delta: Delta) -> HeadV4 {
        let protocol = packet.tuple.protocol;
        let half = |ttl| u16::from_ne_bytes([ttl, protocol]);
        HeadV4 {
            pad: 0,
            hardware: match exit.hardware {
                Some(addresses) => halves(*addresses),
                None => [0, 2, 4, 6, 8, 10].map(|at| old.half(at)),
            },
            ether_type: ethernet::IPV4,
            version_to_len: old.word(NETWORK),
            id_to_offset: old.word(NETWORK + ipv4::ID),
            ttl_and_protocol: [exit.ttl, protocol],
            check: checksum::update(packet.ip_check, delta.plus(Delta::half(half(packet.ttl), half(exit.ttl)))),
            source: new.source,
            destination: new.destination,
        }
    }
}

/// The same as they lie in memory.
#[inline(always)]
const fn halves(words: [u32; 3]) -> [u16; 6] {
    // SAFETY: plain integers, of the same size.
    unsafe { core::mem::transmute(words) }
}

/// A header of IPv6 (RFC 8200 §3).
#[repr(C)]
pub(crate) struct HeadV6 {
    class_and_label: u32,
    payload_len: u16,
    next_header: u8,
    hop_limit: u8,
    source: Ipv6Be,
    destination: Ipv6Be,
}

const _: () = assert!(size_of::<HeadV6>() == ipv6::LEN);

impl Rewrite for Ipv6Be {
    type Head = HeadV6;
    const FIRST: usize = NETWORK;
    const PAD: usize = 0;
    // A device's sum begins past them.
    const HAS_HARDWARE: bool = false;
    const FLAGS: u64 = BPF_F_RECOMPUTE_CSUM as u64;

    #[inline(always)]
    fn head(old: Linear, _: &Parsed<Self>, new: &Tuple<Self>, exit: &Exit<'_>, _: Delta) -> HeadV6 {
        HeadV6 {
            class_and_label: old.word(NETWORK),
            payload_len: old.half(NETWORK + ipv6::PAYLOAD_LEN),
            next_header: old.byte(NETWORK + ipv6::NEXT_HEADER),
            hop_limit: exit.ttl,
            source: new.source,
            destination: new.destination,
        }
    }
}

const _: () = assert!(Ipv6Be::LEN == 16);

/// A family whose packets can be rewritten where they lie.
pub(crate) trait RewriteInPlace: Family {
    /// Where the length stands in the IP header, and what it does not count of the packet.
    const LENGTH: (usize, usize);

    /// Writes the IP header: both addresses, and one hop less. `delta` is the addresses' change.
    fn write_in_place(frame: Writable, packet: &Parsed<Self>, source: Self, destination: Self, delta: Delta);
}

/// The longest way to a transport header that is gone: the verifier forgets what parsing knew.
const MOST_HEADERS: usize = 512;

/// Rewrites a packet, hardware addresses included, or leaves it as it is.
#[inline(always)]
pub(crate) fn rewrite_in_place<A: RewriteInPlace>(
    frame: &Xdp,
    packet: &Parsed<A>,
    translation: &Translation<A>,
    way: &Way,
) -> Result<(), Refused> {
    let tuple = &packet.tuple;
    let is_tcp = tuple.protocol == tcp::PROTOCOL;
    let at = packet.transport;
    if at > MOST_HEADERS {
        return Err(Refused);
    }
    let check = if is_tcp { tcp::CHECK } else { udp::CHECK };
    let transport = frame.window_mut(at, if is_tcp { tcp::CHECK + 2 } else { udp::LEN })?;
    let frame = frame.window_mut(0, NETWORK + A::HEADER_LEN)?;

    if is_partial(frame, packet) {
        return Err(Refused);
    }

    let Change { new, addresses, ports } = Change::new(packet, translation);
    let [a, b, c] = way.addresses;
    frame.set(0, a);
    frame.set(4, b);
    frame.set(8, c);
    A::write_in_place(frame, packet, new.source, new.destination, addresses);
    let delta = addresses.plus(ports);
    let sum = if is_tcp { checksum::update(packet.check, delta) } else { checksum::update_udp(packet.check, delta) };
    transport.set(check, sum);
    transport.set(0, ends(&new));
    Ok(())
}

/// Whether a packet's checksum is yet to be made. A sender on this machine may have left it to its device, which has not seen it: then the sum
/// is that of the pseudo header, and only the kernel knows. `frame` has the IP header.
#[inline(always)]
pub(crate) fn is_partial<A: RewriteInPlace>(frame: Writable, packet: &Parsed<A>) -> bool {
    let tuple = &packet.tuple;
    let (length, uncounted) = A::LENGTH;
    let len = u16::from_be(frame.half(NETWORK + length)) as usize;
    let transport_len = NETWORK + uncounted + len - packet.transport;
    let pseudo = tuple.source.sum()
        + tuple.destination.sum()
        + (tuple.protocol as u16).to_be() as u64
        + (transport_len as u16).to_be() as u64;
    packet.check == !checksum::finish(pseudo) && packet.check != 0
}

impl RewriteInPlace for Ipv4Be {
    const LENGTH: (usize, usize) = (ipv4::TOTAL_LEN, 0);

    #[inline(always)]
    fn write_in_place(frame: Writable, packet: &Parsed<Self>, source: Self, destination: Self, delta: Delta) {
        frame.set(NETWORK + ipv4::TTL, packet.ttl - 1);
        frame.set(NETWORK + ipv4::CHECK, checksum::update(packet.ip_check, delta.plus(Delta::HOP)));
        frame.set(NETWORK + ipv4::SOURCE, source);
        frame.set(NETWORK + ipv4::DESTINATION, destination);
    }
}

impl RewriteInPlace for Ipv6Be {
    const LENGTH: (usize, usize) = (ipv6::PAYLOAD_LEN, ipv6::LEN);

    #[inline(always)]
    fn write_in_place(frame: Writable, packet: &Parsed<Self>, source: Self, destination: Self, _: Delta) {
        frame.set(NETWORK + ipv6::HOP_LIMIT, packet.ttl - 1);
        for (at, word) in [source.0[0], source.0[1], destination.0[0], destination.0[1]].into_iter().enumerate() {
            frame.set(NETWORK + ipv6::SOURCE + 8 * at, word);
        }
    }
}
