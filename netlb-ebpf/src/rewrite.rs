//! Putting a translation into a packet, checksums included.
//!
//! At TC the kernel's helpers are used for what offloads depend on: they know whether a checksum is complete, partial or still to be made.
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
    wire::{ipv4, ipv6, tcp, udp},
};

use crate::frame::{Refused, Skb, Writable, Xdp};

/// A family whose packets can be rewritten.
pub(crate) trait Rewrite: Family {
    /// Writes the IP header: both addresses and the hops left. `delta` is the addresses' change. Says whether the ports were written as well.
    fn write_header(frame: &Skb, packet: &Parsed<Self>, new: &Ends<Self>, delta: Delta) -> Result<bool, Refused>;
}

/// What the packet shall say.
pub(crate) struct Ends<A> {
    pub(crate) source: A,
    pub(crate) destination: A,
    pub(crate) ports: [PortBe; 2],
    pub(crate) ttl: u8,
}

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

/// Rewrites a packet; `ttl` is what it shall say.
#[inline(always)]
pub(crate) fn rewrite<A: Rewrite>(
    frame: &Skb,
    packet: &Parsed<A>,
    translation: &Translation<A>,
    ttl: u8,
) -> Result<(), Refused> {
    let Change { new, addresses, ports } = Change::new(packet, translation);
    let (check, mangled) = if packet.tuple.protocol == tcp::PROTOCOL {
        (packet.transport + tcp::CHECK, 0)
    } else {
        (packet.transport + udp::CHECK, BPF_F_MARK_MANGLED_0 as u64)
    };
    let Tuple { source, destination, .. } = new;
    let has_ports = A::write_header(frame, packet, &Ends { source, destination, ports: ends(&new), ttl }, addresses)?;
    // A later fragment: what the first one has of the checksum covers it as well.
    if !has_ports && !packet.has_transport() {
        return Ok(());
    }
    // From 0 to the difference: the helper takes any change of a 32-bit sum.
    frame.replace_checksum(check, 0, addresses.word() as u64, BPF_F_PSEUDO_HDR as u64 | mangled)?;
    let (old, new) = (ends(&packet.tuple), ends(&new));
    if old != new {
        frame.replace_checksum(check, 0, ports.word() as u64, mangled)?;
        if !has_ports {
            frame.store::<[PortBe; 2]>(packet.transport, &new, 0)?;
        }
    }
    Ok(())
}

#[inline(always)]
const fn ends<A>(tuple: &Tuple<A>) -> [PortBe; 2] {
    [tuple.source_port, tuple.destination_port]
}

impl Rewrite for Ipv4Be {
    #[inline(always)]
    fn write_header(frame: &Skb, packet: &Parsed<Self>, new: &Ends<Self>, delta: Delta) -> Result<bool, Refused> {
        /// From the time to live to the destination (RFC 791 §3.1), and on to the ports where there are no options: each call costs.
        #[repr(C)]
        struct Part<T> {
            ttl_and_protocol: [u8; 2],
            check: u16,
            source: Ipv4Be,
            destination: Ipv4Be,
            ports: T,
        }
        const { assert!(ipv4::TTL + size_of::<Part<()>>() == ipv4::LEN && size_of::<Part<[PortBe; 2]>>() == 16) };
        let protocol = packet.tuple.protocol;
        let hops = Delta::half(u16::from_ne_bytes([packet.ttl, protocol]), u16::from_ne_bytes([new.ttl, protocol]));
        let part = Part {
            ttl_and_protocol: [new.ttl, protocol],
            check: checksum::update(packet.ip_check, delta.plus(hops)),
            source: new.source,
            destination: new.destination,
            ports: new.ports,
        };
        let has_ports = packet.transport == NETWORK + ipv4::LEN;
        if has_ports {
            frame.store(NETWORK + ipv4::TTL, &part, 0)?;
        } else {
            let Part { ttl_and_protocol, check, source, destination, .. } = part;
            frame.store(NETWORK + ipv4::TTL, &Part { ttl_and_protocol, check, source, destination, ports: () }, 0)?;
        }
        Ok(has_ports)
    }
}

impl Rewrite for Ipv6Be {
    #[inline(always)]
    fn write_header(frame: &Skb, packet: &Parsed<Self>, new: &Ends<Self>, _: Delta) -> Result<bool, Refused> {
        let recompute = BPF_F_RECOMPUTE_CSUM as u64;
        if new.ttl != packet.ttl {
            frame.store(NETWORK + ipv6::HOP_LIMIT, &new.ttl, recompute)?;
        }
        frame.store(NETWORK + ipv6::SOURCE, &[new.source.0, new.destination.0], recompute)?;
        Ok(false)
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
