//! Putting a translation into a packet, checksums included.
//!
//! The kernel's helpers are used for what offloads depend on: they know whether a checksum is complete, partial or still to be made.
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
    flow::{Family, NETWORK, Parsed},
    wire::{ipv4, ipv6, tcp, udp},
};

use crate::frame::{Frame, Refused};

/// A family whose packets can be rewritten.
pub(crate) trait Rewrite: Family {
    /// Writes the IP header: both addresses and the hops left. `delta` is the addresses' change.
    fn write_header(frame: &Frame, packet: &Parsed<Self>, new: &Ends<Self>, delta: Delta) -> Result<(), Refused>;
}

/// What the packet shall say.
pub(crate) struct Ends<A> {
    pub(crate) source: A,
    pub(crate) destination: A,
    pub(crate) ttl: u8,
}

/// Rewrites a packet; `ttl` is what it shall say.
#[inline(always)]
pub(crate) fn rewrite<A: Rewrite>(
    frame: &Frame,
    packet: &Parsed<A>,
    translation: &Translation<A>,
    ttl: u8,
) -> Result<(), Refused> {
    let tuple = &packet.tuple;
    let (old_address, old_port, ends, ports) = match translation.direction {
        Direction::Forward => (
            tuple.destination,
            tuple.destination_port,
            Ends { source: tuple.source, destination: translation.address, ttl },
            [tuple.source_port, translation.port],
        ),
        Direction::Reply => (
            tuple.source,
            tuple.source_port,
            Ends { source: translation.address, destination: tuple.destination, ttl },
            [translation.port, tuple.destination_port],
        ),
    };
    let delta = Delta::address(old_address, translation.address);
    let (check, mangled) = if tuple.protocol == tcp::PROTOCOL {
        (packet.transport + tcp::CHECK, 0)
    } else {
        (packet.transport + udp::CHECK, BPF_F_MARK_MANGLED_0 as u64)
    };
    A::write_header(frame, packet, &ends, delta)?;
    // From 0 to the difference: the helper takes any change of a 32-bit sum.
    frame.replace_checksum(check, 0, delta.0 as u64, BPF_F_PSEUDO_HDR as u64 | mangled)?;
    if old_port != translation.port {
        frame.replace_checksum(check, old_port.0 as u64, translation.port.0 as u64, mangled | 2)?;
        frame.store::<[PortBe; 2]>(packet.transport, &ports, 0)?;
    }
    Ok(())
}

impl Rewrite for Ipv4Be {
    #[inline(always)]
    fn write_header(frame: &Frame, packet: &Parsed<Self>, new: &Ends<Self>, delta: Delta) -> Result<(), Refused> {
        /// From the time to live to the destination (RFC 791 §3.1).
        #[repr(C)]
        struct Part {
            ttl_and_protocol: [u8; 2],
            check: u16,
            source: Ipv4Be,
            destination: Ipv4Be,
        }
        const { assert!(ipv4::TTL + size_of::<Part>() == ipv4::LEN) };
        let protocol = packet.tuple.protocol;
        let hops = Delta::half(u16::from_ne_bytes([packet.ttl, protocol]), u16::from_ne_bytes([new.ttl, protocol]));
        let part = Part {
            ttl_and_protocol: [new.ttl, protocol],
            check: checksum::update(packet.ip_check, delta.plus(hops)),
            source: new.source,
            destination: new.destination,
        };
        frame.store(NETWORK + ipv4::TTL, &part, 0)
    }
}

impl Rewrite for Ipv6Be {
    #[inline(always)]
    fn write_header(frame: &Frame, packet: &Parsed<Self>, new: &Ends<Self>, _: Delta) -> Result<(), Refused> {
        let recompute = BPF_F_RECOMPUTE_CSUM as u64;
        if new.ttl != packet.ttl {
            frame.store(NETWORK + ipv6::HOP_LIMIT, &new.ttl, recompute)?;
        }
        frame.store(NETWORK + ipv6::SOURCE, &[new.source.0, new.destination.0], recompute)
    }
}

const _: () = assert!(Ipv6Be::LEN == 16);
