//! Replies to echo requests (RFC 792, RFC 4443 §4): the request itself, turned round.

use aya_ebpf::bindings::BPF_F_RECOMPUTE_CSUM;
use netlb_common::{
    addr::{Ipv4Be, Ipv6Be},
    checksum::{self, Delta},
    flow::NETWORK,
    stray::Strays,
    wire::{
        PacketBytes as _,
        ipv4::{self, Ipv4},
        ipv6::{self, Ipv6},
    },
};

use super::TTL;
use crate::frame::{Refused, Skb};

/// A family whose headers can be turned round.
pub(crate) trait Echo: Strays {
    /// Exchanges the addresses, which leaves every sum as it is, and sets the hops left.
    fn turn(frame: &Skb) -> Result<(), Refused>;
}

#[inline(always)]
pub(super) fn write<A: Echo>(frame: &Skb) -> Result<(), Refused> {
    const CHECK: usize = 2;
    let at = NETWORK + A::HEADER_LEN;
    frame.window(at, CHECK + 2).map_err(|_| Refused)?;
    let kind = |kind: u8| u16::from_ne_bytes([kind, 0]) as u64;
    A::turn(frame)?;
    frame.store(at, &A::ECHO_REPLY, 0)?;
    frame.replace_checksum(at + CHECK, kind(A::ECHO_REQUEST), kind(A::ECHO_REPLY), 2)
}

impl Echo for Ipv4Be {
    #[inline(always)]
    fn turn(frame: &Skb) -> Result<(), Refused> {
        #[repr(C)]
        struct Part {
            ttl_and_protocol: [u8; 2],
            check: u16,
            source: Ipv4Be,
            destination: Ipv4Be,
        }
        const { assert!(ipv4::TTL + size_of::<Part>() == ipv4::LEN) };
        let ip = Ipv4::at(frame, NETWORK).map_err(|_| Refused)?;
        let (ttl, protocol) = (ip.ttl(), ip.protocol());
        let hops = Delta::half(u16::from_ne_bytes([ttl, protocol]), u16::from_ne_bytes([TTL, protocol]));
        let part = Part {
            ttl_and_protocol: [TTL, protocol],
            check: checksum::update(ip.check(), hops),
            source: ip.destination(),
            destination: ip.source(),
        };
        frame.store(NETWORK + ipv4::TTL, &part, 0)
    }
}

impl Echo for Ipv6Be {
    #[inline(always)]
    fn turn(frame: &Skb) -> Result<(), Refused> {
        let ip = Ipv6::at(frame, NETWORK).map_err(|_| Refused)?;
        let turned = [ip.destination().0, ip.source().0];
        frame.store(NETWORK + ipv6::HOP_LIMIT, &TTL, BPF_F_RECOMPUTE_CSUM as u64)?;
        frame.store(NETWORK + ipv6::SOURCE, &turned, 0)
    }
}
